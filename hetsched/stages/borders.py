"""Stages of a pipeline: borders between them, the table over borders, and the exact search.

A border is a set of tasks that holds, with each task, all that it reads from (an ideal of the
graph). Stages lie between borders that contain each other. Everything here is loops over arrays;
`pipeline.py` says what they are for.
"""

from typing import NamedTuple

import numpy as np
from numba import njit

ONE = np.uint64(1)
WORD = np.uint64(63)


class Family(NamedTuple):
    """Borders by size, the empty and the full one at the ends, and what lies within each.

    Sums are by kind of device, then border; a difference of two is the stage between them.
    """

    # (m, words) a bit for each task.
    bits: np.ndarray
    work: np.ndarray
    # How many tasks the kind cannot run.
    unable: np.ndarray
    # Inputs from the host, each at the first task that reads it, and results to the host.
    enter: np.ndarray
    leave: np.ndarray
    memory: np.ndarray
    # Tensors over the border, and their bytes: all of them, and those that surely go from the last
    # stage before it to the first one behind it.
    crossing: np.ndarray
    crossing_nbytes: np.ndarray
    sure: np.ndarray
    sure_nbytes: np.ndarray


class Machine(NamedTuple):
    """Kinds of devices; units of which none can be told from another are counted together.

    `used` is a number with a digit for each class of units: how many of it have a stage.
    """

    launch: np.ndarray
    limit: np.ndarray
    # What another unit of its class adds to `used`, and how many there are, and one more.
    stride: np.ndarray
    digits: np.ndarray
    states: int
    latency: np.ndarray
    per_byte: np.ndarray
    # A stage that is not the only one takes at least so long.
    least: float
    # No more stages than this.
    most: int


class Flow(NamedTuple):
    """Tensors, as `Traffic` has them; `entry` by kind of device."""

    producer: np.ndarray
    nbytes: np.ndarray
    first: np.ndarray
    readers: np.ndarray
    reads_first: np.ndarray
    reads: np.ndarray
    entry: np.ndarray
    entry_first: np.ndarray
    entry_reads: np.ndarray


@njit(cache=True, nogil=True)
def _has(bits: np.ndarray, border: int, task: int) -> bool:
    return bool((bits[border, task >> 6] >> (np.uint64(task) & WORD)) & ONE)


@njit(cache=True, nogil=True)
def _within(bits: np.ndarray, one: int, other: int) -> bool:
    word = 0
    while word < bits.shape[1] and not bits[one, word] & ~bits[other, word]:
        word += 1
    return bool(word == bits.shape[1])


@njit(cache=True, nogil=True)
def ideals(first: np.ndarray, predecessors: np.ndarray, limit: int) -> np.ndarray:
    """All borders by size, as bits; none if there are more than `limit`.

    Each comes from the one without its last task, so that none comes twice.
    """
    tasks = len(first) - 1
    words = tasks // 64 + 1
    bits = np.zeros((limit, words), np.uint64)
    last = np.full(limit, -1, np.int64)
    count, current = 1, 0
    while current < count:
        for task in range(last[current] + 1, tasks):
            ready = True
            for place in range(first[task], first[task + 1]):
                if not _has(bits, current, predecessors[place]):
                    ready = False
                    break
            if ready:
                if count == limit:
                    return bits[:0]
                bits[count] = bits[current]
                bits[count, task >> 6] |= ONE << (np.uint64(task) & WORD)
                last[count] = task
                count += 1
        current += 1
    return bits[:count]


