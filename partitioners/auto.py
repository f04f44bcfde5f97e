"""The best of all partitioners."""

from dataclasses import dataclass, replace

from hetsched.cost import CostModel, price
from hetsched.errors import InfeasiblePlan
from hetsched.graph import Graph
from hetsched.objective import objective
from hetsched.partitioner import Partitioner
from hetsched.plan import Plan
from hetsched.plugin import load, names
from hetsched.system import System


@dataclass(frozen=True)
class Auto(Partitioner):
    """The plan that the simulator finds best, every single-device plan among them.

    A tie goes to the single device, then to the first name, so that a cut has to pay.
    """

    objective: str = "latency"

    def partition(self, graph: Graph, system: System, costs: CostModel) -> Plan:
        goal = objective(self.objective)
        prices = price(graph, system, costs)
        singles = [f"single:device={device.name}" for device in system.devices]
        others = [name for name in names(Partitioner) if name not in ("auto", "single")]
        found: list[tuple[float, Plan]] = []
        notes: list[str] = []
        for spec in [*singles, *others]:
            try:
                plan = load(Partitioner, spec).partition(graph, system, prices)
            except InfeasiblePlan as error:
                notes.append(f"{spec}: no plan, {error}")
                continue
            found.append((goal.value(plan), plan))
            notes.append(f"{spec}: {goal.text(plan)} predicted, parts: {len(plan.parts)}")
        if not found:
            raise InfeasiblePlan("; ".join(notes))
        best = min(found, key=lambda item: item[0])[1]
        if len(best.devices) == 1 and len(system.devices) > 1:
            notes.append(f"hybrid does not pay: '{best.devices[0]}' alone is predicted fastest")
        return replace(best, objective=self.objective, notes=(*best.notes, *notes))
