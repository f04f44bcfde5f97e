"""Elementwise types that take more than one FLOP for each element."""

from hetsched.op import Op
from hetsched.operation import Operation

# Written out in additions, products, comparisons and elementary functions; comparing with the ends
# of an interval is two.
FLOPS_PER_ELEMENT = {
    "Celu": 6,
    "Clip": 2,
    "DequantizeLinear": 2,
    "DynamicQuantizeLinear": 7,
    "Elu": 3,
    "Gelu": 5,
    "HardSigmoid": 4,
    "HardSwish": 5,
    "LeakyRelu": 2,
    "Mish": 4,
    "PRelu": 2,
    "QuantizeLinear": 5,
    "Selu": 4,
    "Shrink": 3,
    "Sigmoid": 4,
    "Softplus": 3,
    "Softsign": 3,
    "Swish": 5,
    "ThresholdedRelu": 1,
}
# They take any number of inputs, and one step for each after the first.
VARIADIC = ("Max", "Mean", "Min", "Sum")


class Elementwise(Operation):
    """Each output element is a function of the input elements at its place."""

    onnx_types = (*FLOPS_PER_ELEMENT, *VARIADIC)

    def flops(self, op: Op) -> int:
        if op.kind in VARIADIC:
            each = len(op.inputs) - 1 + int(op.kind == "Mean")
        else:
            each = FLOPS_PER_ELEMENT[op.kind]
        return op.output().size * each
