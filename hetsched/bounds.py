"""Lower bounds: seconds that no schedule can beat, from paths, from work, and from both.

Each bound is valid by itself, without a schedule and for unrelated machines. They ignore rounding:
a bound can be above the shortest schedule by a few units in the last place of its sums.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from hetsched.problem import Problem
from hetsched.tasks import TaskGraph

# Tasks above which the combined program has no rows of its own beside those of the area.
LARGE = 4000


@dataclass(frozen=True)
class Bound:
    """The best of several bounds: `values` has each in seconds, by name.

    Infinite where no schedule exists: a task that no device can run, or that no data can reach.
    """

    values: Mapping[str, float]

    @property
    def name(self) -> str:
        """Which bound is the best; the first of several."""
        return max(self.values, key=lambda name: self.values[name])

    @property
    def seconds(self) -> float:
        return self.values[self.name]


def lower_bound(problem: Problem, upper: float = np.inf) -> Bound:
    """Bounds on the makespan that need milliseconds: for each schedule shorter than `upper`.

    With the makespan of a known schedule as `upper`, tasks are not considered on devices where
    they would be longer than that; no value is then above `upper`.
    """
    if not problem.tasks:
        return Bound({"critical path": 0.0})
    head, tail = heads(problem), tails(problem)
    path = critical_path(problem, head, tail)
    if not np.isfinite(path):
        return Bound({"critical path": path})
    long = head + problem.seconds + tail > upper * (1 + 1e-9)
    if long.all(axis=1).any():
        return Bound({"critical path": upper})
    if long.any():
        problem = replace(problem, seconds=np.where(long, np.inf, problem.seconds))
    values = {"critical path": path, "area": area(problem)}
    if problem.tasks <= LARGE:
        values["combined"] = combined(problem, head, tail, max(values.values()))
    return Bound({name: min(value, upper) for name, value in values.items()})


def plan_bound(tasks: TaskGraph, objective: str = "latency", upper: float = np.inf) -> Bound:
    """Of the plans for `tasks`, whose parts cost a launch each: the bound of an objective.

    Each part begins with the launch, so that no task starts before the launch of its device, nor
    sooner than a launch after data have come from elsewhere.
    """
    problem = Problem.of(tasks)
    if objective == "throughput":
        values = throughput_bound(problem).values
        return Bound({name: min(value, upper) for name, value in values.items()})
    launch = np.array([device.launch_seconds for device in tasks.system.devices])
    moved = launch * (1.0 - np.eye(len(launch)))
    return lower_bound(
        replace(problem, entry=problem.entry + launch, latency=problem.latency + moved), upper
    )


def throughput_bound(problem: Problem) -> Bound:
    """Seconds a request in steady state: the work of one, shared without loss by all units.

    Valid too where requests are placed in different ways, as with replicated stages.
    """
    return Bound({"area": area(problem)})


def heads(problem: Problem) -> np.ndarray:
    """(n, p) the earliest start of each task on each device, each path to it by itself.

    Along a path each task is where it suits the path best, with what moving the data costs: the
    recursion L(i, q) = max over predecessors j of min over r of L(j, r) + w(j, r) + c(j r, i q).
    Infinite where data cannot come. O(edges * p * p).
    """
    rank = np.arange(problem.tasks)
    delay = problem.latency, problem.per_byte
    return _longest(problem, problem.entry, problem.source, problem.sink, rank, *delay)


def tails(problem: Problem) -> np.ndarray:
    """(n, p) the least time from the finish of each task on each device to the end of the run."""
    rank = np.arange(problem.tasks)[::-1]
    delay = problem.latency.T, problem.per_byte.T
    return _longest(problem, problem.exit, problem.sink, problem.source, rank, *delay)


def _longest(
    problem: Problem,
    own: np.ndarray,
    before: np.ndarray,
    behind: np.ndarray,
    rank: np.ndarray,
    latency: np.ndarray,
    per_byte: np.ndarray,
) -> np.ndarray:
    """The recursion of `heads` from `before` to `behind`, a level of the graph at a time."""
    value = own.astype(np.float64)
    depth = [0] * problem.tasks
    by_rank = np.argsort(rank[before], kind="stable")
    for i, j in zip(before[by_rank].tolist(), behind[by_rank].tolist(), strict=True):
        if depth[j] <= depth[i]:
            depth[j] = depth[i] + 1
    level = np.array(depth)[behind]
    edges = np.lexsort((behind, level))
    level, before, behind = level[edges], before[edges], behind[edges]
    nbytes = problem.nbytes[edges]
    steps = np.searchsorted(level, np.arange(1, max(depth, default=0) + 2))
    for first, last in zip(steps[:-1].tolist(), steps[1:].tolist(), strict=True):
        ends = before[first:last]
        there = (value[ends] + problem.seconds[ends])[:, :, None] + latency
        there += nbytes[first:last, None, None] * per_byte
        sinks = behind[first:last]
        group = np.flatnonzero(np.r_[True, sinks[1:] != sinks[:-1]])
        latest = np.maximum.reduceat(there.min(axis=1), group)
        value[sinks[group]] = np.maximum(value[sinks[group]], latest)
    return value


def critical_path(problem: Problem, head: np.ndarray, tail: np.ndarray) -> float:
    """The longest path, each task and each transfer on it at its best for the path."""
    return float((head + problem.seconds + tail).min(axis=1).max())


def area(problem: Problem) -> float:
    """The least T for which the work fits into T on each unit, tasks shared out at will.

    Memory counts where it is limited, shares of a task taking their share of it.

    References
    ----------
    Lenstra, Shmoys and Tardos, "Approximation algorithms for scheduling unrelated parallel
    machines", Mathematical Programming 46, 1990, https://doi.org/10.1007/BF01585745
    """
    return _Program.of(problem).solve()[0]


def combined(problem: Problem, head: np.ndarray, tail: np.ndarray, least: float) -> float:
    """The area with rows for windows and for paths, found where the shares so far break them.

    A window: on one unit, the tasks with a head of at least a and a tail of at least b have
    T - a - b. A path: its tasks at their shares follow each other, with the least delay of an edge
    times the share of its source that is not where its sink is. `least` is a bound known before:
    a window counts only where a + b is not above it, since no task need be there.

    References
    ----------
    Kedad-Sidhoum, Monna and Trystram, "Scheduling tasks with precedence constraints on hybrid
    multi-core machines", HCW 2015, https://doi.org/10.1109/IPDPSW.2015.119
    """
    program = _Program.of(problem)
    best, shares = program.solve()
    for _ in range(12):
        least = max(least, best)
        found = program.add_windows(problem, head, tail, shares, least)
        found |= program.add_path(problem, shares, best)
        if not found:
            break
        before, (best, shares) = best, program.solve()
        if best <= before * (1 + 1e-4):
            break
    return best


class _Program:
    """min T, where rows . shares <= size T + slack, and the shares of each task add up to 1.

    Solved by its prices y >= 0 with sum of size * y = 1: T is at least the sum over tasks of the
    least price of the task anywhere, less slack * y, whatever y is. So an inexact solution is a
    bound too, and its accuracy costs only strength.
    """

    def __init__(self, allowed: np.ndarray) -> None:
        self.allowed = allowed
        self.rows: list[np.ndarray] = []
        self.size: list[float] = []
        self.slack: list[float] = []
        # Of the rows; those of the best bound so far.
        self.prices = np.empty(0)

    @classmethod
    def of(cls, problem: Problem) -> "_Program":
        """The rows of the units, and of limited memory."""
        program = cls(np.isfinite(problem.seconds))
        work = np.where(program.allowed, problem.seconds, 0.0)
        for unit in range(int(problem.unit.max()) + 1):
            program.add(work * (problem.unit == unit), 1.0, 0.0)
        for device in np.flatnonzero(np.isfinite(problem.limit)):
            held = np.where(np.arange(len(problem.limit)) == device, problem.memory[:, None], 0.0)
            if held[program.allowed[:, device]].sum() > problem.limit[device]:
                # As a share of the limit, in seconds; a little more with T, so that a solution is.
                scale = work.max() / max(problem.limit[device], 1.0)
                program.add(held * scale, 1e-3, problem.limit[device] * scale)
        return program

    def add(self, row: np.ndarray, size: float, slack: float) -> None:
        self.rows.append(row)
        self.size.append(size)
        self.slack.append(slack)

    def solve(self) -> tuple[float, np.ndarray]:
        """The bound, and shares (n, p) that almost reach it.

        The simplex method, where a column is a placement of all tasks, and the one to enter is
        the best at the present prices (Dantzig and Wolfe): its price bounds T besides.
        """
        rows, size = np.array(self.rows), np.array(self.size)
        count, tasks = len(rows), np.arange(len(self.allowed))
        # Raised a little, each row by another amount, so that it cannot go in a circle.
        raised = np.array(self.slack) + 1e-10 * np.arange(1, count + 1) * np.abs(rows).max()
        place = np.argmin(np.where(self.allowed, rows.sum(axis=0), np.inf), axis=1)
        load = rows[:, tasks, place].sum(axis=1)
        # Columns: slacks, but T in place of that of the fullest row; last the placement.
        first = int(np.argmax((load - raised) / size))
        basis = np.eye(count + 1)
        basis[:, first] = np.r_[-size, 0.0]
        basis[:, -1] = np.r_[load, 1.0]
        places = {count: place}
        cost = np.zeros(count + 1)
        cost[first] = 1.0
        right = np.r_[raised, 1.0]
        best = 0.0
        for _ in range(50 + 20 * count):
            values = np.linalg.solve(basis, right)
            dual = np.linalg.solve(basis.T, cost)
            prices = -dual[:-1]
            lowest = int(np.argmin(prices))
            if prices[lowest] < -1e-9 * prices.max():
                column, place = np.eye(count + 1)[lowest], None
            else:
                prices = np.maximum(prices, 0.0)
                prices /= size @ prices
                each = np.where(self.allowed, np.tensordot(prices, rows, 1), np.inf)
                place = np.argmin(each, axis=1)
                value = float(each[tasks, place].sum() - prices @ self.slack)
                if value > best:
                    best, self.prices = value, prices
                if cost @ values - best <= 1e-9 * best:
                    break
                column = np.r_[rows[:, tasks, place].sum(axis=1), 1.0]
            step = np.linalg.solve(basis, column)
            with np.errstate(divide="ignore", invalid="ignore"):
                ratio = np.where(step > 1e-11, values / step, np.inf)
            leave = int(np.argmin(ratio))
            if not np.isfinite(ratio[leave]) or cost[leave]:
                break
            basis[:, leave] = column
            places.pop(leave, None)
            if place is not None:
                places[leave] = place
        values = np.linalg.solve(basis, right)
        shares = np.zeros(self.allowed.shape)
        for index, place in places.items():
            shares[tasks, place] += max(values[index], 0.0)
        return best, shares

    def add_windows(
        self,
        problem: Problem,
        head: np.ndarray,
        tail: np.ndarray,
        shares: np.ndarray,
        least: float,
    ) -> bool:
        """Adds of each unit the window that `shares` break the most, if they break one."""
        found = False
        for unit in range(int(problem.unit.max()) + 1):
            own = self.allowed & (problem.unit == unit)
            if not own.any():
                continue
            begin, end = _steps(head[own]), _steps(tail[own])
            row = np.searchsorted(begin, head[own], "right") - 1
            column = np.searchsorted(end, tail[own], "right") - 1
            work = np.zeros((len(begin), len(end)))
            np.add.at(work, (row, column), (shares[own] * problem.seconds[own]))
            work = work[::-1, ::-1].cumsum(axis=0).cumsum(axis=1)[::-1, ::-1]
            idle = begin[:, None] + end
            needed = np.where(idle <= least, work + idle, 0.0)
            a, b = np.unravel_index(int(needed.argmax()), needed.shape)
            if needed[a, b] > least * (1 + 1e-6):
                inside = own & (head >= begin[a]) & (tail >= end[b])
                self.add(np.where(inside, problem.seconds, 0.0), 1.0, -float(idle[a, b]))
                found = True
        return found

    def add_path(self, problem: Problem, shares: np.ndarray, least: float) -> bool:
        """Adds the longest path at `shares`, if it is longer than `least`."""
        devices = problem.seconds.shape[1]
        apart = ~np.eye(devices, dtype=bool)
        work = np.where(self.allowed, problem.seconds, 0.0)
        weight = (shares * work).sum(axis=1)
        source, sink = problem.source, problem.sink
        delay = np.zeros(len(source))
        if devices > 1:
            pair = problem.latency[apart], problem.per_byte[apart]
            delay = np.min(pair[0] + problem.nbytes[:, None] * pair[1], axis=1)
            delay[np.isinf(delay)] = 0.0
        moved = np.maximum(shares[source] - shares[sink], 0.0)
        begin = (shares * problem.entry).sum(axis=1)
        end = (shares * problem.exit).sum(axis=1)
        finish, edge_of = (begin + weight).tolist(), [-1] * problem.tasks
        steps = (delay * moved.sum(axis=1)).tolist()
        for edge, (i, j) in enumerate(zip(source.tolist(), sink.tolist(), strict=True)):
            # Edges are sorted by sink, so that all into i have been seen.
            value = finish[i] + steps[edge] + weight[j]
            if value > finish[j]:
                finish[j], edge_of[j] = value, edge
        last = int(np.argmax(np.array(finish) + end))
        if finish[last] + end[last] <= least * (1 + 1e-6):
            return False
        row = np.zeros_like(work)
        row[last] = problem.exit[last]
        while True:
            row[last] += work[last]
            edge = edge_of[last]
            if edge < 0:
                break
            towards = moved[edge] > 0
            row[last, towards] -= delay[edge]
            last = int(source[edge])
            row[last, towards] += delay[edge]
        row[last] += problem.entry[last]
        self.add(row, 1.0, 0.0)
        return True


def _steps(values: np.ndarray) -> np.ndarray:
    """The different values, or of many some that are spread among them, the least included."""
    found = np.unique(values)
    return found if len(found) <= 64 else found[:: -(-len(found) // 64)]


def infeasible_memory(problem: Problem) -> str | None:
    """Why the devices cannot hold what the tasks need, whatever runs where; None if not seen.

    Some devices must hold all tasks that run on none but them. If each such set has room, then
    some shares of the tasks fit (Hall's condition), though perhaps not whole tasks. O(2^p + n p).
    """
    count = len(problem.limit)
    which = np.isfinite(problem.seconds) @ (1 << np.arange(count))
    only = np.bincount(which, problem.memory, 1 << count)
    sets = np.arange(1 << count)
    inside = (sets[:, None] >> np.arange(count)) & 1
    limit = np.where(inside, problem.limit, 0.0).sum(axis=1)
    demand = np.array([only[(sets & chosen) == sets].sum() for chosen in sets])
    short = np.flatnonzero(demand > limit * (1 + 1e-12))
    if not len(short):
        return None
    first = min(short.tolist(), key=lambda chosen: (int(inside[chosen].sum()), chosen))
    names = [name for name, of in zip(problem.devices, inside[first], strict=True) if of]
    return (
        f"{', '.join(map(repr, names))} must hold at least {demand[first] / 2**20:.1f} MiB, of "
        f"tasks that run nowhere else, and {'has' if len(names) == 1 else 'have'} "
        f"{limit[first] / 2**20:.1f} MiB; add a device, or raise memory_bytes"
    )


def shares(problem: Problem) -> np.ndarray:
    """(n, p) of each task on each device, with which `area` is reached, up to rounding."""
    return _Program.of(problem).solve()[1]


def priced_area(problem: Problem) -> tuple[float, np.ndarray]:
    """The area, and (units) prices of a second of each unit, which add up to 1.

    All work where it is worth least at these prices is worth the area, so that what a schedule does
    elsewhere, and the time that units idle, at their prices, are how far it is above.
    """
    program = _Program.of(problem)
    least = program.solve()[0]
    price = program.prices[: int(problem.unit.max()) + 1].copy()
    return least, price / (price.sum() or 1.0)
