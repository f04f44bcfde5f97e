"""The layers that the overlay computes, found in a part of a quantised model.

What a part means is what `lowering/quantized.py` finds in it: operations on integers alone. Each
becomes a layer here, with its scales as multipliers and shifts, or is refused by name.

The meaning of a layer is exact, in integers (`reference.py` computes it), and that of ONNX Runtime,
which scales sums in float32: scales are computed in float32 in its order, a multiplier has all of
their bits, and the overlay rounds as float32 does (`isa.requantise`). A layer of bytes without sign
has the same results, then, bit for bit, while its sums stay within 24 bits or are clipped. So it
has to be: what differs by one in one layer may differ by a hundred twenty layers on. For a sum of
two tensors, factors are searched for that give the same for all pairs of bytes.

Tensors of bytes without sign are computed less 128, zero points too: the same numbers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from math import prod

import numpy as np

from hetsched.errors import UnsupportedOperation
from hetsched.fpga.isa import MULTIPLIERS, SHIFTS, requantise
from hetsched.graph import Graph
from hetsched.lowering.quantized import CONTRIBUTED, INTEGER, added, addition, quantized
from hetsched.op import Op, Tensor

# Bits of a multiplier that a scale fills: those of a float32.
PRECISION = 24
# A factor of a sum of two tensors is so many digits of seven bits.
DIGITS = 3
LARGEST_FACTOR = 2 ** (7 * DIGITS) - 1
# Factors of a sum that are looked at, and how many of them for each pair of bytes.
TRIED, COMPARED = 1 << 16, 16
LARGEST_SUM = 2**31
# What one of the bias is in a sum of two tensors: a one of the first digits.
BIAS_UNIT = 2 ** (7 * (DIGITS - 1))
# With the largest multiplier and the least shift.
LARGEST_SCALE = (MULTIPLIERS.stop - 1) / 2**SHIFTS.start
# Operations between floats and bytes, and what is wrong with others in floats and with them.
BETWEEN = ("DequantizeLinear", "QuantizeLinear")
FLOATS = (
    "it is computed in floats, and the overlay multiplies bytes",
    "it is between floats and bytes, and the overlay has bytes alone",
)
# Operations that leave the elements in their order.
VIEWS = ("Flatten", "Reshape", "Squeeze", "Unsqueeze")


@dataclass(frozen=True)
class Image:
    """How a tensor stands in memory: channels of height by width.

    An image [1, c, h, w] and a signal [1, c, w] are so themselves. With `last`, the last axis of
    the tensor is the channels, and what stands before it is the width.
    """

    channels: int
    height: int
    width: int
    last: bool = False

    @property
    def positions(self) -> int:
        return self.height * self.width

    def array(self, values: np.ndarray) -> np.ndarray:
        """The values of a tensor as [channels, height, width]."""
        if self.last:
            values = values.reshape(-1, self.channels).T
        return values.reshape(self.channels, self.height, self.width)

    def values(self, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The tensor of `shape` whose `array` this is."""
        if self.last:
            array = array.reshape(self.channels, -1).T
        return np.ascontiguousarray(array).reshape(shape)


@dataclass(frozen=True, eq=False)
class Rescale:
    """From int32 sums to int8: plus `bias`, times `multiplier / 2**shift`, rounded, plus `zero`.

    Bias, multiplier and shift are of each channel; the result is kept within `low` to `high`.
    """

    bias: np.ndarray
    multiplier: np.ndarray
    shift: np.ndarray
    zero: int = 0
    low: int = -128
    high: int = 127


@dataclass(frozen=True)
class Window:
    """How a kernel moves over an image; around the image stand so many rows and columns of `fill`.

    Pairs are (rows, columns).
    """

    kernel: tuple[int, int]
    strides: tuple[int, int] = (1, 1)
    dilations: tuple[int, int] = (1, 1)
    before: tuple[int, int] = (0, 0)
    fill: int = 0

    @property
    def reach(self) -> tuple[int, int]:
        """Rows and columns of the image that one output needs."""
        (kh, kw), (dh, dw) = self.kernel, self.dilations
        return (kh - 1) * dh + 1, (kw - 1) * dw + 1


