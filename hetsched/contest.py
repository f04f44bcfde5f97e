"""Which of several executables is the fastest, measured side by side."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import repeat
from statistics import quantiles
from time import perf_counter

import numpy as np

from hetsched.executable import Executable

# Each runs at least so often, and until so much time is spent on all of them.
LEAST_RUNS = 5
SECONDS = 2.0
# Runs of a pipeline in one turn: many more than fill it.
REQUESTS = 64


def latencies(
    executables: Sequence[Executable], inputs: Mapping[str, np.ndarray]
) -> tuple[list[float], int]:
    """The seconds of a run of each, and the runs: in turns, A A B B A A B B.

    What drifts meanwhile, the clock or other load, meets all of them alike. Seconds are the first
    quartile: what disturbs makes runs longer, and those of several devices by more, as a host may
    have two virtual cores be threads of one core for a while.
    """
    return _in_turns([partial(_run_seconds, executable, inputs) for executable in executables])


def paces(
    executables: Sequence[Executable], inputs: Mapping[str, np.ndarray]
) -> tuple[list[float], int]:
    """The same of a run among many: behind each other on one device, else several in flight."""

    def all_runs(executable: Executable) -> float:
        if executable.plan.modelled:
            # A pipeline of simulated devices is not run: as if each run waited for the last one.
            return REQUESTS * _run_seconds(executable, inputs)
        start = perf_counter()
        if len(executable.plan.devices) == 1:
            for _ in range(REQUESTS):
                executable.run(inputs)
        else:
            for _ in executable.map(repeat(inputs, REQUESTS)):
                pass
        return perf_counter() - start

    seconds, rounds = _in_turns([partial(all_runs, executable) for executable in executables])
    return [each / REQUESTS for each in seconds], rounds * REQUESTS


def _run_seconds(executable: Executable, inputs: Mapping[str, np.ndarray]) -> float:
    """Of a run; on the virtual clock where a device is modelled."""
    start = perf_counter()
    executable.run(inputs)
    seconds = perf_counter() - start
    return executable.schedule.makespan if executable.plan.modelled else seconds


def _in_turns(calls: Sequence[Callable[[], float]]) -> tuple[list[float], int]:
    """The first quartiles of what calls tell of their time.

    In each turn a call is made twice, and the second counts: the first finds caches that the others
    have used.
    """
    times: list[list[float]] = [[] for _ in calls]
    begin = perf_counter()
    while len(times[0]) < LEAST_RUNS or perf_counter() - begin < SECONDS:
        for call, own in zip(calls, times, strict=True):
            call()
            own.append(call())
    return [quantiles(own, n=4)[0] for own in times], len(times[0])
