"""The scheduling problem as arrays, which loops run over: 100,000 tasks and more."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

from hetsched.device import Device
from hetsched.schedule import Schedule, Slot, Transfer
from hetsched.tasks import TaskGraph


class Arrays(NamedTuple):
    """A problem for compiled loops: its arrays, float64 or int64, each as `Problem` has it.

    The edges into task i are `incoming[i]` to `incoming[i + 1]`. What reads from it, and the bytes
    of the edge there, are `begins[i]` to `begins[i + 1]` of `reader` and `read_nbytes`.
    """

    seconds: np.ndarray
    source: np.ndarray
    sink: np.ndarray
    nbytes: np.ndarray
    tensor: np.ndarray
    incoming: np.ndarray
    begins: np.ndarray
    reader: np.ndarray
    read_nbytes: np.ndarray
    latency: np.ndarray
    per_byte: np.ndarray
    entry: np.ndarray
    exit: np.ndarray
    unit: np.ndarray
    memory: np.ndarray
    limit: np.ndarray
    contention: bool


@dataclass(frozen=True, eq=False)
class Problem:
    """Tasks 0..n-1 in topological order, on devices 0..p-1.

    A task starts when its device's unit is free, and when all that it reads has arrived: `entry`
    for what comes from the host, and for an edge from another device the finish of its source, the
    latency of the pair and the time of its bytes. The end of the run is the last finish, with
    `exit` for results on their way to the host.

    A unit has one task at a time. One without work takes none of its time, yet has its moment:
    it is never inside of another task.

    With `contention` a link, an ordered pair of devices, serves one transfer at a time, for the
    latency and the time of its bytes together; what takes no time waits for none. Edges with one
    `tensor` carry it once to each device, at the same time for all that read it there. What the
    host sends and gets does not contend.

    Raises
    ------
    ValueError
        The arrays do not fit each other, or an edge goes back in the order.
    """

    # (n, p) seconds; infinite where a task cannot run.
    seconds: np.ndarray
    # (m) the task at each end of each edge, and its bytes; sorted by sink, then source.
    source: np.ndarray
    sink: np.ndarray
    nbytes: np.ndarray
    # (p, p) seconds, and seconds for each byte, from the device of the row to that of the column;
    # 0 on the diagonal, infinite latency where no link leads.
    latency: np.ndarray
    per_byte: np.ndarray
    # (n, p) seconds from the start of the run until inputs are there, and behind the finish until
    # results are back.
    entry: np.ndarray
    exit: np.ndarray
    # (p) the unit of each device, 0..u-1: devices of one unit take turns.
    unit: np.ndarray
    # (n) bytes that stay on the task's device for the whole run, and (p) what a device can hold.
    memory: np.ndarray
    limit: np.ndarray
    names: tuple[str, ...] = field(default=(), repr=False)
    devices: tuple[str, ...] = ()
    # (m) 0..m-1, equal for edges of one task that carry the same data; left out, each its own.
    tensor: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64), repr=False)
    contention: bool = False

    def __post_init__(self) -> None:
        tasks, devices = self.seconds.shape
        edges = len(self.source)
        if not len(self.tensor):
            object.__setattr__(self, "tensor", np.arange(edges))
        shapes = {
            "sink": (edges,),
            "nbytes": (edges,),
            "tensor": (edges,),
            "latency": (devices, devices),
            "per_byte": (devices, devices),
            "entry": (tasks, devices),
            "exit": (tasks, devices),
            "unit": (devices,),
            "memory": (tasks,),
            "limit": (devices,),
        }
        for name, shape in shapes.items():
            if getattr(self, name).shape != shape:
                raise ValueError(f"{name} has shape {getattr(self, name).shape}, not {shape}")
        for name in ("seconds", *shapes):
            kind = np.int64 if name in ("source", "sink", "tensor", "unit") else np.float64
            object.__setattr__(self, name, np.ascontiguousarray(getattr(self, name), kind))
        if not (self.source < self.sink).all():
            raise ValueError("an edge leads back in the order of the tasks")
        if edges and not (self.source.min() >= 0 and self.sink.max() < tasks):
            raise ValueError("an edge leads to no task")
        if not (np.diff(self.sink) >= 0).all():
            raise ValueError("the edges are not sorted by sink")

    @property
    def tasks(self) -> int:
        return int(self.seconds.shape[0])

    @cached_property
    def incoming(self) -> np.ndarray:
        """(n + 1) where the edges into each task begin in `source`, `sink` and `nbytes`."""
        return np.searchsorted(self.sink, np.arange(self.tasks + 1)).astype(np.int64)

    @cached_property
    def outgoing(self) -> tuple[np.ndarray, np.ndarray]:
        """(n + 1) where the edges out of each task begin in the second array, of edge numbers."""
        edges = np.argsort(self.source, kind="stable").astype(np.int64)
        begins = np.searchsorted(self.source[edges], np.arange(self.tasks + 1)).astype(np.int64)
        return begins, edges

    @cached_property
    def arrays(self) -> Arrays:
        begins, edges = self.outgoing
        fields = {name: getattr(self, name) for name in Arrays._fields if hasattr(self, name)}
        reads = {"reader": self.sink[edges], "read_nbytes": self.nbytes[edges]}
        return Arrays(**fields, begins=begins, **reads)

    @classmethod
    def of(cls, tasks: TaskGraph, contention: bool = False) -> "Problem":
        """The arrays of a task graph. Linear in tasks and edges, times devices.

        Several tensors between the same two tasks stay several edges. Edges without a tensor's name
        carry each their own.
        """
        system = tasks.system
        devices = [device.name for device in system.devices]
        column = {name: index for index, name in enumerate(devices)}
        number = {task.name: index for index, task in enumerate(tasks.tasks)}
        seconds = np.full((len(number), len(devices)), np.inf)
        for row, task in enumerate(tasks.tasks):
            for name, value in task.seconds.items():
                seconds[row, column[name]] = value
        entry, exit_ = np.zeros_like(seconds), np.zeros_like(seconds)
        inner = []
        for edge in tasks.edges:
            if edge.source is None and edge.sink is not None:
                row = entry[number[edge.sink]]
                arrival = [tasks.transfer_seconds(edge.nbytes, None, name) for name in devices]
                np.maximum(row, arrival, out=row)
            elif edge.sink is None and edge.source is not None:
                row = exit_[number[edge.source]]
                way = [tasks.transfer_seconds(edge.nbytes, name, None) for name in devices]
                np.maximum(row, way, out=row)
            elif edge.source is not None and edge.sink is not None:
                ends = number[edge.sink], number[edge.source]
                inner.append((*ends, edge.nbytes, edge.tensor))
        inner.sort(key=lambda item: item[:2])
        sink, source, nbytes, tensors = zip(*inner, strict=True) if inner else ((),) * 4
        carried: dict[tuple[int, str | int], int] = {}
        for index, (one, name) in enumerate(zip(source, tensors, strict=True)):
            carried.setdefault((one, name or index), index)
        # What cannot be reached, or cannot return its results, cannot run there.
        seconds[np.isinf(entry) | np.isinf(exit_)] = np.inf
        latency, per_byte = links(system.devices, tasks)
        units = list(dict.fromkeys(device.unit for device in system.devices))
        return cls(
            seconds=seconds,
            source=np.array(source, np.int64),
            sink=np.array(sink, np.int64),
            nbytes=np.array(nbytes, np.float64),
            latency=latency,
            per_byte=per_byte,
            entry=np.where(np.isinf(entry), 0.0, entry),
            exit=np.where(np.isinf(exit_), 0.0, exit_),
            unit=np.array([units.index(device.unit) for device in system.devices], np.int64),
            memory=np.array([task.memory_bytes for task in tasks.tasks], np.float64),
            limit=np.array([device.memory_bytes for device in system.devices], np.float64),
            names=tuple(number),
            devices=tuple(devices),
            tensor=np.array(
                [
                    carried[one, name or index]
                    for index, (one, name) in enumerate(zip(source, tensors, strict=True))
                ],
                np.int64,
            ),
            contention=contention,
        )


def links(devices: tuple[Device, ...], tasks: TaskGraph) -> tuple[np.ndarray, np.ndarray]:
    """Latency and seconds for each byte between each ordered pair of devices."""
    latency = np.zeros((len(devices), len(devices)))
    per_byte = np.zeros_like(latency)
    for i, one in enumerate(devices):
        for j, other in enumerate(devices):
            if i == j:
                continue
            link = tasks.system.link(one.name, other.name)
            latency[i, j] = link.seconds if link else np.inf
            per_byte[i, j] = 1.0 / link.bytes_per_second if link else 0.0
    return latency, per_byte


@dataclass(frozen=True)
class Moment:
    """When a search found something shorter or proved more, and what it knew from then on.

    `seconds` are of the wall and `iterations` the search's own, both since it began; `solver` names
    what had found the schedule.
    """

    seconds: float
    iterations: float
    makespan: float
    lower_bound: float
    solver: str


@dataclass(frozen=True, eq=False)
class Solution:
    """A device and a start, in seconds, for each task of a problem, and what is known of it.

    `lower_bound` is in seconds, and no schedule is shorter; `solver` names what found this one.
    Where links contend, `sent` (m) is the start of the transfer of each edge, the same for edges
    that one transfer serves; not a number where none is needed. `history` tells how a search went
    on: makespans fall and bounds rise along it.
    """

    device: np.ndarray
    start: np.ndarray
    makespan: float
    lower_bound: float = 0.0
    solver: str = ""
    sent: np.ndarray | None = None
    history: tuple[Moment, ...] = ()

    @property
    def optimal(self) -> bool:
        """Whether the bound proves that nothing is shorter, but for rounding."""
        return self.makespan <= self.lower_bound * (1 + 1e-9)

    @property
    def gap(self) -> float:
        """How much shorter a schedule could be at most, as a share of this one."""
        return 1 - self.lower_bound / self.makespan if self.makespan > 0 else 0.0

    def schedule(self, problem: Problem) -> Schedule:
        """Its slots, by start; a task without work comes before the one that it starts with.

        Where links contend, with transfers between devices, each named after the task it is from.
        """
        rows = np.arange(problem.tasks)
        finish = self.start + problem.seconds[rows, self.device]
        order = np.lexsort((rows, finish, self.start))
        slots = tuple(
            Slot(
                problem.names[i],
                problem.devices[self.device[i]],
                float(self.start[i]),
                float(finish[i]),
            )
            for i in order
        )
        return Schedule(slots, tuple(self._transfers(problem)))

    def _transfers(self, problem: Problem) -> Iterator[Transfer]:
        if self.sent is None:
            return
        here, there = self.device[problem.source], self.device[problem.sink]
        way = problem.latency[here, there] + problem.nbytes * problem.per_byte[here, there]
        moves = np.flatnonzero(here != there)
        _, first = np.unique(np.stack([problem.tensor, there])[:, moves], axis=1, return_index=True)
        for edge in moves[first]:
            yield Transfer(
                problem.names[problem.source[edge]],
                int(problem.nbytes[edge]),
                problem.devices[here[edge]],
                problem.devices[there[edge]],
                float(self.sent[edge]),
                float(self.sent[edge] + way[edge]),
            )
