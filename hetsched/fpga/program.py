"""A part of a quantised model as a program of the overlay: instructions and a memory of constants.

Each layer is cut into rectangles of its result. Of a rectangle, the input with its halo is loaded
once, and each block of output channels is computed from it, in the order of memory. Where not all
input channels fit into the buffer, they come in turns, and the sums of as many blocks of outputs as
fit wait in the accumulators. Weights are loaded as often as there are rectangles, or once where all
of a layer's fit into half of their buffer. Everything is written in the order in which it is
computed: the queues of the units let loads run ahead, into whatever the buffers have free.

Activations lie in memory in blocks of channels, [channels / rows][height][width][rows].
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil

import numpy as np

from hetsched.errors import UnsupportedOperation
from hetsched.fpga.isa import (
    BEAT,
    LAYOUTS,
    Buffer,
    Conv,
    Instruction,
    Load,
    Overlay,
    Store,
    parameters,
)
from hetsched.fpga.layers import Convolution, Image, Layer, Network, macs, share
from hetsched.fpga.reference import images_of, outputs_of
from hetsched.fpga.stream import Entry, Space, Stream
from hetsched.fpga.tiles import Piece, Work, work

# Of each tensor and of the weights, in the overlay's memory.
ALIGNMENT = 64

_LOAD = {name: 2**bits - 1 for name, bits in LAYOUTS[Load]}
_MOST_POSITIONS = 2 ** dict(LAYOUTS[Conv])["positions"] - 1


@dataclass(frozen=True)
class Fold:
    """Columns of a window as channels: channel c * columns + j of a pixel is tap j of channel c.

    The host does so with an image of few channels, which would leave rows of the array idle.
    """

    columns: int
    stride: int
    dilation: int
    before: int
    width: int
    fill: int

    def array(self, image: np.ndarray) -> np.ndarray:
        """[channels, height, width] as [channels * columns, height, the width of the result]."""
        channels, height, width = image.shape
        reach = (self.width - 1) * self.stride + (self.columns - 1) * self.dilation + 1
        after = max(0, reach - self.before - width)
        pads = ((0, 0), (0, 0), (self.before, after))
        padded = np.pad(image, pads, constant_values=self.fill)
        found = np.empty((channels, self.columns, height, self.width), np.int8)
        for tap in range(self.columns):
            start = tap * self.dilation
            stop = start + (self.width - 1) * self.stride + 1
            found[:, tap] = padded[:, :, start : stop : self.stride]
        return found.reshape(-1, height, self.width)


@dataclass(frozen=True)
class Place:
    """An image in the overlay's memory, in blocks of `rows` channels, from byte `start` on.

    `image` is how it stands there; with a `fold`, the host folds it on the way.
    """

    start: int
    rows: int
    image: Image
    fold: Fold | None = None

    @property
    def nbytes(self) -> int:
        return ceil(self.image.channels / self.rows) * self.rows * self.image.positions

    def write(self, memory: np.ndarray, array: np.ndarray) -> None:
        """Puts an image [channels, height, width] there."""
        if self.fold:
            array = self.fold.array(array)
        blocked = self._of(memory)
        for block in range(len(blocked)):
            part = array[block * self.rows : (block + 1) * self.rows]
            blocked[block, :, :, : len(part)] = part.transpose(1, 2, 0)

    def read(self, memory: np.ndarray) -> np.ndarray:
        """The image that is there, [channels, height, width]."""
        blocked = self._of(memory)
        found = blocked.transpose(0, 3, 1, 2).reshape(-1, *blocked.shape[1:3])
        return found[: self.image.channels]

    def _of(self, memory: np.ndarray) -> np.ndarray:
        """A view [blocks, height, width, rows] of its bytes."""
        found = memory[self.start : self.start + self.nbytes].view(np.int8)
        return found.reshape(-1, self.image.height, self.image.width, self.rows)


@dataclass(frozen=True)
class Span:
    """The instructions of a layer, from and to, and the multiply-adds that its meaning has."""

    layer: str
    start: int
    stop: int
    macs: int


@dataclass(frozen=True, eq=False)
class Program:
    """Instructions, what lies in memory before they start, and where inputs and outputs are.

    Memory from byte 0 has `constants`, and `nbytes` in all.
    """

    overlay: Overlay
    network: Network
    instructions: tuple[Instruction, ...]
    constants: np.ndarray
    nbytes: int
    places: Mapping[str, Place]
    spans: tuple[Span, ...]

    def memory(self, inputs: Sequence[np.ndarray]) -> np.ndarray:
        """The overlay's memory, bytes, with the inputs of the part in their places."""
        found = np.zeros(self.nbytes, np.uint8)
        found[: len(self.constants)] = self.constants
        for name, array in images_of(self.network, inputs).items():
            self.places[name].write(found, array)
        return found

    def read(self, memory: np.ndarray, name: str) -> np.ndarray:
        """The image in its place, [channels, height, width]."""
        return self.places[name].read(memory)

    def outputs(self, memory: np.ndarray) -> list[np.ndarray]:
        """The outputs of the part in a memory that the instructions have gone through."""
        names = {self.network.stored[tensor.name] for tensor in self.network.outputs}
        return outputs_of(self.network, {name: self.read(memory, name) for name in names})


