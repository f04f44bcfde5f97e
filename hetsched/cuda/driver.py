"""CUDA's driver API, by ctypes.

The driver comes with its library, of which hetsched needs some thirty functions that take numbers
and addresses, and whose names have meant the same since CUDA 4. So no package has to be installed,
and none has to fit the driver's version. Tests put others in the place of the library.
"""

from collections.abc import Callable, Mapping
from ctypes import CDLL, byref, c_char_p, c_int
from functools import cache
from typing import Any

from hetsched.errors import (
    BuildError,
    DeviceError,
    DeviceLost,
    HetschedError,
    OutOfMemory,
    PartError,
)

LIBRARIES = ("libcuda.so.1", "libcuda.so", "nvcuda.dll")
SUCCESS, NOT_READY = 0, 600

# What a name of CUDA's means to who has to do something about it.
MEANINGS: Mapping[str, tuple[type[DeviceError] | type[PartError], str]] = {
    "CUDA_ERROR_OUT_OF_MEMORY": (OutOfMemory, "the device is out of memory"),
    "CUDA_ERROR_NO_DEVICE": (DeviceError, "the driver finds no device"),
    "CUDA_ERROR_INVALID_DEVICE": (DeviceError, "there is no such device"),
    "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH": (DeviceError, "driver and kernel module differ"),
    "CUDA_ERROR_SYSTEM_NOT_READY": (DeviceError, "the driver is not ready"),
    "CUDA_ERROR_DEVICE_UNAVAILABLE": (DeviceLost, "another process has the device to itself"),
    "CUDA_ERROR_NO_BINARY_FOR_GPU": (BuildError, "its code is for another device"),
    "CUDA_ERROR_INVALID_IMAGE": (BuildError, "its code is damaged"),
    "CUDA_ERROR_INVALID_PTX": (BuildError, "the driver's compiler refuses it"),
    "CUDA_ERROR_UNSUPPORTED_PTX_VERSION": (BuildError, "the driver is older than its compiler"),
    "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES": (PartError, "a group needs more than a unit has"),
    "CUDA_ERROR_LAUNCH_TIMEOUT": (PartError, "a kernel ran into the driver's time limit"),
    # After these nothing works in this process any more.
    "CUDA_ERROR_ILLEGAL_ADDRESS": (DeviceLost, "a kernel read or wrote where nothing is"),
    "CUDA_ERROR_LAUNCH_FAILED": (DeviceLost, "a kernel failed"),
    "CUDA_ERROR_ASSERT": (DeviceLost, "a kernel failed"),
    "CUDA_ERROR_MISALIGNED_ADDRESS": (DeviceLost, "a kernel read from an address that is not even"),
    "CUDA_ERROR_ECC_UNCORRECTABLE": (DeviceLost, "the device's memory is defect"),
    "CUDA_ERROR_HARDWARE_STACK_ERROR": (DeviceLost, "the device is lost"),
    "CUDA_ERROR_CONTEXT_IS_DESTROYED": (DeviceLost, "the device is lost"),
    "CUDA_ERROR_DEINITIALIZED": (DeviceLost, "the driver has shut down"),
    "CUDA_ERROR_UNKNOWN": (DeviceLost, "the device is lost"),
}


class Failed(HetschedError):
    """What the driver answers with, in words; `code` is its name of it."""

    def __init__(self, code: str, what: str) -> None:
        self.code = code
        self._kind: type[DeviceError] | type[PartError]
        self._kind, meaning = MEANINGS.get(code, (PartError, "the driver refuses"))
        super().__init__(f"{what}: {meaning} ({code})")

    def of(self, where: str, device: str) -> HetschedError:
        """The error of the kind that a user meets, with what failed and on which device."""
        message, kind = f"{where} on '{device}': {self}", self._kind
        return kind(message, device) if issubclass(kind, DeviceError) else kind(message)


class Driver:
    """The functions of a library as methods that raise `Failed`; arguments are those of ctypes.

    Others of Python's threads go on while a function runs.
    """

    def __init__(self, library: Any) -> None:
        self._library = library

    def call(self, function: str, *arguments: Any, what: str = "a call") -> None:
        """
        Raises
        ------
        Failed
            The driver's status is not success.
        """
        status = int(getattr(self._library, function)(*arguments))
        if status != SUCCESS:
            raise Failed(self._name(status), what)

    def number(self, function: str, *arguments: Any, what: str = "a call") -> int:
        """What a function writes to its first argument, an int."""
        found = c_int()
        self.call(function, byref(found), *arguments, what=what)
        return found.value

    def made(self, function: str, kind: Callable[[], Any], *arguments: Any, what: str) -> Any:
        """The object of a `kind` of ctypes that a function fills in, its first argument."""
        found = kind()
        self.call(function, byref(found), *arguments, what=what)
        return found

    def is_over(self, event: Any) -> bool:
        """Whether what was recorded before an event has ended, well or not."""
        return int(self._library.cuEventQuery(event)) != NOT_READY

    def _name(self, status: int) -> str:
        text = c_char_p()
        self._library.cuGetErrorName(status, byref(text))
        return text.value.decode() if text.value else f"status {status}"


@cache
def library() -> Any:
    """The driver's library, or None where none is installed."""
    for name in LIBRARIES:
        try:
            return CDLL(name)
        except OSError:
            continue
    return None


@cache
def driver() -> Driver:
    """The driver of this machine, initialised.

    Raises
    ------
    DeviceError
        There is none, or it has no device.
    """
    found = library()
    if found is None:
        raise DeviceError("no CUDA driver: libcuda.so.1 is not installed")
    there = Driver(found)
    try:
        there.call("cuInit", 0, what="the CUDA driver does not start")
    except Failed as error:
        raise DeviceError(str(error)) from None
    return there
