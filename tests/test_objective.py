"""What plans are chosen for, worked out by hand."""

import random
from dataclasses import replace
from itertools import product

import pytest

from hetsched.device import Device, Link
from hetsched.energy import UNNAMED, used
from hetsched.errors import DeviceError, PluginError
from hetsched.objective import OBJECTIVES, front, objective, seconds_a_request
from hetsched.schedule import Schedule, Slot, Transfer
from hetsched.system import System

SYSTEM = System(
    "two",
    (
        Device("a", "none", active_watts=3.0, idle_watts=1.0),
        Device("b", "none", active_watts=10.0, idle_watts=0.5),
        Device("c", "none", cores=(4,)),
        Device("d", "none", cores=(4,)),
    ),
    (Link("a", "b", 0.0, 1.0, joules_per_byte=0.25),),
)
SCHEDULE = Schedule(
    (Slot("x", "a", 0.0, 2.0), Slot("y", "b", 3.0, 4.0), Slot("z", "a", 2.0, 2.5)),
    (Transfer("t", 8, "a", "b", 2.0, 3.0), Transfer("u", 8, None, "a", 0.0, 0.0)),
)


def test_energy_by_hand() -> None:
    # a works 2.5 s and waits 1.5 s, b works 1 s and waits 3 s, and 8 bytes cross.
    found = used(SCHEDULE, SYSTEM)
    assert found.joules == pytest.approx(3 * 2.5 + 1 * 1.5 + 10 * 1 + 0.5 * 3 + 8 / 4)
    assert found.delay_product == pytest.approx(found.joules * 4)
    assert {use.name: use.source for use in found.uses}["a to b"] == UNNAMED


def test_energy_of_multiply_adds_and_bytes() -> None:
    """They count instead of the active watts, beside what is drawn anyway; each with its source."""
    device = replace(
        SYSTEM.devices[0], joules_per_mac=2.0, joules_per_byte=0.5, energy_source="a data sheet"
    )
    system = replace(SYSTEM, devices=(device, *SYSTEM.devices[1:]))
    first, second, *_ = used(SCHEDULE, system, {"a": (6, 10)}).uses
    assert (first.joules, first.idle_joules) == (3 * 2 + 10 * 0.5 + 4 * 1, 4)
    assert first.source == "a data sheet"
    assert second.joules == pytest.approx(10 * 1 + 0.5 * 3)


def test_energy_needs_watts() -> None:
    with pytest.raises(DeviceError, match="'c' has no active_watts"):
        used(Schedule((Slot("x", "c", 0.0, 1.0),)), SYSTEM)


def test_the_busiest_sets_the_pace() -> None:
    assert seconds_a_request([SCHEDULE], SYSTEM) == 2.5
    # Devices of one core take turns.
    turns = Schedule((Slot("x", "c", 0.0, 2.0), Slot("y", "d", 2.0, 3.5), Slot("z", "a", 0.0, 3.0)))
    assert seconds_a_request([turns], SYSTEM) == 3.5


def test_an_objective_that_is_none() -> None:
    with pytest.raises(PluginError, match="no objective 'speed'; there are latency, throughput"):
        objective("speed")
    assert [objective(name).name for name in OBJECTIVES] == list(OBJECTIVES)


def test_the_front_is_what_nothing_is_better_than() -> None:
    rng = random.Random(0)
    for _ in range(200):
        points = [(rng.randint(0, 6), rng.randint(0, 6), rng.randint(0, 3)) for _ in range(12)]
        found = [point for point, _ in front((point, None) for point in points)]

        def better(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
            return one != other and all(a <= b for a, b in zip(one, other, strict=True))

        assert set(found) == {
            point for point in points if not any(better(other, point) for other in points)
        }
        assert len(found) == len(set(found))
        assert not any(better(one, other) for one, other in product(found, repeat=2))
