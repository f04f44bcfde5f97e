"""A part as a program of kernels for a graphics processor.

Importing this file loads TVM's compiler.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tvm
from tvm import s_tir, tirx
from tvm.s_tir import dlight
from tvm_ffi import structural_walk

from hetsched.errors import DeviceError, UnsupportedOperation
from hetsched.graph import Graph
from hetsched.launches import Program
from hetsched.lowering.device_code import device_code
from hetsched.lowering.entry import calls_of
from hetsched.lowering.program import assembled, copies
from hetsched.lowering.relax import attempted, fuse, lift_constants, lowered, refusal_of
from hetsched.schedules.gpu import loops, threads, tiles
from hetsched.schedules.gpu.limits import Limits
from hetsched.tvm_runtime import ERRORS, first_line

# Of a place in a region: every device of OpenCL can begin a buffer there, CUDA takes any of 16.
ALIGNMENT = 512
# Fewer rows or columns than this are no tile.
LEAST_TILED = 8
# Of groups along the last axis, for any device of CUDA.
MOST_BATCHES = 65535
SCHEDULED = "tirx.is_scheduled"


def program(
    graph: Graph, target: Mapping[str, Any] | str, limits: Limits
) -> tuple[Program, Mapping[str, np.ndarray]]:
    """The program of `graph` for a device of TVM's `target`, and the weights that it reads.

    Raises
    ------
    CompileError
        TVM refuses the part.
    """
    described = tvm.target.Target(target)
    return attempted(graph, lambda part: _made(part, described, limits))


def architecture(target: Mapping[str, Any] | str) -> str:
    """The architecture of a target, such as `sm_90`.

    Raises
    ------
    DeviceError
        TVM knows no such target.
    """
    try:
        return str(tvm.target.Target(target).attrs["arch"])
    except ERRORS as error:
        why = first_line(error)
        raise DeviceError(f"TVM knows no target {target!r} of CUDA: {why}") from None


def why_not(graph: Graph) -> str | None:
    """Why no program can be made of `graph`, or None; quick, as no code is made."""
    return refusal_of(graph, lambda part: lowered(part, vectors=None, sorts=False))


def _made(graph: Graph, target: Any, limits: Limits) -> tuple[Program, Mapping[str, np.ndarray]]:
    part = lift_constants(fuse(lowered(graph, vectors=None, sorts=False)), graph)
    calls = calls_of(part.module, ALIGNMENT)
    functions = {**calls.functions, **{n: _copying(size) for n, size in copies(calls).items()}}
    with target:
        functions = {name: scheduled(f, target, limits) for name, f in functions.items()}
    code = device_code(functions, target)
    language = str(target.kind.name)
    made = assembled(graph, part.weights, calls, code.steps, language, code.source, ALIGNMENT)
    return made, part.weights


def _copying(nbytes: int) -> Any:
    """A function that copies so many bytes."""
    dtype, size = next((d, s) for d, s in (("uint32", 4), ("uint8", 1)) if nbytes % s == 0)
    source = tvm.te.placeholder((nbytes // size,), dtype, name="source")
    copy = tvm.te.compute(source.shape, lambda i: source[i], name="copy")
    return tvm.te.create_prim_func([source, copy])


def scheduled(function: Any, target: Any, limits: Limits) -> Any:
    """The function by the first rule that serves it.

    Raises
    ------
    UnsupportedOperation
        None does.
    """
    if _is_for_threads(function):
        return function
    found = loops.apply(function)
    if found is not None:
        return found.with_attr(SCHEDULED, True)
    for rule in RULES:
        try:
            schedule = rule(function, target, limits)
        except ERRORS:
            # A schedule's steps say only when they are taken that a function does not suit them.
            continue
        if schedule is not None:
            return schedule.mod["main"].with_attr(SCHEDULED, True)
    raise UnsupportedOperation("no schedule for a graphics processor serves it")


def _is_for_threads(function: Any) -> bool:
    """Whether groups and threads share its loops already."""
    found: list[Any] = []
    structural_walk(function.body, (tirx.For, found.append), order="post")
    return any(loop.kind == tirx.ForKind.THREAD_BINDING for loop in found)


def _schedule_of(function: Any) -> Any:
    return s_tir.Schedule(tvm.IRModule({"main": function.with_attr("global_symbol", "main")}))


def _tiles(function: Any, target: Any, limits: Limits) -> Any | None:
    schedule = _schedule_of(function)
    main = tiles.product_of(schedule)
    if main is None:
        return None
    sizes = tiles.sizes(schedule, main)
    if min(sizes[1:3]) < LEAST_TILED or sizes[0] > MOST_BATCHES:
        return None
    tile = tiles.candidates(*sizes, limits)[0]
    return tiles.apply(schedule, main, tile, explicit=str(target.kind.name) != "cuda")


def _threads(function: Any, target: Any, limits: Limits) -> Any | None:
    schedule = _schedule_of(function)
    main = threads.reduction_of(schedule)
    return None if main is None else threads.apply(schedule, main, limits)


def _dlight(rule: Any) -> Callable[[Any, Any, Limits], Any | None]:
    def apply(function: Any, target: Any, limits: Limits) -> Any | None:
        found = rule.apply(function, target, False)
        return found[0] if isinstance(found, list) else found

    return apply


RULES = (
    _tiles,
    _threads,
    _dlight(dlight.gpu.GEMV()),
    _dlight(dlight.gpu.Reduction()),
    _dlight(dlight.gpu.GeneralReduction()),
    _dlight(dlight.gpu.Fallback()),
)
