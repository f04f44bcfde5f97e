"""Operations in pieces: are they right, and what do shares of two devices bring.

    python -m bench.splits --json FILE [--sets chains,layers,tiles,models] [--devices cpu:0,cpu:1]

chains   random chains of operations, split at random, beside ONNX Runtime on the whole
layers   single layers: the share of channels that `channel` plans, or one device where that is
         measured faster, beside all aligned shares
tiles    the memory of activations on one device, tile after tile, and what is computed twice
models   whole networks on two devices beside each alone, the same code with two threads, and ONNX
         Runtime with two threads; and the throughput of a pipeline

Ways to run one thing take turns in one process, round after round; figures are ratios of medians.
Which share of a layer is the best, and which device alone, half of the rounds say; the other half
says how long each takes, as the least of many medians of the same rounds would be too little.
What two devices can bring at most is the sum of their rates over the better one. Beside it is what
they reach while each runs the whole network by itself at the same time, and the rate at which they
share data then: a host moves virtual cores, and caches are near each other or far apart.
"""

import argparse
import json
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import inf
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Barrier, Thread
from time import perf_counter, sleep
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

import hetsched
from bench import engines, families, models
from bench.chains import chain
from bench.cores import Probe, settled
from bench.pipelines import Pipeline
from bench.record import record, write
from bench.timing import geometric_mean, seconds_of
from hetsched.api import priced
from hetsched.cost import Prices
from hetsched.errors import HetschedError, InfeasiblePlan
from hetsched.executable import Executable
from hetsched.graph import Graph, to_onnx
from hetsched.inputs import seeded_inputs
from hetsched.links import measure_link
from hetsched.liveness import peak_nbytes
from hetsched.op import Op, Tensor
from hetsched.operation import flops
from hetsched.partitioner import Partitioner
from hetsched.plan import Plan, simulate
from hetsched.plugin import load
from hetsched.rewrite import rewrite
from hetsched.sharing.memory import Tiling
from hetsched.sharing.search import placed
from hetsched.split import Exit, Split
from hetsched.store import Store
from hetsched.system import System
from hetsched.verify import verify

SETS = ("chains", "layers", "tiles", "models")
CHAINS = 2_000
# Of the peak, in float32; integers are to be the same.
EXACT = 1e-5
# Bounds of an exhaustive search lie this far apart, or a thirty-second of the channels.
GRAIN = 16
MOST_BOUNDS = 32
# Layers of about as much work as one core does in half a millisecond and more.
LAYERS: tuple[tuple[str, tuple[int, ...]], ...] = (
    # Channels in, rows and columns, channels out, kernel, stride.
    ("conv", (3, 224, 64, 7, 2)),
    ("conv", (64, 56, 64, 3, 1)),
    ("conv", (64, 112, 64, 3, 1)),
    ("conv", (64, 112, 128, 3, 1)),
    ("conv", (64, 56, 128, 3, 2)),
    ("conv", (128, 28, 128, 3, 1)),
    ("conv", (128, 56, 128, 3, 1)),
    ("conv", (128, 56, 256, 3, 1)),
    ("conv", (128, 28, 256, 3, 2)),
    ("conv", (256, 14, 256, 3, 1)),
    ("conv", (256, 28, 256, 3, 1)),
    ("conv", (256, 28, 512, 3, 1)),
    ("conv", (256, 14, 512, 3, 2)),
    ("conv", (512, 7, 512, 3, 1)),
    ("conv", (512, 14, 512, 3, 1)),
    ("conv", (96, 27, 256, 5, 1)),
    ("conv", (192, 35, 192, 3, 1)),
    ("conv", (48, 56, 192, 3, 1)),
    ("conv", (256, 56, 64, 1, 1)),
    ("conv", (64, 56, 256, 1, 1)),
    ("conv", (512, 28, 128, 1, 1)),
    ("conv", (128, 28, 512, 1, 1)),
    ("conv", (1024, 14, 256, 1, 1)),
    ("conv", (256, 14, 1024, 1, 1)),
    ("conv", (512, 14, 2048, 1, 1)),
    ("conv", (2048, 7, 512, 1, 1)),
    ("conv", (512, 28, 1024, 1, 2)),
    # Rows, columns in, columns out.
    ("linear", (128, 768, 768)),
    ("linear", (128, 768, 3072)),
    ("linear", (128, 3072, 768)),
    ("linear", (197, 768, 2304)),
    ("linear", (197, 1024, 1024)),
    ("linear", (512, 512, 512)),
    ("linear", (1, 4096, 4096)),
    ("linear", (1, 9216, 4096)),
    ("linear", (16, 2048, 1000)),
)
MODELS = (
    "resnet18 light_vgg19 googlenet mobilenet_v2 squeezenet1_1 vit_b_16 bert_base_like unet "
    "resnet50 batch_of_4"
).split()
PIPELINE_SECONDS = 0.3
# Runs of each device in a round while the other runs too.
AT_ONCE = 4
# Between two ways, so that no thread of the one before spins on.
PAUSE_SECONDS = 0.002
GOALS = {"share": 0.97, "least": 0.99, "memory": 0.75, "models": 0.85, "threads": 0.95}


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    devices: str
    seed: int
    chains: int
    rounds: int
    layers: int
    models: tuple[str, ...]
    store: Path
    commit: str | None
    # No further row is begun then, by `perf_counter`.
    end: float
    # What the file has from before, by set and name.
    kept: Mapping[str, Mapping[str, dict[str, Any]]]


