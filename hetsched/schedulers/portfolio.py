"""The best of all: list schedulers, local search and constraint programming, within a limit."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import cycle
from math import inf
from time import perf_counter

import numpy as np
from numba.core.event import TimingListener, register, unregister

from hetsched.bounds import lower_bound, priced_area, shares
from hetsched.errors import InfeasiblePlan, PluginError
from hetsched.plugin import load
from hetsched.problem import Moment, Problem, Solution
from hetsched.scheduler import Scheduler
from hetsched.schedulers import _cpsat
from hetsched.schedulers._contention import shake
from hetsched.schedulers._justify import backwards, justify
from hetsched.schedulers._list import decode, list_schedule
from hetsched.schedulers._list import makespan as makespan_of
from hetsched.schedulers._rank import remaining
from hetsched.schedulers._refutation import A_SECOND, refuted
from hetsched.schedulers._search import climb, padded, seeded, sweep

LISTS = ("heft", "cpop", "peft", "lookahead", "ippts")
# Tasks up to which the whole is annealed.
WHOLE = 400
# Tasks up to which all are justified at once.
LARGEST = 4000
# How hot annealing begins, in mean seconds of a task and half a transfer; and where links contend,
# by rounds.
HEAT, CONTENTION_HEATS = 0.4, (0.1, 1.0)
# Into how many slices it is divided at least, and how many steps a start is worth for each task.
SLICES = 8
START_STEPS = 300
# How hot it then begins again from the best of all, beside the first time, for two starts each.
AGAIN = (0.5, 0.25, 0.12, 0.06, 0.03)
# Tasks in a window, in turns, its temperature, and steps for each of its tasks.
WINDOWS = (100, 200, 400)
WINDOW_HEAT = 0.1
WINDOW_STEPS = 20
# A round of justification is as much work as so many steps of annealing.
JUSTIFYING = 10
# The share of a makespan above all work up to which its prices count, in rounds of annealing.
SLACKS = (0.1, 0.3)
# Iterations between two looks at the clock: some hundredths of a second.
SLICE = 200
# What an iteration is: a step of annealing looks at all tasks, and costs as much as these besides.
VISITS, FIXED = 2000, 30
# The share of the seconds that is left for what follows the search, and how much of what is left
# for the search is used before it is asked again how long that took.
RESERVE, SOME = 0.01, 0.8
# What two sums that mean the same makespan can differ by, as a share.
ROUNDING = 1e-12
# CP-SAT's own units of work, about seconds, for each iteration.
WORK = 1e-4


@dataclass(frozen=True)
class Portfolio(Scheduler):
    """The best that list scheduling, local search and CP-SAT find, until proved or time is up.

    The best schedule of the list schedulers, and of one that goes by the prices of the devices, is
    annealed: critical tasks are taken out, alone or with others, and put back one by one where the
    longest path through each is shortest. Small problems are annealed from several of the list
    schedules and go to CP-SAT. Large ones are first justified, pushed late and then early after
    some of the order was shuffled, and then annealed in windows. Where links contend, tasks change
    places and all is run again. An iteration is about 0.1 ms of any size of problem; with
    `seconds=0` iterations are the only limit, and the result is the same on any machine. With
    `prove`, problems of up to 100 tasks get a bound that takes longer to find.

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
        with Clock() as clock:
            search = Search(problem, clock, self.seconds or inf, self.iterations or inf, self.seed)
            for solution in started(search):
                search.starts.append(solution)
                search.offer(solution)
            search.prove(lower_bound(problem, search.best.makespan).seconds)
            for step, until in next(steps for most, steps in PLANS if problem.tasks <= most):
                if not search.best.optimal and (self.prove or step is not refute):
                    step(search, until)
        return replace(search.best, history=tuple(search.moments))


