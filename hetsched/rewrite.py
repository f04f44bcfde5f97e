"""A split as a rewrite: the graph with some operations in pieces, which computes the same.

The pieces follow from the exits, backwards: what a piece reads of each tensor inside is what the
operations behind it need, by `Operation.piece`. Between splits a piece takes what it needs from the
pieces before it, so that consecutive splits exchange only what they lack.
"""

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from itertools import pairwise
from operator import or_

import networkx
import numpy as np

from hetsched.errors import SplitRefused
from hetsched.fusion import HEAD
from hetsched.graph import Graph
from hetsched.op import Op, Tensor
from hetsched.operation import Known, Piece, Read, flops, operation_of, piece_of
from hetsched.region import Interval, Region, boxes_of
from hetsched.split import Exit, Split

# Until then bounds of a slice were attributes.
FIRST_OPSET_OF_SLICE_INPUTS = 10
# A constant of at most so many numbers is named after them.
MOST_NAMED = 8

# A split by its place, and one of its pieces.
Place = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Rewritten:
    """A graph with pieces in it.

    `places` says by name which operations belong to a piece: the place of the split, and the number
    of the piece. A slice of what one piece made for another belongs to the first. Operations that
    are in no split, and those that join pieces for them, have no place.
    """

    graph: Graph
    places: Mapping[str, Place]


def split(graph: Graph, splits: Sequence[Split]) -> Graph:
    """The graph with the operations of each split in pieces.

    Raises
    ------
    SplitRefused
        An operation cannot be cut so, or a split does not fit the graph.
    """
    return rewrite(graph, splits).graph


def rewrite(graph: Graph, splits: Sequence[Split]) -> Rewritten:
    """The graph with the operations of each split in pieces, and which operation is of which piece.

    An operation `conv` becomes `conv#0`, `conv#1`, ... in the order of the pieces, all of one piece
    before the next. One that would compute the same in two pieces is in the first alone, unless it
    dequantises. What several operations of a piece read of a tensor is computed as one box, unless
    that is more than their boxes apart. A tensor is joined, under its own name, only for who reads
    it whole.

    Raises
    ------
    SplitRefused
        An operation cannot be cut so, or a split does not fit the graph.
    """
    for item in splits:
        _check(graph, item)
    work = _Rewriting(graph, _known(graph))
    for node in _order(graph, splits):
        if isinstance(node, Op):
            work.add_whole(node)
        else:
            work.add_split(node, splits[node])
    return work.finish()


def redundancy(graph: Graph, item: Split) -> float:
    """The FLOPs of all pieces over those of the operations, less one: what is computed twice.

    Negative where the operations compute what nobody reads.

    Raises
    ------
    SplitRefused
        An operation cannot be cut so, or the split does not fit the graph.
    """
    _check(graph, item)
    known = _known(graph)
    steps = {
        step.key: step
        for number in range(item.pieces)
        for step in _steps(graph, item, number, known)
    }
    total = sum(flops(_detached(step)) for step in steps.values() if step.piece.kind != "Identity")
    written = {tensor.name: tensor for op in graph.ops for tensor in op.writes}
    total += sum((item.pieces - 1) * written[e.tensor].size for e in item.exits if e.sum)
    inside = set(item.ops)
    alone = sum(flops(op) for op in graph.ops if op.name in inside)
    return total / alone - 1 if alone else 0.0


@dataclass(frozen=True, eq=False)
class _Step:
    """A region of one output of `op`, computed by `piece`; of a sum only the terms of an interval.

    `number` is that of the piece of the split. Steps of the same key are the same operation.
    """

    op: Op
    index: int
    region: Region
    piece: Piece
    number: int
    terms: Interval | None = None

    @property
    def key(self) -> object:
        # What dequantises stays with its reader: else floats would be handed over, and rounded in
        # another way than the integers that they stand for.
        own = self.number if self.op.kind == HEAD else None
        return self.op.name, self.piece.outputs, self.terms, own

    def reads(self) -> Iterator[tuple[str, Region]]:
        """The tensors that it reads by name, and what of them."""
        for source in self.piece.inputs:
            if isinstance(source, Read):
                yield self.op.input(source.place).name, source.region


@dataclass(frozen=True, eq=False)
class _Tile:
    """What a piece made of a tensor: `box` of it, where `region` is the piece's own."""

    tensor: Tensor
    box: Region
    region: Region
    place: Place


def _known(graph: Graph) -> Known:
    return Known(graph.constants, graph.opsets.get("", 1))


