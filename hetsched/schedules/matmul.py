"""Products of matrices: a tile of rows by vectors of columns stays in registers.

Constant right sides are packed when they are compiled, into blocks of as many columns as a vector
has lanes, each block row after row.
"""

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
        axis, choice = _choice("packed", rows, columns, rules)
        array = to_numpy(right.value).reshape(inner[-2:])
        packed = pack(array, rules.vectors.lanes, choice.candidate.vectors)
        constant = relax.const(to_tvm(packed, array.dtype))
        return builder.call_te(
            lambda x, w: packed_product(x, w, columns, axis, choice),
            left, constant, primfunc_name_hint="matmul",
        )  # fmt: skip
    if batch and batch != rows[:-2]:
        return None
    axis, choice = _choice("batched" if batch else "product", rows, columns, rules)
    return builder.call_te(
        lambda x, y: product(x, y, axis, choice, rules.vectors.lanes), left, right,
        primfunc_name_hint="matmul",
    )  # fmt: skip


def pack(array: np.ndarray, lanes: int, blocks: int) -> np.ndarray:
    """A matrix [k, n] as [n / lanes, k, lanes], filled up with zeros to a multiple of `blocks`."""
    padded = np.pad(array, ((0, 0), (0, -array.shape[1] % (lanes * blocks))))
    return np.ascontiguousarray(padded.reshape(len(array), -1, lanes).transpose(1, 0, 2))


def packed_product(x: Any, packed: Any, columns: int, axis: int, choice: Choice[Tile]) -> Any:
    """x[..., k] times a packed matrix."""
    lanes = int(packed.shape[2])
    return _product(
        x,
        lambda place, k, n: packed[n // lanes, k, n % lanes],
        columns, int(packed.shape[0]) * lanes, axis, choice,
    )  # fmt: skip


def product(x: Any, y: Any, axis: int, choice: Choice[Tile], lanes: int) -> Any:
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
        x, lambda place, k, n: right[(*place[: len(batch)], k, n)], columns, wide, axis, choice
    )


def _product(x: Any, right: Any, columns: int, wide: int, axis: int, choice: Choice[Tile]) -> Any:
    """Computed for whole tiles, the last row again where there is none; then cropped."""
    *lead, depth = (int(dim) for dim in x.shape)
    k = te.reduce_axis((0, depth), "k")
    tile = choice.candidate
    rows = tile.covering(lead[axis])
    whole = [*lead[:axis], rows, *lead[axis + 1 :]]

    def element(*index: Any) -> Any:
        *place, n = index
        if rows != lead[axis]:
            place[axis] = tirx.min(place[axis], lead[axis] - 1)
        return te.sum(x[(*place, k)] * right(place, k, n), axis=[k])

    attributes = {
        **choice.attributes,
        loops.FAMILY: FAMILY,
        loops.TILE: [axis, tile.broadcasts, tile.vectors],
    }
    total = te.compute((*whole, wide), element, name="product", attrs=attributes)
    if rows == lead[axis] and wide == columns:
        return total
    return te.compute((*lead, columns), lambda *i: total[i], name="crop")


def schedules(schedule: Any, main: Any) -> bool:
    return loops.others_are_plain(schedule, main)


def apply(schedule: Any, main: Any, vectors: Vectors) -> Any:
    axis, rows, blocks = (int(n) for n in schedule.get(main).annotations[loops.TILE])
    work = loops.elements(schedule, schedule.get_loops(main))
    for block in loops.producers(schedule, main):
        elementwise.spread(schedule, block, vectors)
    last = loops.fused_epilogue(schedule, main)
    *lead, n = schedule.get_loops(last)
    even = loops.extent(schedule, n) % (blocks * vectors.lanes) == 0
    m = lead.pop(axis)
    m_outer, m_inner = schedule.split(m, [None, rows])
    n_outer, n_inner, lane = schedule.split(n, [None, blocks, vectors.lanes])
    outer = [*lead, n_outer, m_outer]
    schedule.reorder(*outer, m_inner, n_inner, lane)
    schedule.compute_at(main, m_outer, preserve_unit_loops=True)
    *places, n, k = schedule.get_loops(main)[len(outer) :]
    n_inner, n_lane = schedule.split(n, [None, vectors.lanes])
    schedule.reorder(k, *places, n_inner, n_lane)
    schedule.vectorize(n_lane)
    for loop in (*places, n_inner):
        schedule.unroll(loop)
    loops.parallel(schedule, outer, work)
    start = schedule.get_loops(schedule.decompose_reduction(main, k))
    schedule.vectorize(start[-1])
    for loop in start[-2 - len(places) : -1]:
        schedule.unroll(loop)
    if even:
        *_, m_inner, n_inner, lane = schedule.get_loops(last)
        schedule.vectorize(lane)
        schedule.unroll(m_inner)
        schedule.unroll(n_inner)
    return schedule


def _choice(
    kind: str, left: tuple[int, ...], columns: int, rules: Rules
) -> tuple[int, Choice[Tile]]:
    """The axis of a left side [..., m, k] that is tiled, and the tile."""
    *lead, depth = left
    axis = len(lead) - 1 if kind == "batched" else max(range(len(lead)), key=lambda i: (lead[i], i))
    found = rules.vectors.tiles(lead[axis], rules.vectors.blocks(columns))[:CANDIDATES]
    return axis, rules.choose(f"{kind} {'x'.join(map(str, lead))}x{depth}x{columns}", found)
