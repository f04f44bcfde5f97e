"""The portfolio and its local search: beside brute force, and beside the members."""

from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest
from checker import array_violations
from numba.core import event

from bench.attack import attacked, changed, over_members, over_optimum
from bench.instances import instance, layered, odd, planted, problem
from hetsched.bounds import lower_bound
from hetsched.errors import InfeasiblePlan, PluginError
from hetsched.plugin import load
from hetsched.problem import Problem, Solution
from hetsched.scheduler import Scheduler
from hetsched.schedulers import _cpsat, portfolio
from hetsched.schedulers._contention import shake
from hetsched.schedulers._cpsat import Limit, decode
from hetsched.schedulers._list import decode as decode_in_gaps
from hetsched.schedulers._list import makespan
from hetsched.schedulers._search import climb, padded, seeded, sweep
from hetsched.schedulers.portfolio import LISTS, Portfolio, priced

# No price on the seconds of a unit, and no unit taken before.
NOTHING = np.zeros(4)
# Ends soon, and repeats itself.
QUICK = Portfolio(seconds=0, iterations=300)


def orders(made: Problem) -> list[list[int]]:
    """All topological orders."""
    before = [set(made.source[made.sink == i].tolist()) for i in range(made.tasks)]
    found: list[list[int]] = [[]]
    for _ in range(made.tasks):
        found = [
            [*order, i]
            for order in found
            for i in range(made.tasks)
            if i not in order and before[i] <= set(order)
        ]
    return found


def optimum(made: Problem) -> float:
    """Of all orders on all devices, each task as soon as it can; infinite where there is none."""
    best, found = np.inf, orders(made)
    for device in product(range(len(made.limit)), repeat=made.tasks):
        held = np.bincount(device, made.memory, len(made.limit))
        if (held <= made.limit).all():
            for order in found:
                ends = decode(made, np.array(device), np.array(order), "").makespan
                best = min(best, ends)
    return best


def climbed(made: Problem, steps: int, hot: float, seed: int = 0) -> tuple[float, Solution]:
    """The end that `climb` tells, and that of its order and devices."""
    order, device = np.arange(made.tasks), np.argmin(made.seconds, axis=1)
    best = order.copy(), device.copy()
    end = climb(
        padded(made),
        NOTHING,
        NOTHING,
        order,
        device,
        *best,
        np.inf,
        steps,
        hot,
        0.0,
        0.0,
        seeded(seed),
    )
    assert sorted(best[0]) == list(range(made.tasks))
    place = np.argsort(best[0])
    assert (place[made.source] < place[made.sink]).all()
    return end, decode(made, best[1], best[0], "")


