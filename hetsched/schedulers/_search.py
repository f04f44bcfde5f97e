"""Local search over devices and order: tasks are taken out and put back where they fit best."""

from typing import NamedTuple

import numpy as np
from numba import njit

from hetsched.problem import Problem

# How likely a step takes one task more, and then what: a neighbour in the graph, a critical task,
# else one nearby in the order. How likely all it takes go to one device, and how likely one more.
GROW = 0.7
ALONG, CRITICAL = 0.8, 0.9
TOGETHER, GROW_TOGETHER = 0.2, 0.9
MOST = 32
# What the price of work counts beside the length of a path: where a task goes, and whether a
# change is kept.
PULL, WEIGHT = 10.0, 1.0

# For functions that only other compiled ones call. None of them makes an array, so none counts who
# holds which; that, and what a call hands over, took longer than what they do.
inner = njit(
    cache=True,
    nogil=True,
    no_cpython_wrapper=True,
    no_cfunc_wrapper=True,
    forceinline=True,
    _nrt=False,
)


class Padded(NamedTuple):
    """A problem as the loops read it, with a device more, the last: nowhere.

    A task that has been taken out is nowhere: it holds no unit, takes its least seconds, and what
    it exchanges arrives at once, so that the order of all others still respects it.
    """

    seconds: np.ndarray
    # Where the edges into each task begin, and their sources and bytes; the same for out of it.
    into: np.ndarray
    source: np.ndarray
    into_nbytes: np.ndarray
    out: np.ndarray
    sink: np.ndarray
    out_nbytes: np.ndarray
    latency: np.ndarray
    per_byte: np.ndarray
    entry: np.ndarray
    exit: np.ndarray
    unit: np.ndarray
    memory: np.ndarray
    limit: np.ndarray


def padded(problem: Problem) -> Padded:
    """Linear in tasks and edges, times devices."""
    n = problem.tasks
    out, edges = problem.outgoing
    return Padded(
        np.column_stack([problem.seconds, problem.seconds.min(1, initial=np.inf)]),
        problem.incoming,
        problem.source,
        problem.nbytes,
        out,
        problem.sink[edges],
        problem.nbytes[edges],
        np.pad(problem.latency, (0, 1)),
        np.pad(problem.per_byte, (0, 1)),
        np.column_stack([problem.entry, np.zeros(n)]),
        np.column_stack([problem.exit, np.zeros(n)]),
        np.append(problem.unit, problem.unit.max(initial=-1) + 1),
        problem.memory,
        np.append(problem.limit, np.inf),
    )


class State(NamedTuple):
    """A schedule: tasks in a topological order, each with a device, as soon as it can."""

    order: np.ndarray
    # Of each task in the order.
    position: np.ndarray
    device: np.ndarray
    finish: np.ndarray
    # From the finish of each task to the end of the run.
    tail: np.ndarray
    # row[u, :counts[u]] are the tasks of unit u in order.
    row: np.ndarray
    counts: np.ndarray
    # What depends on a task that is looked at, and what it depends on.
    below: np.ndarray
    above: np.ndarray


@njit(cache=True, nogil=True)
def new_state(order: np.ndarray, device: np.ndarray, units: int) -> State:
    n = len(order)
    position = np.empty(n, np.int64)
    for k in range(n):
        position[order[k]] = k
    return State(
        order.copy(),
        position,
        device.copy(),
        np.zeros(n),
        np.zeros(n),
        np.zeros((units, n), np.int64),
        np.zeros(units, np.int64),
        np.zeros(n, np.bool_),
        np.zeros(n, np.bool_),
    )


@inner
def copy(source: State, sink: State) -> None:
    for k in range(len(source.order)):
        sink.order[k] = source.order[k]
        sink.position[k] = source.position[k]
        sink.device[k] = source.device[k]
        sink.finish[k] = source.finish[k]
        sink.tail[k] = source.tail[k]
    for u in range(len(source.counts)):
        sink.counts[u] = source.counts[u]
        for k in range(source.counts[u]):
            sink.row[u, k] = source.row[u, k]


@inner
def arrival(a: Padded, s: State, i: int, d: int) -> float:
    """When all that task i reads is on device d."""
    start: float = a.entry[i, d]
    for e in range(a.into[i], a.into[i + 1]):
        j = a.source[e]
        f = s.device[j]
        there = s.finish[j] + a.latency[f, d] + a.into_nbytes[e] * a.per_byte[f, d]
        if there > start:
            start = there
    return start


