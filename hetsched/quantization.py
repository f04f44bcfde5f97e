"""Float models in 8 bits, by ONNX Runtime's quantiser, and how far the result is from the float.

What comes out is a model of QuantizeLinear and DequantizeLinear: int8 weights without a zero point
and with a scale for each channel of the result, uint8 activations with one scale and zero point,
biases in int32. ONNX Runtime computes that in integers on any processor (int8 activations it
restores to floats on x86), hetsched does so bit for bit like it, and the FPGA's overlay takes it. A
Relu or Clip behind a layer is in the range of the layer's one QuantizeLinear, or stands before it,
so that nothing is rounded twice.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import inf, log10
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from hetsched.dtype import numpy_dtype
from hetsched.errors import InputError, ModelError
from hetsched.files import replacing
from hetsched.frontend.reader import read_onnx
from hetsched.graph import Graph, to_onnx
from hetsched.inputs import read_inputs
from hetsched.op import Tensor
from hetsched.oracle import ERRORS, LARGEST_MODEL_NBYTES, first_line, session

Progress = Callable[[str, int, int], None]

# Ranges hardly grow with more samples, and all of them are compared anyway.
CALIBRATED = 128
# What a set of labels is called in a calibration file.
LABELS = ("labels", "label", "y")
# Their result may pass through one of these before it is rounded.
LAYERS = ("Add", "Conv", "Gemm", "MatMul")
BOUNDS = ("Clip", "Relu")


@dataclass(frozen=True)
class OutputError:
    """How far an output of the quantised model is from the float model's, over all samples.

    `sqnr` is the power of the float's values over that of the differences, in decibels; infinite
    where there is no difference.
    """

    name: str
    sqnr: float
    largest_error: float
    largest_value: float


@dataclass(frozen=True)
class Accuracy:
    """How many of `samples` each model recognises by the largest value of `output`."""

    output: str
    samples: int
    float_right: int
    quantised_right: int
    agreeing: int


@dataclass(frozen=True, eq=False)
class Quantization:
    """A quantised model and what it costs in accuracy; `accuracy` is there where labels are."""

    model: onnx.ModelProto
    calibrated: int
    compared: int
    layers: Mapping[str, int]
    outputs: tuple[OutputError, ...]
    accuracy: Accuracy | None
    notes: tuple[str, ...] = ()

    def save(self, path: str | Path) -> None:
        """Writes the model.

        Raises
        ------
        OutputFileError
            The file cannot be written.
        """
        with replacing(path) as file:
            file.write(self.model.SerializeToString())

    def to_dict(self) -> dict[str, Any]:
        """All but the model, for JSON."""
        return {
            "calibrated": self.calibrated,
            "compared": self.compared,
            "layers": dict(self.layers),
            "outputs": [asdict(item) for item in self.outputs],
            "accuracy": asdict(self.accuracy) if self.accuracy else None,
            "notes": list(self.notes),
        }


def quantize(
    model: str | Path | bytes | onnx.ModelProto | Graph,
    calibration: str | Path | Mapping[str, np.ndarray],
    samples: int | None = None,
    scale: float | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    progress: Progress | None = None,
) -> Quantization:
    """`model` in 8 bits, calibrated with data of its user, and compared with itself in floats.

    `calibration` is a `.npz` file or its arrays: for each input, by its ONNX name, samples along
    the first axis; an array whose name is no input's is taken where there is one input and it alone
    fits. Integers in `labels`, `label` or `y` are the class of each sample. `samples` is how many
    of them are calibrated with, the first ones (128 of those there are); all are compared. `scale`
    multiplies the inputs, such as 1/255 for pixels that are kept as bytes.

    Raises
    ------
    InputError
        The file cannot be read, an input is missing or has another shape, or there are fewer
        samples than asked for.
    ModelError
        The model cannot be read, or has nothing to quantise.
    """
    tell = progress or (lambda what, done, of: None)
    graph = model if isinstance(model, Graph) else read_onnx(model, shapes)
    given = calibration if isinstance(calibration, Mapping) else read_inputs(calibration)
    feeds, labels, notes = _samples(graph, given, scale)
    count = len(feeds)
    wanted = min(CALIBRATED, count) if samples is None else samples
    if not 1 <= wanted <= count:
        raise InputError(f"{wanted} samples are asked for, and the calibration data has {count}")
    floats = to_onnx(graph)
    calibrated = _calibrated(floats, feeds[:wanted], tell)
    result = _rounded_once(calibrated)
    layers = _layers(result)
    if not layers:
        raise ModelError(f"{graph.name}: no operation of it has a form in 8 bits")
    outputs, accuracy = _compared(graph, floats, result, feeds, labels, tell)
    return Quantization(result, wanted, count, layers, outputs, accuracy, notes)


def _samples(
    graph: Graph, given: Mapping[str, np.ndarray], scale: float | None
) -> tuple[list[dict[str, np.ndarray]], np.ndarray | None, tuple[str, ...]]:
    """What to feed for each sample, and the class of each."""
    arrays, notes = dict(given), []
    missing = [tensor for tensor in graph.inputs if tensor.name not in arrays]
    others = [n for n in arrays if n not in LABELS and all(n != t.name for t in graph.inputs)]
    if len(graph.inputs) == len(missing) == len(others) == 1:
        arrays[missing[0].name] = arrays.pop(others[0])
        notes.append(f"'{others[0]}' is taken for the input '{missing[0].name}'")
        missing = []
    if missing:
        there = ", ".join(f"'{name}'" for name in given) or "nothing"
        raise InputError(
            f"the calibration data has no array for the input '{missing[0].name}' "
            f"{list(missing[0].shape)}; it has {there}"
        )
    counts = {tensor.name: _count(tensor, arrays[tensor.name]) for tensor in graph.inputs}
    count = min(counts.values(), default=0)
    if count != max(counts.values(), default=0):
        told = ", ".join(f"{number} of '{name}'" for name, number in counts.items())
        raise InputError(f"the inputs have different numbers of samples: {told}")
    if count == 0:
        raise InputError("the calibration data has no samples")
    values = {}
    for tensor in graph.inputs:
        array, dtype = arrays[tensor.name], numpy_dtype(tensor.dtype)
        if dtype.kind == "f" and array.dtype.kind in "biu" and scale is None:
            notes.append(
                f"'{tensor.name}' is given as {array.dtype} from {array.min()} to {array.max()} "
                "and taken as it is; a scale, such as 1/255, would say what one of it stands for"
            )
        if array.dtype.kind not in "biuf" or (dtype.kind in "biu" and array.dtype.kind == "f"):
            raise InputError(f"'{tensor.name}' holds {array.dtype}; the model wants {dtype}")
        array = array.reshape(count, *tensor.shape)
        values[tensor.name] = array if scale is None or dtype.kind != "f" else array * scale
        if not np.all(np.isfinite(values[tensor.name])):
            raise InputError(f"'{tensor.name}' has values that are no finite numbers")
    feeds = [
        {t.name: values[t.name][index].astype(numpy_dtype(t.dtype)) for t in graph.inputs}
        for index in range(count)
    ]
    return feeds, _labels(arrays, count), tuple(notes)


def _count(tensor: Tensor, array: np.ndarray) -> int:
    """How many samples `array` has: along an axis before the input's own, or along its first."""
    shape: tuple[int, ...] = array.shape
    if shape[1:] == tensor.shape and array.ndim:
        return shape[0]
    if shape and tensor.shape and shape[1:] == tensor.shape[1:] and shape[0] % tensor.shape[0] == 0:
        return shape[0] // tensor.shape[0]
    wanted = (
        ("n", *map(str, tensor.shape[1:])) if tensor.shape[:1] == (1,) else ("n", *tensor.shape)
    )
    raise InputError(
        f"'{tensor.name}' has shape {list(shape)} in the calibration data; "
        f"samples of it have [{', '.join(map(str, wanted))}]"
    )


