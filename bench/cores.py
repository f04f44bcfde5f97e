"""Whether two cores are two: those of a virtual machine may be threads of one core for a while.

What runs on both then takes up to twice its time, whoever wrote it, and a figure of that moment is
one of the host's, not of what was to be measured.
"""

import statistics
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from time import perf_counter, sleep

import numba
import numpy as np

from hetsched.host import cores, pinned
from hetsched.store import Store
from hetsched.system import System

# Elements that stay in the first cache, and passes over them: some milliseconds.
ELEMENTS, PASSES = 2048, 40000
ALONE_TURNS = 5
# Looks of which the quickest core alone is what all at once are held against: the clock changes.
LOOKS = 16
# More than this and somebody else has a part of the cores.
WHOLE = 1.3
# Between two looks, and the longest wait of all for them to be whole again.
PAUSE_SECONDS, PATIENCE_SECONDS = 0.1, 120.0


class Probe:
    """Multiply-adds on each of `cores`, alone and on all at once. A context."""

    def __init__(self, cores: Sequence[int]) -> None:
        self.waited_seconds = 0.0
        self.disturbed = 0
        self._cores = tuple(cores)
        self._workers = ThreadPoolExecutor(len(self._cores))
        _multiply_add(np.ones(ELEMENTS, np.float32), 1)
        alone = (self._seconds(self._cores[:1]) for _ in range(ALONE_TURNS))
        self._alone = deque(alone, maxlen=LOOKS)

    @classmethod
    def of(cls, system: System) -> "Probe":
        """For all cores that the devices of `system` compute on."""
        return cls(sorted({core for device in system.devices for core in device.cores}))

    def settle(self) -> None:
        """Waits until each core computes at its full pace while the others do.

        After `PATIENCE_SECONDS` in all it waits no more, and `disturbed` counts what came then.
        """
        self._wait(self.slowdown)

    def separate(self) -> None:
        """Waits until the cores are no threads of one, whoever else uses them; as long as that."""
        self._wait(self.together)

    def together(self) -> float:
        """The time of all cores at once over that of the slowest by itself, both as of now."""
        alone = max(self._seconds((core,)) for core in self._cores)
        return statistics.median(self._seconds(self._cores) for _ in range(3)) / alone

    def _wait(self, ratio: Callable[[], float]) -> None:
        while ratio() > WHOLE:
            if self.waited_seconds >= PATIENCE_SECONDS:
                self.disturbed += 1
                return
            sleep(PAUSE_SECONDS)
            self.waited_seconds += PAUSE_SECONDS

    def told(self) -> dict[str, float]:
        """What belongs beside figures that were taken between waits."""
        return {"waited_seconds": self.waited_seconds, "disturbed_rounds": self.disturbed}

    def slowdown(self) -> float:
        """The time of the slowest of all cores at once over that of one alone."""
        self._alone.append(self._seconds(self._cores[:1]))
        return statistics.median(self._seconds(self._cores) for _ in range(3)) / min(self._alone)

    def _seconds(self, cores: Sequence[int]) -> float:
        waiting = [self._workers.submit(_timed, core) for core in cores]
        wait(waiting)
        return max(future.result() for future in waiting)

    def __enter__(self) -> "Probe":
        return self

    def __exit__(self, *_: object) -> None:
        self._workers.shutdown()


def settled(devices: str, store: Store) -> System:
    """The system of `devices`, its links measured while each core is a whole one.

    Two threads of one core hand over a hundred times as fast as two cores.
    """
    with Probe(cores()) as probe:
        probe.settle()
        return System.local(devices, store)


def _timed(core: int) -> float:
    data = np.ones(ELEMENTS, np.float32)
    with pinned((core,)):
        start = perf_counter()
        _multiply_add(data, PASSES)
        return perf_counter() - start


@numba.njit(nogil=True, fastmath=True, cache=True)
def _multiply_add(data: np.ndarray, passes: int) -> None:
    for _ in range(passes):
        for index in range(data.size):
            data[index] = data[index] * np.float32(0.999) + np.float32(1e-3)
