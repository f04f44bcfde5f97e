"""Windows that slide over up to three spatial axes: the geometry of convolutions and pools."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hetsched.errors import ModelError
from hetsched.op import Op
from hetsched.operation import refused
from hetsched.region import Region

AXES = 3
# A value for each axis.
Axes = tuple[int, int, int]


@dataclass(frozen=True)
class Window:
    """A kernel, how it moves, and the padding at the head and tail of each spatial axis.

    There are always three axes: loops are written once, and a signal or an image is a volume whose
    first axes have size one.
    """

    kernel: Axes
    strides: Axes
    dilations: Axes
    heads: Axes
    tails: Axes

    @classmethod
    def of(
        cls, attributes: Mapping[str, Any], kernel: Sequence[int], sizes: Sequence[int]
    ) -> "Window":
        """The window over an input of spatial `sizes`, padded as the attributes of the node say."""
        rank = len(kernel)
        if rank > AXES:
            raise ModelError(f"a window over {rank} spatial axes; at most {AXES} are served")
        pads = attributes.get("pads") or [0] * (2 * rank)
        window = cls(
            kernel=lifted(kernel),
            strides=lifted(attributes.get("strides") or [1] * rank),
            dilations=lifted(attributes.get("dilations") or [1] * rank),
            heads=lifted(pads[:rank], absent=0),
            tails=lifted(pads[rank:], absent=0),
        )
        mode = attributes.get("auto_pad") or "NOTSET"
        return window if mode == "NOTSET" else window._automatic(mode, lifted(sizes))

    @property
    def extents(self) -> Axes:
        """How far the kernel reaches on each axis."""
        return _axes((k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True))

    def positions(self, sizes: Sequence[int], ceil: bool = False) -> Axes:
        """How many places the window takes on each axis of an input of these sizes.

        With `ceil` the last may reach beyond the padding, but must begin before its tail.
        """
        found = []
        for size, extent, stride, head, tail in zip(
            sizes, self.extents, self.strides, self.heads, self.tails, strict=True
        ):
            room = head + size + tail - extent
            steps = -(-room // stride) if ceil else room // stride
            if ceil and steps * stride >= head + size:
                steps -= 1
            found.append(steps + 1)
        return _axes(found)

    def seen(self, axis: int, first: int, last: int, size: int) -> tuple[int, int, int, int]:
        """What the places from `first` to before `last` see of an axis of `size` elements.

        The first element and the one behind the last, and the padding before and behind them that
        these places reach.
        """
        start = first * self.strides[axis] - self.heads[axis]
        end = (last - 1) * self.strides[axis] - self.heads[axis] + self.extents[axis]
        low, high = max(start, 0), min(end, size)
        return low, high, low - start, end - high

    def _automatic(self, mode: str, sizes: Sequence[int]) -> "Window":
        totals = [0] * AXES
        if mode != "VALID":
            totals = [
                max(0, (-(-size // stride) - 1) * stride + extent - size)
                for size, stride, extent in zip(sizes, self.strides, self.extents, strict=True)
            ]
        heads = _axes(t // 2 if mode == "SAME_UPPER" else t - t // 2 for t in totals)
        tails = _axes(total - head for total, head in zip(totals, heads, strict=True))
        return Window(self.kernel, self.strides, self.dilations, heads, tails)


def cut_window(
    op: Op, region: Region, kernel: Sequence[int], shape: Sequence[int]
) -> tuple[list[tuple[int, int]], dict[str, Any]]:
    """What the spatial axes of `region` of the result see of an input of `shape`, and how.

    The attributes say the padding, which is only where the input ends.

    Raises
    ------
    SplitRefused
        They see nothing but padding.
    """
    sizes, rank = shape[2:], len(kernel)
    window = Window.of(op.attributes, kernel, sizes)
    heads, tails = list(window.heads[AXES - rank :]), list(window.tails[AXES - rank :])
    intervals = [(0, size) for size in sizes]
    beyond = False
    cut = region.cuts(op.output().shape)
    for axis in range(rank):
        first, last = region.intervals[axis + 2]
        low, high, head, tail = window.seen(AXES - rank + axis, first, last, sizes[axis])
        # The last place may reach beyond the padding, where their number was rounded up.
        beyond = beyond or tail > tails[axis]
        if axis + 2 not in cut:
            continue
        if low >= high:
            raise refused(op, f"places {first} to {last} see nothing but padding", axis + 2)
        intervals[axis], heads[axis], tails[axis] = (low, high), head, min(tail, tails[axis])
    changed: dict[str, Any] = {"pads": (*heads, *tails), "auto_pad": None}
    if "ceil_mode" in op.attributes:
        changed["ceil_mode"] = int(beyond)
    return intervals, changed


def grouped(
    op: Op, first: int, last: int, filters: int, inputs: int
) -> tuple[tuple[int, int], int]:
    """The input channels that output channels depend on, and how many groups these make.

    A group has so many `filters` and `inputs`.

    Raises
    ------
    SplitRefused
        They are some of one group and some of another.
    """
    if first % filters == 0 and last % filters == 0:
        groups = last // filters - first // filters
        return (first // filters * inputs, last // filters * inputs), groups
    start = first // filters
    if last > (start + 1) * filters:
        raise refused(op, f"channels {first} to {last} cut groups of {filters}", 1)
    return (start * inputs, (start + 1) * inputs), 1


def lifted(values: Sequence[int], absent: int = 1) -> Axes:
    """One value for each of the three axes, `absent` for those that are not there."""
    return _axes((absent,) * (AXES - len(values)) + tuple(values))


def volume(x: np.ndarray) -> np.ndarray:
    """`x` with three spatial axes behind its first two."""
    return x.reshape(*x.shape[:2], *lifted(x.shape[2:]))


def resized(x: np.ndarray, heads: Sequence[int], sizes: Sequence[int], fill: int = 0) -> np.ndarray:
    """A volume of spatial `sizes` with `x` at `heads`, cut where it sticks out."""
    whole = np.full((*x.shape[:2], *sizes), fill, x.dtype)
    source, sink = [slice(None)] * 2, [slice(None)] * 2
    for head, size, old in zip(heads, sizes, x.shape[2:], strict=True):
        first, last = max(head, 0), min(head + old, size)
        sink.append(slice(first, max(first, last)))
        source.append(slice(first - head, max(first, last) - head))
    whole[tuple(sink)] = x[tuple(source)]
    return whole


def _axes(values: Iterable[int]) -> Axes:
    depth, height, width = values
    return depth, height, width
