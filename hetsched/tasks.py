"""The scheduling problem by itself: tasks with a time on each device, and what they exchange."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import inf

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

    def returns(self, task: str, device: str) -> bool:
        """Whether results of `task` can get from `device` to the host, where they are wanted."""
        return all(
            edge.sink is not None or self.transfer_seconds(0, device, None) < float("inf")
            for edge in self.outgoing[task]
        )

    def _place(self, name: str | None) -> Device | None:
        return self._host if name is None else self.system.device(name)

    @cached_property
    def _host(self) -> Device | None:
        """The device that stands for the host's memory: the first that computes in it."""
        return next((d for d in self.system.devices if d.memory_space == "host"), None)


def _space(device: Device | None) -> str:
    return device.memory_space if device else "host"


def replay(tasks: TaskGraph, placement: Mapping[str, str], order: Sequence[str]) -> Schedule:
    """The schedule of tasks that run in `order` on their devices, each as soon as it can.

    A task starts when its inputs have arrived and its device's unit is free. A transfer starts when
    its tensor is there, occupies neither device, and takes what the link says; links do not
    contend.

    Raises
    ------
    InfeasiblePlan
        A task cannot run where it is placed, or its data cannot get there.
    """
    slots: dict[str, Slot] = {}
    free: dict[str, float] = {}
    for name in order:
        device = placement[name]
        unit = tasks.system.device(device).unit
        start = free.get(unit, 0.0)
        for edge in tasks.incoming[name]:
            source = placement[edge.source] if edge.source is not None else None
            there = slots[edge.source].finish if edge.source is not None else 0.0
            start = max(start, there + tasks.transfer_seconds(edge.nbytes, source, device))
        finish = start + tasks.task[name].seconds.get(device, float("inf"))
        if finish == float("inf") or not tasks.returns(name, device):
            raise InfeasiblePlan(
                f"'{name}' cannot run on '{device}', or no link takes its data there "
                "or its results back"
            )
        slots[name] = Slot(name, device, start, finish)
        free[unit] = finish
    clock = "predicted"
    if any(tasks.system.device(device).modelled for device in set(placement.values())):
        clock += ", modelled"
    by_start = sorted(slots.values(), key=lambda slot: slot.start)
    return Schedule(tuple(by_start), _transfers(tasks, slots), clock)


def beside(tasks: TaskGraph, schedule: Schedule) -> TaskGraph:
    """The tasks with the seconds that they take beside what `schedule` has at the same time.

    While all devices in the host's memory compute, each takes the system's `slowdown` times as
    long; while some do, each other one adds its share. Two devices whose tasks ask for more bytes
    a second than the system's memory gives are both slowed by the ratio while they overlap, if that
    is more. A task asks for its own memory once, in so far as the caches do not hold that of all
    tasks: all of it from twice their size on.
    """
    limit, slowdown = tasks.system.bytes_per_second, tasks.system.slowdown
    if (limit == inf and slowdown == 1.0) or len(schedule.devices) < 2:
        return tasks
    sharing = {device.unit for device in tasks.system.devices if device.memory_space == "host"}
    share = (slowdown - 1.0) / max(1, len(sharing) - 1)
    held = max((n for device in tasks.system.devices for n in device.cache_nbytes), default=0)
    total = sum(task.memory_bytes for task in tasks.tasks)
    missing = min(1.0, max(0.0, total / held - 1)) if held else 1.0
    asked = {
        slot.task: missing * tasks.task[slot.task].memory_bytes / slot.seconds
        for slot in schedule.slots
        if slot.seconds > 0 and tasks.system.device(slot.device).memory_space == "host"
    }
    lost = dict.fromkeys(asked, 0.0)
    running: list[Slot] = []
    for slot in sorted(schedule.slots, key=lambda slot: slot.start):
        running = [other for other in running if other.finish > slot.start]
        for other in running:
            if slot.task in asked and other.task in asked and other.device != slot.device:
                excess = max(share, (asked[slot.task] + asked[other.task]) / limit - 1)
                together = min(slot.finish, other.finish) - slot.start
                lost[slot.task] += excess * together
                lost[other.task] += excess * together
        running.append(slot)
    places = {slot.task: slot.device for slot in schedule.slots}
    slowed = [
        replace(
            task,
            seconds={
                **task.seconds,
                places[task.name]: task.seconds[places[task.name]] + lost.get(task.name, 0.0),
            },
        )
        for task in tasks.tasks
    ]
    return TaskGraph(tasks.system, tuple(slowed), tasks.edges)


def _transfers(tasks: TaskGraph, slots: Mapping[str, Slot]) -> tuple[Transfer, ...]:
    """What goes from place to place, each tensor once to a device."""
    moves: dict[tuple[str | None, str, str | None], Transfer] = {}
    for edge in tasks.edges:
        source = slots[edge.source].device if edge.source is not None else None
        sink = slots[edge.sink].device if edge.sink is not None else None
        if tasks.moves(source, sink):
            seconds = tasks.transfer_seconds(edge.nbytes, source, sink)
            start = slots[edge.source].finish if edge.source is not None else 0.0
            key = (edge.source, edge.tensor or str(edge.sink), sink)
            moves[key] = Transfer(edge.tensor, edge.nbytes, source, sink, start, start + seconds)
    return tuple(moves.values())


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
        check_limit(name, held, tasks.system.device(name).memory_bytes)


def check_limit(device: str, held: float, limit: float) -> None:
    """
    Raises
    ------
    InfeasiblePlan
        `device` would hold more bytes than it has; the message has demand, limit and what would do.
    """
    if held > limit:
        raise InfeasiblePlan(
            f"'{device}' would hold {held / 2**20:.1f} MiB of weights and activations and has "
            f"{limit / 2**20:.1f} MiB; add a device, or raise its memory_bytes"
        )
