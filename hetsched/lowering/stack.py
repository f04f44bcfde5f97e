"""TVM's pipeline for loops, but that small tiles stay on the stack.

TVM asks its pool of workspaces for a tile of 1024 bytes or more, whatever its scope, and LLVM
makes registers of memory on the stack only: each tile of a product or a convolution would be
filled with zeros in memory, and be written to memory before its epilogue reads it.

Importing this file loads TVM's compiler.
"""

from math import prod
from typing import Any

import tvm
from tvm import tirx

# The name under which TVM knows the pipeline.
ON_STACK = "hetsched.on_stack"
# Of the scope of registers, that go on a thread's stack.
LARGEST_NBYTES = 1 << 16
# TVM's annotation of what it is to leave as it is.
AS_IT_IS = "disable_lower_builtin"


@tirx.transform.prim_func_pass(opt_level=0)  # type: ignore[untyped-decorator]
def _on_stack(function: Any, _: Any, __: Any) -> Any:
    return function.with_body(_annotated(function.body))


def _annotated(statement: Any) -> Any:
    """`statement` with the annotation on each small buffer of the scope of registers."""
    match statement:
        case tirx.AllocBuffer() if is_tile(statement.buffer):
            return tirx.AllocBuffer(
                statement.buffer,
                {**statement.annotations, AS_IT_IS: tirx.IntImm("bool", 1)},
                statement.span,
            )
        case tirx.SeqStmt():
            return tirx.SeqStmt([_annotated(item) for item in statement.seq])
        case tirx.For():
            return tirx.For(
                statement.loop_var, statement.min, statement.extent, statement.kind,
                _annotated(statement.body), statement.thread_binding, statement.annotations,
            )  # fmt: skip
        case tirx.AttrStmt():
            return tirx.AttrStmt(
                statement.node, statement.attr_key, statement.value, _annotated(statement.body)
            )
        case tirx.IfThenElse():
            other = statement.else_case
            return tirx.IfThenElse(
                statement.condition, _annotated(statement.then_case),
                None if other is None else _annotated(other),
            )  # fmt: skip
    return statement


def is_tile(buffer: Any) -> bool:
    """Whether a buffer goes on the stack, as registers."""
    if buffer.scope() != "local" or not all(isinstance(d, tirx.IntImm) for d in buffer.shape):
        return False
    itemsize: int = tvm.DataType(str(buffer.dtype)).itemsize
    return prod(map(int, buffer.shape)) * itemsize <= LARGEST_NBYTES


def _pipeline() -> tuple[Any, Any, Any]:
    loops, host, device = tirx.get_tir_pipeline("default")
    return loops, lambda: tvm.ir.transform.Sequential([_on_stack, host()]), device


tirx.register_tir_pipeline(ON_STACK, _pipeline)
