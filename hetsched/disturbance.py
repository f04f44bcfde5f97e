"""Whether something else had a part of the machine while a device was measured.

Three things tell it. The processor's time that the host gave to others (steal time) and how often
the system took a core away for another thread are counted while a burst runs. And a short
computation and a short read of memory, which always take the same time on an undisturbed core, are
timed before and behind it: a neighbour on the other thread of a core, in another machine on the
same host, shows in no counter.
"""

import os
import resource
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from time import perf_counter

import numpy as np

from hetsched.device import Device
from hetsched.host import cores, pinned

# What a reference computes on, which stays in the nearest cache, and how often; what the other one
# reads, which does not.
ELEMENTS, PASSES = 4096, 200
READ_NBYTES = 1 << 22
REPEATS = 3
# A reference that takes so many times its least has company. Memory wavers more than arithmetic.
SLOWER_COMPUTE, SLOWER_MEMORY = 1.15, 1.5
# Of the time of a burst on a core: the share that the host may give to others, and how often in a
# second another thread may have the core.
MOST_STOLEN = 0.02
MOST_SWITCHES = 100.0


@dataclass(frozen=True)
class Reading:
    """Counters of a moment in seconds, and what the references take then, in seconds.

    `switches` is how often threads of this process lost a core that they wanted.
    """

    now: float
    stolen: float = 0.0
    switches: int = 0
    compute: float = 0.0
    memory: float = 0.0


class Witness:
    """Says of what was measured between `begin` and `end` whether it was disturbed.

    `read` takes a reading of a device. Each reference is held against the least time that it took
    on the device so far.
    """

    def __init__(self, read: Callable[[Device], Reading] | None = None) -> None:
        self._read = read or reading
        self._compute: dict[str, float] = {}
        self._memory: dict[str, float] = {}
        self._before = Reading(0.0)

    def begin(self, device: Device) -> None:
        self._before = self._taken(device)

    def end(self, device: Device) -> str:
        """What disturbed the device since `begin`, in words; empty if nothing did."""
        before, after = self._before, self._taken(device)
        seconds = max(after.now - before.now, 1e-9)
        count = max(1, len(device.cores))
        told = []
        stolen = (after.stolen - before.stolen) / seconds / count
        if stolen > MOST_STOLEN:
            told.append(f"{stolen:.0%} of the processor stolen")
        switches = (after.switches - before.switches) / seconds / count
        if switches > MOST_SWITCHES:
            told.append(f"{switches:.0f} involuntary switches/s")
        for name, most, least, found in (
            ("compute", SLOWER_COMPUTE, self._compute, max(before.compute, after.compute)),
            ("memory", SLOWER_MEMORY, self._memory, max(before.memory, after.memory)),
        ):
            if found > most * least[device.unit]:
                told.append(f"{name} reference {found / least[device.unit]:.2f} x its best")
        return ", ".join(told)

    def _taken(self, device: Device) -> Reading:
        found = self._read(device)
        for least, seconds in ((self._compute, found.compute), (self._memory, found.memory)):
            least[device.unit] = min(least.get(device.unit, seconds), seconds)
        return found


def reading(device: Device) -> Reading:
    """Of this machine; a device without cores of its own has no references."""
    compute = memory = 0.0
    if device.cores:
        with pinned(device.cores[:1]):
            compute = statistics.median(_compute_seconds() for _ in range(REPEATS))
            memory = statistics.median(_read_seconds() for _ in range(REPEATS))
    switches = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
    return Reading(
        perf_counter(), stolen_seconds(device.cores or cores()), switches, compute, memory
    )


def stolen_seconds(chosen: tuple[int, ...], path: Path = Path("/proc/stat")) -> float:
    """What the host has given to others of the time of these cores; 0 where nothing tells it."""
    try:
        lines = path.read_text(encoding="ascii", errors="replace").splitlines()
        ticks = os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError):
        return 0.0
    # User, nice, system, idle, I/O, interrupts, soft ones, and then what was stolen.
    rows = {fields[0]: fields[1:] for line in lines if (fields := line.split())}
    named = (rows.get(f"cpu{core}", []) for core in chosen)
    return sum(float(fields[7]) for fields in named if len(fields) > 7) / ticks


def _compute_seconds() -> float:
    data, factor = _operands()
    begin = perf_counter()
    for _ in range(PASSES):
        np.multiply(data, factor, out=data)
    return perf_counter() - begin


def _read_seconds() -> float:
    array = _far()
    begin = perf_counter()
    array.max()
    return perf_counter() - begin


@cache
def _operands() -> tuple[np.ndarray, np.float32]:
    # By 1: nothing grows or dies away, which would change how long it takes.
    return np.ones(ELEMENTS, np.float32), np.float32(1.0)


@cache
def _far() -> np.ndarray:
    # Written to, as pages that never were are all the same one.
    return np.ones(READ_NBYTES // 8, np.int64)
