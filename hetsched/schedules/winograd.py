"""Convolutions by 3 x 3 with fewer multiplications, by the minimal filtering of Winograd.

F(m x m, 3 x 3) computes a tile of m x m pixels of the result from one of m + 2 by m + 2 pixels of
the source: both tile and weights are transformed, multiplied place by place, summed over the input
channels, and transformed back. That takes (m + 2)**2 multiplications where the convolution itself
takes 9 m**2: 2.25 times fewer for m = 2, 4 times for m = 4. For each of the (m + 2)**2 places the
sum is a product of matrices, whose tiles stay in registers as those of other families do. Rows of
tiles are computed a chunk at a time, so that what is between the three steps stays in the cache.

The result differs from the exact one by rounding, which grows with m: the transforms of m = 2
only add, those of m = 4 multiply by up to 8. Relative to the largest element of the result, layers
of the sizes that networks have stay below `ERROR` (tests hold random layers to it against
float64). Weights are transformed in float64 and rounded once.

Importing this file loads TVM's compiler.

References
----------
Lavin and Gray, "Fast algorithms for convolutional neural networks", 2016,
https://arxiv.org/abs/1509.09308
Barabasz, Anderson, Soodhalter and Gregg, "Error analysis and improving the accuracy of Winograd
convolution for deep neural networks", ACM TOMS 46(4), 2020, https://doi.org/10.1145/3412380
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
from tvm import ir, te, tirx
from tvm.s_tir import Schedule
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as emit
from tvm_ffi.structural import structural_map

from hetsched.schedules import loops
from hetsched.schedules.cycles import FLOAT_NBYTES, MANY, Form, Window
from hetsched.schedules.rules import Choice
from hetsched.schedules.vectors import Vectors

FAMILY = "winograd"
# The blocks of a convolution.
STEPS = ["padded", "tiles", "product", "convolved"]
LINE_NBYTES = 64
# Weights are read once, from memory or a far cache, and asked for this far ahead.
PREFETCHED_NBYTES = 8192
# The largest error of a layer for each m, of the result's largest element.
ERROR = {2: 2e-6, 4: 2e-5}
# In the weights of a layer: from outputs per tile side to the rows of G.
KERNELS = {
    2: np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]]),
    4: np.array(
        [
            [1 / 4, 0, 0],
            [-1 / 6, -1 / 6, -1 / 6],
            [-1 / 6, 1 / 6, -1 / 6],
            [1 / 24, 1 / 12, 1 / 6],
            [1 / 24, -1 / 12, 1 / 6],
            [0, 0, 1],
        ]
    ),
}


def source_transform(d: Sequence[Any]) -> list[Any]:
    """B^T times the m + 2 values of `d`, of whatever can be added and multiplied."""
    if len(d) == 4:
        return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[3] - d[1]]
    even, odd = d[4] - d[2] * 4.0, d[3] - d[1] * 4.0
    far_even, far_odd = d[4] - d[2], (d[3] - d[1]) * 2.0
    return [
        d[0] * 4.0 - d[2] * 5.0 + d[4],
        even + odd,
        even - odd,
        far_even + far_odd,
        far_even - far_odd,
        d[1] * 4.0 - d[3] * 5.0 + d[5],
    ]


def result_transform(d: Sequence[Any]) -> list[Any]:
    """A^T times the m + 2 values of `d`."""
    if len(d) == 4:
        return [d[0] + d[1] + d[2], d[1] - d[2] + d[3]]
    near, near_odd = d[1] + d[2], d[1] - d[2]
    far, far_odd = d[3] + d[4], d[3] - d[4]
    return [
        d[0] + near + far,
        near_odd + far_odd * 2.0,
        near + far * 4.0,
        near_odd + far_odd * 8.0 + d[5],
    ]


@dataclass(frozen=True)
class _Layer:
    """What a kernel is generated from: kept as the annotation of the main block."""

    m: int
    rows: int
    broadcasts: int
    vectors: int
    group: int
    threads: int
    top: int
    left: int
    height: int
    width: int
    result_height: int
    result_width: int


def transformed(weights: np.ndarray, form: Form, lanes: int) -> np.ndarray:
    """Weights [o, c, 3, 3] at each place, in the order in which the products read them.

    The axes are places, o / (lanes * b), c / lanes, lanes of c, b, lanes of o, for tiles of b
    blocks.
    """
    kernel, blocks = KERNELS[form.m], form.tile.vectors
    outputs, channels = weights.shape[:2]
    filled = ((0, -outputs % lanes), (0, -channels % lanes), (0, 0), (0, 0))
    exact = np.pad(weights, filled).astype(np.float64)
    outputs, channels = exact.shape[:2]
    places = kernel @ exact @ kernel.T
    apart = places.reshape(
        outputs // (lanes * blocks), blocks, lanes, channels // lanes, lanes, len(kernel) ** 2
    )
    return np.ascontiguousarray(apart.transpose(5, 0, 3, 4, 1, 2), np.float32)


def convolution(x: Any, weights: Any, window: Window, choice: Choice[Any], threads: int = 1) -> Any:
    """A convolution of a blocked tensor with transformed weights, step by step."""
    form = choice.candidate
    m, size = form.m, form.m + 2
    batch, inputs, _, lanes = (int(dim) for dim in x.shape)
    blocks = form.tile.vectors
    outputs = int(weights.shape[1]) * blocks
    top, left = window.padding[:2]
    (height, width), (result_height, result_width) = window.source, window.result
    down, across = -(-result_height // m), -(-result_width // m)
    source = np.stack(source_transform(list(np.eye(size))))
    result = np.stack(result_transform(list(np.eye(size))))
    layer = _Layer(
        m, form.rows, form.tile.broadcasts, form.tile.vectors, form.group, threads,
        top, left, height, width, result_height, result_width,
    )  # fmt: skip

    def element(n: Any, c: Any, row: Any, column: Any, u: Any) -> Any:
        inside = tirx.all(row >= top, row < height + top, column >= left, column < width + left)
        value = x[n, c, (row - top) * width + column - left, u]
        return tirx.if_then_else(inside, value, tirx.const(0, "float32"))

    padded = te.compute(
        (batch, inputs, down * m + 2, across * m + 2, lanes), element, name="padded"
    )
    i, j = (te.reduce_axis((0, size), name) for name in "ij")
    tiles = te.compute(
        (batch, size, size, inputs, down, across, lanes),
        lambda n, a, b, c, t, s, u: te.sum(
            padded[n, c, t * m + i, s * m + j, u] * _element(source, a, i) * _element(source, b, j),
            axis=[i, j],
        ),
        name="tiles",
    )
    c, v = te.reduce_axis((0, inputs), "c"), te.reduce_axis((0, lanes), "v")
    product = te.compute(
        (batch, size, size, outputs, down, across, lanes),
        lambda n, a, b, o, t, s, u: te.sum(
            tiles[n, a, b, c, t, s, v] * weights[a * size + b, o // blocks, c, v, o % blocks, u],
            axis=[c, v],
        ),
        name="product",
    )
    a, b = (te.reduce_axis((0, size), name) for name in "ab")

    def back(n: Any, o: Any, p: Any, u: Any) -> Any:
        row, column = p // result_width, p % result_width
        value = product[n, a, b, o, row // m, column // m, u]
        factor = _element(result, row % m, a) * _element(result, column % m, b)
        return te.sum(value * factor, axis=[a, b])

    return te.compute(
        (batch, outputs, result_height * result_width, lanes), back, name="convolved",
        attrs={**choice.attributes, loops.FAMILY: FAMILY, loops.TILE: list(astuple(layer))},
    )  # fmt: skip


def _element(matrix: np.ndarray, row: Any, column: Any) -> Any:
    """An element of a constant matrix."""
    value = tirx.const(0, "float32")
    for (r, c), number in np.ndenumerate(matrix):
        if number:
            here = tirx.const(float(number), "float32")
            value = tirx.Select(tirx.all(row == r, column == c), here, value)
    return value


def schedules(schedule: Any, main: Any) -> bool:
    names = [schedule.get(block).name_hint for block in loops.producers(schedule, main)]
    names.append(schedule.get(main).name_hint)
    return names == STEPS and all(
        loops.is_plain(schedule, block)
        for block in loops.blocks(schedule)
        if schedule.get(block).name_hint not in names
    )


def apply(schedule: Any, main: Any, vectors: Vectors) -> Any:
    """A function of the same parameters, whose loops are written anew."""
    layer = _Layer(*(int(n) for n in schedule.get(main).annotations[loops.TILE]))
    padded, _, product = loops.producers(schedule, main)
    source = schedule.get(padded).reads[0].source
    (weights,) = (
        region.source for region in schedule.get(product).reads if len(region.source.shape) == 6
    )
    last = loops.fused_epilogue(schedule, main)
    convolved = schedule.get(main).writes[0].source
    block = schedule.get(last)
    axes = [axis.var for axis in block.iter_vars]
    store = block.body

    def stored(value: Any, place: Sequence[Any]) -> None:
        """Stores what the epilogue makes of `value` at [n, o, p, u]."""

        def replaced(node: Any) -> Any:
            if isinstance(node, ir.TensorLoad):
                return value if node.source.same_as(convolved) else node
            return next(
                (new for old, new in zip(axes, place, strict=True) if node.same_as(old)), node
            )

        def mapped(expression: Any) -> Any:
            return structural_map(expression, [(ir.TensorLoad, replaced), (tirx.Var, replaced)])

        emit.buffer_store(store.buffer, mapped(store.value), list(map(mapped, store.indices)))

    function = schedule.mod["main"]
    with IRBuilder() as builder, emit.prim_func(s_tir=True):
        emit.func_name("main")
        emit.func_attr(dict(function.attrs))
        for parameter in function.params:
            emit.arg(parameter.name, parameter)
        _Kernel(layer, source, weights, stored).write()
    return Schedule(ir.IRModule({"main": builder.get()}))


class _Kernel:
    """Writes the loops of a layer into the function that is being built.

    `stored` writes a value of the result, with the epilogue, at [n, o, p, u].
    """

    def __init__(
        self, layer: _Layer, source: Any, weights: Any, stored: Callable[[Any, Sequence[Any]], None]
    ) -> None:
        self._layer = layer
        self._source = source
        self._weights = weights
        self._stored = stored
        self._batch, self._inputs, _, self._lanes = (int(dim) for dim in source.shape)
        self._places, panels = (int(dim) for dim in weights.shape[:2])
        self._outputs = panels * layer.vectors
        self._size = layer.m + 2
        self._across = -(-layer.result_width // layer.m)
        self._chunks = -(-layer.result_height // (layer.m * layer.rows))
        self._tiles = layer.rows * self._across

    def write(self) -> None:
        layer = self._layer
        pixels = self._batch * layer.result_height * layer.result_width
        work = pixels * self._inputs * self._outputs * self._lanes**2 * 9
        several = layer.threads > 1 and work >= loops.PARALLEL_PRODUCTS
        outer = several and self._batch * self._chunks >= MANY
        over_chunks = outer and self._chunks >= MANY
        with (
            _loop(self._batch, parallel=outer and not over_chunks) as n,
            _loop(self._chunks, parallel=over_chunks) as chunk,
        ):
            self._chunk(n, chunk, parallel=several and not outer)

    def _chunk(self, n: Any, chunk: Any, *, parallel: bool) -> None:
        layer = self._layer
        tiles = emit.alloc_buffer((self._places, self._inputs, self._tiles, self._lanes))
        with (
            _loop(self._inputs, parallel=parallel) as c,
            _loop(layer.rows) as row,
            _loop(self._across) as column,
        ):
            self._source_tile(tiles, n, c, chunk * layer.rows + row, row, column)
        with _loop(self._outputs // layer.group, parallel=parallel) as group:
            products = emit.alloc_buffer((self._places, layer.group, self._tiles, self._lanes))
            panels = layer.group // layer.vectors
            across = -(-self._tiles // layer.broadcasts)
            with (
                _loop(self._places) as place,
                _loop(panels) as panel,
                _loop(across) as t,
            ):
                start = t * layer.broadcasts
                if self._tiles % layer.broadcasts:
                    # The last overlaps the one before it, and computes the same there.
                    start = tirx.min(start, self._tiles - layer.broadcasts)
                self._product(tiles, products, place, group * panels, panel, start)
            with (
                _loop(layer.group) as o,
                _loop(layer.rows) as row,
                _loop(self._across) as column,
            ):
                self._result_tile(
                    products, n, group * layer.group + o, o, chunk * layer.rows + row, row, column
                )

    def _source_tile(self, tiles: Any, n: Any, c: Any, down: Any, row: Any, column: Any) -> None:
        """Transforms a tile of the source; what is outside of it is zero."""
        layer, size = self._layer, self._size
        half = emit.alloc_buffer((size * size, self._lanes), scope="local")
        with self._vector() as u:
            for j in range(size):
                x = column * layer.m + (j - layer.left)
                across = _inside(x, j - layer.left, self._across, layer.m, layer.width)
                values = []
                for i in range(size):
                    y = down * layer.m + (i - layer.top)
                    rows = self._chunks * layer.rows
                    inside = _inside(y, i - layer.top, rows, layer.m, layer.height) + across
                    value = self._source[n, c, y * layer.width + x, u]
                    if inside:
                        value = emit.if_then_else(tirx.all(*inside), value, _float(0))
                    values.append(value)
                for i, value in enumerate(source_transform(values)):
                    emit.buffer_store(half, value, [i * size + j, u])
            for i in range(size):
                values = [half[i * size + j, u] for j in range(size)]
                for j, value in enumerate(source_transform(values)):
                    emit.buffer_store(
                        tiles, value, [i * size + j, c, row * self._across + column, u]
                    )

    def _product(
        self, tiles: Any, products: Any, place: Any, first: Any, panel: Any, start: Any
    ) -> None:
        """The product of the tiles from `start` by a panel of blocks, at one place."""
        count, blocks = self._layer.broadcasts, self._layer.vectors
        weights = self._weights
        nbytes = blocks * self._lanes * FLOAT_NBYTES
        ahead = PREFETCHED_NBYTES // nbytes
        totals = emit.alloc_buffer((count * blocks, self._lanes), scope="local")
        with emit.unroll(_int(count * blocks)) as t, self._vector() as u:
            emit.buffer_store(totals, _float(0), [t, u])
        with _loop(self._inputs) as c, _loop(self._lanes) as v:
            # Where the loop is a parallel closure, LLVM keeps the totals in registers only without.
            for line in range(0, nbytes if self._layer.threads == 1 else 0, LINE_NBYTES):
                block, lane = divmod(line // FLOAT_NBYTES, self._lanes)
                _prefetch(weights[place, first + panel, c, v + ahead, block, lane])
            sides = [emit.unroll(_int(count)), emit.unroll(_int(blocks))]
            with _in_order(sides, swapped=count < blocks) as (t, b), self._vector() as u:
                factor = weights[place, first + panel, c, v, b, u]
                value = totals[t * blocks + b, u] + tiles[place, c, start + t, v] * factor
                emit.buffer_store(totals, value, [t * blocks + b, u])
        with emit.unroll(_int(blocks)) as b, emit.unroll(_int(count)) as t, self._vector() as u:
            found = [place, panel * blocks + b, start + t, u]
            emit.buffer_store(products, totals[t * blocks + b, u], found)

    def _result_tile(
        self, products: Any, n: Any, block: Any, o: Any, down: Any, row: Any, column: Any
    ) -> None:
        """Transforms a tile back, and stores what of it is inside of the result."""
        layer, size, m = self._layer, self._size, self._layer.m
        half = emit.alloc_buffer((m * size, self._lanes), scope="local")
        pixels = emit.alloc_buffer((m * m, self._lanes), scope="local")
        with self._vector() as u:
            for j in range(size):
                values = [
                    products[i * size + j, o, row * self._across + column, u] for i in range(size)
                ]
                for i, value in enumerate(result_transform(values)):
                    emit.buffer_store(half, value, [i * size + j, u])
            for i in range(m):
                values = [half[i * size + j, u] for j in range(size)]
                for j, value in enumerate(result_transform(values)):
                    emit.buffer_store(pixels, value, [i * m + j, u])
        for i in range(m):
            for j in range(m):
                y, x = down * m + i, column * m + j
                inside = _inside(y, i, self._chunks * layer.rows, m, layer.result_height)
                inside += _inside(x, j, self._across, m, layer.result_width)
                place = y * layer.result_width + x
                with ExitStack() as frames:
                    if inside:
                        frames.enter_context(emit.If(tirx.all(*inside)))
                        frames.enter_context(emit.Then())
                    u = frames.enter_context(self._vector())
                    self._stored(pixels[i * m + j, u], [n, block, place, u])

    def _vector(self) -> Any:
        return emit.vectorized(_int(self._lanes))


def _inside(place: Any, first: int, tiles: int, m: int, size: int) -> list[Any]:
    """What is to be asked of a place, `first` in the first of so many tiles, to be in `size`."""
    asked = []
    if first < 0:
        asked.append(place >= 0)
    if first + (tiles - 1) * m >= size:
        asked.append(place < size)
    return asked


@contextmanager
def _loop(count: int, *, parallel: bool = False) -> Iterator[Any]:
    """A loop, or its only index."""
    if count == 1:
        yield _int(0)
        return
    with (emit.parallel if parallel else emit.serial)(_int(count)) as index:
        yield index


@contextmanager
def _in_order(frames: Sequence[Any], *, swapped: bool) -> Iterator[tuple[Any, Any]]:
    """Two loops, the first outside unless they are `swapped`; their indices as given."""
    first, second = reversed(frames) if swapped else frames
    with first as one, second as other:
        yield (other, one) if swapped else (one, other)


def _prefetch(element: Any) -> None:
    """Asks for the cache line of an element that will be read soon, or lies beyond the tensor."""
    read, keep, data = (tirx.const(n, "int32") for n in (0, 3, 1))
    emit.evaluate(
        emit.call_llvm_intrin("void", "llvm.prefetch", emit.address_of(element), read, keep, data)
    )


def _int(value: int) -> Any:
    return tirx.const(value, "int64")


def _float(value: float) -> Any:
    return tirx.const(value, "float32")