@inner
def remainder(a: Padded, s: State, i: int, d: int) -> float:
    """From the finish of task i on device d to the end of the run, for all that reads from it."""
    rest: float = a.exit[i, d]
    for e in range(a.out[i], a.out[i + 1]):
        j = a.sink[e]
        f = s.device[j]
        way = s.tail[j] + a.seconds[j, f] + a.latency[d, f] + a.out_nbytes[e] * a.per_byte[d, f]
        if way > rest:
            rest = way
    return rest


@inner
def behind(s: State, u: int, k: int) -> int:
    """How many tasks of unit u stand before position k."""
    low, high = 0, s.counts[u]
    while low < high:
        middle = (low + high) // 2
        if s.position[s.row[u, middle]] < k:
            low = middle + 1
        else:
            high = middle
    return low


@inner
def forward(
    a: Padded, s: State, since: int, lost: int, free: np.ndarray, marked: np.ndarray
) -> None:
    """The finish of each task from position `since` on, the rows, and what is below task `lost`."""
    units = len(s.counts)
    for u in range(units):
        s.counts[u] = behind(s, u, since)
        free[u] = s.finish[s.row[u, s.counts[u] - 1]] if s.counts[u] else 0.0
    s.below[:] = False
    marked[:] = False
    for k in range(since, len(s.order)):
        i = s.order[k]
        d = s.device[i]
        start = a.entry[i, d]
        mark = i == lost
        for e in range(a.into[i], a.into[i + 1]):
            j = a.source[e]
            f = s.device[j]
            there = s.finish[j] + a.latency[f, d] + a.into_nbytes[e] * a.per_byte[f, d]
            if there > start:
                start = there
            mark |= s.below[j]
        u = a.unit[d]
        if u < units:
            if free[u] > start:
                start = free[u]
            mark |= marked[u]
            s.row[u, s.counts[u]] = i
            s.counts[u] += 1
            free[u] = start + a.seconds[i, d]
            marked[u] = mark
        s.finish[i] = start + a.seconds[i, d]
        s.below[i] = mark


@inner
def backward(
    a: Padded, s: State, until: int, lost: int, free: np.ndarray, marked: np.ndarray
) -> None:
    """The tail of each task up to position `until`, and what is above task `lost`.

    The rows are those of the order.
    """
    units = len(s.counts)
    for u in range(units):
        k = behind(s, u, until + 1)
        free[u] = 0.0
        if k < s.counts[u]:
            i = s.row[u, k]
            free[u] = s.tail[i] + a.seconds[i, s.device[i]]
    s.above[:] = False
    marked[:] = False
    for k in range(until, -1, -1):
        i = s.order[k]
        d = s.device[i]
        rest = a.exit[i, d]
        mark = i == lost
        for e in range(a.out[i], a.out[i + 1]):
            j = a.sink[e]
            f = s.device[j]
            way = s.tail[j] + a.seconds[j, f] + a.latency[d, f] + a.out_nbytes[e] * a.per_byte[d, f]
            if way > rest:
                rest = way
            mark |= s.above[j]
        u = a.unit[d]
        if u < units:
            if free[u] > rest:
                rest = free[u]
            mark |= marked[u]
            free[u] = rest + a.seconds[i, d]
            marked[u] = mark
        s.tail[i] = rest
        s.above[i] = mark


@inner
def end_of(a: Padded, s: State) -> float:
    end = 0.0
    for i in range(len(s.order)):
        end = max(end, s.finish[i] + a.exit[i, s.device[i]])
    return end


@inner
def worth(a: Padded, s: State, price: np.ndarray, since: np.ndarray, last: np.ndarray) -> float:
    """When the units have done their tasks, in the mean of their prices.

    Work at its prices, and idle time at theirs, are what a packed schedule has above its bound.
    """
    for u in range(len(last)):
        last[u] = since[u]
    for i in range(len(s.order)):
        u = a.unit[s.device[i]]
        last[u] = max(last[u], s.finish[i])
    total = 0.0
    for u in range(len(last)):
        total += price[u] * last[u]
    return total


def seeded(seed: int) -> np.ndarray:
    """The state that `draw` advances, which must not be 0."""
    return np.array([(seed * 0x9E3779B97F4A7C15 + 0x2545F4914F6CDD1D) % 2**64 or 1], np.uint64)


