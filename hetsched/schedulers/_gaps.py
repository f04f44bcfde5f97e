"""Where lanes (units of devices, or links) are free: the first gap that fits, found fast.

The gaps of a lane stand in order of time in blocks of up to `BLOCK`. A search finds the first block
that does not end too early, then the first whose longest gap fits, so that neither a long past nor
many small gaps are walked through one by one.
"""

from typing import NamedTuple

import numpy as np
from numba import njit

BLOCK = 64
# Of a time: what the difference of two times can be off by.
ROUNDING = 4 * 2.0**-52


# For functions that only other compiled ones call: what Python would need is not compiled.
inner = njit(cache=True, nogil=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)


class Gaps(NamedTuple):
    """By block: its gaps, how many, and a bound on the longest of them.

    `row` has the blocks of each lane in order, `last` a bound on the finish of the last gap of
    each, `blocks` how many, and as its last element how many are in use at all. No gap is kept that is shorter than `least` of its lane.
    """

    start: np.ndarray
    finish: np.ndarray
    size: np.ndarray
    longest: np.ndarray
    row: np.ndarray
    last: np.ndarray
    blocks: np.ndarray
    least: np.ndarray


@inner
def new_gaps(least: np.ndarray, taken: int) -> Gaps:
    """All lanes free for ever; at most `taken` calls of `take` may follow."""
    lanes = len(least)
    blocks = lanes + taken // (BLOCK // 2) + 1
    gaps = Gaps(
        np.empty((blocks, BLOCK)),
        np.empty((blocks, BLOCK)),
        np.zeros(blocks, np.int64),
        np.empty(blocks),
        np.empty((lanes, blocks), np.int64),
        np.empty((lanes, blocks)),
        np.ones(lanes + 1, np.int64),
        least,
    )
    for lane in range(lanes):
        gaps.start[lane, 0] = 0.0
        gaps.finish[lane, 0] = np.inf
        gaps.size[lane] = 1
        gaps.longest[lane] = np.inf
        gaps.row[lane, 0] = lane
        gaps.last[lane, 0] = np.inf
    gaps.blocks[lanes] = lanes
    return gaps


@inner
def find(gaps: Gaps, lane: int, ready: float, seconds: float) -> tuple[float, int, int]:
    """The first start at or after `ready` that fits, and the gap: place in the row, and in it."""
    end = ready + seconds
    low, high = 0, gaps.blocks[lane] - 1
    # Most often it is the last block.
    if high > 0 and gaps.last[lane, high - 1] < end:
        low = high
    while low < high:
        middle = (low + high) // 2
        if gaps.last[lane, middle] < end:
            low = middle + 1
        else:
            high = middle
    place = low
    while True:
        block = gaps.row[lane, place]
        # The sum that decides below may round otherwise than the difference.
        if gaps.longest[block] + ROUNDING * gaps.last[lane, place] >= seconds:
            low, high = 0, gaps.size[block]
            while low < high:
                middle = (low + high) // 2
                if gaps.finish[block, middle] < end:
                    low = middle + 1
                else:
                    high = middle
            for index in range(low, gaps.size[block]):
                start = max(ready, gaps.start[block, index])
                if start + seconds <= gaps.finish[block, index]:
                    return start, place, index
        place += 1


@inner
def behind(gaps: Gaps, lane: int, ready: float) -> tuple[float, int, int]:
    """As `find`, behind all that the lane has got so far."""
    place = gaps.blocks[lane] - 1
    block = gaps.row[lane, place]
    index = gaps.size[block] - 1
    return max(ready, gaps.start[block, index]), place, index


@inner
def take(gaps: Gaps, lane: int, place: int, index: int, start: float, seconds: float) -> None:
    """Occupies the gap at `place` and `index` from `start`, for `seconds`."""
    block = gaps.row[lane, place]
    first, last = gaps.start[block, index], gaps.finish[block, index]
    least = gaps.least[lane]
    left = first + least <= start
    right = start + seconds + least <= last
    size = gaps.size[block]
    if left and right:
        if size == BLOCK:
            _split(gaps, lane, place)
            if index >= BLOCK // 2:
                index -= BLOCK // 2
                place += 1
            block = gaps.row[lane, place]
            size = BLOCK // 2
        for i in range(size, index, -1):
            gaps.start[block, i] = gaps.start[block, i - 1]
            gaps.finish[block, i] = gaps.finish[block, i - 1]
        gaps.size[block] = size + 1
        gaps.finish[block, index] = start
        gaps.start[block, index + 1] = start + seconds
    elif left:
        gaps.finish[block, index] = start
    elif right:
        gaps.start[block, index] = start + seconds
    else:
        for i in range(index, size - 1):
            gaps.start[block, i] = gaps.start[block, i + 1]
            gaps.finish[block, i] = gaps.finish[block, i + 1]
        gaps.size[block] = size - 1
    if last - first >= gaps.longest[block]:
        _measure(gaps, block)


@inner
def _measure(gaps: Gaps, block: int) -> None:
    longest = -np.inf
    for i in range(gaps.size[block]):
        longest = max(longest, gaps.finish[block, i] - gaps.start[block, i])
    gaps.longest[block] = longest


@inner
def _split(gaps: Gaps, lane: int, place: int) -> None:
    """Moves the later half of a full block to a new one behind it."""
    lanes = len(gaps.least)
    half = BLOCK // 2
    block, new = gaps.row[lane, place], gaps.blocks[lanes]
    gaps.blocks[lanes] += 1
    for i in range(half):
        gaps.start[new, i] = gaps.start[block, half + i]
        gaps.finish[new, i] = gaps.finish[block, half + i]
    gaps.size[block] = half
    gaps.size[new] = half
    _measure(gaps, block)
    _measure(gaps, new)
    for i in range(gaps.blocks[lane], place + 1, -1):
        gaps.row[lane, i] = gaps.row[lane, i - 1]
        gaps.last[lane, i] = gaps.last[lane, i - 1]
    gaps.row[lane, place + 1] = new
    gaps.last[lane, place + 1] = gaps.last[lane, place]
    gaps.last[lane, place] = gaps.finish[block, half - 1]
    gaps.blocks[lane] += 1