def _check(graph: Graph, item: Split) -> None:
    """Refuses a split that does not fit the graph."""
    inside = set(item.ops)
    ops = [op for op in graph.ops if op.name in inside]
    if len(ops) != len(item.ops):
        there = {op.name for op in ops}
        lost = next((name for name in item.ops if name not in there), item.ops[:1])
        raise SplitRefused(f"a split names '{lost}' twice, or the graph has no such operation")
    written = {tensor.name: (op, tensor) for op in ops for tensor in op.writes}
    if not item.exits:
        raise SplitRefused(f"the split of '{item.ops[0]}' has no exit")
    for exit_ in item.exits:
        if exit_.tensor not in written:
            raise SplitRefused(f"no operation of the split writes its exit '{exit_.tensor}'")
        if exit_.pieces != item.pieces:
            raise SplitRefused(
                f"exit '{exit_.tensor}' has {exit_.pieces} pieces, and another {item.pieces}"
            )
        op, tensor = written[exit_.tensor]
        if exit_.sum and len(exit_.axes) != 1:
            raise SplitRefused(f"exit '{exit_.tensor}' is a sum over {len(exit_.axes)} axes")
        makers = (graph.producers.get(read.name) for read in op.reads)
        if exit_.sum and any(maker is not None and maker.kind == HEAD for maker in makers):
            raise SplitRefused(
                f"exit '{exit_.tensor}' is a sum of what {op} has dequantised, whose terms are "
                "rounded as floats, and the whole as integers"
            )
        if len({axis for axis, _ in exit_.axes}) != len(exit_.axes):
            raise SplitRefused(f"exit '{exit_.tensor}' is cut along one axis twice")
        for axis, bounds in exit_.axes:
            if not exit_.sum and not 0 <= axis < len(tensor.shape):
                raise SplitRefused(f"exit '{exit_.tensor}' has no axis {axis}")
            size = operation_of(op).depth(op) if exit_.sum else tensor.shape[axis]
            rising = all(first < last for first, last in pairwise(bounds))
            if not rising or bounds[0] != 0 or bounds[-1] != size:
                raise SplitRefused(
                    f"exit '{exit_.tensor}' is cut at {bounds}, which does not rise from 0 "
                    f"to {size}"
                )
    exits = {exit_.tensor: exit_ for exit_ in item.exits}
    for op in graph.ops:
        for tensor in op.reads:
            if op.name in inside and tensor.name in exits and exits[tensor.name].sum:
                raise SplitRefused(f"{op} reads the sum '{tensor.name}' inside of its split")
            if op.name not in inside and tensor.name in written and tensor.name not in exits:
                raise SplitRefused(f"{op} reads '{tensor.name}', which is no exit of its split")
    for tensor in graph.outputs:
        if tensor.name in written and tensor.name not in exits:
            raise SplitRefused(f"the output '{tensor.name}' is no exit of its split")


def _order(graph: Graph, splits: Sequence[Split]) -> Iterator[Op | int]:
    """The operations of no split, and the places of the splits, each after what it reads."""
    owner: dict[str, int] = {}
    for place, item in enumerate(splits):
        for name in item.ops:
            if name in owner:
                raise SplitRefused(f"'{name}' is in two splits")
            owner[name] = place
    position: dict[Op | int, int] = {}
    for index, op in enumerate(graph.ops):
        position.setdefault(owner.get(op.name, op), index)
    view = networkx.DiGraph()
    view.add_nodes_from(position)
    for op in graph.ops:
        sink = owner.get(op.name, op)
        for tensor in op.reads:
            producer = graph.producers.get(tensor.name)
            if producer and owner.get(producer.name, producer) != sink:
                view.add_edge(owner.get(producer.name, producer), sink)
    try:
        yield from networkx.lexicographical_topological_sort(view, key=position.__getitem__)
    except networkx.NetworkXUnfeasible:
        around = [node for node, _ in networkx.find_cycle(view)]
        names = [node.name if isinstance(node, Op) else splits[node].ops[0] for node in around]
        raise SplitRefused(
            f"a split waits for itself, by way of {' -> '.join(names[:6])}: it lacks operations "
            "between its own"
        ) from None


def _share(exit_: Exit, number: int, shape: Sequence[int]) -> Region:
    """What of a tensor the piece of this number makes; of a sum each makes all."""
    region = Region.whole(shape)
    if exit_.sum:
        return region
    for axis, bounds in reversed(exit_.axes):
        number, place = divmod(number, len(bounds) - 1)
        region = region.along(axis, *bounds[place : place + 2])
    return region