@inner
def draw(random: np.ndarray) -> float:
    """The next number in [0, 1) of xorshift64*.

    References
    ----------
    Vigna, "An experimental exploration of Marsaglia's xorshift generators, scrambled", ACM TOMS
    42(4), 2016, https://doi.org/10.1145/2845077
    """
    x = random[0]
    x ^= x >> np.uint64(12)
    x ^= x << np.uint64(25)
    x ^= x >> np.uint64(27)
    random[0] = x
    number: float = ((x * np.uint64(0x2545F4914F6CDD1D)) >> np.uint64(11)) * 2.0**-53
    return number


@inner
def insertion(
    a: Padded,
    s: State,
    i: int,
    used: np.ndarray,
    old: int,
    old_before: int,
    only: int,
    price: np.ndarray,
) -> tuple[int, int, int, float]:
    """Where the longest path through task i, which is nowhere, is shortest, and how long it is.

    Its work there, at the price of the unit, counts beside the path.

    Returns a device (-1 if none), the tasks before and behind on its unit (-1 if none) and seconds.
    The place behind `old_before` on device `old` is left out; with `only` so are other devices, if
    task i can run there. Left out are also devices that are full.
    """
    best, path = np.inf, np.inf
    best_device, best_before, best_behind = -1, -1, -1
    for d in range(len(a.unit) - 1):
        seconds = a.seconds[i, d]
        if only >= 0 and d != only and a.seconds[i, only] < np.inf:
            continue
        if seconds == np.inf or used[d] + a.memory[i] > a.limit[d]:
            continue
        start = arrival(a, s, i, d)
        rest = remainder(a, s, i, d)
        u = a.unit[d]
        work = PULL * price[u] * seconds
        if start + seconds + rest + work >= best:
            continue
        row, count = s.row[u], s.counts[u]
        # Behind all that it depends on, before all that depends on it.
        low, high = 0, count
        while low < high:
            middle = (low + high) // 2
            if s.above[row[middle]]:
                low = middle + 1
            else:
                high = middle
        first = low
        high = count
        while low < high:
            middle = (low + high) // 2
            if s.below[row[middle]]:
                high = middle
            else:
                low = middle + 1
        last = low
        # From the last place that waits for nothing, to the first that delays nothing.
        low, high = first, last
        while low < high:
            middle = (low + high) // 2
            if s.finish[row[middle]] <= start:
                low = middle + 1
            else:
                high = middle
        for k in range(low, last + 1):
            before = row[k - 1] if k > 0 else -1
            after = row[k] if k < count else -1
            begin = start
            if before >= 0 and s.finish[before] > begin:
                begin = s.finish[before]
            if begin + seconds + rest + work >= best:
                break
            remain = rest
            if after >= 0 and s.tail[after] + a.seconds[after, s.device[after]] > remain:
                remain = s.tail[after] + a.seconds[after, s.device[after]]
            if not (d == old and before == old_before):
                through = begin + seconds + remain
                if through + work < best:
                    best, path = through + work, through
                    best_device, best_before, best_behind = d, before, after
            if remain == rest:
                break
    return best_device, best_before, best_behind, path


@inner
def place(
    a: Padded,
    s: State,
    i: int,
    d: int,
    before: int,
    after: int,
    scratch: np.ndarray,
    marked: np.ndarray,
) -> tuple[int, int]:
    """Puts task i on device d between its neighbours there, and keeps the order topological.

    Returns the positions between which the order has changed. `below` is that of task i.
    """
    order, position = s.order, s.position
    low, high = len(order), -1
    for e in range(a.into[i], a.into[i + 1]):
        high = max(high, position[a.source[e]])
    for e in range(a.out[i], a.out[i + 1]):
        low = min(low, position[a.sink[e]])
    if before >= 0:
        high = max(high, position[before])
    if after >= 0:
        low = min(low, position[after])
    old = position[i]
    s.device[i] = d
    if low > high:
        # Right behind `high`, which moves forward if i came before it.
        new = high if old <= high else high + 1
        step = 1 if new > old else -1
        for k in range(old, new, step):
            order[k] = order[k + step]
            position[order[k]] = k
        order[new] = i
        position[i] = new
        return min(old, new), max(old, new)
    # What depends on i, by its edges or by its unit, moves behind it.
    units = len(s.counts)
    marked[:] = False
    since, until = min(low, old), max(high, old)
    k, later = since, 0
    for at in range(since, until + 1):
        j = order[at]
        if j == i:
            continue
        u = a.unit[s.device[j]]
        mark = s.below[j] or j == after
        if not mark and u < units:
            mark = marked[u]
        if not mark:
            for e in range(a.into[j], a.into[j + 1]):
                if s.below[a.source[e]]:
                    mark = True
        if mark:
            s.below[j] = True
            if u < units:
                marked[u] = True
            scratch[later] = j
            later += 1
        else:
            order[k] = j
            position[j] = k
            k += 1
    order[k] = i
    position[i] = k
    for at in range(later):
        k += 1
        order[k] = scratch[at]
        position[scratch[at]] = k
    return since, until


