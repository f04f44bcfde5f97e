"""The best of all partitioners, alone and one on the other."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from hetsched.cost import CostModel, Prices, price
from hetsched.errors import InfeasiblePlan
from hetsched.graph import Graph
from hetsched.objective import OBJECTIVES, objective
from hetsched.partitioner import Partitioner, check_objective, serving
from hetsched.plan import Plan
from hetsched.plugin import load, names
from hetsched.system import System


@dataclass(frozen=True)
class Auto(Partitioner):
    """The plan that the simulator finds best, every single device among them.

    Every partitioner that looks for plans of its own is asked; then those that place and order
    groups are asked again for the pieces that the best split made, so that splits, places, order
    and stages are chosen together. A plan for several devices has to be better than the best single
    device by the share `gain`; of equal plans the first named stays.
    """

    objectives = tuple(OBJECTIVES)
    objective: str = "latency"
    gain: float = 0.02

    def partition(self, graph: Graph, system: System, costs: CostModel) -> Plan:
        return self.plans(graph, system, costs)[0]

    def plans(self, graph: Graph, system: System, costs: CostModel) -> tuple[Plan, ...]:
        check_objective(self, self.objective)
        goal = objective(self.objective)
        notes: list[str] = []
        found: list[tuple[float, Plan]] = []
        for spec, plan in self._candidates(graph, system, price(graph, system, costs)):
            if isinstance(plan, InfeasiblePlan):
                notes.append(f"{spec}: no plan, {plan}")
                continue
            value = goal.value(plan)
            if len(plan.devices) > 1:
                value /= 1 - self.gain
            found.append((value, plan))
            notes.append(f"{spec}: {goal.text(plan)} predicted, parts: {len(plan.parts)}")
        if not found:
            raise InfeasiblePlan("; ".join(dict.fromkeys(notes)))
        ranked = [plan for _, plan in sorted(found, key=lambda item: item[0])]
        if len(ranked[0].devices) == 1 and len(system.devices) > 1:
            (device,) = ranked[0].devices
            notes.append(f"hybrid does not pay: '{device}' alone is predicted best")
        return tuple(
            replace(plan, objective=goal.name, notes=(*plan.notes, *notes))
            for plan in _distinct(ranked)
        )

    def _candidates(
        self, graph: Graph, system: System, prices: Prices
    ) -> Iterator[tuple[str, Plan | InfeasiblePlan]]:
        """Each partitioner with its plan, or why it has none."""
        for device in system.devices:
            spec = f"single:device={device.name}"
            yield spec, _plans(load(Partitioner, spec), graph, system, prices)[0]
        if len(system.devices) == 1:
            return
        goal = objective(self.objective)
        best: Plan | None = None
        placing = []
        for name in names(Partitioner):
            chosen = load(Partitioner, name)
            if name in ("auto", "single") or chosen.covered:
                continue
            # What is meant for another objective can serve this one too; but nobody may have said
            # the watts that energy needs.
            watts = {"energy", "edp"}
            served = {*chosen.objectives} - (set() if goal.name in watts else watts) | {goal.name}
            for variant in dict.fromkeys(serving(chosen, name) for name in sorted(served)):
                for plan in _plans(variant, graph, system, prices):
                    yield plan.partitioner if isinstance(plan, Plan) else name, plan
                    if isinstance(plan, Plan) and plan.splits:
                        best = min(best or plan, plan, key=goal.value)
                if not variant.splits:
                    placing.append(variant)
        if best is not None:
            for chosen in placing:
                (plan, *_) = _plans(chosen, best.graph, system, best.prices)
                if isinstance(plan, Plan):
                    spec = f"{best.partitioner}+{plan.partitioner}"
                    plan = replace(plan, splits=best.splits, unsplit=best.unsplit, partitioner=spec)
                yield f"{best.partitioner}+{chosen.name}", plan


def _plans(
    partitioner: Partitioner, graph: Graph, system: System, prices: Prices
) -> Sequence[Plan | InfeasiblePlan]:
    try:
        return partitioner.plans(graph, system, prices)
    except InfeasiblePlan as error:
        return (error,)


def _distinct(plans: list[Plan]) -> list[Plan]:
    """The plans without those that repeat an earlier one."""
    seen = set()
    kept = []
    for plan in plans:
        places = tuple(sorted(plan.placement.items())), tuple(plan.replicas.items())
        key = plan.splits, plan.order, plan.cuts, places
        if key not in seen:
            seen.add(key)
            kept.append(plan)
    return kept
