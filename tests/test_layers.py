"""The table of layers: kernels and nodes find the layers that they compute."""

import pytest

from bench.layers import Call, Found, beside, matched, profiled, summary
from bench.models import load, models
from hetsched import read_onnx
from hetsched.graph import Graph

LANES = 16


@pytest.fixture(scope="module")
def graph() -> Graph:
    """3x3 of 3 to 32 channels with stride 2, 3x3 of 32, 1x1 to 64, mean, and a Gemm."""
    return read_onnx(load(next(m for m in models() if m.name == "width_149")))


def calls() -> dict[Call, float]:
    big = (1, 2, 149 * 149, 16)
    return {
        Call(1, "stem", ((1, 3, 297, 297), (2, 3, 3, 3, 16), (1, 2, 1, 16), big)): 1e-3,
        Call(3, "max_pool", (big, big)): 1e-5,
        Call(4, "convolution", (big, (36, 2, 2, 16, 16), (1, 2, 1, 16), big)): 2e-3,
        Call(6, "dense", (big, (4, 2, 1, 1, 16, 16), (1, 4, 1, 16), (1, 4, 149 * 149, 16))): 1e-3,
        Call(9, "matmul", ((1, 64), (1, 64, 16), (10,), (1, 10))): 1e-6,
    }


def test_kernels_find_their_layers(graph: Graph) -> None:
    found = matched(calls(), graph, LANES)
    assert [layer.kind for layer in found] == ["direct", "", "winograd", "direct", "gemm"]
    assert found[2].shape == "32x149x149, 3x3 -> 32x149x149"
    assert found[2].flops == pytest.approx(2 * 149**2 * 32 * 32 * 9, rel=0.01)
    assert found[2].flops_per_second == found[2].flops / 2e-3


def test_nodes_find_their_layers(graph: Graph) -> None:
    def node(name: str, microseconds: int, *shapes: tuple[int, ...]) -> dict:
        *reads, writes = ({"float": list(shape)} for shape in shapes)
        arguments = {"input_type_shape": reads, "output_type_shape": [writes]}
        return {"cat": "Node", "name": f"{name}_kernel_time", "dur": microseconds} | {
            "args": arguments
        }

    one = ((1, 32, 149, 149), (32, 32, 3, 3), (1, 32, 149, 149))
    packed = ((1, 64), (10,), (1, 10))
    events = [
        {"cat": "Session", "name": "model_run", "dur": 9},
        *(node("conv", took, *one) for took in (30, 50, 40)),
        node("gemm", 7, *packed),
    ]
    layers = beside(matched(calls(), graph, LANES), graph, profiled(events))
    assert layers[2].peer_seconds == pytest.approx(40e-6)
    assert layers[4].peer_seconds == pytest.approx(7e-6)
    assert layers[0].peer_seconds is layers[1].peer_seconds is None


def test_summary(graph: Graph) -> None:
    layers = matched(calls(), graph, LANES)
    told = summary(Found("width_149", 1e11, 1e-2, 1e-2, tuple(layers)))
    assert told["direct"]["kernels"] == 2
    assert told["direct"]["seconds"] == pytest.approx(2e-3)
    assert told["other"]["median_share"] is None
