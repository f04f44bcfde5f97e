"""CUDA's driver without a device: memory of the host, and kernels that are Python functions.

It checks what a driver would: that addresses lie in memory that is allocated, that a thread has
a context, that copies go through pinned memory. What is started takes place as late as it may: when
somebody waits for it, stream by stream, so that memory that is used again too soon gives wrong
values. `calls` tells all.
"""
# The names are CUDA's.
# ruff: noqa: N802

from collections.abc import Callable, Mapping
from ctypes import addressof, c_char, c_uint64, memmove, string_at
from time import perf_counter
from typing import Any

import numpy as np

from hetsched.cuda.devices import (
    BUS_BITS,
    CACHE_NBYTES,
    CLOCK_KHZ,
    GROUP_ITEMS,
    LOCAL_NBYTES,
    MAJOR,
    MEMORY_KHZ,
    MINOR,
    UNITS,
)

NAMES = {
    1: b"CUDA_ERROR_INVALID_VALUE",
    2: b"CUDA_ERROR_OUT_OF_MEMORY",
    100: b"CUDA_ERROR_NO_DEVICE",
    209: b"CUDA_ERROR_NO_BINARY_FOR_GPU",
    500: b"CUDA_ERROR_NOT_FOUND",
    700: b"CUDA_ERROR_ILLEGAL_ADDRESS",
}
INVALID_VALUE, OUT_OF_MEMORY, NO_DEVICE, NOT_FOUND, NOT_READY = 1, 2, 100, 500, 600
FIRST_ADDRESS = 0x7F00_0000_0000

# Of a kernel: what its pointers point to, as bytes that it may change.
Function = Callable[..., None]


