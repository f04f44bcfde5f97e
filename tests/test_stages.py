"""Stages and cuts against brute force, and what a steady pipeline does against its price."""

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import combinations, groupby, product
from math import inf

import numpy as np
import pytest

from bench.stages import all_pipelines, bottleneck, chained, drawn, placed, small_cuts
from hetsched.device import Device, Link
from hetsched.errors import InfeasiblePlan
from hetsched.objective import seconds_a_request
from hetsched.partitioners.layerwise import fastest_pipeline, named, shortest_run
from hetsched.plan import Recipe
from hetsched.stages import annealing, pipeline
from hetsched.stages.pipeline import fastest
from hetsched.stages.relaxation import NEAR, Relaxation
from hetsched.stages.serial import cheapest, fits, in_runs, minimum_cut, serial_seconds
from hetsched.stages.traffic import Traffic
from hetsched.stream import stream
from hetsched.system import System
from hetsched.tasks import Edge, Task, TaskGraph


def alike(rng: random.Random, most: int = 5) -> TaskGraph:
    """Devices of one kind, which nothing tells apart, and one of another."""
    found = drawn(rng, most, 1)
    one = found.system.devices[0]
    devices = tuple(replace(one, name=name, cores=()) for name in "abc")
    devices += (replace(one, name="other", cores=(), memory_bytes=inf),)
    links = [Link(a.name, b.name, 0.25, 50.0) for a in devices for b in devices if a != b]
    tasks = [
        replace(
            task,
            seconds=dict.fromkeys("abc", min(task.seconds.values()))
            | {"other": rng.uniform(0.1, 9)},
        )
        for task in found.tasks
    ]
    return TaskGraph(System("alike", devices, tuple(links)), tuple(tasks), found.edges)


# Pipelines.


@pytest.mark.parametrize(
    "shape",
    [partial(chained, most=8, devices=3), partial(drawn, most=5, devices=4), alike],
    ids=["chain", "graph", "alike"],
)
def test_a_pipeline_is_as_fast_as_the_best_of_all(
    shape: Callable[[random.Random], TaskGraph],
) -> None:
    feasible = 0
    for seed in range(40):
        tasks = shape(random.Random(seed))
        best = min((bottleneck(tasks, each) for each in all_pipelines(tasks)), default=inf)
        if best == inf:
            with pytest.raises(InfeasiblePlan, match="they hold"):
                fastest_pipeline(tasks)
            continue
        feasible += 1
        found = fastest_pipeline(tasks)
        stages = placed(tasks, found.stages)
        assert len({device.unit for device, _ in stages}) == len(stages)
        assert bottleneck(tasks, stages) == pytest.approx(best, rel=1e-9)
        assert found.seconds == pytest.approx(best, rel=1e-9)
        assert found.optimal
        assert found.bound <= best * (1 + 1e-9)
    assert feasible >= 20


def stage_seconds(tasks: TaskGraph, device: Device, members: list[str]) -> float:
    return device.launch_seconds + sum(tasks.task[name].seconds[device.name] for name in members)


def test_stages_may_be_few_long_and_worth_it() -> None:
    checked = 0
    for seed in range(60):
        rng = random.Random(seed)
        tasks = drawn(rng, 5, 3)
        most, least = rng.randint(1, 2), rng.choice([0.0, 2.0, 5.0])
        costs = [
            bottleneck(tasks, each)
            for each in all_pipelines(tasks)
            if len(each) <= most
            and (len(each) == 1 or min(stage_seconds(tasks, *stage) for stage in each) >= least)
        ]
        if min(costs, default=inf) == inf:
            with pytest.raises(InfeasiblePlan):
                fastest_pipeline(tasks, most, least)
            continue
        checked += 1
        assert fastest_pipeline(tasks, most, least).seconds == pytest.approx(min(costs), rel=1e-9)
    assert checked >= 30


def two(links: str = "pq qp") -> System:
    return System(
        "two",
        (Device("p", "none"), Device("q", "none")),
        tuple(Link(a, b, 0.0, 1.0) for a, b in links.split()),
    )


def test_a_further_stage_has_to_gain() -> None:
    tasks = TaskGraph(
        two(),
        (Task("a", {"p": 6.0, "q": 6.0}), Task("b", {"p": 4.0, "q": 4.0})),
        (Edge("a", "b", 1, "x"),),
    )
    assert len(fastest_pipeline(tasks, gain=0.3).stages) == 2
    assert len(fastest_pipeline(tasks, gain=0.5).stages) == 1
    assert fastest_pipeline(tasks).seconds == 6.0


