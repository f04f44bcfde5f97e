"""What a run costs beside its parts and links, and what devices take from each other.

Measured by the time around parts that leave nothing else in the near caches, as those of networks
do, around parts that do next to nothing, and with reads of more than the caches hold. The
profile store keeps the numbers as factors; they belong to the devices and to the code that runs
plans.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import inf
from threading import Barrier, Thread
from time import perf_counter

import numpy as np

from hetsched.confidence import margin
from hetsched.device import Device
from hetsched.executor import Executor
from hetsched.host import pinned
from hetsched.links import copying, runtime
from hetsched.request import Step
from hetsched.schedule import Schedule
from hetsched.store import Factor, Store

KINDS = ("call", "start", "warm", "memory")
# What `corun.py` measures; it belongs to the devices, whatever code runs plans.
SLOWDOWN = "slowdown"
WARM_RUNS, RUNS, BURSTS = 20, 25, 5
# Parts in a row, by which the cost of one more is known.
ROW = 16
WORDS = 2
# Of parts after which the code that runs them has to come from far again: it is there after less,
# and takes three times as long where twice as much has been read and written.
DISPLACING_WORDS = 1 << 20
DISPLACED_NBYTES = 2 * 8 * DISPLACING_WORDS
# Of each device, more than caches hold.
READ_WORDS = 1 << 24
READS, TURNS = 5, 4
# Devices that lose less than this share of their rates do not disturb each other.
NOTICEABLE = 0.05


@dataclass(frozen=True)
class Overheads:
    """Seconds, and bytes a second.

    `call` is what a run takes beside its parts on one device, from the call until it returns;
    `start` the same where several devices have to be woken; both after parts that read and write
    `DISPLACED_NBYTES`. `warm` is the share that is left of it where they touch nothing. `launch` is
    what each part costs beside its kernels, by device. `memory` is what all devices together read
    of the host's memory, infinite where that is what each of them reads by itself. `slowdown` is
    how many times as long a kernel takes while all devices compute; one where that was not
    measured.
    """

    call: float
    start: float = 0.0
    memory: float = inf
    launch: Mapping[str, float] = field(default_factory=dict)
    slowdown: float = 1.0
    warm: float = 1.0


def ends_of(devices: Sequence[Device]) -> str:
    """What factors of these devices belong to; those that are modelled have none."""
    return ", ".join(f"{d.fingerprint} {d.name}" for d in devices if not d.modelled)


def overheads(devices: Sequence[Device], store: Store) -> Overheads:
    """The overheads as the store has them, or as they are measured now and then kept.

    Devices that are modelled say themselves what a launch takes.
    """
    modelled = {d.name: d.launch_seconds for d in devices if d.modelled}
    devices = [device for device in devices if not device.modelled]
    if not devices:
        return Overheads(0.0, launch=modelled)
    subject = f"{ends_of(devices)} by {runtime()}"
    kinds = (*KINDS, *(f"launch of {device.name}" for device in devices))
    known = {kind: store.factors(kind).get(subject) for kind in kinds}
    found = {kind: factor.value for kind, factor in known.items() if factor is not None}
    if len(found) < len(kinds):
        for kind, factor in _measured(devices).items():
            store.add_factor(kind, subject, factor)
            found[kind] = factor.value
    launch = {device.name: found[f"launch of {device.name}"] for device in devices}
    slowed = store.factors(SLOWDOWN).get(ends_of(devices))
    return Overheads(
        found["call"],
        found["start"],
        found["memory"],
        {**launch, **modelled},
        max(1.0, slowed.value) if slowed else 1.0,
        found["warm"],
    )


def _measured(devices: Sequence[Device]) -> dict[str, Factor]:
    units = list({device.unit: device for device in devices}.values())
    call = _run_seconds(units[:1], DISPLACING_WORDS)
    warm = _run_seconds(units[:1])
    share = min(1.0, warm.value / call.value) if call.value > 0 else 1.0
    found = {"call": call, "start": Factor(0.0), "memory": Factor(inf)}
    found["warm"] = Factor(max(0.0, share), repeats=warm.repeats)
    if len(units) > 1:
        found["start"] = _run_seconds(units, DISPLACING_WORDS)
        found["memory"] = _memory([device for device in units if device.memory_space == "host"])
    for device in devices:
        others = [other for other in units if other.unit != device.unit]
        single = _run_seconds([*others, device])
        row = _run_seconds([*others, *[device] * (1 + ROW)])
        found[f"launch of {device.name}"] = _one_of(row, single)
    return found


def _one_of(row: Factor, single: Factor) -> Factor:
    """What each part more takes, of `ROW`."""
    seconds = max(0.0, row.value - single.value) / ROW
    return Factor(seconds, (row.margin + single.margin) / ROW, row.repeats)


def _run_seconds(devices: Sequence[Device], words: int = 0) -> Factor:
    """A run of a small part on each of `devices`, those of one device in a chain, beside its parts.

    With `words`, before each is one that reads so many and writes as many. It is the time from call
    to return without that of the parts of the unit which they keep longest; the least of the
    medians of some bursts, as what disturbs a run only makes it longer.
    """
    steps = []
    read: dict[str, str] = {}
    for index, device in enumerate(devices):
        if words:
            large = partial(copying, device, words)
            steps.append(Step(f"large{index}", device, ("much",), (f"left{index}",), large))
        made = f"made{index}"
        given = read.get(device.name, "given")
        steps.append(
            Step(f"part{index}", device, (given,), (made,), partial(copying, device, WORDS))
        )
        read[device.name] = made
    executor = Executor(steps, tuple(read.values()), {})
    values = {"given": np.zeros(WORDS, np.int64)}
    if words:
        values["much"] = np.ones(words, np.int64)
    bursts = []
    try:
        for _ in range(WARM_RUNS):
            executor.run(values)
        for _ in range(BURSTS):
            found = []
            for _ in range(RUNS):
                begin = perf_counter()
                _, run = executor.run(values)
                found.append((perf_counter() - begin, run))
            # To look at the stamps in between would bring Python's own back into the caches.
            bursts.append(
                statistics.median(
                    seconds - _busiest_seconds(steps, run.schedule()) for seconds, run in found
                )
            )
    finally:
        executor.close()
    return Factor(min(bursts), margin(bursts), BURSTS * RUNS)


def _busiest_seconds(steps: Sequence[Step], schedule: Schedule) -> float:
    busy: dict[str, float] = {}
    for step in steps:
        unit = step.device.unit
        busy[unit] = busy.get(unit, 0.0) + schedule.slot(step.name).seconds
    return max(busy.values())


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
