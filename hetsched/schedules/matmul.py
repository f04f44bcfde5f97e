"""Products of matrices: a tile of rows by vectors of columns stays in registers.

Constant right sides are packed when they are compiled, into blocks of as many columns as a vector
has lanes, each block row after row.
"""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
from tvm import ir, relax, te, tirx

from hetsched.schedules import elementwise, loops
from hetsched.schedules.loops import shape_of
from hetsched.schedules.rules import Choice, Rules
from hetsched.schedules.vectors import Tile, Vectors
from hetsched.tvm_runtime import to_numpy, to_tvm

FAMILY = "product"
# With fewer multiply-adds the loops around the tile cost more than they save.
SMALLEST = 1 << 8
# Annotation of a product whose right side is packed.
PACKED = "packed"
FLOAT_NBYTES = 4
# Of a right side that the second cache holds beside what passes through.
KEPT_NBYTES = 1 << 18
# Elements of a line of the caches.
LINE = 16
# Arguments of LLVM's prefetch: to read, to the second cache, of data.
FETCH = (0, 2, 1)
# Of a product, that are worth to be measured.
CANDIDATES = 4


def legalise(builder: Any, call: Any, rules: Rules) -> Any | None:
    """The loops of a relax.matmul, or None where this family has none for it."""
    left, right = call.args
    rows, inner = shape_of(left), shape_of(right)
    if rows is None or inner is None or len(rows) < 2 or len(inner) < 2:
        return None
    batch, columns = inner[:-2], inner[-1]
    if prod(rows) * columns < SMALLEST:
        return None
    if isinstance(right, ir.GenericConst) and prod(batch) == 1 and len(inner) <= len(rows):
        choice = _choice("packed", rows, columns, 0, rules)
        array = to_numpy(right.value).reshape(inner[-2:])
        packed = pack(array, rules.vectors.lanes, choice.candidate.vectors)
        constant = relax.const(to_tvm(packed, array.dtype))
        return builder.call_te(
            lambda x, w: packed_product(x, w, columns, choice),
            left, constant, primfunc_name_hint="matmul",
        )  # fmt: skip
    if batch and batch != rows[:-2]:
        return None
    choice = _choice("batched" if batch else "product", rows, columns, len(batch), rules)
    return builder.call_te(
        lambda x, y: product(x, y, choice, rules.vectors.lanes), left, right,
        primfunc_name_hint="matmul",
    )  # fmt: skip


def pack(array: np.ndarray, lanes: int, blocks: int) -> np.ndarray:
    """A matrix [k, n] as [n / lanes, k, lanes], filled up with zeros to a multiple of `blocks`."""
    padded = np.pad(array, ((0, 0), (0, -array.shape[1] % (lanes * blocks))))
    return np.ascontiguousarray(padded.reshape(len(array), -1, lanes).transpose(1, 0, 2))


