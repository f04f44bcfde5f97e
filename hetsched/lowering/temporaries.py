"""The memory that the functions of a part ask TVM's pool for while they run.

What a schedule allocates within a function is known for certain only when its loops are lowered:
buffers shrink to what is used of them at a time, and those that are never needed together share
one place.

Importing this file loads TVM's compiler.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any

import tvm
from tvm import tirx
from tvm.tirx.compilation_pipeline import get_tir_pipeline

from hetsched.lowering.entry import PIPELINE
from hetsched.lowering.stack import is_tile

# Below it TVM uses the stack.
LEAST_NBYTES = 1024
# In the text of a function: an allocation, and the scope of those that become registers.
ALLOCATES, REGISTERS = "alloc_buffer(", 'scope="local"'


def temporaries(
    module: Any, calls: Sequence[str], llvm: Mapping[str, Any], threads: int
) -> tuple[tuple[int, ...], ...]:
    """The bytes that each of `calls`, functions of `module` in order, holds at once, if any.

    Those of a loop that `threads` share are counted once for each of them.
    """
    functions = {
        variable: function
        for variable, function in module.functions.items()
        if variable.name_hint in calls and _may_allocate(function)
    }
    if not functions:
        return ()
    lower, _, _ = get_tir_pipeline(PIPELINE)
    target = tvm.target.Target(dict(llvm))
    bound = tirx.transform.BindTarget(target.with_host(target))(tvm.IRModule(functions))
    found = {
        variable.name_hint: tuple(_allocated(function.body, 1, threads))
        for variable, function in lower(bound).functions.items()
    }
    return tuple(sizes for name in calls if (sizes := found.get(name, ())))


def _may_allocate(function: Any) -> bool:
    lines = function.script().splitlines()
    return any(ALLOCATES in line and REGISTERS not in line for line in lines)


def _allocated(statement: Any, times: int, threads: int) -> Iterator[int]:
    match statement:
        case tirx.AllocBuffer() if not is_tile(statement.buffer):
            buffer = statement.buffer
            nbytes = prod(map(int, buffer.shape)) * _itemsize(str(buffer.dtype))
            if nbytes >= LEAST_NBYTES:
                yield nbytes * times
        case tirx.SeqStmt():
            for item in statement.seq:
                yield from _allocated(item, times, threads)
        case tirx.For():
            shared = statement.kind == tirx.ForKind.PARALLEL
            yield from _allocated(statement.body, threads if shared else times, threads)
        case tirx.AttrStmt():
            yield from _allocated(statement.body, times, threads)
        case tirx.IfThenElse():
            yield from _allocated(statement.then_case, times, threads)
            if statement.else_case is not None:
                yield from _allocated(statement.else_case, times, threads)


def _itemsize(dtype: str) -> int:
    kind = tvm.DataType(dtype)
    return -(-int(kind.bits) * int(kind.lanes) // 8)
