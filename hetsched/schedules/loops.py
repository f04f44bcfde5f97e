"""What the schedules of all families do with blocks and loops.

Importing this file loads TVM's compiler.
"""

from collections.abc import Iterable
from math import prod
from typing import Any

from tvm import relax, tirx

# Fewer elements than these are computed sooner by one thread than handed to others.
PARALLEL_ELEMENTS = 1 << 14
# The same of multiply-adds, of which a vector unit does a hundred where it stores an element.
PARALLEL_PRODUCTS = 1 << 18
FAMILY = "family"
TILE = "tile"


def shape_of(value: Any) -> tuple[int, ...] | None:
    """The shape of an expression of Relax that is a float32 tensor, if it is known."""
    shape = getattr(getattr(value, "ty", None), "shape", None)
    if not isinstance(shape, relax.ShapeExpr) or str(value.ty.dtype) != "float32":
        return None
    if not all(isinstance(dim, tirx.IntImm) for dim in shape):
        return None
    return tuple(int(dim) for dim in shape)


def blocks(schedule: Any) -> list[Any]:
    """The blocks of a function, in order."""
    return list(schedule.get_child_blocks(schedule.get_sblock("root")))


def extent(schedule: Any, loop: Any) -> int:
    return int(schedule.get(loop).extent)


def elements(schedule: Any, loops: Iterable[Any]) -> int:
    return prod(extent(schedule, loop) for loop in loops)


def reductions(schedule: Any, block: Any) -> int:
    """How many loops of a block reduce."""
    return sum(int(axis.iter_type) == 2 for axis in schedule.get(block).iter_vars)


def is_plain(schedule: Any, block: Any) -> bool:
    """Whether a block computes each element of one float32 tensor of known shape once."""
    found = schedule.get(block)
    if not isinstance(found.body, tirx.BufferStore) or len(found.writes) != 1:
        return False
    store = found.body
    axes = [axis.var for axis in found.iter_vars]
    return (
        found.init is None
        and all(int(axis.iter_type) == 0 for axis in found.iter_vars)
        and all(isinstance(axis.dom.extent, tirx.IntImm) for axis in found.iter_vars)
        and str(store.buffer.dtype) == "float32"
        and all(
            (isinstance(index, tirx.Var) and any(index.same_as(axis) for axis in axes))
            or isinstance(index, tirx.IntImm)
            for index in store.indices
        )
    )


def others_are_plain(schedule: Any, main: Any) -> bool:
    """Whether all blocks but `main` are plain, so that they can be moved into its loops."""
    name = schedule.get(main).name_hint
    return all(
        is_plain(schedule, block)
        for block in blocks(schedule)
        if schedule.get(block).name_hint != name
    )


def producers(schedule: Any, block: Any) -> list[Any]:
    """The blocks that `block` depends on, in order."""
    names = set()
    todo = [block]
    while todo:
        for producer in schedule.get_producers(todo.pop()):
            if schedule.get(producer).name_hint not in names:
                names.add(schedule.get(producer).name_hint)
                todo.append(producer)
    return [item for item in blocks(schedule) if schedule.get(item).name_hint in names]


def consumers(schedule: Any, main: Any) -> list[Any]:
    """The blocks that `main` does not depend on, in order."""
    before = {schedule.get(block).name_hint for block in (*producers(schedule, main), main)}
    return [block for block in blocks(schedule) if schedule.get(block).name_hint not in before]


def fused_epilogue(schedule: Any, main: Any) -> Any:
    """Inlines what follows `main` in the function into its last block, which is returned.

    The accumulators of `main` get the scope of registers; without a block after it, one that
    stores them is made.
    """
    after = consumers(schedule, main)
    if not after:
        return schedule.cache_write(main, 0, "local")
    for block in after[:-1]:
        schedule.compute_inline(block)
    schedule.set_scope(main, 0, "local")
    return after[-1]


def parallel(
    schedule: Any, loops: Iterable[Any], work: int, least: int = PARALLEL_ELEMENTS
) -> None:
    """The outermost `loops` as one parallel loop where there is so much `work`."""
    loops = list(loops)
    if work >= least and loops:
        fused = schedule.fuse(*loops) if len(loops) > 1 else loops[0]
        if extent(schedule, fused) > 1:
            schedule.parallel(fused)
