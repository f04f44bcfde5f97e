"""How sure a median of repeated measurements is."""

import statistics
from collections.abc import Sequence
from math import comb, inf, sqrt

CONFIDENCE = 0.95
# Student's factor for two-sided 95 %, by the number of values.
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}


def margin(values: Sequence[float]) -> float:
    """Half the width of the interval that has the median with 95 % confidence.

    From six values on, the interval lies between two of them in order, which assumes no
    distribution, and which single outliers do not widen from nine values on. Of two to five values
    it is Student's interval of the mean, and of one it is infinite.

    Examples
    --------
    >>> margin([1.0])
    inf
    >>> margin([1.0, 1.1, 1.2, 1.3, 1.4, 9.0])
    4.0
    >>> round(margin([1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 9.0]), 3)
    0.3

    References
    ----------
    David and Nagaraja, "Order statistics", 3rd edition, 2003, section 7.1,
    https://doi.org/10.1002/0471722162
    """
    count = len(values)
    if count < 2:
        return inf
    if count in STUDENT:
        return STUDENT[count] * statistics.stdev(values) / sqrt(count)
    found = sorted(values)
    rank = 1 + max(k for k in range(count // 2) if _outside(count, k) <= 1 - CONFIDENCE)
    return (found[count - rank] - found[rank - 1]) / 2


def _outside(count: int, rank: int) -> float:
    """The chance that `rank` or fewer of `count` values lie on one given side, for both sides."""
    return float(2 * sum(comb(count, k) for k in range(rank + 1)) / 2**count)
