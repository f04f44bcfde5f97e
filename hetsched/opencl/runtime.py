"""Runs programs of launches on OpenCL devices, by pyopencl.

Importing this file loads pyopencl, and the first device that is opened starts its drivers; a target
imports it when it first loads a part. A device has one context in a process, with an in-order queue
for kernels and another for copies. (An out-of-order queue whose launches wait for each other by
events was no faster on PoCL, 1.35 against 1.3 us a launch: the launches of a part mostly need each
other.)

PoCL computes on the calling thread for a device of one core, and with threads of its own for one of
several: to wake a thread takes ten times as long as such a launch, 12 us against 1.2.
"""

import os
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from ctypes import CDLL, byref, c_int, c_size_t, c_uint, c_void_p, sizeof
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from math import prod
from pathlib import Path
from tempfile import TemporaryFile
from threading import Lock
from time import perf_counter
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from hetsched.cache import default_cache
from hetsched.device import Device
from hetsched.dtype import ALIGNMENT, empty, numpy_dtype
from hetsched.errors import (
    BuildError,
    DeviceError,
    DeviceLost,
    HetschedError,
    OutOfMemory,
    PackageError,
    PartError,
)
from hetsched.host import cores, cpu_device, hold, pinned, threads
from hetsched.launches import (
    APART,
    CONSTANT,
    INPUT,
    OUTPUT,
    WEIGHT,
    WORKSPACE,
    Launch,
    Place,
    Program,
)
from hetsched.opencl import builds
from hetsched.opencl.devices import (
    POCL,
    POCL_OWN,
    POCL_VARIABLE,
    VENDORS_VARIABLE,
    Found,
    select,
    survey,
)
from hetsched.opencl.turn import Turn, turn_of
from hetsched.target import Artifact

# Read by PoCL at the first call of OpenCL. A kernel says the size of its work-groups itself, so
# that PoCL need not compile another version of it for the size that it is launched with.
os.environ.setdefault(POCL_VARIABLE, POCL_OWN)
os.environ.setdefault("POCL_WORK_GROUP_SPECIALIZATION", "0")
# Binaries are kept here, where their number of bytes has a limit.
os.environ.setdefault("PYOPENCL_NO_CACHE", "1")
if survey().vendors is not None:
    os.environ[VENDORS_VARIABLE] = str(survey().vendors)

import pyopencl as cl

OPTIONS = "-cl-std=CL1.2"
# By a feature of the processor, what tells a source that it may ask PoCL for its instructions.
FEATURES = {"avx512_vnni": "-DHAS_QUADS"}
BINARY = ".bin"
# Changes with what is kept of a program.
BINARIES = "opencl program 2"
UNBUILT = "its source does not compile"
# A source of so many letters takes longer to build than a process takes to begin.
PIECE_LETTERS = 20_000
# What a disk has to have free beside a binary.
ROOM_NBYTES = 64 << 10
# Pinned memory through which copies go to a device with memory of its own, in two halves.
STAGING_NBYTES = 8 << 20
LOG_LINES = 12

# What a code of OpenCL means to who has to do something about it.
MEANINGS: Mapping[str, tuple[type[DeviceError] | type[PartError], str]] = {
    "DEVICE_NOT_AVAILABLE": (DeviceLost, "the device is lost"),
    "INVALID_COMMAND_QUEUE": (DeviceLost, "the device is lost"),
    "INVALID_CONTEXT": (DeviceLost, "the device is lost"),
    "MEM_OBJECT_ALLOCATION_FAILURE": (OutOfMemory, "the device is out of memory"),
    "OUT_OF_RESOURCES": (OutOfMemory, "the device is out of memory or registers"),
    "OUT_OF_HOST_MEMORY": (OutOfMemory, "the host is out of memory"),
    "INVALID_BUFFER_SIZE": (OutOfMemory, "a buffer is larger than the device allows"),
    "BUILD_PROGRAM_FAILURE": (BuildError, "its compiler refuses a kernel"),
    "COMPILE_PROGRAM_FAILURE": (BuildError, "its compiler refuses a kernel"),
    "LINK_PROGRAM_FAILURE": (BuildError, "its compiler refuses a kernel"),
    "INVALID_WORK_GROUP_SIZE": (DeviceError, "a work-group is larger than the kernel allows"),
    "INVALID_KERNEL_ARGS": (PartError, "a kernel lacks an argument"),
}


