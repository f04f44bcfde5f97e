"""A lower bound by refutation: if nothing can end by T, then T is a bound.

`refuted(problem, upper, effort) -> Bound`

For a given T each task has, on each device, a window from its earliest start to its latest finish,
and loses the device where the window is too short. Windows shrink by what edges, units and memory
demand, and by the price of the work; then each task is tried on each of its devices, and keeps
what some trial leaves (shaving, or singleton consistency). A task without a device refutes T.
Trials are not nested and nothing is searched, so that a T takes polynomial time.

References
----------
Martin and Shmoys, "A new approach to computing optimal schedules for the job-shop scheduling
problem", IPCO 1996, https://doi.org/10.1007/3-540-61310-2_29
Carlier and Pinson, "Adjustment of heads and tails for the job-shop problem", European Journal of
Operational Research 78, 1994, https://doi.org/10.1016/0377-2217(94)90379-4
Vilim, "O(n log n) filtering algorithms for unary resource constraint", CPAIOR 2004,
https://doi.org/10.1007/978-3-540-24664-0_23
"""

from typing import NamedTuple

import numpy as np
from numba import njit

from hetsched.bounds import Bound, heads, lower_bound, tails
from hetsched.problem import Problem
from hetsched.schedulers._gaps import inner

# Effort that takes about that long.
A_SECOND = 6e8
# Of T: windows that are shorter than a task by less are not, since sums of floats differ.
ROUNDING = 1e-11
# Of a makespan: what is refuted up to this below it has it as its bound.
EQUAL = 5e-10
# How near to each other, as a share, the refuted and the kept T end.
FINE = 2e-3
# The work is priced in windows that begin and end at some quantiles of the tasks' windows; prices
# are bettered so often each time that they are asked.
QUANTILES = 3
WINDOWS = QUANTILES * QUANTILES
STEPS = 6


class Frame(NamedTuple):
    """What does not change while a T is examined.

    Edges of one pair of tasks are one, of `delay` (m, p, p); `into` and `out` say, as in
    `Problem`, where the edges of a task stand. `behind` has the edges by source.
    """

    seconds: np.ndarray
    source: np.ndarray
    sink: np.ndarray
    delay: np.ndarray
    into: np.ndarray
    out: np.ndarray
    behind: np.ndarray
    unit: np.ndarray
    units: int
    memory: np.ndarray
    limit: np.ndarray


class State(NamedTuple):
    """What is left of each task on each device: (n, p) whether, from when and until when."""

    may: np.ndarray
    start: np.ndarray
    finish: np.ndarray


def refuted(problem: Problem, upper: float = np.inf, effort: float = A_SECOND) -> Bound:
    """`lower_bound(problem, upper)`, and the largest T that was refuted.

    With the makespan of a known schedule as `upper` fewer T are tried, and where all below are
    refuted the bound equals it. `effort` limits the work, by the cube of the tasks for each time
    that windows are shrunk, and nothing beside `lower_bound` from 800 tasks on.
    Deterministic.
    """
    light = lower_bound(problem, upper)
    least = light.seconds
    if not np.isfinite(least) or least >= upper or not 0 < problem.tasks**3 < effort:
        return light
    frame = frame_of(problem)
    head, tail = heads(problem), tails(problem)
    spent = np.zeros(1)
    known = np.isfinite(upper)
    if not known:
        # One task after the other, with all moves between, would end by then.
        longest = sum(
            np.where(np.isfinite(array), array, 0.0).max(axis=axis).sum()
            for array, axis in (
                (problem.seconds, 1),
                (frame.delay, (1, 2)),
                (problem.entry, 1),
                (problem.exit, 1),
            )
        )
        upper = max(1.1 * least, 1e-3 * longest)
        while _refuted(frame, head, tail, upper, spent, effort):
            if upper >= longest:
                return Bound({**light.values, "refutation": float("inf")})
            least, upper = upper, 1.1 * upper
    while upper - least > FINE * upper and spent[0] < effort:
        middle = 0.5 * (least + upper)
        if _refuted(frame, head, tail, middle, spent, effort):
            least = middle
        else:
            upper, known = middle, False
    if known and _refuted(frame, head, tail, upper * (1 - EQUAL), spent, effort):
        least = upper * (1 - EQUAL)
    return Bound({**light.values, "refutation": least})


