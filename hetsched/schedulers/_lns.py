"""Large neighbourhood search: windows of a schedule, each solved as a small problem of its own."""

from collections.abc import Callable
from math import inf

import numpy as np

from hetsched.problem import Problem, Solution
from hetsched.schedulers._cpsat import Limit, decode, order_of, solve, transfer_seconds

# Tasks of a window, and CP-SAT's own units of work on it, some 0.1 s.
WINDOW = 30
WORK = 0.01


def improve(
    problem: Problem,
    solution: Solution,
    seed: int,
    stop: Callable[[int], bool],
    seconds: Callable[[], float] = lambda: inf,
) -> Solution:
    """The solution after windows of it were solved anew, one after the other; never a longer one.

    `stop` is asked before each window, with the number of those solved; `seconds` is what a window
    may take at most, asked before each. Tasks between two moments are free, what runs before and
    behind stays where it is, in its order. Every longest path crosses the window, so what is won in
    it is won as a whole. A window that cannot be improved is not tried again before something in
    it has changed; when none is left, larger ones are tried, up to the whole problem. Where links
    contend, what runs before and behind cannot be told apart, and nothing is done.

    References
    ----------
    Shaw, "Using constraint programming and local search methods to solve vehicle routing
    problems", CP 1998, https://doi.org/10.1007/3-540-49481-2_30
    """
    if problem.contention:
        return solution
    rng = np.random.default_rng(seed)
    size, solved = WINDOW, 0
    failed: set[bytes] = set()
    while not stop(solved):
        order = order_of(problem, solution)
        begins = _begins(len(order), size)
        rng.shuffle(begins)
        for begin in begins:
            chosen = order[begin : begin + size]
            key = chosen.tobytes() + solution.device[chosen].tobytes()
            if key not in failed:
                break
        else:
            if size >= problem.tasks:
                break
            size = size * 3 // 2
            continue
        limit = Limit(seconds(), WORK * (size / WINDOW) ** 2)
        better = _solved(problem, solution, order, begin, begin + size, limit, seed + solved)
        solved += 1
        if better.makespan < solution.makespan:
            solution = better
        else:
            failed.add(key)
    return solution


def _begins(tasks: int, size: int) -> np.ndarray:
    """Of windows that overlap by half, the last of which ends with the tasks."""
    last = max(0, tasks - size)
    return np.append(np.arange(0, last, max(1, size // 2)), last)


def _solved(
    problem: Problem,
    solution: Solution,
    order: np.ndarray,
    begin: int,
    end: int,
    limit: Limit,
    seed: int,
) -> Solution:
    """With the tasks order[begin:end] placed anew."""
    chosen = np.sort(order[begin:end])
    small = window(problem, solution, order, begin, end)
    known = Solution(solution.device[chosen], solution.start[chosen], solution.makespan)
    found = solve(small, limit, known, seed)
    if found is None or found.makespan >= known.makespan:
        return solution
    device = solution.device.copy()
    device[chosen] = found.device
    inside = chosen[order_of(small, found)]
    return decode(problem, device, np.concatenate([order[:begin], inside, order[end:]]), "windows")


def window(
    problem: Problem, solution: Solution, order: np.ndarray, begin: int, end: int
) -> Problem:
    """The tasks order[begin:end] as a problem, within the rest of the schedule.

    What runs before and behind is where it is: before, it is when a task can start at a device at
    the earliest, `entry`; behind, what has to follow a task on a device, `exit`. So the shortest
    schedule of the window makes the shortest whole. Linear in tasks and edges.
    """
    chosen = np.sort(order[begin:end])
    place = np.full(problem.tasks, -1)
    place[chosen] = np.arange(len(chosen))
    finish = solution.start + problem.seconds[np.arange(problem.tasks), solution.device]
    units = int(problem.unit.max()) + 1
    free = np.zeros(units)
    for i in order[:begin]:
        free[problem.unit[solution.device[i]]] = finish[i]
    rest, remain = _tails(problem, solution.device, order[end:], units)
    entry = np.maximum(problem.entry[chosen], free[problem.unit])
    behind = np.maximum(problem.exit[chosen], remain[problem.unit])
    devices = np.arange(len(problem.limit))
    into, out = place[problem.sink] >= 0, place[problem.source] >= 0
    for edge in np.flatnonzero(into & ~out):
        i, row = problem.source[edge], place[problem.sink[edge]]
        way = transfer_seconds(problem, problem.nbytes[edge], solution.device[i], devices)
        entry[row] = np.maximum(entry[row], finish[i] + way)
    for edge in np.flatnonzero(out & ~into):
        row, j = place[problem.source[edge]], problem.sink[edge]
        way = transfer_seconds(problem, problem.nbytes[edge], devices, solution.device[j])
        behind[row] = np.maximum(behind[row], way + rest[j])
    seconds = problem.seconds[chosen].copy()
    seconds[np.isinf(entry) | np.isinf(behind)] = np.inf
    inner = into & out
    outside = np.setdiff1d(order, chosen)
    held = np.bincount(solution.device[outside], problem.memory[outside], len(problem.limit))
    return Problem(
        seconds=seconds,
        source=place[problem.source[inner]],
        sink=place[problem.sink[inner]],
        nbytes=problem.nbytes[inner],
        latency=problem.latency,
        per_byte=problem.per_byte,
        entry=np.where(np.isinf(entry), 0.0, entry),
        exit=np.where(np.isinf(behind), 0.0, behind),
        unit=problem.unit,
        memory=problem.memory[chosen],
        limit=problem.limit - held,
    )


def _tails(
    problem: Problem, device: np.ndarray, order: np.ndarray, units: int
) -> tuple[np.ndarray, np.ndarray]:
    """Seconds from the start of each task to the end of the run, and of the first of each unit.

    `order` are the tasks from some moment on.
    """
    rest, remain = np.zeros(problem.tasks), np.zeros(units)
    begins, edges = problem.outgoing
    for i in order[::-1]:
        q = device[i]
        behind = max(problem.exit[i, q], remain[problem.unit[q]])
        out = edges[begins[i] : begins[i + 1]]
        if len(out):
            sinks = problem.sink[out]
            way = transfer_seconds(problem, problem.nbytes[out], q, device[sinks])
            behind = max(behind, (way + rest[sinks]).max())
        rest[i] = remain[problem.unit[q]] = behind + problem.seconds[i, q]
    return rest, remain
