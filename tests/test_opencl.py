"""OpenCL devices: found by name, and programs of launches run on them."""

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from ctypes import CFUNCTYPE, c_int, c_void_p, cast
from dataclasses import replace
from errno import ENOSPC
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper
from programs import affine

import hetsched
from hetsched import api
from hetsched.device import Device
from hetsched.errors import (
    BuildError,
    CompileError,
    DeviceError,
    DeviceLost,
    HetschedError,
    OutOfMemory,
    PackageError,
    PartError,
)
from hetsched.graph import Graph, from_onnx
from hetsched.host import cores
from hetsched.launches import APART, Program
from hetsched.op import Tensor
from hetsched.opencl import builds, devices
from hetsched.opencl.devices import Found, Survey, device, select, survey
from hetsched.plugin import load
from hetsched.system import System
from hetsched.target import Artifact, Kernel, Target

CORE = cores()[-1]


@pytest.fixture
def target() -> Target:
    found = load(Target, "opencl")
    if reason := found.unavailable():
        pytest.skip(reason)
    return found


@pytest.fixture
def first(target: Target) -> Device:
    """The first device; where that computes on the processor, on one core."""
    found = target.device("opencl:0")
    return target.device(f"opencl:0@{CORE}") if found.cores else found


@pytest.fixture
def opencl(target: Target) -> Any:
    """The module that loads pyopencl."""
    from hetsched.opencl import runtime

    return runtime


def graph_of(*outputs: str) -> Graph:
    """What `affine` computes, of which other outputs may be passed on."""
    value = helper.make_tensor_value_info
    made = helper.make_graph(
        [helper.make_node("Mul", ["x", "w"], ["y"], name="scale")],
        "affine",
        [value("x", 1, (2, 4))],
        [value(name, 1, (2, 4)) for name in outputs],
        [helper.make_tensor("w", 1, (2, 4), np.arange(8, dtype=np.float32))],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return from_onnx(model)


WEIGHT = np.arange(8, dtype=np.float32).reshape(2, 4)
X = np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 4)
Y = 2 * X * WEIGHT + 1.5
FLAT = Tensor("t", (8,), "float32")


def artifact(program: Program | None = None) -> Artifact:
    return Artifact((program or affine()).files(), {"w": WEIGHT})


def loaded(target: Target, where: Device, *outputs: str) -> Kernel:
    return target.load(artifact(), graph_of(*(outputs or ("y",))), where)


def own_memory(where: Device) -> Device:
    """The device as if it had memory of its own."""
    return replace(where, memory_space="own")


def test_devices_are_selected_by_index_type_and_name(target: Target) -> None:
    found = survey().devices
    assert select("opencl:0", "opencl")[0] == select("opencl", "opencl")[0] == found[0]
    for one in found:
        chosen, where = select(f"opencl:{one.kind}", "opencl")
        assert chosen.kind == one.kind
        assert bool(where) == (one.kind == "cpu")
    part = found[0].name.split("-")[0].split()[0].lower()
    assert select(f"opencl:{part}", "opencl")[0] == found[0]


def test_a_device_on_the_processor_has_its_cores(target: Target) -> None:
    one = next((found for found in survey().devices if found.kind == "cpu"), None)
    if one is None:
        pytest.skip("no OpenCL device computes on the processor")
    whole, part = target.device("opencl:cpu"), target.device(f"opencl:cpu@{CORE}")
    assert whole.cores == cores()
    assert part.cores == (CORE,)
    assert part.memory_space == "host"
    assert part.description.startswith("OpenCL on CPU (")
    assert part.compute_units == 1
    assert part.group_items > 0 < part.local_nbytes
    assert part.clock_hz == load(Target, "cpu").device(f"cpu:{CORE}").clock_hz
    if len(cores()) > 1:
        assert whole.fingerprint != part.fingerprint


