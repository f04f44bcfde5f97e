"""What a graph is made of: tensors and the operations between them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from types import MappingProxyType
from typing import Any

from hetsched.dtype import ALIGNMENT, itemsize


@dataclass(frozen=True)
class Tensor:
    """A value with its static shape; `dtype` is numpy's name of it, such as `float32`.

    Examples
    --------
    >>> Tensor("x", (1, 3, 8, 8), "float32").nbytes
    768
    """

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        """The number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * itemsize(self.dtype)

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(map(str, self.shape))}]"


def can_adjoin(shape: Sequence[int], axis: int, nbytes: Sequence[int]) -> bool:
    """Whether pieces along an axis, of so many bytes, lie one behind the other and start aligned.

    Examples
    --------
    >>> can_adjoin((1, 64, 28, 28), 1, [100352, 100352])
    True
    >>> can_adjoin((1, 64, 28, 28), 2, [100352, 100352])
    False
    """
    aligned = all(size % ALIGNMENT == 0 for size in nbytes[:-1])
    return aligned and prod(shape[:axis]) == 1


def in_blocks(shape: Sequence[int], lanes: int) -> tuple[int, ...]:
    """The shape [n, c / lanes, pixels, lanes] that a tensor [n, c, ...] has in blocks of channels.

    What fills the last block up may be anything finite.

    Examples
    --------
    >>> in_blocks((1, 24, 28, 28), 16)
    (1, 2, 784, 16)
    """
    batch, channels, *image = shape
    return (batch, -(-channels // lanes), prod(image), lanes)


@dataclass(frozen=True, eq=False)
class Op:
    """One ONNX node: `kind` is its op type, None an omitted optional input or output.

    Attributes are plain values: int, float, str, bytes, a tuple of these, a numpy array, or the
    serialised protobuf of a nested graph.
    """

    name: str
    kind: str
    inputs: tuple[Tensor | None, ...]
    outputs: tuple[Tensor | None, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    domain: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "attributes", MappingProxyType(dict(self.attributes)))

    @property
    def reads(self) -> tuple[Tensor, ...]:
        """The inputs that are there, each once, in order."""
        return tuple(dict.fromkeys(tensor for tensor in self.inputs if tensor is not None))

    @property
    def writes(self) -> tuple[Tensor, ...]:
        """The outputs that are there."""
        return tuple(tensor for tensor in self.outputs if tensor is not None)

    def has_input(self, index: int) -> bool:
        return index < len(self.inputs) and self.inputs[index] is not None

    def input(self, index: int) -> Tensor:
        """The input at `index`; only for an input that the operation requires."""
        tensor = self.inputs[index]
        assert tensor is not None, f"{self} has no input {index}"
        return tensor

    def output(self, index: int = 0) -> Tensor:
        tensor = self.outputs[index]
        assert tensor is not None, f"{self} has no output {index}"
        return tensor

    def __str__(self) -> str:
        prefix = f"{self.domain}." if self.domain else ""
        return f"{prefix}{self.kind} '{self.name}'"
