"""What a plan is chosen for: one number of a plan, the smaller the better."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TypeVar

from hetsched.energy import Energy, energy
from hetsched.errors import PluginError
from hetsched.plan import Plan
from hetsched.schedule import Schedule
from hetsched.system import System

Item = TypeVar("Item")


@dataclass(frozen=True)
class Objective:
    """A number of a plan, and how to print it: in `unit`s of `scale`."""

    name: str
    value: Callable[[Plan], float]
    unit: str
    scale: float

    def text(self, plan: Plan) -> str:
        """The number with its unit, as in `1.250 ms`."""
        return f"{self.value(plan) / self.scale:.3f} {self.unit}"


def objective(name: str) -> Objective:
    """
    Raises
    ------
    PluginError
        There is no such objective.
    """
    if name not in OBJECTIVES:
        raise PluginError(f"no objective '{name}'; there are {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name]


def seconds_a_request(schedules: Sequence[Schedule], system: System) -> float:
    """The time from result to result in steady state, with requests behind each other.

    `schedules` are of requests that follow each other again and again: one, if all are alike. The
    busiest unit or link sets the pace.
    """
    load: dict[object, float] = {}
    for schedule in schedules:
        for slot in schedule.slots:
            unit = system.device(slot.device).unit
            load[unit] = load.get(unit, 0.0) + slot.seconds
        for move in schedule.transfers:
            pair = (move.source, move.sink)
            load[pair] = load.get(pair, 0.0) + move.seconds
    return max(load.values(), default=0.0) / len(schedules)


def held_bytes(plan: Plan) -> float:
    """What the fullest device holds, weights and activations."""
    return max(plan.memory_bytes().values(), default=0.0)


def _energies(plan: Plan) -> list[Energy]:
    return [energy(recipe) for recipe in plan.recipe.turns]


def _turns(plan: Plan) -> list[Schedule]:
    """The schedule of each request until the replicas of all stages begin again."""
    return [recipe.simulate() for recipe in plan.recipe.turns]


OBJECTIVES: Mapping[str, Objective] = {
    item.name: item
    for item in (
        Objective("latency", lambda plan: max(turn.makespan for turn in _turns(plan)), "ms", 1e-3),
        Objective(
            "throughput",
            lambda plan: seconds_a_request(_turns(plan), plan.system),
            "ms a request",
            1e-3,
        ),
        Objective("energy", lambda plan: fmean(use.joules for use in _energies(plan)), "mJ", 1e-3),
        Objective(
            "edp", lambda plan: fmean(use.delay_product for use in _energies(plan)), "uJ s", 1e-6
        ),
        Objective("memory", held_bytes, "MB", 1e6),
    )
}


def front(items: Iterable[tuple[tuple[float, ...], Item]]) -> list[tuple[tuple[float, ...], Item]]:
    """The items that no other is at least as good as in every number and better in one.

    Of equal ones the first stays; the order is that of the numbers.

    Examples
    --------
    >>> [name for _, name in front([((2, 2), "c"), ((1, 3), "a"), ((1, 4), "b"), ((3, 1), "d")])]
    ['a', 'c', 'd']
    """
    kept: list[tuple[tuple[float, ...], Item]] = []
    for values, item in sorted(items, key=lambda pair: pair[0]):
        if not any(all(a <= b for a, b in zip(other, values, strict=True)) for other, _ in kept):
            kept.append((values, item))
    return kept
