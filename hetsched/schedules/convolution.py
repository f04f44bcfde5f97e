"""Convolutions of blocked tensors, their weights packed when they are compiled.

Importing this file loads TVM's compiler.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from tvm import te, tirx

from hetsched.schedules.cycles import Window, phase_window
from hetsched.schedules.rules import Choice
from hetsched.schedules.vectors import Tile
from hetsched.schedules.window import attributes, padded, per_channel, windowed


@dataclass(frozen=True)
class Phases:
    """The phases of the `strides` of a transposed convolution, padded at top and left."""

    strides: tuple[int, int]
    padding: tuple[int, int]

    @property
    def count(self) -> int:
        return prod(self.strides)

    def shift(self, phase: Any) -> tuple[Any, Any]:
        """How many rows and columns further down and right a phase reads."""
        down, right = self.strides
        top, left = self.padding
        return (phase // right + top) // down, (phase % right + left) // right


def pack_dense(weights: np.ndarray, groups: int, lanes: int, *, plain: bool) -> np.ndarray:
    """Weights [o, c, h, w] of a group as [o / lanes, c / lanes, h, w, lanes of c, lanes of o].

    A reader of a `plain` tensor, or of fewer channels than lanes, has all channels in one block.
    Groups are padded each on its own.
    """
    channels = weights.shape[1]
    inner = channels if plain or channels < lanes else lanes
    grouped = weights.reshape(groups, -1, *weights.shape[1:])
    padded = np.pad(
        grouped, ((0, 0), (0, -grouped.shape[1] % lanes), (0, -channels % inner), (0, 0), (0, 0))
    )
    height, width = weights.shape[2:]
    blocked = padded.reshape(-1, lanes, padded.shape[2] // inner, inner, height, width)
    return np.ascontiguousarray(blocked.transpose(0, 2, 4, 5, 3, 1))


def pack_uneven(weights: np.ndarray, groups: int, lanes: int) -> np.ndarray:
    """Weights [o, c, h, w] of groups that are no whole blocks, as `pack_dense` has them.

    Each block of output channels has the blocks of input channels of its groups, as many as any
    has, from `first_block` on, and zeros between them.
    """
    outputs, inputs, height, width = weights.shape
    each, total = outputs // groups, -(-inputs * groups // lanes)
    blocks = [range(start, min(start + lanes, outputs)) for start in range(0, outputs, lanes)]
    reach = max(
        -(-(block[-1] // each + 1) * inputs // lanes) - block[0] // each * inputs // lanes
        for block in blocks
    )
    packed = np.zeros((len(blocks), reach, height, width, lanes, lanes), weights.dtype)
    for index, block in enumerate(blocks):
        start = first_block(index, each, inputs, total - reach, lanes, min) * lanes
        for lane, output in enumerate(block):
            place = output // each * inputs - start + np.arange(inputs)
            packed[index, place // lanes, :, :, place % lanes, lane] = weights[output]
    return packed


def first_block(
    block: Any, outputs: int, inputs: int, last: int, lanes: int, least: Callable[..., Any]
) -> Any:
    """Where a `block` of output channels starts to read, with so many channels in a group."""
    return least(block * lanes // outputs * inputs // lanes, last)


def interleave(packed: np.ndarray, choice: Choice[Tile]) -> np.ndarray:
    """Packed weights [o, c, h, w, lanes of c, lanes of o] in the order that tiles read them.

    The blocks of a tile stand before the lanes of o: one stream of memory instead of several.
    """
    apart = packed.reshape(-1, choice.candidate.vectors, *packed.shape[1:])
    return apart.transpose(0, 2, 3, 4, 5, 1, 6)


def pack_phases(weights: np.ndarray, window: Window, lanes: int) -> np.ndarray:
    """Weights [c, o, h, w] of a transposed convolution as those of a convolution.

    Each phase of the stride is a set of output channels of its own, filled up to whole vectors.
    """
    channels, outputs, height, width = weights.shape
    down, right = window.strides
    top, left = window.padding[:2]
    rows, columns = -(-height // down), -(-width // right)
    space = ((0, 0), (0, -outputs % lanes), (0, rows * down - height), (0, columns * right - width))
    padded = np.pad(weights, space)
    apart = padded.reshape(channels, -1, rows, down, columns, right)
    # A phase is that of the rows and columns of the result, which padding shifts.
    apart = np.roll(apart, (-(top % down), -(left % right)), (3, 5))
    turned = apart[:, :, ::-1, :, ::-1].transpose(3, 5, 1, 0, 2, 4)
    dense_weights = turned.reshape(-1, channels, rows, columns)
    return pack_dense(dense_weights, 1, lanes, plain=False)


def pack_depthwise(weights: np.ndarray, lanes: int) -> np.ndarray:
    """Weights [c, 1, h, w] as [c / lanes, h, w, lanes]."""
    padded = np.pad(weights[:, 0], ((0, -len(weights) % lanes), (0, 0), (0, 0)))
    blocked = padded.reshape(-1, lanes, *weights.shape[2:])
    return np.ascontiguousarray(blocked.transpose(0, 2, 3, 1))


def dense(
    x: Any,
    weights: Any,
    window: Window,
    groups: int,
    choice: Choice[Tile],
    *,
    plain: bool = False,
    uneven: tuple[int, int] | None = None,
    phases: Phases | None = None,
) -> Any:
    """A convolution with interleaved weights; of a `plain` [n, c, h, w] or a blocked tensor.

    `uneven` has the output and input channels of a group if those are no whole blocks. Of
    `phases`, each has an equal part of the output channels.
    """
    shares, inputs, height, width, inner, together, lanes = (int(dim) for dim in weights.shape)
    outputs = shares * together
    batch = int(x.shape[0])
    each = outputs // groups

    def start(o: Any) -> Any:
        if uneven is not None:
            return first_block(o, *uneven, int(x.shape[1]) - inputs, lanes, tirx.min)
        return o // each * inputs if groups > 1 else 0

    c = te.reduce_axis((0, inputs), "c")
    kh = te.reduce_axis((0, height), "kh")
    kw = te.reduce_axis((0, width), "kw")
    v = te.reduce_axis((0, inner), "v")
    axes = [c, kh, kw, v]
    if window.is_pointwise and not plain and phases is None:
        pixels = window.result[0] * window.result[1]
        whole = choice.candidate.covering(pixels)

        def pixel(p: Any) -> Any:
            return p if whole == pixels else tirx.min(p, pixels - 1)

        total = te.compute(
            (batch, outputs, whole, lanes),
            lambda n, o, p, u: te.sum(
                x[n, start(o) + c, pixel(p), v]
                * weights[o // together, c, 0, 0, v, o % together, u],
                axis=axes,
            ),
            name="convolved", attrs=attributes(choice),
        )  # fmt: skip
        if whole == pixels:
            return total
        return te.compute((batch, outputs, pixels, lanes), lambda *i: total[i], name="crop")
    furthest = (0, 0) if phases is None else phases.shift(phases.count - 1)
    read = padded(x, window, choice.candidate.covering(window.result[1]), furthest, plain=plain)

    def element(n: Any, o: Any, row: Any, column: Any, u: Any) -> Any:
        down, right = (0, 0) if phases is None else phases.shift(o // (outputs // phases.count))
        place = window.place(row + down, column + right, kh, kw)
        value = read(n, v, *place) if plain else read(n, start(o) + c, *place, v)
        return te.sum(value * weights[o // together, c, kh, kw, v, o % together, u], axis=axes)

    return windowed(element, (batch, outputs, lanes), window, choice)


def depthwise(x: Any, weights: Any, window: Window, choice: Choice[Tile]) -> Any:
    """Each channel with its own kernel."""

    def product(value: Any, inside: Any, o: Any, kh: Any, kw: Any, u: Any, axes: Any) -> Any:
        weight = weights[o, kh, kw, u]
        if inside is not None:
            # Rather of the weight, which pixels share, than of each pixel.
            weight = tirx.Select(inside, weight, tirx.const(0, "float32"))
        return te.sum(value * weight, axis=axes)

    return per_channel(x, window, choice, product)


def interleaved(x: Any, window: Window) -> Any:
    """The result of a transposed convolution of which `x` has the phases as channels."""
    batch, blocks, _, lanes = (int(dim) for dim in x.shape)
    down, right = window.strides
    height, width = window.result
    each = blocks // (down * right)
    columns = phase_window(window).result[1]

    def element(n: Any, o: Any, p: Any, u: Any) -> Any:
        row, column = p // width, p % width
        phase = row % down * right + column % right
        return x[n, phase * each + o, row // down * columns + column // right, u]

    return te.compute((batch, each, height * width, lanes), element, name="interleaved")
