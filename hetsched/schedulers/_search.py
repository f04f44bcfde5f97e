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
    n, p = problem.seconds.shape
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


@njit(cache=True, nogil=True)
def forward(a, order, device, lost, finish, below, row, count):
    """The finish of each task, the end of the run, and what depends on the task `lost`.

    `row[u, :count[u]]` are the tasks of unit u in order.
    """
    units = row.shape[0]
    free = np.zeros(units)
    marked = np.zeros(units, np.bool_)
    count[:] = 0
    end = 0.0
    for i in order:
        d = device[i]
        start = a.entry[i, d]
        mark = i == lost
        for e in range(a.into[i], a.into[i + 1]):
            j = a.source[e]
            there = (
                finish[j] + a.latency[device[j], d] + a.into_nbytes[e] * a.per_byte[device[j], d]
            )
            if there > start:
                start = there
            mark |= below[j]
        u = a.unit[d]
        if u < units:
            if free[u] > start:
                start = free[u]
            mark |= marked[u]
            row[u, count[u]] = i
            count[u] += 1
            free[u] = start + a.seconds[i, d]
            marked[u] = mark
        finish[i] = start + a.seconds[i, d]
        below[i] = mark
        if finish[i] + a.exit[i, d] > end:
            end = finish[i] + a.exit[i, d]
    return end


@njit(cache=True, nogil=True)
def backward(a, order, device, lost, tail, above):
    """The time from each task's finish to the end of the run, and what `lost` depends on."""
    units = a.unit[-1]
    free = np.zeros(units)
    marked = np.zeros(units, np.bool_)
    for k in range(len(order) - 1, -1, -1):
        i = order[k]
        d = device[i]
        rest = a.exit[i, d]
        mark = i == lost
        for e in range(a.out[i], a.out[i + 1]):
            j = a.sink[e]
            way = (
                tail[j]
                + a.seconds[j, device[j]]
                + a.latency[d, device[j]]
                + a.out_nbytes[e] * a.per_byte[d, device[j]]
            )
            if way > rest:
                rest = way
            mark |= above[j]
        u = a.unit[d]
        if u < units:
            if free[u] > rest:
                rest = free[u]
            mark |= marked[u]
            free[u] = rest + a.seconds[i, d]
            marked[u] = mark
        tail[i] = rest
        above[i] = mark


@njit(cache=True, nogil=True)
def draw(state):
    """The next number in [0, 1) of xorshift64*."""
    x = state[0]
    x ^= x >> np.uint64(12)
    x ^= x << np.uint64(25)
    x ^= x >> np.uint64(27)
    state[0] = x
    return ((x * np.uint64(0x2545F4914F6CDD1D)) >> np.uint64(11)) * (1.0 / 9007199254740992.0)


@njit(cache=True, nogil=True)
def insertion(
    a, i, device, used, finish, tail, above, below, row, count, end, old, old_before, only, state
):
    """The device and the neighbours on its unit where the longest path through task i is shortest.

    Returns device (-1 if none), task before, task behind (-1 if none) and the end of the run.
    """
    best = np.inf
    best_device, best_before, best_behind = -1, -1, -1
    for d in range(len(a.unit) - 1):
        seconds = a.seconds[i, d]
        if only >= 0 and d != only and a.seconds[i, only] < np.inf:
            continue
        if seconds == np.inf or used[d] + a.memory[i] > a.limit[d]:
            continue
        start = a.entry[i, d]
        for e in range(a.into[i], a.into[i + 1]):
            j = a.source[e]
            there = (
                finish[j] + a.latency[device[j], d] + a.into_nbytes[e] * a.per_byte[device[j], d]
            )
            if there > start:
                start = there
        rest = a.exit[i, d]
        for e in range(a.out[i], a.out[i + 1]):
            j = a.sink[e]
            way = (
                tail[j]
                + a.seconds[j, device[j]]
                + a.latency[d, device[j]]
                + a.out_nbytes[e] * a.per_byte[d, device[j]]
            )
            if way > rest:
                rest = way
        if start + seconds + rest >= best:
            continue
        u = a.unit[d]
        # Behind all that it depends on, before all that depends on it.
        low, high = 0, count[u]
        while low < high:
            middle = (low + high) // 2
            if above[row[u, middle]]:
                low = middle + 1
            else:
                high = middle
        first = low
        high = count[u]
        while low < high:
            middle = (low + high) // 2
            if below[row[u, middle]]:
                high = middle
            else:
                low = middle + 1
        last = low
        # The places between the last that delays nothing before, and the first nothing behind.
        low, high = first, last
        while low < high:
            middle = (low + high) // 2
            if finish[row[u, middle]] <= start:
                low = middle + 1
            else:
                high = middle
        for k in range(low, last + 1):
            before = row[u, k - 1] if k > 0 else -1
            behind = row[u, k] if k < count[u] else -1
            begin = start
            if before >= 0 and finish[before] > begin:
                begin = finish[before]
            remain = rest
            if behind >= 0 and tail[behind] + a.seconds[behind, device[behind]] > remain:
                remain = tail[behind] + a.seconds[behind, device[behind]]
            if begin + seconds + rest >= best:
                break
            if not (d == old and before == old_before):
                through = begin + seconds + remain
                if through < best:
                    best = through
                    best_device, best_before, best_behind = d, before, behind
            if remain == rest:
                break
    return best_device, best_before, best_behind, best


