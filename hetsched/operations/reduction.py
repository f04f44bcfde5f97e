"""Reductions along axes."""

from hetsched.op import Op
from hetsched.operation import Operation

FLOPS_PER_ELEMENT = {
    "ArgMax": 1,
    "ArgMin": 1,
    "CumProd": 1,
    "CumSum": 1,
    "ReduceL1": 2,
    "ReduceL2": 2,
    "ReduceLogSum": 1,
    "ReduceLogSumExp": 2,
    "ReduceMax": 1,
    "ReduceMean": 1,
    "ReduceMin": 1,
    "ReduceProd": 1,
    "ReduceSum": 1,
    "ReduceSumSquare": 2,
    "TopK": 1,
}


class Reduction(Operation):
    """Each input element is taken into a result once."""

    onnx_types = tuple(FLOPS_PER_ELEMENT)

    def flops(self, op: Op) -> int:
        return op.input(0).size * FLOPS_PER_ELEMENT[op.kind]
