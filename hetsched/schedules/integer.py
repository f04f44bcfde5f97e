"""Kernels over bytes: convolutions, products, pooling and sums of quantised tensors.

A blocked tensor [n, blocks, height * width, inner] holds unsigned bytes, the distance of each
element from the least value of its type, so that signed tensors differ by their zero point alone.
Weights are signed. Four channels beside each other are one int32 in memory: a dot product takes it
for all lanes, and the weights of four channels for each lane.

The sums are int32. What becomes of them is arithmetic of float32, each step rounded to the nearest,
ties to even: times a scale, within the range of the result less its zero point, to an integer, plus
the zero point.

Importing this file loads TVM's compiler.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T  # noqa: N812

from hetsched.schedules.cycles import Window
from hetsched.schedules.vectors import Vectors

# Channels that one lane of a dot product takes together.
TOGETHER = 4
LARGEST = 255
# What holds a float32 that is added to it to whole numbers, and its bits.
WHOLE = 12582912.0
WHOLE_BITS = 0x4B400000
# TVM's pattern of a function that no other may be fused with.
OPAQUE = 8
# Instructions on vectors that one thread does sooner than it hands them over.
LEAST_SHARED = 1 << 17
# Of a vector of results, to make bytes of its sums and store them.
STORING = 10

Index = Any


def pack_dense(weights: np.ndarray, inner: int, lanes: int) -> np.ndarray:
    """Weights [o, c, h, w] of int8 as int32 [o / lanes, c / inner, h, w, inner / 4, lanes]."""
    outputs, channels, height, width = weights.shape
    space = ((0, -outputs % lanes), (0, -channels % inner), (0, 0), (0, 0))
    padded = np.pad(weights, space)
    apart = padded.reshape(-1, lanes, padded.shape[1] // inner, inner // 4, 4, height, width)
    turned = np.ascontiguousarray(apart.transpose(0, 2, 5, 6, 3, 1, 4))
    return turned.view(np.int32)[..., 0]


def pack_depthwise(weights: np.ndarray, lanes: int, shifts: int) -> np.ndarray:
    """Weights [c, 1, h, w] of int8 as int32 [c / lanes, h, shifts, w / 4, lanes].

    Each shift has the taps of a row one place further on.
    """
    channels, _, height, width = weights.shape
    quads = -(-(width + shifts - 1) // 4)
    found = np.zeros((-(-channels // lanes) * lanes, height, shifts, quads * 4), np.int8)
    for shift in range(shifts):
        found[:channels, :, shift, shift : shift + width] = weights[:, 0]
    apart = found.reshape(-1, lanes, height, shifts, quads, 4)
    turned = np.ascontiguousarray(apart.transpose(0, 2, 3, 4, 1, 5))
    return turned.view(np.int32)[..., 0]


def depthwise_shifts(window: Window) -> int:
    """How many neighbouring results read the same four columns."""
    return 2 if window.kernel[1] <= 3 and window.strides[1] == window.dilations[1] == 1 else 1


def by_lane(values: np.ndarray, lanes: int) -> np.ndarray:
    """A value for each channel as [channels / lanes, lanes], filled up with zeros."""
    return np.pad(values, (0, -len(values) % lanes)).reshape(-1, lanes)


def convolution(
    window: Window,
    shape: Sequence[int],
    outputs: int,
    groups: int,
    zero_points: tuple[int, int],
    vectors: Vectors,
    *,
    rows: bool = False,
) -> Any:
    """Of a blocked tensor of `shape`, to `outputs` blocks; a group has whole blocks.

    `zero_points` are those of the tensor and of the result, as distances from the least value. The
    parameters of the function are the tensor, packed weights, bias and scale [blocks, lanes], and
    the result, which with `rows` is a matrix that has the channels of a pixel beside each other.
    """
    batch, inputs, _, inner = shape
    lanes = vectors.lanes
    each, depth = outputs // groups, inputs // groups
    height, width = window.result
    if window.is_pointwise:
        height, width = 1, height * width
    tile = vectors.tiles(width, each, exact=True)[0]
    pixels, blocks = tile.broadcasts, tile.vectors
    tiles = -(-width // pixels)
    steps = inner // TOGETHER
    kernel = window.kernel
    work = batch * outputs * height * width * (depth * prod(kernel) * steps + STORING)
    weights_shape = (outputs, depth, *kernel, steps, lanes)
    result: tuple[int, ...] = (batch, outputs, height * width, lanes)
    if rows:
        result = (batch * height * width, outputs * lanes)

    def body(x: Any, weights: Any, bias: Any, scale: Any, y: Any) -> None:
        read, columns = _padded(x, window, window.result[1], zero_points[0])
        shares = (batch, outputs // blocks, height)
        if height == 1:
            shares = (batch, outputs // blocks, tiles)
        with _Shared(shares, work) as (n, o, share):
            row = 0 if height == 1 else share
            with T.serial(0, 1 if height == 1 else tiles) as along:
                # The last tile lies over the one before it where they do not divide the row.
                first = T.min((share if height == 1 else along) * pixels, width - pixels)
                sums = _Registers(pixels * blocks, lanes)
                for b in range(blocks):
                    start = _vector(bias, lanes, o * blocks + b, 0)
                    for p in range(pixels):
                        sums.put(b * pixels + p, start)
                with T.grid(depth, *kernel, steps) as (c, kh, kw, quad):
                    place = first
                    if not window.is_pointwise:
                        down = row * window.strides[0] + kh * window.dilations[0]
                        right = first * window.strides[1] + kw * window.dilations[1]
                        place = down * columns + right
                    block = c if groups == 1 else o * blocks // each * depth + c
                    taps = [
                        _weights(
                            vectors, _vector(weights, lanes, o * blocks + b, c, kh, kw, quad, 0)
                        )
                        for b in range(blocks)
                    ]
                    for p in range(pixels):
                        pixel = place + p * window.strides[1]
                        four = _vector(read, TOGETHER, n, block, pixel, quad * TOGETHER)
                        value = T.broadcast(T.reinterpret("int32", four), lanes)
                        data = _data(vectors, value)
                        for b, tap in enumerate(taps):
                            slot = b * pixels + p
                            sums.put(slot, _dot(vectors, sums.get(slot), data, tap))
                for b in range(blocks):
                    factor = _vector(scale, lanes, o * blocks + b, 0)
                    for p in range(pixels):
                        found = _requantised(
                            sums.get(b * pixels + p), factor, zero_points[1], lanes
                        )
                        pixel = row * width + first + p
                        if rows:
                            _put(y, found, lanes, pixel, (o * blocks + b) * lanes)
                        else:
                            _put(y, found, lanes, n, o * blocks + b, pixel, 0)

    return _function(
        "quantized_convolution", body, (tuple(shape), "uint8"), (weights_shape, "int32"),
        ((outputs, lanes), "int32"), ((outputs, lanes), "float32"), (result, "uint8"),
    )  # fmt: skip


def depthwise(
    window: Window, shape: Sequence[int], zero_points: tuple[int, int], vectors: Vectors
) -> Any:
    """Each channel of a blocked tensor with its own kernel; parameters as of `convolution`."""
    batch, blocks, _, lanes = shape
    height, width = window.result
    stride, dilation = window.strides[1], window.dilations[1]
    shifts = depthwise_shifts(window)
    quads = -(-(window.kernel[1] + shifts - 1) // 4)
    pixels = min(width, 8)
    reads = 4 * window.kernel[0] * quads
    work = batch * blocks * height * width * (reads + STORING)
    # Four columns are read at a time, those beyond the kernel for nothing.
    beyond = (quads * 4 - window.kernel[1]) * dilation
    weights_shape = (blocks, window.kernel[0], shifts, quads, lanes)

    def body(x: Any, weights: Any, bias: Any, scale: Any, y: Any) -> None:
        with _Shared((batch, blocks), work) as (n, o):
            read, columns = _plane(x, window, zero_points[0], beyond, n, o)
            start = _vector(bias, lanes, o, 0)
            factor = _vector(scale, lanes, o, 0)
            with T.grid(height, -(-width // pixels)) as (row, along):
                first = T.min(along * pixels, width - pixels)
                sums = _Registers(pixels, lanes)
                for p in range(pixels):
                    sums.put(p, start)
                for kh, quad in np.ndindex(window.kernel[0], quads):
                    line = (row * window.strides[0] + kh * window.dilations[0]) * columns
                    taps = [
                        _weights(vectors, _vector(weights, lanes, o, kh, shift, quad, 0))
                        for shift in range(shifts)
                    ]
                    for p in range(0, pixels, shifts):
                        place = line + (first + p) * stride + quad * 4 * dilation
                        data = _columns(vectors, read, place, dilation)
                        for shift, tap in enumerate(taps):
                            if p + shift < pixels:
                                sums.put(p + shift, _dot(vectors, sums.get(p + shift), data, tap))
                for p in range(pixels):
                    found = _requantised(sums.get(p), factor, zero_points[1], lanes)
                    _put(y, found, lanes, n, o, row * width + first + p, 0)

    return _function(
        "quantized_depthwise", body, (tuple(shape), "uint8"), (weights_shape, "int32"),
        ((blocks, lanes), "int32"), ((blocks, lanes), "float32"),
        ((batch, blocks, height * width, lanes), "uint8"),
    )  # fmt: skip


def added(
    size: int, least: int, ratios: tuple[float, float], fixed: float, vectors: Vectors
) -> Any:
    """The sum of two tensors of `size` bytes: a * ratio + (b * ratio + fixed), both fused.

    `least` is that of their type, whose elements are added, and `fixed` has all zero points.
    """
    lanes = vectors.lanes
    whole = size // lanes

    def element(values: Sequence[Any], count: int) -> Any:
        kind, integer = (name if count == 1 else f"{name}x{count}" for name in ("float32", "int32"))
        total = _constant(fixed, count)
        for value, ratio in zip(reversed(values), reversed(ratios), strict=True):
            own = T.cast(value, integer) + _constant(least, count, "int32") if least else value
            total = T.call_llvm_pure_intrin(
                kind, "llvm.fma", T.cast(own, kind), _constant(ratio, count), total
            )
        return _rounded(total, -least, count)

    def body(a: Any, b: Any, y: Any) -> None:
        with _Shared((whole,), whole * STORING) as (i,):
            both = [_vector(source, lanes, i * lanes) for source in (a, b)]
            _put(y, element(both, lanes), lanes, i * lanes)
        for index in range(whole * lanes, size):
            T.buffer_store(y, element([a[index], b[index]], 1), [index])

    return _function("quantized_add", body, *[((size,), "uint8")] * 3)


@dataclass(frozen=True)
class Change:
    """Bytes of one scale and zero point as those of another: (byte - start) * scale / divisor."""

    start: int
    scale: float
    divisor: float
    zero_point: int

    def __call__(self, value: Any, lanes: int) -> Any:
        """The whole numbers that vectors `value` of int32 become."""
        moved = value - _constant(self.start, lanes, "int32")
        scaled = T.cast(moved, "float32" if lanes == 1 else f"float32x{lanes}")
        scaled = scaled * _constant(self.scale, lanes)
        if self.divisor != 1:
            scaled = scaled / _constant(self.divisor, lanes)
        return _whole(scaled, self.zero_point, lanes)


def change(source: tuple[np.float32, int], result: tuple[np.float32, int]) -> Change | None:
    """From one scale and zero point, as a distance from the least value, to another.

    None where each byte stays the same. To multiply and then divide is what is defined; to
    multiply by the ratio is faster, and is done where that gives the same for each byte.
    """
    (scale, start), (divisor, zero_point) = source, result
    every = np.arange(LARGEST + 1)
    distances = (every - start).astype(np.float32)

    def bytes_of(values: np.ndarray) -> np.ndarray:
        whole: np.ndarray = np.rint(values) + zero_point
        return whole.clip(0, LARGEST)

    defined = bytes_of(distances * scale / divisor)
    if np.array_equal(defined, every):
        return None
    ratio = scale / divisor
    if np.array_equal(defined, bytes_of(distances * ratio)):
        scale, divisor = ratio, np.float32(1)
    return Change(start, float(scale), float(divisor), zero_point)


def concatenated(shapes: Sequence[Sequence[int]], changes: Sequence[Change | None]) -> Any:
    """Blocked tensors of `shapes` behind each other, by channel, each with its change."""
    batch, _, pixels, lanes = shapes[0]
    blocks = [shape[1] for shape in shapes]

    def body(*buffers: Any) -> None:
        *sources, y = buffers
        for index, (x, alter) in enumerate(zip(sources, changes, strict=True)):
            before, count = sum(blocks[:index]), blocks[index]
            with (
                _Shared((batch, count), batch * count * pixels * STORING) as (n, o),
                T.serial(0, pixels) as p,
            ):
                value = _vector(x, lanes, n, o, p, 0)
                if alter is not None:
                    wide = alter(T.cast(value, f"int32x{lanes}"), lanes)
                    value = T.cast(wide, f"uint8x{lanes}")
                _put(y, value, lanes, n, before + o, p, 0)

    return _function(
        "quantized_concat", body, *((tuple(shape), "uint8") for shape in shapes),
        ((batch, sum(blocks), pixels, lanes), "uint8"),
    )  # fmt: skip


def mean(shape: Sequence[int], scale: float, zero_points: tuple[int, int], vectors: Vectors) -> Any:
    """The sum of all pixels less their zero points, times `scale`, of each channel."""
    batch, blocks, pixels, lanes = shape

    def body(x: Any, y: Any) -> None:
        with _Shared((batch, blocks), 2 * batch * blocks * pixels) as (n, o):
            sums = _Registers(1, lanes)
            sums.put(0, T.broadcast(T.int32(-zero_points[0] * pixels), lanes))
            with T.serial(0, pixels) as p:
                value = T.cast(_vector(x, lanes, n, o, p, 0), f"int32x{lanes}")
                sums.put(0, sums.get(0) + value)
            factor = _constant(scale, lanes)
            _put(y, _requantised(sums.get(0), factor, zero_points[1], lanes), lanes, n, o, 0, 0)

    return _function(
        "quantized_mean", body, (tuple(shape), "uint8"), ((batch, blocks, 1, lanes), "uint8")
    )


def max_pool(window: Window, shape: Sequence[int], vectors: Vectors) -> Any:
    """The largest byte of each window of a blocked tensor."""
    batch, blocks, _, lanes = shape
    height, width = window.result
    work = batch * blocks * height * width * prod(window.kernel)

    def body(x: Any, y: Any) -> None:
        with _Shared((batch, blocks), work) as (n, o):
            read, columns = _plane(x, window, 0, 0, n, o)
            with T.grid(height, width) as (row, column):
                found = None
                for kh, kw in np.ndindex(*window.kernel):
                    down = row * window.strides[0] + int(kh) * window.dilations[0]
                    right = column * window.strides[1] + int(kw) * window.dilations[1]
                    value = read(lanes, down * columns + right)
                    found = value if found is None else T.max(found, value)
                _put(y, found, lanes, n, o, row * width + column, 0)

    return _function(
        "quantized_max_pool", body, (tuple(shape), "uint8"),
        ((batch, blocks, height * width, lanes), "uint8"),
    )  # fmt: skip


def pack(shape: Sequence[int], inner: int, source: str, quantise: tuple[float, int] | None) -> Any:
    """A tensor [n, c, h, w] as a blocked one, filled up with zeros.

    `source` is its type: bytes, signed or not, or float32, which is divided by the scale and moved
    by the zero point of `quantise`.
    """
    batch, channels, height, width = shape
    blocks = -(-channels // inner)
    pixels = height * width
    lanes = next(n for n in (16, 8, 4, 2, 1) if pixels % n == 0)

    def body(x: Any, y: Any) -> None:
        whole = "int32" if lanes == 1 else f"int32x{lanes}"

        def element(n: Index, channel: int, o: Index, place: Index) -> Any:
            at = o * inner + channel
            value = _vector(x, lanes, n, T.min(at, channels - 1), place)
            if quantise is None:
                byte = T.cast(value, whole)
                return byte + _constant(128, lanes, "int32") if source == "int8" else byte
            scaled = value / _constant(quantise[0], lanes)
            return _whole(scaled, quantise[1], lanes)

        with _Shared(
            (batch, blocks, pixels // lanes), batch * blocks * inner * pixels // lanes * STORING
        ) as (
            n,
            o,
            p,
        ):
            for four in range(0, inner, TOGETHER):
                bits: Any = _constant(0, lanes, "int32")
                for index in range(TOGETHER):
                    if blocks == 1 and four + index >= channels:
                        continue
                    value = element(n, four + index, o, p * lanes)
                    bits = T.bitwise_or(
                        bits, T.shift_left(value, _constant(8 * index, lanes, "int32"))
                    )
                bytes_of = T.reinterpret(f"uint8x{lanes * TOGETHER}", bits)
                for lane in range(lanes):
                    if inner == TOGETHER:
                        _put(y, bytes_of, lanes * TOGETHER, n, o, p * lanes, 0)
                        break
                    picked = [T.int32(lane * TOGETHER + index) for index in range(TOGETHER)]
                    part = tirx.Shuffle([bytes_of], picked)
                    _put(y, part, TOGETHER, n, o, p * lanes + lane, four)

    return _function(
        "quantized_pack", body, ((batch, channels, pixels), source),
        ((batch, blocks, pixels, inner), "uint8"),
    )  # fmt: skip


def unpack(shape: Sequence[int], channels: int, result: str) -> Any:
    """A blocked tensor as [n, c, pixels] of `result`, a type of bytes."""
    batch, _, pixels, inner = shape

    def body(x: Any, y: Any) -> None:
        work = batch * channels * pixels
        with _Shared((batch, channels), work) as (n, c), T.serial(0, pixels) as p:
            byte = x[n, c // inner, p, c % inner]
            if result == "int8":
                byte = T.bitwise_xor(byte, T.uint8(128))
            T.buffer_store(y, T.reinterpret(result, byte), [n, c, p])

    return _function(
        "quantized_unpack", body, (tuple(shape), "uint8"), ((batch, channels, pixels), result)
    )


def flipped(size: int, source: str, result: str) -> Any:
    """Bytes as distances from the least value of their type, or back: one is the other."""

    def body(x: Any, y: Any) -> None:
        with _Shared((size,), size // 16) as (i,):
            byte = T.reinterpret("uint8", x[i])
            T.buffer_store(y, T.reinterpret(result, T.bitwise_xor(byte, T.uint8(128))), [i])

    return _function("quantized_flip", body, ((size,), source), ((size,), result))


class _Registers:
    """Vectors of int32 that stay in registers, as all places are known."""

    def __init__(self, count: int, lanes: int) -> None:
        self._lanes = lanes
        self._buffer = T.alloc_buffer((count * lanes,), "int32", scope="local")

    def get(self, slot: int) -> Any:
        return _vector(self._buffer, self._lanes, slot * self._lanes)

    def put(self, slot: int, value: Any) -> None:
        _put(self._buffer, value, self._lanes, slot * self._lanes)


class _Shared:
    """A nest of loops over `sizes`, in parallel as one where `work` instructions are worth it."""

    def __init__(self, sizes: Sequence[int], work: int) -> None:
        self._sizes = sizes
        self._frame = (T.parallel if work >= LEAST_SHARED else T.serial)(0, prod(sizes))

    def __enter__(self) -> list[Any]:
        index = self._frame.__enter__()
        found: list[Any] = []
        for place, size in enumerate(self._sizes):
            after = prod(self._sizes[place + 1 :])
            part = index // after if after > 1 else index
            found.append(part % size if place else part)
        return found

    def __exit__(self, *error: Any) -> None:
        self._frame.__exit__(*error)


def _function(name: str, body: Callable[..., None], *buffers: tuple[Sequence[int], str]) -> Any:
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name(name)
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": OPAQUE})
        parameters = [
            T.arg(f"p{index}", T.buffer(tuple(shape), dtype))
            for index, (shape, dtype) in enumerate(buffers)
        ]
        with T.sblock("root"):
            T.reads([])
            T.writes([])
            body(*parameters)
    return builder.get()


def _vector(source: Any, lanes: int, *index: Index) -> Any:
    """`lanes` elements from `index` on; `source` is a buffer, or reads one."""
    if not isinstance(source, tirx.Buffer):
        return source(lanes, *index)
    *outer, last = index
    return source[(*outer, T.ramp(last, 1, lanes) if lanes > 1 else last)]


def _put(buffer: Any, value: Any, lanes: int, *index: Index) -> None:
    *outer, last = index
    T.buffer_store(buffer, value, [*outer, T.ramp(last, 1, lanes) if lanes > 1 else last])


def _constant(value: float, lanes: int, dtype: str = "float32") -> Any:
    scalar = tirx.const(value, dtype)
    return T.broadcast(scalar, lanes) if lanes > 1 else scalar


def _padded(
    x: Any, window: Window, columns: int, zero_point: int
) -> tuple[Callable[..., Any], int]:
    """Reads vectors of `x` by block, place in the padded image, and channel; and its width."""
    batch, blocks, _, inner = (int(size) for size in x.shape)
    rows, across = window.reach(columns)
    if (rows, across) == window.source:
        return lambda lanes, n, c, place, lane: _vector(x, lanes, n, c, place, lane), across
    image = T.alloc_buffer((batch, blocks, rows * across, inner), "uint8")
    with _Shared((batch, blocks, rows), batch * blocks * rows * across) as (n, c, row):
        _fill(
            window, across, row, zero_point, inner,
            lambda count, place: _vector(x, count, n, c, place, 0),
            lambda value, count, place: _put(image, value, count, n, c, place, 0),
        )  # fmt: skip
    return lambda lanes, n, c, place, lane: _vector(image, lanes, n, c, place, lane), across


def _plane(
    x: Any, window: Window, zero_point: int, beyond: int, n: Index, c: Index
) -> tuple[Callable[..., Any], int]:
    """Reads vectors of a padded block of `x` by place; `beyond` columns may be read behind it."""
    inner = int(x.shape[3])
    rows, across = window.reach(window.result[1])
    if (rows, across) == window.source and not beyond:
        return lambda lanes, place: _vector(x, lanes, n, c, place, 0), across
    image = T.alloc_buffer((rows * across + beyond, inner), "uint8")
    with T.serial(0, rows) as row:
        _fill(
            window, across, row, zero_point, inner,
            lambda count, place: _vector(x, count, n, c, place, 0),
            lambda value, count, place: _put(image, value, count, place, 0),
        )  # fmt: skip
    return lambda lanes, place: _vector(image, lanes, place, 0), across


def _fill(
    window: Window,
    across: int,
    row: Index,
    zero_point: int,
    inner: int,
    read: Callable[[int, Index], Any],
    write: Callable[[Any, int, Index], None],
) -> None:
    """One row of a padded image: zero points around a row of the source."""
    height, width = window.source
    top, left = window.padding[:2]
    zero = _constant(zero_point, inner, "uint8")
    line = row * across
    with T.If(tirx.all(row >= top, row < height + top)):
        with T.Then():
            for column in range(left):
                write(zero, inner, line + column)
            with T.serial(0, width) as column:
                write(read(inner, (row - top) * width + column), inner, line + left + column)
            for column in range(left + width, across):
                write(zero, inner, line + column)
        with T.Else(), T.serial(0, across) as column:
            write(zero, inner, line + column)


def _columns(vectors: Vectors, read: Callable[..., Any], place: Index, dilation: int) -> list[Any]:
    """The bytes of four columns as `_data` has them."""
    lanes = vectors.lanes
    if vectors.dot == "lanes":
        places = (place + index * dilation for index in range(4))
        return [T.cast(read(lanes, column), f"int32x{lanes}") for column in places]
    if vectors.dot in ("pairs", "quads"):
        places = (place + index * dilation for index in range(4))
        a, b, c, d = (T.cast(read(lanes, column), f"int32x{lanes}") for column in places)
        even, odd = _paired(a, c, lanes), _paired(b, d, lanes)
        if vectors.dot == "pairs":
            return [even, odd]
        return [T.bitwise_or(even, T.shift_left(odd, _constant(8, lanes, "int32")))]
    return _data(vectors, _four_columns(read, place, dilation, lanes))


def _four_columns(read: Callable[..., Any], place: Index, dilation: int, lanes: int) -> Any:
    """The bytes of four columns as int32 of each lane."""
    if dilation == 1:
        parts = [read(4 * lanes, place)]
    else:
        parts = [read(lanes, place + index * dilation) for index in range(4)]
    order = [T.int32(column * lanes + lane) for lane in range(lanes) for column in range(4)]
    return T.reinterpret(f"int32x{lanes}", tirx.Shuffle(parts, order))


def _weights(vectors: Vectors, packed: Any) -> list[Any]:
    """Four signed bytes of each lane as the instruction takes them."""
    lanes = vectors.lanes
    if vectors.dot == "madd":
        words = T.reinterpret(f"int16x{2 * lanes}", packed)
        eight = _constant(8, 2 * lanes, "int16")
        return [T.shift_right(T.shift_left(words, eight), eight), T.shift_right(words, eight)]
    if vectors.dot == "pairs":
        top, mask = (_constant(value, lanes, "int32") for value in (24, 0xFFFF))
        a, b, c, d = (
            T.shift_right(T.shift_left(packed, _constant(24 - 8 * index, lanes, "int32")), top)
            for index in range(4)
        )
        low, high = (T.bitwise_and(value, mask) for value in (a, b))
        return [_paired(low, c, lanes), _paired(high, d, lanes)]
    if vectors.dot == "lanes":
        top = _constant(24, lanes, "int32")
        shifted = [
            T.shift_left(packed, _constant(24 - 8 * index, lanes, "int32")) for index in range(4)
        ]
        return [T.shift_right(value, top) for value in shifted]
    if vectors.dot == "quads":
        return [packed]
    return [T.reinterpret(f"int8x{4 * lanes}", packed)]


def _data(vectors: Vectors, packed: Any) -> list[Any]:
    """Four unsigned bytes of each lane as the instruction takes them."""
    lanes = vectors.lanes
    if vectors.dot == "vnni":
        return [T.reinterpret(f"uint8x{4 * lanes}", packed)]
    if vectors.dot == "sdot":
        signs = _constant(0x80, 4 * lanes, "uint8")
        bytes_of = T.bitwise_xor(T.reinterpret(f"uint8x{4 * lanes}", packed), signs)
        return [T.reinterpret(f"int8x{4 * lanes}", bytes_of)]
    if vectors.dot == "madd":
        words = T.reinterpret(f"uint16x{2 * lanes}", packed)
        low = T.bitwise_and(words, _constant(LARGEST, 2 * lanes, "uint16"))
        high = T.shift_right(words, _constant(8, 2 * lanes, "uint16"))
        return [T.reinterpret(f"int16x{2 * lanes}", part) for part in (low, high)]
    if vectors.dot == "pairs":
        halves = _constant(LARGEST << 16 | LARGEST, lanes, "int32")
        further = T.shift_right(packed, _constant(8, lanes, "int32"))
        return [T.bitwise_and(value, halves) for value in (packed, further)]
    if vectors.dot == "quads":
        return [packed]
    mask = _constant(LARGEST, lanes, "int32")
    shifted = [T.shift_right(packed, _constant(8 * index, lanes, "int32")) for index in range(4)]
    return [T.bitwise_and(value, mask) for value in shifted]


def _dot(vectors: Vectors, total: Any, data: Sequence[Any], weights: Sequence[Any]) -> Any:
    """`total` plus the four products of each lane."""
    lanes = vectors.lanes
    kind = f"int32x{lanes}"
    if vectors.dot == "vnni":
        name = f"llvm.x86.avx512.vpdpbusd.{32 * lanes}"
        return T.call_llvm_pure_intrin(kind, name, total, data[0], weights[0])
    if vectors.dot == "sdot":
        return T.call_llvm_pure_intrin(kind, "llvm.aarch64.neon.sdot", total, data[0], weights[0])
    if vectors.dot == "quads":
        return T.call_pure_extern(kind, QUADS, total, data[0], weights[0])
    for value, weight in zip(data, weights, strict=True):
        if vectors.dot == "madd":
            product = T.call_llvm_pure_intrin(kind, MULTIPLY_PAIRS[lanes], value, weight)
        elif vectors.dot == "pairs":
            product = T.call_pure_extern(kind, PAIRS, value, weight)
        else:
            product = value * weight
        total = total + product
    return total


def _paired(low: Any, high: Any, lanes: int) -> Any:
    """Two numbers of 16 bits in each lane, the lower one without bits above."""
    return T.bitwise_or(low, T.shift_left(high, _constant(16, lanes, "int32")))


# Functions that C has to have: of the two numbers of 16 bits in each lane, the sum of products; and
# a total plus the four products of unsigned bytes and signed ones in each lane.
PAIRS, QUADS = "multiply_pairs", "multiply_quads"
MULTIPLY_PAIRS = {
    4: "llvm.x86.sse2.pmadd.wd",
    8: "llvm.x86.avx2.pmadd.wd",
    16: "llvm.x86.avx512.pmaddw.d.512",
}


def offset(vectors: Vectors) -> int:
    """What the instruction takes off each byte of the data; the bias has to make up for it."""
    return 128 if vectors.dot == "sdot" else 0


def _requantised(sums: Any, scale: Any, zero_point: int, lanes: int) -> Any:
    return _rounded(T.cast(sums, f"float32x{lanes}") * scale, zero_point, lanes)


def _rounded(value: Any, zero_point: int, lanes: int) -> Any:
    return T.cast(_whole(value, zero_point, lanes), "uint8" if lanes == 1 else f"uint8x{lanes}")


def _whole(value: Any, zero_point: int, lanes: int) -> Any:
    """A float within the range of a byte less its zero point, rounded, plus that, as int32."""
    low, high = (_constant(bound - zero_point, lanes) for bound in (0, LARGEST))
    # The sum has as many bits as leave no fraction, and the last bits of it are the whole number.
    held = T.max(T.min(value, high), low) + _constant(WHOLE, lanes)
    bits = T.reinterpret("int32" if lanes == 1 else f"int32x{lanes}", held)
    return bits - _constant(WHOLE_BITS - zero_point, lanes, "int32")