@inner
def choose(
    a: Padded, s: State, critical: np.ndarray, criticals: int, taken: np.ndarray, random: np.ndarray
) -> tuple[int, int]:
    """A critical task, and perhaps others near it, in topological order.

    Returns how many, and the one device that all should go to, or -1.
    """
    taken[0] = critical[int(draw(random) * criticals)]
    only, more = -1, GROW
    if draw(random) < TOGETHER:
        only = int(draw(random) * (len(a.unit) - 1))
        more = GROW_TOGETHER
    size = 1
    while size < len(taken) and draw(random) < more:
        size += 1
    if size == 1:
        return 1, -1
    count = 1
    for _ in range(3 * size):
        if count == size:
            break
        near = taken[int(draw(random) * count)]
        kind = draw(random)
        if only >= 0 or kind < ALONG:
            degree = a.into[near + 1] - a.into[near]
            both = degree + a.out[near + 1] - a.out[near]
            if not both:
                continue
            e = int(draw(random) * both)
            into = a.into[near]
            other = a.source[into + e] if e < degree else a.sink[a.out[near] + e - degree]
        elif kind < CRITICAL:
            other = critical[int(draw(random) * criticals)]
        else:
            k = s.position[near] + int(draw(random) * 17) - 8
            if not 0 <= k < len(s.order):
                continue
            other = s.order[k]
        x = count
        while x > 0 and s.position[taken[x - 1]] > s.position[other]:
            x -= 1
        if x > 0 and taken[x - 1] == other:
            continue
        for y in range(count, x, -1):
            taken[y] = taken[y - 1]
        taken[x] = other
        count += 1
    return count, only


class Scratch(NamedTuple):
    """What a climb writes on: the schedule as it is, the one that is tried, and what they need."""

    now: State
    trial: State
    critical: np.ndarray
    taken: np.ndarray
    moved: np.ndarray
    used: np.ndarray
    # By unit.
    free: np.ndarray
    last: np.ndarray
    marked: np.ndarray


@njit(cache=True, nogil=True)
def climb(
    a: Padded,
    price: np.ndarray,
    begins: np.ndarray,
    order: np.ndarray,
    device: np.ndarray,
    best_order: np.ndarray,
    best_device: np.ndarray,
    best: float,
    steps: int,
    hot: float,
    cold: float,
    bound: float,
    random: np.ndarray,
) -> float:
    """Anneals `order` and `device` in place; returns the shortest end found, or `best`.

    What is shorter than `best` goes to `best_order` and `best_device`. An end that is not above
    `bound` is not improved.

    Critical tasks, alone or with neighbours, are taken out and put back one by one where the
    longest path through each is shortest; what is worse by x is kept with probability
    exp(-x / temperature), which falls from `hot` to `cold`. Where units have a `price` it also
    counts when they have done their tasks, the first of which begins not before `begins`: with
    many critical paths at once one move shortens none of them, and this tells whether it helps.
    """
    n, units = len(order), a.unit[-1]
    scratch = Scratch(
        new_state(order, device, units),
        new_state(order, device, units),
        np.zeros(n, np.int64),
        np.zeros(min(n, MOST), np.int64),
        np.zeros(n, np.int64),
        np.zeros(len(a.unit)),
        np.zeros(units),
        np.zeros(units),
        np.zeros(units, np.bool_),
    )
    end: float = _climb(
        a, price, begins, best_order, best_device, best, steps, hot, cold, bound, random, scratch
    )
    for k in range(n):
        order[k] = scratch.now.order[k]
        device[k] = scratch.now.device[k]
    return end


