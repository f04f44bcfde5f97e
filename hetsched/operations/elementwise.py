"""Elementwise types that take more than one FLOP for each element."""

from hetsched.op import Op
from hetsched.operation import Known, Operation, Piece, elementwise, keep, refused, wholes
from hetsched.region import Region

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
    examples = (
        "(float[2,3,4] x) => (y) <float low = {-0.5}, float high = {0.5}> { y = Clip (x, low, "
        "high) }",
        "(float[2,3,4] x, float[3,1] s) => (y) { y = PRelu (x, s) }",
        "(float[2,3,4] x, float[4] a, float[3,1] b) => (y) { y = Sum (x, a, b) }",
        "(float[2,3,4] x, float[2,1,4] a) => (y) { y = Mean (x, a) }",
        "(float[2,6] x) => (y) { y = HardSigmoid <alpha=0.3> (x) }",
        "(float[2,3,4] x) => (y) <float s = {0.03}, uint8 z = {100}> { y = QuantizeLinear (x, "
        "s, z) }",
        "(float[2,3,4] x) => (y) <float[3] s = {0.03, 0.1, 0.02}, int8[3] z = {1, 2, 3}> { y = "
        "QuantizeLinear <axis=1> (x, s, z) }",
        "(int8[2,3,4] x) => (y) <float[4] s = {0.03, 0.1, 0.02, 1}> { y = DequantizeLinear "
        "<axis=-1> (x, s) }",
    )

    def flops(self, op: Op) -> int:
        if op.kind in VARIADIC:
            each = len(op.inputs) - 1 + int(op.kind == "Mean")
        else:
            each = FLOPS_PER_ELEMENT[op.kind]
        return op.output().size * each

    def piece(self, op: Op, index: int, region: Region, known: Known) -> Piece:
        """Any box."""
        if op.kind == "DynamicQuantizeLinear":
            raise refused(op, "its scale depends on all elements")
        if op.kind not in ("DequantizeLinear", "QuantizeLinear"):
            return elementwise(op, region)
        reads = wholes(op)
        reads[0] = region
        shape = op.input(0).shape
        axis = op.attributes.get("axis", 1) % max(len(shape), 1)
        scale = op.input(1)
        if len(scale.shape) > 1:
            keep(op, index, region, [axis], "its scales are of blocks")
            reads[1:] = [region.along(axis, 0, scale.shape[axis])] * (len(reads) - 1)
        elif scale.size > 1:
            reads[1:] = [Region((region.intervals[axis],))] * (len(reads) - 1)
        return Piece.of(op, reads, {0: region})
