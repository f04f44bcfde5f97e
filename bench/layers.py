"""Each kernel of a network: microseconds within the model, and the share of the core's peak.

    python -m bench.layers --json FILE [--models resnet50 mobilenet_v2] [--repeats 15]

One core. Rounds of the whole model, ONNX Runtime's with its profiler on, and a loop of nothing but
multiply-adds take turns in one process; times are medians. The peak that shares are of is the
median of the rounds, each the best of a few loops in a row: noise can only slow a loop. The time of
a kernel is that of its call by TVM's virtual machine, which parts do without elsewhere, with what
an instrument of Python adds, about a microsecond. Arithmetic is counted for the layer as the model
has it: what Winograd saves shows as more flops a second, and those layers are no direct
convolutions.

A kernel and a node of ONNX Runtime belong to the first layer, in the order of the graph, whose
sizes they have; one that has none computes something else, such as a change of layout.
"""

import argparse
import json
import os
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np
import tvm
from rich.console import Console
from rich.table import Table

import hetsched
from bench import engines, models
from bench.engines import OnnxRuntime
from bench.models import Model
from bench.peak import peak_flops
from bench.record import record, write
from bench.timing import seconds_of
from hetsched.errors import HetschedError
from hetsched.graph import Graph
from hetsched.host import cores
from hetsched.op import Op
from hetsched.operation import flops
from hetsched.schedules.vectors import Vectors
from hetsched.target import Artifact
from hetsched.targets.cpu import CODE, LAYOUT, Cpu
from hetsched.tvm_runtime import to_tvm, use_threads

LEAST_REPEATS = 15
PEAK_LOOPS = 4
# The layers whose arithmetic is worth a table.
KINDS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
WINOGRAD = "winograd"
DIRECT = "direct"
GOAL = 0.85
# The weights of Winograd, times those of the convolution: 16/9 of F(2x2, 3x3), 4 of F(4x4, 3x3).
LEAST_TRANSFORMED, LARGEST_TRANSFORMED = 1.6, 4
# What the virtual machine does besides: allocation, views, nulls.
BUILTIN = "vm.builtin."
PROFILED = "_kernel_time"
# Channels of ONNX Runtime's largest block.
BLOCK = 16


@dataclass(frozen=True)
class Call:
    """A kernel as the virtual machine called it: its place among all calls, and its arguments."""

    place: int
    symbol: str
    shapes: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Layer:
    """A kernel, and the layer that it computes, if any: its operation and arithmetic.

    `kind` is `direct`, `depthwise`, `grouped` or `winograd` of a convolution, or the operation in
    small letters. `peer_seconds` is what ONNX Runtime takes for the same layer.
    """

    symbol: str
    seconds: float
    op: str = ""
    kind: str = ""
    shape: str = ""
    flops: int = 0
    share: float | None = None
    peer_seconds: float | None = None

    @property
    def flops_per_second(self) -> float:
        return self.flops / self.seconds


@dataclass(frozen=True)
class Found:
    """The layers of a model in the order of the program, and the medians of whole runs."""

    model: str
    peak_flops_per_second: float
    seconds: float
    peer_seconds: float
    layers: tuple[Layer, ...]


