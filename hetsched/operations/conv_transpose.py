"""Transposed convolution: the gradient of a convolution, used to enlarge."""

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from hetsched.op import Op
from hetsched.operation import Call, Compiler, Operation, interpreted, prange
from hetsched.operations._arithmetic import sum_dtype
from hetsched.operations._window import AXES, Axes, Window, lifted, resized, volume


def transposed_convolution(
    x: np.ndarray,
    w: np.ndarray,
    strides: Axes,
    dilations: Axes,
    group: int,
) -> np.ndarray:
    """y[n, m, p * stride + k * dilation] = sum over c of x[n, c, p] * w[c, m, k], all p and k.

    p and k run over three axes, c over the input channels of the group of m, and m in `w` counts
    within its group. The result is whole: padding has still to be cut off.
    """
    depth = (x.shape[2] - 1) * strides[0] + (w.shape[2] - 1) * dilations[0] + 1
    height = (x.shape[3] - 1) * strides[1] + (w.shape[3] - 1) * dilations[1] + 1
    width = (x.shape[4] - 1) * strides[2] + (w.shape[4] - 1) * dilations[2] + 1
    channels = x.shape[1] // group
    y = np.zeros((x.shape[0], w.shape[1] * group, depth, height, width), x.dtype)
    for m in prange(w.shape[1] * group):
        first = m // w.shape[1] * channels
        for n in range(x.shape[0]):
            for c in range(first, first + channels):
                for i in range(w.shape[2]):
                    for j in range(w.shape[3]):
                        for k in range(w.shape[4]):
                            for p in range(x.shape[2]):
                                for q in range(x.shape[3]):
                                    for r in range(x.shape[4]):
                                        y[
                                            n,
                                            m,
                                            p * strides[0] + i * dilations[0],
                                            q * strides[1] + j * dilations[1],
                                            r * strides[2] + k * dilations[2],
                                        ] += x[n, c, p, q, r] * w[c, m % w.shape[1], i, j, k]
    return y


class ConvTranspose(Operation):
    """Each input element adds its multiple of a filter to the output."""

    onnx_types = ("ConvTranspose",)
    defined = onnx_types

    def flops(self, op: Op) -> int:
        products = 2 * op.input(0).size * prod(op.input(1).shape[1:])
        return products + op.output().size * int(op.has_input(2))

    def reference(
        self, call: Call, inputs: Sequence[Any], compiler: Compiler = interpreted
    ) -> tuple[np.ndarray, ...]:
        x, w, bias = (*inputs, None)[:3]
        wide = sum_dtype(x.dtype)
        # The padding of the convolution whose gradient this is; SAME is worked out below.
        attributes = {**call.attributes, "auto_pad": "NOTSET"}
        window = Window.of(attributes, w.shape[2:], x.shape[2:])
        whole = compiler(transposed_convolution)(
            volume(x.astype(wide)),
            volume(w.astype(wide)),
            window.strides,
            window.dilations,
            call.attributes.get("group") or 1,
        )
        heads, sizes = _border(call, window, whole.shape[2:], x.shape[2:])
        y = resized(whole, [-head for head in heads], sizes)
        y = y.reshape(*y.shape[:2], *sizes[AXES - (x.ndim - 2) :])
        if bias is not None:
            y = y + bias.astype(wide).reshape(-1, *(1,) * (x.ndim - 2))
        return (y.astype(x.dtype),)


def _border(
    call: Call, window: Window, whole: Sequence[int], inputs: Sequence[int]
) -> tuple[list[int], list[int]]:
    """How much of the whole result is cut off at its head, and the size that is left."""
    rank = len(inputs)
    extra = lifted(call.attributes.get("output_padding") or [0] * rank, absent=0)
    mode = call.attributes.get("auto_pad") or "NOTSET"
    wanted = call.attributes.get("output_shape")
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
