"""Operations on integers: bit for bit what their definition says, and none left in floats."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib.stride_tricks import sliding_window_view
from onnx import helper, numpy_helper

import hetsched
from hetsched.errors import SplitRefused
from hetsched.graph import Graph, from_onnx
from hetsched.lowering.quantized import quantized
from hetsched.operation import operation_of
from hetsched.plugin import load
from hetsched.rewrite import split
from hetsched.schedules.vectors import Vectors
from hetsched.split import Exit, Split
from hetsched.target import Target

Array = np.ndarray
DTYPES = ("uint8", "int8")
# This machine's, and narrower ones, each with another way to multiply bytes.
ISAS = ("", "x86_64 avx2 fma f16c avx_vnni", "x86_64 avx2 fma f16c", "x86_64")


@pytest.fixture(params=ISAS, scope="module")
def isa(request: pytest.FixtureRequest) -> str:
    """An instruction set that this processor has."""
    pytest.importorskip("tvm")
    here = load(Target, "cpu").device("cpu:0").isa
    if not set(request.param.split()) <= set(here.split()):
        pytest.skip(f"this processor has no {request.param}")
    return str(request.param or here)


def computed(isa: str, graph: Graph, *inputs: Array) -> list[Array]:
    """The results by TVM with the instructions of `isa`."""
    target = load(Target, "cpu")
    device = replace(target.device("cpu"), isa=isa)
    with target.load(target.compile(graph, device), graph, device) as kernel:
        return list(kernel.run(inputs))


def graph_of(
    node: onnx.NodeProto, inputs: dict[str, Array], constants: dict[str, Array], result: Array
) -> Graph:
    node.name = "node"

    def described(name: str, array: Array) -> onnx.ValueInfoProto:
        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        return helper.make_tensor_value_info(name, kind, array.shape)

    graph = helper.make_graph(
        [node], "part", [described(*item) for item in inputs.items()], [described("y", result)],
        initializer=[numpy_helper.from_array(array, name) for name, array in constants.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return from_onnx(helper.make_model(graph, opset_imports=opsets, ir_version=8))


def requantised(sums: Array, scale: Array, zero: Array) -> Array:
    """What the module of the lowering says, of exact sums."""
    limits = np.iinfo(zero.dtype)
    wrapped = sums.astype(np.int64).astype(np.int32).astype(np.float32)
    nearest = np.rint(wrapped * scale.astype(np.float32)).astype(np.float64)
    return np.clip(nearest + int(zero), limits.min, limits.max).astype(zero.dtype)


@dataclass(frozen=True)
class Case:
    """A convolution of integers; `wide` weights leave the range of bytes less their zero point."""

    x: tuple[int, ...]
    w: tuple[int, ...]
    group: int = 1
    strides: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    wide: bool = False


def exact_convolution(x: Array, w: Array, case: Case) -> Array:
    """The sums, in int64."""
    axes = x.ndim - 2
    strides, dilations = case.strides or (1,) * axes, case.dilations or (1,) * axes
    pads = case.pads or (0,) * (2 * axes)
    padded = np.pad(x, ((0, 0), (0, 0), *zip(pads[:axes], pads[axes:], strict=True)))
    reach = [(k - 1) * d + 1 for k, d in zip(w.shape[2:], dilations, strict=True)]
    windows = sliding_window_view(padded, reach, axis=tuple(range(2, 2 + axes)))
    steps = tuple(slice(None, None, s) for s in strides)
    taps = tuple(slice(None, None, d) for d in dilations)
    windows = windows[(slice(None), slice(None), *steps, *taps)]
    results = []
    for index in range(case.group):
        inputs, outputs = w.shape[1], w.shape[0] // case.group
        part = windows[:, index * inputs : (index + 1) * inputs]
        kernel = w[index * outputs : (index + 1) * outputs]
        last = tuple(range(2 + axes, 2 + 2 * axes))
        sums = np.tensordot(part, kernel, axes=((1, *last), (1, *range(2, 2 + axes))))
        results.append(np.moveaxis(sums, -1, 1))
    return np.concatenate(results, axis=1)


def check_convolution(isa: str, case: Case, dtypes: tuple[str, str, str], seed: int) -> None:
    rng = np.random.default_rng(seed)

    def drawn(dtype: str, shape: tuple[int, ...]) -> Array:
        limits = np.iinfo(dtype)
        return rng.integers(limits.min, limits.max + 1, shape).astype(dtype)

    x_type, w_type, y_type = dtypes
    outputs = case.w[0]
    x, x_zero, y_zero = drawn(x_type, case.x), drawn(x_type, ()), drawn(y_type, ())
    w = drawn(w_type, case.w)
    w_zero = np.full(outputs, 128 if w_type == "uint8" else 0).astype(w_type)
    if case.wide:
        w_zero = drawn(w_type, (outputs,))
    bias = rng.integers(-5000, 5000, outputs).astype(np.int32)
    x_scale, y_scale = np.float32(0.02), np.float32(0.05)
    w_scale = (rng.random(outputs) * 0.02 / np.sqrt(w[0].size)).astype(np.float32)
    upright = (-1, *(1,) * (x.ndim - 2))
    sums = exact_convolution(
        x.astype(np.int64) - int(x_zero),
        w.astype(np.int64) - w_zero.astype(np.int64).reshape(-1, *(1,) * (w.ndim - 1)),
        case,
    )
    sums += bias.reshape(upright)
    expected = requantised(sums, (x_scale * w_scale / y_scale).reshape(upright), y_zero)
    names = ("x", "xs", "xz", "w", "ws", "wz", "ys", "yz", "b")
    values = (x, x_scale, x_zero, w, w_scale, w_zero, y_scale, y_zero, bias)
    arrays = {name: np.asarray(value) for name, value in zip(names, values, strict=True)}
    attributes: dict[str, Any] = {"group": case.group}
    for name in ("strides", "dilations", "pads"):
        if getattr(case, name):
            attributes[name] = getattr(case, name)
    node = helper.make_node("QLinearConv", names, ["y"], **attributes)
    graph = graph_of(node, {"x": arrays.pop("x")}, arrays, expected)
    np.testing.assert_array_equal(computed(isa, graph, x)[0], expected)


CASES = (
    Case((1, 3, 17, 23), (20, 3, 7, 7), strides=(2, 2), pads=(3, 3, 3, 3)),
    Case((2, 32, 9, 14), (33, 32, 3, 3), pads=(1, 1, 1, 1)),
    Case((1, 24, 7, 7), (40, 24, 1, 1)),
    Case((1, 64, 14, 14), (48, 64, 1, 1), strides=(2, 2)),
    Case((1, 17, 9, 19), (70, 17, 3, 5), dilations=(2, 3), strides=(1, 2), pads=(0, 1, 2, 3)),
    Case((1, 8, 5, 6), (16, 8, 2, 2), pads=(0, 0, 1, 1)),
    Case((1, 64, 5, 5), (96, 32, 3, 3), group=2),
    Case((1, 12, 5, 5), (12, 4, 3, 3), group=3),
    Case((1, 32, 9, 13), (32, 1, 3, 3), group=32, pads=(1, 1, 1, 1)),
    Case((1, 20, 9, 13), (20, 1, 3, 3), group=20, pads=(1, 1, 1, 1), strides=(2, 2)),
    Case((2, 20, 8, 7), (20, 1, 5, 5), group=20, pads=(2, 2, 2, 2)),
    Case((1, 16, 8, 9), (16, 1, 3, 3), group=16, dilations=(2, 2)),
    Case((2, 24, 37), (20, 24, 3), pads=(1, 1)),
    Case((1, 24, 37), (24, 1, 4), group=24, pads=(2, 0)),
    Case((1, 8, 6, 6), (8, 8, 3, 3), wide=True),
)


TYPES = (("uint8", "int8", "uint8"), ("int8", "int8", "int8"), ("uint8", "uint8", "int8"))


@pytest.mark.parametrize(("seed", "case"), list(enumerate(CASES)), ids=map(str, CASES))
def test_convolutions_are_exact(isa: str, seed: int, case: Case) -> None:
    # Of the narrower ones, each sees a share of the cases, as code takes time to make.
    if isa in ISAS and seed % (len(ISAS) - 1) != ISAS.index(isa) - 1:
        return
    check_convolution(isa, case, TYPES[seed % len(TYPES)], seed)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    axes = draw(st.integers(1, 2))
    numbers = st.lists(st.integers(1, 3), min_size=axes, max_size=axes).map(tuple)
    kernel, strides, dilations = draw(numbers), draw(numbers), draw(numbers)
    pads = draw(st.lists(st.integers(0, 3), min_size=2 * axes, max_size=2 * axes).map(tuple))
    sizes = tuple(
        (k - 1) * d + draw(st.integers(1, 20)) for k, d in zip(kernel, dilations, strict=True)
    )
    group, depth, each = draw(
        st.sampled_from([(1, 5, 18), (1, 40, 3), (17, 1, 1), (2, 16, 32), (3, 2, 2)])
    )
    return Case(
        (draw(st.integers(1, 2)), group * depth, *sizes), (group * each, depth, *kernel),
        group, strides, dilations, pads, draw(st.booleans()),
    )  # fmt: skip


@settings(max_examples=15, deadline=None, derandomize=True)
@given(cases(), st.tuples(*[st.sampled_from(DTYPES)] * 3), st.integers(0, 99))
def test_any_convolution_is_exact(case: Case, dtypes: tuple[str, str, str], seed: int) -> None:
    check_convolution(load(Target, "cpu").device("cpu").isa, case, dtypes, seed)


PRODUCTS = (
    ((3, 8), 16, "column"),
    ((1, 64), 100, "one"),
    ((2, 5, 12), 33, "column"),
    ((4, 7), 9, "one"),
)


@pytest.mark.parametrize(("shape", "columns", "scales"), PRODUCTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_are_exact(
    isa: str, shape: tuple[int, ...], columns: int, scales: str, dtype: str
) -> None:
    rng = np.random.default_rng(columns)
    limits = np.iinfo(dtype)
    a = rng.integers(limits.min, limits.max + 1, shape).astype(dtype)
    b = rng.integers(-128, 128, (shape[-1], columns)).astype(np.int8)
    a_zero, y_zero = (np.array(value, dtype) for value in (limits.min + 7, limits.max - 60))
    b_scale = (rng.random(columns if scales == "column" else ()) * 0.01).astype(np.float32)
    b_zero = np.zeros(b_scale.shape, np.int8)
    a_scale, y_scale = np.float32(0.05), np.float32(0.04)
    sums = (a.astype(np.int64) - int(a_zero)) @ b.astype(np.int64)
    factor = a_scale * b_scale / y_scale
    constants = {
        "as": np.asarray(a_scale), "az": a_zero, "b": b, "bs": b_scale, "bz": b_zero,
        "ys": np.asarray(y_scale), "yz": y_zero,
    }  # fmt: skip
    expected = requantised(sums, factor, y_zero)
    node = helper.make_node("QLinearMatMul", ["a", *constants], ["y"])
    graph = graph_of(node, {"a": a}, constants, expected)
    np.testing.assert_array_equal(computed(isa, graph, a)[0], expected)
    if len(shape) == 2:
        bias = rng.integers(-3000, 3000, columns).astype(np.int32)
        expected = requantised(sums + bias, factor, y_zero)
        names = ["a", "as", "az", "b", "bs", "bz", "c", "ys", "yz"]
        turned = {**constants, "b": np.ascontiguousarray(b.T), "c": bias}
        node = helper.make_node("QGemm", names, ["y"], domain="com.microsoft", transB=1)
        graph = graph_of(node, {"a": a}, turned, expected)
        np.testing.assert_array_equal(computed(isa, graph, a)[0], expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shapes", [((1, 3, 5, 7), (1, 3, 5, 7)), ((2, 3, 4), (3, 1))])
def test_sums_are_those_of_onnx_runtime(
    isa: str, dtype: str, shapes: tuple[tuple[int, ...], tuple[int, ...]]
) -> None:
    rng = np.random.default_rng(3)
    limits = np.iinfo(dtype)
    a, b = (rng.integers(limits.min, limits.max + 1, shape).astype(dtype) for shape in shapes)
    constants: dict[str, Array] = {}
    for name in "aby":
        constants[f"{name}s"] = np.array(rng.random() * 0.05 + 0.01, np.float32)
        constants[f"{name}z"] = np.array(rng.integers(limits.min, limits.max + 1), dtype)
    names = ["a", "as", "az", "b", "bs", "bz", "ys", "yz"]
    node = helper.make_node("QLinearAdd", names, ["y"], domain="com.microsoft")
    graph = graph_of(node, {"a": a, "b": b}, constants, np.zeros(shapes[0], dtype))
    expected = _by_onnx_runtime(graph, {"a": a, "b": b})
    np.testing.assert_array_equal(computed(isa, graph, a, b)[0], expected)


def test_all_sums_of_two_bytes_are_those_of_onnx_runtime() -> None:
    pytest.importorskip("tvm")
    isa = load(Target, "cpu").device("cpu").isa
    every = np.arange(256, dtype=np.uint8)
    a, b = (np.ascontiguousarray(x) for x in np.meshgrid(every, every))
    for seed in range(6):
        rng = np.random.default_rng(seed)
        constants: dict[str, Array] = {}
        for name in "aby":
            constants[f"{name}s"] = np.array(rng.random() * 0.02 + 0.02, np.float32)
            constants[f"{name}z"] = np.array(rng.integers(100, 150), np.uint8)
        names = ["a", "as", "az", "b", "bs", "bz", "ys", "yz"]
        node = helper.make_node("QLinearAdd", names, ["y"], domain="com.microsoft")
        graph = graph_of(node, {"a": a, "b": b}, constants, a)
        expected = _by_onnx_runtime(graph, {"a": a, "b": b})
        np.testing.assert_array_equal(computed(isa, graph, a, b)[0], expected)


def concatenation(
    dtype: str, parts: dict[str, tuple[int, ...]], axis: int, pooled: bool, seed: int
) -> Graph:
    """Of dequantised bytes; those that are pooled before, by one pixel, come blocked.

    The first part has the scale and zero point of the result, the second a ratio with many ties.
    """
    rng = np.random.default_rng(seed)
    limits = np.iinfo(dtype)
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    constants: dict[str, Array] = {}
    scale, zero = rng.random() * 0.05 + 0.01, rng.integers(limits.min, limits.max + 1)
    for index, name in enumerate(["y", *parts]):
        factor = (1, 1, (0.5, 1.5, 2.5)[seed % 3], rng.random() * 2)[index]
        constants[f"{name}s"] = np.array(np.float32(scale) * np.float32(factor), np.float32)
        point = zero if index < 2 else rng.integers(limits.min, limits.max + 1)
        constants[f"{name}z"] = np.array(point, dtype)
    nodes = []
    for name in parts:
        read = name
        if pooled:
            read = f"{name}p"
            nodes.append(helper.make_node("MaxPool", [name], [read], kernel_shape=[1, 1]))
        factors = [f"{name}s", f"{name}z"]
        nodes.append(helper.make_node("DequantizeLinear", [read, *factors], [f"{name}f"]))
    nodes.append(helper.make_node("Concat", [f"{name}f" for name in parts], ["f"], axis=axis))
    nodes.append(helper.make_node("QuantizeLinear", ["f", "ys", "yz"], ["y"]))
    for index, node in enumerate(nodes):
        node.name = f"n{index}"
    shape = list(next(iter(parts.values())))
    shape[axis] = sum(part[axis] for part in parts.values())
    graph = helper.make_graph(
        nodes, "part",
        [helper.make_tensor_value_info(name, kind, part) for name, part in parts.items()],
        [helper.make_tensor_value_info("y", kind, shape)],
        initializer=[numpy_helper.from_array(array, name) for name, array in constants.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return from_onnx(onnx.shape_inference.infer_shapes(model))


CONCATENATIONS = (
    (1, (16, 32, 20), True),
    (1, (20, 16, 16), True),
    (1, (16, 16, 16), False),
    (-1, (16, 16, 16), True),
)


@pytest.mark.parametrize(("seed", "case"), list(enumerate(CONCATENATIONS)))
@pytest.mark.parametrize("dtype", DTYPES)
def test_concatenations_are_those_of_onnx_runtime(
    isa: str, dtype: str, seed: int, case: tuple[int, tuple[int, ...], bool]
) -> None:
    axis, channels, pooled = case
    parts = {name: (2, count, 5, 7) for name, count in zip("abc", channels, strict=True)}
    graph = concatenation(dtype, parts, axis, pooled, seed)
    assert [op.kind for op in quantized(graph).ops][-1] == "QLinearConcat"
    # All bytes, several times.
    inputs = {
        name: np.resize(np.arange(256, dtype=np.uint8), shape).view(dtype)
        for name, shape in parts.items()
    }
    expected = _by_onnx_runtime(graph, inputs)
    np.testing.assert_array_equal(computed(isa, graph, *inputs.values())[0], expected)


@pytest.mark.parametrize("ceil_mode", [0, 1])
def test_pools_are_exact(isa: str, ceil_mode: int) -> None:
    x = np.random.default_rng(0).integers(-128, 128, (1, 20, 14, 13)).astype(np.int8)
    node = helper.make_node(
        "MaxPool", ["x"], ["y"], kernel_shape=[3, 3], strides=[2, 3], pads=[1, 0, 0, 1],
        ceil_mode=ceil_mode,
    )  # fmt: skip
    shape = (1, 20, 7, 5 if ceil_mode else 4)
    graph = graph_of(node, {"x": x}, {}, np.zeros(shape, np.int8))
    expected = _by_onnx_runtime(graph, {"x": x})
    np.testing.assert_array_equal(computed(isa, graph, x)[0], expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantisation_rounds_to_even(isa: str, dtype: str) -> None:
    halves = np.arange(-300, 300, dtype=np.float32) + np.float32(0.5)
    x = np.concatenate([halves, [np.inf, -np.inf, 1e30, -0.0]]).astype(np.float32) * 0.25
    limits = np.iinfo(dtype)
    zero = np.array(limits.min + 101, dtype)
    constants = {"s": np.array(0.25, np.float32), "z": zero}
    places = np.rint(x / np.float32(0.25)) + int(zero)
    expected = np.clip(places, limits.min, limits.max).astype(dtype)
    node = helper.make_node("QuantizeLinear", ["x", "s", "z"], ["y"])
    graph = graph_of(node, {"x": x}, constants, expected)
    np.testing.assert_array_equal(computed(isa, graph, x)[0], expected)


def _by_onnx_runtime(graph: Graph, inputs: dict[str, Array]) -> Array:
    """ONNX Runtime's result, signed tensors in integers too."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdqisint8allowed", "1")
    model = hetsched.graph.to_onnx(graph).SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    found: Array = session.run(None, inputs)[0]
    return found


