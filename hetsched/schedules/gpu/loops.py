"""Functions that come as loops, not as blocks to be scheduled, on a graphics processor.

Each outer loop whose iterations are parallel is a kernel with a thread for each of them; anything
else is a kernel of one thread. Right, but quick only where there are many iterations.

Importing this file loads TVM's compiler.
"""

from collections.abc import Iterator
from typing import Any

from tvm import ir, tirx
from tvm.s_tir import SBlockRealize
from tvm_ffi import structural_map, structural_walk

THREADS = 64
# TVM's number of an axis that is an index of threads.
THREAD_INDEX = 1


def apply(function: Any) -> Any | None:
    """The function as such kernels; None where it has blocks to be scheduled, or needs memory."""
    if any(map(_has_blocks, _statements(function.body))):
        return None
    parameters = [
        tirx.decl_buffer(parameter.shape, parameter.dtype, parameter.name)
        for parameter in function.params
    ]
    # All tensors of a program begin where their memory does.
    body = _replaced(function.body, dict(zip(function.params, parameters, strict=True)))
    kernels = list(map(_kernel, _statements(body)))
    # TVM takes a body that is one loop for one without its block, and makes that.
    whole = tirx.SeqStmt([*kernels, tirx.Evaluate(0)])
    return tirx.PrimFunc(parameters, whole, function.ret_type, function.attrs)


def _statements(statement: Any) -> Iterator[Any]:
    """What is done one after the other."""
    match statement:
        case SBlockRealize() if not statement.block.iter_vars and not statement.block.alloc_buffers:
            yield from _statements(statement.block.body)
        case tirx.SeqStmt():
            for item in statement.seq:
                yield from _statements(item)
        case tirx.AttrStmt() if statement.attr_key == "pragma_scope":
            yield from _statements(statement.body)
        case _:
            yield statement


def _has_blocks(statement: Any) -> bool:
    found: list[Any] = []
    structural_walk(statement, (SBlockRealize, found.append), order="post")
    return bool(found) or isinstance(statement, tirx.AllocBuffer)


def _kernel(statement: Any) -> Any:
    """The statement under an index of groups and one of threads."""
    index: Any = None
    count = 1
    if isinstance(statement, tirx.For) and statement.kind == tirx.ForKind.PARALLEL:
        index, count, statement = statement.loop_var, int(statement.extent), statement.body
    threads = min(THREADS, count)
    group, thread = (tirx.Var(name, "int32") for name in ("group", "thread"))
    body = _private(statement)
    if index is not None:
        at = (group * threads + thread).astype(str(index.ty.dtype))
        body = _replaced(body, {index: at})
        if count % threads:
            body = tirx.IfThenElse(at < count, body, None)
    for variable, extent, tag in (
        (thread, threads, "threadIdx.x"),
        (group, -(-count // threads), "blockIdx.x"),
    ):
        axis = tirx.IterVar(None, tirx.Var(tag, "int32"), THREAD_INDEX, tag)
        body = tirx.For(variable, 0, extent, tirx.ForKind.THREAD_BINDING, body, axis)
    return body


def _private(statement: Any) -> Any:
    """The statement of one thread: what it allocates is its own, and its loops are its own."""
    changed: dict[Any, Any] = {}

    def own(found: Any) -> None:
        buffer = found.buffer
        changed[buffer] = tirx.decl_buffer(buffer.shape, buffer.dtype, buffer.name, scope="local")

    structural_walk(statement, (tirx.AllocBuffer, own), order="post")
    statement = _replaced(statement, changed)

    def serial(loop: Any) -> Any:
        if loop.kind != tirx.ForKind.PARALLEL:
            return loop
        kind = tirx.ForKind.SERIAL
        return tirx.For(loop.loop_var, loop.min, loop.extent, kind, loop.body)

    return structural_map(statement, (tirx.For, serial))


def _replaced(statement: Any, changed: dict[Any, Any]) -> Any:
    return structural_map(statement, (ir.Var, lambda variable: changed.get(variable, variable)))
