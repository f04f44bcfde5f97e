"""Parts as functions of addresses: where their tensors lie, and that the code keeps to it."""

import json
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper, shape_inference

from hetsched.device import Device
from hetsched.errors import PackageError
from hetsched.graph import Graph, from_onnx
from hetsched.host import cores
from hetsched.plugin import load
from hetsched.target import Artifact, Kernel, Target

pytest.importorskip("tvm")

SHAPE = (2, 3, 40)


@pytest.fixture(scope="module")
def entry() -> Any:
    return import_module("hetsched.lowering.entry")


@pytest.fixture
def target() -> Target:
    return load(Target, "cpu")


def graph(nodes: Sequence[Any], outputs: dict[str, Sequence[int]], **weights: np.ndarray) -> Graph:
    def value(name: str, shape: Sequence[int]) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    return from_onnx(
        shape_inference.infer_shapes(
            helper.make_model(
                helper.make_graph(
                    nodes,
                    "part",
                    [value("x", SHAPE)],
                    [value(name, shape) for name, shape in outputs.items()],
                    [numpy_helper.from_array(array, name) for name, array in weights.items()],
                ),
                opset_imports=[helper.make_opsetid("", 17)],
            )
        )
    )


def opened(target: Target, part: Graph, name: str = "cpu") -> tuple[Kernel, Artifact, Device]:
    device = target.device(name)
    artifact = target.compile(part, device)
    return target.load(artifact, part, device), artifact, device


def chain(length: int) -> Graph:
    """Softmax is never fused with what follows it, so that each result lies in memory."""
    nodes = [
        helper.make_node(
            "Softmax", [f"t{i}" if i else "x"], [f"t{i + 1}" if i + 1 < length else "y"], f"n{i}"
        )
        for i in range(length)
    ]
    return graph(nodes, {"y": SHAPE})


def softmax(x: np.ndarray) -> np.ndarray:
    powers = np.exp(x - x.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def test_memory_is_used_again(entry: Any) -> None:
    def lives(nbytes: int, first: int, last: int) -> Any:
        return entry.Memory(nbytes, first=first, last=last)

    memories = [
        lives(100, 0, 1), lives(100, 1, 2), lives(60, 2, 3), lives(500, 0, 3)
    ]  # fmt: skip
    # The long one first; the third is where the first was, which is read no more.
    assert entry.placed(memories) == 740
    assert [memory.start for memory in memories] == [512, 640, 512, 0]
    assert all(memory.start % 64 == 0 for memory in memories)
    assert entry.placed([]) == 0


def test_a_chain_needs_two_places(target: Target) -> None:
    kernel, artifact, _ = opened(target, chain(6))
    nbytes = int(np.prod(SHAPE)) * 4
    workspace = json.loads(artifact.files["layout.json"])["workspace_nbytes"]
    assert nbytes <= workspace <= 2 * nbytes
    x = np.random.default_rng(0).standard_normal(SHAPE, np.float32)
    expected = x
    for _ in range(6):
        expected = softmax(expected)
    for _ in range(3):
        np.testing.assert_allclose(kernel.run([x])[0], expected, rtol=1e-5)
    kernel.close()


def test_a_reader_follows_its_writer(target: Target) -> None:
    """Several kernels on one workspace, which LLVM must not believe to be apart."""
    indices = np.array([3, -1, 0], np.int64)
    nodes = [
        helper.make_node("Add", ["x", "one"], ["a"], "add"),
        helper.make_node("Softmax", ["a"], ["s"], "softmax"),
        helper.make_node("Gather", ["s", "i"], ["y"], "gather", axis=2),
    ]
    part = graph(nodes, {"y": (2, 3, 3)}, one=np.ones((), np.float32), i=indices)
    kernel, _, _ = opened(target, part)
    rng = np.random.default_rng(0)
    for _ in range(5):
        x = rng.standard_normal(SHAPE, np.float32)
        np.testing.assert_allclose(
            kernel.run([x])[0], softmax(x)[..., indices], rtol=1e-5
        )  # fmt: skip
    kernel.close()


def test_outputs_own_their_memory(target: Target) -> None:
    """One is a view of another, one of the input, and one is read by a later kernel."""
    nodes = [
        helper.make_node("Softmax", ["x"], ["s"], "softmax"),
        helper.make_node("Reshape", ["s", "flat"], ["view"], "view"),
        helper.make_node("Reshape", ["x", "flat"], ["same"], "same"),
        helper.make_node("Softmax", ["s"], ["y"], "again"),
    ]
    flat = np.array([-1], np.int64)
    size = int(np.prod(SHAPE))
    part = graph(nodes, {"s": SHAPE, "view": (size,), "same": (size,), "y": SHAPE}, flat=flat)
    kernel, _, _ = opened(target, part)
    x = np.random.default_rng(0).standard_normal(SHAPE, np.float32)
    once = softmax(x)
    expected = [once, once.reshape(-1), x.reshape(-1), softmax(once)]
    results = kernel.run([x])
    for result, wanted in zip(results, expected, strict=True):
        np.testing.assert_allclose(result, wanted, rtol=1e-5)
    everything = [x, *results, *kernel.run([x])]
    for index, one in enumerate(everything):
        assert not any(np.shares_memory(one, other) for other in everything[:index])
    kernel.close()


def test_loops_use_the_threads_of_their_device(target: Target) -> None:
    """One thread counts its own way; the same thread may then run a kernel of all cores."""
    part = chain(2)
    x = np.random.default_rng(0).standard_normal(SHAPE, np.float32)
    for name in (target.devices()[-1], "cpu", target.devices()[-1]):
        kernel, _, _ = opened(target, part, name)
        np.testing.assert_allclose(kernel.run([x])[0], softmax(softmax(x)), rtol=1e-5)
        kernel.close()


def test_the_small_weights_must_be_whole(target: Target) -> None:
    nodes = [helper.make_node("Add", ["x", "w"], ["y"], "add")]
    part = graph(nodes, {"y": SHAPE}, w=np.arange(40, dtype=np.float32))
    kernel, artifact, device = opened(target, part)
    x = np.ones(SHAPE, np.float32)
    np.testing.assert_array_equal(kernel.run([x])[0], x + np.arange(40, dtype=np.float32))
    kernel.close()
    cut = {**artifact.files, "constants.bin": artifact.files["constants.bin"][:-1]}
    with pytest.raises(PackageError, match=r"constants\.bin is cut short"):
        target.load(replace(artifact, files=cut), part, device)


@pytest.mark.skipif(len(cores()) < 2, reason="one core has nothing to share")
@pytest.mark.parametrize(("columns", "shared"), [(8, False), (4096, True)])
def test_threads_are_used_where_a_loop_is_shared(
    target: Target, columns: int, shared: bool
) -> None:
    """What is too small to be shared runs on the caller's thread, whatever the device has."""
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((SHAPE[-1], columns)).astype(np.float32)
    product = helper.make_node("MatMul", ["x", "w"], ["y"])
    part = graph([product], {"y": (*SHAPE[:-1], columns)}, w=weights)
    device = target.device("cpu")
    x = rng.standard_normal(SHAPE).astype(np.float32)
    with target.load(target.compile(part, device), part, device) as kernel:
        assert kernel.any_thread is not shared
        np.testing.assert_allclose(kernel.run([x])[0], x @ weights, atol=1e-4)