class Failed(HetschedError):
    """What OpenCL answers with, in words; `status` is its code."""

    def __init__(self, status: int, what: str, details: str = "") -> None:
        code = cl.status_code.to_string(status, "status %d")
        unknown = PartError, code.lower().replace("_", " ")
        self._kind: type[DeviceError] | type[PartError]
        self._kind, meaning = MEANINGS.get(code, unknown)
        super().__init__(f"{what}: {meaning} ({code})" + (f": {details}" if details else ""))

    def of(self, where: str, device: str) -> HetschedError:
        """The error of the kind that a user meets, with what failed and on which device."""
        message, kind = f"{where} on '{device}': {self}", self._kind
        return kind(message, device) if issubclass(kind, DeviceError) else kind(message)


class Unbuilt(Failed):
    """A program of which no binary was made, for another reason than OpenCL's answer."""

    def __init__(self, message: str) -> None:
        HetschedError.__init__(self, message)
        self._kind = BuildError


class Driver:
    """The calls of OpenCL that a run makes; unlike pyopencl's, they let other threads go on.

    Each returns the status of OpenCL, 0 if all is well. Tests put others in their place.
    """

    def __init__(self) -> None:
        library = CDLL(cl._cl.__file__)
        self.enqueue_kernel = _call(
            library.clEnqueueNDRangeKernel,
            *(c_void_p, c_void_p, c_uint, c_void_p, c_void_p, c_void_p, c_uint, c_void_p),
            c_void_p,
        )
        self.set_argument = _call(library.clSetKernelArg, c_void_p, c_uint, c_size_t, c_void_p)
        self.flush = _call(library.clFlush, c_void_p)
        self.finish = _call(library.clFinish, c_void_p)


def _call(function: Any, *kinds: Any) -> Callable[..., int]:
    function.argtypes, function.restype = kinds, c_int
    found: Callable[..., int] = function
    return found


driver = Driver()


def checked(status: int, what: str) -> None:
    """
    Raises
    ------
    Failed
        The status says that `what` was done failed.
    """
    if status:
        raise Failed(status, what)


@contextmanager
def told(what: str) -> Iterator[None]:
    """Raises `Failed` for what pyopencl raises meanwhile."""
    try:
        yield
    except cl.Error as error:
        raise Failed(error.code, what) from error


@dataclass(frozen=True, eq=False)
class Resident:
    """A tensor in a device's own memory."""

    buffer: cl.Buffer
    shape: tuple[int, ...]
    dtype: np.dtype


@dataclass(frozen=True, eq=False)
class Weight:
    """A buffer with the values of an array, whose address is no other's as long as it is there."""

    buffer: cl.Buffer
    array: np.ndarray