class Clock:
    """Seconds since it was entered, but for those in which Numba compiled.

    So the first search ever finds as much as a later one, which only loads what was compiled.
    """

    def __enter__(self) -> "Clock":
        self._begin = perf_counter()
        self._compiling = TimingListener()
        register("numba:compile", self._compiling)
        return self

    def __exit__(self, *_: object) -> None:
        unregister("numba:compile", self._compiling)

    @property
    def seconds(self) -> float:
        compiled = self._compiling.duration if self._compiling.done else 0.0
        return perf_counter() - self._begin - float(compiled)


class Search:
    """The best schedule of a problem so far, how it came to be, and what may be spent on it."""

    def __init__(
        self, problem: Problem, clock: Clock, seconds: float, iterations: float, seed: int
    ) -> None:
        self.problem = problem
        self.seed = seed
        # Goes on from one local search to the next, so that none repeats another.
        self.random = seeded(seed)
        self.best = Solution(np.empty(0, np.int64), np.empty(0), inf)
        self.moments: list[Moment] = []
        # What the search begins with.
        self.starts: list[Solution] = []
        self._clock = clock
        self._seconds = seconds * (1 - RESERVE)
        self._iterations = iterations
        self._taken = 0.0
        # Seconds of an iteration, as the last ones took them, and when they began.
        self._pace, self._looked = WORK, 0.0

    def offer(self, solution: Solution) -> None:
        """Takes over what is shorter, and the higher of the bounds."""
        best = min(self.best, solution, key=lambda one: one.makespan)
        bound = max(self.best.lower_bound, solution.lower_bound)
        self.best = replace(best, lower_bound=min(bound, best.makespan))
        self.tell(best.makespan, best.solver)

    def prove(self, seconds: float) -> None:
        """No schedule is shorter than that."""
        self.offer(replace(self.best, lower_bound=min(seconds, self.best.makespan)))

    def tell(self, makespan: float, solver: str) -> None:
        """Notes that a schedule was found, if it is shorter or the bound is higher than before."""
        bound = self.best.lower_bound
        if self.moments:
            last = self.moments[-1]
            shorter = makespan < last.makespan * (1 - ROUNDING)
            if not shorter and bound <= last.lower_bound * (1 + ROUNDING):
                return
            if not shorter:
                makespan, solver = last.makespan, last.solver
        self.moments.append(Moment(self._clock.seconds, self._taken, makespan, bound, solver))

    def spent(self) -> float:
        """The share of what is used up first."""
        return max(self._clock.seconds / self._seconds, self._taken / self._iterations)

    def take(self, steps: int, tasks: int) -> None:
        """Notes that so many steps were taken since there was seen to be room."""
        iterations = steps * (tasks + FIXED) / VISITS
        self._pace = max(1e-9, (self._clock.seconds - self._looked) / iterations)
        self._taken += iterations

    def room(self, until: float, tasks: int) -> int:
        """How many steps there surely can be, at the pace of the last, until a share is spent."""
        self._looked = self._clock.seconds
        seconds = (self._seconds * until - self._looked) / self._pace
        left = min(seconds, self._iterations * until - self._taken)
        return steps(SOME * left, tasks) if left > 0 else 0

    def limit(self, until: float) -> _cpsat.Limit:
        """What CP-SAT may use until a share of all is spent."""
        seconds = max(0.01, self._seconds * until - self._clock.seconds)
        return _cpsat.Limit(seconds, WORK * max(1.0, self._iterations * until - self._taken))


def steps(iterations: float, tasks: int) -> int:
    """Of annealing."""
    return max(1, round(iterations * VISITS / (tasks + FIXED)))


@cache
def lists() -> tuple[Scheduler, ...]:
    return tuple(load(Scheduler, name) for name in LISTS)