class Instrumented:
    """The code of a compiled part, run with a clock at each of its kernels."""

    def __init__(self, artifact: Artifact, inputs: Sequence[np.ndarray]) -> None:
        with TemporaryDirectory(prefix="hetsched-layers-") as folder:
            path = Path(folder) / CODE
            path.write_bytes(artifact.files[CODE])
            library = tvm.runtime.load_module(str(path))
        self._machine = tvm.runtime.vm.VirtualMachine(library, tvm.cpu())
        names = json.loads(artifact.files[LAYOUT])["weights"]
        arrays = [*inputs, *(artifact.weights[name] for name in names)]
        self._arguments = [to_tvm(array, array.dtype) for array in arrays]
        self._seconds: dict[Call, list[float]] = defaultdict(list)
        self._place = 0
        self._start = 0.0
        self._machine.set_instrument(self._clock)

    def run(self) -> None:
        self._place = 0
        self._machine["main"](*self._arguments)

    def medians(self) -> dict[Call, float]:
        """The median seconds of each kernel, in the order of the calls."""
        calls = sorted(self._seconds, key=lambda call: call.place)
        return {call: statistics.median(self._seconds[call]) for call in calls}

    def _clock(self, _: Any, symbol: str, before: bool, __: Any, *arguments: Any) -> int:
        if before:
            self._start = perf_counter()
            return 0
        seconds = perf_counter() - self._start
        self._place += 1
        if not symbol.startswith(BUILTIN):
            tensors = (item for item in arguments if hasattr(item, "dtype"))
            shapes = tuple(tuple(map(int, item.shape)) for item in tensors)
            self._seconds[Call(self._place, symbol, shapes)].append(seconds)
        return 0


def measure(model: Model, repeats: int, seed: int) -> Found:
    proto = engines.bound(models.load(model, seed), model.shapes)
    graph = hetsched.read_onnx(proto, model.shapes)
    inputs = models.inputs(model, graph, seed)
    plan = hetsched.partition(graph, engines.device(1), "single", cost_model="roofline")
    (part,) = plan.parts
    part_graph = graph.part(part.ops, part.name)
    artifact = Cpu(interpreted=True).compile(part_graph, part.device)
    os.sched_setaffinity(0, cores()[:1])
    use_threads(1)
    ours = Instrumented(artifact, [inputs[tensor.name] for tensor in part_graph.inputs])
    with TemporaryDirectory(prefix="hetsched-layers-") as folder:
        peer = OnnxRuntime(proto, inputs, 1, profile=str(Path(folder) / "profile"))
        isa = part.device.isa
        whole: dict[str, list[float]] = defaultdict(list)
        peaks = []
        for work in (ours.run, peer.run):
            work()
        for _ in range(repeats):
            peaks.append(max(peak_flops() for _ in range(PEAK_LOOPS)))
            whole["ours"].append(seconds_of(ours.run))
            whole["peer"].append(seconds_of(peer.run))
        events = json.loads(Path(peer.session.end_profiling()).read_text(encoding="utf-8"))
    medians = {name: statistics.median(seconds) for name, seconds in whole.items()}
    peak = statistics.median(peaks)
    layers = matched(ours.medians(), graph, Vectors.of(isa).lanes)
    layers = beside(layers, graph, profiled(events))
    layers = [
        replace(layer, share=layer.flops_per_second / peak) if layer.flops else layer
        for layer in layers
    ]
    return Found(model.name, peak, medians["ours"], medians["peer"], tuple(layers))


def matched(calls: Mapping[Call, float], graph: Graph, lanes: int) -> list[Layer]:
    """A layer for each call, with the operation of `graph` that it computes."""
    left = [op for op in graph.ops if op.kind in KINDS]
    layers = []
    for call, seconds in calls.items():
        fits = ((op, _grown(op, call.shapes, lanes)) for op in left)
        op, grown = next(((op, grown) for op, grown in fits if grown), (None, 0.0))
        if op is None:
            layers.append(Layer(call.symbol, seconds))
            continue
        left.remove(op)
        layers.append(Layer(call.symbol, seconds, op.name, _kind(op, grown), _text(op), flops(op)))
    return layers


