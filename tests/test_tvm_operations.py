"""Which operations TVM computes rightly, by the node tests of ONNX and by old opsets.

A case may be refused, by name and with a reason; a result may not be wrong. Code is made and run in
this process, without the linker, so that a second suffices for dozens of cases.
"""

import os
import re
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from hetsched import oracle
from hetsched.dtype import onnx_code, tolerance
from hetsched.errors import CompileError, ModelError
from hetsched.graph import Graph, from_onnx
from hetsched.plugin import load
from hetsched.target import Target

REFUSED = Path(__file__).parent / "golden" / "tvm_refused.txt"
# Every how manieth node test of an operation runs; 1 takes minutes.
STRIDE = int(os.environ.get("HETSCHED_NODE_TEST_STRIDE", "8"))
# ONNX states these results to four digits.
ROUNDED = {"test_averagepool_2d_ceil_last_window_starts_on_pad"}

Array = np.ndarray


def compute(graph: Graph, inputs: Sequence[Array]) -> list[Array]:
    """The outputs of the graph by TVM.

    Raises
    ------
    CompileError
        TVM refuses it.
    """
    target = load(Target, "cpu")
    device = target.device("cpu")
    with target.load(target.compile(graph, device), graph, device) as kernel:
        return [np.asarray(result) for result in kernel.run(inputs)]


def assert_right(found: Array, expected: Array) -> None:
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    if expected.dtype.kind in "biu":
        np.testing.assert_array_equal(found, expected)
        return
    wide = expected.astype(np.float64)
    peak = np.abs(wide[np.isfinite(wide)]).max(initial=0.0)
    allowed = max(tolerance(expected.dtype.name).relative * peak, 1e-9)
    np.testing.assert_allclose(found.astype(np.float64), wide, rtol=0, atol=allowed)


def named(model: onnx.ModelProto) -> Graph:
    model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    for index, node in enumerate(model.graph.node):
        node.name = f"node{index}"
    return from_onnx(model)


@cache
def node_tests() -> Mapping[str, tuple[Any, ...]]:
    """ONNX's own cases by operation; all but the first input are constants, as in networks."""
    from onnx.backend.test.case.node import collect_testcases

    np.random.seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases = collect_testcases(None)
    found = defaultdict(list)
    for case in cases:
        if "_expanded" in case.name or case.name in ROUNDED:
            continue
        values = [*case.data_sets[0][0], *case.data_sets[0][1]]
        if all(
            isinstance(v, np.ndarray | np.generic) and v.dtype.kind not in "OUS" for v in values
        ):
            found[case.model.graph.node[0].op_type].append(case)
    return {kind: tuple(found[kind]) for kind in sorted(found)}


def node_test(case: Any) -> tuple[Graph, list[Array], list[Array]]:
    inputs, outputs = case.data_sets[0]
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    for value, array in list(zip(model.graph.input, inputs, strict=True))[1:]:
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(array), value.name))
    del model.graph.input[1:]
    return named(model), [np.asarray(x) for x in inputs[:1]], [np.asarray(y) for y in outputs]


@pytest.mark.parametrize("kind", node_tests())
def test_node_tests_of_onnx(kind: str) -> None:
    for case in node_tests()[kind][::STRIDE]:
        try:
            graph, inputs, outputs = node_test(case)
            before = [array.copy() for array in inputs]
            results = compute(graph, inputs)
        except (ModelError, CompileError):
            continue
        for found, expected in zip(results, outputs, strict=True):
            assert_right(found, expected)
        for found, expected in zip(inputs, before, strict=True):
            np.testing.assert_array_equal(found, expected)


def refused_kinds() -> Iterator[str]:
    """The operations of which TVM takes none of the cases, with what it says of the first."""
    target = load(Target, "cpu")
    device = target.device("cpu")
    for cases in node_tests().values():
        reasons: list[str] = []
        for case in cases:
            try:
                graph, _, _ = node_test(case)
            except ModelError:
                continue
            why = target.refusal(graph, device)
            if why is None:
                break
            reasons.append(why)
        else:
            if reasons:
                yield re.sub(r" 'node\d+'", "", reasons[0])