@inner
def _climb(
    a: Padded,
    price: np.ndarray,
    begins: np.ndarray,
    best_order: np.ndarray,
    best_device: np.ndarray,
    best: float,
    steps: int,
    hot: float,
    cold: float,
    bound: float,
    random: np.ndarray,
    scratch: Scratch,
) -> float:
    """As `climb`, on the schedule of `scratch`."""
    now, trial, critical, taken, moved, used, free, last, marked = scratch
    n, nowhere = len(now.order), len(a.unit) - 1
    criticals = 0
    for i in range(n):
        used[now.device[i]] += a.memory[i]
    forward(a, now, 0, -1, free, marked)
    backward(a, now, n - 1, -1, free, marked)
    end = end_of(a, now)
    value, best_value = worth(a, now, price, begins, last), np.inf
    fresh = True
    for step in range(steps + 1):
        if fresh:
            if end < best or (end <= best and value < best_value):
                best, best_value = end, value
                for k in range(n):
                    best_order[k] = now.order[k]
                    best_device[k] = now.device[k]
            criticals = 0
            for i in now.order:
                if now.finish[i] + now.tail[i] >= end * (1 - 1e-12):
                    critical[criticals] = i
                    criticals += 1
            fresh = False
        if best <= bound or step == steps or not criticals:
            break
        temperature = max(hot + (cold - hot) * step / steps, 1e-300)
        count, only = choose(a, now, critical, criticals, taken, random)
        copy(now, trial)
        since, until = now.position[taken[0]], now.position[taken[count - 1]]
        old, before = -1, -1
        if count == 1:
            # Another place than the one that it has.
            i = taken[0]
            old = now.device[i]
            k = behind(now, a.unit[old], now.position[i])
            before = now.row[a.unit[old], k - 1] if k else -1
        for x in range(count):
            i = taken[x]
            used[now.device[i]] -= a.memory[i]
            trial.device[i] = nowhere
        done = 0
        # The longest run that is kept.
        most = end - temperature * np.log(1 - draw(random))
        for x in range(count):
            i = taken[x]
            since, until = min(since, trial.position[i]), max(until, trial.position[i])
            forward(a, trial, since, i, free, marked)
            backward(a, trial, until, i, free, marked)
            d, ahead, after, path = insertion(a, trial, i, used, old, before, only, price)
            # What else is put back makes no path shorter.
            if d < 0 or path > most or (x == count - 1 and end_of(a, trial) > most):
                break
            since, until = place(a, trial, i, d, ahead, after, moved, marked)
            used[d] += a.memory[i]
            done += 1
        if done == count:
            forward(a, trial, since, -1, free, marked)
            new = worth(a, trial, price, begins, last)
            worse = WEIGHT * (new - value)
            if worse <= 0 or draw(random) < np.exp(-worse / temperature):
                backward(a, trial, until, -1, free, marked)
                copy(trial, now)
                end, value = end_of(a, now), new
                fresh = True
                continue
        for x in range(count):
            i = taken[x]
            if x < done:
                used[trial.device[i]] -= a.memory[i]
            used[now.device[i]] += a.memory[i]
    return best


