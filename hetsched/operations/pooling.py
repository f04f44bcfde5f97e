"""Pools: a window's greatest element, mean or norm."""

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
)
from hetsched.operations._window import Axes, Window, cut_window, volume
from hetsched.region import Region


def greatest(
    x: np.ndarray,
    kernel: Axes,
    strides: Axes,
    dilations: Axes,
    heads: Axes,
    sizes: Axes,
    lowest: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """The greatest element under each place of the window, and where in its plane it is.

    Of equal elements the first counts; padding never does. `lowest` holds the least value of the
    type, the result where a window meets only padding.
    """
    shape = (x.shape[0], x.shape[1], sizes[0], sizes[1], sizes[2])
    y = np.empty(shape, x.dtype)
    place = np.empty(shape, np.int64)
    for plane in prange(x.shape[0] * x.shape[1]):
        n, c = plane // x.shape[1], plane % x.shape[1]
        for p in range(sizes[0]):
            for q in range(sizes[1]):
                best, found = y[n, c, p, q], place[n, c, p, q]
                best[:] = lowest[0]
                found[:] = -1
                for i in range(kernel[0]):
                    for j in range(kernel[1]):
                        d = p * strides[0] + i * dilations[0] - heads[0]
                        h = q * strides[1] + j * dilations[1] - heads[1]
                        if 0 <= d < x.shape[2] and 0 <= h < x.shape[3]:
                            row, before = x[n, c, d, h], (d * x.shape[3] + h) * x.shape[4]
                            for k in range(kernel[2]):
                                shift = k * dilations[2] - heads[2]
                                first, last = inside(shift, strides[2], sizes[2], len(row))
                                for r in range(first, last):
                                    w = r * strides[2] + shift
                                    # A choice and not a branch: no one can foretell it.
                                    greater = (found[r] < 0) | (row[w] > best[r])
                                    best[r] = row[w] if greater else best[r]
                                    found[r] = before + w if greater else found[r]
    return y, place


def inside(shift: int, stride: int, places: int, size: int) -> tuple[int, int]:
    """The first r, and the one behind the last, of which r * stride + shift is in range(size)."""
    first, last = -(shift // stride), (size - 1 - shift) // stride + 1
    return max(first, 0), min(last, places)


def mean(
    x: np.ndarray,
    kernel: Axes,
    strides: Axes,
    dilations: Axes,
    heads: Axes,
    tails: Axes,
    sizes: Axes,
    count_padding: bool,
) -> np.ndarray:
    """The mean under each place of the window, over its elements or also over the padding.

    What lies beyond the padding never counts.
    """
    y = np.zeros((x.shape[0], x.shape[1], sizes[0], sizes[1], sizes[2]), x.dtype)
    deep = counts(
        sizes[0], kernel[0], strides[0], dilations[0], heads[0], tails[0], x.shape[2], count_padding
    )
    high = counts(
        sizes[1], kernel[1], strides[1], dilations[1], heads[1], tails[1], x.shape[3], count_padding
    )
    wide = counts(
        sizes[2], kernel[2], strides[2], dilations[2], heads[2], tails[2], x.shape[4], count_padding
    )
    for plane in prange(x.shape[0] * x.shape[1]):
        n, c = plane // x.shape[1], plane % x.shape[1]
        for p in range(sizes[0]):
            for q in range(sizes[1]):
                sums = y[n, c, p, q]
                for i in range(kernel[0]):
                    for j in range(kernel[1]):
                        d = p * strides[0] + i * dilations[0] - heads[0]
                        h = q * strides[1] + j * dilations[1] - heads[1]
                        if 0 <= d < x.shape[2] and 0 <= h < x.shape[3]:
                            row = x[n, c, d, h]
                            for k in range(kernel[2]):
                                shift = k * dilations[2] - heads[2]
                                first, last = inside(shift, strides[2], sizes[2], len(row))
                                for r in range(first, last):
                                    sums[r] += row[r * strides[2] + shift]
                for r in range(sizes[2]):
                    sums[r] /= max(deep[p] * high[q] * wide[r], 1)
    return y


def counts(
    places: int,
    kernel: int,
    stride: int,
    dilation: int,
    head: int,
    tail: int,
    size: int,
    padding: bool,
) -> np.ndarray:
    """How many elements of the kernel are on the axis, at each place, or also on its padding."""
    low, high = (-head, size + tail) if padding else (0, size)
    found = np.zeros(places, np.int64)
    for p in range(places):
        for k in range(kernel):
            found[p] += low <= p * stride + k * dilation - head < high
    return found


class Pooling(Operation):
    """One result for each place of a window on each channel."""

    onnx_types = (
        "AveragePool",
        "GlobalAveragePool",
        "GlobalLpPool",
        "GlobalMaxPool",
        "LpPool",
        "MaxPool",
    )
    defined = ("AveragePool", "MaxPool")
    examples = (
        "(float[2,3,9,8] x) => (y) { y = MaxPool <kernel_shape=[3,2], strides=[2,1], "
        "pads=[1,0,1,1]> (x) }",
        "(float[1,2,10,9] x) => (y) { y = MaxPool <kernel_shape=[3,3], strides=[2,2], "
        "ceil_mode=1> (x) }",
        "(float[1,2,9,8] x) => (y) { y = MaxPool <kernel_shape=[2,2], dilations=[2,3]> (x) }",
        "(float[1,2,9,8] x) => (y) { y = AveragePool <kernel_shape=[3,3], strides=[2,2], "
        "pads=[1,1,1,1]> (x) }",
        "(float[1,2,10,8] x) => (y) { y = AveragePool <kernel_shape=[3,3], strides=[2,2], "
        "pads=[1,1,1,1], ceil_mode=1, count_include_pad=1> (x) }",
        "(float[1,2,7,8] x) => (y) { y = AveragePool <kernel_shape=[3,3], "
        'auto_pad="SAME_LOWER"> (x) }',
        "(float[1,2,12] x) => (y) { y = LpPool <kernel_shape=[3], strides=[2], pads=[1,1]> (x) }",
        "(float[2,4,3,3] x) => (y) { y = GlobalAveragePool (x) }",
        "(float[2,4,3,3] x) => (y) { y = GlobalMaxPool (x) }",
        "(float[2,4,3] x) => (y) { y = GlobalLpPool (x) }",
    )

    def flops(self, op: Op) -> int:
        # A norm takes a power of each element before it is added.
        each = 2 if op.kind.endswith("LpPool") else 1
        if op.kind.startswith("Global"):
            return each * op.input(0).size
        kernel: tuple[int, ...] = op.attributes["kernel_shape"]
        return each * op.output().size * prod(kernel)

    def piece(self, op: Op, index: int, region: Region, known: Known) -> Piece:
        """Any box; where the greatest element was cannot be told from a piece."""
        if index:
            raise refused(op, "the places of the greatest elements count in the whole input")
        shape = op.input(0).shape
        if op.kind.startswith("Global"):
            read = Region((*region.intervals[:2], *((0, size) for size in shape[2:])))
            return Piece.of(op, [read], {0: region})
        spatial, attributes = cut_window(op, region, op.attributes["kernel_shape"], shape)
        return Piece.of(op, [Region((*region.intervals[:2], *spatial))], {0: region}, **attributes)

    def reference(
        self, call: Call, inputs: Sequence[Any], compiler: Compiler = interpreted
    ) -> tuple[np.ndarray, ...]:
        (x,) = inputs
        wide = volume(x.astype(np.float32) if x.dtype.kind not in "iu" and x.itemsize < 4 else x)
        window = Window.of(call.attributes, call.attributes["kernel_shape"], x.shape[2:])
        sizes = window.positions(wide.shape[2:], ceil=bool(call.attributes.get("ceil_mode")))
        shape = (*x.shape[:2], *sizes[-(x.ndim - 2) :])
        if call.kind == "AveragePool":
            y = compiler(mean)(
                wide,
                window.kernel,
                window.strides,
                window.dilations,
                window.heads,
                window.tails,
                sizes,
                bool(call.attributes.get("count_include_pad")),
            )
            return (y.astype(x.dtype).reshape(shape),)
        y, place = compiler(greatest)(
            wide,
            window.kernel,
            window.strides,
            window.dilations,
            window.heads,
            sizes,
            _lowest(wide.dtype),
        )
        results = (y.astype(x.dtype).reshape(shape), _indices(place, call, x.shape).reshape(shape))
        return results[: call.results]


def _lowest(dtype: np.dtype) -> np.ndarray:
    return np.array([np.iinfo(dtype).min if dtype.kind in "iu" else -np.inf], dtype)


def _indices(place: np.ndarray, call: Call, shape: tuple[int, ...]) -> np.ndarray:
    """Places in a plane as places in the whole tensor, rows or columns first as the node says."""
    if call.attributes.get("storage_order"):
        position = np.unravel_index(place, shape[2:])
        place = np.ravel_multi_index(position, shape[2:], order="F")
    planes = np.arange(shape[0] * shape[1]).reshape(*shape[:2], 1, 1, 1)
    return place + planes * prod(shape[2:])
