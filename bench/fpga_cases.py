"""Cases for the FPGA's core: a layer at random, its program, and what it must compute.

The programs are laid out by hand and the results are computed by numpy from the definition of
the layer, so neither shares code with the compiler.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from hetsched.fpga.engine import Counts, Engine, Memory
from hetsched.fpga.isa import (
    SHIFTS,
    Buffer,
    Conv,
    Instruction,
    Load,
    Overlay,
    Store,
    Sync,
    Unit,
    encode,
    parameters,
    requantise,
)

USUAL = Memory()
# Fast and slow memories; one that is shared with others gives a beat in two cycles.
MEMORIES = (Memory(), Memory(latency=3), Memory(latency=60), Memory(period=2), Memory(30, 2, 3))


@dataclass(frozen=True)
class Layer:
    """A convolution (or a product of matrices: kernel 1, height 1), a maximum or a sum."""

    channels: int
    height: int
    width: int
    outputs: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    dilation: int = 1
    padding: int = 0
    kind: str = "conv"
    zero: int = 0
    low: int = -128
    high: int = 127
    fill: int = 0
    lines: int = 0
    """Output lines of a band; 0 for all of them."""

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the outputs."""
        reach = [self.dilation * (k - 1) for k in self.kernel]
        return (
            (self.height + 2 * self.padding - reach[0] - 1) // self.stride + 1,
            (self.width + 2 * self.padding - reach[1] - 1) // self.stride + 1,
        )


@dataclass(frozen=True)
class Case:
    """A layer's data; `instructions` run on `memory` leave the results at `result`."""

    layer: Layer
    instructions: tuple[Instruction, ...]
    memory: np.ndarray
    result: int
    expected: np.ndarray
    macs: int

    def results(self, memory: np.ndarray) -> np.ndarray:
        values = memory[self.result : self.result + self.expected.size]
        return values.view(np.int8).reshape(self.expected.shape)


