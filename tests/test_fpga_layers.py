"""Layers of the overlay: what is found in parts, refused, and how far it is from ONNX's meaning."""

from pathlib import Path

import numpy as np
import pytest

import hetsched
from bench.fpga_parts import Build, convolution, drawn, product, runtime
from hetsched.errors import UnsupportedOperation
from hetsched.fpga import reference
from hetsched.fpga.layers import (
    LARGEST_SCALE,
    Convolution,
    Maximum,
    Sum,
    multiplier_and_shift,
    network,
    sum_factors,
)
from hetsched.graph import Graph

DATA = Path(__file__).parent / "data"


def check(graph: Graph, seed: int = 0) -> None:
    """The reference is ONNX's meaning but for at most one, and seldom that."""
    inputs = drawn(graph, seed)
    found = reference.run(network(graph), inputs)
    for array, wanted in zip(found, runtime(graph, inputs), strict=True):
        assert array.dtype == wanted.dtype
        assert array.shape == wanted.shape
        difference = np.abs(array.astype(int) - wanted.astype(int))
        assert difference.max() <= 1
        assert np.sum(difference) <= 1 + difference.size / 50
        assert len(np.unique(wanted)) > min(2, wanted.size // 2), "the results hardly differ"


@pytest.mark.parametrize("seed", range(40))
def test_convolutions_are_as_onnx_has_them(seed: int) -> None:
    check(convolution(seed), seed)


@pytest.mark.parametrize("kind", ["Gemm", "MatMul"])
@pytest.mark.parametrize("seed", range(8))
def test_products_are_as_onnx_has_them(seed: int, kind: str) -> None:
    check(product(seed, kind), seed)


@pytest.mark.parametrize("seed", range(8))
def test_sums_are_as_onnx_has_them(seed: int) -> None:
    rng = np.random.default_rng(seed)
    build = Build(dtype=("int8", "uint8")[seed % 2])
    shape = (1, 5, 6, 7) if seed % 4 else (9, 13)
    terms = [
        build.input(*shape, scale=float(rng.random() * 0.1 + 1e-3), zero=build.zero + int(zero))
        for zero in rng.integers(-9, 9, 2)
    ]
    y = build.op("Add", *terms)
    y = build.op("Relu", y) if seed % 3 == 0 else y
    check(build.graph(build.rounded(y, 0.08)), seed)


def test_pools_are_as_onnx_has_them() -> None:
    for dtype in ("int8", "uint8"):
        build = Build(dtype)
        x = build.input(1, 11, 9, 8)
        y = build.op("MaxPool", x, kernel_shape=[3, 2], strides=[2, 1], pads=[1, 0, 0, 1])
        z = build.again(build.rounded(y), like=x)
        mean = build.rounded(build.op("GlobalAveragePool", z), 0.03)
        graph = build.graph(mean)
        assert [type(layer) for layer in network(graph).layers] == [Maximum, Convolution]
        check(graph)


def test_a_signal_is_an_image_of_one_row() -> None:
    build = Build()
    rng = np.random.default_rng(0)
    x = build.input(1, 3, 40)
    w = build.weights(rng.integers(-127, 128, (5, 3, 4)).astype(np.int8), np.full(5, 0.001))
    y = build.op("Conv", x, w, strides=[2], pads=[1, 2], kernel_shape=[4])
    check(build.graph(build.rounded(y)))


@pytest.mark.parametrize("model", ["digits_cnn", "digits_branch"])
def test_parts_of_the_digits_models(model: str) -> None:
    with np.load(DATA / "digits_test.npz") as data:
        images = data["x"][:100] / np.float32(16)
    found = hetsched.quantize(DATA / f"{model}.onnx", {"image": images})
    graph = hetsched.read_onnx(found.model)
    kinds: list[type] = []
    for group in graph.groups:
        if {op.kind for op in group.ops} <= {"QuantizeLinear", "DequantizeLinear"}:
            continue
        part = graph.part(group.ops, "part")
        if any(op.kind in ("Mul", "ReduceMean", "Sigmoid") for op in group.ops):
            with pytest.raises(UnsupportedOperation, match="bytes"):
                network(part)
            continue
        kinds += [type(layer) for layer in network(part).layers]
        inputs = drawn(part, len(kinds))
        for array, wanted in zip(
            reference.run(network(part), inputs), runtime(part, inputs), strict=True
        ):
            assert np.abs(array.astype(int) - wanted.astype(int)).max() <= 1
    assert kinds.count(Convolution) == (4 if model == "digits_cnn" else 5)
    if model == "digits_cnn":
        # From the first layer to the last, an image that is flattened among them.
        ops = graph.ops[1:-1]
        whole = network(graph.part(ops, "whole"))
        assert [type(layer) for layer in whole.layers] == [
            Convolution, Convolution, Maximum, Convolution, Convolution
        ]  # fmt: skip
        part = graph.part(ops, "whole")
        right = 0
        for image in images:
            pixels = np.rint(image[None] * 255).astype(np.uint8)
            (logits,) = reference.run(whole, [pixels])
            right += int(np.argmax(logits) == np.argmax(runtime(part, [pixels])[0]))
        assert right == 100


def refusal(graph: Graph) -> str:
    with pytest.raises(UnsupportedOperation) as error:
        network(graph)
    return str(error.value)


def _pixel(build: Build, x: str, dtype: str = "int8", scale: float = 0.001) -> str:
    weights = build.weights(np.ones((4, 3, 1, 1), dtype), np.full(4, scale))
    return build.op("Conv", x, weights, kernel_shape=[1, 1])


def test_what_has_no_layer_is_refused_by_name() -> None:
    build = Build()
    x = build.input(2, 3, 4, 4)
    assert "batch of 2" in refusal(build.graph(build.rounded(_pixel(build, x))))
    build = Build()
    x = build.input(1, 3, 4, 4)
    assert "'Sigmoid" in refusal(build.graph(build.rounded(build.op("Sigmoid", x))))
    build = Build()
    x = build.input(1, 3, 4, 4)
    text = refusal(build.graph(build.rounded(_pixel(build, x, "uint8"))))
    assert text.endswith("its weights have a zero point")
    build = Build()
    x = build.input(1, 3, 4, 4)
    assert "its scale is 3" in refusal(build.graph(build.rounded(_pixel(build, x, scale=3.0))))
    build = Build()
    terms = build.input(1, 3, 4, 4), build.input(1, 3, 1, 1)
    assert "differ in shape" in refusal(build.graph(build.rounded(build.op("Add", *terms))))
    build = Build()
    x = build.input(1, 3, 4, 4)
    y = build.op("Transpose", x, perm=[0, 1, 3, 2])
    assert "Transpose" in refusal(build.graph(build.rounded(y)))
    build = Build()
    factors = build.input(4, 4), build.input(4, 4)
    y = build.rounded(build.op("MatMul", *factors))
    assert "is no constant" in refusal(build.graph(y))
    build = Build()
    rng = np.random.default_rng(0)
    x = build.input(1, 140000)
    w = build.weights(rng.choice([-127, 127], (140000, 1)).astype(np.int8), 1e-6)
    assert "32 bits" in refusal(build.graph(build.rounded(build.op("MatMul", x, w))))


def test_every_scale_is_met_to_two_parts_in_a_million() -> None:
    rng = np.random.default_rng(0)
    scales = np.concatenate([2.0 ** rng.uniform(-29, 0.9999, 10000), 2.0 ** np.arange(-29.0, 1)])
    scales = np.append(scales, [*np.nextafter(2.0 ** np.arange(-5.0, 1), 0), LARGEST_SCALE])
    multiplier, shift = multiplier_and_shift(scales)
    assert multiplier.min() >= 2**16
    assert multiplier.max() < 2**17
    assert shift.min() >= 16
    assert shift.max() <= 47
    error = np.abs(multiplier / 2.0**shift / scales - 1)
    assert error.max() <= 2.0**-17
    assert multiplier_and_shift(np.array(2.0**-40))[1] == 47


def test_factors_of_a_sum_keep_their_proportion() -> None:
    for first, second in ((1.0, 1.0), (0.3, 0.7), (1.9, 1e-4), (1e-5, 2e-5)):
        (a, b), multiplier, shift = sum_factors(first, second)
        assert max(a, b) == 16383
        for factor, scale in ((a, first), (b, second)):
            found = factor * multiplier / 2.0**shift
            assert abs(found - scale) <= max(first, second) / 16383


def test_a_sum_is_a_layer() -> None:
    build = Build()
    y = build.rounded(build.op("Add", build.input(1, 3, 4, 4), build.input(1, 3, 4, 4)))
    assert isinstance(network(build.graph(y)).layers[0], Sum)