@pytest.mark.parametrize("ratio", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("tasks", [1, 2, 9, 40])
def test_climbing_tells_the_end_of_what_it_found(tasks: int, ratio: float) -> None:
    for seed in range(3):
        made = layered(tasks, 3, ratio, seed)
        end, solution = climbed(made, 500, 1.0, seed)
        assert end == pytest.approx(solution.makespan, rel=1e-12)
        assert array_violations(made, solution) == {}


def test_climbing_finds_the_optimum_of_four_tasks() -> None:
    for seed in range(12):
        made = layered(4, 2, 1.0, seed)
        assert climbed(made, 400, 1.0)[0] == pytest.approx(optimum(made), rel=1e-12)


def test_climbing_respects_memory_and_devices_of_one_unit() -> None:
    for seed in range(10):
        made = replace(instance("layered", 20, 4, 1.0, seed, room=1.1), unit=np.array([0, 1, 1, 2]))
        start = load(Scheduler, "heft").schedule(made)
        order = np.lexsort((np.arange(20), start.start))
        device = start.device.copy()
        best = order.copy(), device.copy()
        climb(
            padded(made),
            NOTHING,
            NOTHING,
            order,
            device,
            *best,
            np.inf,
            500,
            1.0,
            0.0,
            0.0,
            seeded(seed),
        )
        assert array_violations(made, decode(made, best[1], best[0], "")) == {}


def test_a_chain_of_costly_transfers_moves_as_a_whole() -> None:
    # Each task by itself is better left on the first device, as moving it alone costs 20.
    tasks = 6
    edges = np.arange(tasks - 1)
    made = problem(np.tile([2.0, 1.0], (tasks, 1)), edges, edges + 1, np.full(tasks - 1, 10.0))
    order, device = np.arange(tasks), np.zeros(tasks, np.int64)
    best = order.copy(), device.copy()
    end = climb(
        padded(made), NOTHING, NOTHING, order, device, *best, np.inf, 2000, 0.0, 0.0, 0.0, seeded(0)
    )
    assert end == tasks
    assert best[1].tolist() == [1] * tasks


@pytest.mark.parametrize("size", [8, 30])
def test_windows_never_make_a_schedule_longer_and_tell_its_end(size: int) -> None:
    for ratio in (0.1, 5.0):
        made = instance("layered", 120, 3, ratio, 5, room=1.05)
        start = load(Scheduler, "heft").schedule(made)
        order = np.lexsort((np.arange(120), start.start))
        device = start.device.copy()
        next_window, end = sweep(
            padded(made), order, device, 0, 60, size, 100, 0.1, NOTHING, seeded(0)
        )
        assert 60 <= next_window < 60 + size
        _, after = sweep(padded(made), order, device, 60, 120, size, 100, 0.1, NOTHING, seeded(0))
        solution = decode(made, device, order, "")
        assert solution.makespan == pytest.approx(after, rel=1e-12)
        assert after <= end * (1 + 1e-12) <= start.makespan * (1 + 2e-12)
        assert array_violations(made, solution) == {}


def test_prices_tell_where_the_tasks_of_a_packed_schedule_are() -> None:
    made, best = planted(300, 3, 1.0, 2)
    found = priced(made)
    assert (found.device == best.device).all()
    assert found.makespan < 1.15 * best.makespan


def test_the_portfolio_finds_and_proves_what_brute_force_finds() -> None:
    for seed in range(10):
        made = layered(4, 2, [0.1, 1.0, 5.0][seed % 3], seed)
        solution = QUICK.schedule(made)
        assert solution.makespan == pytest.approx(optimum(made), rel=1e-9)
        assert solution.optimal


def test_the_portfolio_finds_what_there_is_with_all_that_a_problem_can_have() -> None:
    there = 0
    for seed in range(25):
        made = odd(seed, 3)
        best = optimum(made)
        if best == np.inf:
            with pytest.raises(InfeasiblePlan):
                QUICK.schedule(made)
            continue
        there += 1
        solution = QUICK.schedule(made)
        assert array_violations(made, solution) == {}
        assert solution.makespan == pytest.approx(best, rel=1e-9, abs=1e-12), seed
    assert there > 10


@pytest.mark.parametrize("tasks", [25, 60, 600])
def test_the_portfolio_is_never_worse_than_its_members_and_repeats_itself(tasks: int) -> None:
    for ratio in (0.1, 5.0):
        made = instance("layered", tasks, 3, ratio, 3, room=1.1)
        solution = QUICK.schedule(made)
        assert array_violations(made, solution) == {}
        for name in LISTS:
            assert solution.makespan <= load(Scheduler, name).schedule(made).makespan
        assert solution.makespan >= solution.lower_bound >= lower_bound(made).seconds * (1 - 1e-9)
        again = QUICK.schedule(made)
        assert (again.device == solution.device).all()
        assert (again.start == solution.start).all()
        assert again.solver == solution.solver


def test_where_links_contend_the_portfolio_is_as_good_as_its_members() -> None:
    for seed in range(4):
        made = replace(layered(12, 3, 2.0, seed), contention=True)
        solution = QUICK.schedule(made)
        assert array_violations(made, solution) == {}
        for name in LISTS:
            assert solution.makespan <= load(Scheduler, name).schedule(made).makespan


def test_shaking_finds_the_optimum_where_links_contend() -> None:
    for seed in range(6):
        made = replace(layered(7, 2, 2.0, seed), contention=True)
        best = load(Scheduler, "exact").schedule(made)
        assert best.optimal
        order, device = np.arange(7), np.argmin(made.seconds, axis=1)
        found = order.copy(), device.copy()
        random = seeded(seed)
        end = shake(made.arrays, order, device, *found, np.inf, 3000, 1.0, 0.0, 0.0, random)
        start, _ = decode_in_gaps(made.arrays, *found, True)
        assert makespan(made.arrays, found[1], start) == end
        assert end == pytest.approx(best.makespan, rel=1e-9)


def test_shaking_respects_memory_and_improves_what_list_scheduling_finds() -> None:
    for seed in range(3):
        made = replace(instance("layered", 60, 3, 2.0, seed, room=1.05), contention=True)
        solution = Portfolio(seconds=0, iterations=1000).schedule(made)
        assert array_violations(made, solution) == {}
        members = [load(Scheduler, name).schedule(made).makespan for name in LISTS]
        assert solution.makespan < min(members)


def test_a_search_tells_how_it_went_on() -> None:
    solution = Portfolio(seconds=0, iterations=1500).schedule(layered(60, 3, 5.0, 1))
    moments = solution.history
    assert len(moments) > 3
    for before, after in pairwise(moments):
        assert (after.makespan, -after.lower_bound) < (before.makespan, -before.lower_bound)
        assert after.makespan <= before.makespan
        assert after.lower_bound >= before.lower_bound
        assert after.seconds >= before.seconds
        assert after.iterations >= before.iterations
    assert moments[-1].makespan == pytest.approx(solution.makespan, rel=1e-12)
    assert moments[-1].lower_bound == solution.lower_bound
    assert moments[-1].iterations <= 1500 + 200


def test_time_to_compile_is_not_time_to_search(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    for module in (portfolio, event):
        for name in ("perf_counter", "timer"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, lambda: now[0])
    with portfolio.Clock() as clock:
        now[0] = 2.0
        with event.trigger_event("numba:compile"), event.trigger_event("numba:compile"):
            now[0] = 22.0
        now[0] = 23.0
        assert clock.seconds == 3.0


def test_nothing_to_do_and_one_device() -> None:
    empty = layered(1, 2, 1.0, 0)
    empty = problem(np.empty((0, 2)), empty.source, empty.sink, empty.nbytes)
    assert QUICK.schedule(empty).makespan == 0
    made = layered(30, 1, 1.0, 0, unsupported=0.0)
    solution = QUICK.schedule(made)
    assert solution.makespan == pytest.approx(made.seconds.sum())
    assert solution.optimal


def test_a_portfolio_without_a_limit_is_refused() -> None:
    with pytest.raises(PluginError, match="needs a limit: seconds or iterations"):
        load(Scheduler, "portfolio:seconds=0")


def test_the_attack_changes_instances_and_finds_where_heft_is_bad() -> None:
    rng = np.random.default_rng(0)
    made = layered(8, 3, 1.0, 0)
    for _ in range(50):
        made = changed(made, rng)
    assert np.isfinite(made.seconds).any(axis=1).all()
    bad, worst, so_far = attacked(over_members("heft"), 40, 1)
    assert bad > 1.1
    assert so_far[-1] == bad == over_members("heft")(worst)
    assert over_optimum("portfolio:seconds=0,iterations=300")(worst) == pytest.approx(1)


def test_a_search_never_passes_its_limit_at_the_pace_that_it_has_seen() -> None:
    class Told:
        seconds = 0.0

    clock = Told()
    search = portfolio.Search(layered(4, 3, 1.0, 0), clock, 2.0, np.inf, 0)  # type: ignore[arg-type]
    turns = 0
    while room := search.room(1.0, 400):
        steps = min(room, 8000)
        # A step takes ever longer, up to a fifth more than the one before.
        clock.seconds += steps * 5e-5 * 1.2 ** (turns % 3)
        search.take(steps, 400)
        turns += 1
    assert 1.9 < clock.seconds <= 2.0
    # Of iterations, each step of 470 tasks is a quarter of one.
    search = portfolio.Search(layered(4, 3, 1.0, 0), clock, np.inf, 100, 0)  # type: ignore[arg-type]
    assert search.room(0.5, 470) == round(portfolio.SOME * 200)


def test_what_saying_a_problem_takes_is_of_the_seconds_of_its_solver(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = iter([0.0, 7.0])
    seen: list[Limit] = []
    monkeypatch.setattr(_cpsat, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(_cpsat._Model, "solve", lambda self, limit, seed: seen.append(limit))
    _cpsat.solve(layered(4, 3, 1.0, 0), Limit(seconds=10.0))
    assert seen == [Limit(seconds=3.0)]
