"""Operations on integers that ONNX Runtime adds to those of ONNX."""

from math import prod

from hetsched.op import Op
from hetsched.operation import Operation


class Quantized(Operation):
    """Products, sums, concatenations and means of quantised tensors."""

    onnx_types = (
        "com.microsoft.QGemm",
        "com.microsoft.QLinearAdd",
        "com.microsoft.QLinearConcat",
        "com.microsoft.QLinearGlobalAveragePool",
    )

    def flops(self, op: Op) -> int:
        size = op.output().size
        if op.kind == "QGemm":
            depth = op.input(0).shape[0 if op.attributes.get("transA", 0) else 1]
            return size * (2 * depth + int(op.has_input(6)))
        if op.kind == "QLinearGlobalAveragePool":
            return prod(op.input(0).shape) + size
        return size
