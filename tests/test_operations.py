"""FLOPs and bytes of operations, with the numbers worked out by hand."""

from collections import Counter
from typing import Any

import pytest

from hetsched.fusion import Group, fuse
from hetsched.op import Op, Tensor
from hetsched.operation import (
    Operation,
    flops,
    group_flops,
    group_nbytes,
    nbytes,
    operation_of,
    operations,
)
from hetsched.plugin import load, names

Shape = tuple[int, ...]


def op(kind: str, *shapes: Shape | None, y: Shape, dtype: str = "float32", **attributes: Any) -> Op:
    inputs = tuple(
        None if shape is None else Tensor(f"x{i}", shape, dtype) for i, shape in enumerate(shapes)
    )
    return Op("node", kind, inputs, (Tensor("y", y, dtype),), attributes)


CASES = [
    # 8 * 14 * 14 outputs, each 2 * 3 * 5 * 5.
    ("conv", op("Conv", (1, 3, 18, 18), (8, 3, 5, 5), y=(1, 8, 14, 14)), 235_200),
    # The bias adds one to each of them.
    ("conv, bias", op("Conv", (1, 3, 18, 18), (8, 3, 5, 5), (8,), y=(1, 8, 14, 14)), 236_768),
    # Two groups of two input channels each: 2 * 2 * 9 for each of 6 * 16.
    ("conv, groups", op("Conv", (1, 4, 6, 6), (6, 2, 3, 3), y=(1, 6, 4, 4), group=2), 3_456),
    # Stride 2: (9 - 3) // 2 + 1 = 4 places an axis, 2 * 27 each on 5 channels.
    ("conv, stride", op("Conv", (1, 3, 9, 9), (5, 3, 3, 3), y=(1, 5, 4, 4), strides=(2, 2)), 4_320),
    # Dilation 2 reaches 5: 9 - 5 + 1 = 5 places an axis, but 9 products all the same.
    (
        "conv, dilation",
        op("Conv", (1, 1, 9, 9), (1, 1, 3, 3), y=(1, 1, 5, 5), dilations=(2, 2)),
        450,
    ),
    # Pads of 0 above, 2 left, 1 below, 0 right make 7 x 8 of 6 x 6, so 5 x 6 places of 18.
    (
        "conv, asymmetric pads",
        op("Conv", (1, 1, 6, 6), (1, 1, 3, 3), y=(1, 1, 5, 6), pads=(0, 2, 1, 0)),
        540,
    ),
    # One input channel for each output channel: 2 * 9 for each of 16 * 64.
    (
        "conv, depthwise",
        op("Conv", (1, 16, 8, 8), (16, 1, 3, 3), y=(1, 16, 8, 8), group=16, pads=(1, 1, 1, 1)),
        18_432,
    ),
    # 2 batches * 4 channels * 8 places, 2 * 3 * 3 each.
    ("conv, 1-D", op("Conv", (2, 3, 10), (4, 3, 3), y=(2, 4, 8)), 1_152),
    (
        "conv, integer",
        op("ConvInteger", (1, 3, 4, 4), (2, 3, 3, 3), y=(1, 2, 2, 2), dtype="uint8"),
        432,
    ),
    # The weights come fourth, a bias ninth.
    (
        "conv, quantised",
        op(
            "QLinearConv",
            *((1, 3, 4, 4), (), (), (2, 3, 3, 3), (), (), (), (), (2,)),
            y=(1, 2, 2, 2),
            dtype="uint8",
        ),
        440,
    ),
    # 3 * 4 * 4 inputs, each spread over 2 channels of 2 x 2: 48 * 2 * 8; the bias on 2 * 64.
    (
        "conv transposed",
        op("ConvTranspose", (1, 3, 4, 4), (3, 2, 2, 2), (2,), y=(1, 2, 8, 8), strides=(2, 2)),
        896,
    ),
    ("matmul", op("MatMul", (4, 3), (3, 5), y=(4, 5)), 120),
    # [2, 1, 4, 3] by [6, 3, 5] broadcasts to 2 * 6 products of 4 x 5.
    ("matmul, broadcast", op("MatMul", (2, 1, 4, 3), (6, 3, 5), y=(2, 6, 4, 5)), 1_440),
    ("matmul, vector", op("MatMul", (3,), (3, 5), y=(5,)), 30),
    ("matmul, integer", op("MatMulInteger", (4, 3), (3, 5), y=(4, 5), dtype="uint8"), 120),
    (
        "matmul, quantised",
        op("QLinearMatMul", (4, 3), (), (), (3, 5), (), (), (), (), y=(4, 5), dtype="uint8"),
        120,
    ),
    # 4 x 5 results of depth 3, and C is added to each.
    ("gemm", op("Gemm", (3, 4), (3, 5), (5,), y=(4, 5), transA=1), 140),
    # alpha multiplies the 20 results, beta the 5 elements of C.
    (
        "gemm, scaled",
        op("Gemm", (4, 3), (5, 3), (5,), y=(4, 5), transB=1, alpha=2.0, beta=0.5),
        165,
    ),
    # i, j and k run over 2 * 3 * 4 terms of a product and an addition.
    ("einsum", op("Einsum", (2, 3), (3, 4), y=(2, 4), equation="ij,jk->ik"), 48),
    # 5 batches under the ellipsis.
    (
        "einsum, ellipsis",
        op("Einsum", (5, 2, 3), (1, 3, 4), y=(5, 2, 4), equation="...ij,...jk->...ik"),
        240,
    ),
    # 7 steps * 2 rows * 4 units; 4 gates of 2 * (3 + 4) + 2 and two biases; 5 for the state.
    (
        "lstm",
        op("LSTM", (7, 2, 3), (1, 16, 3), (1, 16, 4), (1, 32), y=(7, 1, 2, 4), hidden_size=4),
        56 * (4 * 18 + 5),
    ),
    # Both directions, no bias, peepholes of a product and a sum at three gates.
    (
        "lstm, both ways, peepholes",
        op(
            "LSTM",
            *((7, 2, 3), (2, 16, 3), (2, 16, 4), None, None, None, None, (2, 12)),
            y=(7, 2, 2, 4),
            hidden_size=4,
        ),
        112 * (4 * 16 + 5 + 6),
    ),
    (
        "gru",
        op("GRU", (7, 2, 3), (1, 12, 3), (1, 12, 4), (1, 24), y=(7, 1, 2, 4), hidden_size=4),
        56 * (3 * 18 + 5),
    ),
    ("rnn", op("RNN", (7, 2, 3), (1, 4, 3), (1, 4, 4), y=(7, 1, 2, 4), hidden_size=4), 56 * 16),
    # 3 * 4 * 4 places of 2 x 3.
    ("max pool", op("MaxPool", (1, 3, 8, 8), y=(1, 3, 4, 4), kernel_shape=(2, 3)), 288),
    ("mean pool", op("AveragePool", (1, 3, 8, 8), y=(1, 3, 4, 4), kernel_shape=(2, 2)), 192),
    ("global pool", op("GlobalAveragePool", (1, 3, 8, 8), y=(1, 3, 1, 1)), 192),
    ("norm pool", op("LpPool", (1, 3, 8), y=(1, 3, 4), kernel_shape=(2,)), 48),
    ("add", op("Add", (2, 3), (3,), y=(2, 3)), 6),
    ("sigmoid", op("Sigmoid", (2, 3), y=(2, 3)), 24),
    ("sum of three", op("Sum", (2, 3), (2, 3), (2, 3), y=(2, 3)), 12),
    ("mean of three", op("Mean", (2, 3), (2, 3), (2, 3), y=(2, 3)), 18),
    ("softmax", op("Softmax", (2, 10), y=(2, 10)), 100),
    ("batch normalisation", op("BatchNormalization", (1, 2, 5), y=(1, 2, 5)), 40),
    # Five squares are added up: ten, and four more, for 12 elements.
    ("local response", op("LRN", (1, 3, 4), y=(1, 3, 4), size=5), 168),
    ("reduction", op("ReduceMean", (4, 5), y=(4, 1)), 20),
    ("norm", op("ReduceL2", (4, 5), y=(4, 1)), 40),
    # 4 neighbours for each of 3 * 8 * 8.
    ("resize", op("Resize", (1, 3, 4, 4), y=(1, 3, 8, 8), mode="linear"), 1_536),
    ("resize, nearest", op("Resize", (1, 3, 4, 4), y=(1, 3, 8, 8)), 0),
    ("transpose", op("Transpose", (4, 5), y=(5, 4)), 0),
    ("reshape", op("Reshape", (4, 5), (1,), y=(20,)), 0),
    ("unknown", op("Erf", (4, 5), y=(4, 5)), 20),
]


