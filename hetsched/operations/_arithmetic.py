"""Matrix products and the types to sum them in, shared by the operations built on them."""

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from hetsched.operation import Compiler, prange

# A panel is so many rows and columns of the second factor, laid out apart to stay in the cache.
DEPTH = 256
COLUMNS = 256
# So many rows of the result take turns at a few rows of the panel: the first cache has both.
ROWS = 16
# Beside a tile of the result, so many rows pay for the panel's layout.
HEIGHT = 128
# Elements to a turn of the unrolled vector loop; rows are padded to it, as its rest is slow.
TURN = 64
CACHE_LINE = 64


def add_product(c: np.ndarray, a: np.ndarray, b: np.ndarray, first: int) -> None:
    """c[i, j] += sum over k of a[i, first + k] * b[k, j], one k after another.

    Four terms are added on each visit of a row. A product may be added before it is rounded.
    """
    fours = len(b) - len(b) % 4
    for top in range(0, len(c), ROWS):
        bottom = min(top + ROWS, len(c))
        for k in range(0, fours, 4):
            b0, b1, b2, b3 = b[k], b[k + 1], b[k + 2], b[k + 3]
            for i in range(top, bottom):
                a0, a1 = a[i, first + k], a[i, first + k + 1]
                a2, a3 = a[i, first + k + 2], a[i, first + k + 3]
                row = c[i]
                for j in range(len(row)):
                    row[j] = row[j] + a0 * b0[j] + a1 * b1[j] + a2 * b2[j] + a3 * b3[j]
        for k in range(fours, len(b)):
            last = b[k]
            for i in range(top, bottom):
                factor, row = a[i, first + k], c[i]
                for j in range(len(row)):
                    row[j] += factor * last[j]


def padded_zeros(rows: int, columns: int, dtype: Any) -> np.ndarray:
    """A matrix of zeros from the start of a cache line on, its rows padded to `TURN`.

    A vector across two lines takes two loads.
    """
    width = (columns + TURN - 1) // TURN * TURN
    whole = np.zeros(rows * width + CACHE_LINE, dtype)
    start = -whole.ctypes.data % CACHE_LINE // whole.itemsize
    return whole[start : start + rows * width].reshape(rows, width)


def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """c[n, i, j] = sum over k of a[n, i, k] * b[n, k, j], tile by tile, in the order of k."""
    batch, rows, depth = a.shape
    columns = b.shape[2]
    c = np.empty((batch, rows, columns), a.dtype)
    down = (rows + HEIGHT - 1) // HEIGHT
    across = (columns + COLUMNS - 1) // COLUMNS
    for tile in prange(batch * down * across):
        n = tile // (down * across)
        top, left = tile // across % down * HEIGHT, tile % across * COLUMNS
        bottom, width = min(top + HEIGHT, rows), min(COLUMNS, columns - left)
        sums = padded_zeros(bottom - top, width, a.dtype)
        panel = padded_zeros(min(DEPTH, depth), width, a.dtype)
        for first in range(0, depth, DEPTH):
            used = min(DEPTH, depth - first)
            for k in range(used):
                for j in range(width):
                    panel[k, j] = b[n, first + k, left + j]
            add_product(sums, a[n, top:bottom], panel[:used], first)
        for i in range(bottom - top):
            for j in range(width):
                c[n, top + i, left + j] = sums[i, j]
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
        stacked = left.reshape(1, prod(left.shape[:-1]), left.shape[-1]), right[np.newaxis]
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
    return np.broadcast_to(x, (*batch, *x.shape[-2:])).reshape(prod(batch), *x.shape[-2:])
