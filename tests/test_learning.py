"""Prices of kernels that were not measured, from counted work and the samples of others."""

from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from graphs import Builder

from hetsched.api import partition, priced
from hetsched.cost import CostModel, kernel_of, price, roofline_seconds
from hetsched.cost_models.learned import Learned
from hetsched.device import Device
from hetsched.graph import Graph
from hetsched.learning.choice import next_to_measure
from hetsched.learning.model import UNKNOWN, Model
from hetsched.learning.regression import Regression
from hetsched.learning.work import SOFTMAX_ROW, Work, work_of
from hetsched.operation import group_flops, group_nbytes
from hetsched.plugin import load
from hetsched.schedules.rules import Rules
from hetsched.schedules.vectors import Vectors
from hetsched.sequence import method
from hetsched.store import Sample, Store
from hetsched.system import System
from hetsched.target import Target

RULES = Rules(Vectors(16, 32, "vnni"))
CLOCK_HZ = 2e9
HERE = Device(
    "cpu:0", "cpu", clock_hz=CLOCK_HZ, isa="x86_64 avx2 fma f16c", fingerprint="here",
    flops_per_second=64e9, bytes_per_second=8e9,
)  # fmt: skip


def convolution(
    channels: int, filters: int, side: int, kernel: int = 1, packed: bool = True
) -> Graph:
    build = Builder()
    x = build.input("x", 1, channels, side, side)
    weights = build.constant(np.zeros((filters, channels, kernel, kernel), np.float32))
    pads = (kernel // 2,) * 4
    y = build.op(
        "Conv", x, weights, shape=(1, filters, side, side), kernel_shape=(kernel, kernel), pads=pads
    )
    graph = build.graph(y)
    return replace(graph, packed={"x": 16, y.name: 16}) if packed else graph


def product(rows: int, depth: int, columns: int) -> Graph:
    build = Builder()
    weights = build.constant(np.zeros((depth, columns), np.float32))
    x = build.input("x", rows, depth)
    return build.graph(build.op("MatMul", x, weights, shape=(rows, columns)))


def drawn(count: int, seed: int) -> list[Graph]:
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        a, b, side = (int(size) for size in rng.integers(8, 200, 3))
        found.append(
            product(side, a, b) if rng.random() < 0.4 else convolution(a, b, side // 4 + 4)
        )
    return found


def truth(part: Graph, slower: float = 1.0) -> float:
    """A machine whose arithmetic is slower, and whose memory is faster, than is assumed."""
    cycles = work_of(part, RULES, 4).cycles
    return slower * (50 + 0.9 * cycles["busy"] + 0.05 * cycles["filters"]) / CLOCK_HZ


def test_the_work_of_a_pointwise_convolution_is_counted_by_tiles() -> None:
    work = work_of(convolution(64, 96, 14), RULES, 4)
    assert work.family == "dense pointwise"
    # 49 tiles of 4 pixels by all 6 vectors, for each of 64 input channels; a step of one is 24
    # multiply-adds, two in a cycle.
    assert (work.sizes["broadcasts"], work.sizes["vectors"]) == (4, 6)
    assert work.cycles["tiles"] == 49
    assert work.cycles["busy"] == 49 * 64 * 12
    # In blocks on both sides nothing is put in blocks.
    assert "blocked" not in work.cycles
    assert work_of(convolution(64, 96, 14, packed=False), RULES, 4).cycles["blocked"] == 64 * 14**2


def test_convolutions_by_transforms_are_known_as_such() -> None:
    assert work_of(convolution(64, 64, 56, 3), RULES, 4).family.startswith("winograd")
    off = replace(RULES, winograd="off")
    assert work_of(convolution(64, 64, 56, 3), off, 4).family == "dense"


def one(kind: str, shape: tuple[int, ...], result: tuple[int, ...], **attributes: Any) -> Graph:
    build = Builder()
    return build.graph(build.op(kind, build.input("x", *shape), shape=result, **attributes))


def test_a_softmax_has_a_row_for_each_of_the_other_axes() -> None:
    shape = (1, 1000, 1, 1)
    assert work_of(one("Softmax", shape, shape, axis=1), RULES, 4).cycles["tiles"] == 1
    several = work_of(one("Softmax", (8, 1000), (8, 1000)), RULES, 4).cycles
    assert several["tiles"] == 8
    # Of a row of 1000, eight elements are no whole vector.
    assert several["ragged"] == SOFTMAX_ROW * 8 * 8


@pytest.mark.parametrize(
    ("shape", "axis", "serial"),
    [((7, 64), 1, 7 * 16), ((7, 64), 0, 0), ((7, 63), 1, 441), ((7, 3), 1, 0)],
)
def test_reductions_are_in_vectors_where_lanes_divide_them(
    shape: tuple[int, int], axis: int, serial: int
) -> None:
    result = (shape[1 - axis],)
    part = one("ReduceMax", shape, result, axes=(axis,), keepdims=0)
    assert work_of(part, RULES, 4).cycles["serial"] == serial


def test_what_is_copied_in_short_rows_is_counted_by_rows() -> None:
    build = Builder()
    x, y = build.input("x", 1, 7, 5, 2, 1), build.input("y", 1, 7, 4, 2, 1)
    part = build.graph(build.op("Concat", x, y, shape=(1, 7, 9, 2, 1), axis=2))
    cycles = work_of(part, RULES, 4).cycles
    assert (cycles["rows"], cycles["chosen"]) == (63, 126)


@pytest.mark.parametrize(
    ("mode", "term", "count"),
    # Twelve vectors cover a row of 191; where it is reflected, each element is asked for.
    [("constant", "copied", 4 * 128 * 12), ("reflect", "chosen", 4 * 128 * 191)],
)
def test_what_is_padded_in_long_rows_is_copied_in_vectors(mode: str, term: str, count: int) -> None:
    build = Builder()
    x, pads = build.input("x", 4, 128, 128, 1), build.constant(np.array([0, 0, 0, 0, 0, 0, 63, 0]))
    part = build.graph(build.op("Pad", x, pads, shape=(4, 128, 191, 1), mode=mode))
    cycles = work_of(part, RULES, 4).cycles
    assert (cycles["rows"], cycles[term]) == (4 * 128, count)
    assert not {"scalar", "chosen", "copied"} - {term} & cycles.keys()


def test_the_order_of_loops_may_tell_which_input_an_element_comes_from() -> None:
    build = Builder()
    x, y = (build.input(name, 1, 200, size) for name, size in (("x", 32), ("y", 16)))
    joined = build.op("Concat", x, y, shape=(1, 200, 48), axis=2)
    assert "chosen" in work_of(build.graph(joined), RULES, 4).cycles
    # Behind a transposition it is the same for all of a row.
    turned = build.op("Transpose", joined, shape=(1, 48, 200), perm=(0, 2, 1))
    assert "chosen" not in work_of(build.graph(turned), RULES, 4).cycles
    build = Builder()
    parts = [build.input(name, 1, 200, 1) for name in "xyz"]
    few = build.op("Concat", *parts, shape=(1, 200, 3), axis=2)
    assert "chosen" not in work_of(build.graph(few), RULES, 4).cycles


def test_a_convolution_of_one_pixel_is_of_another_family() -> None:
    assert work_of(convolution(64, 96, 1), RULES, 4).family == "dense pointwise row"


@pytest.mark.parametrize(("hidden", "again"), [(32, False), (256, True)])
def test_weights_of_a_recurrence_come_again_where_the_first_cache_does_not_hold_them(
    hidden: int, again: bool
) -> None:
    build = Builder()
    x = build.input("x", 10, 1, 16)
    weights = [build.constant(np.zeros((1, 4 * hidden, size), np.float32)) for size in (16, hidden)]
    y = build.op("LSTM", x, *weights, shape=(10, 1, 1, hidden), hidden_size=hidden)
    cycles = work_of(build.graph(y), RULES, 4).cycles
    # A vector of weights has 16 of those of all gates, for each of the hidden elements.
    assert cycles["streamed"] == (10 * hidden * 4 * hidden / 16 if again else 0)


@pytest.mark.parametrize(
    ("perm", "term"), [((1, 0, 2), "shifted"), ((0, 2, 1), "turned"), ((2, 0, 1), "turned")]
)
def test_a_transposition_that_keeps_the_last_axis_moves_rows(
    perm: tuple[int, ...], term: str
) -> None:
    shape = (12, 20, 64)
    part = one("Transpose", shape, tuple(shape[axis] for axis in perm), perm=perm)
    assert work_of(part, RULES, 4).cycles[term] == 12 * 20 * 64


def test_channels_in_blocks_are_beside_each_other_when_they_become_the_last_axis() -> None:
    build = Builder()
    weights = build.constant(np.zeros((32, 64, 1, 1), np.float32))
    y = build.op("Conv", build.input("x", 1, 64, 14, 14), weights, shape=(1, 32, 14, 14),
                 kernel_shape=(1, 1))  # fmt: skip
    last = build.op("Transpose", y, shape=(1, 14, 14, 32), perm=(0, 2, 3, 1))
    assert "turned" not in work_of(build.graph(last), RULES, 4).cycles


def test_bytes_are_put_in_blocks_and_back() -> None:
    build = Builder()
    one, nothing = (build.constant(np.array(v)) for v in (np.float32(1), np.uint8(0)))
    x = build.input("x", 1, 64, 6, 6, dtype="uint8")
    weights = build.constant(np.zeros((96, 64, 1, 1), np.int8))
    zero = build.constant(np.array(np.int8(0)))
    near = build.op("DequantizeLinear", x, one, nothing, shape=(1, 64, 6, 6))
    far = build.op("DequantizeLinear", weights, one, zero, shape=(96, 64, 1, 1))
    y = build.op("Conv", near, far, shape=(1, 96, 6, 6), kernel_shape=(1, 1))
    made = build.op("QuantizeLinear", y, one, nothing, shape=(1, 96, 6, 6), dtype="uint8")
    cycles = work_of(build.graph(made), RULES, 4).cycles
    assert (cycles["packs"], cycles["unpacks"]) == (64 * 36, 96 * 36)


def test_normalisation_over_channels_is_a_product_with_all_of_them() -> None:
    shape = (1, 64, 6, 6)
    work = work_of(one("LRN", shape, shape, size=5), RULES, 4)
    # Whatever the tiles: a multiply-add for each pair of channels, 16 in one, two in a cycle.
    assert work.cycles["busy"] == pytest.approx(36 * 64 * 64 / 16 / 2, rel=0.2)


def test_groups_that_are_no_whole_blocks_read_those_of_all_that_a_block_spans() -> None:
    build = Builder()
    weights = build.constant(np.zeros((120, 24, 3, 3), np.float32))
    x = build.input("x", 1, 120, 14, 14)
    y = build.op(
        "Conv", x, weights, shape=(1, 120, 14, 14), kernel_shape=(3, 3), pads=(1,) * 4, group=5
    )
    graph = replace(build.graph(y), packed={"x": 16, y.name: 16})
    work = work_of(graph, RULES, 4)
    # A block of 16 outputs spans two groups of 24 at most: 48 channels, three blocks.
    assert (work.family, work.sizes["depth"]) == ("uneven", 3 * 16 * 9)


def test_a_kernel_is_colder_in_a_large_graph() -> None:
    part = product(1, 64, 64)
    cold = [work_of(part, RULES, megabytes).cycles["cold"] for megabytes in (1, 4, 16, 64, 256)]
    assert cold == sorted(cold)
    assert (cold[0], cold[-1]) == (0, 1)


def error(model: Regression, parts: list[Graph], slower: float = 1.0) -> float:
    """The mean error of predictions, relative."""
    found = model.estimates([work_of(part, RULES, 4) for part in parts])
    wanted = [truth(part, slower) for part in parts]
    return fmean(abs(e.seconds / t - 1) for e, t in zip(found, wanted, strict=True))


def fitted(model: Regression, parts: list[Graph], slower: float = 1.0) -> Regression:
    works = [work_of(part, RULES, 4) for part in parts]
    return model.fitted(works, [truth(part, slower) for part in parts])


def test_few_samples_tell_of_other_kernels() -> None:
    before = Regression(CLOCK_HZ)
    after = fitted(before, drawn(40, seed=0))
    others = drawn(100, seed=1)
    assert error(after, others) < 0.05 < error(before, others)


def test_what_samples_tell_of_is_more_certain() -> None:
    works = [work_of(part, RULES, 4) for part in drawn(30, seed=1)]
    before = Regression(CLOCK_HZ)
    after = fitted(before, drawn(40, seed=0))
    deviations = [[e.deviation for e in model.estimates(works)] for model in (before, after)]
    assert max(deviations[1]) < min(deviations[0])
    # A family that was not seen stays the least certain.
    (strange,) = after.estimates([Work("strange", {"launch": 1.0, "turned": 1e5})])
    assert strange.deviation > max(deviations[1])


def test_kernels_that_are_not_understood_do_not_spoil_the_rest() -> None:
    """One in eight takes five times as long as all that is counted of it says."""
    parts = drawn(64, seed=0)
    works = [work_of(part, RULES, 4) for part in parts]
    seconds = [truth(part) * (5 if index % 8 == 0 else 1) for index, part in enumerate(parts)]
    assert error(Regression(CLOCK_HZ).fitted(works, seconds), drawn(100, seed=1)) < 0.03


def test_a_wrong_sample_does_not_spoil_the_rest() -> None:
    parts = drawn(40, seed=0)
    works = [work_of(part, RULES, 4) for part in parts]
    seconds = [truth(part) for part in parts]
    seconds[7] *= 20
    assert error(Regression(CLOCK_HZ).fitted(works, seconds), drawn(100, seed=1)) < 0.06


def test_another_device_is_known_from_a_few_samples() -> None:
    known = fitted(Regression(CLOCK_HZ), drawn(100, seed=0))
    few, others = drawn(4, seed=2), drawn(100, seed=1)
    moved = fitted(known, few, slower=3.0)
    alone = fitted(Regression(CLOCK_HZ), few, slower=3.0)
    assert error(moved, others, slower=3.0) < min(0.08, error(alone, others, slower=3.0))


def test_what_is_measured_next_is_unlike_what_is_known() -> None:
    pool = [work_of(part, RULES, 4) for part in [product(8, 64, 64)] * 5]
    pool.append(work_of(convolution(64, 96, 14), RULES, 4))
    first, second, *_ = next_to_measure(pool, Regression(CLOCK_HZ), 6)
    assert (first < 5, second) == (True, 5)
    known = fitted(Regression(CLOCK_HZ), [product(8, 64, 64)])
    assert next_to_measure(pool, known, 1) == [5]
    # What counts for nothing waits.
    assert next_to_measure(pool, known, 1, [1, 1, 1, 1, 1, 0]) != [5]
    assert next_to_measure([], known, 3) == []


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "profile.sqlite")


def layers(count: int, seed: int) -> Graph:
    """Products one behind the other, of sizes that are drawn."""
    rng = np.random.default_rng(seed)
    build = Builder()
    x = build.input("x", 16, 64)
    for columns in rng.integers(8, 300, count).tolist():
        weights = build.constant(np.zeros((x.shape[1], columns), np.float32))
        x = build.op("MatMul", x, weights, shape=(16, columns))
    return build.graph(x)


def kept(store: Store, graph: Graph, device: Device) -> None:
    """Samples of all groups of a graph, by `truth`."""
    compiler = load(Target, device.target).configuration(device)
    parts = [graph.part(group.ops, group.name) for group in graph.groups]
    samples = [(kernel_of(part), Sample(truth(part), 0.0, 9)) for part in parts]
    store.add(device, compiler, method(graph), samples)


def test_without_samples_it_is_the_roofline(store: Store) -> None:
    graph = layers(3, seed=0)
    model = load(CostModel, f"learned:store={store.path}")
    assert isinstance(model, Learned)
    for group, estimate in zip(
        graph.groups, model.estimates(graph, [(g, HERE) for g in graph.groups]), strict=True
    ):
        assert estimate.seconds == roofline_seconds(group_flops(group), group_nbytes(group), HERE)
        assert estimate.deviation == UNKNOWN


def test_what_is_measured_is_taken_and_the_rest_is_like_it(store: Store) -> None:
    known, other = layers(12, seed=0), layers(6, seed=1)
    kept(store, known, HERE)
    model = Learned(str(store.path))
    for group, estimate in zip(
        known.groups, model.estimates(known, [(g, HERE) for g in known.groups]), strict=True
    ):
        assert estimate.is_measured
        assert estimate.seconds == truth(known.part(group.ops, group.name))
    for group in other.groups:
        seconds = model.compute_seconds(other, group, HERE)
        assert seconds == pytest.approx(truth(other.part(group.ops, group.name)), rel=0.2)
    (estimate,) = model.estimates(other, [(other.groups[0], HERE)])
    assert 0 < estimate.deviation < UNKNOWN


def test_samples_of_other_devices_are_better_than_none(store: Store) -> None:
    known, other = layers(12, seed=0), layers(6, seed=1)
    kept(store, known, replace(HERE, fingerprint="there"))
    model = Model.of(HERE, store.records())
    assert model.samples == 0
    parts = [other.part(group.ops, group.name) for group in other.groups]
    for part, estimate in zip(parts, model.estimates(parts, 4), strict=True):
        assert estimate.seconds == pytest.approx(truth(part), rel=0.2)


def test_what_is_predicted_is_never_shown_as_measured(store: Store) -> None:
    known, other = layers(12, seed=0), layers(6, seed=1)
    kept(store, known, HERE)
    system = System("machine", (HERE,), ())
    model = f"learned:store={store.path}"
    measured = partition(known, system, "single", cost_model=model)
    assert not any("predicted by learned" in note for note in measured.notes)
    predicted = partition(other, system, "single", cost_model=model)
    assert any("6 of 6 prices are predicted by learned" in note for note in predicted.notes)
    # Prices that are asked again, for what they lack, remember it.
    prices = priced(other, system, model)
    fewer = replace(prices, seconds=dict(list(prices.seconds.items())[1:]))
    again = price(other, system, fewer).predicted
    assert {name: list(row) for name, row in again.items()} == {
        group.name: ["cpu:0"] for group in other.groups
    }


def test_a_model_is_fitted_anew_when_the_store_has_more(store: Store) -> None:
    known, other = layers(12, seed=0), layers(2, seed=1)
    model = Learned(str(store.path))
    kept(store, layers(1, seed=3), HERE)
    before = model.compute_seconds(other, other.groups[0], HERE)
    kept(store, known, HERE)
    assert model.compute_seconds(other, other.groups[0], HERE) != before