def test_of_equal_bottlenecks_the_pipeline_with_less_work() -> None:
    """One task sets the pace; then the rest stays where it is cheap, without a transfer more."""
    tasks = TaskGraph(
        two(),
        (
            Task("a", {"p": 9.0, "q": 99.0}),
            Task("b", {"p": 5.0, "q": 2.0}),
            Task("c", {"p": 5.0, "q": 3.0}),
        ),
        (Edge("a", "b", 4, "x"), Edge("b", "c", 1, "y")),
    )
    assert named(tasks, fastest_pipeline(tasks)) == [("p", ("a",)), ("q", ("b", "c"))]


def test_a_tensor_over_a_stage_counts_on_its_own_link() -> None:
    """The first of three stages is read by the last: that link, not the ones between, is slow."""
    devices = tuple(Device(name, "none") for name in "pqr")
    rates = {("p", "r"): 0.1}
    links = tuple(
        Link(a.name, b.name, 0.0, rates.get((a.name, b.name), 10.0))
        for a in devices
        for b in devices
        if a != b
    )
    only = {"a": "p", "b": "q", "c": "r"}
    tasks = TaskGraph(
        System("three", devices, links),
        tuple(Task(name, {device: 1.0}) for name, device in only.items()),
        (Edge("a", "b", 1, "x"), Edge("b", "c", 1, "y"), Edge("a", "c", 1, "x")),
    )
    assert fastest_pipeline(tasks).seconds == pytest.approx(10.0)


def grid(rng: random.Random, count: int, width: int) -> TaskGraph:
    """Wide graphs, whose borders are too many to list."""
    devices = tuple(Device(f"d{index}", "none") for index in range(3))
    links = tuple(Link(a.name, b.name, 0.0, 10.0) for a in devices for b in devices if a != b)
    tasks = tuple(
        Task(f"t{index}", {d.name: rng.uniform(0.5, 1.5) * (1 + i) for i, d in enumerate(devices)})
        for index in range(count)
    )
    edges = tuple(
        Edge(
            f"t{index - width + shift}", f"t{index}", rng.randint(0, 3), f"x{index - width + shift}"
        )
        for index in range(width, count)
        for shift in (0, 1)
        if index - width + shift < index
    )
    return TaskGraph(System("grid", devices, links), tasks, edges)