def _grown(op: Op, shapes: Sequence[Sequence[int]], lanes: int) -> float:
    """How much larger than packed the weights of a kernel are; 0 of one that cannot compute `op`.

    `shapes` are of its tensors, the last of which it writes. Channels may be padded to whole
    vectors, and weights be those of Winograd.
    """
    if len(shapes) < 3:
        return 0.0
    *read, written = map(prod, shapes)
    source, weight, result = op.inputs[0].shape, op.inputs[1].shape, op.outputs[0].shape
    data = next((size for size in read if size in _sizes(source, lanes)), None)
    if data is None or written not in _sizes(result, lanes):
        return 0.0
    read.remove(data)
    packed = prod(-(-size // lanes) * lanes for size in weight[:2]) * prod(weight[2:])
    # The weights go before a residual, which may have any size.
    sizes = (size for size in read if prod(weight) <= size <= LARGEST_TRANSFORMED * packed)
    return next(sizes, 0) / packed


def _sizes(shape: Sequence[int], lanes: int) -> set[int]:
    whole = prod(shape)
    if len(shape) < 3:
        return {whole}
    blocked = shape[0] * -(-shape[1] // lanes) * lanes * prod(shape[2:])
    return {whole, blocked}


def _kind(op: Op, grown: float) -> str:
    if op.kind != "Conv":
        return op.kind.lower()
    if grown >= LEAST_TRANSFORMED:
        return WINOGRAD
    channels, group_channels = op.inputs[0].shape[1], op.inputs[1].shape[1]
    if group_channels == channels:
        return DIRECT
    return "depthwise" if group_channels == 1 else "grouped"


def _text(op: Op) -> str:
    """The layer in a few words: `64x56x56, 3x3 -> 64x56x56`."""
    source, weight, result = op.inputs[0].shape, op.inputs[1].shape, op.outputs[0].shape
    if op.kind in ("Conv", "ConvTranspose"):
        source, result = source[1:], result[1:]
        weight = weight[2:]
    return f"{_by(source)}, {_by(weight)} -> {_by(result)}"


def _by(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape))


# What tells a layer of a network: the shapes of its first two inputs and of its output.
Key = tuple[tuple[int, ...], ...]


def _key(reads: Sequence[Sequence[int]], writes: Sequence[int]) -> Key:
    """Numbers of channels are rounded up, as ONNX Runtime pads them."""
    data, *weights = (tuple(shape) for shape in reads[:2])
    return (_rounded(data, 1), *(_rounded(shape, 0, 1) for shape in weights), _rounded(writes, 1))


def _rounded(shape: Sequence[int], *axes: int) -> tuple[int, ...]:
    if len(shape) < 3:
        return tuple(shape)
    return tuple(-(-n // BLOCK) * BLOCK if i in axes else n for i, n in enumerate(shape))


def profiled(events: Sequence[Mapping[str, Any]]) -> dict[Key, list[float]]:
    """The median seconds of the nodes, for those with equal shapes in the order of their runs."""
    times: dict[tuple[str, Key], list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") != "Node" or not event["name"].endswith(PROFILED):
            continue
        arguments = event["args"]
        reads = [_shape(item) for item in arguments["input_type_shape"]]
        writes = [_shape(item) for item in arguments["output_type_shape"]]
        if len(reads) > 1 and writes:
            times[event["name"], _key(reads, writes[0])].append(event["dur"] * 1e-6)
    found: dict[Key, list[float]] = defaultdict(list)
    for (_, key), seconds in times.items():
        found[key].append(statistics.median(seconds))
    return found


def beside(
    layers: Sequence[Layer], graph: Graph, peer: Mapping[Key, Sequence[float]]
) -> list[Layer]:
    """The layers with the peer's time, those of equal shapes in the order of the graph."""
    waiting = {key: list(seconds) for key, seconds in peer.items()}
    taken = {}
    for op in graph.ops:
        if op.kind not in KINDS:
            continue
        key = _key([tensor.shape for tensor in op.inputs], op.outputs[0].shape)
        # A weight that the session has packed is no input of the node any more.
        short = next((k for k in waiting if k[0] == key[0] and k[-1] == key[-1]), None)
        chosen = key if waiting.get(key) else short if op.kind in ("Gemm", "MatMul") else None
        if chosen is not None and waiting[chosen]:
            taken[op.name] = waiting[chosen].pop(0)
    return [replace(layer, peer_seconds=taken.get(layer.op)) for layer in layers]


def _shape(item: Mapping[str, Sequence[int]]) -> tuple[int, ...]:
    (shape,) = item.values()
    return tuple(shape)


def summary(found: Found) -> dict[str, Any]:
    """Of each kind of layer: how many, their seconds and flops, and the median of their shares."""
    kinds: dict[str, list[Layer]] = defaultdict(list)
    for layer in found.layers:
        kinds[layer.kind or "other"].append(layer)
    told = {}
    for kind, layers in kinds.items():
        shares = [layer.share for layer in layers if layer.share is not None]
        peers = [layer.peer_seconds for layer in layers if layer.peer_seconds is not None]
        told[kind] = {
            "kernels": len(layers),
            "seconds": sum(layer.seconds for layer in layers),
            "flops": sum(layer.flops for layer in layers),
            "median_share": statistics.median(shares) if shares else None,
            "peer_seconds": sum(peers) if len(peers) == len(layers) else None,
        }
    return told


def table(found: Found) -> Table:
    peak = found.peak_flops_per_second / 1e9
    shown = Table(title=f"{found.model}: {peak:.0f} GFLOP/s of multiply-adds is the core's peak")
    for title in ("kernel", "kind", "layer"):
        shown.add_column(title, no_wrap=True)
    for title in ("us", "onnxruntime us", "ratio", "GFLOP/s", "of peak"):
        shown.add_column(title, justify="right")
    for layer in found.layers:
        peer = layer.peer_seconds
        shown.add_row(
            layer.symbol,
            layer.kind,
            layer.shape,
            f"{layer.seconds * 1e6:.1f}",
            "" if peer is None else f"{peer * 1e6:.0f}",
            "" if peer is None else f"{peer / layer.seconds:.2f}",
            f"{layer.flops_per_second / 1e9:.0f}" if layer.flops else "",
            "" if layer.share is None else f"{layer.share:.0%}",
        )
    return shown


def summary_table(found: Found) -> Table:
    shown = Table(title=f"{found.model} by kind of layer")
    shown.add_column("kind", no_wrap=True)
    for title in ("kernels", "us", "onnxruntime us", "GFLOP/s", "median of peak"):
        shown.add_column(title, justify="right")
    for kind, row in summary(found).items():
        peer, share = row["peer_seconds"], row["median_share"]
        shown.add_row(
            kind,
            str(row["kernels"]),
            f"{row['seconds'] * 1e6:.0f}",
            "" if peer is None else f"{peer * 1e6:.0f}",
            f"{row['flops'] / row['seconds'] / 1e9:.0f}" if row["flops"] else "",
            "" if share is None else f"{share:.0%}",
        )
    return shown


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.layers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, required=True, help="where the results go")
    parser.add_argument("--models", nargs="*", default=["resnet50", "mobilenet_v2"])
    parser.add_argument("--repeats", type=int, default=LEAST_REPEATS, help="at least 15")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    repeats = max(given.repeats, LEAST_REPEATS)
    about = record(given.seed)
    console = Console(width=None if sys.stdout.isatty() else 180)
    found: list[Found] = []
    try:
        for model in models.chosen(models.FOLDER, given.models, float("inf")):
            print(f"{model.name}: compile, then {repeats} rounds", file=sys.stderr, flush=True)
            found.append(measure(model, repeats, given.seed))
            content = {**about, "repeats": repeats, "models": [_content(one) for one in found]}
            write(given.json, content)
            console.print(table(found[-1]))
    except HetschedError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    for one in found:
        console.print(summary_table(one))
        share = summary(one).get(DIRECT, {}).get("median_share")
        if share is not None:
            console.print(
                f"{one.model}: direct dense convolutions at {share:.0%} of the peak in the median; "
                f"the goal is {GOAL:.0%}"
            )
    return 0


def _content(found: Found) -> dict[str, Any]:
    return asdict(found) | {"summary": summary(found)}


if __name__ == "__main__":
    sys.exit(main())
