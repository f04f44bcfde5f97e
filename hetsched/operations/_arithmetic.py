"""Matrix products and the types to sum them in, shared by the operations built on them."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from hetsched.operation import Compiler, prange


def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """c[n, i, j] = sum over k of a[n, i, k] * b[n, k, j], row by row, in the order of memory."""
    c = np.zeros((a.shape[0], a.shape[1], b.shape[2]), a.dtype)
    for i in prange(a.shape[1]):
        for n in range(a.shape[0]):
            for k in range(a.shape[2]):
                for j in range(b.shape[2]):
                    c[n, i, j] += a[n, i, k] * b[n, k, j]
    return c


def matrix_product(a: np.ndarray, b: np.ndarray, compiler: Compiler) -> np.ndarray:
    """The product over the last two axes, the others broadcast, as `numpy.matmul` has it.

    `a` and `b` are of one type, which is the type of the sums.
    """
    left = a[np.newaxis] if a.ndim == 1 else a
    right = b[:, np.newaxis] if b.ndim == 1 else b
    batch = np.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    shape = (*batch, left.shape[-2], right.shape[-1])
    if right.ndim == 2:
        # One matrix for the whole batch: its rows make one tall matrix.
        stacked = left.reshape(1, -1, left.shape[-1]), right[np.newaxis]
    else:
        stacked = _stacked(left, batch), _stacked(right, batch)
    c = compiler(product)(*stacked).reshape(shape)
    if a.ndim == 1:
        c = c[..., 0, :]
    return c[..., 0] if b.ndim == 1 else c


def sum_dtype(dtype: np.dtype) -> np.dtype:
    """The type to sum products of `dtype` in: at least float32, or int32."""
    if dtype.kind in "iu":
        return np.dtype(np.int32) if dtype.itemsize < 4 else dtype
    return dtype if dtype == np.float64 else np.dtype(np.float32)


def centred(x: np.ndarray, zero_point: np.ndarray | None) -> np.ndarray:
    """`x` less its zero point, which broadcasts, as int32."""
    wide = x.astype(np.int32)
    return wide if zero_point is None else wide - zero_point.astype(np.int32)


def requantised(
    sums: np.ndarray, scales: Sequence[np.ndarray], zero_point: np.ndarray
) -> np.ndarray:
    """`sums` times the scales of both factors over that of the result, to the nearest even.

    `scales` are of the first factor, of the second and of the result.
    """
    first, second, result = (scale.astype(np.float32) for scale in scales)
    limits = np.iinfo(zero_point.dtype)
    nearest = np.rint(sums.astype(np.float32) * (first * second / result))
    # Python would wrap around where a sum leaves the range.
    within: np.ndarray = np.clip(nearest + zero_point, limits.min, limits.max)
    return within.astype(zero_point.dtype)


def _stacked(x: np.ndarray, batch: tuple[int, ...]) -> Any:
    return np.broadcast_to(x, (*batch, *x.shape[-2:])).reshape(-1, *x.shape[-2:])
