"""The bench against other runtimes: its arithmetic, its classes, its engines and processes."""

import gc
import json
import weakref
from pathlib import Path
from time import sleep
from typing import Any

import numpy as np
import pytest

import hetsched
from bench import classes, engines, families, models, peers
from bench.engines import OPENVINO, ORT, OURS, SPINNING, Engine
from bench.models import CATALOGUE
from bench.timing import Times, geometric_mean
from bench.turns import Worker
from hetsched import oracle
from hetsched.errors import HetschedError, InputError
from hetsched.graph import to_onnx
from hetsched.host import cores

# Hundredths of a second that a signal may take to arrive.
PATIENCE = 500
MADE = [model for model in CATALOGUE if model.make]


def times(median: float) -> dict[str, float]:
    return {
        "median": median,
        "first_quartile": median,
        "third_quartile": median,
        "least": median,
        "count": 15,
    }


def row(model: str, ours: float, peer: float, dtype: str = "float32") -> dict[str, Any]:
    both = {OURS: times(ours), ORT: times(peer), OPENVINO: times(peer * 2)}
    found = {
        "model": model,
        "dtype": dtype,
        "class": classes.class_of(model, dtype),
        "families": classes.families_of(model),
        "reason": "",
        "refused": {},
        "deviations": {OURS: {"output": 1e-6}},
        "compile_seconds": 1.0,
        "interleaved": both,
        "apart": both,
    }
    return found | peers.figures(found)


def test_quartiles() -> None:
    found = Times.of([float(value) for value in range(1, 8)])
    assert (found.first_quartile, found.median, found.third_quartile) == (2, 4, 6)
    assert (found.least, found.count, found.spread) == (1, 7, 2)


def test_geometric_mean() -> None:
    assert geometric_mean([1.0, 8.0, 27.0]) == pytest.approx(6.0)
    assert geometric_mean([]) is None


def test_the_figure_is_of_the_fastest_peer() -> None:
    found = row("resnet18", ours=2.0, peer=3.0)
    assert (found["fastest_apart"], found["figure_apart"]) == (ORT, 1.5)


def test_no_figure_without_a_peer() -> None:
    alone = {"interleaved": {OURS: times(1.0)}, "apart": {ORT: times(1.0)}}
    found = peers.figures(alone)
    assert found["figure_interleaved"] is None
    assert found["figure_apart"] is None


def test_summary() -> None:
    rows = [
        row("resnet18", 1.0, 2.0),
        row("unet", 1.0, 0.5),
        row("mobilenet_v2", 1.0, 1.0),
        row("resnet18_int8", 1.0, 100.0, "int8"),
        {**row("vit_b_16", 1.0, 1.0), "reason": "refused"},
    ]
    rows[-1]["figure_apart"] = rows[-1]["figure_interleaved"] = None
    found = peers.summary(rows)
    means = {name: mean["apart"] for name, mean in found["means"].items()}
    assert means["3x3"] == means["all float32"] == pytest.approx(1.0)
    assert means["transposed convolution"] == pytest.approx(0.5)
    assert means["int8"] == pytest.approx(100.0)
    assert means["transformer"] is None
    assert found["below"] == {"interleaved": {"unet": 0.5}, "apart": {"unet": 0.5}}
    assert found["failed"] == {"vit_b_16": "refused"}


def test_later_rows_count() -> None:
    earlier = [row("unet", 1.0, 1.0), row("resnet18", 1.0, 1.0)]
    found = peers.merged(earlier, [row("unet", 1.0, 2.0), row("lenet5", 1.0, 1.0)])
    assert [item["model"] for item in found] == ["lenet5", "resnet18", "unet"]
    assert found[-1]["figure_apart"] == 2.0


def test_classes_name_models_that_there_are() -> None:
    known = {model.name for model in CATALOGUE}
    for table in (classes.MODELS, classes.FAMILIES):
        for names in table.values():
            assert set(names) <= known
    listed = [name for names in classes.MODELS.values() for name in names]
    assert len(listed) == len(set(listed))
    assert {model.name for model in MADE if not model.name.endswith("_int8")} <= {
        name for names in classes.FAMILIES.values() for name in names
    }


def test_dtype_of_a_quantised_model() -> None:
    proto = families.temporal(0)
    assert engines.dtype(proto) == "float32"
    proto.graph.node[0].op_type = "QuantizeLinear"
    assert engines.dtype(proto) == "int8"


def test_device_of_threads() -> None:
    assert engines.device(1) == f"cpu:{cores()[0]}"
    with pytest.raises(HetschedError, match="need as many cores"):
        engines.device(len(cores()) + 1)


