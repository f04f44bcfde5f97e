"""CUDA: what compiles without a device, what a driver is asked for, and on a device the results."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from fake_cuda import INVALID_VALUE, OUT_OF_MEMORY, FakeCuda
from graphs import graph_of
from onnx import helper
from programs import affine

from hetsched import api, oracle, simulate
from hetsched.cuda import compiler, driver, runtime
from hetsched.cuda.devices import capability, runs
from hetsched.device import Device
from hetsched.errors import (
    BuildError,
    CompileError,
    DeviceError,
    DeviceLost,
    OutOfMemory,
    PackageError,
)
from hetsched.executor import Executor
from hetsched.graph import Graph, to_onnx
from hetsched.launches import Program
from hetsched.links import copying
from hetsched.plugin import load
from hetsched.request import Step
from hetsched.system import System
from hetsched.target import Artifact, Kernel, Target

EXAMPLES = Path(__file__).parents[1] / "examples"
H100, ORIN = "nvidia/nvidia-h100", "nvidia/jetson-orin-nano"
RNG = np.random.default_rng(0)


def network() -> Graph:
    """A convolution in tiles, a depthwise one and a pooling by threads, a product, a softmax."""
    weights = {
        name: (RNG.standard_normal(shape) * 0.2).astype(np.float32)
        for name, shape in (
            ("w", (16, 3, 3, 3)), ("b", (16,)), ("d", (16, 1, 3, 3)), ("m", (256, 12)),
        )
    }  # fmt: skip
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("Conv", ["r", "d"], ["e"], group=16, pads=[1, 1, 1, 1]),
        helper.make_node("MaxPool", ["e"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("MatMul", ["f", "m"], ["g"]),
        helper.make_node("Softmax", ["g"], ["y"], axis=-1),
    ]
    return graph_of(nodes, (1, 3, 8, 8), weights)


@pytest.fixture
def target() -> Target:
    return load(Target, "cuda")


def absent(isa: str) -> Device:
    return Device("cuda:0", "cuda", "gpu", isa=isa, compute_units=8, memory_space="cuda:0")


def without_compiler(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(compiler, "compiler", lambda: None)


@pytest.mark.parametrize(("isa", "arch"), [(H100, "sm_90a"), (ORIN, "sm_87"), ("sm_75", "sm_75")])
def test_a_part_compiles_to_source_for_a_device_that_is_not_here(
    target: Target, isa: str, arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_compiler(monkeypatch)
    artifact = target.compile(network(), absent(isa))
    assert artifact.requires == arch
    assert set(artifact.files) <= {"kernels.cu", "launches.json", "constants.bin"}
    program = Program.from_files(artifact.files, "cuda")
    # Tiles, threads and rows: each function is one kernel, with nothing spilled between.
    assert len(program.launches) == 5
    assert all(np.prod(launch.local_size) <= 1024 for launch in program.launches)
    assert "__shared__" in program.source


@pytest.mark.skipif(compiler.compiler() is None, reason=compiler.MISSING)
@pytest.mark.parametrize("isa", [H100, ORIN])
def test_the_source_is_real(target: Target, isa: str) -> None:
    artifact = target.compile(network(), absent(isa))
    code = artifact.files["kernels.cubin"]
    assert code.startswith(b"\x7fELF")
    program = Program.from_files(artifact.files, "cuda")
    assert all(launch.kernel.encode() in code for launch in program.launches)


@pytest.mark.skipif(compiler.compiler() is None, reason=compiler.MISSING)
def test_a_compiler_that_refuses_is_heard() -> None:
    with pytest.raises(BuildError, match=r"refuses a kernel: .*nonsense"):
        compiler.cubin('extern "C" __global__ void f() { nonsense(); }', "sm_90")


def test_a_device_that_no_compiler_knows(target: Target) -> None:
    for isa, why in (("", "no isa"), ("nvidia/abacus", "no target"), ("sm_x", "no architecture")):
        with pytest.raises(CompileError, match=why):
            target.compile(network(), absent(isa))


def test_machine_code_runs_on_its_like() -> None:
    assert runs("sm_90a", "sm_90")
    assert not runs("sm_90a", "sm_92")
    with pytest.raises(DeviceError, match="no architecture"):
        capability("turing")


@pytest.mark.parametrize("name", ["h100", "jetson_orin_nano"])
def test_a_machine_file_is_planned_for(name: str, tmp_path: Path) -> None:
    system = System.load(EXAMPLES / f"{name}.toml")
    plan = api.partition(network(), system, "single")
    assert plan.system.device("cuda:0").compute_units
    assert simulate(plan).makespan > 0
    assert not api.is_here(system)


def test_no_driver_is_told(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    driver.driver.cache_clear()
    monkeypatch.setattr(driver, "library", lambda: None)
    assert target.unavailable() is None
    assert target.devices() == []
    assert target.problems() == ("no CUDA driver: libcuda.so.1 is not installed",)
    artifact = target.compile(network(), absent("sm_90"))
    with pytest.raises(DeviceError, match="no CUDA driver"):
        target.load(artifact, network(), absent("sm_90"))


def twice(grid: list[int], block: list[int], x: np.ndarray, doubled: np.ndarray) -> None:
    doubled[:32].view(np.float32)[:] = 2 * x[:32].view(np.float32)


def total(
    grid: list[int],
    block: list[int],
    doubled: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray,
    y: np.ndarray,
) -> None:
    assert (grid, block) == ([8, 1, 1], [1, 1, 1])
    d, w, b = (array.view(np.float32) for array in (doubled[:32], weight[:32], bias[:4]))
    y[:32].view(np.float32)[:] = d * w + b


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    """A driver of paper, with the kernels of `affine`."""
    library = FakeCuda({"twice": twice, "sum": total})
    monkeypatch.setattr(driver, "library", lambda: library)
    monkeypatch.setattr(runtime, "_opened", {})
    driver.driver.cache_clear()
    yield library
    driver.driver.cache_clear()


@pytest.fixture
def artifact() -> Artifact:
    program = affine()
    source = program.source.replace("__kernel void", 'extern "C" __global__ void')
    program = replace(program, language="cuda", source=source)
    weights = {"w": np.arange(8, dtype=np.float32)}
    return Artifact({**program.files(), "kernels.cubin": b"code"}, weights, "sm_87")


def graph() -> Graph:
    nodes = [
        helper.make_node("Mul", ["x", "v"], ["m"]),
        helper.make_node("Add", ["m", "c"], ["y"]),
    ]
    weights = {"v": np.ones((2, 4), np.float32), "c": np.ones((), np.float32)}
    return graph_of(nodes, (2, 4), weights)


X = RNG.standard_normal((2, 4)).astype(np.float32)
Y = 2 * X * np.arange(8, dtype=np.float32).reshape(2, 4) + 1.5


def loaded(target: Target, artifact: Artifact) -> Kernel:
    return target.load(artifact, graph(), target.device("cuda:0"))


def test_a_device_is_what_the_driver_says(target: Target, fake: FakeCuda) -> None:
    found = target.device("cuda:0")
    assert target.devices() == ["cuda:0"]
    assert (found.description, found.isa, found.compute_units) == ("A device of paper", "sm_87", 10)
    assert found.flops_per_second == 2 * 128 * 10 * 1e9
    assert found.bytes_per_second == 2 * 1e9 * 16
    with pytest.raises(DeviceError, match="no device 'cuda:3'; there are cuda:0"):
        target.device("cuda:3")
    with pytest.raises(DeviceError, match="write cuda:0"):
        target.device("cuda:first")


def test_a_program_runs(target: Target, fake: FakeCuda, artifact: Artifact) -> None:
    with loaded(target, artifact) as kernel:
        begun = kernel.begin([kernel.receive(X)])
        start, finish = begun.finish()
        assert start <= finish
        np.testing.assert_array_equal(kernel.send(begun.outputs[0]), Y)
        held = fake.held_nbytes
        del begun
        # Memory is used again.
        for _ in range(5):
            (output,) = kernel.run([kernel.receive(X)])
            np.testing.assert_array_equal(kernel.send(output), Y)
        assert fake.held_nbytes <= held + 2 * X.nbytes
        times = kernel.seconds([kernel.receive(X)])  # type: ignore[attr-defined]
        assert [name for name, _ in times] == ["twice", "sum"]
        assert all(seconds >= 0 for _, seconds in times)
    assert "cuModuleUnload" in fake.calls


def test_a_run_goes_on_what_another_makes(
    target: Target, fake: FakeCuda, artifact: Artifact
) -> None:
    with loaded(target, artifact) as kernel:
        first = kernel.begin([kernel.receive(X)])
        second = kernel.begin(first.outputs)
        second.finish()
        expected = 2 * Y * np.arange(8, dtype=np.float32).reshape(2, 4) + 1.5
        np.testing.assert_allclose(kernel.send(second.outputs[0]), expected)


def test_memory_is_not_used_again_too_soon(
    target: Target, fake: FakeCuda, artifact: Artifact
) -> None:
    with loaded(target, artifact) as kernel:
        (first,) = kernel.begin([kernel.receive(X)]).outputs
        # What the first run reads is nobody's any more here, but not there: it has not begun.
        second = kernel.begin([kernel.receive(np.zeros_like(X))])
        second.finish()
        np.testing.assert_array_equal(kernel.send(first), Y)
        np.testing.assert_array_equal(kernel.send(second.outputs[0]), np.full_like(X, 1.5))


def test_a_copy_to_measure_by(target: Target, fake: FakeCuda) -> None:
    with target.copying(target.device("cuda:0"), 100) as kernel:  # type: ignore[union-attr]
        array = np.arange(100)
        begun = kernel.begin([kernel.receive(array)])
        start, finish = begun.finish()
        assert start <= finish
        np.testing.assert_array_equal(kernel.send(begun.outputs[0]), array)
    assert "cuLaunchKernel" not in fake.calls


def test_tensors_go_to_a_device_and_back(target: Target, fake: FakeCuda) -> None:
    """As links are measured: copies in turns on the processor and on a device."""
    devices = [load(Target, "cpu").device("cpu:0"), target.device("cuda:0")] * 2
    steps = [
        Step(f"copy{i}", device, (f"t{i}",), (f"t{i + 1}",), partial(copying, device, 100))
        for i, device in enumerate(devices)
    ]
    executor = Executor(steps, ("t4",), {})
    try:
        array = np.arange(100)
        outputs, measured = executor.run({"t0": array})
        # On the processor a copy adds one.
        np.testing.assert_array_equal(outputs["t4"], array + 2)
        assert len(measured.schedule().transfers) >= 3
    finally:
        executor.close()


def test_large_arrays_go_through_pinned_memory_in_turns(
    target: Target, fake: FakeCuda, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "STAGING_NBYTES", 64)
    with loaded(target, artifact) as kernel:
        array = np.arange(101, dtype=np.float32)
        np.testing.assert_array_equal(kernel.send(kernel.receive(array)), array)


@pytest.mark.parametrize(
    ("function", "status", "kind", "message"),
    [
        ("cuLaunchKernel", 700, DeviceLost, "part 'part' failed on 'cuda:0': launch 0, of 'twice'"),
        ("cuEventSynchronize", 700, DeviceLost, "its launches: a kernel read or wrote where"),
        ("cuLaunchKernel", INVALID_VALUE, None, "CUDA_ERROR_INVALID_VALUE"),
    ],
)
def test_a_failing_run_is_told(
    target: Target,
    fake: FakeCuda,
    artifact: Artifact,
    function: str,
    status: int,
    kind: type[Exception] | None,
    message: str,
) -> None:
    with loaded(target, artifact) as kernel:
        given = kernel.receive(X)
        fake.failing[function] = status
        with pytest.raises(kind or Exception, match=message):
            kernel.run([given])


def test_memory_that_is_short(target: Target, fake: FakeCuda, artifact: Artifact) -> None:
    with loaded(target, artifact) as kernel:
        given = kernel.receive(X)
        # Once: what was given back is freed, and it is tried again.
        fake.failing["cuMemAlloc_v2"] = OUT_OF_MEMORY
        (output,) = kernel.run([given])
        np.testing.assert_array_equal(kernel.send(output), Y)
        with pytest.raises(OutOfMemory, match=r"an input, 1073741824 bytes: .*out of memory"):
            kernel.receive(np.empty(1 << 28, np.float32))


def test_damaged_parts_are_refused(target: Target, fake: FakeCuda, artifact: Artifact) -> None:
    fake._kernels = {"twice": twice}
    with pytest.raises(PackageError, match="no 'sum' in its code"):
        loaded(target, artifact)
    with pytest.raises(PackageError, match="no weight 'w'"):
        loaded(target, replace(artifact, weights={}))
    with pytest.raises(PackageError, match=r"'launches\.json' is missing"):
        loaded(target, replace(artifact, files={}))


def test_code_for_another_device_is_compiled_again(
    target: Target, fake: FakeCuda, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = replace(artifact, requires="sm_90a")
    asked = []
    monkeypatch.setattr(compiler, "compiler", lambda: "one")
    monkeypatch.setattr(compiler, "version", lambda: "one 1")
    monkeypatch.setattr(compiler, "cubin", lambda source, arch: asked.append(arch) or b"code")
    loaded(target, other).close()
    assert asked == ["sm_87"]
    without_compiler(monkeypatch)
    with pytest.raises(PackageError, match="is for sm_90a, and 'cuda:0' is sm_87: no compiler"):
        loaded(target, other)


@pytest.fixture
def here(target: Target) -> Device:
    if why := target.problems():
        pytest.skip(why[0])
    return target.device("cuda:0")


@pytest.mark.gpu
def test_a_network_on_a_device(target: Target, here: Device) -> None:
    part = network()
    with target.load(target.compile(part, here), part, here) as kernel:
        x = RNG.standard_normal((1, 3, 8, 8)).astype(np.float32)
        begun = kernel.begin([kernel.receive(x)])
        start, finish = begun.finish()
        (expected,) = oracle.run(to_onnx(part), {"x": x}).values()
        np.testing.assert_allclose(kernel.send(begun.outputs[0]), expected, atol=1e-5)
        assert finish > start


@pytest.mark.gpu
def test_a_plan_with_a_device(here: Device) -> None:
    with api.compile(network(), "cpu:0,cuda:0", partitioner="task") as executable:
        x = RNG.standard_normal((1, 3, 8, 8)).astype(np.float32)
        (found,) = executable.run({"x": x}).values()
        (expected,) = oracle.run(to_onnx(network()), {"x": x}).values()
        np.testing.assert_allclose(found, expected, atol=1e-5)
