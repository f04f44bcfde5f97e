"""Two devices at once: what the overlap of two branches and of a pipeline brings on this machine.

    python -m bench.overlap --json FILE [--devices cpu:0,cpu:1] [--repeats 15]

Models are made of equal layers, a matrix product and tanh: two branches that meet at the end, one
chain, and two branches that exchange what they have after each layer. Single devices and plans
take turns in one process, round after round, so that what else the machine does strikes all alike.
Times are of the wall. Overlap and hand-overs are from recorded stamps: a hand-over takes from the
finish of a part to the start of one on another core that had nothing else to wait for.
"""

import argparse
import statistics
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from math import ceil
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from rich.table import Table

import hetsched
from bench.record import record, write
from hetsched.api import partition, priced
from hetsched.compiler import CompiledPart
from hetsched.errors import HetschedError
from hetsched.executable import Executable
from hetsched.graph import Graph
from hetsched.host import pinned
from hetsched.inputs import seeded_inputs
from hetsched.plan import make_plan
from hetsched.plugin import load
from hetsched.schedule import Schedule
from hetsched.store import Store
from hetsched.system import System
from hetsched.target import Kernel, Target
from hetsched.verify import verify

IN_FLIGHT = 4
# The layers of the branches that exchange their results, and their rows and columns.
EXCHANGES = 16
EXCHANGE_SIZES = (128, 256, 512)


