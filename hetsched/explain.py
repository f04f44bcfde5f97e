"""Why a plan is as it is: for each node what else there was, and for each part what ended it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from hetsched.errors import InfeasiblePlan, PlanError
from hetsched.plan import Recipe
from hetsched.tasks import Edge, memory_bytes


@dataclass(frozen=True)
class Alternative:
    """A node on one device: the seconds that it takes there alone, or why it cannot run.

    `transfer_seconds` is what crosses a border for it there, everything else staying. `change` is
    how much longer the whole run takes with the node there, and `obstacle` why there is no such
    run.
    """

    device: str
    seconds: float | None = None
    refusal: str = ""
    transfer_seconds: float | None = None
    change: float | None = None
    obstacle: str = ""


@dataclass(frozen=True)
class Explanation:
    """A node of a plan where it is, its alternatives in the system's order, and the reason."""

    node: str
    part: str
    device: str
    alternatives: tuple[Alternative, ...]
    reason: str

    @property
    def chosen(self) -> Alternative:
        return next(item for item in self.alternatives if item.device == self.device)


@dataclass(frozen=True)
class Border:
    """Why a part begins where it does: its first node, and what it waits for or hands over to."""

    part: str
    device: str
    first: str
    reason: str


class Account:
    """What can be said of one plan, by its prices alone: nothing is measured or compiled."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._tasks = recipe.tasks
        self._placement = dict(recipe.placement)
        self._part = {name: part for part, _, members in recipe.parts for name in members}

    @cached_property
    def makespan(self) -> float:
        return self._recipe.simulate().makespan

    def nodes(self) -> tuple[str, ...]:
        """All nodes, in the order of the plan."""
        return tuple(self._part)

    def explanation(self, node: str) -> Explanation:
        """
        Raises
        ------
        PlanError
            There is no such node; the message has those of similar names.
        """
        if node not in self._part:
            raise PlanError(_unknown(node, self.nodes()))
        found = tuple(self._alternative(node, device.name) for device in self._tasks.system.devices)
        device = self._placement[node]
        reason = self._reason(device, {item.device: item for item in found})
        if ring := self._recipe.replicas.get(device):
            reason += f"; {', '.join(map(repr, ring))} run it in turn"
        return Explanation(node, self._part[node], device, found, reason)

    def borders(self) -> tuple[Border, ...]:
        """What made each part a part of its own."""
        found = []
        last: dict[str, str] = {}
        for part, device, members in self._recipe.parts:
            unit = self._tasks.system.device(device).unit
            reason = self._border(part, device, members, last.get(unit))
            found.append(Border(part, device, members[0], reason))
            last[unit] = part
        return tuple(found)

    def _alternative(self, node: str, device: str) -> Alternative:
        seconds = self._tasks.task[node].seconds.get(device)
        if seconds is None:
            refusal = self._recipe.refusals.get(node, {}).get(device, "it has no price there")
            return Alternative(device, refusal=refusal)
        crossing = sum(self._crossing(edge, node, device) for edge in self._edges(node))
        try:
            change = self._moved(node, device)
        except InfeasiblePlan as error:
            return Alternative(device, seconds, "", crossing, obstacle=str(error))
        return Alternative(device, seconds, "", crossing, change)

    def _edges(self, node: str) -> tuple[Edge, ...]:
        return (*self._tasks.incoming[node], *self._tasks.outgoing[node])

    def _crossing(self, edge: Edge, node: str, device: str) -> float:
        """The transfer of an edge of `node`, were it on `device`."""
        place = self._placement | {node: device}
        ends = (edge.source and place[edge.source], edge.sink and place[edge.sink])
        return self._tasks.transfer_seconds(edge.nbytes, *ends)

    def _moved(self, node: str, device: str) -> float:
        """How much longer the run takes with `node` alone on `device`."""
        if device == self._placement[node]:
            return 0.0
        recipe = moved(self._recipe, node, device)
        held = memory_bytes(self._tasks, recipe.placement)[device]
        limit = self._tasks.system.device(device).memory_bytes
        if held > limit:
            raise InfeasiblePlan(
                f"'{device}' would hold {held / 1e6:.3f} MB and has {limit / 1e6:.3f} MB"
            )
        return recipe.simulate().makespan - self.makespan

    def _reason(self, device: str, found: Mapping[str, Alternative]) -> str:
        able = {name: item for name, item in found.items() if item.seconds is not None}
        if len(able) == 1:
            return f"only '{device}' can run it"
        chosen = able[device]
        others = [item for name, item in able.items() if name != device]
        best = min(others, key=lambda item: float("inf") if item.change is None else item.change)
        quickest = min(others, key=lambda item: item.seconds or 0.0)
        assert chosen.seconds is not None
        assert quickest.seconds is not None
        faster = chosen.seconds < quickest.seconds
        alone = f"it runs fastest on '{device}'"
        if chosen.seconds == quickest.seconds:
            alone = f"it is as fast on '{device}' as on '{quickest.device}'"
        elif not faster:
            alone = f"it runs faster on '{quickest.device}'"
        if best.change is None:
            return f"{alone}; no other device can take it: {best.obstacle}"
        where = f"'{best.device}'"
        if best.change < 0:
            return (
                f"{alone}; by these prices it would do better on {where}, by "
                f"{-best.change * 1e6:.1f} us of the whole run"
            )
        if best.change == 0:
            return f"{alone}; the run would end at the same time with it on {where}"
        return f"{alone}; on {where} the run would take {best.change * 1e6:.1f} us longer"

    def _border(self, part: str, device: str, members: tuple[str, ...], before: str | None) -> str:
        if before is None:
            return f"the first on '{device}'"
        owner = self._part
        for node in members:
            for edge in self._tasks.incoming[node]:
                if edge.source and self._placement[edge.source] != device:
                    source = owner[edge.source]
                    return (
                        f"it waits for '{edge.tensor or edge.source}', "
                        f"which {source} makes on '{self._placement[edge.source]}'"
                    )
        previous = next(names for name, _, names in self._recipe.parts if name == before)
        for node in previous:
            for edge in self._tasks.outgoing[node]:
                if edge.sink and self._placement[edge.sink] != device:
                    sink = owner[edge.sink]
                    return (
                        f"{before} hands '{edge.tensor or node}' over to {sink} "
                        f"on '{self._placement[edge.sink]}' before it"
                    )
        other = self._placement[previous[0]]
        if other != device:
            return f"{before} holds the same cores as '{other}'"
        return f"it runs behind what stands between it and {before} in the plan's order"


def moved(recipe: Recipe, node: str, device: str) -> Recipe:
    """The same order with `node` on `device`; where it was and where it comes, parts are cut."""
    parts: list[tuple[str, str, tuple[str, ...]]] = []
    for name, own, members in recipe.parts:
        if node not in members:
            parts.append((name, own, members))
            continue
        at = members.index(node)
        pieces = (members[:at], (node,), members[at + 1 :])
        for index, (names, where) in enumerate(zip(pieces, (own, device, own), strict=True)):
            if names:
                parts.append((f"{name}.{index}", where, names))
    return replace(recipe, parts=tuple(parts))


def _unknown(node: str, nodes: tuple[str, ...]) -> str:
    like = [name for name in nodes if node.lower() in name.lower()] or list(nodes)
    shown = ", ".join(like[:5]) + (", ..." if len(like) > 5 else "")
    return f"no node '{node}' in the plan; there are {shown}"


@dataclass(frozen=True)
class Move:
    """A node that two plans place differently, with its seconds at each place."""

    node: str
    before: str
    after: str
    before_seconds: float
    after_seconds: float


@dataclass(frozen=True)
class Difference:
    """What two plans do not have in common; makespans are predicted, in seconds.

    `only_before` and `only_after` are nodes of one plan alone, as where a split differs;
    `repriced` are nodes and devices whose price changed, with both seconds; `order_changed` tells
    of the nodes of both.
    """

    makespans: tuple[float, float]
    parts: tuple[int, int]
    moves: tuple[Move, ...]
    only_before: tuple[str, ...]
    only_after: tuple[str, ...]
    repriced: tuple[tuple[str, str, float, float], ...]
    order_changed: bool
    facts: Mapping[str, tuple[str, str]]

    @property
    def empty(self) -> bool:
        return not (
            self.moves
            or self.only_before
            or self.only_after
            or self.repriced
            or self.order_changed
            or self.facts
            or self.parts[0] != self.parts[1]
        )


def difference(before: Recipe, after: Recipe, facts: Mapping[str, tuple[str, str]]) -> Difference:
    """What differs from `before` to `after`; of `facts`, by name, those that are not the same."""
    one, other = before.placement, after.placement
    common = [name for name in one if name in other]
    old, new = before.tasks.task, after.tasks.task
    return Difference(
        makespans=(before.simulate().makespan, after.simulate().makespan),
        parts=(len(before.parts), len(after.parts)),
        moves=tuple(
            Move(
                name,
                one[name],
                other[name],
                old[name].seconds[one[name]],
                new[name].seconds[other[name]],
            )
            for name in common
            if one[name] != other[name]
        ),
        only_before=tuple(name for name in one if name not in other),
        only_after=tuple(name for name in other if name not in one),
        repriced=tuple(
            (name, device, seconds, new[name].seconds[device])
            for name in common
            for device, seconds in old[name].seconds.items()
            if device in new[name].seconds and new[name].seconds[device] != seconds
        ),
        order_changed=common != [name for name in other if name in one],
        facts={name: pair for name, pair in facts.items() if pair[0] != pair[1]},
    )
