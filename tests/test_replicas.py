"""Stages on several devices, which take requests in turn: chosen, simulated, kept and run."""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from math import inf
from pathlib import Path

import numpy as np
import pytest

import hetsched
from bench.overlap import layered
from bench.stages import chained, drawn
from hetsched import api
from hetsched.api import priced
from hetsched.bounds import throughput_bound
from hetsched.contest import LEAST_RUNS, REQUESTS, paces
from hetsched.device import Device, Link
from hetsched.errors import InfeasiblePlan, InputError, PartError, PlanError
from hetsched.graph import Graph
from hetsched.host import cores
from hetsched.objective import objective
from hetsched.partitioners.layerwise import Stage, fastest_pipeline, fastest_together, pace
from hetsched.plan import Plan, Recipe, make_plan, read_recipe
from hetsched.problem import Problem
from hetsched.stages.pipeline import Pipeline
from hetsched.stages.replicas import Team, ring, teams
from hetsched.stream import stream
from hetsched.system import System
from hetsched.tasks import Edge, Task, TaskGraph
from hetsched.verify import verify

NAMES = "abc"
TWO_CORES = pytest.mark.skipif(len(cores()) < 2, reason="this machine has one core")


def machine(count: int, seconds: float = 0.25, memory_bytes: float = inf) -> System:
    devices = tuple(Device(name, "cpu", memory_bytes=memory_bytes) for name in NAMES[:count])
    links = tuple(Link(a.name, b.name, seconds, 50.0) for a in devices for b in devices if a != b)
    return System("alike", devices, links)


def chain(seconds: Sequence[float], system: System, memory_bytes: float = 0.0) -> TaskGraph:
    names = [device.name for device in system.devices]
    tasks = tuple(
        Task(f"t{i}", dict.fromkeys(names, each), memory_bytes) for i, each in enumerate(seconds)
    )
    edges = tuple(Edge(f"t{i - 1}", f"t{i}", 5, f"x{i}") for i in range(1, len(tasks)))
    return TaskGraph(system, tasks, edges)


def together(tasks: TaskGraph) -> tuple[Pipeline, list[Stage], list[Team]]:
    return fastest_together(tasks, fastest_pipeline(tasks))


def all_ways(count: int, devices: Sequence[str]) -> Iterator[list[tuple[tuple[str, ...], int]]]:
    """Every pipeline of a chain: the devices of each stage, and the tasks before its end."""

    def further(begin: int, left: Sequence[str]) -> Iterator[list[tuple[tuple[str, ...], int]]]:
        if begin == count:
            yield []
        for end in range(begin + 1, count + 1):
            for size in range(1, len(left) + 1):
                for own in combinations(left, size):
                    rest = [name for name in left if name not in own]
                    yield from ([(own, end), *more] for more in further(end, rest))

    yield from further(0, devices)


def test_replicas_are_as_fast_as_the_best_of_all() -> None:
    """Chains on devices that are alike, whose memory holds all of them or only some."""
    replicated = 0
    for seed in range(30):
        rng = random.Random(seed)
        count = rng.randint(2, 5)
        system = machine(3, rng.choice([0.0, 0.25, 2.0]), rng.choice([inf, 2.0, 3.0]))
        tasks = chain([rng.uniform(0.5, 5) for _ in range(count)], system, 1.0)
        best = inf
        for way in all_ways(count, NAMES):
            begins = [0, *(end for _, end in way)]
            stages = [
                (own[0], tuple(f"t{i}" for i in range(begin, end)))
                for begin, (own, end) in zip(begins, way, strict=False)
            ]
            try:
                best = min(best, pace(tasks, stages, [own for own, _ in way]))
            except InfeasiblePlan:
                continue
        if best == inf:
            with pytest.raises(InfeasiblePlan):
                together(tasks)
            continue
        found, stages, rings = together(tasks)
        # Fewer stages are preferred to what is hardly better.
        assert best * (1 - 1e-9) <= found.seconds <= best * 1.02
        assert found.seconds == pytest.approx(pace(tasks, stages, rings))
        assert found.bound <= best * (1 + 1e-9)
        assert fastest_pipeline(tasks).seconds >= found.seconds * 0.98
        replicated += any(len(ring) > 1 for ring in rings)
    assert replicated >= 15


@pytest.mark.parametrize("shape", [chained, drawn])
def test_unlike_devices_are_never_worse_with_replicas(shape: object) -> None:
    replicated = 0
    for seed in range(40):
        tasks = shape(random.Random(seed), 5, 3)  # type: ignore[operator]
        try:
            alone = fastest_pipeline(tasks)
        except InfeasiblePlan:
            continue
        found, stages, rings = together(tasks)
        assert found.seconds <= alone.seconds * 1.03
        assert found.bound <= found.seconds
        assert found.seconds >= throughput_bound(Problem.of(tasks)).seconds * (1 - 1e-9)
        units = [tasks.system.device(name).unit for ring in rings for name in dict.fromkeys(ring)]
        assert len(set(units)) == len(units)
        assert sorted(name for _, members in stages for name in members) == sorted(tasks.task)
        replicated += any(len(ring) > 1 for ring in rings)
    assert replicated >= 3


