"""The general matrix product."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from hetsched.op import Op
from hetsched.operation import Call, Compiler, Operation, interpreted
from hetsched.operations._arithmetic import matrix_product, sum_dtype


class Gemm(Operation):
    """alpha * A B + beta * C, where A and B may be given transposed and C broadcasts."""

    onnx_types = ("Gemm",)
    defined = onnx_types

    def flops(self, op: Op) -> int:
        depth = op.input(0).shape[0 if op.attributes.get("transA") else 1]
        size = op.output().size
        total = 2 * size * depth + size * int(op.attributes.get("alpha", 1.0) != 1)
        if op.has_input(2):
            total += size + op.input(2).size * int(op.attributes.get("beta", 1.0) != 1)
        return total

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
