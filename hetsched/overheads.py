"""What a run costs beside its parts and links, and what devices take from each other.

Measured with parts that do next to nothing, and with reads of more than the caches hold. The
profile store keeps the numbers as factors; they belong to the devices and to the code that runs
plans.
"""

import statistics
from collections.abc import Sequence
from ctypes import CDLL, c_int32, c_void_p
from dataclasses import dataclass
from functools import partial
from math import inf
from threading import Barrier, Thread
from time import perf_counter
from typing import Any

import numpy as np

from hetsched.confidence import margin
from hetsched.crew import address, copying
from hetsched.device import Device
from hetsched.dtype import empty
from hetsched.executor import Executor
from hetsched.host import pinned
from hetsched.links import load_library, runtime
from hetsched.plugin import load
from hetsched.request import Step
from hetsched.store import Factor, Store
from hetsched.target import Code, Kernel, Target

KINDS = ("call", "start", "launch", "memory")
WARM_RUNS, RUNS, BURSTS = 20, 25, 5
# Parts in a row, by which the cost of one more is known.
ROW = 16
WORDS = 2
# A value as crew.c takes it, and the number of the kind that is an address.
VALUE = np.dtype([("kind", "i4"), ("unused", "i4"), ("content", "i8")])
ADDRESS = 4
# Of each device, more than caches hold.
READ_WORDS = 1 << 24
READS, TURNS = 5, 4
# Devices that lose less than this share of their rates do not disturb each other.
NOTICEABLE = 0.05


@dataclass(frozen=True)
class Overheads:
    """Seconds, and bytes a second.

    `call` is what a run takes beside its parts on one device, from the call until it returns;
    `start` the same where several devices have to be woken. `launch` is what each part costs there
    beside its kernels. `memory` is what all devices together read of the host's memory, infinite
    where that is what each of them reads by itself.
    """

    call: float
    start: float = 0.0
    launch: float = 0.0
    memory: float = inf


def overheads(devices: Sequence[Device], store: Store) -> Overheads:
    """The overheads as the store has them, or as they are measured now and then kept."""
    ends = ", ".join(f"{device.fingerprint} {device.name}" for device in devices)
    subject = f"{ends} by {runtime()}"
    known = {kind: store.factors(kind).get(subject) for kind in KINDS}
    found = {kind: factor.value for kind, factor in known.items() if factor is not None}
    if len(found) < len(KINDS):
        for kind, factor in _measured(devices).items():
            store.add_factor(kind, subject, factor)
            found[kind] = factor.value
    return Overheads(**found)


def _measured(devices: Sequence[Device]) -> dict[str, Factor]:
    units = list({device.unit: device for device in devices}.values())
    first, *others = units
    call = _run_seconds([first])
    if not others:
        row = _run_seconds([first] * (1 + ROW))
        no = {"start": Factor(0.0), "memory": Factor(inf)}
        return {"call": call, "launch": _one_of(row, call)} | no
    start = _run_seconds(units)
    row = _run_seconds([*others, *[first] * (1 + ROW)])
    memory = _memory([device for device in units if device.memory_space == "host"])
    return {"call": call, "start": start, "launch": _one_of(row, start), "memory": memory}


def _one_of(row: Factor, single: Factor) -> Factor:
    """What each part more takes, of `ROW`."""
    seconds = max(0.0, row.value - single.value) / ROW
    return Factor(seconds, (row.margin + single.margin) / ROW, row.repeats)


def _run_seconds(devices: Sequence[Device]) -> Factor:
    """A run of a part on each of `devices`, those of one device in a chain.

    The least of the medians of some bursts: what disturbs a run only makes it longer.
    """
    steps = []
    read: dict[str, str] = {}
    for index, device in enumerate(devices):
        made = f"made{index}"
        given = read.get(device.name, "given")
        steps.append(Step(f"part{index}", device, (given,), (made,), partial(_Nearly, device)))
        read[device.name] = made
    executor = Executor(steps, tuple(read.values()), {})
    values = {"given": np.zeros(WORDS, np.int64)}
    bursts = []
    try:
        for _ in range(WARM_RUNS):
            executor.run(values)
        for _ in range(BURSTS):
            times = []
            for _ in range(RUNS):
                begin = perf_counter()
                executor.run(values)
                times.append(perf_counter() - begin)
            bursts.append(statistics.median(times))
    finally:
        executor.close()
    return Factor(min(bursts), margin(bursts), BURSTS * RUNS)


class _Nearly(Kernel):
    """A part that does nearly nothing: it copies two numbers."""

    any_thread = True

    def __init__(self, device: Device) -> None:
        self._library: CDLL | None = None
        self._table = np.array([WORDS, 0, 0], np.uint64)
        self._given = np.array([(ADDRESS, 0, address(self._table))], VALUE)
        self._result = np.zeros(1, VALUE)
        self._arguments = None, address(self._given), 1, address(self._result)
        crew = load(Target, device.target).crew(device)
        if crew is not None:
            self._library = load_library(crew)
            self._copy = self._library.crew_copy
            self._copy.argtypes = (c_void_p, c_void_p, c_int32, c_void_p)

    def run(self, inputs: Sequence[Any]) -> Sequence[Any]:
        (array,) = inputs
        made = empty(array.shape, array.dtype)
        if self._library is None:
            made[:] = array
        else:
            # As code is called from Python: by the addresses in a table.
            self._table[1], self._table[2] = address(array), address(made)
            self._copy(*self._arguments)
        return [made]

    def code(self) -> Code | None:
        if self._library is None:
            return None
        return copying(self._library, ((WORDS,), np.dtype(np.int64)))

    def close(self) -> None:
        self._library = None


def _memory(devices: Sequence[Device]) -> Factor:
    """Bytes a second that `devices` read together; infinite where they read as much alone."""
    arrays = [np.zeros(READ_WORDS, np.int64) for _ in devices]
    for array in arrays:
        # Pages that were never written to are all the same one.
        array += 1
    alone: list[float] = []
    together: list[float] = []
    for _ in range(TURNS):
        alone.append(sum(_rates([(d, a)])[0] for d, a in zip(devices, arrays, strict=True)))
        together.append(sum(_rates(list(zip(devices, arrays, strict=True)))))
    disturbed = statistics.median(together) < (1 - NOTICEABLE) * statistics.median(alone)
    rate = statistics.median(together) if disturbed else inf
    return Factor(rate, margin(together), len(together))


def _rates(work: Sequence[tuple[Device, np.ndarray]]) -> list[float]:
    """Bytes a second that each device reads while the others do."""
    rates = [0.0] * len(work)
    ready = Barrier(len(work))

    def read(index: int, device: Device, array: np.ndarray) -> None:
        times = []
        with pinned(device.cores):
            ready.wait()
            for _ in range(READS):
                begin = perf_counter()
                np.max(array)
                times.append(perf_counter() - begin)
        rates[index] = array.nbytes / statistics.median(times)

    threads = [Thread(target=read, args=(i, *item)) for i, item in enumerate(work)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return rates
