"""What a window computes at every pixel of a blocked tensor: the loops, and their schedule.

A blocked tensor [n, blocks, height * width, lanes] has its channels in blocks of as many as a
vector has lanes. A tile of pixels by blocks of output channels stays in registers. Where no tile
divides the width of the output, columns beyond it are computed, and cropped.

Importing this file loads TVM's compiler.
"""

from collections.abc import Callable
from typing import Any

from tvm import te, tirx
from tvm.s_tir import Schedule, transform

from hetsched.schedules import elementwise, loops
from hetsched.schedules.cycles import Window
from hetsched.schedules.rules import Choice
from hetsched.schedules.vectors import Tile, Vectors

FAMILY = "window"


def per_channel(x: Any, window: Window, choice: Choice[Tile], reduced: Callable[..., Any]) -> Any:
    """What `reduced` makes of the pixels of a channel that its kernel covers.

    It gets the nearest pixel of the channel, and whether the kernel's place is inside or None
    where all are, then the place in the kernel, the lane, and the axes of the reduction.
    """
    batch, blocks, _, lanes = (int(dim) for dim in x.shape)
    kh = te.reduce_axis((0, window.kernel[0]), "kh")
    kw = te.reduce_axis((0, window.kernel[1]), "kw")
    columns = choice.candidate.covering(window.result[1])

    def element(n: Any, o: Any, row: Any, column: Any, u: Any) -> Any:
        place, inside = _nearest(window, columns, window.place(row, column, kh, kw))
        value = x[n, o, place[0] * window.source[1] + place[1], u]
        return reduced(value, inside, o, kh, kw, u, [kh, kw])

    return windowed(element, (batch, blocks, lanes), window, choice)


def _nearest(
    window: Window, columns: int, padded_place: tuple[Any, Any]
) -> tuple[list[Any], Any | None]:
    """The pixel nearest to a place of the padded tensor, and whether it is that place.

    The second is None where it always is. `columns` of the result are computed.
    """
    places, inside = [], []
    reach = window.reach(columns)
    for axis, index in enumerate(padded_place):
        size, before = window.source[axis], window.padding[axis]
        place = index - before
        if before:
            place = tirx.max(place, 0)
            inside.append(index >= before)
        if reach[axis] > size + before:
            place = tirx.min(place, size - 1)
            inside.append(index < size + before)
        places.append(place)
    return places, tirx.all(*inside) if inside else None


