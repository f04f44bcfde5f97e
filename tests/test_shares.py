"""Partitioners that split: which shares they choose, and that plans with splits are whole plans."""

import json
import random
from dataclasses import dataclass, replace
from itertools import pairwise
from math import ceil
from pathlib import Path

import numpy as np
import pytest
from graphs import Builder, random_graph
from hypothesis import given, settings
from hypothesis import strategies as st
from test_partitions import two_cores
from test_plan import check_plan, damaged, pair

import hetsched
from hetsched import oracle, package
from hetsched.compiler import compile_parts
from hetsched.cost import CostModel, Prices, price
from hetsched.device import Device, Link
from hetsched.dtype import tolerance
from hetsched.errors import PlanError, PluginError
from hetsched.executable import Executable, load_executable
from hetsched.fusion import Group
from hetsched.graph import Graph, to_onnx
from hetsched.inputs import seeded_inputs
from hetsched.liveness import peak_nbytes
from hetsched.operation import flops, group_flops, group_nbytes
from hetsched.partitioner import Partitioner
from hetsched.plan import Plan, read_recipe, simulate
from hetsched.plugin import load
from hetsched.report.plan import plan_document
from hetsched.rewrite import redundancy, rewrite, split
from hetsched.sharing.memory import Tiling
from hetsched.sharing.pieces import Layout, Walk, Way
from hetsched.sharing.search import NEXT_BEST
from hetsched.split import Exit, Split
from hetsched.system import System
from hetsched.target import Target
from hetsched.verify import deviation, verify

SEEDS = st.integers(0, 1 << 32).map(random.Random)
SPLITTERS = ["channel", "tile", "hybrid"]


@dataclass(frozen=True)
class Staircase(CostModel):
    """Time by channels in whole steps: a device computes `step` channels as fast as one.

    `seconds_per_flop` is by device; moving bytes is ten thousand times as fast as a FLOP.
    """

    seconds_per_flop: tuple[tuple[str, float], ...]
    step: int = 1

    def compute_seconds(self, graph: Graph, group: Group, device: Device) -> float:
        rate = dict(self.seconds_per_flop)[device.name]
        channels = group.outputs[0].shape[1] if len(group.outputs[0].shape) > 1 else 1
        stairs = ceil(channels / self.step) * self.step / channels
        return rate * (group_flops(group) * stairs + 1e-4 * group_nbytes(group))


@pytest.fixture
def imagined_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """No compiler is asked what it can do: the tests say so themselves."""
    monkeypatch.setattr("hetsched.cost.refusals", lambda parts, device: [None] * len(parts))
    monkeypatch.setattr("hetsched.sharing.search.blocks", lambda graph, devices: {})


def convolution(channels: int, size: int = 16, batch: int = 1) -> Graph:
    build = Builder()
    x = build.input("x", batch, 8, size, size)
    weights = np.random.default_rng(0).standard_normal((channels, 8, 3, 3)).astype(np.float32)
    shape = (batch, channels, size, size)
    y = build.op("Conv", x, build.constant(weights), shape=shape, name="conv", pads=(1, 1, 1, 1))
    return build.graph(build.op("Relu", y, name="relu"))


