"""Pipelines and cuts against brute force and bounds: a set of `python -m bench.schedulers`.

Graphs are made anew from the seed.
"""

import random
import statistics
from collections.abc import Iterator, Sequence
from itertools import pairwise, product
from math import inf
from time import perf_counter, process_time
from typing import Any

import numpy as np

from bench import models
from hetsched import read_onnx
from hetsched.cost import Prices, roofline_seconds
from hetsched.device import Device, Link
from hetsched.errors import InfeasiblePlan
from hetsched.graph import Graph
from hetsched.objective import seconds_a_request
from hetsched.operation import group_flops, group_nbytes
from hetsched.plan import group_tasks
from hetsched.stages.pipeline import fastest
from hetsched.stages.serial import cheapest, minimum_cut
from hetsched.stages.traffic import Traffic
from hetsched.system import System
from hetsched.tasks import Edge, Task, TaskGraph, contract, replay

MODELS = """silero_vad_16k_op15 magika plcmos_v2 mobilenet_v3_small light_shufflenet efficientnet_b0
regnet_y_400mf basic_pitch googlenet resnet18 light_inception_v2 light_densenet121""".split()
CUTS = 10_000
ROUNDING = 1e-9
# A device and its tasks.
Placed = list[tuple[Device, list[str]]]


def layerwise(
    seed: int = 0, instances: int = 0
) -> tuple[str, tuple[str, ...], list[list[str]], list[dict[str, Any]], dict[str, Any]]:
    """The set of `bench.schedulers`: what it says, heads and cells of its table, rows, figures.

    `instances` is the number of small graphs; of cuts there are so many times a hundred.
    """
    rows = [
        *small_pipelines(seed, instances or 100),
        *model_pipelines(),
        *large_pipelines(seed),
    ]
    cells = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        some = [row for row in rows if row["kind"] == kind]
        ratios = [row["ratio"] for row in some if row["ratio"] is not None]
        cells.append(
            [
                kind,
                str(len(some)),
                str(sum(row["optimal"] for row in some)),
                f"{statistics.geometric_mean(ratios):.4f}" if ratios else "",
                f"{max(ratios):.4f}" if ratios else "",
                f"{max(row['seconds'] for row in some):.2f}",
            ]
        )
    cuts = small_cuts(seed, 100 * instances or CUTS)
    large = large_cuts(seed)
    cells.append(
        [
            "two-device cuts",
            str(cuts["graphs"]),
            str(cuts["equal"]),
            f"{cuts['mean']:.4f}",
            f"{cuts['largest']:.4f}",
            f"{large['median_seconds']:.4f}",
        ]
    )
    text = (
        "Bottleneck of pipelines over the best of all by brute force (small graphs) or over the "
        "lower bound that comes with them (networks, large graphs), and cuts of "
        f"{cuts['graphs']:,} graphs over the best placement of all; of cuts the seconds are of "
        f"{large['tasks']:,} tasks, the median of {large['repeats']}."
    )
    heads = ("graphs", "count", "optimal", "geomean", "largest", "most seconds")
    return text, heads, cells, rows, {"cuts": cuts, "large_cuts": large}


# Small graphs, by brute force.