@njit(cache=True, nogil=True)
def borders(bits: np.ndarray, flow: Flow) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Tensors and bytes over each border: all, and those between its two sides for sure.

    The stage before a border has one of its last tasks, and the stage behind one of the first
    tasks out of it; where either is known, what passes between them is sure.
    """
    count, tasks = len(bits), len(flow.reads_first) - 1
    crossing, crossing_nbytes = np.zeros(count), np.zeros(count)
    sure, sure_nbytes = np.zeros(count), np.zeros(count)
    tensors, nbytes = np.zeros(tasks), np.zeros(tasks)
    is_last = np.zeros(tasks, np.bool_)
    for border in range(count):
        lasts, firsts, last, head = 0, 0, -1, -1
        for task in range(tasks):
            is_last[task] = _has(bits, border, task)
        for tensor in range(len(flow.producer)):
            producer = flow.producer[tensor]
            if not _has(bits, border, producer):
                continue
            leaves = False
            for place in range(flow.first[tensor], flow.first[tensor + 1]):
                if _has(bits, border, flow.readers[place]):
                    is_last[producer] = False
                else:
                    leaves = True
            if leaves:
                crossing[border] += 1
                crossing_nbytes[border] += flow.nbytes[tensor]
        for task in range(tasks):
            if is_last[task]:
                lasts, last = lasts + 1, task
        least, least_nbytes = np.inf, np.inf
        for task in range(tasks):
            if _has(bits, border, task):
                continue
            ready, found, size = True, 0.0, 0.0
            for place in range(flow.reads_first[task], flow.reads_first[task + 1]):
                tensor = flow.reads[place]
                if not _has(bits, border, flow.producer[tensor]):
                    ready = False
                    break
                if flow.producer[tensor] == last:
                    found += 1
                    size += flow.nbytes[tensor]
            if ready:
                firsts, head = firsts + 1, task
                least, least_nbytes = min(least, found), min(least_nbytes, size)
        if lasts == 1 and firsts:
            sure[border], sure_nbytes[border] = least, least_nbytes
        elif firsts == 1:
            tensors[:] = 0
            nbytes[:] = 0
            for place in range(flow.reads_first[head], flow.reads_first[head + 1]):
                tensor = flow.reads[place]
                tensors[flow.producer[tensor]] += 1
                nbytes[flow.producer[tensor]] += flow.nbytes[tensor]
            least, least_nbytes = np.inf, np.inf
            for task in range(tasks):
                if is_last[task]:
                    least, least_nbytes = min(least, tensors[task]), min(least_nbytes, nbytes[task])
            if lasts:
                sure[border], sure_nbytes[border] = least, least_nbytes
    return crossing, crossing_nbytes, sure, sure_nbytes


@njit(cache=True, nogil=True)
def _stage(family: Family, machine: Machine, one: int, other: int, kind: int) -> float:
    """Seconds of the stage between two borders: its work, or the host's data if that is longer."""
    if family.unable[kind, other] != family.unable[kind, one]:
        return np.inf
    if family.memory[other] - family.memory[one] > machine.limit[kind]:
        return np.inf
    seconds = machine.launch[kind] + family.work[kind, other] - family.work[kind, one]
    if seconds < machine.least and (one > 0 or other < len(family.bits) - 1):
        return np.inf
    seconds = max(seconds, family.enter[kind, other] - family.enter[kind, one])
    return float(max(seconds, family.leave[kind, other] - family.leave[kind, one]))


@njit(cache=True, nogil=True)
def _link(machine: Machine, source: int, sink: int, tensors: float, nbytes: float) -> float:
    if tensors == 0:
        return 0.0
    return float(tensors * machine.latency[source, sink] + nbytes * machine.per_byte[source, sink])


@njit(cache=True, nogil=True)
def _free(machine: Machine, used: int, kind: int) -> int:
    """`used` with one more unit of the kind; -1 if there is none or all stages have been made."""
    if used // machine.stride[kind] % machine.digits[kind] == machine.digits[kind] - 1:
        return -1
    return int(used + machine.stride[kind])


@njit(cache=True, nogil=True)
def _stages_in(machine: Machine, used: int) -> int:
    total, before = 0, 0
    for kind in range(len(machine.stride)):
        # Kinds of one class follow each other.
        if machine.stride[kind] != before:
            total += used // machine.stride[kind] % machine.digits[kind]
            before = machine.stride[kind]
    return total


