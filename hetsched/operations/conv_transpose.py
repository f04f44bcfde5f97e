"""Transposed convolution: the gradient of a convolution, used to enlarge."""

from collections.abc import Mapping, Sequence
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
from hetsched.operations._arithmetic import matrix_product, sum_dtype
from hetsched.operations._window import AXES, Axes, Window, grouped, lifted, resized, volume
from hetsched.region import Region


def scattered(
    products: np.ndarray, kernel: Axes, sizes: Axes, strides: Axes, dilations: Axes
) -> np.ndarray:
    """y[n, p * stride + k * dilation] = sum over k of products[n, k, p]; p and k run over 3 axes.

    `sizes` are those of p. The result is whole: padding has still to be cut off.
    """
    depth = (sizes[0] - 1) * strides[0] + (kernel[0] - 1) * dilations[0] + 1
    height = (sizes[1] - 1) * strides[1] + (kernel[1] - 1) * dilations[1] + 1
    width = (sizes[2] - 1) * strides[2] + (kernel[2] - 1) * dilations[2] + 1
    y = np.zeros((products.shape[0], depth, height, width), products.dtype)
    for n in prange(products.shape[0]):
        for i in range(kernel[0]):
            for j in range(kernel[1]):
                for k in range(kernel[2]):
                    tap = (i * kernel[1] + j) * kernel[2] + k
                    for p in range(sizes[0]):
                        for q in range(sizes[1]):
                            start = (p * sizes[1] + q) * sizes[2]
                            row = y[n, p * strides[0] + i * dilations[0]]
                            line = row[q * strides[1] + j * dilations[1]]
                            for r in range(sizes[2]):
                                line[r * strides[2] + k * dilations[2]] += products[
                                    n, tap, start + r
                                ]
    return y


