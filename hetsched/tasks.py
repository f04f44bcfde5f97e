"""The scheduling problem by itself: tasks with a time on each device, and what they exchange."""

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from hetsched.device import Device
from hetsched.errors import InfeasiblePlan
from hetsched.schedule import Schedule, Slot, Transfer
from hetsched.system import System


@dataclass(frozen=True)
class Task:
    """A piece of work: seconds on each device that can run it.

    `memory_bytes` stays on its device for the whole run.
    """

    name: str
    seconds: Mapping[str, float]
    memory_bytes: float = 0.0


@dataclass(frozen=True)
class Edge:
    """`tensor` from one task to another; None is the host, where inputs lie and results go."""

    source: str | None
    sink: str | None
    nbytes: int
    tensor: str = ""


@dataclass(frozen=True, eq=False)
class TaskGraph:
    """Tasks in topological order, the edges between them, and the machine.

    Machines are unrelated: a task's time on one device says nothing of another.

    Raises
    ------
    InfeasiblePlan
        A task has no device that can run it.
    """

    system: System
    tasks: tuple[Task, ...]
    edges: tuple[Edge, ...]

    def __post_init__(self) -> None:
        for task in self.tasks:
            if not task.seconds:
                raise InfeasiblePlan(f"no device can run '{task.name}'")

    @cached_property
    def task(self) -> Mapping[str, Task]:
        return {task.name: task for task in self.tasks}

    @cached_property
    def incoming(self) -> Mapping[str, tuple[Edge, ...]]:
        """The edges into each task, those from the host included."""
        return self._edges_by(lambda edge: edge.sink)

    @cached_property
    def outgoing(self) -> Mapping[str, tuple[Edge, ...]]:
        """The edges out of each task, those to the host included."""
        return self._edges_by(lambda edge: edge.source)

    def _edges_by(self, end: Callable[[Edge], str | None]) -> Mapping[str, tuple[Edge, ...]]:
        found: dict[str, list[Edge]] = {task.name: [] for task in self.tasks}
        for edge in self.edges:
            if (name := end(edge)) is not None:
                found[name].append(edge)
        return {name: tuple(edges) for name, edges in found.items()}

    def moves(self, source: str | None, sink: str | None) -> bool:
        """Whether data from one place to the other is a transfer: not within the host's memory."""
        if None in (source, sink):
            return _space(self._place(source)) != _space(self._place(sink))
        return source != sink

    def transfer_seconds(self, nbytes: int, source: str | None, sink: str | None) -> float:
        """From device to device, or from and to the host; infinite where no link leads."""
        if not self.moves(source, sink):
            return 0.0
        source_device, sink_device = self._place(source), self._place(sink)
        if source_device is None or sink_device is None:
            return float("inf")
        link = self.system.link(source_device.name, sink_device.name)
        return link.transfer_seconds(nbytes) if link else float("inf")

    def mean_transfer_seconds(self, nbytes: int) -> float:
        """Over all ordered pairs of different devices that have a link; 0 with one device."""
        links = [link for link in self.system.links if link.source != link.sink]
        if not links:
            return 0.0
        return sum(link.transfer_seconds(nbytes) for link in links) / len(links)

    def _place(self, name: str | None) -> Device | None:
        return self._host if name is None else self.system.device(name)

    @cached_property
    def _host(self) -> Device | None:
        """The device that stands for the host's memory: the first that computes in it."""
        return next((d for d in self.system.devices if d.memory_space == "host"), None)


def _space(device: Device | None) -> str:
    return device.memory_space if device else "host"


