"""A part as one function of plain addresses, for parts whose shapes are all known.

TVM's virtual machine takes microseconds for each call: it makes tensors, checks them and interprets
a program. Where a part only calls TensorIR functions on tensors of known shapes, all of that can be
settled when it is compiled: the functions take addresses, one function calls them in turn, and what
lies between them has its place in one piece of memory.

Importing this file loads TVM's compiler.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import tvm
from tvm import relax, tirx
from tvm.ir import PointerType, PrimType
from tvm.tirx.compilation_pipeline import get_tir_pipeline, register_tir_pipeline
from tvm.tirx.stmt import AttrStmt, Bind, DeclBuffer, Evaluate, IfThenElse, Return, SeqStmt

from hetsched.dtype import ALIGNMENT, numpy_dtype
from hetsched.errors import UnsupportedOperation
from hetsched.lowering.stack import ON_STACK
from hetsched.tvm_runtime import to_numpy

# The name under which TVM knows how functions of addresses are lowered.
PIPELINE = "hetsched"
# What copies all of the second memory to the first; C's name of it.
COPY = "memcpy"
# Before the names of functions, which would else be those of C: exp, floor.
PREFIX = "part_"
# TVM's numbers: of the field of an argument that is an address; of the way to call a function that
# is left as it is.
_ADDRESS = 15
_AS_IT_IS = 1
# What TVM has to know where a function allocates memory: which device.
_DEVICE = {"device_id": 0, "device_type": 1}


@dataclass(frozen=True, eq=False)
class Direct:
    """`module` has the functions of a part, and `main`, which calls them.

    Its one argument is the address of a table with an address for each input, each weight,
    `constants`, each output and the workspace, in this order; it returns 0, or what a function that
    failed gave. The workspace means nothing before and after a call. `calls` are the functions that
    it calls, in order.
    """

    module: Any
    constants: bytes
    workspace_nbytes: int
    calls: tuple[str, ...]


@dataclass(eq=False)
class Memory:
    """Where a tensor is: in a row, from `start`; needed from the call `first` to `last`."""

    nbytes: int
    row: int | None = None
    start: int = 0
    first: int = 0
    last: int = 0


@dataclass(frozen=True, eq=False)
class Calls:
    """What `main` of a module does: functions by name, called in turn on memories.

    The memories of a call are in the order of the function's parameters, those that are written
    behind those that are read; that of `COPY` is written first. Rows are the parameters of `main`,
    then `constants`, the outputs and the workspace. `between` are the memories that are to be
    placed in the last one.
    """

    functions: Mapping[str, Any]
    calls: Sequence[tuple[str, Sequence[Memory]]]
    between: Sequence[Memory]
    constants: bytes
    parameters: int
    outputs: int

    @property
    def workspace(self) -> int:
        """The row of the workspace."""
        return self.parameters + 1 + self.outputs


def calls_of(module: Any, alignment: int = ALIGNMENT) -> Calls:
    """The calls of a fused module, whose `main` takes weights last.

    Raises
    ------
    UnsupportedOperation
        It does something else than to call functions on tensors of known shapes.
    """
    module = relax.transform.RewriteDataflowReshape()(module)
    walk = _Walk(module)
    outputs = walk.outputs()
    parameters = len(module["main"].params)
    constants = _joined(walk.constants, parameters, alignment)
    for index, memory in enumerate(outputs):
        row = parameters + 1 + index
        if memory.row is None:
            memory.row = row
        else:
            walk.copy(memory, row)
    functions = {
        PREFIX + variable.name_hint: function
        for variable, function in module.functions.items()
        if isinstance(function, tirx.PrimFunc)
    }
    between = [memory for memory in walk.made if memory.row is None]
    return Calls(functions, walk.calls, between, constants, parameters, len(outputs))


def direct(module: Any) -> Direct | None:
    """The fused module as functions of addresses, or None where it does something else.

    `main` takes what its rows hold, weights last.
    """
    try:
        found = calls_of(module)
    except UnsupportedOperation:
        return None
    nbytes = placed(found.between)
    for memory in found.between:
        memory.row = found.workspace
    functions = {
        tvm.ir.GlobalVar(name): _of_addresses(name, function)
        for name, function in found.functions.items()
    }
    functions[tvm.ir.GlobalVar("main")] = _main(found.calls)
    calls = tuple(name for name, _ in found.calls)
    return Direct(tvm.IRModule(functions), found.constants, nbytes, calls)


class _Walk:
    """What `main` of a module calls, on which memory, as far as it is understood."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self._main = module["main"]
        self.calls: list[tuple[str, list[Memory]]] = []
        self.made: list[Memory] = []
        self.constants: list[tuple[Memory, np.ndarray]] = []
        self._known: dict[Any, Any] = {
            parameter: Memory(_nbytes(parameter.ty) or 0, row=row)
            for row, parameter in enumerate(self._main.params)
        }
        self._constant_of: dict[bytes, Memory] = {}

    def outputs(self) -> list[Memory]:
        """The memory of each output."""
        for block in self._main.body.blocks:
            for binding in block.bindings:
                self._known[binding.var] = self._value(getattr(binding, "value", None))
        results = self._value(self._main.body.body)
        return [results] if isinstance(results, Memory) else list(results)

    def copy(self, memory: Memory, row: int) -> None:
        """Ends with a copy to the row of an output, whose tensor has a place already."""
        self.calls.append((COPY, [Memory(memory.nbytes, row=row), memory]))

    def _value(self, value: Any) -> Any:
        """The memory that an expression stands for; a list for a tuple."""
        if value in self._known:
            return self._known[value]
        if isinstance(value, tvm.ir.GenericConst):
            return self._constant(to_numpy(value.value))
        if isinstance(value, relax.Tuple):
            return [self._value(field) for field in value.fields]
        if isinstance(value, relax.TupleGetItem):
            return self._value(value.tuple_value)[value.index]
        name = getattr(getattr(value, "op", None), "name", "")
        if name == "relax.reshape":
            return self._value(value.args[0])
        if name == "relax.call_tir" and len(value.args) == 2:
            return self._call(value)
        called = getattr(value.args[0], "global_symbol", name) if name else type(value).__name__
        raise UnsupportedOperation(f"{called} is no loop, and runs in TVM alone")

    def _call(self, call: Any) -> Any:
        function = self._module[call.args[0]]
        types = list(call.ty.fields) if isinstance(call.ty, relax.TupleType) else [call.ty]
        if not _static(function) or None in (sizes := list(map(_nbytes, types))):
            raise UnsupportedOperation(f"{call.args[0].name_hint} is of shapes that are not known")
        read = [self._value(argument) for argument in call.args[1].fields]
        now = len(self.calls)
        written = [Memory(nbytes or 0, first=now, last=now) for nbytes in sizes]
        for memory in read:
            memory.last = now
        self.made += written
        self.calls.append((PREFIX + call.args[0].name_hint, [*read, *written]))
        return written if isinstance(call.ty, relax.TupleType) else written[0]

    def _constant(self, array: np.ndarray) -> Memory:
        content = array.tobytes()
        if content not in self._constant_of:
            memory = Memory(array.nbytes)
            self._constant_of[content] = memory
            self.constants.append((memory, array))
        return self._constant_of[content]


