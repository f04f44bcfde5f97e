"""A checker of schedules that shares no code with the scheduler which it judges.

It knows raw facts alone (numbers, names and pairs of names) and reads a schedule's slots and
transfers one by one.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

HOST = "host"
# Of the makespan: sums of floats in another order differ in the last digits.
ROUNDING = 1e-9


@dataclass(frozen=True)
class Facts:
    """What a schedule has to respect.

    `seconds` are by task, then device; a pair that is missing cannot run. `edges` are source,
    sink, tensor and bytes, where None is the host. `links` are seconds of latency and bytes per
    second by ordered pair. `unit`, `space` and `limit` are by device, in order of preference.
    """

    seconds: Mapping[str, Mapping[str, float]]
    memory: Mapping[str, float]
    edges: Sequence[tuple[str | None, str | None, str, int]]
    links: Mapping[tuple[str, str], tuple[float, float]]
    unit: Mapping[str, str]
    space: Mapping[str, str]
    limit: Mapping[str, float]

    @property
    def host(self) -> str | None:
        """The device whose links serve the host's memory."""
        return next((name for name, space in self.space.items() if space == HOST), None)


@dataclass(frozen=True)
class Violation:
    kind: str
    message: str


def violations(facts: Facts, schedule: Any) -> list[Violation]:
    """All that is wrong with `schedule`; none for a right one."""
    slack = ROUNDING * max(
        [1e-12, *(slot.finish for slot in schedule.slots), *(m.finish for m in schedule.transfers)]
    )
    return [
        *_tasks(facts, schedule, slack),
        *_overlaps(facts, schedule, slack),
        *_edges(facts, schedule, slack),
        *_strays(facts, schedule),
        *_memory(facts, schedule),
    ]


def _tasks(facts: Facts, schedule: Any, slack: float) -> Iterator[Violation]:
    times = Counter(slot.task for slot in schedule.slots)
    for task in facts.seconds:
        if times[task] != 1:
            kind = "twice" if times[task] else "lost"
            yield Violation(kind, f"{task} runs {times[task]} times")
    for task in times.keys() - facts.seconds.keys():
        yield Violation("stray", f"{task} is no task")
    for slot in schedule.slots:
        if slot.start < -slack:
            yield Violation("start", f"{slot.task} starts at {slot.start}")
        needed = facts.seconds.get(slot.task, {}).get(slot.device)
        if needed is None:
            yield Violation("device", f"{slot.task} cannot run on {slot.device}")
        elif not abs(slot.finish - slot.start - needed) <= slack:
            yield Violation(
                "duration", f"{slot.task} takes {slot.finish - slot.start}, not {needed}"
            )


def _overlaps(facts: Facts, schedule: Any, slack: float) -> Iterator[Violation]:
    by_unit: dict[str, list[Any]] = {}
    for slot in schedule.slots:
        by_unit.setdefault(facts.unit.get(slot.device, slot.device), []).append(slot)
    for unit, slots in by_unit.items():
        slots.sort(key=lambda slot: (slot.start, slot.finish))
        free, holder = 0.0, ""
        for slot in slots:
            if slot.start < free - slack:
                yield Violation("overlap", f"{slot.task} starts while {holder} holds {unit}")
            if slot.finish > free:
                free, holder = slot.finish, slot.task


def _edges(facts: Facts, schedule: Any, slack: float) -> Iterator[Violation]:
    slots = {slot.task: slot for slot in schedule.slots}
    for source, sink, tensor, nbytes in facts.edges:
        if (source and source not in slots) or (sink and sink not in slots):
            continue
        there = slots[source].finish if source else 0.0
        needed = slots[sink].start if sink else float("inf")
        before = slots[source].device if source else None
        behind = slots[sink].device if sink else None
        if before == behind or _in_host_memory(facts, before, behind):
            if needed < there - slack:
                yield Violation("precedence", f"{sink} starts before {source} has finished")
            continue
        link = facts.links.get((before or facts.host or "", behind or facts.host or ""))
        if link is None:
            yield Violation("link", f"no link takes '{tensor}' from {before} to {behind}")
            continue
        latency, rate = link
        least = latency + nbytes / rate
        if needed < there + least - slack:
            yield Violation("precedence", f"{sink} starts before '{tensor}' can be there")
        moves = [
            move
            for move in schedule.transfers
            if (move.tensor, move.source, move.sink) == (tensor, before, behind)
        ]
        if not moves:
            yield Violation("transfer missing", f"nothing takes '{tensor}' to {behind}")
        for move in moves:
            if move.nbytes < nbytes or move.finish - move.start < least - slack:
                yield Violation("transfer short", f"'{tensor}' to {behind} needs {least}")
            if move.start < there - slack:
                yield Violation("transfer early", f"'{tensor}' leaves before it is written")
            if move.finish > needed + slack:
                yield Violation("transfer late", f"{sink} does not wait for '{tensor}'")


