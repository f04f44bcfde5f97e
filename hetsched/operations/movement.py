"""Types that move elements and compute nothing."""

from collections.abc import Callable, Mapping
from itertools import accumulate

import numpy as np

from hetsched.op import Op, Tensor
from hetsched.operation import Known, Operation, Piece, Read, keep, refused, wholes
from hetsched.region import Region

# They read as many elements of their first input as they write, wherever those lie.
TAKING = ("Compress", "Gather", "GatherElements", "GatherND", "Slice", "Trilu")


class Movement(Operation):
    """Each output element is an input element, or a constant."""

    onnx_types = (
        *TAKING,
        "CenterCropPad",
        "Concat",
        "Constant",
        "ConstantOfShape",
        "DepthToSpace",
        "Expand",
        "EyeLike",
        "OneHot",
        "Pad",
        "ReverseSequence",
        "ScatterElements",
        "ScatterND",
        "SpaceToDepth",
        "Split",
        "Tile",
        "Transpose",
    )
    examples = (
        "(float[2,3,4] a, float[2,2,4] b, float[2,4,4] c) => (y) { y = Concat <axis=1> (a, b, c) }",
        '(float[1,8,4,3] x) => (y) { y = DepthToSpace <blocksize=2, mode="CRD"> (x) }',
        "(float[2,4,3,3] x) => (y) { y = DepthToSpace <blocksize=2> (x) }",
        "(float[3,1] x) => (y) <int64[3] n = {2, 3, 4}> { y = Expand (x, n) }",
        "(float[5,4,3] x) => (y) <int64[2,2] i = {3, 1, -1, 0}> { y = Gather <axis=1> (x, i) }",
        "(float[5,4,3] x) => (y) <int64 i = {2}> { y = Gather (x, i) }",
        "(float[5,4] x, int64[3,6] i) => (y) { y = Gather (x, i) }",
        "(float[3,4] x) => (y) <int64[2,4] i = {0, 2, 1, 1, 2, 0, 0, 1}> { y = GatherElements "
        "(x, i) }",
        "(float[2,3,4] x) => (y) <int64[6] p = {0, 1, 2, 0, 0, 1}, float v = {0.5}> { y = Pad "
        "(x, p, v) }",
        '(float[2,5,4] x) => (y) <int64[6] p = {0, 1, 0, 0, 2, 0}> { y = Pad <mode="reflect"> '
        "(x, p) }",
        "(float[2,9,8] x) => (y) <int64[2] s = {1, -1}, int64[2] e = {8, -9}, int64[2] a = {1, "
        "2}, int64[2] k = {2, -3}> { y = Slice (x, s, e, a, k) }",
        "(float[2,9,4] x) => (y) <int64[1] s = {2}, int64[1] e = {-1}, int64[1] a = {1}> { y = "
        "Slice (x, s, e, a) }",
        "(float[1,3,6,4] x) => (y) { y = SpaceToDepth <blocksize=2> (x) }",
        "(float[2,7,4] x) => (y, z) <int64[2] n = {3, 4}> { y, z = Split <axis=1> (x, n) }",
        "(float[2,3,4] x) => (y) <int64[3] n = {2, 1, 1}> { y = Tile (x, n) }",
        "(float[2,3,4] x) => (y) { y = Transpose <perm=[1,2,0]> (x) }",
    )

    def flops(self, op: Op) -> int:
        return 0

    def piece(self, op: Op, index: int, region: Region, known: Known) -> Piece:
        if op.kind not in PIECES or op.domain:
            raise refused(op, "its results have no known regions")
        return PIECES[op.kind](op, index, region, known)

    def read_nbytes(self, op: Op, tensor: Tensor) -> int:
        if op.kind in TAKING and tensor == op.inputs[0]:
            # A row that is taken twice is in a cache the second time.
            return min(tensor.nbytes, op.output().nbytes)
        return tensor.nbytes


