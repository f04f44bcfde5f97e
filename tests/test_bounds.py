"""Lower bounds: by hand, and never above what brute force finds."""

from dataclasses import replace

import numpy as np
import pytest

from bench.instances import layered, planted
from bench.instances import problem as made
from hetsched.bounds import (
    area,
    critical_path,
    heads,
    infeasible_memory,
    lower_bound,
    plan_bound,
    tails,
    throughput_bound,
)
from hetsched.device import Device, Link
from hetsched.problem import Problem
from hetsched.schedulers._refutation import refuted
from hetsched.system import System
from hetsched.tasks import Edge, Task, TaskGraph

INFINITY = float("inf")
# Sums of floats in another order differ in the last digits.
ROUNDING = 1 + 1e-9


def of(seconds: list[tuple[float, ...]], edges: str = "") -> Problem:
    """A second a byte on each link; an edge is written `0-1:9`."""
    ends = sorted(
        (int(sink), int(source), float(nbytes))
        for source, sink, nbytes in (
            (*edge.partition(":")[0].split("-"), edge.partition(":")[2]) for edge in edges.split()
        )
    )
    table = np.array(ends, np.float64).reshape(-1, 3)
    source, sink = table[:, 1].astype(np.int64), table[:, 0].astype(np.int64)
    return made(np.array(seconds, np.float64), source, sink, table[:, 2].copy())


def tiny(seed: int, tasks: int = 5) -> Problem:
    """Any problem: devices of one unit, missing links, ways from and to the host, all of it."""
    rng = np.random.default_rng(seed)
    tasks = int(rng.integers(1, tasks + 1))
    devices = int(rng.integers(1, 4))
    seconds = rng.integers(0, 9, (tasks, devices)).astype(np.float64)
    cannot = rng.random((tasks, devices)) < 0.2
    cannot[np.arange(tasks), rng.integers(0, devices, tasks)] = False
    seconds[cannot] = np.inf
    pairs = [
        (j, i) for j in range(tasks) for i in range(j) if rng.random() < rng.choice([0.2, 0.6])
    ]
    pairs = [pair for pair in pairs for _ in range(int(rng.integers(1, 3)))]
    ends = np.array(pairs, np.int64).reshape(-1, 2)
    latency = rng.integers(0, 4, (devices, devices)).astype(np.float64)
    if rng.random() < 0.3:
        latency[rng.random((devices, devices)) < 0.3] = np.inf
    np.fill_diagonal(latency, 0.0)
    apart = 1.0 - np.eye(devices)
    way = rng.choice([0, 3], (2, tasks, devices)) * rng.random() if rng.random() < 0.5 else 0.0
    unit = rng.integers(0, devices, devices) if rng.random() < 0.4 else np.arange(devices)
    limited = rng.random(devices) < 0.2
    return Problem(
        seconds=seconds,
        source=ends[:, 1].copy(),
        sink=ends[:, 0].copy(),
        nbytes=rng.integers(0, 9, len(ends)).astype(np.float64),
        latency=latency,
        per_byte=apart * rng.choice([0.0, 0.3, 2.0]),
        entry=np.zeros((tasks, devices)) + (way[0] if np.ndim(way) else 0.0),
        exit=np.zeros((tasks, devices)) + (way[1] if np.ndim(way) else 0.0),
        unit=np.unique(unit, return_inverse=True)[1],
        memory=rng.integers(0, 3, tasks).astype(np.float64),
        limit=np.where(limited, rng.integers(0, 4, devices), np.inf),
    )


def optimum(problem: Problem) -> float:
    """The least makespan of all placements and orders; infinite where there is none."""
    tasks, devices = problem.seconds.shape
    best = INFINITY
    incoming: list[list[tuple[int, float]]] = [[] for _ in range(tasks)]
    for source, sink, nbytes in zip(problem.source, problem.sink, problem.nbytes, strict=True):
        incoming[sink].append((int(source), float(nbytes)))

    def extend(
        place: dict[int, int], finish: dict[int, float], free: list[float], end: float
    ) -> None:
        nonlocal best
        if len(place) == tasks:
            best = min(best, end)
            return
        for task in range(tasks):
            if task in place or any(source not in place for source, _ in incoming[task]):
                continue
            for device in range(devices):
                held = sum(problem.memory[other] for other in place if place[other] == device)
                if held + problem.memory[task] > problem.limit[device]:
                    continue
                unit = problem.unit[device]
                start = max(free[unit], problem.entry[task, device])
                for source, nbytes in incoming[task]:
                    pair = place[source], device
                    delay = problem.latency[pair] + problem.per_byte[pair] * nbytes
                    start = max(start, finish[source] + delay)
                done = start + problem.seconds[task, device]
                last = max(end, done + problem.exit[task, device])
                if last >= best:
                    continue
                behind = list(free)
                behind[unit] = done
                extend({**place, task: device}, {**finish, task: done}, behind, last)

    extend({}, {}, [0.0] * devices, 0.0)
    return float(best)


