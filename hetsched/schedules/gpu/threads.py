"""Reductions on a graphics processor where each element of the result is one thread's.

Depthwise and grouped convolutions, windows of pooling, and whatever else reduces little for each of
many elements: what neighbours read overlaps, and caches serve it. The sum stays in a register, and
what follows the reduction is computed before it is stored.

Importing this file loads TVM's compiler.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

from tvm import tirx
from tvm.s_tir.dlight.gpu import matmul

from hetsched.schedules.gpu.limits import Limits
from hetsched.schedules.loops import extent

THREADS = 256
# With so many elements, each reduction may be as long as it wants; with fewer, only as short.
MANY_ELEMENTS = 1 << 14
SHORT = 64
# Of a reduction that its compiler unrolls.
UNROLLED = 32


def reduction_of(schedule: Any) -> Any | None:
    """The one reducing block, if everything else is elementwise and there are enough elements."""
    blocks = schedule.get_child_blocks(schedule.get_sblock("root"))
    reducing = matmul.get_reduction_blocks(schedule, blocks)
    if not reducing:
        return None
    found = schedule.get(reducing[0])
    if not isinstance(found.body, tirx.BufferStore):
        return None
    extents = [
        [int(a.dom.extent) for a in found.iter_vars if int(a.iter_type) == k] for k in (0, 2)
    ]
    elements, reduced = map(prod, extents)
    return reducing[0] if elements >= MANY_ELEMENTS or reduced <= SHORT else None


def apply(schedule: Any, main: Any, limits: Limits) -> Any:
    """The function with a thread for each element of its result."""
    matmul.auto_inline_producers(schedule, main)
    stored = schedule.cache_write(main, 0, "local")
    axes = schedule.get(main).iter_vars
    loops = schedule.get_loops(main)
    spatial, reducing = (
        [loop for loop, axis in zip(loops, axes, strict=True) if int(axis.iter_type) == kind]
        for kind in (0, 2)
    )
    schedule.reorder(*spatial, *reducing)
    thread = _bound(schedule, spatial, limits)
    schedule.reverse_compute_at(stored, thread, preserve_unit_loops=True)
    matmul.auto_inline_consumers(schedule, stored)
    # What repeats the result along another axis is a kernel of its own.
    for block in schedule.get_consumers(stored):
        matmul.auto_inline_producers(schedule, block)
        elementwise(schedule, block, limits)
    if prod(extent(schedule, loop) for loop in reducing) <= UNROLLED:
        schedule.annotate(thread, "pragma_unroll_explicit", 0)
        for loop in reducing:
            schedule.unroll(loop)
    schedule.decompose_reduction(main, reducing[0])
    return schedule


def elementwise(schedule: Any, block: Any, limits: Limits) -> None:
    """A thread for each element of a block that reduces nothing."""
    loops = schedule.get_loops(block)
    _bound(schedule, loops or [schedule.add_unit_loop(block)], limits)


def _bound(schedule: Any, loops: Sequence[Any], limits: Limits) -> Any:
    """The loop over the threads of a group, which `loops` are shared out to."""
    fused = schedule.fuse(*loops)
    # No thread without an element: of a single one TVM forgets who is to store it.
    threads = min(THREADS, limits.threads_group, extent(schedule, fused))
    group, thread = schedule.split(fused, [None, threads])
    schedule.bind(group, "blockIdx.x")
    schedule.bind(thread, "threadIdx.x")
    return thread
