"""Scheduled loops against ONNX Runtime: shapes that fit no tile, on wide and narrow vectors."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from hetsched import oracle
from hetsched.device import Device
from hetsched.dtype import onnx_code
from hetsched.graph import from_onnx
from hetsched.schedules.vectors import Vectors
from hetsched.target import Target

Array = np.ndarray
RNG = np.random.default_rng(0)
# Of the largest element; sums of a few thousand products in another order.
TOLERANCE = 1e-5

Model = tuple[str, onnx.ModelProto, list[Array]]


def normal(*shape: int) -> Array:
    return RNG.standard_normal(shape, np.float32)


def model(name: str, nodes: list[Any], x: list[Array], weights: list[Array]) -> Model:
    """The inputs are x0, x1, ..., the constants w0, w1, ..., the output is y."""
    for index, node in enumerate(nodes):
        node.name = f"node{index}"
    inputs = [
        helper.make_tensor_value_info(f"x{i}", onnx_code(a.dtype.name), a.shape)
        for i, a in enumerate(x)
    ]
    graph = helper.make_graph(
        nodes, "part", inputs, [onnx.ValueInfoProto(name="y")],
        initializer=[numpy_helper.from_array(a, f"w{i}") for i, a in enumerate(weights)],
    )  # fmt: skip
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return name, made, x


def one(kind: str, x: list[Array], weights: list[Array], **attributes: Any) -> Model:
    names = [f"x{i}" for i in range(len(x))] + [f"w{i}" for i in range(len(weights))]
    shapes = " ".join("x".join(map(str, a.shape)) for a in (*x, *weights))
    told = ",".join(f"{key}={value}" for key, value in attributes.items())
    node = helper.make_node(kind, names, ["y"], **attributes)
    return model(f"{kind} {shapes} {told}", [node], x, weights)


def convolution(x: tuple[int, ...], w: tuple[int, ...], **attributes: Any) -> Model:
    return one("Conv", [normal(*x)], [normal(*w), normal(w[0])], **attributes)


def network(x: tuple[int, ...], *nodes: tuple[Any, ...], extra: tuple[int, ...] = ()) -> Model:
    """A chain of nodes (kind, weight shapes, attributes) from x0; `extra` is x1 of an Add."""
    weights: list[Array] = []
    made = []
    last = "x0"
    for index, (kind, shapes, attributes) in enumerate(nodes):
        names = []
        for shape in shapes:
            names.append(f"w{len(weights)}")
            weights.append(normal(*shape))
        if kind == "Add" and not shapes:
            names.append("x1")
        out = "y" if index == len(nodes) - 1 else f"t{index}"
        made.append(helper.make_node(kind, [last, *names], [out], **attributes))
        last = out
    inputs = [normal(*x)] + ([normal(*extra)] if extra else [])
    return model(" ".join([str(x), *(node[0] for node in nodes)]), made, inputs, weights)


def gated(channels: int) -> Model:
    """Squeeze and excitation: a pixel of each channel scales all of them."""
    nodes = [
        helper.make_node("Conv", ["x0", "w0"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("GlobalAveragePool", ["a"], ["m"]),
        helper.make_node("Conv", ["m", "w1"], ["s"]),
        helper.make_node("Sigmoid", ["s"], ["g"]),
        helper.make_node("Mul", ["a", "g"], ["y"]),
    ]
    weights = [normal(channels, 8, 3, 3), normal(channels, channels, 1, 1)]
    return model(f"gated {channels}", nodes, [normal(1, 8, 6, 7)], weights)


def joined(first: int, second: int) -> Model:
    nodes = [
        helper.make_node("Conv", ["x0", "w0"], ["a"]),
        helper.make_node("Conv", ["x0", "w1"], ["b"]),
        helper.make_node("Concat", ["a", "b"], ["c"], axis=1),
        helper.make_node("Relu", ["c"], ["y"]),
    ]
    weights = [normal(first, 24, 1, 1), normal(second, 24, 1, 1)]
    return model(f"joined {first} {second}", nodes, [normal(1, 24, 5, 5)], weights)


def heads() -> Model:
    """As attention has them: three matrices from one product, of which each head has columns."""
    shapes = [np.array(shape, np.int64) for shape in ((1, 9, 3, 40), (1, 9, 5, 8), (1, 9, 40))]
    nodes = [
        helper.make_node("MatMul", ["x0", "w0"], ["all"]),
        helper.make_node("Reshape", ["all", "w1"], ["split"]),
        helper.make_node("Transpose", ["split"], ["parts"], perm=[2, 0, 1, 3]),
    ]
    for index, (name, perm) in enumerate((("q", (0, 2, 1, 3)), ("k", (0, 2, 3, 1)), ("v", ()))):
        perm = perm or (0, 2, 1, 3)
        nodes += [
            helper.make_node("Gather", ["parts", f"w{index + 4}"], [f"{name}0"], axis=0),
            helper.make_node("Reshape", [f"{name}0", "w2"], [f"{name}1"]),
            helper.make_node("Transpose", [f"{name}1"], [name], perm=perm),
        ]
    nodes += [
        helper.make_node("MatMul", ["q", "k"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["shares"], axis=-1),
        helper.make_node("MatMul", ["shares", "v"], ["mixed"]),
        helper.make_node("Transpose", ["mixed"], ["back"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["back", "w3"], ["y"]),
    ]
    places = [np.array(place, np.int64) for place in (0, 1, -1)]
    weights = [normal(24, 120), *shapes, *places]
    return model("heads", nodes, [normal(1, 9, 24)], weights)


def models() -> Iterator[Model]:
    yield convolution((1, 3, 17, 23), (20, 3, 3, 3), strides=[2, 2], pads=[1, 1, 1, 1])
    yield convolution((1, 1, 1, 400), (33, 1, 1, 32), strides=[1, 16])
    yield convolution((2, 24, 7, 7), (40, 24, 1, 1))
    yield convolution((1, 1, 90, 1), (20, 1, 32, 1), strides=[4, 1], pads=[3, 0, 2, 0])
    yield convolution((1, 20, 37, 1), (33, 20, 5, 1), strides=[2, 1], pads=[2, 0, 1, 0])
    yield convolution((1, 20, 37, 1), (20, 1, 5, 1), group=20, pads=[2, 0, 1, 0])
    yield convolution((1, 16, 11, 13), (64, 16, 1, 1))
    yield convolution((1, 32, 14, 14), (48, 32, 1, 1), strides=[2, 2])
    yield convolution((2, 17, 9, 19), (33, 17, 3, 3), pads=[0, 1, 2, 3])
    yield convolution((1, 32, 8, 14), (32, 32, 3, 3), pads=[1, 1, 1, 1])
    yield convolution((1, 16, 15, 17), (16, 16, 3, 5), dilations=[2, 3], strides=[1, 2])
    yield convolution((1, 48, 9, 9), (1, 48, 3, 3), auto_pad="SAME_LOWER")
    yield convolution((1, 32, 9, 13), (32, 1, 3, 3), group=32, pads=[1, 1, 1, 1], strides=[2, 2])
    yield convolution((2, 20, 8, 8), (20, 1, 5, 5), group=20, pads=[2, 2, 2, 2])
    yield convolution((1, 20, 8, 8), (40, 1, 3, 3), group=20)
    yield convolution((1, 64, 6, 7), (64, 4, 3, 3), group=16, pads=[1, 1, 1, 1])
    yield convolution((1, 64, 5, 5), (96, 32, 3, 3), group=2)
    yield convolution((1, 12, 5, 5), (12, 4, 3, 3), group=3)
    yield convolution((1, 68, 7, 7), (68, 17, 1, 1), group=4)
    yield convolution((1, 72, 6, 5), (96, 24, 3, 3), group=3, pads=[1, 1, 1, 1], strides=[2, 1])
    yield one("MaxPool", [normal(1, 20, 9, 9)], [], kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    for x, w, more in (
        ((1, 24, 5, 7), (24, 20, 4, 4), {"strides": [2, 2], "pads": [1, 1, 1, 1]}),
        ((1, 16, 1, 1), (16, 20, 4, 4), {"strides": [1, 1]}),
        ((1, 16, 1, 1), (16, 8, 4, 3), {"strides": [2, 2], "pads": [1, 0, 1, 1]}),
        ((2, 16, 6, 5), (16, 16, 2, 2), {"strides": [2, 2]}),
        ((1, 16, 4, 5), (16, 33, 5, 3), {"strides": [3, 2], "pads": [2, 1, 0, 1]}),
        ((1, 16, 4, 4), (16, 8, 2, 2),
         {"strides": [2, 2], "pads": [1, 1, 1, 1], "output_padding": [1, 1]}),
        ((1, 16, 9), (16, 8, 5), {"strides": [2], "pads": [2, 1]}),
    ):  # fmt: skip
        yield one("ConvTranspose", [normal(*x)], [normal(*w), normal(w[1])], **more)
    for size, beta, channels in ((5, 0.75, 32), (7, 0.5, 20), (3, 1.0, 16), (5, 0.6, 16)):
        yield network(
            (2, 8, 5, 6), ("Conv", [(channels, 8, 1, 1)], {}),
            ("LRN", [], {"size": size, "beta": beta, "alpha": 0.5, "bias": 2.0}),
        )  # fmt: skip
    yield one("Sum", [normal(2, 3, 4), normal(3, 1), normal(4)], [])
    yield convolution((2, 24, 37), (20, 24, 3), pads=[1, 1])
    yield convolution((1, 24, 37), (24, 1, 3), pads=[2, 0], group=24)
    yield network(
        (1, 24, 9, 11), ("Conv", [(40, 24, 3, 3), (40,)], {"pads": [1, 1, 1, 1]}),
        ("Add", [], {}), ("Relu", [], {}), extra=(1, 40, 9, 11),
    )  # fmt: skip
    pool = {"kernel_shape": [3, 3], "strides": [2, 2]}
    for kind in ("MaxPool", "AveragePool"):
        for more in ({}, {"pads": [1, 0, 1, 1]}, {"ceil_mode": 1}, {"count_include_pad": 1}):
            if kind == "AveragePool" or "count_include_pad" not in more:
                yield network(
                    (1, 8, 14, 13), ("Conv", [(20, 8, 1, 1)], {}), (kind, [], {**pool, **more})
                )
    yield network(
        (2, 8, 6, 7), ("Conv", [(24, 8, 3, 3)], {}), ("LeakyRelu", [], {}),
        ("Mul", [(24, 1, 1)], {}), ("Div", [(1,)], {}), ("GlobalAveragePool", [], {}),
        ("Flatten", [], {}), ("Gemm", [(24, 10), (10,)], {}),
    )  # fmt: skip
    yield gated(20)
    yield gated(64)
    yield joined(16, 32)
    yield joined(16, 20)
    yield joined(20, 16)
    for x, w in (
        ((1, 70), (70, 33)), ((3, 40), (40, 64)), ((13, 40), (40, 100)), ((128, 32), (32, 96)),
        ((2, 7, 24), (24, 50)), ((3, 5, 7, 24), (24, 50)), ((40, 300), (300, 256)),
        ((19, 1, 24), (24, 48)), ((1, 1, 64), (64, 256)),
    ):  # fmt: skip
        yield one("MatMul", [normal(*x)], [normal(*w)])
    yield one("MatMul", [normal(2, 3, 17, 8), normal(2, 3, 8, 17)], [])
    yield one("MatMul", [normal(4, 5, 8), normal(8, 32)], [])
    yield one("MatMul", [normal(5, 8), normal(3, 8, 16)], [])
    yield one("MatMul", [normal(3, 5, 8)], [normal(3, 8, 33)])
    yield network(
        (2, 9, 24), ("MatMul", [(24, 40)], {}), ("Add", [(40,)], {}), ("Add", [], {}),
        ("Erf", [], {}), extra=(2, 9, 40),
    )  # fmt: skip
    for kind in ("Exp", "Sigmoid", "Tanh", "Erf", "Softplus"):
        yield one(kind, [3 * normal(3, 7, 16)], [])
    for last in (5, 16, 40, 197):
        yield one("Softmax", [3 * normal(2, 3, last)], [])
        yield one("LayerNormalization", [normal(2, 3, last)], [normal(last), normal(last)])
    yield one("Softmax", [normal(2, 20, 16)], [], axis=1)
    for axes in ([2, 3], [3], [1], [1, 2], [0], [0, 3], [0, 1, 2, 3]):
        yield one("ReduceMean", [normal(3, 5, 8, 32)], [], axes=axes)
        yield one("ReduceMax", [normal(3, 5, 8, 32)], [], axes=axes, keepdims=0)
    yield one("ReduceLogSumExp", [normal(3, 7, 32)], [], axes=[1])
    yield one("ReduceL2", [normal(3, 32, 9)], [], axes=[2])
    yield one("GlobalAveragePool", [normal(2, 5, 4, 12)], [])
    # Axes of one element, among those that stay and among those that go.
    yield one("GlobalAveragePool", [normal(1, 5, 1, 48)], [])
    for divisor in (np.float32(3), np.float32(1e-38), normal(16)):
        yield one("Div", [np.abs(normal(3, 16))], [np.asarray(divisor)])
    yield heads()
    for more in (
        {}, {"strides": [2, 2]}, {"strides": [2, 2], "pads": [1, 1, 1, 1]},
        {"strides": [2, 3], "pads": [0, 1, 1, 0], "output_padding": [1, 0]}, {"dilations": [2, 2]},
        {"group": 2},
    ):  # fmt: skip
        yield one("ConvTranspose", [normal(2, 24, 5, 6)], [normal(24, 20, 4, 4)], **more)
    yield one("ConvTranspose", [normal(1, 20, 5, 7)], [normal(20, 3, 2, 2)], strides=[2, 2])
    yield one("ConvTranspose", [normal(1, 20, 9)], [normal(20, 16, 4)], strides=[2], pads=[1, 1])


MODELS = list(models())


@pytest.mark.parametrize(("made", "inputs"), [m[1:] for m in MODELS], ids=[m[0] for m in MODELS])
def test_results_are_those_of_onnx_runtime(
    target: Target, device: Device, made: onnx.ModelProto, inputs: list[Array]
) -> None:
    names = [value.name for value in made.graph.input]
    expected = oracle.run(made, dict(zip(names, inputs, strict=True)))["y"]
    known = onnx.shape_inference.infer_shapes(made)
    known.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", 1, expected.shape))
    graph = from_onnx(known)
    with target.load(target.compile(graph, device), graph, device) as kernel:
        found = kernel.run(inputs)[0]
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max()


@pytest.mark.parametrize("kind", ["Exp", "Sigmoid", "Tanh", "Erf"])
def test_functions_at_the_ends_of_their_range(target: Target, device: Device, kind: str) -> None:
    values = [np.nan, np.inf, -np.inf, 0, 80, -80, 88.7, 100, -100, 1e30, -1e30, 1e-30, 1, -1, 2, 5]
    x = np.array(values, np.float32)
    _, made, _ = one(kind, [x], [])
    expected = oracle.run(made, {"x0": x})["y"]
    made.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", 1, x.shape))
    graph = from_onnx(made)
    with target.load(target.compile(graph, device), graph, device) as kernel:
        found = kernel.run([x])[0]
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize(("kind", "function"), [("Exp", math.exp), ("Erf", math.erf)])
def test_doubles_keep_the_functions_of_the_library(
    target: Target, device: Device, kind: str, function: Callable[[float], float]
) -> None:
    x = np.linspace(-3, 3, 40)
    _, made, _ = one(kind, [x], [])
    made.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", onnx_code("float64"), x.shape))
    graph = from_onnx(made)
    with target.load(target.compile(graph, device), graph, device) as kernel:
        found = kernel.run([x])[0]
    np.testing.assert_allclose(found, [function(value) for value in x], rtol=1e-14)


@pytest.mark.parametrize(
    "vectors", [Vectors(16, 32), Vectors(8, 16), Vectors(4, 32), Vectors(4, 16)]
)
def test_tiles_fit_in_the_registers(vectors: Vectors) -> None:
    for rows in range(1, 60):
        for columns in range(1, 20):
            tile, *_ = vectors.tiles(rows, columns)
            used = tile.broadcasts * tile.vectors + min(tile.broadcasts, tile.vectors) + 1
            assert used <= vectors.registers
            assert tile.waste < 2
            assert columns % vectors.tiles(rows, columns, exact=True)[0].vectors == 0


def test_the_registers_of_instruction_sets() -> None:
    wide = "x86_64 avx2 fma f16c avx512f avx512bw avx512dq avx512vl"
    assert Vectors.of(wide) == Vectors(16, 32, "madd")
    assert Vectors.of(f"{wide} avx512_vnni") == Vectors(16, 32, "vnni")
    assert Vectors.of("x86_64 avx2 fma") == Vectors(8, 16, "madd")
    assert Vectors.of("x86_64 avx2 fma avx_vnni") == Vectors(8, 16, "vnni")
    assert Vectors.of("x86_64") == Vectors(4, 16, "madd")
    assert Vectors.of("aarch64 asimd") == Vectors(4, 32)
    assert Vectors.of("aarch64 asimd asimddp") == Vectors(4, 32, "sdot")


def test_a_product_and_what_follows_it_stay_in_vector_registers() -> None:
    """TVM's pool of memory, and functions called lane by lane, took half of a product's time."""
    tvm = pytest.importorskip("tvm")
    from hetsched.lowering.stack import ON_STACK
    from hetsched.schedules import matmul, polynomials  # noqa: F401
    from hetsched.schedules.apply import scheduled
    from hetsched.schedules.rules import Rules
    from hetsched.schedules.vectors import Tile

    vectors = Vectors(16, 32)
    x = tvm.te.placeholder((128, 768), name="x")
    packed = tvm.te.placeholder((12, 768, 16), name="packed")
    tile = Rules(vectors).choose("product", [Tile(8, 3, 1.0)])
    product = matmul.packed_product(x, packed, 192, tile)
    result = tvm.te.compute(product.shape, lambda *i: tvm.tirx.erf(product[i]), name="result")
    function = tvm.te.create_prim_func([x, packed, result])
    module = scheduled(tvm.IRModule({"main": function}), Rules(vectors))
    target = tvm.target.Target({"kind": "llvm", "mcpu": "x86-64-v4"})
    text = tvm.tirx.build(module, target=target, pipeline=ON_STACK).inspect_source("ll")
    assert "fdiv <16 x float>" in text
    assert "fdiv float" not in text
    assert "call void @llvm.prefetch" in text
    assert "AllocWorkspace" not in text


@pytest.mark.parametrize("axes", [(1, 2), (2,), (0,), (0, 1)])
def test_a_sum_along_any_axes_is_one_of_vectors(axes: tuple[int, ...]) -> None:
    """Lane by lane it took ten times as long; LLVM must not change the order of a sum."""
    tvm = pytest.importorskip("tvm")
    from hetsched.schedules.apply import scheduled
    from hetsched.schedules.rules import Rules

    x = tvm.te.placeholder((24, 8, 32), name="x")
    function = tvm.te.create_prim_func([x, tvm.topi.sum(x, axes)])
    module = scheduled(tvm.IRModule({"main": function}), Rules(Vectors(16, 32)))
    text = tvm.tirx.build(module, target="llvm").inspect_source("ll")
    assert "fadd <16 x float>" in text