class Dram:
    """Memory that fills from the bottom, in multiples of 64 bytes."""

    def __init__(self) -> None:
        self._parts: list[np.ndarray] = []
        self._used = 0

    def put(self, values: np.ndarray) -> int:
        part = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        start = self._used
        self._used += -(-part.size // 64) * 64
        self._parts.append(np.pad(part, (0, self._used - start - part.size)))
        return start

    def bytes(self) -> np.ndarray:
        return np.concatenate(self._parts)


def blocks(values: np.ndarray, size: int) -> np.ndarray:
    """[channels, height, width] as [channels / size, height, width, size]."""
    values = np.pad(values, ((0, -len(values) % size), (0, 0), (0, 0)))
    count, height, width = len(values) // size, *values.shape[1:]
    return values.reshape(count, size, height, width).transpose(0, 2, 3, 1)


def case(overlay: Overlay, layer: Layer, seed: int) -> Case:
    """`layer` with data at random."""
    rng = np.random.default_rng(seed)
    inputs = rng.integers(-128, 128, (layer.channels, layer.height, layer.width))
    inputs = inputs.astype(np.int8)
    padded = np.pad(
        inputs.astype(np.int64),
        ((0, 0), *[(layer.padding, layer.padding)] * 2),
        constant_values=layer.fill,
    )
    build = {"conv": _dense, "depthwise": _depthwise, "maximum": _maximum, "add": _add}
    return build[layer.kind](overlay, layer, rng, inputs, padded)


def _windows(layer: Layer, padded: np.ndarray, i: int, j: int) -> np.ndarray:
    """The input that tap (i, j) of the kernel meets at each output."""
    height, width = layer.shape
    y, x, step = i * layer.dilation, j * layer.dilation, layer.stride
    return padded[:, y : y + (height - 1) * step + 1 : step, x : x + (width - 1) * step + 1 : step]


def _requantisation(
    rng: np.random.Generator, outputs: int, spread: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bias, multiplier and shift for accumulators that spread by `spread`."""
    bias = rng.integers(-int(spread) - 1, int(spread) + 2, outputs)
    multiplier = rng.integers(1 << 23, 1 << 24, outputs)
    shift = 23 + np.clip(
        np.log2(spread / 50).round().astype(int) + rng.integers(0, 2, outputs), 0, 31
    )
    return bias, multiplier, shift


def _bands(layer: Layer) -> list[tuple[int, int]]:
    """First line and lines of the parts that the outputs are computed in."""
    height = layer.shape[0]
    lines = layer.lines or height
    return [(start, min(lines, height - start)) for start in range(0, height, lines)]


def _lines_between(layer: Layer) -> int:
    """Input lines from one that is loaded to the next: a kernel of one line needs no others."""
    return layer.stride if layer.kernel[0] == 1 and not layer.padding else 1


def _load_band(
    layer: Layer, overlay: Overlay, source: int, start: int, lines: int, planes: range, place: int
) -> Load:
    """The input lines of a band of outputs with their halo, of `planes`, at input word `place`."""
    pad, beats, apart = layer.padding, overlay.input_beats, _lines_between(layer)
    top = start * layer.stride - pad
    end = (start + lines - 1) * layer.stride + layer.dilation * (layer.kernel[0] - 1) + 1 - pad
    plane = layer.height * layer.width * overlay.rows
    return Load(
        source + planes.start * plane + max(top, 0) * layer.width * overlay.rows,
        place * beats,
        layer.width * beats,
        -(-(min(end, layer.height) - max(top, 0)) // apart),
        len(planes),
        row_stride=apart * layer.width * overlay.rows,
        plane_stride=plane,
        left=pad * beats,
        right=pad * beats,
        top=max(-top, 0),
        bottom=max(end - layer.height, 0),
        fill=layer.fill,
    )


def _band_words(layer: Layer, lines: int) -> tuple[int, int]:
    """Words of a line and of a plane of a band's input."""
    line, apart = layer.width + 2 * layer.padding, _lines_between(layer)
    whole = (lines - 1) * layer.stride + layer.dilation * (layer.kernel[0] - 1) + 1
    return line, line * -(-whole // apart)


def _store(
    overlay: Overlay, layer: Layer, result: int, block: int, start: int, lines: int, word: int
) -> Store:
    """A block of output channels of a band, from output word `word` on."""
    height, width = layer.shape
    parts = overlay.rows // overlay.columns
    plane = height * width * overlay.rows
    place = result + block // parts * plane + block % parts * overlay.columns
    beats = overlay.column_beats
    if parts == 1:
        return Store(place + start * width * overlay.rows, word * beats, lines * width * beats)
    assert beats == 1, "a row of outputs at a step has words of one beat"
    return Store(place + start * width * overlay.rows, word, lines * width, step=overlay.rows)


@dataclass(frozen=True)
class Plan:
    """A layer as the core runs it: for each block of outputs, its tiles and its CONV.

    `tiles` are [block, tile, rows, columns]; `conv(block, lines, first, line, plane)` reads its
    input from word `first` on, of so many words a line and a plane.
    """

    tiles: np.ndarray
    bias: np.ndarray
    multiplier: np.ndarray
    shift: np.ndarray
    conv: Callable[[int, int, int, int, int], Conv]
    accumulators: np.ndarray
    macs: int


def _case(
    overlay: Overlay,
    layer: Layer,
    plan: Plan,
    inputs: np.ndarray,
    more: np.ndarray | None = None,
) -> Case:
    """The program goes through the blocks of outputs in each band, in two halves of the buffers.

    A turn is a part of the weights of a block: its loads and its CONV. What is loaded waits for
    the CONV that used its half two turns ago, and a block's first CONV for the STORE that did.
    """
    dram = Dram()
    source = dram.put(blocks(inputs, overlay.rows))
    other = dram.put(blocks(more, overlay.rows)) if more is not None else source
    weights = dram.put(plan.tiles)
    count, columns = len(plan.tiles), overlay.columns
    requant = [np.pad(v, (0, -len(v) % columns)) for v in (plan.bias, plan.multiplier)]
    shift = np.pad(plan.shift, (0, -len(plan.shift) % columns), constant_values=SHIFTS.start)
    words = parameters(*requant, shift)
    requantisation = dram.put(words)
    height, width = layer.shape
    planes, result_planes = (-(-c // overlay.rows) for c in (layer.channels, layer.outputs))
    result = dram.put(np.full((result_planes, height, width, overlay.rows), 77, np.int8))
    assert count <= overlay.parameter_words
    program: list[Instruction] = [
        Sync(),
        Load(requantisation, 0, words.size, buffer=Buffer.PARAMETERS),
    ]
    bands = _bands(layer)
    turns = done = 0
    share = overlay.input_words // (2 if len(bands) > 1 else 1)

    def band_loads(band: int, need: range) -> list[Instruction]:
        start, lines = bands[band]
        plane = _band_words(layer, lines)[1]
        first = band % 2 * share
        sources = [source] if more is None else [source, other]
        return [
            _load_band(layer, overlay, place, start, lines, need, first + part + need.start * plane)
            for place, part in zip(sources, (0, planes * plane), strict=False)
            if need
        ]

    for band, (start, lines) in enumerate(bands):
        line, plane = _band_words(layer, lines)
        first = band % 2 * share
        ahead = band and count > 3
        assert planes * plane * (1 + (more is not None)) <= share
        assert lines * width <= min(overlay.accumulator_words, overlay.output_words // 2)
        for block in range(count):
            whole = plan.conv(block, lines, first, line, plane)
            for part in _parts(overlay, whole, fresh=not block):
                half = turns % 2 * overlay.weight_words // 2
                conv = whole.inner * whole.middle
                tiles = plan.tiles[block, part.start * conv : part.stop * conv]
                assert 0 < tiles.size <= overlay.weight_words // 2 * columns
                offset = (block * plan.tiles.shape[1] + part.start * conv) * tiles[0].size
                loads: list[Instruction] = [
                    Load(
                        weights + offset,
                        half * overlay.column_beats,
                        tiles.size // 8,
                        buffer=Buffer.WEIGHTS,
                        wait=Unit.CONV if turns >= 2 else 0,
                    )
                ]
                if not block and not ahead:
                    # A tile for each plane reads the planes as it goes, else all are needed.
                    loads += band_loads(band, part if whole.outer > 1 else range(planes))
                elif block >= 3 and part.stop == whole.outer and band + 1 < len(bands):
                    # The next band's comes piece by piece: the band before this one is done.
                    of = count - 3
                    piece = range(planes * (block - 3) // of, planes * (block - 2) // of)
                    loads += band_loads(band + 1, piece)
                loads[-1] = replace(loads[-1], signal=Unit.CONV)
                program += loads
                opens, closes = part.start == 0, part.stop == whole.outer
                word = done % 2 * overlay.output_words // 2
                program.append(
                    replace(
                        whole,
                        input=whole.input + part.start * whole.outer_stride,
                        outer=len(part),
                        first=opens,
                        last=closes,
                        weights=half,
                        parameter=block,
                        output=word,
                        zero=layer.zero,
                        low=layer.low,
                        high=layer.high,
                        wait=Unit.LOAD | (Unit.STORE if opens and done >= 2 else 0),
                        signal=Unit.LOAD | (Unit.STORE if closes else 0),
                    )
                )
                turns += 1
            store = _store(overlay, layer, result, block, start, lines, word)
            program.append(replace(store, wait=Unit.CONV, signal=Unit.CONV))
            done += 1
    outputs = requantise(
        plan.accumulators,
        *(v[: layer.outputs, None, None] for v in (plan.multiplier, plan.shift)),
        layer.zero,
        layer.low,
        layer.high,
    )
    whole = np.full((result_planes * overlay.rows, height, width), 77, np.int8)
    whole[: layer.outputs] = outputs
    return Case(layer, tuple(program), dram.bytes(), result, blocks(whole, overlay.rows), plan.macs)


def _parts(overlay: Overlay, conv: Conv, fresh: bool) -> list[range]:
    """The outer loop in parts whose weights fit; short ones where the input is still to come."""
    size = overlay.weight_words // 2 // (conv.inner * conv.middle * overlay.rows)
    size = min(size, 4) if fresh else size
    return [range(o, min(o + size, conv.outer)) for o in range(0, conv.outer, size)]


def _diagonal(overlay: Overlay, block: int, values: np.ndarray) -> np.ndarray:
    """A tile that gives each column its own channel, times one of `values`."""
    tile = np.zeros((overlay.rows, overlay.columns), np.int8)
    lane = block % (overlay.rows // overlay.columns) * overlay.columns
    tile[lane + np.arange(overlay.columns), np.arange(overlay.columns)] = values
    return tile


def _dense(
    overlay: Overlay, layer: Layer, rng: np.random.Generator, inputs: np.ndarray, padded: np.ndarray
) -> Case:
    rows, columns = overlay.rows, overlay.columns
    kh, kw = layer.kernel
    weights = rng.integers(-128, 128, (layer.outputs, layer.channels, kh, kw)).astype(np.int8)
    requant = _requantisation(rng, layer.outputs, 5000.0 * (layer.channels * kh * kw) ** 0.5)
    sums = np.zeros((layer.outputs, *layer.shape), np.int64)
    for i in range(kh):
        for j in range(kw):
            window = _windows(layer, padded, i, j).astype(float)
            # Sums of products of bytes are exact in double precision.
            sums += np.einsum("oc,chw->ohw", weights[:, :, i, j].astype(float), window).astype(
                np.int64
            )
    parts = np.pad(
        weights, ((0, -layer.outputs % columns), (0, -layer.channels % rows), (0, 0), (0, 0))
    )
    tiles = parts.reshape(-1, columns, parts.shape[1] // rows, rows, kh, kw)
    tiles = tiles.transpose(0, 2, 4, 5, 3, 1).reshape(len(tiles), -1, rows, columns)

    def conv(block: int, lines: int, first: int, line: int, plane: int) -> Conv:
        return Conv(
            first,
            layer.shape[1],
            layer.stride,
            lines,
            layer.stride // _lines_between(layer) * line,
            inner=kw,
            inner_stride=layer.dilation,
            middle=kh,
            middle_stride=layer.dilation * line,
            outer=parts.shape[1] // rows,
            outer_stride=plane,
        )

    macs = weights.size * layer.shape[0] * layer.shape[1]
    plan = Plan(tiles, *requant, conv, sums + requant[0][:, None, None], macs)
    return _case(overlay, layer, plan, inputs)


def _depthwise(
    overlay: Overlay, layer: Layer, rng: np.random.Generator, inputs: np.ndarray, padded: np.ndarray
) -> Case:
    columns, parts = overlay.columns, overlay.rows // overlay.columns
    kh, kw = layer.kernel
    weights = rng.integers(-128, 128, (layer.channels, kh, kw)).astype(np.int8)
    requant = _requantisation(rng, layer.outputs, 5000.0 * (kh * kw) ** 0.5)
    sums = np.zeros((layer.outputs, *layer.shape), np.int64)
    for i in range(kh):
        for j in range(kw):
            sums += weights[:, i, j, None, None] * _windows(layer, padded, i, j)
    whole = np.pad(weights, ((0, -layer.channels % columns), (0, 0), (0, 0)))
    tiles = np.zeros((len(whole) // columns, kh, overlay.rows, columns), np.int8)
    # The row counts positions back: the first tap is the oldest.
    tiles[:, :, :kw] = whole.reshape(-1, columns, kh, kw).transpose(0, 2, 3, 1)[:, :, ::-1]

    def conv(block: int, lines: int, first: int, line: int, plane: int) -> Conv:
        return Conv(
            first + block // parts * plane,
            (layer.shape[1] - 1) * layer.stride + kw,
            1,
            lines,
            layer.stride // _lines_between(layer) * line,
            middle=kh,
            middle_stride=line,
            drop=kw - 1,
            step=layer.stride,
            lane=block % parts,
            depthwise=True,
        )

    macs = weights.size * layer.shape[0] * layer.shape[1]
    plan = Plan(tiles, *requant, conv, sums + requant[0][:, None, None], macs)
    return _case(overlay, layer, plan, inputs)


def _maximum(
    overlay: Overlay, layer: Layer, rng: np.random.Generator, inputs: np.ndarray, padded: np.ndarray
) -> Case:
    kh, kw = layer.kernel
    parts = overlay.rows // overlay.columns
    windows = [_windows(layer, padded, i, j) for i in range(kh) for j in range(kw)]
    count = -(-layer.outputs // overlay.columns)
    ones = np.ones(overlay.columns, np.int8)
    tiles = np.stack([[_diagonal(overlay, block, ones)] * (kh * kw) for block in range(count)])

    def conv(block: int, lines: int, first: int, line: int, plane: int) -> Conv:
        return Conv(
            first + block // parts * plane,
            layer.shape[1],
            layer.stride,
            lines,
            layer.stride // _lines_between(layer) * line,
            inner=kw,
            inner_stride=layer.dilation,
            middle=kh,
            middle_stride=layer.dilation * line,
            maximum=True,
        )

    same = np.zeros(layer.outputs, int), np.full(layer.outputs, 1 << 23), np.full(layer.outputs, 23)
    return _case(overlay, layer, Plan(tiles, *same, conv, np.max(windows, axis=0), 0), inputs)


def _add(
    overlay: Overlay, layer: Layer, rng: np.random.Generator, inputs: np.ndarray, padded: np.ndarray
) -> Case:
    parts = overlay.rows // overlay.columns
    more = rng.integers(-128, 128, inputs.shape).astype(np.int8)
    factors = rng.integers(-16383, 16384, (2, layer.outputs))
    high, low = np.clip(factors >> 7, -128, 127), factors & 127
    requant = _requantisation(rng, layer.outputs, 1e6)
    requant = (requant[0] // 128, *requant[1:])
    sums = requant[0][:, None, None] + sum(
        w[:, None, None] * x.astype(np.int64) for w, x in zip(high, (inputs, more), strict=True)
    )
    sums = 128 * sums + sum(
        w[:, None, None] * x.astype(np.int64) for w, x in zip(low, (inputs, more), strict=True)
    )
    columns = overlay.columns
    halves = np.pad(np.stack([high, low]), ((0, 0), (0, 0), (0, -layer.outputs % columns)))
    tiles = np.stack(
        [
            [
                _diagonal(overlay, block, value[columns * block : columns * (block + 1)])
                for half in halves
                for value in half
            ]
            for block in range(halves.shape[2] // columns)
        ]
    )

    def conv(block: int, lines: int, first: int, line: int, plane: int) -> Conv:
        return Conv(
            first + block // parts * plane,
            layer.shape[1],
            1,
            lines,
            line,
            inner=2,
            inner_stride=-(-layer.channels // overlay.rows) * plane,
            middle=2,
            widen=True,
        )

    return _case(overlay, layer, Plan(tiles, *requant, conv, sums, 0), inputs, more)


def layer(seed: int) -> Layer:
    """A layer at random that fits an 8x8 or 16x8 overlay."""
    rng = np.random.default_rng(seed)
    kind = ("conv", "conv", "conv", "gemm", "depthwise", "add", "maximum")[seed % 7]
    channels, outputs = (int(n) for n in rng.integers(1, 41, 2))
    if kind == "gemm":
        return Layer(int(rng.integers(1, 200)), 1, int(rng.integers(1, 60)), outputs)
    dense = kind == "conv"
    kernel = (1, 1) if kind == "add" else tuple(int(k) for k in rng.integers(1, 5, 2))
    # A band needs a line that is no halo.
    padding = min(int(rng.integers(0, 3)), min(kernel) - 1)
    stride = int(rng.integers(1, 4)) if kind != "add" else 1
    dilation = int(rng.integers(1, 3)) if dense else 1
    reach = dilation * (max(kernel) - 1) + 1
    height, width = (int(n) for n in rng.integers(reach, reach + 12, 2))
    bounds = sorted(int(n) for n in rng.integers(-128, 128, 2))
    low, high = bounds if rng.integers(2) and bounds[0] < bounds[1] else (-128, 127)
    found = Layer(
        channels,
        height,
        width,
        outputs if dense else channels,
        (kernel[0], kernel[1]),
        stride,
        dilation,
        padding,
        kind,
        zero=int(rng.integers(-128, 128)) if rng.integers(2) else 0,
        low=low,
        high=high,
        fill=-128 if kind == "maximum" else int(rng.integers(-128, 128)),
    )
    lines = int(rng.integers(1, found.shape[0] + 1)) if rng.integers(2) else 0
    return replace(found, lines=lines)


RESNET18 = {
    "3x3 64 56x56": Layer(64, 56, 56, 64, (3, 3), 1, 1, 1, lines=6),
    "3x3 128 28x28": Layer(128, 28, 28, 128, (3, 3), 1, 1, 1, lines=5),
    "3x3 256 14x14": Layer(256, 14, 14, 256, (3, 3), 1, 1, 1, lines=6),
    "3x3 512 7x7": Layer(512, 7, 7, 512, (3, 3), 1, 1, 1),
    "3x3 64-128 stride 2": Layer(64, 56, 56, 128, (3, 3), 2, 1, 1, lines=3),
    "3x3 128-256 stride 2": Layer(128, 28, 28, 256, (3, 3), 2, 1, 1, lines=3),
    "3x3 256-512 stride 2": Layer(256, 14, 14, 512, (3, 3), 2, 1, 1),
    "1x1 64-128 stride 2": Layer(64, 56, 56, 128, (1, 1), 2, lines=4),
    "1x1 128-256 stride 2": Layer(128, 28, 28, 256, (1, 1), 2, lines=7),
    "1x1 256-512 stride 2": Layer(256, 14, 14, 512, (1, 1), 2),
}


def run(device: Engine, given: Case, memory: Memory = USUAL) -> Counts:
    """What the launch did, if its results are the expected ones."""
    dram = given.memory.copy()
    counts = device.run(encode(given.instructions), dram, memory)
    results = given.results(dram)
    # Channels that fill up the last block are whatever they are.
    real = np.moveaxis(results, 3, 1).reshape(-1, *given.layer.shape)[: given.layer.outputs]
    wanted = np.moveaxis(given.expected, 3, 1).reshape(-1, *given.layer.shape)
    np.testing.assert_array_equal(real, wanted[: given.layer.outputs], err_msg=str(given.layer))
    unused = np.ones(dram.size, bool)
    unused[given.result : given.result + given.expected.size] = False
    np.testing.assert_array_equal(dram[unused], given.memory[unused])
    return counts
