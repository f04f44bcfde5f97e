"""The best of all: list schedulers, local search and constraint programming, within a limit."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import inf
from time import perf_counter

import numpy as np

from hetsched.bounds import lower_bound, shares
from hetsched.errors import InfeasiblePlan
from hetsched.plugin import load
from hetsched.problem import Problem, Solution
from hetsched.scheduler import Scheduler
from hetsched.schedulers import _cpsat
from hetsched.schedulers._list import list_schedule
from hetsched.schedulers._rank import remaining
from hetsched.schedulers._search import climb, padded, sweep

LISTS = ("heft", "cpop", "peft", "lookahead", "ippts")
# Tasks up to which the shortest schedule is often proved, and up to which the whole is annealed.
PROVABLE = 40
WHOLE = 400
# Where each round of annealing ends, as a share of what is left at its begin, and how hot it begins,
# in mean seconds of a task and of a transfer.
ROUNDS = ((0.1, 1.0), (0.4, 1.0), (0.7, 0.5), (1.0, 0.25))
# Tasks in a window, in turns, its temperature, and steps for each of its tasks.
WINDOWS = (50, 100, 30)
WINDOW_HEAT = 0.1
WINDOW_STEPS = 20
# Steps times tasks between two looks at the clock; a task of a step takes some 50 ns.
SLICE = 400_000
# CP-SAT's own units of work, about seconds, for each step times task.
WORK = 1e-7


@dataclass(frozen=True)
class Portfolio(Scheduler):
    """The best that list scheduling, local search and CP-SAT find, until proved or time is up.

    The best schedule of the list schedulers, and of one that goes by the prices of the devices, is
    annealed: critical tasks are taken out, alone or with others, and put back one by one where the
    longest path through each is shortest. Small problems then go to CP-SAT, large ones are annealed
    in windows. `iterations` are steps of annealing; with `seconds=0` they are the only limit, and
    the result is the same on any machine. Where links contend, local search is left out.

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

    def schedule(self, problem: Problem) -> Solution:
        if not problem.tasks:
            return Solution(np.empty(0, np.int64), np.empty(0), 0.0, 0.0, self.name)
        budget = Budget(self.seconds or inf, self.iterations or inf)
        best = self._started(problem, budget)
        bound = lower_bound(problem, best.makespan).seconds
        best = replace(best, lower_bound=min(best.makespan, bound))
        for step, until in SMALL if problem.tasks <= PROVABLE else LARGE:
            if not best.optimal:
                best = step(problem, best, budget, until, self.seed)
        return best

    def _started(self, problem: Problem, budget: "Budget") -> Solution:
        """The best of the list schedulers; where all fail, what CP-SAT finds."""
        found, reason = [], None
        for members in (load(Scheduler, name).schedule for name in LISTS), (priced,):
            for member in members:
                try:
                    found.append(member(problem))
                except InfeasiblePlan as error:
                    # It says what is short, should nothing else be found.
                    reason = reason or error
        if found:
            return min(found, key=lambda solution: solution.makespan)
        assert reason
        try:
            solution = _cpsat.solve(problem, budget.limit(problem.tasks, 1.0), seed=self.seed)
        except InfeasiblePlan:
            raise reason from None
        if solution is None:
            raise reason
        return solution


class Budget:
    """Seconds from now on, and steps, of which one or both are limited."""

    def __init__(self, seconds: float, steps: float) -> None:
        self.begin = perf_counter()
        self.seconds = seconds
        self.steps = steps
        self.taken = 0

    def spent(self) -> float:
        """The share of what is used up first."""
        return max((perf_counter() - self.begin) / self.seconds, self.taken / self.steps)

    def limit(self, tasks: int, until: float) -> _cpsat.Limit:
        """What CP-SAT may use until a share of the budget is spent."""
        seconds = max(0.01, self.seconds * until - (perf_counter() - self.begin))
        return _cpsat.Limit(seconds, WORK * max(1.0, self.steps * until - self.taken) * tasks)


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
    found = _cpsat.solve(problem, budget.limit(problem.tasks, until), solution, seed)
    if found is None:
        return solution
    shorter = min(solution, found, key=lambda one: one.makespan)
    bound = max(solution.lower_bound, found.lower_bound)
    return replace(shorter, lower_bound=min(bound, shorter.makespan))


def annealed(
    problem: Problem, solution: Solution, budget: Budget, until: float, seed: int
) -> Solution:
    """The solution after local search until that share of the budget is spent."""
    if problem.contention:
        return solution
    a = padded(problem)
    scale = mean_seconds(problem)
    state = np.array([seed * 2654435761 + 88172645463325252], np.uint64)
    order, device = _cpsat.order_of(problem, solution), solution.device.copy()
    best, solver = solution.makespan, solution.solver
    bound = solution.lower_bound * (1 + 1e-9)
    if problem.tasks <= WHOLE:
        steps = max(1, SLICE // problem.tasks)
        since = budget.spent()
        for end_of_round, heat in ROUNDS:
            now_order, now_device = order.copy(), device.copy()
            begin, last = budget.spent(), since + end_of_round * (until - since)
            while best > bound and (spent := budget.spent()) < last:
                now_heat = heat * scale * (last - spent) / (last - begin)
                end = climb(
                    a,
                    now_order,
                    now_device,
                    order,
                    device,
                    best,
                    steps,
                    now_heat,
                    now_heat,
                    bound,
                    state,
                )
                budget.taken += steps
                if end < best:
                    best, solver = end, "annealing"
    else:
        for size in windows(budget, until):
            steps = WINDOW_STEPS * size
            chunk = max(1, SLICE // (steps * size)) * (size // 2)
            first = 0
            while first < problem.tasks and best > bound and budget.spent() < until:
                first, end = sweep(
                    a,
                    order,
                    device,
                    first,
                    min(problem.tasks, first + chunk),
                    size,
                    steps,
                    WINDOW_HEAT * scale,
                    state,
                )
                budget.taken += steps * 2 * chunk // size
                if end < best:
                    best, solver = end, "windows"
            if best <= bound:
                break
    if solver == solution.solver:
        return solution
    return _cpsat.decode(problem, device, order, solver, solution.lower_bound)


def windows(budget: Budget, until: float) -> Iterator[int]:
    """Sizes of windows in turns, until that share is spent."""
    while budget.spent() < until:
        for size in WINDOWS:
            if budget.spent() < until:
                yield size


def mean_seconds(problem: Problem) -> float:
    """Of a task where it is fastest, and half of what moving the data of an edge takes."""
    work = float(problem.seconds.min(axis=1).mean())
    apart = np.isfinite(problem.latency) & ~np.eye(len(problem.limit), dtype=bool)
    if not apart.any() or not len(problem.nbytes):
        return work
    way = problem.latency[apart].mean() + problem.per_byte[apart].mean() * problem.nbytes.mean()
    return work + 0.5 * float(way)


# What is tried in turn, and the share of the budget that is spent behind it.
SMALL = ((annealed, 0.05), (proved, 0.6), (annealed, 1.0))
LARGE = ((annealed, 1.0),)
