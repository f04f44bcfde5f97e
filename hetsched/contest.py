"""Which of several executables is the fastest, measured side by side."""

from collections.abc import Mapping, Sequence
from statistics import median
from time import perf_counter

import numpy as np

from hetsched.executable import Executable

# Each runs at least so often, and until so much time is spent on all of them.
LEAST_RUNS = 5
SECONDS = 2.0


def median_latencies(
    executables: Sequence[Executable], inputs: Mapping[str, np.ndarray]
) -> tuple[list[float], int]:
    """The median seconds of a run of each, and the runs: in turns, A B A B, after a warm-up.

    What drifts meanwhile, the clock or other load, meets all of them alike.
    """
    for executable in executables:
        executable.run(inputs)
    times: list[list[float]] = [[] for _ in executables]
    begin = perf_counter()
    while len(times[0]) < LEAST_RUNS or perf_counter() - begin < SECONDS:
        for executable, own in zip(executables, times, strict=True):
            start = perf_counter()
            executable.run(inputs)
            own.append(perf_counter() - start)
    return [median(own) for own in times], len(times[0])
