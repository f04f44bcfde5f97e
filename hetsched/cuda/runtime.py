"""Runs programs of launches on CUDA devices, by the driver alone.

A device has one context in a process, its primary one, with a stream for kernels and another for
copies. Arrays go to and from the device through pinned memory in two halves, so that the host fills
one while the device reads the other.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from ctypes import (
    addressof,
    c_float,
    c_int,
    c_size_t,
    c_uint,
    c_uint8,
    c_uint64,
    c_void_p,
    sizeof,
)
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from threading import Lock
from time import perf_counter
from typing import Any
from weakref import WeakValueDictionary, finalize

import numpy as np

from hetsched.cuda import driver as cuda
from hetsched.cuda.driver import Driver, Failed
from hetsched.device import Device
from hetsched.dtype import empty, numpy_dtype
from hetsched.errors import DeviceError, OutOfMemory, PackageError, PartError
from hetsched.launches import CONSTANT, INPUT, OUTPUT, WEIGHT, WORKSPACE, Launch, Program

# Pinned memory of a direction, in two halves.
STAGING_NBYTES = 8 << 20
# More shared memory than this has to be asked for, kernel by kernel.
ORDINARY_SHARED_NBYTES = 48 << 10
# The driver's numbers: of that request, of streams that do not wait for others.
MOST_SHARED, NON_BLOCKING = 8, 1
# Events tell times from a first one in milliseconds of float32: after so long they would be coarse.
COARSE_SECONDS = 1.0


class Memory:
    """Bytes on the device, given back when nobody has them any more."""

    def __init__(self, there: "Opened", nbytes: int, what: str) -> None:
        self.nbytes = nbytes
        self.address = there.taken(nbytes, what)
        self._back = finalize(self, there.given_back, self.address, nbytes)
        # The process is about to end, and the driver with it.
        self._back.atexit = False


class Event:
    """A place in a stream, which the device passes some time."""

    def __init__(self, there: Driver) -> None:
        self.handle = there.made("cuEventCreate", c_void_p, c_uint(0), what="an event")
        self._end = finalize(self, there.call, "cuEventDestroy_v2", self.handle)
        self._end.atexit = False


@dataclass(eq=False)
class Resident:
    """A tensor on the device. Who reads it elsewhere waits for `ready`, the end of who makes it."""

    memory: Memory
    shape: tuple[int, ...]
    dtype: np.dtype
    ready: Event | None = None


@dataclass(eq=False)
class Opened:
    """A device of this process. `free` is memory that nobody uses, by its size in bytes.

    `running` are the ends of runs with what they need until then.
    """

    driver: Driver
    name: str
    context: c_void_p
    stream: c_void_p
    copies: c_void_p
    origin: Event
    origin_seconds: float
    free: dict[int, list[int]] = field(default_factory=dict)
    running: deque[tuple[Any, Any]] = field(default_factory=deque)
    weights: "WeakValueDictionary[tuple[int, int], Weight]" = field(
        default_factory=WeakValueDictionary
    )

    def __post_init__(self) -> None:
        self._lock = Lock()
        self._into, self._out = (Staging(self, STAGING_NBYTES // 2) for _ in range(2))

    def enter(self) -> None:
        """Makes the device the calling thread's."""
        self.driver.call("cuCtxSetCurrent", self.context, what="the device")

    def taken(self, nbytes: int, what: str) -> int:
        """The address of so many bytes, of memory that was given back where there is some."""
        with self._lock:
            if self.free.get(nbytes):
                return self.free[nbytes].pop()
        try:
            return self._allocated(nbytes, what)
        except Failed:
            self.release()
            return self._allocated(nbytes, what)

    def given_back(self, address: int, nbytes: int) -> None:
        with self._lock:
            self.free.setdefault(nbytes, []).append(address)

    def release(self) -> None:
        """Gives what nobody uses back to the driver, which others may want."""
        with self._lock:
            unused = [address for addresses in self.free.values() for address in addresses]
            self.free.clear()
        for address in unused:
            self.driver.call("cuMemFree_v2", c_uint64(address), what="memory")

    def _allocated(self, nbytes: int, what: str) -> int:
        size = c_size_t(max(1, nbytes))
        found = self.driver.made("cuMemAlloc_v2", c_uint64, size, what=f"{what}, {nbytes} bytes")
        return int(found.value)

    def record(self, event: "Event", stream: c_void_p) -> None:
        self.driver.call("cuEventRecord", event.handle, stream, what="an event")

    def wait(self, event: "Event", what: str) -> None:
        self.driver.call("cuEventSynchronize", event.handle, what=what)

    def purge(self) -> None:
        """Forgets the runs that have ended, and what they needed."""
        while self.running and self.driver.is_over(self.running[0][0].handle):
            self.running.popleft()

    def weight(self, array: np.ndarray) -> "Weight":
        """A copy of an array on the device, which parts share that read the same memory."""
        key = array.ctypes.data, array.nbytes
        found = self.weights.get(key)
        if found is None:
            found = Weight(Memory(self, array.nbytes, "a weight"), array)
            self.write(found.memory, array)
            self.weights[key] = found
        return found

    def receive(self, array: np.ndarray) -> Resident:
        """The values of an array on the device."""
        self.enter()
        memory = Memory(self, array.nbytes, "an input")
        self.write(memory, array)
        return Resident(memory, array.shape, array.dtype)

    def write(self, memory: Memory, array: np.ndarray) -> None:
        self._into.write(memory.address, np.ascontiguousarray(array).reshape(-1).view(np.uint8))

    def send(self, resident: Resident) -> np.ndarray:
        """An array with the values of a tensor on the device."""
        self.enter()
        array = empty(resident.shape, resident.dtype)
        if resident.ready is not None:
            waits = (self.copies, resident.ready.handle, c_uint(0))
            self.driver.call("cuStreamWaitEvent", *waits, what="a copy")
        self._out.read(resident.memory.address, array.reshape(-1).view(np.uint8))
        return array

    def copied(self, resident: Resident) -> Resident:
        """Another with the same values, once what has been started has ended."""
        self.enter()
        memory = Memory(self, resident.memory.nbytes, "a tensor")
        to, source = c_uint64(memory.address), c_uint64(resident.memory.address)
        size = c_size_t(memory.nbytes)
        self.driver.call("cuMemcpyDtoDAsync_v2", to, source, size, self.stream, what="a copy")
        ready = Event(self.driver)
        self.record(ready, self.stream)
        self.running.append((ready, resident))
        return Resident(memory, resident.shape, resident.dtype, ready)

    def seconds_of(self, event: Event) -> float:
        """When something was over that has ended, by `perf_counter`."""
        ends = self.origin.handle, event.handle
        elapsed = self.driver.made("cuEventElapsedTime", c_float, *ends, what="an event")
        return self.origin_seconds + float(elapsed.value) * 1e-3

    def stamps(self, began: float, begin: Event, end: Event) -> tuple[float, float]:
        """When two events took place, by `perf_counter`; waits for the second.

        The first was recorded after `began`.
        """
        self.enter()
        self.wait(end, "its launches")
        now = perf_counter()
        found = (self.seconds_of(event) for event in (begin, end))
        first, last = (min(max(seconds, began), now) for seconds in found)
        return first, last

    def synchronise(self) -> None:
        self.driver.call("cuStreamSynchronize", self.stream, what="its launches")


