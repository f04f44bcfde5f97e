"""Kernels for graphics processors, run by PoCL, which poses as one with groups and barriers."""

from dataclasses import replace

import numpy as np
import pytest
from graphs import graph_of
from onnx import helper

from hetsched import oracle
from hetsched.device import Device
from hetsched.graph import Graph, to_onnx
from hetsched.launches import WORKSPACE, Program
from hetsched.plugin import load
from hetsched.schedules.gpu.limits import Limits
from hetsched.target import Target

RNG = np.random.default_rng(0)
node = helper.make_node


def normal(*shape: int) -> np.ndarray:
    return (RNG.standard_normal(shape) * 0.5).astype(np.float32)


def ragged() -> Graph:
    """A convolution and a product whose sizes are no multiple of any tile."""
    nodes = [
        node("Conv", ["x", "w", "b"], ["c"], pads=[1, 1, 1, 1], strides=[2, 1]),
        node("Relu", ["c"], ["r"]),
        node("Transpose", ["r"], ["t"], perm=[0, 2, 3, 1]),
        node("MatMul", ["t", "m"], ["y"]),
    ]
    constants = {"w": normal(19, 5, 3, 3), "b": normal(19), "m": normal(19, 11)}
    return graph_of(nodes, (2, 5, 11, 13), constants)


