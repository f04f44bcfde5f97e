"""The schedule of every function of a fused module that a family knows; others stay as they are.

Importing this file loads TVM's compiler.
"""

from typing import Any

import tvm
from tvm.s_tir import SBlockRealize, Schedule

from hetsched.schedules import elementwise, loops, matmul, rows, window
from hetsched.schedules.rules import CANDIDATE, CANDIDATES, WORKLOAD
from hetsched.schedules.vectors import Vectors

# What a tuner reads of a function.
TOLD = (WORKLOAD, CANDIDATE, CANDIDATES)
FAMILIES: dict[str, Any] = {
    window.FAMILY: window,
    matmul.FAMILY: matmul,
    rows.FAMILY: rows,
}


def scheduled(module: Any, vectors: Vectors) -> Any:
    """`module` with its functions scheduled for `vectors`."""
    functions = {
        variable: _scheduled(function, vectors)
        if isinstance(function, tvm.tirx.PrimFunc)
        else function
        for variable, function in module.functions.items()
    }
    return tvm.IRModule(functions, attrs=module.attrs)


def _scheduled(function: Any, vectors: Vectors) -> Any:
    body = function.body
    if not isinstance(body, SBlockRealize) or body.block.name_hint != "root":
        return function
    if not all(_is_float32_of_known_shape(parameter) for parameter in function.params):
        return function
    # A schedule changes the function that it is given.
    copy = tvm.ir.load_json(tvm.ir.save_json(function.with_attr("global_symbol", "main")))
    schedule = Schedule(tvm.IRModule({"main": copy}))
    main = [
        block for block in loops.blocks(schedule) if loops.FAMILY in schedule.get(block).annotations
    ]
    told: dict[str, Any] = {}
    if len(main) == 1:
        annotations = schedule.get(main[0]).annotations
        told = {name: annotations[name] for name in TOLD if name in annotations}
        family = FAMILIES[str(schedule.get(main[0]).annotations[loops.FAMILY])]
        if not family.schedules(schedule, main[0]):
            return function
        schedule = family.apply(schedule, main[0], vectors)
    elif not main and elementwise.schedules(schedule):
        elementwise.apply(schedule, vectors)
    else:
        return function
    found = schedule.mod["main"].with_attr("tirx.is_scheduled", True)
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
