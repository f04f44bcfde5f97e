"""Runs of kernel groups in pieces: what each piece of a run computes and needs.

A run is contiguous in the order of the graph. Its results are cut, and what a piece needs inside of
the run follows from them: a piece has a halo where a window reaches over a cut, and all of a tensor
of which an operation reads all.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise, product

from hetsched.errors import SplitRefused
from hetsched.graph import Graph
from hetsched.op import Op, Tensor
from hetsched.operation import Known, Piece, Read, flops, operation_of, piece_of
from hetsched.region import Region, boxes_of
from hetsched.split import Exit, Split


@dataclass(frozen=True)
class Way:
    """How a run is cut: its results along `axes` of tensors of `rank`, of any rank if it is 0.

    With `sum` the run ends with a contraction whose terms are shared. Bounds are multiples of
    `grain` where the axis is long enough, and what is less than a grain takes as long as one.
    """

    axes: tuple[int, ...] = ()
    rank: int = 0
    sum: bool = False
    grain: int = 1


@dataclass(frozen=True, eq=False)
class Layout:
    """A graph, where each of its tensors is last read, and which have their channels in blocks.

    `packed` has the channels of a block by tensor name.
    """

    graph: Graph
    packed: Mapping[str, int] = field(default_factory=dict)

    @cached_property
    def known(self) -> Known:
        return Known(self.graph.constants, self.graph.opsets.get("", 1))

    @cached_property
    def last_reader(self) -> Mapping[str, int]:
        """The last group that reads each tensor; the end for results of the graph."""
        found: dict[str, int] = {}
        for index, group in enumerate(self.graph.groups):
            found.update((tensor.name, index) for op in group.ops for tensor in op.reads)
        found.update((tensor.name, len(self.graph.groups)) for tensor in self.graph.outputs)
        return found

    @cached_property
    def tensors(self) -> Mapping[str, Tensor]:
        """The activations by name."""
        written = {t.name: t for op in self.graph.ops for t in op.writes}
        return {**{t.name: t for t in self.graph.inputs}, **written}


class Walk:
    """Backwards through the groups before `last`, a run that is cut in pieces.

    `rates` are the shares of each of the way's axes, in proportion; of two axes every pair is a
    piece, the last axis fastest. `needs` are the boxes that each piece needs of what the run has
    not computed yet, `makes` the regions that it writes of each result.
    """

    def __init__(
        self, layout: Layout, last: int, way: Way, rates: Sequence[Sequence[float]]
    ) -> None:
        self._layout = layout
        self._last = last
        self._way = way
        self._rates = rates
        self._ops: list[str] = []
        self._exits: list[Exit] = []
        # What is read behind the contraction that ends the run, in its own group.
        self._outside: set[str] = set()
        self.pieces = 1
        for axis in rates:
            self.pieces *= len(axis)
        self.needs: list[dict[str, list[Region]]] = [{} for _ in range(self.pieces)]
        self.makes: dict[str, tuple[Region, ...]] = {}

    def take(self, index: int) -> list[float]:
        """Adds a group at the front; the share of its arithmetic that each piece has.

        Raises
        ------
        SplitRefused
            An operation of the group, or one of its results, cannot be cut so.
        """
        group = self._layout.graph.groups[index]
        ops = list(group.ops)
        found = []
        if self._way.sum and index == self._last - 1:
            anchor = next(op for op in ops if op.name == group.name)
            behind = ops[ops.index(anchor) + 1 :]
            self._outside = {tensor.name for op in behind for tensor in op.reads}
            ops = ops[: ops.index(anchor)]
            self._ops.append(anchor.name)
            found.append((flops(anchor), self._add_up(anchor)))
        found += [(flops(op), self._take(op)) for op in reversed(ops)]
        self._ops[:0] = [op.name for op in ops]
        total = sum(max(1, weight) for weight, _ in found)
        return [
            sum(max(1, weight) * shares[place] for weight, shares in found) / total
            for place in range(self.pieces)
        ]

    @property
    def split(self) -> Split:
        """The groups taken so far as a split."""
        return Split(tuple(self._ops), tuple(reversed(self._exits)))

    def _take(self, op: Op) -> list[float]:
        """The share of an operation that each piece has."""
        shares = [0.0] * self.pieces
        for index, tensor in enumerate(op.outputs):
            if tensor is None:
                continue
            leaves = self._layout.last_reader.get(tensor.name, -1) >= self._last
            cut = self._cut(tensor) if leaves or tensor.name in self._outside else None
            for place, needs in enumerate(self.needs):
                regions = needs.pop(tensor.name, [])
                if cut is not None:
                    regions = boxes_of([*regions, cut[place]])
                share = 0.0
                for region in regions:
                    piece = piece_of(op, index, region, self._layout.known)
                    self._read(op, piece, place)
                    share += self._share(piece.outputs[index] or region, tensor)
                shares[place] = max(shares[place], share)
        return shares

    def _share(self, region: Region, tensor: Tensor) -> float:
        """What of the work for a tensor a region of it is, in whole grains."""
        share, grain = region.size / max(1, tensor.size), self._way.grain
        for axis in self._way.axes:
            if axis < len(tensor.shape) and tensor.shape[axis] > grain:
                size, part = tensor.shape[axis], region.shape[axis]
                share *= -(-part // grain) * size / (-(-size // grain) * part)
        return share

    def _add_up(self, op: Op) -> list[float]:
        """The share of the terms of a sum that each piece has."""
        tensor, depth = op.output(), operation_of(op).depth(op)
        bounds = self._bounds(depth, self._rates[0])
        for place, (first, last) in enumerate(pairwise(bounds)):
            self._read(op, operation_of(op).term(op, first, last, self._layout.known), place)
        self._exits.append(Exit(tensor.name, ((0, bounds),), True))
        self.makes[tensor.name] = (Region.whole(tensor.shape),) * self.pieces
        return [(last - first) / depth for first, last in pairwise(bounds)]

    def _read(self, op: Op, piece: Piece, place: int) -> None:
        needs = self.needs[place]
        for item in piece.inputs:
            if isinstance(item, Read):
                name = op.input(item.place).name
                if name not in self._layout.graph.constants:
                    needs[name] = boxes_of([*needs.get(name, ()), item.region])

    def _cut(self, tensor: Tensor) -> tuple[Region, ...]:
        """The pieces of a result; noted as an exit."""
        way, rank = self._way, len(tensor.shape)
        if way.sum or (way.rank and rank != way.rank) or max(way.axes) >= rank:
            raise SplitRefused(f"{tensor} is not cut so")
        if way.axes == (3,) and tensor.shape[3] <= tensor.shape[2]:
            raise SplitRefused(f"{tensor} has as many rows as columns, and those lie together")
        # Of channels in blocks, a part of a block is no piece that others can read without a copy.
        lanes = self._layout.packed.get(tensor.name, 1)
        axes = tuple(
            (axis, self._bounds(tensor.shape[axis], rates, lanes if axis == 1 else 1))
            for axis, rates in zip(way.axes, self._rates, strict=True)
        )
        self._exits.append(Exit(tensor.name, axes))
        regions = []
        for ends in product(*(pairwise(bounds) for _, bounds in axes)):
            region = Region.whole(tensor.shape)
            for axis, (first, last) in zip(way.axes, ends, strict=True):
                region = region.along(axis, first, last)
            regions.append(region)
        self.makes[tensor.name] = tuple(regions)
        return tuple(regions)

    def _bounds(self, size: int, rates: Sequence[float], least: int = 1) -> tuple[int, ...]:
        bounds = shares_of(size, rates, self._way.grain, least)
        if bounds is None:
            raise SplitRefused(f"{size} is too little for {len(rates)} pieces")
        return bounds


def nbytes_of(tensor: Tensor, region: Region) -> int:
    """The bytes of a region of a tensor."""
    return region.size * tensor.nbytes // max(1, tensor.size)


def shares_of(
    size: int, rates: Sequence[float], grain: int = 1, least: int = 1
) -> tuple[int, ...] | None:
    """Bounds of shares in proportion to `rates`, at multiples of `grain`.

    Of a short axis the grain is half of it, or so, but never below `least`. None if a share would
    be empty.

    Examples
    --------
    >>> shares_of(64, (1.0, 1.0), 16), shares_of(7, (1.0, 1.0)), shares_of(24, (2.0, 1.0), 16)
    ((0, 32, 64), (0, 4, 7), (0, 16, 24))
    >>> shares_of(48, (1.0, 1.0), 16), shares_of(48, (1.0, 1.0), 16, 16)
    ((0, 24, 48), (0, 32, 48))
    """
    total = sum(rates)
    ends = [size * part / total for part in accumulate(rates)][:-1]
    while grain > 1 and size < 2 * grain * len(rates):
        grain //= 2
    grain = max(grain, least)
    bounds = (0, *(int(end / grain + 0.5) * grain for end in ends), size)
    return bounds if all(a < b for a, b in pairwise(bounds)) else None
