"""What is tried when a device is tuned, and what is chosen of it."""

from collections.abc import Iterable
from dataclasses import dataclass

# A candidate that gains less on the first is not taken: it is within the noise.
LEAST_GAIN = 0.02


@dataclass(frozen=True)
class Step:
    """What long work is at: step `index` of `total`."""

    doing: str
    index: int
    total: int


@dataclass(frozen=True)
class Trial:
    """Median seconds of a workload's candidate, which has this `place` in the compiler's ranking.

    The first is 0; a candidate is a text that the compiler understands.
    """

    workload: str
    candidate: str
    place: int
    seconds: float


def choices(trials: Iterable[Trial]) -> dict[str, str]:
    """The candidate for each workload that is faster than its first one by a margin.

    >>> choices([Trial("w", "a", 0, 1.0), Trial("w", "b", 1, 0.9), Trial("v", "a", 0, 1.0)])
    {'w': 'b'}
    """
    tried: dict[str, list[Trial]] = {}
    for trial in trials:
        tried.setdefault(trial.workload, []).append(trial)
    found = {}
    for workload, own in tried.items():
        best = min(own, key=lambda trial: (trial.seconds, trial.place))
        first = min(own, key=lambda trial: trial.place)
        if first.place or best.seconds < first.seconds * (1 - LEAST_GAIN):
            found[workload] = best.candidate
    return found