class ConvTranspose(Operation):
    """Each input element adds its multiple of a filter to the output."""

    onnx_types = ("ConvTranspose",)
    defined = onnx_types
    examples = (
        "(float[2,3,4,5] x, float[3,4,3,2] w, float[4] b) => (y) { y = ConvTranspose "
        "<strides=[2,3], pads=[1,0,0,1], output_padding=[1,0]> (x, w, b) }",
        "(float[1,4,6] x, float[4,3,2] w) => (y) { y = ConvTranspose <group=2, strides=[3], "
        "dilations=[2]> (x, w) }",
        "(float[1,2,5,4] x, float[2,3,4,4] w) => (y) { y = ConvTranspose "
        '<auto_pad="SAME_UPPER", strides=[2,2]> (x, w) }',
    )

    def flops(self, op: Op) -> int:
        products = 2 * op.input(0).size * prod(op.input(1).shape[1:])
        return products + op.output().size * int(op.has_input(2))

    def piece(self, op: Op, index: int, region: Region, known: Known) -> Piece:
        """Any rows and batches, and output channels of whole groups or within one group."""
        x, w = op.input(0), op.input(1)
        group = op.attributes.get("group", 1)
        batch, (first, last) = region.intervals[:2]
        channels, groups = grouped(op, first, last, w.shape[1], w.shape[0] // group)
        rank = len(w.shape) - 2
        attributes = {**op.attributes, "auto_pad": "NOTSET"}
        window = Window.of(attributes, w.shape[2:], x.shape[2:])
        whole = [
            (size - 1) * stride + extent
            for size, stride, extent in zip(
                lifted(x.shape[2:]), window.strides, window.extents, strict=True
            )
        ]
        heads, _ = _border(op.attributes, window, whole, x.shape[2:])
        spatial, pads, extra = [], [], []
        for axis in range(AXES - rank, AXES):
            low, high = region.intervals[2 + axis - AXES + rank]
            stride, extent = window.strides[axis], window.extents[axis]
            size = x.shape[2 + axis - AXES + rank]
            # The first element that reaches the first row, or else the one before it.
            start = -(-(low + heads[axis] - extent + 1) // stride)
            start = max(0, min(start, (low + heads[axis]) // stride, size - 1))
            end = max(start + 1, min(size, (high - 1 + heads[axis]) // stride + 1))
            head = low - (start * stride - heads[axis])
            tail = (end - 1) * stride - heads[axis] + extent - high
            if head < 0 or tail <= -stride or head >= (end - 1 - start) * stride + extent:
                raise refused(op, f"rows {low} to {high} are out of reach", axis - AXES + rank + 2)
            spatial.append((start, end))
            pads.append((head, max(tail, 0)))
            extra.append(max(-tail, 0))
        reads: list[Region | None] = [
            Region((batch, channels, *spatial)),
            Region.whole(w.shape).along(0, *channels),
        ]
        if groups == 1:
            start = first // w.shape[1] * w.shape[1]
            reads[1] = (
                Region.whole(w.shape).along(0, *channels).along(1, first - start, last - start)
            )
        if op.has_input(2):
            reads.append(Region(((first, last),)))
        return Piece.of(
            op,
            reads,
            {0: region},
            group=groups,
            pads=(*(head for head, _ in pads), *(tail for _, tail in pads)),
            output_padding=tuple(extra),
            output_shape=None,
            auto_pad=None,
        )

    def reference(
        self, call: Call, inputs: Sequence[Any], compiler: Compiler = interpreted
    ) -> tuple[np.ndarray, ...]:
        x, w, bias = (*inputs, None)[:3]
        wide = sum_dtype(x.dtype)
        # The padding of the convolution whose gradient this is; SAME is worked out below.
        attributes = {**call.attributes, "auto_pad": "NOTSET"}
        window = Window.of(attributes, w.shape[2:], x.shape[2:])
        whole = _transposed(volume(x.astype(wide)), volume(w.astype(wide)), window, call, compiler)
        heads, sizes = _border(call.attributes, window, whole.shape[2:], x.shape[2:])
        y = resized(whole, [-head for head in heads], sizes)
        y = y.reshape(*y.shape[:2], *sizes[AXES - (x.ndim - 2) :])
        if bias is not None:
            y = y + bias.astype(wide).reshape(-1, *(1,) * (x.ndim - 2))
        return (y.astype(x.dtype),)


def _transposed(
    x: np.ndarray, w: np.ndarray, window: Window, call: Call, compiler: Compiler
) -> np.ndarray:
    """y[n, m, p * stride + k * dilation] = sum over k, c of x[n, c, p] * w[c, m, k].

    c runs over the input channels of the group of m; m in `w` counts within its group. The sums
    over c are matrix products.
    """
    group = call.attributes.get("group") or 1
    batch, filters = x.shape[0], w.shape[1]
    sizes = lifted(x.shape[2:])
    channels, taps, places = w.shape[0] // group, prod(window.kernel), prod(sizes)
    left = w.reshape(group, channels, filters * taps).swapaxes(1, 2)
    right = x.reshape(batch, group, channels, places)
    products = matrix_product(left, right, compiler)
    whole = compiler(scattered)(
        products.reshape(batch * group * filters, taps, places),
        window.kernel,
        sizes,
        window.strides,
        window.dilations,
    )
    return whole.reshape(batch, group * filters, *whole.shape[1:])


def _border(
    attributes: Mapping[str, Any], window: Window, whole: Sequence[int], inputs: Sequence[int]
) -> tuple[list[int], list[int]]:
    """How much of the whole result is cut off at its head, and the size that is left."""
    rank = len(inputs)
    extra = lifted(attributes.get("output_padding") or [0] * rank, absent=0)
    mode = attributes.get("auto_pad") or "NOTSET"
    wanted = attributes.get("output_shape")
    if wanted:
        # Some files give batch and channels too.
        wanted = lifted(wanted[-rank:])
    elif mode in ("SAME_UPPER", "SAME_LOWER"):
        wanted = tuple(
            size * stride for size, stride in zip(lifted(inputs), window.strides, strict=True)
        )
    else:
        cut = zip(whole, extra, window.heads, window.tails, strict=True)
        return list(window.heads), [size + more - head - tail for size, more, head, tail in cut]
    totals = [
        max(0, size + more - want) for size, more, want in zip(whole, extra, wanted, strict=True)
    ]
    heads = [total // 2 if mode == "SAME_UPPER" else total - total // 2 for total in totals]
    return heads, list(wanted)
