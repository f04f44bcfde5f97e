"""What reports call a device: OpenCL on the processor is never taken for a GPU."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import Builder
from typer.testing import CliRunner

from hetsched.cli import app
from hetsched.device import Device
from hetsched.errors import HetschedError
from hetsched.graph import to_onnx
from hetsched.host import cores
from hetsched.plugin import load
from hetsched.report.tables import hardware
from hetsched.target import Target

LABEL = "OpenCL on CPU (PoCL), "


@pytest.fixture(scope="module")
def devices() -> str:
    """The processor, and OpenCL on it by PoCL, on cores of their own where there are two."""
    try:
        pocl = load(Target, "opencl").device("opencl:pocl")
    except HetschedError as error:
        pytest.skip(str(error))
    assert pocl.description.startswith(LABEL)
    return f"cpu:{cores()[0]},opencl:pocl@{cores()[-1]}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A product, the least that there is to compile."""
    build = Builder()
    x = build.input("x", 4, 4)
    path = tmp_path_factory.mktemp("model") / "product.onnx"
    product = build.op("MatMul", x, build.constant(np.eye(4, dtype=np.float32)))
    onnx.save(to_onnx(build.graph(product)), path)
    return path


@pytest.fixture(autouse=True, scope="module")
def _wide() -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "160")
        yield


def shown(*arguments: object, status: int = 0) -> str:
    result = CliRunner().invoke(app, [str(item) for item in arguments], catch_exceptions=False)
    assert result.exit_code == status, result.output
    return result.stdout


def is_labelled(text: str) -> bool:
    """Whether the last table has a row that names the device and what it is."""
    lines = text[text.index("\nHardware\n") :].splitlines()
    return any("opencl:" in line and LABEL in line for line in lines)


def test_reports_say_what_the_device_is(devices: str, model: Path, tmp_path: Path) -> None:
    plan, package, trace = (tmp_path / name for name in ("plan.json", "m.hsp", "trace.json"))
    place = ("--partitioner", "single:device=" + devices.partition(",")[2])
    options = ("--devices", devices, *place, "--cost-model", "roofline")
    assert is_labelled(shown("partition", model, *options, "-o", plan))
    assert is_labelled(shown("compile", model, "--plan", plan, "-o", package))
    assert is_labelled(shown("run", package, "--repeat", 1, "--trace", trace))
    assert is_labelled(shown("verify", package))
    assert is_labelled(shown("explain", package))
    assert is_labelled(shown("simulate", plan))
    assert is_labelled(shown("diff", plan, plan))
    # There is no time for anything.
    profile = shown("profile", model, "--devices", devices, "--budget", "0s", status=4)
    assert is_labelled(profile)
    assert LABEL in shown("devices")
    tracks = [
        event["args"]["name"]
        for event in json.loads(trace.read_text())["traceEvents"]
        if event["name"] == "thread_name"
    ]
    assert any(name.startswith("opencl:") and LABEL in name for name in tracks)


def test_hardware_is_by_device() -> None:
    found = hardware((Device("a", "t", description="one"), Device("b", "t")))
    assert found == {"hardware": {"a": "one", "b": "unknown"}}
