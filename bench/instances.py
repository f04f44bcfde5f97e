"""Task graphs to schedule, made anew from a seed: families of shapes, times and bytes drawn."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from hetsched.problem import Problem, Solution

# The number of tasks, and the two ends of each edge.
Shape = tuple[int, np.ndarray, np.ndarray]


def layered(
    tasks: int,
    devices: int,
    ratio: float,
    seed: int,
    unsupported: float = 0.1,
    layers: float = 0.5,
    room: float = 0.0,
) -> Problem:
    """A random layered graph, of tasks ** layers layers; the rest as `instance` has it.

    A task reads from one to three of the two layers before its own.
    """
    rng = np.random.default_rng(seed)
    layer = np.sort(rng.integers(0, max(2, round(tasks**layers)), tasks))
    # Of each task: the first that it may read from, and the first that it may not.
    until = np.searchsorted(layer, layer)
    since = np.searchsorted(layer, layer - 2)
    since[since == until] = 0
    reads = np.minimum(rng.integers(1, 4, tasks), until - since)
    sink = np.repeat(np.arange(tasks), reads)
    source = since[sink] + (rng.random(len(sink)) * (until - since)[sink]).astype(np.int64)
    return drawn((tasks, source, sink), devices, ratio, rng, unsupported, room)


def instance(
    family: str,
    tasks: int,
    devices: int,
    ratio: float,
    seed: int,
    unsupported: float = 0.1,
    room: float = 0.0,
) -> Problem:
    """The largest graph of a family with at most `tasks` tasks, or its smallest.

    `ratio` is the mean transfer over the mean work (CCR). Work is uniform in [0.2, 1.8] of a task's
    own mean on each device (beta 1 of the literature, with a floor). A task cannot run on a device
    with probability `unsupported`, but on one at least.

    With `room`, memory is limited: tasks hold 1 to 9 bytes each, and a device has `room` times what
    it needs in a hidden placement, so that from 1 on all fit.
    """
    made = FAMILIES[family]
    if isinstance(made, float):
        return layered(tasks, devices, ratio, seed, unsupported, made, room)
    size, above = 1, 2
    while made(above)[0] <= tasks:
        size, above = above, 2 * above
    while above - size > 1:
        middle = (size + above) // 2
        size, above = (middle, above) if made(middle)[0] <= tasks else (size, middle)
    rng = np.random.default_rng(seed)
    return drawn(made(size), devices, ratio, rng, unsupported, room)


def families() -> tuple[str, ...]:
    return tuple(FAMILIES)


def drawn(
    shape: Shape,
    devices: int,
    ratio: float,
    rng: np.random.Generator,
    unsupported: float,
    room: float,
) -> Problem:
    """Times, bytes and memory for a shape, as `instance` says. An edge that comes twice is one."""
    tasks, source, sink = shape
    pairs = np.unique(sink * tasks + source)
    sink, source = pairs // tasks, pairs % tasks
    mean = rng.uniform(0.1, 1.9, tasks)
    seconds = mean[:, None] * rng.uniform(0.2, 1.8, (tasks, devices))
    cannot = rng.random((tasks, devices)) < unsupported
    cannot[np.arange(tasks), rng.integers(0, devices, tasks)] = False
    seconds[cannot] = np.inf
    nbytes = rng.uniform(0.1, 1.9, len(pairs)) * ratio
    if not room:
        return problem(seconds, source, sink, nbytes)
    memory = rng.integers(1, 10, tasks).astype(float)
    hidden = np.argmin(rng.random((tasks, devices)) + cannot, axis=1)
    limit = np.ceil(room * np.bincount(hidden, memory, devices))
    return problem(seconds, source, sink, nbytes, memory, limit)


def problem(
    seconds: np.ndarray,
    source: np.ndarray,
    sink: np.ndarray,
    nbytes: np.ndarray,
    memory: np.ndarray | None = None,
    limit: np.ndarray | None = None,
) -> Problem:
    """Each device a unit of its own, a byte a second on each link, no latency; edges by sink."""
    tasks, devices = seconds.shape
    return Problem(
        seconds=seconds,
        source=source,
        sink=sink,
        nbytes=nbytes,
        latency=np.zeros((devices, devices)),
        per_byte=1.0 - np.eye(devices),
        entry=np.zeros_like(seconds),
        exit=np.zeros_like(seconds),
        unit=np.arange(devices),
        memory=np.zeros(tasks) if memory is None else memory,
        limit=np.full(devices, np.inf) if limit is None else limit,
        names=tuple(f"t{i}" for i in range(tasks)),
        devices=tuple(f"d{i}" for i in range(devices)),
    )


def odd(seed: int, most: int = 8) -> Problem:
    """1 to `most` tasks on 1 to 3 devices with all that a problem can have but contention.

    Tasks without work or with hardly any, slow and missing links, devices of one unit, memory that
    need not suffice, entry and exit. Not each has a schedule.
    """
    rng = np.random.default_rng(seed)
    tasks, devices = int(rng.integers(1, most + 1)), int(rng.integers(1, 4))
    seconds = rng.choice([0.0, 1e-6, 0.1, 0.25, 0.3, 0.7], (tasks, devices)) * rng.uniform(0.5, 2)
    cannot = rng.random(seconds.shape) < 0.2
    cannot[np.arange(tasks), rng.integers(0, devices, tasks)] = False
    pairs = [(i, j) for j in range(tasks) for i in range(j) if rng.random() < 0.5]
    source, sink = np.array(pairs, np.int64).reshape(-1, 2).T
    latency = rng.choice([0.0, 0.05, 0.4, np.inf], (devices, devices), p=[0.3, 0.3, 0.3, 0.1])
    per_byte = rng.choice([0.0, 0.1, 0.3], (devices, devices))
    for pair in latency, per_byte:
        np.fill_diagonal(pair, 0.0)
    made = problem(
        np.where(cannot, np.inf, seconds),
        source,
        sink,
        rng.choice([0.0, 0.5, 1.0, 2.5], len(pairs)),
        rng.choice([0.0, 0.1, 1.0], tasks),
        np.where(rng.random(devices) < 0.3, rng.choice([0.3, 1.2, 2.0], devices), np.inf),
    )
    return replace(
        made,
        latency=latency,
        per_byte=per_byte,
        entry=rng.choice([0.0, 0.0, 0.2], seconds.shape),
        exit=rng.choice([0.0, 0.0, 0.2], seconds.shape),
        unit=np.zeros(devices, np.int64) if rng.random() < 0.2 else np.arange(devices),
    )


def planted(
    tasks: int, devices: int, ratio: float, seed: int, unsupported: float = 0.1
) -> tuple[Problem, Solution]:
    """A graph on unrelated devices with a schedule that is known to be shortest, at any size.

    The schedule comes first: every device is packed without a gap from 0 to T, and edges are drawn
    only where data arrive in time, many of them at the very last moment. Each device has a
    price y, and a task costs nowhere less, in seconds times price, than at its home; so the work
    of any schedule, at these prices, is worth T at least, and no schedule ends before T. A task's
    home need not be where it is fastest.

    `ratio` is the mean transfer of an edge over the mean work, `unsupported` the probability that
    a task cannot run on a device that is not its home. All times of the schedule are multiples of
    2**-20, so that sums of floats are exact. The order of the tasks does not tell the schedule:
    it is random but for the depth in the graph. Linear but for sorting; at least a task a device.
    """
    rng = np.random.default_rng(seed)
    home = rng.permutation(np.arange(tasks) % devices)
    length = round(tasks / devices * 2**20)
    start, end = np.empty(tasks, np.int64), np.empty(tasks, np.int64)
    for device in range(devices):
        (own,) = np.nonzero(home == device)
        until = np.cumsum(rng.uniform(0.2, 1.8, len(own)))
        end[own] = np.rint(until / until[-1] * length)
        start[own[1:]], start[own[0]] = end[own[:-1]], 0
    source, sink, delay = _timely_edges(rng, home, start, end, ratio)
    # Deeper tasks behind, any order among those of one depth.
    depth = [0] * tasks
    by_start = np.argsort(start[sink], kind="stable")
    for i, j in zip(source[by_start].tolist(), sink[by_start].tolist(), strict=True):
        depth[j] = max(depth[j], depth[i] + 1)
    order = np.lexsort((rng.random(tasks), depth))
    place = np.argsort(order)
    source, sink = place[source], place[sink]
    home, start, end = home[order], start[order], end[order]
    edges = np.lexsort((source, sink))

    price = rng.uniform(0.5, 1.5, devices)
    work = (end - start) / 2**20
    seconds = (work * price[home])[:, None] / price * rng.uniform(1, 2, (tasks, devices))
    seconds[rng.random((tasks, devices)) < unsupported] = np.inf
    seconds[np.arange(tasks), home] = work
    made = problem(seconds, source[edges], sink[edges], delay[edges] / 2**20)
    makespan = length / 2**20
    return made, Solution(home, start / 2**20, makespan, makespan, "planted")


def _timely_edges(
    rng: np.random.Generator, home: np.ndarray, start: np.ndarray, end: np.ndarray, ratio: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Source, sink and ticks of transfer of up to three edges into each task, all in time."""
    tasks = len(home)
    sink = np.repeat(np.arange(tasks), rng.integers(1, 4, tasks))
    delay = np.rint(rng.uniform(0.1, 1.9, len(sink)) * ratio * 2**20).astype(np.int64)
    ended = np.argsort(end, kind="stable")
    # One of the last that had finished when the transfer had to begin.
    latest = np.searchsorted(end[ended], start[sink] - delay, "right") - rng.geometric(
        0.3, len(sink)
    )
    source = ended[np.maximum(latest, 0)]
    kept = latest >= 0
    # A third of the edges stay on the device, from the task right before.
    before = np.full(tasks, -1)
    packed = np.lexsort((start, home))
    same = home[packed[1:]] == home[packed[:-1]]
    before[packed[1:][same]] = packed[:-1][same]
    stays = (rng.random(len(sink)) < 1 / 3) & (before[sink] >= 0)
    source, kept = np.where(stays, before[sink], source), kept | stays
    slack = start[sink] - end[source]
    tight = (home[source] != home[sink]) & (slack <= 2 * ratio * 2**20)
    delay = np.where(tight & (rng.random(len(sink)) < 2 / 3), slack, delay)
    _, first = np.unique(sink * tasks + source, return_index=True)
    first = first[kept[first]]
    return source[first], sink[first], delay[first]


