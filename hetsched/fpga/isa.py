"""The overlay's sizes and instructions: what the RTL, the simulators and the compiler agree on.

Three units run side by side, each with a queue of instructions: LOAD copies from DRAM to the
buffers, CONV computes, STORE copies results to DRAM. A unit takes its instructions in order. They
wait for each other through tokens: an instruction takes one token of each unit that it waits for
before it starts, and gives one to each unit that it signals when its last word is written.

Buffers. `input` holds words of `rows` int8 (channels of one position), `weights` words of
`columns` int8 (one row of a tile), `parameters` a word of 8 bytes for each output channel,
`accumulators` words of `columns` int32, `output` words of `columns` int8. DMA counts in beats of
8 bytes: word w of a buffer of words of n bytes is the beats w * n / 8 and on.

Memory layout of activations: [channels / rows][height][width][rows], so an input word is `rows`
bytes in a row, and a plane of words is one row after the other. The address generator reads at any
stride, so another layout works where its loads are rectangles.

Numeric meaning of one CONV at an output position, for each column c:

1. For each tile (outer, middle, inner loop in that order), `sum` = sum over r of input word [r] *
   tile [r][c]. The accumulator becomes `sum + bias[c]` at the first tile if `first`, else
   `accumulator + sum`, in int32 that wraps. With `widen`, what is accumulated (the bias too) is
   multiplied by 128 before the first tile of each pass of the middle loop but the first. With
   `maximum`, max(accumulator, sum) replaces the addition but at the first tile of a `first`; both
   must lie in -256..255.
2. At the last tile, if `last`, the accumulator a is requantised and goes to `output`:
   `requantise(a, multiplier[c], shift[c], zero, low, high)`; it does not go to `accumulators`.
   Otherwise it goes to `accumulators`.

With `depthwise`, column c gets its own channel in place of the word: row r has channel
`lane * columns + c` of the position streamed r positions ago. So a row of a kernel of width k is
one tile whose row k - 1 - j holds the weights of tap j, and a row of n outputs streams
`(n - 1) * step + k` positions with `drop` = k - 1.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np

from hetsched.errors import DeviceError

BEAT = 8
"""Bytes that the memory port moves in a cycle."""

WORDS = 4
"""Words of 64 bits of an instruction."""


@dataclass(frozen=True)
class Overlay:
    """The sizes of a core: `rows` input channels times `columns` output channels in a cycle.

    Buffers are counted in their words; each must be a power of two. `queue` is how many
    instructions of a unit can stand in its queue: a stream in which an instruction stands behind
    more than that many of a unit that waits for it never ends. `outstanding` is how many reads
    may be under way: above the memory's latency, nothing waits.
    """

    rows: int = 8
    columns: int = 8
    input_words: int = 8192
    weight_words: int = 4096
    parameter_words: int = 512
    accumulator_words: int = 1024
    output_words: int = 4096
    queue: int = 16
    outstanding: int = 32

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value < 8 or value & (value - 1):
                raise DeviceError(
                    f"overlay's {field.name} is {value}; a power of two of at least 8 would do"
                )
        if self.rows < self.columns:
            raise DeviceError(
                f"overlay of {self.rows} rows and {self.columns} columns: a block of outputs is "
                "no part of a block of inputs; at least as many rows as columns would do"
            )

    @classmethod
    def parse(cls, size: str) -> "Overlay":
        """The overlay of `ROWSxCOLUMNS`, with 64 KiB of inputs and 32 KiB of weights and outputs.

        Examples
        --------
        >>> Overlay.parse("16x8").input_words
        4096
        """
        rows, cross, columns = size.partition("x")
        if not cross or not rows.isdecimal() or not columns.isdecimal():
            raise DeviceError(f"'{size}' is no size of an overlay; '8x8' would do")
        r, c = int(rows), int(columns)
        if not 8 <= r <= 64 or not 8 <= c <= 64:
            raise DeviceError(f"an overlay of {size} cannot be built; sizes go from 8 to 64")
        return cls(r, c, input_words=65536 // r, weight_words=32768 // c, output_words=32768 // c)

    @property
    def name(self) -> str:
        return f"{self.rows}x{self.columns}"

    @property
    def macs(self) -> int:
        """Multiplications in a cycle."""
        return self.rows * self.columns

    @property
    def input_beats(self) -> int:
        """Beats of a word of `input`."""
        return self.rows // BEAT

    @property
    def column_beats(self) -> int:
        """Beats of a word of `weights` or `output`."""
        return self.columns // BEAT


class Unit:
    """Bits of `wait` and `signal`: the units that give or get a token."""

    LOAD = 1
    CONV = 2
    STORE = 4


class Buffer:
    """Where a LOAD writes."""

    INPUT = 0
    WEIGHTS = 1
    PARAMETERS = 2


@dataclass(frozen=True)
class Load:
    """Copies `planes` x `rows` rows of `beats` beats from DRAM, with a halo, to a buffer.

    Byte address of row r of plane p: `dram + p * plane_stride + r * row_stride`, a multiple of 8.
    The buffer is filled one beat after the other from beat `start`. Around the rows of each plane
    stand `top` and `bottom` rows, and around each row `left` and `right` beats, of bytes `fill`.
    Strides are taken modulo 2**32. At least one beat, row and plane.
    """

    dram: int
    start: int
    beats: int
    rows: int = 1
    planes: int = 1
    row_stride: int = 0
    plane_stride: int = 0
    left: int = 0
    right: int = 0
    top: int = 0
    bottom: int = 0
    fill: int = 0
    buffer: int = Buffer.INPUT
    wait: int = 0
    signal: int = 0

    code: ClassVar[int] = 1
    unit: ClassVar[int] = Unit.LOAD


@dataclass(frozen=True)
class Conv:
    """Up to `outer * middle * inner` weight tiles over `lines` x `positions` input words.

    Tile (o, m, i) reads the input word `input + o * outer_stride + m * middle_stride +
    i * inner_stride + l * line_stride + p * position_stride` at position p of line l, modulo the
    buffer. Of each line the first `drop` positions make no output, then each `step`-th does; the
    outputs are counted from 0 in that order, and output n is word `accumulator + n` of
    `accumulators` and `output + n` of `output`. Tiles lie one after the other from word `weights`,
    `rows` words each. `parameter` is the word of `columns` channels.

    The outputs of a CONV are at least 1, its tiles at least 1.
    """

    input: int
    positions: int
    position_stride: int = 1
    lines: int = 1
    line_stride: int = 0
    inner: int = 1
    inner_stride: int = 0
    middle: int = 1
    middle_stride: int = 0
    outer: int = 1
    outer_stride: int = 0
    weights: int = 0
    parameter: int = 0
    accumulator: int = 0
    output: int = 0
    drop: int = 0
    step: int = 1
    lane: int = 0
    zero: int = 0
    low: int = -128
    high: int = 127
    first: bool = True
    last: bool = True
    depthwise: bool = False
    widen: bool = False
    maximum: bool = False
    wait: int = 0
    signal: int = 0

    code: ClassVar[int] = 2
    unit: ClassVar[int] = Unit.CONV


@dataclass(frozen=True)
class Store:
    """Copies `rows` rows of `beats` beats of `output`, from beat `start` on, to DRAM.

    Byte address of beat b of row r: `dram + r * row_stride + b * step`, a multiple of 8. `step`
    is 8 where a block of outputs is a block of inputs; an overlay of more rows than columns fills
    a block of inputs by several stores at a step of `rows` bytes (where `columns` is 8).
    """

    dram: int
    start: int
    beats: int
    rows: int = 1
    row_stride: int = 0
    step: int = BEAT
    wait: int = 0
    signal: int = 0

    code: ClassVar[int] = 3
    unit: ClassVar[int] = Unit.STORE


@dataclass(frozen=True)
class Sync:
    """No later instruction starts before all earlier ones are done, and all tokens are dropped.

    A launch that does not know what tokens the one before has left begins with it.
    """

    code: ClassVar[int] = 4
    unit: ClassVar[int] = 0


Instruction = Load | Conv | Store | Sync
KINDS: tuple[type[Load] | type[Conv] | type[Store] | type[Sync], ...] = (Load, Conv, Store, Sync)

HEAD = (("code", 3), ("wait", 3), ("signal", 3))

LAYOUTS: Mapping[type, tuple[tuple[str, int], ...]] = {
    Load: (
        *HEAD,
        ("dram", 32),
        ("start", 16),
        ("beats", 16),
        ("rows", 12),
        ("planes", 12),
        ("row_stride", 32),
        ("plane_stride", 32),
        ("left", 8),
        ("right", 8),
        ("top", 4),
        ("bottom", 4),
        ("fill", 8),
        ("buffer", 2),
    ),
    Conv: (
        *HEAD,
        ("first", 1),
        ("last", 1),
        ("depthwise", 1),
        ("widen", 1),
        ("maximum", 1),
        ("input", 14),
        ("position_stride", 14),
        ("line_stride", 14),
        ("positions", 12),
        ("lines", 12),
        ("inner", 6),
        ("inner_stride", 14),
        ("middle", 6),
        ("middle_stride", 14),
        ("outer", 10),
        ("outer_stride", 14),
        ("weights", 13),
        ("parameter", 9),
        ("accumulator", 11),
        ("output", 13),
        ("drop", 5),
        ("step", 3),
        ("lane", 3),
        ("zero", 8),
        ("low", 8),
        ("high", 8),
    ),
    Store: (
        *HEAD,
        ("dram", 32),
        ("start", 16),
        ("beats", 16),
        ("rows", 12),
        ("row_stride", 32),
        ("step", 8),
    ),
    Sync: HEAD,
}
"""Name and bits of the fields of an instruction, from bit 0 on; signed values are taken modulo."""

SIGNED = frozenset("zero low high fill".split())
MODULAR = frozenset(
    "position_stride line_stride inner_stride middle_stride outer_stride row_stride "
    "plane_stride".split()
)
POSITIVE = frozenset("beats rows planes positions lines inner middle outer step".split())


def encode(instructions: Iterable[Instruction]) -> np.ndarray:
    """The instructions as a table of `WORDS` words of 64 bits each, the lowest bits first.

    Raises
    ------
    DeviceError
        A value that its field cannot hold.
    """
    words = [
        [value >> 64 * word & (1 << 64) - 1 for word in range(WORDS)]
        for value in map(_number, instructions)
    ]
    return np.array(words, np.uint64).reshape(-1, WORDS)


def decode(words: np.ndarray) -> Iterator[Instruction]:
    """The instructions that `encode` turned into `words`.

    Raises
    ------
    DeviceError
        Words that are no instruction.
    """
    kinds = {kind.code: kind for kind in KINDS}
    for place, row in enumerate(np.asarray(words, np.uint64).reshape(-1, WORDS).tolist()):
        number = sum(word << 64 * index for index, word in enumerate(row))
        kind = kinds.get(number & 7)
        if kind is None:
            raise DeviceError(f"instruction {place}: {number & 7} is no operation of the overlay")
        values: dict[str, int] = {}
        for name, bits in LAYOUTS[kind]:
            value = number & (1 << bits) - 1
            if name in SIGNED and value >> bits - 1:
                value -= 1 << bits
            values[name] = value
            number >>= bits
        known: dict[str, Any] = {
            field.name: bool(values[field.name]) if field.type is bool else values[field.name]
            for field in fields(kind)
        }
        yield kind(**known)


def _number(instruction: Instruction) -> int:
    number = start = 0
    for name, bits in LAYOUTS[type(instruction)]:
        value = int(getattr(instruction, name, 0))
        low = -1 << bits - 1 if name in SIGNED | MODULAR else int(name in POSITIVE)
        high = (1 << bits - (name in SIGNED)) - 1
        if not low <= value <= high:
            raise DeviceError(
                f"{type(instruction).__name__}'s {name} is {value}; {low} to {high} would do"
            )
        number |= (value & (1 << bits) - 1) << start
        start += bits
    assert start <= 64 * WORDS
    return number


SHIFTS = range(23, 55)
"""Shifts that a requantisation can have."""

MULTIPLIERS = range(1 << 24)

FRACTION = 26
"""Bits behind the point that a requantisation looks at."""


def parameters(bias: np.ndarray, multiplier: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Words of 64 bits of the buffer `parameters`, one for each output channel.

    `bias` is int32, `multiplier` one of `MULTIPLIERS`, `shift` one of `SHIFTS`.
    """
    bias, multiplier, shift = (np.asarray(value, np.int64) for value in (bias, multiplier, shift))
    for name, value, legal in (
        ("bias", bias, range(-1 << 31, 1 << 31)),
        ("multiplier", multiplier, MULTIPLIERS),
        ("shift", shift, SHIFTS),
    ):
        if value.size and not (value.min() >= legal.start and value.max() < legal.stop):
            raise DeviceError(f"a {name} is not in {legal.start} to {legal.stop - 1}")
    words = (bias & 0xFFFFFFFF) | multiplier << 32 | (shift - SHIFTS.start) << 56
    return np.asarray(words, np.uint64)


