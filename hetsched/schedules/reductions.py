"""Sums, means and extremes of the axes of a tensor, in vectors.

What is reduced along the last axes is reduced lane by lane, and then across the lanes of a vector.
Along others, a vector holds results that lie behind each other.

Importing this file loads TVM's compiler.
"""

from typing import Any

from hetsched.schedules import elementwise, loops
from hetsched.schedules.vectors import Vectors

SPATIAL, REDUCTION = 0, 2


def main_block(schedule: Any) -> Any | None:
    """The one block that reduces one tensor, if all others are elementwise, else None."""
    reducing = [b for b in loops.blocks(schedule) if not loops.is_plain(schedule, b)]
    if len(reducing) != 1:
        return None
    (main,) = reducing
    block = schedule.get(main)
    kinds = [int(axis.iter_type) for axis in block.iter_vars]
    tensors = [region.source for region in (*block.reads, *block.writes)]
    plain = (
        len(block.reads) == len(block.writes) == 1
        and block.init is not None
        and all(str(tensor.dtype) == "float32" for tensor in tensors)
    )
    # Spatial axes first, as reductions of operators have them.
    ordered = kinds == sorted(kinds) and set(kinds) == {SPATIAL, REDUCTION}
    whole = all(schedule.get(loop).kind == 0 for loop in schedule.get_loops(main))
    return main if plain and ordered and whole and _reduced_axes(schedule, main) else None


def apply(schedule: Any, main: Any, vectors: Vectors) -> Any | None:
    """The schedule, or None where no vector fits."""
    before = loops.producers(schedule, main)
    if any(len(schedule.get_consumers(block)) > 1 for block in before):
        # What several read is not computed for each.
        return None
    for block in before:
        schedule.compute_inline(block)
    axes = _reduced_axes(schedule, main)
    count = loops.reductions(schedule, main)
    nest = schedule.get_loops(main)
    lead, reduced = nest[:-count], nest[-count:]
    if not lead:
        return None
    work = loops.elements(schedule, nest)
    rank = len(schedule.get(main).reads[0].region)
    if axes == list(range(rank - count, rank)):
        if loops.elements(schedule, reduced) % vectors.lanes:
            return None
        _across(schedule, main, lead, reduced, vectors, work)
    elif rank - 1 not in axes:
        last = schedule.get(main).reads[0].region[-1].min
        column = schedule.get(main).iter_vars[len(lead) - 1].var
        if not last.same_as(column) or loops.extent(schedule, lead[-1]) % vectors.lanes:
            return None
        _beside(schedule, main, lead, reduced, vectors, work)
    else:
        return None
    for block in loops.consumers(schedule, main):
        elementwise.spread(schedule, block, vectors)
    return schedule


def _across(
    schedule: Any, main: Any, lead: list[Any], reduced: list[Any], vectors: Vectors, work: int
) -> None:
    last = schedule.fuse(*reduced) if len(reduced) > 1 else reduced[0]
    _, lane = schedule.split(last, [None, vectors.lanes])
    lanes = schedule.rfactor(lane, factor_axis=len(lead))
    schedule.set_scope(lanes, 0, "local")
    row = schedule.get_loops(main)[len(lead) - 1]
    schedule.compute_at(lanes, row, preserve_unit_loops=True)
    # The axis of lanes is the first of the factored block.
    lane, *others = schedule.get_loops(lanes)[len(lead) :]
    schedule.reorder(*others, lane)
    schedule.vectorize(lane)
    across = schedule.get_loops(main)[-1]
    loops.parallel(schedule, schedule.get_loops(main)[: len(lead)], work)
    # An axis of one element is still one of its own.
    first = others[-loops.reductions(schedule, lanes)]
    start = schedule.decompose_reduction(lanes, first)
    schedule.vectorize(schedule.get_loops(start)[-1])
    schedule.decompose_reduction(main, across)


def _beside(
    schedule: Any, main: Any, lead: list[Any], reduced: list[Any], vectors: Vectors, work: int
) -> None:
    column, lane = schedule.split(lead[-1], [None, vectors.lanes])
    schedule.reorder(*lead[:-1], column, *reduced, lane)
    schedule.vectorize(lane)
    loops.parallel(schedule, [*lead[:-1], column], work)
    start = schedule.decompose_reduction(main, reduced[0])
    schedule.vectorize(schedule.get_loops(start)[-1])


def _reduced_axes(schedule: Any, main: Any) -> list[int]:
    """The axes of what is read that are reduced, if it is read in the order of the block's axes."""
    block = schedule.get(main)
    read = [dim.min for dim in block.reads[0].region]
    found: list[int] = []
    for kind in (SPATIAL, REDUCTION):
        order = [axis.var for axis in block.iter_vars if int(axis.iter_type) == kind]
        found = [index for index, dim in enumerate(read) if any(map(dim.same_as, order))]
        used = [var for var in order if any(map(var.same_as, read))]
        if len(used) != len(found):
            return []
        if not all(read[index].same_as(var) for index, var in zip(found, used, strict=True)):
            return []
    return found
