"""Two devices at once: what the overlap of two branches and of a pipeline brings on this machine.

    python -m bench.overlap --json FILE [--devices cpu:0,cpu:1] [--repeats 15]

Two models are made of equal layers, a matrix product and tanh: two branches that meet at the end,
and one chain. Single devices and plans take turns in one process, round after round, so that what
else the machine does strikes all alike. Times are of the wall; overlap is from recorded stamps.
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
from hetsched.api import partition
from hetsched.compiler import CompiledPart
from hetsched.errors import HetschedError
from hetsched.executable import Executable
from hetsched.graph import Graph
from hetsched.host import pinned
from hetsched.inputs import seeded_inputs
from hetsched.plugin import load
from hetsched.store import Store
from hetsched.system import System
from hetsched.target import Kernel, Target
from hetsched.verify import verify

IN_FLIGHT = 2


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
        overlaps, parts = [], []
        for _ in range(repeats):
            for name, executable in alone.items():
                times[name].append(_wall(partial(executable.run, inputs)))
            times["both"].append(_wall(partial(both.run, inputs)))
            overlaps.append(both.schedule.overlap_seconds())
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
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(repeats):
            for name, executable in runs.items():
                times[name].append(in_flight(executable, inputs, requests))
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
        "throughput_over_best_single": best / samples[-1].median,
        # The first request fills the pipeline and the last empties it.
        "possible_throughput_over_single": 2 * requests / (requests + 1),
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
    parser.add_argument("--requests", type=int, default=8, help="requests in a round of a pipeline")
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
        for part in (branches, pipeline):
            part["rows"] = [sample.to_dict() for sample in part["samples"]]
        content = {
            **about,
            "repeats": given.repeats,
            "layers_of_a_branch": layers,
            "size": given.size,
            "cost_model": "profiled",
            "branches": {k: v for k, v in branches.items() if k != "samples"},
            "pipeline": {k: v for k, v in pipeline.items() if k != "samples"},
        }
        write(given.json, content)
    except HetschedError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    _print(content, branches["samples"], pipeline["samples"])
    return 0


def _print(
    content: Mapping[str, Any], branches: Sequence[Sample], pipeline: Sequence[Sample]
) -> None:
    console = Console(width=None if sys.stdout.isatty() else 120)
    made = f"{content['layers_of_a_branch']} layers of {content['size']} squared"
    found = content["branches"]
    console.print(table(f"two branches of {made}, {content['repeats']} rounds", branches))
    console.print(
        f"overlap {_ms(found['overlap_seconds'])} ms of "
        f"{_ms(found['possible_overlap_seconds'])} ms that the parts allow; "
        f"{found['speedup_over_best_single']:.2f} times the best single device"
    )
    found = content["pipeline"]
    console.print(table(f"a chain, ms a request, {found['in_flight']} in flight", pipeline))
    console.print(
        f"{found['throughput_over_best_single']:.2f} times the throughput of the best single "
        f"device, of {found['possible_throughput_over_single']:.2f} possible with "
        f"{found['requests']} requests a round"
    )


if __name__ == "__main__":
    sys.exit(main())