def _steps(graph: Graph, item: Split, number: int, known: Known) -> list[_Step]:
    """What one piece computes, in topological order."""
    exits = {exit_.tensor: exit_ for exit_ in item.exits}
    inside = set(item.ops)
    wanted: dict[str, list[Region]] = {}
    steps: list[_Step] = []
    for op in reversed([op for op in graph.ops if op.name in inside]):
        found: list[_Step] = []
        for index, tensor in enumerate(op.outputs):
            if tensor is None:
                continue
            exit_ = exits.get(tensor.name)
            if exit_ and exit_.sum:
                (_, bounds), whole = exit_.axes[0], Region.whole(tensor.shape)
                terms = bounds[number], bounds[number + 1]
                piece = operation_of(op).term(op, *terms, known)
                found.append(_Step(op, index, whole, piece, number, terms))
                continue
            regions = wanted.pop(tensor.name, [])
            if exit_:
                regions.append(_share(exit_, number, tensor.shape))
            for region in boxes_of(regions):
                found.append(_Step(op, index, region, piece_of(op, index, region, known), number))
        for step in found:
            for name, region in step.reads():
                wanted.setdefault(name, []).append(region)
        steps.extend(reversed(found))
    return steps[::-1]


def _made(step: _Step, name: str, inputs: Sequence[Tensor | None], outputs: Sequence[str]) -> Op:
    """The operation of a step over these inputs, that writes tensors of these names."""
    written = [
        None if region is None or tensor is None else Tensor(new, region.shape, tensor.dtype)
        for region, tensor, new in zip(step.piece.outputs, step.op.outputs, outputs, strict=False)
    ]
    while written[-1] is None:
        written.pop()
    kind = step.piece.kind or step.op.kind
    domain = "" if step.piece.kind else step.op.domain
    return Op(name, kind, tuple(inputs), tuple(written), step.piece.attributes, domain)


def _detached(step: _Step) -> Op:
    """The operation of a step by its shapes alone."""
    inputs: list[Tensor | None] = []
    for source in step.piece.inputs:
        if isinstance(source, Read):
            tensor = step.op.input(source.place)
            inputs.append(Tensor(tensor.name, source.region.shape, tensor.dtype))
        else:
            array = source
            inputs.append(None if array is None else Tensor("", array.shape, array.dtype.name))
    return _made(step, step.op.name, inputs, [t.name if t else "" for t in step.op.outputs])


def _label(region: Region, shape: Sequence[int]) -> str:
    """The region as numpy writes it, such as `[:, 0:32]`."""
    cut = region.cuts(shape)
    parts = (
        f"{first}:{last}" if axis in cut else ":"
        for axis, (first, last) in enumerate(region.intervals)
    )
    return f"[{', '.join(parts)}]"


