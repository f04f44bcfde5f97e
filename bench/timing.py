"""Repeated measurements of one thing, and what is said of them."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import exp, log
from time import perf_counter
from typing import Any


@dataclass(frozen=True)
class Times:
    """Seconds of a run: the median of `count` runs, the quartiles, and the least."""

    median: float
    first_quartile: float
    third_quartile: float
    least: float
    count: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Times":
        """
        >>> Times.of([3.0, 1.0, 2.0])
        Times(median=2.0, first_quartile=1.0, third_quartile=3.0, least=1.0, count=3)
        """
        first, median, third = statistics.quantiles(seconds, n=4)
        return cls(median, first, third, min(seconds), len(seconds))

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles."""
        return (self.third_quartile - self.first_quartile) / 2


def seconds_of(work: Callable[[], Any]) -> float:
    start = perf_counter()
    work()
    return perf_counter() - start


def geometric_mean(values: Iterable[float]) -> float | None:
    """The geometric mean of positive values, or None of none.

    >>> geometric_mean([0.5, 2.0])
    1.0
    """
    logarithms = [log(value) for value in values]
    return exp(statistics.fmean(logarithms)) if logarithms else None
