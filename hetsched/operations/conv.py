"""Convolution."""

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from hetsched.op import Op
from hetsched.operation import (
    Call,
    Compiler,
    Known,
    Operation,
    Piece,
    interpreted,
    prange,
    refused,
    wholes,
)
from hetsched.operations._arithmetic import (
    COLUMNS,
    DEPTH,
    HEIGHT,
    add_product,
    centred,
    padded_zeros,
    requantised,
    sum_dtype,
)
from hetsched.operations._window import Axes, Window, cut_window, grouped, resized, volume
from hetsched.region import Region


def convolution(
    x: np.ndarray,
    w: np.ndarray,
    strides: Axes,
    dilations: Axes,
    group: int,
) -> np.ndarray:
    """y[n, m, p] = sum over c, k of x[n, first(m) + c, p * stride + k * dilation] * w[m, c, k].

    `x` is padded; p and k run over three axes. An output channel m sees the input channels of its
    group, from first(m) on. The places p are taken in blocks: what the terms (c, k) of the sum see
    from there are the rows of a panel, and the weights times the panel are the block of y. Terms
    are added in the order of memory of w.
    """
    depth = (x.shape[2] - (w.shape[2] - 1) * dilations[0] - 1) // strides[0] + 1
    height = (x.shape[3] - (w.shape[3] - 1) * dilations[1] - 1) // strides[1] + 1
    width = (x.shape[4] - (w.shape[4] - 1) * dilations[2] - 1) // strides[2] + 1
    plane, row = x.shape[3] * x.shape[4], x.shape[4]
    channel = x.shape[2] * plane
    place = offsets(
        (1, depth, height, width), (0, strides[0] * plane, strides[1] * row, strides[2])
    )
    term = offsets(w.shape[1:], (channel, dilations[0] * plane, dilations[1] * row, dilations[2]))
    elements, weights = x.reshape(x.size), w.reshape(w.shape[0], len(term))
    filters = w.shape[0] // group
    y = np.empty((x.shape[0], w.shape[0], len(place)), x.dtype)
    down = (filters + HEIGHT - 1) // HEIGHT
    across = (len(place) + COLUMNS - 1) // COLUMNS
    for tile in prange(x.shape[0] * group * down * across):
        n, g = tile // (group * down * across), tile // (down * across) % group
        top, left = g * filters + tile // across % down * HEIGHT, tile % across * COLUMNS
        bottom, many = min(top + HEIGHT, (g + 1) * filters), min(COLUMNS, len(place) - left)
        start = (n * x.shape[1] + g * w.shape[1]) * channel
        sums = padded_zeros(bottom - top, many, x.dtype)
        panel = padded_zeros(min(DEPTH, len(term)), many, x.dtype)
        for first in range(0, len(term), DEPTH):
            used = min(DEPTH, len(term) - first)
            for t in range(used):
                seen = start + term[first + t]
                for p in range(many):
                    panel[t, p] = elements[seen + place[left + p]]
            add_product(sums, weights[top:bottom], panel[:used], first)
        for m in range(bottom - top):
            for p in range(many):
                y[n, top + m, left + p] = sums[m, p]
    return y.reshape(x.shape[0], w.shape[0], depth, height, width)


def offsets(counts: tuple[int, ...], steps: tuple[int, ...]) -> np.ndarray:
    """How far in memory each element of a grid of four axes is from the first, in their order."""
    found = np.empty(counts, np.int64)
    for c in range(counts[0]):
        for i in range(counts[1]):
            for j in range(counts[2]):
                for k in range(counts[3]):
                    found[c, i, j, k] = c * steps[0] + i * steps[1] + j * steps[2] + k * steps[3]
    return found.reshape(found.size)


# Where the input and the weights are, and what has a value for each output channel.
PLACES: dict[str, tuple[int, int, tuple[int, ...]]] = {
    "Conv": (0, 1, (2,)),
    "ConvInteger": (0, 1, (3,)),
    "QLinearConv": (0, 3, (4, 5, 8)),
}