def drawn(rng: random.Random, most: int, devices: int) -> TaskGraph:
    """Unrelated devices, some that share cores, some with little memory or memory of their own.

    Tensors have several readers, links are missing here and there, and so are prices.
    """
    made = []
    for index in range(devices):
        own = rng.random() < 0.4
        made.append(
            Device(
                f"d{index}",
                "drawn",
                cores=() if own or rng.random() < 0.5 else (rng.randint(0, 1),),
                memory_space=f"space{index}" if own else "host",
                memory_bytes=rng.choice([inf, inf, 250.0, 400.0]),
                launch_seconds=rng.choice([0.0, 0.3]),
            )
        )
    links = [
        Link(a.name, b.name, rng.choice([0.0, 0.2]), rng.choice([30.0, 200.0]))
        for a in made
        for b in made
        if a != b and rng.random() < 0.9
    ]
    names = [f"t{index}" for index in range(rng.randint(2, most))]
    tasks, edges = [], []
    for index, name in enumerate(names):
        able = [device.name for device in made if rng.random() < 0.85] or [made[0].name]
        seconds = {device: rng.uniform(0.1, 5.0) for device in able}
        tasks.append(Task(name, seconds, float(rng.randint(0, 100))))
        if index == 0 or rng.random() < 0.2:
            edges.append(Edge(None, name, 40, f"input {index % 2}"))
        nbytes = rng.randint(0, 90)
        readers = [other for other in names[index + 1 :] if rng.random() < 0.35]
        edges += [Edge(name, reader, nbytes, f"{name}.y") for reader in readers]
        if not readers:
            edges.append(Edge(name, None, nbytes, f"{name}.y"))
    return TaskGraph(System("drawn", tuple(made), tuple(links)), tuple(tasks), tuple(edges))


def chained(rng: random.Random, most: int, devices: int) -> TaskGraph:
    """As `drawn`, but each task reads from the one before."""
    found = drawn(rng, most, devices)
    names = [task.name for task in found.tasks]
    edges = [Edge(a, b, rng.randint(0, 90), f"{a}.y") for a, b in pairwise(names)]
    return TaskGraph(found.system, found.tasks, tuple(edges))


def all_pipelines(tasks: TaskGraph) -> Iterator[Placed]:
    """Every way to cut the graph into stages that can run, each unit at most once."""
    needs = {task.name: {e.source for e in tasks.incoming[task.name]} for task in tasks.tasks}
    borders = [frozenset[str]()]
    for task in tasks.tasks:
        borders += [have | {task.name} for have in borders if needs[task.name] - {None} <= have]

    def further(before: frozenset[str], stages: Placed) -> Iterator[Placed]:
        if len(before) == len(tasks.tasks):
            yield stages
            return
        units = {device.unit for device, _ in stages}
        for device in tasks.system.devices:
            if device.unit in units:
                continue
            for border in borders:
                if before < border:
                    members = [t.name for t in tasks.tasks if t.name in border - before]
                    if all(device.name in tasks.task[name].seconds for name in members):
                        yield from further(border, [*stages, (device, members)])

    yield from further(frozenset(), [])


def bottleneck(tasks: TaskGraph, stages: Placed) -> float:
    """What the simulator's schedule of one request says of many; infinite if it cannot be."""
    for device, members in stages:
        if sum(tasks.task[name].memory_bytes for name in members) > device.memory_bytes:
            return inf
    placement = {name: device.name for device, members in stages for name in members}
    parts = contract(tasks, [members for _, members in stages], placement)
    try:
        schedule = replay(parts, placement, [members[0] for _, members in stages])
    except InfeasiblePlan:
        return inf
    return seconds_a_request([schedule], tasks.system)


def placed(tasks: TaskGraph, stages: Sequence[tuple[int, Sequence[int]]]) -> Placed:
    devices = tasks.system.devices
    return [(devices[device], [tasks.tasks[i].name for i in members]) for device, members in stages]


def small_pipelines(seed: int, count: int) -> list[dict[str, Any]]:
    rows = []
    for index in range(count):
        rng = random.Random(1000 * seed + index)
        tasks = drawn(rng, 6, 3) if index % 3 else chained(rng, 8, 4)
        best = min((bottleneck(tasks, each) for each in all_pipelines(tasks)), default=inf)
        start = process_time()
        found = fastest(Traffic.of(tasks))
        seconds = process_time() - start
        cost = bottleneck(tasks, placed(tasks, found.stages)) if found else inf
        rows.append(
            {
                "kind": "small graphs" if index % 3 else "small chains",
                "name": f"{index}",
                "tasks": len(tasks.tasks),
                "feasible": best < inf,
                "cost": cost if cost < inf else None,
                "best": best if best < inf else None,
                "ratio": cost / best if best < inf else None,
                "optimal": cost == best or abs(cost - best) <= ROUNDING * best,
                # The first has the time in which Numba compiles.
                "seconds": 0.0 if index < 2 else seconds,
            }
        )
    return rows