def _labels(arrays: Mapping[str, np.ndarray], count: int) -> np.ndarray | None:
    name = next((name for name in LABELS if name in arrays), None)
    if name is None:
        return None
    labels = arrays[name]
    if labels.dtype.kind not in "iu" or labels.shape != (count,):
        raise InputError(
            f"'{name}' is {labels.dtype}{list(labels.shape)}; labels of {count} samples are "
            f"integers of shape [{count}]"
        )
    return labels


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    """Hands the samples to the quantiser, and tells each."""

    def __init__(self, feeds: Sequence[dict[str, np.ndarray]], tell: Progress) -> None:
        self._feeds, self._tell, self._done = feeds, tell, 0

    def get_next(self) -> dict[str, np.ndarray] | None:
        if self._done == len(self._feeds):
            return None
        self._tell("calibrating", self._done, len(self._feeds))
        self._done += 1
        return self._feeds[self._done - 1]


def _calibrated(
    model: onnx.ModelProto, feeds: Sequence[dict[str, np.ndarray]], tell: Progress
) -> onnx.ModelProto:
    with TemporaryDirectory(prefix="hetsched-") as folder, _quiet():
        # From a file: what it is handed itself it would move to another place.
        source, path = Path(folder) / "float.onnx", Path(folder) / "quantised.onnx"
        if model.ByteSize() > LARGEST_MODEL_NBYTES:
            raise ModelError("ONNX Runtime's quantiser is given no model of more than 2 GB")
        onnx.save(model, str(source))
        try:
            quantize_static(
                str(source), str(path), _Reader(feeds, tell),
                quant_format=QuantFormat.QDQ, per_channel=True,
                activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
                extra_options={"WeightSymmetric": True},
            )  # fmt: skip
        except ERRORS as error:
            raise ModelError(f"ONNX Runtime's quantiser: {first_line(error)}") from None
        return onnx.load(str(path))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the quantiser's advice to prepare the model, which it is."""

    def kept(record: logging.LogRecord) -> bool:
        return record.filename != "quantize.py"

    root = logging.getLogger()
    root.addFilter(kept)
    try:
        yield
    finally:
        root.removeFilter(kept)