class Conv(Operation):
    """Each output channel is a filter over all input channels of its group."""

    onnx_types = ("Conv", "ConvInteger", "QLinearConv")
    defined = onnx_types
    examples = (
        "(float[2,4,9,8] x, float[6,4,3,2] w, float[6] b) => (y) { y = Conv <pads=[1,0,2,1], "
        "strides=[2,1], dilations=[1,2]> (x, w, b) }",
        "(float[1,4,6,5] x, float[6,2,3,3] w) => (y) { y = Conv <group=2, pads=[1,1,1,1]> (x, w) }",
        "(float[1,6,9,7] x, float[6,1,3,3] w, float[6] b) => (y) { y = Conv <group=6, "
        'auto_pad="SAME_UPPER", strides=[2,2]> (x, w, b) }',
        "(float[2,3,11] x, float[4,3,5] w) => (y) { y = Conv <pads=[2,2]> (x, w) }",
        "(float[1,2,5,4,6] x, float[3,2,2,3,3] w) => (y) { y = Conv <pads=[0,1,1,1,1,1]> (x, w) }",
        "(uint8[1,3,6,6] x, int8[4,3,3,3] w) => (y) <uint8 z = {3}> { y = ConvInteger "
        "<pads=[1,1,1,1]> (x, w, z) }",
        "(uint8[1,4,6,6] x, int8[4,2,3,3] w, int32[4] b) => (y) <float s = {0.02}, uint8 z = "
        "{9}, float[4] t = {0.1, 0.2, 0.3, 0.4}, int8[4] o = {0, 0, 0, 0}> { y = QLinearConv "
        "<group=2, pads=[1,1,1,1]> (x, s, z, w, t, o, s, z, b) }",
    )

    def flops(self, op: Op) -> int:
        weight = op.input(3 if op.kind == "QLinearConv" else 1)
        bias = {"Conv": 2, "QLinearConv": 8}.get(op.kind)
        additions = int(bias is not None and op.has_input(bias))
        return op.output().size * (2 * prod(weight.shape[1:]) + additions)

    def piece(self, op: Op, index: int, region: Region, known: Known) -> Piece:
        """Any rows and batches, and output channels of whole groups or within one group."""
        data, filters, by_channel = PLACES[op.kind]
        x, w = op.input(data), op.input(filters)
        batch, (first, last) = region.intervals[:2]
        spatial, attributes = cut_window(op, region, w.shape[2:], x.shape)
        group = op.attributes.get("group", 1)
        channels, groups = grouped(op, first, last, w.shape[0] // group, w.shape[1])
        if groups != group:
            attributes["group"] = groups
        reads = wholes(op)
        reads[data] = Region((batch, channels, *spatial))
        reads[filters] = Region.whole(w.shape).along(0, first, last)
        for place in by_channel:
            if op.has_input(place) and op.input(place).size == w.shape[0] > 1:
                reads[place] = Region(((first, last),))
        return Piece.of(op, reads, {0: region}, **attributes)

    def depth(self, op: Op) -> int:
        if op.kind == "QLinearConv" or op.attributes.get("group", 1) != 1:
            raise refused(op, "its input channels are of several groups, or its sums are rounded")
        return op.input(0).shape[1]

    def term(self, op: Op, first: int, last: int, known: Known) -> Piece:
        reads = wholes(op)
        for place in (0, 1):
            reads[place] = Region.whole(op.input(place).shape).along(1, first, last)
        if op.kind == "Conv" and first:
            reads = reads[:2]
        return Piece.of(op, reads, {0: Region.whole(op.output().shape)})

    def reference(
        self, call: Call, inputs: Sequence[Any], compiler: Compiler = interpreted
    ) -> tuple[np.ndarray, ...]:
        if call.kind == "Conv":
            x, w, bias = (*inputs, None)[:3]
            wide = sum_dtype(x.dtype)
            y = _convolved(x.astype(wide, copy=False), w.astype(wide, copy=False), call, compiler)
            if bias is not None:
                y = y + _by_channel(bias, y.ndim).astype(wide)
            return (y.astype(x.dtype),)
        if call.kind == "ConvInteger":
            x, w, x_zero, w_zero = (*inputs, None, None)[:4]
            return (
                _convolved(
                    centred(x, x_zero), centred(w, _by_filter(w_zero, w.ndim)), call, compiler
                ),
            )
        x, x_scale, x_zero, w, w_scale, w_zero, y_scale, y_zero, bias = (*inputs, None)[:9]
        y = _convolved(centred(x, x_zero), centred(w, _by_filter(w_zero, w.ndim)), call, compiler)
        if bias is not None:
            y = y + _by_channel(bias, y.ndim)
        return (requantised(y, (x_scale, _by_channel(w_scale, y.ndim), y_scale), y_zero),)


def _convolved(x: np.ndarray, w: np.ndarray, call: Call, compiler: Compiler) -> np.ndarray:
    window = Window.of(call.attributes, w.shape[2:], x.shape[2:])
    whole = volume(x)
    sizes = [
        head + size + tail
        for head, size, tail in zip(window.heads, whole.shape[2:], window.tails, strict=True)
    ]
    padded = resized(whole, window.heads, sizes)
    group = call.attributes.get("group") or 1
    y = compiler(convolution)(padded, volume(w), window.strides, window.dilations, group)
    return y.reshape(*y.shape[:2], *y.shape[-(x.ndim - 2) :])


def _by_channel(values: np.ndarray, rank: int) -> np.ndarray:
    """One value, or one for each output channel, to broadcast over an output."""
    return values.reshape(-1, *(1,) * (rank - 2))


def _by_filter(values: np.ndarray | None, rank: int) -> np.ndarray | None:
    """One value, or one for each output channel, to broadcast over the weights."""
    return None if values is None else values.reshape(-1, *(1,) * (rank - 1))