def _concatenated(op: Op, index: int, region: Region, known: Known) -> Piece:
    """Those inputs that the region meets; where that is one, the result is a region of it."""
    axis = op.attributes["axis"] % len(region.intervals)
    first, last = region.intervals[axis]
    reads: list[Read] = []
    end = 0
    for place, tensor in enumerate(op.inputs):
        assert tensor is not None
        start, end = end, end + tensor.shape[axis]
        low, high = max(first, start), min(last, end)
        if low < high:
            reads.append(Read(place, region.along(axis, low - start, high - start)))
    if len(reads) == 1:
        return Piece.alias(op, reads[0].place, reads[0].region, index, region)
    return Piece(tuple(reads), (region,), op.attributes)


def _divided(op: Op, index: int, region: Region, known: Known) -> Piece:
    """A region of the input."""
    axis = op.attributes.get("axis", 0) % len(region.intervals)
    sizes = [0 if tensor is None else tensor.shape[axis] for tensor in op.outputs]
    if sum(sizes) != op.input(0).shape[axis]:
        raise refused(op, "an output that is not there hides where the others begin")
    start = [0, *accumulate(sizes)][index]
    return Piece.alias(op, 0, region.shifted(axis, start), index, region)


def _sliced(op: Op, index: int, region: Region, known: Known) -> Piece:
    """A region of the input, every so many elements of it, or backwards."""
    shape = op.input(0).shape
    rank = len(shape)
    if "starts" in op.attributes:
        starts = op.attributes["starts"]
        axes = op.attributes.get("axes") or range(len(starts))
        steps: tuple[int, ...] = (1,) * len(starts)
    else:
        starts = known.integers(op, 1) or ()
        axes = known.integers(op, 3) or tuple(range(len(starts)))
        steps = known.integers(op, 4) or (1,) * len(starts)
    read = region
    begins, ends = [0] * len(starts), [0] * len(starts)
    for i, (start, axis, step) in enumerate(zip(starts, axes, steps, strict=True)):
        axis, size = axis % rank, shape[axis % rank]
        start = start + size if start < 0 else start
        start = max(0, min(start, size if step > 0 else size - 1))
        first, last = region.intervals[axis]
        one, other = start + first * step, start + (last - 1) * step
        read = read.along(axis, min(one, other), max(one, other) + 1)
        width = abs(other - one) + 1
        begins[i], ends[i] = (0, width) if step > 0 else (width - 1, -width - 1)
    if all(step == 1 for step in steps):
        return Piece.alias(op, 0, read, index, region)
    fixed = {1: np.array(begins), 2: np.array(ends), 3: np.array(axes), 4: np.array(steps)}
    reads: list[Region | None] = [read, None, None, None, None]
    return Piece.of(op, reads, {0: region}, fixed)


def _transposed(op: Op, index: int, region: Region, known: Known) -> Piece:
    rank = len(region.intervals)
    perm = op.attributes.get("perm") or tuple(reversed(range(rank)))
    intervals = [(0, 0)] * rank
    for axis, source in enumerate(perm):
        intervals[source] = region.intervals[axis]
    return Piece.of(op, [Region(tuple(intervals))], {0: region})


def _padded(op: Op, index: int, region: Region, known: Known) -> Piece:
    """Axes that are not padded, and with a constant also those that are."""
    shape, rank = op.input(0).shape, len(region.intervals)
    values = op.attributes.get("pads") or known.integers(op, 1) or ()
    axes = known.integers(op, 3) or tuple(range(rank))
    heads, tails = [0] * rank, [0] * rank
    for i, axis in enumerate(axes):
        heads[axis % rank], tails[axis % rank] = values[i], values[i + len(axes)]
    plain = op.attributes.get("mode", "constant") == "constant"
    read = region
    for axis in range(rank):
        if not plain and (heads[axis] or tails[axis]):
            keep(op, index, region, [axis], "its border is made of what is inside")
            continue
        if axis not in region.cuts(op.output().shape):
            read = read.along(axis, 0, shape[axis])
            continue
        first, last = (place - heads[axis] for place in region.intervals[axis])
        low, high = max(first, 0), min(last, shape[axis])
        if low >= high:
            raise refused(op, "a part of it is nothing but padding", axis)
        read = read.along(axis, low, high)
        heads[axis], tails[axis] = low - first, last - high
    if "pads" in op.attributes:
        return Piece.of(op, [read], {0: region}, pads=(*heads, *tails))
    reads = wholes(op)
    reads[0] = read
    fixed = {1: np.array([*heads, *tails])}
    if op.has_input(3):
        fixed[3] = np.arange(rank)
    return Piece.of(op, reads, {0: region}, fixed)