def _rounded_once(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` without a rounding between a layer and the Relu or Clip that alone reads it."""
    graph = model.graph
    readers = Counter(name for node in graph.node for name in node.input)
    readers.update(value.name for value in graph.output)
    producers = {name: node for node in graph.node for name in node.output}

    def sole(name: str, kinds: Sequence[str]) -> onnx.NodeProto | None:
        node = producers.get(name)
        return node if node is not None and node.op_type in kinds and readers[name] == 1 else None

    dropped = []
    for node in graph.node:
        if node.op_type not in BOUNDS:
            continue
        restored = sole(node.input[0], ("DequantizeLinear",))
        rounded = sole(restored.input[0], ("QuantizeLinear",)) if restored is not None else None
        if restored is None or rounded is None or sole(rounded.input[0], LAYERS) is None:
            continue
        node.input[0] = rounded.input[0]
        dropped += [restored, rounded]
    for node in dropped:
        graph.node.remove(node)
    read = {name for node in graph.node for name in node.input}
    read.update(value.name for value in graph.output)
    kept = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    return model


def _layers(model: onnx.ModelProto) -> dict[str, int]:
    """How many operations of each kind read integers alone, by kind."""
    restored = {n.output[0] for n in model.graph.node if n.op_type == "DequantizeLinear"}
    counts = Counter(
        node.op_type
        for node in model.graph.node
        if node.op_type != "QuantizeLinear" and node.input and node.input[0] in restored
    )
    return dict(sorted(counts.items()))


def _compared(
    graph: Graph,
    floats: onnx.ModelProto,
    integers: onnx.ModelProto,
    feeds: Sequence[dict[str, np.ndarray]],
    labels: np.ndarray | None,
    tell: Progress,
) -> tuple[tuple[OutputError, ...], Accuracy | None]:
    """The errors of the outputs over all samples, and what is recognised if there are labels."""
    sessions = [session(floats), session(integers)]
    names = [tensor.name for tensor in graph.outputs if numpy_dtype(tensor.dtype).kind == "f"]
    classes = _classes(graph) if labels is not None else None
    # Of each output: power of the values, power of the errors, largest error, largest value.
    sums = np.zeros((len(names), 4))
    right = [0, 0, 0]
    for index, feed in enumerate(feeds):
        tell("comparing", index, len(feeds))
        both = [dict(zip(names, s.run(names, feed), strict=True)) for s in sessions]
        for row, name in enumerate(names):
            exact, near = (found[name].astype(np.float64) for found in both)
            error = np.abs(exact - near)
            sums[row, :2] += np.sum(exact**2), np.sum(error**2)
            largest = (np.max(error, initial=0.0), np.max(np.abs(exact), initial=0.0))
            sums[row, 2:] = np.maximum(sums[row, 2:], largest)
        if labels is not None and classes is not None:
            first, second = (int(np.argmax(found[classes])) for found in both)
            right[0] += int(first == labels[index])
            right[1] += int(second == labels[index])
            right[2] += int(first == second)
    outputs = tuple(
        OutputError(name, _decibels(power, noise), error, value)
        for name, (power, noise, error, value) in zip(names, sums.tolist(), strict=True)
    )
    return outputs, Accuracy(classes, len(feeds), *right) if classes is not None else None


def _classes(graph: Graph) -> str:
    """The output whose largest value is the class of one sample: the first that is one vector."""
    for tensor in graph.outputs:
        vector = tensor.size == max(tensor.shape, default=0) > 1
        if vector and numpy_dtype(tensor.dtype).kind == "f":
            return tensor.name
    shapes = ", ".join(map(str, graph.outputs))
    raise InputError(f"there are labels, and no output has one value for each class: {shapes}")


def _decibels(power: float, noise: float) -> float:
    if noise == 0:
        return inf
    return 10 * log10(power / noise) if power else -inf
