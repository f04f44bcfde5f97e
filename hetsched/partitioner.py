"""What chooses a plan."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from heapq import heapify, heappop, heappush
from itertools import groupby

from hetsched.cost import CostModel
from hetsched.errors import PluginError
from hetsched.graph import Graph
from hetsched.plan import Plan
from hetsched.plugin import Plugin
from hetsched.schedule import Schedule
from hetsched.system import System
from hetsched.tasks import TaskGraph, Timeline, contract, replay

OBJECTIVES = ("latency", "throughput")


class Partitioner(Plugin):
    """Chooses placement and order of the kernel groups; deterministic."""

    package = "hetsched.partitioners"

    @abstractmethod
    def partition(self, graph: Graph, system: System, costs: CostModel) -> Plan:
        """A plan for `graph` on `system`.

        Raises
        ------
        InfeasiblePlan
            The devices cannot run or hold the graph; the message names what is short.
        """


def check_objective(objective: str) -> None:
    """
    Raises
    ------
    PluginError
        There is no such objective.
    """
    if objective not in OBJECTIVES:
        raise PluginError(f"no objective '{objective}'; there are {', '.join(OBJECTIVES)}")


def cost_of(schedule: Schedule, system: System, objective: str) -> float:
    """What an objective minimises: the makespan, or the seconds a request in steady state.

    In steady state requests overlap, and the busiest unit or link sets the pace.
    """
    if objective == "latency":
        return schedule.makespan
    load: dict[object, float] = {}
    for slot in schedule.slots:
        unit = system.device(slot.device).unit
        load[unit] = load.get(unit, 0.0) + slot.seconds
    for move in schedule.transfers:
        pair = (move.source, move.sink)
        load[pair] = load.get(pair, 0.0) + move.seconds
    return max(load.values(), default=0.0)


def arrange(timeline: Timeline) -> tuple[str, ...]:
    """An order of the placed tasks whose runs make few, long parts that do not delay the end.

    A schedule of single tasks alternates between devices at every step. Two runs of one device are
    brought together whenever the tasks between do not forbid it and the makespan of the parts does
    not grow.
    """
    placement = {name: slot.device for name, slot in timeline.slots.items()}
    order = _by_release(timeline)
    runs = [list(names) for _, names in groupby(order, key=lambda name: placement[name])]
    best = _makespan(timeline.tasks, placement, runs)
    first = 0
    while first < len(runs):
        joined = _join_next(timeline.tasks, placement, runs, first, best)
        if joined is None:
            first += 1
        else:
            best, runs = joined
    return tuple(name for run in runs for name in run)


def _by_release(timeline: Timeline) -> list[str]:
    """The tasks by the time at which nothing but a transfer holds them back.

    Of those released together the ones that wait for another device come first, so that they stand
    between a task and the next one of its device, and the two do not become one part.
    """
    tasks, slots = timeline.tasks, timeline.slots
    position = {task.name: index for index, task in enumerate(tasks.tasks)}
    free: dict[str, float] = {}
    key: dict[str, tuple[float, bool, int]] = {}
    for name in sorted(slots, key=lambda name: (slots[name].start, position[name])):
        unit = tasks.system.device(slots[name].device).unit
        sources = [slots[e.source] for e in tasks.incoming[name] if e.source is not None]
        released = max([free.get(unit, 0.0), *(source.finish for source in sources)])
        waits = any(source.device != slots[name].device for source in sources)
        key[name] = (released, not waits, position[name])
        free[unit] = slots[name].finish
    missing = {
        name: sum(edge.source is not None for edge in tasks.incoming[name]) for name in slots
    }
    ready = [(key[name], name) for name, count in missing.items() if not count]
    heapify(ready)
    order = []
    while ready:
        _, name = heappop(ready)
        order.append(name)
        for edge in tasks.outgoing[name]:
            if edge.sink is not None:
                missing[edge.sink] -= 1
                if not missing[edge.sink]:
                    heappush(ready, (key[edge.sink], edge.sink))
    return order


def _join_next(
    tasks: TaskGraph,
    placement: Mapping[str, str],
    runs: list[list[str]],
    first: int,
    best: float,
) -> tuple[float, list[list[str]]] | None:
    """The runs with `first` and the next one of its device joined, if that is not slower."""
    device = placement[runs[first][0]]
    later = [i for i in range(first + 1, len(runs)) if placement[runs[i][0]] == device]
    if not later:
        return None
    second = later[0]
    between = {name for run in runs[first + 1 : second] for name in run}
    joined = runs[first] + runs[second]
    choices = []
    if not any(e.source in between for name in runs[second] for e in tasks.incoming[name]):
        choices.append([*runs[:first], joined, *runs[first + 1 : second], *runs[second + 1 :]])
    if not any(e.sink in between for name in runs[first] for e in tasks.outgoing[name]):
        choices.append([*runs[:first], *runs[first + 1 : second], joined, *runs[second + 1 :]])
    for choice in choices:
        # Runs of another device that have become neighbours are one part from now on.
        merged = [
            [name for run in same for name in run]
            for _, same in groupby(choice, key=lambda run: placement[run[0]])
        ]
        makespan = _makespan(tasks, placement, merged)
        if makespan <= best:
            return makespan, merged
    return None


def _makespan(
    tasks: TaskGraph, placement: Mapping[str, str], runs: Sequence[Sequence[str]]
) -> float:
    parts = contract(tasks, runs, placement)
    order = [run[0] for run in runs]
    return replay(parts, {name: placement[name] for name in order}, order).makespan
