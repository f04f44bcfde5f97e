"""Any partition computes what the uncut graph computes."""

import random
from collections.abc import Sequence

import numpy as np
import onnx
import pytest
from graphs import Table, random_graph, random_order
from hypothesis import given, settings
from hypothesis import strategies as st

from hetsched import oracle
from hetsched.compiler import compile_parts
from hetsched.device import Device, Link
from hetsched.dtype import numpy_dtype, tolerance
from hetsched.executable import Executable
from hetsched.graph import Graph, from_onnx, to_onnx
from hetsched.inputs import seeded_inputs
from hetsched.plan import Plan, make_plan
from hetsched.plugin import load
from hetsched.system import System
from hetsched.target import Target
from hetsched.verify import deviation

SEEDS = st.integers(0, 1 << 32).map(random.Random)


def system_of(names: Sequence[str]) -> System:
    """Devices of this machine, one of them on cores of its own name."""
    devices: list[Device] = []
    for name in names:
        target = load(Target, name.partition(":")[0])
        if reason := target.unavailable():
            pytest.skip(f"{name}: {reason}")
        devices.append(target.device(name))
    links = [Link(a.name, b.name, 1e-6, 1e9) for a in devices for b in devices if a != b]
    return System("here", tuple(devices), tuple(links))


def random_plan(rng: random.Random, graph: Graph, system: System) -> Plan:
    """Any placement, in any topological order."""
    names = [device.name for device in system.devices]
    placement = {group.name: rng.choice(names) for group in graph.groups}
    costs = Table(rng).prices(graph, system)
    order = random_order(rng, graph)
    return make_plan(graph, system, costs, placement, order, "random")


def check_partition(rng: random.Random, graph: Graph, system: System) -> Plan:
    plan = random_plan(rng, graph, system)
    inputs = seeded_inputs(graph, seed=rng.randint(0, 99))
    expected = oracle.run(to_onnx(graph), inputs)
    with Executable(plan, compile_parts(plan)) as executable:
        for _ in range(2):
            actual = executable.run(inputs)
            assert list(actual) == [tensor.name for tensor in graph.outputs]
            for tensor in graph.outputs:
                array = actual[tensor.name]
                assert array.dtype == numpy_dtype(tensor.dtype)
                assert array.shape == tensor.shape
                far = deviation(array, expected[tensor.name])
                assert far <= tolerance(tensor.dtype).relative, f"{tensor} by {far}"
        slots = executable.schedule.slots
    assert sorted(slot.task for slot in slots) == sorted(part.name for part in plan.parts)
    return plan


def two_cores() -> list[str]:
    names = load(Target, "onnxruntime").devices()[1:3]
    return names if len(names) > 1 else [*names, "onnxruntime"]


def test_random_partitions_compute_the_same() -> None:
    parts: list[int] = []
    system = system_of(two_cores())

    @settings(max_examples=60)
    @given(SEEDS)
    def check(rng: random.Random) -> None:
        parts.append(len(check_partition(rng, random_graph(rng), system).parts))

    check()
    assert sum(count >= 3 for count in parts) >= 15, parts


@pytest.mark.parametrize("third", ["reference:{}", "cpu:{}", "opencl:0@{}"])
def test_random_partitions_over_three_devices_compute_the_same(third: str) -> None:
    """Targets that differ exchange tensors; the third shares the first one's core."""
    check_some([*two_cores(), third.format(two_cores()[0].partition(":")[2])])


@pytest.mark.parametrize("queue", ["opencl:0@{1}", "opencl:0@{0}"])
def test_random_partitions_over_compiled_devices_compute_the_same(queue: str) -> None:
    """Kernels of the processor and of OpenCL exchange tensors, on two cores and on one."""
    cores = [name.partition(":")[2] for name in two_cores()]
    check_some([f"cpu:{cores[0]}", queue.format(*cores)])