def _expanded(op: Op, index: int, region: Region, known: Known) -> Piece:
    read = region.operand(op.input(0).shape)
    return Piece.of(op, [read, None], {0: region}, {1: np.array(region.shape)})


def _tiled(op: Op, index: int, region: Region, known: Known) -> Piece:
    shape = op.input(0).shape
    repeated = [a for a, size in enumerate(op.output().shape) if size != shape[a]]
    keep(op, index, region, repeated, "it is repeated")
    read = region
    for axis in repeated:
        read = read.along(axis, 0, shape[axis])
    reads = wholes(op)
    reads[0] = read
    return Piece.of(op, reads, {0: region})


def _gathered(op: Op, index: int, region: Region, known: Known) -> Piece:
    """Rows of the indices and columns of what is taken; of constant indices only what they span."""
    data, taken = op.input(0), op.input(1)
    axis = op.attributes.get("axis", 0) % len(data.shape)
    rank = len(taken.shape)
    rows = Region(region.intervals[axis : axis + rank])
    others = region.intervals[:axis], region.intervals[axis + rank :]
    along, fixed = (0, data.shape[axis]), {}
    if taken.name in known.constants:
        array = known.constants[taken.name][rows.slices]
        array = np.where(array < 0, array + data.shape[axis], array)
        along = int(array.min()), int(array.max()) + 1
        fixed[1] = (array - along[0]).astype(taken.dtype)
    read = Region((*others[0], along, *others[1]))
    return Piece.of(op, [read, rows], {0: region}, fixed)


def _gathered_elements(op: Op, index: int, region: Region, known: Known) -> Piece:
    axis = op.attributes.get("axis", 0) % len(region.intervals)
    read = region.along(axis, 0, op.input(0).shape[axis])
    return Piece.of(op, [read, region], {0: region})


def _depth_to_space(op: Op, index: int, region: Region, known: Known) -> Piece:
    """Whole blocks of rows and columns; channels where those of a block are next to each other."""
    block = op.attributes["blocksize"]
    batch, (first, last), *rows = region.intervals
    if op.attributes.get("mode", "DCR") == "DCR":
        keep(op, index, region, [1], "the elements of a block are far apart")
    wide = [(low // block, -(-high // block)) for low, high in rows]
    read = Region((batch, (first * block**2, last * block**2), *wide))
    made = Region((batch, (first, last), *((low * block, high * block) for low, high in wide)))
    return Piece.of(op, [read], {0: made})


def _space_to_depth(op: Op, index: int, region: Region, known: Known) -> Piece:
    block = op.attributes["blocksize"]
    keep(op, index, region, [1], "the elements of a block are far apart")
    batch, _, *rows = region.intervals
    wide = ((low * block, high * block) for low, high in rows)
    return Piece.of(op, [Region((batch, (0, op.input(0).shape[1]), *wide))], {0: region})


PIECES: Mapping[str, Callable[[Op, int, Region, Known], Piece]] = {
    "Concat": _concatenated,
    "DepthToSpace": _depth_to_space,
    "Expand": _expanded,
    "Gather": _gathered,
    "GatherElements": _gathered_elements,
    "Pad": _padded,
    "Slice": _sliced,
    "SpaceToDepth": _space_to_depth,
    "Split": _divided,
    "Tile": _tiled,
    "Transpose": _transposed,
}
