"""Sums of products in Einstein's notation."""

from math import prod

from hetsched.op import Op
from hetsched.operation import Known, Operation, Piece, refused
from hetsched.region import Interval, Region


class Einsum(Operation):
    """One term for each value of all letters together: its products, and an addition to the sum."""

    onnx_types = ("Einsum",)
    examples = (
        '(float[2,3,4] a, float[2,4,5] b) => (y) { y = Einsum <equation="bij,bjk->bik"> (a, b) }',
        '(float[6,3,4] a, float[1,4,5] b) => (y) { y = Einsum <equation="...ij,...jk"> (a, b) }',
        '(float[2,3,4,5] a, float[2,6,4,5] b) => (y) { y = Einsum <equation="bqhd,bkhd->bhqk"> '
        "(a, b) }",
    )

    def flops(self, op: Op) -> int:
        terms, _ = _letters(op)
        return prod(_sizes(op, terms).values()) * len(terms)

    def piece(self, op: Op, index: int, region: Region, known: Known) -> Piece:
        """Any box."""
        terms, result = _letters(op)
        return self._with(op, terms, dict(zip(result, region.intervals, strict=True)), region)

    def depth(self, op: Op) -> int:
        terms, result = _letters(op)
        sizes = _sizes(op, terms)
        summed = [letter for letter in sizes if letter not in result]
        if len(summed) != 1:
            raise refused(op, f"it is a sum over {len(summed)} axes")
        return sizes[summed[0]]

    def term(self, op: Op, first: int, last: int, known: Known) -> Piece:
        terms, result = _letters(op)
        (summed,) = (letter for letter in _sizes(op, terms) if letter not in result)
        return self._with(op, terms, {summed: (first, last)}, Region.whole(op.output().shape))

    def _with(
        self, op: Op, terms: list[list[str]], cut: dict[str, Interval], region: Region
    ) -> Piece:
        reads: list[Region | None] = []
        for place, term in enumerate(terms):
            sizes = op.input(place).shape
            whole = ((0, size) for size in sizes)
            intervals = (
                full if full == (0, 1) else cut.get(letter, full)
                for letter, full in zip(term, whole, strict=True)
            )
            reads.append(Region(tuple(intervals)))
        return Piece.of(op, reads, {0: region})


def _letters(op: Op) -> tuple[list[list[str]], list[str]]:
    """A letter for each axis of each input, and of the result.

    The axes under an ellipsis broadcast from the right, so they are named from there.
    """
    left, arrow, right = op.attributes["equation"].replace(" ", "").partition("->")
    terms = []
    hidden: list[str] = []
    for place, term in enumerate(left.split(",")):
        head, ellipsis, tail = term.partition("...")
        covered = len(op.input(place).shape) - len(head) - len(tail)
        middle = [f"...{covered - i}" for i in range(covered)] if ellipsis else []
        hidden = max(hidden, middle, key=len)
        terms.append([*head, *middle, *tail])
    if arrow:
        head, ellipsis, tail = right.partition("...")
        return terms, [*head, *(hidden if ellipsis else []), *tail]
    every = [letter for term in terms for letter in term if letter not in hidden]
    return terms, [*hidden, *sorted(letter for letter in every if every.count(letter) == 1)]


def _sizes(op: Op, terms: list[list[str]]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for place, term in enumerate(terms):
        for letter, size in zip(term, op.input(place).shape, strict=True):
            sizes[letter] = max(size, sizes.get(letter, 1))
    return sizes
