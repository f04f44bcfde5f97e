"""Convolutions and pooling over blocked tensors.

A blocked tensor [n, blocks, height * width, lanes] has its channels in blocks of as many as a
vector has lanes. A tile of pixels by blocks of output channels stays in registers. Where no tile
divides the width of the output, columns beyond it are computed, and cropped.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import te, tirx
from tvm.s_tir import Schedule, transform

from hetsched.schedules import elementwise, loops
from hetsched.schedules.vectors import Vectors

FAMILY = "window"
# Pixels of a tile whose addresses are computed one by one.
MOST_CLAMPED = 8
# Output blocks of a 1x1 convolution's tile: it reads its input once for each.
WIDE = 3
LOWEST = -3.4028234663852886e38


@dataclass(frozen=True)
class Window:
    """Where a kernel reads. `padding` is top, left, bottom, right; bottom and right may exceed."""

    kernel: tuple[int, int]
    strides: tuple[int, int]
    dilations: tuple[int, int]
    padding: tuple[int, int, int, int]
    source: tuple[int, int]
    result: tuple[int, int]

    @property
    def is_pointwise(self) -> bool:
        return self.kernel == self.strides == (1, 1) and self.source == self.result

    def padded(self, columns: int) -> tuple[int, int]:
        """The height and width that are read for `columns` columns of the result."""

        def size(axis: int, count: int) -> int:
            reach = (count - 1) * self.strides[axis] + 1
            reach += (self.kernel[axis] - 1) * self.dilations[axis]
            return max(reach, self.source[axis] + self.padding[axis])

        return size(0, self.result[0]), size(1, columns)


def pack_dense(weights: np.ndarray, groups: int, lanes: int, *, plain: bool) -> np.ndarray:
    """Weights [o, c, h, w] of a group as [o / lanes, c / lanes, h, w, lanes of c, lanes of o].

    A reader of a `plain` tensor, or of fewer channels than lanes, has all channels in one block.
    Groups are padded each on its own.
    """
    channels = weights.shape[1]
    inner = channels if plain or channels < lanes else lanes
    grouped = weights.reshape(groups, -1, *weights.shape[1:])
    padded = np.pad(
        grouped, ((0, 0), (0, -grouped.shape[1] % lanes), (0, -channels % inner), (0, 0), (0, 0))
    )
    height, width = weights.shape[2:]
    blocked = padded.reshape(-1, lanes, padded.shape[2] // inner, inner, height, width)
    return np.ascontiguousarray(blocked.transpose(0, 2, 4, 5, 3, 1))


def pack_phases(weights: np.ndarray, strides: tuple[int, int], lanes: int) -> np.ndarray:
    """Weights [c, o, h, w] of a transposed convolution as those of a convolution.

    Each phase of the stride is a set of output channels of its own, filled up to whole vectors.
    """
    channels, outputs, height, width = weights.shape
    down, right = strides
    rows, columns = -(-height // down), -(-width // right)
    space = ((0, 0), (0, -outputs % lanes), (0, rows * down - height), (0, columns * right - width))
    padded = np.pad(weights, space)
    apart = padded.reshape(channels, -1, rows, down, columns, right)
    turned = apart[:, :, ::-1, :, ::-1].transpose(3, 5, 1, 0, 2, 4)
    dense_weights = turned.reshape(-1, channels, rows, columns)
    return pack_dense(dense_weights, 1, lanes, plain=False)


def pack_depthwise(weights: np.ndarray, lanes: int) -> np.ndarray:
    """Weights [c, 1, h, w] as [c / lanes, h, w, lanes]."""
    padded = np.pad(weights[:, 0], ((0, -len(weights) % lanes), (0, 0), (0, 0)))
    blocked = padded.reshape(-1, lanes, *weights.shape[2:])
    return np.ascontiguousarray(blocked.transpose(0, 2, 3, 1))


def dense(
    x: Any, weights: Any, window: Window, groups: int, vectors: Vectors, *, plain: bool = False
) -> Any:
    """A convolution with packed weights; of a `plain` [n, c, h, w] or a blocked tensor."""
    outputs, inputs, height, width, inner, lanes = (int(dim) for dim in weights.shape)
    batch = int(x.shape[0])
    each = outputs // groups
    c = te.reduce_axis((0, inputs), "c")
    kh = te.reduce_axis((0, height), "kh")
    kw = te.reduce_axis((0, width), "kw")
    v = te.reduce_axis((0, inner), "v")
    axes = [c, kh, kw, v]
    if window.is_pointwise and not plain:
        pixels = window.result[0] * window.result[1]
        tile = vectors.tile(pixels, each, exact=True, wide=WIDE)
        if pixels % tile.broadcasts and tile.broadcasts > MOST_CLAMPED:
            tile = vectors.tile(MOST_CLAMPED, each, exact=True, wide=WIDE)
        whole = -(-pixels // tile.broadcasts) * tile.broadcasts

        def pixel(p: Any) -> Any:
            return p if whole == pixels else tirx.min(p, pixels - 1)

        total = te.compute(
            (batch, outputs, whole, lanes),
            lambda n, o, p, u: te.sum(
                x[n, o // each * inputs + c, pixel(p), v] * weights[o, c, 0, 0, v, u], axis=axes
            ),
            name="convolved", attrs=_attributes(tile.broadcasts, tile.vectors, 0),
        )  # fmt: skip
        if whole == pixels:
            return total
        return te.compute((batch, outputs, pixels, lanes), lambda *i: total[i], name="crop")
    tile = vectors.tile(window.result[1], each, exact=True)
    columns = -(-window.result[1] // tile.broadcasts) * tile.broadcasts
    read = _padded(x, window, columns, 0.0, plain=plain)

    def element(n: Any, o: Any, row: Any, column: Any, u: Any) -> Any:
        place = _place(window, row, column, kh, kw)
        block = o // each * inputs + c
        value = read(n, o // each * inner + v, *place) if plain else read(n, block, *place, v)
        return te.sum(value * weights[o, c, kh, kw, v, u], axis=axes)

    return _windowed(
        element, (batch, outputs, lanes), window, columns, (tile.broadcasts, tile.vectors)
    )


def depthwise(x: Any, weights: Any, window: Window, vectors: Vectors) -> Any:
    """Each channel with its own kernel."""
    return _per_channel(
        x, window, vectors, 0.0,
        lambda value, o, kh, kw, u, axes: te.sum(value * weights[o, kh, kw, u], axis=axes),
    )  # fmt: skip


def max_pool(x: Any, window: Window, vectors: Vectors) -> Any:
    return _per_channel(
        x, window, vectors, LOWEST, lambda value, o, kh, kw, u, axes: te.max(value, axis=axes)
    )


def average_pool(x: Any, window: Window, vectors: Vectors, *, padding_counts: bool) -> Any:
    total = _per_channel(
        x, window, vectors, 0.0, lambda value, o, kh, kw, u, axes: te.sum(value, axis=axes)
    )
    width = window.result[1]

    def count(p: Any) -> Any:
        if padding_counts or not any(window.padding):
            return tirx.const(window.kernel[0] * window.kernel[1], "float32")
        covered = []
        for axis, index in enumerate((p // width, p % width)):
            start = index * window.strides[axis] - window.padding[axis]
            end = tirx.min(start + window.kernel[axis], window.source[axis])
            covered.append(end - tirx.max(start, 0))
        return (covered[0] * covered[1]).astype("float32")

    return te.compute(total.shape, lambda n, o, p, u: total[n, o, p, u] / count(p), name="average")


def phase_window(window: Window) -> Window:
    """The convolution that computes all phases of a transposed one."""
    kernel = tuple(
        -(-size // stride) for size, stride in zip(window.kernel, window.strides, strict=True)
    )
    rows, columns = (
        (window.result[axis] - 1 + window.padding[axis]) // window.strides[axis] + 1
        for axis in (0, 1)
    )
    return Window(
        kernel=(kernel[0], kernel[1]),
        strides=(1, 1),
        dilations=(1, 1),
        padding=(kernel[0] - 1, kernel[1] - 1, kernel[0] - 1, kernel[1] - 1),
        source=window.source,
        result=(rows, columns),
    )


def interleaved(x: Any, window: Window) -> Any:
    """The result of a transposed convolution of which `x` has the phases as channels."""
    batch, blocks, _, lanes = (int(dim) for dim in x.shape)
    down, right = window.strides
    top, left = window.padding[:2]
    height, width = window.result
    each = blocks // (down * right)
    columns = phase_window(window).result[1]

    def element(n: Any, o: Any, p: Any, u: Any) -> Any:
        row, column = p // width + top, p % width + left
        phase = row % down * right + column % right
        return x[n, phase * each + o, row // down * columns + column // right, u]

    return te.compute((batch, each, height * width, lanes), element, name="interleaved")


def global_pool(x: Any) -> Any:
    """The mean of all pixels of each channel."""
    batch, blocks, pixels, lanes = (int(dim) for dim in x.shape)
    p = te.reduce_axis((0, pixels), "p")
    total = te.compute(
        (batch, blocks, 1, lanes), lambda n, o, _, u: te.sum(x[n, o, p, u], axis=[p]),
        name="sum", attrs=_attributes(1, 1, 0),
    )  # fmt: skip
    scale = tirx.const(1 / pixels, "float32")
    return te.compute(total.shape, lambda *i: total[i] * scale, name="mean")


def pack(x: Any, lanes: int) -> Any:
    """A tensor [n, c, h, w] as a blocked one, filled up with zeros."""
    batch, channels, height, width = (int(dim) for dim in x.shape)
    blocks = -(-channels // lanes)

    def element(n: Any, o: Any, p: Any, u: Any) -> Any:
        value = x[n, o * lanes + u, p // width, p % width]
        if channels % lanes == 0:
            return value
        return tirx.if_then_else(o * lanes + u < channels, value, tirx.const(0, "float32"))

    return te.compute((batch, blocks, height * width, lanes), element, name="packed")


def unpack(x: Any, shape: tuple[int, ...]) -> Any:
    """A blocked tensor as one of `shape`, [n, c, h, w]."""
    lanes, width = int(x.shape[3]), shape[3]
    return te.compute(
        shape, lambda n, c, h, w: x[n, c // lanes, h * width + w, c % lanes], name="unpacked"
    )


def _per_channel(
    x: Any, window: Window, vectors: Vectors, outside: float, reduced: Callable[..., Any]
) -> Any:
    batch, blocks, _, lanes = (int(dim) for dim in x.shape)
    kh = te.reduce_axis((0, window.kernel[0]), "kh")
    kw = te.reduce_axis((0, window.kernel[1]), "kw")
    tile = vectors.tile(window.result[1], 1)
    columns = -(-window.result[1] // tile.broadcasts) * tile.broadcasts
    read = _padded(x, window, columns, outside)
    return _windowed(
        lambda n, o, row, column, u: reduced(
            read(n, o, *_place(window, row, column, kh, kw), u), o, kh, kw, u, [kh, kw]
        ),
        (batch, blocks, lanes), window, columns, (tile.broadcasts, 1),
    )  # fmt: skip


def _windowed(
    element: Callable[..., Any],
    sizes: tuple[int, int, int],
    window: Window,
    columns: int,
    tile: tuple[int, int],
) -> Any:
    """`element` of every place of the result and of its columns beyond, which are cropped."""
    batch, blocks, lanes = sizes
    height, width = window.result
    if columns == width:
        return te.compute(
            (batch, blocks, height * width, lanes),
            lambda n, o, p, u: element(n, o, p // width, p % width, u),
            name="convolved", attrs=_attributes(*tile, 0),
        )  # fmt: skip
    total = te.compute(
        (batch, blocks, height, columns, lanes), element,
        name="convolved", attrs=_attributes(*tile, width),
    )  # fmt: skip
    return te.compute(
        (batch, blocks, height * width, lanes),
        lambda n, o, p, u: total[n, o, p // width, p % width, u],
        name="crop",
    )


def _padded(
    x: Any, window: Window, columns: int, outside: float, *, plain: bool = False
) -> Callable[..., Any]:
    """Reads `x` by row and column of the padded tensor, which is made where there is padding."""
    height, width = window.source
    top, left = window.padding[:2]
    rows, across = window.padded(columns)

    def read(n: Any, c: Any, row: Any, column: Any, *lane: Any) -> Any:
        return x[n, c, row, column] if plain else x[(n, c, row * width + column, *lane)]

    if (rows, across) == (height, width):
        return read

    def element(n: Any, c: Any, row: Any, column: Any, *lane: Any) -> Any:
        inside = tirx.all(row >= top, row < height + top, column >= left, column < width + left)
        value = read(n, c, row - top, column - left, *lane)
        return tirx.if_then_else(inside, value, tirx.const(outside, "float32"))

    shape = (int(x.shape[0]), int(x.shape[1]), rows, across)
    made = te.compute(shape if plain else (*shape, int(x.shape[3])), element, name="padded")
    return lambda *i: made[i]


def _place(window: Window, row: Any, column: Any, kh: Any, kw: Any) -> tuple[Any, Any]:
    return (
        row * window.strides[0] + kh * window.dilations[0],
        column * window.strides[1] + kw * window.dilations[1],
    )


def _attributes(pixels: int, blocks: int, width: int) -> dict[str, Any]:
    """A tile; `width` is that of the result where its columns are cropped, else 0."""
    return {loops.FAMILY: FAMILY, loops.TILE: [pixels, blocks, width]}


def schedules(schedule: Any, main: Any) -> bool:
    return loops.others_are_plain(schedule, main)


def apply(schedule: Any, main: Any, vectors: Vectors) -> Any:
    pixels, blocks, width = (int(n) for n in schedule.get(main).annotations[loops.TILE])
    work = loops.elements(schedule, schedule.get_loops(main))
    for block in loops.producers(schedule, main):
        _spread(schedule, block, vectors)
    last = loops.fused_epilogue(schedule, main)
    if width:
        schedule, main, last = _with_rows(schedule, main, last, width)
    batch, block, *rows, place, lane = schedule.get_loops(last)
    outer_block, inner_block = schedule.split(block, [None, blocks])
    outer_place, inner_place = schedule.split(place, [None, pixels])
    outer = [batch, outer_block, *rows, outer_place]
    schedule.reorder(*outer, inner_block, inner_place, lane)
    schedule.compute_at(main, outer_place, preserve_unit_loops=True)
    count = loops.reductions(schedule, main)
    inner = schedule.get_loops(main)[len(outer) :]
    spatial, reduced = inner[:-count], inner[-count:]
    n, o, *p, u = spatial
    # The blocks inside: their weights stay in registers, and pixels pass through.
    schedule.reorder(n, *reduced, *p, o, u)
    schedule.vectorize(u)
    for loop in (*p, o):
        schedule.unroll(loop)
    loops.parallel(schedule, outer, work)
    start = schedule.get_loops(schedule.decompose_reduction(main, reduced[0]))
    schedule.vectorize(start[-1])
    for loop in start[-2 - len(p) : -1]:
        schedule.unroll(loop)
    *_, inner_block, inner_place, lane = schedule.get_loops(last)
    schedule.vectorize(lane)
    schedule.unroll(inner_block)
    schedule.unroll(inner_place)
    return schedule


def _with_rows(schedule: Any, main: Any, last: Any, width: int) -> tuple[Any, Any, Any]:
    """Rows and columns of `last` apart: only then is a tile of what it crops found to be small."""
    schedule.transform_block_layout(
        last, lambda n, o, p, u: (n, o, tirx.floordiv(p, width), tirx.floormod(p, width), u)
    )
    names = [schedule.get(block).name_hint for block in (main, last)]
    simplified = Schedule(transform.StmtSimplify()(schedule.mod))
    return simplified, *(simplified.get_sblock(name) for name in names)


def _spread(schedule: Any, block: Any, vectors: Vectors) -> None:
    """A pass before the convolution: vectors of channels where those are innermost."""
    nest = schedule.get_loops(block)
    if len(nest) != 5 or loops.extent(schedule, nest[-1]) != vectors.lanes:
        elementwise.spread(schedule, block, vectors)
        return
    schedule.vectorize(nest[-1])
    loops.parallel(schedule, nest[:3], loops.elements(schedule, nest))
