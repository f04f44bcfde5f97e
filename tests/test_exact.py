"""Exact schedules against brute force, and windows against the whole."""

from dataclasses import replace
from itertools import permutations, product
from math import inf

import numpy as np
import pytest

from bench.instances import layered, problem
from hetsched.errors import InfeasiblePlan
from hetsched.plugin import load
from hetsched.problem import Problem, Solution
from hetsched.scheduler import Scheduler
from hetsched.schedulers._cpsat import Limit, decode, order_of, solve
from hetsched.schedulers._lns import improve, window


def tiny(seed: int) -> Problem:
    """Up to four tasks with all that a problem can have."""
    rng = np.random.default_rng(seed)
    tasks, devices = int(rng.integers(1, 5)), int(rng.integers(1, 4))
    seconds = rng.choice([0.0, 1e-6, 0.1, 0.25, 0.3, 0.7], (tasks, devices)) * rng.uniform(0.5, 2)
    cannot = rng.random(seconds.shape) < 0.2
    cannot[np.arange(tasks), rng.integers(0, devices, tasks)] = False
    pairs = [(i, j) for j in range(tasks) for i in range(j) if rng.random() < 0.5]
    source, sink = np.array(pairs, np.int64).reshape(-1, 2).T
    latency = rng.choice([0.0, 0.05, 0.4, inf], (devices, devices), p=[0.3, 0.3, 0.3, 0.1])
    per_byte = rng.choice([0.0, 0.1, 0.3], (devices, devices))
    for pair in latency, per_byte:
        np.fill_diagonal(pair, 0.0)
    made = problem(
        np.where(cannot, inf, seconds),
        source,
        sink,
        rng.choice([0.0, 0.5, 1.0, 2.5], len(pairs)),
        rng.choice([0.0, 0.1, 1.0], tasks),
        np.where(rng.random(devices) < 0.3, rng.choice([0.3, 1.2, 2.0], devices), inf),
    )
    return replace(
        made,
        latency=latency,
        per_byte=per_byte,
        entry=rng.choice([0.0, 0.0, 0.2], seconds.shape),
        exit=rng.choice([0.0, 0.0, 0.2], seconds.shape),
        unit=np.zeros(devices, np.int64) if rng.random() < 0.2 else np.arange(devices),
    )


def shortest(given: Problem) -> float:
    """The least makespan over all devices and orders; infinite if there is none."""
    tasks, devices = given.seconds.shape
    edges = list(
        zip(given.source.tolist(), given.sink.tolist(), given.nbytes.tolist(), strict=True)
    )
    orders = [
        order
        for order in permutations(range(tasks))
        if all(order.index(i) < order.index(j) for i, j, _ in edges)
    ]
    best = inf
    for device in product(range(devices), repeat=tasks):
        held = [0.0] * devices
        for i, q in enumerate(device):
            held[q] += given.memory[i]
        if any(held[q] > given.limit[q] for q in range(devices)):
            continue
        for order in orders:
            free, finish, end = [0.0] * devices, [0.0] * tasks, 0.0
            for j in order:
                q = device[j]
                start = max(free[given.unit[q]], given.entry[j, q])
                for i, sink, nbytes in edges:
                    if sink == j:
                        way = given.latency[device[i], q] + given.per_byte[device[i], q] * nbytes
                        start = max(start, finish[i] + way)
                finish[j] = free[given.unit[q]] = start + given.seconds[j, q]
                end = max(end, finish[j] + given.exit[j, q])
            best = min(best, end)
    return best


@pytest.mark.parametrize("first", range(0, 160, 40))
def test_nothing_is_shorter(first: int) -> None:
    exact = load(Scheduler, "exact")
    for seed in range(first, first + 40):
        given = tiny(seed)
        best = shortest(given)
        if best == inf:
            with pytest.raises(InfeasiblePlan):
                exact.schedule(given)
            continue
        found = exact.schedule(given)
        assert found.makespan == pytest.approx(best, rel=1e-12), seed
        assert found.lower_bound <= best
        assert found.optimal, seed


def sequential(given: Problem) -> Solution:
    """All tasks in turn, each where it is fastest."""
    return decode(given, given.seconds.argmin(1), np.arange(given.tasks), "in turn")


def test_a_limit_of_work_gives_the_same_each_time_and_an_honest_bound() -> None:
    given = layered(30, 3, 1.0, seed=1)
    whole = load(Scheduler, "exact:seconds=0,iterations=4000").schedule(given)
    scheduler = load(Scheduler, "exact:seconds=0,iterations=20")
    one, other = scheduler.schedule(given), scheduler.schedule(given)
    assert (one.device == other.device).all()
    assert (one.start == other.start).all()
    assert one.lower_bound == other.lower_bound <= whole.makespan <= one.makespan


def test_what_is_known_is_kept_unless_something_is_shorter() -> None:
    given = layered(30, 3, 1.0, seed=1)
    known = sequential(given)
    assert solve(given, Limit(work=1e-9), known).makespan <= known.makespan
    best = solve(given, Limit(), known)
    again = solve(given, Limit(), best)
    assert best.optimal
    assert again.optimal
    assert (again.start == best.start).all()


@pytest.mark.parametrize("seed", range(3))
def test_a_window_says_what_the_whole_takes(seed: int) -> None:
    given = layered(60, 3, 1.0, seed)
    now = sequential(given)
    order = order_of(given, now)
    for begin, end in [(0, 20), (17, 40), (40, 60), (0, 60)]:
        chosen = np.sort(order[begin:end])
        small = window(given, now, order, begin, end)
        inner = decode(small, now.device[chosen], order_of(small, _part(now, chosen)), "")
        assert inner.makespan <= now.makespan * (1 + 1e-12)
        assert (inner.start <= now.start[chosen] + 1e-12).all()
        better = solve(small, Limit(work=0.05), inner)
        device = now.device.copy()
        device[chosen] = better.device
        inside = chosen[order_of(small, better)]
        whole = decode(given, device, np.concatenate([order[:begin], inside, order[end:]]), "")
        assert whole.makespan <= max(better.makespan, _beside(given, now, chosen)) * (1 + 1e-12)


def _part(whole: Solution, chosen: np.ndarray) -> Solution:
    return Solution(whole.device[chosen], whole.start[chosen], whole.makespan)


def _beside(given: Problem, now: Solution, chosen: np.ndarray) -> float:
    """The end of the run if the chosen tasks took no time."""
    free = replace(given, seconds=given.seconds.copy())
    free.seconds[chosen] = 0.0
    return decode(free, now.device, order_of(given, now), "").makespan


def test_windows_improve_and_are_the_same_each_time() -> None:
    given = layered(60, 3, 1.0, seed=3)
    now = sequential(given)
    one = improve(given, now, 0, lambda solved: solved == 4)
    other = improve(given, now, 0, lambda solved: solved == 4)
    assert one.makespan < 0.9 * now.makespan
    assert (one.start == other.start).all()
