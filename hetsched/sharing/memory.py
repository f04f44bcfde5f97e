"""Tiles on one device, one after the other, so that less memory is held at once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from hetsched.errors import SplitRefused
from hetsched.graph import Graph
from hetsched.liveness import peak_nbytes
from hetsched.operation import flops, group_flops
from hetsched.region import Region
from hetsched.rewrite import redundancy, split
from hetsched.sharing.pieces import Layout, Walk, Way, nbytes_of
from hetsched.split import Split

# Rows and columns of an image.
IMAGE = Way((2, 3), 4)
LONGEST_RUN = 32


@dataclass(frozen=True, eq=False)
class _Step:
    """The groups from `first` on, tile after tile, or one group as it is.

    `extra_flops` are computed more than once, `nbytes` are held at most, by an estimate.
    """

    first: int
    extra_flops: float
    nbytes: int
    split: Split | None = None


@dataclass(frozen=True, eq=False)
class Tiling:
    """Runs of groups in grids of at most `most` rows and columns of tiles.

    Together they compute at most the share `extra` more than the graph.
    """

    graph: Graph
    most: tuple[int, int]
    extra: float

    def splits(self) -> tuple[Split, ...]:
        """Those that hold the least memory at once; none if nothing holds less than the graph.

        References
        ----------
        Zhao, Barijough and Gerstlauer, "DeepThings: distributed adaptive deep learning inference on
        resource-constrained IoT edge clusters", IEEE TCAD 37(11), 2018,
        https://doi.org/10.1109/TCAD.2018.2858384
        """
        steps = [self._steps(last) for last in range(1, len(self.graph.groups) + 1)]
        limits = sorted({step.nbytes for row in steps for step in row})
        best: tuple[int, tuple[Split, ...]] = peak_nbytes(self.graph), ()
        low, high = 0, len(limits)
        while low < high:
            middle = (low + high) // 2
            found = self._within(steps, limits[middle])
            if found is None:
                low = middle + 1
                continue
            high = middle
            peak = peak_nbytes(split(self.graph, found))
            if peak < best[0]:
                best = peak, found
        return best[1]

    @cached_property
    def _layout(self) -> Layout:
        return Layout(self.graph)

    @cached_property
    def _alive(self) -> list[int]:
        """The bytes that are there before each group, and at the end."""
        groups, reader = self.graph.groups, self._layout.last_reader
        change = [0] * (len(groups) + 2)
        born = {tensor.name: 0 for tensor in self.graph.inputs}
        born |= {t.name: i + 1 for i, group in enumerate(groups) for t in group.outputs}
        for name, index in born.items():
            last = reader.get(name, -1)
            if last >= index:
                change[index] += self._layout.tensors[name].nbytes
                change[last + 1] -= self._layout.tensors[name].nbytes
        alive = [0]
        for value in change:
            alive.append(alive[-1] + value)
        return alive[1:]

    def _steps(self, last: int) -> list[_Step]:
        """The ways to get to before group `last`."""
        group = self.graph.groups[last - 1]
        made = sum(tensor.nbytes for tensor in group.outputs)
        steps = [_Step(last - 1, 0.0, self._alive[last - 1] + made)]
        for rows in range(1, self.most[0] + 1):
            for columns in range(1, self.most[1] + 1):
                # Squares and bands.
                if rows * columns > 1 and (rows == columns or columns == 1):
                    steps += self._tiled(last, rows, columns)
        return steps

    def _tiled(self, last: int, rows: int, columns: int) -> list[_Step]:
        walk = Walk(self._layout, last, IMAGE, ([1.0] * rows, [1.0] * columns))
        steps: list[_Step] = []
        inside, extra, alone = 0, 0.0, 0
        for first in range(last - 1, max(-1, last - 1 - LONGEST_RUN), -1):
            group = self.graph.groups[first]
            behind = [self._held(needs) for needs in walk.needs]
            before = [{n: tuple(r) for n, r in needs.items()} for needs in walk.needs]
            try:
                shares = walk.take(first)
            except SplitRefused:
                break
            entering = [
                self._held({n: r for n, r in needs.items() if old.get(n) != tuple(r)})
                for needs, old in zip(walk.needs, before, strict=True)
            ]
            written = [
                sum(t.nbytes for t in group.outputs) * share
                for share in (shares if last - 1 != first else [0.0] * walk.pieces)
            ]
            inside = max(
                inside,
                *(int(max(a, c) + b) for a, b, c in zip(behind, entering, written, strict=True)),
            )
            work = group_flops(group)
            alone += work
            extra += (sum(shares) - 1) * work
            if extra > max(1, alone):
                break
            made = sum(
                nbytes_of(self._layout.tensors[name], region)
                for name, regions in walk.makes.items()
                for region in regions
            )
            nbytes = max(self._alive[first] + made + inside, self._alive[last] + made)
            steps.append(_Step(first, extra, nbytes, walk.split))
        return steps

    def _held(self, needs: Mapping[str, Sequence[Region]]) -> int:
        return sum(
            nbytes_of(self._layout.tensors[name], region)
            for name, regions in needs.items()
            for region in regions
        )

    def _within(self, steps: list[list[_Step]], limit: int) -> tuple[Split, ...] | None:
        """The splits of least extra work that hold at most `limit`, if it is allowed."""
        best: list[tuple[float, _Step | None] | None] = [(0.0, None)]
        for row in steps:
            found: tuple[float, _Step | None] | None = None
            for step in row:
                before = best[step.first]
                if before is None or step.nbytes > limit:
                    continue
                extra = before[0] + max(0.0, step.extra_flops)
                if found is None or extra < found[0]:
                    found = extra, step
            best.append(found)
        if best[-1] is None:
            return None
        splits: list[Split] = []
        place = len(steps)
        while place:
            state = best[place]
            assert state is not None
            assert state[1] is not None
            if state[1].split is not None:
                splits.append(state[1].split)
            place = state[1].first
        if self.extra_flops(splits) > self.extra:
            return None
        return tuple(reversed(splits))

    def extra_flops(self, splits: Sequence[Split]) -> float:
        """What is computed more than once, as a share of the whole graph; exact."""
        total = sum(map(group_flops, self.graph.groups))
        work = {op.name: flops(op) for op in self.graph.ops}
        extra = sum(
            redundancy(self.graph, item) * sum(work[name] for name in item.ops) for item in splits
        )
        return extra / total if total else 0.0
