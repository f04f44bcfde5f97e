"""Pooling of blocked tensors.

Importing this file loads TVM's compiler.
"""

from typing import Any

from tvm import te, tirx

from hetsched.schedules.cycles import Window
from hetsched.schedules.rules import Choice
from hetsched.schedules.vectors import Tile
from hetsched.schedules.window import attributes, per_channel

# Blocks whose sums take turns: each waits for its last addition.
MOST_SUMS = 8
LOWEST = -3.4028234663852886e38


def max_pool(x: Any, window: Window, choice: Choice[Tile]) -> Any:
    # The nearest pixel to one outside is of the window as well.
    return per_channel(
        x, window, choice, lambda value, inside, o, kh, kw, u, axes: te.max(value, axis=axes)
    )


def average_pool(x: Any, window: Window, choice: Choice[Tile], *, padding_counts: bool) -> Any:
    def share(value: Any, inside: Any, o: Any, kh: Any, kw: Any, u: Any, axes: Any) -> Any:
        if inside is not None:
            value = value * tirx.Select(inside, tirx.const(1, "float32"), tirx.const(0, "float32"))
        return te.sum(value, axis=axes)

    total = per_channel(x, window, choice, share)
    width = window.result[1]

    def count(p: Any) -> Any:
        if padding_counts or not any(window.padding):
            return tirx.const(window.kernel[0] * window.kernel[1], "float32")
        covered = []
        for axis, index in enumerate((p // width, p % width)):
            start = index * window.strides[axis] - window.padding[axis]
            end = tirx.min(start + window.kernel[axis], window.source[axis])
            covered.append(end - tirx.max(start, 0))
        return (covered[0] * covered[1]).astype("float32")

    return te.compute(total.shape, lambda n, o, p, u: total[n, o, p, u] / count(p), name="average")


def global_pool(x: Any) -> Any:
    """The mean of all pixels of each channel."""
    batch, blocks, pixels, lanes = (int(dim) for dim in x.shape)
    p = te.reduce_axis((0, pixels), "p")
    sums = next(count for count in range(MOST_SUMS, 0, -1) if blocks % count == 0)
    choice = Choice("", Tile(1, sums, 1.0), ())
    total = te.compute(
        (batch, blocks, 1, lanes), lambda n, o, _, u: te.sum(x[n, o, p, u], axis=[p]),
        name="sum", attrs=attributes(choice),
    )  # fmt: skip
    scale = tirx.const(1 / pixels, "float32")
    return te.compute(total.shape, lambda *i: total[i] * scale, name="mean")
