"""Types that give the same elements another shape, or tell a shape."""

from collections.abc import Sequence
from math import prod

import numpy as np

from hetsched.op import Op, Tensor
from hetsched.operation import Known, Operation, Piece, Read, refused, wholes
from hetsched.region import Interval, Region


class View(Operation):
    """Nothing is computed and nothing moves; Dropout is the identity outside training."""

    onnx_types = (
        "Dropout",
        "Flatten",
        "Identity",
        "Reshape",
        "Shape",
        "Size",
        "Squeeze",
        "Unsqueeze",
    )
    is_view = True
    examples = (
        "(float[2,6,4] x) => (y) <int64[4] n = {2, 3, 2, 4}> { y = Reshape (x, n) }",
        "(float[1,12,5] x) => (y) <int64[2] n = {12, 5}> { y = Reshape (x, n) }",
        "(float[2,3,2,4] x) => (y) <int64[3] n = {2, -1, 4}> { y = Reshape (x, n) }",
        "(float[4,6] x) => (y) <int64[3] n = {2, 3, 4}> { y = Reshape (x, n) }",
        "(float[2,3,1,4] x) => (y) { y = Flatten <axis=2> (x) }",
        "(float[2,1,4,1] x) => (y) { y = Squeeze (x) }",
        "(float[2,1,4,1] x) => (y) <int64[1] a = {1}> { y = Squeeze (x, a) }",
        "(float[4,3] x) => (y) <int64[2] a = {0, -1}> { y = Unsqueeze (x, a) }",
        "(float[4,3] x) => (y) { y = Identity (x) }",
        "(float[4,3] x) => (y) { y = Dropout (x) }",
    )

    def flops(self, op: Op) -> int:
        return 0

    def piece(self, op: Op, index: int, region: Region, known: Known) -> Piece:
        """What lies together in the input: whole groups of axes, or a run of one of them."""
        if index or op.kind in ("Shape", "Size"):
            raise refused(op, "it tells of the whole input")
        reads = wholes(op)
        if op.kind in ("Dropout", "Identity"):
            reads[0] = region
            return Piece.of(op, reads, {0: region})
        reads[0] = read = regrouped(op, region)
        if op.kind == "Reshape" or (op.kind == "Squeeze" and not op.has_input(1)):
            # A Squeeze that names no axes would take one that a cut leaves a single element of.
            return Piece((Read(0, read), np.array(region.shape)), (region,), {}, "Reshape")
        return Piece.of(op, reads, {0: region})

    def read_nbytes(self, op: Op, tensor: Tensor) -> int:
        """What a kernel that this belongs to reads through it: not the shape asked for."""
        if op.kind in ("Shape", "Size") or tensor != op.inputs[0]:
            return 0
        return tensor.nbytes


def regrouped(op: Op, region: Region) -> Region:
    """The region of the input of a reshape that has the elements of `region` in their order.

    Raises
    ------
    SplitRefused
        They are no box.
    """
    before, after = op.input(0).shape, op.output().shape
    if 0 in before:
        raise refused(op, "it is empty")
    found: list[Interval] = []
    old = new = 0
    while old < len(before) or new < len(after):
        first, start = old, new
        # The fewest axes of both that have as many elements.
        while old == first or new == start or prod(before[first:old]) != prod(after[start:new]):
            few = prod(before[first:old]) <= prod(after[start:new])
            if old < len(before) and (few or new == len(after)):
                old += 1
            elif new < len(after):
                new += 1
            else:
                break
        run = _run(region.intervals[start:new], after[start:new])
        box = None if run is None else _box(*run, before[first:old])
        if box is None:
            axis = next(axis for axis in region.cuts(after) if start <= axis < new)
            raise refused(op, "what it has there lies apart in the input", axis)
        found.extend(box)
    return Region(tuple(found))


def _run(intervals: Sequence[Interval], sizes: Sequence[int]) -> tuple[int, int] | None:
    """Where a box of an array of these sizes begins in memory, and its length, if it is one run."""
    start, length, inner, closed = 0, 1, 1, False
    for (first, last), size in zip(reversed(intervals), reversed(sizes), strict=True):
        if closed and last - first > 1:
            return None
        closed = closed or (first, last) != (0, size)
        start += first * inner
        length *= last - first
        inner *= size
    return start, length


def _box(start: int, length: int, sizes: Sequence[int]) -> list[Interval] | None:
    """The box of an array of these sizes that is one run in memory of this start and length."""
    box: list[Interval] = []
    inner = prod(sizes)
    for size in sizes:
        inner //= size
        first, start = divmod(start, inner)
        if length <= inner:
            # Within one index of this axis.
            if start + length > inner:
                return None
            box.append((first, first + 1))
        else:
            if start or length % inner:
                return None
            box.append((first, first + length // inner))
            length = inner
    return box