def windows() -> Graph:
    """What a thread an element computes: depthwise and grouped convolutions, and a pooling."""
    nodes = [
        node("Conv", ["x", "d"], ["a"], group=12, pads=[2, 2, 2, 2]),
        node("Conv", ["a", "g"], ["b"], group=3),
        node("AveragePool", ["b"], ["y"], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
    ]
    return graph_of(nodes, (1, 12, 9, 9), {"d": normal(12, 1, 5, 5), "g": normal(6, 4, 1, 1)})


def gated() -> Graph:
    """A few sums, each of which scales a plane: the sum and what repeats it are two kernels."""
    nodes = [
        node("GlobalAveragePool", ["x"], ["p"]),
        node("Conv", ["p", "w", "b"], ["c"]),
        node("HardSigmoid", ["c"], ["s"]),
        node("Mul", ["x", "s"], ["y"]),
    ]
    return graph_of(nodes, (1, 8, 12, 10), {"w": normal(8, 8, 1, 1), "b": normal(8)})


def rows() -> Graph:
    """Rows that a group of threads reduces together."""
    nodes = [
        node("LayerNormalization", ["x", "s", "b"], ["n"], axis=-1),
        node("Softmax", ["n"], ["m"], axis=-1),
        node("ReduceMean", ["m"], ["y"], axes=[1], keepdims=0),
    ]
    return graph_of(nodes, (3, 37, 65), {"s": normal(65), "b": normal(65)})


def one() -> Graph:
    """A single element, of which all threads but one keep off."""
    return graph_of([node("MatMul", ["x", "m"], ["y"])], (1, 64), {"m": normal(64, 1)})


def functions() -> Graph:
    """Functions that C has another name of, and numbers that seven digits do not tell."""
    nodes = [
        node("Tan", ["x"], ["t"]),
        node("Erf", ["t"], ["e"]),
        node("Mul", ["e", "c"], ["m"]),
        node("LeakyRelu", ["m"], ["y"], alpha=0.123456789),
    ]
    return graph_of(nodes, (3, 5), {"c": np.array(0.70710677, np.float32)})


def bidirectional() -> Graph:
    nodes = [
        node("GRU", ["x", "w", "r", "b", "n"], ["y"], hidden_size=7, direction="bidirectional")
    ]
    lengths = np.array([4, 2], np.int32)
    constants = {"w": normal(2, 21, 3), "r": normal(2, 21, 7), "b": normal(2, 42), "n": lengths}
    return graph_of(nodes, (4, 2, 3), constants)


def quantised() -> Graph:
    """Products of bytes, without a processor's instructions."""
    scale, zero = np.array(0.05, np.float32), np.array(3, np.uint8)
    nodes = [
        node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        node("DequantizeLinear", ["w", "s"], ["v"]),
        node("Conv", ["d", "v"], ["c"], pads=[1, 1, 1, 1]),
        node("QuantizeLinear", ["c", "s", "z"], ["p"]),
        node("DequantizeLinear", ["p", "s", "z"], ["e"]),
        node("Add", ["d", "e"], ["a"]),
        node("QuantizeLinear", ["a", "s", "z"], ["t"]),
        node("DequantizeLinear", ["t", "s", "z"], ["y"]),
    ]
    weights = RNG.integers(-50, 50, (4, 4, 3, 3)).astype(np.int8)
    return graph_of(nodes, (1, 4, 6, 6), {"s": scale, "z": zero, "w": weights})


GRAPHS = (ragged, windows, gated, rows, one, functions, bidirectional, quantised)


@pytest.fixture(scope="module")
def target() -> Target:
    found = load(Target, "opencl")
    if reason := found.unavailable():
        pytest.skip(reason)
    return found


@pytest.fixture(scope="module")
def device(target: Target) -> Device:
    """The first device, with memory of its own and groups, whatever it is."""
    return replace(
        target.device("opencl:0"),
        kind="gpu",
        cores=(),
        memory_space="its own",
        compute_units=2,
        group_items=256,
        local_nbytes=32 << 10,
    )


@pytest.mark.parametrize("make", GRAPHS)
def test_right_results(make, target: Target, device: Device) -> None:  # type: ignore[no-untyped-def]
    graph = make()
    x = normal(*graph.inputs[0].shape)
    artifact = target.compile(graph, device)
    with target.load(artifact, graph, device) as kernel:
        (output,) = kernel.run([kernel.receive(x)])
        found = kernel.send(output)
    (expected,) = oracle.run(to_onnx(graph), {"x": x}).values()
    peak = np.abs(expected).max()
    np.testing.assert_allclose(found / peak, expected / peak, atol=1e-6)


def test_numbers_keep_all_their_digits(target: Target, device: Device) -> None:
    """TVM writes seven, of which the last is wrong here: by the bits nothing is lost."""
    factor = np.float32(1.0000005)
    graph = graph_of([node("Mul", ["x", "c"], ["y"])], (3,), {"c": np.array(factor)})
    source = target.compile(graph, device).files["kernels.cl"].decode()
    assert f"as_float({factor.view(np.int32)})" in source


def test_what_is_between_kernels_has_its_place(target: Target, device: Device) -> None:
    program = Program.from_files(target.compile(gated(), device).files, "opencl")
    places = [place for launch in program.launches for place in launch.arguments]
    assert len(program.launches) == 3
    assert {place.start % 512 for place in places if place.region == WORKSPACE} == {0}
    # Who reads does not write.
    assert all(sum(p.written for p in launch.arguments) == 1 for launch in program.launches)


def test_tiles_fit_the_device() -> None:
    from hetsched.schedules.gpu import tiles

    for limits in (Limits(), Limits(threads_group=64, shared_nbytes_group=8 << 10)):
        for sizes in ((1, 3136, 64, 576), (12, 197, 197, 64), (1, 9, 8, 3)):
            ranked = tiles.candidates(*sizes, limits)
            assert ranked
            assert all(tile.threads <= limits.threads_group for tile in ranked)
            assert all(tile.shared_nbytes <= limits.shared_nbytes_group for tile in ranked)


def test_large_products_get_large_tiles_and_small_ones_many_groups() -> None:
    from hetsched.schedules.gpu import tiles

    limits = Limits(units=100, threads_group=1024, threads_unit=2048)
    large = tiles.candidates(1, 8192, 8192, 8192, limits)[0]
    small = tiles.candidates(1, 64, 64, 1024, limits)[0]
    assert large.i * large.j > small.i * small.j
