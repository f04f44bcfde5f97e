"""Work and traffic of a task graph as arrays: what the loops of layer-wise partitioners read."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from hetsched.problem import links
from hetsched.tasks import Edge, TaskGraph


@dataclass(frozen=True, eq=False)
class Traffic:
    """Tasks 0..n-1 in topological order, on devices 0..p-1, and each tensor once.

    A tensor is sent once to each device that reads it, however many of its tasks do. Times are
    seconds; what cannot be is infinite. `first` of a list of readers says where those of each
    tensor begin, and has one element more.
    """

    tasks: TaskGraph
    # (n, p); infinite too where inputs cannot come or results cannot go.
    seconds: np.ndarray
    # (n) bytes, and (p) what a device can hold.
    memory: np.ndarray
    limit: np.ndarray
    launch: np.ndarray
    # (p) devices of one unit take turns.
    unit: np.ndarray
    # Tensors between tasks: the task that writes each, its bytes, and the tasks that read it.
    producer: np.ndarray
    nbytes: np.ndarray
    first: np.ndarray
    readers: np.ndarray
    # Inputs from the host: (x, p) seconds to each device, and the tasks that read each.
    entry: np.ndarray
    entry_first: np.ndarray
    entry_readers: np.ndarray
    # (n, p) seconds to bring a task's results back to the host.
    exit: np.ndarray
    # (p, p) of a tensor from the device of the row to that of the column, beside its bytes, and of
    # each byte.
    latency: np.ndarray
    per_byte: np.ndarray

    @classmethod
    def of(cls, tasks: TaskGraph) -> "Traffic":
        """The arrays of a task graph. Linear in tasks and edges, times devices."""
        devices = tasks.system.devices
        names = [device.name for device in devices]
        number = {task.name: index for index, task in enumerate(tasks.tasks)}
        seconds = np.full((len(number), len(names)), np.inf)
        for row, task in enumerate(tasks.tasks):
            for column, name in enumerate(names):
                seconds[row, column] = task.seconds.get(name, np.inf)
        inner: dict[tuple[str, str], tuple[Edge, set[int]]] = {}
        entries: dict[str, tuple[Edge, set[int]]] = {}
        exits: dict[tuple[str, str], Edge] = {}
        for edge in tasks.edges:
            if edge.source is not None and edge.sink is not None:
                key = edge.source, edge.tensor or edge.sink
                inner.setdefault(key, (edge, set()))[1].add(number[edge.sink])
            elif edge.sink is not None:
                entries.setdefault(edge.tensor or edge.sink, (edge, set()))[1].add(
                    number[edge.sink]
                )
            elif edge.source is not None:
                exits[edge.source, edge.tensor] = edge
        exit_ = np.zeros_like(seconds)
        for edge in exits.values():
            way = [tasks.transfer_seconds(edge.nbytes, name, None) for name in names]
            exit_[number[str(edge.source)]] += way
        entry = np.zeros((len(entries), len(names)))
        for row, (edge, readers) in enumerate(entries.values()):
            entry[row] = [tasks.transfer_seconds(edge.nbytes, None, name) for name in names]
            seconds[np.ix_(sorted(readers), np.isinf(entry[row]))] = np.inf
        seconds[np.isinf(exit_)] = np.inf
        latency, per_byte = links(devices, tasks)
        units = list(dict.fromkeys(device.unit for device in devices))
        first, reading = lists([sorted(found) for _, found in inner.values()])
        entry_first, entry_readers = lists([sorted(found) for _, found in entries.values()])
        return cls(
            tasks=tasks,
            seconds=seconds,
            memory=np.array([task.memory_bytes for task in tasks.tasks], np.float64),
            limit=np.array([device.memory_bytes for device in devices], np.float64),
            launch=np.array([device.launch_seconds for device in devices], np.float64),
            unit=np.array([units.index(device.unit) for device in devices], np.int64),
            producer=np.array([number[name] for name, _ in inner], np.int64),
            nbytes=np.array([edge.nbytes for edge, _ in inner.values()], np.float64),
            first=first,
            readers=reading,
            entry=np.where(np.isinf(entry), 0.0, entry),
            entry_first=entry_first,
            entry_readers=entry_readers,
            exit=np.where(np.isinf(exit_), 0.0, exit_),
            latency=latency,
            per_byte=per_byte,
        )

    @property
    def count(self) -> int:
        return len(self.seconds)

    @property
    def devices(self) -> tuple[str, ...]:
        return tuple(device.name for device in self.tasks.system.devices)

    @cached_property
    def successors(self) -> tuple[tuple[int, ...], ...]:
        """The tasks that read from each, in order."""
        found: list[set[int]] = [set() for _ in range(self.count)]
        for tensor, producer in enumerate(self.producer):
            found[producer].update(self.readers[self.first[tensor] : self.first[tensor + 1]])
        return tuple(tuple(sorted(int(task) for task in row)) for row in found)

    @cached_property
    def predecessors(self) -> tuple[tuple[int, ...], ...]:
        found: list[list[int]] = [[] for _ in range(self.count)]
        for source, sinks in enumerate(self.successors):
            for sink in sinks:
                found[sink].append(source)
        return tuple(map(tuple, found))

    @cached_property
    def reads(self) -> tuple[np.ndarray, np.ndarray]:
        """The tensors that each task reads: where they begin, and which."""
        return _turned(self.first, self.readers, self.count)

    @cached_property
    def writes(self) -> tuple[np.ndarray, np.ndarray]:
        """The tensors that each task writes."""
        return _turned(np.arange(len(self.producer) + 1), self.producer, self.count)

    @cached_property
    def entry_reads(self) -> tuple[np.ndarray, np.ndarray]:
        """The inputs from the host that each task reads."""
        return _turned(self.entry_first, self.entry_readers, self.count)


def lists(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Where each row begins, with one element more, and the elements of all."""
    first = np.zeros(len(rows) + 1, np.int64)
    np.cumsum([len(row) for row in rows], out=first[1:])
    return first, np.array([item for row in rows for item in row], np.int64)


def _turned(first: np.ndarray, items: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """For each of `count` items the rows that it is in."""
    rows = np.repeat(np.arange(len(first) - 1), np.diff(first))
    order = np.argsort(items, kind="stable")
    begins = np.searchsorted(items[order], np.arange(count + 1)).astype(np.int64)
    return begins, rows[order].astype(np.int64)
