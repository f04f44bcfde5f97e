"""Networks quantised to 8 bits by ONNX Runtime, as users quantise theirs."""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from bench.models import Model, load, models
from hetsched import read_onnx
from hetsched.graph import to_onnx

# By the name of the quantised network: that of the float one, and the type of the activations.
INT8 = {
    f"{name}_{suffix}": (name, dtype)
    for name in ("mobilenet_v2", "resnet18", "resnet50", "squeezenet1_1", "googlenet")
    for suffix, dtype in (("int8", "uint8"), ("s8s8", "int8"))
}
ACTIVATIONS = {"uint8": QuantType.QUInt8, "int8": QuantType.QInt8}
CALIBRATION_IMAGES = 4


def quantised_load(name: str, seed: int = 0) -> onnx.ModelProto:
    """The network `name` of `INT8`, weights and calibration drawn from `seed`."""
    source, dtype = INT8[name]
    model = next(model for model in models() if model.name == source)
    return quantised(float_model(model, seed), dtype, seed)


def float_model(model: Model, seed: int = 0) -> onnx.ModelProto:
    """`model` with known shapes and no normalisation left, as it should be before."""
    return to_onnx(read_onnx(load(model, seed), shapes=model.shapes))


def quantised(model: onnx.ModelProto, activations: str = "uint8", seed: int = 0) -> onnx.ModelProto:
    """`model`, whose inputs are images, quantised statically and with a scale for each channel.

    Weights are int8 and symmetric; the tensors between are of `activations`, `uint8` or `int8`,
    and have QuantizeLinear and DequantizeLinear around them.
    """
    with TemporaryDirectory(prefix="hetsched-") as folder:
        source, result = Path(folder) / "float.onnx", Path(folder) / "quantised.onnx"
        onnx.save(model, str(source))
        quantize_static(
            str(source), str(result), _Images(model, seed),
            quant_format=QuantFormat.QDQ, per_channel=True,
            activation_type=ACTIVATIONS[activations], weight_type=QuantType.QInt8,
        )  # fmt: skip
        return onnx.load(str(result))


class _Images(CalibrationDataReader):  # type: ignore[misc]
    """Pixels in [0, 1) for each input."""

    def __init__(self, model: onnx.ModelProto, seed: int) -> None:
        shapes = {
            value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
            for value in model.graph.input
        }
        rng = np.random.default_rng(seed)
        self._images = [
            {name: rng.random(shape, np.float32) for name, shape in shapes.items()}
            for _ in range(CALIBRATION_IMAGES)
        ]

    def get_next(self) -> Mapping[str, Any] | None:
        return self._images.pop() if self._images else None