@dataclass(frozen=True, eq=False)
class Weight:
    """An array on device and host, whose address is no other's as long as it is there."""

    memory: Memory
    array: np.ndarray


class Staging:
    """Two halves of pinned memory that copies of one direction go through."""

    def __init__(self, there: Opened, half_nbytes: int) -> None:
        self._there = there
        self._half = half_nbytes
        self._lock = Lock()
        self._halves: list[tuple[int, np.ndarray]] = []

    def write(self, address: int, given: np.ndarray) -> None:
        """The bytes `given` to the device; returns when they are there."""
        call, stream = self._there.driver.call, self._there.copies
        with self._lock:
            halves, ends = self._pinned(), [Event(self._there.driver) for _ in range(2)]
            for turn, start in enumerate(range(0, given.size, self._half)):
                place, half = halves[turn % 2]
                piece = given[start : start + self._half]
                if turn > 1:
                    self._there.wait(ends[turn % 2], "a copy")
                half[: piece.size] = piece
                to, size = c_uint64(address + start), c_size_t(piece.size)
                call("cuMemcpyHtoDAsync_v2", to, c_void_p(place), size, stream, what="a copy")
                self._there.record(ends[turn % 2], stream)
            call("cuStreamSynchronize", stream, what="a copy")

    def read(self, address: int, taken: np.ndarray) -> None:
        """Bytes of the device into `taken`."""
        call, stream = self._there.driver.call, self._there.copies
        starts = range(0, taken.size, self._half)

        def fetch(turn: int) -> None:
            place, _ = halves[turn % 2]
            size = c_size_t(min(self._half, taken.size - starts[turn]))
            source = c_uint64(address + starts[turn])
            call("cuMemcpyDtoHAsync_v2", c_void_p(place), source, size, stream, what="a copy")
            self._there.record(ends[turn % 2], stream)

        with self._lock:
            halves, ends = self._pinned(), [Event(self._there.driver) for _ in range(2)]
            if starts:
                fetch(0)
            for turn, start in enumerate(starts):
                self._there.wait(ends[turn % 2], "a copy")
                if turn + 1 < len(starts):
                    fetch(turn + 1)
                piece = taken[start : start + self._half]
                piece[:] = halves[turn % 2][1][: piece.size]

    def _pinned(self) -> list[tuple[int, np.ndarray]]:
        while len(self._halves) < 2:
            size, flags = c_size_t(self._half), c_uint(0)
            made = self._there.driver.made(
                "cuMemHostAlloc", c_void_p, size, flags, what="pinned memory"
            )
            whole = (c_uint8 * self._half).from_address(made.value)
            self._halves.append((made.value, np.ctypeslib.as_array(whole)))
        return self._halves