def requantise(
    accumulator: np.ndarray,
    multiplier: np.ndarray,
    shift: np.ndarray,
    zero: int = 0,
    low: int = -128,
    high: int = 127,
) -> np.ndarray:
    """`clip(round(accumulator * multiplier / 2**shift) + zero)` to low..high, as int8.

    Rounded as if the product were a float32 before: to the nearest integer, but to an even one
    where the product is as near to a half as float32 cannot tell from it. So the result is that of
    `rint(float32(accumulator) * float32(multiplier / 2**shift))`, wherever the accumulator has no
    more than 24 bits and the multiplier all of its own.

    The product is cut off behind `FRACTION` bits, rounded down. It is near to a half if its
    distance `d` from it, counted in the last of these bits, is below `2**(n + 1)`, where the whole
    part has n bits (those of its complement, of a negative one): half a step of float32. Without
    any, that step is one where the product is below a half in magnitude, and two above.
    """
    product = accumulator.astype(np.int64) * np.asarray(multiplier, np.int64)
    spare = FRACTION - SHIFTS.start
    fixed = (product << spare) >> (np.asarray(shift, np.int64) - SHIFTS.start)
    whole, fraction = fixed >> FRACTION, fixed & (1 << FRACTION) - 1
    half = 1 << FRACTION - 1
    above, negative = fraction >= half, fixed < 0
    distance = np.where(above, fraction - half, half - 1 - fraction)
    # What is beyond 8 bits is clipped in any case.
    magnitude = np.minimum(np.where(negative, ~whole, whole), 255)
    bits = np.frexp(magnitude.astype(np.float64))[1]
    steps = np.where(bits > 0, 2 << bits, np.where(above == negative, 1, 2))
    rounded = whole + np.where(distance < steps, whole & 1, above)
    return np.asarray(np.clip(rounded + zero, low, high), np.int8)
