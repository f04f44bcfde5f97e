"""Winograd's convolution: exact to its bound at any size, chosen by a model, and an option."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from hetsched import Graph
from hetsched.device import Device
from hetsched.errors import DeviceError, PluginError
from hetsched.graph import from_onnx
from hetsched.lowering import relax
from hetsched.plugin import load
from hetsched.schedules import winograd
from hetsched.schedules.cycles import Form, Window, convolutions
from hetsched.schedules.rules import CANDIDATE, WINOGRAD, Rules
from hetsched.schedules.vectors import Tile, Vectors
from hetsched.system import System
from hetsched.target import Artifact, Target

Array = np.ndarray
WIDE, NARROW = Vectors(16, 32), Vectors(8, 16)
# What follows the convolution, of the result of which it is given `y`; and the same in float64.
EPILOGUES: dict[str, tuple[list[tuple[str, list[str]]], Callable[[Array, Array], Array]]] = {
    "nothing": ([], lambda y, r: y),
    "residual": ([("Add", ["r"]), ("Relu", [])], lambda y, r: np.maximum(y + r, 0)),
    "clip": ([("Clip", ["zero", "six"])], lambda y, r: np.clip(y, 0, 6)),
    "silu": ([("Sigmoid", []), ("Mul", ["y0"])], lambda y, r: y / (1 + np.exp(-y))),
    "hard swish": ([("HardSwish", [])], lambda y, r: y * np.clip(y / 6 + 0.5, 0, 1)),
    "chain": (
        [("LeakyRelu", []), ("Mul", ["r"]), ("Tanh", []), ("Add", ["y0"])],
        lambda y, r: np.tanh(np.where(y < 0, 0.01 * y, y) * r) + y,
    ),
}


def layer(
    x: tuple[int, ...], outputs: int, pads: tuple[int, ...], epilogue: str = "nothing"
) -> tuple[Graph, list[Array], Array]:
    """A convolution by 3 x 3 with a bias and an epilogue, its inputs, and its result in float64."""
    rng = np.random.default_rng(sum(x) + outputs)
    data = rng.standard_normal(x, np.float32)
    weights = (rng.standard_normal((outputs, x[1], 3, 3)) / np.sqrt(9 * x[1])).astype(np.float32)
    bias = rng.standard_normal(outputs, np.float32)
    top, left, bottom, right = pads
    wide = np.pad(data.astype(np.float64), ((0, 0), (0, 0), (top, bottom), (left, right)))
    windows = np.lib.stride_tricks.sliding_window_view(wide, (3, 3), axis=(2, 3))
    exact = np.einsum("nchwij,ocij->nohw", windows, weights.astype(np.float64), optimize=True)
    exact += bias[:, None, None]
    residual = rng.standard_normal(exact.shape, np.float32)
    nodes, function = EPILOGUES[epilogue]
    made = [helper.make_node("Conv", ["x", "w", "b"], ["y0"], pads=pads)]
    for index, (kind, more) in enumerate(nodes):
        made.append(helper.make_node(kind, [f"y{index}", *more], [f"y{index + 1}"]))
    constants = {"w": weights, "b": bias, "zero": np.float32(0), "six": np.float32(6)}
    used = {name for node in made for name in node.input}
    inputs = [helper.make_tensor_value_info("x", 1, x)]
    given = [data]
    if "r" in used:
        inputs.append(helper.make_tensor_value_info("r", 1, residual.shape))
        given.append(residual)
    for node in made:
        node.name = node.output[0]
    graph = helper.make_graph(
        made, "layer", inputs,
        [helper.make_tensor_value_info(made[-1].output[0], 1, exact.shape)],
        initializer=[
            numpy_helper.from_array(np.asarray(array), name)
            for name, array in constants.items() if name in used
        ],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    known = onnx.shape_inference.infer_shapes(model)
    return from_onnx(known), given, function(exact, residual)


def candidates(graph: Graph, device: Device, how: str) -> list[str]:
    """What was chosen for the functions of `graph`."""
    found: list[str] = []

    def build(module: Any) -> bytes:
        attributes = [getattr(function, "attrs", None) for function in module.functions.values()]
        found.extend(str(a.get(CANDIDATE)) for a in attributes if a and a.get(CANDIDATE))
        return b""

    relax.compile_part(graph, build, Rules(Vectors.of(device.isa), winograd=how))
    return found


def run(how: str, graph: Graph, device: Device, inputs: list[Array]) -> Array:
    target = load(Target, f"cpu:winograd={how}")
    with target.load(target.compile(graph, device), graph, device) as kernel:
        return np.array(kernel.run(inputs)[0])


def error(found: Array, exact: Array) -> float:
    assert found.shape == exact.shape
    return float(np.abs(found - exact).max() / np.abs(exact).max())


@pytest.mark.parametrize("m", [2, 4])
def test_the_transforms_make_a_convolution(m: int) -> None:
    size = m + 2
    source = np.stack(winograd.source_transform(list(np.eye(size))))
    result = np.stack(winograd.result_transform(list(np.eye(size))))
    rng = np.random.default_rng(m)
    d, g = rng.standard_normal((size, size)), rng.standard_normal((3, 3))
    kernel = winograd.KERNELS[m]
    found = result @ ((kernel @ g @ kernel.T) * (source @ d @ source.T)) @ result.T
    windows = np.lib.stride_tricks.sliding_window_view(d, (3, 3))
    np.testing.assert_allclose(found, np.einsum("hwij,ij->hw", windows, g), atol=1e-13)


@pytest.mark.parametrize("m", [2, 4])
def test_weights_are_transformed_in_double_precision(m: int) -> None:
    weights = np.random.default_rng(0).standard_normal((20, 6, 3, 3), np.float32)
    packed = winograd.transformed(weights, Form(m, 1, Tile(2, 3, 1.0), 3), 8)
    assert packed.shape == ((m + 2) ** 2, 1, 1, 8, 3, 8)
    assert packed.dtype == np.float32
    kernel = winograd.KERNELS[m]
    for o, c in ((0, 0), (7, 5), (8, 1), (19, 3)):
        exact = kernel @ weights[o, c].astype(np.float64) @ kernel.T
        place = packed[:, 0, 0, c, o // 8, o % 8]
        np.testing.assert_array_equal(place, exact.reshape(-1).astype(np.float32))
    assert not packed[:, :, :, :, 2, 4:].any()
    assert not packed[:, :, :, 6:].any()


@pytest.mark.parametrize("how", ["f2", "f4"])
@pytest.mark.parametrize(
    ("x", "outputs", "pads"),
    [
        ((1, 32, 7, 7), 48, (1, 1, 1, 1)),
        ((2, 20, 13, 9), 33, (1, 0, 2, 1)),
        ((1, 16, 14, 28), 32, (0, 0, 0, 0)),
        ((6, 8, 5, 6), 20, (2, 2, 2, 2)),
        ((1, 48, 71, 3), 16, (0, 1, 0, 1)),
        ((1, 17, 3, 73), 16, (1, 0, 1, 0)),
        ((1, 64, 56, 56), 64, (1, 1, 1, 1)),
        ((1, 256, 14, 14), 64, (1, 1, 1, 1)),
    ],
)
def test_layers_stay_below_the_bound(
    device: Device, how: str, x: tuple[int, ...], outputs: int, pads: tuple[int, ...]
) -> None:
    graph, inputs, exact = layer(x, outputs, pads)
    bound = winograd.ERROR[2 if how == "f2" else 4]
    assert error(run(how, graph, device, inputs), exact) <= bound


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("how", ["f2", "f4"])
def test_what_follows_is_fused(device: Device, how: str, epilogue: str) -> None:
    graph, inputs, exact = layer((1, 24, 19, 18), 40, (1, 1, 1, 1), epilogue)
    assert error(run(how, graph, device, inputs), exact) <= winograd.ERROR[4]


@pytest.mark.parametrize("how", ["f2", "f4"])
@pytest.mark.parametrize("x", [(1, 32, 40, 12), (4, 32, 6, 6), (1, 64, 7, 7)])
def test_threads_share_chunks_or_images_or_channels(
    target: Target, how: str, x: tuple[int, ...]
) -> None:
    device = target.device("cpu")
    if device.threads < 2:
        pytest.skip("one core")
    graph, inputs, exact = layer(x, 64, (1, 1, 1, 1), "residual")
    assert error(run(how, graph, device, inputs), exact) <= winograd.ERROR[4]


def test_each_option_has_its_form(device: Device) -> None:
    graph, *_ = layer((1, 64, 28, 28), 64, (1, 1, 1, 1))
    for how, start in (("f2", "f2 "), ("f4", "f4 "), ("auto", "f4 ")):
        (candidate,) = candidates(graph, device, how)
        assert candidate.startswith(start)
    (candidate,) = candidates(graph, device, "off")
    assert not candidate.startswith("f")


@pytest.mark.parametrize("vectors", [WIDE, NARROW])
def test_the_model_takes_what_was_measured_as_fastest(vectors: Vectors) -> None:
    def first(channels: int, size: int, **more: Any) -> str:
        window = replace(
            Window((3, 3), (1, 1), (1, 1), (1, 1, 1, 1), (size, size), (size, size)), **more
        )
        blocks = vectors.blocks(channels)
        tiles = vectors.tiles(size, blocks, exact=True)[:4]
        found = convolutions((1, blocks, blocks), window, tiles, Rules(vectors))
        assert set(tiles) <= set(found)
        return str(found[0])

    assert first(64, 56).startswith("f4 ")
    assert first(128, 28).startswith("f4 ")
    assert first(256, 14)[0] == "f"
    assert first(512, 7)[0] == "f"
    assert not first(16, 7).startswith("f2 ")
    assert not first(64, 56, strides=(2, 2), result=(28, 28)).startswith("f")
    assert not first(64, 56, dilations=(2, 2), result=(54, 54)).startswith("f")
    assert not first(64, 56, kernel=(1, 3), result=(58, 56)).startswith("f")


def test_the_option_is_part_of_version_and_artifact(target: Target) -> None:
    versions = {load(Target, f"cpu:winograd={how}").version() for how in WINOGRAD}
    assert len(versions) == len(WINOGRAD)
    assert target.version() == load(Target, "cpu:winograd=auto").version()
    graph, *_ = layer((1, 32, 28, 28), 32, (1, 1, 1, 1))
    device = target.device("cpu:0")

    def compiled(how: str) -> Artifact:
        return load(Target, f"cpu:winograd={how}").compile(graph, device)

    assert b'"winograd": "off"' in compiled("off").files["layout.json"]
    assert b'"winograd": "f2"' in compiled("f2").files["layout.json"]


def test_options_of_a_system(target: Target) -> None:
    system = System("one", (target.device("cpu:0"),), ())
    changed = system.with_options("cpu", winograd="off")
    assert changed.devices[0].target == "cpu:winograd=off"
    assert changed.with_options("cpu", winograd="f2").devices[0].target == "cpu:winograd=f2"
    assert System.from_dict(changed.to_dict()) == changed
    with pytest.raises(
        PluginError, match="'f3' is no winograd of cpu; there are off, f2, f4, auto"
    ):
        system.with_options("cpu", winograd="f3")
    with pytest.raises(DeviceError, match="no device is of target 'onnxruntime'"):
        system.with_options("onnxruntime", winograd="f2")