@dataclass
class Timeline:
    """A schedule in the making: the one place where time is computed.

    A task starts when its inputs have arrived and its device's unit is free. A transfer starts when
    its tensor is there, occupies neither device, and takes what the link says; links do not
    contend.
    """

    tasks: TaskGraph
    slots: dict[str, Slot] = field(default_factory=dict)
    _by_unit: dict[str, list[Slot]] = field(default_factory=dict)

    def arrival(self, edge: Edge, device: str) -> float:
        """When the data of `edge` can be used on `device`."""
        if edge.source is None:
            return self.tasks.transfer_seconds(edge.nbytes, None, device)
        source = self.slots[edge.source]
        return source.finish + self.tasks.transfer_seconds(edge.nbytes, source.device, device)

    def ready(self, task: str, device: str) -> float:
        """When all inputs of `task` can be used on `device`."""
        return max((self.arrival(edge, device) for edge in self.tasks.incoming[task]), default=0.0)

    def earliest(self, task: str, device: str) -> Slot:
        """The first gap on `device` that fits `task` once its inputs have arrived."""
        seconds = self._seconds(task, device)
        start = self.ready(task, device)
        busy = self._by_unit.get(self.tasks.system.device(device).unit, [])
        # Slots that finish before `start` cannot matter; they are in order of time.
        for slot in busy[bisect_left(busy, start, key=lambda slot: slot.finish) :]:
            if start + seconds <= slot.start:
                break
            start = max(start, slot.finish)
        return Slot(task, device, start, start + seconds)

    def last(self, task: str, device: str) -> Slot:
        """The slot behind everything that the device has got so far."""
        busy = self._by_unit.get(self.tasks.system.device(device).unit, [])
        start = max(self.ready(task, device), busy[-1].finish if busy else 0.0)
        return Slot(task, device, start, start + self._seconds(task, device))

    def _seconds(self, task: str, device: str) -> float:
        """Infinite where the task cannot run, or its results cannot get back to the host."""
        for edge in self.tasks.outgoing[task]:
            if edge.sink is None and self.tasks.transfer_seconds(0, device, None) == float("inf"):
                return float("inf")
        return self.tasks.task[task].seconds.get(device, float("inf"))

    def place(self, slot: Slot) -> None:
        self.slots[slot.task] = slot
        busy = self._by_unit.setdefault(self.tasks.system.device(slot.device).unit, [])
        # By finish too: of two slots that start together the first has no duration.
        key = slot.start, slot.finish
        busy.insert(bisect_left(busy, key, key=lambda other: (other.start, other.finish)), slot)

    def schedule(self) -> Schedule:
        """What has been placed, with the transfers that it needs, each tensor once to a device."""
        moves: dict[tuple[str | None, str, str | None], Transfer] = {}
        for edge in self.tasks.edges:
            source = self.slots[edge.source].device if edge.source else None
            sink = self.slots[edge.sink].device if edge.sink else None
            seconds = self.tasks.transfer_seconds(edge.nbytes, source, sink)
            if not self.tasks.moves(source, sink):
                continue
            start = self.slots[edge.source].finish if edge.source else 0.0
            key = (edge.source, edge.tensor or str(edge.sink), sink)
            moves[key] = Transfer(edge.tensor, edge.nbytes, source, sink, start, start + seconds)
        slots = sorted(self.slots.values(), key=lambda slot: slot.start)
        clock = "predicted"
        if any(self.tasks.system.device(slot.device).modelled for slot in slots):
            clock += ", modelled"
        return Schedule(tuple(slots), tuple(moves.values()), clock)


def replay(tasks: TaskGraph, placement: Mapping[str, str], order: Sequence[str]) -> Schedule:
    """The schedule of tasks that run in `order` on their devices, each as soon as it can.

    Raises
    ------
    InfeasiblePlan
        A task cannot run where it is placed, or its data cannot get there.
    """
    timeline = Timeline(tasks)
    for name in order:
        slot = timeline.last(name, placement[name])
        if slot.finish == float("inf"):
            raise InfeasiblePlan(
                f"'{name}' cannot run on '{placement[name]}', or no link takes its data there "
                "or its results back"
            )
        timeline.place(slot)
    return timeline.schedule()


def upward_rank(tasks: TaskGraph) -> dict[str, float]:
    """The longest path from each task to the end, in mean seconds of work and transfers.

    References
    ----------
    Topcuoglu, Hariri and Wu, "Performance-effective and low-complexity task scheduling for
    heterogeneous computing", IEEE TPDS 13(3), 2002, https://doi.org/10.1109/71.993206
    """
    rank: dict[str, float] = {}
    for task in reversed(tasks.tasks):
        mean = sum(task.seconds.values()) / len(task.seconds)
        tail = max(
            (
                tasks.mean_transfer_seconds(edge.nbytes) + rank[edge.sink]
                for edge in tasks.outgoing[task.name]
                if edge.sink is not None
            ),
            default=0.0,
        )
        rank[task.name] = mean + tail
    return rank


def contract(
    tasks: TaskGraph, members: Sequence[Sequence[str]], placement: Mapping[str, str]
) -> TaskGraph:
    """Each of `members`, tasks on one device, as one task that runs them all.

    It is named after its first member, starts when all inputs are there and hands over at its end,
    as a part does.
    """
    owner = {name: names[0] for names in members for name in names}
    contracted = []
    for names in members:
        device = placement[names[0]]
        launch = tasks.system.device(device).launch_seconds
        seconds = launch + sum(tasks.task[name].seconds[device] for name in names)
        memory = sum(tasks.task[name].memory_bytes for name in names)
        contracted.append(Task(names[0], {device: seconds}, memory))
    edges = {
        (e.tensor or (e.source, e.sink), source, sink): Edge(source, sink, e.nbytes, e.tensor)
        for e in tasks.edges
        for source, sink in [(owner.get(e.source or ""), owner.get(e.sink or ""))]
        if source != sink
    }
    return TaskGraph(tasks.system, tuple(contracted), tuple(edges.values()))


def memory_bytes(tasks: TaskGraph, placement: Mapping[str, str]) -> dict[str, float]:
    """What the tasks of each device hold for the whole run."""
    held = {device.name: 0.0 for device in tasks.system.devices}
    for task in tasks.tasks:
        held[placement[task.name]] += task.memory_bytes
    return held


def check_memory(tasks: TaskGraph, placement: Mapping[str, str]) -> None:
    """
    Raises
    ------
    InfeasiblePlan
        A device would hold more than it has; the message has demand, limit and what would do.
    """
    for name, held in memory_bytes(tasks, placement).items():
        limit = tasks.system.device(name).memory_bytes
        if held > limit:
            raise InfeasiblePlan(
                f"'{name}' would hold {held / 2**20:.1f} MiB of weights and activations and has "
                f"{limit / 2**20:.1f} MiB; add a device, or raise its memory_bytes"
            )
