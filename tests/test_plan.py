"""Plans: every partitioner over random graphs and machines, and plan files that are damaged."""

import copy
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import networkx
import numpy as np
import pytest
from checker import Facts, violations
from graphs import Builder, Table, random_graph, random_order, random_system
from hypothesis import given, settings
from hypothesis import strategies as st

from hetsched.cost import CostModel, Prices, price
from hetsched.device import Device, Link
from hetsched.errors import (
    DeviceError,
    HetschedError,
    InfeasiblePlan,
    PlanError,
    UnsupportedOperation,
)
from hetsched.graph import Graph
from hetsched.partitioner import Partitioner
from hetsched.plan import Plan, make_plan, read_recipe, simulate
from hetsched.plugin import load, names
from hetsched.system import System

SEEDS = st.integers(0, 1 << 32).map(random.Random)
PARTITIONERS = names(Partitioner)


@pytest.fixture(autouse=True)
def imagined_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """No compiler is asked what it can do: the tests say so themselves."""
    monkeypatch.setattr("hetsched.cost.refusals", lambda parts, device: [None] * len(parts))
    monkeypatch.setattr("hetsched.sharing.search.blocks", lambda graph, devices: {})


def costs_of(rng: random.Random, graph: Graph, system: System, kind: str) -> CostModel:
    if kind == "roofline":
        return load(CostModel, "roofline")
    return Table(rng, refused=0.2).prices(graph, system)


def partitioned(name: str, graph: Graph, system: System, costs: CostModel) -> Plan | None:
    try:
        return load(Partitioner, name).partition(graph, system, costs)
    except InfeasiblePlan:
        return None


def check_plan(plan: Plan) -> None:
    graph = plan.graph
    groups = [group for part in plan.parts for group in part.groups]
    assert sorted(g.name for g in groups) == sorted(g.name for g in graph.groups)
    owner = {op.name: part.name for part in plan.parts for op in part.ops}
    assert owner.keys() == {op.name for op in graph.ops} - joining(graph)
    view = networkx.DiGraph(
        (source, sink) for source, sink, _, _ in facts_of(plan).edges if source and sink
    )
    assert networkx.is_directed_acyclic_graph(view)
    for part in plan.parts:
        for group in part.groups:
            assert plan.placement[group.name] == part.device.name
            assert part.device.name in plan.prices.seconds[group.name]
    for before, behind in zip(plan.parts, plan.parts[1:], strict=False):
        made = {tensor.name for tensor in before.outputs}
        views = {piece.name for t in behind.inputs for piece in graph.views.get(t.name, ())}
        apart = before.device != behind.device or made & views
        assert apart or behind.groups[0].name in plan.cuts
    assert violations(facts_of(plan), simulate(plan)) == []


def joining(graph: Graph) -> set[str]:
    """The operations that nobody has to run."""
    return {op.name for op in graph.ops if {t.name for t in op.writes} & set(graph.views)}


def facts_of(plan: Plan) -> Facts:
    """Of the parts, from the operations and the table of prices."""
    free = joining(plan.graph)
    owner = {op.name: part.name for part in plan.parts for op in part.ops}
    computing = [op for op in plan.graph.ops if op.name not in free]
    producer = {t.name: owner[op.name] for op in computing for t in op.writes}
    pieces = {t.name: op.reads for op in plan.graph.ops if op.name in free for t in op.writes}
    edges: dict[tuple[str | None, str | None, str, int], None] = {}
    for op in computing:
        for tensor in (t for whole in op.reads for t in pieces.get(whole.name, (whole,))):
            ends = producer.get(tensor.name), owner[op.name]
            if tensor.name not in plan.graph.constants and ends[0] != ends[1]:
                edges[*ends, tensor.name, tensor.nbytes] = None
    for whole in plan.graph.outputs:
        for tensor in pieces.get(whole.name, (whole,)):
            edges[producer[tensor.name], None, tensor.name, tensor.nbytes] = None
    devices = plan.system.devices
    return Facts(
        seconds={
            part.name: {
                part.device.name: part.device.launch_seconds
                + sum(plan.prices.seconds[g.name][part.device.name] for g in part.groups)
            }
            for part in plan.parts
        },
        memory={part.name: part.weight_nbytes + part.activation_nbytes for part in plan.parts},
        edges=list(edges),
        links={(k.source, k.sink): (k.seconds, k.bytes_per_second) for k in plan.system.links},
        unit={
            device.name: str(device.cores) if device.cores else device.name for device in devices
        },
        space={device.name: device.memory_space for device in devices},
        limit={device.name: device.memory_bytes for device in devices},
    )


