"""The reference, interpreted and compiled, against ONNX Runtime.

Where the values are small whole numbers every sum is exact in any order, so that results must be
equal to the last bit.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import numba
import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import helper, shape_inference

from hetsched.device import Device
from hetsched.dtype import onnx_code
from hetsched.errors import CompileError, DeviceError, PackageError
from hetsched.graph import Graph, from_onnx
from hetsched.op import Op, Tensor
from hetsched.operation import Call, Compiler, interpreted, operation_of
from hetsched.operations._arithmetic import product
from hetsched.operations.conv import Conv, convolution
from hetsched.operations.matmul import MatMul
from hetsched.operations.pooling import Pooling, greatest
from hetsched.plugin import load
from hetsched.target import Artifact, Target
from hetsched.targets.reference import compiled

DATA = Path(__file__).parent / "data"
OPSET = 19
COMPILERS: dict[str, Compiler] = {"interpreted": interpreted, "compiled": compiled(False)}
CORE = Device("reference:0", "reference", cores=(0,))
CORES = Device("reference", "reference", cores=(0, 1))

repeatably = settings(max_examples=60, deadline=None, derandomize=True)


def whole_numbers(seed: int, shape: Sequence[int], dtype: str) -> np.ndarray:
    low = 0 if dtype.startswith("uint") else -8
    return np.random.default_rng(seed).integers(low, 8, shape).astype(dtype)


def model_of(
    kind: str, inputs: Sequence[np.ndarray | None], attributes: dict[str, Any], opset: int, n: int
) -> onnx.ModelProto:
    given = {f"x{i}": array for i, array in enumerate(inputs) if array is not None}
    names = [f"x{i}" if array is not None else "" for i, array in enumerate(inputs)]
    outputs = [f"y{i}" for i in range(n)]
    return helper.make_model(
        helper.make_graph(
            [helper.make_node(kind, names, outputs, "node", **attributes)],
            "graph",
            [
                helper.make_tensor_value_info(name, onnx_code(array.dtype.name), array.shape)
                for name, array in given.items()
            ],
            [helper.make_empty_tensor_value_info(name) for name in outputs],
        ),
        ir_version=8,
        opset_imports=[helper.make_opsetid("", opset)],
    )


def oracle(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    content = model.SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    found: list[np.ndarray] = session.run(None, feeds)
    return found


def from_attribute(attribute: onnx.AttributeProto) -> Any:
    value = helper.get_attribute_value(attribute)
    if isinstance(value, list):
        return [item.decode() if isinstance(item, bytes) else item for item in value]
    return value.decode() if isinstance(value, bytes) else value


def check(
    kind: str,
    inputs: Sequence[np.ndarray | None],
    attributes: dict[str, Any] | None = None,
    opset: int = OPSET,
    results: int = 1,
    tolerance: float = 0.0,
) -> None:
    """Compares the reference with ONNX Runtime; a tolerance of zero means equal."""
    attributes = attributes or {}
    feeds = {f"x{i}": array for i, array in enumerate(inputs) if array is not None}
    wanted = oracle(model_of(kind, inputs, attributes, opset, results), feeds)
    schema = onnx.defs.get_schema(kind, opset)
    defaults = {
        name: from_attribute(attribute.default_value)
        for name, attribute in schema.attributes.items()
        if attribute.default_value.type
    }
    call = Call(kind, {**defaults, **attributes}, opset, results)
    operation = operation_of(Op("node", kind, (), ()))
    for name, compiler in COMPILERS.items():
        found = operation.reference(call, inputs, compiler)
        assert len(found) == results
        for got, want in zip(found, wanted, strict=True):
            assert (got.dtype, got.shape) == (want.dtype, want.shape), name
            if tolerance:
                np.testing.assert_allclose(got, want, tolerance, tolerance, err_msg=name)
            else:
                np.testing.assert_array_equal(got, want, err_msg=name)


CONVOLUTIONS = [
    # Shape of x, of w, attributes.
    ((1, 2, 7, 6), (3, 2, 3, 3), {}),
    ((1, 2, 7, 6), (3, 2, 3, 2), {"pads": [1, 0, 0, 2]}),
    ((2, 2, 7, 8), (2, 2, 2, 3), {"strides": [2, 3], "pads": [2, 1, 0, 3]}),
    ((1, 2, 9, 9), (2, 2, 3, 2), {"dilations": [2, 3], "strides": [1, 2]}),
    ((1, 4, 5, 5), (4, 1, 3, 3), {"group": 4, "pads": [1, 1, 1, 1]}),
    ((1, 4, 5, 5), (8, 1, 2, 2), {"group": 4}),
    ((2, 6, 4, 4), (4, 3, 2, 2), {"group": 2, "strides": [2, 1]}),
    ((1, 2, 7, 6), (2, 2, 4, 3), {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    ((1, 2, 7, 6), (2, 2, 4, 3), {"auto_pad": "SAME_LOWER", "strides": [2, 2]}),
    ((1, 2, 7, 6), (2, 2, 4, 3), {"auto_pad": "VALID", "strides": [1, 2]}),
    ((2, 3, 11), (4, 3, 3), {"strides": [2], "pads": [0, 2]}),
    ((1, 2, 11), (4, 1, 3), {"group": 2, "dilations": [3]}),
    ((1, 2, 3, 4, 5), (2, 2, 2, 2, 2), {"pads": [1, 0, 0, 0, 1, 1], "strides": [1, 2, 1]}),
]


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_convolution(case: tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]) -> None:
    x, w, attributes = case
    bias = whole_numbers(2, w[:1], "float32")
    floats = [whole_numbers(0, x, "float32"), whole_numbers(1, w, "float32"), bias]
    check("Conv", floats, attributes)
    check("Conv", floats[:2], attributes)
    zeros = np.array(3, "uint8"), np.array(5, "uint8")
    integers = whole_numbers(0, x, "uint8"), whole_numbers(1, w, "uint8")
    check("ConvInteger", [*integers, *zeros], attributes)
    check("ConvInteger", integers, attributes)


@st.composite
def windows(draw: st.DrawFn, rank: int) -> tuple[list[int], list[int], dict[str, Any]]:
    """Spatial sizes, a kernel that fits in them, and attributes."""
    numbers = st.lists(st.integers(1, 3), min_size=rank, max_size=rank)
    kernel, strides, dilations = draw(numbers), draw(numbers), draw(numbers)
    automatic = draw(st.booleans())
    if automatic:
        # ONNX Runtime has SAME padding for no other.
        dilations = [1] * rank
    attributes: dict[str, Any] = {"strides": strides, "dilations": dilations}
    extents = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    sizes = [extent + draw(st.integers(0, 4)) for extent in extents]
    if automatic:
        attributes["auto_pad"] = draw(st.sampled_from(["SAME_UPPER", "SAME_LOWER", "VALID"]))
    else:
        # A pool refuses padding as wide as its kernel.
        heads = [draw(st.integers(0, k - 1)) for k in kernel]
        attributes["pads"] = heads + [draw(st.integers(0, k - 1)) for k in kernel]
    return sizes, kernel, attributes


@given(st.data())
@repeatably
def test_any_convolution(data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, 3))
    sizes, kernel, attributes = data.draw(windows(rank))
    group, inputs, outputs, batch = (data.draw(st.integers(1, top)) for top in (3, 2, 2, 2))
    x, w = (batch, group * inputs, *sizes), (group * outputs, inputs, *kernel)
    attributes["group"] = group
    if data.draw(st.booleans()):
        check("Conv", [whole_numbers(0, x, "float32"), whole_numbers(1, w, "float32")], attributes)
    else:
        zero = np.array(data.draw(st.integers(0, 255)), "uint8")
        arrays = whole_numbers(0, x, "uint8"), whole_numbers(1, w, "int8")
        check("ConvInteger", [*arrays, zero], attributes)


def test_quantised_convolution() -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (1, 4, 6, 6)).astype(np.uint8)
    w = rng.integers(-128, 128, (4, 2, 3, 3)).astype(np.int8)
    scales = rng.uniform(0.001, 0.02, 4).astype(np.float32)
    bias = rng.integers(-500, 500, 4).astype(np.int32)
    scalar = np.array(0.02, np.float32)
    x_zero, y_zero = np.array(130, np.uint8), np.array(120, np.uint8)
    w_zero, one_zero = np.zeros(4, np.int8), np.array(3, np.int8)
    attributes = {"group": 2, "pads": [1, 0, 1, 2]}
    many: list[np.ndarray | None]
    many = [x, scalar, x_zero, w, scales, w_zero, np.array(0.05, np.float32), y_zero, bias]
    check("QLinearConv", many, attributes)
    one: list[np.ndarray | None]
    one = [x, scalar, x_zero, w, scalar, one_zero, np.array(0.5, np.float32), y_zero]
    check("QLinearConv", one, attributes)


TRANSPOSED = [
    ((1, 2, 4, 3), (2, 3, 3, 3), {}),
    ((1, 2, 4, 3), (2, 3, 3, 2), {"strides": [2, 3], "pads": [1, 0, 0, 1]}),
    ((2, 4, 3, 3), (4, 2, 2, 3), {"group": 2, "strides": [2, 2], "output_padding": [1, 0]}),
    ((1, 3, 4, 4), (3, 1, 3, 3), {"group": 3, "dilations": [2, 1]}),
    ((1, 2, 4, 4), (2, 2, 3, 3), {"strides": [2, 2], "output_shape": [8, 7]}),
    ((1, 2, 4, 4), (2, 2, 4, 4), {"strides": [2, 2], "output_shape": [7, 9]}),
    (
        (1, 2, 4, 4),
        (2, 2, 4, 4),
        {"strides": [2, 2], "output_shape": [7, 9], "auto_pad": "SAME_UPPER"},
    ),
    ((1, 2, 4, 4), (2, 2, 4, 3), {"strides": [3, 2], "auto_pad": "SAME_UPPER"}),
    ((1, 2, 4, 4), (2, 2, 4, 4), {"strides": [3, 1], "auto_pad": "SAME_LOWER"}),
    ((1, 2, 4, 4), (2, 2, 4, 4), {"strides": [3, 2], "auto_pad": "VALID"}),
    ((2, 2, 5), (2, 3, 4), {"strides": [3], "pads": [2, 1], "output_padding": [2]}),
    ((1, 2, 2, 3, 2), (2, 2, 2, 2, 3), {"strides": [1, 2, 2], "pads": [0, 1, 0, 1, 0, 1]}),
]


@pytest.mark.parametrize("case", TRANSPOSED, ids=str)
def test_transposed_convolution(
    case: tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]],
) -> None:
    x, w, attributes = case
    bias = whole_numbers(2, [w[1] * attributes.get("group", 1)], "float32")
    arrays = [whole_numbers(0, x, "float32"), whole_numbers(1, w, "float32"), bias]
    check("ConvTranspose", arrays, attributes)
    check("ConvTranspose", arrays[:2], attributes)


@given(st.data())
@repeatably
def test_any_transposed_convolution(data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, 3))
    _, kernel, attributes = data.draw(windows(rank))
    sizes = [data.draw(st.integers(1, 4)) for _ in range(rank)]
    group, inputs, outputs = (data.draw(st.integers(1, top)) for top in (3, 2, 2))
    x, w = (1, group * inputs, *sizes), (group * inputs, outputs, *kernel)
    attributes["group"] = group
    # Below the stride, which is all that ONNX Runtime takes.
    attributes["output_padding"] = [
        data.draw(st.integers(0, stride - 1)) for stride in attributes["strides"]
    ]
    whole = [
        (size - 1) * s + (k - 1) * d + 1 + extra
        for size, s, k, d, extra in zip(
            sizes,
            attributes["strides"],
            kernel,
            attributes["dilations"],
            attributes["output_padding"],
            strict=True,
        )
    ]
    pads = attributes.get("pads", [0] * (2 * rank))
    left = [size - pads[i] - pads[rank + i] for i, size in enumerate(whole)]
    assume(min(left) > 0)
    if attributes.get("auto_pad", "VALID") != "VALID":
        # Where the whole result is less than the standard wants, ONNX Runtime adds nothing.
        wanted = zip(whole, sizes, attributes["strides"], strict=True)
        assume(all(reached >= size * stride for reached, size, stride in wanted))
    check(
        "ConvTranspose",
        [whole_numbers(0, x, "float32"), whole_numbers(1, w, "float32")],
        attributes,
    )


PRODUCTS = [
    ((4, 3), (3, 5)),
    ((2, 4, 3), (3, 5)),
    ((4, 3), (2, 3, 5)),
    ((2, 1, 4, 3), (6, 3, 5)),
    ((6, 4, 3), (2, 1, 3, 5)),
    ((3,), (3, 5)),
    ((4, 3), (3,)),
    ((3,), (3,)),
    ((2, 4, 3), (3,)),
    ((3,), (2, 3, 4)),
    ((1, 1), (1, 1)),
]


@pytest.mark.parametrize("shapes", PRODUCTS, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64", "int32", "int64"])
def test_product(shapes: tuple[tuple[int, ...], tuple[int, ...]], dtype: str) -> None:
    check("MatMul", [whole_numbers(i, shape, dtype) for i, shape in enumerate(shapes)])


@given(st.integers(1, 5), st.integers(1, 9), st.integers(1, 5), st.sampled_from([0, 1, 2, 3]))
@repeatably
def test_any_integer_product(rows: int, depth: int, columns: int, zeros: int) -> None:
    rng = np.random.default_rng(rows + 10 * depth + 100 * columns)
    a = rng.integers(0, 256, (2, rows, depth)).astype(np.uint8)
    b = rng.integers(-128, 128, (depth, columns)).astype(np.int8)
    points = [np.array(77, np.uint8), rng.integers(-9, 9, columns).astype(np.int8)]
    check("MatMulInteger", [a, b, *points[: min(zeros, 2)]])


def test_quantised_product() -> None:
    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, (2, 5, 7)).astype(np.uint8)
    b = rng.integers(0, 256, (7, 4)).astype(np.uint8)
    scale = [np.array(s, np.float32) for s in (0.02, 0.01, 0.3)]
    zero = [np.array(z, np.uint8) for z in (110, 130, 128)]
    check("QLinearMatMul", [a, scale[0], zero[0], b, scale[1], zero[1], scale[2], zero[2]])


@pytest.mark.parametrize("c", [None, (), (5,), (1, 5), (4, 1), (4, 5)], ids=str)
@pytest.mark.parametrize(("left", "right"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_general_product(c: tuple[int, ...] | None, left: int, right: int) -> None:
    a = whole_numbers(0, (3, 4) if left else (4, 3), "float32")
    b = whole_numbers(1, (5, 3) if right else (3, 5), "float32")
    third = [] if c is None else [whole_numbers(2, c, "float32")]
    # Halves and quarters keep the sums exact.
    scaled = {"alpha": 0.5, "beta": -0.25}
    check("Gemm", [a, b, *third], {"transA": left, "transB": right, **scaled})
    check("Gemm", [a, b, *third], {"transA": left, "transB": right})


@given(st.data())
@repeatably
def test_any_pool(data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, 3))
    sizes, kernel, attributes = data.draw(windows(rank))
    attributes["kernel_shape"] = kernel
    attributes["ceil_mode"] = data.draw(st.integers(0, 1))
    shape = (2, 2, *sizes)
    if data.draw(st.booleans()):
        dtype = data.draw(st.sampled_from(["float32", "int8", "uint8"]))
        results = data.draw(st.integers(1, 2))
        check("MaxPool", [whole_numbers(0, shape, dtype)], attributes, results=results)
    else:
        attributes["count_include_pad"] = data.draw(st.integers(0, 1))
        check("AveragePool", [whole_numbers(0, shape, "float32")], attributes, tolerance=1e-6)


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("sizes", [(6, 5, 5), (5, 6, 5), (5, 5, 6), (6, 6), (6,)], ids=str)
def test_a_mean_leaves_out_what_lies_beyond_the_padding(sizes: tuple[int, ...], count: int) -> None:
    # On an axis of 6 the third window begins at 4 and would end at 7.
    rank = len(sizes)
    attributes = {"kernel_shape": [3] * rank, "strides": [2] * rank, "ceil_mode": 1}
    x = whole_numbers(0, (1, 2, *sizes), "float32")
    check("AveragePool", [x], {**attributes, "count_include_pad": count}, tolerance=1e-6)


def test_indices_of_a_pool_by_columns() -> None:
    x = whole_numbers(0, (2, 2, 5, 6), "float32")
    attributes = {"kernel_shape": [2, 2], "strides": [2, 2], "storage_order": 1}
    check("MaxPool", [x], attributes, results=2)


def layer(kind: str, directions: int, optional: bool) -> list[np.ndarray | None]:
    """Inputs of a layer of 4 units on 5 steps of 3 rows of 2, with all that is optional or not."""
    rng = np.random.default_rng(0)
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[kind]

    def some(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    inputs: list[np.ndarray | None]
    inputs = [some(5, 3, 2), some(directions, 4 * gates, 2), some(directions, 4 * gates, 4)]
    if optional:
        inputs += [some(directions, 8 * gates), np.array([5, 2, 4], np.int32)]
        inputs += [some(directions, 3, 4)]
        if kind == "LSTM":
            inputs += [some(directions, 3, 4), some(directions, 12)]
    return inputs


RECURRENT = [
    ("LSTM", {}),
    ("LSTM", {"clip": 0.4}),
    ("LSTM", {"input_forget": 1}),
    ("GRU", {}),
    ("GRU", {"linear_before_reset": 1}),
    ("GRU", {"activations": ["HardSigmoid", "Softsign"], "activation_alpha": [0.3]}),
    ("RNN", {}),
    ("RNN", {"activations": ["Relu"]}),
    ("RNN", {"activations": ["LeakyRelu"], "activation_alpha": [0.2]}),
]


@pytest.mark.parametrize("optional", [False, True])
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("case", RECURRENT, ids=str)
def test_recurrent_layer(case: tuple[str, dict[str, Any]], direction: str, optional: bool) -> None:
    kind, options = case
    directions = 2 if direction == "bidirectional" else 1
    attributes: dict[str, Any] = {"hidden_size": 4, "direction": direction, **options}
    for key in ("activations", "activation_alpha"):
        if key in attributes:
            attributes[key] = attributes[key] * directions
    results = 3 if kind == "LSTM" else 2
    inputs = layer(kind, directions, optional)
    check(kind, inputs, attributes, opset=14, results=results, tolerance=2e-6)


@pytest.mark.parametrize("axis", [-1, 0, 1, 2])
@pytest.mark.parametrize("opset", [11, 13])
@pytest.mark.parametrize("kind", ["Softmax", "LogSoftmax", "Hardmax"])
def test_softmax_of_old_and_new(kind: str, opset: int, axis: int) -> None:
    x = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
    check(kind, [x], {"axis": axis}, opset=opset, tolerance=1e-6)


@pytest.mark.parametrize("opset", [9, 15])
def test_normalisation_uses_the_statistics_it_is_given(opset: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, 4, 5)).astype(np.float32)
    scale, shift, mean, variance = rng.uniform(0.5, 2, (4, 3)).astype(np.float32)
    check("BatchNormalization", [x, scale, shift, mean, variance], opset=opset, tolerance=1e-5)


@pytest.mark.parametrize("compiler", COMPILERS.values(), ids=COMPILERS)
def test_half_precision_is_summed_in_single(compiler: Compiler) -> None:
    # 2048 + 1 is not a half: one added at a time, 4096 ones would end at 2048.
    a, b = np.ones((1, 4096), np.float16), np.ones((4096, 1), np.float16)
    product = operation_of(Op("node", "MatMul", (), ()))
    (y,) = product.reference(Call("MatMul", {}, 13), [a, b], compiler)
    assert y.dtype == np.float16
    assert y.item() == 4096


def graph_of(path: Path) -> Graph:
    return from_onnx(shape_inference.infer_shapes(onnx.load(path), data_prop=True))


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("digits_branch", CORE),
        ("digits_cnn", CORE),
        ("digits_lstm", CORE),
        # Few loops, because each takes seconds to compile for several cores.
        ("digits_lstm", CORES),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_model(name: str, device: Device) -> None:
    path = DATA / f"{name}.onnx"
    graph = graph_of(path)
    target = load(Target, "reference")
    assert target.refusal(graph, device) is None
    with target.load(target.compile(graph, device), graph, device) as kernel:
        for seed in range(3):
            image = np.random.default_rng(seed).uniform(0, 1, (1, 1, 8, 8)).astype(np.float32)
            (found,) = kernel.run([kernel.receive(image)])
            (wanted,) = oracle(onnx.load(path), {"image": image})
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


def product_graph(kind: str = "MatMul", domain: str = "") -> Graph:
    x, y = Tensor("x", (2, 64), "float32"), Tensor("y", (2, 16), "float32")
    w = np.arange(1024, dtype=np.float32).reshape(64, 16)
    op = Op("node", kind, (x, Tensor("w", w.shape, "float32")), (y,), domain=domain)
    return Graph("part", (op,), (x,), (y,), {"w": w}, {"": OPSET, "com.example": 1})


def test_an_artifact_keeps_large_weights_apart() -> None:
    graph, target = product_graph(), load(Target, "reference")
    artifact = target.compile(graph, CORE)
    assert list(artifact.weights) == ["w"]
    assert sum(map(len, artifact.files.values())) < 1024
    x = np.ones((2, 64), np.float32)
    (y,) = target.load(artifact, graph, CORE).run([x])
    np.testing.assert_array_equal(y, x @ graph.constants["w"])


def test_an_artifact_that_does_not_fit_is_refused() -> None:
    graph, target = product_graph(), load(Target, "reference")
    good = target.compile(graph, CORE)
    damaged = {"part.onnx": good.files["part.onnx"][:-20]}
    for artifact in (
        Artifact({}, good.weights),
        Artifact(damaged, good.weights),
        Artifact(good.files, {}),
        Artifact(good.files, {"w": np.zeros((64, 15), np.float32)}),
        Artifact(good.files, {"w": np.zeros((64, 16), np.float64)}),
    ):
        with pytest.raises(PackageError, match="part 'part'"):
            target.load(artifact, graph, CORE)


@pytest.mark.parametrize(
    ("kind", "domain"), [("MaxRoiPool", ""), ("Multinomial", ""), ("MatMul", "com.example")]
)
def test_a_refusal_names_the_operation(kind: str, domain: str) -> None:
    graph, target = product_graph(kind, domain), load(Target, "reference")
    reason = target.refusal(graph, CORE)
    assert reason is not None
    assert f"{kind} 'node'" in reason
    with pytest.raises(CompileError, match=kind):
        target.compile(graph, CORE)


def test_a_type_that_is_a_function_of_others_runs() -> None:
    # ONNX spells Gelu out by its input type.
    x, y = Tensor("x", (2, 3), "float32"), Tensor("y", (2, 3), "float32")
    graph = Graph("part", (Op("node", "Gelu", (x,), (y,)),), (x,), (y,), {}, {"": 20})
    target = load(Target, "reference")
    assert target.refusal(graph, CORE) is None
    given = whole_numbers(0, x.shape, "float32")
    (found,) = target.load(target.compile(graph, CORE), graph, CORE).run([given])
    (wanted,) = oracle(model_of("Gelu", [given], {}, 20, 1), {"x0": given})
    np.testing.assert_allclose(found, wanted, 1e-6, 1e-6)


def test_results_are_the_callers_own() -> None:
    x, y = Tensor("x", (2, 3), "float32"), Tensor("y", (2, 3), "float32")
    graph = Graph("part", (Op("node", "Flatten", (x,), (y,)),), (x,), (y,), {}, {"": OPSET})
    target = load(Target, "reference")
    given = np.ones((2, 3), np.float32)
    (found,) = target.load(target.compile(graph, CORE), graph, CORE).run([given])
    given[:] = 7
    assert found.max() == 1


def test_the_device_sets_the_number_of_threads() -> None:
    graph, target = product_graph(), load(Target, "reference")
    x = np.ones((2, 64), np.float32)

    def threads(device: Device) -> int:
        target.load(target.compile(graph, device), graph, device).run([x])
        return int(numba.get_num_threads())

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(threads, CORE).result() == 1
        available = min(2, numba.config.NUMBA_NUM_THREADS)
        assert pool.submit(threads, CORES).result() == available


def test_threads_share_one_compiled_function() -> None:
    start = Barrier(4)

    def run(seed: int) -> tuple[Any, np.ndarray]:
        start.wait()
        function = compiled(False)(convolution)
        x = whole_numbers(seed, (1, 2, 1, 6, 6), "float64")
        w = whole_numbers(seed, (2, 2, 1, 3, 3), "float64")
        return function, function(x, w, (1, 1, 1), (1, 1, 1), 1)

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(run, range(4)))
    assert len({id(function) for function, _ in results}) == 1
    for seed, (_, y) in enumerate(results):
        x = whole_numbers(seed, (1, 2, 1, 6, 6), "float64")
        w = whole_numbers(seed, (2, 2, 1, 3, 3), "float64")
        np.testing.assert_array_equal(y, convolution(x, w, (1, 1, 1), (1, 1, 1), 1))


def test_parallel_loops_do_as_serial_ones() -> None:
    x, w = (
        whole_numbers(0, (2, 4, 1, 7, 7), "float32"),
        whole_numbers(1, (6, 2, 1, 3, 3), "float32"),
    )
    arguments = ((1, 2, 1), (1, 1, 2), 2)
    wanted = convolution(x, w, *arguments)
    np.testing.assert_array_equal(compiled(True)(convolution)(x, w, *arguments), wanted)


# Sides of one element, at the edges of tiles of 128 rows, 256 columns and 256 terms, and none.
SIDES = [(1, 1, 1), (130, 259, 5), (3, 515, 257), (128, 256, 256), (0, 3, 4), (3, 0, 4), (3, 4, 0)]


@pytest.mark.parametrize("sides", SIDES, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64", "int32", "int64"])
def test_tiles_of_a_product(sides: tuple[int, int, int], dtype: str) -> None:
    rows, depth, columns = sides
    a = whole_numbers(0, (2, rows, depth), dtype)
    b = whole_numbers(1, (2, depth, columns), dtype)
    (y,) = MatMul().reference(Call("MatMul", {}, OPSET), [a, b], compiled(False))
    assert y.dtype == dtype
    np.testing.assert_array_equal(y, a @ b)


def test_integers_wrap_around_in_a_product() -> None:
    a = np.full((3, 70), 2**30, np.int32)
    (y,) = MatMul().reference(Call("MatMul", {}, OPSET), [a, a.T * 3 + 1], compiled(False))
    np.testing.assert_array_equal(y, a @ (a.T * 3 + 1))


# Places beyond a block of 256, filters beyond one of 128, terms beyond a panel of 256.
LARGE = [
    ((1, 3, 17, 19), (5, 3, 3, 3), {"pads": [1, 1, 1, 1]}),
    ((2, 2, 300), (3, 2, 4), {"dilations": [3]}),
    ((1, 31, 5, 5), (131, 31, 3, 3), {}),
    ((1, 260, 3, 3), (130, 2, 1, 1), {"group": 130}),
    ((2, 4, 40, 23), (6, 2, 3, 2), {"group": 2, "strides": [2, 1], "dilations": [1, 2]}),
    ((0, 2, 5, 5), (3, 2, 3, 3), {}),
]


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_blocks_of_a_convolution(
    case: tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]],
) -> None:
    shape, filters, attributes = case
    x, w = whole_numbers(0, shape, "float32"), whole_numbers(1, filters, "float32")
    (wanted,) = oracle(model_of("Conv", [x, w], attributes, OPSET, 1), {"x0": x, "x1": w})
    (found,) = Conv().reference(Call("Conv", attributes, OPSET), [x, w], compiled(False))
    np.testing.assert_array_equal(found, wanted)


def test_parallel_products_and_pools_do_as_serial_ones() -> None:
    a, b = whole_numbers(0, (2, 150, 9), "float32"), whole_numbers(1, (2, 9, 300), "float32")
    np.testing.assert_array_equal(compiled(True)(product)(a, b), a @ b)
    x = whole_numbers(2, (2, 3, 1, 9, 8), "float32")
    window = (1, 3, 3), (1, 2, 1), (1, 1, 1), (0, 1, 1), (1, 5, 8)
    least = np.array([-np.inf], np.float32)
    for found, wanted in zip(
        compiled(True)(greatest)(x, *window, least), greatest(x, *window, least), strict=True
    ):
        np.testing.assert_array_equal(found, wanted)


def test_the_first_of_several_not_a_numbers_stays() -> None:
    x = np.array([[[np.nan, 1, 2, np.nan, 3]]], np.float32)
    call = Call("MaxPool", {"kernel_shape": [2]}, OPSET, 1)
    for compiler in COMPILERS.values():
        (y,) = Pooling().reference(call, [x], compiler)
        np.testing.assert_array_equal(y, [[[np.nan, 2, 2, np.nan]]])


def test_devices_are_cores_of_this_machine() -> None:
    target = load(Target, "reference")
    assert target.unavailable() is None
    for name in target.devices():
        device = target.device(name)
        assert (device.name, device.target) == (name, "reference")
        assert device.threads == (1 if ":" in name else len(target.devices()) - 1)
    with pytest.raises(DeviceError, match="reference:4096"):
        target.device("reference:4096")
