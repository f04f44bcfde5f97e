"""Task graphs to schedule, made anew from a seed."""

import numpy as np

from hetsched.problem import Problem, Solution


def layered(tasks: int, devices: int, ratio: float, seed: int, unsupported: float = 0.1) -> Problem:
    """A random layered graph on unrelated devices.

    `ratio` is the mean transfer over the mean work (CCR); a task cannot run on a device with
    probability `unsupported`, but on one at least. Work is uniform in [0.2, 1.8] of a task's own
    mean on each device (beta 1 of the literature, with a floor).
    """
    rng = np.random.default_rng(seed)
    layer = np.sort(rng.integers(0, max(2, round(tasks**0.5)), tasks))
    ends = set()
    for sink in range(tasks):
        earlier = np.flatnonzero(layer < layer[sink])
        if not len(earlier):
            continue
        near = earlier[layer[earlier] >= layer[sink] - 2]
        pool = near if len(near) else earlier
        count = min(len(pool), int(rng.integers(1, 4)))
        ends |= {(sink, int(source)) for source in rng.choice(pool, count, replace=False)}
    pairs = np.array(sorted(ends), np.int64).reshape(-1, 2)
    mean = rng.uniform(0.1, 1.9, tasks)
    seconds = mean[:, None] * rng.uniform(0.2, 1.8, (tasks, devices))
    cannot = rng.random((tasks, devices)) < unsupported
    cannot[np.arange(tasks), rng.integers(0, devices, tasks)] = False
    seconds[cannot] = np.inf
    nbytes = rng.uniform(0.1, 1.9, len(pairs)) * ratio
    return problem(seconds, pairs[:, 1], pairs[:, 0], nbytes)


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