@pytest.mark.parametrize(("node", "expected"), [pytest.param(*c[1:], id=c[0]) for c in CASES])
def test_flops(node: Op, expected: int) -> None:
    assert flops(node) == expected


def taken(kind: str, x: Shape, indices: Shape, y: Shape) -> Op:
    data, rows = Tensor("x", x, "float32"), Tensor("i", indices, "int64")
    return Op("node", kind, (data, rows), (Tensor("y", y, "float32"),))


BYTES = [
    # 4 * (3 * 18 * 18 + 8 * 3 * 25 + 8 + 8 * 14 * 14).
    ("conv", op("Conv", (1, 3, 18, 18), (8, 3, 5, 5), (8,), y=(1, 8, 14, 14)), 12_592),
    ("matmul", op("MatMul", (4, 3), (3, 5), y=(4, 5)), 4 * (12 + 15 + 20)),
    ("bytes", op("MatMulInteger", (4, 3), (3, 5), y=(4, 5), dtype="uint8"), 12 + 15 + 20),
    ("omitted input", op("Clip", (4,), None, (), y=(4,)), 4 * (4 + 1 + 4)),
    ("reshape", op("Reshape", (4, 5), (1,), y=(20,)), 0),
    ("flatten", op("Flatten", (4, 5), y=(4, 5)), 0),
    # Three rows of 16 floats of a thousand, and three indices.
    ("gather", taken("Gather", (1000, 16), (3,), (3, 16)), 3 * 64 + 3 * 8 + 3 * 64),
    # More rows than there are cannot be read.
    ("gather, again", taken("Gather", (2, 16), (5,), (5, 16)), 2 * 64 + 5 * 8 + 5 * 64),
    ("slice", taken("Slice", (100, 8), (1,), (10, 8)), 320 + 8 + 320),
]