def test_devices_keep_off_the_cores_of_others(target: Target) -> None:
    if survey().devices[0].kind != "cpu" or len(cores()) < 2:
        pytest.skip("no OpenCL device shares the processor with others")
    assert target.picks_cores("opencl:0")
    assert not target.picks_cores(f"opencl:0@{CORE}")
    left = target.beside("opencl:0", [cores()[0]])
    assert cores()[0] not in left.cores
    assert target.device(left.name) == left
    assert target.beside("opencl:0", []).cores == target.beside("opencl:0", cores()).cores


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("opencl:99", "no device 'opencl:99': opencl:0 is "),
        ("opencl:nothing", "no device 'opencl:nothing': opencl:0 is "),
        ("opencl:", "is no device of target"),
        ("opencl@", "is no device of target"),
        ("opencl:0@x", "opencl:0@0-3"),
        ("opencl:0@999", "this machine has cores"),
    ],
)
def test_a_device_that_is_not_there_is_an_error(target: Target, name: str, message: str) -> None:
    if "@" in name and survey().devices[0].kind != "cpu":
        message = "does not compute on the processor"
    with pytest.raises(DeviceError) as caught:
        target.device(name)
    assert message in str(caught.value)


GPU = Found(
    "Some Platform", 0, "Some GPU", "NVIDIA", "gpu", "1.0", True, 10, 1e9, 1024, 49152, 1 << 33,
    False, ("fp16", "int8dot"),
)  # fmt: skip


def test_a_device_with_its_own_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "survey", lambda: Survey((GPU,), ()))
    found = device("opencl:gpu", "opencl")
    assert (found.kind, found.cores, found.memory_space) == ("gpu", (), "opencl:gpu")
    assert found.isa == "opencl fp16 int8dot"
    assert (found.compute_units, found.group_items, found.local_nbytes) == (10, 1024, 49152)
    with pytest.raises(DeviceError, match="does not compute on the processor's cores"):
        device("opencl:0@0", "opencl")
    monkeypatch.setattr(devices, "survey", lambda: Survey((replace(GPU, available=False),), ()))
    with pytest.raises(DeviceError, match="is not available"):
        device("opencl:0", "opencl")


def test_limits_are_fields_of_a_machine_file(tmp_path: Path) -> None:
    text = """
name = "board"
[[device]]
name = "opencl:0"
target = "opencl"
kind = "gpu"
isa = "opencl fp16"
compute_units = 4
group_items = 128
local_nbytes = 16384
"""
    path = tmp_path / "machine.toml"
    path.write_text(text)
    (found,) = System.load(path).devices
    assert (found.compute_units, found.group_items, found.local_nbytes) == (4, 128, 16384)
    path.write_text(System.load(path).to_toml())
    assert System.load(path).devices == (found,)
    for wrong in ("-1", "1.5", "true", "'1'"):
        path.write_text(text.replace("compute_units = 4", f"compute_units = {wrong}"))
        with pytest.raises(DeviceError, match="'compute_units' is"):
            System.load(path)


@pytest.fixture
def vendors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[dict[str, str]], Target]]:
    """A machine with other drivers: files that name them, by name."""
    if sys.platform != "linux" or not devices.find_spec("pyopencl"):
        pytest.skip("pyopencl is not installed")

    def with_files(files: dict[str, str]) -> Target:
        for name, content in files.items():
            (tmp_path / name).write_text(content)
        monkeypatch.setenv(devices.VENDORS_VARIABLE, str(tmp_path))
        return load(Target, "opencl")

    yield with_files
    devices._survey.cache_clear()


def driver_text() -> str:
    files = devices.icd_files("")
    if not files:
        pytest.skip("no OpenCL driver is installed")
    return files[0].read_text()


def test_no_driver_is_said(vendors: Callable[[dict[str, str]], Target], tmp_path: Path) -> None:
    target = vendors({})
    assert str(tmp_path) in (target.unavailable() or "")
    assert target.devices() == []
    with pytest.raises(DeviceError, match="there is no OpenCL device here"):
        target.device("opencl:0")


