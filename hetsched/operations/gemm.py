"""The general matrix product."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from hetsched.dtype import numpy_dtype
from hetsched.op import Op
from hetsched.operation import Call, Compiler, Known, Operation, Piece, interpreted
from hetsched.operations._arithmetic import matrix_product, sum_dtype
from hetsched.region import Interval, Region

# Until then it needed three inputs.
FIRST_OPSET_WITHOUT_BIAS = 11


class Gemm(Operation):
    """alpha * A B + beta * C, where A and B may be given transposed and C broadcasts."""

    onnx_types = ("Gemm",)
    defined = onnx_types
    examples = (
        "(float[4,5] a, float[5,6] b, float[6] c) => (y) { y = Gemm (a, b, c) }",
        "(float[5,4] a, float[6,5] b, float[4,1] c) => (y) { y = Gemm <transA=1, transB=1, "
        "alpha=0.5, beta=2.0> (a, b, c) }",
        "(float[4,5] a, float[6,5] b) => (y) { y = Gemm <transB=1> (a, b) }",
    )

    def flops(self, op: Op) -> int:
        depth = op.input(0).shape[0 if op.attributes.get("transA") else 1]
        size = op.output().size
        total = 2 * size * depth + size * int(op.attributes.get("alpha", 1.0) != 1)
        if op.has_input(2):
            total += size + op.input(2).size * int(op.attributes.get("beta", 1.0) != 1)
        return total

    def piece(self, op: Op, index: int, region: Region, known: Known) -> Piece:
        """Any rows and columns."""
        row, column = region.intervals
        return self._with(op, {0: region}, row, (0, self.depth(op)), column)

    def depth(self, op: Op) -> int:
        return op.input(0).shape[0 if op.attributes.get("transA") else 1]

    def term(self, op: Op, first: int, last: int, known: Known) -> Piece:
        whole = Region.whole(op.output().shape)
        row, column = whole.intervals
        piece = self._with(op, {0: whole}, row, (first, last), column)
        if not first or not op.has_input(2):
            return piece
        # The bias is added once.
        none = (
            ()
            if known.opset >= FIRST_OPSET_WITHOUT_BIAS
            else (np.zeros(1, numpy_dtype(op.output().dtype)),)
        )
        return replace(piece, inputs=(*piece.inputs[:2], *none))

    def _with(
        self,
        op: Op,
        outputs: Mapping[int, Region],
        row: Interval,
        depth: Interval,
        column: Interval,
    ) -> Piece:
        reads: list[Region | None] = [
            Region((depth, row) if op.attributes.get("transA") else (row, depth)),
            Region((column, depth) if op.attributes.get("transB") else (depth, column)),
        ]
        if op.has_input(2):
            reads.append(Region((row, column)).operand(op.input(2).shape))
        return Piece.of(op, reads, outputs)

    def reference(
        self, call: Call, inputs: Sequence[Any], compiler: Compiler = interpreted
    ) -> tuple[np.ndarray, ...]:
        a, b, c = (*inputs, None)[:3]
        wide = sum_dtype(a.dtype)
        left = a.T if call.attributes.get("transA") else a
        right = b.T if call.attributes.get("transB") else b
        y = matrix_product(left.astype(wide, copy=False), right.astype(wide, copy=False), compiler)
        y = y * wide.type(call.attributes.get("alpha", 1.0))
        if c is not None:
            y = y + c.astype(wide) * wide.type(call.attributes.get("beta", 1.0))
        return (y.astype(a.dtype),)