@pytest.mark.parametrize("kind", ["roofline", "table"])
@pytest.mark.parametrize("name", PARTITIONERS)
def test_every_partitioner_makes_right_plans(name: str, kind: str) -> None:
    planned: list[int] = []

    @settings(max_examples=40)
    @given(SEEDS)
    def check(rng: random.Random) -> None:
        graph, system = random_graph(rng), random_system(rng)
        costs = costs_of(rng, graph, system, kind)
        plan = partitioned(name, graph, system, costs)
        if plan is None:
            return
        planned.append(len(plan.parts))
        check_plan(plan)
        text = plan.to_json()
        assert load(Partitioner, name).partition(graph, system, costs).to_json() == text
        again = Plan.from_json(text, graph)
        assert again.to_json() == text
        assert simulate(again) == simulate(plan) == read_recipe(text).simulate()

    check()
    assert len(planned) >= 15


@settings(max_examples=60)
@given(SEEDS)
def test_any_placement_and_order_makes_a_right_plan(rng: random.Random) -> None:
    graph, system = random_graph(rng), random_system(rng)
    costs = Table(rng).prices(graph, system)
    device_names = [device.name for device in system.devices]
    placement = {group.name: rng.choice(device_names) for group in graph.groups}
    plan = make_plan(graph, system, costs, placement, random_order(rng, graph), "random")
    check_plan(plan)
    assert Plan.from_json(plan.to_json(), graph).to_json() == plan.to_json()


def test_auto_is_never_worse_than_any_other() -> None:
    compared, hybrid = 0, 0
    for seed in range(40):
        rng = random.Random(seed)
        graph, system = random_graph(rng), random_system(rng)
        costs = costs_of(rng, graph, system, rng.choice(["roofline", "table"]))
        auto = partitioned("auto:gain=0", graph, system, costs)
        specs = [f"single:device={device.name}" for device in system.devices]
        specs += [name for name in PARTITIONERS if name != "auto"]
        plans = [partitioned(spec, graph, system, costs) for spec in specs]
        assert (auto is None) == (not any(plans))
        if auto is None:
            continue
        hybrid += len(auto.devices) > 1
        for plan in filter(None, plans):
            compared += 1
            assert simulate(auto).makespan <= simulate(plan).makespan * (1 + 1e-12)
    assert compared > 100
    assert 5 < hybrid < 40


def two_layers() -> Graph:
    build = Builder()
    x = build.input("x", 2, 4)
    one = build.constant(np.ones((4, 4), np.float32), "one")
    two = build.constant(np.ones((4, 4), np.float32), "two")
    x = build.op("MatMul", x, one, name="first")
    x = build.op("Softmax", x, name="odd")
    return build.graph(build.op("MatMul", x, two, name="last"))


def pair(**changes: Any) -> System:
    devices = tuple(Device(name, "imagined", isa=name, **changes) for name in ("p", "q"))
    links = (Link("p", "q", 1e-5, 1e9), Link("q", "p", 1e-5, 1e9))
    return System("pair", devices, links)


@pytest.mark.parametrize("name", PARTITIONERS)
def test_an_operation_goes_where_it_can_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusals(parts: Sequence[Graph], device: Device) -> list[str | None]:
        odd = [device.name == "p" and part.ops[0].kind == "Softmax" for part in parts]
        return ["it knows no Softmax" if it else None for it in odd]

    monkeypatch.setattr("hetsched.cost.refusals", refusals)
    costs = load(CostModel, "roofline")
    plan = load(Partitioner, name).partition(two_layers(), pair(), costs)
    assert plan.placement["odd"] == "q"
    assert plan.prices.refusals["odd"] == {"p": "it knows no Softmax"}
    with pytest.raises(PlanError, match="'odd' cannot run on 'p': it knows no Softmax"):
        replace(plan, placement={**plan.placement, "odd": "p"})


