"""What tells how urgent a task is: ranks and tables, each in one pass over the edges."""

import numpy as np
from numba import njit

from hetsched.problem import Arrays
from hetsched.schedulers._gaps import inner


@inner
def mean_link(a: Arrays) -> tuple[float, float]:
    """Latency, and seconds for each byte, in the mean of the pairs of devices that have a link."""
    latency, per_byte, links = 0.0, 0.0, 0
    for one in range(len(a.limit)):
        for other in range(len(a.limit)):
            if one != other and a.latency[one, other] < np.inf:
                latency += a.latency[one, other]
                per_byte += a.per_byte[one, other]
                links += 1
    return latency / max(1, links), per_byte / max(1, links)


@inner
def mean(a: Arrays, task: int, row: np.ndarray) -> float:
    """Of the finite values of `row`, over the devices that can run `task`."""
    total, count = 0.0, 0
    for device in range(len(row)):
        if a.seconds[task, device] < np.inf and row[device] < np.inf:
            total += row[device]
            count += 1
    return total / max(1, count)


@njit(cache=True, nogil=True)
def upward_rank(a: Arrays) -> np.ndarray:
    """The longest path from the start of each task to the end, in mean seconds.

    References
    ----------
    Topcuoglu, Hariri and Wu, "Performance-effective and low-complexity task scheduling for
    heterogeneous computing", IEEE TPDS 13(3), 2002, https://doi.org/10.1109/71.993206
    """
    latency, per_byte = mean_link(a)
    tasks = len(a.memory)
    rank = np.empty(tasks)
    for task in range(tasks - 1, -1, -1):
        longest = mean(a, task, a.exit[task])
        for edge in range(a.begins[task], a.begins[task + 1]):
            way = latency + a.read_nbytes[edge] * per_byte
            longest = max(longest, way + rank[a.reader[edge]])
        rank[task] = mean(a, task, a.seconds[task]) + longest
    return rank


@njit(cache=True, nogil=True)
def downward_rank(a: Arrays) -> np.ndarray:
    """The longest path from the start of the run to the start of each task, in mean seconds."""
    latency, per_byte = mean_link(a)
    tasks = len(a.memory)
    rank = np.empty(tasks)
    behind = np.empty(tasks)
    for task in range(tasks):
        longest = mean(a, task, a.entry[task])
        for edge in range(a.incoming[task], a.incoming[task + 1]):
            longest = max(longest, latency + a.nbytes[edge] * per_byte + behind[a.source[edge]])
        rank[task] = longest
        behind[task] = longest + mean(a, task, a.seconds[task])
    return rank


@njit(cache=True, nogil=True)
def remaining(a: Arrays, own: float) -> np.ndarray:
    """(n, p) the longest path behind each task on each device if all later ones choose freely.

    With `own` 0 it is the optimistic cost table of PEFT, with 1 the predict cost matrix of IPPTS,
    which counts a task's own time too, once more in the tables of what comes before. Infinite where
    a task cannot run, or what comes behind cannot be reached.

    References
    ----------
    Arabnejad and Barbosa, "List scheduling algorithm for heterogeneous systems by an optimistic
    cost table", IEEE TPDS 25(3), 2014, https://doi.org/10.1109/TPDS.2013.57
    """
    tasks, devices = a.seconds.shape
    table = np.empty((tasks, devices))
    for task in range(tasks - 1, -1, -1):
        for device in range(devices):
            seconds = a.seconds[task, device]
            if seconds == np.inf:
                table[task, device] = np.inf
                continue
            longest = a.exit[task, device]
            for edge in range(a.begins[task], a.begins[task + 1]):
                sink = a.reader[edge]
                nearest = np.inf
                for other in range(devices):
                    way = table[sink, other] + a.seconds[sink, other]
                    if other != device:
                        way += a.latency[device, other]
                        way += a.read_nbytes[edge] * a.per_byte[device, other]
                    nearest = min(nearest, way)
                longest = max(longest, nearest)
            table[task, device] = longest + own * seconds
    return table


@njit(cache=True, nogil=True)
def ahead(a: Arrays, table: np.ndarray) -> np.ndarray:
    """(n, p) the table without the tasks' own seconds; infinite where a task cannot run."""
    found = np.empty_like(table)
    for task in range(len(table)):
        for device in range(table.shape[1]):
            seconds = a.seconds[task, device]
            found[task, device] = table[task, device] - seconds if seconds < np.inf else np.inf
    return found


@njit(cache=True, nogil=True)
def mean_rows(a: Arrays, table: np.ndarray) -> np.ndarray:
    """The mean of each row of `table` over the devices that can run its task."""
    means = np.empty(len(table))
    for task in range(len(table)):
        means[task] = mean(a, task, table[task])
    return means