def test_a_chain_by_hand() -> None:
    # Moving the data costs 3 each time, so the whole chain stays on the second device.
    chain = of([(2, 3), (5, 4), (1, 1)], "0-1:3 1-2:3")
    assert heads(chain).tolist() == [[0, 0], [2, 3], [7, 7]]
    assert tails(chain).tolist() == [[6, 5], [1, 1], [0, 0]]
    assert critical_path(chain, heads(chain), tails(chain)) == 8
    assert lower_bound(chain).seconds == pytest.approx(8)
    assert lower_bound(chain).name == "critical path"
    # With moves for nothing each task is where it is fastest.
    free = of([(2, 3), (5, 4), (1, 1)], "0-1:0 1-2:0")
    assert critical_path(free, heads(free), tails(free)) == 7


def test_the_way_from_and_to_the_host_by_hand() -> None:
    chain = of([(2, 3), (5, 4)], "0-1:3")
    way = replace(chain, entry=np.array([(1.0, 0), (0, 0)]), exit=np.array([(0.0, 0), (0, 2)]))
    # All on the first device: 1 + 2 + 5; on the second 3 + 4 + 2.
    assert critical_path(way, heads(way), tails(way)) == 8 == optimum(way)


def test_shares_of_the_work_by_hand() -> None:
    assert area(of([(3, 5)] * 4)) == pytest.approx(4 * 3 * 5 / (3 + 5))
    # The first only on one device, the rest of the work fills the other.
    assert area(of([(6, np.inf), (2, 2), (2, 2)])) == pytest.approx(6)
    # Two devices of one unit: each task where it is fastest, one after the other.
    shared = replace(of([(2, 3), (3, 2)]), unit=np.array([0, 0]))
    assert area(shared) == pytest.approx(4)
    assert throughput_bound(shared).seconds == pytest.approx(4)


def test_a_window_by_hand() -> None:
    # One device: nothing else can run beside the first and the last, that take 1 each.
    diamond = of([(1, 1), *[(2, 2)] * 3, (1, 1)], "0-1:0 0-2:0 0-3:0 1-4:0 2-4:0 3-4:0")
    assert area(diamond) == pytest.approx(4)
    assert lower_bound(diamond).values["combined"] == pytest.approx(1 + 3 + 1)


def test_limited_memory_by_hand() -> None:
    problem = of([(1, 4)] * 4)
    held = replace(problem, memory=np.full(4, 10.0), limit=np.array([10.0, np.inf]))
    assert area(problem) == pytest.approx(3.2)
    # A quarter of the tasks has room on the fast device.
    assert area(held) == pytest.approx(12, rel=0.01)
    assert area(held) <= 12 * ROUNDING
    assert infeasible_memory(held) is None


def test_what_memory_is_short_is_said() -> None:
    problem = of([(1, 4)] * 3 + [(1, np.inf)])
    held = replace(problem, memory=np.array([2.0, 2, 2, 8]) * 2**20)
    assert infeasible_memory(replace(held, limit=np.array([8.0, 6]) * 2**20)) is None
    one = infeasible_memory(replace(held, limit=np.array([7.0, np.inf]) * 2**20))
    assert one is not None
    assert "'d0' must hold at least 8.0 MiB" in one
    assert "has 7.0 MiB" in one
    both = infeasible_memory(replace(held, limit=np.array([8.0, 5]) * 2**20))
    assert both is not None
    assert "'d0', 'd1' must hold at least 14.0 MiB" in both
    assert "have 13.0 MiB" in both


def test_no_bound_is_above_the_optimum() -> None:
    reached = feasible = 0
    for seed in range(400):
        problem = tiny(seed)
        best = optimum(problem)
        bound = lower_bound(problem)
        for name, value in bound.values.items():
            assert value <= best * ROUNDING, f"{name} of seed {seed}"
        if best == INFINITY:
            continue
        feasible += 1
        assert infeasible_memory(problem) is None
        reached += bound.seconds >= best / ROUNDING
        # Knowing a schedule helps, and hides no shorter one.
        known = lower_bound(problem, best).seconds
        assert bound.seconds * 0.99 <= known <= best
    # The bounds are worth something: they are met in most of the instances.
    assert feasible > 300
    assert reached > feasible / 2


def test_the_combined_bound_is_the_best() -> None:
    for seed in range(20):
        values = lower_bound(layered(20, 3, [0.1, 1, 5][seed % 3], seed)).values
        assert values["combined"] >= values["area"] / ROUNDING
        assert max(values.values()) > min(values.values())