def fits(network: Network, overlay: Overlay) -> None:
    """Whether `program` serves; quick, as nothing is written.

    Raises
    ------
    UnsupportedOperation
        As `program`.
    """
    _Writer(network, overlay).check()


def program(network: Network, overlay: Overlay) -> Program:
    """`network` for a core of this size.

    Raises
    ------
    UnsupportedOperation
        A layer does not fit; the message has its name and the reason.
    """
    return _Writer(network, overlay).program()


@dataclass(frozen=True)
class Cut:
    """How the result of a layer is cut: rows and columns of a rectangle, and words of inputs.

    `words` is how many words of the buffer of inputs one load may take.
    """

    rows: int
    columns: int
    words: int


@dataclass(frozen=True)
class Round:
    """Blocks of outputs, from and to, that are computed from the same loads of input blocks."""

    outputs: tuple[int, int]
    loads: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class _Area:
    """A rectangle of the result, and of the input with its halo before it is cut off."""

    rows: tuple[int, int]
    columns: tuple[int, int]
    top: int
    left: int
    height: int
    width: int

    @property
    def outputs(self) -> int:
        return (self.rows[1] - self.rows[0]) * (self.columns[1] - self.columns[0])

    @property
    def words(self) -> int:
        return self.height * self.width


def _area(work: Work, rows: tuple[int, int], columns: tuple[int, int]) -> _Area:
    window = work.window
    (sh, sw), (rh, rw) = window.strides, window.reach
    return _Area(
        rows,
        columns,
        rows[0] * sh - window.before[0],
        columns[0] * sw - window.before[1],
        (rows[1] - rows[0] - 1) * sh + rh,
        (columns[1] - columns[0] - 1) * sw + rw,
    )