def frame_of(problem: Problem) -> Frame:
    """The edges of a problem as shrinking wants them."""
    devices = len(problem.unit)
    pairs, which = np.unique(
        np.stack([problem.sink, problem.source], 1), axis=0, return_inverse=True
    )
    each = problem.latency + problem.per_byte * problem.nbytes[:, None, None]
    each[:, np.arange(devices), np.arange(devices)] = 0.0
    delay = np.zeros((len(pairs), devices, devices))
    np.maximum.at(delay, which.reshape(-1), each)
    sink, source = np.ascontiguousarray(pairs[:, 0]), np.ascontiguousarray(pairs[:, 1])
    behind = np.argsort(source, kind="stable").astype(np.int64)
    tasks = np.arange(problem.tasks + 1)
    return Frame(
        seconds=problem.seconds,
        source=source,
        sink=sink,
        delay=delay,
        into=np.searchsorted(sink, tasks).astype(np.int64),
        out=np.searchsorted(source[behind], tasks).astype(np.int64),
        behind=behind,
        unit=problem.unit,
        units=int(problem.unit.max()) + 1,
        memory=problem.memory,
        limit=problem.limit,
    )


@njit(cache=True, nogil=True)
def _refuted(
    f: Frame, head: np.ndarray, tail: np.ndarray, end: float, spent: np.ndarray, effort: float
) -> bool:
    """Whether nothing can end by `end`, as far as trials show."""
    tasks, devices = f.seconds.shape
    slack = ROUNDING * end
    may = np.zeros((tasks, devices), np.bool_)
    start, finish = head.copy(), np.empty((tasks, devices))
    for i in range(tasks):
        for q in range(devices):
            finish[i, q] = end - tail[i, q]
            may[i, q] = start[i, q] + f.seconds[i, q] <= finish[i, q] + slack
    state = State(may, start, finish)
    prices = np.full((WINDOWS, f.units), 1.0 / f.units)
    if not _shrink(f, state, slack, prices, spent):
        return True
    return not _shave(f, state, slack, prices, spent, effort)


@inner
def _shave(
    f: Frame, state: State, slack: float, prices: np.ndarray, spent: np.ndarray, effort: float
) -> bool:
    """Each task is tried on each device; it keeps what some trial leaves. False: none does."""
    tasks, devices = f.seconds.shape
    trial = State(state.may.copy(), state.start.copy(), state.finish.copy())
    union = State(state.may.copy(), state.start.copy(), state.finish.copy())
    idle = 0
    while idle < tasks:
        for i in range(tasks):
            idle += 1
            if idle > tasks or spent[0] >= effort:
                return True
            if _choices(state, i) < 2:
                continue
            union.may[:] = False
            union.start[:] = np.inf
            union.finish[:] = -np.inf
            for q in range(devices):
                if not state.may[i, q]:
                    continue
                _copy(state, trial)
                trial.may[i] = False
                trial.may[i, q] = True
                if _shrink(f, trial, slack, prices, spent):
                    _unite(union, trial)
            if not _choices(union, i):
                return False
            if _narrow(state, union, slack):
                if not _shrink(f, state, slack, prices, spent):
                    return False
                idle = 0
    return True


@inner
def _copy(source: State, sink: State) -> None:
    """By loops: to assign one array to another takes Numba longer to compile than all of this."""
    tasks, devices = source.may.shape
    for i in range(tasks):
        for q in range(devices):
            sink.may[i, q] = source.may[i, q]
            sink.start[i, q] = source.start[i, q]
            sink.finish[i, q] = source.finish[i, q]


@inner
def _choices(state: State, i: int) -> int:
    """The number of devices that task i may be on."""
    count = 0
    for q in range(state.may.shape[1]):
        count += state.may[i, q]
    return count


@inner
def _unite(union: State, trial: State) -> None:
    """Adds to `union` what `trial` leaves."""
    tasks, devices = union.may.shape
    for i in range(tasks):
        for q in range(devices):
            if trial.may[i, q]:
                union.may[i, q] = True
                union.start[i, q] = min(union.start[i, q], trial.start[i, q])
                union.finish[i, q] = max(union.finish[i, q], trial.finish[i, q])


