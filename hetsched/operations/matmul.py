"""Matrix products."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from hetsched.op import Op
from hetsched.operation import (
    Call,
    Compiler,
    Known,
    Operation,
    Piece,
    interpreted,
    refused,
    wholes,
)
from hetsched.operations._arithmetic import centred, matrix_product, requantised, sum_dtype
from hetsched.region import Region

# Where the factors are; then what has one value, or one for each row or column of the result.
PLACES: dict[str, tuple[tuple[int, int], tuple[int, ...], tuple[int, ...]]] = {
    "MatMul": ((0, 1), (), ()),
    "MatMulInteger": ((0, 1), (2,), (3,)),
    "QLinearMatMul": ((0, 3), (1, 2), (4, 5)),
}


class MatMul(Operation):
    """c[..., i, j] = sum over k of a[..., i, k] * b[..., k, j]; the leading axes broadcast."""

    onnx_types = ("MatMul", "MatMulInteger", "QLinearMatMul")
    defined = onnx_types
    examples = (
        "(float[2,1,4,3] a, float[5,3,6] b) => (y) { y = MatMul (a, b) }",
        "(float[3] a, float[2,3,6] b) => (y) { y = MatMul (a, b) }",
        "(float[2,4,3] a, float[3] b) => (y) { y = MatMul (a, b) }",
        "(uint8[2,4,3] a, int8[3,6] b) => (y) <uint8 z = {3}, int8[6] w = {1, 2, 3, 4, 5, 6}> { "
        "y = MatMulInteger (a, b, z, w) }",
        "(uint8[4,3] a, uint8[3,6] b) => (y) <float s = {0.5}, uint8 z = {3}> { y = "
        "QLinearMatMul (a, s, z, b, s, z, s, z) }",
    )

    def flops(self, op: Op) -> int:
        return 2 * op.output().size * op.input(0).shape[-1]

    def piece(self, op: Op, index: int, region: Region, known: Known) -> Piece:
        """Any box: rows of the first factor, columns of the second, and what broadcasts to it."""
        (left, right), by_row, by_column = PLACES[op.kind]
        a, b = op.input(left).shape, op.input(right).shape
        intervals = list(region.intervals)
        column = intervals.pop() if len(b) > 1 else None
        row = intervals.pop() if len(a) > 1 else None
        batch = Region(tuple(intervals))
        reads = wholes(op)
        if row is not None:
            reads[left] = Region((*batch.operand(a[:-2]).intervals, row, (0, a[-1])))
        if column is not None:
            reads[right] = Region((*batch.operand(b[:-2]).intervals, (0, b[-2]), column))
        for places, interval in ((by_row, row), (by_column, column)):
            for place in places:
                tensor = op.inputs[place] if op.has_input(place) else None
                if tensor is None or interval is None or tensor.size == 1:
                    continue
                if len(tensor.shape) != 1:
                    raise refused(op, f"'{tensor.name}' is neither one value nor a vector of them")
                reads[place] = Region((interval,))
        return Piece.of(op, reads, {0: region})

    def depth(self, op: Op) -> int:
        if op.kind == "QLinearMatMul":
            raise refused(op, "its sums are rounded")
        return op.input(0).shape[-1]

    def term(self, op: Op, first: int, last: int, known: Known) -> Piece:
        a, b = op.input(0).shape, op.input(1).shape
        reads = wholes(op)
        reads[0] = Region.whole(a).along(len(a) - 1, first, last)
        reads[1] = Region.whole(b).along(max(len(b) - 2, 0), first, last)
        return Piece.of(op, reads, {0: Region.whole(op.output().shape)})

    def reference(
        self, call: Call, inputs: Sequence[Any], compiler: Compiler = interpreted
    ) -> tuple[np.ndarray, ...]:
        if call.kind == "MatMul":
            a, b = inputs
            wide = sum_dtype(a.dtype)
            return (
                matrix_product(
                    a.astype(wide, copy=False), b.astype(wide, copy=False), compiler
                ).astype(a.dtype),
            )
        if call.kind == "MatMulInteger":
            a, b, a_zero, b_zero = (*inputs, None, None)[:4]
            left = centred(a, _by_row(a_zero))
            return (matrix_product(left, centred(b, b_zero), compiler),)
        a, a_scale, a_zero, b, b_scale, b_zero, c_scale, c_zero = inputs
        sums = matrix_product(centred(a, _by_row(a_zero)), centred(b, b_zero), compiler)
        return (requantised(sums, (_by_row(a_scale), b_scale, c_scale), c_zero),)


def _by_row(values: Any) -> Any:
    """One value, or one for each row of the matrix: a vector stands upright."""
    return values[:, np.newaxis] if values is not None and values.ndim == 1 else values