@njit(cache=True, nogil=True)
def place(a, order, position, device, i, d, before, behind, below, scratch, marked):
    """Puts task i on device d between its neighbours, and keeps the order topological."""
    n = len(order)
    low, high = n, -1
    for e in range(a.into[i], a.into[i + 1]):
        high = max(high, position[a.source[e]])
    for e in range(a.out[i], a.out[i + 1]):
        low = min(low, position[a.sink[e]])
    if before >= 0:
        high = max(high, position[before])
    if behind >= 0:
        low = min(low, position[behind])
    old = position[i]
    device[i] = d
    if low > high:
        # Right behind `high`, in the order without i.
        if old <= high:
            for k in range(old, high):
                order[k] = order[k + 1]
                position[order[k]] = k
            order[high] = i
            position[i] = high
        else:
            for k in range(old, high + 1, -1):
                order[k] = order[k - 1]
                position[order[k]] = k
            order[high + 1] = i
            position[i] = high + 1
        return
    # What depends on i, by its edges or by its unit, moves behind it.
    units = a.unit[-1]
    marked[:] = False
    k, later = min(low, old), 0
    top = max(high, old)
    for at in range(k, top + 1):
        j = order[at]
        if j == i:
            continue
        u = a.unit[device[j]]
        mark = below[j] or j == behind
        if not mark and u < units:
            mark = marked[u]
        if not mark:
            for e in range(a.into[j], a.into[j + 1]):
                if below[a.source[e]]:
                    mark = True
        if mark:
            below[j] = True
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


@njit(cache=True, nogil=True)
def climb(a, order, device, best_order, best_device, best, steps, hot, cold, bound, state):
    """Anneals `order` and `device` in place; returns the shortest end found, or `best`.

    What is shorter than `best` goes to `best_order` and `best_device`. An end that is not above
    `bound` is not improved.

    Critical tasks, alone or with neighbours, are taken out and put back one by one where the
    longest path through each is shortest; what is worse by x is kept with probability
    exp(-x / temperature), which falls from `hot` to `cold`.
    """
    n, nowhere = len(order), len(a.unit) - 1
    units = a.unit[-1]
    finish, tail = np.zeros(n), np.zeros(n)
    below, above = np.zeros(n, np.bool_), np.zeros(n, np.bool_)
    row, count = np.zeros((units, n), np.int64), np.zeros(units, np.int64)
    position, scratch = np.zeros(n, np.int64), np.zeros(n, np.int64)
    marked = np.zeros(units, np.bool_)
    used = np.zeros(nowhere + 1)
    critical = np.zeros(n, np.int64)
    criticals = 0
    taken = np.zeros(32, np.int64)
    new_order, new_device = order.copy(), device.copy()
    for i in range(n):
        used[device[i]] += a.memory[i]
    for k in range(n):
        position[order[k]] = k
    now = forward(a, order, device, -1, finish, below, row, count)
    if now < best:
        best = now
        best_order[:] = order
        best_device[:] = device
    fresh = True
    for step in range(steps):
        if best <= bound:
            break
        temperature = hot + (cold - hot) * step / steps
        if fresh:
            end = forward(a, order, device, -1, finish, below, row, count)
            backward(a, order, device, -1, tail, above)
            criticals = 0
            for i in order:
                if finish[i] + tail[i] >= end * (1 - 1e-12):
                    critical[criticals] = i
                    criticals += 1
            fresh = False
        first = critical[int(draw(state) * criticals)]
        # How many to take out, and which.
        chance = draw(state)
        size = 1
        only = -1
        grow = GROW
        if draw(state) < TOGETHER:
            only = int(draw(state) * nowhere)
            grow = GROW_TOGETHER
        while size < 32 and chance < grow:
            size += 1
            chance = draw(state)
        if size == 1:
            only = -1
        taken[0] = first
        got = 1
        if size > 1:
            tries = 0
            while got < size and tries < 3 * size:
                tries += 1
                seed = taken[int(draw(state) * got)]
                kind = draw(state)
                other = -1
                if kind < ALONG or only >= 0:
                    degree = a.into[seed + 1] - a.into[seed]
                    both = degree + a.out[seed + 1] - a.out[seed]
                    if both:
                        e = int(draw(state) * both)
                        if e < degree:
                            other = a.source[a.into[seed] + e]
                        else:
                            other = a.sink[a.out[seed] + e - degree]
                elif kind < CRITICAL:
                    other = critical[int(draw(state) * criticals)]
                else:
                    k = position[seed] + int(draw(state) * 17) - 8
                    if 0 <= k < n:
                        other = order[k]
                if other < 0:
                    continue
                double = False
                for k in range(got):
                    if taken[k] == other:
                        double = True
                if not double:
                    taken[got] = other
                    got += 1
        old, before = -1, -1
        if got == 1:
            i = taken[0]
            old = device[i]
            # The task before it on its unit.
            u = a.unit[old]
            for k in range(position[i] - 1, -1, -1):
                if a.unit[device[order[k]]] == u:
                    before = order[k]
                    break
        else:
            new_order[:] = order
            # In topological order.
            for x in range(1, got):
                i = taken[x]
                y = x - 1
                while y >= 0 and position[taken[y]] > position[i]:
                    taken[y + 1] = taken[y]
                    y -= 1
                taken[y + 1] = i
        new_device[:] = device
        for x in range(got):
            i = taken[x]
            used[device[i]] -= a.memory[i]
            new_device[i] = nowhere
        end = now
        done = 0
        for x in range(got):
            i = taken[x]
            new = order if got == 1 else new_order
            base = forward(a, new, new_device, i, finish, below, row, count)
            backward(a, new, new_device, i, tail, above)
            d, ahead, behind, through = insertion(
                a,
                i,
                new_device,
                used,
                finish,
                tail,
                above,
                below,
                row,
                count,
                base,
                old,
                before,
                only,
                state,
            )
            if d < 0:
                break
            end = max(base, through)
            if (
                x == got - 1
                and end > now
                and draw(state) >= np.exp((now - end) / max(temperature, 1e-300))
            ):
                break
            place(a, new, position, new_device, i, d, ahead, behind, below, scratch, marked)
            used[d] += a.memory[i]
            done += 1
        if done == got:
            if got > 1:
                order[:] = new_order
            device[:] = new_device
            now = end
            fresh = True
            if now < best:
                best = now
                best_order[:] = order
                best_device[:] = device
        else:
            for x in range(got):
                i = taken[x]
                if x < done:
                    used[new_device[i]] -= a.memory[i]
                used[device[i]] += a.memory[i]
            if got > 1:
                for k in range(n):
                    position[order[k]] = k
    return best


