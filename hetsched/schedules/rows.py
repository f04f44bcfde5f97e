"""Softmax and layer normalisation over the last axis, a row at a time.

A reduction adds up vectors, then the lanes of the last one; what fills no vector goes by itself.

Importing this file loads TVM's compiler.
"""

from collections.abc import Callable
from typing import Any

from tvm import te, tirx

from hetsched.schedules import loops
from hetsched.schedules.loops import shape_of
from hetsched.schedules.rules import Rules
from hetsched.schedules.vectors import Vectors

FAMILY = "rows"
# Iterations of an outer loop that are enough to share.
SHARES = 8


def legalise_softmax(builder: Any, call: Any, rules: Rules) -> Any | None:
    shape = shape_of(call.args[0])
    if shape is None or len(shape) < 2 or int(call.attrs.axis) % len(shape) != len(shape) - 1:
        return None
    return builder.call_te(
        lambda x: softmax(x, rules.vectors.lanes), call.args[0], primfunc_name_hint="softmax"
    )


def legalise_layer_norm(builder: Any, call: Any, rules: Rules) -> Any | None:
    shape = shape_of(call.args[0])
    if shape is None or len(shape) < 2 or len(call.attrs.axes) != 1:
        return None
    if int(call.attrs.axes[0]) % len(shape) != len(shape) - 1:
        return None
    epsilon = float(call.attrs.epsilon)
    return builder.call_te(
        lambda x, scale, shift: layer_norm(x, scale, shift, epsilon, rules.vectors.lanes),
        *call.args,
        primfunc_name_hint="layer_norm",
    )  # fmt: skip


def softmax(x: Any, lanes: int) -> Any:
    largest = _reduced(x.shape, lambda *i: x[i], te.max, tirx.max, lanes)
    power = te.compute(x.shape, lambda *i: tirx.exp(x[i] - largest(i[:-1])), name="power")
    total = _reduced(x.shape, lambda *i: power[i], te.sum, lambda a, b: a + b, lanes)
    factor = te.compute(x.shape[:-1], lambda *i: tirx.const(1, "float32") / total(i), name="factor")
    return te.compute(
        x.shape, lambda *i: power[i] * factor[i[:-1]], name="softmax", attrs={loops.FAMILY: FAMILY}
    )


def layer_norm(x: Any, scale: Any, shift: Any, epsilon: float, lanes: int) -> Any:
    count = tirx.const(1 / int(x.shape[-1]), "float32")
    total = _reduced(x.shape, lambda *i: x[i], te.sum, lambda a, b: a + b, lanes)
    rest = te.compute(x.shape, lambda *i: x[i] - total(i[:-1]) * count, name="rest")
    square = _reduced(x.shape, lambda *i: rest[i] * rest[i], te.sum, lambda a, b: a + b, lanes)
    factor = te.compute(
        x.shape[:-1],
        lambda *i: (
            tirx.const(1, "float32") / tirx.sqrt(square(i) * count + tirx.const(epsilon, "float32"))
        ),
        name="factor",
    )
    return te.compute(
        x.shape, lambda *i: rest[i] * factor[i[:-1]] * scale[i[-1]] + shift[i[-1]],
        name="layer_norm", attrs={loops.FAMILY: FAMILY},
    )  # fmt: skip


def _reduced(
    shape: Any,
    element: Callable[..., Any],
    reducer: Callable[..., Any],
    combined: Callable[[Any, Any], Any],
    lanes: int,
) -> Callable[[Any], Any]:
    """Reads the reduction of `element` over the last axis, of a row."""
    *lead, columns = (int(dim) for dim in shape)
    parts = []
    whole = columns // lanes * lanes
    if whole:
        a = te.reduce_axis((0, columns // lanes), "a")
        vector = te.compute(
            (*lead, lanes),
            lambda *i: reducer(element(*i[:-1], a * lanes + i[-1]), axis=[a]), name="vector",
        )  # fmt: skip
        b = te.reduce_axis((0, lanes), "b")
        parts.append(te.compute(lead, lambda *i: reducer(vector[(*i, b)], axis=[b]), name="across"))
    if whole < columns:
        c = te.reduce_axis((0, columns - whole), "c")
        parts.append(
            te.compute(lead, lambda *i: reducer(element(*i, whole + c), axis=[c]), name="tail")
        )
    if len(parts) == 1:
        return lambda row: parts[0][row]
    return lambda row: combined(parts[0][row], parts[1][row])


def schedules(schedule: Any, main: Any) -> bool:
    """Whether all before the result is of its rows, and all after it is elementwise."""
    before = loops.producers(schedule, main)
    names = {schedule.get(block).name_hint for block in (*before, main)}
    after = [b for b in loops.blocks(schedule) if schedule.get(b).name_hint not in names]
    shape = _spatial(schedule, main)
    return (
        all(loops.is_plain(schedule, block) for block in (main, *after))
        and all(_spatial(schedule, block) == shape for block in after)
        and all(
            loops.reductions(schedule, block) <= 1
            and _spatial(schedule, block)[: len(shape) - 1] == shape[:-1]
            for block in before
        )
    )


def apply(schedule: Any, main: Any, vectors: Vectors) -> Any:
    before = {schedule.get(b).name_hint for b in (*loops.producers(schedule, main), main)}
    after = [b for b in loops.blocks(schedule) if schedule.get(b).name_hint not in before]
    last = main
    if after:
        for block in (main, *after[:-1]):
            schedule.compute_inline(block)
        last = after[-1]
    *lead, column = schedule.get_loops(last)
    work = loops.elements(schedule, [*lead, column])
    row = lead[-1]
    _vectorise(schedule, column, vectors)
    starts = []
    for block in reversed(loops.producers(schedule, last)):
        schedule.compute_at(block, row, preserve_unit_loops=True)
        nest = schedule.get_loops(block)[len(lead) :]
        if not loops.reductions(schedule, block):
            if nest:
                _vectorise(schedule, nest[-1], vectors)
            continue
        *spatial, reduced = nest
        is_vector = _spatial(schedule, block)[len(lead) :] == [vectors.lanes]
        if is_vector:
            schedule.reorder(reduced, *spatial)
            schedule.vectorize(spatial[-1])
        starts.append((block, reduced, is_vector))
    # Not fused: LLVM leaves loops alone in functions that divide indices.
    shared = next((loop for loop in lead if loops.extent(schedule, loop) >= SHARES), row)
    loops.parallel(schedule, [shared], work)
    for block, reduced, is_vector in starts:
        start = schedule.decompose_reduction(block, reduced)
        if is_vector:
            schedule.vectorize(schedule.get_loops(start)[-1])
    return schedule


def _vectorise(schedule: Any, loop: Any, vectors: Vectors) -> None:
    if loops.extent(schedule, loop) % vectors.lanes == 0:
        _, lane = schedule.split(loop, [None, vectors.lanes])
        schedule.vectorize(lane)


def _spatial(schedule: Any, block: Any) -> list[int]:
    axes = schedule.get(block).iter_vars
    return [int(axis.dom.extent) for axis in axes if int(axis.iter_type) == 0]