def check_some(names: Sequence[str]) -> None:
    """Graphs that the last device can run, until five have a part there."""
    system = system_of(names)
    last = system.devices[-1]
    checked = 0
    for seed in range(40):
        rng = random.Random(seed)
        graph = random_graph(rng, 8)
        whole = graph.part(graph.ops, "whole")
        if any(
            load(Target, device.target).refusal(whole, device) is not None
            for device in system.devices
        ):
            continue
        plan = check_partition(rng, graph, system)
        checked += last.name in plan.devices
        if checked == 5:
            break
    assert checked == 5


@settings(max_examples=60)
@given(SEEDS)
def test_parts_are_models_of_their_own(rng: random.Random) -> None:
    """Chained by hand in ONNX Runtime, the parts give every tensor of the whole."""
    graph = random_graph(rng)
    system = System(
        "drawn",
        (Device("p", "imagined"), Device("q", "imagined")),
        (Link("p", "q", 0.0, 1e9), Link("q", "p", 0.0, 1e9)),
    )
    plan = random_plan(rng, graph, system)
    values = dict(seeded_inputs(graph))
    expected = oracle.run(to_onnx(graph), values)
    for part in plan.parts:
        model = to_onnx(graph.part(part.ops, part.name))
        onnx.checker.check_model(model, full_check=True)
        assert [value.name for value in model.graph.input] == [t.name for t in part.inputs]
        # Just what it reads comes along.
        read = {name for node in model.graph.node for name in node.input}
        assert {tensor.name for tensor in model.graph.initializer} <= read
        values |= oracle.run(model, {t.name: values[t.name] for t in part.inputs})
    for name, array in expected.items():
        assert deviation(values[name], array) <= tolerance(array.dtype.name).relative


@settings(max_examples=60)
@given(SEEDS)
def test_a_graph_survives_onnx(rng: random.Random) -> None:
    graph = random_graph(rng)
    model = to_onnx(graph)
    onnx.checker.check_model(model, full_check=True)
    again = from_onnx(onnx.ModelProto.FromString(model.SerializeToString()))
    assert again.digest == graph.digest
    assert (again.inputs, again.outputs) == (graph.inputs, graph.outputs)
    assert [str(op) for op in again.ops] == [str(op) for op in graph.ops]
    assert [op.inputs + op.outputs for op in again.ops] == [
        op.inputs + op.outputs for op in graph.ops
    ]
    assert [dict(op.attributes) for op in again.ops] == [dict(op.attributes) for op in graph.ops]
    assert again.constants.keys() == graph.constants.keys()
    for name, array in graph.constants.items():
        np.testing.assert_array_equal(again.constants[name], array)


@settings(max_examples=30)
@given(SEEDS)
def test_the_whole_graph_is_a_part_of_itself(rng: random.Random) -> None:
    graph = random_graph(rng)
    whole = graph.part(graph.ops, graph.name)
    assert whole.ops == graph.ops
    # The border has outputs in the order in which they are written.
    assert sorted(whole.outputs, key=str) == sorted(graph.outputs, key=str)
    read = {tensor.name for op in graph.ops for tensor in op.reads}
    assert {t.name for t in whole.inputs} == {t.name for t in graph.inputs if t.name in read}


def test_the_digest_changes_with_weights_names_and_structure() -> None:
    graph = random_graph(random.Random(3))
    model = to_onnx(graph)
    name, array = next((n, a) for n, a in graph.constants.items() if a.dtype == np.float32)
    changed = from_onnx(model)
    weights = {**changed.constants, name: array + np.float32(1e-6) * (1 + abs(array))}
    other = Graph(
        changed.name, changed.ops, changed.inputs, changed.outputs, weights, changed.opsets
    )
    assert from_onnx(model).digest == graph.digest
    assert other.digest != graph.digest
    fewer = Graph(
        graph.name, graph.ops, graph.inputs, graph.outputs[:-1], graph.constants, graph.opsets
    )
    assert fewer.digest != graph.digest