def started(search: Search) -> Iterator[Solution]:
    """What the list schedulers find; where all fail, what CP-SAT finds."""
    members = [*(scheduler.schedule for scheduler in lists()), priced]
    reasons: list[InfeasiblePlan] = []
    for member in members:
        try:
            yield member(search.problem)
        except InfeasiblePlan as error:
            reasons.append(error)
    if len(reasons) < len(members):
        return
    # The first says what is short, should there be no schedule.
    solution = None
    if search.problem.tasks <= WHOLE:
        try:
            solution = _cpsat.solve(search.problem, search.limit(1.0), seed=search.seed)
        except InfeasiblePlan:
            raise reasons[0] from None
    if solution is None:
        raise reasons[0]
    yield solution


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


def proved(search: Search, until: float) -> None:
    """A shorter schedule and a bound by constraint programming."""
    found = _cpsat.solve(search.problem, search.limit(until), search.best, search.seed)
    if found is not None:
        search.offer(found)


def refute(search: Search, until: float) -> None:
    """A bound from refuting makespans below the best."""
    limit = search.limit(until)
    effort = min(1.0, limit.seconds, limit.work) * A_SECOND
    search.prove(refuted(search.problem, search.best.makespan, effort).seconds)


@dataclass(frozen=True)
class Local:
    """What local search works on: the best so far, in place, and the rest of what it needs."""

    order: np.ndarray
    device: np.ndarray
    best: float
    # What ends the search, and what temperatures are in.
    bound: float
    scale: float
    random: np.ndarray


Turns = Callable[[Search, Local, float], Iterator[float]]


def local_search(turns: Turns, solver: str, search: Search, until: float) -> None:
    """Improves the best by turns, each of which tells the end that it came to."""
    problem, best = search.problem, search.best
    local = Local(
        _cpsat.order_of(problem, best),
        best.device.copy(),
        best.makespan,
        best.lower_bound * (1 + 1e-9),
        mean_seconds(problem),
        search.random,
    )
    for end in turns(search, local, until):
        search.tell(end, solver)
        if end <= local.bound:
            break
    search.offer(run_again(problem, local, solver))


def run_again(problem: Problem, local: Local, solver: str) -> Solution:
    """The schedule of an order and devices; where links contend, tasks go into gaps."""
    if not problem.contention:
        return _cpsat.decode(problem, local.device, local.order, solver)
    start, sent = decode(problem.arrays, local.order, local.device, True)
    end = makespan_of(problem.arrays, local.device, start)
    return Solution(local.device, start, end, 0.0, solver, sent)


