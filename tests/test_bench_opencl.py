"""The bench of OpenCL on the processor: its cases, its tables, and one case from end to end."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import opencl
from bench.figures import opencl as figures
from bench.figures import opencl_summary
from hetsched import oracle
from hetsched.plugin import load
from hetsched.target import Target

ABOUT = {
    "command": "python -m bench.opencl",
    "machine": {"cpu": "a processor", "cores": 2},
    "commit": "0123456789",
}


def times(median: float) -> dict[str, float]:
    return {"median": median, "first_quartile": median, "third_quartile": median}


def row(case: str, ours: float, cpu: float, **known: Any) -> dict[str, Any]:
    return {
        "case": case,
        "reason": "",
        "deviation": 1e-6,
        "seconds": {"opencl": times(ours), "cpu": times(cpu), "onnxruntime": times(cpu)},
        "cpu_ratio": times(cpu / ours),
        "onnxruntime_ratio": times(cpu / ours),
    } | known


def test_tables_tell_the_mean_and_what_failed() -> None:
    failed = {"case": "vit_b_16", "reason": "DeviceError: no device"}
    rows = [row("resnet18", 2.0, 1.0), row("googlenet", 2.0, 4.0), failed]
    ((title, heads, cells),) = opencl.tables({"sets": {"models": rows}})
    assert opencl.NAME in title
    assert "geometric mean 1.00" in title
    assert all(len(line) == len(heads) for line in cells[:2])
    assert cells[2] == ["vit_b_16", "failed"]


def test_figures_compare_goals_with_what_was_done() -> None:
    share = {"opencl": 2.6, "cpu": 2.7, opencl.DIRECT: 0.92}
    kernels = [
        row("8 of 3x3, 64 of 56", 1.0, 1.0, goal=0.6, share=share),
        row("4 of softmax", 1.0, 2.0, goal=None),
    ]
    result = ABOUT | {"sets": {"models": [row("resnet18", 1.0, 0.9)], "kernels": kernels}}
    summary = opencl_summary(result)
    assert "0.90 of the cpu target's speed" in summary
    assert "8 of 3x3, 64 of 56 92% (60%)" in summary
    assert "| 8 of 3x3, 64 of 56 |" in figures(result)


@pytest.mark.parametrize("case", [case for case in opencl.KERNELS if not case.macs])
def test_layers_are_models_that_onnxruntime_runs(case: opencl.Case) -> None:
    proto, inputs = case.open(0)
    session = oracle.session(proto, 1)
    outputs = session.run(None, dict(inputs))
    assert all(np.isfinite(output).all() and output.any() for output in outputs)


def test_what_does_not_exist_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(tmp_path / "opencl.json")
    assert opencl.main(["--json", file, "--models", "lenet6"]) != 0
    assert "no model 'lenet6'" in capsys.readouterr().err
    assert opencl.main(["--json", file, "--sets", "layers"]) != 0
    assert "no set 'layers'; there are models, kernels" in capsys.readouterr().err
    (tmp_path / "opencl.json").write_text("[]")
    assert opencl.main(["--json", file, "--add"]) != 0
    assert "is no result of this bench" in capsys.readouterr().err


def test_a_case_from_end_to_end(tmp_path: Path) -> None:
    why = load(Target, "opencl").unavailable()
    if why is not None:
        pytest.skip(why)
    file = tmp_path / "opencl.json"
    given = ["--json", str(file), "--sets", "kernels", "--kernels", "layer norm", "--seconds", "0"]
    assert opencl.main(given) == 0
    content = json.loads(file.read_text(encoding="utf-8"))
    (found,) = content["sets"]["kernels"]
    assert found["device"].startswith(opencl.NAME)
    assert found["deviation"] < 1e-5
    assert found["seconds"]["opencl"]["count"] == opencl.LEAST_ROUNDS
