"""Layers of the overlay: what is found in parts, refused, and how far it is from ONNX's meaning."""

from pathlib import Path

import numpy as np
import pytest

import hetsched
from bench.fpga_parts import Build, convolution, drawn, joined, product, runtime
from hetsched.errors import UnsupportedOperation
from hetsched.fpga import reference
from hetsched.fpga.isa import requantise
from hetsched.fpga.layers import (
    BIAS_UNIT,
    LARGEST_SCALE,
    Convolution,
    Maximum,
    Sum,
    multiplier_and_shift,
    network,
    sum_factors,
)
from hetsched.graph import Graph
from hetsched.lowering.quantized import addition

DATA = Path(__file__).parent / "data"


def check(graph: Graph, seed: int = 0) -> None:
    """The reference is what ONNX Runtime computes on bytes without sign.

    With a sign it computes in floats, and differs by at most one, and seldom that.
    """
    inputs = drawn(graph, seed)
    found = reference.run(network(graph), inputs)
    for array, wanted in zip(found, runtime(graph, inputs), strict=True):
        assert array.dtype == wanted.dtype
        assert array.shape == wanted.shape
        difference = np.abs(array.astype(int) - wanted.astype(int))
        assert difference.max() <= (wanted.dtype == np.int8)
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


@pytest.mark.parametrize("seed", range(6))
def test_what_is_joined_is_as_onnx_has_it(seed: int) -> None:
    check(joined(seed), seed)


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
            assert np.array_equal(array, wanted)
    assert kinds.count(Convolution) == (4 if model == "digits_cnn" else 5)
    if model == "digits_cnn":
        # From the first layer to the last, an image that is flattened among them.
        ops = graph.ops[1:-1]
        whole = network(graph.part(ops, "whole"))
        assert [type(layer) for layer in whole.layers] == [
            Convolution, Convolution, Maximum, Convolution, Convolution
        ]  # fmt: skip
        part = graph.part(ops, "whole")
        for image in images:
            pixels = np.rint(image[None] * 255).astype(np.uint8)
            assert np.array_equal(reference.run(whole, [pixels]), runtime(part, [pixels]))


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


def test_every_scale_is_met() -> None:
    rng = np.random.default_rng(0)
    scales = np.concatenate([2.0 ** rng.uniform(-31, 0.9999, 10000), 2.0 ** np.arange(-31.0, 1)])
    scales = np.append(scales, [*np.nextafter(2.0 ** np.arange(-5.0, 1), 0), LARGEST_SCALE])
    multiplier, shift = multiplier_and_shift(scales)
    assert multiplier.min() >= 2**23
    assert multiplier.max() < 2**24
    assert shift.min() >= 23
    assert shift.max() <= 54
    error = np.abs(multiplier / 2.0**shift / scales - 1)
    assert error.max() <= 2.0**-24
    floats = scales[scales < LARGEST_SCALE].astype(np.float32)
    multiplier, shift = multiplier_and_shift(floats)
    assert np.array_equal(np.ldexp(multiplier.astype(float), -shift), floats)
    assert multiplier_and_shift(np.array(2.0**-40))[1] == 54


@pytest.mark.parametrize("scale", [2.0**-7, 3 * 2.0**-9, 0.0123, 0.7, 1.9, 4.1e-5])
def test_sums_are_rounded_as_in_float32(scale: float) -> None:
    """Those at random, and those whose product is nearest to a half, on both sides."""
    factor = np.float32(scale)
    rng = np.random.default_rng(0)
    limit = min(2**24, int(400 / scale))
    halves = np.rint((np.arange(-300, 300) + 0.5) / float(factor)).astype(np.int64)
    beside = np.concatenate([halves + side for side in (-1, 0, 1)])
    sums = np.concatenate([rng.integers(-limit, limit, 100000), beside[np.abs(beside) <= 2**24]])
    multiplier, shift = multiplier_and_shift(factor)
    for zero, low, high in ((0, -128, 127), (-128, -128, 127), (7, -20, 100)):
        wanted = np.rint(sums.astype(np.float32) * factor) + zero
        found = requantise(sums, multiplier, shift, zero, low, high)
        assert np.array_equal(found, np.clip(wanted, low, high))


def test_a_product_that_float32_takes_for_a_half_goes_to_the_even_side() -> None:
    """Worked out: at a half, a step of float32 is 2**-24 or more; at 100, it is 2**-17."""
    multiplier, shift = np.array(1 << 23), np.array(47)

    def rounded(total: int) -> int:
        return int(requantise(np.array(total), multiplier, shift))

    assert [rounded(2**23 + step) for step in (-1, 0, 1)] == [0, 0, 1]
    for half, even in ((100.5, 100), (101.5, 102), (-100.5, -100)):
        middle = int(half * 2**24)
        assert {rounded(middle + step) for step in range(-63, 64, 9)} == {even}
        assert rounded(middle - 65) == int(np.floor(half))
        assert rounded(middle + 65) == int(np.ceil(half))


def test_sums_of_two_tensors_are_right_for_all_pairs() -> None:
    rng = np.random.default_rng(0)
    for place in range(10):
        scales = [np.float32(scale) for scale in 2.0 ** rng.uniform(-6, -4, 3)]
        least = (0, -128)[place % 2]
        zeros = (rng.integers(0, 256, 3) + least).tolist()
        found = sum_factors(*addition(scales, zeros), least)
        assert found.different == 0
        assert max(found.factors) < 2**21
        total = 255 * sum(found.factors) + abs(BIAS_UNIT * found.bias)
        assert total - 127 * sum(found.factors) < 2**31


def test_a_sum_is_a_layer() -> None:
    build = Build()
    y = build.rounded(build.op("Add", build.input(1, 3, 4, 4), build.input(1, 3, 4, 4)))
    assert isinstance(network(build.graph(y)).layers[0], Sum)