def test_refused_operations_are_those_known() -> None:
    pytest.importorskip("tvm")
    text = "".join(f"{line}\n" for line in refused_kinds())
    if os.environ.get("HETSCHED_UPDATE_GOLDEN"):
        REFUSED.write_text(text)
    assert text == REFUSED.read_text()


def operation(
    kind: str,
    opset: int,
    *inputs: Array | None,
    constants: int = 0,
    outputs: int = 1,
    **attributes: Any,
) -> tuple[onnx.ModelProto, list[Array]]:
    """A model of one operation whose last `constants` inputs are constants."""
    names = ["" if x is None else f"x{i}" for i, x in enumerate(inputs)]
    fixed = len(inputs) - constants
    graph = helper.make_graph(
        [helper.make_node(kind, names, [f"y{i}" for i in range(outputs)], "node", **attributes)],
        kind,
        [
            helper.make_tensor_value_info(name, onnx_code(x.dtype.name), x.shape)
            for name, x in zip(names[:fixed], inputs[:fixed], strict=True)
            if x is not None
        ],
        [onnx.ValueInfoProto(name=f"y{i}") for i in range(outputs)],
        initializer=[
            numpy_helper.from_array(x, name)
            for name, x in zip(names[fixed:], inputs[fixed:], strict=True)
            if x is not None
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    return model, [x for x in inputs[:fixed] if x is not None]


RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 3, 4, 5), np.float32)
IMAGE = RNG.standard_normal((1, 4, 7, 9), np.float32)
STATISTICS = [RNG.random(4, np.float32) + 0.5 for _ in range(4)]


def floats(*values: float) -> Array:
    return np.array(values, np.float32)


def ints(*values: int) -> Array:
    return np.array(values, np.int64)