class FakeCuda:
    """The library. `failing` has statuses to answer with, by the function, once each."""

    def __init__(self, kernels: Mapping[str, Function], memory_nbytes: int = 1 << 30) -> None:
        self.calls: list[str] = []
        self.failing: dict[str, int] = {}
        self.count = 1
        self._kernels = kernels
        self._left = memory_nbytes
        self._total = memory_nbytes
        self._memory: dict[int, np.ndarray] = {}
        self._pinned: dict[int, Any] = {}
        self._functions: list[str] = []
        self._events: list[float] = []
        # What is still to be done on each stream, and the stream that is to pass an event.
        self._streams: dict[int, list[Callable[[], None]]] = {}
        self._recorded: dict[int, int] = {}
        self._next = FIRST_ADDRESS

    def __getattr__(self, name: str) -> Callable[..., int]:
        if not name.startswith("cu"):
            raise AttributeError(name)
        function = getattr(self, f"_{name}")

        def call(*arguments: Any) -> int:
            self.calls.append(name)
            if name in self.failing:
                return self.failing.pop(name)
            return function(*arguments) or 0

        return call

    @property
    def held_nbytes(self) -> int:
        return self._total - self._left

    def _cuInit(self, flags: int) -> int:
        return 0 if self.count else NO_DEVICE

    def _cuGetErrorName(self, status: int, text: Any) -> None:
        text._obj.value = NAMES.get(status)

    def _cuDriverGetVersion(self, found: Any) -> None:
        found._obj.value = 13000

    def _cuDeviceGetCount(self, found: Any) -> None:
        found._obj.value = self.count

    def _cuDeviceGet(self, found: Any, number: Any) -> None:
        found._obj.value = 7

    def _cuDeviceGetName(self, text: Any, size: int, device: Any) -> None:
        text.value = b"A device of paper"

    def _cuDeviceTotalMem_v2(self, found: Any, device: Any) -> None:
        found._obj.value = self._total

    def _cuDeviceGetAttribute(self, found: Any, which: int, device: Any) -> None:
        found._obj.value = {
            GROUP_ITEMS: 1024,
            LOCAL_NBYTES: 48 << 10,
            CLOCK_KHZ: 1_000_000,
            UNITS: 10,
            MEMORY_KHZ: 1_000_000,
            BUS_BITS: 128,
            CACHE_NBYTES: 1 << 20,
            MAJOR: 8,
            MINOR: 7,
        }[which]

    def _cuDevicePrimaryCtxRetain(self, found: Any, device: Any) -> None:
        found._obj.value = 11

    def _cuCtxSetCurrent(self, context: Any) -> int:
        return 0 if context.value == 11 else INVALID_VALUE

    def _cuStreamCreate(self, found: Any, flags: Any) -> None:
        found._obj.value = 21 + len(self._streams)
        self._streams[21 + len(self._streams)] = []

    def _later(self, stream: Any, what: Callable[[], None]) -> None:
        self._streams[stream.value].append(what)

    def _pass(self, event: int) -> None:
        """Does what a stream has to do, as far as an event."""
        while event in self._recorded:
            self._streams[self._recorded[event]].pop(0)()

    def _cuStreamSynchronize(self, stream: Any) -> None:
        while self._streams[stream.value]:
            self._streams[stream.value].pop(0)()

    def _cuStreamWaitEvent(self, stream: Any, event: Any, flags: Any) -> None:
        number = event.value
        self._later(stream, lambda: self._pass(number))

    def _cuEventCreate(self, found: Any, flags: Any) -> None:
        self._events.append(0.0)
        found._obj.value = len(self._events)

    def _cuEventDestroy_v2(self, event: Any) -> None:
        assert event.value

    def _cuEventRecord(self, event: Any, stream: Any) -> None:
        number = event.value
        self._recorded[number] = stream.value

        def passed() -> None:
            self._events[number - 1] = perf_counter()
            self._recorded.pop(number, None)

        self._later(stream, passed)

    def _cuEventSynchronize(self, event: Any) -> None:
        self._pass(event.value)

    def _cuEventQuery(self, event: Any) -> int:
        return NOT_READY if event.value in self._recorded else 0

    def _cuEventElapsedTime(self, found: Any, start: Any, end: Any) -> None:
        found._obj.value = (self._events[end.value - 1] - self._events[start.value - 1]) * 1e3

    def _cuMemAlloc_v2(self, found: Any, size: Any) -> int:
        if size.value > self._left:
            return OUT_OF_MEMORY
        self._left -= size.value
        # What was in memory before means nothing.
        self._memory[self._next] = np.full(size.value, 0xA5, np.uint8)
        found._obj.value = self._next
        self._next += -(-size.value // 512) * 512 + 512
        return 0

    def _cuMemFree_v2(self, address: Any) -> None:
        # As the driver does.
        for stream in self._streams.values():
            while stream:
                stream.pop(0)()
        self._left += self._memory.pop(address.value).size

    def _cuMemHostAlloc(self, found: Any, size: Any, flags: Any) -> None:
        block = (c_char * size.value)()
        self._pinned[addressof(block)] = block
        found._obj.value = addressof(block)

    def _cuMemcpyHtoDAsync_v2(self, to: Any, source: Any, size: Any, stream: Any) -> None:
        assert source.value in self._pinned
        target, pinned, nbytes = self._bytes(to.value), source.value, size.value

        def copy() -> None:
            target[:nbytes] = np.frombuffer(string_at(pinned, nbytes), np.uint8)

        self._later(stream, copy)

    def _cuMemcpyDtoHAsync_v2(self, to: Any, source: Any, size: Any, stream: Any) -> None:
        assert to.value in self._pinned
        pinned, given, nbytes = to.value, self._bytes(source.value), size.value
        self._later(stream, lambda: memmove(pinned, given[:nbytes].tobytes(), nbytes))

    def _cuMemcpyDtoDAsync_v2(self, to: Any, source: Any, size: Any, stream: Any) -> None:
        target, given, nbytes = self._bytes(to.value), self._bytes(source.value), size.value

        def copy() -> None:
            target[:nbytes] = given[:nbytes]

        self._later(stream, copy)

    def _cuModuleLoadData(self, found: Any, code: bytes) -> None:
        assert code
        found._obj.value = 31

    def _cuModuleUnload(self, module: Any) -> None:
        assert module.value == 31

    def _cuModuleGetFunction(self, found: Any, module: Any, name: bytes) -> int:
        if name.decode() not in self._kernels:
            return NOT_FOUND
        self._functions.append(name.decode())
        found._obj.value = len(self._functions)
        return 0

    def _cuFuncSetAttribute(self, function: Any, which: Any, value: Any) -> None:
        pass

    def _cuLaunchKernel(self, function: Any, *given: Any) -> None:
        *sizes, _, stream, addresses, extra = given
        assert extra is None
        grid, block = ([size.value for size in part] for part in (sizes[:3], sizes[3:]))
        values = [c_uint64.from_address(address).value for address in addresses]
        kernel = self._kernels[self._functions[function.value - 1]]
        memories = list(map(self._bytes, values))
        self._later(stream, lambda: kernel(grid, block, *memories))

    def _bytes(self, address: int) -> np.ndarray:
        """What lies from an address on, to the end of its memory."""
        for start, memory in self._memory.items():
            if start <= address < start + memory.size:
                return memory[address - start :]
        raise AssertionError(f"no memory at {address:#x}")
