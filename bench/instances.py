"""Task graphs to schedule, made anew from a seed."""

import numpy as np

from hetsched.problem import Problem


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
