"""Element types: one table of their ONNX code, size and the tolerance of a comparison."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from math import prod

import numpy as np
from onnx import TensorProto, helper

from hetsched.errors import ModelError

STRING = "string"
# What generated code may assume of a buffer's address.
ALIGNMENT = 64
# Below it is quicker to take what numpy gives.
LEAST_ALIGNED_NBYTES = 4096


@dataclass(frozen=True)
class Tolerance:
    """How far a result may be from the reference: `relative` to the largest magnitude in it.

    Zero means bit-exact.
    """

    relative: float


# Integer and bool paths are exact; a wider gap would hide a wrong kernel. The float ones are of the
# output's peak: fp32 sums in another order differ by 1e-5 of it in deep networks.
TOLERANCES = {
    "float64": Tolerance(1e-9),
    "float32": Tolerance(1e-4),
    "float16": Tolerance(1e-2),
    "bfloat16": Tolerance(4e-2),
}
EXACT = Tolerance(0.0)


def tolerance(dtype: str) -> Tolerance:
    return TOLERANCES.get(dtype, EXACT)


@cache
def numpy_dtype(dtype: str) -> np.dtype:
    """The numpy type of a dtype name; strings are objects."""
    if dtype == STRING:
        return np.dtype(object)
    found: np.dtype = helper.tensor_dtype_to_np_dtype(onnx_code(dtype))
    return found


@cache
def _codes() -> dict[str, int]:
    codes = {STRING: int(TensorProto.STRING)}
    for code in TensorProto.DataType.values():
        if code not in (TensorProto.UNDEFINED, TensorProto.STRING):
            codes[np.dtype(helper.tensor_dtype_to_np_dtype(code)).name] = code
    return codes


@cache
def onnx_code(dtype: str) -> int:
    """The `TensorProto.DataType` of a dtype name."""
    return _codes()[dtype]


@cache
def dtype_name(code: int) -> str:
    """The dtype name of a `TensorProto.DataType`."""
    for name, known in _codes().items():
        if known == code:
            return name
    raise ModelError(f"element type {code} is not one that ONNX defines")


@cache
def itemsize(dtype: str) -> int:
    """Bytes of one element; a string counts as a pointer."""
    return numpy_dtype(dtype).itemsize


def raw_bytes(array: np.ndarray) -> memoryview:
    """The elements in order, as bytes; no copy if they lie like that. Not for strings."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array without values, aligned if it is large enough for that to count."""
    nbytes = prod(shape) * dtype.itemsize
    if nbytes < LEAST_ALIGNED_NBYTES:
        return np.empty(shape, dtype)
    memory = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -memory.__array_interface__["data"][0] % ALIGNMENT
    return memory[start : start + nbytes].view(dtype).reshape(shape)


def new(shape: tuple[int, ...], dtype: np.dtype) -> Callable[[], np.ndarray]:
    """What makes such arrays as `empty` does, again and again."""
    small = prod(shape) * dtype.itemsize < LEAST_ALIGNED_NBYTES
    return partial(np.empty if small else empty, shape, dtype)


def empty_nbytes(nbytes: int) -> int:
    """What `empty` asks for, for an array of so many bytes."""
    return nbytes if nbytes < LEAST_ALIGNED_NBYTES else nbytes + ALIGNMENT
