"""Pieces that lie one behind the other: what is a view, and that plans with views compute right."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from graphs import Builder
from test_partitions import two_cores
from test_plan import check_plan

import hetsched
from hetsched import oracle
from hetsched.cost import price
from hetsched.device import Link
from hetsched.dtype import tolerance
from hetsched.errors import PlanError
from hetsched.executable import Executable, load_executable
from hetsched.graph import Graph, to_onnx
from hetsched.inputs import seeded_inputs
from hetsched.plan import Plan
from hetsched.plugin import load
from hetsched.rewrite import rewrite, split
from hetsched.sharing.search import placed
from hetsched.split import Exit, Split
from hetsched.system import System
from hetsched.target import Target
from hetsched.verify import deviation, verify


def images(batch: int = 1, size: int = 8) -> Graph:
    """Two convolutions, the second with a shortcut: what the first makes is read twice."""
    build = Builder()
    values = np.random.default_rng(0)
    x = build.input("x", batch, 16, size, size)
    for index in range(2):
        weights = values.standard_normal((16, 16, 3, 3)).astype(np.float32) * np.float32(0.1)
        y = build.op("Conv", x, build.constant(weights), name=f"conv{index}", pads=(1, 1, 1, 1))
        x = build.op("Relu", y if index == 0 else build.op("Add", y, x), name=f"relu{index}")
    return build.graph(x)


def tokens(count: int = 12) -> Graph:
    build = Builder()
    values = np.random.default_rng(0)
    x = build.input("x", 1, count, 32)
    for index in range(2):
        weights = values.standard_normal((32, 32)).astype(np.float32)
        x = build.op("MatMul", x, build.constant(weights), name=f"product{index}")
        x = build.op("Softmax", x, name=f"softmax{index}", axis=2)
    return build.graph(x)


def branches() -> Graph:
    """Two convolutions of one tensor, whose channels meet again, and one that reads all."""
    build = Builder()
    values = np.random.default_rng(0)

    def conv(x, name):
        weights = values.standard_normal((16, x.shape[1], 3, 3)).astype(np.float32)
        shape = (1, 16, *x.shape[2:])
        return build.op(
            "Conv", x, build.constant(weights), name=name, pads=(1, 1, 1, 1), shape=shape
        )

    x = build.input("x", 1, 16, 8, 8)
    both = conv(x, "left"), conv(x, "right")
    y = build.op("Concat", *both, name="meet", axis=1, shape=(1, 32, 8, 8))
    return build.graph(conv(y, "last"))


def halves(graph: Graph, axis: int, *bounds: int) -> tuple[Split, ...]:
    """Each layer by itself, all along the same axis and at the same bounds."""
    layers = [(graph.ops[0], graph.ops[1]), graph.ops[2:]]
    return tuple(
        Split(
            tuple(op.name for op in layer),
            (Exit(layer[-1].output().name, ((axis, bounds),)),),
        )
        for layer in layers
    )


CASES = {
    "channels": (images(), halves(images(), 1, 0, 8, 16)),
    "uneven channels": (images(), halves(images(), 1, 0, 5, 16)),
    "batch": (images(3), halves(images(3), 0, 0, 1, 3)),
    "concatenation": (
        branches(),
        tuple(
            Split((name,), (Exit(f"{name}.y", ((1, (0, 8, 16)),)),))
            for name in ("left", "right", "last")
        ),
    ),
    "tokens": (tokens(), halves(tokens(), 1, 0, 4, 12)),
}


def views(graph: Graph) -> dict[str, list[str]]:
    return {name: [t.name for t in pieces] for name, pieces in graph.views.items()}


def test_a_concatenation_of_pieces_is_a_view_of_all() -> None:
    """Those of one input may be in pieces and those of another not."""
    graph = branches()
    left, right = (
        Split((name,), (Exit(f"{name}.y", ((1, (0, 8, 16)),)),)) for name in ("left", "right")
    )
    pieces = {name: [f"{name}.y#0", f"{name}.y#1"] for name in ("left", "right")}
    assert views(split(graph, (left, right))) == {"meet.y": pieces["left"] + pieces["right"]}
    assert views(split(graph, (right,))) == {"meet.y": ["left.y", *pieces["right"]]}
    assert views(split(graph, ())) == {}
    rows = Split(("left",), (Exit("left.y", ((2, (0, 4, 8)),)),))
    assert views(split(graph, (rows,))) == {}


def test_what_is_concatenated_twice_is_copied() -> None:
    """A piece has one place. The second tensor has the pieces of the first among its own."""
    build = Builder()
    x = build.input("x", 1, 16, 8, 8)
    y = build.op("Relu", x, name="relu")
    z = build.op("Concat", y, x, name="near", axis=1, shape=(1, 32, 8, 8))
    graph = build.graph(build.op("Concat", y, z, name="far", axis=1, shape=(1, 48, 8, 8)))
    splits = (
        Split(("relu",), (Exit("relu.y", ((1, (0, 8, 16)),)),)),
        Split(("near",), (Exit("near.y", ((1, (0, 8, 32)),)),)),
    )
    new = split(graph, splits)
    far = next(op for op in new.ops if op.name == "far")
    assert [tensor.name for tensor in far.inputs if tensor].count("relu.y#0") == 2
    assert views(new) == {}


def test_pieces_along_the_first_long_axis_are_a_view() -> None:
    graph, splits = CASES["channels"]
    new = split(graph, splits)
    expected = {f"relu{i}.y": [f"relu{i}.y#0", f"relu{i}.y#1"] for i in range(2)}
    assert views(new) == expected
    # No kernel joins.
    assert [group.name for group in new.groups] == ["conv0#0", "conv0#1", "conv1#0", "conv1#1"]
    assert {t.name for group in new.groups for t in group.inputs} >= {"x", "relu0.y"}
    assert views(split(images(3), halves(images(3), 0, 0, 1, 3))).keys() == {"relu1.y"}


@pytest.mark.parametrize(
    ("graph", "splits"),
    [
        pytest.param(images(), halves(images(), 2, 0, 4, 8), id="rows"),
        pytest.param(images(2), halves(images(2), 1, 0, 8, 16), id="channels of a batch"),
        # 5 x 7 x 7 x 4 bytes is no multiple of 64.
        pytest.param(images(1, 7), halves(images(1, 7), 1, 0, 5, 16), id="at an odd address"),
    ],
)
def test_other_pieces_are_copied(graph: Graph, splits: tuple[Split, ...]) -> None:
    new = split(graph, splits)
    assert not new.views
    assert {op.kind for group in new.groups for op in group.ops} >= {"Concat"}


def test_a_concatenation_of_the_model_is_a_kernel() -> None:
    build = Builder()
    x = build.input("x", 1, 16, 8, 8)
    pieces = [build.op("Relu", x), build.op("Neg", x)]
    graph = build.graph(build.op("Concat", *pieces, shape=(1, 32, 8, 8), axis=1))
    assert not graph.views
    assert [group.ops[0].kind for group in graph.groups] == ["Relu", "Neg", "Concat"]


def test_a_tensor_twice_is_copied() -> None:
    build = Builder()
    half = build.op("Relu", build.input("x", 1, 16, 8, 8))
    graph = build.graph(build.op("Concat", half, half, shape=(1, 32, 8, 8), axis=1, name="both"))
    graph = replace(graph, joins=frozenset(("both",)))
    assert not graph.views
    assert [group.name for group in graph.groups] == ["relu0", "both"]


def test_readers_wait_for_all_pieces() -> None:
    graph, splits = CASES["channels"]
    plan = planned(graph, splits, system_of("cpu:0", "reference:0"))
    check_plan(plan)
    edges = {(e.source, e.sink) for e in plan.recipe.tasks.edges}
    assert edges >= {(f"conv0#{i}", f"conv1#{j}") for i in range(2) for j in range(2)}
    assert edges >= {("conv1#0", None), ("conv1#1", None)}


def test_a_join_without_a_copy_is_explained_by_its_pieces() -> None:
    graph, splits = CASES["channels"]
    plan = planned(graph, splits, system_of("cpu:0", "reference:0"))
    (join, *_) = (op for op in plan.graph.ops if op.name in plan.graph.joins)
    for name in (join.name, join.output().name):
        with pytest.raises(PlanError, match=r"joins without a copy.* explain 'conv0#0', 'conv0#1'"):
            hetsched.explain(plan, name)


def test_a_part_ends_before_a_view_of_what_it_makes() -> None:
    graph, splits = CASES["channels"]
    system = system_of("reference:0")
    plan = planned(graph, splits, system)
    check_plan(plan)
    assert [[g.name for g in part.groups] for part in plan.parts] == [
        ["conv0#0", "conv0#1"],
        ["conv1#0", "conv1#1"],
    ]
    inputs = seeded_inputs(graph)
    with hetsched.compile(plan) as executable:
        agree(executable.run(inputs), graph, inputs)


@pytest.mark.parametrize("devices", ["cpu", "onnxruntime", "both"])
@pytest.mark.parametrize("case", CASES)
def test_plans_with_views_compute_the_same(case: str, devices: str, tmp_path: Path) -> None:
    cores = [name.partition(":")[2] for name in two_cores()]
    if len(cores) < 2 or not cores[1]:
        pytest.skip("this machine has one core")
    names = {"both": ("cpu", "onnxruntime")}.get(devices, (devices, devices))
    for name in names:
        if reason := load(Target, name).unavailable():
            pytest.skip(reason)
    graph, splits = CASES[case]
    plan = planned(graph, splits, system_of(*map(":".join, zip(names, cores, strict=True))))
    assert plan.graph.views
    assert len(plan.devices) == 2
    check_plan(plan)
    path = tmp_path / "views.hsp"
    with hetsched.compile(plan) as executable:
        check(executable, graph)
        executable.save(path)
    with load_executable(path) as loaded:
        assert views(loaded.plan.graph) == views(plan.graph)
        check(loaded, graph)


def check(executable: Executable, graph: Graph) -> None:
    """Each part, one run after another, and several in flight; results stay what they were."""
    verify(executable).check()
    given = [seeded_inputs(graph, seed) for seed in range(6)]
    found = [executable.run(inputs) for inputs in given]
    schedule = executable.schedule
    assert sorted(s.task for s in schedule.slots) == sorted(p.part.name for p in executable.parts)
    found += [request.result() for request in [executable.submit(inputs) for inputs in given]]
    # An input at an address that no vector fits.
    (x,) = graph.inputs
    shifted = np.empty(x.size + 1, np.float32)[1:].reshape(x.shape)
    shifted[...] = given[0][x.name]
    found.append(executable.run({x.name: shifted}))
    for inputs, outputs in zip([*given, *given, given[0]], found, strict=True):
        agree(outputs, graph, inputs)
    assert len({array.ctypes.data for outputs in found for array in outputs.values()}) == len(found)


def agree(outputs: dict[str, np.ndarray], graph: Graph, inputs: dict[str, np.ndarray]) -> None:
    expected = oracle.run(to_onnx(graph), inputs)
    for name, array in outputs.items():
        far = deviation(array, expected[name])
        assert far <= tolerance(array.dtype.name).relative, f"{name} by {far}"


def system_of(*names: str) -> System:
    devices = tuple(load(Target, name.partition(":")[0]).device(name) for name in names)
    links = tuple(Link(a.name, b.name, 0.0, 1e12) for a in devices for b in devices if a != b)
    return System("here", devices, links)


def planned(graph: Graph, splits: tuple[Split, ...], system: System) -> Plan:
    rewritten = rewrite(graph, splits)
    prices = price(graph, system, hetsched.cost.load(hetsched.cost.CostModel, "roofline"))
    devices = system.devices * (2 // len(system.devices))
    return placed(rewritten, graph, system, prices, splits, devices, "test")