def test_with_too_many_borders_the_bound_holds_and_is_near(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for seed in range(4):
        tasks = grid(random.Random(seed), 16, 4)
        traffic = Traffic.of(tasks)
        exact = fastest(traffic)
        monkeypatch.setattr(pipeline._Solver, "all_borders", lambda _: np.zeros((0, 1)))
        rough = fastest(traffic)
        monkeypatch.undo()
        assert exact is not None
        assert exact.optimal
        assert rough is not None
        stages = placed(tasks, rough.stages)
        assert bottleneck(tasks, stages) == pytest.approx(rough.seconds, rel=1e-9)
        assert rough.bound <= exact.seconds * (1 + 1e-9)
        assert exact.seconds <= rough.seconds * (1 + 1e-9)
        assert rough.seconds <= 1.1 * exact.seconds
        assert rough.bound >= 0.8 * exact.seconds


def work_of_busiest(
    traffic: Traffic, found: list[float], devices: tuple[int, ...], stage: np.ndarray
) -> float:
    """The least of all that are found, this one among them."""
    for source, sinks in enumerate(traffic.successors):
        assert all(stage[source] <= stage[sink] for sink in sinks)
    seconds = traffic.seconds[np.arange(traffic.count), np.array(devices)[stage]]
    found.append(float(np.bincount(stage, seconds).max()))
    return min(found)


def test_branch_and_bound_comes_to_the_best_of_all() -> None:
    for seed in range(12):
        tasks = grid(random.Random(seed), 9, 3)
        # Without transfers, which the relaxation leaves out.
        tasks = TaskGraph(
            tasks.system, tasks.tasks, tuple(replace(e, nbytes=0) for e in tasks.edges)
        )
        traffic = Traffic.of(tasks)
        best = min(bottleneck(tasks, each) for each in all_pipelines(tasks))
        found: list[float] = []
        relaxation = Relaxation(traffic, 0, partial(work_of_busiest, traffic, found))
        relaxation.go_on(inf, 1e6, branching=False)
        assert relaxation.bound <= best * (1 + 1e-9)
        relaxation.go_on(min(found), 1e7, branching=True)
        assert relaxation.bound <= best * (1 + 1e-9)
        assert best <= min(found) * (1 + 1e-9)
        assert min(found) <= relaxation.bound * NEAR**2


def taken(traffic: Traffic, devices: tuple[int, ...], stage: np.ndarray) -> float:
    """Seconds of the pipeline of (n) stages on devices; infinite if it cannot be."""
    if np.isinf(traffic.seconds[np.arange(traffic.count), np.array(devices)[stage]]).any():
        return inf
    parts = [(device, np.flatnonzero(stage == index)) for index, device in enumerate(devices)]
    stages = [(device, tuple(map(int, part))) for device, part in parts if len(part)]
    return bottleneck(traffic.tasks, placed(traffic.tasks, stages))


def test_annealing_counts_what_a_pipeline_takes_and_never_ends_with_more() -> None:
    better, seen = 0, 0
    for seed in range(60):
        rng = random.Random(seed)
        tasks = drawn(rng, 8, 3)
        traffic = Traffic.of(tasks)
        solver = pipeline._Solver(traffic, 0, 0.0)
        devices = tuple(rng.sample(range(3), 3))
        stage = np.array([rng.randint(0, 2) for _ in range(traffic.count)])
        for source, sinks in enumerate(traffic.successors):
            stage[list(sinks)] = np.maximum(stage[list(sinks)], stage[source])
        if len(set(traffic.unit)) < 3 or taken(traffic, devices, stage) == inf:
            continue
        seen += 1
        found = annealing.annealed(
            traffic, solver.flow, devices, stage, np.full(3, 1 / 3), 3000, seed
        )
        assert taken(traffic, devices, found) <= taken(traffic, devices, stage) * (1 + 1e-9)
        better += taken(traffic, devices, found) < taken(traffic, devices, stage)
        # Moved to there one by one, or put there at once.
        flow = solver.flow
        board = annealing._board(traffic, flow, devices)
        launch = traffic.launch[list(devices)]
        moved = annealing._placed(board, launch, stage)
        for task in range(traffic.count):
            annealing._shift(board, moved, task, int(stage[task]), int(found[task]))
        at_once = annealing._placed(board, launch, found)
        for one, other in zip(moved, at_once, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-9)
        if set(found) == {0, 1, 2}:
            assert annealing._bottleneck(at_once) == pytest.approx(taken(traffic, devices, found))
    assert seen >= 10
    assert better >= 5


# One stage after the other.


def total(tasks: TaskGraph, device: list[Device]) -> float:
    """Of a placement in the tasks' order, as `shortest_run` says."""
    seconds = device[0].launch_seconds
    for task, where in zip(tasks.tasks, device, strict=True):
        seconds += task.seconds.get(where.name, inf)
    first: set[str] = set()
    for index, where in enumerate(device):
        name = tasks.tasks[index].name
        for edge in tasks.incoming[name]:
            if edge.source is None and edge.tensor not in first:
                seconds += tasks.transfer_seconds(edge.nbytes, None, where.name)
            if edge.source is None:
                first.add(edge.tensor)
                if tasks.transfer_seconds(0, None, where.name) == inf:
                    return inf
        back = {e.tensor: e for e in tasks.outgoing[name] if e.sink is None}
        seconds += sum(tasks.transfer_seconds(e.nbytes, where.name, None) for e in back.values())
    position = {task.name: index for index, task in enumerate(tasks.tasks)}
    for cut in range(1, len(device)):
        before, behind = device[cut - 1], device[cut]
        if before != behind:
            seconds += behind.launch_seconds
            crossing = {
                (e.source, e.tensor): e.nbytes
                for e in tasks.edges
                if e.source and e.sink and position[e.source] < cut <= position[e.sink]
            }
            seconds += sum(
                tasks.transfer_seconds(nbytes, before.name, behind.name)
                for nbytes in crossing.values()
            )
    return seconds


def holds(tasks: TaskGraph, device: list[Device]) -> bool:
    return all(
        sum(t.memory_bytes for t, d in zip(tasks.tasks, device, strict=True) if d == each)
        <= each.memory_bytes
        for each in tasks.system.devices
    )


@pytest.mark.parametrize(
    "shape",
    [partial(chained, most=6, devices=3), partial(drawn, most=6, devices=3)],
    ids=["chain", "graph"],
)
def test_shortest_run_is_as_short_as_the_shortest_of_all(
    shape: Callable[[random.Random], TaskGraph],
) -> None:
    feasible = 0
    for seed in range(60):
        tasks = shape(random.Random(seed))
        devices = tuple(replace(device, memory_bytes=inf) for device in tasks.system.devices)
        tasks = TaskGraph(replace(tasks.system, devices=devices), tasks.tasks, tasks.edges)
        best = min(total(tasks, list(each)) for each in product(devices, repeat=len(tasks.tasks)))
        if best == inf:
            with pytest.raises(InfeasiblePlan):
                shortest_run(tasks)
            continue
        feasible += 1
        assert total(tasks, found_run(tasks)) <= best * (1 + 1e-9)
    assert feasible >= 40


def found_run(tasks: TaskGraph) -> list[Device]:
    """The device of each task."""
    where = {name: device for device, members in shortest_run(tasks) for name in members}
    return [tasks.system.device(where[task.name]) for task in tasks.tasks]


def test_where_memory_is_short_another_run_is_found() -> None:
    """Wherever one fits; mostly the shortest of those."""
    ratios = []
    for seed in range(60):
        tasks = chained(random.Random(seed), 6, 3)
        held = sum(task.memory_bytes for task in tasks.tasks)
        devices = tuple(replace(device, memory_bytes=0.6 * held) for device in tasks.system.devices)
        tasks = TaskGraph(replace(tasks.system, devices=devices), tasks.tasks, tasks.edges)
        every = [list(each) for each in product(devices, repeat=len(tasks.tasks))]
        fitting = min((total(tasks, each) for each in every if holds(tasks, each)), default=inf)
        if fitting == inf:
            with pytest.raises(InfeasiblePlan, match="MiB"):
                shortest_run(tasks)
            continue
        found = found_run(tasks)
        assert holds(tasks, found)
        ratios.append(total(tasks, found) / fitting)
    assert len(ratios) >= 30
    assert min(ratios) >= 1 - 1e-9
    assert float(np.mean(ratios)) <= 1.02


# Cuts.


def every_placement(tasks: TaskGraph) -> Iterator[dict[str, str]]:
    names = [device.name for device in tasks.system.devices]
    for each in product(names, repeat=len(tasks.tasks)):
        yield dict(zip((task.name for task in tasks.tasks), each, strict=True))


def in_turn(tasks: TaskGraph, placement: dict[str, str]) -> float:
    """Work and transfers, one after the other, each tensor once to a device."""
    seconds = sum(t.seconds.get(placement[t.name], inf) for t in tasks.tasks)
    moves = {
        (
            edge.source,
            edge.tensor,
            placement[edge.sink] if edge.sink else None,
        ): tasks.transfer_seconds(
            edge.nbytes,
            placement[edge.source] if edge.source else None,
            placement[edge.sink] if edge.sink else None,
        )
        for edge in tasks.edges
    }
    return seconds + sum(moves.values())


def goes_back(tasks: TaskGraph, placement: dict[str, str]) -> bool:
    first, last = (device.name for device in tasks.system.devices)
    return any(
        (placement[e.source], placement[e.sink]) == (last, first)
        for e in tasks.edges
        if e.source and e.sink
    )


@pytest.mark.parametrize(("devices", "seeds"), [(2, 150), (3, 25)])
def test_a_cut_is_as_cheap_as_the_cheapest_of_all(devices: int, seeds: int) -> None:
    feasible = short = 0
    for seed in range(seeds):
        rng = random.Random(seed)
        tasks = drawn(rng, 8 if devices == 2 else 5, devices)
        back = devices > 2 or rng.random() < 0.6
        costs = [
            (in_turn(tasks, each), holds(tasks, [tasks.system.device(d) for d in each.values()]))
            for each in every_placement(tasks)
            if back or not goes_back(tasks, each)
        ]
        best = min((cost for cost, fitting in costs if fitting), default=inf)
        traffic = Traffic.of(tasks)
        if best == inf:
            with pytest.raises(InfeasiblePlan):
                cheapest(traffic, back)
            continue
        feasible += 1
        short += min(costs)[0] < best
        found = cheapest(traffic, back)
        assert fits(traffic, found.device)
        names = traffic.devices
        where = {t.name: names[d] for t, d in zip(tasks.tasks, found.device, strict=True)}
        assert back or not goes_back(tasks, where)
        assert in_turn(tasks, where) == pytest.approx(best, rel=1e-9, abs=1e-9)
        assert found.seconds == pytest.approx(best, rel=1e-9, abs=1e-9)
        assert found.optimal
    assert feasible >= seeds // 2
    assert short >= (5 if devices == 2 else 1)


def test_a_tensor_with_many_readers_is_sent_once() -> None:
    """Three readers on the fast device: all together they pay for one transfer, not for three."""
    tasks = TaskGraph(
        two(),
        (
            Task("a", {"p": 1.0}),
            *(Task(name, {"p": 3.0, "q": 1.0}) for name in "bcd"),
        ),
        tuple(Edge("a", name, 4, "x") for name in "bcd"),
    )
    traffic = Traffic.of(tasks)
    cut = minimum_cut(traffic)
    assert cut is not None
    assert cut.tolist() == [0, 1, 1, 1]
    assert serial_seconds(traffic, cut) == 8.0


def test_runs_stay_on_a_device_while_they_can() -> None:
    tasks = TaskGraph(
        two(),
        tuple(Task(name, {"p": 1.0, "q": 1.0}) for name in "abcd"),
        (Edge("a", "c", 1, "x"), Edge("b", "d", 1, "y")),
    )
    assert in_runs(Traffic.of(tasks), np.array([0, 1, 0, 1])) == [0, 2, 1, 3]


def test_cuts_are_those_of_brute_force() -> None:
    assert small_cuts(seed=1, count=200)["equal"] == 200


# Many requests.


def recipe(tasks: TaskGraph, device: list[int]) -> Recipe:
    """A placement in runs of one device."""
    names = [each.name for each in tasks.system.devices]
    order = in_runs(Traffic.of(tasks), np.array(device))
    runs = [
        (names[place], tuple(tasks.tasks[task].name for task in members))
        for place, members in groupby(order, key=lambda task: device[task])
    ]
    parts = tuple((f"part{i}", name, members) for i, (name, members) in enumerate(runs))
    return Recipe(tasks, {}, parts, {name: "" for name, _, _ in parts})


def test_many_requests_take_what_the_busiest_unit_or_link_needs() -> None:
    """For plans of any kind, whose parts come back to a device too."""
    checked = several = 0
    for seed in range(120):
        rng = random.Random(seed)
        tasks = drawn(rng, 6, 3)
        plan = recipe(tasks, [rng.randrange(3) for _ in tasks.tasks])
        try:
            pace = seconds_a_request([plan.simulate()], tasks.system)
        except (InfeasiblePlan, KeyError):
            continue
        checked += 1
        several += len(plan.parts) > len({device for _, device, _ in plan.parts})
        some, more = (stream(plan, requests).makespan for requests in (20, 60))
        assert (more - some) / 40 == pytest.approx(pace, rel=0.02)
        alone = stream(plan, 3, in_flight=1)
        assert alone.makespan >= 3 * plan.simulate().makespan * (1 - 1e-9)
        assert len(alone.slots) == 3 * len(plan.parts)
        for one, other in combinations(alone.slots, 2):
            units = {tasks.system.device(slot.device).unit for slot in (one, other)}
            assert (
                len(units) == 2
                or one.finish <= other.start + 1e-12
                or other.finish <= one.start + 1e-12
            )
    assert checked >= 15
    assert several >= 5


def test_a_stream_by_hand() -> None:
    """Two stages of 2 and 3 seconds with a transfer of 1: a result every 3 seconds."""
    tasks = TaskGraph(
        two(),
        (Task("a", {"p": 2.0}), Task("b", {"q": 3.0})),
        (Edge("a", "b", 1, "x"),),
    )
    schedule = stream(recipe(tasks, [0, 1]), 3)
    times = {slot.task: (slot.start, slot.finish) for slot in schedule.slots}
    assert times == {
        "part0 of 0": (0.0, 2.0),
        "part0 of 1": (2.0, 4.0),
        "part0 of 2": (4.0, 6.0),
        "part1 of 0": (3.0, 6.0),
        "part1 of 1": (6.0, 9.0),
        "part1 of 2": (9.0, 12.0),
    }
    assert stream(recipe(tasks, [0, 1]), 3, in_flight=1).makespan == 18.0