# Shapes, of a size that is their own.


def chain(size: int) -> Shape:
    return size, np.arange(size - 1), np.arange(1, size)


def out_tree(size: int) -> Shape:
    """Each task is read by two."""
    sink = np.arange(1, size)
    return size, (sink - 1) // 2, sink


def in_tree(size: int) -> Shape:
    """Each task reads from two: `out_tree` backwards."""
    _, source, sink = out_tree(size)
    return size, size - 1 - sink, size - 1 - source


def fork_join(size: int) -> Shape:
    """`size` stages, each a fork to `size` tasks and their join, the fork of the next."""
    stage, branch = (axis.ravel() for axis in np.mgrid[0:size, 0:size])
    fork = stage * (size + 1)
    inner = fork + 1 + branch
    source, sink = np.concatenate([fork, inner]), np.concatenate([inner, fork + size + 1])
    return size * (size + 1) + 1, source, sink


def gaussian(size: int) -> Shape:
    """Elimination of a column at a time: a pivot, then each column behind it.

    References
    ----------
    Topcuoglu, Hariri and Wu, IEEE TPDS 13(3), 2002, https://doi.org/10.1109/71.993206
    """
    # Task (k, k) is a pivot, (k, j) the update of column j by it; they stand in rows.
    k, j = (axis.ravel() for axis in np.mgrid[0:size, 0 : size + 1])
    k, j = k[j > k], j[j > k]
    pivot = k * (size + 1) - k * (k - 1) // 2
    update = pivot + j - k
    again = k < size - 1
    # The next step reads the column: as its pivot, or to update it.
    source = np.concatenate([pivot, update[again]])
    return int(update.max()) + 1, source, np.concatenate([update, (update + size - k)[again]])