@njit(cache=True, nogil=True)
def table(
    family: Family, machine: Machine, bound: float, relay: bool, totals: bool
) -> tuple[float, np.ndarray, np.ndarray, np.ndarray]:
    """The best way on from each border, and the stages of the best way of all.

    `rest[border, kind, used]` is the bottleneck of all that follows a border behind a stage on
    `kind`; with `totals` the sum of its stages and transfers, none of which is above `bound`.
    What lies above `bound` is left out. Of transfers each adjacent pair of stages pays what surely
    passes between them, so that the bottleneck is a lower bound (and exact for chains and for two
    stages); with `relay` it pays all that crosses the border.

    Returns the value, `rest`, and the kinds and borders of the stages.
    """
    count, kinds, states = len(family.bits), len(machine.launch), machine.states
    full = count - 1
    rest = np.full((count, kinds, states), np.inf)
    rest[full] = 0.0
    onward = np.empty((kinds, states))
    last = np.empty(kinds)
    tensors = family.crossing if relay else family.sure
    nbytes = family.crossing_nbytes if relay else family.sure_nbytes
    after = np.empty((kinds, states), np.int64)
    number = np.empty(states, np.int64)
    # `rest` behind each state that can have a stage of the kind, side by side for the inner loop.
    room = np.zeros(kinds, np.int64)
    slots = np.empty((kinds, states), np.int64)
    behind = np.full((count, kinds, states), np.inf)
    reach = np.full((count, kinds), np.inf)
    values = np.empty((kinds, states))
    for used in range(states):
        number[used] = _stages_in(machine, used)
        for kind in range(kinds):
            after[kind, used] = -1
            if number[used] < machine.most:
                after[kind, used] = _free(machine, used, kind)
            if after[kind, used] >= 0:
                slots[kind, room[kind]] = used
                room[kind] += 1
    bits, launch = family.bits, machine.launch
    # By border, so that what is read together lies together.
    work, unable = family.work.T.copy(), family.unable.T.copy()
    enter, leave = family.enter.T.copy(), family.leave.T.copy()
    memory, limit, least = family.memory, machine.limit, machine.least
    nested = True
    for border in range(full):
        nested = nested and _within(family.bits, border, border + 1)
    for border in range(full - 1, -1, -1):
        onward[:] = np.inf
        values[:] = np.inf
        for other in range(border + 1, full):
            checked, near = nested, False
            for kind in range(kinds):
                # As `_stage` has it, but a call would cost more than all of this.
                seconds = launch[kind] + work[other, kind] - work[border, kind]
                if seconds > bound:
                    continue
                near = True
                if reach[other, kind] > bound or unable[other, kind] != unable[border, kind]:
                    continue
                if memory[other] - memory[border] > limit[kind] or seconds < least:
                    continue
                seconds = max(seconds, enter[other, kind] - enter[border, kind])
                seconds = max(seconds, leave[other, kind] - leave[border, kind])
                if seconds > bound:
                    continue
                if not checked:
                    if not _within(bits, border, other):
                        break
                    checked = True
                for slot in range(room[kind]):
                    value = behind[other, kind, slot]
                    if totals:
                        value += seconds
                    elif value < seconds:
                        value = seconds
                    if value < values[kind, slot]:
                        values[kind, slot] = value
            if nested and not near:
                # What contains a stage that is too long is too long.
                break
        for kind in range(kinds):
            for slot in range(room[kind]):
                onward[kind, slots[kind, slot]] = values[kind, slot]
        for kind in range(kinds):
            seconds = _stage(family, machine, border, full, kind)
            last[kind] = seconds if seconds <= bound else np.inf
        if border == 0:
            break
        for source in range(kinds):
            for used in range(1, states):
                if used // machine.stride[source] % machine.digits[source] == 0:
                    continue
                for kind in range(kinds):
                    if after[kind, used] < 0:
                        continue
                    move = _link(machine, source, kind, tensors[border], nbytes[border])
                    if move <= bound:
                        value = onward[kind, used]
                        value = value + move if totals else max(value, move)
                        rest[border, source, used] = min(rest[border, source, used], value)
                    if number[used] == 1:
                        # Two stages alone: all that crosses the border goes between them.
                        move = _link(
                            machine,
                            source,
                            kind,
                            family.crossing[border],
                            family.crossing_nbytes[border],
                        )
                    if move <= bound:
                        value = last[kind] + move if totals else max(last[kind], move)
                        rest[border, source, used] = min(rest[border, source, used], value)
        for kind in range(kinds):
            for slot in range(room[kind]):
                value = rest[border, kind, after[kind, slots[kind, slot]]]
                behind[border, kind, slot] = value
                if totals and value < np.inf:
                    value = 0.0
                reach[border, kind] = min(reach[border, kind], value)
    best = np.inf
    for kind in range(kinds):
        best = min(best, last[kind], onward[kind, 0])
    # The way that gave each value is found again, from the front.
    chosen = np.zeros(machine.most, np.int64)
    ends = np.zeros(machine.most, np.int64)
    made = 0
    if best == np.inf:
        return best, rest, chosen[:0], ends[:0]
    border, used, source, wanted = 0, 0, -1, best
    while border != full:
        found = False
        for other in range(full, border, -1):
            for kind in range(kinds):
                if after[kind, used] < 0:
                    continue
                seconds = _stage(family, machine, border, other, kind)
                if not seconds <= bound or not _within(family.bits, border, other):
                    continue
                move = 0.0
                if source >= 0:
                    move = _link(machine, source, kind, tensors[border], nbytes[border])
                    if other == full and number[used] == 1:
                        move = _link(
                            machine,
                            source,
                            kind,
                            family.crossing[border],
                            family.crossing_nbytes[border],
                        )
                if not move <= bound:
                    continue
                value = rest[other, kind, after[kind, used]]
                both = seconds + value + move if totals else max(max(seconds, value), move)
                if both == wanted:
                    found = True
                    wanted = value
                    used, source, border = after[kind, used], kind, other
                    chosen[made], ends[made] = kind, other
                    made += 1
                    break
            if found:
                break
        if not found:
            return np.inf, rest, chosen[:0], ends[:0]
    return best, rest, chosen[:made], ends[:made]


