"""When each task holds its device: one type for predicted and for measured time."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any


@dataclass(frozen=True)
class Slot:
    """`task` holds `device` from `start` to `finish`, in seconds from the start of the run."""

    task: str
    device: str
    start: float
    finish: float

    @property
    def seconds(self) -> float:
        return self.finish - self.start


@dataclass(frozen=True)
class Transfer:
    """`tensor` on its way from one device to another; None is the host's own memory.

    If it is not known to be `copied`, it can have been handed over where it is.
    """

    tensor: str
    nbytes: int
    source: str | None
    sink: str | None
    start: float
    finish: float
    copied: bool = False

    @property
    def seconds(self) -> float:
        return self.finish - self.start


@dataclass(frozen=True)
class Schedule:
    """Slots and transfers on one time axis; `clock` says what the seconds are.

    `clock` is `predicted` or `measured`, with `, modelled` behind it where a device has no real
    clock of its own.
    """

    slots: tuple[Slot, ...]
    transfers: tuple[Transfer, ...] = ()
    clock: str = "predicted"
    labels: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def makespan(self) -> float:
        """Seconds from the start to the last finish, of results on their way out too."""
        ends = [slot.finish for slot in self.slots] + [move.finish for move in self.transfers]
        return max(ends, default=0.0)

    @cached_property
    def devices(self) -> tuple[str, ...]:
        """The devices that work, in order of first use."""
        return tuple(dict.fromkeys(slot.device for slot in self.slots))

    def busy_seconds(self, device: str) -> float:
        return sum(slot.seconds for slot in self.slots if slot.device == device)

    def overlap_seconds(self) -> float:
        """The time in which at least two devices work."""
        edges = sorted(
            [(slot.start, 1) for slot in self.slots] + [(slot.finish, -1) for slot in self.slots]
        )
        total, running, since = 0.0, 0, 0.0
        for time, change in edges:
            if running >= 2:
                total += time - since
            running += change
            since = time
        return total

    def slot(self, task: str) -> Slot:
        return self._by_task[task]

    @cached_property
    def _by_task(self) -> Mapping[str, Slot]:
        return {slot.task: slot for slot in self.slots}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; seconds."""
        return {
            "clock": self.clock,
            "makespan": self.makespan,
            "slots": [vars(slot) | {} for slot in self.slots],
            "transfers": [vars(move) | {} for move in self.transfers],
        }

    def __str__(self) -> str:
        return gantt(self)


def gantt(schedule: Schedule, width: int = 72, rows: int = 16) -> str:
    """The schedule as text: a bar for each device, then its slots by start time.

    Of more than `rows` slots the longest are listed, and the rest counted.

    Examples
    --------
    >>> print(gantt(Schedule((Slot("a", "cpu:0", 0.0, 1e-3), Slot("b", "cpu:1", 1e-3, 2e-3))), 8))
    predicted 2.000 ms
    cpu:0 |####    |  50 % busy
    cpu:1 |    ####|  50 % busy
        start ms  finish ms  device  task
           0.000      1.000  cpu:0   a
           1.000      2.000  cpu:1   b
    """
    lines = [bars(schedule, width)]
    widest = max((len(device) for device in schedule.devices), default=0)
    widest = max(widest, len("device"))
    lines.append(f"    start ms  finish ms  {'device':<{widest}}  task")
    shown = sorted(schedule.slots, key=lambda slot: -slot.seconds)[:rows]
    for slot in sorted(shown, key=lambda slot: slot.start):
        label = schedule.labels.get(slot.task, "")
        times = f"{slot.start * 1e3:12.3f} {slot.finish * 1e3:10.3f}"
        lines.append(f"{times}  {slot.device:<{widest}}  {slot.task}  {label}".rstrip())
    if len(schedule.slots) > rows:
        lines.append(f"{'':23}  and {len(schedule.slots) - rows} shorter ones")
    return "\n".join(lines)


def bars(schedule: Schedule, width: int = 72, span: float = 0.0) -> str:
    """The makespan, then a bar for each device over `span` seconds, by default the makespan."""
    span = max(span, schedule.makespan) or 1.0
    widest = max((len(device) for device in schedule.devices), default=0)
    lines = [f"{schedule.clock} {schedule.makespan * 1e3:.3f} ms"]
    for device in schedule.devices:
        share = schedule.busy_seconds(device) / (schedule.makespan or 1.0)
        cells = _cells((slot for slot in schedule.slots if slot.device == device), span, width)
        lines.append(f"{device:<{widest}} |{cells}| {share * 100:3.0f} % busy")
    return "\n".join(lines)


def _cells(slots: Iterable[Slot], span: float, width: int) -> str:
    """One character a column: full where the device works most of it, a dot for less."""
    filled = [0.0] * width
    for slot in slots:
        first, last = slot.start / span * width, slot.finish / span * width
        for column in range(int(first), min(width, int(last) + 1)):
            filled[column] += max(0.0, min(last, column + 1) - max(first, column))
    return "".join("#" if share > 0.5 else "." if share > 0.01 else " " for share in filled)
