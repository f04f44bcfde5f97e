"""Scheduling of the kernel groups, one by one."""

from dataclasses import dataclass

from hetsched.cost import CostModel
from hetsched.graph import Graph
from hetsched.partitioner import Partitioner, arrange
from hetsched.plan import Plan, group_tasks, make_plan
from hetsched.plugin import load
from hetsched.problem import Problem
from hetsched.scheduler import Scheduler
from hetsched.system import System


@dataclass(frozen=True)
class Task(Partitioner):
    """Each kernel group where and when `scheduler` says, joined to parts where that delays nothing.

    The schedule is that of single groups, as if each handed over at once; parts hand over at their
    end.
    """

    scheduler: str = "heft"

    def partition(self, graph: Graph, system: System, costs: CostModel) -> Plan:
        tasks = group_tasks(graph, system, costs)
        problem = Problem.of(tasks)
        schedule = load(Scheduler, self.scheduler).schedule(problem).schedule(problem)
        runs = arrange(tasks, schedule)
        placement = {slot.task: slot.device for slot in schedule.slots}
        order = [name for run in runs for name in run]
        cuts = [run[0] for run in runs]
        return make_plan(graph, system, costs, placement, order, self.name, cuts)
