"""Contiguous stages of the graph's topological order."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from hetsched.cost import CostModel
from hetsched.errors import InfeasiblePlan
from hetsched.graph import Graph
from hetsched.objective import objective
from hetsched.partitioner import Partitioner
from hetsched.plan import Plan, group_tasks, make_plan
from hetsched.system import System
from hetsched.tasks import TaskGraph


@dataclass(frozen=True)
class Layerwise(Partitioner):
    """Optimal stages for a serial order of the groups, by dynamic programming.

    `throughput` makes the busiest stage as short as it can be, with at most one stage on each unit:
    a pipeline, for several requests in flight. `latency` makes the sum of all stages and of the
    transfers between them shortest; there a device may come again.

    O(groups^2 * 2^devices * devices^2) time for throughput, O(groups * devices^2) for latency.

    References
    ----------
    Hu et al., "Pipeline parallelism for inference on heterogeneous edge computing" (PipeEdge),
    DSD 2022, https://doi.org/10.1109/DSD57027.2022.00048
    """

    objective: str = "throughput"

    def partition(self, graph: Graph, system: System, costs: CostModel) -> Plan:
        objective(self.objective)
        tasks = group_tasks(graph, system, costs)
        stages = fastest_pipeline(tasks) if self.objective == "throughput" else shortest_run(tasks)
        order = [task.name for task in tasks.tasks]
        placement = {name: device for device, first, last in stages for name in order[first:last]}
        spec = f"{self.name}:objective={self.objective}"
        plan = make_plan(graph, system, costs, placement, order, spec)
        return replace(plan, objective=self.objective)


# Device, first task and the one behind the last.
Stage = tuple[str, int, int]


def fastest_pipeline(tasks: TaskGraph) -> list[Stage]:
    """The stages, each unit at most once, whose slowest is fastest.

    A stage costs its work and, whichever is longer, the transfers into it on its slowest link.
    Of equal bottlenecks, less total work is preferred.

    Raises
    ------
    InfeasiblePlan
        No stages run and hold everything.
    """
    prefix = _Prefix(tasks)
    devices = [device.name for device in tasks.system.devices]
    units = [device.unit for device in tasks.system.devices]
    launch = {device.name: device.launch_seconds for device in tasks.system.devices}
    count = len(tasks.tasks)
    if not count:
        return []
    # (end, set of devices used, last of them) -> (bottleneck, work), stages
    best: dict[tuple[int, int, int], tuple[tuple[float, float], list[Stage]]] = {}
    for used in range(1, 1 << len(devices)):
        for last, device in enumerate(devices):
            if not used >> last & 1:
                continue
            rest = used & ~(1 << last)
            if any(rest >> i & 1 and units[i] == units[last] for i in range(len(devices))):
                continue
            for end in range(1, count + 1):
                for start in range(end):
                    # A first stage starts at the first task; a later one behind another device.
                    earlier = range(len(devices)) if rest else [-1]
                    if bool(rest) != bool(start):
                        continue
                    work = launch[device] + prefix.seconds(device, start, end)
                    if work == float("inf") or not prefix.fits(device, start, end):
                        continue
                    for other in earlier:
                        before = best.get((start, rest, other)) if rest else ((0.0, 0.0), [])
                        if before is None:
                            continue
                        (bottleneck, total), stages = before
                        move = prefix.transfer_seconds(start, devices[other], device) if rest else 0
                        cost = (max(bottleneck, work, move), total + work + move)
                        key = (end, used, last)
                        if cost[1] < float("inf") and (key not in best or cost < best[key][0]):
                            best[key] = (cost, [*stages, (device, start, end)])
    done = [value for (end, _, _), value in best.items() if end == count]
    if not done:
        raise InfeasiblePlan(
            "no pipeline with each unit once can run and hold all groups; "
            "add a device, or use another partitioner"
        )
    return min(done, key=lambda value: value[0])[1]


def shortest_run(tasks: TaskGraph) -> list[Stage]:
    """The stages of least total time when one runs after the other.

    Raises
    ------
    InfeasiblePlan
        A group cannot be reached by any sequence of devices.
    """
    prefix = _Prefix(tasks)
    devices = [device.name for device in tasks.system.devices]
    launch = {device.name: device.launch_seconds for device in tasks.system.devices}
    best = {device: (launch[device], [(device, 0, 0)]) for device in devices}
    for index in range(len(tasks.tasks)):
        step = {}
        for device in devices:
            work = prefix.seconds(device, index, index + 1)
            options = []
            for other, (cost, stages) in best.items():
                if other == device:
                    (_, first, _) = stages[-1]
                    options.append((cost + work, [*stages[:-1], (device, first, index + 1)]))
                elif index > 0:
                    move = prefix.transfer_seconds(index, other, device)
                    total = cost + move + launch[device] + work
                    options.append((total, [*stages, (device, index, index + 1)]))
            step[device] = min(options, key=lambda option: option[0])
        best = step
    cost, stages = min(best.values(), key=lambda option: option[0])
    if cost == float("inf"):
        raise InfeasiblePlan("no sequence of devices can run all groups; add a device")
    return stages


class _Prefix:
    """Sums over runs of the topological order, each in constant time."""

    def __init__(self, tasks: TaskGraph) -> None:
        self._tasks = tasks
        self._limit = {d.name: d.memory_bytes for d in tasks.system.devices}
        self._seconds = {
            device.name: _sums([t.seconds.get(device.name, float("inf")) for t in tasks.tasks])
            for device in tasks.system.devices
        }
        self._memory = _sums([task.memory_bytes for task in tasks.tasks])
        self._crossing = self._bytes_crossing()

    def seconds(self, device: str, start: int, end: int) -> float:
        """The work of a run without the launch; infinite if the device cannot run all of it."""
        finite, infinite = self._seconds[device]
        if infinite[end] > infinite[start]:
            return float("inf")
        return finite[end] - finite[start]

    def fits(self, device: str, start: int, end: int) -> bool:
        finite, _ = self._memory
        return finite[end] - finite[start] <= self._limit[device]

    def transfer_seconds(self, cut: int, source: str, sink: str) -> float:
        """For all that is written before `cut` and read behind it, as if it came from `source`."""
        return self._tasks.transfer_seconds(self._crossing[cut], source, sink)

    def _bytes_crossing(self) -> list[int]:
        position = {task.name: index for index, task in enumerate(self._tasks.tasks)}
        last: dict[tuple[str, str], tuple[int, int]] = {}
        for edge in self._tasks.edges:
            if edge.source is not None and edge.sink is not None:
                key = (edge.source, edge.tensor or edge.sink)
                until = max(last.get(key, (0, 0))[0], position[edge.sink])
                last[key] = (until, edge.nbytes)
        change = [0] * (len(self._tasks.tasks) + 2)
        for (source, _), (until, nbytes) in last.items():
            change[position[source] + 1] += nbytes
            change[until + 1] -= nbytes
        crossing = [0]
        for value in change:
            crossing.append(crossing[-1] + value)
        return crossing[1:]


def _sums(values: Sequence[float]) -> tuple[list[float], list[int]]:
    """Prefix sums of the finite values, and prefix counts of the infinite ones."""
    finite, infinite = [0.0], [0]
    for value in values:
        finite.append(finite[-1] + (value if value < float("inf") else 0.0))
        infinite.append(infinite[-1] + (value == float("inf")))
    return finite, infinite