class Network:
    """A float network node by node, with drawn weights."""

    def __init__(self, *shape: int) -> None:
        self.rng = np.random.default_rng(0)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, Array] = {}
        self.input = helper.make_tensor_value_info("x", 1, shape)

    def add(self, kind: str, x: list[str], *shapes: tuple[int, ...], **attributes: Any) -> str:
        names = list(x)
        for shape in shapes:
            names.append(f"w{len(self.weights)}")
            scale = np.float32(2 / np.sqrt(max(1, np.prod(shape[1:]))))
            self.weights[names[-1]] = scale * self.rng.standard_normal(shape, np.float32)
        self.nodes.append(helper.make_node(kind, names, [f"t{len(self.nodes)}"], **attributes))
        self.nodes[-1].name = f"n{len(self.nodes)}"
        return str(self.nodes[-1].output[0])

    def model(self, output: str) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes, "net", [self.input], [onnx.ValueInfoProto(name=output)],
            initializer=[numpy_helper.from_array(a, name) for name, a in self.weights.items()],
        )  # fmt: skip
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        return onnx.shape_inference.infer_shapes(model)


def residual_network() -> onnx.ModelProto:
    net = Network(1, 3, 20, 20)
    pads = {"pads": [1, 1, 1, 1]}
    x = net.add("Relu", [net.add("Conv", ["x"], (24, 3, 3, 3), (24,), **pads)])
    x = net.add("MaxPool", [x], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    y = net.add(
        "Clip", [net.add("Conv", [x], (24, 1, 3, 3), (24,), group=24, **pads), "zero", "six"]
    )
    y = net.add("Conv", [y], (24, 24, 1, 1))
    x = net.add("Relu", [net.add("Add", [x, y])])
    y = net.add("Conv", [x], (40, 24, 3, 3), (40,), strides=[2, 2])
    z = net.add("Conv", [x], (40, 24, 3, 3), (40,), strides=[2, 2])
    x = net.add("Conv", [x], (32, 24, 3, 3), (32,), strides=[2, 2])
    x = net.add("Concat", [x, net.add("Add", [y, z])], axis=1)
    x = net.add("GlobalAveragePool", [x])
    x = net.add("Flatten", [x])
    x = net.add("Gemm", [x], (10, 72), (10,), transB=1)
    net.weights |= {"zero": np.array(0, np.float32), "six": np.array(6, np.float32)}
    return net.model(x)


@pytest.fixture(scope="module", params=DTYPES)
def quantised_model(request: pytest.FixtureRequest) -> onnx.ModelProto:
    bench = import_module("bench.quantized")
    made: onnx.ModelProto = bench.quantised(residual_network(), request.param)
    return made


KERNELS = {
    "Clip": 0, "Conv": 0, "Gemm": 0, "Add": 0, "Concat": 0, "QLinearConv": 6, "QLinearAdd": 2,
    "QLinearConcat": 1, "QGemm": 1, "QLinearGlobalAveragePool": 1, "MaxPool": 1,
    "QuantizeLinear": 1, "DequantizeLinear": 1,
}  # fmt: skip


def test_nothing_of_a_quantised_network_stays_in_floats(quantised_model: onnx.ModelProto) -> None:
    graph = hetsched.read_onnx(quantised_model)
    kinds = Counter(op.kind for op in quantized(graph).ops)
    assert {kind: kinds[kind] for kind in KERNELS} == KERNELS
    # And groups hand over integers, so that each is the kernel that it becomes.
    handed = [t for group in graph.groups for t in group.outputs if t not in graph.outputs]
    assert {tensor.dtype for tensor in handed} <= set(DTYPES)


def test_a_quantised_network_is_exact(isa: str, quantised_model: onnx.ModelProto) -> None:
    graph = hetsched.read_onnx(quantised_model)
    if isa in ISAS[1:-1] and "int8" in {t.dtype for op in graph.ops for t in op.writes}:
        return
    x = np.random.default_rng(5).random(graph.inputs[0].shape, np.float32)
    expected = _by_onnx_runtime(graph, {graph.inputs[0].name: x})
    np.testing.assert_array_equal(computed(isa, graph, x)[0], expected)


def test_groups_hand_over_the_integers_of_the_whole(quantised_model: onnx.ModelProto) -> None:
    pytest.importorskip("tvm")
    isa = load(Target, "cpu").device("cpu").isa
    graph = hetsched.read_onnx(quantised_model)
    x = np.random.default_rng(5).random(graph.inputs[0].shape, np.float32)
    expected = _by_onnx_runtime(graph, {graph.inputs[0].name: x})
    values = {graph.inputs[0].name: x}
    for group in graph.groups:
        part = graph.part(group.ops, group.name)
        inputs = [values[tensor.name] for tensor in part.inputs]
        results = computed(isa, part, *inputs)
        values.update(zip((t.name for t in part.outputs), results, strict=True))
    np.testing.assert_array_equal(values[graph.outputs[0].name], expected)


@pytest.mark.parametrize("axis", [1, 2])
def test_pieces_hand_over_integers(quantised_model: onnx.ModelProto, axis: int) -> None:
    """What dequantises weights is in each piece that reads them: floats are rounded otherwise."""
    graph = hetsched.read_onnx(quantised_model)
    group = next(group for group in graph.groups if any(op.kind == "Conv" for op in group.ops))
    (written,) = group.outputs
    middle = written.shape[axis] // 2
    exit_ = Exit(written.name, ((axis, (0, middle, written.shape[axis])),))
    pieces = split(graph, [Split(tuple(op.name for op in group.ops), (exit_,))])
    handed = [t for group in pieces.groups for t in group.outputs if t not in pieces.outputs]
    assert {tensor.dtype for tensor in handed} <= set(DTYPES)


def test_quantised_sums_are_not_cut(quantised_model: onnx.ModelProto) -> None:
    graph = hetsched.read_onnx(quantised_model)
    group = next(group for group in graph.groups if any(op.kind == "Conv" for op in group.ops))
    convolution = next(op for op in group.ops if op.kind == "Conv")
    depth = operation_of(convolution).depth(convolution)
    exit_ = Exit(convolution.output().name, ((0, (0, 1, depth)),), sum=True)
    with pytest.raises(SplitRefused, match="dequantised"):
        split(graph, [Split((convolution.name,), (exit_,))])


def instructions() -> Iterator[tuple[str, str]]:
    wide = "avx2 fma f16c avx512f avx512bw avx512dq avx512vl"
    yield f"x86_64 {wide} avx512_vnni", "vpdpbusd"
    yield f"x86_64 {wide}", "vpmaddwd"
    yield "x86_64 avx2 fma f16c avx_vnni", "vpdpbusd"
    yield "x86_64 avx2 fma f16c", "vpmaddwd"
    yield "x86_64", "pmaddwd"
    yield "aarch64 asimd asimddp", "sdot"
    yield "aarch64 asimd", "mla"
    yield "riscv64", "mul"


@pytest.mark.parametrize(("architecture", "instruction"), list(instructions()))
def test_kernels_use_the_instructions_for_bytes(architecture: str, instruction: str) -> None:
    tvm = pytest.importorskip("tvm")
    integer = import_module("hetsched.schedules.integer")
    window = import_module("hetsched.schedules.window").Window
    llvm = import_module("hetsched.targets.cpu").llvm(architecture)
    vectors = Vectors.of(architecture)
    place = window((3, 3), (1, 1), (1, 1), (1, 1, 1, 1), (8, 8), (8, 8))
    shape = (1, 2, 64, vectors.lanes)
    for function in (
        integer.convolution(place, shape, 2, 1, (3, 5), vectors),
        integer.depthwise(place, shape, (3, 5), vectors),
    ):
        built = tvm.tirx.build(tvm.IRModule({"main": function}), target=tvm.target.Target(llvm))
        assert instruction in built.inspect_source("asm")