@dataclass(eq=False)
class Opened:
    """A device of this process, with what is made once for it.

    `most_nbytes` is the largest buffer, `alignment` what the start of a part of one is a multiple
    of. `shares_memory` says that buffers lie in the host's memory; `shared_pointers`, that kernels
    take addresses of memory that OpenCL has allocated (SVM of the kind fine-grain buffer);
    `on_caller`, that whoever enqueues a launch computes it. Whoever enqueues has `turn`.
    """

    device: cl.Device
    number: int
    context: cl.Context
    queue: cl.CommandQueue
    copies: cl.CommandQueue
    shares_memory: bool
    most_nbytes: int
    alignment: int
    shared_pointers: bool
    on_caller: bool
    pool: cl.tools.MemoryPool

    def __post_init__(self) -> None:
        # A second thread that enqueues to one of PoCL's devices that compute on the caller may get
        # what the first waits for, and PoCL 3.1 then waits for itself.
        self.turn: Turn | nullcontext[None] = (
            turn_of(self.number) if self.on_caller else nullcontext()
        )
        # Weights by the memory that they lie in: parts that read the same ones share them.
        self.weights: WeakValueDictionary[tuple[int, int], Weight] = WeakValueDictionary()
        # The runs that have not ended, by the addresses of their outputs.
        self.pending: WeakValueDictionary[int, Started] = WeakValueDictionary()
        self._staging: Staging | None = None
        self._lock = Lock()

    @property
    def staging(self) -> "Staging":
        with self._lock:
            if self._staging is None:
                self._staging = Staging(self.context, self.copies)
            return self._staging

    def weight(self, array: np.ndarray) -> Weight:
        """A buffer with the values of a contiguous array, in its memory if that is shared."""
        key = array.ctypes.data, array.nbytes
        with self._lock:
            found = self.weights.get(key)
            if found is None:
                where = "USE_HOST_PTR" if self.shares_memory else "COPY_HOST_PTR"
                flags = cl.mem_flags.READ_ONLY | getattr(cl.mem_flags, where)
                found = Weight(cl.Buffer(self.context, flags, hostbuf=array), array)
                self.weights[key] = found
        return found

    def allocate(self, nbytes: int) -> np.ndarray:
        """Memory of the host that kernels take by its address, where there are shared pointers."""
        found: np.ndarray = cl.fsvm_empty(self.context, (nbytes,), np.uint8, alignment=ALIGNMENT)
        return found

    def workspace(self, nbytes: int) -> cl.Buffer:
        """Memory for kernels alone; where the host's is shared, that of an array.

        numpy asks for huge pages, drivers do not, and tiles touch many pages.
        """
        if not self.shares_memory:
            flags = cl.mem_flags.READ_WRITE | cl.mem_flags.HOST_NO_ACCESS
            return cl.Buffer(self.context, flags, nbytes)
        flags = cl.mem_flags.READ_WRITE | cl.mem_flags.USE_HOST_PTR
        return cl.Buffer(self.context, flags, hostbuf=empty((nbytes,), np.dtype(np.uint8)))

    def receive(self, array: np.ndarray) -> Resident:
        """The values of an array in the device's own memory."""
        with told("an input cannot be copied to the device"), self.turn:
            found = self.resident(array.shape, array.dtype)
            self.staging.write(found.buffer, array)
        return found

    def send(self, resident: Resident) -> np.ndarray:
        """An array with the values of what lies in the device's own memory."""
        array = empty(resident.shape, resident.dtype)
        with told("an output cannot be copied from the device"), self.turn:
            self.staging.read(resident.buffer, array)
        return array

    def copied(self, resident: Resident) -> Resident:
        """Another with the same values, once what has been enqueued has ended."""
        found = self.resident(resident.shape, resident.dtype)
        with told("a tensor cannot be copied"), self.turn:
            cl.enqueue_copy(self.queue, found.buffer, resident.buffer)
        return found

    def resident(self, shape: tuple[int, ...], dtype: np.dtype) -> Resident:
        """Memory of the device without values."""
        return Resident(self.pool.allocate(prod(shape) * dtype.itemsize), shape, dtype)


class Staging:
    """Pinned memory, by which arrays go to and from a device's own memory.

    While one half is copied by the device, the other is filled or read by the host.
    """

    def __init__(self, context: cl.Context, queue: cl.CommandQueue) -> None:
        flags = cl.mem_flags.READ_WRITE | cl.mem_flags.ALLOC_HOST_PTR
        self._queue = queue
        self._lock = Lock()
        self._half = STAGING_NBYTES // 2
        self._buffer = cl.Buffer(context, flags, STAGING_NBYTES)
        access = cl.map_flags.READ | cl.map_flags.WRITE
        memory, _ = cl.enqueue_map_buffer(
            queue, self._buffer, access, 0, (STAGING_NBYTES,), np.uint8, is_blocking=True
        )
        self._halves = memory[: self._half], memory[self._half :]

    def write(self, buffer: cl.Buffer, array: np.ndarray) -> None:
        """The values of `array` into `buffer`; returns when they are there."""
        given = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        events: list[cl.Event] = []
        with self._lock:
            for turn, start in enumerate(range(0, given.size, self._half)):
                piece = given[start : start + self._half]
                half = self._halves[turn % 2][: piece.size]
                if turn > 1:
                    events[turn - 2].wait()
                half[:] = piece
                events.append(
                    cl.enqueue_copy(self._queue, buffer, half, dst_offset=start, is_blocking=False)
                )
                self._queue.flush()
            for event in events[-2:]:
                event.wait()

    def read(self, buffer: cl.Buffer, array: np.ndarray) -> None:
        """The values of `buffer` into a contiguous array."""
        taken = array.reshape(-1).view(np.uint8)
        starts = range(0, taken.size, self._half)
        with self._lock:
            events = [self._fetch(buffer, taken.size, start, 0) for start in starts[:1]]
            for turn, start in enumerate(starts):
                events[turn].wait()
                if turn + 1 < len(starts):
                    events.append(self._fetch(buffer, taken.size, starts[turn + 1], turn + 1))
                piece = taken[start : start + self._half]
                piece[:] = self._halves[turn % 2][: piece.size]

    def _fetch(self, buffer: cl.Buffer, nbytes: int, start: int, turn: int) -> cl.Event:
        half = self._halves[turn % 2][: min(self._half, nbytes - start)]
        event = cl.enqueue_copy(self._queue, half, buffer, src_offset=start, is_blocking=False)
        self._queue.flush()
        return event