def windowed(
    element: Callable[..., Any],
    sizes: tuple[int, int, int],
    window: Window,
    choice: Choice[Tile],
) -> Any:
    """`element` of every place of the result and of its columns beyond, which are cropped."""
    batch, blocks, lanes = sizes
    height, width = window.result
    columns = choice.candidate.covering(width)
    if columns == width:
        return te.compute(
            (batch, blocks, height * width, lanes),
            lambda n, o, p, u: element(n, o, p // width, p % width, u),
            name="convolved", attrs=attributes(choice),
        )  # fmt: skip
    total = te.compute(
        (batch, blocks, height, columns, lanes), element,
        name="convolved", attrs=attributes(choice, width),
    )  # fmt: skip
    return te.compute(
        (batch, blocks, height * width, lanes),
        lambda n, o, p, u: total[n, o, p // width, p % width, u],
        name="crop",
    )


def padded(
    x: Any, window: Window, columns: int, further: tuple[int, int], *, plain: bool = False
) -> Callable[..., Any]:
    """Reads `x` by row and column of the padded tensor, which is made where there is padding.

    It has as many rows and columns more as are to be read `further`.
    """
    height, width = window.source
    top, left = window.padding[:2]
    rows, across = (size + more for size, more in zip(window.reach(columns), further, strict=True))

    def read(n: Any, c: Any, row: Any, column: Any, *lane: Any) -> Any:
        return x[n, c, row, column] if plain else x[(n, c, row * width + column, *lane)]

    if (rows, across) == (height, width):
        return read

    def element(n: Any, c: Any, row: Any, column: Any, *lane: Any) -> Any:
        inside = tirx.all(row >= top, row < height + top, column >= left, column < width + left)
        value = read(n, c, row - top, column - left, *lane)
        return tirx.if_then_else(inside, value, tirx.const(0, "float32"))

    shape = (int(x.shape[0]), int(x.shape[1]), rows, across)
    made = te.compute(shape if plain else (*shape, int(x.shape[3])), element, name="padded")
    return lambda *i: made[i]


def attributes(choice: Choice[Tile], width: int = 0) -> dict[str, Any]:
    """Annotations of a main block; `width` is that of the result if columns are cropped."""
    tile = choice.candidate
    return {
        **choice.attributes,
        loops.FAMILY: FAMILY,
        loops.TILE: [tile.broadcasts, tile.vectors, width],
    }


def schedules(schedule: Any, main: Any) -> bool:
    return loops.others_are_plain(schedule, main)


def apply(schedule: Any, main: Any, vectors: Vectors) -> Any:
    pixels, blocks, width = (int(n) for n in schedule.get(main).annotations[loops.TILE])
    work = loops.elements(schedule, schedule.get_loops(main))
    for block in loops.producers(schedule, main):
        _spread(schedule, block, vectors)
    stages = _stages_of_gate(schedule, main)
    last = stages[-1] if stages else loops.fused_epilogue(schedule, main)
    if width:
        schedule, main, last = _with_rows(schedule, main, last, width)
    batch, block, *rows, place, lane = schedule.get_loops(last)
    outer_block, inner_block = schedule.split(block, [None, blocks])
    outer_place, inner_place = schedule.split(place, [None, pixels])
    if stages:
        outer = [batch, outer_block]
        schedule.reorder(*outer, inner_block, *rows, outer_place, inner_place, lane)
        for stage in stages[:-1]:
            schedule.compute_at(stage, outer_block, preserve_unit_loops=True)
    else:
        outer = [batch, outer_block, *rows, outer_place]
        schedule.reorder(*outer, inner_block, inner_place, lane)
    schedule.compute_at(main, outer[-1], preserve_unit_loops=True)
    count = loops.reductions(schedule, main)
    inner = schedule.get_loops(main)[len(outer) :]
    spatial, reduced = inner[:-count], inner[-count:]
    n, o, *p, u = spatial
    # The blocks inside: their weights stay in registers, and pixels pass through.
    schedule.reorder(n, *reduced, *p, o, u)
    schedule.vectorize(u)
    for loop in (*p, o):
        schedule.unroll(loop)
    loops.parallel(schedule, outer, work, loops.PARALLEL_PRODUCTS)
    start = schedule.get_loops(schedule.decompose_reduction(main, reduced[0]))
    schedule.vectorize(start[-1])
    for loop in start[-2 - len(p) : -1]:
        schedule.unroll(loop)
    for stage in stages[:-1]:
        *_, inner_stage, _, lane = schedule.get_loops(stage)
        schedule.vectorize(lane)
        schedule.unroll(inner_stage)
    *_, inner_block, inner_place, lane = schedule.get_loops(last)
    schedule.vectorize(lane)
    if not stages:
        schedule.unroll(inner_block)
        schedule.unroll(inner_place)
    return schedule


def _stages_of_gate(schedule: Any, main: Any) -> list[Any]:
    """What follows a `main` of one pixel and is broadcast to an image: of the pixel, of the image.

    Everything between is inlined. Empty if nothing is broadcast.
    """
    *_, place, _ = _spatial(schedule, main)
    after = loops.consumers(schedule, main)
    wide = [block for block in after if _spatial(schedule, block)[-2] != place]
    if place != 1 or not wide:
        return []
    names = [schedule.get(block).name_hint for block in wide]
    narrow = [block for block in after if schedule.get(block).name_hint not in names]
    for block in (*narrow[:-1], *wide[:-1]):
        schedule.compute_inline(block)
    for block in (main, *narrow[-1:]):
        schedule.set_scope(block, 0, "local")
    return [*narrow[-1:], wide[-1]]


def _spatial(schedule: Any, block: Any) -> list[int]:
    axes = schedule.get(block).iter_vars
    return [int(axis.dom.extent) for axis in axes if int(axis.iter_type) == 0]


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
