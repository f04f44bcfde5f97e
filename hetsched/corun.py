"""How much longer kernels take while all devices compute than by themselves.

Devices share more than memory: a host may have put two virtual cores on one, and a clock may fall
when more cores work. So the kernels of a few models are run on each device by itself and on all at
once, in turns, as they are measured for their prices (`sequence.py`). The profile store keeps the
ratio as a factor of the devices.
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

# Turns of bursts on each device and on all; each is so long, or so many runs of the kernels.
TURNS, RUNS, SHORTEST_SECONDS = 9, 4, 0.02


def sharing_units(devices: Sequence[Device]) -> tuple[Device, ...]:
    """The first device of each unit that computes in the host's memory and can be measured."""
    found: dict[str, Device] = {}
    for device in devices:
        if device.memory_space == "host" and not device.modelled:
            found.setdefault(device.unit, device)
    return tuple(found.values())


def measured_slowdown(
    graphs: Sequence[Graph],
    devices: Sequence[Device],
    store: Store,
    settle: Callable[[], None] | None = None,
) -> Factor:
    """What the groups of `graphs` take on all `devices` at once over what they take on each alone.

    The median of the turns, never below one, and kept in the store for systems of these devices.
    Groups that a device does not run are left out. `settle` is called before each turn, and may
    wait.

    Raises
    ------
    DeviceError
        The target of a device is not available here.
    PartError
        A kernel fails.
    """
    units = sharing_units(devices)
    ratios: list[float] = []
    for graph in graphs if len(units) > 1 else ():
        ratios += _ratios(graph, units, settle)
    if not ratios:
        return Factor(1.0, 0.0)
    factor = Factor(max(1.0, statistics.median(ratios)), margin(ratios), len(ratios))
    store.add_factor(SLOWDOWN, ends_of(devices), factor)
    return factor


def _ratios(
    graph: Graph, units: Sequence[Device], settle: Callable[[], None] | None
) -> list[float]:
    """Of each turn, the mean of the devices."""
    found = []
    with ExitStack() as stack:
        loaded = [stack.enter_context(KernelSequence(graph, graph.groups, unit)) for unit in units]
        workers = stack.enter_context(ThreadPoolExecutor(len(units)))
        longest = max(_total(sequence.burst(0.0)) for sequence in loaded)
        seconds = max(SHORTEST_SECONDS, RUNS * longest)
        for _ in range(TURNS if longest else 0):
            if settle:
                settle()
            alone = [_total(sequence.burst(seconds)) for sequence in loaded]
            waiting = [workers.submit(sequence.burst, seconds) for sequence in loaded]
            at_once = [_total(burst.result()) for burst in waiting]
            pairs = zip(at_once, alone, strict=True)
            found.append(statistics.fmean(now / before for now, before in pairs))
    return found


def _total(times: Mapping[str, Sequence[float]]) -> float:
    return sum(statistics.median(each) for each in times.values())
