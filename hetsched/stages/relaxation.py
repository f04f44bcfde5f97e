"""What no pipeline is faster than, and borders that are nearly as good, where borders are many."""

from dataclasses import dataclass, field
from itertools import permutations, product

import numpy as np
from ortools.graph.python import max_flow
from ortools.linear_solver import pywraplp

from hetsched.stages.serial import CAPACITY, UNCUTTABLE
from hetsched.stages.traffic import Traffic

# Ways to set the devices in a row, and minimum cuts of all of them together.
MOST_ROWS = 60
CUTS = 120
# Cuts that are made to price the devices of a pipeline which is to be improved.
PRICING = 16
# Good enough: no more is tried for the last permille.
NEAR = 1.001


@dataclass(eq=False)
class Row:
    """Devices in the order of their stages, and the cuts that were made for them.

    Each cut puts every task in a stage, none before what it reads from, for a price on each stage's
    seconds; prices add up to one. What the cut costs is a lower bound of the bottleneck.
    """

    devices: tuple[int, ...]
    bound: float = 0.0
    # (stages) seconds of each cut, and (n) its stages.
    loads: list[np.ndarray] = field(default_factory=list)
    stages: list[np.ndarray] = field(default_factory=list)
    price: np.ndarray = field(default_factory=lambda: np.zeros(0))
    weights: np.ndarray = field(default_factory=lambda: np.zeros(0))
    # No mixture of the cuts costs less than this; where the bound reaches it, there is no better.
    ceiling: float = np.inf

    def priced(self, traffic: Traffic) -> np.ndarray:
        """(n, stages) seconds times the price of the stage; a task that cannot run stays out."""
        price = np.maximum(self.price, 1e-12)
        seconds: np.ndarray = traffic.seconds[:, list(self.devices)] * price
        return seconds

    @property
    def finished(self) -> bool:
        return self.bound * NEAR >= self.ceiling


def relaxed(traffic: Traffic, most: int, enough: float) -> tuple[float, list[np.ndarray]]:
    """A lower bound of the bottleneck, and stages (n) that mix the cuts at it, best first.

    Launches, transfers and memory are left out. For devices in a row, each task is put in a stage
    so that the sum of the stages' seconds, times their prices, is least: a minimum cut. The prices
    that make it largest give the bound (a Lagrangian relaxation, solved by cutting planes), and
    the cuts there, mixed, an order of the tasks which passes near the best borders. The row with
    the lowest bound goes on first. Stops at `enough`.

    References
    ----------
    Kelley, "The cutting-plane method for solving convex programs", J. SIAM 8(4), 1960,
    https://doi.org/10.1137/0108053
    Picard, "Maximal closure of a graph and applications to combinatorial problems", Management
    Science 22(11), 1976, https://doi.org/10.1287/mnsc.22.11.1268
    """
    rows = _rows(traffic, most)
    if not rows or len(rows) > MOST_ROWS:
        return 0.0, []
    for count in range(CUTS):
        if count < len(rows):
            row = rows[count]
        else:
            row = min(rows, key=lambda row: row.bound)
            if row.finished or row.bound * NEAR >= enough:
                break
        _go_on(traffic, row)
    bound = min(row.bound for row in rows)
    best = sorted(rows, key=lambda row: row.bound)[:4]
    return bound, [
        np.asarray(row.weights @ np.array(row.stages[: len(row.weights)]))
        for row in best
        if row.stages
    ]


def _rows(traffic: Traffic, most: int) -> list[Row]:
    """Every order of as many units as may have a stage, those that are alike once."""
    units = [np.flatnonzero(traffic.unit == unit) for unit in range(int(traffic.unit.max()) + 1)]
    length = min(most or len(units), len(units))
    columns = np.unique(traffic.seconds, axis=1, return_inverse=True)[1].ravel()
    found: dict[tuple[int, ...], Row] = {}
    for chosen in permutations(range(len(units)), length):
        for devices in product(*(units[unit] for unit in chosen)):
            key = tuple(int(columns[device]) for device in devices)
            found.setdefault(key, Row(tuple(map(int, devices))))
            if len(found) > MOST_ROWS:
                return list(found.values())
    return list(found.values())