def annealing(search: Search, local: Local, until: float) -> Iterator[float]:
    """Rounds from each start on, ever colder; in the second the price of work counts more.

    There are as many starts as there is time for, then the best of all, again and ever less hot.
    """
    problem, tasks, random = search.problem, search.problem.tasks, local.random
    best, since = local.best, search.spent()
    limit = search.limit(until)
    iterations = min(limit.seconds, limit.work) / WORK
    starts = 1 if problem.contention else steps(iterations, tasks) // (START_STEPS * tasks)
    others = sorted(search.starts, key=lambda solution: solution.makespan)[: max(0, starts - 1)]
    again = () if problem.contention else AGAIN[: starts // 2]
    runs = [*((start, 1.0) for start in others), (None, 1.0), *((None, heat) for heat in again)]
    share = (until - since) / len(runs) / len(SLACKS)
    count = steps(min(SLICE, iterations / SLICES / len(runs)), tasks)
    rows, last = padded(problem), since
    for start, warmth in runs:
        # The best that was found from this start on.
        order, device, end = local.order.copy(), local.device.copy(), best
        if start is not None:
            order, device = _cpsat.order_of(problem, start), start.device.copy()
            end = start.makespan
        for index, slack in enumerate(SLACKS):
            heat = HEAT * warmth * local.scale
            price = counting_price(problem, end, slack)
            move = partial(climb, rows, price, np.zeros(len(price)))
            if problem.contention:
                move = partial(shake, problem.arrays)
                heat = CONTENTION_HEATS[index] * local.scale
            now_order, now_device = order.copy(), device.copy()
            begin, last = search.spent(), last + share
            while (spent := search.spent()) < last and (room := search.room(last, tasks)):
                some = min(count, room)
                hot = heat * (last - spent) / (last - begin)
                now = now_order, now_device, order, device
                end = move(*now, end, some, hot, hot, local.bound, random)
                search.take(some, tasks)
                if end < best:
                    best = end
                    local.order[:], local.device[:] = order, device
                yield best


def justification(search: Search, local: Local, until: float) -> Iterator[float]:
    """The devices stay as they are."""
    a, back, tasks = search.problem.arrays, backwards(search.problem).arrays, search.problem.tasks
    count = max(1, steps(SLICE, tasks) // JUSTIFYING)
    while search.spent() < until:
        some = min(count, max(1, search.room(until, tasks) // JUSTIFYING))
        best = justify(a, back, local.order, local.device, some, local.bound, local.random)
        search.take(JUSTIFYING * some, tasks)
        yield best


def counting_price(problem: Problem, makespan: float, slack: float) -> np.ndarray:
    """(units) of a second of work, in full if no more than `slack` of a makespan is above it.

    From twice as much on it is nothing.
    """
    least, price = priced_area(problem)
    return price * min(1.0, max(0.0, 2 - (1 - least / makespan) / slack))


def windows(search: Search, local: Local, until: float) -> Iterator[float]:
    """As annealing, where a small part of the order is annealed at a time."""
    a, tasks = padded(search.problem), search.problem.tasks
    borders = np.random.default_rng(search.seed)
    price = counting_price(search.problem, local.best, SLACKS[0])
    for size in cycle(WINDOWS):
        count = WINDOW_STEPS * size
        some = max(1, steps(SLICE, size) // count)
        # Not always the same borders.
        first = -int(borders.integers(size))
        while first < tasks:
            # What is left at the end is less for each task.
            room = search.room(until, size)
            if room < size:
                return
            some, count = max(1, min(some, room // count)), min(count, room)
            last = min(tasks, first + some * size // 2)
            heat = WINDOW_HEAT * local.scale
            first, best = sweep(
                a,
                local.order,
                local.device,
                first,
                last,
                size,
                count,
                heat,
                price,
                local.random,
            )
            search.take(some * count, size)
            yield best


def mean_seconds(problem: Problem) -> float:
    """Of a task where it is fastest, and half of what moving the data of an edge takes."""
    work = float(problem.seconds.min(axis=1).mean())
    apart = np.isfinite(problem.latency) & ~np.eye(len(problem.limit), dtype=bool)
    if not apart.any() or not len(problem.nbytes):
        return work
    way = problem.latency[apart].mean() + problem.per_byte[apart].mean() * problem.nbytes.mean()
    return work + 0.5 * float(way)


Step = Callable[[Search, float], None]
annealed: Step = partial(local_search, annealing, "annealing")


def justified(search: Search, until: float) -> None:
    """Justification; where links contend, what is late for one task need not be for its links."""
    if not search.problem.contention:
        local_search(justification, "justification", search, until)


def windowed(search: Search, until: float) -> None:
    """Annealing in windows; where links contend there are no tails to bound a window by."""
    if search.problem.contention:
        annealed(search, until)
    else:
        local_search(windows, "windows", search, until)


# Up to how many tasks what is tried in turn, and the share of the budget that is spent behind it.
PLANS: tuple[tuple[float, tuple[tuple[Step, float], ...]], ...] = (
    (40, ((annealed, 0.05), (refute, 0.1), (proved, 0.6), (annealed, 1.0))),
    # What refuting and the program itself take is not known before; annealing has what is left.
    (100, ((annealed, 0.4), (refute, 0.45), (annealed, 0.75), (proved, 0.9), (annealed, 1.0))),
    (WHOLE, ((annealed, 1.0),)),
    (LARGEST, ((justified, 0.3), (windowed, 1.0))),
    (inf, ((windowed, 1.0),)),
)