def test_a_heavy_stage_has_two_of_three_devices() -> None:
    """By hand: no device holds both tasks, so that replicas of the whole cannot be."""
    tasks = chain([2.0, 4.0], machine(3, 0.0, 1.0), 1.0)
    found, stages, rings = together(tasks)
    assert stages == [("c", ("t0",)), ("a", ("t1",))]
    assert rings == [("c",), ("a", "b")]
    assert found.seconds == 2.0
    schedule = stream(recipe(tasks, stages, rings), 5)
    second = {slot.task: (slot.device, slot.start) for slot in schedule.slots}
    assert [second[f"part1 of {i}"][0] for i in range(5)] == ["a", "b", "a", "b", "a"]
    assert [second[f"part1 of {i}"][1] for i in range(5)] == pytest.approx(
        [2.1 + 2.0 * i for i in range(5)]
    )


def test_who_is_faster_takes_more_requests() -> None:
    system = machine(2)
    tasks = TaskGraph(system, (Task("t0", {"a": 3.0, "b": 1.0}),), ())
    assert ring(tasks, ("a", "b"), ["t0"]) == ("b", "b", "a", "b")
    _, stages, rings = together(tasks)
    assert stages == [("b", ("t0",))]
    assert rings == [("b", "b", "b", "a")]
    assert pace(tasks, stages, rings) == pytest.approx(3 / 4)
    # One that is too slow to gain anything has no turn.
    slow = TaskGraph(system, (Task("t0", {"a": 30.0, "b": 1.0}),), ())
    assert ring(slow, ("a", "b"), ["t0"]) == ("b",)


def test_units_that_are_alike_make_few_teams() -> None:
    found = [way.teams for way in teams(chain([1.0], machine(3)))]
    assert found == [(("a", "b", "c"),), (("a", "b"), ("c",))]
    assert [way.teams for way in teams(chain([1.0], machine(3)), 2)] == [(("a", "b"), ("c",))]


def recipe(tasks: TaskGraph, stages: Sequence[tuple[str, Sequence[str]]], rings: object) -> Recipe:
    parts = tuple((f"part{i}", name, tuple(names)) for i, (name, names) in enumerate(stages))
    replicas = {each[0]: each for each in rings if len(each) > 1}  # type: ignore[attr-defined]
    return Recipe(tasks, {}, parts, {name: "" for name, _, _ in parts}, {}, replicas)


def test_many_requests_take_what_the_busiest_unit_or_link_needs() -> None:
    checked = 0
    for seed in range(60):
        rng = random.Random(seed)
        tasks = drawn(rng, 6, 3)
        try:
            _, stages, rings = together(tasks)
        except InfeasiblePlan:
            continue
        if all(len(each) == 1 for each in rings):
            continue
        checked += 1
        plan = recipe(tasks, stages, rings)
        some, more = (stream(plan, requests).makespan for requests in (48, 144))
        assert (more - some) / 96 == pytest.approx(pace(tasks, stages, rings), rel=0.02)
    assert checked >= 5


# Plans.


@pytest.fixture(scope="module")
def graph() -> Graph:
    return hetsched.read_onnx(layered(["chain"], 3, 16))


def replicated(graph: Graph, system: System, ring: tuple[str, ...], last: str = "") -> Plan:
    """All on the first device of the ring, or the last group on a device of its own."""
    order = [group.name for group in graph.groups]
    placement = dict.fromkeys(order, ring[0]) | ({order[-1]: last} if last else {})
    prices = priced(graph, system, "roofline")
    return make_plan(graph, system, prices, placement, order, "test", replicas={ring[0]: ring})


def test_a_plan_keeps_its_replicas(graph: Graph) -> None:
    plan = replicated(graph, machine(3), ("a", "b", "a"), "c")
    again = Plan.from_json(plan.to_json(), graph)
    assert again.replicas == plan.replicas == {"a": ("a", "b", "a")}
    assert again.to_json() == plan.to_json()
    assert plan.devices == ("a", "b", "c")
    assert [(part.name, part.device.name) for part in plan.copies] == [
        ("part0", "a"),
        ("part1", "c"),
        ("part0", "b"),
    ]
    held = plan.memory_bytes()
    assert held["a"] == held["b"] > held["c"] > 0
    turns = read_recipe(plan.to_json()).turns
    assert [turn.parts[0][1] for turn in turns] == ["a", "b", "a"]
    first, second = (slot.seconds for slot in turns[0].simulate().slots)
    # The first device, and its link, have two of three requests.
    value = objective("throughput").value(plan)
    assert value == pytest.approx(max(second, max(first, 0.25 + 1024 / 50) * 2 / 3))


