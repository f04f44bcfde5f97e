"""Quantises networks to 8 bits by ONNX Runtime, as users quantise theirs."""

import logging
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

ACTIVATIONS = {"uint8": QuantType.QUInt8, "int8": QuantType.QInt8}
CALIBRATION_IMAGES = 4


def quantised(model: onnx.ModelProto, activations: str = "uint8", seed: int = 0) -> onnx.ModelProto:
    """`model`, whose inputs are images, quantised statically and with a scale for each channel.

    Its shapes are known and its normalisations folded before, as the quantiser wants it.

    Weights are int8 and symmetric; the tensors between are of `activations`, `uint8` or `int8`,
    and have QuantizeLinear and DequantizeLinear around them.
    """
    with TemporaryDirectory(prefix="hetsched-") as folder:
        source, result = Path(folder) / "float.onnx", Path(folder) / "quantised.onnx"
        onnx.save(model, str(source))
        # It asks for what has been done.
        logging.getLogger().addFilter(_is_not_of_the_quantiser)
        quantize_static(
            str(source), str(result), _Images(model, seed),
            quant_format=QuantFormat.QDQ, per_channel=True,
            activation_type=ACTIVATIONS[activations], weight_type=QuantType.QInt8,
        )  # fmt: skip
        return onnx.load(str(result))


def _is_not_of_the_quantiser(record: logging.LogRecord) -> bool:
    return record.filename != "quantize.py"


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
