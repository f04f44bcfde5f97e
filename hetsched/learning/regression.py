"""Times of kernels from a count of their work: a sum with uncertain factors, and what it misses."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from hetsched.learning.work import Work

# Cycles that each unit of `Work.cycles` takes, before anything is measured.
CYCLES: Mapping[str, float] = {
    "launch": 10, "called": 3, "cold": 200, "busy": 0.6, "started": 0.5, "streamed": 0.4,
    "tiles": 9, "filters": 0.01, "filters_cold": 0.04, "filters_again": 0.02, "moved": 0.012,
    "moved_cold": 0.012, "far": 0.015, "blocked": 1, "unblocked": 1, "padded": 0.3,
    "transforms": 0.3, "cheap": 0.3, "dear": 8, "turned": 2, "shifted": 0.4,
    "plain": 0.5, "scalar": 0.6, "chosen": 4, "serial": 4, "loads": 0.4, "waits": 0.4,
    "recurrence": 1, "interleaved": 1, "ragged": 1, "rows": 4, "packs": 0.1, "unpacks": 0.5,
    "copied": 1,
}  # fmt: skip
TERMS = tuple(CYCLES)
SIZES = (
    "channels filters rows columns taps stride batch depth zeros again broadcasts vectors between "
    "chunks masked inputs outputs ops megabytes"
).split()
# Standard deviations of logarithms: of a factor for all kernels, of what a family has besides, of
# the device's speed, of what the sum misses, and of a measured time.
FACTOR, OF_FAMILY, SPEED, MISSED, NOISE = 0.5, 0.5, 0.5, 0.2, 0.03
# How much of these remains where another device, or another compiler, is known.
KNOWN = 0.4
# How far apart, in logarithms of their work, kernels are of which little is said of each other.
REACH = 10.0
# Of what the sum misses, the share that families have in common.
SHARED = 0.3
# A clock's grain.
GRAIN_SECONDS = 3e-9
ROUNDS = 12
# Of a normal variable's distance from its mean, in deviations.
MEDIAN_OF_NORMAL = 0.6745


@dataclass(frozen=True)
class Estimate:
    """Seconds of a kernel, and the deviation of their logarithm: 0 if they are measured."""

    seconds: float
    deviation: float

    @property
    def is_measured(self) -> bool:
        return self.deviation == 0


@dataclass(frozen=True, eq=False)
class Table:
    """Kernels in rows: seconds of each term by `CYCLES`, what tells them apart, and families."""

    seconds: np.ndarray
    features: np.ndarray
    families: tuple[str, ...]

    @classmethod
    def of(cls, works: Sequence[Work], clock_hz: float) -> "Table":
        cycles = [[work.cycles.get(name, 0.0) * CYCLES[name] for name in TERMS] for work in works]
        sizes = [[max(1.0, work.sizes.get(name, 1.0)) for name in SIZES] for work in works]
        seconds = np.array(cycles, float).reshape(len(works), len(TERMS)) / clock_hz
        shapes = np.array(sizes, float).reshape(len(works), len(SIZES))
        features = np.hstack([np.log(np.maximum(seconds, 1e-8)), np.log(shapes)]) / REACH
        return cls(seconds, features, tuple(work.family for work in works))


@dataclass(frozen=True, eq=False)
class Regression:
    """The logarithm of a kernel's time as a Gaussian process.

    The time is a sum of terms, each the count of some work times a factor that all kernels share
    and one that those of a family do. Factors are lognormal, and as the sum is smooth in them, it
    is taken as linear around the most probable ones; what it misses is a process over the
    logarithms of the counts (Matern, 3/2). So few samples move the factors, and more say where the
    count is wrong. Samples that fit nothing count less.

    `factors`, `by_family` and `speed` are logarithms. `before` is what was known without the
    samples: nothing, or another device. Of the samples there are the `table`, `slopes` (by how
    much the logarithm of the time changes with that of each factor), the `inverse` of their
    covariance, and `weights`. `width` is the share of the deviations that it is uncertain by, but
    for the speed. `doubt` is by how much further than expected each sample is from
    what the others say.

    References
    ----------
    Rasmussen and Williams, "Gaussian processes for machine learning", 2006, section 2.7,
    https://doi.org/10.7551/mitpress/3206.001.0001
    """

    clock_hz: float
    factors: np.ndarray = field(default_factory=lambda: np.zeros(len(TERMS)))
    by_family: Mapping[str, np.ndarray] = field(default_factory=dict)
    speed: float = 0.0
    before: "Regression | None" = None
    table: Table | None = None
    slopes: np.ndarray = field(default_factory=lambda: np.zeros((0, len(TERMS))))
    inverse: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    weights: np.ndarray = field(default_factory=lambda: np.zeros(0))
    width: float = 1.0
    doubt: float = 1.0

    def fitted(self, works: Sequence[Work], seconds: Sequence[float]) -> "Regression":
        """What these samples make of it, whether they are of the same device or of another.

        O(n**3) in the samples.
        """
        if not works:
            return self
        table = Table.of(works, self.clock_hz)
        measured = np.asarray(seconds, float)
        noise = NOISE**2 + (GRAIN_SECONDS / measured) ** 2
        trust = np.ones(len(works))
        width = 1.0 if self.table is None else KNOWN
        missed = _missed(table, table, width)
        beyond = np.log(measured) - self._beyond(table)
        own = [np.array([family == name for family in table.families]) for name in table.families]
        found = replace(self, before=self, table=table, width=width)
        for turn in range(ROUNDS):
            terms = found._terms(table)
            slopes = terms / terms.sum(axis=1, keepdims=True)
            linear = slopes * (found._logarithms(table) - self._logarithms(table))
            speeded = found.speed - self.speed
            rest = beyond - np.log(terms.sum(axis=1)) - self.speed + linear.sum(axis=1)
            covariance = _of_factors(slopes, table, slopes, table, width) + missed
            inverse = np.linalg.inv(covariance + np.diag(noise / trust))
            weights = inverse @ rest
            step = 1.0 if turn == ROUNDS - 1 else 0.7
            pulls = width**2 * slopes * weights[:, None]
            moved = {
                name: self._of_family(name) + OF_FAMILY**2 * pulls[same].sum(axis=0)
                for name, same in zip(table.families, own, strict=True)
            }
            found = replace(
                found,
                factors=_between(found.factors, self.factors + FACTOR**2 * pulls.sum(axis=0), step),
                by_family={**self.by_family}
                | {name: _between(found._of_family(name), to, step) for name, to in moved.items()},
                speed=found.speed + step * (SPEED**2 * weights.sum() - speeded),
                slopes=slopes,
                inverse=inverse,
                weights=weights,
            )
            misfit = np.abs(rest - covariance @ weights)
            # To the power of 1, some kernels that nobody understands move all; to that of 2, few
            # samples leave out what they should learn from.
            trust = 1 / np.maximum(1.0, misfit / np.sqrt(noise)) ** 1.5
        # Each sample beside what the others say of it, in the deviations that they expect.
        surprises = np.abs(weights) / np.sqrt(np.diag(inverse))
        return replace(found, doubt=max(1.0, float(np.median(surprises)) / MEDIAN_OF_NORMAL))

    def estimates(self, works: Sequence[Work]) -> list[Estimate]:
        """The median time of each kernel, and how uncertain it is."""
        if not works:
            return []
        table = Table.of(works, self.clock_hz)
        mean = self._beyond(table) + np.log(self._terms(table).sum(axis=1)) + self.speed
        variance = np.diag(self.covariance(table))
        deviations = self.doubt * np.sqrt(np.maximum(variance, 0.0) + NOISE**2)
        return [
            Estimate(float(np.exp(value)), float(deviation))
            for value, deviation in zip(mean, deviations, strict=True)
        ]

    def covariance(self, table: Table) -> np.ndarray:
        """Of the logarithms of these kernels' times, without the noise of a measurement."""
        terms = self._terms(table)
        slopes = terms / terms.sum(axis=1, keepdims=True)
        width = self.width
        found = _of_factors(slopes, table, slopes, table, width)
        found += _missed(table, table, width)
        if self.table is not None:
            shared = _of_factors(slopes, table, self.slopes, self.table, width)
            shared += _missed(table, self.table, width)
            found -= shared @ self.inverse @ shared.T
        return found

    def _beyond(self, table: Table) -> np.ndarray:
        """What the sum misses of each kernel, as far as samples told."""
        found: np.ndarray = np.zeros(len(table.families))
        if self.before is not None and self.table is not None:
            found += _missed(table, self.table, self.width) @ self.weights
            found += self.before._beyond(table)
        return found

    def _of_family(self, name: str) -> np.ndarray:
        found: np.ndarray = self.by_family.get(name, np.zeros(len(TERMS)))
        return found

    def _logarithms(self, table: Table) -> np.ndarray:
        own = np.array([self._of_family(name) for name in table.families])
        found: np.ndarray = self.factors + own
        return found

    def _terms(self, table: Table) -> np.ndarray:
        found: np.ndarray = table.seconds * np.exp(self._logarithms(table))
        return found


def _between(one: np.ndarray, other: np.ndarray, share: float) -> np.ndarray:
    found: np.ndarray = one + share * (other - one)
    return found


def _same(one: Table, other: Table) -> np.ndarray:
    found: np.ndarray = np.array(one.families)[:, None] == np.array(other.families)[None]
    return found


def _of_factors(a: np.ndarray, one: Table, b: np.ndarray, other: Table, width: float) -> np.ndarray:
    """The covariance that kernels have because they share factors."""
    common = a @ b.T
    own = FACTOR**2 + OF_FAMILY**2 * _same(one, other)
    found: np.ndarray = SPEED**2 + width**2 * own * common
    return found


def _missed(one: Table, other: Table, width: float) -> np.ndarray:
    """The covariance of what the sums of two sets of kernels miss."""
    a, b = one.features, other.features
    squares = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1)[None] - 2 * a @ b.T
    distance = np.sqrt(3 * np.maximum(squares, 0.0))
    alike: np.ndarray = (1 + distance) * np.exp(-distance)
    return (width * MISSED) ** 2 * alike * np.where(_same(one, other), 1.0, SHARED)