@pytest.mark.parametrize(("node", "expected"), [pytest.param(*c[1:], id=c[0]) for c in BYTES])
def test_nbytes(node: Op, expected: int) -> None:
    assert nbytes(node) == expected


def test_a_tensor_read_twice_counts_once() -> None:
    x = Tensor("x", (4,), "float32")
    assert nbytes(Op("square", "Mul", (x, x), (Tensor("y", (4,), "float32"),))) == 32


def test_another_domain_has_types_of_its_own() -> None:
    x, y = Tensor("x", (4,), "float32"), Tensor("y", (4,), "float32")
    foreign = Op("node", "Reshape", (x,), (y,), domain="com.example")
    assert (flops(foreign), nbytes(foreign)) == (4, 32)


def chain(*ops: tuple[str, tuple[str, ...], str], shapes: dict[str, Shape]) -> Group:
    """One group of operations of kind, inputs and output; `w...` are constants."""
    tensors = {name: Tensor(name, shape, "float32") for name, shape in shapes.items()}
    made = [
        Op(output, kind, tuple(tensors[i] for i in inputs), (tensors[output],))
        for kind, inputs, output in ops
    ]
    constants = {name: None for name in shapes if name.startswith("w")}
    (group,) = fuse(made, [made[-1].output()], constants)
    return group


def test_a_group_moves_what_crosses_its_border() -> None:
    group = chain(
        ("MatMul", ("x", "w"), "a"),
        ("Add", ("a", "wb"), "b"),
        ("Relu", ("b",), "y"),
        shapes={"x": (4, 3), "w": (3, 5), "a": (4, 5), "wb": (5,), "b": (4, 5), "y": (4, 5)},
    )
    # The product, an addition and a maximum for each of 20; the tensors a and b stay inside.
    assert group_flops(group) == 120 + 20 + 20
    assert group_nbytes(group) == 4 * (12 + 15 + 5 + 20)
    assert sum(map(nbytes, group.ops)) > group_nbytes(group)


def test_a_group_that_begins_with_a_reshape_reads_its_input() -> None:
    shapes = {"x": (4, 5), "ws": (1,), "a": (20,), "y": (20,)}
    group = chain(("Reshape", ("x", "ws"), "a"), ("Relu", ("a",), "y"), shapes=shapes)
    assert group_nbytes(group) == 4 * (20 + 20)


def test_a_group_of_views_moves_nothing() -> None:
    shapes = {"x": (4, 5), "a": (1, 4, 5), "y": (4, 5)}
    group = chain(("Unsqueeze", ("x",), "a"), ("Squeeze", ("a",), "y"), shapes=shapes)
    assert group_nbytes(group) == 0


def test_a_group_that_gathers_reads_the_rows_it_takes() -> None:
    shapes = {"w": (1000, 16), "i": (3,), "a": (3, 16), "y": (3, 16)}
    group = chain(("Gather", ("w", "i"), "a"), ("Relu", ("a",), "y"), shapes=shapes)
    assert group_nbytes(group) == 4 * (3 * 16 + 3 + 3 * 16)


def test_no_type_is_in_two_files() -> None:
    counts = Counter(k for name in names(Operation) for k in load(Operation, name).onnx_types)
    assert [kind for kind, count in counts.items() if count > 1] == []
    assert counts["Conv"] == 1


@pytest.mark.parametrize("name", names(Operation))
def test_a_file_is_all_that_an_operation_needs(name: str) -> None:
    operation = load(Operation, name)
    assert operation.onnx_types
    assert set(operation.defined) <= set(operation.onnx_types)
    for kind in operation.onnx_types:
        assert operation_of(Op("node", kind, (), ())).name == name
    assert name in [found.name for found in operations()]
