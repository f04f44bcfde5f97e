"""Which runs of groups devices share, and along which axis: dynamic programming over the places
between groups. Work grows with the length of a run, and exchanges with the number of runs.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import median

from hetsched.cost import Prices
from hetsched.device import Device, Link
from hetsched.errors import SplitRefused
from hetsched.op import Tensor, can_adjoin
from hetsched.region import Region
from hetsched.sharing.pieces import Layout, Walk, Way, nbytes_of
from hetsched.split import Split
from hetsched.system import System

# Groups of one run, at most: other things end runs far earlier in most networks.
LONGEST_RUN = 64
# Groups whose times say how fast the devices are at what ends with them.
NEAR = 4


@dataclass(frozen=True, eq=False)
class Run:
    """The groups from `first` to before `last` in pieces, one for each device.

    `seconds` are estimates of the pieces, `needs` what they read of the tensors that enter the run,
    `makes` what they write of those that leave it. `work` is the estimate of each piece of a group
    before any correction.
    """

    first: int
    last: int
    way: Way
    split: Split
    seconds: tuple[float, ...]
    needs: tuple[Mapping[str, Sequence[Region]], ...]
    makes: Mapping[str, tuple[Region, ...]]
    work: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True)
class Corrections:
    """By what pieces take longer than their share of the group's time.

    `known` is by group and way, for each device; what is not known is taken to be as other groups
    are in this way, or in any.
    """

    known: Mapping[tuple[str, Way], tuple[float, ...]] = field(default_factory=dict)

    def of(self, group: str, way: Way, device: int) -> float:
        found = self.known.get((group, way)) or self._typical.get(way) or self._typical.get(None)
        return found[device] if found else 1.0

    @cached_property
    def _typical(self) -> Mapping[Way | None, tuple[float, ...]]:
        rows: dict[Way | None, list[tuple[float, ...]]] = {}
        for (_, way), row in self.known.items():
            for key in (way, None):
                rows.setdefault(key, []).append(row)
        return {way: tuple(map(median, zip(*found, strict=True))) for way, found in rows.items()}


# Where a tensor lies: on a device, in pieces, those of each device, or, None, in the host's memory.
Pieces = tuple[tuple[Region, ...], ...]
Place = str | Pieces | None


@dataclass(frozen=True, eq=False)
class _State:
    """The cheapest way so far to a place between groups; it may have ended with a run."""

    seconds: float
    places: Mapping[str, Place]
    before: "_State | None" = None
    run: Run | None = None


@dataclass(frozen=True, eq=False)
class Sharing:
    """The devices that may share the groups of a graph, one of each unit, and the ways to.

    `corrections` are of the estimates of a group's pieces. No run is shared whose pieces take less
    than `least_seconds`.
    """

    layout: Layout
    system: System
    prices: Prices
    devices: tuple[Device, ...]
    ways: tuple[Way, ...]
    corrections: Corrections
    least_seconds: float = 0.0

    def cheapest(self) -> tuple[list[Run], float]:
        """The runs of the least time, by an estimate in which one step follows the other."""
        graph = self.layout.graph
        start = _State(0.0, {tensor.name: None for tensor in graph.inputs})
        reached: list[dict[object, _State]] = [{"": start}]
        for last in range(1, len(graph.groups) + 1):
            found: dict[object, _State] = {}
            for key, before in reached[last - 1].items():
                viewed = self._viewed(before, last - 1)
                if viewed is not None:
                    _keep(found, key, viewed)
                    continue
                for device in self.devices:
                    _keep(found, device.name, self._whole(before, last - 1, device))
            for way in self.ways:
                for run in self.runs_ending(last, way):
                    work = max(run.seconds)
                    for before in reached[run.first].values():
                        if way not in found or before.seconds + work < found[way].seconds:
                            _keep(found, way, self._shared(before, run))
            reached.append(found)
        if not reached[-1]:
            return [], float("inf")
        results = {t.name: (Region.whole(t.shape),) for t in graph.outputs}
        seconds, state = min(
            (
                (state.seconds + self._entry(state, results, 0), state)
                for state in reached[-1].values()
            ),
            key=lambda found: found[0],
        )
        runs = []
        behind: _State | None = state
        while behind is not None:
            if behind.run is not None:
                runs.append(behind.run)
            behind = behind.before
        return runs[::-1], seconds

    def runs_ending(self, last: int, way: Way) -> Iterator[Run]:
        """The runs before group `last` that can be cut so, the shortest first."""
        walk = Walk(self.layout, last, way, [self._rates(last, way)])
        seconds = [0.0 for _ in self.devices]
        # What the whole of it takes on each device.
        alone = [0.0 for _ in self.devices]
        work: dict[str, tuple[float, ...]] = {}
        for first in range(last - 1, max(-1, last - 1 - LONGEST_RUN), -1):
            group = self.layout.graph.groups[first]
            row = self.prices.seconds[group.name]
            if not all(device.name in row for device in self.devices):
                return
            try:
                shares = walk.take(first)
            except SplitRefused:
                return
            prices = [row[device.name] for device in self.devices]
            work[group.name] = tuple(p * share for p, share in zip(prices, shares, strict=True))
            for place, estimate in enumerate(work[group.name]):
                seconds[place] += estimate * self.corrections.of(group.name, way, place)
                alone[place] += prices[place]
            if min(alone) <= max(seconds):
                return
            if max(seconds) >= self.least_seconds:
                needs = tuple(
                    {name: tuple(regions) for name, regions in needs.items()}
                    for needs in walk.needs
                )
                yield Run(
                    first,
                    last,
                    way,
                    walk.split,
                    tuple(seconds),
                    needs,
                    dict(walk.makes),
                    dict(work),
                )

    def _rates(self, last: int, way: Way) -> list[float]:
        """How fast each device is at the groups before `last` so cut, in proportion."""
        totals = [0.0] * len(self.devices)
        for group in self.layout.graph.groups[max(0, last - NEAR) : last]:
            row = self.prices.seconds[group.name]
            if all(device.name in row for device in self.devices):
                for place, device in enumerate(self.devices):
                    factor = self.corrections.of(group.name, way, place)
                    totals[place] += row[device.name] * factor
        return [1.0 / total for total in totals] if all(totals) else [1.0] * len(totals)

    def _whole(self, before: _State, index: int, device: Device) -> _State:
        """A group on one device."""
        group = self.layout.graph.groups[index]
        work = self.prices.seconds[group.name].get(device.name, float("inf"))
        wanted = {tensor.name: (Region.whole(tensor.shape),) for tensor in group.inputs}
        seconds = before.seconds + work + self._entry(before, wanted, self.devices.index(device))
        made = dict.fromkeys((tensor.name for tensor in group.outputs), device.name)
        return _State(seconds, self._alive({**before.places, **made}, index + 1), before)

    def _viewed(self, before: _State, index: int) -> _State | None:
        """A concatenation of tensors some of which are in pieces that can lie behind each other."""
        group = self.layout.graph.groups[index]
        op = group.ops[0]
        if len(group.ops) > 1 or op.kind != "Concat":
            return None
        there = [before.places.get(tensor.name) for tensor in op.reads]
        whole, axis = op.output(), int(op.attributes["axis"]) % len(op.output().shape)
        if len(op.reads) < len(op.inputs) or None in there:
            return None
        found: list[list[Region]] = [[] for _ in self.devices]
        start = 0
        for tensor, place in zip(op.reads, there, strict=True):
            pieces: Pieces
            if isinstance(place, tuple):
                pieces = place
            else:
                complete = (Region.whole(tensor.shape),)
                pieces = tuple(complete if d.name == place else () for d in self.devices)
            for mine, parts in zip(found, pieces, strict=True):
                mine.extend(part.shifted(axis, start) for part in parts)
            start += tensor.shape[axis]
        places = tuple(map(tuple, found))
        in_pieces = any(isinstance(place, tuple) for place in there)
        if not in_pieces or not _adjoin(whole, places):
            return None
        return _State(
            before.seconds, self._alive({**before.places, whole.name: places}, index + 1), before
        )

    def _shared(self, before: _State, run: Run) -> _State:
        """A run on all devices."""
        ends = [
            device.launch_seconds
            + self._entry(before, run.needs[place], place)
            + seconds * self.system.slowdown
            for place, (device, seconds) in enumerate(zip(self.devices, run.seconds, strict=True))
        ]
        seconds = before.seconds + max(ends)
        places: dict[str, Place] = dict(before.places)
        places |= {name: tuple((part,) for part in parts) for name, parts in run.makes.items()}
        if run.way.sum:
            # One device adds the terms up.
            (name,) = run.makes
            nbytes = self.layout.tensors[name].nbytes
            reads = len(self.devices) + 1
            seconds += self._link(0, nbytes) + reads * nbytes / self.devices[0].bytes_per_second
            for tensor in self.layout.graph.groups[run.last - 1].outputs:
                places[tensor.name] = self.devices[0].name
        return _State(seconds, self._alive(places, run.last), before, run)

    def _alive(self, places: Mapping[str, Place], index: int) -> Mapping[str, Place]:
        reader = self.layout.last_reader
        return {name: place for name, place in places.items() if reader.get(name, -1) >= index}

    def _entry(self, before: _State, wanted: Mapping[str, Sequence[Region]], place: int) -> float:
        """The seconds until the regions `wanted` are on a device, each in one piece."""
        device, moved, copied = self.devices[place], 0, 0
        for name, regions in wanted.items():
            tensor = self.layout.tensors[name]
            there = before.places.get(name)
            if not isinstance(there, tuple):
                nbytes = sum(nbytes_of(tensor, region) for region in regions)
                moved += nbytes if there not in (None, device.name) else 0
                copied += sum(
                    nbytes_of(tensor, region)
                    for region in regions
                    if not region.covers(tensor.shape)
                )
                continue
            for region in regions:
                if region in there[place]:
                    continue
                nbytes = nbytes_of(tensor, region)
                moved += nbytes
                for own in there[place]:
                    both = own & region
                    moved -= nbytes_of(tensor, both) if both else 0
                if not (region.covers(tensor.shape) and _adjoin(tensor, there)):
                    copied += nbytes
        seconds = 2 * copied / device.bytes_per_second
        return seconds + (self._link(place, moved) if moved else 0.0)

    def _link(self, place: int, nbytes: int) -> float:
        """The slowest way to bring so much to a device from any other."""
        return max(
            (
                link.transfer_seconds(nbytes) if link else float("inf")
                for link in self._links[place]
            ),
            default=0.0,
        )

    @cached_property
    def _links(self) -> list[list[Link | None]]:
        return [
            [self.system.link(other.name, sink.name) for other in self.devices if other != sink]
            for sink in self.devices
        ]


def _adjoin(tensor: Tensor, pieces: Pieces) -> bool:
    """Whether the pieces of a tensor lie one behind the other in its memory."""
    regions = sorted({part for parts in pieces for part in parts}, key=lambda part: part.intervals)
    axes = {axis for region in regions for axis in region.cuts(tensor.shape)}
    return len(axes) == 1 and can_adjoin(
        tensor.shape, min(axes), [nbytes_of(tensor, r) for r in regions]
    )


def _keep(found: dict[object, _State], key: object, state: _State) -> None:
    known = found.get(key)
    if state.seconds < (known.seconds if known else float("inf")):
        found[key] = state
