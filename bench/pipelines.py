"""The throughput of pipelines on this machine: stages on a device each, and stages with replicas.

    python -m bench.pipelines --json FILE [--devices cpu:0,cpu:1] [--models a,b] [--add]

A pipeline cannot be faster than its busiest unit. How near it comes is told from the stamps of the
very run: what the busiest unit computed for a request, over the time from result to result. The
busiest unit's parts in runs one at a time stand beside it: that others work meanwhile makes them
slower. All ways of a model take turns, round after round. `--add` keeps the rows of other models
that the file has.
"""

import argparse
import json
import statistics
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from math import inf
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import hetsched
from bench import models
from bench.cores import Probe, settled
from bench.overlap import layered, layers_for
from bench.record import record, write
from bench.timing import seconds_of
from hetsched.api import priced
from hetsched.errors import HetschedError, InfeasiblePlan
from hetsched.executable import Executable
from hetsched.graph import Graph
from hetsched.inputs import seeded_inputs
from hetsched.objective import objective
from hetsched.partitioner import Partitioner
from hetsched.plugin import load
from hetsched.request import Request
from hetsched.store import Store
from hetsched.system import System
from hetsched.verify import verify

MODELS = "chain,googlenet,mobilenet_v2,resnet18,squeezenet1_1,mobilenet_v3_small,efficientnet_b0"
PIPELINES = {"stages": "replicas=1", "replicas": "replicas=0"}
CHAIN_SECONDS, CHAIN_SIZE = 0.02, 512


@dataclass(frozen=True)
class Round:
    """Many requests behind each other: seconds of one, by the wall and on each unit."""

    seconds: float
    busy_seconds: Mapping[str, float]

    @property
    def share(self) -> float:
        """Of the rate that the busiest unit allows."""
        return max(self.busy_seconds.values()) / self.seconds


@dataclass(frozen=True)
class Throughput:
    """A pipeline as it was measured: medians of rounds.

    `alone_seconds` is what the busiest unit computed in runs one at a time.
    """

    in_flight: int
    requests: int
    seconds: float
    bottleneck_seconds: float
    share: float
    alone_seconds: float
    predicted_seconds: float
    parts: int
    replicas: Mapping[str, Sequence[str]]
    rounds: tuple[float, ...]


class Pipeline:
    """Rounds of requests through `executable`, each of about `seconds`."""

    def __init__(
        self, executable: Executable, inputs: Mapping[str, np.ndarray], seconds: float
    ) -> None:
        self._executable, self._inputs = executable, inputs
        self._unit = {d.name: d.unit for d in executable.plan.system.devices}
        # As many for each replica.
        self._turns = len(executable.plan.recipe.turns)
        once = self._round(2 * executable.most_in_flight)
        whole = max(1, round(seconds / once.seconds / self._turns))
        self.requests = max(2 * executable.most_in_flight, whole * self._turns)
        self.rounds: list[Round] = []
        self._alone: list[float] = []

    def go(self) -> None:
        self.rounds.append(self._round(self.requests))
        busy: dict[str, float] = {}
        for _ in range(self._turns):
            self._executable.run(self._inputs)
            for slot in self._executable.schedule.slots:
                unit = self._unit[slot.device]
                busy[unit] = busy.get(unit, 0.0) + slot.seconds
        self._alone.append(max(busy.values()) / self._turns)

    def result(self) -> Throughput:
        plan = self._executable.plan
        return Throughput(
            self._executable.most_in_flight,
            self.requests,
            statistics.median(each.seconds for each in self.rounds),
            statistics.median(max(each.busy_seconds.values()) for each in self.rounds),
            statistics.median(each.share for each in self.rounds),
            statistics.median(self._alone),
            objective("throughput").value(plan),
            len(plan.parts),
            dict(plan.replicas),
            tuple(each.seconds for each in self.rounds),
        )

    def _round(self, requests: int) -> Round:
        """From a result to that of `requests` later, the pipeline as full as `map` has it."""
        executable, inputs = self._executable, self._inputs
        waiting: deque[Request] = deque()
        every: list[Request] = []

        def submit() -> None:
            every.append(executable.submit(inputs))
            waiting.append(every[-1])

        for _ in range(executable.most_in_flight):
            submit()
        # Until the requests of all replicas are where they stay.
        for _ in range(executable.most_in_flight):
            submit()
            waiting.popleft().result()
        waiting.popleft().result()
        start = perf_counter()
        for _ in range(requests):
            submit()
            waiting.popleft().result()
        finish = perf_counter()
        for request in waiting:
            request.result()
        busy: dict[str, float] = {}
        for request in every:
            for slot in request.schedule().slots:
                unit, since = self._unit[slot.device], request.started
                within = min(since + slot.finish, finish) - max(since + slot.start, start)
                busy[unit] = busy.get(unit, 0.0) + max(0.0, within) / requests
        return Round((finish - start) / requests, busy)