_opened: dict[tuple[str, int, bool], Opened] = {}
# Of drivers that compute with threads of their own.
_workers: set[int] = set()
_opening, _building = Lock(), Lock()


def opened(device: Device) -> Opened:
    """The device as this process has it, opened if that has not been done.

    Raises
    ------
    DeviceError
        It is not here, or its driver does not give it.
    """
    target = device.target.partition(":")[0]
    found, _ = select(device.name, target) if device.name.startswith(target) else (None, ())
    if found is None:
        raise DeviceError(f"no device '{device.name}': {target} has no device of that name")
    number = _number(found, device.cores)
    shares_memory = device.memory_space == "host"
    key = found.platform, number, shares_memory
    with _opening:
        if key not in _opened:
            if found.is_pocl and len(device.cores) > 1:
                # Counts when the first device of a process is opened.
                os.environ.setdefault("POCL_MAX_PTHREAD_COUNT", str(len(device.cores)))
            before = threads()
            try:
                # Threads that a driver starts may use the cores that the device has.
                with pinned(device.cores):
                    _opened[key] = _open(found, number, shares_memory)
                own = {thread.native_id for thread in threading.enumerate()}
                _workers.update(threads() - before - own)
            except (cl.Error, IndexError, StopIteration) as error:
                raise DeviceError(f"'{device.name}', {found}, does not open: {error}") from error
        there = _opened[key]
        if device.cores and not there.on_caller:
            hold(_workers, device.cores)
        return there


def forget(there: Opened) -> None:
    """Opens the device anew when a part is loaded for it again: this one is lost."""
    with _opening:
        for key in [key for key, known in _opened.items() if known is there]:
            del _opened[key]


def _number(found: Found, chosen: Sequence[int]) -> int:
    """Which device of its platform it is in this process."""
    if not found.is_pocl or os.environ.get(POCL_VARIABLE) != POCL_OWN:
        return found.number
    return cores().index(chosen[0]) if len(chosen) == 1 else len(cores())


