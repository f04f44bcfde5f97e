"""The bench of the FPGA's overlay: its sets on few cases, and what the documents say of them."""

import json
from pathlib import Path

import pytest

from bench import fpga
from bench.figures import fpga as figures
from bench.figures import fpga_summary
from hetsched.errors import HetschedError
from hetsched.fpga.engine import why_not


@pytest.fixture(autouse=True)
def _simulated() -> None:
    reason = why_not("verilator")
    if reason:
        pytest.skip(reason)


def test_cases_count_what_is_right(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "fpga.json"
    few = ["--cases", "4", "--inputs", "1", "--models", "digits_cnn"]
    assert fpga.main(["--json", str(path), "--sets", "cases,networks", *few]) == 0
    sets = json.loads(path.read_text())["sets"]
    for row in sets["cases"]["figures"].values():
        assert row["cases"] == row["exact"] == row["predicted"] == 4
        assert row["crossed"] == row["agreeing"] == 4
        assert row["largest_error"] == 0
    (row,) = sets["networks"]["figures"]["rows"]
    assert row["verified"]
    assert row["same"] == row["inputs"] == 20
    assert row["equal"] == row["parts"] == 1
    assert row["units"] == 0
    assert row["cycles"] > row["macs"] / 64
    assert "| digits_cnn |" in figures(json.loads(path.read_text()))
    assert "FPGA" in fpga_summary(json.loads(path.read_text()))
    assert "modelled" in capsys.readouterr().out


def test_a_wrong_result_is_counted_not_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fpga.reference, "run", lambda part, inputs: [inputs[0]])
    found = fpga.cases(fpga.Options(cases=2, crossed=0))
    assert found.figures["by hand"]["exact"] == 2
    assert found.figures["compiled"]["exact"] == 0


def test_what_is_not_there_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit):
        fpga.main(["--json", str(tmp_path / "a"), "--sets", "clocks"])
    monkeypatch.setattr(fpga, "why_not", lambda name: "no compiler")
    fpga.engine.cache_clear()
    with pytest.raises(HetschedError, match="no compiler"):
        fpga.engine("verilator")
    assert fpga.main(["--json", str(tmp_path / "a")]) != 0
