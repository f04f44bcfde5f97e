"""Kernel groups in sequence: that it is the graph that runs, and what is compiled and told."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from graphs import Builder
from test_views import halves
from test_views import tokens as layers

from hetsched import cache, oracle
from hetsched.device import Device
from hetsched.errors import CompileError
from hetsched.graph import Graph, to_onnx
from hetsched.inputs import seeded
from hetsched.plugin import load
from hetsched.rewrite import split
from hetsched.sequence import (
    CODE_NBYTES,
    LEAST_PASSES,
    KernelSequence,
    _InCode,
    left_out,
    method,
    surroundings_of,
)
from hetsched.target import Artifact, Target


def device(name: str = "cpu:0") -> Device:
    return load(Target, name.partition(":")[0]).device(name)


def tokens() -> Graph:
    """Two layers of one signature and one content: what stands for the other is as good."""
    graph = layers()
    weights = next(iter(graph.constants.values()))
    return replace(graph, constants=dict.fromkeys(graph.constants, weights))


def ranked() -> Graph:
    """A sort, which is no code that runs without Python, between two products."""
    build = Builder()
    x = build.input("x", 4, 16)
    weights = build.constant(np.eye(16, dtype=np.float32) * 2)
    y = build.op("MatMul", x, weights, name="first")
    y = build.op("CumSum", y, build.constant(np.array(1, np.int64)), name="between")
    return build.graph(build.op("MatMul", y, weights, name="last"))


def agrees(graph: Graph, found: dict[str, np.ndarray]) -> bool:
    inputs = {tensor.name: seeded(tensor, seed=0) for tensor in graph.inputs}
    wanted = oracle.run(to_onnx(graph), inputs)
    assert set(found) == set(wanted)
    return all(np.allclose(found[name], wanted[name], rtol=1e-4, atol=1e-5) for name in wanted)


@pytest.mark.parametrize("name", ["cpu:0", "reference"])
@pytest.mark.parametrize("make", [tokens, ranked])
def test_it_is_the_graph_that_runs(name: str, make: Callable[[], Graph]) -> None:
    graph = make()
    with KernelSequence(graph, graph.groups, device(name)) as kernels:
        assert agrees(graph, kernels.run())
        times = kernels.burst(0.0)
    assert list(times) == [group.name for group in graph.groups]
    for seconds in times.values():
        assert len(seconds) == LEAST_PASSES
        assert min(seconds) > 0


def test_pieces_run_with_their_views() -> None:
    whole = tokens()
    graph = split(whole, halves(whole, 1, 0, 6, 12))
    assert graph.views
    with KernelSequence(graph, graph.groups, device()) as kernels:
        assert agrees(whole, kernels.run())


def test_groups_of_one_signature_are_compiled_once_and_have_their_own_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    graph, compiled = tokens(), Counter[str]()

    def counted(target: Target, part: Graph, device: Device) -> Artifact:
        compiled[part.ops[0].kind] += 1
        return cache.compiled(target, part, device)

    monkeypatch.setattr("hetsched.sequence.compiled", counted)
    with KernelSequence(graph, graph.groups, device()) as kernels:
        first, _, second, _ = (
            {int(row) for row in member.code.table[:, 1]} for member in kernels._members
        )
    assert compiled == {"MatMul": 1, "Softmax": 1}
    assert first & second <= {0}


def test_what_is_not_there_is_given() -> None:
    graph = tokens()
    chosen = [group for group in graph.groups if group.name in ("product1", "softmax0")]
    with KernelSequence(graph, chosen, device()) as kernels:
        assert list(kernels.burst(0.0)) == ["softmax0", "product1"]
        assert kernels.run() == {}


def test_what_is_left_out_is_read_in_its_place() -> None:
    """Few kernels that run alone have all they need in the nearest cache, which no run has."""
    graph = tokens()
    names = [group.name for group in graph.groups]
    assert names == ["product0", "softmax0", "product1", "softmax1"]
    touched = {
        group.name: CODE_NBYTES + sum(t.nbytes for t in (*group.constants, *group.outputs))
        for group in graph.groups
    }
    assert left_out(graph, names, 1 << 30) == dict.fromkeys(names, 0)
    wanted = {"softmax0": touched["product0"] + touched["softmax1"], "product1": 0}
    assert left_out(graph, ["product1", "softmax0"], 1 << 30) == wanted
    half = sum(wanted.values()) // 2
    assert left_out(graph, ["product1", "softmax0"], half) == {"softmax0": half, "product1": 0}
    chosen = [group for group in graph.groups if group.name in ("product1", "softmax0")]
    with KernelSequence(graph, chosen, device()) as kernels:
        (stretch,) = kernels._stretches
        assert isinstance(stretch, _InCode)
        steps = [step.name for step in stretch._crew._routes[0].course.steps]
    first = steps.index("others before softmax0")
    assert first < steps.index("softmax0")
    assert not [name for name in steps if name == "others before product1"]


def test_what_the_target_refuses_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = tokens()

    def refused(target: Target, part: Graph, device: Device) -> Artifact:
        if part.ops[0].kind == "Softmax":
            raise CompileError("no")
        return cache.compiled(target, part, device)

    monkeypatch.setattr("hetsched.sequence.compiled", refused)
    with KernelSequence(graph, graph.groups, device()) as kernels:
        assert kernels.refused == {"softmax0": "no", "softmax1": "no"}
        assert list(kernels.burst(0.0)) == ["product0", "product1"]


def test_what_is_too_late_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, clock = tokens(), iter(range(100))
    monkeypatch.setattr("hetsched.sequence.perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr("hetsched.sequence.cores", lambda: (0,))
    backwards = tuple(reversed(graph.groups))
    with KernelSequence(graph, backwards, device(), deadline=1.0) as kernels:
        # The softmax came first.
        assert list(kernels.burst(0.0)) == ["softmax0", "softmax1"]
        assert not kernels.refused


def test_samples_belong_to_surroundings_of_one_size() -> None:
    graph = tokens()
    assert method(graph) == "sequence 2, within 1 MB"
    build = Builder()
    weights = build.constant(np.zeros((1024, 1025), np.float32))
    product = build.op("MatMul", build.input("x", 4, 1024), weights, shape=(4, 1025))
    assert surroundings_of(method(build.graph(product))) == 16
    assert surroundings_of("alone") is None


def test_what_stays_in_a_kernel_is_no_part_of_the_surroundings() -> None:
    build = Builder()
    weights = build.constant(np.zeros((4, 1024), np.float32))
    product = build.op("MatMul", build.input("x", 512, 4), weights, shape=(512, 1024))
    graph = build.graph(build.op("Relu", product, shape=(512, 1024)))
    assert len(graph.groups) == 1
    # One tensor of 2 MB, and little else.
    assert surroundings_of(method(graph)) == 4