@njit(cache=True, nogil=True)
def sweep(a, order, device, first, until, size, steps, heat, state):
    """Climbs windows of `size` tasks of the order that begin from `first` on and before `until`.

    They overlap by half. Returns the place where the next window begins and the end of the run.

    What stands before and behind a window keeps its place, as arrivals and tails.
    """
    n, devices = len(order), len(a.unit) - 1
    units = a.unit[-1]
    finish, tail = np.zeros(n), np.zeros(n)
    below, above = np.zeros(n, np.bool_), np.zeros(n, np.bool_)
    row, count = np.zeros((units, n), np.int64), np.zeros(units, np.int64)
    end = forward(a, order, device, -1, finish, below, row, count)
    backward(a, order, device, -1, tail, above)
    number = np.full(n, -1)
    free = np.zeros(units)
    used = np.zeros(devices + 1)
    for i in range(n):
        used[device[i]] += a.memory[i]
    for k in range(first):
        free[a.unit[device[order[k]]]] = finish[order[k]]
    stride = max(1, size // 2)
    while first < until:
        last = min(first + size, n)
        m = last - first
        rest = np.zeros(units)
        missing = units
        seen = np.zeros(units, np.bool_)
        for k in range(last, n):
            i = order[k]
            u = a.unit[device[i]]
            if not seen[u]:
                seen[u] = True
                rest[u] = tail[i] + a.seconds[i, device[i]]
                missing -= 1
                if not missing:
                    break
        inner = 0
        for k in range(first, last):
            number[order[k]] = k - first
        for k in range(first, last):
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
            i = order[first + k]
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
                    there = finish[j] + a.latency[f, d] + a.into_nbytes[e] * a.per_byte[f, d]
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
                        tail[j]
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
            a.limit - used,
        )
        inner_order = np.arange(m)
        inner_device = device[order[first:last]]
        best_order, best_device = inner_order.copy(), inner_device.copy()
        climb(
            part,
            inner_order,
            inner_device,
            best_order,
            best_device,
            np.inf,
            steps,
            heat,
            0.0,
            0.0,
            state,
        )
        old = order[first:last].copy()
        for k in range(m):
            number[old[k]] = -1
            order[first + k] = old[best_order[k]]
            device[old[k]] = best_device[k]
        for k in range(m):
            used[device[old[k]]] += a.memory[old[k]]
        # The finishes of the tasks that stay, and when they leave their units.
        for k in range(first, min(first + stride, n)):
            i = order[k]
            d = device[i]
            start = max(a.entry[i, d], free[a.unit[d]])
            for e in range(a.into[i], a.into[i + 1]):
                j = a.source[e]
                there = (
                    finish[j]
                    + a.latency[device[j], d]
                    + a.into_nbytes[e] * a.per_byte[device[j], d]
                )
                if there > start:
                    start = there
            finish[i] = start + a.seconds[i, d]
            free[a.unit[d]] = finish[i]
        first += stride
    return first, forward(a, order, device, -1, finish, below, row, count)
