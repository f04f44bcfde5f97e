"""Layers as weight tiles over blocks of channels: what a CONV of the overlay does, kind by kind.

A `Work` says for each block of output channels which blocks of input channels it reads, which
tiles its weights are, and how one CONV walks over them. Where the tiles lie in memory and how the
image is cut is not its matter.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

import numpy as np

from hetsched.fpga.isa import LAYOUTS, SHIFTS, Conv, Overlay
from hetsched.fpga.layers import DIGITS, Convolution, Image, Layer, Maximum, Rescale, Sum, Window

_BITS = dict(LAYOUTS[Conv])
MOST_INNER = 2 ** _BITS["inner"] - 1
MOST_MIDDLE = 2 ** _BITS["middle"] - 1
MOST_OUTER = 2 ** _BITS["outer"] - 1
MOST_STEP = 2 ** _BITS["step"] - 1
# Rows of a tile that see the positions before, in a depthwise one.
TAPS = 8


@dataclass(frozen=True)
class Piece:
    """Tiles that one CONV does: blocks of inputs, rows and columns of the kernel, from and to."""

    blocks: tuple[int, int]
    rows: tuple[int, int]
    columns: tuple[int, int]

    @property
    def tiles(self) -> int:
        return _size(self.blocks) * _size(self.rows) * _size(self.columns)


@dataclass(frozen=True, eq=False)
class Work(ABC):
    """A layer on an overlay; `made` is the image of its result."""

    overlay: Overlay
    layer: Layer
    image: Image
    made: Image

    # How many images of one shape a tile reads from.
    sources = 1
    depthwise = False
    widen = False
    maximum = False

    @property
    @abstractmethod
    def window(self) -> Window: ...

    @property
    @abstractmethod
    def rescale(self) -> Rescale: ...

    @property
    def inputs(self) -> int:
        """Blocks of input channels."""
        return -(-self.image.channels // self.overlay.rows)

    @property
    def outputs(self) -> int:
        """Blocks of output channels."""
        return -(-self.made.channels // self.overlay.columns)

    def reads(self, output: int) -> tuple[int, int]:
        """The blocks of input channels, from and to, that a block of output channels needs."""
        block = output * self.overlay.columns // self.overlay.rows
        return block, block + 1

    def lane(self, output: int) -> int:
        """Where in its block of input channels a block of output channels is."""
        return output * self.overlay.columns % self.overlay.rows // self.overlay.columns

    def weights(self, output: int) -> int:
        """Blocks of outputs of one number have the same tiles."""
        return output

    @abstractmethod
    def pieces(self, blocks: tuple[int, int]) -> Iterator[Piece]:
        """The tiles over blocks of inputs, in parts that fit into half of the buffer."""

    @abstractmethod
    def tiles(self, output: int, piece: Piece) -> np.ndarray:
        """Weights int8 [tiles, rows, columns] in the order of the loops of `loops`."""

    def loops(self, piece: Piece, block_words: int, row_words: int) -> dict[str, int]:
        """The loops of a CONV, and how far it goes in the buffer of inputs for each."""
        dh, dw = self.window.dilations
        return {
            "outer": _size(piece.blocks),
            "outer_stride": block_words,
            "middle": _size(piece.rows),
            "middle_stride": dh * row_words,
            "inner": _size(piece.columns),
            "inner_stride": dw,
        }

    @property
    def streamed(self) -> tuple[int, int]:
        """Words of a line that make no output, and how many there are from one to the next."""
        return 0, 1

    def capacity(self) -> int:
        """Tiles that half of the buffer of weights takes."""
        return self.overlay.weight_words // 2 // self.overlay.rows

    def parameters(self, output: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Bias, multiplier and shift of a block of output channels."""
        columns = self.overlay.columns
        span = slice(output * columns, (output + 1) * columns)
        fields = (self.rescale.bias, self.rescale.multiplier, self.rescale.shift)
        found = [np.zeros(columns, np.int64) for _ in fields]
        found[2][:] = SHIFTS.start
        for array, values in zip(found, fields, strict=True):
            array[: len(values[span])] = values[span]
        return found[0], found[1], found[2]