def _rows(
    kind: str, names: Sequence[str], options: Options, make: Callable[[str], dict[str, Any]]
) -> Iterator[list[dict[str, Any]]]:
    """The rows there are, kept or made while there is time, in order: after each that was made."""
    found = dict(options.kept.get(kind, {}))
    order = [*(name for name in found if name not in names), *names]
    yield [found[name] for name in order if name in found]
    for name in track(names, f"{kind}s", transient=True):
        row = found.get(name)
        if (row is None or row["commit"] != options.commit) and perf_counter() < options.end:
            found[name] = {kind: name, "commit": options.commit} | make(name)
            yield [found[name] for name in order if name in found]


def chains(options: Options) -> Iterator[dict[str, Any]]:
    """How far random chains in pieces are from the whole, by arithmetic."""
    rows: dict[str, list[float]] = {}
    ways: dict[str, int] = {}
    for seed in track(range(options.chains), "chains", transient=True):
        drawn = chain(options.seed + seed)
        rows.setdefault(drawn.arithmetic, []).append(drawn.deviation())
        for way in drawn.ways:
            ways[way] = ways.get(way, 0) + 1
    yield {
        "chains": options.chains,
        "ways": ways,
        "rows": [
            {"arithmetic": name, "chains": len(found), "worst": max(found)}
            for name, found in rows.items()
        ],
        "passed": all(
            max(found) <= (EXACT if name == "float32" else 0.0) for name, found in rows.items()
        ),
    }


def layers(options: Options) -> Iterator[dict[str, Any]]:
    """Each layer alone, by the chosen share, and by every share of two devices there is."""
    system = settled(options.devices, Store(options.store))
    by_name = {f"{kind} {'x'.join(map(str, sizes))}": (kind, sizes) for kind, sizes in LAYERS}
    names = list(by_name)[: options.layers]
    with Probe.of(system) as probe:

        def made(name: str) -> dict[str, Any]:
            return layer(*by_name[name], system, options, probe)

        for rows in _rows("layer", names, options, made):
            yield {
                "devices": options.devices,
                "cores": _told(rows),
                "rows": rows,
                "mean_share": geometric_mean(row["share"] for row in rows),
                "mean_planned_share": geometric_mean(row["planned_share"] for row in rows),
                "mean_speedup": geometric_mean(row["speedup"] for row in rows),
                "mean_possible": geometric_mean(row["possible"] for row in rows),
                "least_speedup": min((row["speedup"] for row in rows), default=None),
            }


