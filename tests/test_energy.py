"""Plans of least energy, beside all placements."""

import random
from itertools import product

import pytest
from graphs import Table, random_graph

from hetsched.device import Device, Link
from hetsched.errors import DeviceError
from hetsched.partitioner import Partitioner
from hetsched.plan import Plan, make_plan, simulate
from hetsched.plugin import load
from hetsched.system import System


def serial_joules(plan: Plan) -> float:
    """The energy when one thing is done at a time, and every other device idles meanwhile."""
    system = plan.system
    idle = sum(device.idle_watts for device in system.devices)
    total = 0.0
    for name, where in plan.placement.items():
        device = system.device(where)
        watts = device.active_watts - device.idle_watts + idle
        total += plan.prices.seconds[name][where] * watts
    for move in simulate(plan).transfers:
        total += move.seconds * idle
        if link := system.link(str(move.source), str(move.sink)):
            total += move.nbytes * link.joules_per_byte
    return total


def test_least_energy_equals_brute_force() -> None:
    told = 0
    for seed in range(60):
        rng = random.Random(seed)
        graph = random_graph(rng, 6)
        devices = tuple(
            Device(name, "none", active_watts=rng.uniform(1, 9), idle_watts=rng.uniform(0, 1))
            for name in ("p", "q")
        )
        links = (
            Link("p", "q", 1e-6, 1e8, rng.choice([0.0, 1e-9])),
            Link("q", "p", 1e-6, 1e8, 1e-9),
        )
        system = System("two", devices, links)
        costs = Table(rng).prices(graph, system)
        plan = load(Partitioner, "mincut:objective=energy").partition(graph, system, costs)
        names = [group.name for group in graph.groups]
        found = []
        for choice in product("pq", repeat=len(names)):
            placement = dict(zip(names, choice, strict=True))
            if all(device in costs.seconds[name] for name, device in placement.items()):
                other = make_plan(graph, system, costs, placement, names, "any")
                found.append(serial_joules(other))
        assert serial_joules(plan) == pytest.approx(min(found))
        told += len(plan.devices) > 1
    assert told >= 5


def test_energy_needs_watts_of_every_device() -> None:
    rng = random.Random(0)
    graph = random_graph(rng, 6)
    devices = (Device("p", "none", active_watts=1.0), Device("q", "none"))
    system = System("two", devices, (Link("p", "q", 0.0, 1e9), Link("q", "p", 0.0, 1e9)))
    costs = Table(rng).prices(graph, system)
    with pytest.raises(DeviceError, match="'q' has no active_watts"):
        load(Partitioner, "mincut:objective=energy").partition(graph, system, costs)
