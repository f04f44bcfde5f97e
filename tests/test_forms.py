"""Tensors in blocks of channels between parts: which they are, and that nothing else changes."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graphs import Builder
from test_bad_input import _edited_manifest, _rewritten
from test_plan import check_plan

import hetsched
from hetsched import forms, oracle
from hetsched.cache import compiled
from hetsched.cost import Prices, signature
from hetsched.device import Link
from hetsched.dtype import tolerance
from hetsched.errors import CompileError, ModelError, PackageError
from hetsched.executable import load_executable
from hetsched.graph import Graph, from_onnx, to_onnx
from hetsched.inputs import seeded_inputs
from hetsched.op import Tensor
from hetsched.plan import Plan, make_plan, packed_between
from hetsched.plugin import load
from hetsched.rewrite import split
from hetsched.schedules.rules import Rules
from hetsched.schedules.vectors import Vectors
from hetsched.split import Exit, Split
from hetsched.system import System
from hetsched.target import Target
from hetsched.verify import deviation, verify

LANES = 8


class Layers(Builder):
    """Layers of a convolutional network with random weights."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.values = np.random.default_rng(seed)

    def weights(self, *shape: int) -> Tensor:
        scale = np.sqrt(2 / np.prod(shape[1:]))
        return self.constant((self.values.standard_normal(shape) * scale).astype(np.float32))

    def conv(self, x: Tensor, outputs: int, size: int = 1, group: int = 1) -> Tensor:
        weights = self.weights(outputs, x.shape[1] // group, *[size] * (len(x.shape) - 2))
        pads = (size // 2,) * 2 * (len(x.shape) - 2)
        shape = (x.shape[0], outputs, *x.shape[2:])
        return self.op("Conv", x, weights, shape=shape, pads=pads, group=group)


def positive(build: Layers, x: Tensor) -> Tensor:
    return build.op("Add", build.op("Abs", x), build.constant(np.float32([0.5])))


def transposed(build: Layers, x: Tensor) -> Tensor:
    shape = (x.shape[0], 12, *(2 * size for size in x.shape[2:]))
    weights = build.weights(x.shape[1], 12, *[2] * (len(x.shape) - 2))
    return build.op("ConvTranspose", x, weights, shape=shape, strides=(2,) * (len(x.shape) - 2))


def pooled(kind: str) -> Callable[[Layers, Tensor], Tensor]:
    return lambda build, x: build.op(kind, x, kernel_shape=(3, 3), pads=(1,) * 4)


def averaged(build: Layers, x: Tensor) -> Tensor:
    scale = build.op("GlobalAveragePool", x, shape=(*x.shape[:2], 1, 1))
    scale = build.op("Sigmoid", build.conv(scale, x.shape[1]))
    return build.op("Mul", x, scale)


def concatenated(*channels: int) -> Callable[[Layers, Tensor], Tensor]:
    def layer(build: Layers, x: Tensor) -> Tensor:
        pieces = [build.conv(x, count) for count in channels]
        return build.op("Concat", *pieces, shape=(x.shape[0], sum(channels), *x.shape[2:]), axis=1)

    return layer


def joined(axis: int) -> Callable[[Layers, Tensor], Tensor]:
    """Slices of a tensor joined the other way round."""

    def layer(build: Layers, x: Tensor) -> Tensor:
        bounds = (0, 16, x.shape[1]) if axis == 1 else (0, 4, x.shape[axis])
        pieces = []
        for first, last in pairwise(bounds):
            places = [build.constant(np.array([value])) for value in (first, last, axis)]
            shape = (*x.shape[:axis], last - first, *x.shape[axis + 1 :])
            pieces.insert(0, build.op("Slice", x, *places, shape=shape))
        if axis == 1:
            return build.op("Concat", *pieces[::-1], shape=x.shape, axis=1)
        return build.op("Concat", *pieces, shape=x.shape, axis=axis)

    return layer


def of_channels(build: Layers, x: Tensor) -> Tensor:
    return build.op("Mul", x, build.weights(x.shape[1], 1, 1))


def normalised(build: Layers, x: Tensor) -> Tensor:
    columns = [np.abs(build.values.standard_normal(x.shape[1])).astype(np.float32) for _ in "abcd"]
    return build.op("BatchNormalization", x, *map(build.constant, columns))


def of_pixels(build: Layers, x: Tensor) -> Tensor:
    return build.conv(build.op("Softmax", x, axis=3), 12)


# By name: the channels, and what stands between two convolutions.
FAMILIES: dict[str, tuple[int, Callable[[Layers, Tensor], Tensor]]] = {
    "conv": (24, lambda build, x: build.conv(x, 20, 3)),
    "depthwise": (20, lambda build, x: build.conv(x, 20, 3, 20)),
    "grouped": (24, lambda build, x: build.conv(x, 36, 3, 6)),
    "grouped in whole blocks": (64, lambda build, x: build.conv(x, 32, 1, 2)),
    "transposed": (20, transposed),
    "max pool": (20, pooled("MaxPool")),
    "average pool": (20, pooled("AveragePool")),
    "squeeze and excite": (20, averaged),
    "residual": (20, lambda build, x: build.op("Add", build.conv(x, x.shape[1]), x)),
    "channels": (20, of_channels),
    "normalised": (20, normalised),
    "concat of whole blocks": (20, concatenated(32, 16, 5)),
    "concat of others": (20, concatenated(5, 16)),
    "slices of channels": (20, joined(1)),
    "slices of rows": (20, joined(2)),
    "few channels": (20, lambda build, x: build.conv(x, 3)),
    "positive": (20, positive),
    "plain": (20, of_pixels),
}


def network(family: str, batch: int = 1, channels: int = 0, size: int = 9) -> Graph:
    usual, layer = FAMILIES[family]
    build = Layers()
    x = build.input("x", batch, 5, size, size - size % 2)
    x = build.op("Relu", build.conv(x, channels or usual, 3))
    return build.graph(build.conv(layer(build, x), 6))


def line() -> Graph:
    """A network of one spatial dimension."""
    build = Layers()
    x = build.conv(build.conv(build.input("x", 2, 5, 30), 20, 3), 20, 5, 20)
    return build.graph(build.conv(build.op("Relu", x), 6))


def on(graph: Graph, *devices: str, splits: Sequence[Split] = (), apart: bool = True) -> Plan:
    """A plan that gives the groups to the devices in turn, if `apart` each a part of its own."""
    original, graph = graph, split(graph, splits) if splits else graph
    names = tuple(dict.fromkeys(devices))
    found = tuple(load(Target, name.partition(":")[0]).device(name) for name in names)
    links = tuple(
        Link(a.name, b.name, 1e-6, 1e10) for a in found for b in found if a.name != b.name
    )
    groups = [group.name for group in graph.groups]
    table = {name: dict.fromkeys(names, 1e-5) for name in groups}
    members = {group.name: group.members for group in graph.groups}
    placement = {name: devices[index % len(devices)] for index, name in enumerate(groups)}
    return make_plan(
        graph, System("", found, links), Prices("table", table, {}, members), placement, groups,
        "test", groups if apart else (), splits, original if splits else None,
    )  # fmt: skip


def test_the_rule_by_hand() -> None:
    build = Layers()
    x = build.input("x", 1, 5, 9, 9)
    stem = build.conv(x, 20, 3)
    pool = build.op("MaxPool", stem, kernel_shape=(1, 1))
    table = build.op("Softmax", pool, axis=1)
    head = build.conv(table, 8)
    tail = build.op("Relu", build.conv(head, 20))
    graph = build.graph(build.op("Flatten", tail, shape=(1, 20 * 81)))
    # The softmax reads and makes what is plain; nobody reads `tail` in blocks.
    inner = graph.ops[4].output()
    assert forms.packed(graph, LANES) == {stem.name, head.name, inner.name}


def test_arrays_go_there_and_back() -> None:
    array = np.arange(2 * 11 * 6, dtype=np.float32).reshape(2, 11, 2, 3)
    packed = forms.pack(array, LANES)
    assert packed.shape == (2, 2, 6, LANES)
    assert packed[1, 1, 4, 2] == array[1, 10, 1, 1]
    assert np.array_equal(forms.unpack(packed, array.shape), array)


def test_a_part_has_the_packed_tensors_of_its_border() -> None:
    graph = network("conv")
    whole = replace(graph, packed=dict.fromkeys(forms.packed(graph, LANES), LANES))
    first, second, third = (whole.part(group.ops, group.name) for group in graph.groups)
    (border,) = first.outputs
    assert first.packed == {border.name: LANES}
    assert set(second.packed) == {border.name, second.outputs[0].name}
    assert first.handed(border).shape == (1, 3, 72, LANES)
    assert third.handed(third.outputs[0]) == third.outputs[0]
    plain = graph.part(graph.groups[0].ops, first.name)
    assert len({first.digest, plain.digest}) == len({signature(first), signature(plain)}) == 2


def test_packed_tensors_are_a_property_of_the_model() -> None:
    graph = forms.between(network("conv"), load(Target, "cpu").device("cpu"))
    assert graph.packed
    assert from_onnx(to_onnx(graph)).packed == graph.packed


def test_only_images_of_floats_are_packed() -> None:
    graph = network("conv")
    for packed in ({"none": LANES}, {"c0": LANES}, {"x": 0}):
        with pytest.raises(ModelError, match="blocks"):
            replace(graph, packed=packed)


def filled(array: np.ndarray, lanes: int) -> np.ndarray:
    """The array in blocks, the last one filled up with large numbers."""
    packed = forms.pack(array, lanes)
    packed[forms.pack(np.ones_like(array), lanes) == 0] = -1e6
    return packed


@pytest.mark.parametrize("family", [*FAMILIES, "line", "batch"])
def test_parts_hand_over_blocks(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tvm")
    graph = (
        line() if family == "line" else network("conv", 2) if family == "batch" else network(family)
    )
    # What fills blocks up may be anything.
    monkeypatch.setattr(import_module("hetsched.verify"), "pack", filled)
    plan = on(graph, "cpu:0")
    packed = packed_between(plan)
    target = load(Target, "cpu")
    assert packed
    assert set(packed.values()) == {target.lanes(plan.system.devices[0])}
    with hetsched.compile(plan) as executable:
        verify(executable).check()


@pytest.mark.parametrize("family", sorted({*FAMILIES} - {"plain", "concat of others"}))
def test_the_rule_is_that_of_the_schedules(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lowered = pytest.importorskip("hetsched.lowering.relax").lowered
    planner = import_module("hetsched.schedules.layout")._Planner
    called: list[str] = []
    call = planner.call

    def told(self: Any, function: Any, *tensors: Any, **options: Any) -> Any:
        called.append(function.__name__)
        return call(self, function, *tensors, **options)

    monkeypatch.setattr(planner, "call", told)
    graph = network(family)
    rules = Rules(Vectors(lanes=LANES, registers=16), 1)
    whole = replace(graph, packed=dict.fromkeys(forms.packed(graph, LANES), LANES))
    for group in graph.groups:
        lowered(whole.part(group.ops, group.name), rules)
    # The model's input, and its output.
    assert [name for name in called if name in ("pack", "unpack")] == ["pack", "unpack"]


def test_a_part_of_several_results() -> None:
    build = Layers()
    x = build.input("x", 1, 5, 9, 8)
    halves = [build.conv(x, 20), build.conv(x, 24)]
    graph = build.graph(*(build.conv(half, 6) for half in halves))
    plan = on(graph, "cpu:0", "cpu:0", *two_cores()[::-1], apart=False)
    assert sorted(len(part.outputs) for part in plan.parts) == [1, 1, 2]
    assert len(packed_between(plan)) == 2
    with hetsched.compile(plan) as executable:
        verify(executable).check()


def test_the_virtual_machine_takes_and_gives_blocks() -> None:
    device = load(Target, "cpu").device("cpu:0")
    interpreter = load(Target, "cpu:interpreted=true")
    graph = forms.between(network("residual"), device)
    values = seeded_inputs(network("residual"))
    arrays = {"x": values["x"]}
    for group in graph.groups:
        part = graph.part(group.ops, group.name)
        with interpreter.load(interpreter.compile(part, device), part, device) as kernel:
            results = kernel.run([arrays[tensor.name] for tensor in part.inputs])
        for tensor, array in zip(part.outputs, results, strict=True):
            assert array.shape == part.handed(tensor).shape
            arrays[tensor.name] = array
    agree({graph.outputs[0].name: arrays[graph.outputs[0].name]}, network("residual"), values)


def agree(found: dict[str, np.ndarray], graph: Graph, inputs: dict[str, np.ndarray]) -> None:
    expected = oracle.run(to_onnx(graph), inputs)
    for tensor in graph.outputs:
        limit = tolerance(tensor.dtype).relative
        assert deviation(found[tensor.name], expected[tensor.name]) <= limit


def two_cores() -> list[str]:
    names = [name for name in load(Target, "cpu").devices() if ":" in name][:2]
    if len(names) < 2:
        pytest.skip("this machine has one core")
    return names


def random_network(rng: random.Random) -> Graph:
    """Layers of all families behind each other, with shortcuts."""
    build = Layers(rng.randrange(1 << 30))
    x = build.conv(build.input("x", 1, 3, 9, 7), 20, 3)
    for _ in range(rng.randint(3, 7)):
        channels, layer = FAMILIES[rng.choice(sorted(FAMILIES))]
        if x.shape[1] != channels or rng.random() < 0.3:
            x = build.conv(x, channels)
        before, x = x, layer(build, x)
        if before.shape == x.shape and rng.random() < 0.5:
            x = build.op("Add", before, x)
    return build.graph(build.conv(x, 4), x)


@pytest.mark.parametrize("seed", range(4))
def test_random_networks_on_two_devices(seed: int) -> None:
    rng = random.Random(seed)
    graph = random_network(rng)
    names = two_cores()
    names.append("onnxruntime" + names[0].removeprefix("cpu"))
    devices = [rng.choice(names[: 2 + seed % 2]) for _ in range(7)]
    plan = on(graph, *devices, *names[:2], apart=seed == 0)
    with hetsched.compile(plan) as executable:
        verify(executable).check()


def test_what_another_target_reads_is_plain() -> None:
    pytest.importorskip("tvm")
    plan = on(network("conv"), "cpu:0", "cpu:0", "onnxruntime:0")
    assert list(packed_between(plan)) == [plan.parts[0].outputs[0].name]


def test_other_lanes_are_refused_by_name() -> None:
    graph = network("conv")
    packed = replace(graph, packed={graph.groups[0].outputs[0].name: 3})
    part = packed.part(packed.groups[1].ops, "second")
    for name, told in (("cpu:0", "blocks of"), ("onnxruntime:0", "no blocks")):
        target = load(Target, name.partition(":")[0])
        with pytest.raises(CompileError, match=f"'second' hands 'relu1.y' .* 3 .*'{name}'.*{told}"):
            compiled(target, part, target.device(name))


def packaged(tmp_path: Path) -> tuple[Graph, Path]:
    graph = network("residual")
    path = tmp_path / "model.hsp"
    with hetsched.compile(on(graph, *two_cores())) as executable:
        executable.save(path)
    return graph, path


def test_packages_know_what_is_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, path = packaged(tmp_path)
    # Another version may have another rule.
    monkeypatch.setattr(forms, "packed", lambda *_: frozenset())
    monkeypatch.setattr("hetsched.plan.packed", lambda *_: frozenset())
    inputs = seeded_inputs(graph)
    with load_executable(path) as executable:
        assert any(item.graph.packed for item in executable.parts)
        agree(executable.run(inputs), graph, inputs)


@pytest.mark.parametrize("packed", [{}, {"relu1.y": 1}, {"x": 16}, {"none": 16}])
def test_a_package_that_says_otherwise_is_refused(packed: dict[str, int], tmp_path: Path) -> None:
    _, path = packaged(tmp_path)
    edited = _rewritten(path, tmp_path / "edited.hsp", _edited_manifest(packed=packed))
    with pytest.raises(PackageError, match="blocks"), load_executable(edited) as executable:
        executable.start()


@pytest.mark.parametrize(("bounds", "whole"), [((0, 16, 24), True), ((0, 12, 24), False)])
def test_joined_pieces_are_packed_together(bounds: tuple[int, ...], whole: bool) -> None:
    graph = network("residual", channels=24, size=8)
    first = graph.groups[0]
    joined = first.outputs[0].name
    splits = (Split(tuple(op.name for op in first.ops), (Exit(joined, ((1, bounds),)),)),)
    new = split(graph, splits)
    names = {joined, *(piece.name for piece in new.views[joined])}
    assert len(names) == 3
    assert names & forms.packed(new, LANES) == (names if whole else set())
    plan = on(graph, *two_cores(), splits=splits)
    check_plan(plan)
    with hetsched.compile(plan) as executable:
        verify(executable).check()
