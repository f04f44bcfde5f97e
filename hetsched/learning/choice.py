"""Which kernels to measure next, so that the prices of all of them become most certain."""

from collections.abc import Sequence

import numpy as np

from hetsched.learning.regression import NOISE, Regression, Table
from hetsched.learning.work import Work


def next_to_measure(
    pool: Sequence[Work], regression: Regression, count: int, shares: Sequence[float] = ()
) -> list[int]:
    """Positions in `pool` of at most `count` kernels, the one that tells most first.

    `shares` says how much each kernel of the pool counts: its share of the time of what is to be
    priced; all the same if it is left out. Each choice is the kernel whose time would lower the
    expected sum of squared errors the most, given those before it; what that time is does not
    matter. O(count * len(pool)**2).

    References
    ----------
    Cohn, Ghahramani and Jordan, "Active learning with statistical models", JAIR 4, 1996,
    https://doi.org/10.1613/jair.295
    """
    if not pool:
        return []
    weights = np.asarray(shares or [1.0] * len(pool), float)
    covariance = regression.covariance(Table.of(pool, regression.clock_hz))
    chosen: list[int] = []
    for _ in range(min(count, len(pool))):
        gain = weights @ covariance**2 / (np.diag(covariance) + NOISE**2)
        gain[chosen] = -1.0
        best = int(np.argmax(gain))
        chosen.append(best)
        column = covariance[:, best].copy()
        covariance -= np.outer(column, column) / (column[best] + NOISE**2)
    return chosen
