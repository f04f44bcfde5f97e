"""What chooses a plan."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence

from hetsched.cost import CostModel
from hetsched.graph import Graph
from hetsched.plan import Plan
from hetsched.plugin import Plugin
from hetsched.system import System
from hetsched.tasks import Edge, TaskGraph, Timeline, contract, replay


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


def arrange(timeline: Timeline) -> tuple[tuple[str, ...], ...]:
    """The placed tasks as runs, few and long, that do not delay the end: the parts of a plan.

    A part hands over at its end and waits for all that it needs at its start. So the tasks of a
    device, by start time, are first cut wherever another device waits or is waited for; then two
    runs of one device are joined whenever the tasks between do not forbid it and the makespan of
    the parts does not grow.
    """
    placement = {name: slot.device for name, slot in timeline.slots.items()}
    runs = _runs(timeline, placement)
    best = _makespan(timeline.tasks, placement, runs)
    first = 0
    while first < len(runs):
        joined = _join_next(timeline.tasks, placement, runs, first, best)
        if joined is None:
            first += 1
        else:
            best, runs = joined
    return tuple(map(tuple, runs))


def _runs(timeline: Timeline, placement: Mapping[str, str]) -> list[list[str]]:
    """The tasks by start time, in runs of one device that end where another device waits."""
    tasks = timeline.tasks
    position = {task.name: index for index, task in enumerate(tasks.tasks)}

    def crosses(edge: Edge) -> bool:
        ends = edge.source, edge.sink
        return None not in ends and placement[str(edge.source)] != placement[str(edge.sink)]

    runs: list[list[str]] = []
    ended = True
    # Tasks without work start together with what they wait for: then position decides.
    for name in sorted(placement, key=lambda name: (timeline.slots[name].start, position[name])):
        waits = any(map(crosses, tasks.incoming[name]))
        if ended or waits or placement[runs[-1][-1]] != placement[name]:
            runs.append([])
        runs[-1].append(name)
        ended = any(map(crosses, tasks.outgoing[name]))
    return runs


def _join_next(
    tasks: TaskGraph,
    placement: Mapping[str, str],
    runs: list[list[str]],
    first: int,
    best: float,
) -> tuple[float, list[list[str]]] | None:
    """The runs with `first` and the next one of its device joined, if that is not slower."""
    device = placement[runs[first][0]]
    later = (i for i in range(first + 1, len(runs)) if placement[runs[i][0]] == device)
    second = next(later, None)
    if second is None:
        return None
    between = {name for run in runs[first + 1 : second] for name in run}
    joined = runs[first] + runs[second]
    choices = []
    if not any(e.source in between for name in runs[second] for e in tasks.incoming[name]):
        choices.append([*runs[:first], joined, *runs[first + 1 : second], *runs[second + 1 :]])
    if not any(e.sink in between for name in runs[first] for e in tasks.outgoing[name]):
        choices.append([*runs[:first], *runs[first + 1 : second], joined, *runs[second + 1 :]])
    for choice in choices:
        makespan = _makespan(tasks, placement, choice)
        if makespan <= best:
            return makespan, choice
    return None


def _makespan(
    tasks: TaskGraph, placement: Mapping[str, str], runs: Sequence[Sequence[str]]
) -> float:
    parts = contract(tasks, runs, placement)
    order = [run[0] for run in runs]
    return replay(parts, {name: placement[name] for name in order}, order).makespan
