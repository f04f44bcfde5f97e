"""Contiguous stages of the graph: a pipeline, or one run after the other."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from math import lcm

import numpy as np

from hetsched.bounds import throughput_bound
from hetsched.cost import CostModel
from hetsched.errors import InfeasiblePlan
from hetsched.graph import Graph
from hetsched.objective import seconds_a_request
from hetsched.partitioner import Partitioner, check_objective
from hetsched.plan import Plan, group_tasks, make_plan
from hetsched.problem import Problem
from hetsched.stages.pipeline import Pipeline, fastest
from hetsched.stages.replicas import Team, teams
from hetsched.stages.serial import cheapest, fits, in_runs
from hetsched.stages.traffic import Traffic
from hetsched.system import System
from hetsched.tasks import TaskGraph, check_memory, contract, replay

# A device and its tasks, in order.
Stage = tuple[str, tuple[str, ...]]
PRICES = 40
# Tasks above which units are together all or none.
LARGE = 4000
# So near the bound nothing else is looked for.
ENOUGH = 1 + 1e-3
# By so much each further stage has to be better than replicas of fewer: they need no balance, so
# that no error of a price can bring them out of it.
STAGE = 0.01


@dataclass(frozen=True)
class Layerwise(Partitioner):
    """Optimal stages, by dynamic programming.

    `throughput` makes the busiest stage or link as fast as it can be, with at most one stage on
    each unit: a pipeline, for several requests in flight. A stage may have several units, which
    take requests in turn, where that is faster. `latency` makes the sum of all stages and
    of the transfers between them shortest, in the graph's topological order; there a device may
    come again.

    Of a pipeline, `stages` is the most that there may be (0: a stage for each unit),
    `least_seconds` what each of several takes at least, and `gain` by what share each further one
    has to make the bottleneck shorter; `replicas` is the most units that a stage may have (0: any
    number).

    References
    ----------
    Narayanan et al., "PipeDream: generalized pipeline parallelism for DNN training", SOSP 2019,
    https://doi.org/10.1145/3341301.3359646 (replicated stages)
    """

    objectives = ("latency", "throughput")
    objective: str = "throughput"
    stages: int = 0
    least_seconds: float = 0.0
    gain: float = 0.0
    replicas: int = 0

    def partition(self, graph: Graph, system: System, costs: CostModel) -> Plan:
        return self.plans(graph, system, costs)[0]

    def plans(self, graph: Graph, system: System, costs: CostModel) -> tuple[Plan, ...]:
        """The best plan; if it has replicas, behind it the best without, which holds less."""
        check_objective(self, self.objective)
        tasks = group_tasks(graph, system, costs)
        if self.objective == "latency":
            return (self._plan(graph, system, costs, shortest_run(tasks)),)
        options = self.stages, self.least_seconds, self.gain
        alone = fastest_pipeline(tasks, *options)
        stages = named(tasks, alone)
        found = self._plan(graph, system, costs, stages, (), alone)
        if self.replicas == 1:
            return (found,)
        best, stages, rings = fastest_together(tasks, alone, *options, self.replicas)
        together = self._plan(graph, system, costs, stages, rings, best)
        if not together.replicas:
            return (together,)
        return together, replace(found, partitioner=f"{found.partitioner},replicas=1")

    def _plan(
        self,
        graph: Graph,
        system: System,
        costs: CostModel,
        stages: Sequence[Stage],
        rings: Sequence[Team] = (),
        found: Pipeline | None = None,
    ) -> Plan:
        order = [name for _, members in stages for name in members]
        placement = {name: device for device, members in stages for name in members}
        spec = f"{self.name}:objective={self.objective}"
        replicas = {ring[0]: ring for ring in rings if len(ring) > 1}
        plan = make_plan(graph, system, costs, placement, order, spec, replicas=replicas)
        notes: tuple[str, ...] = ()
        if found and found.seconds:
            least = f"{found.bound / found.seconds * 100:.1f} %"
            known = "proved optimal" if found.optimal else f"at least {least} of it are needed"
            notes = (f"stages: {found.seconds * 1e3:.3f} ms a request, {known}",)
        return replace(plan, objective=self.objective, notes=notes)


def fastest_together(
    tasks: TaskGraph,
    alone: Pipeline,
    most: int = 0,
    least_seconds: float = 0.0,
    gain: float = 0.0,
    replicas: int = 0,
) -> tuple[Pipeline, list[Stage], list[Team]]:
    """The fastest pipeline whose stages may have several units each; its stages and their rings.

    `alone` is that of one unit for each stage, the options are those of `Layerwise`. The units are
    put together in teams in every way, and the stages of each machine of teams found by
    `fastest_pipeline`: the best of all where members of a team are alike and links are no
    bottleneck; what they really take is what counts.
    """
    options = most, least_seconds, gain
    stages = named(tasks, alone)
    rings: list[Team] = [(device,) for device, _ in stages]
    found = [(alone, stages, rings)]
    if not tasks.tasks:
        return found[0]
    bound = min(throughput_bound(Problem.of(tasks)).seconds, alone.bound)
    few = len(tasks.tasks) > LARGE
    for way in islice(teams(tasks, replicas), 1 if few else None):
        try:
            stages = named(way.tasks, fastest_pipeline(way.tasks, *options))
            rings = way.rings(tasks, stages)
            stages = [(ring[0], names) for ring, (_, names) in zip(rings, stages, strict=True)]
            seconds = pace(tasks, stages, rings)
        except InfeasiblePlan:
            continue
        found.append((Pipeline((), seconds, min(bound, seconds)), stages, rings))
        if seconds <= bound * ENOUGH:
            break
    best = min(found, key=lambda way: way[0].seconds * (1 + STAGE) ** len(way[1]))
    return replace(best[0], bound=min(bound, best[0].seconds)), *best[1:]


def pace(tasks: TaskGraph, stages: Sequence[Stage], rings: Sequence[Team]) -> float:
    """Seconds a request where the devices of a ring take those of its stage in turn.

    Raises
    ------
    InfeasiblePlan
        A device cannot run or hold its stage, or its data cannot get there.
    """
    schedules = []
    for turn in range(lcm(*map(len, rings))):
        place = [ring[turn % len(ring)] for ring in rings]
        placement = {
            name: device
            for device, (_, members) in zip(place, stages, strict=True)
            for name in members
        }
        check_memory(tasks, placement)
        parts = contract(tasks, [members for _, members in stages], placement)
        schedules.append(replay(parts, placement, [members[0] for _, members in stages]))
    return seconds_a_request(schedules, tasks.system)


def fastest_pipeline(
    tasks: TaskGraph, most: int = 0, least_seconds: float = 0.0, gain: float = 0.0
) -> Pipeline:
    """The pipeline of least bottleneck; see `pipeline.fastest`.

    With a `gain`, of more stages only if each further one makes it shorter by that share.

    Raises
    ------
    InfeasiblePlan
        No stages run and hold everything.
    """
    if not tasks.tasks:
        return Pipeline((), 0.0, 0.0)
    traffic = Traffic.of(tasks)
    if not gain:
        best = fastest(traffic, most, least_seconds)
    else:
        best, units = None, len(set(traffic.unit.tolist()))
        for count in range(1, min(most or units, units) + 1):
            found = fastest(traffic, count, least_seconds)
            if found is None:
                continue
            further = len(found.stages) - len(best.stages) if best else 0
            if best is None or found.seconds < best.seconds * (1 - gain) ** further:
                best = found
    if best is None:
        limits = ", ".join(
            f"'{device.name}' {device.memory_bytes / 2**20:.1f} MiB"
            for device in tasks.system.devices
        )
        raise InfeasiblePlan(
            "no pipeline with each unit once can run and hold all groups: they hold "
            f"{traffic.memory.sum() / 2**20:.1f} MiB, and there are {limits}; "
            "add a device or a link, raise memory_bytes, or use another partitioner"
        )
    return best


def named(tasks: TaskGraph, pipeline: Pipeline) -> list[Stage]:
    """The stages with the names of their devices and tasks."""
    devices = tasks.system.devices
    return [
        (devices[device].name, tuple(tasks.tasks[task].name for task in members))
        for device, members in pipeline.stages
    ]


def shortest_run(tasks: TaskGraph) -> list[Stage]:
    """The stages of least total time when one runs after the other.

    Between two stages all moves that is written before and read behind. Where the shortest do not
    fit into the devices' memory, prices on memory lead to others, and if these do not either, the
    search of `mincut` does.

    Raises
    ------
    InfeasiblePlan
        No sequence of devices runs and holds everything, or none was found.
    """
    if not tasks.tasks:
        return []
    traffic = Traffic.of(tasks)
    order = list(range(traffic.count))
    device = _shortest(traffic, np.zeros(len(traffic.limit)))
    if not fits(traffic, device):
        priced = _shortest_that_fits(traffic)
        if priced is not None:
            device = priced
        else:
            device = cheapest(traffic).device
            order = in_runs(traffic, device)
    return _runs(tasks, device, order)


def _shortest(traffic: Traffic, price: np.ndarray) -> np.ndarray:
    """(n) the device of each task, in the tasks' order; `price` is seconds for a byte held.

    O(tasks * devices^2) time.
    """
    work = traffic.seconds + traffic.exit + traffic.memory[:, None] * price
    # An input from the host is paid where it is read first.
    for tensor, begin in enumerate(traffic.entry_first[:-1]):
        work[traffic.entry_readers[begin]] += traffic.entry[tensor]
    tensors, nbytes = _crossing(traffic)
    best = traffic.launch + work[0]
    came = np.zeros(traffic.seconds.shape, np.int64)
    for task in range(1, traffic.count):
        move = np.zeros_like(traffic.latency)
        if tensors[task]:
            move = tensors[task] * traffic.latency + nbytes[task] * traffic.per_byte
        move = move + traffic.launch
        np.fill_diagonal(move, 0.0)
        ways = best[:, None] + move
        came[task] = ways.argmin(axis=0)
        best = ways.min(axis=0) + work[task]
    if best.min() == np.inf:
        raise InfeasiblePlan("no sequence of devices can run all groups; add a device or a link")
    device = np.empty(traffic.count, np.int64)
    device[-1] = best.argmin()
    for task in range(traffic.count - 1, 0, -1):
        device[task - 1] = came[task, device[task]]
    return device


def _shortest_that_fits(traffic: Traffic) -> np.ndarray | None:
    """The best of what several prices on memory lead to; None if nothing fits."""
    finite = np.where(np.isfinite(traffic.seconds), traffic.seconds, 0.0)
    scale = finite.sum() / max(1.0, traffic.memory.sum())
    price = np.zeros(len(traffic.limit))
    best, least = None, np.inf
    for step in range(PRICES):
        device = _shortest(traffic, price)
        held = np.bincount(device, traffic.memory, len(traffic.limit))
        if (held <= traffic.limit).all():
            seconds = _total(traffic, device)
            if seconds < least:
                best, least = device, seconds
        over = np.where(np.isfinite(traffic.limit), held - traffic.limit, 0.0)
        change = over / max(1.0, float(np.abs(over).max()))
        price = np.maximum(0.0, price + scale * 2.0 / (1 + step) ** 0.7 * change)
    return best


def _total(traffic: Traffic, device: np.ndarray) -> float:
    tensors, nbytes = _crossing(traffic)
    rows = np.arange(traffic.count)
    total = float((traffic.seconds[rows, device] + traffic.exit[rows, device]).sum())
    for tensor, begin in enumerate(traffic.entry_first[:-1]):
        total += float(traffic.entry[tensor, device[traffic.entry_readers[begin]]])
    total += float(traffic.launch[device[0]])
    for task in np.flatnonzero(np.diff(device)) + 1:
        source, sink = device[task - 1], device[task]
        total += float(traffic.launch[sink])
        if tensors[task]:
            total += float(tensors[task] * traffic.latency[source, sink])
            total += float(nbytes[task] * traffic.per_byte[source, sink])
    return total


def _crossing(traffic: Traffic) -> tuple[np.ndarray, np.ndarray]:
    """(n) the tensors, and their bytes, that are written before each task and read from it on."""
    tensors, nbytes = np.zeros(traffic.count + 1), np.zeros(traffic.count + 1)
    if len(traffic.readers):
        last = np.maximum.reduceat(traffic.readers, traffic.first[:-1])
        for change, size in ((tensors, np.ones_like(traffic.nbytes)), (nbytes, traffic.nbytes)):
            np.add.at(change, traffic.producer + 1, size)
            np.add.at(change, last + 1, -size)
    return np.cumsum(tensors)[:-1], np.cumsum(nbytes)[:-1]


def _runs(tasks: TaskGraph, device: np.ndarray, order: Sequence[int]) -> list[Stage]:
    """The order in runs of one device."""
    stages: list[tuple[str, list[str]]] = []
    for task in order:
        name = tasks.system.devices[device[task]].name
        if not stages or stages[-1][0] != name:
            stages.append((name, []))
        stages[-1][1].append(tasks.tasks[task].name)
    return [(name, tuple(members)) for name, members in stages]