def layer(
    kind: str, sizes: Sequence[int], system: System, options: Options, probe: Probe
) -> dict[str, Any]:
    """The times of one layer: each device alone, the chosen share, and all aligned shares."""
    graph = layer_graph(kind, sizes)
    width = sizes[2]
    grain = max(GRAIN, width // MOST_BOUNDS // GRAIN * GRAIN)
    prices = priced(graph, system, "profiled", options.store)
    found = load(Partitioner, f"channel:grain={grain}").plans(graph, system, prices)
    plans = {f"'{d.name}' alone": _alone(graph, system, prices, d.name) for d in system.devices}
    singles = tuple(plans)
    written = graph.outputs[0]
    axis = 1 if kind == "conv" else len(written.shape) - 1
    for bound in range(grain, width, grain):
        exit_ = Exit(written.name, ((axis, (0, bound, width)),))
        item = Split(tuple(op.name for op in graph.ops), (exit_,))
        plans[f"{bound} | {width - bound}"] = placed(
            rewrite(graph, (item,)),
            graph,
            system,
            prices,
            (item,),
            system.devices,
            "exhaustive",
        )
    inputs = seeded_inputs(graph, options.seed)
    before = probe.told()
    with ExitStack() as stack:
        # As `hetsched compile --measure` ships it.
        probe.settle()
        shipped = stack.enter_context(hetsched.compile(found, measure=True)).plan
        planned = _same(found[0], plans)
        ships = _same(shipped, plans)
        ways = {name: stack.enter_context(hetsched.compile(plan)) for name, plan in plans.items()}
        first = _turns(ways, inputs, max(3, options.rounds // 4), probe)
        order = sorted(plans, key=lambda name: statistics.median(first[name]))
        final = dict.fromkeys([ships, planned, *singles, *order[:4]])
        times = _turns({name: ways[name] for name in final}, inputs, 2 * options.rounds, probe)
    choosing, medians = _judged(times)
    single = medians[min(singles, key=choosing.__getitem__)]
    best = min(choosing, key=choosing.__getitem__)
    return {
        "flops": sum(map(flops, graph.ops)),
        "grain": grain,
        "shares": len(plans),
        "planned": planned,
        "chosen": ships,
        "best": best,
        "single_seconds": single,
        "chosen_seconds": medians[ships],
        "planned_seconds": medians[planned],
        "best_seconds": medians[best],
        "predicted_seconds": simulate(found[0]).makespan,
        "speedup": single / medians[ships],
        "best_speedup": single / medians[best],
        "share": medians[best] / medians[ships],
        "planned_share": medians[best] / medians[planned],
        "possible": _possible([medians[name] for name in singles]),
        "seconds": {name: statistics.median(found) for name, found in first.items()},
        "cores": _since(before, probe),
    }


def _judged(times: Mapping[str, Sequence[float]]) -> tuple[dict[str, float], dict[str, float]]:
    """The medians of every second round, to choose by, and of the others, to judge what was."""
    choosing = {name: statistics.median(found[::2]) for name, found in times.items()}
    return choosing, {name: statistics.median(found[1::2]) for name, found in times.items()}


def _same(plan: Plan, plans: dict[str, Plan]) -> str:
    """The name of the plan among `plans`, which gets it where it has none like it."""
    for name, other in plans.items():
        if (other.splits, other.placement) == (plan.splits, plan.placement):
            return name
    name = f"{_sizes(plan)} otherwise"
    plans[name] = plan
    return name


def _told(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What the probe told of all rows."""
    kinds = ("waited_seconds", "disturbed_rounds")
    return {kind: sum(row.get("cores", {}).get(kind, 0) for row in rows) for kind in kinds}


def _since(before: Mapping[str, float], probe: Probe) -> dict[str, float]:
    """What the probe tells of the time since it told `before`."""
    return {name: value - before[name] for name, value in probe.told().items()}


def layer_graph(kind: str, sizes: Sequence[int]) -> Graph:
    """A convolution with bias and ReLU, or a matrix product with bias."""
    values = np.random.default_rng(0)

    def drawn(*shape: int) -> np.ndarray:
        return values.standard_normal(shape).astype(np.float32) * np.float32(0.05)

    if kind == "conv":
        before, size, after, kernel, stride = sizes
        x = Tensor("x", (1, before, size, size), "float32")
        constants = {"weights": drawn(after, before, kernel, kernel), "bias": drawn(after)}
        rows = (size - 1) // stride + 1
        y = Tensor("y", (1, after, rows, rows), "float32")
        z = Tensor("z", y.shape, "float32")
        pad = kernel // 2
        attributes = {"pads": (pad,) * 4, "strides": (stride,) * 2, "kernel_shape": (kernel,) * 2}
        read = [Tensor(name, array.shape, "float32") for name, array in constants.items()]
        ops = (Op("conv", "Conv", (x, *read), (y,), attributes), Op("relu", "Relu", (y,), (z,)))
        return Graph(kind, ops, (x,), (z,), constants, {"": 17})
    rows, before, after = sizes
    x = Tensor("x", (rows, before), "float32")
    constants = {"weights": drawn(before, after), "bias": drawn(after)}
    read = [Tensor(name, array.shape, "float32") for name, array in constants.items()]
    y = Tensor("y", (rows, after), "float32")
    return Graph(kind, (Op("gemm", "Gemm", (x, *read), (y,)),), (x,), (y,), constants, {"": 17})


def tiles(options: Options) -> Iterator[dict[str, Any]]:
    """A stem in grids of tiles: the memory held at once, by tensors and as compiled."""
    graph = hetsched.read_onnx(families.yolo_stem(options.seed))
    system = System.local(options.devices.split(",")[0], Store(options.store))
    inputs = seeded_inputs(graph, options.seed)
    work = sum(map(flops, graph.ops))
    rows = []
    with ExitStack() as stack:
        ways: dict[str, Executable] = {}
        for grid in ("", "3x3", "5x5", "8x8"):
            spec = f"tile:tiles={grid}" if grid else "single"
            prices = priced(graph, system, "roofline")
            plan = load(Partitioner, spec).partition(graph, system, prices)
            executable = stack.enter_context(hetsched.compile(plan))
            verify(executable, inputs, options.seed).check()
            ways[grid] = executable
            predicted = Tiling(graph, (1, 1), 0.0).extra_flops(plan.splits)
            rows.append(
                {
                    "grid": grid or "whole",
                    "splits": [item.to_dict() for item in plan.splits],
                    "peak_nbytes": peak_nbytes(plan.graph),
                    "workspace_nbytes": _workspace(executable),
                    "predicted_extra_flops": predicted,
                    "extra_flops": sum(map(flops, plan.graph.ops)) / work - 1,
                }
            )
        times = _turns(ways, inputs, options.rounds)
    for row, found in zip(rows, times.values(), strict=True):
        row["seconds"] = statistics.median(found)
        row["saved"] = 1 - row["peak_nbytes"] / rows[0]["peak_nbytes"]
        row["saved_workspace"] = 1 - row["workspace_nbytes"] / rows[0]["workspace_nbytes"]
    yield {"model": graph.name, "rows": rows}


def networks(options: Options) -> Iterator[dict[str, Any]]:
    """Whole networks on two devices, beside other ways to use both."""
    system = settled(options.devices, Store(options.store))
    with Probe.of(system) as probe:

        def made(name: str) -> dict[str, Any]:
            return network(*_model(name, options.seed), system, options, probe)

        for rows in _rows("model", options.models, options, made):
            yield {
                "devices": options.devices,
                "cores": _told(rows),
                "rows": rows,
                "mean_speedup": geometric_mean(row["speedup"] for row in rows),
                "mean_of_possible": geometric_mean(row["of_possible"] for row in rows),
                "mean_of_together": geometric_mean(row["of_together"] for row in rows),
                "mean_of_threads": geometric_mean(row["over_threads"] for row in rows),
                "mean_pipeline": geometric_mean(
                    row["pipeline"]["of_bottleneck"] for row in rows if row["pipeline"]
                ),
            }


def network(
    graph: Graph,
    inputs: Mapping[str, np.ndarray],
    system: System,
    options: Options,
    probe: Probe,
) -> dict[str, Any]:
    prices = priced(graph, system, "profiled", options.store)
    names = [device.name for device in system.devices]
    before = probe.told()
    found = load(Partitioner, "hybrid").plans(graph, system, prices)
    threads = ",".join(str(core) for device in system.devices for core in device.cores)
    both = System.local(engines.device(len(threads.split(","))))
    threaded = load(Partitioner, "single").partition(graph, both, priced(graph, both, "roofline"))
    with ExitStack() as stack:
        ways: dict[str, Any] = {
            name: stack.enter_context(hetsched.compile(_alone(graph, system, prices, name)))
            for name in names
        }
        # As `hetsched compile --measure` ships it.
        probe.settle()
        shared = stack.enter_context(hetsched.compile(found, measure=True))
        verify(shared, inputs, options.seed).check()
        ways |= {"shared": shared, "threads": stack.enter_context(hetsched.compile(threaded))}
        peer = engines.OnnxRuntime(to_onnx(graph), inputs, 2)
        stack.callback(peer.close)
        calls = {name: partial(way.run, inputs) for name, way in ways.items()}
        calls["onnxruntime"] = peer.run
        times = _calls(calls, options.rounds, probe)
        together = _at_once([calls[name] for name in names], options.rounds, probe)
        link = measure_link(*system.devices[:2])
        overlaps = []
        for _ in range(options.rounds):
            shared.run(inputs)
            overlaps.append(shared.schedule.overlap_seconds())
        piped = _pipeline(graph, system, prices, inputs, options.rounds, probe)
    plan = shared.plan
    medians = {name: statistics.median(found) for name, found in times.items()}
    alone = [medians[name] for name in names]
    speedup = min(alone) / medians["shared"]
    return {
        "parts": len(plan.parts),
        "splits": [item.to_dict() for item in plan.splits],
        "seconds": medians,
        "notes": list(plan.notes),
        "predicted_seconds": simulate(plan).makespan,
        "predicted_alone_seconds": sum(prices.seconds[g.name][names[0]] for g in graph.groups),
        "overlap_seconds": statistics.median(overlaps),
        "speedup": speedup,
        "possible": _possible(alone),
        "of_possible": speedup / _possible(alone),
        "together_seconds": together,
        "of_together": speedup / (min(alone) * sum(1 / seconds for seconds in together)),
        "link_seconds": link.seconds,
        "link_bytes_per_second": link.bytes_per_second,
        "over_threads": medians["threads"] / medians["shared"],
        "over_onnxruntime": medians["onnxruntime"] / medians["shared"],
        "pipeline": piped,
        "cores": _since(before, probe),
    }


def _pipeline(
    graph: Graph,
    system: System,
    prices: Prices,
    inputs: Mapping[str, np.ndarray],
    rounds: int,
    probe: Probe,
) -> dict[str, Any] | None:
    """The time from result to result with many in flight, beside what the busiest device needs."""
    try:
        plan = load(Partitioner, "layerwise:objective=throughput").partition(graph, system, prices)
    except InfeasiblePlan:
        return None
    with hetsched.compile(plan) as executable:
        pipeline = Pipeline(executable, inputs, PIPELINE_SECONDS)
        for _ in range(max(3, rounds // 4)):
            probe.settle()
            pipeline.go()
        found = pipeline.result()
    return {
        "parts": len(plan.parts),
        "replicas": {name: list(ring) for name, ring in plan.replicas.items()},
        "bottleneck_seconds": found.bottleneck_seconds,
        "request_seconds": found.seconds,
        "of_bottleneck": found.share,
    }


def _model(name: str, seed: int) -> tuple[Graph, Mapping[str, np.ndarray]]:
    found = {model.name: model for model in models.models()}
    if name == "batch_of_4":
        graph = hetsched.read_onnx(families.batch_of_4(seed))
        return graph, seeded_inputs(graph, seed)
    if name not in found:
        raise HetschedError(f"no model '{name}'; there are batch_of_4, {', '.join(found)}")
    model = found[name]
    graph = hetsched.read_onnx(models.load(model, seed), model.shapes)
    return graph, models.inputs(model, graph, seed)


def _alone(graph: Graph, system: System, prices: Prices, device: str) -> Plan:
    return load(Partitioner, f"single:device={device}").partition(graph, system, prices)


def _possible(seconds: Sequence[float]) -> float:
    """The sum of the rates over the best rate."""
    return min(seconds) * sum(1 / value for value in seconds)


def _turns(
    ways: Mapping[str, Executable],
    inputs: Mapping[str, np.ndarray],
    rounds: int,
    probe: Probe | None = None,
) -> dict[str, list[float]]:
    return _calls({name: partial(way.run, inputs) for name, way in ways.items()}, rounds, probe)


def _calls(
    calls: Mapping[str, Callable[[], object]], rounds: int, probe: Probe | None = None
) -> dict[str, list[float]]:
    """Seconds of each call, in turns: one to warm up, and one that counts."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        if probe:
            probe.settle()
        for name, call in calls.items():
            sleep(PAUSE_SECONDS)
            call()
            times[name].append(seconds_of(call))
    return times


def _at_once(calls: Sequence[Callable[[], object]], rounds: int, probe: Probe) -> list[float]:
    """The median seconds of each call while the others are called too, each by a thread."""
    times: list[list[float]] = [[] for _ in calls]

    def repeat(own: list[float], call: Callable[[], object], ready: Barrier, enough: int) -> None:
        ready.wait()
        while min(map(len, times)) < enough:
            own.append(seconds_of(call))

    for number in range(1, rounds + 1):
        probe.settle()
        ready = Barrier(len(calls))
        threads = [
            Thread(target=repeat, args=(own, call, ready, AT_ONCE * number))
            for own, call in zip(times, calls, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return [statistics.median(own) for own in times]


def _workspace(executable: Executable) -> int:
    """What the compiled parts keep tensors in, besides inputs and outputs."""
    return sum(
        json.loads(item.artifact.files["layout.json"])["workspace_nbytes"]
        for item in executable.parts
    )


def _sizes(plan: Plan) -> str:
    """The shares of a plan's splits, or the device that has all."""
    if not plan.splits:
        return f"'{plan.devices[0]}' alone"
    return "; ".join(
        " | ".join(str(high - low) for low, high in pairwise(item.exits[-1].axes[0][1]))
        for item in plan.splits
    )


Shown = tuple[str, Sequence[str], list[list[str]]]


def tables(content: Mapping[str, Any]) -> list[Shown]:
    """Title, heads and cells of a table for each set."""
    return [
        (f"{title}, {_commits(content[name], content['commit'])}", heads, cells)
        for name, (title, heads, cells) in _tables(content).items()
    ]


def _commits(found: Mapping[str, Any], latest: str) -> str:
    """Of what the rows of a set are, with their numbers where they differ."""
    whole = found.get("commit", latest)
    counts = Counter(row.get("commit", whole)[:7] for row in found["rows"])
    if len(counts) < 2:
        return f"commit {next(iter(counts), whole[:7])}"
    return "rows by commit: " + ", ".join(f"{n} of {commit}" for commit, n in counts.items())


def _tables(content: Mapping[str, Any]) -> dict[str, Shown]:
    found: dict[str, Shown] = {}
    if "chains" in content:
        cells = [
            [row["arithmetic"], str(row["chains"]), f"{row['worst']:.1e}"]
            for row in content["chains"]["rows"]
        ]
        found["chains"] = ("random chains", ("arithmetic", "chains", "worst"), cells)
    if "layers" in content:
        heads = (
            "layer", "alone ms", "planned ms", "chosen", "ms", "best", "ms", "speed-up", "of best",
        )  # fmt: skip
        cells = [
            [
                row["layer"],
                _ms(row["single_seconds"]),
                _ms(row["planned_seconds"]),
                # A bar would end the cell of a table in a document.
                row["chosen"].replace(" | ", "+"),
                _ms(row["chosen_seconds"]),
                row["best"].replace(" | ", "+"),
                _ms(row["best_seconds"]),
                f"{row['speedup']:.2f}",
                f"{row['share']:.3f}",
            ]
            for row in content["layers"]["rows"]
        ]
        found["layers"] = ("single layers", heads, cells)
    if "tiles" in content:
        heads = ("grid", "peak MB", "saved", "workspace MB", "saved", "more FLOPs", "ms")
        cells = [
            [
                row["grid"],
                f"{row['peak_nbytes'] / 1e6:.1f}",
                f"{row['saved']:.1%}",
                f"{row['workspace_nbytes'] / 1e6:.1f}",
                f"{row['saved_workspace']:.1%}",
                f"{row['extra_flops']:.2%}",
                _ms(row["seconds"]),
            ]
            for row in content["tiles"]["rows"]
        ]
        found["tiles"] = (f"tiles of {content['tiles']['model']}", heads, cells)
    if "models" in content:
        heads = (
            "model",
            "alone ms",
            "shared ms",
            "predicted",
            "threads ms",
            "ort ms",
            "speed-up",
            "of possible",
            "of both at once",
            "link GB/s",
            "of threads",
            "pipeline",
        )
        cells = [
            [
                row["model"],
                _ms(row["seconds"][content["models"]["devices"].split(",")[0]]),
                _ms(row["seconds"]["shared"]),
                _ms(row["predicted_seconds"]),
                _ms(row["seconds"]["threads"]),
                _ms(row["seconds"]["onnxruntime"]),
                f"{row['speedup']:.2f}",
                f"{row['of_possible']:.2f}",
                f"{row['of_together']:.2f}" if "of_together" in row else "",
                f"{row['link_bytes_per_second'] / 1e9:.0f}" if "of_together" in row else "",
                f"{row['over_threads']:.2f}",
                f"{row['pipeline']['of_bottleneck']:.2f}" if row["pipeline"] else "",
            ]
            for row in content["models"]["rows"]
        ]
        found["models"] = ("whole networks", heads, cells)
    return found


def _table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    shown = Table(title=title)
    for number, head in enumerate(heads):
        shown.add_column(head, justify="right" if number else "left")
    for row in rows:
        shown.add_row(*row)
    return shown


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3f}"


RUNS = {"chains": chains, "layers": layers, "tiles": tiles, "models": networks}


def _kept(content: Mapping[str, Any], devices: str) -> dict[str, dict[str, dict[str, Any]]]:
    """The rows of layers and models by name, if they are of the same devices."""
    return {
        kind: {
            row[kind]: {"commit": content[name]["commit"]} | row for row in content[name]["rows"]
        }
        for name, kind in (("layers", "layer"), ("models", "model"))
        if name in content and content[name]["devices"] == devices
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.splits", description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="where the results go")
    parser.add_argument("--sets", default=",".join(SETS), help="what to run")
    parser.add_argument("--devices", default="cpu:0,cpu:1", help="two devices")
    parser.add_argument("--chains", type=int, default=CHAINS, help="random chains")
    parser.add_argument("--layers", type=int, default=len(LAYERS), help="the first layers")
    parser.add_argument("--models", nargs="*", default=MODELS, help="whole networks")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of all ways")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--add",
        action="store_true",
        help="keep what the file has, and run layers and models again if they are of other commits",
    )
    parser.add_argument(
        "--seconds", type=float, default=inf, help="begin no layer or model after so long"
    )
    given = parser.parse_args(arguments)
    wanted = given.sets.split(",")
    for name in wanted:
        if name not in RUNS:
            parser.error(f"no set '{name}'; there are {', '.join(RUNS)}")
    content: dict[str, Any] = {**record(given.seed), "rounds": given.rounds, "goals": GOALS}
    kept: dict[str, dict[str, dict[str, Any]]] = {}
    if given.add and given.json.exists():
        old = json.loads(given.json.read_text(encoding="utf-8"))
        content |= {name: {"commit": old["commit"]} | old[name] for name in RUNS if name in old}
        kept = _kept(content, given.devices)
    console = Console(width=None if sys.stdout.isatty() else 140)
    try:
        with TemporaryDirectory(prefix="hetsched-bench-") as folder:
            # A store of its own: what is predicted was measured in this very run.
            options = Options(
                given.devices,
                given.seed,
                given.chains,
                given.rounds,
                given.layers,
                tuple(given.models),
                Path(folder) / "profile.sqlite",
                content["commit"],
                perf_counter() + given.seconds,
                kept,
            )
            for name in wanted:
                for found in RUNS[name](options):
                    content[name] = found | {"commit": content["commit"]}
                    # What there is so far, so that `--add` goes on where a run broke off.
                    write(given.json, content)
    except HetschedError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    for shown in tables(content):
        console.print(_table(*shown))
    for name in wanted:
        means = {k: v for k, v in content[name].items() if isinstance(v, float | bool)}
        for what, value in means.items():
            console.print(f"{name}: {what.replace('_', ' ')} {value:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