def packed_product(x: Any, packed: Any, columns: int, choice: Choice[Tile]) -> Any:
    """x[..., k] times a packed matrix."""
    lanes = int(packed.shape[2])
    return _product(
        x,
        lambda place, k, n: packed[n // lanes, k, n % lanes],
        0, columns, int(packed.shape[0]) * lanes,
        {**choice.attributes, PACKED: 1}, choice.candidate,
    )  # fmt: skip


def product(x: Any, y: Any, choice: Choice[Tile], lanes: int) -> Any:
    """x[..., m, k] times y[..., k, n], or y[k, n]; a ragged n is filled up in a copy of y."""
    *batch, depth, columns = (int(dim) for dim in y.shape)
    tile = choice.candidate.vectors * lanes
    wide = -(-columns // tile) * tile
    right = y
    if wide != columns:
        right = te.compute(
            (*batch, depth, wide),
            lambda *i: tirx.if_then_else(i[-1] < columns, y[i], tirx.const(0, "float32")),
            name="filled",
        )
    return _product(
        x,
        lambda place, k, n: right[(*place, k, n)],
        len(batch), columns, wide, choice.attributes, choice.candidate,
    )  # fmt: skip


def _product(
    x: Any,
    right: Any,
    batch: int,
    columns: int,
    wide: int,
    attributes: Mapping[str, Any],
    tile: Tile,
) -> Any:
    """Axes of x behind the `batch` are the rows of one matrix.

    It is computed for whole tiles, the last row again where there is none; then cropped.
    """
    *lead, depth = (int(dim) for dim in x.shape)
    k = te.reduce_axis((0, depth), "k")
    sizes = lead[batch:]
    count = prod(sizes)
    rows = tile.covering(count)

    def element(*index: Any) -> Any:
        *place, row, n = index
        if rows != count:
            row = tirx.min(row, count - 1)
        return te.sum(x[(*place, *_unravelled(row, sizes), k)] * right(place, k, n), axis=[k])

    total = te.compute(
        (*lead[:batch], rows, wide), element, name="product",
        attrs={**attributes, loops.FAMILY: FAMILY, loops.TILE: [tile.broadcasts, tile.vectors]},
    )  # fmt: skip
    if rows == count and wide == columns and len(sizes) == 1:
        return total
    return te.compute(
        (*lead, columns),
        lambda *i: total[(*i[:batch], _ravelled(i[batch:-1], sizes), i[-1])],
        name="crop",
    )


def _unravelled(row: Any, sizes: Sequence[int]) -> list[Any]:
    """The indices of a row in an array of `sizes`."""
    indices: list[Any] = []
    for place, size in enumerate(sizes):
        before, behind = prod(sizes[:place]), prod(sizes[place + 1 :])
        index = row // behind if behind > 1 else row
        if size == 1:
            index = 0
        elif before > 1:
            index = index % size
        indices.append(index)
    return indices


def _ravelled(indices: Sequence[Any], sizes: Sequence[int]) -> Any:
    """The row of an array of `sizes` that is at `indices`."""
    first, *rest = [
        (index, size) for index, size in zip(indices, sizes, strict=True) if size > 1
    ] or [(indices[-1], 1)]
    row = first[0]
    for index, size in rest:
        row = row * size + index
    return row


def schedules(schedule: Any, main: Any) -> bool:
    return loops.others_are_plain(schedule, main)


def apply(schedule: Any, main: Any, vectors: Vectors) -> Any:
    annotations = schedule.get(main).annotations
    rows, blocks = (int(n) for n in annotations[loops.TILE])
    *batch, _, _, _ = schedule.get_loops(main)
    work = loops.elements(schedule, schedule.get_loops(main))
    for block in loops.producers(schedule, main):
        elementwise.spread(schedule, block, vectors)
    last = loops.fused_epilogue(schedule, main)
    _flatten(schedule, last, len(batch))
    *lead, m, n = schedule.get_loops(last)
    even = loops.extent(schedule, n) % (blocks * vectors.lanes) == 0
    depth = loops.extent(schedule, schedule.get_loops(main)[-1])
    # A right side that stays in the second cache is read again for each row of tiles, which then
    # reads the left side once.
    by_rows = depth * loops.extent(schedule, n) * FLOAT_NBYTES <= KEPT_NBYTES
    m_outer, m_inner = schedule.split(m, [None, rows])
    n_outer, n_inner, lane = schedule.split(n, [None, blocks, vectors.lanes])
    outer = [*lead, *((m_outer, n_outer) if by_rows else (n_outer, m_outer))]
    tiles = loops.extent(schedule, m_outer)
    panels = loops.extent(schedule, n_outer)
    schedule.reorder(*outer, m_inner, n_inner, lane)
    schedule.compute_at(main, outer[-1], preserve_unit_loops=True)
    *places, n, k = schedule.get_loops(main)[len(outer) :]
    n_inner, n_lane = schedule.split(n, [None, vectors.lanes])
    schedule.reorder(k, *places, n_inner, n_lane)
    schedule.vectorize(n_lane)
    for loop in (*places, n_inner):
        schedule.unroll(loop)
    loops.parallel(schedule, outer, work, loops.PARALLEL_PRODUCTS)
    start = schedule.get_loops(schedule.decompose_reduction(main, k))
    schedule.vectorize(start[-1])
    for loop in start[-2 - len(places) : -1]:
        schedule.unroll(loop)
    if even:
        *_, m_inner, n_inner, lane = schedule.get_loops(last)
        schedule.vectorize(lane)
        schedule.unroll(m_inner)
        schedule.unroll(n_inner)
    if PACKED in annotations and not by_rows:
        _fetch_ahead(schedule, main, k, panels, tiles, blocks * vectors.lanes)
    return schedule


def _flatten(schedule: Any, last: Any, batch: int) -> None:
    """One axis in place of those between the `batch` and the columns.

    Of loops that are fused, TVM could not tell the rows that a ragged tile needs.
    """
    sizes = [int(axis.dom.extent) for axis in schedule.get(last).iter_vars[batch:-1]]
    if len(sizes) > 1:
        flat = tirx.IndexMap.from_func(
            lambda *i: [*i[:batch], _ravelled(i[batch:-1], sizes), i[-1]],
            ndim=batch + len(sizes) + 1,
        )
        schedule.transform_block_layout(last, flat)


def _fetch_ahead(schedule: Any, main: Any, k: Any, panels: int, tiles: int, columns: int) -> None:
    """Each of the `tiles` of a panel of columns fetches its share of the next panel's weights."""
    share = -(-columns // tiles)
    first = schedule.get_loops(main)[0]
    if panels < 2 or not 1 < tiles <= columns or loops.extent(schedule, first) != panels * tiles:
        return
    place = schedule.get(first).loop_var
    loop = schedule.get(k)
    weights = schedule.get(main).reads[-1].source
    panel = tirx.min(place // tiles + 1, panels - 1)
    steps = (place % tiles * loop.extent + loop.loop_var) * share
    blocks = columns // int(weights.shape[2])
    fetches = [
        tirx.Evaluate(
            tirx.call_llvm_intrin(
                "void", "llvm.prefetch",
                tirx.address_of(weights[panel * blocks, 0, steps + line]), *FETCH,
            )
        )
        for line in range(0, share, LINE)
    ]  # fmt: skip
    body = tirx.SeqStmt([*fetches, loop.body])
    schedule.state.replace(
        schedule.get_sref(k),
        tirx.For(
            loop.loop_var, loop.min, loop.extent, loop.kind, body, loop.thread_binding,
            loop.annotations,
        ),
    )  # fmt: skip


def _choice(
    kind: str, left: tuple[int, ...], columns: int, batch: int, rules: Rules
) -> Choice[Tile]:
    *lead, depth = left
    count = prod(lead[batch:])
    found = rules.vectors.tiles(count, rules.vectors.blocks(columns))[:CANDIDATES]
    places = "x".join(map(str, (*lead[:batch], count)))
    return rules.choose(f"{kind} {places}x{depth}x{columns}", found)
