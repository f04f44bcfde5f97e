"""What hetsched knows about ONNX operations: their cost, how they are cut, and what they mean.

An operation is one file in `hetsched/operations`: the ONNX types that it covers, their FLOPs and
bytes, how a region of the result is computed alone, and for some the loops that define the result.
The file is all there is to add.

A FLOP is one arithmetic operation on one element, so a multiply-add is two and an elementary
function (`exp`, `tanh`) is one; integer arithmetic counts like floating point. Zero points and
scales of quantised operations are not counted.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np

from hetsched.errors import PluginError, SplitRefused
from hetsched.fusion import ELEMENTWISE, Group
from hetsched.op import Op, Tensor
from hetsched.plugin import Plugin, load, names
from hetsched.region import Region

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


@dataclass(frozen=True)
class Known:
    """What an operation can be told of its graph: the constants by name, and the opset of ONNX."""

    constants: Mapping[str, np.ndarray]
    opset: int

    def integers(self, op: Op, place: int) -> tuple[int, ...] | None:
        """The values of an input of sizes or axes; None if it is omitted.

        Raises
        ------
        SplitRefused
            They are known only when the model runs.
        """
        if not op.has_input(place):
            return None
        name = op.input(place).name
        if name not in self.constants:
            raise refused(op, f"'{name}' is no constant")
        return tuple(int(value) for value in self.constants[name].reshape(-1))


@dataclass(frozen=True)
class Read:
    """A region of the input that the whole operation has at `place`."""

    place: int
    region: Region


@dataclass(frozen=True, eq=False)
class Piece:
    """The operation that computes a region of a result, and exactly what it reads for that.

    An array among `inputs` is a constant; None is an omitted input. `outputs` are the regions that
    it computes, of each output of the whole operation, and None those that it does not; the region
    that was asked for may be inside of one. An empty `kind` is that of the whole operation, and
    `Identity` says that the result is what is read.
    """

    inputs: tuple[Read | np.ndarray | None, ...]
    outputs: tuple[Region | None, ...]
    attributes: Mapping[str, Any]
    kind: str = ""

    @classmethod
    def of(
        cls,
        op: Op,
        reads: Sequence[Region | None],
        outputs: Mapping[int, Region],
        constants: Mapping[int, np.ndarray] | None = None,
        **attributes: Any,
    ) -> "Piece":
        """The same type of operation with `reads` of the inputs of `op`, in their order.

        `constants` replace the inputs at some places, and `attributes` are changed; None removes
        one.
        """
        inputs: list[Read | np.ndarray | None] = [
            None if region is None else Read(place, region) for place, region in enumerate(reads)
        ]
        for place, array in (constants or {}).items():
            inputs[place] = array
        changed = {**op.attributes, **attributes}
        return cls(
            tuple(inputs),
            tuple(outputs.get(index) for index in range(len(op.outputs))),
            {name: value for name, value in changed.items() if value is not None},
        )

    @classmethod
    def alias(cls, op: Op, place: int, read: Region, index: int, region: Region) -> "Piece":
        """The piece that computes nothing: its result is a region of an input."""
        outputs = tuple(region if i == index else None for i in range(len(op.outputs)))
        return cls((Read(place, read),), outputs, {}, "Identity")


def refused(op: Op, why: str, axis: int | None = None) -> SplitRefused:
    """The error that says why `op` is not cut, or not along one axis of its result."""
    where = "" if axis is None else f" along axis {axis}"
    return SplitRefused(f"{op} cannot be cut{where}: {why}")


def keep(op: Op, index: int, region: Region, axes: Iterable[int], why: str) -> None:
    """
    Raises
    ------
    SplitRefused
        The region has not all of one of `axes` of the result.
    """
    cut = region.cuts(op.output(index).shape)
    for axis in axes:
        if axis in cut:
            raise refused(op, why, axis)


def wholes(op: Op) -> list[Region | None]:
    """All of each input."""
    return [None if tensor is None else Region.whole(tensor.shape) for tensor in op.inputs]


def whole_piece(op: Op) -> Piece:
    """The operation as it is."""
    written = {i: Region.whole(t.shape) for i, t in enumerate(op.outputs) if t is not None}
    return Piece.of(op, wholes(op), written)


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
    result `reference` computes. `examples` are graphs of one operation in ONNX's text, which every
    cut is tested on.
    """

    package = "hetsched.operations"
    onnx_types: ClassVar[tuple[str, ...]] = ()
    is_view: ClassVar[bool] = False
    defined: ClassVar[tuple[str, ...]] = ()
    examples: ClassVar[tuple[str, ...]] = ()

    def flops(self, op: Op) -> int:
        return sum(tensor.size for tensor in op.writes[:1])

    def read_nbytes(self, op: Op, tensor: Tensor) -> int:
        """How much `op` reads of `tensor`, one of its inputs."""
        return tensor.nbytes

    def piece(self, op: Op, index: int, region: Region, known: Known) -> Piece:
        """The operation that computes `region` of the output at `index`, which is not all of it.

        Raises
        ------
        SplitRefused
            A box of the result does not come from boxes of the inputs.
        """
        if op.kind not in ELEMENTWISE or op.domain:
            raise refused(op, "its results have no known regions")
        return elementwise(op, region)

    def depth(self, op: Op) -> int:
        """How many terms each element of the result is a sum of: the size of the contracted axis.

        Raises
        ------
        SplitRefused
            It is no such sum.
        """
        raise refused(op, "it is no sum over an axis")

    def term(self, op: Op, first: int, last: int, known: Known) -> Piece:
        """The operation that adds up only the terms from `first` to before `last`.

        What is added once, such as a bias, goes with the first term.

        Raises
        ------
        SplitRefused
            It is no such sum.
        """
        raise refused(op, "it is no sum over an axis")

    def reference(
        self, call: Call, inputs: Sequence[Any], compiler: Compiler = interpreted
    ) -> tuple[np.ndarray, ...]:
        """The results by definition; an omitted optional input is None.

        The loops that do the work go through `compiler`.
        """
        raise NotImplementedError(f"{call.kind} has no reference")


def elementwise(op: Op, region: Region) -> Piece:
    """The piece of an operation whose inputs broadcast to its one result."""
    reads = [None if t is None else region.operand(t.shape) for t in op.inputs]
    if op.kind == "CastLike":
        # Of the second only the type counts; its shape may be any.
        reads[1] = Region.whole(op.input(1).shape)
    return Piece.of(op, reads, {0: region})


def piece_of(op: Op, index: int, region: Region, known: Known) -> Piece:
    """The operation that computes `region` of the output of `op` at `index`.

    Raises
    ------
    SplitRefused
        A box of the result does not come from boxes of the inputs.
    """
    if region.covers(op.output(index).shape):
        return whole_piece(op)
    return operation_of(op).piece(op, index, region, known)


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
