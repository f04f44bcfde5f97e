"""How long kernels take by a count of a core's cycles, and so which ways are worth trying.

What is here needs no compiler: a cost model asks it as well as the schedules do.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hetsched.schedules.rules import Rules
from hetsched.schedules.vectors import Tile, Vectors, step_cycles

# Of a kernel, that are worth to be measured.
CANDIDATES = 4
# By how much tiles are slower that compute columns which are cropped, besides computing them.
CROPPING = 1.05
# Pixels of a tile that reads far apart, of a 1x1 convolution or a plain tensor, if it has several
# blocks of channels; and pixels that have an address each, as no tile divides them.
MOST_PIXELS = 8
# Output blocks of a 1x1 convolution's tile: it reads its input once for each.
WIDE = 3
# The m that an option of the rules allows.
ALLOWED = {"off": (), "f2": (2,), "f4": (4,), "auto": (4, 2)}
# Forms of each m that are worth to be measured.
FORMS = 2
# Of a core: cycles for each vector of a transform, the bytes that stay near, of which products are
# a part, and how many it reads in a cycle from there and from afar.
TRANSFORM_CYCLES = 5
NEAR_NBYTES = 1 << 20
GROUP_NBYTES = 1 << 18
NEAR_NBYTES_PER_CYCLE = 64
FAR_NBYTES_PER_CYCLE = 10
# Chunks that are enough to be shared by threads; with fewer, channels are.
MANY = 4
FLOAT_NBYTES = 4


@dataclass(frozen=True)
class Window:
    """Where a kernel reads. `padding` is top, left, bottom, right; bottom and right may exceed."""

    kernel: tuple[int, int]
    strides: tuple[int, int]
    dilations: tuple[int, int]
    padding: tuple[int, int, int, int]
    source: tuple[int, int]
    result: tuple[int, int]

    @property
    def is_pointwise(self) -> bool:
        return self.kernel == self.strides == (1, 1) and self.source == self.result

    @property
    def turned(self) -> "Window":
        """The window with rows and columns exchanged."""
        top, left, bottom, right = self.padding
        sides = (self.kernel, self.strides, self.dilations, self.source, self.result)
        kernel, strides, dilations, source, result = ((b, a) for a, b in sides)
        return Window(kernel, strides, dilations, (left, top, right, bottom), source, result)

    @property
    def text(self) -> str:
        """The window as part of a workload."""
        sides = (self.kernel, self.strides, self.dilations, self.padding, self.source)
        return " ".join("x".join(map(str, side)) for side in sides)

    def place(self, row: Any, column: Any, kh: Any, kw: Any) -> tuple[Any, Any]:
        """The row and column of the padded tensor that one of the result reads."""
        return (
            row * self.strides[0] + kh * self.dilations[0],
            column * self.strides[1] + kw * self.dilations[1],
        )

    def reach(self, columns: int) -> tuple[int, int]:
        """The height and width that are read for `columns` columns of the result."""

        def size(axis: int, count: int) -> int:
            reach = (count - 1) * self.strides[axis] + 1
            reach += (self.kernel[axis] - 1) * self.dilations[axis]
            return max(reach, self.source[axis] + self.padding[axis])

        return size(0, self.result[0]), size(1, columns)


def phase_window(window: Window) -> Window:
    """The convolution that computes all phases of a transposed one."""
    kernel = tuple(
        -(-size // stride) for size, stride in zip(window.kernel, window.strides, strict=True)
    )
    rows, columns = (-(-window.result[axis] // window.strides[axis]) for axis in (0, 1))
    return Window(
        kernel=(kernel[0], kernel[1]),
        strides=(1, 1),
        dilations=(1, 1),
        padding=(kernel[0] - 1, kernel[1] - 1, kernel[0] - 1, kernel[1] - 1),
        source=window.source,
        result=(rows, columns),
    )


def tiles(
    window: Window, vectors: Vectors, blocks: int = 1, *, streamed: bool = False
) -> list[Tile]:
    """Candidates: pixels of a row by blocks of channels, whose weights may be `streamed`."""
    return vectors.tiles(
        window.result[1], blocks, exact=True, streamed=streamed, cropping=CROPPING
    )[:CANDIDATES]


def dense_tiles(
    window: Window, blocks: int, vectors: Vectors, *, plain: bool, shifted: bool = False
) -> list[Tile]:
    """Candidates: pixels by some of `blocks` of output channels, those that read the same."""
    if plain:
        found = vectors.tiles(
            window.result[1], blocks, exact=True, wide=WIDE, streamed=True, cropping=CROPPING
        )
    elif window.is_pointwise and not shifted:
        pixels = window.result[0] * window.result[1]
        found = vectors.tiles(
            pixels, blocks, exact=True, wide=WIDE, streamed=True, cropping=CROPPING
        )
        found = [
            tile
            for tile in found
            if tile.broadcasts <= MOST_PIXELS or pixels % tile.broadcasts == 0
        ]
    else:
        return tiles(window, vectors, blocks, streamed=True)
    short = [tile for tile in found if tile.broadcasts <= MOST_PIXELS or tile.vectors == 1]
    return short[:CANDIDATES]


@dataclass(frozen=True)
class Form:
    """F(m x m, 3 x 3) by chunks of `rows` rows of tiles.

    `tile` is that of the products in registers: pixels by blocks of output channels. Products of
    `group` blocks are made before they are transformed back.
    """

    m: int
    rows: int
    tile: Tile
    group: int

    def __str__(self) -> str:
        return f"f{self.m} {self.rows} rows {self.tile} of {self.group}"


def convolutions(
    shape: tuple[int, int, int], window: Window, tiles: Sequence[Tile], rules: Rules
) -> list[Any]:
    """Ways to compute a dense convolution, the fastest by this count first.

    `shape` is the batch and the blocks of input and of output channels; `tiles` are those of the
    convolution itself, best first.
    """
    square = (window.kernel, window.strides, window.dilations) == ((3, 3), (1, 1), (1, 1))
    sizes = ALLOWED[rules.winograd] if square else ()
    best = [
        form
        for m in sizes
        for form in sorted(
            _forms(m, shape, window, rules),
            key=lambda form: form_cycles(form, shape, window, rules),
        )[:FORMS]
    ]
    if rules.winograd == "f4" and best:
        return [*best, *tiles]

    def cycles(candidate: Form | Tile) -> float:
        if isinstance(candidate, Form):
            return form_cycles(candidate, shape, window, rules)
        return direct_cycles(candidate, shape, window, rules)

    return sorted((*best, *tiles), key=cycles) if best else list(tiles)


def direct_cycles(tile: Tile, shape: tuple[int, int, int], window: Window, rules: Rules) -> float:
    """Cycles of a core for a convolution by 3 x 3 whose tiles are of pixels of a row."""
    (batch, inputs, outputs), lanes = shape, rules.vectors.lanes
    steps = window.result[0] * tile.covering(window.result[1]) * inputs * lanes * 9
    steps = batch * steps * outputs // (tile.broadcasts * tile.vectors)
    nbytes = 9 * inputs * outputs * lanes**2 * FLOAT_NBYTES
    return steps * step_cycles(tile.broadcasts, tile.vectors) + nbytes / FAR_NBYTES_PER_CYCLE


def form_cycles(form: Form, shape: tuple[int, int, int], window: Window, rules: Rules) -> float:
    """Cycles of a core for a convolution in a form, where its share of the work is the largest."""
    (batch, inputs, outputs), lanes = shape, rules.vectors.lanes
    down, across = (-(-size // form.m) for size in window.result)
    places, tiles = (form.m + 2) ** 2, form.rows * across
    chunks = batch * -(-down // form.rows)
    steps = places * form.tile.covering(tiles) * outputs * inputs * lanes
    steps //= form.tile.broadcasts * form.tile.vectors
    transforms = places * tiles * (inputs + outputs) * TRANSFORM_CYCLES
    nbytes = places * inputs * outputs * lanes**2 * FLOAT_NBYTES
    between = places * tiles * (inputs + form.group) * lanes * FLOAT_NBYTES
    if between > NEAR_NBYTES:
        transforms *= 2
    step = step_cycles(form.tile.broadcasts, form.tile.vectors)
    cycles = steps * step + transforms
    # What does not stay near is read again for each chunk.
    again = chunks - 1 if nbytes + between > NEAR_NBYTES else 0
    traffic = nbytes / FAR_NBYTES_PER_CYCLE + again * nbytes / NEAR_NBYTES_PER_CYCLE
    units = chunks if chunks >= MANY else outputs // form.group
    uneven = -(-units // rules.threads) * rules.threads / units
    return chunks * cycles * uneven + traffic


def _forms(m: int, shape: tuple[int, int, int], window: Window, rules: Rules) -> Iterator[Form]:
    batch, _, outputs = shape
    down, across = (-(-size // m) for size in window.result)
    for rows in sorted({-(-down // parts) for parts in range(1, down + 1)}):
        chunks = batch * -(-down // rows)
        shared = 1 if rules.threads == 1 or chunks >= MANY else rules.threads
        for tile in rules.vectors.tiles(rows * across, outputs, exact=True):
            groups = [
                group
                for group in range(tile.vectors, outputs + 1, tile.vectors)
                if outputs % group == 0
                and (group * shared <= outputs or group == tile.vectors)
                and (
                    group == tile.vectors
                    or (m + 2) ** 2 * rows * across * group * rules.vectors.lanes * FLOAT_NBYTES
                    <= GROUP_NBYTES
                )
            ]
            yield Form(m, rows, tile, groups[-1])
