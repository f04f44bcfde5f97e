"""The vector registers of a core, and the tiles of a result that fit in them."""

from dataclasses import dataclass
from functools import cached_property
from itertools import product

AVX512 = frozenset("avx512f avx512bw avx512dq avx512vl avx2 fma f16c".split())
# Cycles from a multiply-add to one that needs its result.
LATENCY = 4
# Of a core: multiply-adds, and loads, in a cycle; and instructions that it takes in.
PIPES = 2
LOADS = 2
WIDTH = 8
# Of a loop over tiles: cycles lost before each step is under way.
STARTED = 0.5
LARGEST_SIDE = 16
# In a cycle of a loop whose vectors come from the second cache: loads, and bytes from there.
STREAMED_LOADS = 1.7
STREAMED_NBYTES = 32


@dataclass(frozen=True)
class Tile:
    """`broadcasts` scalars by `vectors` vectors: the accumulators that a loop keeps in registers.

    `waste` is the work done over the work asked for.
    """

    broadcasts: int
    vectors: int
    waste: float

    def __str__(self) -> str:
        return f"{self.broadcasts}x{self.vectors}"

    def covering(self, broadcasts: int) -> int:
        """The scalars of the tiles that cover `broadcasts`."""
        return -(-broadcasts // self.broadcasts) * self.broadcasts


@dataclass(frozen=True)
class Vectors:
    """`registers` vector registers with `lanes` elements of float32 each.

    `dot` is how a core multiplies vectors of bytes: `vnni` and `sdot` are instructions that add
    four products to each element of int32, `madd` one for two products of 16 bits, `quads` and
    `pairs` functions of C for the same, `quads` for 16 lanes only, and `lanes` stands for products
    of 32 bits.
    """

    lanes: int
    registers: int
    dot: str = "lanes"

    @classmethod
    def of(cls, isa: str) -> "Vectors":
        """Those of the instruction set that a device names.

        >>> Vectors.of("x86_64 avx2 fma f16c")
        Vectors(lanes=8, registers=16, dot='madd')
        """
        architecture, *features = isa.split()
        if architecture != "x86_64":
            return cls(4, 32, "sdot" if "asimddp" in features else "lanes")
        if set(features) >= AVX512:
            return cls(16, 32, "vnni" if "avx512_vnni" in features else "madd")
        if "avx2" in features:
            return cls(8, 16, "vnni" if "avx_vnni" in features else "madd")
        return cls(4, 16, "madd")

    def blocks(self, count: int) -> int:
        """How many vectors hold `count` elements."""
        return -(-count // self.lanes)

    def tiles(
        self,
        broadcasts: int,
        vectors: int,
        *,
        exact: bool = False,
        wide: int = 1,
        streamed: bool = False,
        cropping: float = 1.0,
    ) -> list[Tile]:
        """Tiles for `broadcasts` scalars by `vectors` vectors, those of the fewest cycles first.

        The smaller side stays in registers besides the accumulators, and one operand passes
        through. `exact` keeps to divisors of `vectors`. Tiles of at least `wide` vectors go first.
        The vectors of `streamed` ones come from the second cache. `cropping` is by how much a
        tile is slower that does not divide `broadcasts`.
        """

        def cycles(tile: Tile) -> tuple[bool, float]:
            accumulators = tile.broadcasts * tile.vectors
            loads = tile.broadcasts + tile.vectors
            busy = busy_cycles(tile.broadcasts, tile.vectors)
            started = STARTED
            if streamed:
                started = 1.0
                nbytes = tile.vectors * self.lanes * 4
                busy = max(busy, nbytes / STREAMED_NBYTES, loads / STREAMED_LOADS)
            slower = cropping if broadcasts % tile.broadcasts else 1.0
            return (
                tile.vectors < min(wide, vectors),
                tile.waste * (busy + started) / accumulators * slower,
            )

        tiles = (
            Tile(rows, columns, _waste(broadcasts, rows) * _waste(vectors, columns))
            for rows, columns in self._sides
            if rows <= broadcasts and columns <= vectors and not (exact and vectors % columns)
        )
        return sorted(tiles, key=cycles)

    @cached_property
    def _sides(self) -> list[tuple[int, int]]:
        sides = product(range(LARGEST_SIDE, 0, -1), range(8, 0, -1))
        return [
            (rows, columns)
            for rows, columns in sides
            if rows * columns + min(rows, columns) + 1 <= self.registers
        ]


def step_cycles(broadcasts: int, vectors: int) -> float:
    """Cycles of a core for one multiply-add to each accumulator of a tile, all told."""
    return busy_cycles(broadcasts, vectors) + STARTED


def busy_cycles(broadcasts: int, vectors: int) -> float:
    """Cycles in which one multiply-add to each accumulator of a tile keeps a core busy."""
    accumulators, loads = broadcasts * vectors, broadcasts + vectors
    instructions = accumulators + loads + 2
    return max(accumulators / PIPES, loads / LOADS, LATENCY, instructions / WIDTH)


def _waste(count: int, side: int) -> float:
    return -(-count // side) * side / count