POOL: dict[str, Any] = {"kernel_shape": [3, 3], "strides": [2, 2]}
SOFT = ("Softmax", "LogSoftmax", "Hardmax")
BOTH = ("nearest", "linear")
KERNEL = RNG.standard_normal((4, 3, 3, 3), np.float32)
OLD = [
    *(operation(kind, opset, X) for kind in SOFT for opset in (7, 11, 13)),
    *(operation(kind, o, X, axis=axis) for kind in SOFT for o in (7, 11) for axis in (0, 2)),
    *(operation(kind, 11, X, axis=-2) for kind in SOFT),
    *(operation(kind, 13, X, axis=1) for kind in SOFT),
    *(operation("Squeeze", opset, X[:1, :, :1], axes=[0, 2]) for opset in (7, 11)),
    operation("Squeeze", 11, X[:1, :, :1], axes=[0, -2]),
    operation("Squeeze", 11, X[:1, :, :1]),
    operation("Squeeze", 13, X[:1, :, :1], ints(0, 2), constants=1),
    operation("Squeeze", 13, X[:1, :, :1]),
    *(operation("Unsqueeze", opset, X, axes=[0, 3]) for opset in (7, 11)),
    operation("Unsqueeze", 11, X, axes=[-1, 0]),
    operation("Unsqueeze", 13, X, ints(3, 0), constants=1),
    *(operation("Slice", o, X, starts=[1, 0, -3], ends=[9, 2, -1], axes=[3, 1, 2]) for o in (7, 9)),
    operation("Slice", 9, X, starts=[1, 0], ends=[9, 2]),
    operation("Slice", 10, X, ints(-1), ints(-9), ints(3), ints(-2), constants=4),
    operation("Slice", 13, X, ints(3), ints(0), ints(-1), ints(-1), constants=4),
    operation("Slice", 13, X, ints(1), ints(2**62), ints(2), constants=3),
    *(operation("Pad", o, X, pads=[0, 0, 1, 2, 0, 0, 3, 1], value=2.5) for o in (7, 9)),
    *(operation("Pad", 9, X, pads=[0, 0, 1, 2, 0, 0, 3, 1], mode=m) for m in ("reflect", "edge")),
    operation("Pad", 9, X, pads=[0, 0, -1, 2, 0, 0, 0, -1]),
    operation("Pad", 11, X, ints(0, 0, 1, 2, 0, 0, 3, 1), np.array(1.5, np.float32), constants=2),
    *(
        operation("Pad", 13, X, ints(0, 0, 1, 2, 0, 0, 3, 1), constants=1, mode=mode)
        for mode in ("constant", "reflect", "edge")
    ),
    operation("Pad", 18, X, ints(1, 2), np.array(1, np.float32), ints(3), constants=3),
    operation("Pad", 19, X, ints(0, 0, 1, 2, 0, 0, 3, 1), constants=1, mode="wrap"),
    *(operation("Clip", o, X, min=-0.5, max=0.5) for o in (7, 9)),
    *(operation("Clip", o, X, max=0.5) for o in (7, 9)),
    operation("Clip", 9, X),
    operation("Clip", 11, X, np.array(-0.5, np.float32), constants=1),
    operation("Clip", 13, X, None, np.array(0.5, np.float32), constants=2),
    *(operation("TopK", 7, X, k=3, axis=axis, outputs=2) for axis in (1, -1)),
    operation("TopK", 10, X, ints(2), constants=1, axis=2, outputs=2),
    *(
        operation("TopK", 11, X, ints(2), constants=1, axis=2, largest=largest, outputs=2)
        for largest in (0, 1)
    ),
    *(
        operation(kind, opset, X, axes=[-1, 1], keepdims=keep)
        for kind in ("ReduceSum", "ReduceMean", "ReduceMax", "ReduceL2", "ReduceProd")
        for opset in (11,)
        for keep in (0, 1)
    ),
    *(operation("ReduceSum", opset, X, keepdims=0) for opset in (7, 11, 13)),
    operation("ReduceSum", 13, X, ints(1, 3), constants=1),
    operation("ReduceSum", 13, X, noop_with_empty_axes=1),
    operation("ReduceMean", 18, X, ints(-1), constants=1, keepdims=0),
    operation("ReduceMax", 18, X),
    operation("ReduceLogSumExp", 11, 100 * X, axes=[2]),
    *(operation("Split", o, X, split=[1, 3, 1], axis=3, outputs=3) for o in (7, 11)),
    operation("Split", 7, X, axis=2, outputs=2),
    operation("Split", 11, X, axis=-2, outputs=2),
    operation("Split", 13, X, ints(2, 3), constants=1, axis=3, outputs=2),
    operation("Split", 18, X, axis=3, num_outputs=2, outputs=2),
    *(operation("Upsample", 7, X, scales=[1.0, 1.0, 2.0, 3.0], mode=m) for m in BOTH),
    *(
        operation("Upsample", 9, X, floats(1, 1, 2, 3), constants=1, mode=mode)
        for mode in ("nearest", "linear")
    ),
    operation("Upsample", 9, X, floats(1, 1, 1.6, 1.5), constants=1),
    *(
        operation("Resize", 10, X, floats(1, 1, *scale), constants=1, mode=mode)
        for mode in ("nearest", "linear")
        for scale in ((2, 3), (0.5, 0.6), (0.5, 0.4))
    ),
    *(
        operation(
            "Resize", opset, X, floats(), floats(1, 1, *scale), constants=2, mode=mode,
            coordinate_transformation_mode=place, nearest_mode=near,
        )
        for opset in (11, 13)
        for mode in ("nearest", "linear", "cubic")
        for place in ("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel")
        for near in (("floor", "round_prefer_floor", "ceil") if mode == "nearest" else ("floor",))
        for scale in ((2, 3), (0.5, 0.4))
    ),
    *(
        operation("Resize", 13, X, None, None, ints(2, 3, *size), constants=3, mode=mode)
        for mode in ("nearest", "linear", "cubic")
        for size in ((8, 10), (6, 7), (3, 3), (1, 1))
    ),
    operation("Resize", 13, X, None, floats(2, 1, 2, 1), constants=2),
    operation("Resize", 13, X[0], None, floats(1, 2, 2), constants=2),
    *(operation("Dropout", opset, X, ratio=0.5) for opset in (7, 10)),
    *(operation("Dropout", o, X, np.array(0.5, np.float32), constants=1) for o in (12, 13)),
    operation("Dropout", 10, X, outputs=2),
    operation("Dropout", 13, X, outputs=2),
    *(operation("BatchNormalization", o, IMAGE, *STATISTICS, constants=4) for o in (7, 9, 14, 15)),
    *(operation("BatchNormalization", o, IMAGE, *STATISTICS, epsilon=0.1) for o in (9, 15)),
    operation("BatchNormalization", 9, IMAGE[:, :, 0], *STATISTICS, constants=4),
    operation("BatchNormalization", 9, IMAGE[:, :, 0, 0], *STATISTICS, constants=4),
    *(
        operation("Cast", opset, 4 * X, to=onnx_code(to))
        for opset in (7, 13)
        for to in ("int32", "bool", "int8", "float64", "float16", "int64")
    ),
    operation("Cast", 13, floats(-3.7, 3.7, 0.5, -0.5), to=onnx_code("int64")),
    operation("Cast", 13, np.array([300, -1, 5]), to=onnx_code("uint8")),
    *(
        operation("MaxPool", opset, IMAGE, **POOL, **more)
        for opset in (8, 10, 12)
        for more in ({"pads": [1, 1, 1, 1]}, {"auto_pad": "SAME_UPPER"}, {"auto_pad": "SAME_LOWER"})
    ),
    *(operation("MaxPool", 10, IMAGE, **POOL, ceil_mode=1, pads=p) for p in ([0] * 4, [1] * 4)),
    operation("MaxPool", 10, IMAGE, kernel_shape=[2, 2], dilations=[2, 2]),
    operation("MaxPool", 12, IMAGE, **POOL, outputs=2),
    operation("MaxPool", 12, IMAGE[:, :, 0], kernel_shape=[3], strides=[2], ceil_mode=1),
    *(
        operation("AveragePool", opset, IMAGE, **POOL, count_include_pad=include, **more)
        for opset in (7, 10, 11)
        for include in (0, 1)
        for more in ({"pads": [1, 1, 1, 1]}, {"auto_pad": "SAME_UPPER"}, {"auto_pad": "SAME_LOWER"})
    ),
    *(
        operation("AveragePool", o, IMAGE, **POOL, count_include_pad=include, ceil_mode=1, pads=p)
        for o in (10, 19)
        for include in (0, 1)
        for p in ([0] * 4, [1] * 4, [0, 1, 1, 0])
    ),
    operation("AveragePool", 19, IMAGE, kernel_shape=[2, 2], dilations=[2, 2]),
    operation("LpPool", 11, IMAGE, **POOL, p=2),
    operation("GlobalAveragePool", 7, IMAGE),
    operation("GlobalMaxPool", 7, IMAGE[:, :, 0]),
    *(
        operation(
            "ConvTranspose", 11, IMAGE, KERNEL, constants=1, **more
        )
        for more in (
            {},
            {"strides": [2, 2], "pads": [1, 1, 1, 1], "output_padding": [1, 1]},
            {"strides": [2, 3], "pads": [0, 1, 1, 0]},
            {"strides": [2, 2], "output_shape": [14, 18]},
            {"strides": [2, 2], "auto_pad": "SAME_UPPER"},
            {"strides": [2, 2], "auto_pad": "SAME_LOWER"},
            {"dilations": [2, 2]},
            {"group": 2},
        )
    ),
    *(
        operation("Conv", 11, IMAGE, RNG.standard_normal((4, 4 // g, 3, 3), np.float32),
                  constants=1, group=g, **more)
        for g in (1, 2, 4)
        for more in (
            {"auto_pad": "SAME_UPPER", "strides": [2, 2]},
            {"auto_pad": "SAME_LOWER", "strides": [2, 2]},
            {"auto_pad": "VALID", "dilations": [2, 3]},
            {"pads": [0, 1, 2, 3], "strides": [1, 2]},
        )
    ),
    operation("Gemm", 7, X[0, 0].T.copy(), X[0, 1], floats(1, 2, 3, 4, 5), constants=2, alpha=0.5),
    operation("Gemm", 11, X[0, 0], X[0, 1], transA=1, beta=2.0),
    operation("Gemm", 13, X[0, 0], X[0, 1], np.array(3, np.float32), transB=1, beta=2.0),
    operation("Flatten", 9, X, axis=0),
    operation("Flatten", 11, X, axis=-1),
    operation("Flatten", 9, X, axis=4),
    *(operation("ArgMax", o, X, axis=2, keepdims=k) for o in (7, 12) for k in (0, 1)),
    operation("ArgMin", 12, np.round(X), axis=1, select_last_index=1),
    operation("Gather", 11, X, ints(-1, 0, 2), constants=1, axis=2),
    operation("Gather", 13, X, ints(-1, 0, 2), axis=3),
    operation("Gather", 13, X, np.array(-1), constants=1, axis=1),
    operation("GatherElements", 13, X, np.array([[[[-1, 0]]]]), axis=3),
    operation("GatherND", 12, X, np.array([[0, 1], [1, -1]]), constants=1),
    operation("OneHot", 11, ints(0, 2, -1, 7), ints(4), floats(2, 5), constants=2),
    operation("CumSum", 11, X, np.array(1), constants=1, exclusive=1, reverse=1),
    operation("Expand", 8, X[:, :1], ints(3, 1, 5), constants=1),
    operation("Tile", 7, X, ints(7, 6, 4, 2), constants=1),
    *(operation("Mod", 13, np.array([5, -5, 7, -7]), ints(3, 3, -4, -4), fmod=f) for f in (0, 1)),
    operation("Div", 14, np.array([5, -5, 7, -7]), ints(3, 3, -4, -4)),
    operation("Div", 14, np.array([5, -5], np.int8), np.array([3, 3], np.int8)),
    operation("Pow", 13, np.abs(X), ints(2), constants=1),
    operation("Pow", 12, np.array([2, 3, -2], np.int32), np.array([3, 2, 2], np.int32)),
    operation("LRN", 7, IMAGE, size=3, alpha=0.1),
    operation("LRN", 7, IMAGE, size=4),
    operation("InstanceNormalization", 7, IMAGE, *STATISTICS[:2], constants=2),
    operation("LayerNormalization", 17, X, floats(1, 2, 3, 4, 5), constants=1),
    operation("LayerNormalization", 17, X, X[0, 0], X[0, 1], constants=2, axis=2, epsilon=0.1),
    operation("GroupNormalization", 18, IMAGE, floats(1, 2), floats(3, 4), num_groups=2),
    operation("GroupNormalization", 21, IMAGE, *STATISTICS[:2], constants=2, num_groups=2),
    *(operation("DepthToSpace", 11, IMAGE, blocksize=2, mode=m) for m in ("DCR", "CRD")),
    operation("SpaceToDepth", 7, X[:, :, :, :4].copy(), blocksize=2),
    operation("PRelu", 9, X, floats(0.1, 0.2, 0.3).reshape(3, 1, 1), constants=1),
    operation("PRelu", 9, X, floats(0.1), constants=1),
    operation("Selu", 7, X),
    operation("Elu", 7, X, alpha=0.5),
    operation("HardSigmoid", 7, X, alpha=0.3),
    operation("ThresholdedRelu", 10, X, alpha=0.3),
    operation("Gelu", 20, X, approximate="tanh"),
    operation("Gelu", 20, X),
    operation("Round", 11, floats(0.5, 1.5, 2.5, -0.5, -1.5)),
    operation("Sign", 9, floats(0.0, -2, 3)),
    operation("Einsum", 12, X, X, equation="bchw,bdhw->bcd"),
    operation("Where", 9, X > 0, X, np.array(0, np.float32), constants=1),
    operation("Not", 7, X > 0),
    operation("And", 7, X > 0, X < 1),
    operation("Equal", 11, np.round(X), np.round(X)),
    operation("Trilu", 14, X, np.array(1), constants=1, upper=0),
    operation("ScatterND", 11, X, np.array([[0, 1], [1, -1]]), X[:, 0], constants=2),
    operation("ScatterElements", 11, X, np.array([[[[-1, 0]]]]), X[:1, :1, :1, :2], constants=1),
    *(
        operation("QuantizeLinear", 13, X, np.array(0.1, np.float32), np.array(z), constants=2)
        for z in (np.uint8(128), np.int8(3))
    ),
    operation("DequantizeLinear", 10, np.arange(6, dtype=np.uint8), np.array(0.1, np.float32),
              np.array(np.uint8(3)), constants=2),
    operation("QuantizeLinear", 13, X, floats(0.1, 0.2, 0.3), np.zeros(3, np.int8), axis=1),
    operation("DynamicQuantizeLinear", 11, X, outputs=3),
    operation("MatMulInteger", 10, np.arange(6, dtype=np.uint8).reshape(2, 3),
              np.arange(6, dtype=np.int8).reshape(3, 2), np.array(np.uint8(2)), constants=2),
    operation("MeanVarianceNormalization", 13, X),
    operation("Shrink", 9, X, bias=0.2, lambd=0.4),
    operation("EyeLike", 9, X[0, 0], k=1),
    operation("Compress", 11, X, np.array([True, False, True]), constants=1, axis=1),
    operation("GridSample", 16, IMAGE, RNG.uniform(-1.2, 1.2, (1, 3, 4, 2)).astype(np.float32)),
    operation("GridSample", 16, IMAGE, RNG.uniform(-1.2, 1.2, (1, 3, 4, 2)).astype(np.float32),
              mode="bicubic", padding_mode="reflection", align_corners=1),
]  # fmt: skip


def told(model: onnx.ModelProto) -> str:
    node = model.graph.node[0]
    attributes = [f"{a.name}={helper.get_attribute_value(a)}" for a in node.attribute]
    return f"{node.op_type}-{model.opset_import[0].version}-{','.join(attributes)}"


SOME_OLD = OLD[:: max(1, STRIDE // 2)]


@pytest.mark.parametrize(("model", "inputs"), SOME_OLD, ids=[told(model) for model, _ in SOME_OLD])
def test_operations_of_old_opsets(model: onnx.ModelProto, inputs: list[Array]) -> None:
    names = [value.name for value in model.graph.input]
    try:
        expected = oracle.run(model, dict(zip(names, inputs, strict=True)))
    except ModelError as error:
        pytest.skip(str(error))
    for value in model.graph.output:
        array = expected[value.name]
        code = onnx_code(array.dtype.name)
        value.CopyFrom(helper.make_tensor_value_info(value.name, code, array.shape))
    try:
        results = compute(named(model), inputs)
    except CompileError as error:
        why = str(error)
    else:
        why = ""
    if why:
        assert f"{model.graph.node[0].op_type} 'node0': " in why
        pytest.skip(why)
    for found, output in zip(results, model.graph.output, strict=True):
        assert_right(found, expected[output.name])
