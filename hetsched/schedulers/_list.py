"""List scheduling, in parts that schedulers put together: an order, a choice, and insertion.

`order_by(arrays, priority) -> order`
    a topological order, of what is ready the highest priority first;
`place(arrays, order, bias, ahead, insertion, home) -> device, start, sent, failed`
    one task after the other where it finishes first;
`decode(arrays, order, device, insertion) -> start, sent`
    the same with the devices given;
`makespan(arrays, device, start) -> seconds`;
`homes(arrays, order, tries) -> home, ...`
    a device for each task, so that memory suffices;
`list_schedule(problem, ...) -> Solution`
    all of it for a scheduler, with memory and what to say when there is no way.

The arrays are `Problem.arrays`. All of it is deterministic, ties go to the first device and task.
"""

from collections.abc import Iterator
from dataclasses import replace

import networkx
import numpy as np
from numba import njit

from hetsched.errors import InfeasiblePlan
from hetsched.problem import Arrays, Problem, Solution
from hetsched.schedulers._gaps import Gaps, behind, find, inner, new_gaps, take
from hetsched.schedulers._rank import remaining

# How many tasks are asked to leave a full device for one that wants to go there.
ASKED = 64
# More than any task has inputs.
PASSED = 1 << 40
# Children of each node of the heap of what is ready: the more, the fewer levels.
WAYS = 4
# How many times a task is given a home before the search for homes is given up, beside once each.
TRIES = 200_000


def order_by(a: Arrays, priority: np.ndarray) -> np.ndarray:
    """The tasks, each behind what it reads from; of those that are ready, the highest priority.

    A tie goes to the first in position. O(n log n + m).
    """
    ranked = np.argsort(-priority, kind="stable").astype(np.int64)
    if (priority[a.source] >= priority[a.sink]).all():
        # No task has a higher priority than what it reads from: sorting is all.
        return ranked
    found: np.ndarray = _ready_first(a, priority, ranked)
    return found


@njit(cache=True, nogil=True)
def _ready_first(a: Arrays, priority: np.ndarray, ranked: np.ndarray) -> np.ndarray:
    """`ranked` has the tasks by priority: most are ready when it is their turn."""
    tasks = len(priority)
    # The inputs that each waits for, less `PASSED` once it has had its turn.
    waits = a.incoming[1:] - a.incoming[:-1]
    # A heap of what became ready behind its turn, which comes first, with its priorities beside it.
    heap = np.empty(tasks, np.int64)
    keys = np.empty(tasks)
    size = turn = 0
    order = np.empty(tasks, np.int64)
    for position in range(tasks):
        if size:
            task = heap[0]
            size = _pop(heap, keys, size)
        else:
            while waits[ranked[turn]] != 0:
                waits[ranked[turn]] -= PASSED
                turn += 1
            task = ranked[turn]
            turn += 1
        order[position] = task
        for edge in range(a.begins[task], a.begins[task + 1]):
            sink = a.reader[edge]
            waits[sink] -= 1
            if waits[sink] == -PASSED:
                size = _push(heap, keys, size, sink, priority[sink])
    return order


@inner
def _push(heap: np.ndarray, keys: np.ndarray, size: int, task: int, key: float) -> int:
    hole = size
    while hole > 0:
        above = (hole - 1) // WAYS
        if key < keys[above] or (key == keys[above] and task > heap[above]):
            break
        heap[hole], keys[hole] = heap[above], keys[above]
        hole = above
    heap[hole], keys[hole] = task, key
    return size + 1


@inner
def _pop(heap: np.ndarray, keys: np.ndarray, size: int) -> int:
    size -= 1
    task, key = heap[size], keys[size]
    hole = 0
    while WAYS * hole + 1 < size:
        below = WAYS * hole + 1
        for other in range(below + 1, min(below + WAYS, size)):
            if keys[other] > keys[below] or (
                keys[other] == keys[below] and heap[other] < heap[below]
            ):
                below = other
        if key > keys[below] or (key == keys[below] and task < heap[below]):
            break
        heap[hole], keys[hole] = heap[below], keys[below]
        hole = below
    heap[hole], keys[hole] = task, key
    return size


