"""How far schedules are from the shortest ones, and how long finding them takes.

    python -m bench.schedulers --json FILE [--sets proved,medium,...] [--seed 0] [--instances N]

All instances are made anew from the seed and all are reported; references are solved in this run,
or in an earlier one that was broken off, with `--references FILE`. Each set has a table; the file
has its rows as well. Process time is of all threads.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from math import inf
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np
from rich.progress import track

from bench import models
from bench.attack import attack
from bench.instances import families, instance, layered, odd, planted
from bench.record import record, write
from bench.scaling import scaling
from bench.sets import run
from bench.stages import layerwise
from hetsched import read_onnx
from hetsched.cost import Prices, roofline_seconds
from hetsched.device import Device, Link
from hetsched.errors import InfeasiblePlan
from hetsched.host import cores, pinned
from hetsched.operation import group_flops, group_nbytes
from hetsched.plan import group_tasks
from hetsched.plugin import load
from hetsched.problem import Problem, Solution
from hetsched.scheduler import Scheduler
from hetsched.schedulers._refutation import refuted
from hetsched.system import System

LISTS = ("heft", "cpop", "peft", "lookahead", "ippts")
RATIOS = (0.1, 1.0, 5.0)
DEVICES = 3
# Of the whole run's instances: what a set has where the command line does not say.
INSTANCES = {
    "proved": 504,
    "medium": 36,
    "planted": 3,
    "memory": 120,
    "contention": 27,
    "bound": 10_000,
}
# Anything shorter than a proved optimum by more than this is an error of one of the two.
ROUNDING = 1e-9

MODELS = """ppocrv2_cls light_shufflenet regnet_y_400mf efficientnet_b0 basic_pitch
mobilenet_v3_small""".split()
# Multiply-adds of dense operations are fast on the accelerator, and nothing else runs there.
DENSE = frozenset("Conv ConvTranspose Gemm MatMul QLinearConv".split())


@dataclass(frozen=True)
class Case:
    """An instance, and what makes it again."""

    name: str
    problem: Problem = field(repr=False)
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class Options:
    """What the command line says; `instances` of 0 are each set's own number."""

    seed: int = 0
    scheduler: str = "portfolio"
    instances: int = 0
    reference_seconds: float = 0.0
    jobs: int = 1
    references: Path | None = None

    def count(self, name: str) -> int:
        return self.instances or INSTANCES[name]


@dataclass(frozen=True)
class Result:
    """Of a set: `text` in words, a table of `cells` below `heads`, and a row for each instance."""

    text: str
    heads: tuple[str, ...]
    cells: list[list[str]]
    rows: list[dict[str, Any]]
    figures: dict[str, Any]