def placed(memories: Sequence[Memory], alignment: int = ALIGNMENT) -> int:
    """Gives each a start such that none overlaps another that lives with it; the bytes needed.

    The largest first, each at the lowest start where it fits.

    References
    ----------
    Pisarchyk and Lee, "Efficient memory management for deep neural net inference", 2020,
    https://arxiv.org/abs/2001.03288
    """
    there: list[Memory] = []
    for memory in sorted(memories, key=lambda memory: -memory.nbytes):
        start = 0
        for other in there:
            if memory.last < other.first or other.last < memory.first:
                continue
            if start + memory.nbytes <= other.start:
                break
            start = max(start, _aligned(other.start + other.nbytes, alignment))
        memory.start = start
        there.append(memory)
        there.sort(key=lambda other: other.start)
    return max((memory.start + memory.nbytes for memory in memories), default=0)


def _joined(constants: Sequence[tuple[Memory, np.ndarray]], row: int, alignment: int) -> bytes:
    """All constants behind each other, each where its memory says from now on."""
    joined = bytearray()
    for memory, array in constants:
        joined.extend(bytes(_aligned(len(joined), alignment) - len(joined)))
        memory.row, memory.start = row, len(joined)
        joined.extend(array.tobytes())
    return bytes(joined)


def _aligned(nbytes: int, alignment: int) -> int:
    return -(-nbytes // alignment) * alignment


def _nbytes(type_: Any) -> int | None:
    """The size of a tensor of this type, or None if it is not known."""
    shape = getattr(type_, "shape", None)
    if not isinstance(shape, relax.ShapeExpr) or not _known(shape):
        return None
    return int(prod(map(int, shape)) * numpy_dtype(str(type_.dtype)).itemsize)


def _static(function: Any) -> bool:
    """Whether all that a function is given is compact tensors of known shapes."""
    return all(
        hasattr(parameter, "shape")
        and _known(parameter.shape)
        and _known(parameter.strides)
        and _starts_known(parameter)
        for parameter in function.params
    )


def _starts_known(parameter: Any) -> bool:
    """Whether a tensor begins where its memory does, or wherever the caller says: there."""
    start = parameter.elem_offset
    return isinstance(start, tirx.Var) or (isinstance(start, tirx.IntImm) and not int(start))


def _known(shape: Any) -> bool:
    return all(isinstance(dim, tirx.IntImm) for dim in shape)


def _of_addresses(name: str, function: Any) -> Any:
    """The function with addresses for tensors; once it is lowered, it returns 0."""
    addresses = [
        tirx.Var(f"{parameter.name}_data", PointerType(PrimType(parameter.dtype), "global"))
        for parameter in function.params
    ]
    tensors = [
        DeclBuffer(parameter, data=address)
        for parameter, address in zip(function.params, addresses, strict=True)
    ]
    starts = [p.elem_offset for p in function.params if isinstance(p.elem_offset, tirx.Var)]
    zeros = [Bind(start, tirx.IntImm(str(start.ty.dtype), 0)) for start in dict.fromkeys(starts)]
    body = SeqStmt([*zeros, *tensors, function.body])
    return (
        tirx.PrimFunc(addresses, body, PrimType("int32"), function.attrs)
        .with_attr("global_symbol", name)
        .with_attr("calling_conv", _AS_IT_IS)
    )


def _main(calls: Sequence[tuple[str, Sequence[Memory]]]) -> Any:
    table = tirx.Var("table", "handle")
    body: list[Any] = []
    for index, (name, memories) in enumerate(calls):
        arguments = []
        for place, memory in enumerate(memories):
            address = tirx.tvm_struct_get(table, memory.row, _ADDRESS, "handle")
            if memory.start:
                tensor = tirx.decl_buffer((memory.start + 1,), "uint8", f"memory{index}_{place}")
                body.append(DeclBuffer(tensor, data=address))
                address = tirx.address_of(tensor[memory.start])
            arguments.append(address)
        if name == COPY:
            nbytes = tirx.IntImm("int64", memories[0].nbytes)
            body.append(Evaluate(tirx.call_extern("handle", name, *arguments, nbytes)))
            continue
        status = tirx.Var(f"status{index}", PrimType("int32"))
        body.append(Bind(status, tirx.call_extern("int32", name, *arguments)))
        body.append(IfThenElse(status != 0, Return(status), None))
    body.append(Return(tirx.IntImm("int32", 0)))
    return tirx.PrimFunc([table], SeqStmt(body)).with_attr("global_symbol", "main")


@tirx.transform.prim_func_pass(opt_level=0)  # type: ignore[untyped-decorator]
def _on_the_processor(function: Any, *_: Any) -> Any:
    """Says which device a function is on, as TVM's own lowering of arguments does.

    What it allocates there is freed at the end of that statement, so that 0 is returned behind it.
    """
    if not function.attrs["global_symbol"].startswith(PREFIX):
        return function
    body = function.body
    for key, value in _DEVICE.items():
        body = AttrStmt("default", key, tirx.IntImm("int32", value), body)
    return function.with_body(SeqStmt([body, Return(tirx.IntImm("int32", 0))]))


def _pipeline() -> tuple[Any, Any, Any]:
    lower, host, device = get_tir_pipeline(ON_STACK)
    return lower, lambda: tvm.transform.Sequential([_on_the_processor, host()]), device


register_tir_pipeline(PIPELINE, _pipeline)
