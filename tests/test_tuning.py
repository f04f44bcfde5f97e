"""Candidates of kernels: what is tried, kept and compiled."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import hetsched
from hetsched import cli, oracle
from hetsched.errors import DeviceError, PluginError
from hetsched.host import cpu_device
from hetsched.plugin import load
from hetsched.schedules.rules import Rules
from hetsched.schedules.vectors import Vectors
from hetsched.store import Store, default_path
from hetsched.target import Target
from hetsched.trial import Trial

DEVICE = cpu_device("cpu:0", "cpu")


@pytest.fixture(autouse=True)
def _own_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HETSCHED_STORE", str(tmp_path / "store.sqlite"))


@pytest.fixture
def model() -> onnx.ModelProto:
    """Two convolutions and a product, small enough to be tried in a moment."""
    rng = np.random.default_rng(0)
    weights = {
        "w": rng.standard_normal((48, 16, 3, 3)),
        "v": rng.standard_normal((32, 48, 1, 1)),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "v"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tuned",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 16, 12, 12])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 32, 12, 12])],
        [numpy_helper.from_array(a.astype(np.float32), name) for name, a in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def test_a_choice_is_taken_by_its_text() -> None:
    rules = Rules(Vectors(16, 32), chosen={"a": "3", "b": "no more there"})
    assert rules.choose("a", [1, 2, 3]).candidate == 3
    assert rules.choose("b", [1, 2, 3]).candidate == 1
    assert rules.choose("c", [1, 2, 3]).candidates == ("1", "2", "3")


def test_trials_come_back_from_the_store(tmp_path: Path) -> None:
    store = Store(tmp_path / "s.sqlite")
    trials = [Trial("w", "a", 0, 2.0), Trial("w", "b", 1, 1.0), Trial("v", "a", 0, 1.0)]
    for trial in trials:
        store.add_trial(DEVICE, "compiler 1", trial)
    assert set(store.trials(DEVICE, "compiler 1")) == set(trials)
    assert store.trials(DEVICE, "compiler 2") == ()


def test_what_is_tried_is_compiled_from_then_on(model: onnx.ModelProto) -> None:
    graph = hetsched.read_onnx(model)
    target = load(Target, "cpu")
    untuned = target.configuration(DEVICE)
    tuning = hetsched.tune(graph, "cpu:0", trials=3)
    assert tuning.whole
    assert len(tuning.rows) == 2
    assert all(1 < len(row.trials) <= 3 and not row.already for row in tuning.rows)
    # Which is the fastest is the machine's to say: the slowest is made so.
    store = Store(default_path())
    chosen = {}
    for row in tuning.rows:
        last = max(row.trials, key=lambda trial: trial.place)
        chosen[row.workload] = last.candidate
        store.add_trial(DEVICE, target.version(), Trial(row.workload, last.candidate, 1, 1e-12))
    assert target.configuration(DEVICE) != untuned
    again = hetsched.tune(graph, "cpu:0", trials=3)
    assert all(row.already and row.chosen.candidate == chosen[row.workload] for row in again.rows)
    x = np.random.default_rng(1).standard_normal((1, 16, 12, 12)).astype(np.float32)
    with hetsched.compile(graph, "cpu:0", "single") as executable:
        found = executable.run({"x": x})["y"]
    right = oracle.run(model, {"x": x})["y"]
    np.testing.assert_allclose(found, right, atol=1e-5 * np.abs(right).max())


def test_scheduled_functions_use_what_was_chosen(model: onnx.ModelProto) -> None:
    from hetsched.lowering.trials import variants

    graph = hetsched.read_onnx(model)
    part = graph.part(graph.ops, "all")
    rules = Rules(Vectors.of(DEVICE.isa))
    found = variants(part, rules, 3)
    places: dict[str, list[int]] = {}
    for variant in found:
        places.setdefault(variant.workload, []).append(variant.place)
    assert len(places) == 2
    assert all(own == list(range(len(own))) for own in places.values())
    texts = {variant.function.without_attr("global_symbol").script() for variant in found}
    assert len(texts) == len(found)


def test_a_spent_budget_is_said_and_what_was_tried_is_kept(
    model: onnx.ModelProto, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    graph = hetsched.read_onnx(model)
    assert not hetsched.tune(graph, "cpu:0", budget_seconds=0).whole
    path = tmp_path / "m.onnx"
    onnx.save(model, path)
    with pytest.raises(SystemExit) as end:
        cli.app(["tune", str(path), "--devices", "cpu:0", "--trials", "2", "--json"])
    assert not end.value.code
    document = json.loads(capsys.readouterr().out)
    assert len(document["kernels"]) == 2
    assert all(len(kernel["candidates"]) == 2 for kernel in document["kernels"])


def test_tuning_belongs_to_the_way_of_winograd(
    model: onnx.ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HETSCHED_STORE", str(tmp_path / "profile.sqlite"))
    path = tmp_path / "m.onnx"
    onnx.save(model, path)
    options = ["--devices", "cpu:0", "--trials", "2", "--winograd", "off", "--json"]
    with pytest.raises(SystemExit) as end:
        cli.app(["tune", str(path), *options])
    assert not end.value.code
    store, here = Store(default_path()), load(Target, "cpu").device("cpu:0")
    assert store.trials(here, load(Target, "cpu:winograd=off").version())
    assert not store.trials(here, load(Target, "cpu").version())


def test_what_cannot_be_tuned_is_named(model: onnx.ModelProto) -> None:
    graph = hetsched.read_onnx(model)
    with pytest.raises(PluginError, match="no tuner 'none'; there are candidates, metaschedule"):
        hetsched.tune(graph, "cpu:0", tuner="none")
    with pytest.raises(DeviceError, match="'onnxruntime:0': target 'onnxruntime' has no tuner"):
        hetsched.tune(graph, "onnxruntime:0")


@pytest.fixture
def doubles() -> onnx.ModelProto:
    """A product of doubles, for which no family has a schedule."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "doubles",
        [helper.make_tensor_value_info("x", TensorProto.DOUBLE, [16, 24])],
        [helper.make_tensor_value_info("y", TensorProto.DOUBLE, [16, 32])],
        [numpy_helper.from_array(np.random.default_rng(0).standard_normal((24, 32)), "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def test_a_search_keeps_a_trace_that_is_compiled(doubles: onnx.ModelProto) -> None:
    from hetsched.lowering.relax import fuse, lowered
    from hetsched.schedules.apply import scheduled, uncovered

    graph = hetsched.read_onnx(doubles)
    tuning = hetsched.tune(graph, "cpu:0", "metaschedule", trials=2)
    (row,) = tuning.rows
    assert [trial.place for trial in row.trials] == [0, 1]
    rules = Rules(Vectors.of(DEVICE.isa), chosen={row.workload: row.trials[1].candidate})
    module = fuse(lowered(graph.part(graph.ops, "all"), rules)).module
    assert list(uncovered(module, rules.vectors)) == [row.workload]
    made = [
        f for f in scheduled(module, rules).functions.values() if "tirx.is_scheduled" in f.attrs
    ]
    assert len(made) == 1
    # Whatever was measured, the trace is used, and the result is right.
    target = load(Target, "cpu")
    Store(default_path()).add_trial(
        DEVICE, target.version(), Trial(row.workload, row.trials[1].candidate, 1, 1e-12)
    )
    x = np.random.default_rng(1).standard_normal((16, 24))
    with hetsched.compile(graph, "cpu:0", "single") as executable:
        found = executable.run({"x": x})["y"]
    np.testing.assert_allclose(found, oracle.run(doubles, {"x": x})["y"], rtol=1e-12)
    assert hetsched.tune(graph, "cpu:0", "metaschedule", trials=2).rows[0].already
