"""Streams of instructions: places in the buffers, and the tokens that keep units apart.

Whoever makes a stream says what each instruction reads and writes. An instruction waits for those
before it that wrote what it reads, or that use what it overwrites. What it waits for stands before
it in the stream, so no queue can be too short.
"""

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from hetsched.fpga.isa import Conv, Instruction, Load, Store, Unit

UNITS = (Unit.LOAD, Unit.CONV, Unit.STORE)
# Tokens that one unit may have given another that are not taken: the core counts up to 255, and
# the giver may be ahead of the stream's order by the queue of the taker.
MOST_TOKENS = 192
# Where there would be more, how far behind the giver's latest instruction the taker stays.
SLACK = 16


@dataclass
class Entry:
    """An instruction in the stream, `index` of all and `place` of its unit.

    `seen` is how many instructions of each unit are known to have ended when it starts.
    """

    instruction: Load | Conv | Store
    index: int
    place: int
    seen: tuple[int, ...]
    wait: int = 0
    signal: int = 0

    @property
    def unit(self) -> int:
        return UNITS.index(self.instruction.unit)


@dataclass
class _Interval:
    """Words that one instruction wrote, and who read them since."""

    start: int
    stop: int
    writer: Entry
    readers: dict[int, Entry] = field(default_factory=dict)


class Space:
    """A buffer, used as a ring: what was written where, and who reads it."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._next = 0
        self._starts: list[int] = []
        self._intervals: list[_Interval] = []

    def take(self, size: int) -> int:
        """The start of the next `size` words in a row."""
        assert 0 < size <= self.size, f"{size} of {self.size} words"
        start = self._next if self._next + size <= self.size else 0
        self._next = start + size
        return start

    def users(self, start: int, stop: int) -> Iterator[Entry]:
        """Who wrote the words, and who read them."""
        for interval in self._within(start, stop):
            yield interval.writer
            yield from interval.readers.values()

    def writers(self, start: int, stop: int) -> Iterator[Entry]:
        return (interval.writer for interval in self._within(start, stop))

    def read(self, start: int, stop: int, reader: Entry) -> None:
        for interval in self._within(start, stop):
            interval.readers[reader.unit] = reader

    def write(self, start: int, stop: int, writer: Entry) -> None:
        low, high = self._span(start, stop)
        old = self._intervals[low:high]
        new = [_Interval(start, stop, writer)]
        if old and old[0].start < start:
            new.insert(0, replace(old[0], stop=start, readers=dict(old[0].readers)))
        if old and old[-1].stop > stop:
            new.append(replace(old[-1], start=stop, readers=dict(old[-1].readers)))
        self._intervals[low:high] = new
        self._starts[low:high] = [interval.start for interval in new]

    def _within(self, start: int, stop: int) -> Sequence[_Interval]:
        low, high = self._span(start, stop)
        return self._intervals[low:high]

    def _span(self, start: int, stop: int) -> tuple[int, int]:
        low = bisect_right(self._starts, start) - 1
        if low < 0 or self._intervals[low].stop <= start:
            low += 1
        return low, bisect_left(self._starts, stop)


class Stream:
    """Instructions in order, each after those that it is told to follow."""

    def __init__(self) -> None:
        self._entries: list[Entry] = []
        self._by_unit: tuple[list[Entry], ...] = ([], [], [])
        self._seen: list[tuple[int, ...]] = [(0, 0, 0)] * len(UNITS)
        # For each giver and taker, where in the stream the latest tokens are taken.
        self._taken: dict[tuple[int, int], deque[int]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, instruction: Load | Conv | Store, after: Iterable[Entry]) -> Entry:
        """Appends `instruction`, which starts when all of `after` have ended."""
        unit = UNITS.index(instruction.unit)
        seen = list(self._seen[unit])
        latest: list[Entry | None] = [None] * len(UNITS)
        for entry in after:
            other = latest[entry.unit]
            if other is None or other.place < entry.place:
                latest[entry.unit] = entry
        own = self._by_unit[unit]
        made = Entry(instruction, len(self._entries), len(own), ())
        # The latest first: what it has seen may spare the others.
        waited = [entry for entry in latest if entry is not None and entry.unit != unit]
        for entry in sorted(waited, key=lambda entry: -sum(entry.seen)):
            other_unit = entry.unit
            if entry.place < seen[other_unit]:
                continue
            entry = self._giver(entry, unit)
            made.wait |= UNITS[other_unit]
            entry.signal |= UNITS[unit]
            seen[other_unit] = entry.place + 1
            seen = [max(pair) for pair in zip(seen, entry.seen, strict=True)]
        # A unit ends its instructions in order, but starts the next before the last has ended.
        made.seen = tuple(seen)
        self._seen[unit] = made.seen
        own.append(made)
        self._entries.append(made)
        return made

    def _giver(self, entry: Entry, unit: int) -> Entry:
        """Who gives `unit` a token that tells that `entry` has ended: itself, or one behind it."""
        taken = self._taken.setdefault((entry.unit, unit), deque())
        while taken and taken[0] <= entry.index:
            taken.popleft()
        if len(taken) >= MOST_TOKENS:
            others = self._by_unit[entry.unit]
            entry = others[max(entry.place, len(others) - SLACK)]
        taken.append(len(self._entries))
        return entry

    def instructions(self) -> tuple[Instruction, ...]:
        return tuple(
            replace(entry.instruction, wait=entry.wait, signal=entry.signal)
            for entry in self._entries
        )