def fft(size: int) -> Shape:
    """The recursive calls, a tree with 2 ** size leaves, then the butterflies.

    References
    ----------
    Topcuoglu, Hariri and Wu, IEEE TPDS 13(3), 2002, https://doi.org/10.1109/71.993206
    """
    points = 2**size
    calls, source, sink = out_tree(2 * points - 1)
    level, point = (axis.ravel() for axis in np.mgrid[0:size, 0:points])
    # The leaves of the tree are level 0, which stands before the tasks of the levels behind it.
    before = calls - points + level * points
    crossed = point ^ (1 << level)
    return (
        calls + size * points,
        np.concatenate([source, before + point, before + crossed]),
        np.concatenate([sink, before + points + point, before + points + point]),
    )


def lu(size: int) -> Shape:
    """LU of `size` x `size` tiles, without pivoting: task (k, i, j) is step k on tile (i, j)."""
    k, i, j = (axis.ravel() for axis in np.mgrid[0:size, 0:size, 0:size])
    return _steps(k, i, j, (i >= k) & (j >= k))


def cholesky(size: int) -> Shape:
    """Cholesky of `size` x `size` tiles, of which the lower half is there."""
    k, i, j = (axis.ravel() for axis in np.mgrid[0:size, 0:size, 0:size])
    return _steps(k, i, j, (i >= j) & (j >= k))