@pytest.mark.parametrize("name", PARTITIONERS)
def test_an_operation_that_nothing_can_run_is_named(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "hetsched.cost.refusals",
        lambda parts, device: [
            "why not" if part.ops[0].kind == "Softmax" else None for part in parts
        ],
    )
    with pytest.raises(UnsupportedOperation, match=r"Softmax 'odd' \(p: why not; q: why not\)"):
        load(Partitioner, name).partition(two_layers(), pair(), load(CostModel, "roofline"))


@pytest.mark.parametrize("name", PARTITIONERS)
def test_too_little_memory_names_what_is_short(name: str) -> None:
    system = pair(memory_bytes=64.0)
    with pytest.raises(InfeasiblePlan) as caught:
        load(Partitioner, name).partition(two_layers(), system, load(CostModel, "roofline"))
    assert "\n" not in str(caught.value)
    assert "add a device" in str(caught.value)


def test_memory_names_demand_and_limit() -> None:
    # Two weights of 64 bytes and three results of 32.
    graph, mebi = two_layers(), 2.0**20
    order = [group.name for group in graph.groups]
    for limit, fits in ((224.0, True), (223.0, False)):
        system = pair(memory_bytes=limit)
        costs = price(graph, system, load(CostModel, "roofline"))
        placement = dict.fromkeys(order, "p")
        if fits:
            plan = make_plan(graph, system, costs, placement, order, "hand")
            assert plan.memory_bytes() == {"p": 224.0, "q": 0.0}
            continue
        with pytest.raises(InfeasiblePlan) as caught:
            make_plan(graph, system, costs, placement, order, "hand")
        message = str(caught.value)
        assert f"'p' would hold {224 / mebi:.1f} MiB" in message
        assert f"has {limit / mebi:.1f} MiB" in message


def plan_of(graph: Graph) -> Plan:
    system = pair(launch_seconds=1e-6)
    table = {group.name: {"p": 1e-3, "q": 2e-3} for group in graph.groups}
    refusals: dict[str, dict[str, str]] = {group.name: {} for group in graph.groups}
    del table["odd"]["p"]
    refusals["odd"]["p"] = "it knows no Softmax"
    order = [group.name for group in graph.groups]
    placement = {"first": "p", "odd": "q", "last": "p"}
    plan = make_plan(graph, system, Prices("table", table, refusals), placement, order, "hand")
    return replace(plan, notes=("a note",))


def test_a_plan_by_hand() -> None:
    plan = plan_of(two_layers())
    assert [(part.name, part.device.name, part.label) for part in plan.parts] == [
        ("part0", "p", "MatMul (1 ops)"),
        ("part1", "q", "Softmax (1 ops)"),
        ("part2", "p", "MatMul (1 ops)"),
    ]
    # Launch and work, three times, and 32 bytes over the link twice.
    assert simulate(plan).makespan == pytest.approx(3e-6 + 1e-3 + 2e-3 + 1e-3 + 2 * (1e-5 + 32e-9))


@pytest.mark.parametrize(
    ("order", "placement", "message"),
    [
        (["odd", "first", "last"], {}, "'odd' comes before"),
        (["first", "odd"], {}, "'last'"),
        (["first", "odd", "odd"], {}, "'last'"),
        (["first", "first", "odd", "last"], {}, "'first'"),
        (["first", "odd", "last", "more"], {}, "'more'"),
        (["first", "odd", "last"], {"last": "r"}, "'last' is on 'r'"),
    ],
)
def test_a_wrong_order_or_placement_is_refused(
    order: list[str], placement: dict[str, str], message: str
) -> None:
    plan = plan_of(two_layers())
    with pytest.raises(PlanError, match=message):
        replace(plan, order=tuple(order), placement={**plan.placement, **placement})