def rounds(work: Work, words: int, limit: int, outputs: int) -> list[Round] | None:
    """How blocks of outputs share loads, where one of a block of inputs takes `words`.

    A load takes at most `limit` words; the sums of `outputs` words of each block of outputs have
    to wait where the inputs come in turns. None where not even one block of inputs fits.
    """
    most = limit // (words * work.sources)
    if not most:
        return None
    found: list[Round] = []
    output = 0
    while output < work.outputs:
        start, stop = work.reads(output)
        last = output + 1
        if stop - start <= most:
            while last < work.outputs and work.reads(last)[1] - start <= most:
                stop = work.reads(last)[1]
                last += 1
            loads: tuple[tuple[int, int], ...] = ((start, stop),)
        else:
            together = max(1, work.overlay.accumulator_words // outputs)
            while (
                last < work.outputs
                and last - output < together
                and work.reads(last) == (start, stop)
            ):
                last += 1
            parts = ceil((stop - start) / most)
            size = stop - start
            loads = tuple(
                (start + part * size // parts, start + (part + 1) * size // parts)
                for part in range(parts)
            )
        found.append(Round((output, last), loads))
        output = last
    return found


def cuts(work: Work) -> tuple[Cut, list[Round]]:
    """How a layer is cut: by an estimate of cycles, the first of equals.

    Raises
    ------
    UnsupportedOperation
        It does not fit; the message has its name and the reason.
    """
    _check_halo(work)
    best: tuple[float, Cut, list[Round]] | None = None
    for cut in _cuts(work):
        whole = _area(work, (0, cut.rows), (0, cut.columns))
        found = rounds(work, whole.words, cut.words, whole.outputs)
        if found is None:
            continue
        cycles = _estimate(work, cut, whole, found)
        if best is None or cycles < best[0]:
            best = (cycles, cut, found)
    if best is None:
        raise _refused(work, "not even a window of one block of channels fits into its buffer")
    return best[1], best[2]


def _refused(work: Work, why: str) -> UnsupportedOperation:
    return UnsupportedOperation(f"'{work.layer.name}' on an overlay of {work.overlay.name}: {why}")


def _check_halo(work: Work) -> None:
    area = _area(work, (0, work.made.height), (0, work.made.width))
    beats = work.overlay.input_beats
    halo = {
        "top": -area.top,
        "bottom": area.top + area.height - work.image.height,
        "left": -area.left * beats,
        "right": (area.left + area.width - work.image.width) * beats,
    }
    for name, size in halo.items():
        if size > _LOAD[name]:
            raise _refused(work, f"a halo of {size} at its {name}; {_LOAD[name]} would do")


def _cuts(work: Work) -> Iterator[Cut]:
    made, overlay = work.made, work.overlay
    drop, step = work.streamed
    for columns in _sizes(made.width):
        if columns > overlay.accumulator_words or (columns - 1) * step + drop + 1 > _MOST_POSITIONS:
            continue
        for rows in _sizes(made.height):
            if rows * columns > overlay.accumulator_words:
                continue
            for words in (overlay.input_words // 2, overlay.input_words):
                yield Cut(rows, columns, words)
        # Narrower rectangles only where these do not fit.
        whole = _area(work, (0, 1), (0, columns))
        if rounds(work, whole.words, overlay.input_words // 2, columns):
            return


def _estimate(work: Work, cut: Cut, whole: _Area, found: Sequence[Round]) -> float:
    """Cycles, roughly: the longest of computing, loading and storing, and what comes first."""
    overlay = work.overlay
    drop, step = work.streamed
    tall, wide = ceil(work.made.height / cut.rows), ceil(work.made.width / cut.columns)
    heights = [cut.rows] * (tall - 1) + [work.made.height - (tall - 1) * cut.rows]
    widths = [cut.columns] * (wide - 1) + [work.made.width - (wide - 1) * cut.columns]
    streams = sum(
        max(h * ((w - 1) * step + drop + 1), overlay.rows) for h in heights for w in widths
    )
    tiles = sum(
        sum(piece.tiles for blocks in one.loads for piece in work.pieces(blocks))
        if work.reads(one.outputs[0]) == work.reads(one.outputs[1] - 1)
        else sum(
            sum(piece.tiles for piece in work.pieces(work.reads(output)))
            for output in range(*one.outputs)
        )
        / (one.outputs[1] - one.outputs[0])
        for one in found
        for _ in range(*one.outputs)
    )
    compute = streams * tiles
    areas = tall * wide
    read = sum(b - a for one in found for a, b in one.loads) * whole.words * work.sources
    weights = tiles * overlay.rows * overlay.column_beats
    if tiles * overlay.rows > overlay.weight_words // 2:
        weights *= areas
    loads = areas * read * overlay.input_beats + weights
    stores = work.made.positions * work.outputs * overlay.column_beats
    start, stop = found[0].loads[0]
    first = (stop - start) * whole.words * work.sources * overlay.input_beats
    turns = areas * sum(len(one.loads) for one in found)
    if turns == 1 or cut.words * 2 <= overlay.input_words:
        return max(compute, loads, stores) + first
    return max(compute + loads, stores)


class _Writer:
    """Writes the layers of a network one after the other."""

    def __init__(self, network: Network, overlay: Overlay) -> None:
        self._network = network
        self._overlay = overlay
        self._stream = Stream()
        self._input = Space(overlay.input_words)
        self._weights = Space(overlay.weight_words)
        self._parameters = Space(overlay.parameter_words)
        self._output = Space(overlay.output_words)
        self._constants: list[np.ndarray] = []
        self._constant_nbytes = 0
        # Bytes of constants are not known before the end: images start from 0 behind them.
        self._image_nbytes = 0
        self._places: dict[str, Place] = {}
        # Of each image, who stored a row last.
        self._stored: dict[str, list[Entry | None]] = {}

    def check(self) -> None:
        layers, folds = self._folded()
        images = {**self._network.images, **{name: image for name, (_, image) in folds.items()}}
        for layer in layers:
            cuts(self._work(layer, images))

    def program(self) -> Program:
        network = self._network
        layers, folds = self._folded()
        images = {**network.images, **{name: image for name, (_, image) in folds.items()}}
        names = [network.stored[tensor.name] for tensor in network.inputs]
        for name in names:
            self._place(name, images[name], folds[name][0] if name in folds else None)
        spans = []
        for layer in layers:
            start = len(self._stream)
            made = images[layer.result]
            if layer.result not in self._places:
                self._place(layer.result, made)
            _Layer(self, self._work(layer, images)).write()
            spans.append(Span(layer.name, start, len(self._stream), macs(layer, made)))
        base = _aligned(self._constant_nbytes)
        constants = np.zeros(base, np.uint8)
        if self._constants:
            whole = np.concatenate(self._constants)
            constants[: len(whole)] = whole
        return Program(
            self._overlay,
            network,
            tuple(_moved(one, base) for one in self._stream.instructions()),
            constants,
            base + self._image_nbytes,
            {
                name: replace(place, start=place.start + base)
                for name, place in self._places.items()
            },
            tuple(spans),
        )

    def _work(self, layer: Layer, images: Mapping[str, Image]) -> Work:
        start, made = share(layer, images[layer.result])
        found = work(self._overlay, layer, images[layer.sources[0]], made)
        if start % self._overlay.rows:
            raise _refused(found, f"what it joins begins at channel {start}, within a block")
        return found

    def _place(self, name: str, image: Image, fold: Fold | None = None) -> None:
        rows = self._overlay.rows
        place = Place(self._image_nbytes, rows, image, fold)
        self._places[name] = place
        self._stored[name] = [None] * image.height
        self._image_nbytes = _aligned(self._image_nbytes + place.nbytes)

    def _folded(self) -> tuple[list[Layer], dict[str, tuple[Fold, Image]]]:
        """The layers, where inputs of few channels get the columns of a window as channels."""
        network, layers = self._network, []
        folds: dict[str, tuple[Fold, Image]] = {}
        inputs = {network.stored[tensor.name] for tensor in network.inputs}
        outputs = {network.stored[tensor.name] for tensor in network.outputs}
        for layer in network.layers:
            readers = [one for one in network.layers if layer.sources[0] in one.sources]
            if (
                isinstance(layer, Convolution)
                and layer.source in inputs - outputs
                and len(readers) == 1
                and layer.groups == 1
            ):
                made = network.images[layer.result]
                folded = self._fold(layer, network.images[layer.source], made)
                if folded:
                    layer, fold, image = folded
                    folds[layer.source] = (fold, image)
            layers.append(layer)
        return layers, folds

    def _fold(
        self, layer: Convolution, image: Image, made: Image
    ) -> tuple[Convolution, Fold, Image] | None:
        rows, columns = self._overlay.rows, layer.window.kernel[1]
        plain, window = ceil(image.channels / rows) * columns, layer.window
        folded = ceil(image.channels * columns / rows)
        # The host makes a larger image, so only where it saves much.
        if 2 * folded > plain:
            return None
        fold = Fold(
            columns, window.strides[1], window.dilations[1], window.before[1], made.width,
            window.fill,
        )  # fmt: skip
        outputs, _, height, _ = layer.weights.shape
        weights = layer.weights.transpose(0, 1, 3, 2).reshape(outputs, -1, height, 1)
        narrow = replace(
            window,
            kernel=(height, 1),
            strides=(window.strides[0], 1),
            dilations=(window.dilations[0], 1),
            before=(window.before[0], 0),
        )
        wide = Image(image.channels * columns, image.height, made.width)
        return replace(layer, window=narrow, weights=weights), fold, wide

    def constant(self, array: np.ndarray) -> int:
        """The byte at which an array of constants starts."""
        data = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
        start = self._constant_nbytes
        padded = np.zeros(_aligned(len(data)), np.uint8)
        padded[: len(data)] = data
        self._constants.append(padded)
        self._constant_nbytes += len(padded)
        return start


class _Layer:
    """Writes one layer."""

    def __init__(self, writer: _Writer, work: Work) -> None:
        self._writer = writer
        self._work = work
        self._overlay = writer._overlay
        self._stream = writer._stream
        self._cut, self._rounds = cuts(work)
        # Where the weights of blocks of outputs are in memory, and constants in their buffers.
        self._packed: dict[tuple[int, tuple[int, int]], list[tuple[Piece, int]]] = {}
        self._kept: dict[int, int] = {}
        self._channels = self._pack_parameters()

    # Constants.

    def _pack_parameters(self) -> int:
        words = [parameters(*self._work.parameters(o)) for o in range(self._work.outputs)]
        return self._writer.constant(np.concatenate(words))

    def _weights_of(self, output: int, blocks: tuple[int, int]) -> list[tuple[Piece, int]]:
        """The pieces over blocks of inputs, and where the tiles of each are in memory."""
        key = (self._work.weights(output), blocks)
        if key not in self._packed:
            self._packed[key] = [
                (piece, self._writer.constant(self._work.tiles(output, piece)))
                for piece in self._work.pieces(blocks)
            ]
        return self._packed[key]

    # Instructions.

    def write(self) -> None:
        made = self._work.made
        for row in range(0, made.height, self._cut.rows):
            rows = (row, min(row + self._cut.rows, made.height))
            for column in range(0, made.width, self._cut.columns):
                columns = (column, min(column + self._cut.columns, made.width))
                area = _area(self._work, rows, columns)
                for one in self._rounds:
                    self._round(area, one)

    def _round(self, area: _Area, one: Round) -> None:
        for turn, blocks in enumerate(one.loads):
            start: int | None = None
            for output in range(*one.outputs):
                needed = blocks if len(one.loads) > 1 else self._work.reads(output)
                pieces = self._weights_of(output, needed)
                for index, (piece, dram) in enumerate(pieces):
                    weights = self._load_weights(piece, dram)
                    parameter = self._load_parameters(output)
                    if start is None:
                        start = self._load_input(area, blocks)
                    first = turn == 0 and index == 0
                    last = turn == len(one.loads) - 1 and index == len(pieces) - 1
                    place = (output - one.outputs[0]) * area.outputs if len(one.loads) > 1 else 0
                    self._convolve(
                        area, output, piece, start, blocks, weights, parameter, place, first, last
                    )

    def _load_weights(self, piece: Piece, dram: int) -> int:
        overlay, words = self._overlay, piece.tiles * self._overlay.rows
        beats = words * overlay.column_beats
        load = Load(dram=dram, start=0, beats=beats, buffer=Buffer.WEIGHTS)
        return self._loaded(load, words, self._writer._weights, overlay.column_beats)

    def _loaded(self, load: Load, words: int, space: Space, beats: int) -> int:
        """The word where the constants of `load` are: still there, or loaded now.

        A word of the buffer has so many `beats`.
        """
        start = self._kept.get(load.dram, -1)
        if start >= 0:
            found = [entry.instruction for entry in space.writers(start, start + words)]
            if found == [replace(load, start=start * beats)]:
                return start
        start = space.take(words)
        load = replace(load, start=start * beats)
        entry = self._stream.add(load, space.users(start, start + words))
        space.write(start, start + words, entry)
        self._kept[load.dram] = start
        return start

    def _load_parameters(self, output: int) -> int:
        """The word of the parameters of a block of outputs; many come at once."""
        overlay, space = self._overlay, self._writer._parameters
        together = overlay.parameter_words // 2
        first = output // together * together
        words = min(first + together, self._work.outputs) - first
        load = Load(
            dram=self._channels + first * overlay.columns * BEAT,
            start=0,
            beats=words * overlay.columns,
            buffer=Buffer.PARAMETERS,
        )
        return self._loaded(load, words, space, overlay.columns) + output - first

    def _load_input(self, area: _Area, blocks: tuple[int, int]) -> int:
        """Loads blocks of channels of a rectangle, of each source one behind the other."""
        overlay, work, writer = self._overlay, self._work, self._writer
        image = work.image
        count = blocks[1] - blocks[0]
        start = writer._input.take(count * area.words * work.sources)
        row = (max(area.top, 0), min(area.top + area.height, image.height))
        column = (max(area.left, 0), min(area.left + area.width, image.width))
        halo = {
            "top": row[0] - area.top,
            "bottom": area.top + area.height - row[1],
            "left": (column[0] - area.left) * overlay.input_beats,
            "right": (area.left + area.width - column[1]) * overlay.input_beats,
        }
        plane = image.positions * overlay.rows
        line = image.width * overlay.rows
        for index, source in enumerate(work.layer.sources):
            origin = writer._places[source].start
            load = Load(
                dram=origin + blocks[0] * plane + row[0] * line + column[0] * overlay.rows,
                start=(start + index * count * area.words) * overlay.input_beats,
                beats=(column[1] - column[0]) * overlay.input_beats,
                rows=row[1] - row[0],
                planes=count,
                row_stride=line,
                plane_stride=plane,
                fill=work.window.fill,
                **halo,
            )
            words = (start + index * count * area.words, start + (index + 1) * count * area.words)
            stored = [e for e in writer._stored[source][row[0] : row[1]] if e is not None]
            entry = self._stream.add(_whole(load), [*writer._input.users(*words), *stored])
            writer._input.write(*words, entry)
        return start

    def _convolve(
        self,
        area: _Area,
        output: int,
        piece: Piece,
        start: int,
        blocks: tuple[int, int],
        weights: int,
        parameter: int,
        accumulator: int,
        first: bool,
        last: bool,
    ) -> None:
        overlay, work, writer = self._overlay, self._work, self._writer
        window = work.window
        count = blocks[1] - blocks[0]
        step_words = count * area.words if work.sources > 1 else area.words
        loops = work.loops(piece, step_words, area.width)
        inner = loops["inner_stride"]
        begin = start + (piece.blocks[0] - blocks[0]) * area.words
        if work.sources == 1:
            begin += piece.rows[0] * loops["middle_stride"] + piece.columns[0] * inner
        drop, step = work.streamed
        wide = area.columns[1] - area.columns[0]
        strided = 1 if work.depthwise else window.strides[1]
        place = writer._output.take(area.outputs) if last else 0
        conv = Conv(
            input=begin,
            positions=(wide - 1) * step + drop + 1,
            position_stride=strided,
            lines=area.rows[1] - area.rows[0],
            line_stride=window.strides[0] * area.width,
            **loops,
            weights=weights,
            parameter=parameter,
            accumulator=accumulator,
            output=place,
            drop=drop,
            step=step,
            lane=work.lane(output) if work.depthwise else 0,
            zero=work.rescale.zero,
            low=work.rescale.low,
            high=work.rescale.high,
            first=first,
            last=last,
            depthwise=work.depthwise,
            widen=work.widen,
            maximum=work.maximum,
        )
        after = [
            *writer._input.writers(start, start + count * area.words * work.sources),
            *writer._weights.writers(weights, weights + piece.tiles * overlay.rows),
            *writer._parameters.writers(parameter, parameter + 1),
        ]
        if last:
            after += writer._output.users(place, place + area.outputs)
        entry = self._stream.add(conv, after)
        writer._input.read(start, start + count * area.words * work.sources, entry)
        writer._weights.read(weights, weights + piece.tiles * overlay.rows, entry)
        writer._parameters.read(parameter, parameter + 1, entry)
        if last:
            writer._output.write(place, place + area.outputs, entry)
            self._store(area, output, place)

    def _store(self, area: _Area, output: int, place: int) -> None:
        overlay, work, writer = self._overlay, self._work, self._writer
        made = work.made
        start, _ = share(work.layer, made)
        block = (start + output * overlay.columns) // overlay.rows
        line = made.width * overlay.rows
        wide = area.columns[1] - area.columns[0]
        dram = writer._places[work.layer.result].start + block * made.positions * overlay.rows
        dram += area.rows[0] * line + area.columns[0] * overlay.rows
        dram += output * overlay.columns % overlay.rows
        store = Store(
            dram=dram,
            start=place * overlay.column_beats,
            beats=wide * overlay.column_beats,
            rows=area.rows[1] - area.rows[0],
            row_stride=line,
            step=BEAT if overlay.columns == overlay.rows else overlay.rows,
        )
        if wide == made.width:
            store = replace(store, beats=store.beats * store.rows, rows=1, row_stride=0)
        entry = self._stream.add(store, writer._output.writers(place, place + area.outputs))
        writer._output.read(place, place + area.outputs, entry)
        for row in range(*area.rows):
            writer._stored[work.layer.result][row] = entry


def _whole(load: Load) -> Load:
    """`load` with rows, and planes, that lie one behind the other as one."""
    nbytes = load.beats * BEAT
    plain = not (load.left or load.right or load.top or load.bottom)
    if plain and load.row_stride == nbytes and load.beats * load.rows <= _LOAD["beats"]:
        load = replace(load, beats=load.beats * load.rows, rows=1, row_stride=0)
        nbytes = load.beats * BEAT
        if load.plane_stride == nbytes and load.beats * load.planes <= _LOAD["beats"]:
            load = replace(load, beats=load.beats * load.planes, planes=1)
    return load if load.planes > 1 else replace(load, plane_stride=0)


def _moved(instruction: Instruction, base: int) -> Instruction:
    """`instruction` where images start at `base`."""
    if isinstance(instruction, Store):
        return replace(instruction, dram=instruction.dram + base)
    if isinstance(instruction, Load) and instruction.buffer == Buffer.INPUT:
        return replace(instruction, dram=instruction.dram + base)
    return instruction


def _sizes(size: int) -> list[int]:
    """Sizes of parts that are as equal as they can be, the largest first."""
    return sorted({ceil(size / parts) for parts in range(1, size + 1)}, reverse=True)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