@inner
def _narrow(state: State, union: State, slack: float) -> bool:
    """Takes over what `union` leaves; whether that is less by something that counts."""
    tasks, devices = union.may.shape
    less = False
    for i in range(tasks):
        for q in range(devices):
            if not state.may[i, q]:
                continue
            if not union.may[i, q]:
                state.may[i, q] = False
                less = True
                continue
            room = state.finish[i, q] - state.start[i, q]
            if union.finish[i, q] - union.start[i, q] < 0.98 * room - slack:
                less = True
            state.start[i, q] = max(state.start[i, q], union.start[i, q])
            state.finish[i, q] = min(state.finish[i, q], union.finish[i, q])
    return less


@inner
def _shrink(f: Frame, state: State, slack: float, prices: np.ndarray, spent: np.ndarray) -> bool:
    """Shrinks windows until nothing changes much; False where a task has no device left."""
    spent[0] += len(f.seconds) ** 3
    for _ in range(8):
        changed = _along_edges(f, state, slack)
        if changed >= 0:
            for unit in range(f.units):
                one = _on_unit(f, state, unit, slack)
                changed = -1 if one < 0 else changed | one
                if changed < 0:
                    break
        if changed == 0:
            changed = _priced(f, state, slack, prices)
            if changed == 0:
                fits: bool = _held(f, state)
                return fits
        if changed < 0:
            return False
    return True


@inner
def _held(f: Frame, state: State) -> bool:
    """Whether each device can hold what runs nowhere else."""
    tasks, devices = f.seconds.shape
    for q in range(devices):
        held = 0.0
        for i in range(tasks):
            if state.may[i, q] and _choices(state, i) == 1:
                held += f.memory[i]
        if held > f.limit[q] * (1 + ROUNDING):
            return False
    return True


@inner
def _keep(f: Frame, state: State, i: int, slack: float) -> int:
    """Takes from task i the devices where it has no room; -1 if none is left, 1 if some went."""
    changed, left = 0, 0
    for q in range(f.seconds.shape[1]):
        if state.may[i, q]:
            if state.start[i, q] + f.seconds[i, q] > state.finish[i, q] + slack:
                state.may[i, q] = False
                changed = 1
            else:
                left += 1
    return changed if left else -1


@inner
def _along_edges(f: Frame, state: State, slack: float) -> int:
    """Starts from sources, then finishes from sinks; -1 where a task has no device left, else
    whether a window shrank.

    What a task reads has come from another device by the time of the move, or its source ran on
    the same device: those sources that cannot have come from elsewhere ran there one by one.
    """
    tasks, devices = f.seconds.shape
    degree = 1
    for i in range(tasks):
        degree = max(degree, f.into[i + 1] - f.into[i], f.out[i + 1] - f.out[i])
    # Of each neighbour: the bound from elsewhere, and its window's bound and seconds if here.
    away, here, work = np.empty(degree), np.empty(degree), np.empty(degree)
    changed = 0
    for step in range(2 * tasks):
        forward = step < tasks
        i = step if forward else 2 * tasks - 1 - step
        first, last = (f.into[i], f.into[i + 1]) if forward else (f.out[i], f.out[i + 1])
        if first == last and not forward:
            continue
        for q in range(devices):
            if not state.may[i, q]:
                continue
            count = last - first
            for k in range(count):
                edge = first + k if forward else f.behind[first + k]
                other = f.source[edge] if forward else f.sink[edge]
                away[k] = np.inf
                for r in range(devices):
                    if r != q and state.may[other, r]:
                        if forward:
                            value = state.start[other, r] + f.seconds[other, r]
                            value += f.delay[edge, r, q]
                        else:
                            value = f.seconds[other, r] - state.finish[other, r]
                            value += f.delay[edge, q, r]
                        away[k] = min(away[k], value)
                here[k], work[k] = np.inf, 0.0
                if state.may[other, q]:
                    here[k] = state.start[other, q] if forward else -state.finish[other, q]
                    work[k] = f.seconds[other, q]
            bound = _earliest(away, here, work, count)
            if forward and bound > state.start[i, q] + slack:
                state.start[i, q] = bound
                changed = 1
            elif not forward and -bound < state.finish[i, q] - slack:
                state.finish[i, q] = -bound
                changed = 1
        kept = _keep(f, state, i, slack)
        if kept < 0:
            return -1
        changed |= kept
    return changed