def _in_host_memory(facts: Facts, before: str | None, behind: str | None) -> bool:
    """Whether the host and a device that computes in its memory exchange data."""
    if before and behind:
        return False
    return facts.space.get(before or behind or "", HOST) == HOST


def _strays(facts: Facts, schedule: Any) -> Iterator[Violation]:
    placed = {slot.task: slot.device for slot in schedule.slots}
    needed = {
        (tensor, placed.get(source) if source else None, placed.get(sink) if sink else None)
        for source, sink, tensor, _ in facts.edges
    }
    times = Counter((move.tensor, move.source, move.sink) for move in schedule.transfers)
    for (tensor, before, behind), count in times.items():
        if count > 1:
            yield Violation("transfer twice", f"'{tensor}' goes to {behind} {count} times")
        if (tensor, before, behind) not in needed:
            yield Violation("stray", f"nobody needs '{tensor}' from {before} on {behind}")


def _memory(facts: Facts, schedule: Any) -> Iterator[Violation]:
    held: Counter[str] = Counter()
    for slot in schedule.slots:
        held[slot.device] += facts.memory.get(slot.task, 0)
    for device, nbytes in held.items():
        if nbytes > facts.limit.get(device, float("inf")):
            yield Violation(
                "memory", f"{device} holds {nbytes}, its limit is {facts.limit[device]}"
            )


def array_violations(problem: Any, solution: Any) -> Counter[str]:
    """How often each rule is broken by a device and a start for each task, in whole arrays.

    Of the problem it reads the raw arrays alone. A million tasks take seconds.
    """
    found: Counter[str] = Counter()
    tasks, devices = problem.seconds.shape
    device, start = np.asarray(solution.device), np.asarray(solution.start)
    if device.shape != (tasks,) or start.shape != (tasks,):
        return Counter(lost=1)
    placed = (device >= 0) & (device < devices)
    found["lost"] = int((~placed | ~np.isfinite(start)).sum())
    if found["lost"]:
        return +found
    rows = np.arange(tasks)
    seconds = problem.seconds[rows, device]
    found["device"] = int((~np.isfinite(seconds)).sum())
    if found["device"]:
        return +found
    finish = start + seconds
    end = (finish + problem.exit[rows, device]).max(initial=0.0)
    slack = ROUNDING * max(1e-12, end)
    found["start"] = int((start < -slack).sum())
    found["makespan"] = int(not abs(solution.makespan - end) <= slack)
    found["entry"] = int((start < problem.entry[rows, device] - slack).sum())
    held = np.bincount(device, problem.memory, devices)
    found["memory"] = int((held > problem.limit).sum())
    found["overlap"] = _lane_overlaps(problem.unit[device], start, finish, slack)

    source, sink = problem.source, problem.sink
    here, there = device[source], device[sink]
    crosses = here != there
    way = np.where(crosses, problem.latency[here, there], 0.0)
    found["link"] = int((~np.isfinite(way)).sum())
    way += np.where(crosses, problem.nbytes * problem.per_byte[here, there], 0.0)
    found["precedence"] = int((finish[source] + way > start[sink] + slack).sum())
    if problem.contention and not found["link"]:
        sent = np.asarray(solution.sent)[crosses]
        found["transfer missing"] = int((~np.isfinite(sent)).sum())
        sent = np.nan_to_num(sent)
        found["transfer early"] = int((sent < finish[source[crosses]] - slack).sum())
        late = sent + way[crosses] > start[sink[crosses]] + slack
        found["transfer late"] = int(late.sum())
        # A tensor goes to a device once, whoever reads it there.
        key = problem.tensor[crosses] * devices + there[crosses]
        _, first, which = np.unique(key, return_index=True, return_inverse=True)
        found["transfer twice"] = int((sent != sent[first][which]).sum())
        lane = (here * devices + there)[crosses][first]
        until = (sent + way[crosses])[first]
        busy = way[crosses][first] > 0
        found["link overlap"] = _lane_overlaps(lane[busy], sent[first][busy], until[busy], slack)
    return +found


def _lane_overlaps(lane: np.ndarray, start: np.ndarray, finish: np.ndarray, slack: float) -> int:
    """How many start before all earlier ones of their lane have finished."""
    count = 0
    for one in np.unique(lane):
        own = np.flatnonzero(lane == one)
        own = own[np.lexsort((finish[own], start[own]))]
        busy = np.maximum.accumulate(finish[own])
        count += int((start[own][1:] < busy[:-1] - slack).sum())
    return count