@dataclass(frozen=True)
class Sample:
    """A way to run a model: seconds of each round, and what the stamps and the plan say.

    `threads` compute at once on all `devices` together. `seconds` are of one request; of
    `requests` in a round, the round's time divided by them.
    """

    name: str
    devices: tuple[str, ...]
    threads: int
    requests: int
    seconds: tuple[float, ...]
    predicted_seconds: float | None = None
    overlap_seconds: tuple[float, ...] = ()

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles."""
        first, _, third = statistics.quantiles(self.seconds, n=4)
        return (third - first) / 2

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"median_seconds": self.median, "spread_seconds": self.spread}


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


class Serial:
    """The parts of an executable one after the other, each alone on its device. A context."""

    def __init__(self, executable: Executable) -> None:
        self._parts = executable.parts
        self._outputs = [tensor.name for tensor in executable.outputs]
        devices = {item.part.device.name: item.part.device for item in self._parts}
        self._workers = {name: ThreadPoolExecutor(1) for name in devices}
        self._kernels = [self._on(item, partial(_kernel, item)) for item in self._parts]

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, float]:
        """The seconds of each part, by name."""
        values = dict(inputs)
        seconds = {}
        for item, kernel in zip(self._parts, self._kernels, strict=True):
            given = [values[tensor.name] for tensor in item.graph.inputs]
            took, found = self._on(item, partial(_one, kernel, given))
            seconds[item.part.name] = took
            values.update(zip([t.name for t in item.graph.outputs], found, strict=True))
        return seconds

    def __enter__(self) -> "Serial":
        return self

    def __exit__(self, *_: object) -> None:
        for item, kernel in zip(self._parts, self._kernels, strict=True):
            self._on(item, kernel.close)
        for worker in self._workers.values():
            worker.shutdown()

    def _on(self, item: CompiledPart, work: Callable[[], Any]) -> Any:
        device = item.part.device

        def held() -> Any:
            with pinned(device.cores):
                return work()

        return self._workers[device.name].submit(held).result()


def ideal_makespan(parts: Sequence[CompiledPart], seconds: Mapping[str, float]) -> float:
    """When the parts are done if nothing but their own work takes time, each on its device."""
    free: dict[str, float] = {}
    ready: dict[str, float] = {}
    for item in parts:
        device = item.part.device.name
        arrivals = [ready.get(tensor.name, 0.0) for tensor in item.graph.inputs]
        finish = max([free.get(device, 0.0), *arrivals]) + seconds[item.part.name]
        free[device] = finish
        ready.update((tensor.name, finish) for tensor in item.graph.outputs)
    return max(free.values())


def handovers(parts: Sequence[CompiledPart], schedule: Schedule) -> list[float]:
    """The seconds of each hand-over between units that a part had nothing else to wait for."""
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
        if before[latest].part.device.unit != unit:
            found.append(schedule.slot(item.part.name).start - finish)
    return found


def in_flight(executable: Executable, inputs: Mapping[str, np.ndarray], requests: int) -> float:
    """The seconds a request, of `requests` of which two are always on their way."""
    start = perf_counter()
    waiting: deque = deque()
    for _ in range(requests):
        if len(waiting) == IN_FLIGHT:
            waiting.popleft().result()
        waiting.append(executable.submit(inputs))
    for request in waiting:
        request.result()
    return (perf_counter() - start) / requests


def branches_bench(
    graph: Graph, system: System, store: Path, repeats: int, seed: int
) -> dict[str, Any]:
    """Two branches: each device alone, the plan of `task`, and the plan's parts in turn."""
    inputs = seeded_inputs(graph, seed)
    with ExitStack() as stack:
        alone = {
            device.name: stack.enter_context(
                _compiled(graph, system, f"single:device={device.name}", store)
            )
            for device in system.devices
        }
        both = stack.enter_context(_compiled(graph, system, "task", store))
        for executable in (*alone.values(), both):
            verify(executable, inputs, seed).check()
        serial = stack.enter_context(Serial(both))
        serial.run(inputs)
        times: dict[str, list[float]] = {name: [] for name in (*alone, "both", "serial")}
        overlaps, parts, waits = [], [], []
        for _ in range(repeats):
            for name, executable in alone.items():
                times[name].append(_wall(partial(executable.run, inputs)))
            times["both"].append(_wall(partial(both.run, inputs)))
            overlaps.append(both.schedule.overlap_seconds())
            waits += handovers(both.parts, both.schedule)
            parts.append(serial.run(inputs))
            times["serial"].append(sum(parts[-1].values()))
        samples = [
            _sample(f"'{name}' alone", executable, 1, times[name])
            for name, executable in alone.items()
        ]
        samples.append(_sample("parts in turn", both, 1, times["serial"], threads=1))
        samples.append(_sample("plan of task", both, 1, times["both"], tuple(overlaps)))
        seconds = {name: statistics.median(row[name] for row in parts) for name in parts[0]}
        ideal = ideal_makespan(both.parts, seconds)
        possible = sum(seconds.values()) - ideal
        best = min(sample.median for sample in samples[: len(alone)])
        plan = [
            {
                "part": item.part.name,
                "device": item.part.device.name,
                "label": item.part.label,
                "seconds_alone": seconds[item.part.name],
            }
            for item in both.parts
        ]
    overlap = statistics.median(overlaps)
    return {
        "samples": samples,
        "parts": plan,
        "ideal_seconds": ideal,
        "possible_overlap_seconds": possible,
        "overlap_seconds": overlap,
        "handover_seconds": statistics.median(waits) if waits else None,
        # A plan of one part has nothing to overlap.
        "achieved_share": overlap / possible if possible > 0 else None,
        "saved_share": (samples[-2].median - samples[-1].median) / possible if possible else None,
        "speedup_over_best_single": best / samples[-1].median,
    }


def pipeline_bench(
    graph: Graph, system: System, store: Path, repeats: int, requests: int, seed: int
) -> dict[str, Any]:
    """A chain with two requests in flight: each device alone, and the stages of `layerwise`."""
    inputs = seeded_inputs(graph, seed)
    with ExitStack() as stack:
        alone = {
            device.name: stack.enter_context(
                _compiled(graph, system, f"single:device={device.name}", store)
            )
            for device in system.devices
        }
        stages = stack.enter_context(
            _compiled(graph, system, "layerwise:objective=throughput", store)
        )
        runs = {**alone, "stages": stages}
        for executable in runs.values():
            verify(executable, inputs, seed).check()
        serial = stack.enter_context(Serial(stages))
        serial.run(inputs)
        times: dict[str, list[float]] = {name: [] for name in runs}
        parts = []
        for _ in range(repeats):
            for name, executable in runs.items():
                times[name].append(in_flight(executable, inputs, requests))
                parts.append(serial.run(inputs))
        work: dict[str, float] = {}
        for item in stages.parts:
            unit = item.part.device.unit
            seconds = statistics.median(row[item.part.name] for row in parts)
            work[unit] = work.get(unit, 0.0) + seconds
        samples = [
            _sample(f"'{name}' alone", executable, requests, times[name])
            for name, executable in alone.items()
        ]
        samples.append(_sample("stages of layerwise", stages, requests, times["stages"]))
    best = min(sample.median for sample in samples[:-1])
    return {
        "samples": samples,
        "requests": requests,
        "in_flight": IN_FLIGHT,
        "requests_per_second": {sample.name: 1 / sample.median for sample in samples},
        "bottleneck_seconds": max(work.values()),
        "share_of_bottleneck_rate": max(work.values()) / samples[-1].median,
        "throughput_over_best_single": best / samples[-1].median,
        # The first request fills the pipeline and the last empties it.
        "possible_throughput_over_single": 2 * requests / (requests + 1),
    }


