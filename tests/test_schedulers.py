"""Schedulers of arrays: every one that is found, judged by an independent checker; and by hand."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import permutations, product

import numpy as np
import pytest
from checker import array_violations

from bench.instances import families, instance, layered
from hetsched.errors import InfeasiblePlan
from hetsched.plugin import load, names
from hetsched.problem import Problem, Solution
from hetsched.scheduler import Scheduler
from hetsched.schedulers._list import decode, makespan, order_by
from hetsched.schedulers._rank import upward_rank

# One pass over the tasks, so that they can be tried on many.
LISTS = ["cpop", "heft", "ippts", "lookahead", "peft"]
# The spec that tests use of one that searches, so that it ends soon.
SPECS: dict[str, str] = {"portfolio": "portfolio:seconds=0,iterations=2000"}


def scheduler(name: str) -> Scheduler:
    return load(Scheduler, SPECS.get(name, name))


def random_problem(seed: int, most: int = 12, contention: bool | None = None) -> Problem:
    """Devices that share units, links that are missing, limited memory, tasks without work."""
    rng = np.random.default_rng(seed)
    tasks, devices = int(rng.integers(1, most + 1)), int(rng.integers(1, 5))
    pairs = np.argwhere(np.triu(rng.random((tasks, tasks)) < min(0.3, 4 / tasks), 1).T)
    sink, source = pairs[:, 0], pairs[:, 1]
    nbytes = rng.integers(0, 90, len(pairs)).astype(float)
    # One tensor may have several readers.
    tensor = np.arange(len(pairs))
    for task in range(tasks):
        own = np.flatnonzero(source == task)
        if len(own) and rng.random() < 0.5:
            tensor[own], nbytes[own] = own[0], nbytes[own[0]]
    seconds = rng.choice([0.0, 1.0, 2.0, 5.5, 9.0], (tasks, devices))
    seconds += rng.random((tasks, devices)) * rng.integers(0, 2, (tasks, devices))
    cannot = rng.random((tasks, devices)) < 0.15
    cannot[np.arange(tasks), rng.integers(0, devices, tasks)] = False
    latency = rng.choice([0.0, 0.25, 3.0], (devices, devices))
    if rng.random() < 0.3:
        latency[rng.random((devices, devices)) < 0.3] = np.inf
    np.fill_diagonal(latency, 0.0)
    memory = rng.integers(0, 100, tasks).astype(float)
    limits = [np.inf, 1.3 * memory.sum() / devices, 3 * memory.max()]
    return Problem(
        seconds=np.where(cannot, np.inf, seconds),
        source=source,
        sink=sink,
        nbytes=nbytes,
        latency=latency,
        per_byte=rng.choice([0.0, 0.01, 0.1], (devices, devices)) * (1 - np.eye(devices)),
        entry=rng.choice([0.0, 0.0, 4.0], (tasks, devices)),
        exit=rng.choice([0.0, 0.0, 3.0], (tasks, devices)),
        unit=np.unique(rng.integers(0, devices, devices), return_inverse=True)[1],
        memory=memory,
        limit=rng.choice(limits, devices),
        tensor=tensor,
        contention=bool(rng.random() < 0.5) if contention is None else contention,
    )


# Conformance of all that are found.


@pytest.mark.parametrize("name", names(Scheduler))
def test_no_scheduler_breaks_a_rule(name: str) -> None:
    solved = 0
    for seed in range(300 if name in LISTS else 30):
        made = random_problem(seed)
        try:
            solution = scheduler(name).schedule(made)
        except InfeasiblePlan:
            continue
        solved += 1
        assert array_violations(made, solution) == {}, seed
    assert solved >= (200 if name in LISTS else 20)


@pytest.mark.parametrize("family", families())
def test_no_scheduler_breaks_a_rule_on_any_family(family: str) -> None:
    for name, contention in product(LISTS, (False, True)):
        made = replace(instance(family, 200, 3, 1.0, 7, room=1.05), contention=contention)
        assert array_violations(made, scheduler(name).schedule(made)) == {}, name


@pytest.mark.parametrize("name", LISTS)
def test_a_hundred_thousand_tasks_and_more_hold_every_rule(name: str) -> None:
    for made in (layered(100_000, 3, 1.0, 3), instance("wavefront", 100_000, 3, 5.0, 4, room=1.1)):
        assert array_violations(made, scheduler(name).schedule(made)) == {}


@pytest.mark.parametrize("name", names(Scheduler))
def test_a_scheduler_repeats_itself(name: str) -> None:
    for seed in range(8):
        made = random_problem(seed)
        try:
            first = scheduler(name).schedule(made)
        except InfeasiblePlan:
            continue
        again = scheduler(name).schedule(random_problem(seed))
        np.testing.assert_array_equal(first.device, again.device)
        np.testing.assert_array_equal(first.start, again.start)


# The checker against broken schedules.


def mutations(
    made: Problem, solution: Solution, rng: np.random.Generator
) -> Iterator[tuple[str, Problem, Solution]]:
    """One schedule of each kind of mistake that can be made in this one."""
    tasks, devices = made.seconds.shape
    seconds = made.seconds[np.arange(tasks), solution.device]
    size = solution.makespan

    def moved(task: int, start: float) -> Solution:
        starts = solution.start.copy()
        starts[task] = start
        finish = starts + seconds + made.exit[np.arange(tasks), solution.device]
        return replace(solution, start=starts, makespan=float(finish.max()))

    def put(task: int, on: int) -> Solution:
        device = solution.device.copy()
        device[task] = on
        return replace(solution, device=device)

    task = int(rng.integers(tasks))
    yield "lost", made, put(task, int(rng.choice([-1, devices])))
    yield "lost", made, moved(task, np.nan)
    yield "lost", made, replace(solution, start=solution.start[:-1])
    yield "start", made, moved(task, -0.01 * size)
    yield "makespan", made, replace(solution, makespan=size * rng.choice([0.99, 1.01]))
    for on in np.flatnonzero(np.isinf(made.seconds[task]))[:1]:
        yield "device", made, put(task, int(on))
    held = np.bincount(solution.device, made.memory, devices)
    if held[solution.device[task]]:
        limit = made.limit.copy()
        limit[solution.device[task]] = held[solution.device[task]] - 0.5
        yield "memory", replace(made, limit=limit), solution
    late = np.flatnonzero(made.entry[np.arange(tasks), solution.device] > 1e-3 * size)
    for one in late[:1]:
        yield "entry", made, moved(one, float(rng.uniform(0, 0.9)))
    same = made.unit[solution.device] == made.unit[solution.device[task]]
    for other in np.flatnonzero(same & (seconds > 1e-3 * size))[:1]:
        if other != task and seconds[task] > 1e-3 * size:
            middle = solution.start[other] + seconds[other] / 2
            yield "overlap", made, moved(task, middle)
    crosses = solution.device[made.source] != solution.device[made.sink]
    for edge in rng.permutation(len(crosses))[:1]:
        source, sink = made.source[edge], made.sink[edge]
        here, there = solution.device[source], solution.device[sink]
        arrival = solution.start[source] + seconds[source]
        if crosses[edge]:
            arrival += made.latency[here, there] + made.nbytes[edge] * made.per_byte[here, there]
        yield "precedence", made, moved(sink, arrival - 1e-3 * size)
    for edge in rng.permutation(np.flatnonzero(crosses))[:1]:
        here, there = solution.device[made.source[edge]], solution.device[made.sink[edge]]
        latency = made.latency.copy()
        latency[here, there] = np.inf
        yield "link", replace(made, latency=latency), solution
        if not made.contention:
            continue
        way = made.latency[here, there] + made.nbytes[edge] * made.per_byte[here, there]

        def sent(edges: np.ndarray, value: float) -> Solution:
            times = solution.sent.copy()
            times[edges] = value
            return replace(solution, sent=times)

        alike = crosses & (made.tensor == made.tensor[edge])
        alike &= solution.device[made.sink] == there
        finish = solution.start[made.source[edge]] + seconds[made.source[edge]]
        yield "transfer missing", made, sent(alike, np.nan)
        yield "transfer early", made, sent(alike, finish - 1e-3 * size)
        yield "transfer late", made, sent(alike, solution.start[made.sink[edge]] + size)
        if alike.sum() > 1:
            yield "transfer twice", made, sent(np.array([edge]), solution.sent[edge] + 1e-3 * size)
        link = crosses & (solution.device[made.source] == here) & ~alike
        link &= solution.device[made.sink] == there
        link &= (made.latency[here, there] + made.nbytes * made.per_byte[here, there]) > 0
        if link.any() and way > 1e-3 * size:
            yield "link overlap", made, sent(alike, solution.sent[np.flatnonzero(link)[0]])


def test_the_checker_rejects_every_broken_schedule() -> None:
    tried: Counter[str] = Counter()
    for seed in range(220):
        made = random_problem(seed)
        try:
            solution = scheduler("heft").schedule(made)
        except InfeasiblePlan:
            continue
        if solution.makespan == 0:
            continue
        for kind, changed, broken in mutations(made, solution, np.random.default_rng(seed)):
            tried[kind] += 1
            assert kind in array_violations(changed, broken), (kind, seed)
    assert sum(tried.values()) >= 1000, tried
    assert len(tried) == 14
    assert min(tried.values()) >= 10, tried


# Against plain loops, and brute force.


def naive_decode(made: Problem, order: np.ndarray, device: np.ndarray) -> np.ndarray:
    """Starts with insertion, all slots of a unit walked through for each task; no contention."""
    start, finish = np.full(made.tasks, np.inf), np.full(made.tasks, np.inf)
    slots: dict[int, list[tuple[float, float]]] = {}
    for task in order:
        on = device[task]
        ready = made.entry[task, on]
        for edge in range(made.incoming[task], made.incoming[task + 1]):
            at = device[made.source[edge]]
            way = made.latency[at, on] + made.nbytes[edge] * made.per_byte[at, on]
            ready = max(ready, finish[made.source[edge]] + (way if at != on else 0.0))
        seconds = made.seconds[task, on]
        if ready + seconds == np.inf:
            continue
        busy = slots.setdefault(int(made.unit[on]), [])
        for begin, end in busy:
            if end < ready:
                continue
            if ready + seconds <= begin:
                break
            ready = max(ready, end)
        start[task], finish[task] = ready, ready + seconds
        busy.append((ready, ready + seconds))
        busy.sort()
    return start


@pytest.mark.parametrize("seed", range(60))
def test_decode_finds_the_very_first_gap(seed: int) -> None:
    """Also where a unit has many blocks of gaps, and gaps of no length."""
    made = random_problem(seed, 40, contention=False)
    if seed % 10 == 0:
        made = layered(1500, 2, 5.0, seed)
        if seed % 20:
            still = np.random.default_rng(seed).random(made.tasks) < 0.2
            made = replace(made, seconds=np.where(still[:, None], 0.0, made.seconds))
    rng = np.random.default_rng(seed)
    order = order_by(made.arrays, rng.random(made.tasks))
    able = np.where(np.isfinite(made.seconds), rng.random(made.seconds.shape), np.inf)
    device = np.argmin(able, axis=1)
    start, _ = decode(made.arrays, order, device, True)
    np.testing.assert_array_equal(start, naive_decode(made, order, device))
    behind, _ = decode(made.arrays, order, device, False)
    if np.isfinite(behind).all():
        solution = Solution(device, behind, makespan(made.arrays, device, behind))
        assert array_violations(replace(made, limit=made.limit * 0 + np.inf), solution) == {}
        by_unit = made.unit[device][order]
        for unit in set(by_unit):
            assert (np.diff(behind[order][by_unit == unit]) >= 0).all()


def test_orders_are_topological_and_take_the_highest_priority_that_is_ready() -> None:
    for seed in range(100):
        made = random_problem(seed)
        priority = np.random.default_rng(seed).integers(0, 4, made.tasks).astype(float)
        if seed % 2:
            priority = upward_rank(made.arrays)
        order = order_by(made.arrays, priority).tolist()
        done: set[int] = set()
        for task in order:
            ready = [
                other
                for other in range(made.tasks)
                if other not in done and done.issuperset(made.source[made.sink == other].tolist())
            ]
            assert task == max(ready, key=lambda other: (priority[other], -other))
            done.add(task)
        assert len(done) == made.tasks


def optimum(made: Problem) -> float:
    """The least makespan of all placements and orders that hold the memory; no contention."""
    best = np.inf
    edges = list(zip(made.source.tolist(), made.sink.tolist(), strict=True))
    orders = [
        order
        for order in permutations(range(made.tasks))
        if all(order.index(source) < order.index(sink) for source, sink in edges)
    ]
    for device in product(range(made.seconds.shape[1]), repeat=made.tasks):
        held = np.bincount(device, made.memory, len(made.limit))
        if (held > made.limit).any():
            continue
        for order in orders:
            free: dict[int, float] = {}
            finish: dict[int, float] = {}
            end = 0.0
            for task in order:
                on = device[task]
                start = max(made.entry[task, on], free.get(int(made.unit[on]), 0.0))
                for edge in range(made.incoming[task], made.incoming[task + 1]):
                    at = device[made.source[edge]]
                    way = made.latency[at, on] + made.nbytes[edge] * made.per_byte[at, on]
                    start = max(start, finish[int(made.source[edge])] + (way if at != on else 0))
                finish[task] = free[int(made.unit[on])] = start + made.seconds[task, on]
                end = max(end, finish[task] + made.exit[task, on])
            best = min(best, end)
    return best


def test_no_scheduler_is_below_the_optimum_nor_misses_a_way() -> None:
    found: Counter[str] = Counter()
    for seed in range(120):
        made = random_problem(seed, 4)
        best = optimum(replace(made, contention=False))
        for name in names(Scheduler):
            try:
                solution = scheduler(name).schedule(made)
            except InfeasiblePlan:
                found[name] += best < np.inf
                continue
            assert solution.makespan >= best * (1 - 1e-9), (name, seed)
    # Lists may miss a way where links are missing, not often.
    assert all(missed <= 3 for missed in found.values()), found
