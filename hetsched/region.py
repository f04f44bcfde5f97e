"""A box of a tensor: what of it a piece of an operation reads or writes."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

Interval = tuple[int, int]


@dataclass(frozen=True)
class Region:
    """On each axis the elements from the first to before the last.

    Examples
    --------
    >>> rows = Region.whole((1, 8, 14, 14)).along(2, 0, 7)
    >>> rows.shape, str(rows)
    ((1, 8, 7, 14), '[0:1, 0:8, 0:7, 0:14]')
    >>> rows | rows.along(2, 5, 9)
    Region(intervals=((0, 1), (0, 8), (0, 9), (0, 14)))
    """

    intervals: tuple[Interval, ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> "Region":
        return cls(tuple((0, size) for size in shape))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(last - first for first, last in self.intervals)

    @property
    def size(self) -> int:
        """The number of elements."""
        return prod(self.shape)

    @property
    def slices(self) -> tuple[slice, ...]:
        """What numpy takes the region by."""
        return tuple(slice(first, last) for first, last in self.intervals)

    def along(self, axis: int, first: int, last: int) -> "Region":
        """The region with another interval on one axis."""
        changed = list(self.intervals)
        changed[axis] = (first, last)
        return Region(tuple(changed))

    def shifted(self, axis: int, by: int) -> "Region":
        first, last = self.intervals[axis]
        return self.along(axis, first + by, last + by)

    def covers(self, shape: Sequence[int]) -> bool:
        """Whether it is all of a tensor of this shape."""
        return all(
            interval == (0, size) for interval, size in zip(self.intervals, shape, strict=True)
        )

    def cuts(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The axes of a tensor of this shape that it has not all of."""
        pairs = enumerate(zip(self.intervals, shape, strict=True))
        return tuple(axis for axis, (interval, size) in pairs if interval != (0, size))

    def within(self, outer: "Region") -> "Region":
        """The region as counted from where `outer` begins."""
        pairs = zip(self.intervals, outer.intervals, strict=True)
        return Region(tuple((first - base, last - base) for (first, last), (base, _) in pairs))

    def operand(self, shape: Sequence[int]) -> "Region":
        """What of an operand of this shape, broadcast as numpy does, meets the region of a result.

        Examples
        --------
        >>> Region(((0, 1), (4, 8), (0, 9))).operand((8, 1))
        Region(intervals=((4, 8), (0, 1)))
        """
        tail = self.intervals[len(self.intervals) - len(shape) :]
        pairs = zip(tail, shape, strict=True)
        return Region(tuple((0, 1) if size == 1 else interval for interval, size in pairs))

    def __contains__(self, other: "Region") -> bool:
        pairs = zip(self.intervals, other.intervals, strict=True)
        return all(a[0] <= b[0] and b[1] <= a[1] for a, b in pairs)

    def __and__(self, other: "Region") -> "Region | None":
        """What both have; None if that is nothing."""
        pairs = zip(self.intervals, other.intervals, strict=True)
        both = tuple((max(a[0], b[0]), min(a[1], b[1])) for a, b in pairs)
        return Region(both) if all(first < last for first, last in both) else None

    def __or__(self, other: "Region") -> "Region":
        """The box around both."""
        pairs = zip(self.intervals, other.intervals, strict=True)
        return Region(tuple((min(a[0], b[0]), max(a[1], b[1])) for a, b in pairs))

    def __str__(self) -> str:
        return f"[{', '.join(f'{first}:{last}' for first, last in self.intervals)}]"


def boxes_of(regions: Iterable[Region]) -> list[Region]:
    """Boxes that hold all of `regions`, joined where that is no more elements.

    Examples
    --------
    >>> print(*boxes_of(Region((ends,)) for ends in [(0, 4), (6, 8), (2, 5)]))
    [6:8] [0:5]
    """
    found: list[Region] = []
    for region in dict.fromkeys(regions):
        # A box that grows may meet another.
        while True:
            other = next((b for b in found if (b | region).size <= b.size + region.size), None)
            if other is None:
                break
            found.remove(other)
            region = region | other
        found.append(region)
    return found
