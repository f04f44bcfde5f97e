"""The best of all: list schedulers, local search and constraint programming, within a limit."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import cycle
from math import inf
from time import perf_counter

import numpy as np

from hetsched.bounds import lower_bound, shares
from hetsched.errors import InfeasiblePlan, PluginError
from hetsched.plugin import load
from hetsched.problem import Problem, Solution
from hetsched.scheduler import Scheduler
from hetsched.schedulers import _cpsat
from hetsched.schedulers._list import list_schedule
from hetsched.schedulers._rank import remaining
from hetsched.schedulers._refutation import refuted
from hetsched.schedulers._search import climb, draw, padded, seeded, sweep

LISTS = ("heft", "cpop", "peft", "lookahead", "ippts")
# Tasks up to which the whole is annealed.
WHOLE = 400
# Tasks up to which a bound is worth tenths of a second.
REFUTED = 100
# Where each round of annealing ends, as a share of all, and how hot it begins, in mean seconds
# of a task and half a transfer.
ROUNDS = ((0.1, 1.0), (0.4, 1.0), (0.7, 0.5), (1.0, 0.25))
# Tasks in a window, in turns, its temperature, and steps for each of its tasks.
WINDOWS = (50, 100, 200)
WINDOW_HEAT = 0.1
WINDOW_STEPS = 20
# Iterations between two looks at the clock: some hundredths of a second.
SLICE = 200
# What an iteration is: a step of annealing looks at all tasks, and costs as much as these besides.
VISITS, FIXED = 1000, 30
# CP-SAT's own units of work, about seconds, for each iteration.
WORK = 1e-4


@dataclass(frozen=True)
class Portfolio(Scheduler):
    """The best that list scheduling, local search and CP-SAT find, until proved or time is up.

    The best schedule of the list schedulers, and of one that goes by the prices of the devices, is
    annealed: critical tasks are taken out, alone or with others, and put back one by one where the
    longest path through each is shortest. Small problems then go to CP-SAT, large ones are annealed
    in windows. An iteration is about 0.1 ms of any size of problem; with `seconds=0` iterations are
    the only limit, and the result is the same on any machine. With `prove`, problems of up to 100
    tasks get a bound that takes longer to find. Where links contend, local search is left out.

    References
    ----------
    Mastrolilli and Gambardella, "Effective neighbourhood functions for the flexible job shop
    problem", Journal of Scheduling 3(1), 2000,
    https://doi.org/10.1002/(SICI)1099-1425(200001/02)3:1<3::AID-JOS32>3.0.CO;2-Y
    Ruiz and Stuetzle, "A simple and effective iterated greedy algorithm for the permutation
    flowshop scheduling problem", EJOR 177(3), 2007, https://doi.org/10.1016/j.ejor.2005.12.009
    """

    seconds: float = 2.0
    iterations: int = 0
    seed: int = 0
    prove: bool = True

    def __post_init__(self) -> None:
        if self.seconds <= 0 and self.iterations <= 0:
            raise PluginError("'portfolio' needs a limit: seconds or iterations above 0")

    def schedule(self, problem: Problem) -> Solution:
        if not problem.tasks:
            return Solution(np.empty(0, np.int64), np.empty(0), 0.0, 0.0, self.name)
        budget = Budget(self.seconds or inf, self.iterations or inf)
        best = self._started(problem, budget)
        bound = lower_bound(problem, best.makespan).seconds
        if self.prove and problem.tasks <= REFUTED and bound < best.makespan:
            bound = refuted(problem, best.makespan).seconds
        best = replace(best, lower_bound=min(best.makespan, bound))
        for step, until in next(steps for most, steps in PLANS if problem.tasks <= most):
            if not best.optimal:
                best = step(problem, best, budget, until, self.seed)
        return best

    def _started(self, problem: Problem, budget: "Budget") -> Solution:
        """The best of the list schedulers; where all fail, what CP-SAT finds."""
        members: list[Callable[[Problem], Solution]]
        members = [*(load(Scheduler, name).schedule for name in LISTS), priced]
        found: list[Solution] = []
        reasons: list[InfeasiblePlan] = []
        for member in members:
            try:
                found.append(member(problem))
            except InfeasiblePlan as error:
                reasons.append(error)
        if not found:
            # The first says what is short, should there be no schedule.
            solution = None
            if problem.tasks <= WHOLE:
                try:
                    solution = _cpsat.solve(problem, budget.limit(1.0), seed=self.seed)
                except InfeasiblePlan:
                    raise reasons[0] from None
            if solution is None:
                raise reasons[0]
            found.append(solution)
        return min(found, key=lambda solution: solution.makespan)


class Budget:
    """Seconds from now on, and iterations, of which one or both are limited."""

    def __init__(self, seconds: float, iterations: float) -> None:
        self.begin = perf_counter()
        self.seconds = seconds
        self.iterations = iterations
        self.taken = 0.0

    def spent(self) -> float:
        """The share of what is used up first."""
        elapsed = perf_counter() - self.begin
        return max(elapsed / self.seconds, self.taken / self.iterations)

    def take(self, steps: int, tasks: int) -> None:
        self.taken += steps * (tasks + FIXED) / VISITS

    def limit(self, until: float) -> _cpsat.Limit:
        """What CP-SAT may use until a share of the budget is spent."""
        seconds = max(0.01, self.seconds * until - (perf_counter() - self.begin))
        return _cpsat.Limit(seconds, WORK * max(1.0, self.iterations * until - self.taken))


def steps(iterations: float, tasks: int) -> int:
    """Of annealing."""
    return max(1, round(iterations * VISITS / (tasks + FIXED)))


def priced(problem: Problem) -> Solution:
    """Tasks where the least time suffices for all their work, by the longest way that is left.

    The shares of the linear program round to a device for each task but a few.
    """
    home = np.argmax(shares(problem), axis=1)
    rows = np.arange(problem.tasks)
    seconds = np.full_like(problem.seconds, inf)
    seconds[rows, home] = problem.seconds[rows, home]
    there = replace(problem, seconds=seconds)
    priority = seconds[rows, home] + remaining(there.arrays, 0.0)[rows, home]
    return list_schedule(there, "prices", priority)


def proved(
    problem: Problem, solution: Solution, budget: Budget, until: float, seed: int
) -> Solution:
    """The solution or a better one, and a bound, by constraint programming."""
    found = _cpsat.solve(problem, budget.limit(until), solution, seed)
    if found is None:
        return solution
    best = min(solution, found, key=lambda one: one.makespan)
    bound = max(solution.lower_bound, found.lower_bound)
    return replace(best, lower_bound=min(bound, best.makespan))


def annealed(
    problem: Problem, solution: Solution, budget: Budget, until: float, seed: int
) -> Solution:
    """The solution after local search until that share of the budget is spent."""
    if problem.contention:
        return solution
    a, random, scale = padded(problem), seeded(seed), mean_seconds(problem)
    order, device = _cpsat.order_of(problem, solution), solution.device.copy()
    best, bound = solution.makespan, solution.lower_bound * (1 + 1e-9)
    count = steps(SLICE, problem.tasks)
    since = budget.spent()
    for end_of_round, heat in ROUNDS:
        now_order, now_device = order.copy(), device.copy()
        begin, last = budget.spent(), since + end_of_round * (until - since)
        while best > bound and (spent := budget.spent()) < last:
            hot = heat * scale * (last - spent) / (last - begin)
            best = climb(
                a, now_order, now_device, order, device, best, count, hot, hot, bound, random
            )
            budget.take(count, problem.tasks)
    return shorter(problem, solution, order, device, "annealing")


def windowed(
    problem: Problem, solution: Solution, budget: Budget, until: float, seed: int
) -> Solution:
    """As `annealed`, where a small part of the order is annealed at a time."""
    if problem.contention:
        return solution
    a, random, scale = padded(problem), seeded(seed), mean_seconds(problem)
    order, device = _cpsat.order_of(problem, solution), solution.device.copy()
    best, bound = solution.makespan, solution.lower_bound * (1 + 1e-9)
    for size in cycle(WINDOWS):
        count = WINDOW_STEPS * size
        some = max(1, steps(SLICE, size) // count)
        # Not always the same borders.
        first = -int(draw(random) * size)
        while first < problem.tasks and best > bound and budget.spent() < until:
            last = min(problem.tasks, first + some * size // 2)
            first, best = sweep(
                a, order, device, first, last, size, count, WINDOW_HEAT * scale, random
            )
            budget.take(some * count, size)
        if best <= bound or budget.spent() >= until:
            break
    return shorter(problem, solution, order, device, "windows")


def shorter(
    problem: Problem, solution: Solution, order: np.ndarray, device: np.ndarray, solver: str
) -> Solution:
    """The solution, or that of order and devices if it is shorter."""
    found = _cpsat.decode(problem, device, order, solver, solution.lower_bound)
    return found if found.makespan < solution.makespan else solution


def mean_seconds(problem: Problem) -> float:
    """Of a task where it is fastest, and half of what moving the data of an edge takes."""
    work = float(problem.seconds.min(axis=1).mean())
    apart = np.isfinite(problem.latency) & ~np.eye(len(problem.limit), dtype=bool)
    if not apart.any() or not len(problem.nbytes):
        return work
    way = problem.latency[apart].mean() + problem.per_byte[apart].mean() * problem.nbytes.mean()
    return work + 0.5 * float(way)


Step = Callable[[Problem, Solution, Budget, float, int], Solution]
# Up to how many tasks what is tried in turn, and the share of the budget that is spent behind it.
PLANS: tuple[tuple[float, tuple[tuple[Step, float], ...]], ...] = (
    (40, ((annealed, 0.05), (proved, 0.6), (annealed, 1.0))),
    (100, ((annealed, 1.0),)),
    (WHOLE, ((annealed, 0.6), (windowed, 1.0))),
    (inf, ((windowed, 1.0),)),
)