def _open(found: Found, number: int, shares_memory: bool) -> Opened:
    platform = next(one for one in cl.get_platforms() if one.name == found.platform)
    device = platform.get_devices()[number]
    context = cl.Context([device])
    stamped = cl.command_queue_properties.PROFILING_ENABLE
    queue = cl.CommandQueue(context, properties=stamped)
    fine = getattr(cl.device_svm_capabilities, "FINE_GRAIN_BUFFER", 0)
    try:
        shared_pointers = bool(device.svm_capabilities & fine)
    except cl.Error:
        shared_pointers = False
    return Opened(
        device,
        number,
        context,
        queue,
        cl.CommandQueue(context, properties=stamped),
        shares_memory,
        device.max_mem_alloc_size,
        max(1, device.mem_base_addr_align // 8),
        shared_pointers,
        found.is_pocl and device.name.startswith("basic"),
        cl.tools.MemoryPool(cl.tools.ImmediateAllocator(queue)),
    )


def built(there: Opened, source: str, names: Sequence[str]) -> dict[str, cl.Program]:
    """The program that has each of the kernels `names`: of kept binaries, or of the source.

    A source is built by other processes, a long one in pieces, and their binaries are loaded here.
    Where a driver gives none, or refuses one, this process builds the source, but never by PoCL.

    Raises
    ------
    Failed
        The source does not compile; the message has what the compiler says.
    """
    kept, key = default_cache(), _key(there, source)
    found = kept.read(key)
    if found is not None:
        # It may be of another driver of the same version: the source is what counts.
        with suppress(cl.Error):
            programs = _of_binaries(there, list(found.files.values()))
            if programs.keys() >= set(names):
                return programs
    binaries = _binaries(there, source)
    if binaries:
        try:
            programs = _of_binaries(there, binaries)
        except cl.Error as error:
            if _is_pocl(there):
                raise Failed(error.code, "its binary does not load", _log(str(error))) from error
        else:
            _keep(key, binaries)
            return programs
    program = cl.Program(there.context, source)
    try:
        _build(there, program)
    except cl.Error as error:
        raise Failed(error.code, UNBUILT, _log(str(error))) from error
    return _by_kernel(program)


def prepare(program: Program, device: Device) -> None:
    """Keeps the binary of a program for who loads it.

    Raises
    ------
    Failed
        The source does not compile.
    """
    kept = default_cache()
    if not program.launches or kept.folder is None:
        return
    there = opened(device)
    key = _key(there, program.source)
    if kept.read(key) is None and (binaries := _binaries(there, program.source)):
        _keep(key, binaries)


def _keep(key: str, binaries: Sequence[bytes]) -> None:
    files = {f"{number}{BINARY}": binary for number, binary in enumerate(binaries)}
    default_cache().keep(key, Artifact(files))


def _key(there: Opened, source: str) -> str:
    """Under which the binary of a source is kept."""
    told_by = there.device
    decisive = (
        *(BINARIES, _options(there), told_by.platform.name, told_by.name),
        *(told_by.version, told_by.driver_version),
        sha256(source.encode()).hexdigest(),
    )
    return sha256(repr(decisive).encode()).hexdigest()


def _binaries(there: Opened, source: str) -> list[bytes]:
    """The binaries of a source, none where the driver gives none."""
    platform = there.device.platform
    number = platform.get_devices().index(there.device)
    pieces = _pieces(source)
    try:
        with ThreadPoolExecutor(len(pieces)) as threads:
            build = partial(builds.build, platform.name, number, _options(there))
            made = list(threads.map(build, pieces))
    except builds.Died as error:
        raise Unbuilt(f"{UNBUILT}: {error}") from error
    if all(status == 0 and binary for status, binary in made):
        return [binary for _, binary in made]
    if _is_pocl(there):
        for status, answer in made:
            if status:
                raise Failed(status, UNBUILT, _log(answer.decode(errors="replace")))
        raise Unbuilt(f"{UNBUILT}: its compiler gives no binary")
    # Perhaps it is not for two processes: what this one hears counts.
    return []


def _pieces(source: str) -> list[str]:
    """The source in pieces of about the same length that are built side by side."""
    common, *kernels = source.split(APART)
    count = min(len(cores()), len(kernels), len(source) // PIECE_LETTERS)
    if count < 2:
        return [source]
    pieces = [common] * count
    for kernel in sorted(kernels, key=len, reverse=True):
        shortest = min(range(count), key=lambda i: len(pieces[i]))
        pieces[shortest] += APART + kernel
    return pieces


def _of_binaries(there: Opened, binaries: Sequence[bytes]) -> dict[str, cl.Program]:
    """The program that has a kernel, by the kernel's name."""
    if _is_pocl(there):
        _check_room(sum(map(len, binaries)))
    found: dict[str, cl.Program] = {}
    for binary in binaries:
        program = cl.Program(there.context, [there.device], [binary])
        _build(there, program)
        found |= _by_kernel(program)
    return found


def _by_kernel(program: cl.Program) -> dict[str, cl.Program]:
    return {kernel.function_name: program for kernel in program.all_kernels()}


def _is_pocl(there: Opened) -> bool:
    return bool(there.device.platform.name == POCL)


def _check_room(nbytes: int) -> None:
    """
    Raises
    ------
    Unbuilt
        PoCL cannot unpack a binary into files; it would say so by ending the process in a run.
    """
    home = os.environ.get("HOME")
    caches = os.environ.get("XDG_CACHE_HOME") or (f"{home}/.cache" if home else "/tmp")
    folder = Path(os.environ.get("POCL_CACHE_DIR") or f"{caches}/pocl")
    while not folder.exists():
        folder = folder.parent
    try:
        with TemporaryFile(dir=folder) as file:
            file.write(bytes(2 * nbytes + ROOM_NBYTES))
    except OSError as error:
        raise Unbuilt(f"its code has no room in {folder}: {error.strerror}") from error


def _options(there: Opened) -> str:
    """The options of a build; PoCL's device is this processor."""
    features = cpu_device("cpu", "cpu").isa.split() if _is_pocl(there) else []
    return " ".join([OPTIONS, *(FEATURES[feature] for feature in FEATURES if feature in features)])


def _build(there: Opened, program: cl.Program) -> None:
    # What a compiler has to say counts where it refuses. Who sets aside warnings has to be alone.
    with _building, warnings.catch_warnings():
        warnings.simplefilter("ignore", cl.CompilerWarning)
        program.build(_options(there))


def _log(text: str) -> str:
    """What the compiler says, in one line."""
    lines = [" ".join(line.split()) for line in text.splitlines()]
    wanted = [line for line in lines if "error:" in line] or [line for line in lines if line]
    return "; ".join(wanted[:LOG_LINES])


class Loaded:
    """A program on a device: its kernels, each launch with the arguments that never change.

    `kernels` has one kernel object for each launch; `free` are the arguments that belong to a run,
    as (launch, argument, place). `buffers` are those of the regions that live as long as it.

    Raises
    ------
    DeviceError
        It does not fit the device; the message says what and how large.
    PackageError
        Kernels and launches do not belong together.
    Failed
        The source does not compile, or the device has no memory for it.
    """

    def __init__(
        self, program: Program, weights: Mapping[str, np.ndarray], device: Device, name: str
    ) -> None:
        self.program, self.name, self.device = program, name, device
        self.opened = there = opened(device)
        for launch in program.launches:
            self._check_sizes(launch)
        self._check_memory()
        names = list(dict.fromkeys(launch.kernel for launch in program.launches))
        self.programs = built(there, program.source, names) if names else {}
        if missing := [kernel for kernel in names if kernel not in self.programs]:
            raise PackageError(
                f"part '{name}' is damaged: '{missing[0]}' is no kernel of its source"
            )
        with told("it does not load"):
            self.buffers = self._regions(weights)
            self._parts: dict[tuple[str, int | str, int, int], cl.Buffer] = {}
            self.kernels = [
                cl.Kernel(self.programs[launch.kernel], launch.kernel)
                for launch in program.launches
            ]
            self.free = self._fixed()
            for launch, kernel in zip(program.launches, self.kernels, strict=True):
                self._check_kernel(launch, kernel)
        self.calls = [self._enqueueing(index) for index in range(len(self.kernels))]
        self.inputs, self.outputs = (
            [(tensor.shape, numpy_dtype(tensor.dtype)) for tensor in tensors]
            for tensors in (program.inputs, program.outputs)
        )

    def _check_sizes(self, launch: Launch) -> None:
        info = self.opened.device
        items, sizes = info.max_work_group_size, info.max_work_item_sizes
        if prod(launch.local_size) > items or any(
            wanted > most for wanted, most in zip(launch.local_size, sizes, strict=False)
        ):
            raise DeviceError(
                f"part '{self.name}' does not fit '{self.device.name}': '{launch.kernel}' has "
                f"groups of {' x '.join(map(str, launch.local_size))} work-items, and the device "
                f"takes {items}, at most {' x '.join(map(str, sizes))}"
            )

    def _check_kernel(self, launch: Launch, kernel: cl.Kernel) -> None:
        info, asked = self.opened.device, cl.kernel_work_group_info
        most = kernel.get_work_group_info(asked.WORK_GROUP_SIZE, info)
        local = kernel.get_work_group_info(asked.LOCAL_MEM_SIZE, info)
        fits = f"part '{self.name}' does not fit '{self.device.name}': '{launch.kernel}' needs"
        if prod(launch.local_size) > most:
            raise DeviceError(
                f"{fits} groups of {prod(launch.local_size)} work-items, and gets {most} at most"
            )
        if local > info.local_mem_size:
            raise DeviceError(
                f"{fits} {local} bytes of local memory, and the device has {info.local_mem_size}"
            )

    def _check_memory(self) -> None:
        program, there = self.program, self.opened
        wanted = {
            "workspace": program.workspace_nbytes,
            "constants": len(program.constants),
            **{f"weight '{name}'": nbytes for name, nbytes in program.weights.items()},
            **{f"input '{tensor.name}'": tensor.nbytes for tensor in program.inputs},
            **{f"output '{tensor.name}'": tensor.nbytes for tensor in program.outputs},
        }
        fits = f"part '{self.name}' does not fit '{self.device.name}'"
        for what, nbytes in wanted.items():
            if nbytes > there.most_nbytes:
                raise OutOfMemory(
                    f"{fits}: its {what} has {nbytes / 2**20:.0f} MiB, and the device gives at "
                    f"most {there.most_nbytes / 2**20:.0f} at once",
                    self.device.name,
                )
        total, most = sum(wanted.values()), there.device.global_mem_size
        if total > most:
            raise OutOfMemory(
                f"{fits}: it holds {total / 2**20:.0f} MiB, and the device has {most / 2**20:.0f}"
            )

    def _regions(self, weights: Mapping[str, np.ndarray]) -> dict[tuple[str, int | str], cl.Buffer]:
        there, program = self.opened, self.program
        found: dict[tuple[str, int | str], cl.Buffer] = {}
        self.weights = {
            name: there.weight(np.ascontiguousarray(weights[name])) for name in program.weights
        }
        for name, weight in self.weights.items():
            found[WEIGHT, name] = weight.buffer
        if program.constants:
            flags = cl.mem_flags.READ_ONLY | cl.mem_flags.COPY_HOST_PTR
            found[CONSTANT, 0] = cl.Buffer(there.context, flags, hostbuf=program.constants)
        if program.workspace_nbytes:
            found[WORKSPACE, 0] = there.workspace(program.workspace_nbytes)
        return found

    def _fixed(self) -> list[tuple[int, int, Place]]:
        """Sets the arguments that stay, and returns the others."""
        free = []
        for index, launch in enumerate(self.program.launches):
            kernel = self.kernels[index]
            pointers = len(launch.arguments)
            given = pointers if launch.case is None else pointers + 1
            if kernel.num_args != given:
                raise PackageError(
                    f"part '{self.name}' is damaged: '{launch.kernel}' takes {kernel.num_args} "
                    f"arguments, and a launch gives {given}"
                )
            if launch.case is not None:
                kernel.set_arg(pointers, np.int32(launch.case))
            for number, place in enumerate(launch.arguments):
                if place.region in (INPUT, OUTPUT):
                    free.append((index, number, place))
                else:
                    base = self.buffers[place.region, place.which]
                    kernel.set_arg(number, self._part(base, place))
        return free

    def _part(self, base: cl.Buffer, place: Place) -> cl.Buffer:
        """The bytes of a place as a buffer."""
        if not place.start:
            return base
        if place.start % self.opened.alignment:
            raise DeviceError(
                f"part '{self.name}' does not fit '{self.device.name}': a buffer begins at byte "
                f"{place.start}, and the device wants multiples of {self.opened.alignment}"
            )
        key = place.region, place.which, place.start, place.nbytes
        # Those of a run belong to other memory each time.
        if place.region in (INPUT, OUTPUT):
            return base.get_sub_region(place.start, place.nbytes)
        if key not in self._parts:
            self._parts[key] = base.get_sub_region(place.start, place.nbytes)
        return self._parts[key]

    def _enqueueing(self, index: int) -> tuple[Any, ...]:
        """The arguments of the call that starts a launch, but for its event."""
        launch = self.program.launches[index]
        axes = len(launch.global_size)
        sizes = (c_size_t * axes)(*launch.global_size), (c_size_t * axes)(*launch.local_size)
        return (
            *(self.opened.queue.int_ptr, self.kernels[index].int_ptr, axes, None),
            *(*sizes, 0, None),
        )

    def arrays(self, inputs: Sequence[Any]) -> list[np.ndarray]:
        """Inputs in the host's memory as kernels read them.

        Raises
        ------
        PartError
            One has another shape.
        """
        found = []
        for array, (shape, dtype) in zip(inputs, self.inputs, strict=True):
            if (
                array.__class__ is not np.ndarray
                or array.dtype != dtype
                or not array.flags.c_contiguous
            ):
                array = np.asarray(array, dtype, order="C")
            if array.shape != shape:
                raise PartError(
                    f"part '{self.name}' failed: an input of shape {array.shape} in place of "
                    f"{shape}"
                )
            found.append(array)
        return found

    def close(self) -> None:
        """Frees kernels and buffers."""
        self.kernels, self.calls, self.free = [], [], []
        self.buffers, self.weights, self._parts, self.programs = {}, {}, {}, {}

    def start(self, inputs: Sequence[Any], stamped: bool = False) -> "Started":
        """Enqueues all launches, for inputs that are arrays, or buffers of the device's memory.

        Raises
        ------
        Failed
            The device refuses.
        """
        run = Started(self, inputs)
        try:
            with self.opened.turn:
                run.enqueue(stamped)
        except BaseException:
            run.end()
            raise
        return run

    def arguments_of(self, run: "Started") -> None:
        """Sets the arguments that belong to a run."""
        for index, number, place in self.free:
            base = (run.inputs if place.region == INPUT else run.made)[int(place.which)]
            if place.start:
                base = self._part(base, place)
                run.kept.append(base)
            handle = c_void_p(base.int_ptr)
            status = driver.set_argument(
                self.kernels[index].int_ptr, number, sizeof(handle), byref(handle)
            )
            checked(status, "an argument is refused")


class Started:
    """A run of a program that has been enqueued.

    `outputs` may be read by later launches on the same device at once, by others after `finish`.
    """

    def __init__(self, loaded: Loaded, inputs: Sequence[Any]) -> None:
        self._loaded = loaded
        there = self._there = loaded.opened
        self._ended = True
        self._began = 0.0
        self._events: list[cl.Event] = []
        # What has to live until it has ended.
        self.kept: list[Any] = []
        self.outputs: list[Any]
        if not there.shares_memory:
            self.kept = list(inputs)
            self.inputs = [resident.buffer for resident in inputs]
            with told("its outputs cannot be made"):
                self.outputs = [there.resident(*kind) for kind in loaded.outputs]
            self.made = [resident.buffer for resident in self.outputs]
            return
        with told("its inputs cannot be lent"):
            self.inputs = list(map(self._lent, loaded.arrays(inputs)))
        self.outputs = [empty(*kind) for kind in loaded.outputs]
        flags = cl.mem_flags.READ_WRITE | cl.mem_flags.USE_HOST_PTR
        with told("its outputs cannot be made"):
            self.made = [cl.Buffer(there.context, flags, hostbuf=array) for array in self.outputs]
        for array in self.outputs:
            there.pending[array.ctypes.data] = self

    def __del__(self) -> None:
        # Of one that nobody waited for: the device must not write to what is another's by now.
        if not getattr(self, "_ended", True):
            self.end()

    def _lent(self, array: np.ndarray) -> cl.Buffer:
        """A buffer in the memory of an array, that of the run that makes it if that goes on."""
        self.kept.append(array)
        before = self._there.pending.get(array.ctypes.data)
        if before is not None:
            for made, buffer in zip(before.outputs, before.made, strict=True):
                if made.ctypes.data == array.ctypes.data and made.nbytes == array.nbytes:
                    return buffer
        flags = cl.mem_flags.READ_ONLY | cl.mem_flags.USE_HOST_PTR
        return cl.Buffer(self._there.context, flags, hostbuf=array)

    def enqueue(self, stamped: bool) -> None:
        """Starts the launches, each with an event of its own if they are `stamped`."""
        loaded = self._loaded
        loaded.arguments_of(self)
        self._ended = False
        self._began = perf_counter()
        last = len(loaded.calls) - 1
        for index, call in enumerate(loaded.calls):
            event = c_void_p() if stamped or index in (0, last) else None
            status = driver.enqueue_kernel(*call, None if event is None else byref(event))
            checked(status, f"launch {index}, of '{loaded.program.launches[index].kernel}'")
            if event is not None:
                self._events.append(cl.Event.from_int_ptr(event.value, retain=False))
        checked(driver.flush(self._there.queue.int_ptr), "its launches")

    def finish(self) -> tuple[float, float]:
        """Waits, and returns when the first launch began and the last ended, by `perf_counter`.

        Raises
        ------
        Failed
            A launch failed.
        """
        with self._there.turn:
            return self._finish()

    def _finish(self) -> tuple[float, float]:
        there = self._there
        try:
            maps = []
            if there.shares_memory:
                # What the device wrote is the host's to see while it is mapped.
                with told("its outputs cannot be mapped"):
                    maps = [self._mapped(buffer) for buffer in self.made]
            checked(driver.finish(there.queue.int_ptr), "its launches")
            self._ended = True
            with told("its outputs cannot be unmapped"):
                for mapped in maps:
                    mapped.release(there.queue)
            return self._stamps()
        finally:
            self.end()

    def end(self) -> None:
        """Waits until the device has left off, well or not."""
        if not self._ended:
            self._ended = True
            with self._there.turn:
                driver.finish(self._there.queue.int_ptr)
        if self._there.shares_memory:
            for array in self.outputs:
                if self._there.pending.get(array.ctypes.data) is self:
                    del self._there.pending[array.ctypes.data]

    def _mapped(self, buffer: cl.Buffer) -> Any:
        """The map of a whole buffer, once the launches have ended."""
        array, _ = cl.enqueue_map_buffer(
            *(self._there.queue, buffer, cl.map_flags.READ, 0, (buffer.size,), np.uint8),
            is_blocking=False,
        )
        return array.base

    def _stamps(self) -> tuple[float, float]:
        if not self._events:
            return self._began, self._began
        with told("its launches"):
            queued = self._events[0].profile.queued
            start, end = self._events[0].profile.start, self._events[-1].profile.end
        now = perf_counter()
        # The device's clock has an origin of its own.
        times = (self._began + (stamp - queued) * 1e-9 for stamp in (start, end))
        first, last = (min(max(time, self._began), now) for time in times)
        return first, last

    def seconds(self) -> list[float]:
        """What each launch took, of a run that was `stamped` and has ended."""
        with told("its launches"):
            return [(e.profile.end - e.profile.start) * 1e-9 for e in self._events]
