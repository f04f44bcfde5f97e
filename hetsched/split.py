"""A split: operations of a graph computed in pieces, which devices can share or take in turn."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any


@dataclass(frozen=True)
class Exit:
    """How a result of a split is cut: at `bounds`, from 0 to its size, along each of some axes.

    Of two axes every pair of intervals is a piece, the last axis fastest. With `sum` there is one
    axis, that of the contraction of the operation that writes the tensor (its input channels, the
    k of a matrix product), and the pieces are added up.
    """

    tensor: str
    axes: tuple[tuple[int, tuple[int, ...]], ...]
    sum: bool = False

    @property
    def pieces(self) -> int:
        return prod(len(bounds) - 1 for _, bounds in self.axes)


@dataclass(frozen=True)
class Split:
    """`ops`, by name, computed in pieces: piece i makes the i-th piece of every exit.

    What a piece needs of the tensors inside follows from its exits, so that pieces may overlap
    inside (a halo) and never at the exits. All exits have as many pieces; each result of `ops`
    that is read outside is an exit.
    """

    ops: tuple[str, ...]
    exits: tuple[Exit, ...]

    @property
    def pieces(self) -> int:
        return self.exits[0].pieces

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "ops": list(self.ops),
            "exits": [
                {
                    "tensor": item.tensor,
                    "axes": [{"axis": axis, "bounds": list(bounds)} for axis, bounds in item.axes],
                    "sum": item.sum,
                }
                for item in self.exits
            ],
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Split":
        """The split that `to_dict` wrote."""
        return cls(
            tuple(map(str, content["ops"])),
            tuple(
                Exit(
                    str(item["tensor"]),
                    tuple(
                        (int(cut["axis"]), tuple(map(int, cut["bounds"]))) for cut in item["axes"]
                    ),
                    bool(item["sum"]),
                )
                for item in content["exits"]
            ),
        )