@dataclass
class _Rewriting:
    """The new graph in the making: `add_whole` and `add_split` in topological order."""

    graph: Graph
    known: Known
    ops: list[Op] = field(default_factory=list)
    places: dict[str, Place] = field(default_factory=dict)
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    joins: set[str] = field(default_factory=set)
    # By name of the old tensor: its pieces, and how they were cut.
    _tiles: dict[str, list[_Tile]] = field(default_factory=dict)
    _exits: dict[str, Exit] = field(default_factory=dict)
    # What was cut or joined before, by tensor and region; constants by their content.
    _cut: dict[tuple[str, Region], Tensor] = field(default_factory=dict)
    _joined: dict[tuple[str, Region], Tensor] = field(default_factory=dict)
    _arrays: dict[tuple[str, tuple[int, ...], bytes], Tensor] = field(default_factory=dict)
    _names: set[str] = field(default_factory=set)
    _tensors: dict[str, Tensor] = field(default_factory=dict)
    # Operations that are kernel groups by themselves.
    _alone: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.constants.update(self.graph.constants)
        self._alone.update(
            group.name
            for group in self.graph.groups
            if len(group.ops) == 1 and len(group.ops[0].reads) == len(group.ops[0].inputs)
        )
        for op in self.graph.ops:
            self._tensors |= {tensor.name: tensor for tensor in (*op.reads, *op.writes)}
        self._names.update(self._tensors, self.graph.constants, (op.name for op in self.graph.ops))
        self._names.update(tensor.name for tensor in (*self.graph.inputs, *self.graph.outputs))

    def add_whole(self, op: Op) -> None:
        inputs: tuple[Tensor | None, ...]
        if op.kind == "Concat" and op.name in self._alone:
            inputs = tuple(tile for tensor in op.reads for tile in self._cut_as(op, tensor))
            if inputs != op.inputs:
                # The pieces of all lie one behind the other, if they can.
                self.joins.add(op.name)
        else:
            inputs = tuple(None if t is None else self._all_of(t) for t in op.inputs)
        if inputs == op.inputs:
            self.ops.append(op)
        else:
            self.ops.append(Op(op.name, op.kind, inputs, op.outputs, op.attributes, op.domain))

    def _cut_as(self, op: Op, tensor: Tensor) -> Sequence[Tensor]:
        """The pieces of a tensor, if they are cut along the axis that `op` concatenates along."""
        exit_ = self._exits.get(tensor.name)
        axis = int(op.attributes["axis"]) % len(tensor.shape)
        if exit_ is None or exit_.sum or [along for along, _ in exit_.axes] != [axis]:
            return (self._all_of(tensor),)
        return [
            self._slice(tensor.name, tile.tensor, tile.box, tile.region, tile.place)
            for tile in self._tiles[tensor.name]
        ]

    def add_split(self, which: int, item: Split) -> None:
        """All pieces, one after the other; first what earlier pieces hand to others."""
        inside = {t.name for op in self.graph.ops if op.name in set(item.ops) for t in op.writes}
        pieces = [_steps(self.graph, item, number, self.known) for number in range(item.pieces)]
        planned: set[object] = set()
        entries = []
        for steps in pieces:
            new = [step for step in steps if step.key not in planned]
            planned.update(step.key for step in new)
            entries.append(self._entries(new, inside))
        for number, taken in enumerate(entries):
            for name, region in taken:
                self._hand_over(self._tensors[name], region, number)
        computed: dict[object, list[Tensor | None]] = {}
        for exit_ in item.exits:
            self._exits[exit_.tensor] = exit_
        tiles: dict[str, list[_Tile]] = {exit_.tensor: [] for exit_ in item.exits}
        for number, steps in enumerate(pieces):
            place = which, number
            boxes: dict[str, list[tuple[Region, Tensor]]] = {}
            for name, region in entries[number]:
                taken_tensor = self._from_outside(self._tensors[name], region, place)
                boxes.setdefault(name, []).append((region, taken_tensor))
            for step in steps:
                if step.key not in computed:
                    computed[step.key] = self._compute(step, boxes, place)
                tensor, box = computed[step.key][step.index], step.piece.outputs[step.index]
                assert tensor is not None
                assert box is not None
                name = step.op.output(step.index).name
                tensor = self._slice(name, tensor, box, step.region, place)
                boxes.setdefault(name, []).append((step.region, tensor))
            for name, made in tiles.items():
                region = _share(self._exits[name], number, self._tensors[name].shape)
                box, tensor = _holding(boxes[name], region)
                made.append(_Tile(tensor, box, region, place))
        self._tiles |= tiles

    def _entries(self, steps: Sequence[_Step], inside: Container[str]) -> list[tuple[str, Region]]:
        """What steps read of tensors from outside, without what is in another region of the list.

        Constants are apart, as nothing has to be done to take them.
        """
        found: dict[str, list[Region]] = {}
        for step in steps:
            for name, region in step.reads():
                if name in inside or name in self.graph.constants:
                    continue
                others = found.setdefault(name, [])
                if not any(region in other for other in others):
                    others[:] = [*(other for other in others if other not in region), region]
        return [(name, region) for name, regions in found.items() for region in regions]

    def finish(self) -> Rewritten:
        for output in self.graph.outputs:
            tensor = self._all_of(output)
            if tensor.name != output.name:
                name = self._fresh(f"name {output.name}")
                self.ops.append(Op(name, "Identity", (tensor,), (output,)))
        read = {output.name for output in self.graph.outputs}
        ops: list[Op] = []
        whole = {op.name for op in self.graph.ops}
        for op in reversed(self.ops):
            # Of a tensor of which nobody reads a part, some pieces compute nothing.
            if op.name in whole or any(tensor.name in read for tensor in op.writes):
                ops.append(op)
                read.update(tensor.name for tensor in op.reads)
        graph = Graph(
            self.graph.name,
            tuple(reversed(ops)),
            self.graph.inputs,
            self.graph.outputs,
            {name: array for name, array in self.constants.items() if name in read},
            self.graph.opsets,
            self.graph.joins | self.joins,
        )
        kept = {op.name for op in ops}
        return Rewritten(graph, {n: place for n, place in self.places.items() if n in kept})

    def _compute(
        self, step: _Step, boxes: Mapping[str, Sequence[tuple[Region, Tensor]]], place: Place
    ) -> list[Tensor | None]:
        """Adds the operation of a step; what it writes, by output of the whole operation."""
        inputs: list[Tensor | None] = []
        for index, source in enumerate(step.piece.inputs):
            if isinstance(source, Read):
                tensor = step.op.input(source.place)
                if tensor.name in self.graph.constants:
                    inputs.append(self._weights(tensor, source.region))
                else:
                    box, made = _holding(boxes[tensor.name], source.region)
                    inputs.append(self._slice(tensor.name, made, box, source.region, place))
            elif source is None:
                inputs.append(None)
            else:
                inputs.append(self._constant(source, f"{step.op.name}.{index}"))
        count = len(step.op.outputs)
        if step.piece.kind == "Identity":
            return [inputs[0] if i == step.index else None for i in range(count)]
        name = self._fresh(f"{step.op.name}#{place[1]}")
        names = [
            self._fresh(f"{tensor.name}#{place[1]}") if tensor and region else ""
            for tensor, region in zip(step.op.outputs, step.piece.outputs, strict=True)
        ]
        op = self._add(_made(step, name, inputs, names), place)
        return [op.outputs[i] if i < len(op.outputs) else None for i in range(count)]

    def _from_outside(self, tensor: Tensor, region: Region, place: Place) -> Tensor:
        """A region of a tensor that is there whole, or in pieces."""
        if tensor.name in self._tiles:
            return self._from_tiles(tensor, region, place)
        return self._slice(tensor.name, tensor, Region.whole(tensor.shape), region, place)

    def _from_tiles(self, tensor: Tensor, region: Region, place: Place | None) -> Tensor:
        """A region of a tensor that is there in pieces, for a piece or for who reads it whole."""
        if (tensor.name, region) in self._joined:
            return self._joined[tensor.name, region]
        sources = [
            (part, self._slice(tensor.name, tile.tensor, tile.box, part, tile.place))
            for tile, part in self._sources(tensor.name, region, place)
        ]
        if len(sources) == 1:
            return sources[0][1]
        place = None if region.covers(tensor.shape) else place
        exit_ = self._exits[tensor.name]
        if exit_.sum:
            found = self._total(tensor, region, [source for _, source in sources], place)
            sources = [(region, found)]
        else:
            for axis, bounds in reversed(exit_.axes):
                first, last = region.intervals[axis]
                count = sum(low < last and first < high for low, high in pairwise(bounds))
                rows = (sources[i : i + count] for i in range(0, len(sources), count))
                sources = [self._concatenate(tensor, row, axis, place) for row in rows]
        self._joined[tensor.name, region] = sources[0][1]
        return sources[0][1]

    def _sources(
        self, name: str, region: Region, place: Place | None
    ) -> list[tuple[_Tile, Region]]:
        """The tiles that a region comes from, with what each gives, in the order of the pieces."""
        tiles = self._tiles[name]
        if self._exits[name].sum:
            return [(tile, region) for tile in tiles]
        holding = [tile for tile in tiles if region in tile.box]
        if holding:
            own = [tile for tile in holding if place and tile.place[1] == place[1]]
            return [((own or holding)[0], region)]
        parts = ((tile, tile.region & region) for tile in tiles)
        return [(tile, part) for tile, part in parts if part is not None]

    def _hand_over(self, tensor: Tensor, region: Region, number: int) -> None:
        """Cuts what a piece takes of pieces of other numbers, before any piece goes on."""
        if tensor.name in self._tiles and (tensor.name, region) not in self._joined:
            for tile, part in self._sources(tensor.name, region, (0, number)):
                if tile.place[1] != number:
                    self._slice(tensor.name, tile.tensor, tile.box, part, tile.place)

    def _all_of(self, tensor: Tensor) -> Tensor:
        """The whole tensor, under its own name unless one piece has made all of it."""
        if tensor.name not in self._tiles:
            return tensor
        return self._from_tiles(tensor, Region.whole(tensor.shape), None)

    def _slice(
        self, name: str, tensor: Tensor, box: Region, region: Region, place: Place
    ) -> Tensor:
        """A region of a tensor that has `box` of the one of this name; itself if that is all.

        Where it is all that a piece before made, it is taken from there.
        """
        if name in self._tiles and not self._exits[name].sum:
            tensor, box = next(
                ((tile.tensor, tile.box) for tile in self._tiles[name] if tile.box == region),
                (tensor, box),
            )
        local = region.within(box)
        axes = local.cuts(tensor.shape)
        if not axes:
            return tensor
        key = tensor.name, local
        if key in self._cut:
            return self._cut[key]
        firsts, lasts = zip(*(local.intervals[axis] for axis in axes), strict=True)
        label = self._fresh(name + _label(region, self._tensors[name].shape))
        inputs: list[Tensor | None] = [tensor]
        attributes = {}
        if self.known.opset < FIRST_OPSET_OF_SLICE_INPUTS:
            attributes = {"starts": firsts, "ends": lasts, "axes": axes}
        else:
            inputs += [self._constant(np.array(values), label) for values in (firsts, lasts, axes)]
        result = Tensor(label, local.shape, tensor.dtype)
        self._add(Op(label, "Slice", tuple(inputs), (result,), attributes), place)
        self._cut[key] = result
        return result

    def _concatenate(
        self,
        tensor: Tensor,
        parts: Sequence[tuple[Region, Tensor]],
        axis: int,
        place: Place | None,
    ) -> tuple[Region, Tensor]:
        """Regions that are next to each other along an axis as one."""
        if len(parts) == 1:
            return parts[0]
        region = reduce(or_, (part for part, _ in parts))
        sources = [source for _, source in parts]
        return region, self._join("Concat", tensor, region, sources, place, axis=axis)

    def _total(
        self, tensor: Tensor, region: Region, sources: Sequence[Tensor], place: Place | None
    ) -> Tensor:
        """The terms of a region added up: those of floats at once, as only these have a Sum."""
        if len(sources) == 2:
            return self._join("Add", tensor, region, sources, place)
        if tensor.dtype in ("float32", "float64"):
            return self._join("Sum", tensor, region, sources, place)
        total = sources[0]
        for source in sources[1:-1]:
            result = Tensor(self._fresh(f"{tensor.name}#sum"), region.shape, tensor.dtype)
            op = Op(self._fresh(f"join {result.name}"), "Add", (total, source), (result,))
            self.joins.add(op.name)
            total = self._add(op, place).output()
        return self._join("Add", tensor, region, [total, sources[-1]], place)

    def _join(
        self,
        kind: str,
        tensor: Tensor,
        region: Region,
        sources: Sequence[Tensor],
        place: Place | None,
        **attributes: int,
    ) -> Tensor:
        """The region, under the tensor's own name if it is all of it."""
        name = tensor.name
        if not region.covers(tensor.shape):
            name = self._fresh(name + _label(region, tensor.shape))
        result = Tensor(name, region.shape, tensor.dtype)
        name = self._fresh(f"join {name}")
        self.joins.add(name)
        return self._add(Op(name, kind, tuple(sources), (result,), attributes), place).output()

    def _weights(self, tensor: Tensor, region: Region) -> Tensor:
        """A region of a constant, whose memory is that of the whole."""
        if region.covers(tensor.shape):
            return tensor
        if (tensor.name, region) not in self._cut:
            name = self._fresh(tensor.name + _label(region, tensor.shape))
            self.constants[name] = self.graph.constants[tensor.name][region.slices]
            self._cut[tensor.name, region] = Tensor(name, region.shape, tensor.dtype)
        return self._cut[tensor.name, region]

    def _constant(self, array: np.ndarray, name: str) -> Tensor:
        """A constant of sizes or places; equal ones are one."""
        array = np.asarray(array)
        key = array.dtype.name, array.shape, array.tobytes()
        if key not in self._arrays:
            if array.size <= MOST_NAMED:
                name = f"{array.dtype.name}{array.tolist()}"
            name = self._fresh(name)
            self.constants[name] = array
            self._arrays[key] = Tensor(name, array.shape, array.dtype.name)
        return self._arrays[key]

    def _add(self, op: Op, place: Place | None) -> Op:
        self.ops.append(op)
        if place is not None:
            self.places[op.name] = place
        return op

    def _fresh(self, name: str) -> str:
        """The name, or with a number behind it where it is taken."""
        found, number = name, 1
        while found in self._names:
            found, number = f"{name}.{number}", number + 1
        self._names.add(found)
        return found


def _holding(boxes: Sequence[tuple[Region, Tensor]], region: Region) -> tuple[Region, Tensor]:
    """The smallest box that has all of the region."""
    return min((box for box in boxes if region in box[0]), key=lambda box: box[0].size)
