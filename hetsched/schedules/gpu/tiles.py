"""Products on a graphics processor: results in registers, tiles of the factors in shared memory.

A function with one reduction, C[s, i, j] += A[s, i, k] * B[s, j, k] once loops are put together:
matrix products, and convolutions, of which i runs over the places of the output, j over its
channels and k over what a filter covers. What lies before (padding, views) is computed as the
factors are fetched, what lies behind as the result is stored.

Importing this file loads TVM's compiler.

References
----------
Chetlur et al., "cuDNN: efficient primitives for deep learning", 2014,
https://arxiv.org/abs/1410.0759
Volkov and Demmel, "Benchmarking GPUs to tune dense linear algebra", SC 2008,
https://doi.org/10.1109/SC.2008.5214359
"""

from dataclasses import dataclass
from math import ceil, prod
from typing import Any

from tvm import tirx
from tvm.s_tir.dlight.gpu import matmul
from tvm.tirx.analysis import undefined_vars

from hetsched.schedules.gpu.limits import Limits

# Neighbours that a thread computes: as many floats as one load moves.
WIDTH = 4
# Registers of a thread beside its accumulators and the factors of one step.
OTHER_REGISTERS = 40
# Threads that hide the latency of memory on a multiprocessor.
HIDING_THREADS = 512
# Multiply-adds in the time that fetching an element takes, which is mostly arithmetic on indices.
FETCH_PRODUCTS = 16
# Of a step, beside its work: the barriers.
STEP_PRODUCTS = 128


@dataclass(frozen=True)
class Tile:
    """Of a group of `threads` along i and j: each computes so many times `WIDTH` of either.

    `k` products are added between two barriers.
    """

    threads_i: int
    threads_j: int
    micro_i: int
    micro_j: int
    k: int

    def __str__(self) -> str:
        return (
            f"{self.threads_i}x{self.threads_j} threads of "
            f"{self.micro_i * WIDTH}x{self.micro_j * WIDTH}, steps of {self.k}"
        )

    @property
    def i(self) -> int:
        return self.threads_i * self.micro_i * WIDTH

    @property
    def j(self) -> int:
        return self.threads_j * self.micro_j * WIDTH

    @property
    def threads(self) -> int:
        return self.threads_i * self.threads_j

    @property
    def shared_nbytes(self) -> int:
        return 4 * self.k * (self.i + self.j + 2 * WIDTH)

    @property
    def registers(self) -> int:
        micro_i, micro_j = WIDTH * self.micro_i, WIDTH * self.micro_j
        return micro_i * micro_j + micro_i + micro_j + OTHER_REGISTERS


TILES = tuple(
    Tile(*threads, *micro, k)
    for threads in ((16, 16), (16, 8), (8, 16), (8, 8), (8, 4), (4, 8))
    for micro in ((2, 2), (2, 1), (1, 2), (1, 1))
    for k in (8, 16, 32)
)


def cycles(tile: Tile, batch: int, i: int, j: int, k: int, limits: Limits) -> float:
    """What a model of the processor says that a product takes, in cycles.

    Groups run in waves, as many at once as registers, shared memory and threads let stand side by
    side; a multiprocessor of few threads waits for memory.
    """
    groups = batch * ceil(i / tile.i) * ceil(j / tile.j)
    fitting = min(
        limits.registers // (tile.threads * tile.registers),
        limits.shared_nbytes_unit // tile.shared_nbytes,
        limits.threads_unit // tile.threads,
    )
    side_by_side = max(1, min(fitting, ceil(groups / limits.units)))
    waves = ceil(groups / (limits.units * side_by_side))
    products = tile.i * tile.j * tile.k
    fetched = (tile.i + tile.j) * tile.k * FETCH_PRODUCTS
    # A step of a micro tile reads its factors from shared memory, four at a time.
    micro_i, micro_j = WIDTH * tile.micro_i, WIDTH * tile.micro_j
    read = products * (micro_i + micro_j) / (micro_i * micro_j) / WIDTH * 2
    step = (products + fetched + read) / limits.lanes
    step = step * side_by_side + STEP_PRODUCTS
    waiting: float = max(1.0, (HIDING_THREADS / (tile.threads * side_by_side)) ** 0.5)
    return waves * ceil(k / tile.k) * step * waiting


def candidates(batch: int, i: int, j: int, k: int, limits: Limits) -> list[Tile]:
    """The tiles that the device can hold, the quickest by the model first."""
    held = [
        tile
        for tile in TILES
        if tile.threads <= limits.threads_group
        and tile.shared_nbytes <= limits.shared_nbytes_group
        and tile.threads * tile.registers <= limits.registers
    ]
    return sorted(held, key=lambda tile: cycles(tile, batch, i, j, k, limits))


def product_of(schedule: Any) -> Any | None:
    """The one reducing block, if it is such a product and everything else is elementwise."""
    blocks = schedule.get_child_blocks(schedule.get_sblock("root"))
    reducing = matmul.get_reduction_blocks(schedule, blocks)
    if not reducing:
        return None
    main = reducing[0]
    found = schedule.get(main)
    if not _multiplies(found) or matmul.get_index_map(found) is None:
        return None
    axes = [int(axis.dom.extent) for axis in found.iter_vars]
    return main if all(axes) else None


def sizes(schedule: Any, main: Any) -> tuple[int, int, int, int]:
    """The extents of s, i, j and k."""
    _, _, _, traits = matmul.detect_iter_traits(schedule.get(main))
    kinds = matmul.IterKind
    order = (kinds.kIter_S, kinds.kIter_I, kinds.kIter_J, kinds.kIter_K)
    s, i, j, k = (prod(int(t.extent) for t in traits if t.kind == kind) for kind in order)
    return s, i, j, k


