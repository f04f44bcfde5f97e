"""One suite for every target: compile, pack, load and run small graphs as ONNX Runtime does."""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from hetsched import oracle
from hetsched.device import Device
from hetsched.dtype import onnx_code, tolerance
from hetsched.errors import CompileError, DeviceError, PackageError, PartError
from hetsched.graph import DETACHED_NBYTES, Graph, from_onnx
from hetsched.plugin import load, names
from hetsched.target import Artifact, Kernel, Target

Array = np.ndarray


@dataclass(frozen=True, eq=False)
class Case:
    """A model with inputs that suit it."""

    name: str
    model: onnx.ModelProto
    inputs: Mapping[str, Array]

    @property
    def graph(self) -> Graph:
        return from_onnx(self.model)

    @property
    def arrays(self) -> list[Array]:
        return [self.inputs[tensor.name] for tensor in self.graph.inputs]

    @property
    def expected(self) -> list[Array]:
        found = oracle.run(self.model, self.inputs)
        return [found[tensor.name] for tensor in self.graph.outputs]


def case(
    name: str,
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, Array],
    outputs: Sequence[str],
    constants: Mapping[str, Array] | None = None,
    opset: int = 17,
) -> Case:
    for index, node in enumerate(nodes):
        node.name = f"{node.op_type.lower()}{index}"
    graph = helper.make_graph(
        nodes,
        name,
        [
            helper.make_tensor_value_info(name, onnx_code(x.dtype.name), x.shape)
            for name, x in inputs.items()
        ],
        [onnx.ValueInfoProto(name=name) for name in outputs],
        [numpy_helper.from_array(x, name) for name, x in (constants or {}).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    known = {v.name: v for v in graph.input} | {
        t.name: helper.make_tensor_value_info(t.name, t.data_type, t.dims)
        for t in graph.initializer
    }
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    for value in inferred.graph.output:
        if not value.type.tensor_type.elem_type:
            value.CopyFrom(known[value.name])
    return Case(name, inferred, inputs)


RNG = np.random.default_rng(0)


def normal(*shape: int, dtype: Any = np.float32) -> Array:
    return (RNG.standard_normal(shape) * 0.5).astype(dtype)


node = helper.make_node


def residual() -> Case:
    shape = (1, 16, 8, 8)
    constants = {"w": normal(16, 16, 3, 3), "v": normal(16, 16, 1, 1), "vb": normal(16)} | {
        name: RNG.random(16, np.float32) + 0.5 for name in ("scale", "bias", "mean", "variance")
    }
    nodes = [
        node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
        node("BatchNormalization", ["c", "scale", "bias", "mean", "variance"], ["n"]),
        node("Relu", ["n"], ["r"]),
        node("Conv", ["r", "v", "vb"], ["d"]),
        node("Add", ["d", "x"], ["s"]),
        node("Relu", ["s"], ["y"]),
    ]
    return case("residual", nodes, {"x": normal(*shape)}, ["y"], constants)


def conv(name: str, x: Array, w: Array, kind: str = "Conv", **attributes: Any) -> Case:
    return case(name, [node(kind, ["x", "w"], ["y"], **attributes)], {"x": x}, ["y"], {"w": w})


def recurrent(kind: str, gates: int) -> Case:
    constants = {
        "w": normal(2, gates * 5, 4),
        "r": normal(2, gates * 5, 5),
        "b": normal(2, gates * 10),
    }
    nodes = [
        node(kind, ["x", "w", "r", "b"], ["y", "h"], hidden_size=5, direction="bidirectional"),
    ]
    return case(kind, nodes, {"x": normal(6, 2, 4)}, ["y", "h"], constants)


def cases() -> Iterator[Case]:
    x, image = normal(2, 3, 4), normal(1, 8, 9, 9)
    yield residual()
    yield conv("depthwise", image, normal(8, 1, 3, 3), group=8, strides=[2, 2])
    yield conv("grouped", image, normal(16, 4, 3, 3), group=2, pads=[1, 0, 2, 1])
    yield conv("conv1d", normal(2, 8, 20), normal(4, 8, 5), dilations=[2])
    yield conv("transposed", image, normal(8, 4, 3, 3), "ConvTranspose", strides=[2, 2])
    yield case(
        "gemm", [node("Gemm", ["x", "w", "b"], ["y"], transB=1, alpha=0.5)],
        {"x": normal(3, 20)}, ["y"], {"w": normal(30, 20), "b": normal(30)},
    )  # fmt: skip
    yield case(
        "batched", [node("MatMul", ["a", "b"], ["y"])],
        {"a": normal(2, 1, 3, 4), "b": normal(5, 4, 6)}, ["y"],
    )  # fmt: skip
    yield case(
        "layernorm", [node("LayerNormalization", ["x", "s", "b"], ["y"])], {"x": x}, ["y"],
        {"s": normal(4), "b": normal(4)},
    )  # fmt: skip
    yield case("softmax", [node("Softmax", ["x"], ["y"])], {"x": x}, ["y"])
    yield case("flat_softmax", [node("Softmax", ["x"], ["y"], axis=1)], {"x": x}, ["y"], opset=11)
    yield recurrent("LSTM", 4)
    yield recurrent("GRU", 3)
    yield case(
        "embedding", [node("Gather", ["w", "i"], ["y"])], {"i": np.array([[3, -1], [0, 9]])}, ["y"],
        {"w": normal(10, 64)},
    )  # fmt: skip
    yield case("bool", [node("Greater", ["x", "z"], ["y"]), node("Not", ["y"], ["n"])],
               {"x": x, "z": normal(4)}, ["y", "n"])  # fmt: skip
    yield case("bool_in", [node("And", ["a", "b"], ["y"])], {"a": x > 0, "b": x < 0.5}, ["y"])
    half = normal(3, 40, dtype=np.float16)
    yield case(
        "half", [node("MatMul", ["x", "w"], ["m"]), node("Relu", ["m"], ["y"])], {"x": half}, ["y"],
        {"w": normal(40, 20, dtype=np.float16)},
    )  # fmt: skip
    small = RNG.integers(-100, 100, (3, 50), np.int8)
    yield case(
        "int8", [node("Transpose", ["x"], ["t"]), node("Concat", ["t", "t"], ["y"], axis=1)],
        {"x": small}, ["y"],
    )  # fmt: skip
    yield case("uint8", [node("Max", ["x", "w"], ["y"])], {"x": small.view(np.uint8)}, ["y"],
               {"w": small.view(np.uint8)[::-1].copy()})  # fmt: skip
    yield case("int64", [node("Mul", ["x", "x"], ["y"])], {"x": np.array([2**40, -3])}, ["y"])
    brain = normal(4, 300).astype(ml_dtypes.bfloat16)
    yield case(
        "bfloat16", [node("Cast", ["x"], ["f"], to=1), node("Add", ["f", "f"], ["a"]),
                     node("Cast", ["a"], ["y"], to=16)],
        {"x": brain}, ["y"],
    )  # fmt: skip
    yield case("scalar", [node("Neg", ["x"], ["y"]), node("Exp", ["y"], ["z"])],
               {"x": np.array(0.5, np.float32)}, ["z", "y"])  # fmt: skip
    yield case(
        "several", [node("Split", ["x"], ["a", "b"], axis=2), node("Relu", ["a"], ["r"])],
        {"x": x}, ["b", "r", "a"],
    )  # fmt: skip
    yield case("passed", [node("Relu", ["x"], ["y"])], {"x": x, "z": x + 1}, ["z", "y", "x"])
    yield case("identity", [node("Identity", ["x"], ["y"])], {"x": x}, ["y"])
    yield case("reshape", [node("Flatten", ["x"], ["y"])], {"x": x}, ["y"])
    yield case(
        "constant", [node("Relu", ["x"], ["y"])], {"x": x}, ["w", "y"], {"w": normal(20, 30)}
    )
    yield case("kept", [node("Identity", ["w"], ["y"]), node("Add", ["x", "w"], ["z"])],
               {"x": x}, ["y", "z"], {"w": normal(100, 1, 3, 4)})  # fmt: skip
    yield case(
        "names", [node("Relu", ["a:b/c"], ["a_b_c"]), node("Add", ["a_b_c", "a.b.c"], ["a b c"])],
        {"a:b/c": x, "a.b.c": x}, ["a b c"],
    )  # fmt: skip
    yield case("tile", [node("Tile", ["x", "n"], ["y"])], {"x": normal(4, 4, 8)}, ["y"],
               {"n": np.array([5, 1, 7])})  # fmt: skip


CASES = {item.name: item for item in cases()}


@pytest.fixture(params=names(Target), scope="module")
def target(request: pytest.FixtureRequest) -> Target:
    found = load(Target, request.param)
    why = found.unavailable()
    if why is not None or not found.devices():
        pytest.skip(why or "; ".join(found.problems()))
    return found


@pytest.fixture(scope="module")
def device(target: Target) -> Device:
    return target.device(target.devices()[0])


@pytest.fixture(scope="module")
def compiled(target: Target, device: Device) -> Callable[[str], Artifact]:
    """Artifacts by the name of their case, each compiled once; skips what the target refuses."""
    artifacts: dict[str, Artifact] = {}

    def artifact(name: str) -> Artifact:
        if name not in artifacts:
            graph = CASES[name].graph
            why = target.refusal(graph, device)
            if why is not None:
                with pytest.raises(CompileError):
                    target.compile(graph, device)
                pytest.skip(why)
            artifacts[name] = target.compile(graph, device)
        return artifacts[name]

    return artifact


Open = Callable[[str], Kernel]


@pytest.fixture
def opened(target: Target, device: Device, compiled: Callable[[str], Artifact]) -> Iterator[Open]:
    kernels: list[Kernel] = []

    def kernel(name: str) -> Kernel:
        kernels.append(target.load(compiled(name), CASES[name].graph, device))
        return kernels[-1]

    yield kernel
    for item in kernels:
        item.close()


def results(kernel: Kernel, arrays: Sequence[Array]) -> list[Array]:
    buffers = kernel.run([kernel.receive(array) for array in arrays])
    return [kernel.send(buffer) for buffer in buffers]


def assert_equal(found: Sequence[Array], expected: Sequence[Array]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        wide = other.astype(np.float64)
        allowed = tolerance(other.dtype.name).relative * np.abs(wide).max()
        np.testing.assert_allclose(one.astype(np.float64), wide, rtol=0, atol=allowed)


@pytest.mark.parametrize("name", CASES)
def test_results_are_those_of_onnx_runtime(name: str, opened: Open) -> None:
    arrays = CASES[name].arrays
    before = [array.copy() for array in arrays]
    kernel = opened(name)
    first = results(kernel, arrays)
    copies = [array.copy() for array in first]
    assert_equal(first, CASES[name].expected)
    # Once more, with other values and again with the same ones.
    results(kernel, [array[..., ::-1] if array.ndim else array for array in arrays])
    second = results(kernel, arrays)
    for (
        one,
        kept,
        again,
    ) in zip(first, copies, second, strict=True):
        np.testing.assert_array_equal(one, kept, "an earlier output is overwritten")
        np.testing.assert_array_equal(again, kept, "a repeated run differs")
    for array, kept in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(array, kept, "an input is modified")


@pytest.mark.parametrize("name", ["residual", "bool_in", "half", "int8", "bfloat16", "embedding"])
def test_inputs_of_any_layout(name: str, opened: Open) -> None:
    kernel = opened(name)
    expected = CASES[name].expected
    for change in (unaligned, strided, read_only):
        assert_equal(results(kernel, [change(array) for array in CASES[name].arrays]), expected)


def unaligned(array: Array) -> Array:
    memory = np.empty(array.nbytes + 65, np.uint8)
    start = -memory.ctypes.data % 64 + 1
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def strided(array: Array) -> Array:
    return np.repeat(array, 2, axis=-1)[..., ::2]


def read_only(array: Array) -> Array:
    copy = array.copy()
    copy.flags.writeable = False
    return copy


@pytest.mark.parametrize("name", ["passed", "identity", "reshape", "constant", "kept"])
def test_outputs_are_nobody_elses(name: str, opened: Open) -> None:
    kernel = opened(name)
    arrays = [array.copy() for array in CASES[name].arrays]
    expected = [array.copy() for array in CASES[name].expected]
    found = results(kernel, arrays)
    for array in arrays:
        array[...] = 0
    assert_equal(found, expected)
    for array in found:
        if array.flags.writeable:
            array[...] = 0
    assert_equal(results(kernel, CASES[name].arrays), expected)


def test_outputs_outlive_the_kernel(opened: Open) -> None:
    kernel = opened("residual")
    found = results(kernel, CASES["residual"].arrays)
    kernel.close()
    del kernel
    gc.collect()
    assert_equal(found, CASES["residual"].expected)


def test_the_same_output_twice(target: Target, device: Device) -> None:
    graph = CASES["residual"].graph
    if why := target.refusal(graph, device):
        pytest.skip(why)
    twice = replace(graph, outputs=graph.outputs * 2)
    with target.load(target.compile(twice, device), twice, device) as kernel:
        assert_equal(results(kernel, CASES["residual"].arrays), CASES["residual"].expected * 2)


def test_two_kernels_of_one_artifact(opened: Open) -> None:
    one, other = opened("residual"), opened("residual")
    arrays, expected = CASES["residual"].arrays, CASES["residual"].expected
    first = results(one, arrays)
    results(other, [2 * array for array in arrays])
    one.close()
    assert_equal(first, expected)
    assert_equal(results(other, arrays), expected)


def test_kernels_of_several_threads(opened: Open) -> None:
    kernels = [opened("residual"), opened("LSTM")]

    def work(kernel: Kernel, name: str) -> None:
        for _ in range(20):
            assert_equal(results(kernel, CASES[name].arrays), CASES[name].expected)

    with ThreadPoolExecutor(2) as pool:
        for future in [
            pool.submit(work, *pair) for pair in zip(kernels, ("residual", "LSTM"), strict=True)
        ]:
            future.result()


def test_weights_are_apart_and_may_be_mapped(
    target: Target, device: Device, compiled: Callable[[str], Artifact], tmp_path: Path
) -> None:
    artifact = compiled("residual")
    assert all(array.nbytes >= DETACHED_NBYTES for array in artifact.weights.values())
    mapped = {}
    for index, (name, array) in enumerate(artifact.weights.items()):
        path = tmp_path / str(index)
        path.write_bytes(array.tobytes())
        mapped[name] = np.memmap(path, array.dtype, "r", shape=array.shape)
    packed = replace(artifact, weights=mapped)
    with target.load(packed, CASES["residual"].graph, device) as kernel:
        assert_equal(results(kernel, CASES["residual"].arrays), CASES["residual"].expected)


def test_unchanged_weights_keep_their_names(compiled: Callable[[str], Artifact]) -> None:
    graph = CASES["embedding"].graph
    assert set(compiled("embedding").weights) <= set(graph.constants)


def test_compiling_is_deterministic(target: Target, device: Device) -> None:
    graph = CASES["gemm"].graph
    if why := target.refusal(graph, device):
        pytest.skip(why)
    one, other = target.compile(graph, device), target.compile(graph, device)
    assert list(one.files) == list(other.files)
    assert list(one.weights) == list(other.weights)


def test_damaged_artifacts_are_refused(
    target: Target, device: Device, compiled: Callable[[str], Artifact]
) -> None:
    artifact, graph = compiled("residual"), CASES["residual"].graph
    for name, content in artifact.files.items():
        for damage in (b"", b"\0" * 100, content[: len(content) // 2], content[:-100]):
            damaged = replace(artifact, files={**artifact.files, name: damage})
            with pytest.raises(PackageError):
                target.load(damaged, graph, device).close()
    if artifact.weights:
        with pytest.raises(PackageError):
            target.load(replace(artifact, weights={}), graph, device).close()


def test_foreign_instruction_sets_are_refused(
    target: Target, device: Device, compiled: Callable[[str], Artifact]
) -> None:
    artifact = compiled("residual")
    if artifact.requires:
        foreign = replace(artifact, requires=f"{artifact.requires} avx9")
        with pytest.raises(PackageError, match="avx9"):
            target.load(foreign, CASES["residual"].graph, device)


def test_wrong_inputs_are_an_error(opened: Open) -> None:
    kernel = opened("residual")
    with pytest.raises(PartError, match="residual"):
        results(kernel, [normal(1, 16, 8, 9)])
    assert_equal(results(kernel, CASES["residual"].arrays), CASES["residual"].expected)


def test_refusals_name_operation_and_node(target: Target, device: Device) -> None:
    x = normal(2, 3)
    strange = case(
        "strange", [node("Relu", ["x"], ["r"]), node("Relu", ["r"], ["y"])], {"x": x}, ["y"]
    )
    graph = strange.graph
    if why := target.refusal(graph, device):
        pytest.skip(why)
    last = replace(graph.ops[1], kind="Unheard")
    graph = replace(graph, ops=(graph.ops[0], last))
    why = target.refusal(graph, device)
    assert why is not None
    assert "Unheard" in why
    assert "relu1" in why
    assert "\n" not in why
    with pytest.raises(CompileError, match=r"strange.*Unheard"):
        target.compile(graph, device)


def test_devices_are_those_that_there_are(target: Target) -> None:
    for name in target.devices():
        assert target.device(name).name == name
        assert target.device(name).target == target.name
    with pytest.raises(DeviceError):
        target.device(f"{target.name}:4096")


def test_versions_name_the_compiler(target: Target) -> None:
    assert target.version().strip()