def test_a_join_by_hand() -> None:
    # All on one device for 3; or the first two side by side, and the move: 1 + delay + 1.
    for delay, best in ((2, 3), (0.5, 2.5)):
        join = of([(1, 1)] * 3, f"0-2:{delay} 1-2:{delay}")
        assert lower_bound(join).seconds < best == optimum(join)
        assert refuted(join, best).seconds == pytest.approx(best)
        assert refuted(join).seconds == pytest.approx(best, rel=5e-3)
        fork = of([(1, 1)] * 3, f"0-1:{delay} 0-2:{delay}")
        assert refuted(fork, best).seconds == pytest.approx(best) == optimum(fork)


def test_tasks_that_do_not_fit_side_by_side_by_hand() -> None:
    # Two of three equal tasks share a device, though a share of 1.5 each would do.
    three = of([(2, 2)] * 3)
    assert lower_bound(three).seconds == pytest.approx(3)
    assert refuted(three, 4).seconds == pytest.approx(4)
    # One unit: each of two tasks has half of the run to itself, in either order.
    assert refuted(of([(0, 0)] * 2)).seconds == 0
    window = replace(of([(2,)] * 2), entry=np.array([[1.0], [1.0]]), exit=np.array([[2.0], [2.0]]))
    assert refuted(window, 7).seconds == pytest.approx(7) == optimum(window)


def test_nothing_is_refuted_that_there_is() -> None:
    reached = feasible = 0
    for seed in range(150):
        problem = tiny(seed)
        best = optimum(problem)
        bound = refuted(problem)
        assert bound.seconds <= best * ROUNDING, f"seed {seed}"
        assert bound.seconds >= lower_bound(problem).seconds
        if best < INFINITY:
            feasible += 1
            reached += bound.seconds >= 0.99 * best
            assert refuted(problem, best).seconds <= best
            assert refuted(problem, 1.1 * best).seconds <= best * ROUNDING
    assert feasible > 100
    assert reached > 0.95 * feasible


def test_refutation_is_better_than_the_other_bounds() -> None:
    for seed in range(6):
        problem = layered(16, 3, [0.1, 1, 5][seed % 3], seed)
        values = refuted(problem).values
        assert values["refutation"] > 1.02 * max(
            value for name, value in values.items() if name != "refutation"
        )
        assert refuted(problem).seconds == values["refutation"]
    # Too large to try: the other bounds alone.
    assert "refutation" not in refuted(layered(16, 3, 1, 0), effort=100).values


def test_launches_count_in_the_bound_of_plans() -> None:
    devices = (Device("p", "none", launch_seconds=1), Device("q", "none", launch_seconds=2))
    links = (Link("p", "q", 3, INFINITY), Link("q", "p", 3, INFINITY))
    tasks = TaskGraph(
        System("two", devices, links),
        (Task("a", {"p": 4}), Task("b", {"q": 5})),
        (Edge("a", "b", 0),),
    )
    assert plan_bound(tasks).seconds == pytest.approx(1 + 4 + 3 + 2 + 5)
    assert plan_bound(tasks, "throughput").seconds == pytest.approx(5)


@pytest.mark.parametrize("ratio", [0.1, 1, 5])
@pytest.mark.parametrize(("tasks", "devices"), [(3, 3), (40, 2), (2000, 3)])
def test_a_planted_schedule_is_right_and_full(tasks: int, devices: int, ratio: float) -> None:
    problem, solution = planted(tasks, devices, ratio, seed=tasks)
    place, start = solution.device, solution.start
    seconds = problem.seconds[np.arange(tasks), place]
    finish = start + seconds
    delay = np.where(place[problem.source] == place[problem.sink], 0, problem.nbytes)
    assert (finish[problem.source] + delay <= start[problem.sink]).all()
    for device in range(devices):
        own = np.flatnonzero(place == device)
        own = own[np.argsort(start[own])]
        assert start[own[0]] == 0
        assert (start[own[1:]] == finish[own[:-1]]).all()
        assert finish[own[-1]] == solution.makespan
    assert solution.optimal
    if tasks == 2000:
        assert problem.nbytes.mean() == pytest.approx(ratio, rel=0.3)
        tight = finish[problem.source] + delay == start[problem.sink]
        assert (tight & (delay > 0)).mean() > 0.01
        assert (np.argmin(problem.seconds, axis=1) != place).mean() > 0


@pytest.mark.parametrize("devices", [2, 3])
def test_a_planted_schedule_meets_its_bound(devices: int) -> None:
    for tasks in (30, 2000):
        problem, solution = planted(tasks, devices, 1, seed=1)
        assert area(problem) == pytest.approx(solution.makespan, rel=1e-6)
