"""Matrix products."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from hetsched.op import Op
from hetsched.operation import Call, Compiler, Operation, interpreted
from hetsched.operations._arithmetic import centred, matrix_product, requantised, sum_dtype


class MatMul(Operation):
    """c[..., i, j] = sum over k of a[..., i, k] * b[..., k, j]; the leading axes broadcast."""

    onnx_types = ("MatMul", "MatMulInteger", "QLinearMatMul")
    defined = onnx_types

    def flops(self, op: Op) -> int:
        return 2 * op.output().size * op.input(0).shape[-1]

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
