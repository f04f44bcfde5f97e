"""The schedule of every function of a fused module that a family knows; others stay as they are.

Importing this file loads TVM's compiler.
"""

from collections.abc import Mapping
from hashlib import sha256
from typing import Any

import tvm
from tvm.s_tir import SBlockRealize, Schedule
from tvm.s_tir.schedule import Trace
from tvm_ffi.serialization import from_json_graph_str, to_json_graph_str

from hetsched.schedules import elementwise, loops, matmul, reductions, rows, window, winograd
from hetsched.schedules.rules import CANDIDATE, CANDIDATES, WORKLOAD, Rules
from hetsched.schedules.vectors import Vectors

# What a tuner reads of a function.
TOLD = (WORKLOAD, CANDIDATE, CANDIDATES)
SCHEDULED = "tirx.is_scheduled"
FAMILIES: dict[str, Any] = {
    window.FAMILY: window,
    matmul.FAMILY: matmul,
    rows.FAMILY: rows,
    winograd.FAMILY: winograd,
}


def scheduled(module: Any, rules: Rules) -> Any:
    """`module` with its functions scheduled by the families, or as a trace was chosen for them."""
    functions = {
        variable: _by_family(function, rules.vectors) or _by_trace(function, rules) or function
        if isinstance(function, tvm.tirx.PrimFunc)
        else function
        for variable, function in module.functions.items()
    }
    return tvm.IRModule(functions, attrs=module.attrs)


def uncovered(module: Any, vectors: Vectors) -> dict[str, Any]:
    """The functions of a fused module that no family schedules, by the text of their workload."""
    return {
        workload_of(function): function
        for function in module.functions.values()
        if isinstance(function, tvm.tirx.PrimFunc)
        and _is_of_blocks(function)
        and _by_family(function, vectors) is None
    }


def workload_of(function: Any) -> str:
    """What names a function that no family knows: a digest of its text, whatever its name."""
    text = function.with_attr("global_symbol", "main").script()
    return f"function {sha256(text.encode()).hexdigest()[:16]}"


def _schedule_of(function: Any) -> Any:
    # A schedule changes the function that it is given.
    # (Not by tvm.ir.load_json, which takes longer, as it first updates texts of older versions.)
    copy = from_json_graph_str(to_json_graph_str(function.with_attr("global_symbol", "main")))
    return Schedule(tvm.IRModule({"main": copy}))


def _is_of_blocks(function: Any) -> bool:
    """Whether a function is of blocks without a schedule."""
    if function.attrs and SCHEDULED in function.attrs:
        return False
    body = function.body
    return isinstance(body, SBlockRealize) and body.block.name_hint == "root"


def _by_trace(function: Any, rules: Rules) -> Any | None:
    """The function by the trace of a schedule, if one was chosen for it."""
    if not any(workload.startswith("function ") for workload in rules.chosen):
        return None
    if not _is_of_blocks(function):
        return None
    trace = rules.chosen.get(workload_of(function))
    return None if trace is None else traced(function, trace)


def traced(function: Any, trace: str) -> Any:
    """The function by a trace in JSON.

    References
    ----------
    Shao et al., "Tensor program optimization with probabilistic programs", NeurIPS 2022,
    https://arxiv.org/abs/2205.13603
    """
    schedule = _schedule_of(function)
    Trace.apply_json_to_schedule(tvm.ir.load_json(trace), schedule)
    return _finished(schedule, function, {})


def _by_family(function: Any, vectors: Vectors) -> Any | None:
    if not _is_of_blocks(function):
        return None
    if not all(_is_float32_of_known_shape(parameter) for parameter in function.params):
        return None
    schedule = _schedule_of(function)
    main = [
        block for block in loops.blocks(schedule) if loops.FAMILY in schedule.get(block).annotations
    ]
    told: dict[str, Any] = {}
    if len(main) == 1:
        annotations = schedule.get(main[0]).annotations
        told = {name: annotations[name] for name in TOLD if name in annotations}
        family = FAMILIES[str(schedule.get(main[0]).annotations[loops.FAMILY])]
        if not family.schedules(schedule, main[0]):
            return None
        schedule = family.apply(schedule, main[0], vectors)
    elif not main and elementwise.schedules(schedule):
        schedule = elementwise.apply(schedule, vectors)
    elif not main and (reducing := reductions.main_block(schedule)) is not None:
        schedule = reductions.apply(schedule, reducing, vectors)
    else:
        return None
    if schedule is None:
        return None
    return _finished(schedule, function, told)


def _finished(schedule: Any, function: Any, told: Mapping[str, Any]) -> Any:
    found = schedule.mod["main"].with_attr(SCHEDULED, True)
    for name, value in told.items():
        found = found.with_attr(name, value)
    symbol = function.attrs.get("global_symbol") if function.attrs else None
    return (
        found.with_attr("global_symbol", symbol) if symbol else found.without_attr("global_symbol")
    )


def _is_float32_of_known_shape(parameter: Any) -> bool:
    shape = getattr(parameter, "shape", None)
    return (
        shape is not None
        and str(parameter.dtype) == "float32"
        and all(isinstance(dim, tvm.tirx.IntImm) for dim in shape)
    )