@inner
def _earliest(away: np.ndarray, here: np.ndarray, work: np.ndarray, count: int) -> float:
    """The least start behind all neighbours, each from elsewhere by `away`, or one by one here.

    For a start s those with away > s are here: of the neighbours by falling `away` the first few.
    """
    for k in range(1, count):
        at = k
        while at > 0 and away[at - 1] < away[at]:
            for values in (away, here, work):
                values[at - 1], values[at] = values[at], values[at - 1]
            at -= 1
    best = np.inf
    # Those here, in order of when they can start.
    order = np.empty(count, np.int64)
    for taken in range(count + 1):
        if taken:
            k = taken - 1
            if here[k] == np.inf:
                break
            at = k
            while at > 0 and here[order[at - 1]] > here[k]:
                order[at] = order[at - 1]
                at -= 1
            order[at] = k
        time = -np.inf
        for at in range(taken):
            time = max(time, here[order[at]]) + work[order[at]]
        best = min(best, max(time, away[taken]) if taken < count else time)
        if taken < count and time >= away[taken]:
            break
    return best


@inner
def _ascending(values: np.ndarray, count: int) -> np.ndarray:
    """The first `count` positions by value; few, so by insertion."""
    order = np.empty(count, np.int64)
    for k in range(count):
        at = k
        while at > 0 and values[order[at - 1]] > values[k]:
            order[at] = order[at - 1]
            at -= 1
        order[at] = k
    return order


@inner
def _on_unit(f: Frame, state: State, unit: int, slack: float) -> int:
    """Tasks of a unit run one by one: -1 where that is impossible, else whether windows shrank.

    Sets of tasks that run nowhere else, with all their windows inside of one interval, leave no
    room for another task between, so that it comes before or behind them (edge-finding); and two
    tasks that have room in one order only are in that order.
    """
    tasks, devices = f.seconds.shape
    # Tasks of this unit alone: the windows over its devices, and the least seconds.
    own = np.empty(tasks, np.int64)
    begin, end, least = np.empty(tasks), np.empty(tasks), np.empty(tasks)
    count = 0
    for i in range(tasks):
        only = True
        low, high, work = np.inf, -np.inf, np.inf
        for q in range(devices):
            if state.may[i, q]:
                if f.unit[q] != unit:
                    only = False
                    break
                low, high = min(low, state.start[i, q]), max(high, state.finish[i, q])
                work = min(work, f.seconds[i, q])
        if only:
            own[count] = i
            begin[count], end[count], least[count] = low, high, work
            count += 1
    if not count:
        return 0
    by_begin, by_end = _ascending(begin, count), _ascending(end, count)
    changed = 0
    for i in range(tasks):
        touched = False
        for q in range(devices):
            if f.unit[q] != unit or not state.may[i, q]:
                continue
            seconds = f.seconds[i, q]
            start, finish = state.start[i, q], state.finish[i, q]
            # Those that cannot come behind i, one by one, and mirrored.
            time = -np.inf
            for k in by_begin:
                if own[k] != i and start + seconds > end[k] - least[k] + slack:
                    time = max(time, begin[k]) + least[k]
            start = max(start, time)
            time = np.inf
            for at in range(count - 1, -1, -1):
                k = by_end[at]
                if own[k] != i and begin[k] + least[k] > finish - seconds + slack:
                    time = min(time, end[k]) - least[k]
            finish = min(finish, time)
            # Sets with windows inside of [a, b]: i before all of them, or behind.
            for a in by_begin:
                low, work = begin[a], 0.0
                for b in by_end:
                    if own[b] == i or begin[b] < low:
                        continue
                    work += least[b]
                    high = end[b]
                    if min(low, start) + work + seconds > high + slack:
                        start = max(start, low + work)
                        if low + work > high + slack:
                            return -1
            for at in range(count - 1, -1, -1):
                high, work = end[by_end[at]], 0.0
                for back in range(count - 1, -1, -1):
                    k = by_begin[back]
                    if own[k] == i or end[k] > high:
                        continue
                    work += least[k]
                    low = begin[k]
                    if max(high, finish) - work - seconds < low - slack:
                        finish = min(finish, high - work)
            if start > state.start[i, q] + slack or finish < state.finish[i, q] - slack:
                touched = True
                state.start[i, q] = max(state.start[i, q], start)
                state.finish[i, q] = min(state.finish[i, q], finish)
        if touched:
            changed = 1
            if _keep(f, state, i, slack) < 0:
                return -1
    return changed


