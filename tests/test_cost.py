"""Prices: what is alike is asked once, and what is not alike is told apart."""

from collections.abc import Sequence

import numpy as np
import pytest
from graphs import Builder

from hetsched.cost import CostModel, graph_of, kernel_of, price, signature
from hetsched.device import Device
from hetsched.errors import ModelError, UnsupportedOperation
from hetsched.graph import Graph
from hetsched.plugin import load
from hetsched.store import Kernel
from hetsched.system import System
from hetsched.target import Target


def reshaped(sizes: tuple[int, ...], name: str = "x", opset: int | None = None) -> Graph:
    build = Builder()
    x = build.input(name, 4, 6)
    graph = build.graph(build.op("Reshape", x, build.constant(np.array(sizes)), shape=(24,)))
    if opset is None:
        return graph
    return Graph("g", graph.ops, graph.inputs, graph.outputs, graph.constants, {"": opset})


def product(weights: np.ndarray, twice: bool = False, **attributes: object) -> Graph:
    build = Builder()
    x, y = build.input("x", 4, 4), build.input("y", 4, 4)
    z = build.op("MatMul", x, build.constant(weights))
    return build.graph(build.op("Add", z, z if twice else y, **attributes))


ONES, RAMP = np.ones((4, 4), np.float32), np.arange(16, dtype=np.float32).reshape(4, 4)


def test_names_and_weights_make_no_difference() -> None:
    assert signature(product(ONES)) == signature(product(RAMP))
    assert signature(reshaped((24,))) == signature(reshaped((24,), "other"))


def test_whatever_else_differs_makes_one() -> None:
    graphs = [
        product(ONES),
        product(ONES.astype(np.float64)),
        product(ONES, twice=True),
        product(ONES, axis=1),
        product(ONES, axis=(1, 2)),
        product(ONES, axis=np.ones(2)),
        product(ONES, axis=np.ones(3)),
        reshaped((24,)),
        # The value of an integer constant is a parameter.
        reshaped((-1,)),
        reshaped((24,), opset=12),
    ]
    assert len({signature(graph) for graph in graphs}) == len(graphs)


def test_the_graph_of_a_kernel_comes_back_from_the_store_without_its_weights() -> None:
    build = Builder()
    x = build.input("x", 8, 64)
    large = build.constant(np.full((64, 64), 2, np.float32))
    small = build.constant(np.full(64, 3, np.float32))
    graph = build.graph(build.op("Add", build.op("MatMul", x, large, shape=(8, 64)), small))
    kernel = kernel_of(graph)
    assert kernel.kinds == "MatMul+Add"
    assert len(kernel.model) < 2000
    again = graph_of(kernel)
    assert signature(again) == kernel.signature == signature(graph)
    assert sorted(float(array.max()) for array in again.constants.values()) == [0.0, 3.0]


@pytest.mark.parametrize("model", [b"", b"no model at all", b"\x0a\xff\xff"])
def test_what_is_no_graph_of_a_kernel_is_one_line(model: bytes) -> None:
    with pytest.raises(ModelError, match="has no graph of 'Conv'"):
        graph_of(Kernel("k", "Conv", model))


def chain(count: int, scales: Sequence[float]) -> Graph:
    build = Builder()
    x = build.input("x", 8, 8)
    for index in range(count):
        x = build.op("MatMul", x, build.constant(np.full((8, 8), index, np.float32)))
        scale = build.constant(np.array([1, 1, scales[index]], np.float32))
        x = build.op("Resize", x, scale, shape=(8, 8))
    return build.graph(x)


@pytest.mark.parametrize("refused", ["", "MatMul"])
def test_what_is_alike_is_asked_once(monkeypatch: pytest.MonkeyPatch, refused: str) -> None:
    """But each that is refused by its own name, and each value that may be a reason."""
    asked: list[str] = []

    def refusals(target: Target, parts: Sequence[Graph], device: Device) -> list[str | None]:
        asked.extend(part.ops[0].kind for part in parts)
        return [f"no {part.ops[0]}" if part.ops[0].kind == refused else None for part in parts]

    monkeypatch.setattr("hetsched.cost.kept_refusals", refusals)
    graph = chain(6, (1, 1, 1, 1, 2, 2))
    system = System("m", (Device("a", "reference"), Device("b", "cpu")), ())
    costs = load(CostModel, "roofline")
    if refused:
        with pytest.raises(UnsupportedOperation, match=str(graph.groups[0].ops[0])):
            price(graph, system, costs)
    else:
        prices = price(graph, system, costs)
        assert len(prices.seconds) == 12
    again = 5 if refused else 0
    # Twice: for each kind of device.
    assert sorted(asked) == 2 * (1 + again) * ["MatMul"] + 2 * 2 * ["Resize"]