@dataclass(frozen=True, eq=False)
class Convolution:
    """Weights int8 [outputs, inputs of a group, rows, columns]; an output sees its group."""

    name: str
    source: str
    result: str
    window: Window
    weights: np.ndarray
    groups: int
    rescale: Rescale

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.source,)


@dataclass(frozen=True, eq=False)
class Move(Convolution):
    """The channels of `result` from `start` on: those of `source`, in another scale."""

    start: int = 0


@dataclass(frozen=True, eq=False)
class Maximum:
    """The largest value in each window."""

    name: str
    source: str
    result: str
    window: Window

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.source,)


@dataclass(frozen=True, eq=False)
class Sum:
    """The sources, each times its factor, plus `BIAS_UNIT * bias`, rescaled: one for all.

    A factor is from 0 to `LARGEST_FACTOR`, as scales are never negative.
    """

    name: str
    sources: tuple[str, str]
    result: str
    factors: tuple[int, int]
    rescale: Rescale


Layer = Convolution | Maximum | Sum


def share(layer: Layer, image: Image) -> tuple[int, Image]:
    """What `layer` makes of `image`, that of its result: the first channel, and all that follow."""
    if isinstance(layer, Move):
        return layer.start, replace(image, channels=len(layer.weights))
    return 0, image


def macs(layer: Layer, image: Image) -> int:
    """The multiply-adds of a layer whose result is `image`: those of a convolution's weights."""
    if isinstance(layer, Move) or not isinstance(layer, Convolution):
        return 0
    return layer.weights.size * image.positions


@dataclass(frozen=True, eq=False)
class Network:
    """A part as layers in order; every tensor but views has an `Image`.

    `stored` says for each input and output of the part which image it is in: views share one.
    """

    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    layers: tuple[Layer, ...]
    images: Mapping[str, Image]
    stored: Mapping[str, str]

    @property
    def macs(self) -> int:
        """Multiply-adds of its convolutions."""
        return sum(macs(layer, self.images[layer.result]) for layer in self.layers)