@inner
def _priced(f: Frame, state: State, slack: float, prices: np.ndarray) -> int:
    """What work is worth in some intervals at prices of the units: -1 where the units have less.

    In an interval [a, b] a task needs what its window leaves it no way to do outside. With prices
    y that sum to 1 the least worth of all tasks is at most the sum of y (b - a), and a device where
    a task would make it more is none for the task. Prices follow the loads that they give rise to.
    """
    tasks, devices = f.seconds.shape
    units = f.units
    low, high = np.full(tasks, np.inf), np.full(tasks, -np.inf)
    first, last = np.full(units, np.inf), np.full(units, -np.inf)
    for i in range(tasks):
        for q in range(devices):
            if state.may[i, q]:
                u = f.unit[q]
                low[i], high[i] = min(low[i], state.start[i, q]), max(high[i], state.finish[i, q])
                first[u], last[u] = (
                    min(first[u], state.start[i, q]),
                    max(last[u], state.finish[i, q]),
                )
    by_low, by_high = _ascending(low, tasks), _ascending(high, tasks)
    room, load, trial = np.empty(units), np.empty(units), np.empty(units)
    needs = np.zeros((tasks, devices))
    changed = 0
    for window in range(WINDOWS):
        a = low[by_low[(window // QUANTILES) * tasks // (QUANTILES + 1)]]
        b = high[by_high[tasks - 1 - (window % QUANTILES) * tasks // (QUANTILES + 1)]]
        for u in range(units):
            room[u] = max(0.0, min(b, last[u]) - max(a, first[u]))
        for i in range(tasks):
            for q in range(devices):
                if state.may[i, q]:
                    u = f.unit[q]
                    work = f.seconds[i, q]
                    need = min(state.start[i, q] + work - max(a, first[u]), room[u])
                    need = min(need, min(b, last[u]) - state.finish[i, q] + work)
                    needs[i, q] = max(0.0, min(need, work))
        longest = max(slack, 1e-300)
        for u in range(units):
            longest = max(longest, room[u])
        best = -np.inf
        for u in range(units):
            trial[u] = prices[window, u]
        for step in range(STEPS):
            worth = 0.0
            load[:] = 0.0
            for u in range(units):
                worth -= trial[u] * room[u]
            for i in range(tasks):
                least, where = np.inf, 0
                for q in range(devices):
                    if state.may[i, q] and trial[f.unit[q]] * needs[i, q] < least:
                        least, where = trial[f.unit[q]] * needs[i, q], q
                worth += least
                load[f.unit[where]] += needs[i, where]
            if worth > best:
                best = worth
                for u in range(units):
                    prices[window, u] = trial[u]
            if worth > slack:
                return -1
            total = 0.0
            for u in range(units):
                full = (load[u] - room[u]) / longest
                trial[u] *= np.exp(max(-1.0, min(1.0, full)) / (1 + step))
                trial[u] = max(trial[u], 1e-6)
                total += trial[u]
            for u in range(units):
                trial[u] /= total
        for i in range(tasks):
            least = np.inf
            for q in range(devices):
                if state.may[i, q]:
                    least = min(least, prices[window, f.unit[q]] * needs[i, q])
            for q in range(devices):
                worth = prices[window, f.unit[q]] * needs[i, q]
                if state.may[i, q] and best - least + worth > slack:
                    state.may[i, q] = False
                    changed = 1
    return changed
