"""From shared runs to a plan: candidates are priced as they are, and the simulator judges."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

from hetsched.cost import CostModel, Prices, price
from hetsched.device import Device
from hetsched.errors import InfeasiblePlan, SplitRefused, UnsupportedOperation
from hetsched.forms import packed
from hetsched.graph import Graph
from hetsched.partitioner import Partitioner, alone, quickest, scheduled
from hetsched.plan import Plan, simulate
from hetsched.plugin import load
from hetsched.rewrite import Rewritten, rewrite
from hetsched.sharing.pieces import Layout, Way
from hetsched.sharing.runs import Corrections, Run, Sharing
from hetsched.split import Split
from hetsched.system import System
from hetsched.target import Target

# How often the estimates are corrected by the prices of what they led to.
ROUNDS = 3
# Plans behind the best that are worth measuring.
NEXT_BEST = 2
# Rows or columns of images, rows of matrices and steps in time, or the batch.
TILES = (Way((2,), 4), Way((3,), 4), Way((1,), 3), Way((2,), 3), Way((0,)))


def channels(grain: int) -> tuple[Way, ...]:
    """Output channels of images, matrices and sequences, or the terms of a contraction."""
    places = ((1, 4), (2, 3), (1, 3), (1, 2))
    cuts = tuple(Way((axis,), rank, grain=grain) for axis, rank in places)
    return (*cuts, Way(sum=True, grain=grain))


@dataclass(frozen=True, eq=False)
class Search:
    """Looks for the plan of least makespan that shares runs of `graph` in ways of `menus`.

    At most `candidates` are priced. A plan with splits is preferred if it saves the share `gain`,
    and no run is shared whose pieces take less than `least_seconds`.
    """

    graph: Graph
    system: System
    prices: Prices
    menus: tuple[tuple[Way, ...], ...]
    spec: str
    candidates: int = 8
    gain: float = 0.02
    least_seconds: float = 0.0

    def plans(self) -> tuple[Plan, ...]:
        """The best, behind it the best of each kind of way by itself, and the next best of all.

        What data take from core to core may change from one minute to the next, and kinds differ in
        how much they hand over. Pieces are measured one plan after the other, so that a machine
        that wavers meanwhile may have made a good one look worse.

        Raises
        ------
        InfeasiblePlan
            Neither with splits nor without was a plan found that the devices can hold.
        """
        best = unsplit(self.graph, self.system, self.prices, self.spec)
        goal = simulate(best).makespan * (1 - self.gain)
        kinds, every = [], []
        for plan, ways in self._candidates():
            seconds = simulate(plan).makespan
            if len(self.menus) > 1 and ways in self.menus:
                kinds.append((seconds, plan))
            every.append((seconds, plan))
            if seconds < goal:
                best, goal = plan, seconds
        kinds.sort(key=lambda found: found[0])
        every.sort(key=lambda found: found[0])
        found = {plan.splits: plan for _, plan in (*kinds, *every[: 1 + NEXT_BEST])}
        return best, *(plan for splits, plan in found.items() if splits != best.splits)

    def _candidates(self) -> Iterator[tuple[Plan, tuple[Way, ...]]]:
        """Plans with different splits, each priced as it is, and the ways that were looked at."""
        devices = one_of_each_unit(self.graph, self.system, self.prices)
        if len(devices) < 2 or self.prices.source is None:
            return
        seen: list[tuple[Split, ...]] = []
        layout = Layout(self.graph, blocks(self.graph, devices))
        known: dict[tuple[str, Way], tuple[float, ...]] = {}
        best: tuple[float, Plan, list[Run]] | None = None
        # Each kind of way by itself, so that all are known by their prices when they compete.
        menus = [menu for menu in self.menus if len(self.menus) > 1]
        every = tuple(way for menu in self.menus for way in menu)
        for ways in (*menus, *(every for _ in range(ROUNDS))):
            sharing = Sharing(
                layout,
                self.system,
                self.prices,
                devices,
                ways,
                Corrections(known),
                self.least_seconds,
            )
            runs, estimate = sharing.cheapest()
            splits = tuple(run.split for run in runs)
            if len(seen) >= self.candidates:
                break
            if ways == every and best is not None and estimate >= best[0] * (1 - self.gain):
                # Corrected by the prices, nothing else looks better.
                break
            if not splits or splits in seen:
                continue
            seen.append(splits)
            found = self._planned(splits, devices)
            if found is None:
                continue
            plan, rewritten = found
            yield plan, ways
            seconds = simulate(plan).makespan
            if best is None or seconds < best[0]:
                best = seconds, plan, runs
            known |= _factors(runs, rewritten, plan.prices, devices)
        if best is not None:
            for plan in self._moved(best[0], best[1], best[2], devices, seen):
                yield plan, ()

    def _moved(
        self,
        best: float,
        plan: Plan,
        runs: list[Run],
        devices: tuple[Device, ...],
        seen: list[tuple[Split, ...]],
    ) -> Iterator[Plan]:
        """Plans with one bound moved by a grain at a time, while that is faster.

        Where devices are alike, one of two plans that only turn their shares round is enough.
        """
        alike = len({device.fingerprint for device in devices}) == 1
        splits = plan.splits
        for place in _heaviest(runs):
            for step in (-1, 1):
                while len(seen) < self.candidates:
                    moved = _shifted(splits[place], step * runs[place].way.grain)
                    if moved is None:
                        break
                    changed = (*splits[:place], moved, *splits[place + 1 :])
                    if changed in seen or (alike and tuple(map(_turned, changed)) in seen):
                        break
                    seen.append(changed)
                    found = self._planned(changed, devices)
                    if found is None:
                        break
                    yield found[0]
                    seconds = simulate(found[0]).makespan
                    # Two prices measured for the same work differ by a little.
                    if seconds >= best * (1 - self.gain):
                        break
                    best, splits = seconds, changed

    def _planned(
        self, splits: tuple[Split, ...], devices: tuple[Device, ...]
    ) -> tuple[Plan, Rewritten] | None:
        """The plan with these splits, piece by piece on `devices`; None if there is none."""
        try:
            rewritten = rewrite(self.graph, splits)
            return placed(
                rewritten, self.graph, self.system, self.prices, splits, devices, self.spec
            ), rewritten
        except (SplitRefused, UnsupportedOperation, InfeasiblePlan):
            return None


@dataclass(frozen=True)
class Shares(Partitioner):
    """A partitioner that shares runs of groups in some ways, with the options of the search."""

    splits = True
    candidates: int = 4
    gain: float = 0.02
    least_seconds: float = 5e-6

    @abstractmethod
    def menus(self) -> tuple[tuple[Way, ...], ...]:
        """How runs may be cut: the ways of each kind."""

    def partition(self, graph: Graph, system: System, costs: CostModel) -> Plan:
        return self.plans(graph, system, costs)[0]

    def plans(self, graph: Graph, system: System, costs: CostModel) -> tuple[Plan, ...]:
        return Search(
            graph,
            system,
            price(graph, system, costs),
            self.menus(),
            self.name,
            self.candidates,
            self.gain,
            self.least_seconds,
        ).plans()


def placed(
    rewritten: Rewritten,
    graph: Graph,
    system: System,
    prices: Prices,
    splits: Sequence[Split],
    devices: Sequence[Device],
    spec: str,
) -> Plan:
    """The plan of `graph` with `splits`, made already, piece by piece on `devices`.

    Raises
    ------
    UnsupportedOperation
        No device runs a piece.
    InfeasiblePlan
        A device cannot hold what is on it, or cannot run what is its own.
    """
    return scheduled(
        rewritten.graph,
        system,
        price(rewritten.graph, system, prices),
        spec,
        pins={name: devices[piece].name for name, (_, piece) in rewritten.places.items()},
        splits=splits,
        original=graph,
    )


def unsplit(graph: Graph, system: System, prices: Prices, spec: str) -> Plan:
    """The better of one device alone and of a list schedule.

    Raises
    ------
    InfeasiblePlan
        Neither fits.
    """
    single = (partial(alone, device.name, graph, system, prices, spec) for device in system.devices)
    return quickest([*single, partial(scheduled, graph, system, prices, spec)])


def blocks(graph: Graph, devices: Sequence[Device]) -> Mapping[str, int]:
    """The tensors that `devices` hand to each other in blocks of channels, and their channels."""
    lanes, *others = {load(Target, device.target).lanes(device) for device in devices}
    if others:
        return {}
    return dict.fromkeys(packed(graph, lanes), lanes) if lanes else {}


def one_of_each_unit(graph: Graph, system: System, prices: Prices) -> tuple[Device, ...]:
    """The device of each unit that runs most of the graph fastest: those that can share work."""
    chosen: dict[str, tuple[tuple[int, float], Device]] = {}
    for device in system.devices:
        rows = [prices.seconds[group.name] for group in graph.groups]
        able = [row[device.name] for row in rows if device.name in row]
        key = -len(able), sum(able)
        if device.unit not in chosen or key < chosen[device.unit][0]:
            chosen[device.unit] = key, device
    return tuple(device for _, device in chosen.values())


def _factors(
    runs: Sequence[Run], rewritten: Rewritten, prices: Prices, devices: tuple[Device, ...]
) -> dict[tuple[str, Way], tuple[float, ...]]:
    """By how much each group's pieces take longer than estimated before any correction.

    Devices that are alike have one factor, that of the longest piece: that one was measured to be
    a little slower than its equal is no reason to give it less.
    """
    priced: dict[tuple[int, str, int], float] = {}
    for group in rewritten.graph.groups:
        place = next((rewritten.places[n] for n in group.members if n in rewritten.places), None)
        if place is not None:
            key = place[0], group.name.partition("#")[0], place[1]
            seconds = prices.seconds[group.name].get(devices[place[1]].name, float("inf"))
            priced[key] = priced.get(key, 0.0) + seconds
    kinds = [device.fingerprint for device in devices]
    found: dict[tuple[str, Way], tuple[float, ...]] = {}
    for index, run in enumerate(runs):
        for name, estimates in run.work.items():
            factors = []
            for kind in kinds:
                alike = [place for place, other in enumerate(kinds) if other == kind]
                whole = max(estimates[place] for place in alike)
                took = max(priced.get((index, name, place), 0.0) for place in alike)
                factors.append(took / whole if whole and took else 1.0)
            if any((index, name, place) in priced for place in range(len(devices))):
                found[name, run.way] = tuple(factors)
    return found


def _heaviest(runs: Sequence[Run]) -> list[int]:
    """The places of the runs, those with the most work first."""
    return sorted(range(len(runs)), key=lambda place: -max(runs[place].seconds))


def _turned(item: Split) -> Split:
    """The split with the sizes of the pieces the other way round."""
    exits = (
        replace(
            exit_,
            axes=tuple(
                (axis, tuple(bounds[-1] - bound for bound in reversed(bounds)))
                for axis, bounds in exit_.axes
            ),
        )
        for exit_ in item.exits
    )
    return replace(item, exits=tuple(exits))


def _shifted(item: Split, step: int) -> Split | None:
    """The split with the bounds of all exits moved by `step`, in proportion to their sizes."""
    first = item.exits[0].axes[0][1][-1]
    exits = []
    for exit_ in item.exits:
        ((axis, bounds),) = exit_.axes
        by = step * bounds[-1] // first
        moved = (0, *(bound + by for bound in bounds[1:-1]), bounds[-1])
        if not by or not all(low < high for low, high in pairwise(moved)):
            return None
        exits.append(replace(exit_, axes=((axis, moved),)))
    return replace(item, exits=tuple(exits))
