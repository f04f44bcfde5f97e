"""What hetsched knows about ONNX operations: their cost, and what they mean.

An operation is one file in `hetsched/operations`: the ONNX types that it covers, their FLOPs and
bytes, and for some the loops that define the result. The file is all there is to add.

A FLOP is one arithmetic operation on one element, so a multiply-add is two and an elementary
function (`exp`, `tanh`) is one; integer arithmetic counts like floating point. Zero points and
scales of quantised operations are not counted.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np

from hetsched.errors import PluginError
from hetsched.fusion import Group
from hetsched.op import Op, Tensor
from hetsched.plugin import Plugin, load, names

# Marks the loop of a reference whose iterations are independent. Python runs them in turn; a
# compiler replaces the name by its own parallel range.
prange = range

Loops = TypeVar("Loops", bound=Callable[..., Any])


@dataclass(frozen=True)
class Call:
    """One node to evaluate: its ONNX type, attributes, opset, and how many results it has.

    `attributes` include those that the node leaves to their default in that opset; an attribute
    without a default is None.
    """

    kind: str
    attributes: Mapping[str, Any]
    opset: int
    results: int = 1


class Compiler(Protocol):
    """What runs a function of plain loops: `interpreted`, or something that compiles it."""

    def __call__(self, loops: Loops, /) -> Loops: ...


def interpreted(loops: Loops, /) -> Loops:
    """The loops as they are, run by Python."""
    return loops


class Operation(Plugin):
    """A family of ONNX types; by itself, an elementwise operation of one FLOP per output element.

    A type of another domain than ONNX's own is written `domain.Type`. `is_view` says that the
    output is the input under another shape, so that nothing moves. `defined` are the types whose
    result `reference` computes.
    """

    package = "hetsched.operations"
    onnx_types: ClassVar[tuple[str, ...]] = ()
    is_view: ClassVar[bool] = False
    defined: ClassVar[tuple[str, ...]] = ()

    def flops(self, op: Op) -> int:
        return sum(tensor.size for tensor in op.writes[:1])

    def read_nbytes(self, op: Op, tensor: Tensor) -> int:
        """How much `op` reads of `tensor`, one of its inputs."""
        return tensor.nbytes

    def reference(
        self, call: Call, inputs: Sequence[Any], compiler: Compiler = interpreted
    ) -> tuple[np.ndarray, ...]:
        """The results by definition; an omitted optional input is None.

        The loops that do the work go through `compiler`.
        """
        raise NotImplementedError(f"{call.kind} has no reference")


def operation_of(op: Op) -> Operation:
    """What is known about the type of `op`."""
    return _by_type().get(f"{op.domain}.{op.kind}" if op.domain else op.kind, _UNKNOWN)


def operations() -> tuple[Operation, ...]:
    """Every operation there is a file of, by name."""
    return tuple(dict.fromkeys(_by_type().values()))


def flops(op: Op) -> int:
    """The arithmetic operations of `op`.

    Examples
    --------
    >>> x, w = Tensor("x", (4, 3), "float32"), Tensor("w", (3, 5), "float32")
    >>> flops(Op("product", "MatMul", (x, w), (Tensor("y", (4, 5), "float32"),)))
    120
    """
    return operation_of(op).flops(op)


def nbytes(op: Op) -> int:
    """The bytes that `op` reads, weights included, and writes."""
    operation = operation_of(op)
    if operation.is_view:
        return 0
    read = sum(operation.read_nbytes(op, tensor) for tensor in op.reads)
    return read + sum(tensor.nbytes for tensor in op.writes)


def group_flops(group: Group) -> int:
    """The arithmetic operations of all operations of `group`."""
    return sum(map(flops, group.ops))


def group_nbytes(group: Group) -> int:
    """The bytes that cross the border of `group`, which as one kernel keeps the rest in registers.

    A tensor that several members read counts once, with the most that one of them takes of it.
    """
    if all(operation_of(op).is_view for op in group.ops):
        return 0
    read: dict[str, int] = {}
    for op in group.ops:
        operation = operation_of(op)
        for tensor in op.reads:
            taken = operation.read_nbytes(op, tensor)
            read[tensor.name] = max(taken, read.get(tensor.name, 0))
    crossing = sum(read[tensor.name] for tensor in (*group.inputs, *group.constants))
    return crossing + sum(tensor.nbytes for tensor in group.outputs)


_UNKNOWN = Operation()


@cache
def _by_type() -> Mapping[str, Operation]:
    found: dict[str, Operation] = {}
    for name in names(Operation):
        operation = load(Operation, name)
        for kind in operation.onnx_types:
            if kind in found:
                raise PluginError(f"both '{found[kind].name}' and '{name}' are about {kind}")
            found[kind] = operation
    return found