def _steps(k: np.ndarray, i: np.ndarray, j: np.ndarray, there: np.ndarray) -> Shape:
    """Step k factors tile (k, k), then the tiles of its row and column, then updates the rest."""
    k, i, j = k[there], i[there], j[there]
    size = int(k.max()) + 1
    tile = np.full((size, size, size), -1)
    # Within a step the tile (k, k) is first, then its row and column, then the rest.
    inner = (i > k) & (j > k)
    order = np.lexsort((j, i, inner, k))
    tile[k[order], i[order], j[order]] = np.arange(len(order))
    own = tile[k, i, j]
    edge = (i > k) ^ (j > k)
    # An update reads its row's tile in column k, and its column's in row k; of a symmetric matrix
    # that is the tile of the other half.
    across = np.where(tile[k, k, j] >= 0, tile[k, k, j], tile[k, j, k])
    later = k > 0
    source = [tile[k, k, k][edge], tile[k, i, k][inner], across[inner], tile[k - 1, i, j][later]]
    sink = [own[edge], own[inner], own[inner], own[later]]
    return len(order), np.concatenate(source), np.concatenate(sink)


def stencil(size: int) -> Shape:
    """`size` cells for as many steps; a cell reads itself and both neighbours a step before."""
    step, cell, by = (axis.ravel() for axis in np.mgrid[1 : size + 1, 0:size, -1:2])
    inside = (cell + by >= 0) & (cell + by < size)
    source = ((step - 1) * size + cell + by)[inside]
    return size * (size + 1), source, (step * size + cell)[inside]


def wavefront(size: int) -> Shape:
    """A square of cells, each of which reads the one above and the one to its left."""
    cell = np.arange(size * size)
    down, right = cell[cell >= size], cell[cell % size > 0]
    source, sink = np.concatenate([down - size, right - 1]), np.concatenate([down, right])
    return size * size, source, sink


def map_reduce(size: int) -> Shape:
    """`size` tasks, each of which eight others read, and one that reads these."""
    one, other = (axis.ravel() for axis in np.mgrid[0:size, size : size + 8])
    source = np.concatenate([one, np.arange(size, size + 8)])
    return size + 9, source, np.concatenate([other, np.full(8, size + 8)])


# A shape, or of a random layered graph the share that the logarithm of its depth has of all.
FAMILIES: dict[str, Callable[[int], Shape] | float] = {
    "layered": 0.5,
    "wide": 0.25,
    "deep": 0.75,
    "chain": chain,
    "out_tree": out_tree,
    "in_tree": in_tree,
    "fork_join": fork_join,
    "gaussian": gaussian,
    "fft": fft,
    "lu": lu,
    "cholesky": cholesky,
    "stencil": stencil,
    "wavefront": wavefront,
    "map_reduce": map_reduce,
}