def test_a_driver_that_does_not_load_is_named(
    vendors: Callable[[dict[str, str]], Target],
) -> None:
    target = vendors({"broken.icd": "/nowhere/libbroken.so\n"})
    why = target.unavailable() or ""
    assert "broken.icd does not load" in why
    assert "libbroken.so" in why
    shown = [found for found in api.devices() if found.name == "opencl"]
    assert [found.reason for found in shown] == [why]


def test_a_driver_that_crashes_leaves_the_others(
    vendors: Callable[[dict[str, str]], Target], tmp_path: Path
) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no C compiler to make such a driver")
    source = tmp_path / "crash.c"
    source.write_text("#include <stdlib.h>\n__attribute__((constructor)) void f(void) {abort();}")
    library = tmp_path / "libcrash.so"
    subprocess.run([compiler, "-shared", "-fPIC", source, "-o", library], check=True)
    target = vendors({"a.icd": f"{library}\n", "b.icd": driver_text()})
    assert target.unavailable() is None
    assert target.devices() == ["opencl:0"]
    assert any("a.icd crashed (SIGABRT)" in problem for problem in target.problems())
    assert any("SIGABRT" in found.reason for found in api.devices())
    # What is opened later knows the good ones only.
    assert [path.name for path in Path(survey().vendors or "").iterdir()] == ["000-b.icd"]