def proved(options: Options) -> Result:
    """10 to 30 tasks: against the optimum, as far as constraint programming proves it."""
    cases = [
        _drawn(index, 10 + index // 3 % 21, RATIOS[index % 3], options.seed, 3 * 21)
        for index in range(options.count("proved"))
    ]
    seconds = options.reference_seconds or 20.0
    judged = (_limited(options.scheduler, 1.0), *LISTS)
    rows = _compared(cases, judged, f"exact:seconds={seconds}", options)
    sure = [row for row in rows if row["proved"]]
    figures = _figures(sure)
    figures["bound"] = _spread(row["bound"] / row["reference"] for row in sure)
    figures["own_bound"] = _spread(row["bounds"][judged[0]] / row["reference"] for row in sure)
    text = (
        f"{len(sure)} of {len(rows)} instances of 10 to 30 tasks on {DEVICES} unrelated devices, "
        f"transfers 0.1, 1 and 5 times the work, have a proved optimum within {seconds:g} s: "
        "makespan over it. The lower bound, which needs no search, is "
        f"{figures['bound']['geomean']:.4f} of it (geometric mean), {figures['bound']['min']:.3f} "
        f"at the least; that of {judged[0]}, which searches, "
        f"{figures['own_bound']['geomean']:.4f} and {figures['own_bound']['min']:.3f}. "
        f"{figures['below']} schedules are below the optimum."
    )
    return Result(text, SCHEDULER_HEADS, _cells(figures["schedulers"]), rows, figures)


def medium(options: Options) -> Result:
    """40 to 200 tasks: against what constraint programming finds in a minute on two cores."""
    seconds = options.reference_seconds or 60.0
    # Of processor time, so that what else the machine does is no handicap.
    spec = f"exact:seconds=0,process={2 * seconds},workers=2,linearization=0"
    cases = list(_medium_cases(options))
    rows = _compared(cases, (_limited(options.scheduler, 2.0), "heft"), spec, options)
    figures = _figures(rows)
    won = [row["makespans"][figures["first"]] / row["reference"] for row in rows]
    figures["above"] = sum(ratio > 1 + ROUNDING for ratio in won)
    text = (
        f"{len(rows)} instances of {min(c.problem.tasks for c in cases)} to "
        f"{max(c.problem.tasks for c in cases)} tasks (random, of algorithms, of networks), each "
        f"in 2 s, over what CP-SAT finds in {seconds:g} s with two workers from the schedule of "
        f"HEFT; {sum(row['proved'] for row in rows)} are proved optima: "
        f"{figures['above']} are above it, {sum(ratio < 1 - ROUNDING for ratio in won)} below."
    )
    return Result(text, SCHEDULER_HEADS, _cells(figures["schedulers"]), rows, figures)


def _medium_cases(options: Options) -> Iterator[Case]:
    """Five that are drawn, then a network, as long as there are some: any number is a fair mix."""
    sizes = (40, 60, 80, 120, 160, 200)
    # The chain is solved by anyone.
    shapes = ["layered", *(name for name in families() if name not in ("chain", "layered"))]
    networks = iter(MODELS)
    index = 0
    for place in range(options.count("medium")):
        name = next(networks, None) if place % 6 == 5 else None
        if name is not None:
            yield _model(name)
            continue
        family = shapes[(index + index // len(sizes)) % len(shapes)]
        ratio = RATIOS[(index + index // 3) % 3]
        yield _made(family, sizes[index % len(sizes)], ratio, options.seed + index)
        index += 1


def planted_optimum(tasks: int, seconds: float, options: Options) -> Result:
    """Many tasks: against an optimum that the instance was made around."""
    judged = (_limited(options.scheduler, seconds), "heft")
    _warm((_limited(options.scheduler, 2.0), "heft"))
    rows = []
    for index in range(options.count("planted")):
        ratio, seed = RATIOS[index % 3], options.seed + index
        problem, best = planted(tasks, DEVICES, ratio, seed)
        facts = {"tasks": tasks, "ratio": ratio, "seed": seed}
        case = Case(f"planted({tasks}, {DEVICES}, {ratio}, {seed})", problem, facts)
        bests = {"reference": best.makespan, "proved": True, "reference_seconds": 0.0}
        rows.append(_row(case, judged, bests))
    text = (
        f"{len(rows)} instances of {tasks:,} tasks, in {seconds:g} s each: makespan over the "
        "optimum that is known from how the instance was made, which is the lower bound by prices "
        "of the devices."
    )
    figures = _figures(rows)
    return Result(text, SCHEDULER_HEADS, _cells(figures["schedulers"]), rows, figures)


def memory(options: Options) -> Result:
    """10 to 30 tasks that hardly fit: is a placement found where there is one, and how good?"""
    rooms = (0.9, 1.0, 1.02, 1.1, 1.3)
    cases = []
    for index in range(options.count("memory")):
        room = rooms[index % len(rooms)]
        tasks, ratio = 10 + index // 5 % 21, RATIOS[index // 5 % 3]
        cases.append(_made("layered", tasks, ratio, options.seed + index, room))
    seconds = options.reference_seconds or 20.0
    judged = (_limited(options.scheduler, 1.0), *LISTS)
    rows = _compared(cases, judged, f"exact:seconds={seconds}", options)
    there = [row for row in rows if row["reference"] is not None]
    figures = _figures([row for row in there if row["proved"]])
    figures["feasible"] = len(there)
    figures["impossible"] = sum(row["impossible"] for row in rows)
    figures["found"] = {
        name: sum(row["makespans"][name] is not None for row in there)
        for name in rows[0]["makespans"]
    }
    text = (
        f"Of {len(rows)} instances of 10 to 30 tasks whose memory hardly suffices, CP-SAT finds "
        f"{len(there)} feasible and proves {figures['impossible']} to be impossible within "
        f"{seconds:g} s; feasible schedules found of these {len(there)}: "
        + ", ".join(f"{name} {count}" for name, count in figures["found"].items())
        + f". {figures['below']} schedules are below a proved optimum. Makespan over the optimum "
        "where it is proved and a schedule was found:"
    )
    return Result(text, SCHEDULER_HEADS, _cells(figures["schedulers"]), rows, figures)


def contention(options: Options) -> Result:
    """8 to 24 tasks whose transfers wait for each other: against constraint programming."""
    cases = []
    for index in range(options.count("contention")):
        case = _made("layered", 8 + 2 * (index // 3 % 9), RATIOS[index % 3], options.seed + index)
        facts = {**case.facts, "contention": True}
        cases.append(Case(case.name, replace(case.problem, contention=True), facts))
    seconds = options.reference_seconds or 20.0
    spec = f"exact:seconds={seconds}"
    rows = _compared(cases, (_limited(options.scheduler, 1.0), *LISTS), spec, options)
    figures = _figures(rows)
    text = (
        f"{len(rows)} instances of 8 to 24 tasks with links that serve one transfer at a time: "
        f"makespan over what CP-SAT finds in {seconds:g} s "
        f"({sum(row['proved'] for row in rows)} are proved optima). "
        f"{figures['below']} schedules are below a proved optimum."
    )
    return Result(text, SCHEDULER_HEADS, _cells(figures["schedulers"]), rows, figures)


def bound(options: Options) -> Result:
    """Up to 8 tasks with all that an instance can have: is the lower bound ever above?"""
    exact = load(Scheduler, "exact:seconds=20")
    rows, impossible = [], 0
    count = options.count("bound")
    for index in track(range(count), "bound", transient=True):
        seed = options.seed * count + index
        problem = odd(seed)
        least = refuted(problem).seconds
        try:
            best = exact.schedule(problem)
        except InfeasiblePlan:
            impossible += 1
            continue
        rows.append(
            {"seed": seed, "tasks": problem.tasks, "bound": least, "optimum": best.makespan}
            | {"proved": best.optimal}
        )
    sure = [row for row in rows if row["proved"] and row["optimum"] > 0]
    shares = _spread(row["bound"] / row["optimum"] for row in sure)
    above = [row for row in sure if row["bound"] > row["optimum"] * (1 + ROUNDING)]
    text = (
        f"Of {count} random instances of 1 to 8 tasks, with memory, links that are missing, "
        f"devices that take turns, entry and exit, {impossible} have no schedule and {len(sure)} a "
        f"proved optimum; the lower bound is above it in {len(above)}."
    )
    cells = [[f"{shares['geomean']:.4f}", f"{shares['min']:.3f}", f"{shares['max']:.9f}"]]
    figures = {"shares": shares, "above": len(above), "impossible": impossible}
    return Result(text, ("bound / optimum, geomean", "least", "most"), cells, above, figures)


def speed(options: Options) -> Result:
    """How the time of list scheduling grows with the number of tasks."""
    rows = scaling(seed=options.seed + 1)
    names = list(dict.fromkeys(row["scheduler"] for row in rows))
    cells = []
    for name in names:
        some = [row for row in rows if row["scheduler"] == name]
        cells.append([str(name), *(f"{row['seconds']:.3g}" for row in some)])
        cells[-1].append(f"{some[-1]['exponent']:.2f}")
    sizes = list(dict.fromkeys(f"{row['tasks']:,} tasks, s" for row in rows))
    text = (
        f"Wall seconds of list scheduling on {DEVICES} devices, from the arrays to the schedule "
        "(median of 3 to 50), and the exponent of time between the first size and the last."
    )
    return Result(text, ("scheduler", *sizes, "exponent"), cells, rows, {})


SCHEDULER_HEADS = (
    "scheduler",
    "geomean",
    "p95",
    "max",
    "wall s, median",
    "wall s, max",
    "process s, max",
)

SETS: dict[str, Callable[[Options], Result]] = {
    "proved": proved,
    "medium": medium,
    "planted 1k": partial(planted_optimum, 1_000, 2.0),
    "planted 10k": partial(planted_optimum, 10_000, 10.0),
    "planted 100k": partial(planted_optimum, 100_000, 40.0),
    "memory": memory,
    "contention": contention,
    "bound": bound,
    "speed": speed,
    "attack": lambda options: Result(*attack(options.seed, options.instances, options.scheduler)),
    "layerwise": lambda options: Result(*layerwise(options.seed, options.instances)),
}


def _drawn(index: int, tasks: int, ratio: float, seed: int, turn: int) -> Case:
    """Every other time round a random layered graph, else the next family."""
    shapes = families()
    around = index // turn
    family = "layered" if around % 2 == 0 else shapes[(index + around) % len(shapes)]
    return _made(family, tasks, ratio, seed * 100_000 + index)


def _made(family: str, tasks: int, ratio: float, seed: int, room: float = 0.0) -> Case:
    problem = instance(family, tasks, DEVICES, ratio, seed, room=room)
    facts = {"family": family, "tasks": problem.tasks, "ratio": ratio, "seed": seed}
    facts |= {"room": room} if room else {}
    name = f"instance('{family}', {tasks}, {DEVICES}, {ratio}, {seed}, room={room})"
    return Case(name, problem, facts)


def _model(name: str) -> Case:
    """The kernel groups of a network on a described machine: processor, GPU and accelerator."""
    (model,) = models.chosen(models.FOLDER, [name], inf)
    graph = read_onnx(models.load(model), shapes=dict(model.shapes))
    seconds = {
        group.name: {
            device.name: device.launch_seconds
            + roofline_seconds(group_flops(group), group_nbytes(group), device)
            for device in MACHINE.devices
            if device.name != "npu" or DENSE & {op.kind for op in group.ops}
        }
        for group in graph.groups
    }
    tasks = group_tasks(graph, MACHINE, Prices("roofline", seconds, {}))
    return Case(name, Problem.of(tasks), {"family": name, "tasks": len(tasks.tasks)})


def _device(name: str, flops: float, rate: float, launch: float, space: str) -> Device:
    return Device(
        name,
        "described",
        memory_space=space,
        flops_per_second=flops,
        bytes_per_second=rate,
        launch_seconds=launch,
    )


MACHINE = System(
    "described",
    (
        _device("cpu", 5e10, 2e10, 1e-6, "host"),
        _device("gpu", 2e11, 4e10, 1e-5, "gpu"),
        _device("npu", 4e11, 1e10, 5e-6, "npu"),
    ),
    tuple(
        Link(source, sink, 5e-6, 8e9)
        for source in ("cpu", "gpu", "npu")
        for sink in ("cpu", "gpu", "npu")
        if source != sink
    ),
)


def _limited(scheduler: str, seconds: float) -> str:
    """With that limit of seconds, unless the scheduler is given one."""
    if "seconds=" in scheduler or "iterations=" in scheduler:
        return scheduler
    return f"{scheduler}{',' if ':' in scheduler else ':'}seconds={seconds:g}"


def _compared(
    cases: Sequence[Case], schedulers: Sequence[str], spec: str, options: Options
) -> list[dict[str, Any]]:
    """A row for each case, with what the reference `spec` finds."""
    bests = _references(cases, spec, options)
    _warm(schedulers)
    both = list(zip(cases, bests, strict=True))
    return [
        _row(case, schedulers, best)
        for case, best in track(both, ", ".join(schedulers), transient=True)
    ]


def _warm(schedulers: Iterable[str]) -> None:
    """What Numba compiles is compiled before any clock runs, for small problems and large ones."""
    for name in schedulers:
        for tasks in (30, 60, 500):
            load(Scheduler, name).schedule(layered(tasks, DEVICES, 1.0, 0))


def _references(cases: Sequence[Case], spec: str, options: Options) -> list[dict[str, Any]]:
    """What a reference finds for each case; what a file has of an earlier run is not solved again.

    The file is written after each, so that a run can be broken off at any time.
    """
    path, known = options.references, {}
    if path and path.exists():
        known = json.loads(path.read_text(encoding="utf-8"))
    missing = [case for case in cases if f"{case.name}, {spec}" not in known]
    with ExitStack() as stack:
        work: Callable[..., Iterable[dict[str, Any]]] = map
        if options.jobs > 1:
            work = stack.enter_context(ProcessPoolExecutor(options.jobs)).map
        solved = work(_reference, missing, [spec] * len(missing))
        for case, found in zip(track(missing, spec, transient=True), solved, strict=True):
            known[f"{case.name}, {spec}"] = found
            if path:
                write(path, known)
    return [known[f"{case.name}, {spec}"] for case in cases]


def _reference(case: Case, spec: str) -> dict[str, Any]:
    start, process = perf_counter(), process_time()
    found, impossible = None, False
    try:
        found = load(Scheduler, spec).schedule(case.problem)
    except InfeasiblePlan as error:
        impossible = "no schedule was found" not in str(error)
    return {
        "reference": found.makespan if found else None,
        "reference_bound": found.lower_bound if found else None,
        "proved": found.optimal if found else False,
        "impossible": impossible,
        "reference_by": spec,
        "reference_seconds": perf_counter() - start,
        "reference_process": process_time() - process,
    }


def _row(case: Case, schedulers: Sequence[str], best: Mapping[str, Any]) -> dict[str, Any]:
    """What each scheduler finds on one core, and in what time; None where it finds nothing."""
    makespans: dict[str, float | None] = {}
    bounds: dict[str, float | None] = {}
    seconds: dict[str, tuple[float, float]] = {}
    for name in schedulers:
        wall, process = perf_counter(), process_time()
        try:
            with pinned(cores()[:1]):
                found: Solution | None = load(Scheduler, name).schedule(case.problem)
        except InfeasiblePlan:
            found = None
        seconds[name] = perf_counter() - wall, process_time() - process
        makespans[name] = found.makespan if found else None
        bounds[name] = found.lower_bound if found else None
    return {
        "instance": case.name,
        **case.facts,
        **best,
        "bound": refuted(case.problem).seconds,
        "makespans": makespans,
        "bounds": bounds,
        "seconds": seconds,
    }


def _figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of each scheduler: makespan over the reference, and times, where it found a schedule."""
    schedulers, below = {}, 0
    names = list(rows[0]["makespans"]) if rows else []
    for name in names:
        some = [row for row in rows if row["makespans"][name] is not None]
        ratios = [row["makespans"][name] / row["reference"] for row in some]
        below += sum(
            ratio < 1 - ROUNDING for ratio, row in zip(ratios, some, strict=True) if row["proved"]
        )
        walls = [row["seconds"][name][0] for row in some]
        schedulers[name] = _spread(ratios) | {
            "wall_median": statistics.median(walls) if walls else None,
            "wall_max": max(walls, default=None),
            "process_max": max((row["seconds"][name][1] for row in some), default=None),
        }
    return {"schedulers": schedulers, "below": below, "first": names[0] if names else None}


def _spread(values: Iterable[float]) -> dict[str, Any]:
    """Geometric mean, 95th percentile (of all values, the first that 95 % do not exceed), ends."""
    ordered = sorted(values)
    if not ordered:
        return {"count": 0, "geomean": None, "p95": None, "min": None, "max": None}
    return {
        "count": len(ordered),
        "geomean": float(np.exp(np.mean(np.log(ordered)))),
        "p95": ordered[-(-95 * len(ordered) // 100) - 1],
        "min": ordered[0],
        "max": ordered[-1],
    }


def _cells(schedulers: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    def told(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    return [
        [name]
        + [told(figures[key], ".4f") for key in ("geomean", "p95", "max")]
        + [told(figures[key], ".3g") for key in ("wall_median", "wall_max", "process_max")]
        for name, figures in schedulers.items()
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.schedulers", description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="where the results go")
    parser.add_argument("--sets", default=",".join(SETS), help=f"of {', '.join(SETS)}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scheduler", default=Options.scheduler, help="the one that is judged")
    parser.add_argument("--instances", type=int, default=0, help="of each set; 0: its own number")
    parser.add_argument("--reference-seconds", type=float, default=0.0, help="0: each set's own")
    parser.add_argument("--jobs", type=int, default=1, help="processes that solve references")
    parser.add_argument(
        "--references", type=Path, help="a file that keeps references for a run after this one"
    )
    parser.add_argument(
        "--add", action="store_true", help="keep the other sets that the file has from before"
    )
    given = parser.parse_args(arguments)
    wanted = given.sets.split(",")
    for name in wanted:
        if name not in SETS:
            parser.error(f"no set '{name}'; there are {', '.join(SETS)}")
    options = Options(
        given.seed,
        given.scheduler,
        given.instances,
        given.reference_seconds,
        given.jobs,
        given.references,
    )
    asked = vars(given) | {"json": None, "references": None}
    found = {name: partial(SETS[name], options) for name in wanted}
    content = record(given.seed) | {"options": asked}
    return run(given.json, content, found, keep=given.add, width=120)


if __name__ == "__main__":
    sys.exit(main())