def multiplier_and_shift(scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The fractions `multiplier / 2**shift` nearest to positive scales of at most `LARGEST_SCALE`.

    Those of float32 are met. Below 2**-31 they lose bits of the multiplier, and leave nothing of a
    sum of 32 bits.

    Examples
    --------
    >>> multiplier, shift = multiplier_and_shift(np.array([0.75, 0.001]))
    >>> multiplier.tolist(), shift.tolist()
    ([12582912, 8589935], [24, 33])
    """
    scale = np.asarray(scale, np.float64)
    shift = np.minimum(PRECISION - np.frexp(scale)[1], SHIFTS.stop - 1)
    multiplier = np.rint(np.ldexp(scale, shift)).astype(np.int64)
    full = multiplier == MULTIPLIERS.stop
    return np.where(full, multiplier >> 1, multiplier), shift - full


def network(graph: Graph) -> Network:
    """The layers of `graph`, a part of a quantised model.

    Raises
    ------
    UnsupportedOperation
        The overlay cannot compute an operation; the message has its name and the reason.
    """
    return _Reader(quantized(graph)).network()


class _Refused(Exception):
    """Why an operation has no layer."""


class _Reader:
    """Goes through the operations in order."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._constants = graph.constants
        self._readers: dict[str, list[Op]] = {}
        for op in graph.ops:
            for tensor in op.reads:
                self._readers.setdefault(tensor.name, []).append(op)
        self._images: dict[str, Image] = {}
        self._stored: dict[str, str] = {}
        self._layers: list[Layer] = []

    def network(self) -> Network:
        graph = self._graph
        if not graph.ops:
            raise UnsupportedOperation(f"'{graph.name}' has no operation")
        for tensor in graph.inputs:
            try:
                self._place(tensor, self._form(tensor))
            except _Refused as reason:
                where = self._readers.get(tensor.name, [tensor])[0]
                raise UnsupportedOperation(f"{where}: {reason}") from None
        # What is computed in floats keeps its DequantizeLinear: the name of the first says more.
        for op in sorted(graph.ops, key=lambda op: op.kind in BETWEEN):
            if _in_floats(op):
                raise UnsupportedOperation(f"{op}: {FLOATS[op.kind in BETWEEN]}")
        for op in graph.ops:
            try:
                self._add(op)
            except _Refused as reason:
                raise UnsupportedOperation(f"{op}: {reason}") from None
        names = {tensor.name for tensor in (*graph.inputs, *graph.outputs)}
        for tensor in graph.outputs:
            if tensor.name not in self._stored:
                raise UnsupportedOperation(f"'{tensor.name}' is a constant")
        stored = {name: self._stored[name] for name in sorted(names)}
        images = {name: image for name, image in self._images.items() if name in self._used()}
        return Network(graph.name, graph.inputs, graph.outputs, tuple(self._layers), images, stored)

    def _used(self) -> set[str]:
        used = {name for layer in self._layers for name in (*layer.sources, layer.result)}
        return used | {self._stored[t.name] for t in (*self._graph.inputs, *self._graph.outputs)}

    def _add(self, op: Op) -> None:
        kind = (op.domain, op.kind)
        if kind[0] == "" and op.kind in VIEWS:
            self._view(op)
        elif kind in LAYERS:
            LAYERS[kind](self, op)
        else:
            raise _Refused("the overlay has no such operation")

    def _form(self, tensor: Tensor) -> Image:
        """How `tensor` stands in memory, by its rank and by who reads it."""
        _check_bytes(tensor)
        rank = len(tensor.shape)
        if not tensor.size:
            raise _Refused(f"'{tensor.name}' is empty")
        if rank < 2:
            raise _Refused(f"'{tensor.name}' has {rank} axes, and no channels among them")
        if rank > 4:
            raise _Refused(f"'{tensor.name}' has {rank} axes; at most four would do")
        if rank == 4 or (rank == 3 and self._in_windows(tensor)):
            batch, channels, *area = tensor.shape
            if batch != 1:
                raise _Refused(f"'{tensor.name}' has a batch of {batch}; the overlay takes one")
            return Image(channels, area[0] if rank == 4 else 1, area[-1])
        return Image(tensor.shape[-1], 1, prod(tensor.shape[:-1]), last=True)

    def _in_windows(self, tensor: Tensor) -> bool:
        """Whether a window moves over a tensor of three axes, or made it."""
        ops = self._readers.get(tensor.name, [])
        producer = self._graph.producers.get(tensor.name)
        return any(op.kind in WINDOWS for op in (*ops, *((producer,) if producer else ())))

    def _place(self, tensor: Tensor, image: Image) -> None:
        self._images[tensor.name] = image
        self._stored[tensor.name] = tensor.name

    def image(self, tensor: Tensor) -> Image:
        """The image that `tensor`, no view, is in."""
        if tensor.name in self._constants:
            raise _Refused(f"'{tensor.name}' is a constant")
        return self._images[self._stored[tensor.name]]

    def source(self, tensor: Tensor, image: Image) -> str:
        """Where `tensor` is stored, which must be as `image`."""
        if self.image(tensor) != image:
            raise _Refused(f"'{tensor.name}' stands otherwise in the overlay's memory")
        return self._stored[tensor.name]

    def constant(self, tensor: Tensor) -> np.ndarray:
        if tensor.name not in self._constants:
            raise _Refused(f"'{tensor.name}' is no constant")
        return self._constants[tensor.name]

    def zero(self, tensor: Tensor) -> int:
        """A zero point, as the overlay has it."""
        value = self.constant(tensor)
        return int(value.reshape(())) - (128 if value.dtype == np.uint8 else 0)

    def scale(self, tensor: Tensor) -> np.ndarray:
        return np.asarray(self.constant(tensor), np.float32)

    def weights(self, tensor: Tensor, zero: Tensor) -> np.ndarray:
        values, zeros = self.constant(tensor), self.constant(zero)
        if values.dtype == np.uint8 and np.all(zeros == 128):
            return (values.astype(np.int16) - 128).astype(np.int8)
        if values.dtype != np.int8 or np.any(zeros):
            raise _Refused("its weights have a zero point")
        return values

    def rescale(
        self,
        scale: np.ndarray,
        weights: np.ndarray,
        bias: np.ndarray | None,
        before: int,
        zero: int,
    ) -> Rescale:
        """Of sums over `weights` [outputs, ...] of values whose zero is `before`."""
        outputs = weights.shape[0]
        flat = weights.reshape(outputs, -1).astype(np.int64)
        total = np.zeros(outputs, np.int64) if bias is None else bias.astype(np.int64).reshape(-1)
        total = total - before * flat.sum(1)
        if np.any(np.abs(total) + 128 * np.abs(flat).sum(1) >= LARGEST_SUM):
            raise _Refused("its sums can leave 32 bits")
        scales = np.broadcast_to(scale.reshape(-1), (outputs,))
        if not np.all((scales > 0) & (scales <= LARGEST_SCALE)):
            raise _Refused(f"its scale is {scales.max():.3g}; above 0 and below 2 would do")
        multiplier, shift = multiplier_and_shift(scales)
        return Rescale(total, multiplier, shift, zero)

    def append(self, op: Op, image: Image, *layers: Layer) -> None:
        """The layers that make the result of `op`, which is as `image`."""
        result = op.output()
        wanted = self._form(result)
        if (image.channels, image.positions) != (wanted.channels, wanted.positions):
            raise _Refused(f"its result {result} stands otherwise in the overlay's memory")
        self._layers += layers
        self._place(result, replace(wanted, height=image.height, width=image.width))

    def _view(self, op: Op) -> None:
        """The same bytes by another name, which a matrix product or the host can read."""
        source = op.input(0)
        _check_bytes(op.output())
        image = self.image(source)
        if image.last and op.output().shape[-1] != image.channels:
            raise _Refused("it changes the channels of rows, which lie in blocks")
        self._stored[op.output().name] = self._stored[source.name]

    def bound(self, op: Op) -> None:
        """A Clip behind the layer that it bounds."""
        source = op.input(0)
        makers = [n for n, layer in enumerate(self._layers) if layer.result == source.name]
        if not makers or len(self._readers[source.name]) != 1:
            raise _Refused("it bounds what no layer before it makes for it alone")
        moved = 128 if source.dtype == "uint8" else 0
        low, high = (int(self.constant(op.input(i)).reshape(())) - moved for i in (1, 2))
        for place in makers:
            layer = self._layers[place]
            if isinstance(layer, Maximum) or any(
                t.name == source.name for t in self._graph.outputs
            ):
                raise _Refused("it bounds what no layer before it rounds")
            bounded = replace(layer.rescale, low=low, high=high)
            self._layers[place] = replace(layer, result=op.output().name, rescale=bounded)
        self._place(op.output(), self._images.pop(source.name))


def _in_floats(op: Op) -> bool:
    return (op.domain, op.kind) not in INTEGER and any(
        tensor.dtype.startswith("float") for tensor in (*op.reads, *op.writes)
    )


def _check_bytes(tensor: Tensor) -> None:
    if tensor.dtype not in ("int8", "uint8"):
        raise _Refused(f"'{tensor.name}' is {tensor.dtype}; the overlay has bytes alone")


def _pair(op: Op, name: str, rank: int, default: int) -> tuple[int, int]:
    values = tuple(int(v) for v in op.attributes.get(name, (default,) * (rank - 2)))
    return (default, values[0]) if rank == 3 else (values[0], values[1])


def _window(op: Op, kernel: tuple[int, ...], fill: int) -> Window:
    """The window of an operation over images or signals."""
    rank = len(kernel) + 2
    if op.attributes.get("auto_pad", b"NOTSET") not in (b"NOTSET", "NOTSET", b"VALID", "VALID"):
        raise _Refused("its padding is given as auto_pad")
    if rank not in (3, 4):
        raise _Refused(f"its window has {rank - 2} axes; one or two would do")
    pads = [int(pad) for pad in op.attributes.get("pads", (0,) * 2 * (rank - 2))]
    before = (0, pads[0]) if rank == 3 else (pads[0], pads[1])
    if min(pads, default=0) < 0:
        raise _Refused("its padding is negative")
    whole = (1, kernel[0]) if rank == 3 else (kernel[0], kernel[1])
    window = Window(
        whole, _pair(op, "strides", rank, 1), _pair(op, "dilations", rank, 1), before, fill
    )
    if any(pad >= reach for pad, reach in zip(before, window.reach, strict=True)):
        raise _Refused("its padding is as wide as its window")
    return window


def _made(op: Op, window: Window, image: Image, channels: int) -> Image:
    """The image of the result, whose size the model tells."""
    shape = op.output().shape
    height, width = (shape[2] if len(shape) == 4 else 1), shape[-1]
    for size, made, pad, stride, reach in zip(
        (image.height, image.width), (height, width),
        window.before, window.strides, window.reach, strict=True,
    ):  # fmt: skip
        if (made - 1) * stride - pad >= size or (made - 1) * stride + reach - pad - size >= reach:
            raise _Refused("a window of it is all padding")
    return Image(channels, height, width)


def _convolution(reader: _Reader, op: Op) -> None:
    data, xs, xz, kernel, ws, wz, ys, yz = (op.input(index) for index in range(8))
    weights = reader.weights(kernel, wz)
    bias = reader.constant(op.input(8)) if op.has_input(8) else None
    before = reader.zero(xz)
    window = _window(op, weights.shape[2:], before)
    image = reader.image(data)
    if image.last:
        raise _Refused(f"'{data.name}' stands in rows")
    scale = reader.scale(xs) * reader.scale(ws) / reader.scale(ys)
    layer = Convolution(
        op.name,
        reader.source(data, reader._form(data)),
        op.output().name,
        window,
        weights.reshape(*weights.shape[:2], *window.kernel),
        int(op.attributes.get("group", 1)),
        reader.rescale(scale, weights, bias, before, reader.zero(yz)),
    )
    reader.append(op, _made(op, window, image, weights.shape[0]), layer)


def _product(
    reader: _Reader,
    op: Op,
    data: Tensor,
    weights: np.ndarray,
    scale: np.ndarray,
    bias: np.ndarray | None,
    zeros: tuple[int, int],
) -> None:
    """`data` times `weights` [outputs, inputs], a convolution of one pixel, or of a whole image."""
    image = reader.image(data)
    outputs, inputs = weights.shape
    rows = data.size // inputs
    if bias is not None and bias.size not in (1, outputs):
        raise _Refused("its bias is no row")
    if image.last and image.channels == inputs:
        kernel, made = (1, 1), Image(outputs, 1, rows, last=True)
    elif not image.last and rows == 1:
        kernel, made = (image.height, image.width), Image(outputs, 1, 1, last=True)
    else:
        raise _Refused(f"'{data.name}' stands in the overlay's memory as no rows of {inputs}")
    bias = None if bias is None else np.broadcast_to(bias.reshape(-1), (outputs,))
    layer = Convolution(
        op.name,
        reader._stored[data.name],
        op.output().name,
        Window(kernel, fill=zeros[0]),
        weights.reshape(outputs, -1, *kernel),
        1,
        reader.rescale(scale, weights, bias, *zeros),
    )
    reader.append(op, made, layer)


def _gemm(reader: _Reader, op: Op) -> None:
    data, xs, xz, factor, ws, wz = (op.input(index) for index in range(6))
    if op.attributes.get("transA", 0):
        raise _Refused("its first factor is transposed")
    weights = reader.weights(factor, wz)
    bias = reader.constant(op.input(6)) if op.has_input(6) else None
    scale = reader.scale(xs) * reader.scale(ws) / reader.scale(op.input(7))
    upright = weights if op.attributes.get("transB", 0) else weights.T
    zeros = reader.zero(xz), reader.zero(op.input(8))
    _product(reader, op, data, np.ascontiguousarray(upright), scale, bias, zeros)


def _matmul(reader: _Reader, op: Op) -> None:
    data, xs, xz, factor, ws, wz, ys, yz = (op.input(index) for index in range(8))
    if len(factor.shape) != 2:
        raise _Refused(f"its second factor has {len(factor.shape)} axes; two would do")
    weights = reader.weights(factor, wz)
    scale = reader.scale(xs) * reader.scale(ws) / reader.scale(ys)
    zeros = reader.zero(xz), reader.zero(yz)
    _product(reader, op, data, np.ascontiguousarray(weights.T), scale, None, zeros)


def _sum(reader: _Reader, op: Op) -> None:
    first, a_scale, a_zero, second, b_scale, b_zero, scale, zero = (
        op.input(index) for index in range(8)
    )
    if first.shape != second.shape:
        raise _Refused("its terms differ in shape")
    image = reader.image(first)
    scales = [np.float32(reader.scale(item).reshape(())) for item in (a_scale, b_scale, scale)]
    points = [int(reader.constant(item).reshape(())) for item in (a_zero, b_zero, zero)]
    least = int(np.iinfo(reader.constant(zero).dtype).min)
    found = sum_factors(*addition(scales, points), least)
    full = np.full(image.channels, 1, np.int64)
    rescale = Rescale(full * found.bias, full * found.multiplier, full * found.shift, -128 - least)
    sources = reader.source(first, image), reader.source(second, image)
    layer = Sum(op.name, sources, op.output().name, found.factors, rescale)
    reader.append(op, image, layer)


@dataclass(frozen=True)
class Factors:
    """`multiplier / 2**shift` times the sum of bytes times `factors` and `BIAS_UNIT * bias`.

    `different` tells for how many of the pairs of bytes that is not what ONNX Runtime computes.
    """

    factors: tuple[int, int]
    bias: int
    multiplier: int
    shift: int
    different: int


@cache
def sum_factors(ratios: tuple[float, float], fixed: float, least: int) -> Factors:
    """Integers for `round(ratios[0] * a + ratios[1] * b + fixed)`, as float32 computes it.

    `a`, `b` and the result are bytes of at least `least`. The larger factor is one of the `TRIED`
    largest that fit. Rounding the other factor, the bias and the scale does harm, and there are so
    many that for some it does next to none. Of the `COMPARED` with the least harm, it is the first
    that is right for all pairs of bytes, or for the most.

    Examples
    --------
    >>> found = sum_factors((0.5, 0.25), -96.0, 0)
    >>> found.different, found.factors[0] / found.factors[1]
    (0, 2.0)
    """
    larger = max(ratios)
    # What is added to signed bytes.
    offset = fixed + sum(ratios) * (least + 128)
    reach = (128 * sum(ratios) + abs(offset)) / larger
    most = min(LARGEST_FACTOR, int(LARGEST_SUM / reach) - BIAS_UNIT)
    if not 0 < larger <= LARGEST_SCALE * (most - TRIED):
        raise _Refused(f"a scale of it is {larger:.3g} times that of the result")
    tried = np.arange(most, most - TRIED, -1)
    multipliers, shifts = multiplier_and_shift(larger / tried)
    scales = np.ldexp(multipliers.astype(np.float64), -shifts)
    pairs = [np.rint(ratio / larger * tried).astype(np.int64) for ratio in ratios]
    biases = np.rint(offset / larger * tried / BIAS_UNIT).astype(np.int64)
    harm = np.abs(scales * BIAS_UNIT * biases - offset)
    for factors, ratio in zip(pairs, ratios, strict=True):
        harm += 128 * np.abs(scales * factors - ratio)
    first, second = np.meshgrid(np.arange(-128, 128), np.arange(-128, 128), indexing="ij")
    moved = least + 128
    wanted = added(ratios, fixed, first + moved, second + moved)
    wanted = np.clip(wanted, least, least + 255) - moved
    best: Factors | None = None
    for place in np.argsort(harm, kind="stable")[:COMPARED].tolist():
        one, other = (int(factors[place]) for factors in pairs)
        bias, multiplier, shift = (int(v[place]) for v in (biases, multipliers, shifts))
        total = one * first + other * second + BIAS_UNIT * bias
        results = requantise(total, np.array(multiplier), np.array(shift), -moved)
        different = int(np.count_nonzero(results != wanted))
        if best is None or different < best.different:
            best = Factors((one, other), bias, multiplier, shift, different)
        if not different:
            break
    assert best is not None
    return best


def _maximum(reader: _Reader, op: Op) -> None:
    data = op.input(0)
    if len(op.writes) != 1:
        raise _Refused("it tells where its maxima are")
    image = reader.image(data)
    window = _window(op, tuple(op.attributes["kernel_shape"]), -128)
    layer = Maximum(op.name, reader.source(data, reader._form(data)), op.output().name, window)
    reader.append(op, _made(op, window, image, image.channels), layer)


def _mean(reader: _Reader, op: Op) -> None:
    """A convolution of each channel with ones, as large as the image."""
    data, xs, xz, ys, yz = (op.input(index) for index in range(5))
    image = reader.image(data)
    if image.last or len(data.shape) != 4:
        raise _Refused(f"'{data.name}' is no image")
    kernel = (image.height, image.width)
    weights = np.ones((image.channels, 1, *kernel), np.int8)
    scale = reader.scale(xs) / (reader.scale(ys) * np.float32(image.positions))
    before = reader.zero(xz)
    layer = Convolution(
        op.name,
        reader.source(data, image),
        op.output().name,
        Window(kernel, fill=before),
        weights,
        image.channels,
        reader.rescale(scale, weights, None, before, reader.zero(yz)),
    )
    reader.append(op, Image(image.channels, 1, 1), layer)


def _concatenation(reader: _Reader, op: Op) -> None:
    """Each part goes to its channels, from its scale and zero point to those of the result."""
    rank = len(op.output().shape)
    if rank != 4 or int(op.attributes["axis"]) % rank != 1:
        raise _Refused("it joins no channels of images")
    parts = range(2, len(op.inputs), 3) if op.domain else range(len(op.inputs))
    one = np.ones((), np.float32)
    layers: list[Layer] = []
    start = 0
    for part in parts:
        data = op.input(part)
        image = reader.image(data)
        if image.last:
            raise _Refused(f"'{data.name}' stands in rows")
        scales, zeros = (one, one), (0, 0)
        if op.domain:
            scales = reader.scale(op.input(part + 1)), reader.scale(op.input(0))
            zeros = reader.zero(op.input(part + 2)), reader.zero(op.input(1))
        factor, rescale = _moved(reader, image.channels, scales, zeros)
        layers.append(
            Move(
                op.name,
                reader.source(data, image),
                op.output().name,
                Window((1, 1)),
                np.full((image.channels, 1, 1, 1), factor, np.int8),
                image.channels,
                rescale,
                start,
            )
        )
        start += image.channels
    reader.append(op, replace(image, channels=start), *layers)


def _moved(
    reader: _Reader,
    channels: int,
    scales: tuple[np.ndarray, np.ndarray],
    zeros: tuple[int, int],
) -> tuple[int, Rescale]:
    """A factor and what follows it, which take bytes from one scale and zero point to the other.

    ONNX Runtime multiplies by one scale and divides by the other: factors are tried until one gives
    the same for each byte.
    """
    every = np.arange(-128, 128)
    wanted = np.rint((every - zeros[0]).astype(np.float32) * scales[0] / scales[1]) + zeros[1]
    found = []
    for factor in range(1, 128):
        weights = np.full((channels, 1), factor)
        scale = scales[0] / scales[1] / np.float32(factor)
        rescale = reader.rescale(scale, weights, None, *zeros)
        found.append((factor, rescale))
        total = factor * every + rescale.bias[0]
        results = requantise(total, rescale.multiplier[0], rescale.shift[0], rescale.zero)
        if np.array_equal(results, np.clip(wanted, -128, 127)):
            return found[-1]
    return found[0]


# Operations whose windows move over the last axes of a tensor.
WINDOWS = ("QLinearConv", "MaxPool")

LAYERS: Mapping[tuple[str, str], Callable[[_Reader, Op], None]] = {
    ("", "QLinearConv"): _convolution,
    ("", "QLinearMatMul"): _matmul,
    ("", "MaxPool"): _maximum,
    ("", "Clip"): _Reader.bound,
    ("", "Concat"): _concatenation,
    (CONTRIBUTED, "QGemm"): _gemm,
    (CONTRIBUTED, "QLinearAdd"): _sum,
    (CONTRIBUTED, "QLinearConcat"): _concatenation,
    (CONTRIBUTED, "QLinearGlobalAveragePool"): _mean,
}
