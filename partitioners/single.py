"""The whole graph on one device."""

from dataclasses import dataclass

from hetsched.cost import CostModel, price
from hetsched.errors import InfeasiblePlan
from hetsched.graph import Graph
from hetsched.partitioner import Partitioner
from hetsched.plan import Plan, make_plan, simulate
from hetsched.system import System


@dataclass(frozen=True)
class Single(Partitioner):
    """All groups on `device`; without one, on the device that is predicted fastest."""

    device: str = ""

    def partition(self, graph: Graph, system: System, costs: CostModel) -> Plan:
        devices = [system.device(self.device)] if self.device else system.devices
        plans: list[Plan] = []
        refused: list[str] = []
        for device in devices:
            try:
                plans.append(_on(device.name, graph, system, costs))
            except InfeasiblePlan as error:
                refused.append(str(error))
        if not plans:
            raise InfeasiblePlan("; ".join(refused))
        return min(plans, key=lambda plan: simulate(plan).makespan)


def _on(device: str, graph: Graph, system: System, costs: CostModel) -> Plan:
    prices = price(graph, system, costs)
    for group in graph.groups:
        if device not in prices.seconds[group.name]:
            raise InfeasiblePlan(
                f"'{device}' alone cannot run {group.ops[0]}: {prices.refusals[group.name][device]}"
            )
    order = [group.name for group in graph.groups]
    placement = dict.fromkeys(order, device)
    return make_plan(graph, system, prices, placement, order, f"single:device={device}")
