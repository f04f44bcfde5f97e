"""TVM's runtime: its threads, and its tensors on the memory of numpy arrays.

Importing this file loads TVM, which takes a second and 200 MB; a target imports it when it first
compiles or loads.
"""

import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import CDLL, Structure, byref, c_char, c_size_t, c_uint64, c_void_p
from tempfile import TemporaryFile
from typing import IO, Any

import numpy as np

from hetsched.dtype import ALIGNMENT, numpy_dtype

# Read by the runtime when a thread first computes. Idle workers yield so many times, about 0.1 ms,
# and then sleep: the next kernel mostly comes sooner and waking takes longer than many kernels, but
# other devices compute beside them. They stay on the cores of the calling thread.
os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", "200")
os.environ.setdefault("TVM_BIND_THREADS", "0")
# The most that `use_threads` can ask for; TVM's own default is half of the cores.
os.environ.setdefault("TVM_NUM_THREADS", str(os.cpu_count() or 1))

import tvm
import tvm_ffi

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
_configure_threads = tvm.get_global_func("runtime.config_threadpool")
_of_thread = threading.local()
_ffi = CDLL(tvm_ffi.libinfo.find_libtvm_ffi())
# The runtime's mode in which it uses as many workers as it is told to, whatever cores there are.
_ALL_CORES = 0


def first_line(error: BaseException) -> str:
    """The first line of what TVM says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


class _Raised(Structure):
    """The head of TVM's error object: three words of an object, then kind and message."""

    _fields_ = (
        ("object", 3 * c_uint64),
        ("kind", c_void_p),
        ("kind_nbytes", c_size_t),
        ("message", c_void_p),
        ("message_nbytes", c_size_t),
    )


def raised() -> str:
    """The first line of the error that code left on the calling thread, which forgets it.

    Empty if there is none.
    """
    handle = c_void_p()
    _ffi.TVMFFIErrorMoveFromRaised(byref(handle))
    if not handle.value:
        return ""
    found = _Raised.from_address(handle.value)
    text = bytes((c_char * found.message_nbytes).from_address(found.message))
    _ffi.TVMFFIObjectDecRef(handle)
    return text.decode(errors="replace").strip().partition("\n")[0]


class _Stderr:
    """The file that stands in for stderr while anything compiles, and who does."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._original = -1
        self._caught: IO[bytes] | None = None

    def enter(self) -> None:
        with self._lock:
            if not self._inside:
                self._caught = TemporaryFile()  # noqa: SIM115
                self._original = os.dup(2)
                os.dup2(self._caught.fileno(), 2)
            self._inside += 1

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside or self._caught is None:
                return
            os.dup2(self._original, 2)
            with self._caught as caught:
                caught.seek(0)
                rest = b"".join(line for line in caught if not WARNING.match(line))
            if rest:
                os.write(self._original, rest)
            os.close(self._original)


_stderr = _Stderr()


@contextmanager
def quiet() -> Iterator[None]:
    """Drops the warnings that TVM's C++ code writes to stderr while it compiles.

    Anything else that is written there meanwhile, by any thread, is passed on when the last of
    those who are inside leaves.
    """
    _stderr.enter()
    try:
        yield
    finally:
        _stderr.leave()


def use_threads(count: int) -> None:
    """Makes kernels that the calling thread runs from now on use `count` threads."""
    before = getattr(_of_thread, "count", None)
    if before == count:
        return
    if before is None or count > 1:
        # The first time, the thread gets as many workers as any later count may need.
        _configure_threads(_ALL_CORES, count)
    if count == 1:
        # Told of one core, the runtime runs loops at once instead of handing them to its pool.
        _configure_threads(_ALL_CORES, count, ["0"])
    _of_thread.count = count


def to_tvm(array: np.ndarray, dtype: np.dtype) -> Any:
    """A tensor of TVM with the values of `array`, of which `dtype` is the type in native order.

    It uses the array's memory, and keeps it alive, where that is contiguous and aligned, read-only
    or not; else it has a copy.
    """
    array = aligned(array, dtype)
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


def address(array: np.ndarray) -> int:
    """Where the values of a contiguous array begin."""
    # The quick way is three times as quick, which counts for small networks.
    if array.flags.writeable and array.dtype.isbuiltin == 1:
        return int(tvm_ffi.from_dlpack(array).data_ptr())
    return array.ctypes.data


def aligned(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """`array` if it is of `dtype`, contiguous and aligned, else a copy that is."""
    if array.dtype != dtype or not array.flags.c_contiguous or array.ctypes.data % ALIGNMENT:
        array = aligned_copy(array, dtype)
    return array


def aligned_copy(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A copy of `array` that is of `dtype`, contiguous and aligned."""
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