# Networks and large graphs, against the bound.


def machine(devices: int, room: float, held: float) -> System:
    """Two to four devices of several kinds; `room` is what all can hold, of `held` bytes."""
    rates = [(5e10, 2e10), (2e11, 4e10), (5e10, 2e10), (1e11, 1e10)][:devices]
    made = tuple(
        Device(
            f"d{index}",
            "described",
            flops_per_second=flops,
            bytes_per_second=nbytes,
            memory_space="host" if index == 0 else f"space{index}",
            launch_seconds=5e-6,
            memory_bytes=room * held / devices if room else inf,
        )
        for index, (flops, nbytes) in enumerate(rates)
    )
    links = tuple(Link(a.name, b.name, 1e-5, 2e9) for a in made for b in made if a != b)
    return System(f"{devices} devices", made, links)


def model_tasks(graph: Graph, system: System) -> TaskGraph:
    seconds = {
        group.name: {
            device.name: roofline_seconds(group_flops(group), group_nbytes(group), device)
            for device in system.devices
        }
        for group in graph.groups
    }
    return group_tasks(graph, system, Prices("roofline", seconds, {}))


def model_pipelines(names: Sequence[str] = MODELS) -> list[dict[str, Any]]:
    rows = []
    there = {model.name: model for model in models.models()}
    for name in names:
        if name not in there:
            continue
        model = there[name]
        graph = read_onnx(models.load(model), shapes=dict(model.shapes))
        held = sum(t.nbytes for g in graph.groups for t in (*g.constants, *g.outputs))
        for devices, room in product((2, 3, 4), (0.0, 1.3)):
            tasks = model_tasks(graph, machine(devices, room, held))
            rows.append(_judged("networks", f"{name}, {devices} devices, room {room}", tasks))
    return rows


def large(rng: random.Random, count: int, width: int, devices: int, related: bool) -> TaskGraph:
    """A chain, or a graph in which a task reads from one or two of the `width` before it."""
    made = tuple(Device(f"d{index}", "drawn") for index in range(devices))
    links = tuple(Link(a.name, b.name, 0.0, 1.0) for a in made for b in made if a != b)
    speed = [rng.uniform(0.5, 2.0) for _ in made]
    tasks, edges = [], []
    for index in range(count):
        mean = rng.uniform(0.1, 1.9)
        factors = speed if related else [rng.uniform(0.2, 1.8) for _ in made]
        seconds = {d.name: mean * factor for d, factor in zip(made, factors, strict=True)}
        tasks.append(Task(f"t{index}", seconds, 1.0))
        sources = range(max(0, index - width), index)
        chosen = rng.sample(sources, min(len(sources), rng.randint(1, 2)))
        edges += [Edge(f"t{i}", f"t{index}", 1, f"t{i}.y") for i in sorted(chosen)]
    return TaskGraph(System("large", made, links), tuple(tasks), tuple(edges))


def large_pipelines(seed: int) -> list[dict[str, Any]]:
    rows = []
    for index, (count, width, devices, related) in enumerate(
        product((300, 2000), (1, 4, 30), (2, 3, 4), (True, False))
    ):
        tasks = large(random.Random(1000 * seed + index), count, width, devices, related)
        kind = "chains" if width == 1 else "graphs"
        speeds = "related" if related else "unrelated"
        name = f"{count} tasks, {width} wide, {devices} devices"
        rows.append(_judged(f"large {kind}, {speeds}", name, tasks))
    return rows