def test_an_answer_that_is_none_is_a_problem(
    vendors: Callable[[dict[str, str]], Target], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    query = tmp_path / "query.py"
    query.write_text("print('{}')")
    monkeypatch.setattr(devices, "QUERY", query)
    target = vendors({"one.icd": "libone.so\n"})
    assert "one.icd gave no answer" in (target.unavailable() or "")


def test_a_driver_that_hangs_is_a_problem(
    vendors: Callable[[dict[str, str]], Target], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    query = tmp_path / "query.py"
    query.write_text("import time; time.sleep(60)")
    monkeypatch.setattr(devices, "QUERY", query)
    monkeypatch.setattr(devices, "PATIENCE_SECONDS", 0.1)
    target = vendors({"slow.icd": "libslow.so\n"})
    assert "slow.icd did not answer" in (target.unavailable() or "")


def test_without_pyopencl_that_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    target = load(Target, "opencl")
    monkeypatch.setattr(devices, "find_spec", lambda name: None)
    assert target.unavailable() == "the package pyopencl is not installed"


@pytest.mark.parametrize("memory", ["shared", "own"])
def test_a_program_runs(target: Target, first: Device, memory: str) -> None:
    where = own_memory(first) if memory == "own" else first
    with loaded(target, where, "y", "x", "w") as kernel:
        for turn in range(3):
            x = X + turn
            (y, passed, given) = map(kernel.send, kernel.run([kernel.receive(x)]))
            np.testing.assert_allclose(y, 2 * x * WEIGHT + 1.5, rtol=1e-6)
            assert passed is not x
            np.testing.assert_array_equal(passed, x)
            np.testing.assert_array_equal(given, WEIGHT)


def test_a_program_runs_on_all_cores(target: Target) -> None:
    with loaded(target, target.device("opencl:0")) as kernel:
        np.testing.assert_allclose(kernel.send(*kernel.run([kernel.receive(X)])), Y, rtol=1e-6)


def test_results_stay_when_the_next_run_begins(target: Target, first: Device) -> None:
    with loaded(target, first) as kernel:
        (one,), (other,) = kernel.run([X]), kernel.run([X + 1])
        np.testing.assert_allclose(one, Y, rtol=1e-6)
        assert not np.array_equal(one, other)


@pytest.mark.parametrize("memory", ["shared", "own"])
def test_what_has_begun_hands_its_outputs_on(target: Target, first: Device, memory: str) -> None:
    where = own_memory(first) if memory == "own" else first
    with loaded(target, where) as kernel:
        one = kernel.begin([kernel.receive(X)])
        other = kernel.begin(one.outputs)
        times = [*one.finish(), *other.finish()]
        found = kernel.send(other.outputs[0])
        np.testing.assert_allclose(found, 2 * Y * WEIGHT + 1.5, rtol=1e-6)
        # On a device launches follow each other.
        assert times == sorted(times)


def test_inputs_may_be_of_any_layout_and_read_only(target: Target, first: Device) -> None:
    with loaded(target, first) as kernel:
        whole = np.repeat(np.repeat(X, 2, 0), 2, 1)
        shifted = np.zeros(33, np.uint8)[1:].view(np.float32).reshape(2, 4)
        shifted[:] = X
        frozen = X.copy()
        frozen.flags.writeable = False
        for array in (whole[::2, ::2], np.asfortranarray(X), shifted, frozen):
            np.testing.assert_allclose(kernel.run([array])[0], Y, rtol=1e-6)


def test_weights_are_there_once(target: Target, first: Device) -> None:
    with loaded(target, own_memory(first)) as one, loaded(target, own_memory(first)) as other:
        assert one.loaded.weights["w"] is other.loaded.weights["w"]
        opened = one.loaded.opened
        del one, other
    assert all(weight.array is not WEIGHT for weight in opened.weights.values())


def test_launches_are_timed(target: Target, first: Device) -> None:
    with loaded(target, first) as kernel:
        found = kernel.seconds([X])
        assert [name for name, _ in found] == ["twice", "sum"]
        assert all(seconds >= 0 for _, seconds in found)


@pytest.mark.parametrize("nbytes", [1, 1000, 3 << 20, (8 << 20) + 4, 20 << 20])
def test_copies_through_pinned_memory(first: Device, opencl: Any, nbytes: int) -> None:
    there = opencl.opened(own_memory(first))
    array = np.random.default_rng(0).integers(0, 256, nbytes, np.uint8)
    resident = there.receive(array)
    np.testing.assert_array_equal(there.send(resident), array)
    copy = there.copied(resident)
    there.queue.finish()
    np.testing.assert_array_equal(there.send(copy), array)


def test_copying_reads_and_writes_words(target: Target, first: Device) -> None:
    words = np.arange(1000, dtype=np.int64)
    for where in (first, replace(own_memory(first), kind="gpu")):
        kernel = target.copying(where, words.size)
        assert kernel is not None
        with kernel:
            found = kernel.send(*kernel.run([kernel.receive(words)]))
        np.testing.assert_array_equal(found, words + 1)


def test_a_kept_binary_is_used_and_a_broken_one_is_not(
    target: Target, first: Device, opencl: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HETSCHED_CACHE", str(tmp_path))
    sources = []
    build = builds.build

    def watched(platform: str, number: int, options: str, source: str) -> tuple[int, bytes]:
        sources.append(source)
        return build(platform, number, options, source)

    monkeypatch.setattr(builds, "build", watched)
    for _ in range(2):
        with loaded(target, first) as kernel:
            np.testing.assert_allclose(kernel.run([X])[0], Y, rtol=1e-6)
        assert sources == [affine().source]
    (entry,) = tmp_path.glob("*.hsc")
    # Not whole: the archive's digests tell.
    entry.write_bytes(entry.read_bytes()[:-200])
    with loaded(target, first) as kernel:
        np.testing.assert_allclose(kernel.run([X])[0], Y, rtol=1e-6)
    # Whole, and no program of this driver.
    key = next(tmp_path.glob("*.hsc")).stem
    opencl.default_cache().keep(key, Artifact({"0.bin": b"nothing"}))
    with loaded(target, first) as kernel:
        np.testing.assert_allclose(kernel.run([X])[0], Y, rtol=1e-6)
    assert opencl.default_cache().read(key).files["0.bin"] != b"nothing"


def test_a_source_that_does_not_compile_shows_the_log(target: Target, first: Device) -> None:
    program = replace(affine(), source=affine().source.replace("2.0f", "nonsense"))
    with pytest.raises(BuildError, match=r"affine.*nonsense") as caught:
        target.load(artifact(program), graph_of("y"), first)
    assert "\n" not in str(caught.value)
    assert caught.value.device == first.name


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ("float absent(float);", "absent"),
        ('float absent(float) __asm__("llvm.absent");', "SIGABRT"),
    ],
)
def test_a_function_that_is_not_there_leaves_the_process(
    target: Target, first: Device, capfd: pytest.CaptureFixture[str], declared: str, message: str
) -> None:
    if not select(first.name, "opencl")[0].is_pocl:
        pytest.skip("other drivers have other words")
    source = f"{declared}\n{affine().source}".replace("2.0f * x[i]", "absent(x[i])")
    with pytest.raises(BuildError, match="part 'affine' does not load on") as caught:
        target.load(artifact(replace(affine(), source=source)), graph_of("y"), first)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.device == first.name
    assert capfd.readouterr() == ("", "")
    with loaded(target, first) as kernel:
        np.testing.assert_allclose(kernel.run([X])[0], Y, rtol=1e-6)


def test_a_disk_without_room_is_said(
    target: Target, first: Device, opencl: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not select(first.name, "opencl")[0].is_pocl:
        pytest.skip("other drivers do not unpack binaries")

    def full(**options: Any) -> Any:
        raise OSError(ENOSPC, "No space left on device")

    monkeypatch.setattr(opencl, "TemporaryFile", full)
    with pytest.raises(BuildError, match=r"affine.*its code has no room in .*: No space left"):
        loaded(target, first)


# Answers with the source, until it is told otherwise by it.
ECHO = """
import json, os, signal, sys
while line := sys.stdin.buffer.readline():
    source = sys.stdin.buffer.read(json.loads(line)["nbytes"])
    print("words", file=sys.stderr, flush=True)
    if source == b"die":
        os.kill(os.getpid(), signal.SIGKILL)
    if source == b"fail":
        sys.exit(3)
    if source == b"wait":
        signal.pause()
    about = {"status": 0, "nbytes": len(source)}
    sys.stdout.buffer.write(json.dumps(about).encode() + b"\\n" + source)
    sys.stdout.buffer.flush()
    if source == b"leave":
        break
"""


@pytest.fixture
def echoing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[str], str]]:
    """Builds by processes that answer with the source."""
    builder = tmp_path / "builder.py"
    builder.write_text(ECHO)
    monkeypatch.setattr(builds, "BUILDER", builder)
    monkeypatch.setattr(builds, "_idle", [])
    yield lambda source: builds.build("platform", 0, "", source)[1].decode()
    for child in builds._idle:
        child.end()


