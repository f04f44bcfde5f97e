"""Where groups run so that work and transfers, one after the other, take least: a minimum cut."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from hetsched.cost import CostModel
from hetsched.energy import active_joules
from hetsched.errors import PluginError
from hetsched.graph import Graph
from hetsched.operation import group_flops, group_nbytes
from hetsched.partitioner import Partitioner, check_objective
from hetsched.plan import Plan, group_tasks, make_plan
from hetsched.stages.serial import Serial, cheapest, in_runs
from hetsched.stages.traffic import Traffic
from hetsched.system import System


@dataclass(frozen=True)
class Mincut(Partitioner):
    """The least sum of all groups' work and of all transfers, each tensor once to a device.

    Exact for two devices that can hold it, such as a small one at hand and a fast one behind a slow
    link; what overlaps and what launches take is not counted. `back=no` forbids data to return to
    the first device once they have left it. With short memory or more devices it looks further,
    for a limited time, and notes how far from the optimum the sum can be. `objective=energy` adds
    up joules instead, each device at work while all others idle.

    References
    ----------
    Hu et al., "Dynamic adaptive DNN surgery for inference acceleration on the edge" (DADS),
    INFOCOM 2019, https://doi.org/10.1109/INFOCOM.2019.8737614
    """

    objectives = ("latency", "energy")
    back: bool = True
    objective: str = "latency"

    def partition(self, graph: Graph, system: System, costs: CostModel) -> Plan:
        if not self.back and len(system.devices) != 2:
            raise PluginError(
                f"back=no is for two devices, and there are {len(system.devices)}; leave it out"
            )
        check_objective(self, self.objective)
        tasks = group_tasks(graph, system, costs)
        traffic = Traffic.of(tasks)
        energy = self.objective == "energy"
        if energy:
            work = {group.name: (group_flops(group), group_nbytes(group)) for group in graph.groups}
            traffic = in_joules(traffic, work)
        found = Serial(np.zeros(0, np.int64), 0.0, 0.0)
        if traffic.count:
            found = cheapest(traffic, self.back)
        order = [tasks.tasks[task].name for task in in_runs(traffic, found.device)]
        names = [device.name for device in system.devices]
        placement = {
            task.name: names[device] for task, device in zip(tasks.tasks, found.device, strict=True)
        }
        given = [] if self.back else ["back=no"]
        given += [f"objective={self.objective}"] if energy else []
        spec = ":".join([self.name, ",".join(given)]) if given else self.name
        plan = make_plan(graph, system, costs, placement, order, spec)
        notes: tuple[str, ...] = ()
        if found.seconds:
            least = f"at least {found.bound / found.seconds * 100:.1f} % of it are needed"
            known = "proved least" if found.optimal else least
            unit = "mJ" if energy else "ms"
            notes = (f"work and transfers in turn: {found.seconds * 1e3:.3f} {unit}, {known}",)
        return replace(plan, objective=self.objective, notes=notes)


def in_joules(traffic: Traffic, work: Mapping[str, tuple[int, int]]) -> Traffic:
    """The same with joules for seconds, when one thing is done at a time and the rest idles.

    `work` are FLOPs and bytes of each task.

    Raises
    ------
    DeviceError
        A device has no watts.
    """
    system = traffic.tasks.system
    names = [device.name for device in system.devices]
    idle = sum(device.idle_watts for device in system.devices)
    joules = _times(traffic.seconds, idle)
    for row, task in zip(joules, traffic.tasks.tasks, strict=True):
        for column, device in enumerate(system.devices):
            seconds = task.seconds.get(device.name, np.inf)
            beyond = active_joules(device, seconds, *work[task.name])
            row[column] += beyond if np.isfinite(row[column]) else 0.0
    of_bytes = np.zeros_like(traffic.per_byte)
    for link in system.links:
        of_bytes[names.index(link.source), names.index(link.sink)] = link.joules_per_byte
    return replace(
        traffic,
        seconds=joules,
        latency=_times(traffic.latency, idle),
        per_byte=traffic.per_byte * idle + of_bytes,
        entry=_times(traffic.entry, idle),
        exit=_times(traffic.exit, idle),
    )


def _times(seconds: np.ndarray, watts: float) -> np.ndarray:
    """The product, where what cannot be stays so at 0 watts."""
    product = np.full_like(seconds, np.inf)
    np.multiply(seconds, watts, out=product, where=np.isfinite(seconds))
    return product
