"""TVM's runtime: its threads, and its tensors on the memory of numpy arrays.

Importing this file loads TVM, which takes a second and 200 MB; a target imports it when it first
compiles or loads.
"""

import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryFile
from typing import Any

import numpy as np

from hetsched.dtype import numpy_dtype

# Read by the runtime when a thread first computes. Idle workers sleep instead of spinning, as other
# devices of the machine compute beside them, and stay on the cores that the calling thread has.
os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", "0")
os.environ.setdefault("TVM_BIND_THREADS", "0")
# The most that `use_threads` can ask for; TVM's own default is half of the cores.
os.environ.setdefault("TVM_NUM_THREADS", str(os.cpu_count() or 1))

import tvm
import tvm_ffi

# What generated code may assume of a buffer's address.
ALIGNMENT = 64

# TVM has no base class for what it raises: its C++ checks become the kinds of tvm.error (which are
# RuntimeErrors) or plain ones, and its Python code fails in whatever way an unforeseen value makes
# it fail.
ERRORS: tuple[type[Exception], ...] = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    BufferError,
    LookupError,
    MemoryError,
    NameError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)

WARNING = re.compile(rb"\[\d\d:\d\d:\d\d\] \S+:\d+: Warning: ")
_stderr = threading.RLock()
_configure_threads = tvm.get_global_func("runtime.config_threadpool")
_of_thread = threading.local()
# The runtime's mode in which it uses as many workers as it is told to, whatever cores there are.
_ALL_CORES = 0


def first_line(error: BaseException) -> str:
    """The first line of what TVM says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


@contextmanager
def quiet() -> Iterator[None]:
    """Drops the warnings that TVM's C++ code writes to stderr while it compiles.

    Anything else that is written there meanwhile, by any thread, is passed on at the end.
    """
    with _stderr, TemporaryFile() as caught:
        original = os.dup(2)
        os.dup2(caught.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(original, 2)
            caught.seek(0)
            rest = b"".join(line for line in caught if not WARNING.match(line))
            if rest:
                os.write(original, rest)
            os.close(original)


def use_threads(count: int) -> None:
    """Makes kernels that the calling thread runs from now on use `count` threads."""
    if getattr(_of_thread, "count", None) != count:
        _configure_threads(_ALL_CORES, count)
        _of_thread.count = count


def to_tvm(array: np.ndarray, dtype: np.dtype) -> Any:
    """A tensor of TVM with the values of `array`, of which `dtype` is the type in native order.

    It uses the array's memory, and keeps it alive, where that is contiguous and aligned, read-only
    or not; else it has a copy.
    """
    if array.dtype != dtype or not array.flags.c_contiguous or array.ctypes.data % ALIGNMENT:
        array = _aligned_copy(array, dtype)
    if dtype.isbuiltin == 1:
        lent = array if array.flags.writeable else np.asarray(_Writable(array, dtype))
        return tvm_ffi.from_dlpack(lent)
    # DLPack of numpy has no narrow floats: they travel as unsigned integers of their size.
    bits: Any = tvm_ffi.from_dlpack(np.asarray(_Writable(array, np.dtype(f"u{dtype.itemsize}"))))
    return bits._create_view(bits.shape, dtype.name)


def to_numpy(tensor: Any) -> np.ndarray:
    """A tensor of TVM on the host as an array of the same memory, which keeps it alive."""
    dtype = numpy_dtype(str(tensor.dtype))
    if dtype.isbuiltin == 1:
        return np.from_dlpack(tensor)
    bits = tensor._create_view(tensor.shape, f"uint{8 * dtype.itemsize}")
    return np.from_dlpack(bits).view(dtype)


def _aligned_copy(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    nbytes = array.size * dtype.itemsize
    memory = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    copy = memory[start : start + nbytes].view(dtype).reshape(array.shape)
    copy[...] = array
    return copy


class _Writable:
    """Lends an array's memory to DLPack, which refuses arrays that are read-only.

    TVM does not write to what a kernel reads.
    """

    def __init__(self, array: np.ndarray, dtype: np.dtype) -> None:
        self._array = array
        self.__array_interface__: dict[str, Any] = {
            "data": (array.ctypes.data, False),
            "shape": array.shape,
            "typestr": dtype.str,
            "version": 3,
        }
