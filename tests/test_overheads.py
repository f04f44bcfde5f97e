"""What a run costs beside its parts: measured once, written down, and counted in predictions."""

from dataclasses import replace
from math import inf
from pathlib import Path

import pytest
from graphs import Builder

from hetsched import overheads as module
from hetsched.cost import Prices
from hetsched.device import Device, Link
from hetsched.errors import DeviceError
from hetsched.graph import Graph
from hetsched.overheads import overheads
from hetsched.plan import make_plan, read_recipe, simulate
from hetsched.plugin import load
from hetsched.request import Step
from hetsched.schedule import Schedule, Slot
from hetsched.store import Store
from hetsched.system import System
from hetsched.target import Target
from hetsched.tasks import Task, TaskGraph, beside, replay


def here(*names: str) -> list[Device]:
    return [load(Target, name.partition(":")[0]).device(name) for name in names]


@pytest.mark.parametrize("names", [("cpu:0",), ("reference",), ("reference", "cpu:0")])
def test_overheads_are_measured_once(
    names: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "profile.sqlite")
    first = overheads(here(*names), store)
    assert first.call > 0
    assert list(first.launch) == list(names)
    assert min(first.launch.values()) >= 0
    assert (first.start > 0) == (len({device.unit for device in here(*names)}) > 1)
    monkeypatch.setattr(module, "_measured", None)
    assert overheads(here(*names), store) == first


def test_what_parts_take_is_no_overhead() -> None:
    """Of units side by side, the one that is busy for longest; else the other's time counts."""
    steps = [Step(name, Device(device, "none"), (), ()) for name, device in ("ap", "bq", "cq")]
    slots = (Slot("a", "p", 1.0, 4.0), Slot("b", "q", 1.5, 2.5), Slot("c", "q", 3.0, 7.0))
    assert module._busiest_seconds(steps, Schedule(slots)) == 5.0


def system() -> System:
    devices = (Device("p", "none", launch_seconds=1.0), Device("q", "none", launch_seconds=1.0))
    links = (Link("p", "q", 0.5, inf), Link("q", "p", 0.5, inf))
    return System("small", devices, links, 10.0, 20.0, 1e9)


def chain() -> Graph:
    build = Builder()
    x = build.op("Relu", build.input("x", 4), name="first")
    return build.graph(build.op("Softmax", x, name="second"))


def test_a_prediction_begins_when_the_devices_do() -> None:
    graph = chain()
    seconds = {group.name: {"p": 2.0, "q": 3.0} for group in graph.groups}
    costs = Prices("by hand", seconds, {group.name: {} for group in graph.groups})
    names = [group.name for group in graph.groups]

    def plan(*places: str):  # type: ignore[no-untyped-def]
        return make_plan(graph, system(), costs, dict(zip(names, places, strict=True)), names, "")

    alone = simulate(plan("p", "p"))
    # The call, one launch and both kernels.
    assert (alone.slots[0].start, alone.makespan) == (10.0, 10 + 1 + 2 + 2)
    both = simulate(plan("p", "q"))
    assert (both.slots[0].start, both.makespan) == (20.0, 20 + (1 + 2) + 0.5 + (1 + 3))
    assert both.transfers[0].start == 23.0
    assert read_recipe(plan("p", "q").to_json()).simulate() == both


def test_a_machine_file_has_the_overheads(tmp_path: Path) -> None:
    path = tmp_path / "machine.toml"
    path.write_text(system().to_toml())
    assert System.load(path) == system()
    assert "run_seconds" not in replace(system(), run_seconds=0.0).to_toml()
    path.write_text("start_seconds = -1\n" + system().to_toml().replace("start_seconds = 20.0", ""))
    with pytest.raises(DeviceError, match="'start_seconds' is -1; it must not be negative"):
        System.load(path)


def test_devices_share_what_memory_gives() -> None:
    devices = tuple(Device(name, "none", cache_nbytes=(10,)) for name in "pq")
    machine = System("small", devices, (), bytes_per_second=40.0)
    tasks = TaskGraph(machine, (Task("a", {"p": 2.0}, 60.0), Task("b", {"q": 1.0}, 30.0)), ())
    places = {"a": "p", "b": "q"}
    schedule = replay(tasks, places, ["a", "b"])
    # Both ask for 30 bytes a second, together 1.5 x 40, for as long as b runs.
    slowed = beside(tasks, schedule).task
    assert (slowed["a"].seconds["p"], slowed["b"].seconds["q"]) == (2.5, 1.5)
    # Caches that hold it all leave nothing to ask for.
    roomy = tuple(replace(device, cache_nbytes=(90,)) for device in devices)
    held = replace(tasks, system=replace(machine, devices=roomy))
    assert beside(held, schedule).task["a"].seconds["p"] == 2.0
    # Without a limit nothing changes.
    assert beside(
        replace(tasks, system=replace(machine, bytes_per_second=inf)), schedule
    ).tasks == (tasks.tasks)


def test_devices_that_compute_at_once_take_longer() -> None:
    """By the system's factor, for as long as the other computes too."""
    devices = tuple(Device(name, "none") for name in "pqr")
    machine = System("small", devices, (), slowdown=1.5)
    rows = (Task("a", {"p": 4.0}), Task("b", {"q": 2.0}), Task("c", {"r": 1.0}))
    tasks = TaskGraph(machine, rows, ())
    places = {"a": "p", "b": "q", "c": "r"}
    slowed = beside(tasks, replay(tasks, places, list(places))).task
    # All three for a second, and two for another one: each other device is half of all others.
    assert slowed["a"].seconds["p"] == 4 + 0.25 + 0.5
    assert slowed["b"].seconds["q"] == 2 + 0.25 + 0.5
    assert slowed["c"].seconds["r"] == 1 + 0.5
    apart = tuple(replace(device, memory_space=device.name) for device in devices)
    elsewhere = replace(tasks, system=replace(machine, devices=apart))
    assert beside(elsewhere, replay(tasks, places, list(places))).task["a"].seconds["p"] == 4.0


def test_a_slowdown_speeds_nothing_up() -> None:
    with pytest.raises(DeviceError, match=r"'slowdown' is 0\.5; it must be a number from 1 on"):
        replace(system(), slowdown=0.5)
    assert "slowdown" not in system().to_toml()
    slowed = replace(system(), slowdown=1.25)
    assert System.from_dict(slowed.to_dict()) == slowed


def test_a_small_run_is_called_sooner() -> None:
    """What runs parts is still near; behind large ones it comes from far, and no further."""
    warm = replace(system(), warm_share=0.25)
    half = module.DISPLACED_NBYTES / 2
    told = [warm.beside_parts(1, nbytes) for nbytes in (0, half, 2 * half, 4 * half, 400 * half)]
    assert told == [2.5, 6.25, 10.0, 17.5, 17.5]
    assert warm.beside_parts(2, 0) == 5.0
    # A machine file that does not say so has one number.
    assert system().beside_parts(1, 0) == system().beside_parts(1, 1e12) == 10.0
    with pytest.raises(DeviceError, match="'warm_share' is 2; it must be from 0 to 1"):
        replace(system(), warm_share=2)
