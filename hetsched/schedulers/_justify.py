"""Local search over orders on given devices: a stretch of time is shuffled, all else follows."""

from dataclasses import replace

import numpy as np
from numba import njit

from hetsched.problem import Arrays, Problem
from hetsched.schedulers._gaps import inner
from hetsched.schedulers._list import decode, makespan
from hetsched.schedulers._search import draw

# What is shuffled and by how much, at the most, in mean times from task to task of a unit.
STRETCH, SHIFT = 40.0, 10.0


def backwards(problem: Problem) -> Problem:
    """The problem with time running backwards; task i is the i-th from the end. No contention."""
    last = problem.tasks - 1
    source, sink = last - problem.sink, last - problem.source
    edges = np.lexsort((source, sink))
    return replace(
        problem,
        seconds=problem.seconds[::-1],
        source=source[edges],
        sink=sink[edges],
        nbytes=problem.nbytes[edges],
        tensor=np.empty(0, np.int64),
        latency=problem.latency.T,
        per_byte=problem.per_byte.T,
        entry=problem.exit[::-1],
        exit=problem.entry[::-1],
        memory=problem.memory[::-1],
        names=problem.names[::-1],
    )


@inner
def _sort(order: np.ndarray, key: np.ndarray) -> None:
    """By key, what ties stays as it is; fast where little is out of order."""
    for k in range(1, len(order)):
        i = order[k]
        hole = k
        while hole > 0 and key[order[hole - 1]] > key[i]:
            order[hole] = order[hole - 1]
            hole -= 1
        order[hole] = i


@njit(cache=True, nogil=True)
def justify(
    a: Arrays,
    back: Arrays,
    order: np.ndarray,
    device: np.ndarray,
    rounds: int,
    bound: float,
    random: np.ndarray,
) -> float:
    """Shortens the run of `order`, in place, on the devices that are given; returns its end.

    A round moves tasks that start in some stretch of time to and fro in the order. Then each task,
    from the last to finish on, is put as late as it can be, and then, from the first to start on,
    as early as it can be, each into the first gap that fits: time that units idle gathers at the
    end. What is no longer than before is kept. `back` is the problem `backwards`. Ends at `bound`.

    References
    ----------
    Valls, Ballestin and Quintanilla, "Justification and RCPSP: a technique that pays", EJOR
    165(2), 2005, https://doi.org/10.1016/j.ejor.2004.04.008
    """
    n = len(order)
    units = np.max(a.unit) + 1
    seconds = np.empty(n)
    for i in range(n):
        seconds[i] = a.seconds[i, device[i]]
    back_device = device[::-1].copy()
    start, _ = decode(a, order, device, False)
    end: float = makespan(a, device, start)
    key, trial, back_trial = np.empty(n), np.empty(n, np.int64), np.empty(n, np.int64)
    for _ in range(rounds):
        if end <= bound:
            break
        mean = end * units / n
        stretch, shift = STRETCH * mean * draw(random), SHIFT * mean * draw(random)
        share = draw(random)
        begin = draw(random) * (end + stretch) - stretch
        for i in range(n):
            key[i] = start[i]
            if begin <= start[i] < begin + stretch and draw(random) < share:
                key[i] += shift * (2 * draw(random) - 1)
            for e in range(a.incoming[i], a.incoming[i + 1]):
                key[i] = max(key[i], key[a.source[e]])
        trial[:] = order
        _sort(trial, key)
        found, _ = decode(a, trial, device, True)
        for k in range(n):
            i = trial[n - 1 - k]
            back_trial[k] = n - 1 - i
            key[n - 1 - i] = -(found[i] + seconds[i])
        _sort(back_trial, key)
        late, _ = decode(back, back_trial, back_device, True)
        for k in range(n):
            i = n - 1 - back_trial[n - 1 - k]
            trial[k] = i
            key[i] = -(late[n - 1 - i] + seconds[i])
        _sort(trial, key)
        found, _ = decode(a, trial, device, True)
        last = makespan(a, device, found)
        if last <= end:
            start, end = found, last
            order[:] = trial
            # One without work comes before the one that it starts with.
            for i in range(n):
                key[i] = start[i] + seconds[i]
            _sort(order, key)
            _sort(order, start)
    return end