@njit(cache=True, nogil=True)
def _arrive(
    family: Family,
    machine: Machine,
    flow: Flow,
    stage: int,
    kinds: np.ndarray,
    path: np.ndarray,
    place: np.ndarray,
    seen: np.ndarray,
    loads: np.ndarray,
) -> tuple[float, int]:
    """The exact cost of the last of `stage + 1` stages, and how many steps it took to find.

    It ends at `path[stage + 1]`; `place` has the stage of all tasks before and gets that of its
    own. Each tensor comes once, over the link from the stage that wrote it.
    """
    one, other, kind = path[stage], path[stage + 1], kinds[stage]
    cost = _stage(family, machine, one, other, kind)
    steps = len(place) // 8 + 1
    loads[: stage + 1] = 0
    entering = 0.0
    for task in range(len(place)):
        if not _has(family.bits, other, task) or _has(family.bits, one, task):
            continue
        place[task] = stage
        for index in range(flow.reads_first[task], flow.reads_first[task + 1]):
            tensor = flow.reads[index]
            source = place[flow.producer[tensor]]
            if source != stage and seen[tensor] != other:
                seen[tensor] = other
                loads[source] += _link(machine, kinds[source], kind, 1.0, flow.nbytes[tensor])
        for index in range(flow.entry_first[task], flow.entry_first[task + 1]):
            tensor = flow.entry_reads[index]
            if seen[len(flow.producer) + tensor] != other:
                seen[len(flow.producer) + tensor] = other
                entering += flow.entry[tensor, kind]
        steps += 2 + flow.reads_first[task + 1] - flow.reads_first[task]
    # The same border may end the next stage that is tried.
    seen[:] = -1
    cost = max(cost, entering)
    for source in range(stage):
        cost = max(cost, loads[source])
    return cost, steps


@njit(cache=True, nogil=True)
def cost_of_stages(
    family: Family, machine: Machine, flow: Flow, kinds: np.ndarray, ends: np.ndarray
) -> float:
    """The bottleneck of stages on `kinds` that end at the borders `ends`."""
    place = np.zeros(len(flow.reads_first) - 1, np.int64)
    seen = np.full(len(flow.producer) + len(flow.entry), -1, np.int64)
    loads = np.zeros(len(kinds) + 1)
    path = np.zeros(len(kinds) + 1, np.int64)
    path[1:] = ends
    cost = 0.0
    for stage in range(len(kinds)):
        found, _ = _arrive(family, machine, flow, stage, kinds, path, place, seen, loads)
        cost = max(cost, found)
    return cost


@njit(cache=True, nogil=True)
def search(
    family: Family, machine: Machine, flow: Flow, rest: np.ndarray, bound: float, budget: int
) -> tuple[float, np.ndarray, np.ndarray, int]:
    """The stages of least bottleneck of all that are not above `bound`, and the budget left.

    The budget counts looks at tasks and borders; if none is left, better stages may exist. `rest`
    is a lower bound of what follows, as `table` made it with at least this `bound`.
    """
    count, kinds_there = len(family.bits), len(machine.launch)
    full = count - 1
    place = np.zeros(len(flow.reads_first) - 1, np.int64)
    seen = np.full(len(flow.producer) + len(flow.entry), -1, np.int64)
    loads = np.zeros(machine.most + 1)
    path = np.zeros(machine.most + 1, np.int64)
    kinds = np.zeros(machine.most + 1, np.int64)
    used = np.zeros(machine.most + 1, np.int64)
    reached = np.zeros(machine.most + 1)
    cursor = np.full(machine.most + 1, count * kinds_there - 1, np.int64)
    best = np.inf
    best_kinds, best_ends, best_count = kinds.copy(), path.copy(), 0
    stage = 0
    while stage >= 0 and budget > 0:
        budget -= 1
        choice = cursor[stage]
        if choice < (path[stage] + 1) * kinds_there:
            stage -= 1
            continue
        cursor[stage] -= 1
        border, kind = choice // kinds_there, choice % kinds_there
        behind = _free(machine, used[stage], kind)
        if behind < 0 or rest[border, kind, behind] > bound:
            continue
        if not _stage(family, machine, path[stage], border, kind) <= bound:
            continue
        if not _within(family.bits, path[stage], border):
            continue
        kinds[stage], path[stage + 1] = kind, border
        cost, steps = _arrive(family, machine, flow, stage, kinds, path, place, seen, loads)
        budget -= steps
        cost = max(cost, reached[stage])
        if not cost <= bound:
            continue
        if border == full:
            best, best_count = cost, stage + 1
            best_kinds[:] = kinds
            best_ends[:-1] = path[1:]
            bound = cost * (1 - 1e-12)
        elif stage + 1 < machine.most:
            stage += 1
            used[stage], reached[stage] = behind, cost
            cursor[stage] = count * kinds_there - 1
    return best, best_kinds[:best_count], best_ends[:best_count], budget
