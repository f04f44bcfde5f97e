"""What no pipeline is faster than, and cuts on the way there, where borders are many."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from heapq import heapify, heappop, heappush
from itertools import permutations, product

import numpy as np
from ortools.graph.python import max_flow
from ortools.linear_solver import pywraplp

from hetsched.stages.serial import CAPACITY, UNCUTTABLE
from hetsched.stages.traffic import Traffic

# Ways to set the devices in a row.
MOST_ROWS = 120
# Good enough: no more is tried for the last permille. Prices are settled when the best mixture of
# the cuts is so near.
NEAR = 1.001
SETTLED = 1.0005
# What capacities in whole numbers can take from a bound, as a share.
ROUNDING = 1e-8
# The work of a cut: tasks times borders that are free, and so many besides.
FIXED = 500
# Weights of cuts and of tasks that are no more than this are nothing.
NOTHING = 1e-6

Judge = Callable[[tuple[int, ...], np.ndarray], float]


@dataclass(eq=False)
class Branch:
    """Pipelines on devices in a row, in which each task is in one of some adjacent stages.

    Cuts put every task in a stage, none before what it reads from, for a price on each stage's
    seconds; prices add up to one. What the cut costs is a lower bound of the bottleneck.
    """

    devices: tuple[int, ...]
    # (n) of each task.
    first: np.ndarray
    last: np.ndarray
    bound: float = 0.0
    # (n) the stages of each cut, and (stages) the seconds of each.
    cuts: list[np.ndarray] = field(default_factory=list)
    loads: list[np.ndarray] = field(default_factory=list)
    # The prices for which the cuts so far cost most, and how much that is: it takes better cuts
    # for the bound to exceed that; how they mix at these prices.
    price: np.ndarray = field(default_factory=lambda: np.zeros(0))
    ceiling: float = np.inf
    weights: np.ndarray = field(default_factory=lambda: np.zeros(0))
    network: "Network | None" = None

    @property
    def settled(self) -> bool:
        return self.bound * SETTLED >= self.ceiling

    @property
    def mixture(self) -> np.ndarray:
        """(n) the mean stage of each task."""
        mean: np.ndarray = self.weights @ np.array(self.cuts)
        return mean


class Relaxation:
    """A lower bound of the bottleneck by branch and bound, and the best cut of all it makes.

    Launches, transfers and memory are left out. For devices in a row, each task is put in a stage
    so that the sum of the stages' seconds, times their prices, is least: a minimum cut. The prices
    that make it largest give a bound (a Lagrangian relaxation, solved by cutting planes). Where it
    is lowest, a task is kept behind a border and, apart from that, before it. The cuts at the best
    prices, mixed, are an order of the tasks that passes near the best borders.

    References
    ----------
    Kelley, "The cutting-plane method for solving convex programs", J. SIAM 8(4), 1960,
    https://doi.org/10.1137/0108053
    Picard, "Maximal closure of a graph and applications to combinatorial problems", Management
    Science 22(11), 1976, https://doi.org/10.1287/mnsc.22.11.1268
    Geoffrion, "Lagrangean relaxation for integer programming", Mathematical Programming Study 2,
    1974, https://doi.org/10.1007/BFb0120690
    """

    def __init__(self, traffic: Traffic, most: int, judge: Judge) -> None:
        """`judge` says how long a pipeline really takes: devices in a row, and (n) stages."""
        self.traffic = traffic
        self.work = 0.0
        self._judge = judge
        self._edges = np.array(
            [(task, reader) for task, row in enumerate(traffic.successors) for reader in row],
            np.int64,
        ).reshape(-1, 2)
        rows = _rows(traffic, most)
        self._rows = [] if len(rows) > MOST_ROWS else rows
        # By bound, then age. What has been looked at to its end has the bound of `_ended`.
        self._open = [(0.0, age, row) for age, row in enumerate(self._rows)]
        self._made = len(rows)
        self._ended = np.inf if self._rows else 0.0

    @property
    def bound(self) -> float:
        """No pipeline is faster."""
        return min([self._ended, *(bound for bound, _, _ in self._open[:1])])

    @property
    def rows(self) -> list[Branch]:
        """The devices in a row before anything was branched, least bound first."""
        return sorted((row for row in self._rows if row.cuts), key=lambda row: row.bound)

    def settled(self, devices: tuple[int, ...]) -> Branch | None:
        """The row of these devices, with good prices; None if it is not among them."""
        row = next((row for row in self._rows if row.devices == devices), None)
        while row and not row.settled:
            self._priced(row, 0.0)
        return row

    def go_on(self, enough: float, work: float, branching: bool) -> float:
        """Raises the bound until it is near `enough` or until so much work is done in all.

        Without `branching` only until the lowest of the rows is settled. Returns `enough`, or what
        the best cut takes that the judge has found to be faster.
        """
        self._open = [(branch.bound, age, branch) for _, age, branch in self._open]
        heapify(self._open)
        while self._open and self.work < work and self.bound * NEAR < enough:
            bound, age, branch = self._open[0]
            if bound > self._ended:
                break
            if not branch.settled:
                heappop(self._open)
                enough = self._priced(branch, enough)
                heappush(self._open, (branch.bound, age, branch))
                continue
            if not branching:
                break
            heappop(self._open)
            branch.network = None
            self._branch(branch)
        return enough

    def _priced(self, branch: Branch, enough: float) -> float:
        """One more cut, at the prices for which the cuts so far cost most."""
        stages, traffic = len(branch.devices), self.traffic
        if not len(branch.price):
            branch.price = np.full(stages, 1 / stages)
        if branch.network is None:
            branch.network = Network(self._edges, branch.first, branch.last, stages)
        self.work += FIXED + branch.network.nodes
        seconds = traffic.seconds[:, list(branch.devices)]
        cut = branch.network.cut(seconds * np.maximum(branch.price, 1e-12))
        if cut is None:
            branch.bound = branch.ceiling = np.inf
            return enough
        load = np.bincount(cut, seconds[np.arange(traffic.count), cut], stages)
        branch.bound = max(branch.bound, float(branch.price @ load) * (1 - ROUNDING))
        branch.cuts.append(cut.astype(np.int8))
        branch.loads.append(load)
        _mix(branch)
        if load.max() < enough:
            return min(enough, self._judge(branch.devices, cut))
        return enough

    def _branch(self, branch: Branch) -> None:
        """Opens what is left where some task stays before a border and where it stays behind."""
        task, border = self._torn(branch)
        if task < 0:
            self._ended = min(self._ended, branch.bound)
            return
        for late in (False, True):
            first, last = branch.first.copy(), branch.last.copy()
            if late:
                _raise(first, task, border + 1, self.traffic.successors)
            else:
                _raise(last, task, -border, self.traffic.predecessors, -1)
            if (first > last).any():
                continue
            kept = [
                place
                for place, cut in enumerate(branch.cuts)
                if ((cut >= first) & (cut <= last)).all()
            ]
            self._made += 1
            part = replace(
                branch,
                first=first,
                last=last,
                cuts=[branch.cuts[place] for place in kept],
                loads=[branch.loads[place] for place in kept],
                ceiling=np.inf,
            )
            if kept:
                _mix(part)
            heappush(self._open, (part.bound, self._made, part))

    def _torn(self, branch: Branch) -> tuple[int, int]:
        """The task and the border of which to know the side changes most; -1 if all are known.

        Where the cuts have some task on both sides of a border, whatever reads from it follows if
        it goes behind, and what it reads from stays if it stays.
        """
        mixed = [place for place, weight in enumerate(branch.weights) if weight > NOTHING]
        cuts, weights = np.array([branch.cuts[place] for place in mixed]), branch.weights[mixed]
        seconds = self.traffic.seconds[:, list(branch.devices)]
        mean = np.where(np.isfinite(seconds), seconds, 0.0).mean(axis=1)
        most, task, border = 0.0, -1, -1
        for number in range(len(branch.devices) - 1):
            behind = weights @ (cuts > number) / weights.sum()
            torn = np.flatnonzero((behind > NOTHING) & (behind < 1 - NOTHING))
            if not len(torn):
                continue
            below = _reached(torn, self.traffic)
            follows = below @ (mean[torn] * (1 - behind[torn]))
            stays = below.T @ (mean[torn] * behind[torn])
            either = np.minimum(follows, stays)
            place = int(np.argmax(either))
            if task < 0 or either[place] > most:
                most, task, border = float(either[place]), int(torn[place]), number
        return task, border


class Network:
    """Tasks as chains of arcs from source to sink, an arc for each stage that a task can be in.

    A cut takes one of each chain. What is known of a task needs no nodes.
    """

    def __init__(self, edges: np.ndarray, first: np.ndarray, last: np.ndarray, stages: int) -> None:
        borders = np.arange(stages - 1)
        self._first = first
        self._free = (first[:, None] <= borders) & (borders < last[:, None])
        self.nodes = int(self._free.sum())
        number = np.full(self._free.shape, -1)
        number[self._free] = np.arange(self.nodes)
        source, sink = self._ends = self.nodes, self.nodes + 1
        # Tasks that can be in each stage, and are not only there.
        self._able: list[np.ndarray] = []
        tails, heads = [], []
        for stage in range(stages):
            able = np.flatnonzero((first < last) & (first <= stage) & (stage <= last))
            self._able.append(able)
            before = number[able, stage - 1] if stage else np.full(len(able), source)
            tails.append(np.where(stage > first[able], before, source))
            behind = number[able, stage] if stage < stages - 1 else np.full(len(able), sink)
            heads.append(np.where(stage < last[able], behind, sink))
        self._priced = sum(map(len, self._able))
        for border in range(stages - 1):
            # What reads from what is behind a border is behind it too.
            ends = number[edges, border]
            ends = ends[(ends >= 0).all(axis=1)]
            tails.append(ends[:, 0])
            heads.append(ends[:, 1])
            if border:
                # Behind a border is behind all earlier ones.
                both = (number[:, border - 1 : border + 1] >= 0).all(axis=1)
                tails.append(number[both, border])
                heads.append(number[both, border - 1])
        self._flow = max_flow.SimpleMaxFlow()
        self._arcs = self._flow.add_arcs_with_capacity(
            np.concatenate(tails).astype(np.int32),
            np.concatenate(heads).astype(np.int32),
            np.full(sum(map(len, tails)), UNCUTTABLE, np.int64),
        )

    def cut(self, seconds: np.ndarray) -> np.ndarray | None:
        """(n) the stages of which the (n, stages) `seconds` are least; None if some task has none.

        What tasks cost that have no choice is left out.
        """
        if not self.nodes:
            return self._first
        values = [seconds[able, stage] for stage, able in enumerate(self._able)]
        cost = np.concatenate(values)
        finite = np.isfinite(cost)
        capacity = np.full(len(cost), UNCUTTABLE, np.int64)
        capacity[finite] = np.rint(cost[finite] / (float(cost[finite].sum()) or 1.0) * CAPACITY)
        flow = self._flow
        flow.set_arcs_capacity(self._arcs[: self._priced], capacity)
        if flow.solve(*self._ends) != flow.OPTIMAL or flow.optimal_flow() >= UNCUTTABLE:
            return None
        side = np.zeros(self.nodes + 2, bool)
        side[flow.get_source_side_min_cut()] = True
        behind = np.zeros(self._free.shape, bool)
        behind[self._free] = side[: self.nodes]
        found: np.ndarray = self._first + behind.sum(axis=1)
        return found


def _rows(traffic: Traffic, most: int) -> list[Branch]:
    """Every order of as many units as may have a stage, those that are alike once."""
    units = [np.flatnonzero(traffic.unit == unit) for unit in range(int(traffic.unit.max()) + 1)]
    length = min(most or len(units), len(units))
    columns = np.unique(traffic.seconds, axis=1, return_inverse=True)[1].ravel()
    first = np.zeros(traffic.count, np.int64)
    found: dict[tuple[int, ...], Branch] = {}
    for chosen in permutations(range(len(units)), length):
        for devices in product(*(units[unit] for unit in chosen)):
            key = tuple(int(columns[device]) for device in devices)
            row = Branch(tuple(map(int, devices)), first, first + length - 1)
            found.setdefault(key, row)
            if len(found) > MOST_ROWS:
                return list(found.values())
    return list(found.values())


def _mix(branch: Branch) -> None:
    """The prices for which the cuts so far cost most, and how the cuts mix at them."""
    # Built number by number: expressions take longer than the cuts.
    solver = pywraplp.Solver.CreateSolver("GLOP")
    prices = [solver.NumVar(0.0, 1.0, "") for _ in branch.devices]
    cost = solver.NumVar(0.0, solver.infinity(), "")
    total = solver.Constraint(1.0, 1.0)
    for price in prices:
        total.SetCoefficient(price, 1.0)
    size = max(float(branch.loads[-1].max()), 1e-30)
    cuts = []
    for load in branch.loads:
        cuts.append(solver.Constraint(-solver.infinity(), 0.0))
        cuts[-1].SetCoefficient(cost, 1.0)
        for price, seconds in zip(prices, (load / -size).tolist(), strict=True):
            cuts[-1].SetCoefficient(price, seconds)
    solver.Objective().SetCoefficient(cost, 1.0)
    solver.Objective().SetMaximization()
    solver.Solve()
    branch.ceiling = float(cost.solution_value()) * size
    found = np.maximum([price.solution_value() for price in prices], 0.0)
    branch.price = found / found.sum()
    weights = np.abs([cut.dual_value() for cut in cuts])
    branch.weights = weights / (weights.sum() or 1.0)


def _raise(
    limits: np.ndarray,
    task: int,
    least: int,
    further: tuple[tuple[int, ...], ...],
    sign: int = 1,
) -> None:
    """`limits`, times the sign, are at least `least` at the task and all that is further on."""
    waiting = [task]
    while waiting:
        one = waiting.pop()
        if sign * limits[one] < least:
            limits[one] = sign * least
            waiting += further[one]


def _reached(some: np.ndarray, traffic: Traffic) -> np.ndarray:
    """Which of some tasks are reached from which (rows), over some of them, or are the same."""
    place = {int(task): index for index, task in enumerate(some)}
    below = np.eye(len(some), dtype=bool)
    for task in reversed(place):
        for sink in traffic.successors[task]:
            if sink in place:
                below[place[task]] |= below[place[sink]]
    return below
