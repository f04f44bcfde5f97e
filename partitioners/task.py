"""Scheduling of the kernel groups, one by one."""

from dataclasses import dataclass

from hetsched.cost import CostModel
from hetsched.graph import Graph
from hetsched.partitioner import Partitioner, scheduled
from hetsched.plan import Plan
from hetsched.system import System


@dataclass(frozen=True)
class Task(Partitioner):
    """Each kernel group where and when `scheduler` says, joined to parts where that delays nothing.

    The schedule is that of single groups, as if each handed over at once; parts hand over at their
    end.
    """

    # Half a second of search or less, and the same on any machine.
    scheduler: str = "portfolio:seconds=0,iterations=4000,prove=no"

    def partition(self, graph: Graph, system: System, costs: CostModel) -> Plan:
        return scheduled(graph, system, costs, self.name, self.scheduler)