_opened: dict[str, Opened] = {}
_opening = Lock()


def opened(device: Device) -> Opened:
    """The device as this process has it, opened if that has not been done.

    Raises
    ------
    DeviceError
        It is not here, or its driver does not give it.
    """
    with _opening:
        if device.name not in _opened:
            try:
                _opened[device.name] = _open(cuda.driver(), device.name)
            except Failed as error:
                raise error.of("it does not open", device.name) from error
        return _opened[device.name]


def _open(there: Driver, name: str) -> Opened:
    number = int(name.partition(":")[2] or 0)
    handle = there.number("cuDeviceGet", c_int(number), what="the device")
    context = there.made("cuDevicePrimaryCtxRetain", c_void_p, c_int(handle), what="its context")
    there.call("cuCtxSetCurrent", context, what="its context")
    stream, copies = (
        there.made("cuStreamCreate", c_void_p, c_uint(NON_BLOCKING), what="a stream")
        for _ in range(2)
    )
    found = Opened(there, name, context, stream, copies, Event(there), 0.0)
    _begin_clock(found)
    return found


def _begin_clock(there: Opened) -> None:
    """Notes when the device is at `origin`; it must have nothing to do."""
    there.record(there.origin, there.stream)
    there.wait(there.origin, "an event")
    there.origin_seconds = perf_counter()