class Dense(Work):
    """A convolution: each tile is a block of inputs by a block of outputs at one tap."""

    layer: Convolution

    @property
    def window(self) -> Window:
        return self.layer.window

    @property
    def rescale(self) -> Rescale:
        return self.layer.rescale

    def reads(self, output: int) -> tuple[int, int]:
        each = self.layer.weights.shape[0] // self.layer.groups
        first = output * self.overlay.columns
        last = min(first + self.overlay.columns, self.made.channels) - 1
        inputs = self.layer.weights.shape[1]
        start, stop = first // each * inputs, (last // each + 1) * inputs
        return start // self.overlay.rows, -(-stop // self.overlay.rows)

    def pieces(self, blocks: tuple[int, int]) -> Iterator[Piece]:
        height, width = self.window.kernel
        columns = min(width, MOST_INNER, self.capacity())
        rows = min(height, MOST_MIDDLE, self.capacity() // columns)
        whole = (rows, columns) == (height, width)
        fit = min(self.capacity() // (rows * columns), MOST_OUTER) if whole else 1
        parts = ceil(_size(blocks) / fit)
        for part in _even(blocks, parts):
            for r in range(0, height, rows):
                for c in range(0, width, columns):
                    yield Piece(part, (r, min(r + rows, height)), (c, min(c + columns, width)))

    def tiles(self, output: int, piece: Piece) -> np.ndarray:
        rows, columns = self.overlay.rows, self.overlay.columns
        weights, inputs = self.layer.weights, self.layer.weights.shape[1]
        each = weights.shape[0] // self.layer.groups
        taps = weights[:, :, slice(*piece.rows), slice(*piece.columns)]
        start = piece.blocks[0] * rows
        found = np.zeros((_size(piece.blocks) * rows, *taps.shape[2:], columns), np.int8)
        first = output * columns
        stop = min(first + columns, weights.shape[0])
        for group in range(first // each, (stop - 1) // each + 1):
            # The channels of the group that the piece has, of inputs and of outputs.
            low, high = max(group * inputs, start), min((group + 1) * inputs, start + len(found))
            left, right = max(group * each, first), min((group + 1) * each, stop)
            if low < high:
                part = taps[left:right, low - group * inputs : high - group * inputs]
                found[low - start : high - start, :, :, left - first : right - first] = (
                    part.transpose(1, 2, 3, 0)
                )
        blocks = found.reshape(_size(piece.blocks), rows, *taps.shape[2:], columns)
        return blocks.transpose(0, 2, 3, 1, 4).reshape(-1, rows, columns)


class Depthwise(Dense):
    """A convolution of each channel alone: a tile is a row of the kernel over pixels in a row.

    Taps that are further apart than the tile has rows are in tiles of their own, each as wide.
    """

    depthwise = True

    @property
    def _each(self) -> int:
        """Taps of a row of the kernel in one tile."""
        dilation = self.window.dilations[1]
        return min(self.window.kernel[1], 1 + (TAPS - 1) // dilation)

    def pieces(self, blocks: tuple[int, int]) -> Iterator[Piece]:
        height, width = self.window.kernel
        columns = min(ceil(width / self._each), MOST_INNER, self.capacity())
        rows = min(height, MOST_MIDDLE, self.capacity() // columns)
        for r in range(0, height, rows):
            for c in range(0, ceil(width / self._each), columns):
                last = min(c + columns, ceil(width / self._each))
                yield Piece(blocks, (r, min(r + rows, height)), (c, last))

    def reads(self, output: int) -> tuple[int, int]:
        return Work.reads(self, output)

    def loops(self, piece: Piece, block_words: int, row_words: int) -> dict[str, int]:
        found = super().loops(piece, block_words, row_words)
        return {**found, "inner_stride": self._each * self.window.dilations[1]}

    @property
    def streamed(self) -> tuple[int, int]:
        return (self._each - 1) * self.window.dilations[1], self.window.strides[1]

    def tiles(self, output: int, piece: Piece) -> np.ndarray:
        rows, columns = self.overlay.rows, self.overlay.columns
        weights = self.layer.weights[output * columns : (output + 1) * columns, 0]
        found = np.zeros((_size(piece.rows), _size(piece.columns), rows, columns), np.int8)
        for segment in range(*piece.columns):
            for tap in range(self._each):
                column = segment * self._each + tap
                if column < weights.shape[2]:
                    # What streamed last is the last tap of the window.
                    row = (self._each - 1 - tap) * self.window.dilations[1]
                    values = weights[:, slice(*piece.rows), column].T
                    found[:, segment - piece.columns[0], row, : len(weights)] = values
        return found.reshape(-1, rows, columns)


class Largest(Work):
    """The maximum in a window: tiles that hand each channel on."""

    layer: Maximum
    maximum = True

    @property
    def window(self) -> Window:
        return self.layer.window

    @property
    def rescale(self) -> Rescale:
        full = np.ones(self.made.channels, np.int64)
        return Rescale(full * 0, full << SHIFTS.start, full * SHIFTS.start)

    def weights(self, output: int) -> int:
        return self.lane(output)

    def pieces(self, blocks: tuple[int, int]) -> Iterator[Piece]:
        height, width = self.window.kernel
        columns = min(width, MOST_INNER, self.capacity())
        rows = min(height, MOST_MIDDLE, self.capacity() // columns)
        for r in range(0, height, rows):
            for c in range(0, width, columns):
                yield Piece(blocks, (r, min(r + rows, height)), (c, min(c + columns, width)))

    def tiles(self, output: int, piece: Piece) -> np.ndarray:
        one = _diagonal(self.overlay, self.lane(output), 1)
        return np.broadcast_to(one, (piece.tiles, *one.shape))


class Total(Work):
    """A sum of two images: the digits of their factors, the highest first."""

    layer: Sum
    sources = 2
    widen = True

    @property
    def window(self) -> Window:
        return Window((1, 1))

    @property
    def rescale(self) -> Rescale:
        return self.layer.rescale

    def weights(self, output: int) -> int:
        return self.lane(output)

    def pieces(self, blocks: tuple[int, int]) -> Iterator[Piece]:
        yield Piece(blocks, (0, DIGITS), (0, 2))

    def tiles(self, output: int, piece: Piece) -> np.ndarray:
        places = range(7 * (DIGITS - 1), -1, -7)
        parts = [factor >> place & 127 for place in places for factor in self.layer.factors]
        return np.stack([_diagonal(self.overlay, self.lane(output), part) for part in parts])

    def loops(self, piece: Piece, block_words: int, row_words: int) -> dict[str, int]:
        return {"middle": DIGITS, "inner": 2, "inner_stride": block_words}


def work(overlay: Overlay, layer: Layer, image: Image, made: Image) -> Work:
    """What the overlay does for a layer that reads `image` and makes `made`."""
    if isinstance(layer, Sum):
        return Total(overlay, layer, image, made)
    if isinstance(layer, Maximum):
        return Largest(overlay, layer, image, made)
    single = layer.groups == image.channels == made.channels > 1
    if single and layer.window.strides[1] <= MOST_STEP:
        return Depthwise(overlay, layer, image, made)
    return Dense(overlay, layer, image, made)


def _diagonal(overlay: Overlay, lane: int, value: int) -> np.ndarray:
    """A tile that hands the channels of a lane on, times `value`."""
    tile = np.zeros((overlay.rows, overlay.columns), np.int8)
    columns = np.arange(overlay.columns)
    tile[lane * overlay.columns + columns, columns] = value
    return tile


def _size(span: tuple[int, int]) -> int:
    return span[1] - span[0]


def _even(span: tuple[int, int], parts: int) -> Iterator[tuple[int, int]]:
    """`span` in so many parts, whose sizes differ by one at most."""
    start, size = span[0], _size(span)
    for part in range(parts):
        yield start + part * size // parts, start + (part + 1) * size // parts
