"""The scheduling problem as a constraint program, for OR-Tools' CP-SAT."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import frexp, inf, isfinite

import numpy as np
from ortools.sat.python import cp_model

from hetsched.errors import InfeasiblePlan
from hetsched.problem import Problem, Solution

# Ticks of the longest schedule that is considered, as a power of two: fine enough that what
# rounding takes from a bound is far below what `Solution.optimal` allows.
TIME_BITS = 40
MEMORY_BITS = 50
# A schedule that is this short beside the longest is looked for again with finer ticks.
COARSE = 1 / 64


@dataclass(frozen=True)
class Limit:
    """How long a solver may look: seconds of the wall, and units of CP-SAT's own count of its work.

    The same work gives the same result on any machine, as long as the seconds are not used up and
    there is one worker.
    """

    seconds: float = inf
    work: float = inf
    workers: int = 1


def solve(
    problem: Problem,
    limit: Limit,
    known: Solution | None = None,
    seed: int = 0,
    chains: Sequence[tuple[int, int]] = (),
) -> Solution | None:
    """The best schedule within `limit`, and a bound; None if nothing was found.

    `known` is where the search starts, and nothing longer is looked for. `chains` are pairs of
    tasks of which the first finishes before the second starts, whatever their devices.
    A bound of infinity says that there is no schedule, which is then `known` or None.

    Time is counted in ticks of a power of two of a second, and all times are rounded down: what is
    minimised is never above the real makespan, so the bound holds for the real problem, and
    the rounding costs it less than a tick for each task and transfer on a path. The schedule
    that is returned is not the rounded one: `decode` runs its order and devices in floats.
    """
    for rounding in (np.floor, np.ceil):
        found = _Model(problem, known, chains, rounding).solve(limit, seed)
        if found is None or holds(problem, found.device):
            break
    if found and not known and found.makespan < COARSE * serial_seconds(problem):
        return solve(problem, limit, found, seed, chains)
    return found


def holds(problem: Problem, device: np.ndarray) -> bool:
    """Whether every device can hold the tasks that are placed on it."""
    held = np.bincount(device, problem.memory, len(problem.limit))
    return bool((held <= problem.limit).all())


def decode(
    problem: Problem, device: np.ndarray, order: np.ndarray, solver: str, bound: float = 0.0
) -> Solution:
    """Tasks on their devices in `order`, which is topological, each as soon as it can."""
    start = np.zeros(problem.tasks)
    finish = np.zeros(problem.tasks)
    end = 0.0
    free = [0.0] * (int(problem.unit.max()) + 1)
    begins = problem.incoming.tolist()
    for i in order.tolist():
        q = int(device[i])
        edges = slice(begins[i], begins[i + 1])
        begin = max(free[problem.unit[q]], float(problem.entry[i, q]))
        sources = problem.source[edges]
        if len(sources):
            way = transfer_seconds(problem, problem.nbytes[edges], device[sources], q)
            begin = max(begin, float((finish[sources] + way).max()))
        start[i] = begin
        finish[i] = free[problem.unit[q]] = begin + problem.seconds[i, q]
        end = max(end, float(finish[i] + problem.exit[i, q]))
    return Solution(np.array(device, np.int64), start, end, min(bound, end), solver)


def order_of(problem: Problem, solution: Solution) -> np.ndarray:
    """The tasks by start; one without work comes before the one that it starts with."""
    rows = np.arange(problem.tasks)
    finish = solution.start + problem.seconds[rows, solution.device]
    return np.lexsort((rows, finish, solution.start))


def transfer_seconds(
    problem: Problem, nbytes: np.ndarray, source: np.ndarray | int, sink: np.ndarray | int
) -> np.ndarray:
    """Of bytes from device to device; infinite where no link leads."""
    seconds: np.ndarray = problem.latency[source, sink] + problem.per_byte[source, sink] * nbytes
    return seconds


def serial_seconds(problem: Problem) -> float:
    """What no shortest schedule exceeds: all tasks and transfers in turn, at their slowest."""
    finite = np.where(np.isfinite(problem.seconds), problem.seconds, 0.0)
    way = np.where(np.isfinite(problem.latency), problem.latency, 0.0)[..., None]
    moves = (way + problem.per_byte[..., None] * problem.nbytes).max((0, 1))
    ends = problem.entry.max(initial=0.0) + problem.exit.max(initial=0.0)
    return float(finite.max(1).sum() + moves.sum() + ends)


class _Model:
    """A start for each task, a literal for each task and device that can run it.

    A transfer is a difference of two starts that holds where both tasks are on a pair of devices.
    To say it with the starts alone, and with no variable for the finish, is what CP-SAT is
    fastest with; so is leaving out the linear relaxation.
    """

    def __init__(
        self,
        problem: Problem,
        known: Solution | None,
        chains: Sequence[tuple[int, int]],
        rounding: np.ufunc,
    ) -> None:
        self.problem = problem
        self.known = known
        self.model = cp_model.CpModel()
        longest = known.makespan if known else serial_seconds(problem)
        self.ticks = 2.0 ** (TIME_BITS - frexp(longest)[1]) if longest > 0 else 1.0
        self.seconds = self._in_ticks(problem.seconds)
        entry, behind = self._in_ticks(problem.entry), self._in_ticks(problem.exit)
        # Rounded down, the known schedule is no longer than it is in floats, rounded up.
        self.horizon = int(np.ceil(longest * self.ticks))
        tasks, devices = problem.seconds.shape
        self.on: list[dict[int, cp_model.IntVar]] = []
        self.start: list[cp_model.IntVar] = []
        self.makespan = self.model.new_int_var(0, self.horizon, "")
        busy: list[list[cp_model.IntervalVar]] = [[] for _ in range(int(problem.unit.max()) + 1)]
        for i in range(tasks):
            can = [q for q in range(devices) if isfinite(problem.seconds[i, q])]
            on = {q: self.model.new_bool_var("") for q in can}
            self.model.add_exactly_one(on.values())
            start = self.model.new_int_var(
                min((int(entry[i, q]) for q in can), default=0), self.horizon, ""
            )
            for q, here in on.items():
                length = int(self.seconds[i, q])
                busy[problem.unit[q]].append(
                    self.model.new_optional_fixed_size_interval_var(start, length, here, "")
                )
                if entry[i, q]:
                    self.model.add(start >= int(entry[i, q])).only_enforce_if(here)
                tail = length + int(behind[i, q])
                self.model.add(self.makespan >= start + tail).only_enforce_if(here)
            self.on.append(on)
            self.start.append(start)
        for intervals in busy:
            self.model.add_no_overlap(intervals)
        self._edges()
        for i, j in chains:
            for q, here in self.on[i].items():
                self.model.add(
                    self.start[j] >= self.start[i] + int(self.seconds[i, q])
                ).only_enforce_if(here)
        self._work()
        self._memory(rounding)
        self.model.minimize(self.makespan)
        if known:
            self._hint(known)

    def _in_ticks(self, seconds: np.ndarray) -> np.ndarray:
        # A product with a power of two is exact.
        finite = np.where(np.isfinite(seconds), seconds, 0.0)
        return np.floor(finite * self.ticks).astype(np.int64)

    def _edges(self) -> None:
        problem = self.problem
        devices = len(problem.limit)
        pairs = np.indices((devices, devices))
        for edge in range(len(problem.source)):
            i, j = int(problem.source[edge]), int(problem.sink[edge])
            way = transfer_seconds(problem, problem.nbytes[edge], pairs[0], pairs[1])
            ticks = self._in_ticks(way)
            for q, here in self.on[i].items():
                for r, there in self.on[j].items():
                    if isfinite(way[q, r]):
                        delay = int(self.seconds[i, q]) + int(ticks[q, r])
                        self.model.add(self.start[j] >= self.start[i] + delay).only_enforce_if(
                            here, there
                        )
                    else:
                        self.model.add_bool_or(~here, ~there)

    def _work(self) -> None:
        """Redundant: the work of a unit fits in the makespan."""
        for unit in range(int(self.problem.unit.max()) + 1):
            here = [
                (on[q], int(self.seconds[i, q]))
                for i, on in enumerate(self.on)
                for q in on
                if self.problem.unit[q] == unit
            ]
            if here:
                literals, seconds = zip(*here, strict=True)
                self.model.add(cp_model.LinearExpr.weighted_sum(literals, seconds) <= self.makespan)

    def _memory(self, rounding: np.ufunc) -> None:
        problem = self.problem
        total = float(problem.memory.sum())
        scale = 2.0 ** (MEMORY_BITS - frexp(total)[1])
        nbytes = rounding(problem.memory * scale).astype(np.int64)
        for q, limit in enumerate(problem.limit):
            if limit < total:
                here = [i for i, on in enumerate(self.on) if q in on]
                self.model.add(
                    cp_model.LinearExpr.weighted_sum(
                        [self.on[i][q] for i in here], [int(nbytes[i]) for i in here]
                    )
                    <= int(np.floor(limit * scale))
                )

    def _hint(self, known: Solution) -> None:
        for i, on in enumerate(self.on):
            for q, here in on.items():
                self.model.add_hint(here, int(known.device[i] == q))
            self.model.add_hint(self.start[i], int(np.floor(known.start[i] * self.ticks)))

    def solve(self, limit: Limit, seed: int) -> Solution | None:
        solver = cp_model.CpSolver()
        solver.parameters.num_workers = limit.workers
        solver.parameters.random_seed = seed
        solver.parameters.linearization_level = 0
        if isfinite(limit.seconds):
            solver.parameters.max_time_in_seconds = limit.seconds
        if isfinite(limit.work):
            solver.parameters.max_deterministic_time = limit.work
        status = solver.solve(self.model)
        if status == cp_model.INFEASIBLE and not self.known:
            raise InfeasiblePlan("no placement holds what the tasks need")
        if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
            return self.known
        bound = solver.best_objective_bound / self.ticks
        device = np.array(
            [next(q for q, here in on.items() if solver.boolean_value(here)) for on in self.on]
        )
        start = np.array([solver.value(start) for start in self.start])
        rows = np.arange(len(start))
        order = np.lexsort((rows, start + self.seconds[rows, device], start))
        found = decode(self.problem, device, order, "cp-sat", bound)
        if self.known and self.known.makespan <= found.makespan:
            return replace(self.known, lower_bound=min(bound, self.known.makespan))
        return found
