"""What chooses a plan."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from heapq import heapify, heappop, heappush
from typing import ClassVar

from hetsched.cost import CostModel, price
from hetsched.errors import InfeasiblePlan, PluginError
from hetsched.graph import Graph
from hetsched.objective import objective
from hetsched.plan import Plan, group_tasks, make_plan, simulate
from hetsched.plugin import Plugin, load
from hetsched.problem import Problem
from hetsched.schedule import Schedule
from hetsched.scheduler import Scheduler
from hetsched.split import Split
from hetsched.system import System
from hetsched.tasks import Task, TaskGraph


class Partitioner(Plugin):
    """Chooses placement and order of the kernel groups; deterministic.

    `objectives` are what it can plan for, by an option `objective` if there are several. One that
    `splits` computes groups in pieces. One that is `covered` looks at nothing that another does not
    look at too, so that `auto` leaves it out.
    """

    package = "hetsched.partitioners"
    objectives: ClassVar[tuple[str, ...]] = ("latency",)
    splits: ClassVar[bool] = False
    covered: ClassVar[bool] = False

    @abstractmethod
    def partition(self, graph: Graph, system: System, costs: CostModel) -> Plan:
        """A plan for `graph` on `system`.

        Raises
        ------
        InfeasiblePlan
            The devices cannot run or hold the graph; the message names what is short.
        """

    def plans(self, graph: Graph, system: System, costs: CostModel) -> tuple[Plan, ...]:
        """Plans that are worth measuring, the one of `partition` first.

        Raises
        ------
        InfeasiblePlan
            As `partition`.
        """
        return (self.partition(graph, system, costs),)


def check_objective(partitioner: Partitioner, name: str) -> None:
    """
    Raises
    ------
    PluginError
        There is no such objective, or the partitioner cannot plan for it.
    """
    if objective(name).name not in partitioner.objectives:
        served = ", ".join(partitioner.objectives)
        raise PluginError(f"partitioner '{partitioner.name}' serves {served}, not {name}")


def serving(partitioner: Partitioner, name: str) -> Partitioner:
    """The partitioner with its option `objective` set, if it has one that can be so."""
    if len(partitioner.objectives) > 1 and name in partitioner.objectives:
        return replace(partitioner, objective=name)  # type: ignore[type-var]
    return partitioner


# Passes of `arrange` over all runs, in both directions of time; most find nothing after two.
PASSES = 8
# Of the makespan: sums of floats in another order differ in the last digits.
ROUNDING = 1e-12


def alone(
    device: str,
    graph: Graph,
    system: System,
    costs: CostModel,
    spec: str,
    splits: Sequence[Split] = (),
    original: Graph | None = None,
) -> Plan:
    """The plan of partitioner `spec` with all of the graph on one device.

    Raises
    ------
    InfeasiblePlan
        The device cannot run or hold it.
    """
    prices = price(graph, system, costs)
    for group in graph.groups:
        if device not in prices.seconds[group.name]:
            raise InfeasiblePlan(
                f"'{device}' alone cannot run {group.ops[0]}: {prices.refusals[group.name][device]}"
            )
    order = [group.name for group in graph.groups]
    placement = dict.fromkeys(order, device)
    return make_plan(graph, system, prices, placement, order, spec, (), splits, original)


def quickest(attempts: Iterable[Callable[[], Plan]]) -> Plan:
    """The plan of least makespan of those that can be made; of equal ones the first.

    Raises
    ------
    InfeasiblePlan
        None can be made; the message has each reason.
    """
    plans: list[Plan] = []
    refused: list[str] = []
    for attempt in attempts:
        try:
            plans.append(attempt())
        except InfeasiblePlan as error:
            refused.append(str(error))
    if not plans:
        raise InfeasiblePlan("; ".join(dict.fromkeys(refused)))
    return min(plans, key=lambda plan: simulate(plan).makespan)


def scheduled(
    graph: Graph,
    system: System,
    costs: CostModel,
    spec: str,
    scheduler: str = "heft",
    pins: Mapping[str, str] | None = None,
    splits: Sequence[Split] = (),
    original: Graph | None = None,
) -> Plan:
    """The plan of partitioner `spec` with each kernel group where and when `scheduler` says.

    `pins` say where an operation has to be. The schedule is that of single groups, as if each
    handed over at once; they are joined to parts, which hand over at their end, where that delays
    nothing.

    Raises
    ------
    InfeasiblePlan
        A device cannot hold what is on it, or cannot run what is pinned to it.
    """
    tasks = group_tasks(graph, system, costs)
    if pins:
        members = {group.name: group.ops for group in graph.groups}
        pinned = []
        for task in tasks.tasks:
            pin = next((pins[op.name] for op in members[task.name] if op.name in pins), None)
            row = {name: value for name, value in task.seconds.items() if pin in (None, name)}
            pinned.append(Task(task.name, row, task.memory_bytes))
        tasks = TaskGraph(system, tuple(pinned), tasks.edges)
    problem = Problem.of(tasks)
    schedule = load(Scheduler, scheduler).schedule(problem).schedule(problem)
    runs = arrange(tasks, schedule)
    return make_plan(
        graph,
        system,
        costs,
        {slot.task: slot.device for slot in schedule.slots},
        [name for run in runs for name in run],
        spec,
        [run[0] for run in runs],
        splits,
        original,
    )


def arrange(tasks: TaskGraph, schedule: Schedule) -> tuple[tuple[str, ...], ...]:
    """The placed tasks as runs, few and long, that do not delay the end: the parts of a plan.

    A part hands over at its end and waits for all that it needs at its start. So the tasks of a
    device, in the schedule's order, are first cut wherever another device waits or is waited for;
    then runs of one device that follow each other are joined where nothing between forbids it,
    nobody gets what he waits for later by more than the launch that is saved, and the makespan of
    the parts does not grow. O(edges log^2) time.
    """
    runs = _Runs.cut(tasks, schedule).punctual()
    idle = 0
    for _ in range(PASSES):
        joined = runs.joined().backwards()
        idle = idle + 1 if len(joined.members) == len(runs.members) else 0
        runs = joined
        if idle == 2:
            break
    if runs.reversed:
        runs = runs.backwards()
    return tuple(map(tuple, runs.members))


@dataclass(frozen=True)
class _Runs:
    """Runs in the order in which they start, each with its tasks; or all of it backwards in time.

    `work` is without `launch`, which a run costs beside. `before` and `behind` are seconds from the
    start of all to that of a run at least, and from its end to the end of all. `edges` are pairs of
    runs by position, with the seconds of the way from one to the other.
    """

    members: list[list[str]]
    lane: list[str]
    unit: list[str]
    launch: list[float]
    work: list[float]
    before: list[float]
    behind: list[float]
    edges: list[tuple[int, int, float]]
    reversed: bool = False

    @classmethod
    def cut(cls, tasks: TaskGraph, schedule: Schedule) -> "_Runs":
        """A run ends where another device waits for it, and where the next task waits for one."""
        placement = {slot.task: slot.device for slot in schedule.slots}
        runs: list[list[str]] = []
        owner: dict[str, int] = {}
        ended = True
        for slot in schedule.slots:
            name, device = slot.task, slot.device
            waits = any(
                edge.source is not None and placement[edge.source] != device
                for edge in tasks.incoming[name]
            )
            if ended or waits or placement[runs[-1][-1]] != device:
                runs.append([])
            runs[-1].append(name)
            owner[name] = len(runs) - 1
            ended = any(
                edge.sink is not None and placement[edge.sink] != device
                for edge in tasks.outgoing[name]
            )
        before, behind = [0.0] * len(runs), [0.0] * len(runs)
        edges = []
        for edge in tasks.edges:
            source = placement[edge.source] if edge.source is not None else None
            sink = placement[edge.sink] if edge.sink is not None else None
            seconds = tasks.transfer_seconds(edge.nbytes, source, sink)
            if edge.source is None and edge.sink is not None:
                before[owner[edge.sink]] = max(before[owner[edge.sink]], seconds)
            elif edge.sink is None and edge.source is not None:
                behind[owner[edge.source]] = max(behind[owner[edge.source]], seconds)
            elif edge.source is not None and edge.sink is not None:
                ends = owner[edge.source], owner[edge.sink]
                if ends[0] != ends[1]:
                    edges.append((*ends, seconds))
        devices = [tasks.system.device(placement[names[0]]) for names in runs]
        return cls(
            members=runs,
            lane=[device.name for device in devices],
            unit=[device.unit for device in devices],
            launch=[device.launch_seconds for device in devices],
            work=[
                sum(tasks.task[name].seconds[device.name] for name in names)
                for names, device in zip(runs, devices, strict=True)
            ],
            before=before,
            behind=behind,
            edges=edges,
        )

    def punctual(self) -> "_Runs":
        """The runs, each with an end by which those of other units have what they wait for.

        That is when they start now. Prices are never exact, so that a reader which could wait, by
        the prices, had better not.
        """
        starts, free = [0.0] * len(self.members), dict[str, float]()
        writers, behind = self._by(1), list(self.behind)
        for run, unit in enumerate(self.unit):
            arrivals = (
                starts[source] + self.launch[source] + self.work[source] + way
                for source, _, way in writers[run]
            )
            starts[run] = max([self.before[run], free.get(unit, 0.0), *arrivals])
            free[unit] = starts[run] + self.launch[run] + self.work[run]
        ends = (
            start + launch + work + rest
            for start, launch, work, rest in zip(
                starts, self.launch, self.work, self.behind, strict=True
            )
        )
        total = max(ends, default=0.0)
        for source, sink, way in self.edges:
            if self.unit[source] != self.unit[sink]:
                limit = starts[sink] - way + self.launch[source]
                behind[source] = max(behind[source], total - limit)
        return replace(self, behind=behind)

    def backwards(self) -> "_Runs":
        """What ends last starts first."""
        last = len(self.members) - 1
        return _Runs(
            members=[names[::-1] for names in reversed(self.members)],
            lane=self.lane[::-1],
            unit=self.unit[::-1],
            launch=self.launch[::-1],
            work=self.work[::-1],
            before=self.behind[::-1],
            behind=self.before[::-1],
            edges=[(last - sink, last - source, way) for source, sink, way in self.edges],
            reversed=not self.reversed,
        )

    def latest(self) -> list[float]:
        """The start of each run, seconds before the end of all, if each starts as late as it can.

        The largest is the makespan, but for what comes `before`.
        """
        readers = self._by(0)
        free: dict[str, float] = {}
        latest = [0.0] * len(self.members)
        for run in reversed(range(len(self.members))):
            end = max(self.behind[run], free.get(self.unit[run], 0.0))
            for _, reader, way in readers[run]:
                end = max(end, latest[reader] + way)
            latest[run] = free[self.unit[run]] = end + self.launch[run] + self.work[run]
        return latest

    def _by(self, end: int) -> list[list[tuple[int, int, float]]]:
        """The edges of each run: 0 for those out of it, 1 for those into it."""
        found: list[list[tuple[int, int, float]]] = [[] for _ in self.members]
        for edge in self.edges:
            found[edge[:2][end]].append(edge)
        return found

    def joined(self) -> "_Runs":
        """Each run, in order, moved back to the next one of its device where that delays nothing.

        All runs so far start as early as they can, those to come would start as late as they can:
        while each of the former ends before the latter wait for it, the makespan stays. So a run
        may be moved that nobody so far reads from.
        """
        latest = self.latest()
        total = max(map(sum, zip(latest, self.before, strict=True)), default=0.0)
        allowed = total * (1 + ROUNDING)
        writers, readers = self._by(1), self._by(0)
        count = len(self.members)
        # A run that was joined to another, later one is found there.
        owner = list(range(count))
        # What comes behind on the unit, by the seconds that it has to start before the end.
        follows = [0.0] * count
        free: dict[str, float] = {}
        for run in reversed(range(count)):
            follows[run] = free.get(self.unit[run], 0.0)
            free[self.unit[run]] = latest[run]
        # What was joined to a run: the first of its pieces, each names the one behind it.
        first, following = list(range(count)), [-1] * count
        work = list(self.work)
        before, behind = list(self.before), list(self.behind)
        ready, finish, since = [0.0] * count, [0.0] * count, [0.0] * count
        read = [False] * count
        # The readers to come of each run, the most urgent first: seconds before the end.
        waiting = [
            [(-(latest[reader] + way), reader) for _, reader, way in edges] for edges in readers
        ]
        for edges in waiting:
            heapify(edges)
        on_device: dict[str, int] = {}
        on_unit: dict[str, int] = {}
        for run in range(count):
            lane, unit = self.lane[run], self.unit[run]
            other = on_device.get(lane, -1)
            last = on_unit.get(unit, -1)
            sources = [(_owner(owner, source), way) for source, _, way in writers[run]]
            ready[run] = max(
                [before[run], *(finish[at] + way for at, way in sources if at != other)]
            )
            if other >= 0 and not read[other]:
                start = max(
                    ready[run], ready[other], since[other] if last == other else finish[last]
                )
                urgent = waiting[other]
                while urgent and _owner(owner, urgent[0][1]) in (run, other):
                    heappop(urgent)
                end = start + self.launch[run] + work[other] + work[run]
                needed = [behind[other], behind[run], follows[run]]
                needed += [-edges[0][0] for edges in (urgent, waiting[run]) if edges]
                if end + max(needed) <= allowed:
                    owner[other] = run
                    work[run] += work[other]
                    first[run], following[other] = first[other], run
                    behind[run] = max(behind[other], behind[run])
                    before[run] = max(before[other], before[run])
                    ready[run] = max(ready[run], ready[other])
                    since[run] = since[other] if last == other else finish[last]
                    small, large = sorted((urgent, waiting[run]), key=len)
                    for item in small:
                        heappush(large, item)
                    waiting[run] = large
                    finish[run] = end
                    for at, _ in sources:
                        read[at] = True
                    on_device[lane] = on_unit[unit] = run
                    continue
            ready[run] = max([ready[run], *(finish[at] for at, _ in sources if at == other)])
            since[run] = finish[last] if last >= 0 else 0.0
            finish[run] = max(ready[run], since[run]) + self.launch[run] + work[run]
            for at, _ in sources:
                read[at] = True
            on_device[lane] = on_unit[unit] = run

        def pieces(run: int) -> Iterator[int]:
            piece = first[run]
            while piece != run:
                yield piece
                piece = following[piece]
            yield run

        kept = [run for run in range(count) if owner[run] == run]
        place = {run: index for index, run in enumerate(kept)}
        ends = [
            (place[_owner(owner, source)], place[_owner(owner, sink)], way)
            for source, sink, way in self.edges
        ]
        return _Runs(
            members=[
                [name for piece in pieces(run) for name in self.members[piece]] for run in kept
            ],
            lane=[self.lane[run] for run in kept],
            unit=[self.unit[run] for run in kept],
            launch=[self.launch[run] for run in kept],
            work=[work[run] for run in kept],
            before=[before[run] for run in kept],
            behind=[behind[run] for run in kept],
            edges=[edge for edge in ends if edge[0] != edge[1]],
            reversed=self.reversed,
        )


def _owner(owner: list[int], run: int) -> int:
    while owner[run] != run:
        owner[run] = owner[owner[run]]
        run = owner[run]
    return run
