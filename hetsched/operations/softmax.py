"""Softmax and its relatives."""

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from hetsched.op import Op
from hetsched.operation import Call, Compiler, Known, Operation, Piece, interpreted, keep
from hetsched.operations._arithmetic import sum_dtype
from hetsched.region import Region

# Until then the axes from `axis` on were one, and so were those before it.
FIRST_OPSET_OF_ONE_AXIS = 13


class Softmax(Operation):
    """exp(x) over its sum along an axis."""

    onnx_types = ("Hardmax", "LogSoftmax", "Softmax")
    defined = onnx_types
    examples = (
        "(float[2,3,4] x) => (y) { y = Softmax <axis=1> (x) }",
        "(float[2,3,4] x) => (y) { y = LogSoftmax (x) }",
        "(float[2,3,4] x) => (y) { y = Hardmax <axis=0> (x) }",
    )

    def flops(self, op: Op) -> int:
        # The maximum, less it, exp, the sum, and over the sum (or less its logarithm).
        return op.output().size * (1 if op.kind == "Hardmax" else 5)

    def piece(self, op: Op, index: int, region: Region, known: Known) -> Piece:
        """Any box of the axes that it does not add up."""
        rank, modern = len(region.intervals), known.opset >= FIRST_OPSET_OF_ONE_AXIS
        axis = op.attributes.get("axis", -1 if modern else 1) % rank
        keep(op, index, region, [axis] if modern else range(axis, rank), "it is added up")
        return Piece.of(op, [region], {0: region})

    def reference(
        self, call: Call, inputs: Sequence[Any], compiler: Compiler = interpreted
    ) -> tuple[np.ndarray, ...]:
        (x,) = inputs
        axis = call.attributes["axis"]
        if call.opset < FIRST_OPSET_OF_ONE_AXIS:
            rows = prod(x.shape[: axis % x.ndim if axis < 0 else axis])
            wide = x.astype(sum_dtype(x.dtype)).reshape(rows, -1)
            axis = 1
        else:
            wide = x.astype(sum_dtype(x.dtype))
        if call.kind == "Hardmax":
            y = np.zeros_like(wide)
            np.put_along_axis(y, np.expand_dims(wide.argmax(axis), axis), 1, axis)
        else:
            below = wide - wide.max(axis=axis, keepdims=True)
            power = np.exp(below)
            total = power.sum(axis=axis, keepdims=True)
            y = power / total if call.kind == "Softmax" else below - np.log(total)
        return (y.astype(x.dtype).reshape(x.shape),)
