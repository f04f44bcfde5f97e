"""Between plain tensors [n, c, h, w] and blocked ones [n, c / lanes, h * w, lanes].

Importing this file loads TVM's compiler.
"""

from collections.abc import Sequence
from typing import Any

from tvm import te, tirx


def pack(x: Any, lanes: int) -> Any:
    """A tensor [n, c, h, w] as a blocked one, filled up with zeros."""
    batch, channels, height, width = (int(dim) for dim in x.shape)
    blocks = -(-channels // lanes)

    def element(n: Any, o: Any, p: Any, u: Any) -> Any:
        value = x[n, o * lanes + u, p // width, p % width]
        if channels % lanes == 0:
            return value
        return tirx.if_then_else(o * lanes + u < channels, value, tirx.const(0, "float32"))

    return te.compute((batch, blocks, height * width, lanes), element, name="packed")


def cut(x: Any, starts: Sequence[int], shape: tuple[int, ...]) -> Any:
    """The box of `shape` of a blocked tensor that starts at these images, blocks and pixels."""
    image, block, pixel = starts
    return te.compute(shape, lambda n, o, p, u: x[n + image, o + block, p + pixel, u], name="cut")


def unpack(x: Any, shape: tuple[int, ...]) -> Any:
    """A blocked tensor as one of `shape`, [n, c, h, w]."""
    lanes, width = int(x.shape[3]), shape[3]
    return te.compute(
        shape, lambda n, c, h, w: x[n, c // lanes, h * width + w, c % lanes], name="unpacked"
    )
