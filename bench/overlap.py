"""Two devices at once: what one plan over both brings on this machine, by stamps and by the wall.

    python -m bench.overlap --json FILE [--devices cpu:0,cpu:1] [--models a,b] [--add]

A network with branches, two towers that meet at the end, and a batch that is split, each planned by
`auto` for both devices; of its best plans and the better device alone, the fastest as measured is
what `hetsched compile` ships. Beside the plan run each device alone, the processor's
own code with two threads, and ONNX Runtime with two threads. All take turns in one process, round
after round, so that what else the machine does strikes all alike. Times are of the wall; that both
devices work at once is from recorded stamps. The possible speed-up is the sum of the devices' rates
over the better one. A plan that cuts operations into pieces can be faster for that alone, as
pieces find room in nearer caches: so each device also runs the pieces by itself, and its better
rate counts.
Hand-overs are counted, and how many of them copied from memory to memory.

Then two branches exchange what they have after each layer: a hand-over takes from the finish of a
part to the start of one on another unit that had nothing else to wait for, less what a copy takes.
`--add` keeps the rows of other models that the file has.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from math import ceil, inf
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from rich.table import Table

import hetsched
from bench import engines, families, models
from bench.cores import Probe, settled
from bench.record import record, write
from bench.timing import seconds_of
from hetsched.api import partition, plans, priced
from hetsched.compiler import CompiledPart
from hetsched.errors import HetschedError
from hetsched.executable import Executable
from hetsched.graph import Graph, to_onnx
from hetsched.inputs import seeded_inputs
from hetsched.plan import make_plan, simulate
from hetsched.schedule import Schedule
from hetsched.store import Store
from hetsched.system import System
from hetsched.verify import verify

MODELS = "googlenet,two_towers,batch_of_4"
THREADS = 2
TOWER_SECONDS, TOWER_SIZE = 0.02, 512
# The layers of the branches that exchange their results, and their rows and columns.
EXCHANGES = 16
EXCHANGE_SIZES = (128, 256, 512)


def layered(branches: Sequence[str], layers: int, size: int, seed: int = 0) -> onnx.ModelProto:
    """A chain of `layers` for each of `branches`, all from one input; several are concatenated.

    Operations are named by their branch, the last, that joins them, `join`.
    """
    rng = np.random.default_rng(seed)
    nodes, weights, ends = [], [], []
    for branch in branches:
        value = "x"
        for layer in range(layers):
            name = f"{branch}{layer}"
            # The variance stays, so that no layer saturates and each one counts.
            weight = rng.standard_normal((size, size)) / np.sqrt(size)
            weights.append(numpy_helper.from_array(weight.astype(np.float32), f"{name}.weight"))
            nodes += [
                helper.make_node("MatMul", [value, f"{name}.weight"], [f"{name}.product"], name),
                helper.make_node("Tanh", [f"{name}.product"], [f"{name}.value"], f"{name}.tanh"),
            ]
            value = f"{name}.value"
        ends.append(value)
    nodes.append(helper.make_node("Concat", ends, ["y"], "join", axis=0))
    rows = size * len(branches)
    graph = helper.make_graph(
        nodes,
        "layered",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (size, size))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (rows, size))],
        initializer=weights,
    )
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])


def exchanging(layers: int, size: int, seed: int = 0) -> onnx.ModelProto:
    """Two branches, `left` and `right`, whose every layer reads the sum of the last of both."""
    rng = np.random.default_rng(seed)
    nodes, weights, values = [], [], ["x", "x"]
    for layer in range(layers):
        made = []
        for branch in ("left", "right"):
            name = f"{branch}{layer}"
            weight = rng.standard_normal((size, size)) / np.sqrt(2 * size)
            weights.append(numpy_helper.from_array(weight.astype(np.float32), f"{name}.weight"))
            product = [f"{name}.sum", f"{name}.weight"]
            nodes += [
                helper.make_node("Add", values, [f"{name}.sum"], f"{name}.add"),
                helper.make_node("MatMul", product, [f"{name}.product"], name),
                helper.make_node("Tanh", [f"{name}.product"], [f"{name}.value"], f"{name}.tanh"),
            ]
            made.append(f"{name}.value")
        values = made
    nodes.append(helper.make_node("Concat", values, ["y"], "join", axis=0))
    graph = helper.make_graph(
        nodes,
        "exchanging",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (size, size))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (2 * size, size))],
        initializer=weights,
    )
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])


def handovers(parts: Sequence[CompiledPart], schedule: Schedule) -> list[float]:
    """The seconds of each hand-over between units that a part had nothing else to wait for.

    What a copy between two memories takes is left out.
    """
    makers = {tensor.name: item for item in parts for tensor in item.graph.outputs}
    last: dict[str, CompiledPart] = {}
    found = []
    for item in parts:
        unit = item.part.device.unit
        before = [makers[t.name] for t in item.graph.inputs if t.name in makers]
        if unit in last:
            before.append(last[unit])
        last[unit] = item
        if not before:
            continue
        finish, latest = max(
            (schedule.slot(other.part.name).finish, index) for index, other in enumerate(before)
        )
        other = before[latest].part.device
        if other.unit == unit:
            continue
        copies = [
            move.seconds
            for move in schedule.transfers
            if other.memory_space != item.part.device.memory_space
            and (move.source, move.sink) == (other.name, item.part.device.name)
            and move.tensor in {tensor.name for tensor in item.graph.inputs}
        ]
        found.append(schedule.slot(item.part.name).start - finish - sum(copies))
    return found


def model(name: str, system: System, seed: int) -> tuple[Graph, Mapping[str, np.ndarray]]:
    if name == "two_towers":
        layers = layers_for(TOWER_SECONDS, TOWER_SIZE, system)
        graph = hetsched.read_onnx(layered(["left", "right"], layers, TOWER_SIZE, seed))
        return graph, seeded_inputs(graph, seed)
    if name == "batch_of_4":
        graph = hetsched.read_onnx(families.batch_of_4(seed))
        return graph, seeded_inputs(graph, seed)
    (found,) = models.chosen(models.FOLDER, [name], inf)
    graph = hetsched.read_onnx(models.load(found, seed), shapes=dict(found.shapes))
    return graph, models.inputs(found, graph, seed)


def together(
    graph: Graph,
    inputs: Mapping[str, np.ndarray],
    system: System,
    store: Path,
    rounds: int,
    seed: int,
) -> dict[str, Any]:
    """Each device alone, the plan for both, and other ways to use two cores, in turns."""
    prices = priced(graph, system, "profiled", store)
    threads = System.local(engines.device(THREADS), Store(store))
    found = plans(graph, system, "auto", None, "profiled", store)
    with ExitStack() as stack:
        ways: dict[str, Executable] = {
            device.name: stack.enter_context(
                _compiled(graph, system, f"single:device={device.name}", store)
            )
            for device in system.devices
        }
        ways["plan"] = both = stack.enter_context(hetsched.compile(found, measure=True))
        plan = both.plan
        for device in system.devices if plan.splits else ():
            name = f"pieces on {device.name}"
            pieces = _compiled(plan.graph, system, f"single:device={device.name}", store)
            ways[name] = stack.enter_context(pieces)
        whole = partition(graph, threads, "single", cost_model="roofline")
        ways["threads"] = stack.enter_context(hetsched.compile(whole))
        for executable in ways.values():
            verify(executable, inputs, seed).check()
        calls = {name: partial(way.run, inputs) for name, way in ways.items()}
        peer = engines.OnnxRuntime(to_onnx(graph), inputs, THREADS)
        stack.callback(peer.close)
        calls["onnxruntime"] = peer.run
        times: dict[str, list[float]] = {name: [] for name in calls}
        overlaps, shares, waits = [], [], []
        probe = stack.enter_context(Probe.of(system))
        for _ in range(rounds):
            probe.settle()
            for name, call in calls.items():
                call()
                times[name].append(seconds_of(call))
                if name == "plan":
                    schedule = both.schedule
                    overlaps.append(schedule.overlap_seconds())
                    shares.append(overlaps[-1] / schedule.makespan)
                    waits += handovers(both.parts, schedule)
    medians = {name: statistics.median(found) for name, found in times.items()}
    alone = [medians[device.name] for device in system.devices]
    pieces = [medians.get(f"pieces on {device.name}", inf) for device in system.devices]
    possible = min(alone) * sum(1 / min(pair) for pair in zip(alone, pieces, strict=True))
    moves = [move for move in schedule.transfers if None not in (move.source, move.sink)]
    speedup = min(alone) / medians["plan"]
    return {
        "partitioner": plan.partitioner,
        "parts": len(plan.parts),
        "splits": len(plan.splits),
        "cores": probe.told(),
        "rounds": times,
        "seconds": medians,
        "predicted_seconds": simulate(plan).makespan,
        "predicted_alone_seconds": min(
            sum(row[device.name] for row in prices.seconds.values())
            if all(device.name in row for row in prices.seconds.values())
            else inf
            for device in system.devices
        ),
        "overlap_seconds": statistics.median(overlaps),
        "overlap_share": statistics.median(shares),
        "handover_seconds": statistics.median(waits) if waits else None,
        "handed_over": len(moves),
        "copied": sum(move.copied for move in moves),
        "speedup": speedup,
        "possible": possible,
        "of_possible": speedup / possible,
        "over_threads": medians["threads"] / medians["plan"],
        "over_onnxruntime": medians["onnxruntime"] / medians["plan"],
    }


def exchange(size: int, system: System, store: Path, rounds: int, seed: int) -> dict[str, Any]:
    """Branches that exchange their results after each layer, one on each of two devices."""
    graph = hetsched.read_onnx(exchanging(EXCHANGES, size, seed))
    inputs = seeded_inputs(graph, seed)
    first, second = (device.name for device in system.devices[:2])
    order = [group.name for group in graph.groups]
    placement = {name: second if name.startswith("right") else first for name in order}
    prices = priced(graph, system, "profiled", store)
    plan = make_plan(graph, system, prices, placement, order, "exchange")
    with ExitStack() as stack:
        alone = stack.enter_context(_compiled(graph, system, f"single:device={first}", store))
        both = stack.enter_context(hetsched.compile(plan))
        for executable in (alone, both):
            verify(executable, inputs, seed).check()
        times: dict[str, list[float]] = {"alone": [], "both": []}
        waits = []
        for _ in range(rounds):
            times["alone"].append(seconds_of(partial(alone.run, inputs)))
            times["both"].append(seconds_of(partial(both.run, inputs)))
            waits += handovers(both.parts, both.schedule)
    medians = {name: statistics.median(found) for name, found in times.items()}
    return {
        "size": size,
        "parts": len(both.parts),
        "handovers_of_a_run": len(waits) / rounds,
        "handed_over": len(both.schedule.transfers),
        "copied": sum(move.copied for move in both.schedule.transfers),
        "handover_seconds": statistics.median(waits),
        "handover_p90_seconds": statistics.quantiles(waits, n=10)[-1],
        "seconds": medians,
        "speedup": medians["alone"] / medians["both"],
    }


def layers_for(seconds: float, size: int, system: System) -> int:
    """How many layers take so long on the first device."""
    graph = hetsched.read_onnx(layered(["probe"], 2, size))
    first = system.devices[0].name
    plan = partition(graph, system, f"single:device={first}", cost_model="roofline")
    inputs = seeded_inputs(graph)
    with hetsched.compile(plan) as executable:
        executable.run(inputs)
        layer = min(seconds_of(partial(executable.run, inputs)) for _ in range(5)) / 2
    return max(1, ceil(seconds / layer))


def _compiled(graph: Graph, system: System, partitioner: str, store: Path) -> Executable:
    return hetsched.compile(partition(graph, system, partitioner, None, "profiled", store))


def tables(content: Mapping[str, Any]) -> list[tuple[str, Sequence[str], list[list[str]]]]:
    """Title, heads and cells: networks on both devices, and hand-overs."""
    devices = list(content["described"])
    rows = [
        [
            row["model"],
            *(_ms(row["seconds"][name]) for name in (*devices, "plan", "threads", "onnxruntime")),
            f"{_ms(row['overlap_seconds'])} ({row['overlap_share']:.0%})",
            f"{row['speedup']:.2f}",
            f"{row['possible']:.2f}",
            f"{row['of_possible']:.2f}",
            f"{row['copied']} of {row['handed_over']}",
            row["partitioner"],
        ]
        for row in content["rows"]
    ]
    heads = (
        "model",
        *(f"{name} ms" for name in (*devices, "plan", f"{THREADS} threads", "onnxruntime")),
        "both at work ms",
        "speed-up",
        "possible",
        "of possible",
        "copied",
        "partitioner",
    )
    handed = [
        [
            f"{row['size']} squared",
            f"{row['handovers_of_a_run']:.0f}",
            f"{row['copied']} of {row['handed_over']}",
            f"{row['handover_seconds'] * 1e6:.1f}",
            f"{row['handover_p90_seconds'] * 1e6:.1f}",
            _ms(row["seconds"]["alone"]),
            _ms(row["seconds"]["both"]),
            f"{row['speedup']:.2f}",
        ]
        for row in content["exchanges"]
    ]
    return [
        ("networks on both devices", heads, rows),
        (
            f"branches that exchange {EXCHANGES} times",
            (
                "layers",
                "waited for",
                "copied",
                "median us",
                "p90 us",
                "alone ms",
                "both ms",
                "speed-up",
            ),
            handed,
        ),
    ]


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.overlap", description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="where the results go")
    parser.add_argument("--devices", default="cpu:0,cpu:1", help="two devices")
    parser.add_argument("--models", default=MODELS)
    parser.add_argument("--rounds", type=int, default=25, help="rounds of all ways")
    parser.add_argument("--add", action="store_true", help="to the rows of the file")
    parser.add_argument("--store", type=Path, help="prices; by default measured in this run")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    content = record(given.seed) | {"devices": given.devices, "repeats": given.rounds}
    names = given.models.split(",")
    rows, exchanges = [], []
    if given.add and given.json.exists():
        earlier = json.loads(given.json.read_text())
        rows = [row for row in earlier["rows"] if row["model"] not in names]
        exchanges = earlier["exchanges"]
    try:
        with TemporaryDirectory(prefix="hetsched-bench-") as folder:
            store = given.store or Path(folder) / "profile.sqlite"
            system = settled(given.devices, Store(store))
            content["described"] = {d.name: d.description for d in system.devices}
            for name in names:
                graph, inputs = model(name, system, given.seed)
                found = together(graph, inputs, system, store, given.rounds, given.seed)
                rows.append({"model": name, **found})
                print(name, file=sys.stderr, flush=True)
            exchanges = exchanges or [
                exchange(size, system, store, given.rounds, given.seed) for size in EXCHANGE_SIZES
            ]
        content |= {"rows": rows, "exchanges": exchanges}
        write(given.json, content)
    except HetschedError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    console = Console(width=None if sys.stdout.isatty() else 160)
    for title, heads, cells in tables(content):
        shown = Table(title=title)
        for place, head in enumerate(heads):
            shown.add_column(head, justify="right" if place else "left")
        for row in cells:
            shown.add_row(*row)
        console.print(shown)
    for name, description in content["described"].items():
        console.print(f"{name}: {description}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
