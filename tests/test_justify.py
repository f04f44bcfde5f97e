"""Justification: the order it leaves, the end it tells, and the problem that runs backwards."""

from dataclasses import replace

import numpy as np
import pytest
from checker import array_violations

from bench.instances import instance, layered, odd, planted
from hetsched.errors import InfeasiblePlan
from hetsched.plugin import load
from hetsched.problem import Problem, Solution
from hetsched.scheduler import Scheduler
from hetsched.schedulers._cpsat import decode, order_of
from hetsched.schedulers._justify import backwards, justify
from hetsched.schedulers._search import seeded
from hetsched.schedulers.portfolio import priced


def justified(made: Problem, start: Solution, rounds: int, bound: float = 0.0) -> Solution:
    """What is left of `start`, beside the end that was told."""
    order, device = order_of(made, start), start.device.copy()
    back = backwards(made).arrays
    end = justify(made.arrays, back, order, device, rounds, bound, seeded(0))
    assert sorted(order) == list(range(made.tasks))
    assert (device == start.device).all()
    found = decode(made, device, order, "")
    assert found.makespan == pytest.approx(end, rel=1e-12)
    assert array_violations(made, found) == {}
    return found


@pytest.mark.parametrize("ratio", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("tasks", [1, 2, 9, 120])
def test_justifying_tells_the_end_of_what_it_found(tasks: int, ratio: float) -> None:
    made = layered(tasks, 3, ratio, tasks)
    start = load(Scheduler, "heft").schedule(made)
    assert justified(made, start, 50).makespan <= start.makespan * (1 + 1e-12)


def test_justifying_keeps_to_all_that_a_problem_can_have() -> None:
    seen = 0
    for seed in range(60):
        made = odd(seed)
        try:
            start = load(Scheduler, "heft").schedule(made)
        except InfeasiblePlan:
            continue
        assert justified(made, start, 20).makespan <= start.makespan * (1 + 1e-12)
        seen += 1
    assert seen > 40


def test_justifying_closes_most_of_the_gap_of_a_packed_schedule() -> None:
    made, best = planted(300, 3, 1.0, 2)
    start = priced(made)
    found = justified(made, start, 400)
    assert found.makespan - best.makespan < 0.6 * (start.makespan - best.makespan)


def test_justifying_ends_at_the_bound() -> None:
    made, _ = planted(100, 3, 1.0, 2)
    start = priced(made)
    assert justified(made, start, 100, start.makespan).makespan == start.makespan


def test_backwards_twice_is_the_problem_itself() -> None:
    made = replace(instance("lu", 60, 3, 1.0, 3, room=1.1), unit=np.array([0, 1, 1]))
    again = backwards(backwards(made))
    for name, value in made.arrays._asdict().items():
        assert np.array_equal(value, getattr(again.arrays, name)), name
