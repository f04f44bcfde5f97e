"""The examples of the README and of the documentation do what they say."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench import figures
from hetsched.cli import app
from hetsched.host import cores
from hetsched.partitioner import Partitioner
from hetsched.system import System

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
TWO_CORES = pytest.mark.skipif(len(cores()) < 2, reason="the examples name two cores")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the examples run: the repository's tests are there, and a model."""
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    shutil.copy(ROOT / "tests/data/digits_branch.onnx", tmp_path / "model.onnx")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HETSCHED_STORE", str(tmp_path / "store.sqlite"))
    return tmp_path


@TWO_CORES
def test_python(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = blocks(README, "python")
    exec(compile(example, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "predicted" in printed
    assert "measured" in printed
    assert (folder / "digits.hsp").exists()


@TWO_CORES
def test_commands(folder: Path) -> None:
    (console,) = blocks(README, "console")
    commands = [line.removeprefix("$ hetsched ") for line in console.splitlines()]
    for command in commands:
        result = CliRunner().invoke(app, shlex.split(command))
        assert result.exit_code == 0, (command, result.output)
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    assert {"predicted", "measured"} <= {event["args"].get("name") for event in events}


def test_machine_file(folder: Path) -> None:
    (example,) = blocks((ROOT / "docs/files.md").read_text(), "toml")
    (folder / "machine.toml").write_text(example)
    system = System.load(folder / "machine.toml")
    assert [device.name for device in system.devices] == ["big", "little"]
    command = "partition model.onnx --system machine.toml --partitioner task"
    result = CliRunner().invoke(app, shlex.split(command))
    assert result.exit_code == 0, result.output


def test_partitioner(folder: Path) -> None:
    import hetsched

    (example,) = blocks((ROOT / "docs/extending.md").read_text(), "python")
    names: dict[str, type[Partitioner]] = {"__name__": "hetsched.partitioners.alternate"}  # type: ignore[dict-item]
    exec(compile(example, "docs/extending.md", "exec"), names)
    system = System.load(ROOT / "tests/data/two_cores.toml")
    graph = hetsched.read_onnx("model.onnx")
    plan = names["Alternate"]().partition(graph, system, hetsched.priced(graph, system, "roofline"))
    assert set(plan.devices) == {device.name for device in system.devices}


@TWO_CORES
def test_demo(folder: Path) -> None:
    command = [sys.executable, "-m", "examples.demo", folder / "model.onnx", "--folder", folder]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    for told in ("Links, measured", "Memory", "Predicted beside measured", "verified"):
        assert told in done.stdout
    assert (folder / "model.hsp").exists()


def test_figures() -> None:
    assert figures.main(["--check"]) == 0, "python -m bench.figures makes them anew"