def exchange_bench(
    size: int, system: System, store: Path, repeats: int, seed: int
) -> dict[str, Any]:
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
        waits, makespans = [], []
        for _ in range(repeats):
            times["alone"].append(_wall(partial(alone.run, inputs)))
            times["both"].append(_wall(partial(both.run, inputs)))
            waits += handovers(both.parts, both.schedule)
            seconds = {slot.task: slot.seconds for slot in both.schedule.slots}
            makespans.append(ideal_makespan(both.parts, seconds))
        samples = [
            _sample(f"{size}: '{first}' alone", alone, 1, times["alone"]),
            _sample(f"{size}: a branch each", both, 1, times["both"]),
        ]
    return {
        "samples": samples,
        "size": size,
        "parts": len(both.parts),
        "handovers_of_a_run": len(waits) / repeats,
        "handover_seconds": statistics.median(waits),
        "handover_p90_seconds": statistics.quantiles(waits, n=10)[-1],
        # If nothing but the parts themselves, as they ran, took time.
        "ideal_seconds": statistics.median(makespans),
        "speedup_over_single": samples[0].median / samples[1].median,
    }


def layers_for(seconds: float, size: int, system: System) -> int:
    """How many layers take so long on the first device."""
    graph = hetsched.read_onnx(layered(["probe"], 2, size))
    first = system.devices[0].name
    plan = partition(graph, system, f"single:device={first}", cost_model="roofline")
    inputs = seeded_inputs(graph)
    with hetsched.compile(plan) as executable:
        executable.run(inputs)
        layer = min(_wall(partial(executable.run, inputs)) for _ in range(5)) / 2
    return max(1, ceil(seconds / layer))


def _compiled(graph: Graph, system: System, partitioner: str, store: Path) -> Executable:
    return hetsched.compile(partition(graph, system, partitioner, None, "profiled", store))


def _kernel(item: CompiledPart) -> Kernel:
    target = load(Target, item.part.device.target)
    return target.load(item.artifact, item.graph, item.part.device)


def _one(kernel: Kernel, arrays: Sequence[np.ndarray]) -> tuple[float, list[np.ndarray]]:
    values = [kernel.receive(array) for array in arrays]
    start = perf_counter()
    results = kernel.run(values)
    seconds = perf_counter() - start
    return seconds, [kernel.send(result) for result in results]


def _sample(
    name: str,
    executable: Executable,
    requests: int,
    seconds: Sequence[float],
    overlaps: tuple[float, ...] = (),
    threads: int | None = None,
) -> Sample:
    plan = executable.plan
    used = [plan.system.device(device) for device in plan.devices]
    predicted = hetsched.simulate(plan).makespan
    if threads is not None:
        predicted = sum(slot.seconds for slot in hetsched.simulate(plan).slots)
    return Sample(
        name=name,
        devices=plan.devices,
        threads=sum(device.threads for device in used) if threads is None else threads,
        requests=requests,
        seconds=tuple(seconds),
        predicted_seconds=predicted if requests == 1 else None,
        overlap_seconds=overlaps,
    )


def _wall(work: Callable[[], object]) -> float:
    start = perf_counter()
    work()
    return perf_counter() - start