@inner
def _free(a: Arrays) -> tuple[Gaps, np.ndarray]:
    """The lanes, units first and then, where they contend, links; and (m, p) when tensors leave.

    What has not been sent leaves at infinity.
    """
    tasks, devices = a.seconds.shape
    units = 0
    for unit in a.unit:
        units = max(units, unit + 1)
    links = devices * devices if a.contention else 0
    least = np.zeros(units + links)
    least[:units] = np.inf
    for task in range(tasks):
        for device in range(devices):
            unit = a.unit[device]
            least[unit] = min(least[unit], a.seconds[task, device])
    moves = len(a.source) if a.contention else 0
    return new_gaps(least, tasks + moves), np.full((moves, devices), np.inf)


@inner
def _way(a: Arrays, nbytes: float, source: int, sink: int) -> float:
    """Seconds that data need from device to device."""
    if source == sink:
        return 0.0
    seconds: float = a.latency[source, sink] + nbytes * a.per_byte[source, sink]
    return seconds


@inner
def _ready_over_links(
    a: Arrays,
    task: int,
    on: int,
    device: np.ndarray,
    finish: np.ndarray,
    gaps: Gaps,
    left: np.ndarray,
    sent: np.ndarray,
    send: bool,
) -> float:
    """When all that `task` reads has arrived on device `on` if links contend.

    With `send` the transfers are made and written to `sent`. They are taken as their sources
    finish, ties in order of the edges; each goes in the first gap of its link behind the one
    before it.
    """
    devices = len(a.limit)
    lane = len(gaps.least) - devices * devices
    first = a.incoming[task]
    edges = np.empty(a.incoming[task + 1] - first, np.int64)
    for i in range(len(edges)):
        edge, hole = first + i, i
        while hole > 0 and finish[a.source[edges[hole - 1]]] > finish[a.source[edge]]:
            edges[hole] = edges[hole - 1]
            hole -= 1
        edges[hole] = edge
    ready: float = a.entry[task, on]
    until = np.zeros(devices)
    for i in range(len(edges)):
        edge = edges[i]
        source = a.source[edge]
        place = device[source]
        if place == on:
            ready = max(ready, finish[source])
            continue
        seconds = _way(a, a.nbytes[edge], place, on)
        if seconds == np.inf:
            return np.inf
        start = left[a.tensor[edge], on]
        if start == np.inf and seconds == 0:
            start = finish[source]
        elif start == np.inf:
            again = False
            for j in range(i):
                again = again or a.tensor[edges[j]] == a.tensor[edge]
            if again:
                continue
            link = lane + place * devices + on
            start, row, index = find(gaps, link, max(finish[source], until[place]), seconds)
            until[place] = start + seconds
            if send:
                take(gaps, link, row, index, start, seconds)
        ready = max(ready, start + seconds)
        if send:
            left[a.tensor[edge], on] = start
            sent[edge] = start
    return ready


