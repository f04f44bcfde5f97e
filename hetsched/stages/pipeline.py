"""The stages of a pipeline, on heterogeneous devices, whose slowest is fastest."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from heapq import heapify, heappop, heappush

import numpy as np

from hetsched.bounds import throughput_bound
from hetsched.problem import Problem
from hetsched.stages.annealing import annealed
from hetsched.stages.borders import (
    Family,
    Flow,
    Machine,
    borders,
    cost_of_stages,
    ideals,
    search,
    table,
)
from hetsched.stages.exact import improved
from hetsched.stages.relaxation import NEAR, Branch, Relaxation
from hetsched.stages.traffic import Traffic, lists

# Looks at tasks and borders in the exact search: about a second.
BUDGET = 200_000_000
# Pairs of borders times states of the table: about two seconds.
WORK = 3_000_000_000
LARGEST_FAMILY = 8192
# Work of branch and bound, a million of it about half a second: until the lowest of the rows of
# devices is settled, and of all. Rows that are mixed, and orders for each.
ROOT_WORK, WORK_OF_ALL = 2e6, 2.6e6
MIXED = 4
# Rows that are annealed beside that of the best, and steps for each: a third of a second.
ANNEALED, STEPS = 2, 6_000_000
EXACT = 1 + 1e-9
# Tasks times devices that constraint programming is tried for, and its deterministic seconds.
LARGEST_PROGRAM = 1000
PROGRAM_WORK = 2.0


@dataclass(frozen=True, eq=False)
class Pipeline:
    """Stages as device and tasks, both numbers, in order; no pipeline is faster than `bound`."""

    stages: tuple[tuple[int, tuple[int, ...]], ...]
    seconds: float
    bound: float

    @property
    def devices(self) -> tuple[int, ...]:
        return tuple(device for device, _ in self.stages)

    @property
    def optimal(self) -> bool:
        """Whether the bound proves that none is faster, but for a millionth."""
        return self.seconds <= self.bound * (1 + 1e-6)


def fastest(traffic: Traffic, most: int = 0, least: float = 0.0) -> Pipeline | None:
    """The pipeline of least bottleneck with each unit at most once; None if there is none.

    The bottleneck is the work of the busiest stage, with its launch, or the transfers of the
    busiest link, each tensor once to a device. Of equal ones, less work and transfers in all are
    preferred. At most `most` stages, if it is not 0, none of which takes less than `least` seconds
    unless it is the only one.

    Dynamic programming over the borders, after Tarnawski et al., with the devices that have a
    stage behind each, after PipeEdge; O(borders^2 * devices * 2^devices) time, where units that
    are alike count once. What it cannot see in a graph with branches, tensors that pass over a
    stage, it leaves out, so that its value is a lower bound; an exact search, with the table as its
    bound, settles the rest. Graphs with too many borders get those of several orders of the tasks;
    what is best there is annealed, and branch and bound, and for small graphs constraint
    programming, give the bound and what is better still. That is some seconds of work at most.

    References
    ----------
    Tarnawski et al., "Efficient algorithms for device placement of DNN graph operators",
    NeurIPS 2020, https://doi.org/10.48550/arXiv.2006.16423
    Hu et al., "Pipeline parallelism for inference on heterogeneous edge computing" (PipeEdge),
    DSD 2022, https://doi.org/10.1109/DSD57027.2022.00048
    """
    solver = _Solver(traffic, most, least)
    bits = solver.all_borders()
    if len(bits):
        return solver.solve(bits, complete=True)
    return solver.refined()


class _Solver:
    """One problem, and the arrays that do not depend on the borders."""

    def __init__(self, traffic: Traffic, most: int, least: float) -> None:
        self.traffic = traffic
        self.units, self.devices, self.machine = _machine(traffic, most, least)
        reads_first, reads = traffic.reads
        entry_first, entry_reads = traffic.entry_reads
        self.flow = Flow(
            traffic.producer,
            traffic.nbytes,
            traffic.first,
            traffic.readers,
            reads_first,
            reads,
            np.ascontiguousarray(traffic.entry[:, self.devices]),
            entry_first,
            entry_reads,
        )
        states = len(self.devices) * self.machine.states
        self.limit = int(min(LARGEST_FAMILY, (2 * WORK / states) ** 0.5))
        self.best: Pipeline | None = None

    def all_borders(self) -> np.ndarray:
        found: np.ndarray = ideals(*lists(self.traffic.predecessors), self.limit)
        return found

    def solve(self, bits: np.ndarray, complete: bool) -> Pipeline | None:
        """The best stages between these borders; with all of them there, the best of all."""
        family = self.family(bits)
        bound = self._first_bound(family)
        value, rest, kinds, ends = table(family, self.machine, bound, False, False)
        if value == np.inf:
            return None
        best = cost_of_stages(family, self.machine, self.flow, kinds, ends)
        if best > value * EXACT:
            _, _, *relayed = table(family, self.machine, bound, True, False)
            cost = cost_of_stages(family, self.machine, self.flow, *relayed)
            if len(relayed[0]) and cost < best:
                best, (kinds, ends) = cost, relayed
            if complete:
                best, value, kinds, ends = self._settled(family, rest, best, value, kinds, ends)
        if best == np.inf:
            return None
        # As little work and as few transfers as the bottleneck allows.
        _, _, *lean = table(family, self.machine, best * EXACT, False, True)
        if len(lean[0]):
            cost = cost_of_stages(family, self.machine, self.flow, *lean)
            if cost <= best * EXACT:
                kinds, ends = lean
                best = cost
        return Pipeline(
            self._stages(family, kinds, ends),
            float(best),
            float(min(best, value)) if complete else 0.0,
        )

    def _settled(
        self,
        family: Family,
        rest: np.ndarray,
        best: float,
        value: float,
        kinds: np.ndarray,
        ends: np.ndarray,
    ) -> tuple[float, float, np.ndarray, np.ndarray]:
        """The best stages and a lower bound, by search below thresholds that grow to `best`."""
        budget, step = BUDGET, 0.0
        while value * EXACT < best and budget > 0:
            threshold = min(value * (1 + step) * EXACT, best / EXACT)
            cost, *found, budget = search(family, self.machine, self.flow, rest, threshold, budget)
            if cost < best:
                best, (kinds, ends) = cost, found
            if budget > 0:
                # All below has been seen.
                value = best if cost < np.inf or threshold == best / EXACT else threshold
            step = max(0.01, 2 * step)
        return best, value, kinds, ends

    def _first_bound(self, family: Family) -> float:
        """What a few of the borders can do: the table need not look above it."""
        count = len(family.bits)
        if count <= 256:
            return np.inf
        few = np.unique(np.linspace(0, count - 1, 128).astype(np.int64))
        sample = Family(
            *(np.ascontiguousarray(array[few]) for array in family[:1]),
            *(np.ascontiguousarray(array[:, few]) for array in family[1:5]),
            *(np.ascontiguousarray(array[few]) for array in family[5:]),
        )
        _, _, kinds, ends = table(sample, self.machine, np.inf, True, False)
        if not len(kinds):
            return np.inf
        return float(cost_of_stages(sample, self.machine, self.flow, kinds, ends)) * EXACT

    def family(self, bits: np.ndarray) -> Family:
        """What lies before each border."""
        traffic, tasks = self.traffic, self.traffic.count
        seconds = traffic.seconds[:, self.devices]
        able = np.isfinite(seconds)
        # Each input from the host at the first task that reads it.
        enter = np.zeros_like(seconds)
        for tensor, begin in enumerate(traffic.entry_first[:-1]):
            enter[traffic.entry_readers[begin]] += traffic.entry[tensor, self.devices]
        columns = np.concatenate(
            [
                np.where(able, seconds, 0.0),
                (~able).astype(np.float64),
                enter,
                traffic.exit[:, self.devices],
                traffic.memory[:, None],
            ],
            axis=1,
        )
        sums = np.empty((columns.shape[1], len(bits)))
        for begin in range(0, len(bits), 512):
            sums[:, begin : begin + 512] = (members(bits[begin : begin + 512], tasks) @ columns).T
        kinds = len(self.devices)
        work, unable, enter, leave = (
            np.ascontiguousarray(sums[index * kinds : (index + 1) * kinds]) for index in range(4)
        )
        crossing = borders(bits, self.flow)
        return Family(bits, work, unable, enter, leave, sums[-1].copy(), *crossing)

    def _stages(
        self, family: Family, kinds: np.ndarray, ends: np.ndarray
    ) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """On devices: of units that are alike the next one gets the next stage."""
        taken = [0] * len(self.units)
        stages = []
        before = np.zeros(self.traffic.count, bool)
        for kind, end in zip(kinds, ends, strict=True):
            group = next(
                index for index, alike in enumerate(self.units) if self.devices[kind] in alike[0]
            )
            member = self.units[group][0].index(self.devices[kind])
            device = self.units[group][taken[group]][member]
            taken[group] += 1
            inside = members(family.bits[end : end + 1], self.traffic.count)[0] > 0
            stages.append((int(device), tuple(map(int, np.flatnonzero(inside & ~before)))))
            before = inside
        return tuple(stages)

    def refined(self) -> Pipeline | None:
        """The best stages between borders of several orders, or that branch and bound comes to."""
        traffic, most = self.traffic, self.machine.most
        orders = _orders(traffic)
        self.offer(self.solve(_prefixes(orders, self.limit), complete=False))
        bound = throughput_bound(Problem.of(traffic.tasks)).seconds
        relaxation = Relaxation(traffic, most, self.judged)
        relaxation.go_on(self.seconds, ROOT_WORK, branching=False)
        # A mixture of cuts is an order too: none of them has a task before what it reads from.
        mixed = [
            order[np.argsort(row.mixture[order], kind="stable")]
            for row in relaxation.rows[:MIXED]
            for order in orders[:MIXED]
        ]
        if mixed and self.seconds > relaxation.bound * NEAR:
            self.offer(self.solve(_prefixes(mixed + orders, self.limit), complete=False))
        for devices in [
            *([self.best.devices] if self.best else []),
            *(row.devices for row in relaxation.rows[:ANNEALED]),
        ]:
            row = relaxation.settled(devices)
            if row and self.seconds > relaxation.bound * NEAR:
                self.anneal(row)
        relaxation.go_on(self.seconds, WORK_OF_ALL, branching=True)
        bound = max(bound, relaxation.bound)
        best = self.best
        if best is None:
            return None
        small = traffic.seconds.size <= LARGEST_PROGRAM and not self.machine.least
        if best.seconds > bound * NEAR and small:
            stages, bound = improved(traffic, most, best.stages, best.seconds, bound, PROGRAM_WORK)
            found = Pipeline(tuple(stages), self.seconds_of(stages), 0.0)
            best = min(best, found, key=lambda pipeline: pipeline.seconds)
        return replace(best, bound=min(best.seconds, bound))

    @property
    def seconds(self) -> float:
        """Of the best so far."""
        return self.best.seconds if self.best else np.inf

    def offer(self, pipeline: Pipeline | None) -> None:
        if pipeline and pipeline.seconds < self.seconds:
            self.best = pipeline

    def anneal(self, row: Branch) -> None:
        """Offers what annealing finds from the best so far, or from a cut of other devices."""
        stage = row.cuts[int(np.argmin([load.max() for load in row.loads]))].astype(np.int64)
        if self.best and self.best.devices == row.devices:
            for index, (_, tasks) in enumerate(self.best.stages):
                stage[list(tasks)] = index
        self.judged(
            row.devices,
            annealed(self.traffic, self.flow, row.devices, stage, row.price, STEPS, seed=0),
        )

    def judged(self, devices: Sequence[int], stage: np.ndarray) -> float:
        """Offers the (n) stages on devices in a row; how long the best of all takes."""
        parts = [(device, np.flatnonzero(stage == index)) for index, device in enumerate(devices)]
        stages = tuple((device, tuple(map(int, part))) for device, part in parts if len(part))
        self.offer(Pipeline(stages, self.seconds_of(stages), 0.0))
        return self.seconds

    def seconds_of(self, stages: Sequence[tuple[int, Sequence[int]]]) -> float:
        """The bottleneck of stages on devices."""
        count = self.traffic.count
        order = np.array([task for _, tasks in stages for task in tasks], np.int64)
        ends = np.cumsum([0] + [len(tasks) for _, tasks in stages])
        family = self.family(_bits(order, ends, count))
        kinds = [
            next(
                place
                for alike in self.units
                for unit in alike
                for first, member in zip(alike[0], unit, strict=True)
                if member == device
                for place in [self.devices.index(first)]
            )
            for device, _ in stages
        ]
        numbers = np.array(kinds, np.int64), np.arange(1, len(ends), dtype=np.int64)
        return float(cost_of_stages(family, self.machine, self.flow, *numbers))


def members(bits: np.ndarray, tasks: int) -> np.ndarray:
    """(borders, tasks) 1 where the task lies before the border."""
    flags = np.unpackbits(bits.astype("<u8").view(np.uint8), axis=1, bitorder="little")
    return flags[:, :tasks].astype(np.float64)


def _machine(
    traffic: Traffic, most: int, least: float
) -> tuple[list[list[list[int]]], list[int], Machine]:
    """Units that are alike together, a device of each kind, and the kinds."""
    units: list[list[int]] = [[] for _ in range(int(traffic.unit.max()) + 1)]
    for device, unit in enumerate(traffic.unit):
        units[unit].append(device)
    classes: list[list[list[int]]] = []
    for unit in units:
        alike = next((c for c in classes if _interchangeable(traffic, c[0], unit)), None)
        if alike is None:
            classes.append([unit])
        else:
            alike.append(unit)
    devices, strides, digits = [], [], []
    states = 1
    for alike in classes:
        devices += alike[0]
        strides += [states] * len(alike[0])
        digits += [len(alike) + 1] * len(alike[0])
        states *= len(alike) + 1
    latency = traffic.latency[np.ix_(devices, devices)].copy()
    per_byte = traffic.per_byte[np.ix_(devices, devices)].copy()
    for alike in classes:
        for row, one in zip(map(devices.index, alike[0]), alike[0], strict=True):
            for j, other in enumerate(alike[-1]):
                # A link within a class leads from one unit to another; with one unit to none.
                column = devices.index(alike[0][j])
                latency[row, column] = traffic.latency[one, other] if len(alike) > 1 else np.inf
                per_byte[row, column] = traffic.per_byte[one, other] if len(alike) > 1 else 0.0
    machine = Machine(
        launch=traffic.launch[devices],
        limit=traffic.limit[devices],
        stride=np.array(strides, np.int64),
        digits=np.array(digits, np.int64),
        states=states,
        latency=latency,
        per_byte=per_byte,
        least=least,
        most=min(most or len(units), len(units)),
    )
    return classes, devices, machine


def _interchangeable(traffic: Traffic, one: Sequence[int], other: Sequence[int]) -> bool:
    """Whether two units can trade places without a change to anything."""
    if len(one) != len(other):
        return False
    swap = np.arange(len(traffic.unit))
    swap[list(one)], swap[list(other)] = other, one
    return (
        all(np.array_equal(row, row[swap]) for row in (traffic.launch, traffic.limit))
        and all(
            np.array_equal(rows, rows[:, swap])
            for rows in (traffic.seconds, traffic.entry, traffic.exit)
        )
        and all(
            np.array_equal(square, square[np.ix_(swap, swap)])
            for square in (traffic.latency, traffic.per_byte)
        )
    )


def _orders(traffic: Traffic) -> list[np.ndarray]:
    """Topological orders of the tasks that differ: deep, wide, by rank, by what devices like."""
    count = traffic.count
    finite = np.where(np.isfinite(traffic.seconds), traffic.seconds, np.nan)
    mean = np.nan_to_num(np.nanmean(finite, axis=1)) if count else np.zeros(0)
    depth, rank = np.zeros(count), np.zeros(count)
    for task in range(count):
        for source in traffic.predecessors[task]:
            depth[task] = max(depth[task], depth[source] + 1)
    for task in reversed(range(count)):
        after = max((rank[sink] for sink in traffic.successors[task]), default=0.0)
        rank[task] = mean[task] + after
    worst = np.nan_to_num(np.nanmax(finite, axis=1)) * 10 if count else np.zeros(0)
    filled = np.where(np.isfinite(traffic.seconds), traffic.seconds, worst[:, None]) + 1e-12
    kinds = np.unique(filled, axis=1, return_index=True)[1]
    keys = [np.arange(count, dtype=np.float64), depth, -rank]
    for one in sorted(kinds):
        for other in sorted(kinds):
            if one != other and len(keys) < 15:
                # What `one` is better at comes early.
                keys.append(filled[:, one] / filled[:, other])
    return [_ordered(traffic, key, deep=False) for key in keys] + [
        _ordered(traffic, keys[0], deep=True)
    ]


def _ordered(traffic: Traffic, key: np.ndarray, deep: bool) -> np.ndarray:
    """The ready task of least key first; with `deep`, the one that became ready last."""
    missing = [len(row) for row in traffic.predecessors]
    ready = [(0.0, float(key[task]), task) for task, count in enumerate(missing) if not count]
    heapify(ready)
    order: list[int] = []
    while ready:
        _, _, task = heappop(ready)
        order.append(task)
        for sink in traffic.successors[task]:
            missing[sink] -= 1
            if not missing[sink]:
                heappush(ready, (-float(len(order)) if deep else 0.0, float(key[sink]), sink))
    return np.array(order, np.int64)


def _prefixes(orders: Sequence[np.ndarray], limit: int) -> np.ndarray:
    """Borders by size, each once: beginnings of the orders, all or spread evenly."""
    tasks = len(orders[0])
    share = max(2, limit // len(orders) - 2)
    sizes = np.unique(np.linspace(0, tasks, min(share, tasks + 1)).astype(np.int64))
    found: dict[bytes, int] = {}
    for order in orders:
        for size, row in zip(sizes, _bits(order, sizes, tasks), strict=True):
            found.setdefault(row.tobytes(), int(size))
    ordered = sorted(found, key=lambda key: found[key])
    return np.frombuffer(b"".join(ordered), np.uint64).reshape(len(ordered), -1).copy()


def _bits(order: np.ndarray, sizes: Sequence[int] | np.ndarray, tasks: int) -> np.ndarray:
    """The beginnings of `order` of these sizes, which grow, as borders."""
    flags = np.zeros((len(sizes), (tasks // 64 + 1) * 64), np.uint8)
    rank = np.empty(tasks, np.int64)
    rank[order] = np.arange(tasks)
    flags[:, :tasks] = rank < np.asarray(sizes)[:, None]
    return np.packbits(flags, axis=1, bitorder="little").view("<u8").astype(np.uint64)