def table(title: str, samples: Sequence[Sample]) -> Table:
    shown = Table(title=title)
    for name in ("way", "devices"):
        shown.add_column(name)
    for name in ("threads", "median ms", "spread ms", "least ms", "predicted ms", "overlap ms"):
        shown.add_column(name, justify="right")
    for sample in samples:
        overlap = statistics.median(sample.overlap_seconds) if sample.overlap_seconds else None
        shown.add_row(
            sample.name,
            ",".join(sample.devices),
            str(sample.threads),
            *map(_ms, (sample.median, sample.spread, min(sample.seconds))),
            *map(_ms, (sample.predicted_seconds, overlap)),
        )
    return shown


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.2f}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.overlap", description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="where the results go")
    parser.add_argument("--devices", default="cpu:0,cpu:1", help="two devices")
    parser.add_argument("--repeats", type=int, default=15, help="rounds of all ways")
    parser.add_argument(
        "--requests", type=int, default=32, help="requests in a round of a pipeline"
    )
    parser.add_argument("--branch-ms", type=float, default=40.0, help="work of a branch")
    parser.add_argument("--size", type=int, default=512, help="rows and columns of a layer")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    about = record(given.seed)
    try:
        with TemporaryDirectory(prefix="hetsched-bench-") as folder:
            # A store of its own: what is predicted was measured in this very run.
            store = Path(folder) / "profile.sqlite"
            system = System.local(given.devices, Store(store))
            layers = layers_for(given.branch_ms / 1e3, given.size, system)
            forked = hetsched.read_onnx(layered(["left", "right"], layers, given.size, given.seed))
            chain = hetsched.read_onnx(layered(["chain"], 2 * layers, given.size, given.seed))
            branches = branches_bench(forked, system, store, given.repeats, given.seed)
            pipeline = pipeline_bench(
                chain, system, store, given.repeats, given.requests, given.seed
            )
            exchanges = [
                exchange_bench(size, system, store, given.repeats, given.seed)
                for size in EXCHANGE_SIZES
            ]
        for part in (branches, pipeline, *exchanges):
            part["rows"] = [sample.to_dict() for sample in part["samples"]]
        content = {
            **about,
            "repeats": given.repeats,
            "layers_of_a_branch": layers,
            "size": given.size,
            "cost_model": "profiled",
            "branches": {k: v for k, v in branches.items() if k != "samples"},
            "pipeline": {k: v for k, v in pipeline.items() if k != "samples"},
            "exchanges": [{k: v for k, v in e.items() if k != "samples"} for e in exchanges],
        }
        write(given.json, content)
    except HetschedError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    rows = [sample for exchange in exchanges for sample in exchange["samples"]]
    _print(content, branches["samples"], pipeline["samples"], rows)
    return 0


def _print(
    content: Mapping[str, Any],
    branches: Sequence[Sample],
    pipeline: Sequence[Sample],
    exchanges: Sequence[Sample],
) -> None:
    console = Console(width=None if sys.stdout.isatty() else 120)
    made = f"{content['layers_of_a_branch']} layers of {content['size']} squared"
    found = content["branches"]
    console.print(table(f"two branches of {made}, {content['repeats']} rounds", branches))
    console.print(
        f"overlap {_ms(found['overlap_seconds'])} ms of "
        f"{_ms(found['possible_overlap_seconds'])} ms that the parts allow; "
        f"{found['speedup_over_best_single']:.2f} times the best single device"
        + (f"; hand-over {wait * 1e6:.1f} us" if (wait := found["handover_seconds"]) else "")
    )
    found = content["pipeline"]
    console.print(table(f"a chain, ms a request, {found['in_flight']} in flight", pipeline))
    console.print(
        f"{found['throughput_over_best_single']:.2f} times the throughput of the best single "
        f"device, of {found['possible_throughput_over_single']:.2f} possible with "
        f"{found['requests']} requests a round; {found['share_of_bottleneck_rate']:.1%} of the "
        f"rate of the longest stage, {_ms(found['bottleneck_seconds'])} ms"
    )
    console.print(table(f"branches that exchange {EXCHANGES} times", exchanges))
    for found in content["exchanges"]:
        console.print(
            f"{found['size']}: a hand-over takes {found['handover_seconds'] * 1e6:.1f} us, the "
            f"slowest tenth more than {found['handover_p90_seconds'] * 1e6:.0f} us; the parts as "
            f"they ran allow {_ms(found['ideal_seconds'])} ms; "
            f"{found['speedup_over_single']:.2f} times one device"
        )


if __name__ == "__main__":
    sys.exit(main())