@njit(cache=True, nogil=True)
def decode(
    a: Arrays, order: np.ndarray, device: np.ndarray, insertion: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The start of each task, taken in `order`, on its device, and of the transfer of each edge.

    `order` is topological. With `insertion` a task takes the first gap of its unit that fits, else
    it goes behind all that the unit has got so far. Infinite where a task cannot run or be reached.
    The second array is empty unless links contend.
    """
    gaps, left = _free(a)
    start = np.empty(len(order))
    finish = np.empty(len(order))
    sent = np.full(len(left), np.nan)
    for task in order:
        on = device[task]
        if a.contention:
            ready = _ready_over_links(a, task, on, device, finish, gaps, left, sent, True)
        else:
            ready = a.entry[task, on]
            for edge in range(a.incoming[task], a.incoming[task + 1]):
                source = a.source[edge]
                way = _way(a, a.nbytes[edge], device[source], on)
                ready = max(ready, finish[source] + way)
        seconds = a.seconds[task, on]
        if ready + seconds == np.inf:
            start[task] = np.inf
            finish[task] = np.inf
            continue
        unit = a.unit[on]
        if insertion:
            begin, row, index = find(gaps, unit, ready, seconds)
        else:
            begin, row, index = behind(gaps, unit, ready)
        take(gaps, unit, row, index, begin, seconds)
        start[task] = begin
        finish[task] = begin + seconds
    return start, sent


@njit(cache=True, nogil=True)
def makespan(a: Arrays, device: np.ndarray, start: np.ndarray) -> float:
    """When the last task has finished and its results are where they go."""
    last = 0.0
    for task in range(len(start)):
        on = device[task]
        last = max(last, start[task] + a.seconds[task, on] + a.exit[task, on])
    return last


@njit(cache=True, nogil=True)
def place(
    a: Arrays, order: np.ndarray, bias: np.ndarray, ahead: bool, insertion: bool, home: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Each task, in topological `order`, on the device where finish + exit + bias are least.

    `bias` is (n, p) seconds; infinite forbids. With `ahead` the finish that counts is that of the
    last child to finish, each where that is earliest, as far as its other inputs are placed yet.

    `home` is a device for each task which all together fit in memory; a task goes elsewhere only if
    the rest can still be held, some of it in another home. With no home (length 0) memory is not
    looked at.

    Device, start, start of each edge's transfer (empty unless links contend), and the first task
    that cannot be reached on any device, or -1.
    """
    tasks, devices = a.seconds.shape
    gaps, left = _free(a)
    sent = np.full(len(left), np.nan)
    device = np.full(tasks, -1)
    start = np.zeros(tasks)
    finish = np.zeros(tasks)
    # When what has been placed so far is there; links that contend are asked later.
    arrived = a.entry.copy()
    cost = np.empty(devices)
    begins = np.empty(devices)
    rows = np.empty(devices, np.int64)
    indices = np.empty(devices, np.int64)
    held = np.zeros(devices)
    home = home.copy()
    guests = _guests(a, order, home, held)
    for task in order:
        for on in range(devices):
            cost[on] = np.inf
            seconds = a.seconds[task, on]
            if seconds == np.inf or bias[task, on] == np.inf:
                continue
            ready = arrived[task, on]
            if a.contention:
                ready = _ready_over_links(a, task, on, device, finish, gaps, left, sent, False)
            if ready == np.inf:
                continue
            if insertion:
                begins[on], rows[on], indices[on] = find(gaps, a.unit[on], ready, seconds)
            else:
                begins[on], rows[on], indices[on] = behind(gaps, a.unit[on], ready)
            end = begins[on] + seconds
            cost[on] = end + a.exit[task, on]
            if ahead:
                cost[on] = max(cost[on], _last_child(a, task, on, end, arrived, gaps, insertion))
            cost[on] += bias[task, on]
        while True:
            on = int(np.argmin(cost))
            if cost[on] == np.inf:
                return device, start, sent, task
            if len(home) == 0 or _settle(a, task, on, home, held, guests):
                break
            cost[on] = np.inf
        seconds = a.seconds[task, on]
        if a.contention:
            _ready_over_links(a, task, on, device, finish, gaps, left, sent, True)
        take(gaps, a.unit[on], rows[on], indices[on], begins[on], seconds)
        device[task] = on
        start[task] = begins[on]
        finish[task] = begins[on] + seconds
        for edge in range(a.begins[task], a.begins[task + 1]):
            row = arrived[a.reader[edge]]
            for other in range(devices):
                way = _way(a, a.read_nbytes[edge], on, other)
                row[other] = max(row[other], finish[task] + way)
    return device, start, sent, -1


@inner
def _last_child(
    a: Arrays,
    task: int,
    on: int,
    end: float,
    arrived: np.ndarray,
    gaps: Gaps,
    insertion: bool,
) -> float:
    """When the last task that reads from `task` has finished, each where that is first.

    That `task` runs on device `on` until `end` need not be taken from the gaps: its readers start
    behind it. The links to them are counted as if they were free.
    """
    last = 0.0
    readers = a.reader[a.begins[task] : a.begins[task + 1]]
    read_nbytes = a.read_nbytes[a.begins[task] : a.begins[task + 1]]
    index = 0
    while index < len(readers):
        child = readers[index]
        # Several edges to one task stand together.
        until = index + 1
        while until < len(readers) and readers[until] == child:
            until += 1
        first = np.inf
        for other in range(len(a.limit)):
            seconds = a.seconds[child, other]
            ready = arrived[child, other]
            for nbytes in read_nbytes[index:until]:
                ready = max(ready, end + _way(a, nbytes, on, other))
            # What cannot be ready before a better end needs no search.
            if ready + seconds == np.inf or ready + seconds + a.exit[child, other] >= first:
                continue
            if insertion:
                begin = find(gaps, a.unit[other], ready, seconds)[0]
            else:
                begin = behind(gaps, a.unit[other], ready)[0]
            first = min(first, begin + seconds + a.exit[child, other])
        last = max(last, first)
        index = until
    return last


@inner
def _guests(
    a: Arrays, order: np.ndarray, home: np.ndarray, held: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Who lives where, the last of the order first: the task before, and behind each in its list.

    Behind the tasks the second array has the first of each device. Adds up what is `held`.
    """
    tasks, devices = len(home), len(held)
    before = np.full(tasks, -1)
    follows = np.full(tasks + devices, -1)
    if tasks:
        for task in order:
            held[home[task]] += a.memory[task]
            _move_in(task, home[task], before, follows)
    return before, follows


@inner
def _move_in(task: int, on: int, before: np.ndarray, follows: np.ndarray) -> None:
    head = len(before) + on
    first = follows[head]
    follows[head] = task
    before[task] = head
    follows[task] = first
    if first >= 0:
        before[first] = task


@inner
def _move_out(task: int, before: np.ndarray, follows: np.ndarray) -> None:
    follows[before[task]] = follows[task]
    if follows[task] >= 0:
        before[follows[task]] = before[task]


@inner
def _settle(
    a: Arrays,
    task: int,
    on: int,
    home: np.ndarray,
    held: np.ndarray,
    guests: tuple[np.ndarray, np.ndarray],
) -> bool:
    """Whether `task` can be on a device for good, others that live there moving if they must."""
    before, follows = guests
    at = home[task]
    if at == on:
        _move_out(task, before, follows)
        return True
    held[at] -= a.memory[task]
    moved = np.empty(ASKED, np.int64)
    count = 0
    guest = follows[len(home) + on]
    for _ in range(ASKED):
        if guest < 0 or held[on] + a.memory[task] <= a.limit[on]:
            break
        following = follows[guest]
        best = -1
        room = a.memory[guest]
        for other in range(len(held)):
            if other == on or a.seconds[guest, other] == np.inf or a.memory[guest] == 0:
                continue
            if a.limit[other] - held[other] >= room:
                best, room = other, a.limit[other] - held[other]
        if best >= 0:
            _move(a, guest, best, home, held, guests)
            moved[count] = guest
            count += 1
        guest = following
    if held[on] + a.memory[task] > a.limit[on]:
        for index in range(count):
            _move(a, moved[index], on, home, held, guests)
        held[at] += a.memory[task]
        return False
    held[on] += a.memory[task]
    home[task] = on
    _move_out(task, before, follows)
    return True


@inner
def _move(
    a: Arrays,
    guest: int,
    on: int,
    home: np.ndarray,
    held: np.ndarray,
    guests: tuple[np.ndarray, np.ndarray],
) -> None:
    before, follows = guests
    held[home[guest]] -= a.memory[guest]
    held[on] += a.memory[guest]
    home[guest] = on
    _move_out(guest, before, follows)
    _move_in(guest, on, before, follows)


@njit(cache=True, nogil=True)
def homes(a: Arrays, order: np.ndarray, tries: int) -> tuple[np.ndarray, np.ndarray, int, bool]:
    """A device for each task, so that each can hold all of its tasks, found depth first.

    Tasks are taken in `order`, each on the device with the most room left. With them: what the
    devices hold, or held when the first task found no room; that task, or -1 where all have a home;
    whether there are no other ways to try.
    """
    tasks, devices = a.seconds.shape
    home = np.full(tasks, -1)
    held = np.zeros(devices)
    tried = np.zeros((tasks, devices), np.bool_)
    tries += tasks
    depth, stuck = 0, -1
    full = held
    while depth < tasks:
        task = order[depth]
        if home[task] >= 0:
            held[home[task]] -= a.memory[task]
            home[task] = -1
        room = a.memory[task]
        for on in range(devices):
            if tried[depth, on] or a.seconds[task, on] == np.inf:
                continue
            if a.limit[on] - held[on] >= room and (home[task] < 0 or a.limit[on] - held[on] > room):
                home[task], room = on, a.limit[on] - held[on]
        if home[task] >= 0:
            tries -= 1
            tried[depth, home[task]] = True
            held[home[task]] += a.memory[task]
            depth += 1
            continue
        if stuck < 0:
            stuck, full = task, held.copy()
        if depth == 0 or tries <= 0:
            return home, full, stuck, depth == 0
        tried[depth] = False
        depth -= 1
    return home, held, -1, True


def find_home(problem: Problem) -> np.ndarray:
    """A device for each task so that memory suffices; none (length 0) where all fit anywhere.

    Raises
    ------
    InfeasiblePlan
        A task can run nowhere, or no way was found to hold all tasks.
    """
    can = np.isfinite(problem.seconds)
    count = can.sum(axis=1)
    if not count.all():
        raise InfeasiblePlan(
            f"no device can run {name_of(problem, int(np.argmin(count)))}, and get its inputs and "
            "return its results; add a device or a link"
        )
    if problem.memory.sum() <= problem.limit.min(initial=np.inf):
        return np.empty(0, np.int64)
    # Those with the least choice first, then the largest.
    order = np.lexsort((-problem.memory, count, problem.memory == 0))
    home: np.ndarray
    home, held, stuck, all_tried = homes(problem.arrays, order, TRIES)
    if stuck < 0:
        return home
    devices = problem.devices or tuple(map(str, range(len(held))))
    mebi = 2.0**20
    rooms = [
        f"'{devices[on]}' holds {held[on] / mebi:.4g} of {problem.limit[on] / mebi:.4g} MiB"
        for on in np.flatnonzero(can[stuck])
    ]
    raise InfeasiblePlan(
        f"{name_of(problem, stuck)} needs {problem.memory[stuck] / mebi:.4g} MiB, and where it can "
        f"run {', '.join(rooms)}; "
        + ("no other placement fits" if all_tried else "no placement was found that fits")
        + ": add a device, or raise its memory_bytes"
    )


def name_of(problem: Problem, task: int) -> str:
    return f"'{problem.names[task]}'" if problem.names else f"task {task}"


def list_schedule(
    problem: Problem,
    solver: str,
    priority: np.ndarray,
    bias: np.ndarray | None = None,
    ahead: bool = False,
    insertion: bool = True,
) -> Solution:
    """The tasks by `priority`, each where `place` puts it.

    Where a way ends for lack of a link, devices are left out: for each task those that cannot reach
    all that comes behind it, then all but some that have links with each other.

    Raises
    ------
    InfeasiblePlan
        No such schedule was found; the message has task, device, demand and limit.
    """
    a = problem.arrays
    order = order_by(a, priority)
    bias = np.zeros_like(problem.seconds) if bias is None else bias
    device, start, sent, stuck = place(a, order, bias, ahead, insertion, find_home(problem))
    if stuck >= 0:
        found = []
        for reduced in _linked(problem):
            try:
                home = find_home(reduced)
            except InfeasiblePlan:
                continue
            device, start, sent, failed = place(reduced.arrays, order, bias, ahead, insertion, home)
            if failed < 0:
                found.append((makespan(a, device, start), device, start, sent))
        if not found:
            raise InfeasiblePlan(
                f"{name_of(problem, stuck)} has inputs on devices from which no link leads to one "
                "that can run it; add links, or use another scheduler"
            )
        _, device, start, sent = min(found, key=lambda item: item[0])
    return Solution(
        device=device,
        start=start,
        makespan=makespan(a, device, start),
        solver=solver,
        sent=sent if problem.contention else None,
    )


def _linked(problem: Problem) -> Iterator[Problem]:
    """The problem with fewer devices, so that links are not missed."""
    table = remaining(problem.arrays, 0.0)
    yield replace(problem, seconds=np.where(np.isinf(table), np.inf, problem.seconds))
    both = np.isfinite(problem.latency) & np.isfinite(problem.latency.T)
    pairs = networkx.from_numpy_array(both & ~np.eye(len(both), dtype=bool))
    for clique in sorted(map(sorted, networkx.find_cliques(pairs))):
        seconds = np.full_like(problem.seconds, np.inf)
        seconds[:, clique] = problem.seconds[:, clique]
        yield replace(problem, seconds=seconds)