class Loaded:
    """A program on a device, with the arguments of each launch that never change.

    Raises
    ------
    DeviceError
        It does not fit the device; the message says what and how large.
    PackageError
        Kernels and launches do not belong together.
    Failed
        The code is for another device, or there is no memory for it.
    """

    def __init__(
        self,
        program: Program,
        code: bytes,
        weights: Mapping[str, np.ndarray],
        device: Device,
        name: str,
    ) -> None:
        self.program, self.name, self.device = program, name, device
        for launch in program.launches:
            self._check(launch)
        self.opened = there = opened(device)
        there.enter()
        self._check_memory()
        self._module: c_void_p | None = None
        if program.launches:
            self._module = there.driver.made("cuModuleLoadData", c_void_p, code, what="its code")
        self.weights = {
            key: there.weight(np.ascontiguousarray(weights[key])) for key in program.weights
        }
        self._own: dict[tuple[str, int | str], Memory] = {
            (WEIGHT, key): weight.memory for key, weight in self.weights.items()
        }
        if program.constants:
            constants = Memory(there, len(program.constants), "its constants")
            there.write(constants, np.frombuffer(program.constants, np.uint8))
            self._own[CONSTANT, 0] = constants
        if program.workspace_nbytes:
            self._own[WORKSPACE, 0] = Memory(there, program.workspace_nbytes, "its workspace")
        self.inputs, self.outputs = (
            [(tensor.shape, numpy_dtype(tensor.dtype)) for tensor in tensors]
            for tensors in (program.inputs, program.outputs)
        )
        # Of each launch the addresses, of which the driver wants the addresses.
        self._values: list[Any] = []
        self._free: list[tuple[Any, int, str, int, int]] = []
        self._calls = [self._call(launch) for launch in program.launches]

    def _check(self, launch: Launch) -> None:
        most = self.device.group_items
        if most and prod(launch.local_size) > most:
            raise DeviceError(
                f"part '{self.name}' does not fit '{self.device.name}': '{launch.kernel}' has "
                f"groups of {prod(launch.local_size)} threads, and the device takes {most}"
            )

    def _check_memory(self) -> None:
        program = self.program
        tensors = sum(tensor.nbytes for tensor in (*program.inputs, *program.outputs))
        held = program.workspace_nbytes + len(program.constants) + sum(program.weights.values())
        if held + tensors > self.device.memory_bytes:
            raise OutOfMemory(
                f"part '{self.name}' does not fit '{self.device.name}': it holds "
                f"{(held + tensors) / 2**20:.0f} MiB, and the device has "
                f"{self.device.memory_bytes / 2**20:.0f}",
                self.device.name,
            )

    def _call(self, launch: Launch) -> tuple[Any, ...]:
        """The arguments of the driver's call that starts a launch."""
        there = self.opened.driver
        what = f"'{launch.kernel}'"
        try:
            function = there.made(
                "cuModuleGetFunction", c_void_p, self._module, launch.kernel.encode(), what=what
            )
        except Failed as error:
            if error.code != "CUDA_ERROR_NOT_FOUND":
                raise
            raise PackageError(f"part '{self.name}' is damaged: no {what} in its code") from None
        if launch.shared_nbytes > ORDINARY_SHARED_NBYTES:
            asked = c_int(MOST_SHARED), c_int(launch.shared_nbytes)
            there.call("cuFuncSetAttribute", function, *asked, what=what)
        values = (c_uint64 * len(launch.arguments))()
        for index, place in enumerate(launch.arguments):
            if place.region in (INPUT, OUTPUT):
                free = (values, index, place.region, int(place.which), place.start)
                self._free.append(free)
            else:
                values[index] = self._own[place.region, place.which].address + place.start
        self._values.append(values)
        first, size = addressof(values), sizeof(c_uint64)
        addresses = (c_void_p * len(values))(*(first + size * i for i in range(len(values))))
        groups, threads = (
            [c_uint(size) for size in (*sizes, 1, 1)[:3]]
            for sizes in (launch.groups, launch.local_size)
        )
        shared = c_uint(launch.shared_nbytes)
        return (function, *groups, *threads, shared, self.opened.stream, addresses, None)

    def close(self) -> None:
        """Frees code and memory."""
        there = self.opened
        self._calls, self._free, self._own, self.weights = [], [], {}, {}
        if self._module is not None:
            there.enter()
            there.synchronise()
            there.purge()
            module, self._module = self._module, None
            there.driver.call("cuModuleUnload", module, what="its code")

    def start(self, inputs: Sequence[Resident], stamped: bool = False) -> "Started":
        """Starts all launches.

        Raises
        ------
        Failed
            The device refuses.
        """
        there = self.opened
        there.enter()
        for resident, (shape, dtype) in zip(inputs, self.inputs, strict=True):
            if resident.shape != shape or resident.dtype != dtype:
                raise PartError(
                    f"part '{self.name}' failed: an input of {resident.dtype}{resident.shape} in "
                    f"place of {dtype}{shape}"
                )
        there.purge()
        if not there.running and perf_counter() - there.origin_seconds > COARSE_SECONDS:
            there.synchronise()
            _begin_clock(there)
        return Started(self, inputs, stamped)

    def launch(self, run: "Started", stamped: bool) -> None:
        """The driver's calls of a run; with `stamped`, an event behind each."""
        there = self.opened
        memories = {INPUT: run.inputs, OUTPUT: run.outputs}
        for values, index, region, which, start in self._free:
            values[index] = memories[region][which].memory.address + start
        for number, call in enumerate(self._calls):
            what = f"launch {number}, of '{self.program.launches[number].kernel}'"
            there.driver.call("cuLaunchKernel", *call, what=what)
            if stamped:
                run.marks.append(Event(there.driver))
                there.record(run.marks[-1], there.stream)


class Started:
    """A run of a program that has been started.

    `outputs` may be read by later launches on the same device at once, by others after `finish`.
    """

    def __init__(self, loaded: Loaded, inputs: Sequence[Resident], stamped: bool) -> None:
        there = self._there = loaded.opened
        self.inputs = list(inputs)
        self._begin, self._end = Event(there.driver), Event(there.driver)
        self.marks: list[Event] = []
        self.outputs = [
            Resident(
                Memory(there, prod(shape) * dtype.itemsize, "an output"), shape, dtype, self._end
            )
            for shape, dtype in loaded.outputs
        ]
        self._began = perf_counter()
        there.record(self._begin, there.stream)
        try:
            loaded.launch(self, stamped)
        finally:
            # What has been started, all or not, uses the memory until here.
            there.record(self._end, there.stream)
            there.running.append((self._end, (self.inputs, self.outputs, loaded)))

    def finish(self) -> tuple[float, float]:
        """Waits, and returns when the first launch began and the last ended, by `perf_counter`.

        Raises
        ------
        Failed
            A launch failed.
        """
        return self._there.stamps(self._began, self._begin, self._end)

    def seconds(self) -> list[float]:
        """What each launch took, of a run that was stamped and has ended."""
        times = list(map(self._there.seconds_of, (self._begin, *self.marks)))
        return [after - before for before, after in pairwise(times)]


class Copying:
    """A copy of a tensor on the device, as `Started` is a run."""

    def __init__(self, there: Opened, resident: Resident) -> None:
        there.enter()
        self._there = there
        self._begin = Event(there.driver)
        self._began = perf_counter()
        there.record(self._begin, there.stream)
        self._made = there.copied(resident)
        self.outputs = [self._made]

    def finish(self) -> tuple[float, float]:
        assert self._made.ready is not None
        return self._there.stamps(self._began, self._begin, self._made.ready)
