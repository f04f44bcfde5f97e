"""The scheduling problem as a constraint program, for OR-Tools' CP-SAT."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import frexp, inf, isfinite
from threading import Event, Thread
from time import perf_counter, process_time

import numpy as np
from ortools.sat.python import cp_model

from hetsched.errors import InfeasiblePlan
from hetsched.problem import Problem, Solution
from hetsched.schedulers import _list

# Ticks of the longest schedule that is considered, as a power of two: fine enough that what
# rounding takes from a bound is far below what `Solution.optimal` allows.
TIME_BITS = 40
MEMORY_BITS = 50
# A schedule that is this short beside the longest is looked for again with finer ticks.
COARSE = 1 / 64
# Seconds between two looks at the clock of the process.
WATCH = 0.1
# Seconds that a solver has at least.
LEAST = 0.01


@dataclass(frozen=True)
class Limit:
    """How long a solver may look: seconds of the wall, and units of CP-SAT's own count of its work.

    The same work gives the same result on any machine, as long as the seconds are not used up and
    there is one worker. `process` seconds, of all threads of this process together, are the fair
    limit where others work on the machine. `linearization` is CP-SAT's level of that name.
    """

    seconds: float = inf
    work: float = inf
    workers: int = 1
    process: float = inf
    linearization: int = 0


def solve(
    problem: Problem,
    limit: Limit,
    known: Solution | None = None,
    seed: int = 0,
) -> Solution | None:
    """The best schedule within `limit`, and a bound; None if nothing was found.

    `known`, which holds all limits of memory, is where the search starts, and nothing longer is
    looked for.

    Time is counted in ticks of a power of two of a second, and all times are rounded down: what is
    minimised is never above the real makespan, so the bound holds for the real problem, and
    the rounding costs it less than a tick for each task and transfer on a path. The schedule
    that is returned is not the rounded one: its order and devices are run in floats.

    Raises
    ------
    InfeasiblePlan
        There is no schedule.
    """
    begin = perf_counter()
    model = _Model(problem, known, np.floor)
    # Large problems take a while to say.
    limit = replace(limit, seconds=max(LEAST, limit.seconds - (perf_counter() - begin)))
    found = model.solve(limit, seed)
    if found and not holds(problem, found.device):
        # Only what is rounded up is sure to fit, but only what is rounded down is a bound.
        bound = found.lower_bound
        found = _Model(problem, known, np.ceil).solve(limit, seed)
        found = replace(found, lower_bound=bound) if found else None
    if found and not known and found.makespan < COARSE * serial_seconds(problem):
        return solve(problem, limit, found, seed)
    return found


def holds(problem: Problem, device: np.ndarray) -> bool:
    """Whether every device can hold the tasks that are placed on it."""
    held = np.bincount(device, problem.memory, len(problem.limit))
    return bool((held <= problem.limit).all())


def decode(
    problem: Problem, device: np.ndarray, order: np.ndarray, solver: str, bound: float = 0.0
) -> Solution:
    """Tasks on their devices in `order`, which is topological, each as soon as it can."""
    device = np.asarray(device, np.int64)
    start, sent = _list.decode(problem.arrays, order, device, False)
    end = _list.makespan(problem.arrays, device, start)
    return Solution(
        device, start, end, min(bound, end), solver, sent if problem.contention else None
    )


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


@contextmanager
def _stopped(solver: cp_model.CpSolver, process: float) -> Iterator[None]:
    """While this holds, the solver stops when the process has used so many seconds more."""
    if not isfinite(process):
        yield
        return
    last, done = process_time() + process, Event()

    def watch() -> None:
        while not done.wait(WATCH):
            if process_time() > last:
                solver.stop_search()

    watcher = Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


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
        self.moves: dict[tuple[int, int, int], tuple[cp_model.IntVar, cp_model.IntVar]] = {}
        self.links: dict[tuple[int, int], list[cp_model.IntervalVar]] = {}
        self._edges()
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
        devices = np.indices((len(problem.limit), len(problem.limit)))
        for edge in range(len(problem.source)):
            i, j = int(problem.source[edge]), int(problem.sink[edge])
            way = transfer_seconds(problem, problem.nbytes[edge], devices[0], devices[1])
            ticks = self._in_ticks(way)
            least = None
            for q, here in self.on[i].items():
                for r, there in self.on[j].items():
                    if not isfinite(way[q, r]):
                        self.model.add_bool_or(~here, ~there)
                        continue
                    length, delay = int(self.seconds[i, q]), int(ticks[q, r])
                    least = length + delay if least is None else min(least, length + delay)
                    if problem.contention and way[q, r] > 0:
                        self._sent(edge, q, r, delay)
                        continue
                    self.model.add(self.start[j] >= self.start[i] + length + delay).only_enforce_if(
                        here, there
                    )
            if least is not None:
                # Redundant, but known before any device is.
                self.model.add(self.start[j] >= self.start[i] + least)
        for intervals in self.links.values():
            self.model.add_no_overlap(intervals)

    def _sent(self, edge: int, source: int, sink: int, ticks: int) -> None:
        """A transfer that holds its link, one for all edges with the tensor that go there."""
        i, j = int(self.problem.source[edge]), int(self.problem.sink[edge])
        here, there = self.on[i][source], self.on[j][sink]
        key = int(self.problem.tensor[edge]), source, sink
        if key not in self.moves:
            moved, begin = self.model.new_bool_var(""), self.model.new_int_var(0, self.horizon, "")
            self.moves[key] = moved, begin
            self.links.setdefault((source, sink), []).append(
                self.model.new_optional_fixed_size_interval_var(begin, ticks, moved, "")
            )
            self.model.add_implication(moved, here)
            self.model.add(begin >= self.start[i] + int(self.seconds[i, source])).only_enforce_if(
                moved
            )
        moved, begin = self.moves[key]
        self.model.add_bool_or(~here, ~there, moved)
        self.model.add(self.start[j] >= begin + ticks).only_enforce_if(moved, there)

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
        solver.parameters.linearization_level = limit.linearization
        # With these OR-Tools 9.15 now and then proves what is not so; it is no slower without.
        solver.parameters.cp_model_presolve = False
        solver.parameters.inprocessing_dtime_ratio = 0.0
        solver.parameters.use_precedences_in_disjunctive_constraint = False
        if isfinite(limit.seconds):
            solver.parameters.max_time_in_seconds = limit.seconds
        if isfinite(limit.work):
            solver.parameters.max_deterministic_time = limit.work
        with _stopped(solver, limit.process):
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
        finish = start + self.seconds[rows, device]
        if self.problem.contention:
            found = self._replayed(solver, device, start, finish, bound)
        else:
            order = np.lexsort((rows, finish, start))
            found = decode(self.problem, device, order, "cp-sat", bound)
        if self.known and self.known.makespan <= found.makespan:
            return replace(self.known, lower_bound=min(bound, self.known.makespan))
        return found

    def _replayed(
        self,
        solver: cp_model.CpSolver,
        device: np.ndarray,
        start: np.ndarray,
        finish: np.ndarray,
        bound: float,
    ) -> Solution:
        """What the solver found in floats: tasks and transfers in its order, each when it can."""
        problem = self.problem
        edges = range(len(problem.source))
        carried: dict[tuple[int, int, int], list[int]] = {}
        for edge in edges:
            i, j = problem.source[edge], problem.sink[edge]
            key = int(problem.tensor[edge]), int(device[i]), int(device[j])
            if key in self.moves:
                carried.setdefault(key, []).append(edge)
        # By start, end and task: what starts an event has come before it.
        events = [(int(start[i]), int(finish[i]), i, -1) for i in range(problem.tasks)]
        for key, served in carried.items():
            begin = solver.value(self.moves[key][1])
            way = self._in_ticks(transfer_seconds(problem, problem.nbytes[served[0]], *key[1:]))
            events.append((begin, begin + int(way), int(problem.source[served[0]]), served[0]))
        begins, ends = np.zeros(problem.tasks), np.zeros(problem.tasks)
        sent, there = np.full(len(edges), np.nan), np.zeros(len(edges))
        free: dict[tuple[int, ...], float] = {}
        for _, _, i, edge in sorted(events):
            q = int(device[i])
            if edge >= 0:
                r = int(device[problem.sink[edge]])
                leaves = max(ends[i], free.get((q, r), 0.0))
                way = transfer_seconds(problem, problem.nbytes[edge], q, r)
                free[q, r] = leaves + float(way)
                served = carried[int(problem.tensor[edge]), q, r]
                sent[served], there[served] = leaves, free[q, r]
                continue
            begin = max(problem.entry[i, q], free.get((problem.unit[q],), 0.0))
            for into in range(problem.incoming[i], problem.incoming[i + 1]):
                source = problem.source[into]
                if np.isnan(sent[into]):
                    way = transfer_seconds(problem, problem.nbytes[into], device[source], q)
                    there[into] = ends[source] + way
                    if device[source] != q:
                        sent[into] = ends[source]
                begin = max(begin, there[into])
            begins[i], ends[i] = begin, begin + problem.seconds[i, q]
            free[(problem.unit[q],)] = ends[i]
        end = _list.makespan(problem.arrays, device, begins)
        return Solution(device, begins, end, min(bound, end), "cp-sat", sent)