def apply(schedule: Any, main: Any, tile: Tile, explicit: bool) -> Any:
    """The function in tiles.

    Loops over registers are written out if `explicit`, else the compiler of the source is told to.
    """
    along_i = _stored_along_i(schedule, main)
    _normalise(schedule, main)
    schedule.pad_einsum(main, [1, tile.i, tile.j, tile.k])
    s, i, j, k = schedule.get_loops(main)
    group_i, micro_i, thread_i, four_i = schedule.split(
        i, [None, tile.micro_i, tile.threads_i, WIDTH]
    )
    group_j, micro_j, thread_j, four_j = schedule.split(
        j, [None, tile.micro_j, tile.threads_j, WIDTH]
    )
    step, inner = schedule.split(k, [None, tile.k])
    schedule.reorder(
        s, group_i, group_j, micro_i, micro_j, thread_i, thread_j, step, inner, four_i, four_j
    )
    schedule.bind(s, "blockIdx.z")
    # The innermost axes run along what is contiguous in the result.
    schedule.bind(group_i, "blockIdx.x" if along_i else "blockIdx.y")
    schedule.bind(group_j, "blockIdx.y" if along_i else "blockIdx.x")
    schedule.bind(micro_i, "vthread.y")
    schedule.bind(micro_j, "vthread.x")
    schedule.bind(thread_i, "threadIdx.x" if along_i else "threadIdx.y")
    schedule.bind(thread_j, "threadIdx.y" if along_i else "threadIdx.x")
    for loop in (four_i, four_j, *([] if explicit else [inner])):
        schedule.unroll(loop)
    schedule.annotate(thread_j, "pragma_unroll_explicit", int(explicit))
    stored = schedule.cache_write(main, 0, "local")
    schedule.reverse_compute_at(stored, thread_j, preserve_unit_loops=True)
    for loop in schedule.get_loops(stored)[-2:]:
        schedule.unroll(loop)
    for index in range(2):
        registers = schedule.cache_read(main, index, "local")
        schedule.compute_at(registers, inner, preserve_unit_loops=True)
        *_, four, one = schedule.get_loops(registers)
        schedule.reorder(one, four)
        schedule.vectorize(four)
        shared = schedule.cache_read(registers, 0, "shared")
        # Along k last would let threads that read neighbours meet in one bank.
        schedule.transform_layout(shared, ("write", 0), lambda s, row, k: (s, k, row))
        schedule.storage_align(shared, 0, axis=1, factor=(tile.i, tile.j)[index], offset=WIDTH)
        schedule.compute_at(shared, step, preserve_unit_loops=True)
        matmul.auto_inline_producers(schedule, shared)
        _fetch(schedule, shared, tile, along_i)
    matmul.auto_inline_consumer_chain(schedule, stored)
    schedule.decompose_reduction(main, step)
    return schedule


def _fetch(schedule: Any, shared: Any, tile: Tile, along_i: bool) -> None:
    """Shares a tile of a factor out to the threads, neighbours to neighbours in memory."""
    row, k = schedule.get_loops(shared)[-2:]
    order = (k, row) if _contiguous_along_row(schedule.get(shared)) else (row, k)
    schedule.reorder(*order)
    x, y = (tile.threads_i, tile.threads_j) if along_i else (tile.threads_j, tile.threads_i)
    each, thread_y, thread_x = schedule.split(schedule.fuse(*order), [None, y, x])
    schedule.bind(thread_y, "threadIdx.y")
    schedule.bind(thread_x, "threadIdx.x")
    schedule.unroll(each)


def _contiguous_along_row(block: Any) -> bool:
    """Whether neighbours along the row, rather than along k, are neighbours in memory."""
    _, row, k = (axis.var for axis in block.iter_vars)
    for read in block.reads:
        for place in reversed(read.region):
            names = undefined_vars(place.min)
            if any(name.same_as(row) for name in names):
                return True
            if any(name.same_as(k) for name in names):
                return False
    return True


def _multiplies(block: Any) -> bool:
    """Whether a block adds products of two numbers, each read as it is or as another type."""
    store = block.body
    if not isinstance(store, tirx.BufferStore) or not isinstance(store.value, tirx.Add):
        return False
    product = store.value.b
    return isinstance(product, tirx.Mul) and str(store.buffer.dtype) in ("float32", "int32")


def _stored_along_i(schedule: Any, main: Any) -> bool:
    """Whether what is contiguous in the result belongs to i."""
    found = schedule.get(main)
    *_, traits = matmul.detect_iter_traits(found)
    kinds = {axis.var: trait.kind for axis, trait in zip(found.iter_vars, traits, strict=True)}
    for index in reversed(found.body.indices):
        kind = kinds.get(index)
        if kind in (matmul.IterKind.kIter_I, matmul.IterKind.kIter_J):
            return bool(kind == matmul.IterKind.kIter_I)
    return False


def _normalise(schedule: Any, main: Any) -> None:
    """Puts the loops of `main` together to s, i, j and k, each by a copy that is inlined later."""
    a, b = (schedule.reindex(main, ("read", index)) for index in range(2))
    c = schedule.reindex(main, ("write", 0))
    product, a_map, b_map, c_map = matmul.get_index_map(schedule.get(main))
    schedule.transform_layout(a, ("write", 0), a_map)
    schedule.transform_layout(b, ("write", 0), b_map)
    schedule.transform_layout(c, ("read", 0), c_map)
    schedule.transform_block_layout(main, product)
