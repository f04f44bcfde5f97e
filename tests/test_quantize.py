"""Quantising a model: what the result looks like, what it costs, and what is refused."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper
from typer.testing import CliRunner

import hetsched
from hetsched.cli import app
from hetsched.errors import InputError, ModelError
from hetsched.quantization import Quantization

DATA = Path(__file__).parent / "data"
CNN, BRANCH = DATA / "digits_cnn.onnx", DATA / "digits_branch.onnx"
DIGITS = DATA / "digits_test.npz"


def images(count: int = 450) -> dict[str, np.ndarray]:
    with np.load(DIGITS) as data:
        return {"image": data["x"][:count] / np.float32(16), "labels": data["y"][:count]}


@pytest.fixture(scope="module")
def quantised() -> Quantization:
    return hetsched.quantize(CNN, images())


def test_the_digits_are_recognised_as_before(
    quantised: Quantization,
) -> None:
    found = quantised.accuracy
    assert found is not None
    assert (found.output, found.samples, found.float_right) == ("logits", 450, 444)
    assert found.quantised_right >= 442
    assert [item.name for item in quantised.outputs] == ["logits"]
    assert 30 < quantised.outputs[0].sqnr < 60


def test_the_report_is_of_the_model_that_is_written(
    quantised: Quantization, tmp_path: Path
) -> None:
    quantised.save(tmp_path / "q.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "q.onnx")
    given = images()
    found = [np.argmax(session.run(None, {"image": x[None]})[0]) for x in given["image"]]
    assert quantised.accuracy is not None
    assert np.sum(np.array(found) == given["labels"]) == quantised.accuracy.quantised_right


def test_weights_have_no_zero_points_and_nothing_is_rounded_twice(
    quantised: Quantization,
) -> None:
    graph = quantised.model.graph
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    kinds = set()
    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            zeros = values[node.input[2]]
            kinds.add(zeros.dtype.name)
            assert zeros.dtype == np.uint8 or not zeros.any()
    assert kinds == {"int8", "int32", "uint8"}
    # Each Relu is in the range of its layer's QuantizeLinear.
    assert not any(node.op_type == "Relu" for node in graph.node)
    scales = [values[n.input[1]] for n in graph.node if n.output[0].startswith("onnx::Conv_34_D")]
    assert [scale.size for scale in scales] == [32]


def test_a_clip_that_rounding_does_not_do_stands_before_it() -> None:
    rng = np.random.default_rng(0)
    value = [helper.make_tensor_value_info(name, 1, [1, 3, 6, 6]) for name in "xy"]
    ends = [numpy_helper.from_array(np.float32(v), n) for n, v in (("low", -1), ("high", 0.5))]
    weights = numpy_helper.from_array(rng.standard_normal((3, 3, 1, 1)).astype(np.float32), "w")
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "w"], ["c"]),
            helper.make_node("Clip", ["c", "low", "high"], ["y"]),
        ],
        "clipped", value[:1], value[1:], [weights, *ends],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    data = rng.standard_normal((9, 3, 6, 6)).astype(np.float32)
    found = hetsched.quantize(model, {"x": data})
    kinds = [node.op_type for node in found.model.graph.node]
    assert kinds.count("QuantizeLinear") == 2
    assert found.outputs[0].sqnr > 30


@pytest.mark.parametrize("model", [CNN, BRANCH], ids=lambda path: path.stem)
def test_the_command_shows_it_and_writes_the_model(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "q.onnx"
    command = ["quantize", model, "--calibration", DIGITS, "--scale", "1/16", "-o", path]
    result = CliRunner().invoke(app, [*map(str, command), "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    right = document["accuracy"]
    assert right["float_right"] == {"digits_cnn": 444, "digits_branch": 424}[model.stem]
    assert abs(right["float_right"] - right["quantised_right"]) <= 6
    assert document["nbytes"] == path.stat().st_size < model.stat().st_size
    assert document["calibrated"] == 128
    # Each of the words of the table, wherever its lines break.
    text = CliRunner().invoke(app, list(map(str, command)), catch_exceptions=False).stdout
    assert {"float", "int8", "top-1", "SQNR", "logits"} <= set(text.split())
    onnx.checker.check_model(str(path))


def test_without_labels_there_are_errors_alone() -> None:
    given = images(9)
    del given["labels"]
    told: list[str] = []
    found = hetsched.quantize(
        CNN, given, samples=4, progress=lambda what, done, of: told.append(f"{what} {done}/{of}")
    )
    assert found.accuracy is None
    assert (found.calibrated, found.compared) == (4, 9)
    assert (told[0], told[-1]) == ("calibrating 0/4", "comparing 8/9")


def test_bytes_are_taken_as_they_are_and_said() -> None:
    with np.load(DIGITS) as data:
        pixels = data["x"][:20]
    assert any("uint8" in note for note in hetsched.quantize(CNN, {"image": pixels}).notes)
    scaled = hetsched.quantize(CNN, {"image": pixels}, scale=1 / 16)
    assert scaled.notes == ()
    assert scaled.outputs == hetsched.quantize(CNN, {"image": images(20)["image"]}).outputs


def _changed(**arrays: Any) -> Callable[[], Mapping[str, np.ndarray]]:
    def given() -> Mapping[str, np.ndarray]:
        merged = images(8) | arrays
        return {name: np.asarray(array) for name, array in merged.items() if array is not None}

    return given


@pytest.mark.parametrize(
    ("given", "samples", "message"),
    [
        (_changed(image=None), None, "no array for the input 'image'"),
        (_changed(image=np.zeros((8, 1, 8, 9))), None, "'image' has shape [8, 1, 8, 9]"),
        (_changed(image=np.float32(1)), None, "samples of it have [n, 1, 8, 8]"),
        (_changed(image=np.zeros((0, 1, 8, 8)), labels=None), None, "no samples"),
        (_changed(), 9, "9 samples are asked for, and the calibration data has 8"),
        (_changed(labels=np.zeros(7, int)), None, "labels of 8 samples"),
        (_changed(labels=np.zeros(8)), None, "'labels' is float64[8]"),
        (_changed(image=np.full((8, 1, 8, 8), np.nan)), None, "no finite numbers"),
        (_changed(image=np.full((8, 1, 8, 8), "a")), None, "'image' holds <U1"),
    ],
)
def test_what_does_not_fit_is_refused(
    given: Callable[[], Mapping[str, np.ndarray]], samples: int | None, message: str
) -> None:
    with pytest.raises(InputError) as error:
        hetsched.quantize(CNN, given(), samples)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_model_without_anything_to_quantise_is_refused() -> None:
    value = [helper.make_tensor_value_info(name, 1, [1, 4]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Sin", ["x"], ["y"])], "sine", value[:1], value[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    with pytest.raises(ModelError, match="no operation of it"):
        hetsched.quantize(model, {"x": np.ones((8, 1, 4), np.float32)})


def test_errors_of_the_command_are_one_line(tmp_path: Path) -> None:
    for options in (
        ("--calibration", tmp_path / "missing.npz", "-o", tmp_path / "q.onnx"),
        ("--calibration", DIGITS, "-o", tmp_path / "nowhere" / "q.onnx"),
        ("--calibration", DIGITS, "-o", tmp_path / "q.onnx", "--samples", "451"),
        ("--calibration", DIGITS, "-o", tmp_path / "q.onnx", "--scale", "1/0"),
    ):
        result = CliRunner().invoke(app, ["quantize", str(CNN), *map(str, options)])
        assert result.exit_code in (1, 2)
        assert len(result.stderr.splitlines()) == 1
        assert result.stderr.startswith("error: ")
    assert list(tmp_path.iterdir()) == []