def measured(
    graph: Graph,
    inputs: Mapping[str, np.ndarray],
    system: System,
    store: Path,
    rounds: int,
    seconds: float,
    seed: int,
) -> dict[str, Any]:
    """Each device alone, and both kinds of pipeline, in turns."""
    prices = priced(graph, system, "profiled", store)
    with ExitStack() as stack:
        alone: dict[str, Executable] = {}
        for device in system.devices:
            one = load(Partitioner, f"single:device={device.name}")
            plan = one.partition(graph, system, prices)
            alone[device.name] = stack.enter_context(hetsched.compile(plan))
        pipelines: dict[str, Pipeline] = {}
        for name, option in PIPELINES.items():
            chosen = load(Partitioner, f"layerwise:objective=throughput,{option}")
            try:
                plan = chosen.partition(graph, system, prices)
            except InfeasiblePlan:
                continue
            executable = stack.enter_context(hetsched.compile(plan))
            verify(executable, inputs, seed).check()
            pipelines[name] = Pipeline(executable, inputs, seconds)
        times: dict[str, list[float]] = {name: [] for name in alone}
        probe = stack.enter_context(Probe.of(system))
        for _ in range(rounds):
            probe.settle()
            for name, executable in alone.items():
                executable.run(inputs)
                runs = max(1, round(seconds / 4 / seconds_of(partial(executable.run, inputs))))
                once = partial(executable.run, inputs)
                times[name].append(statistics.median(seconds_of(once) for _ in range(runs)))
            for pipeline in pipelines.values():
                pipeline.go()
    single = {name: statistics.median(found) for name, found in times.items()}
    best = min(single.values())
    return {
        "single_seconds": single,
        "cores": probe.told(),
        "possible": best * sum(1 / value for value in single.values()),
        **{
            name: asdict(found) | {"speedup": best / found.seconds}
            for name, pipeline in pipelines.items()
            for found in [pipeline.result()]
        },
    }


def model(name: str, system: System, seed: int) -> tuple[Graph, Mapping[str, np.ndarray]]:
    if name == "chain":
        layers = layers_for(CHAIN_SECONDS, CHAIN_SIZE, system)
        graph = hetsched.read_onnx(layered(["chain"], layers, CHAIN_SIZE, seed))
        return graph, seeded_inputs(graph, seed)
    (found,) = models.chosen(models.FOLDER, [name], inf)
    graph = hetsched.read_onnx(models.load(found, seed), shapes=dict(found.shapes))
    return graph, models.inputs(found, graph, seed)


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    shown = Table(title="pipelines")
    shown.add_column("model")
    heads = (
        "best single ms",
        *(
            f"{name}{head}"
            for name in PIPELINES
            for head in (" ms", ", busiest ms", ", share", ", speed-up")
        ),
    )
    for head in (*heads, "possible"):
        shown.add_column(head, justify="right")
    for row in rows:
        cells = [f"{min(row['single_seconds'].values()) * 1e3:.3f}"]
        for name in PIPELINES:
            found = row.get(name)
            cells += (
                [""] * 4
                if found is None
                else [
                    f"{found['seconds'] * 1e3:.3f}",
                    f"{found['bottleneck_seconds'] * 1e3:.3f}",
                    f"{found['share'] * 100:.1f} %",
                    f"{found['speedup']:.2f}",
                ]
            )
        shown.add_row(row["model"], *cells, f"{row['possible']:.2f}")
    return shown


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.pipelines", description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="where the results go")
    parser.add_argument("--devices", default="cpu:0,cpu:1")
    parser.add_argument("--models", default=MODELS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.5, help="of a pipeline's round")
    parser.add_argument("--add", action="store_true", help="to the rows of the file")
    parser.add_argument("--store", type=Path, help="prices; by default measured in this run")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    content = record(given.seed) | {"devices": given.devices, "rows": []}
    names = given.models.split(",")
    rows = []
    if given.add and given.json.exists():
        rows = [r for r in json.loads(given.json.read_text())["rows"] if r["model"] not in names]
    try:
        with TemporaryDirectory(prefix="hetsched-bench-") as folder:
            store = given.store or Path(folder) / "profile.sqlite"
            system = settled(given.devices, Store(store))
            for name in names:
                graph, inputs = model(name, system, given.seed)
                found = measured(
                    graph, inputs, system, store, given.rounds, given.seconds, given.seed
                )
                rows.append({"model": name, **found})
                content["rows"] = rows
                content |= means(rows)
                write(given.json, content)
                print(name, file=sys.stderr, flush=True)
    except HetschedError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table(rows))
    for name in PIPELINES:
        console.print(
            f"{name}: {content[f'mean_share_{name}'] * 100:.1f} % of 1/bottleneck, at least "
            f"{content[f'least_share_{name}'] * 100:.1f} %; "
            f"{content[f'mean_speedup_{name}']:.2f} times the best single device"
        )
    return 0


def means(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    found = {}
    for name in PIPELINES:
        some = [row[name] for row in rows if name in row]
        if some:
            found[f"mean_share_{name}"] = statistics.geometric_mean(r["share"] for r in some)
            found[f"least_share_{name}"] = min(row["share"] for row in some)
            found[f"mean_speedup_{name}"] = statistics.geometric_mean(r["speedup"] for r in some)
    return found


if __name__ == "__main__":
    sys.exit(main())
