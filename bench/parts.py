"""What it costs to cut a network into parts: each kernel group a part of its own on one core.

    python -m bench.parts --json FILE [--models NAME ...] [--seconds 6] [--device cpu:0]

The whole network, its groups with tensors handed over in blocks of channels, and its groups with
plain tensors take turns in one process. Times are sums of the parts' own, medians of the runs;
*alone* are sums of the medians of single groups, each repeated on the same tensors.
"""

import argparse
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from rich.console import Console
from rich.table import Table

import hetsched
from bench import models
from bench.record import record, write
from hetsched.cache import compiled
from hetsched.compiler import CompiledPart
from hetsched.cost import Prices
from hetsched.device import Device
from hetsched.errors import HetschedError
from hetsched.executable import Executable
from hetsched.graph import Graph
from hetsched.host import pinned
from hetsched.inputs import seeded
from hetsched.plan import Plan, make_plan
from hetsched.plugin import load
from hetsched.system import System
from hetsched.target import Target

NAMES = ("mobilenet_v2", "squeezenet1_1", "resnet18", "googlenet")
# Runs of a group alone, at least, and until so much time is spent.
LEAST_RUNS = 7
SECONDS_ALONE = 0.04


def measured(graph: Graph, device: Device, seconds: float, seed: int) -> dict[str, float]:
    """Seconds of the whole, and of all groups in turn and alone, packed and plain."""
    groups = [group.name for group in graph.groups]
    with ExitStack() as stack:
        whole = stack.enter_context(hetsched.compile(_plan(graph, device, ())))
        cut = _plan(graph, device, groups)
        packed = stack.enter_context(hetsched.compile(cut))
        plain = stack.enter_context(_plain(cut))
        ways = {"whole": whole, "packed": packed, "plain": plain}
        inputs = {tensor.name: seeded(tensor, seed) for tensor in graph.inputs}
        times: dict[str, list[float]] = {name: [] for name in ways}
        begin = perf_counter()
        while len(times["plain"]) < LEAST_RUNS or perf_counter() - begin < seconds:
            for name, executable in ways.items():
                executable.run(inputs)
                times[name].append(sum(slot.seconds for slot in executable.schedule.slots))
        found = {name: median(own[1:]) for name, own in times.items()}
        for name in ("packed", "plain"):
            found[f"{name} alone"] = sum(_alone(item) for item in ways[name].parts)
    return found


def _plan(graph: Graph, device: Device, cuts: Iterable[str]) -> Plan:
    groups = [group.name for group in graph.groups]
    seconds = {name: {device.name: 1e-5} for name in groups}
    prices = Prices("none", seconds, {}, {group.name: group.members for group in graph.groups})
    placement = dict.fromkeys(groups, device.name)
    return make_plan(graph, System("", (device,), ()), prices, placement, groups, "bench", cuts)


def _plain(plan: Plan) -> Executable:
    parts = []
    for part in plan.parts:
        graph = plan.graph.part(part.ops, part.name)
        target = load(Target, part.device.target)
        parts.append(CompiledPart(part, graph, compiled(target, graph, part.device)))
    return Executable(plan, parts)


def _alone(item: CompiledPart) -> float:
    device = item.part.device
    target = load(Target, device.target)
    with pinned(device.cores), target.load(item.artifact, item.graph, device) as kernel:
        call = kernel.bind([seeded(item.graph.handed(tensor), 0) for tensor in item.graph.inputs])
        call()
        times: list[float] = []
        begin = perf_counter()
        while len(times) < LEAST_RUNS or perf_counter() - begin < SECONDS_ALONE:
            start = perf_counter()
            call()
            times.append(perf_counter() - start)
    return median(times)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.parts", description=__doc__)
    parser.add_argument("--json", required=True)
    parser.add_argument("--models", nargs="+", default=NAMES)
    parser.add_argument("--folder", type=Path, default=models.FOLDER)
    parser.add_argument("--device", default="cpu:0")
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    columns = ("whole", "packed", "plain", "packed alone", "plain alone")
    table = Table("model", "groups", *(f"{name}, ms" for name in columns))
    rows: list[dict[str, Any]] = []
    try:
        target = load(Target, options.device.partition(":")[0])
        device = target.device(options.device)
        for model in models.chosen(options.folder, options.models, float("inf")):
            graph = hetsched.read_onnx(models.load(model, options.seed))
            found = measured(graph, device, options.seconds, options.seed)
            rows.append({"model": model.name, "groups": len(graph.groups), "seconds": found})
            cells = (f"{found[name] * 1e3:.2f}" for name in columns)
            table.add_row(model.name, str(len(graph.groups)), *cells)
            write(options.json, record(options.seed) | {"device": options.device, "models": rows})
    except HetschedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