def _go_on(traffic: Traffic, row: Row) -> None:
    """One more cut, at the prices for which the cuts so far cost most."""
    stages = len(row.devices)
    if not len(row.price):
        row.price = np.full(stages, 1 / stages)
    stage = _cut(traffic, row.priced(traffic))
    if stage is None:
        row.bound = row.ceiling = np.inf
        return
    seconds = traffic.seconds[np.arange(traffic.count), np.array(row.devices)[stage]]
    load = np.bincount(stage, seconds, stages)
    row.bound = max(row.bound, float(row.price @ load) * (1 - 1e-9))
    row.loads.append(load)
    row.stages.append(stage)
    solver = pywraplp.Solver.CreateSolver("GLOP")
    prices = [solver.NumVar(0.0, 1.0, "") for _ in range(stages)]
    cost = solver.NumVar(0.0, solver.infinity(), "")
    solver.Add(sum(prices) == 1)
    size = max(float(load.max()), 1e-30)
    cuts = [
        solver.Add(cost <= sum(p * float(s / size) for p, s in zip(prices, one, strict=True)))
        for one in row.loads
    ]
    solver.Maximize(cost)
    solver.Solve()
    row.ceiling = float(cost.solution_value()) * size
    row.price = np.array([price.solution_value() for price in prices])
    row.price /= row.price.sum()
    weights = np.abs([cut.dual_value() for cut in cuts])
    row.weights = weights / (weights.sum() or 1.0)


def settled(traffic: Traffic, devices: tuple[int, ...]) -> Row:
    """The devices in a row with good prices on their stages."""
    row = Row(devices)
    for _ in range(PRICING):
        _go_on(traffic, row)
        if row.finished:
            break
    return row


def pulled(traffic: Traffic, row: Row, stage: np.ndarray, pull: float) -> np.ndarray | None:
    """The stages (n) of a cut near `stage`; None if some task can be in none.

    A task that leaves its stage costs the pull, in mean seconds of a task, beside its priced
    seconds: so few tasks go, those for which it pays most, and the loads change little.
    """
    seconds = row.priced(traffic)
    away = np.full(seconds.shape, pull * float(seconds[np.isfinite(seconds)].mean()))
    away[np.arange(traffic.count), stage] = 0.0
    return _cut(traffic, seconds + away)


def _cut(traffic: Traffic, seconds: np.ndarray) -> np.ndarray | None:
    """(n) the stages of which the (n, stages) `seconds` are least; None if some task has none.

    A task has a chain of arcs from source to sink, one for each stage, of which the cut takes one.
    """
    count, stages = seconds.shape
    source, sink = count * (stages - 1), count * (stages - 1) + 1
    if not np.isfinite(seconds).any(axis=1).all():
        return None
    if stages == 1:
        return np.zeros(count, np.int64)
    tasks = np.arange(count)
    ends = np.array(
        [(task, reader) for task, row_ in enumerate(traffic.successors) for reader in row_],
        np.int64,
    ).reshape(-1, 2)
    tails, heads, values = [], [], []
    for stage in range(stages):
        tails.append(tasks + (stage - 1) * count if stage else np.full(count, source))
        heads.append(tasks + stage * count if stage < stages - 1 else np.full(count, sink))
        values.append(seconds[:, stage])
        if stage < stages - 1:
            # Behind a border is behind all earlier ones, and so is all that reads from it.
            tails.append(ends[:, 0] + stage * count)
            heads.append(ends[:, 1] + stage * count)
            values.append(np.full(len(ends), np.inf))
        if 0 < stage < stages - 1:
            tails.append(tasks + stage * count)
            heads.append(tasks + (stage - 1) * count)
            values.append(np.full(count, np.inf))
    cost = np.concatenate(values)
    finite = np.isfinite(cost)
    capacity = np.full(len(cost), UNCUTTABLE, np.int64)
    capacity[finite] = np.rint(cost[finite] / (float(cost[finite].sum()) or 1.0) * CAPACITY)
    flow = max_flow.SimpleMaxFlow()
    flow.add_arcs_with_capacity(
        np.concatenate(tails).astype(np.int32), np.concatenate(heads).astype(np.int32), capacity
    )
    if flow.solve(source, sink) != flow.OPTIMAL or flow.optimal_flow() >= UNCUTTABLE:
        return None
    side = np.zeros(sink + 1, bool)
    side[flow.get_source_side_min_cut()] = True
    # Stage k: behind the first k borders.
    found: np.ndarray = side[:source].reshape(stages - 1, count).sum(axis=0)
    return found