def test_replicas_that_cannot_be(graph: Graph) -> None:
    system = machine(3)
    plan = replicated(graph, system, ("a", "b"))
    for replicas, reason in [
        ({"a": ("b", "a")}, "is not the first of its replicas"),
        ({"c": ("c", "b")}, "'c' has no parts"),
        ({"a": ("a", *"b" * 16)}, "more than 16 requests"),
    ]:
        with pytest.raises(PlanError, match=reason):
            replace(plan, replicas=replicas)
    other = replicated(graph, system, ("a", "b"), "c")
    with pytest.raises(PlanError, match="'c' would run parts of 'a' and of 'c'"):
        replace(other, replicas={"a": ("a", "c")})
    seconds = {name: {"a": 1.0, "c": 1.0} for name in plan.prices.seconds}
    with pytest.raises(PlanError, match="has replicas on 'b', where it has no price"):
        replace(plan, prices=replace(plan.prices, seconds=seconds))
    text = plan.to_json()
    for wrong in ('"replicas": {"a": ["a", "z"]}', '"replicas": {"a": []}', '"replicas": [1]'):
        damaged = text.replace('"replicas": {\n  "a": [\n   "a",\n   "b"\n  ]\n }', wrong)
        assert damaged != text
        with pytest.raises(PlanError):
            Plan.from_json(damaged, graph)
    small = replace(system.devices[1], memory_bytes=1.0)
    tight = replace(system, devices=(system.devices[0], small, system.devices[2]))
    with pytest.raises(InfeasiblePlan, match="'b' would hold"):
        replicated(graph, tight, ("a", "b"))


@TWO_CORES
def test_replicas_run_and_keep_the_order(graph: Graph, tmp_path: Path) -> None:
    system = System.local("cpu:0,cpu:1")
    plan = replicated(graph, system, ("cpu:0", "cpu:1"))
    (name,) = (tensor.name for tensor in graph.inputs)
    (shape,) = (tensor.shape for tensor in graph.inputs)
    rng = np.random.default_rng(0)
    given = [{name: rng.standard_normal(shape).astype(np.float32)} for _ in range(40)]
    path = tmp_path / "replicas.hsp"
    with hetsched.compile(plan) as executable:
        verify(executable, given[0]).check()
        right = [executable.run(each) for each in given]
        executable.save(path)
    with hetsched.load(path) as executable:
        assert executable.plan.replicas == plan.replicas
        check(right, executable.map(given))
        check(right[:3], executable.map(given[:3], in_flight=1))
        assert list(executable.map([])) == []
        requests = [executable.submit(each) for each in given[:4]]
        used = [request.schedule().devices for request in requests]
        assert used in ([("cpu:0",), ("cpu:1",)] * 2, [("cpu:1",), ("cpu:0",)] * 2)


@TWO_CORES
def test_replicas_ship_only_where_they_are_faster(
    graph: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = replicated(graph, System.local("cpu:0,cpu:1"), ("cpu:0", "cpu:1"))
    plan = replace(plan, objective="throughput")
    for seconds, count in (([2.0, 1.0], 2), ([1.0, 2.0], 1)):
        monkeypatch.setattr(api, "paces", lambda *_, found=seconds: (found, 5))
        with hetsched.compile(plan, measure=True) as chosen:
            assert len(chosen.plan.devices) == count
            assert any("first quartiles of 5 runs" in note for note in chosen.plan.notes)
    monkeypatch.undo()
    monkeypatch.setattr("hetsched.contest.SECONDS", 0.0)
    with hetsched.compile(plan) as executable:
        (name,) = (tensor.name for tensor in graph.inputs)
        seconds, runs = paces([executable], {name: np.ones((16, 16), np.float32)})
        assert runs == LEAST_RUNS * REQUESTS
        assert seconds[0] > 0


def check(right: Sequence[Mapping[str, np.ndarray]], found: Iterator[dict]) -> None:
    rows = list(found)
    assert len(rows) == len(right)
    for one, other in zip(right, rows, strict=True):
        for name, array in one.items():
            np.testing.assert_array_equal(other[name], array)


def test_map_takes_inputs_as_outputs_are_taken(graph: Graph) -> None:
    """It never runs far ahead, and what one input is refused for comes at its place."""
    taken = []
    (tensor,) = graph.inputs
    x = np.ones(tensor.shape, np.float32)

    def given() -> Iterator[dict[str, np.ndarray]]:
        for index in range(100):
            taken.append(index)
            yield {tensor.name: x if index < 50 else x[:1]}

    with hetsched.compile(graph, "cpu:0", "single") as executable:
        found = executable.map(given(), in_flight=3)
        assert taken == []
        for index in range(40):
            next(found)
            assert taken[-1] == index + 2
        with pytest.raises(InputError, match="was given"):
            list(found)
        # What was in flight has ended, and others run.
        assert len(list(executable.map([{tensor.name: x}] * 5))) == 5


def test_what_failed_code_says_is_in_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from hetsched import tvm_runtime

    assert tvm_runtime.raised() == ""
    tvm_runtime._ffi.TVMFFIErrorSetRaisedFromCStr(b"ValueError", b"no room for 7 bytes\nat ...")
    assert tvm_runtime.raised() == "no room for 7 bytes"
    assert tvm_runtime.raised() == ""
    assert issubclass(PartError, hetsched.HetschedError)