@pytest.mark.parametrize("model", MADE, ids=lambda model: model.name)
def test_a_made_model_means_what_its_import_means(model: models.Model) -> None:
    proto = models.load(model)
    graph = hetsched.read_onnx(proto)
    inputs = models.inputs(model, graph)
    ((_, expected),) = oracle.run(proto, inputs).items()
    ((_, found),) = oracle.run(to_onnx(graph), inputs).items()
    assert np.isfinite(expected).all()
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("width", [71, 73, 149])
def test_ragged_widths_are_what_they_are_called(width: int) -> None:
    model = next(m for m in MADE if m.name == f"width_{width}")
    graph = hetsched.read_onnx(models.load(model))
    convolved = [op.outputs[0].shape for op in graph.ops if op.kind == "Conv"]
    assert all(shape[2:] == (width, width) for shape in convolved)


@pytest.mark.parametrize("bind", [True, False])
@pytest.mark.parametrize("name", engines.PEERS)
def test_peers_compute_the_model(name: str, bind: bool) -> None:
    if name not in engines.installed((name,)):
        pytest.skip(engines.INSTALL)
    model = next(m for m in models.models() if m.name == "silero_vad_16k_op15")
    proto = engines.bound(models.load(model), model.shapes)
    inputs = models.inputs(model, hetsched.read_onnx(proto))
    expected_by_name = oracle.run(proto, inputs)
    engine = engines.open_peer(name, proto, inputs, 1, bind)
    # The engine shares the memory of its inputs, and keeps it.
    kept = [weakref.ref(array) for array in inputs.values()]
    del inputs
    gc.collect()
    assert all(array() is not None for array in kept)
    engine.run()
    for key, expected in expected_by_name.items():
        np.testing.assert_allclose(engine.outputs()[key], expected, atol=1e-5)
    engine.close()


class Counting:
    """An engine that does nothing but fail when it is asked to at once."""

    def __init__(self, reason: str) -> None:
        if reason:
            raise engines.EngineRefuses(reason)

    def run(self) -> None: ...

    def outputs(self) -> dict[str, np.ndarray]:
        return {}

    def close(self) -> None: ...


def opened(reason: str) -> Engine:
    return Counting(reason)


def test_workers_take_turns() -> None:
    with Worker("a", cores()[:1], opened, "") as first, Worker("b", cores()[:1], opened, "") as two:
        assert [len(worker.burst(1, 3)) for worker in (first, two, first)] == [3, 3, 3]
        # Between its turns a process is stopped.
        for _ in range(PATIENCE):
            stat = Path(f"/proc/{first._process.pid}/stat").read_text()
            if stat.rpartition(")")[2].split()[0] == "T":
                break
            sleep(0.01)
        else:
            pytest.fail("not stopped")


def test_an_engine_that_refuses_is_told() -> None:
    with pytest.raises(engines.EngineRefuses, match="no such layer"):
        Worker("a", cores()[:1], opened, "no such layer")


def test_the_bench_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "peers.json"
    command = ["--json", str(path), "--peers", ORT, SPINNING, "--models"]
    assert peers.main([*command, "digits_branch"]) == 0
    assert peers.main([*command, "digits_lstm", "--merge"]) == 0
    content = json.loads(path.read_text())
    assert [item["model"] for item in content["rows"]] == ["digits_lstm", "digits_branch"]
    for item in content["rows"]:
        assert item["targets"] == ["cpu"]
        for way in peers.WAYS:
            assert item[way].keys() == {OURS, ORT, SPINNING}
            assert all(found["count"] >= 15 for found in item[way].values())
        assert max(item["deviations"][OURS].values()) < 1e-5
    assert "geometric means" in capsys.readouterr().out
    assert peers.main([*command, "digits_lstm", "--merge", "--calls", "arrays"]) == 1


def test_unknown_names_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "peers.json")
    assert peers.main(["--json", path, "--peers", "nothing"]) == 1
    assert peers.main(["--json", path, "--models", "nothing"]) == 1
    told = capsys.readouterr().err
    assert "no peer 'nothing'" in told
    assert "no model 'nothing'" in told
    with pytest.raises(InputError):
        peers._earlier(Path(__file__), {}, peers.Options(1, 15, 0, (), True))


def test_a_peer_that_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    assert engines.installed(engines.PEERS) == (ORT, SPINNING)
    path = str(tmp_path / "peers.json")
    assert peers.main(["--json", path, "--peers", OPENVINO]) == 1
    assert engines.INSTALL in capsys.readouterr().err
