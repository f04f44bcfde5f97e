"""Devices that run one stage together, a request each in turn."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from math import inf, lcm

from hetsched.device import Device, Link
from hetsched.errors import InfeasiblePlan
from hetsched.plan import MOST_TURNS
from hetsched.system import System
from hetsched.tasks import Task, TaskGraph

# Requests until unlike devices begin again.
LONGEST_RING = 8
# Ways to put the units together that are listed, those of which are the same among them, and that
# are looked at.
MOST_LISTED = 10_000
MOST_TEAMS = 64

# Devices by name, each of its own unit; the first stands for all of them.
Team = tuple[str, ...]


@dataclass(frozen=True)
class Teams:
    """A machine whose devices are teams of those of `tasks`; as good as they can be, or better.

    A team has a task done in the time in which its members, each at its own pace, do one of it.
    Unlike members are not that quick with several tasks, so that what is found for `tasks` is to
    be judged again.
    """

    teams: tuple[Team, ...]
    tasks: TaskGraph

    def rings(self, tasks: TaskGraph, stages: Sequence[tuple[str, Sequence[str]]]) -> list[Team]:
        """The devices of each stage, in the order of the requests that they take; see `ring`.

        Raises
        ------
        InfeasiblePlan
            They take too many requests until all begin again.
        """
        team = {names[0]: names for names in self.teams}
        found = [ring(tasks, team[device], members) for device, members in stages]
        if lcm(*map(len, found)) > MOST_TURNS:
            raise InfeasiblePlan(f"stages begin again after more than {MOST_TURNS} requests")
        return found


def teams(tasks: TaskGraph, most: int = 0) -> Iterator[Teams]:
    """The machine with its units in teams of up to `most` (0: any number), in every other way.

    Units that cannot be told apart count once. Fewer teams come first; that all units are alone is
    left out.
    """
    units: dict[str, list[Device]] = {}
    for device in tasks.system.devices:
        units.setdefault(device.unit, []).append(device)
    kinds = [_kind(tasks, devices) for devices in units.values()]
    alike = [kinds.index(kind) for kind in kinds]
    seen: set[tuple[tuple[int, ...], ...]] = set()
    for groups in islice(_partitions(len(alike), most or len(alike)), MOST_LISTED):
        if len(groups) == len(alike):
            return
        key = tuple(sorted(tuple(alike[unit] for unit in group) for group in groups))
        if key not in seen:
            seen.add(key)
            if len(seen) > MOST_TEAMS:
                return
            parted = [[list(units.values())[unit] for unit in group] for group in groups]
            if (merged := _merged(tasks, parted)) is not None:
                yield merged


def ring(tasks: TaskGraph, team: Team, members: Sequence[str]) -> Team:
    """The devices of a team in the order of the requests that each takes, for these tasks.

    Each request goes to who is done first with it; of up to `LONGEST_RING` requests those that
    take the least time each.

    Examples
    --------
    >>> a, b = Device("a", "none"), Device("b", "none")
    >>> one = TaskGraph(System("s", (a, b), ()), (Task("t", {"a": 1.0, "b": 2.0}),), ())
    >>> ring(one, ("a", "b"), ["t"])
    ('a', 'a', 'b')
    """
    seconds = {
        name: tasks.system.device(name).launch_seconds
        + sum(tasks.task[task].seconds.get(name, inf) for task in members)
        for name in team
    }
    best, pace = team[:1], seconds[team[0]]
    done = dict.fromkeys(team, 0.0)
    taken: list[str] = []
    for count in range(1, LONGEST_RING + 1):
        name = min(team, key=lambda each: done[each] + seconds[each])
        done[name] += seconds[name]
        taken.append(name)
        if max(done.values()) / count < pace * (1 - 1e-9):
            best, pace = tuple(taken), max(done.values()) / count
    return best


def _kind(tasks: TaskGraph, devices: Sequence[Device]) -> tuple[object, ...]:
    """The same for two units that no plan can tell apart, but for their links to each other."""
    names = [device.name for device in tasks.system.devices]
    own = {device.name for device in devices}
    rows = []
    for device in devices:
        seconds = tuple(task.seconds.get(device.name) for task in tasks.tasks)
        ways = sorted(
            (link.seconds, link.bytes_per_second, link.source == device.name)
            for other in names
            if other not in own
            for pair in ((device.name, other), (other, device.name))
            if (link := tasks.system.link(*pair))
        )
        rows.append(
            (seconds, device.launch_seconds, device.memory_bytes, device.memory_space, tuple(ways))
        )
    return tuple(rows)


def _partitions(count: int, most: int) -> Iterator[list[list[int]]]:
    """Every way to part 0 .. count - 1 into groups of up to `most`, fewer groups first.

    Examples
    --------
    >>> list(_partitions(3, 2))
    [[[0, 1], [2]], [[0, 2], [1]], [[0], [1, 2]], [[0], [1], [2]]]
    """

    def further(groups: list[list[int]], item: int, wanted: int) -> Iterator[list[list[int]]]:
        if item == count:
            if len(groups) == wanted:
                yield [list(group) for group in groups]
            return
        for group in groups:
            if len(group) < most:
                group.append(item)
                yield from further(groups, item + 1, wanted)
                group.pop()
        if len(groups) < wanted:
            groups.append([item])
            yield from further(groups, item + 1, wanted)
            groups.pop()

    for wanted in range(1, count + 1):
        # What is too long to list is cut off by who asks.
        yield from further([], 0, wanted)


def _merged(tasks: TaskGraph, groups: Sequence[Sequence[Sequence[Device]]]) -> Teams | None:
    """Of each group of units a device; a unit that is alone keeps all devices that it has.

    None if nobody would be left for a task.
    """
    found: list[tuple[Device, Team]] = []
    for units in groups:
        if len(units) == 1:
            found += [(device, (device.name,)) for device in units[0]]
            continue
        members = tuple(min(unit, key=lambda device: _total(tasks, device)) for unit in units)
        # What takes least stands for the team: it can run most.
        first = min(members, key=lambda device: _total(tasks, device))
        names = (first.name, *(device.name for device in members if device != first))
        rate = sum(1 / d.launch_seconds if d.launch_seconds else inf for d in members)
        merged = replace(
            first,
            launch_seconds=1 / rate,
            memory_bytes=min(device.memory_bytes for device in members),
        )
        found.append((merged, names))
    team_of = {device.name: names for device, names in found}
    links = tuple(
        link
        for one, own in found
        for other, theirs in found
        if one is not other and (link := _link(tasks.system, own, theirs))
    )
    system = System(tasks.system.name, tuple(device for device, _ in found), links)
    merged_tasks = tuple(
        Task(
            task.name,
            {
                name: seconds
                for name, names in team_of.items()
                if (seconds := _together(task, names)) < inf
            },
            task.memory_bytes,
        )
        for task in tasks.tasks
    )
    if not all(task.seconds for task in merged_tasks):
        return None
    return Teams(tuple(team_of.values()), TaskGraph(system, merged_tasks, tasks.edges))


def _total(tasks: TaskGraph, device: Device) -> float:
    return sum(task.seconds.get(device.name, inf) for task in tasks.tasks)


def _together(task: Task, names: Team) -> float:
    """Seconds a request of the task by devices that all do it; infinite if one cannot."""
    seconds = [task.seconds.get(name, inf) for name in names]
    if inf in seconds:
        return inf
    return 1 / sum(1 / each for each in seconds) if all(seconds) else 0.0


def _link(system: System, own: Team, theirs: Team) -> Link | None:
    """The slowest of the links between two teams, which share what passes; None if one lacks."""
    links: list[Link] = []
    for source in own:
        for sink in theirs:
            link = system.link(source, sink)
            if link is None:
                return None
            links.append(link)
    share = max(len(own), len(theirs))
    return Link(
        own[0],
        theirs[0],
        max(link.seconds for link in links) / share,
        min(link.bytes_per_second for link in links) * share,
    )