def _judged(kind: str, name: str, tasks: TaskGraph) -> dict[str, Any]:
    start = process_time()
    found = fastest(Traffic.of(tasks))
    seconds = process_time() - start
    cost = bottleneck(tasks, placed(tasks, found.stages)) if found else None
    return {
        "kind": kind,
        "name": name,
        "tasks": len(tasks.tasks),
        "feasible": found is not None,
        "cost": cost,
        "bound": found.bound if found else None,
        "ratio": cost / found.bound if found and cost is not None else None,
        "optimal": bool(found and found.optimal),
        "stages": len(found.stages) if found else 0,
        "seconds": seconds,
    }


# Cuts.


def in_turn(tasks: TaskGraph) -> np.ndarray:
    """(2^n) the sum of work and transfers of each placement on two devices; bit i is of task i."""
    first, second = (device.name for device in tasks.system.devices)
    names = [task.name for task in tasks.tasks]
    column = {name: index for index, name in enumerate(names)}
    there = (np.arange(1 << len(names))[:, None] >> np.arange(len(names)) & 1).astype(bool)
    total = np.zeros(len(there))
    for index, task in enumerate(tasks.tasks):
        row = [task.seconds.get(name, inf) for name in (first, second)]
        total += np.where(there[:, index], row[1], row[0])
    readers: dict[tuple[str | None, str], list[Edge]] = {}
    for edge in tasks.edges:
        readers.setdefault((edge.source, edge.tensor), []).append(edge)
    for (source, _), edges in readers.items():
        nbytes = edges[0].nbytes
        ends = [column[edge.sink] for edge in edges if edge.sink is not None]
        some = [~there[:, ends].all(axis=1), there[:, ends].any(axis=1)]
        for sink, reads in zip((first, second), some, strict=True):
            if not ends:
                continue
            if source is None:
                total += np.where(reads, tasks.transfer_seconds(nbytes, None, sink), 0.0)
            else:
                other = second if sink == first else first
                moves = reads & (there[:, column[source]] == (other == second))
                total += np.where(moves, tasks.transfer_seconds(nbytes, other, sink), 0.0)
        if source is not None and any(edge.sink is None for edge in edges):
            row = [tasks.transfer_seconds(nbytes, name, None) for name in (first, second)]
            total += np.where(there[:, column[source]], row[1], row[0])
    return total


def small_cuts(seed: int, count: int) -> dict[str, Any]:
    """Graphs of up to 12 tasks: how many cuts are as cheap as the cheapest placement.

    Every other may not go back. Memory is left out here.
    """
    equal, ratios = 0, []
    for index in range(count):
        rng = random.Random(1_000_000 * seed + index)
        tasks = drawn(rng, 12, 2)
        back = index % 2 == 0
        total = in_turn(tasks)
        if not back:
            place = np.arange(len(total))
            column = {task.name: i for i, task in enumerate(tasks.tasks)}
            for edge in tasks.edges:
                if edge.source and edge.sink:
                    returns = (place >> column[edge.source]) & ~(place >> column[edge.sink]) & 1
                    total = np.where(returns, inf, total)
        best = float(total.min())
        cut = minimum_cut(Traffic.of(tasks), back)
        cost = inf if cut is None else float(total[int((cut << np.arange(len(cut))).sum())])
        equal += cost == best or abs(cost - best) <= ROUNDING * best
        if best < inf:
            ratios.append(cost / best)
    return {
        "graphs": count,
        "equal": equal,
        "mean": statistics.fmean(ratios),
        "largest": max(ratios),
    }


def large_cuts(seed: int, count: int = 1000, repeats: int = 15) -> dict[str, Any]:
    traffic = Traffic.of(large(random.Random(seed), count, 30, 2, related=False))
    seconds = []
    for _ in range(repeats):
        start = perf_counter()
        cheapest(traffic)
        seconds.append(perf_counter() - start)
    return {"tasks": count, "repeats": repeats, "median_seconds": statistics.median(seconds)}
