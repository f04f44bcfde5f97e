"""List scheduling of the kernel groups."""

from dataclasses import dataclass

from hetsched.cost import CostModel
from hetsched.errors import InfeasiblePlan
from hetsched.graph import Graph
from hetsched.partitioner import Partitioner, arrange
from hetsched.plan import Plan, group_tasks, make_plan
from hetsched.system import System
from hetsched.tasks import TaskGraph, Timeline, upward_rank


@dataclass(frozen=True)
class Task(Partitioner):
    """Heterogeneous earliest finish time (HEFT), with insertion.

    Groups are taken by upward rank, the longest mean-cost path to an output, and each goes where it
    finishes first. O(groups * devices * groups on a device) time.

    References
    ----------
    Topcuoglu, Hariri and Wu, "Performance-effective and low-complexity task scheduling for
    heterogeneous computing", IEEE TPDS 13(3), 2002, https://doi.org/10.1109/71.993206
    """

    def partition(self, graph: Graph, system: System, costs: CostModel) -> Plan:
        tasks = group_tasks(graph, system, costs)
        timeline = heft(tasks)
        placement = {name: slot.device for name, slot in timeline.slots.items()}
        runs = arrange(timeline)
        order = [name for run in runs for name in run]
        cuts = [run[0] for run in runs]
        return make_plan(graph, system, costs, placement, order, self.name, cuts)


def heft(tasks: TaskGraph) -> Timeline:
    """Each task, by upward rank, in the gap where it finishes first.

    A device whose memory is full is passed over.

    Raises
    ------
    InfeasiblePlan
        No device can hold a task beside what it holds already.
    """
    rank = upward_rank(tasks)
    free = {device.name: device.memory_bytes for device in tasks.system.devices}
    timeline = Timeline(tasks)
    # Stable, so tasks of equal rank stay in topological order.
    for task in sorted(tasks.tasks, key=lambda task: -rank[task.name]):
        fitting = [name for name in free if name in task.seconds]
        fitting = [name for name in fitting if task.memory_bytes <= free[name]]
        slots = [timeline.earliest(task.name, name) for name in fitting]
        slots = [slot for slot in slots if slot.finish < float("inf")]
        if not slots:
            raise InfeasiblePlan(
                f"no device that can run '{task.name}' has {task.memory_bytes / 2**20:.1f} MiB "
                "left for it and a link to its inputs; add a device, raise memory_bytes of one, "
                "or use another partitioner"
            )
        best = min(slots, key=lambda slot: slot.finish)
        free[best.device] -= task.memory_bytes
        timeline.place(best)
    return timeline
