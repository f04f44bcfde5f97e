"""A part as a program of kernels for a graphics processor.

Importing this file loads TVM's compiler.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import tvm
from tvm import relax, s_tir, tirx
from tvm.s_tir import dlight

from hetsched.errors import CompileError, UnsupportedOperation
from hetsched.graph import Graph
from hetsched.launches import CONSTANT, INPUT, OUTPUT, WEIGHT, WORKSPACE, Launch, Place, Program
from hetsched.lowering.device_code import KernelCall, Temporary, device_code
from hetsched.lowering.entry import _joined, _Memory, _placed, _Walk
from hetsched.lowering.relax import attempted, fuse, lift_constants, lowered, refusal_of
from hetsched.schedules.gpu import threads, tiles
from hetsched.schedules.gpu.limits import Limits
from hetsched.tvm_runtime import ERRORS

# Fewer rows or columns than this are no tile.
LEAST_TILED = 8
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


def why_not(graph: Graph) -> str | None:
    """Why no program can be made of `graph`, or None; quick, as no code is made."""
    return refusal_of(graph, lambda part: lowered(part, vectors=None))


def _made(graph: Graph, target: Any, limits: Limits) -> tuple[Program, Mapping[str, np.ndarray]]:
    fused = fuse(lowered(graph, vectors=None))
    module = relax.transform.RewriteDataflowReshape()(fused.module)
    with target:
        fused = replace(fused, module=scheduled(module, target, limits))
    part = lift_constants(fused, graph)
    walk = _Walk(part.module)
    outputs = walk.outputs()
    if outputs is None:
        raise UnsupportedOperation("it does more than call kernels on tensors of known shapes")
    functions = {
        variable.name_hint: function
        for variable, function in part.module.functions.items()
        if isinstance(function, tirx.PrimFunc)
    }
    inputs = len(part.module["main"].params) - len(part.weights)
    constants = _joined(walk.constants, inputs + len(part.weights))
    first_output = inputs + len(part.weights) + 1
    copies=[]
    for index, memory in enumerate(outputs):
        if memory.row is None:
            memory.row = first_output + index
        else:
            own = _Memory(memory.nbytes, row=first_output + index)
            name = f"copy_{memory.nbytes}"
            functions.setdefault(name, _copy(memory.nbytes, target, limits))
            copies.append((name, [memory, own]))
    code = device_code(functions, target)
    workspace = first_output + len(outputs)
    between = [memory for memory in walk.made if memory.row is None]
    calls: list[tuple[KernelCall, list[_Memory]]] = []
    for index, (name, memories) in enumerate([*walk.calls,*copies]):
        name = name.removeprefix("part_")
        own: dict[int, _Memory] = {}
        for call in code.calls[name]:
            for argument in call.arguments:
                if isinstance(argument, Temporary) and argument.number not in own:
                    own[argument.number] = _Memory(argument.nbytes, first=index, last=index)
            calls.append(
                (call, [own[a.number] if isinstance(a, Temporary) else memories[a] for a in call.arguments])
            )
        between += own.values()
    nbytes = _placed(between)
    for memory in between:
        memory.row = workspace
    names = list(part.weights)

    def place(memory: _Memory, written: bool) -> Place:
        row = memory.row
        assert row is not None
        if row < inputs:
            where: tuple[str, int | str] = (INPUT, row)
        elif row < inputs + len(names):
            where = (WEIGHT, names[row - inputs])
        elif row < first_output:
            where = (CONSTANT, 0)
        elif row < workspace:
            where = (OUTPUT, row - first_output)
        else:
            where = (WORKSPACE, 0)
        return Place(*where, memory.start, memory.nbytes, written)

    launches = tuple(
        Launch(
            call.kernel,
            tuple(g * t for g, t in zip(call.groups, call.threads, strict=True)),
            call.threads,
            tuple(place(m, w) for m, w in zip(memories, call.written, strict=True)),
            call.shared_nbytes,
        )
        for call, memories in calls
    )
    made = tuple(dict.fromkeys(t for t in graph.outputs if t.name in graph.producers))
    return Program(
        str(target.kind.name),
        code.source,
        graph.inputs,
        made,
        launches,
        {name: array.nbytes for name, array in part.weights.items()},
        constants,
        nbytes,
    ), part.weights


def _copy(nbytes: int, target: Any, limits: Limits) -> Any:
    """A function that copies so many bytes."""
    dtype, size = next((d, s) for d, s in (("uint32", 4), ("uint8", 1)) if nbytes % s == 0)
    source = tvm.te.placeholder((nbytes // size,), dtype, name="source")
    copy = tvm.te.compute(source.shape, lambda i: source[i], name="copy")
    with target:
        return scheduled_function(tvm.te.create_prim_func([source, copy]), target, limits)


def scheduled(module: Any, target: Any, limits: Limits) -> Any:
    """`module` with its functions shared out to groups of threads."""
    functions = {
        variable: scheduled_function(function, target, limits)
        if isinstance(function, tirx.PrimFunc)
        else function
        for variable, function in module.functions.items()
    }
    return tvm.IRModule(functions, attrs=module.attrs)


def scheduled_function(function: Any, target: Any, limits: Limits) -> Any:
    if function.attrs and function.attrs.get(SCHEDULED):
        return function
    for rule in RULES:
        try:
            found = rule(function, target, limits)
        except ERRORS as e:
            print("RULE", rule.__name__, function.attrs, str(e)[:200]); open("/tmp/cudaw/rule.py","w").write(function.script())
            continue
        if found is not None:
            return found.mod["main"].with_attr(SCHEDULED, True)
    return function


def _schedule_of(function: Any) -> Any:
    return s_tir.Schedule(tvm.IRModule({"main": function.with_attr("global_symbol", "main")}))


def _tiles(function: Any, target: Any, limits: Limits) -> Any | None:
    schedule = _schedule_of(function)
    main = tiles.product_of(schedule)
    if main is None:
        return None
    sizes = tiles.sizes(schedule, main)
    if min(sizes[1:3]) < LEAST_TILED:
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
    apply.__name__=type(rule).__name__
    return apply


RULES = (
    _tiles,
    _threads,
    _dlight(dlight.gpu.GEMV()),
    _dlight(dlight.gpu.Reduction()),
    _dlight(dlight.gpu.GeneralReduction()),
    _dlight(dlight.gpu.Fallback()),
)
