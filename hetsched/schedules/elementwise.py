"""Functions without reductions: one pass over the result, a vector at a time."""

import re
from typing import Any

from tvm.s_tir import Schedule
from tvm.s_tir.transform import StmtSimplify

from hetsched.schedules import loops
from hetsched.schedules.vectors import Vectors

# What to compute again costs more than to store.
DEAR = re.compile(r"T\.(exp|tanh|sigmoid|erf|sqrt|rsqrt|log|pow|sin|cos)\(")
# A division of indices, and by what.
DIVIDES = re.compile(r"(?: // | % )(?:T\.int64\((\d+)\))?|(?:truncdiv|truncmod|shift_right)\(")
# Outer iterations that are enough to share.
SHARES = 64


def schedules(schedule: Any) -> bool:
    """Whether each block of the function computes each element of a tensor once."""
    return all(loops.is_plain(schedule, block) for block in loops.blocks(schedule))


def apply(schedule: Any, vectors: Vectors) -> Any:
    outputs = {schedule.get(b).name_hint for b in schedule.get_output_blocks("root")}
    for block in loops.blocks(schedule):
        name = schedule.get(block).name_hint
        if name not in outputs and is_cheap(schedule, block):
            schedule.compute_inline(block)
    # Of views in each other's place, indices divide by what their loops never reach.
    schedule = Schedule(StmtSimplify()(schedule.mod))
    for block in loops.blocks(schedule):
        spread(schedule, block, vectors)
    return schedule


def is_cheap(schedule: Any, block: Any) -> bool:
    """Whether to compute a block's elements where they are read, each as often as it is read."""
    size = loops.elements(schedule, schedule.get_loops(block))
    readers = schedule.get_consumers(block)
    repeated = len(readers) > 1 or any(
        loops.elements(schedule, schedule.get_loops(reader)) > size for reader in readers
    )
    return not (repeated and DEAR.search(str(schedule.get(block).body)))


def spread(schedule: Any, block: Any, vectors: Vectors) -> None:
    """Vectorises the innermost loop where that divides evenly; parallel over the outermost."""
    nest = schedule.get_loops(block)
    work = loops.elements(schedule, nest)
    if not nest:
        return
    if len(nest) > 1 and _is_flat(schedule.get(block)):
        nest = [schedule.fuse(*nest)]
    inner = nest[-1]
    if loops.extent(schedule, inner) % vectors.lanes == 0 and _is_vector(
        schedule.get(block), vectors
    ):
        *nest[-1:], lanes = schedule.split(inner, [None, vectors.lanes])
        schedule.vectorize(lanes)
    elif len(nest) == 1:
        return
    else:
        nest.pop()
    outer: list[Any] = []
    while nest and (not outer or loops.elements(schedule, outer) < SHARES):
        outer.append(nest.pop(0))
    loops.parallel(schedule, outer, work)


def _is_vector(block: Any, vectors: Vectors) -> bool:
    """Whether a vector along the last axis has indices that are no divisions."""
    last = block.iter_vars[-1].var
    dims = [dim.min for region in block.reads for dim in region.region]
    if all(dim.same_as(last) or last.name not in str(dim) for dim in dims):
        return True
    divisors = [found.group(1) for found in DIVIDES.finditer(str(block.body))]
    return all(divisor and int(divisor) % vectors.lanes == 0 for divisor in divisors)


def _is_flat(block: Any) -> bool:
    """Whether all tensors that a block touches have its shape and are read in its order."""
    shape = [int(axis.dom.extent) for axis in block.iter_vars]
    regions = [*block.reads, *block.writes]
    return len(block.reads) > 0 and all(
        [int(d) for d in region.source.shape] == shape
        and all(
            axis.var.same_as(dim.min)
            for axis, dim in zip(block.iter_vars, region.region, strict=True)
        )
        for region in regions
    )
