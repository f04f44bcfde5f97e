"""How much longer kernels take while all devices compute than by themselves.

Devices share more than memory: a host may have put two virtual cores on one, its neighbours use the
other thread of a core, and a clock falls when more cores work. So the kernels of a few models are
run on all devices at once, as they are measured alone (`sequence.py`), and what they take is held
against their prices. The profile store keeps the ratio as a factor of the devices.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

from hetsched.confidence import margin
from hetsched.device import Device
from hetsched.graph import Graph
from hetsched.overheads import SLOWDOWN, ends_of
from hetsched.sequence import KernelSequence
from hetsched.store import Factor, Store

# Bursts on all devices at once, each so many runs of the kernels, or so long.
TURNS, RUNS, SHORTEST_SECONDS = 9, 6, 0.03
# Seconds of each group on each device, by the names of both.
Rows = Mapping[str, Mapping[str, float]]


def sharing_units(devices: Sequence[Device]) -> tuple[Device, ...]:
    """The first device of each unit that computes in the host's memory and can be measured."""
    found: dict[str, Device] = {}
    for device in devices:
        if device.memory_space == "host" and not device.modelled:
            found.setdefault(device.unit, device)
    return tuple(found.values())


def measured_slowdown(
    courses: Sequence[tuple[Graph, Rows]],
    devices: Sequence[Device],
    store: Store,
    settle: Callable[[], None] | None = None,
) -> Factor:
    """What the groups of some graphs take on all `devices` at once, over their prices.

    The median of the bursts, never below one, and kept in the store for systems of these devices.
    Groups without a price on each device are left out. `settle` is called before each burst, and
    may wait.

    Raises
    ------
    DeviceError
        The target of a device is not available here.
    PartError
        A kernel fails.
    """
    units = sharing_units(devices)
    ratios: list[float] = []
    for graph, rows in courses if len(units) > 1 else ():
        ratios += _ratios(graph, rows, units, settle)
    value = max(1.0, statistics.median(ratios)) if ratios else 1.0
    factor = Factor(value, margin(ratios) if ratios else 0.0, max(1, len(ratios)))
    if ratios:
        store.add_factor(SLOWDOWN, ends_of(devices), factor)
    return factor


def _ratios(
    graph: Graph, rows: Rows, units: Sequence[Device], settle: Callable[[], None] | None
) -> list[float]:
    """Of each burst, the mean of the devices."""
    names = [device.name for device in units]
    groups = [g for g in graph.groups if all(name in rows.get(g.name, {}) for name in names)]
    if not groups:
        return []
    alone = [sum(rows[group.name][name] for group in groups) for name in names]
    seconds = max(SHORTEST_SECONDS, RUNS * max(alone))
    found = []
    with ExitStack() as stack:
        loaded = [stack.enter_context(KernelSequence(graph, groups, unit)) for unit in units]
        workers = stack.enter_context(ThreadPoolExecutor(len(units)))
        for _ in range(TURNS):
            if settle:
                settle()
            bursts = [workers.submit(sequence.burst, seconds) for sequence in loaded]
            taken = [_total(burst.result()) for burst in bursts]
            found.append(
                statistics.fmean(now / before for now, before in zip(taken, alone, strict=True))
            )
    return found


def _total(times: Mapping[str, Sequence[float]]) -> float:
    return sum(statistics.median(each) for each in times.values())
