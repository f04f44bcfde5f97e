"""Local search where links contend: orders and devices are changed and run again as a whole.

A transfer that finds its link taken waits, and so a change anywhere can delay what has nothing to
do with it: there are no tails to tell what a place is worth, as `_search` has them.
"""

import numpy as np
from numba import njit

from hetsched.problem import Arrays
from hetsched.schedulers._gaps import inner
from hetsched.schedulers._list import decode, makespan
from hetsched.schedulers._search import draw

# How likely a step takes a task that others wait for, not just any; moves it to another device;
# and takes a neighbour in the graph along.
WAITED, ELSEWHERE, ALONG = 0.8, 0.6, 0.25
# Of a time: what two sums that mean the same moment can be off by.
ROUNDING = 1e-12


@njit(cache=True, nogil=True)
def shake(
    a: Arrays,
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
    """As `_search.climb`, with contention: the end is that of `decode` with insertion.

    A step gives one task, mostly one on a chain that the end waits for, another device or another
    place in the order between what it reads and what reads it, perhaps with neighbours in the
    graph on its new device.
    """
    n, devices = a.seconds.shape
    position = np.empty(n, np.int64)
    used = np.zeros(devices)
    for k in range(n):
        position[order[k]] = k
        used[device[k]] += a.memory[k]
    chain, old_order, old_device = order.copy(), order.copy(), device.copy()
    start, sent = decode(a, order, device, True)
    end = makespan(a, device, start)
    length = _waited_for(a, device, start, sent, end, chain)
    for step in range(steps):
        if end < best:
            best = end
            for k in range(n):
                best_order[k] = order[k]
                best_device[k] = device[k]
        if best <= bound:
            break
        for k in range(n):
            old_order[k] = order[k]
            old_device[k] = device[k]
        i = int(draw(random) * n)
        if draw(random) < WAITED:
            i = chain[int(draw(random) * length)]
        d = device[i]
        if draw(random) < ELSEWHERE:
            d = int(draw(random) * devices)
        if not _goes(a, i, d, device, used):
            d = device[i]
        while True:
            used[device[i]] -= a.memory[i]
            used[d] += a.memory[i]
            device[i] = d
            _shift(a, i, order, position, draw(random))
            if draw(random) >= ALONG:
                break
            degree = a.incoming[i + 1] - a.incoming[i]
            both = degree + a.begins[i + 1] - a.begins[i]
            if not both:
                break
            e = int(draw(random) * both)
            if e < degree:
                i = a.source[a.incoming[i] + e]
            else:
                i = a.reader[a.begins[i] + e - degree]
            if not _goes(a, i, d, device, used):
                break
        start, sent = decode(a, order, device, True)
        found = makespan(a, device, start)
        temperature = max(hot + (cold - hot) * step / steps, 1e-300)
        if found <= end or draw(random) < np.exp((end - found) / temperature):
            end = found
            length = _waited_for(a, device, start, sent, end, chain)
            continue
        for k in range(n):
            order[k] = old_order[k]
            position[order[k]] = k
            used[device[k]] -= a.memory[k]
            device[k] = old_device[k]
            used[device[k]] += a.memory[k]
    return best


@inner
def _goes(a: Arrays, i: int, d: int, device: np.ndarray, used: np.ndarray) -> bool:
    """Whether task i can be on device d, as far as the task and memory go."""
    if device[i] == d:
        return True
    fits: bool = a.seconds[i, d] < np.inf and used[d] + a.memory[i] <= a.limit[d]
    return fits


@inner
def _shift(a: Arrays, i: int, order: np.ndarray, position: np.ndarray, share: float) -> None:
    """Moves task i to a share of the way from behind what it reads to before what reads it."""
    first, last = 0, len(order) - 1
    for e in range(a.incoming[i], a.incoming[i + 1]):
        first = max(first, position[a.source[e]] + 1)
    for e in range(a.begins[i], a.begins[i + 1]):
        last = min(last, position[a.reader[e]] - 1)
    new = first + int(share * (last + 1 - first))
    step = 1 if new > position[i] else -1
    for k in range(position[i], new, step):
        order[k] = order[k + step]
        position[order[k]] = k
    order[new] = i
    position[i] = new


@inner
def _waited_for(
    a: Arrays,
    device: np.ndarray,
    start: np.ndarray,
    sent: np.ndarray,
    end: float,
    chain: np.ndarray,
) -> int:
    """Writes the tasks of a chain that the end waits for to `chain`, the last first; their number.

    Before a task comes one on its unit that ends as it starts, else the source of what it reads
    last.
    """
    n = len(device)
    at = 0
    for i in range(n):
        if start[i] + a.seconds[i, device[i]] + a.exit[i, device[i]] >= end * (1 - ROUNDING):
            at = i
    length = 0
    while at >= 0:
        chain[length] = at
        length += 1
        d = device[at]
        begin, before = start[at] - ROUNDING * end, -1
        if begin <= 0 or length == n:
            break
        for j in range(n):
            same = a.unit[device[j]] == a.unit[d] and start[j] < begin
            if same and start[j] + a.seconds[j, device[j]] >= begin:
                before = j
        if before < 0:
            for e in range(a.incoming[at], a.incoming[at + 1]):
                j = a.source[e]
                f = device[j]
                there = start[j] + a.seconds[j, f]
                if f != d:
                    there = sent[e] + a.latency[f, d] + a.nbytes[e] * a.per_byte[f, d]
                if there >= begin and start[j] < begin:
                    before = j
        at = before
    return length