def test_builds_go_on_side_by_side(echoing: Callable[[str], str]) -> None:
    sources = [f"{i}" * 200_000 for i in range(8)]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(echoing, sources)) == sources
    assert 1 <= len(builds._idle) <= len(cores())


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("die", r"its compiler crashed \(SIGKILL\): words"),
        ("fail", "its compiler failed with exit status 3: words"),
        ("wait", "its compiler did not end within 0.5 s: words"),
    ],
)
def test_a_compiler_that_does_not_answer_is_an_error(
    echoing: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, source: str, message: str
) -> None:
    assert echoing("one") == "one"
    with monkeypatch.context() as patch:
        if source == "wait":
            patch.setattr(builds, "PATIENCE_SECONDS", 0.5)
        with pytest.raises(builds.Died, match=message):
            echoing(source)
    assert not builds._idle
    assert echoing("other") == "other"


def test_a_compiler_that_nobody_asked_is_replaced(echoing: Callable[[str], str]) -> None:
    assert [echoing(source) for source in ("leave", "leave", "one")] == ["leave", "leave", "one"]


def test_a_long_source_is_built_in_pieces(
    target: Target, first: Device, opencl: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HETSCHED_CACHE", str(tmp_path))
    monkeypatch.setattr(opencl, "PIECE_LETTERS", 100)
    monkeypatch.setattr(opencl, "cores", lambda: (0, 1))
    head, *kernels = affine().source.replace("2.0f", "TWO").split("__kernel")
    common = f"#define TWO 2.0f\n{head}"
    source = APART.join([common, *(f"__kernel{kernel}" for kernel in kernels)])
    # The longer one first.
    pieces = [f"{common}{APART}__kernel{kernel}" for kernel in kernels[::-1]]
    assert opencl._pieces(source) == pieces
    for _ in range(2):
        with target.load(
            artifact(replace(affine(), source=source)), graph_of("y"), first
        ) as kernel:
            np.testing.assert_allclose(kernel.run([X])[0], Y, rtol=1e-6)
            assert len(set(map(id, kernel.loaded.programs.values()))) == 2
    monkeypatch.setattr(opencl, "PIECE_LETTERS", len(source))
    assert opencl._pieces(source) == [source]
    monkeypatch.setattr(opencl, "cores", lambda: (0,))
    assert opencl._pieces(affine().source) == [affine().source]


def test_a_kernel_that_is_only_a_comment(target: Target, first: Device) -> None:
    source = affine().source.replace("__kernel void sum(", "/* __kernel void sum( */ void some(")
    with pytest.raises(PackageError, match="part 'affine' is damaged: 'sum' is no kernel of its"):
        target.load(artifact(replace(affine(), source=source)), graph_of("y"), first)


def test_groups_that_are_too_large_are_refused(target: Target, first: Device) -> None:
    program = affine()
    wide = 1 << 20
    launches = tuple(
        replace(launch, global_size=(wide,), local_size=(wide,)) for launch in program.launches
    )
    with pytest.raises(DeviceError, match=r"affine.*'twice' has groups of 1048576 work-items"):
        target.load(artifact(replace(program, launches=launches)), graph_of("y"), first)


def test_a_workspace_that_is_too_large_is_out_of_memory(target: Target, first: Device) -> None:
    program = replace(affine(), workspace_nbytes=1 << 46)
    with pytest.raises(OutOfMemory, match=r"affine.*its workspace has 67108864 MiB") as caught:
        target.load(artifact(program), graph_of("y"), first)
    assert caught.value.device == first.name


def test_launches_and_kernels_have_to_agree(target: Target, first: Device) -> None:
    program = affine()
    short = replace(program.launches[0], arguments=program.launches[0].arguments[:1])
    program = replace(program, launches=(short, program.launches[1]))
    with pytest.raises(PackageError, match=r"'twice' takes 2 arguments, and a launch gives 1"):
        target.load(artifact(program), graph_of("y"), first)
    # A case where the kernel has a pointer.
    program = replace(program, launches=(replace(short, case=0), program.launches[1]))
    with pytest.raises(PartError, match=r"'affine' does not load.*INVALID_ARG_SIZE"):
        target.load(artifact(program), graph_of("y"), first)


@pytest.mark.parametrize(
    ("status", "kind", "message"),
    [
        (-2, DeviceLost, "the device is lost (DEVICE_NOT_AVAILABLE)"),
        (-36, DeviceLost, "the device is lost (INVALID_COMMAND_QUEUE)"),
        (-4, OutOfMemory, "out of memory (MEM_OBJECT_ALLOCATION_FAILURE)"),
        (-5, OutOfMemory, "out of memory or registers (OUT_OF_RESOURCES)"),
        (-52, PartError, "a kernel lacks an argument (INVALID_KERNEL_ARGS)"),
        (-9999, PartError, "status -9999"),
    ],
)
@pytest.mark.parametrize("call", ["enqueue_kernel", "finish", "set_argument", "flush"])
def test_a_device_that_fails_in_a_run(
    target: Target,
    first: Device,
    opencl: Any,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    status: int,
    kind: type[HetschedError],
    message: str,
) -> None:
    with loaded(target, first) as kernel:
        with monkeypatch.context() as patch:
            patch.setattr(opencl.driver, call, lambda *arguments: status)
            with pytest.raises(kind) as caught:
                kernel.run([X])
        assert "part 'affine' failed on" in str(caught.value)
        assert message in str(caught.value)
        # Nothing is left of the run that failed.
        assert not kernel.loaded.opened.pending
        np.testing.assert_allclose(kernel.run([X])[0], Y, rtol=1e-6)


def test_a_device_that_fails_in_a_run_without_python(target: Target, first: Device) -> None:
    graph = graph_of("y")
    with target.load(target.compile(graph, first), graph, first) as kernel:
        if kernel._caller is None:
            pytest.skip("runs need Python here")
        for call in (lambda: kernel.run([X]), kernel.bind([X])):
            np.testing.assert_allclose(call()[0], X * WEIGHT)
        lost = CFUNCTYPE(c_int, c_void_p)(lambda queue: -2)
        # The table of OpenCL's functions that crew.c calls.
        kernel._caller._code.enter.args[0]["clFinish"] = cast(lost, c_void_p).value
        for call in (lambda: kernel.run([X]), kernel.bind([X])):
            with pytest.raises(DeviceLost, match="part 'affine' failed on") as caught:
                call()
            assert caught.value.device == first.name
        # What is loaded later opens the device anew.
        with loaded(target, first) as other:
            assert other.loaded.opened is not kernel.loaded.opened
            np.testing.assert_allclose(other.run([X])[0], Y, rtol=1e-6)
        with pytest.raises(PartError, match="in place of"):
            kernel.run([X[:1]])
        with pytest.raises(PartError, match="in place of"):
            kernel.bind([X[:1]])


def test_what_a_driver_compiles_is_made_ahead(
    target: Target, first: Device, opencl: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HETSCHED_CACHE", str(tmp_path))
    target.prepare(artifact(), first)
    (entry,) = tmp_path.glob("*.hsc")
    before = entry.read_bytes()
    loaded(target, first).close()
    assert [path.read_bytes() for path in tmp_path.glob("*.hsc")] == [before]
    # What does not compile, or is of another machine, is told by who loads it.
    target.prepare(
        artifact(replace(affine(), source=affine().source.replace("2.0f", "nonsense"))), first
    )
    target.prepare(artifact(), replace(first, name="opencl:99"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda program: replace(program, inputs=(Tensor("x", (8,), "float32"),)), "other inputs"),
        (
            lambda program: replace(program, outputs=(Tensor("y", (8,), "float32"),)),
            "other outputs",
        ),
        (lambda program: replace(program, weights={"w": 64}), "weight 'w' has 32 bytes, not 64"),
        (lambda program: replace(program, weights={"w": 32, "v": 4}), "there is no weight 'v'"),
    ],
)
def test_a_damaged_artifact_is_refused(
    target: Target, first: Device, change: Callable[[Program], Program], message: str
) -> None:
    with pytest.raises(PackageError, match=r"part 'affine' is damaged") as caught:
        target.load(artifact(change(affine())), graph_of("y"), first)
    assert message in str(caught.value)


def test_a_program_without_launches_passes_on(target: Target, first: Device) -> None:
    value = helper.make_tensor_value_info("x", 1, (2, 4))
    made = helper.make_graph([], "through", [value], [value])
    graph = from_onnx(helper.make_model(made, ir_version=8))
    with target.load(target.compile(graph, first), graph, first) as kernel:
        np.testing.assert_array_equal(kernel.run([X])[0], X)


WITHOUT_TVM = """
import sys
import numpy as np
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("tvm", "tvm_ffi"):
            raise ImportError(name)
sys.meta_path.insert(0, Absent())
sys.path[:0] = [{tests!r}]
from test_opencl import WEIGHT, X, Y, artifact, graph_of
from hetsched.plugin import load
from hetsched.target import Target
target = load(Target, "opencl")
with target.load(artifact(), graph_of("y"), target.device({name!r})) as kernel:
    np.testing.assert_allclose(kernel.run([X])[0], Y, rtol=1e-6)
import hetsched
with hetsched.load({package!r}) as executable:
    np.testing.assert_allclose(executable.run({{"x": X}})["y"], X * WEIGHT, rtol=1e-6)
assert "tvm" not in sys.modules
"""


def test_artifacts_run_without_tvm(first: Device, tmp_path: Path) -> None:
    package = str(tmp_path / "affine.hsp")
    with hetsched.compile(graph_of("y"), first.name, "single") as executable:
        executable.save(package)
    code = WITHOUT_TVM.format(tests=str(Path(__file__).parent), name=first.name, package=package)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_parts_for_a_gpu(target: Target, first: Device) -> None:
    """With groups and memory of their own; what runs OpenCL here runs them too, slowly."""
    one = replace(
        own_memory(first), kind="gpu", isa="opencl fp64", group_items=64, local_nbytes=1 << 15
    )
    graph = graph_of("y", "x", "w")
    with target.load(target.compile(graph, one), graph, one) as kernel:
        found = list(map(kernel.send, kernel.run([kernel.receive(X)])))
    for array, expected in zip(found, (X * WEIGHT, X, WEIGHT), strict=True):
        np.testing.assert_allclose(array, expected, rtol=1e-6)


def test_a_type_that_a_gpu_lacks_is_a_refusal(target: Target, first: Device) -> None:
    one = replace(own_memory(first), kind="gpu", isa="opencl")
    value = helper.make_tensor_value_info
    made = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"], name="relu")],
        "narrow",
        [value("x", 10, (4,))],
        [value("y", 10, (4,))],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    graph = from_onnx(model)
    why = f"'x' is float16, and '{first.name}' has no fp16"
    assert target.refusal(graph, one) == why
    with pytest.raises(CompileError, match="has no fp16"):
        target.compile(graph, one)


WORKERS = """
import os
import sys
sys.path[:0] = [{tests!r}]
from test_opencl import X, artifact, graph_of
from hetsched.host import cores
from hetsched.opencl import runtime
from hetsched.plugin import load
from hetsched.target import Target
target = load(Target, "opencl")
# First a device whose launches are computed by who makes them.
for where in (cores()[:1], cores()[-2:], cores()[:2]):
    device = target.device(f"opencl:cpu@{{where[0]}}-{{where[-1]}}")
    with target.load(artifact(), graph_of("y"), device) as kernel:
        kernel.run([X])
        if kernel.asynchronous:
            for worker in runtime._workers:
                assert os.sched_getaffinity(worker) == set(where), (worker, where)
assert runtime._workers
"""


def test_workers_of_a_driver_are_held_on_the_cores_of_the_device(target: Target) -> None:
    if not any(found.is_pocl for found in survey().devices) or len(cores()) < 2:
        pytest.skip("PoCL on two cores or more is not here")
    code = WORKERS.format(tests=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_devices_on_different_cores_run_at_the_same_time(target: Target) -> None:
    if survey().devices[0].kind != "cpu" or len(cores()) < 2:
        pytest.skip("OpenCL on two cores or more is not here")
    graph = graph_of("y")
    names = [f"opencl:0@{core}" for core in cores()[:2]]
    made = target.compile(graph, target.device(names[0]))
    kernels = [target.load(made, graph, target.device(name)) for name in names]
    assert kernels[0].loaded.opened is not kernels[1].loaded.opened

    def wrong(kernel: Kernel) -> int:
        found = [(kernel.run([X + turn])[0], (X + turn) * WEIGHT) for turn in range(300)]
        return sum(not np.allclose(*pair) for pair in found)

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(wrong, kernels)) == [0, 0]
    for kernel in kernels:
        kernel.close()
