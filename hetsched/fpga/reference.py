"""What layers mean, in exact integers: the reference of simulators and RTL.

Images are int8 [channels, height, width]. Sums of products are computed in float64, which is exact
far beyond the 32 bits that they fit in.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from hetsched.fpga.isa import requantise
from hetsched.fpga.layers import (
    BIAS_UNIT,
    Convolution,
    Layer,
    Maximum,
    Network,
    Rescale,
    Window,
    share,
)


def run(network: Network, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The outputs of a part for its inputs, tensors as ONNX has them."""
    images = images_of(network, inputs)
    for layer in network.layers:
        whole = network.images[layer.result]
        start, part = share(layer, whole)
        found = compute(layer, images, (whole.height, whole.width))
        if part != whole:
            shape = (whole.channels, whole.height, whole.width)
            joined = images.setdefault(layer.result, np.zeros(shape, np.int8))
            joined[start : start + part.channels] = found
        else:
            images[layer.result] = found
    return outputs_of(network, images)


def images_of(network: Network, inputs: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Inputs of a part as images, by name."""
    return {
        tensor.name: network.images[tensor.name].array(signed(array))
        for tensor, array in zip(network.inputs, inputs, strict=True)
    }


def outputs_of(network: Network, images: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Outputs of a part from the images that they are in."""
    outputs = []
    for tensor in network.outputs:
        name = network.stored[tensor.name]
        values = network.images[name].values(images[name], tensor.shape)
        outputs.append(unsigned(values) if tensor.dtype == "uint8" else values)
    return outputs


def signed(array: np.ndarray) -> np.ndarray:
    """Bytes as int8: those without sign less 128."""
    return array if array.dtype == np.int8 else (array ^ np.uint8(128)).view(np.int8)


def unsigned(array: np.ndarray) -> np.ndarray:
    """Bytes without sign that stand as int8, plus 128."""
    return np.asarray(array.view(np.uint8) ^ np.uint8(128))


def compute(layer: Layer, images: Mapping[str, np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """The result of a layer, of `size` rows and columns."""
    if isinstance(layer, Convolution):
        return convolution(layer, images[layer.source], size)
    if isinstance(layer, Maximum):
        return maximum(layer, images[layer.source], size)
    first, second = (images[name].astype(np.int64) for name in layer.sources)
    bias = layer.rescale.bias.reshape(-1, 1, 1)
    total = BIAS_UNIT * bias + layer.factors[0] * first + layer.factors[1] * second
    return rescaled(total, layer.rescale)


def convolution(layer: Convolution, image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Each group's part of the image times its weights, tap by tap."""
    outputs, inputs = layer.weights.shape[:2]
    each = outputs // layer.groups
    total = np.zeros((layer.groups, each, size[0] * size[1]))
    weights = layer.weights.astype(np.float64)
    for row, column, seen in _taps(layer.window, image, size):
        part = seen.astype(np.float64).reshape(layer.groups, inputs, -1)
        factors = weights[:, :, row, column].reshape(layer.groups, each, inputs)
        total += factors @ part
    return rescaled(
        total.astype(np.int64).reshape(outputs, *size) + layer.rescale.bias.reshape(-1, 1, 1),
        layer.rescale,
    )


def maximum(layer: Maximum, image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    taps = [seen for _, _, seen in _taps(layer.window, image, size)]
    return np.asarray(np.max(taps, axis=0))


def rescaled(total: np.ndarray, rescale: Rescale) -> np.ndarray:
    """Sums [channels, height, width] with their bias, as int8."""
    multiplier, shift = (v.reshape(-1, 1, 1) for v in (rescale.multiplier, rescale.shift))
    return requantise(total, multiplier, shift, rescale.zero, rescale.low, rescale.high)


def _taps(
    window: Window, image: np.ndarray, size: tuple[int, int]
) -> Iterator[tuple[int, int, np.ndarray]]:
    """For each place in the window, its row and column and the values that it sees."""
    before, after = window.before, []
    for axis in (0, 1):
        last = (size[axis] - 1) * window.strides[axis] + window.reach[axis]
        after.append(max(0, last - before[axis] - image.shape[1 + axis]))
    pads = ((0, 0), (before[0], after[0]), (before[1], after[1]))
    padded = np.pad(image, pads, constant_values=window.fill)
    (sh, sw), (dh, dw) = window.strides, window.dilations
    for row in range(window.kernel[0]):
        for column in range(window.kernel[1]):
            top, left = row * dh, column * dw
            rows = slice(top, top + (size[0] - 1) * sh + 1, sh)
            columns = slice(left, left + (size[1] - 1) * sw + 1, sw)
            yield row, column, padded[:, rows, columns]