def test_a_plan_belongs_to_one_graph() -> None:
    graph = two_layers()
    text = plan_of(graph).to_json()
    weights = {name: array.copy() for name, array in graph.constants.items()}
    weights["two"][3, 3] = np.float32(1 + 2**-20)
    other = replace(graph, constants=weights)
    assert other.digest != graph.digest
    assert replace(graph, constants=dict(graph.constants)).digest == graph.digest
    with pytest.raises(PlanError, match="belongs to 'graph' with other shapes or weights"):
        Plan.from_json(text, other)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no JSON"),
        ("{", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("[]", "no plan"),
        ("null", "no plan"),
        ('{"format": "another"}', "no plan"),
        ('{"format": "hetsched-plan"}', "version None"),
        ('{"format": "hetsched-plan", "version": 2}', "version 2; this hetsched reads 3"),
        ('{"format": "hetsched-plan", "version": 3}', "plan lacks 'graph'"),
    ],
)
def test_what_is_no_plan_says_so(text: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Plan.from_json(text, two_layers())
    with pytest.raises(PlanError, match=message):
        read_recipe(text)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value of a JSON document."""
    if path:
        yield path
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from places(inner, (*path, key))


WRONG = [None, True, "text", -7, 0.5, [], {}, [None], {"a": 1}, [[1]], 1e400, "x" * 9]


def damaged(content: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], bool]]:
    """Every value removed, and replaced by one of each other type; whether it must be noticed."""
    for path in places(content):
        changed = copy.deepcopy(content)
        parent = changed
        for key in path[:-1]:
            parent = parent[key]
        old = parent[path[-1]]
        where = ".".join(map(str, path))
        # Fields of devices have defaults; refusals and notes may be fewer; a price may be absent.
        optional = path[0] == "system" or (path[0] in ("refusals", "notes") and len(path) > 1)
        optional = optional or "seconds" in path[:-1] or (path[0] == "edges" and len(path) == 2)
        for wrong in WRONG:
            if type(wrong) is not type(old):
                parent[path[-1]] = wrong
                # An integer is a number too, and the ends of edges may be the host.
                numbers = {type(wrong), type(old)} <= {int, float} and wrong != 1e400
                ends = path[0] == "edges" and (wrong is None or old is None)
                system = path[0] == "system" and len(path) == 2
                must = not (numbers or ends or system)
                must = must and not (path[0] == "system" and path[-1] == "name")
                yield f"{where} = {wrong!r}", copy.deepcopy(changed), must
        del parent[path[-1]]
        yield f"{where} removed", changed, not optional


def test_every_damage_is_a_plan_error() -> None:
    graph = two_layers()
    content = json.loads(plan_of(graph).to_json())
    tried, accepted, messages = 0, [], set()
    for what, changed, must in damaged(content):
        text = json.dumps(changed)
        for read in (lambda text: Plan.from_json(text, graph), read_recipe):
            tried += 1
            try:
                found = read(text)
                # What is accepted can be used.
                simulate(found) if isinstance(found, Plan) else found.simulate()
            except PlanError as error:
                messages.add(str(error))
            except Exception as error:
                raise AssertionError(f"{what}: {error!r}") from error
            else:
                if must and read is not read_recipe:
                    accepted.append(what)
    assert not any("\n" in message for message in messages)
    assert tried > 1000
    assert accepted == []


@settings(max_examples=150)
@given(SEEDS)
def test_a_plan_with_values_exchanged_is_read_or_refused(rng: random.Random) -> None:
    """Damage that keeps the types: two values of the document change places."""
    graph = two_layers()
    content = json.loads(plan_of(graph).to_json())
    ways = list(places(content))
    for _ in range(2):
        one, other = rng.sample(ways, 2)
        if one == other[: len(one)] or other == one[: len(other)]:
            continue
        try:
            first, second = _at(content, one), _at(content, other)
            _at(content, one[:-1])[one[-1]] = second
            _at(content, other[:-1])[other[-1]] = first
        except (KeyError, IndexError, TypeError):
            continue
    text = json.dumps(content)
    for read in (lambda text: Plan.from_json(text, graph), read_recipe):
        try:
            found = read(text)
            found.simulate() if not isinstance(found, Plan) else simulate(found)
        except PlanError:
            pass


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def test_a_recipe_on_another_machine() -> None:
    recipe = read_recipe(plan_of(two_layers()).to_json())
    same = pair(launch_seconds=1e-6)
    assert recipe.on(same).simulate() == recipe.simulate()
    # Another kind of device: 2 * 2 * 4 * 4 operations, at one a second.
    slow = replace(same.devices[0], fingerprint="slow", flops_per_second=1.0)
    other = recipe.on(replace(same, devices=(slow, same.devices[1])))
    slot = other.simulate().slot("part0")
    assert slot.seconds == pytest.approx(64 + 1e-6)
    assert other.simulate().slot("part1").seconds == pytest.approx(2e-3 + 1e-6)
    with pytest.raises(DeviceError, match="no device 'q'"):
        recipe.on(System("one", same.devices[:1], ()))
    assert issubclass(DeviceError, HetschedError)
