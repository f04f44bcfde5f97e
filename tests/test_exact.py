"""Exact schedules against brute force."""

from dataclasses import replace
from itertools import pairwise, permutations, product
from math import inf

import numpy as np
import pytest

from bench.instances import instance, layered, odd, problem
from hetsched.errors import InfeasiblePlan
from hetsched.plugin import load
from hetsched.problem import Problem, Solution
from hetsched.scheduler import Scheduler
from hetsched.schedulers import _cpsat
from hetsched.schedulers._cpsat import Limit, decode, solve


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
        given = odd(seed, 4)
        best = shortest(given)
        if best == inf:
            with pytest.raises(InfeasiblePlan):
                exact.schedule(given)
            continue
        found = exact.schedule(given)
        assert found.makespan == pytest.approx(best, rel=1e-12), seed
        assert found.lower_bound <= best
        assert found.optimal, seed


@pytest.mark.parametrize("bits", [40, 36, 24])
def test_no_wrong_proof(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """OR-Tools 9.15 with presolve proves 4.0305 for most of these."""
    monkeypatch.setattr(_cpsat, "TIME_BITS", bits)
    given = instance("layered", 16, 3, 0.1, 34, room=1.3)
    known = load(Scheduler, "heft").schedule(given)
    for seed in range(10):
        found = solve(given, Limit(), known, seed)
        assert found.makespan == pytest.approx(4.021927946828492, rel=1e-12)
        assert found.lower_bound <= found.makespan


def contended(seed: int) -> Problem:
    """Up to four tasks and four edges on two devices, whose links serve one transfer at a time."""
    rng = np.random.default_rng(seed)
    tasks = int(rng.integers(2, 5))
    pairs = [(i, j) for j in range(tasks) for i in range(j)]
    pairs = [pairs[k] for k in sorted(rng.permutation(len(pairs))[:4])]
    source, sink = np.array(pairs, np.int64).T
    made = problem(
        rng.uniform(0.1, 1, (tasks, 2)), source, sink, rng.choice([0.0, 0.5, 1.0], len(pairs))
    )
    # Edges of one task with as many bytes have one tensor, or each its own.
    own = np.arange(len(pairs))
    same = [
        next(e for e in own if pairs[e][0] == i and made.nbytes[e] == made.nbytes[k])
        for k, (i, _) in enumerate(pairs)
    ]
    return replace(made, contention=True, tensor=np.array(same) if seed % 2 else own)


def shortest_with_contention(given: Problem) -> float:
    """The least makespan over devices and orders of tasks and transfers."""
    edges = list(zip(given.source.tolist(), given.sink.tolist(), strict=True))
    best = inf
    for device in product(range(2), repeat=given.tasks):
        moves = {
            (int(given.tensor[k]), device[j]): k
            for k, (i, j) in enumerate(edges)
            if device[i] != device[j]
        }
        for order in permutations([*range(given.tasks), *((key,) for key in moves)]):
            finish, there, free = {}, {}, {}
            for event in order:
                if isinstance(event, tuple):
                    k = moves[event[0]]
                    if edges[k][0] not in finish:
                        break
                    q, seconds = device[edges[k][0]], float(given.nbytes[k])
                    begin = max(finish[edges[k][0]], free.get((q, "link"), 0.0) if seconds else 0)
                    there[event[0]] = begin + seconds
                    if seconds:
                        free[q, "link"] = begin + seconds
                    continue
                q, begin = device[event], free.get(device[event], 0.0)
                for k, (i, j) in enumerate(edges):
                    if j == event:
                        key = int(given.tensor[k]), q
                        come = there.get(key, inf) if device[i] != q else finish.get(i, inf)
                        begin = max(begin, come)
                if begin == inf:
                    break
                finish[event] = free[q] = begin + given.seconds[event, q]
            else:
                best = min(best, max(finish.values()))
    return best


@pytest.mark.parametrize("seed", range(12))
def test_nothing_is_shorter_where_links_contend(seed: int) -> None:
    given = contended(seed)
    found = load(Scheduler, "exact").schedule(given)
    assert found.makespan == pytest.approx(shortest_with_contention(given), rel=1e-12)
    assert found.optimal
    held: dict[int, set[tuple[float, float]]] = {0: set(), 1: set()}
    for k, (i, j) in enumerate(zip(given.source, given.sink, strict=True)):
        finish = found.start[i] + given.seconds[i, found.device[i]]
        if found.device[i] == found.device[j]:
            assert np.isnan(found.sent[k])
            assert found.start[j] >= finish
            continue
        assert found.sent[k] >= finish
        assert found.start[j] >= found.sent[k] + given.nbytes[k]
        if given.nbytes[k]:
            held[found.device[i]].add((found.sent[k], found.sent[k] + given.nbytes[k]))
    for slots in held.values():
        ordered = sorted(slots)
        assert all(a[1] <= b[0] for a, b in pairwise(ordered))


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