def stem() -> Graph:
    """Convolutions of two strides and a pooling, a shortcut, and a layer that reads all."""
    build = Builder()
    values = np.random.default_rng(0)

    def conv(x, channels, stride=1, name=""):
        weights = values.standard_normal((channels, x.shape[1], 3, 3)).astype(np.float32)
        size = -(-x.shape[2] // stride)
        return build.op(
            "Conv",
            x,
            build.constant(weights),
            shape=(1, channels, size, size),
            pads=(1, 1, 1, 1),
            strides=(stride, stride),
            name=name,
        )

    x = build.input("x", 1, 4, 32, 32)
    x = build.op("Relu", conv(x, 8, name="first"))
    x = build.op(
        "MaxPool", x, shape=(1, 8, 16, 16), kernel_shape=(2, 2), strides=(2, 2), name="pool"
    )
    y = build.op("Relu", conv(x, 8, name="second"))
    y = build.op("Add", conv(y, 8, name="third"), x)
    y = build.op("GlobalAveragePool", y, shape=(1, 8, 1, 1))
    return build.graph(y)


def fast_pair(slower: float = 1.0, step: int = 1) -> tuple[System, Staircase]:
    """Two devices 10 us apart, of which the second is slower than 1 GFLOP/s."""
    return pair(launch_seconds=1e-6), Staircase((("p", 1e-9), ("q", slower * 1e-9)), step)


def partitioned(spec: str, graph: Graph, system: System, costs: CostModel) -> Plan:
    return load(Partitioner, spec).partition(graph, system, costs)


@pytest.mark.usefixtures("imagined_devices")
@pytest.mark.parametrize(("slower", "sizes"), [(1.0, (32, 32)), (3.0, (48, 16)), (1e6, ())])
def test_channels_are_shared_by_speed(slower: float, sizes: tuple[int, ...]) -> None:
    system, costs = fast_pair(slower, 8)
    plan = partitioned("channel:grain=8", convolution(64), system, costs)
    check_plan(plan)
    assert sizes_of(plan) == ([sizes] if sizes else [])


def test_channels_in_blocks_are_cut_between_blocks() -> None:
    """Else a piece would be no view of the whole; a part of a block takes as long as all of it."""
    graph = convolution(48)
    shares = {}
    for lanes in (1, 16):
        walk = Walk(Layout(graph, {"relu.y": lanes}), 1, Way((1,), 4, grain=16), [[1.0, 1.0]])
        shares[lanes] = walk.take(0)
        bounds = walk.split.exits[0].axes[0][1]
        assert bounds == ((0, 24, 48) if lanes == 1 else (0, 32, 48))
    assert shares[1] == pytest.approx([2 / 3, 2 / 3])
    assert shares[16] == pytest.approx([2 / 3, 1 / 3])


@pytest.mark.usefixtures("imagined_devices")
def test_the_share_is_the_best_of_all() -> None:
    """The staircase makes the even share of 2.6 to 1 wrong; every aligned share is tried here."""
    graph = convolution(96)
    system, costs = fast_pair(2.6, 24)
    plan = partitioned("channel:grain=8,candidates=12", graph, system, costs)
    every = [simulate(partitioned("single", graph, system, costs)).makespan]
    for bound in range(8, 96, 8):
        item = Split(("conv", "relu"), (Exit("relu.y", ((1, (0, bound, 96)),)),))
        rewritten = split(graph, (item,))
        prices = price(rewritten, system, costs)
        seconds = [
            prices.seconds[name][device] for name, device in (("conv#0", "p"), ("conv#1", "q"))
        ]
        every.append(max(seconds))
    assert simulate(plan).makespan <= min(every) * 1.01
    assert sizes_of(plan) == [(72, 24)]


@pytest.mark.usefixtures("imagined_devices")
def test_rows_are_shared_with_a_halo() -> None:
    graph = stem()
    system, costs = fast_pair()
    # Far enough apart that a halo is cheaper than another exchange.
    links = tuple(replace(link, seconds=60e-6) for link in system.links)
    system = replace(system, links=links)
    plan = partitioned("tile", graph, system, costs)
    check_plan(plan)
    inside = {name for item in plan.splits for name in item.ops}
    assert {"first", "pool", "second", "third"} <= inside
    assert all(redundancy(graph, item) < 0.25 for item in plan.splits)
    assert any(redundancy(graph, item) > 0 for item in plan.splits)
    single = simulate(partitioned("single", graph, system, costs)).makespan
    assert 1.5 < single / simulate(plan).makespan < 2
    assert plan_document(plan)["splits"][-1]["cut"].split()[0] in ("rows", "columns")


@pytest.mark.usefixtures("imagined_devices")
def test_each_kind_of_way_is_worth_measuring_behind_the_best_plan() -> None:
    graph = stem()
    system, costs = fast_pair()
    best, *others = load(Partitioner, "hybrid").plans(graph, system, costs)
    assert others
    assert len({plan.splits for plan in (best, *others)}) == 1 + len(others)
    by_kind = [partitioned(spec, graph, system, costs) for spec in ("channel:candidates=1", "tile")]
    for other in others:
        check_plan(other)
        assert simulate(best).makespan <= simulate(other).makespan
        assert simulate(other).makespan >= min(simulate(plan).makespan for plan in by_kind)
    assert best.splits == partitioned("hybrid", graph, system, costs).splits


@pytest.mark.usefixtures("imagined_devices")
def test_the_next_best_shares_are_worth_measuring() -> None:
    """Prices of two shares may have been measured in different moments."""
    system, costs = fast_pair(2.6, 24)
    plans = load(Partitioner, "channel:grain=8").plans(convolution(96), system, costs)
    best, *others = [simulate(plan).makespan for plan in plans]
    assert 1 <= len(others) <= NEXT_BEST
    assert others == sorted(others)
    assert best <= others[0]
    assert len({plan.splits for plan in plans}) == len(plans)


@pytest.mark.usefixtures("imagined_devices")
def test_shares_of_devices_that_are_alike_are_not_tried_both_ways_round() -> None:
    system, costs = fast_pair(1.0)
    plans = load(Partitioner, "channel:grain=16").plans(convolution(96), system, costs)
    found = [tuple(sorted(size) for size in sizes_of(plan)) for plan in plans if plan.splits]
    assert found[0] == ([48, 48],)
    assert len(found) > 1
    assert all(found.count(sizes) == 1 for sizes in found)


@pytest.mark.usefixtures("imagined_devices")
def test_a_batch_is_shared_without_a_halo() -> None:
    system, costs = fast_pair()
    graph = convolution(8, batch=6)
    plan = partitioned("tile", graph, system, costs)
    (item,) = plan.splits
    assert redundancy(graph, item) == 0
    assert sizes_of(plan) == [(3, 3)]


@pytest.mark.usefixtures("imagined_devices")
def test_a_contraction_behind_channels_is_added_up() -> None:
    """Two matrix products, the first wide: data meet only as the sum behind the second."""
    build = Builder()
    x = build.input("x", 1, 64)
    values = np.random.default_rng(0)
    for index, (rows, columns) in enumerate([(64, 512), (512, 64)]):
        weights = values.standard_normal((rows, columns)).astype(np.float32)
        x = build.op("MatMul", x, build.constant(weights), shape=(1, columns), name=f"fc{index}")
        x = build.op("Relu", x)
    system, costs = fast_pair()
    plan = partitioned("channel:least_seconds=0", build.graph(x), system, costs)
    check_plan(plan)
    (item,) = plan.splits
    assert item.ops == ("fc0", "relu1", "fc1")
    assert item.exits[0].sum


@pytest.mark.usefixtures("imagined_devices")
@pytest.mark.parametrize("name", SPLITTERS)
def test_nothing_is_split_that_does_not_pay(name: str) -> None:
    """A second, slow link: the pieces are there too late."""
    system, costs = fast_pair()
    links = tuple(replace(link, seconds=1.0) for link in system.links)
    plan = partitioned(name, stem(), replace(system, links=links), costs)
    assert plan.splits == ()
    assert len(plan.devices) == 1


@pytest.mark.usefixtures("imagined_devices")
@pytest.mark.parametrize("name", SPLITTERS)
def test_a_table_without_a_source_has_no_price_for_pieces(name: str) -> None:
    system, costs = fast_pair()
    graph = stem()
    found = price(graph, system, costs)
    table = Prices("table", found.seconds, found.refusals)
    assert partitioned(name, graph, system, table).splits == ()
    assert partitioned(f"{name}:least_seconds=0", graph, system, found).splits


@pytest.mark.usefixtures("imagined_devices")
def test_prices_ask_their_source_only_for_what_is_new() -> None:
    asked: list[str] = []

    @dataclass(frozen=True)
    class Noted(Staircase):
        def compute_seconds(self, graph: Graph, group: Group, device: Device) -> float:
            asked.append(group.name)
            return super().compute_seconds(graph, group, device)

    graph, system = stem(), pair()
    prices = price(graph, system, Noted((("p", 1e-6), ("q", 1e-6))))
    assert price(graph, system, prices) is prices
    asked.clear()
    item = Split(("second",), (Exit("second.y", ((2, (0, 8, 16)),)),))
    rewritten = split(graph, (item,))
    again = price(rewritten, system, prices)
    groups = [group.name for group in rewritten.groups]
    assert list(again.seconds) == groups
    # Two pieces and their join, and each slice; the tail of the group is one of its own now.
    assert {"second#0", "second#1"} <= set(asked)
    assert {"first", "pool", "third"}.isdisjoint(asked)
    assert again.seconds["first"] == prices.seconds["first"]


@pytest.fixture
def two_workers() -> System:
    """Two devices of one core each, and a link that costs nothing."""
    targets = load(Target, "onnxruntime")
    devices = tuple(targets.device(name) for name in two_cores())
    links = tuple(Link(a.name, b.name, 0.0, 1e12) for a in devices for b in devices if a != b)
    return System("here", devices, links)


@pytest.mark.parametrize("name", SPLITTERS)
def test_split_random_graphs_compute_the_same(name: str, two_workers: System) -> None:
    if len({device.unit for device in two_workers.devices}) < 2:
        pytest.skip("this machine has one core")
    counts: list[int] = []
    rates = tuple((device.name, 1e-3) for device in two_workers.devices)

    @settings(max_examples=25)
    @given(SEEDS)
    def check(rng: random.Random) -> None:
        graph = random_graph(rng)
        spec = f"{name}:candidates=2,least_seconds=0"
        spec += "" if name == "tile" else ",grain=1"
        plan = partitioned(spec, graph, two_workers, Staircase(rates))
        counts.append(len(plan.splits))
        inputs = seeded_inputs(graph)
        expected = oracle.run(to_onnx(graph), inputs)
        with Executable(plan, compile_parts(plan)) as executable:
            found = executable.run(inputs)
        assert list(found) == [tensor.name for tensor in graph.outputs]
        for name_, array in found.items():
            far = deviation(array, expected[name_])
            assert far <= tolerance(array.dtype.name).relative, f"{name_} by {far}"

    check()
    assert sum(map(bool, counts)) >= 8, counts


def split_plan() -> tuple[Graph, Plan]:
    system, costs = fast_pair()
    graph = stem()
    return graph, partitioned("tile", graph, system, costs)


@pytest.mark.usefixtures("imagined_devices")
def test_a_plan_file_has_the_splits() -> None:
    graph, plan = split_plan()
    text = plan.to_json()
    assert json.loads(text)["graph"]["sha256"] == graph.digest
    again = Plan.from_json(text, graph)
    assert again.to_json() == text
    assert again.splits == plan.splits
    assert again.graph.digest == plan.graph.digest
    assert simulate(again) == simulate(plan) == read_recipe(text).simulate()
    with pytest.raises(PlanError, match="other shapes or weights"):
        Plan.from_json(text, plan.graph)


@pytest.mark.usefixtures("imagined_devices")
def test_every_damage_of_a_split_is_a_plan_error() -> None:
    graph, plan = split_plan()
    content = json.loads(plan.to_json())
    splits = content.pop("splits")
    accepted = []
    for what, changed, must in damaged({"splits": splits}):
        try:
            simulate(Plan.from_json(json.dumps({**content, **changed}), graph))
        except PlanError:
            continue
        except Exception as error:
            raise AssertionError(f"{what}: {error!r}") from error
        if must:
            accepted.append(what)
    assert accepted == []


def test_a_package_keeps_the_model_and_its_splits(two_workers: System, tmp_path: Path) -> None:
    graph = stem()
    rates = tuple((device.name, 1e-3) for device in two_workers.devices)
    plan = partitioned("tile:least_seconds=0", graph, two_workers, Staircase(rates))
    if len({device.unit for device in two_workers.devices}) > 1:
        assert plan.splits
    path = tmp_path / "split.hsp"
    with hetsched.compile(plan) as executable:
        verify(executable).check()
        executable.save(path)
    again, _ = package.read(path)
    assert again.original.digest == graph.digest
    assert again.to_json() == plan.to_json()
    with load_executable(path, whole=True) as loaded:
        assert loaded.inputs == graph.inputs
        assert loaded.outputs == graph.outputs
        found = verify(loaded)
        found.check()
        assert len(found.comparisons) == len(plan.parts) + 1


def test_verify_compares_with_the_model_before_any_split(two_workers: System) -> None:
    """Of a plan whose rewritten graph computes something else, the whole is the culprit."""
    graph = stem()
    item = Split(("first",), (Exit("first.y", ((2, (0, 16, 32)),)),))
    rewritten = rewrite(graph, (item,)).graph
    weights = {
        name: array * np.float32(1.5) if array.ndim == 4 else array
        for name, array in rewritten.constants.items()
    }
    wrong = replace(rewritten, constants=weights)
    rates = tuple((device.name, 1e-3) for device in two_workers.devices)
    plan = partitioned("single", wrong, two_workers, Staircase(rates))
    plan = replace(plan, splits=(item,), unsplit=graph)
    with hetsched.compile(plan) as executable:
        culprit = verify(executable).culprit
    assert culprit is not None


def sizes_of(plan: Plan) -> list[tuple[int, ...]]:
    """The sizes of the pieces of each split."""
    return [
        tuple(high - low for low, high in pairwise(item.exits[-1].axes[0][1]))
        for item in plan.splits
    ]


@pytest.mark.usefixtures("imagined_devices")
def test_tiles_on_one_device_hold_less_at_once() -> None:
    graph = stem()
    system, costs = fast_pair(0.5)
    plan = partitioned("tile:tiles=4x4,extra=0.3", graph, system, costs)
    check_plan(plan)
    assert plan.devices == ("q",)
    assert [part.name for part in plan.parts] == ["part0"]
    assert peak_nbytes(plan.graph) < 0.6 * peak_nbytes(graph)
    extra = sum(map(flops, plan.graph.ops)) / sum(map(flops, graph.ops)) - 1
    assert extra == pytest.approx(Tiling(graph, (4, 4), 0.3).extra_flops(plan.splits))
    assert extra <= 0.3
    with pytest.raises(PluginError, match="'5' is no grid of tiles"):
        partitioned("tile:tiles=5", graph, system, costs)
