"""Operations on integers that ONNX Runtime adds to those of ONNX."""

from math import prod

from hetsched.op import Op
from hetsched.operation import Known, Operation, Piece, Read, wholes
from hetsched.region import Region


class Quantized(Operation):
    """Products, sums, concatenations and means of quantised tensors."""

    onnx_types = (
        "com.microsoft.QGemm",
        "com.microsoft.QLinearAdd",
        "com.microsoft.QLinearConcat",
        "com.microsoft.QLinearGlobalAveragePool",
    )
    examples = (
        "(uint8[4,3] a, int8[3,6] b, int32[6] c) => (uint8[4,6] y) <float s = {0.5}, uint8 z = "
        "{3}, int8 w = {0}> { y = com.microsoft.QGemm (a, s, z, b, s, w, c, s, z) }",
        "(uint8[2,3,4] a, uint8[4] b) => (uint8[2,3,4] y) <float s = {0.5}, uint8 z = {3}> { y "
        "= com.microsoft.QLinearAdd (a, s, z, b, s, z, s, z) }",
        "(uint8[2,3,4] a, uint8[2,5,4] b) => (uint8[2,8,4] y) <float s = {0.5}, float t = "
        "{0.3}, uint8 z = {3}> { y = com.microsoft.QLinearConcat <axis=1> (t, z, a, s, z, b, s, "
        "z) }",
        "(uint8[2,4,3,3] x) => (uint8[2,4,1,1] y) <float s = {0.5}, uint8 z = {3}> { y = "
        "com.microsoft.QLinearGlobalAveragePool (x, s, z, s, z) }",
    )

    def flops(self, op: Op) -> int:
        size = op.output().size
        if op.kind == "QGemm":
            depth = op.input(0).shape[0 if op.attributes.get("transA", 0) else 1]
            return size * (2 * depth + int(op.has_input(6)))
        if op.kind == "QLinearGlobalAveragePool":
            return prod(op.input(0).shape) + size
        return size

    def piece(self, op: Op, index: int, region: Region, known: Known) -> Piece:
        """Any box that the operation on floats can have."""
        reads = wholes(op)
        if op.kind == "QLinearAdd":
            for place in (0, 3):
                reads[place] = region.operand(op.input(place).shape)
        elif op.kind == "QLinearGlobalAveragePool":
            shape = op.input(0).shape
            last = bool(op.attributes.get("channels_last", 0))
            middle = range(1, len(shape) - 1) if last else range(2, len(shape))
            read = region
            for axis in middle:
                read = read.along(axis, 0, shape[axis])
            reads[0] = read
        elif op.kind == "QGemm":
            row, column = region.intervals
            transposed = [op.attributes.get(name, 0) for name in ("transA", "transB")]
            depth = (0, op.input(0).shape[0 if transposed[0] else 1])
            reads[0] = Region((depth, row) if transposed[0] else (row, depth))
            reads[3] = Region((column, depth) if transposed[1] else (depth, column))
            for place in (4, 5, 6):
                if op.has_input(place) and op.input(place).size > 1:
                    shape = op.input(place).shape
                    reads[place] = Region((row, column)).operand(shape)
        else:
            return self._concatenated(op, region)
        return Piece.of(op, reads, {0: region})

    def _concatenated(self, op: Op, region: Region) -> Piece:
        """Those inputs that the region meets, each with its scale and zero point."""
        axis = op.attributes["axis"] % len(region.intervals)
        first, last = region.intervals[axis]
        reads = [Read(0, Region.whole(op.input(0).shape)), Read(1, Region.whole(op.input(1).shape))]
        end = 0
        for place in range(2, len(op.inputs), 3):
            start, end = end, end + op.input(place).shape[axis]
            low, high = max(first, start), min(last, end)
            if low < high:
                reads.append(Read(place, region.along(axis, low - start, high - start)))
                for other in (place + 1, place + 2):
                    reads.append(Read(other, Region.whole(op.input(other).shape)))
        return Piece(tuple(reads), (region,), op.attributes)
