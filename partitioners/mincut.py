"""Where groups run so that work and transfers, one after the other, take least: a minimum cut."""

from dataclasses import dataclass, replace

import numpy as np

from hetsched.cost import CostModel
from hetsched.errors import PluginError
from hetsched.graph import Graph
from hetsched.partitioner import Partitioner
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
    for a limited time, and notes how far from the optimum the sum can be.

    References
    ----------
    Hu et al., "Dynamic adaptive DNN surgery for inference acceleration on the edge" (DADS),
    INFOCOM 2019, https://doi.org/10.1109/INFOCOM.2019.8737614
    """

    back: bool = True

    def partition(self, graph: Graph, system: System, costs: CostModel) -> Plan:
        if not self.back and len(system.devices) != 2:
            raise PluginError(
                f"back=no is for two devices, and there are {len(system.devices)}; leave it out"
            )
        tasks = group_tasks(graph, system, costs)
        traffic = Traffic.of(tasks)
        found = Serial(np.zeros(0, np.int64), 0.0, 0.0)
        if traffic.count:
            found = cheapest(traffic, self.back)
        order = [tasks.tasks[task].name for task in in_runs(traffic, found.device)]
        names = [device.name for device in system.devices]
        placement = {
            task.name: names[device] for task, device in zip(tasks.tasks, found.device, strict=True)
        }
        spec = self.name if self.back else f"{self.name}:back=no"
        plan = make_plan(graph, system, costs, placement, order, spec)
        notes: tuple[str, ...] = ()
        if found.seconds:
            least = f"at least {found.bound / found.seconds * 100:.1f} % of it are needed"
            known = "proved least" if found.optimal else least
            notes = (f"work and transfers in turn: {found.seconds * 1e3:.3f} ms, {known}",)
        return replace(plan, notes=notes)
