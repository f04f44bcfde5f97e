"""Reductions along axes."""

from hetsched.op import Op
from hetsched.operation import Known, Operation, Piece, keep, wholes
from hetsched.region import Region

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
    examples = (
        "(float[2,3,4] x) => (y) <int64[1] a = {-2}> { y = ReduceMean <keepdims=0> (x, a) }",
        "(float[2,3,4,5] x) => (y) <int64[2] a = {1, 3}> { y = ReduceSum (x, a) }",
        "(float[2,3,4] x) => (y) <int64[1] a = {0}> { y = ReduceL2 <keepdims=0> (x, a) }",
        "(float[2,3,4] x) => (y) { y = ArgMax <axis=1, keepdims=0> (x) }",
        "(float[2,3,4] x) => (y) <int64 a = {1}> { y = CumSum (x, a) }",
        "(float[2,9,4] x) => (y, i) <int64[1] k = {3}> { y, i = TopK <axis=1> (x, k) }",
    )

    def flops(self, op: Op) -> int:
        return op.input(0).size * FLOPS_PER_ELEMENT[op.kind]

    def piece(self, op: Op, index: int, region: Region, known: Known) -> Piece:
        """Any box of the axes that stay."""
        rank = len(op.input(0).shape)
        keepdims = bool(op.attributes.get("keepdims", 1))
        if op.kind.startswith("Reduce"):
            axes = op.attributes.get("axes") or known.integers(op, 1) or ()
            if not axes and not op.attributes.get("noop_with_empty_axes"):
                axes = tuple(range(rank))
        elif op.kind.startswith("Arg"):
            axes = (op.attributes.get("axis", 0),)
        elif op.kind == "TopK":
            axes, keepdims = (op.attributes.get("axis", -1),), True
        else:
            axes, keepdims = known.integers(op, 1) or (), True
        taken = {axis % rank for axis in axes}
        shape = op.input(0).shape
        if keepdims:
            keep(op, index, region, sorted(taken), "its elements are taken together")
        stay = iter(region.intervals)
        if keepdims:
            intervals = [
                (0, shape[axis]) if axis in taken else interval
                for axis, interval in enumerate(stay)
            ]
        else:
            intervals = [(0, shape[axis]) if axis in taken else next(stay) for axis in range(rank)]
        reads = wholes(op)
        reads[0] = Region(tuple(intervals))
        return Piece.of(op, reads, dict.fromkeys(range(len(op.outputs)), region))