@njit(cache=True, nogil=True)
def sweep(
    a: Padded,
    order: np.ndarray,
    device: np.ndarray,
    first: int,
    until: int,
    size: int,
    steps: int,
    heat: float,
    price: np.ndarray,
    random: np.ndarray,
) -> tuple[int, float]:
    """Climbs windows of `size` tasks of the order that begin from `first` on and before `until`.

    They overlap by half; of one that begins below 0 there is less. Returns the place where the next
    window begins and the end of the run.

    What stands before and behind a window keeps its place, as arrivals and tails.
    """
    n, devices = len(order), len(a.unit) - 1
    units = a.unit[-1]
    s = new_state(order, device, units)
    free, marked = np.zeros(units), np.zeros(units, np.bool_)
    forward(a, s, 0, -1, free, marked)
    backward(a, s, n - 1, -1, free, marked)
    number = np.full(n, -1)
    free[:] = 0.0
    used = np.zeros(devices + 1)
    for i in range(n):
        used[device[i]] += a.memory[i]
    for k in range(first):
        free[a.unit[device[order[k]]]] = s.finish[order[k]]
    stride = max(1, size // 2)
    while first < until:
        begin, last = max(first, 0), min(first + size, n)
        m = last - begin
        if m <= 0:
            first += stride
            continue
        rest = np.zeros(units)
        missing = units
        seen = np.zeros(units, np.bool_)
        for k in range(last, n):
            i = order[k]
            u = a.unit[device[i]]
            if not seen[u]:
                seen[u] = True
                rest[u] = s.tail[i] + a.seconds[i, device[i]]
                missing -= 1
                if not missing:
                    break
        inner = 0
        for k in range(begin, last):
            number[order[k]] = k - begin
        for k in range(begin, last):
            i = order[k]
            for e in range(a.into[i], a.into[i + 1]):
                if number[a.source[e]] >= 0:
                    inner += 1
        seconds = np.empty((m, devices + 1))
        entry, exit = np.empty((m, devices + 1)), np.empty((m, devices + 1))
        memory = np.empty(m)
        into, out = np.zeros(m + 1, np.int64), np.zeros(m + 1, np.int64)
        source, sink = np.empty(inner, np.int64), np.empty(inner, np.int64)
        into_nbytes, out_nbytes = np.empty(inner), np.empty(inner)
        for k in range(m):
            i = order[begin + k]
            seconds[k] = a.seconds[i]
            entry[k] = a.entry[i]
            exit[k] = a.exit[i]
            memory[k] = a.memory[i]
            used[device[i]] -= a.memory[i]
            for d in range(devices):
                entry[k, d] = max(entry[k, d], free[a.unit[d]])
                exit[k, d] = max(exit[k, d], rest[a.unit[d]])
            into[k + 1], out[k + 1] = into[k], out[k]
            for e in range(a.into[i], a.into[i + 1]):
                j = a.source[e]
                if number[j] >= 0:
                    source[into[k + 1]] = number[j]
                    into_nbytes[into[k + 1]] = a.into_nbytes[e]
                    into[k + 1] += 1
                    continue
                f = device[j]
                for d in range(devices):
                    there = s.finish[j] + a.latency[f, d] + a.into_nbytes[e] * a.per_byte[f, d]
                    entry[k, d] = max(entry[k, d], there)
            for e in range(a.out[i], a.out[i + 1]):
                j = a.sink[e]
                if number[j] >= 0:
                    sink[out[k + 1]] = number[j]
                    out_nbytes[out[k + 1]] = a.out_nbytes[e]
                    out[k + 1] += 1
                    continue
                f = device[j]
                for d in range(devices):
                    way = (
                        s.tail[j]
                        + a.seconds[j, f]
                        + a.latency[d, f]
                        + a.out_nbytes[e] * a.per_byte[d, f]
                    )
                    exit[k, d] = max(exit[k, d], way)
        for k in range(m):
            for d in range(devices):
                # Nothing may go where its data cannot come from or go to.
                if entry[k, d] == np.inf or exit[k, d] == np.inf:
                    seconds[k, d] = np.inf
        limit = np.empty(devices + 1)
        for d in range(devices + 1):
            limit[d] = a.limit[d] - used[d]
        part = Padded(
            seconds,
            into,
            source,
            into_nbytes,
            out,
            sink,
            out_nbytes,
            a.latency,
            a.per_byte,
            entry,
            exit,
            a.unit,
            memory,
            limit,
        )
        inner_order = np.arange(m)
        inner_device = device[order[begin:last]]
        best_order, best_device = inner_order.copy(), inner_device.copy()
        climb(
            part,
            price,
            free,
            inner_order,
            inner_device,
            best_order,
            best_device,
            np.inf,
            steps,
            heat,
            0.0,
            0.0,
            random,
        )
        old = order[begin:last].copy()
        for k in range(m):
            number[old[k]] = -1
            order[begin + k] = old[best_order[k]]
            device[old[k]] = best_device[k]
        for k in range(m):
            used[device[old[k]]] += a.memory[old[k]]
        # The finishes of the tasks that stay, and when they leave their units.
        for k in range(begin, min(max(first + stride, 0), n)):
            i = order[k]
            d = device[i]
            s.device[i] = d
            start = max(arrival(a, s, i, d), free[a.unit[d]])
            s.finish[i] = free[a.unit[d]] = start + a.seconds[i, d]
        first += stride
    s = new_state(order, device, units)
    forward(a, s, 0, -1, free, marked)
    return first, end_of(a, s)
