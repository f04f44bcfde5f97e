"""The FPGA's overlay: whether its RTL computes what it should, how fast, how well that is known.

    python -m bench.fpga --json FILE [--sets cases,layers,networks,depthwise,speed] [--add]

Everything runs on simulators of the RTL, cycle by cycle, with the DMA and a memory that answers
after 24 cycles; milliseconds are its cycles over the clock that place and route has reached.

`cases`      layers and parts at random: results, the model of cycles, and a second simulator
`layers`     every layer of a quantised resnet18, each launched alone, and a product of matrices
`networks`   whole quantised networks with parts on the overlay, against ONNX Runtime's int8
`depthwise`  the depthwise layers of a quantised mobilenet_v2
`speed`      simulated cycles in a second of the processor's time

The file is written after each set. With `--add` the sets that it has stay.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from time import process_time
from typing import Any

import numpy as np

import hetsched
from bench import models, sets
from bench.fpga_cases import MEMORIES, Case, Layer, case, layer, run
from bench.fpga_parts import between_bytes, drawn, drawn_part, runtime, square
from bench.record import record
from bench.sets import Found
from hetsched import oracle
from hetsched.errors import HetschedError, InputError
from hetsched.fpga import reference
from hetsched.fpga.board import board
from hetsched.fpga.cycles import cycles
from hetsched.fpga.engine import PACKAGES, Counts, Engine, Memory, why_not
from hetsched.fpga.isa import Instruction, Overlay, Sync, encode
from hetsched.fpga.layers import Convolution, Network, network
from hetsched.fpga.program import program
from hetsched.graph import Graph, to_onnx
from hetsched.plan import Part, Plan
from hetsched.store import Store
from hetsched.system import System

ROOT = Path(__file__).parents[1]
HOST = ROOT / "examples" / "small_host.toml"
BOARD = "ecp5-8x8"
DEVICE = f"fpga:{BOARD}"
SIZE = "8x8"
# What others use of their array on ResNet-18. VTA: T. Chen et al., TVM, OSDI 2018,
# arXiv 1802.04799, with latency hidden, as remembered; the DPU: two B4096 at 300 MHz on a ZCU104,
# frames per second times operations over the peak, from the tables of AMD's UG1354 2.5.
ANCHORS = "TVM's VTA has about 88%, AMD's DPU (B4096, by its frames per second) 64%"
NETWORKS = ("digits_cnn", "mobilenet_v2", "resnet18", "squeezenet1_1", "googlenet")
DIGITS = ROOT / "tests" / "data"
# Calibrated with the first images; so many of the others for one of a large network's inputs.
CALIBRATED = 60
DIGITS_FOR_ONE = 20
# Cases that the slower simulator runs too.
CROSSED = 24
SECONDS = 3.0
LEAST_RUNS = 3


@dataclass(frozen=True)
class Options:
    seed: int = 0
    cases: int = 220
    crossed: int = CROSSED
    inputs: int = 4
    models: Sequence[str] = NETWORKS
    seconds: float = SECONDS


@cache
def engine(name: str) -> Engine:
    """A core of the usual size.

    Raises
    ------
    InputError
        It cannot be built here.
    """
    reason = why_not(name)
    if reason:
        raise InputError(f"the bench needs the FPGA's simulators: {reason}")
    made = Engine(Overlay.parse(SIZE), name)
    # A core that has just been made is busy for a cycle.
    made.run(encode([Sync()]), np.zeros(64, np.uint8))
    return made


def predicted(instructions: Sequence[Instruction], memory: Memory) -> int:
    overlay = engine("verilator").overlay
    return cycles(overlay, instructions, memory.latency, memory.beats, memory.period).cycles


def cases(options: Options) -> Found:
    """Programs laid out by hand and by the compiler; a difference is counted, not raised."""
    rows: dict[str, dict[str, Any]] = {}
    seeds = range(options.seed, options.seed + options.cases)
    for name, tried in (("by hand", _by_hand), ("compiled", _compiled)):
        exact = agreeing = 0
        errors = []
        for seed in seeds:
            memory = MEMORIES[seed % len(MEMORIES)]
            right, instructions, counts = tried("verilator", seed, memory)
            exact += right
            errors.append(abs(predicted(instructions, memory) - counts.cycles) / counts.cycles)
        crossed = list(seeds[: options.crossed])
        for seed in crossed:
            memory = MEMORIES[seed % len(MEMORIES)]
            found = [tried(one, seed, memory) for one in ("verilator", "cxxrtl")]
            agreeing += found[1][0] and found[0][2] == found[1][2]
        rows[name] = {
            "cases": options.cases,
            "exact": exact,
            "crossed": len(crossed),
            "agreeing": agreeing,
            "largest_error": max(errors),
            "predicted": sum(error == 0 for error in errors),
        }
    return Found(
        "Convolutions, products, depthwise ones, sums, maxima and concatenations with data at "
        "random, on memories of five speeds. Exact: every byte is what numpy computes. Agreeing: "
        "CXXRTL has the same results and the same counters, cycle for cycle.",
        ("programs", "cases", "exact", "on CXXRTL", "agreeing", "cycles as predicted", "error"),
        [
            [
                name,
                str(row["cases"]),
                str(row["exact"]),
                str(row["crossed"]),
                str(row["agreeing"]),
                str(row["predicted"]),
                f"{row['largest_error']:.2%}",
            ]
            for name, row in rows.items()
        ],
        rows,
    )


Tried = tuple[bool, Sequence[Instruction], Counts]


def _by_hand(name: str, seed: int, memory: Memory) -> Tried:
    device = engine(name)
    given = case(device.overlay, layer(seed), seed)
    counts, right = _launched(device, given, memory)
    return right, given.instructions, counts


def _launched(device: Engine, given: Case, memory: Memory) -> tuple[Counts, bool]:
    try:
        return run(device, given, memory), True
    except AssertionError:
        return device.run(encode(given.instructions), given.memory.copy(), memory), False


def _compiled(name: str, seed: int, memory: Memory) -> Tried:
    graph = drawn_part(seed)
    found = launch(graph, drawn(graph, seed), memory, name)
    return found.exact, found.instructions, found.counts


@dataclass(frozen=True)
class Launch:
    """A part that has run on the core; `exact` says that its results are the reference's."""

    part: Network
    instructions: tuple[Instruction, ...]
    counts: Counts
    outputs: list[np.ndarray]
    exact: bool

    @property
    def utilisation(self) -> float:
        return self.part.macs / (self.counts.cycles * engine("verilator").overlay.macs)


def launch(
    graph: Graph, inputs: list[np.ndarray], memory: Memory = MEMORIES[0], name: str = "verilator"
) -> Launch:
    device, part = engine(name), network(graph)
    made = program(part, device.overlay)
    instructions = (Sync(), *made.instructions)
    dram = made.memory(inputs)
    counts = device.run(encode(instructions), dram, memory)
    outputs = made.outputs(dram)
    wanted = reference.run(part, inputs)
    exact = all(map(np.array_equal, outputs, wanted))
    return Launch(part, instructions, counts, outputs, exact)


def quantised_part(name: str, seed: int) -> Graph:
    """What a quantised model computes on bytes."""
    model = next(model for model in models.models() if model.name == f"{name}_int8")
    return between_bytes(hetsched.read_onnx(models.load(model, seed)))


def alone(graph: Graph, seed: int) -> Iterator[tuple[str, Graph, Launch, list[np.ndarray]]]:
    """Each layer launched alone, on what the layers before it make of data at random."""
    values = {
        tensor.name: array for tensor, array in zip(graph.inputs, drawn(graph, seed), strict=True)
    }
    for group in graph.groups:
        part = graph.part(group.ops, group.name)
        inputs = [values[tensor.name] for tensor in part.inputs]
        found = launch(part, inputs)
        values |= {t.name: array for t, array in zip(part.outputs, found.outputs, strict=True)}
        # A view computes nothing.
        if found.part.layers:
            yield _kind(part, found.part), part, found, inputs


def _kind(graph: Graph, part: Network) -> str:
    found = [one for one in part.layers if isinstance(one, Convolution)]
    if any("AveragePool" in op.kind for op in graph.ops):
        return "average"
    if not found:
        return type(part.layers[0]).__name__.lower()
    (conv,) = found
    rows, columns = conv.window.kernel
    image = part.images[conv.source]
    if image.positions == 1 or image.last:
        return "product"
    if conv.groups > 1:
        return f"depthwise {rows}x{columns}"
    return f"{rows}x{columns}" if image.channels >= 8 else f"stem {rows}x{columns}"


def layers(options: Options) -> Found:
    rows: list[dict[str, Any]] = []
    graph = quantised_part("resnet18", options.seed)
    for kind, part, found, inputs in alone(graph, options.seed):
        rows.append(_row(part.name, kind, part, found, inputs))
    graph = square(256)
    found = launch(graph, drawn(graph, options.seed))
    product = _row("256 x 256 x 256", "product", graph, found, drawn(graph, options.seed))
    bodies = [row for row in rows if row["kind"] in ("3x3", "1x1")]
    dense = [row for row in rows if row["macs"] and row["kind"] not in ("product", "average")]
    figures = {
        "layers": len(rows),
        "exact": sum(row["exact"] for row in rows),
        "largest_units": max(row["units"] for row in rows),
        "bodies": _together(bodies),
        "convolutions": _together(dense),
        "product": product["utilisation"],
        "cycles": sum(row["cycles"] for row in rows),
        "rows": [*rows, product],
    }
    return Found(
        f"{figures['exact']} of {len(rows)} layers are exact, and within "
        f"{figures['largest_units']} unit of ONNX Runtime's. The array is used to "
        f"{figures['bodies']:.1%} in 3x3 and 1x1 layers, to {figures['convolutions']:.1%} in all "
        f"convolutions, to {figures['product']:.1%} in a product of 256 x 256 x 256, loads and "
        f"stores included. On ResNet-18, {ANCHORS}.",
        ("layer", "kind", "exact", "cycles", "MMAC", "used", "beats", "units"),
        [
            [
                row["name"],
                row["kind"],
                "yes" if row["exact"] else "no",
                str(row["cycles"]),
                f"{row['macs'] / 1e6:.1f}",
                f"{row['utilisation']:.1%}" if row["macs"] else "",
                str(row["beats"]),
                str(row["units"]),
            ]
            for row in figures["rows"]
        ],
        figures,
    )


def _row(
    name: str, kind: str, graph: Graph, found: Launch, inputs: list[np.ndarray]
) -> dict[str, Any]:
    pairs = zip(found.outputs, runtime(graph, inputs), strict=True)
    return {
        "name": name,
        "kind": kind,
        "exact": found.exact,
        "cycles": found.counts.cycles,
        "macs": found.part.macs,
        "utilisation": found.utilisation,
        "beats": found.counts.reads + found.counts.writes,
        "units": max(_units(ours, theirs) for ours, theirs in pairs),
    }


def _units(ours: np.ndarray, theirs: np.ndarray) -> int:
    return int(np.abs(ours.astype(int) - theirs.astype(int)).max(initial=0))


def _together(rows: Sequence[Mapping[str, Any]]) -> float:
    """Use of the array over layers, by their cycles."""
    total = sum(row["cycles"] for row in rows) * engine("verilator").overlay.macs
    return sum(row["macs"] for row in rows) / total


def depthwise(options: Options) -> Found:
    rows = [
        _row(part.name, kind, part, found, inputs)
        for kind, part, found, inputs in alone(
            quantised_part("mobilenet_v2", options.seed), options.seed
        )
    ]
    chosen = [row for row in rows if row["kind"].startswith("depthwise")]
    macs = sum(row["macs"] for row in chosen)
    figures = {
        "layers": len(chosen),
        "exact": sum(row["exact"] for row in chosen),
        "weighted": sum(row["macs"] * row["utilisation"] for row in chosen) / macs,
        "together": _together(chosen),
        "port": sum(row["beats"] for row in chosen) / sum(row["cycles"] for row in chosen),
        "all_layers": len(rows),
        "all_exact": sum(row["exact"] for row in rows),
        "largest_units": max(row["units"] for row in rows),
        "convolutions": _together([row for row in rows if row["macs"]]),
        "rows": chosen,
    }
    return Found(
        f"{figures['all_exact']} of {len(rows)} layers of mobilenet_v2, launched alone, are exact, "
        f"and within {figures['largest_units']} unit of ONNX Runtime's. Its {len(chosen)} "
        f"depthwise layers use the array to {figures['weighted']:.1%}, weighted by "
        f"multiply-adds, or {figures['together']:.1%} of all their cycles, where one channel at a "
        f"time would use an eighth; in {figures['port']:.0%} of these cycles the port to memory "
        f"is busy. All layers that multiply use {figures['convolutions']:.1%}.",
        ("layer", "exact", "cycles", "MMAC", "used", "beats"),
        [
            [
                row["name"],
                "yes" if row["exact"] else "no",
                str(row["cycles"]),
                f"{row['macs'] / 1e6:.2f}",
                f"{row['utilisation']:.1%}",
                str(row["beats"]),
            ]
            for row in chosen
        ],
        figures,
    )


def networks(options: Options) -> Found:
    rows = []
    # A store of its own: what is predicted for the processor was measured in this very run.
    with TemporaryDirectory(prefix="hetsched-bench-") as folder:
        store = Store(Path(folder) / "profile.sqlite")
        for name in options.models:
            print(f"networks: {name}", file=sys.stderr, flush=True)
            rows.append(_network(name, options, store))
    found = board(BOARD)
    clock = found.description
    return Found(
        "Quantised to int8, planned for examples/small_host.toml; the clock is that of the "
        f"{clock}. Top-1 is compared with ONNX Runtime's of the same quantised model; parts are "
        "right by `verify`, each fed with ONNX Runtime's values, and equal where no byte of theirs "
        "differs; units are steps of the last quantisation, at the output over all inputs. Cycles "
        "are those of an input on the overlay; ms are these over the clock, and modelled.",
        (
            "network",
            "parts on FPGA",
            "layers",
            "of",
            "inputs",
            "same top-1",
            "parts right",
            "equal",
            "units",
            "MMAC on FPGA",
            "cycles",
            "used",
            "modelled ms",
            "simulated s",
        ),
        [
            [
                row["model"],
                str(row["parts"]),
                str(row["layers"]),
                str(row["all_layers"]),
                str(row["inputs"]),
                str(row["same"]),
                "yes" if row["verified"] else "no",
                str(row["equal"]),
                f"{row['units']:.0f}",
                f"{row['macs'] / 1e6:.1f}",
                str(row["cycles"]),
                f"{row['utilisation']:.1%}",
                f"{row['seconds'] * 1e3:.2f}",
                f"{row['cpu_seconds']:.1f}",
            ]
            for row in rows
        ],
        {"clock": clock, "clock_hz": found.clock_hz, "rows": rows},
    )


def _network(name: str, options: Options, store: Store) -> dict[str, Any]:
    graph, inputs = _given(name, options)
    system = System.load(HOST)
    plan = hetsched.partition(graph, system, "task", store=store.path)
    # The file of a machine has a clock of its own.
    assumed_hz = system.device(DEVICE).clock_hz
    session = oracle.session(to_onnx(graph))
    names = [tensor.name for tensor in graph.outputs]
    unit = _unit(graph)
    same, units, cpu = 0, 0.0, 0.0
    with hetsched.compile(plan) as executable:
        verification = hetsched.verify(executable, inputs[0])
        for given in inputs:
            start = process_time()
            found = executable.run(given)
            cpu += process_time() - start
            wanted = dict(zip(names, session.run(names, given), strict=True))
            ours, theirs = (values[names[0]].reshape(-1) for values in (found, wanted))
            same += int(np.argmax(ours) == np.argmax(theirs))
            units = max(units, float(np.abs(ours - theirs).max()) / unit)
    placed = [network(plan.graph.part(part.ops, part.name)) for part in _placed(plan)]
    seconds = sum(executable.schedule.slot(part.name).seconds for part in _placed(plan))
    count, macs = round(seconds * assumed_hz), sum(part.macs for part in placed)
    return {
        "model": name,
        "parts": len(placed),
        "layers": sum(len(part.layers) for part in placed),
        "all_layers": len(graph.groups),
        "inputs": len(inputs),
        "same": same,
        "verified": verification.passed,
        "equal": sum(not one.deviation for one in verification.comparisons if one.device == DEVICE),
        "units": units,
        "macs": macs,
        "cycles": count,
        "utilisation": macs / (count * engine("verilator").overlay.macs),
        "seconds": count / board(BOARD).clock_hz,
        "cpu_seconds": cpu / len(inputs),
    }


def _given(name: str, options: Options) -> tuple[Graph, list[dict[str, np.ndarray]]]:
    """A quantised network and inputs for it: images of digits, or pixels at random."""
    if name == "digits_cnn":
        with np.load(DIGITS / "digits_test.npz") as data:
            images = data["x"] / np.float32(16)
        found = hetsched.quantize(DIGITS / "digits_cnn.onnx", {"image": images[:CALIBRATED]})
        chosen = images[CALIBRATED : CALIBRATED + DIGITS_FOR_ONE * options.inputs]
        return hetsched.read_onnx(found.model), [{"image": image[None]} for image in chosen]
    model = next(model for model in models.models() if model.name == f"{name}_int8")
    graph = hetsched.read_onnx(models.load(model, options.seed))
    seeds = range(options.seed, options.seed + options.inputs)
    return graph, [models.inputs(model, graph, seed) for seed in seeds]


def _unit(graph: Graph) -> float:
    """A step of the quantisation that the only output comes from."""
    (output,) = graph.outputs
    op = next(op for op in graph.ops if output in op.outputs)
    if op.kind != "DequantizeLinear":
        raise InputError(f"{graph.name}: its output is of {op.kind}, not of a quantisation")
    return float(graph.constants[op.inputs[1].name])


def _placed(plan: Plan) -> list[Part]:
    return [part for part in plan.parts if part.device.name == DEVICE]


def speed(options: Options) -> Found:
    given = case(engine("verilator").overlay, Layer(64, 28, 28, 64, (3, 3), 1, 1, 1, lines=14), 0)
    words = encode(given.instructions)
    rows = []
    for name in ("verilator", "cxxrtl"):
        device = engine(name)
        rates, spent = [], 0.0
        while spent < options.seconds or len(rates) < LEAST_RUNS:
            dram = given.memory.copy()
            start = process_time()
            counts = device.run(words, dram)
            seconds = process_time() - start
            spent += seconds
            rates.append(counts.simulated / seconds)
        rows.append({"engine": name, "runs": len(rates), "rates": sorted(rates)})
    for row in rows:
        row["median"] = float(np.median(row["rates"]))
    return Found(
        "Cycles of an 8x8 core in a second of the processor's time, in a convolution of 3x3 that "
        "keeps the array busy: the median, and the slowest run and the fastest.",
        ("engine", "runs", "million cycles / s", "slowest", "fastest"),
        [
            [
                row["engine"],
                str(row["runs"]),
                *(
                    f"{rate / 1e6:.2f}"
                    for rate in (row["median"], row["rates"][0], row["rates"][-1])
                ),
            ]
            for row in rows
        ],
        {"rows": rows},
    )


SETS: Mapping[str, Callable[[Options], Found]] = {
    "cases": cases,
    "layers": layers,
    "networks": networks,
    "depthwise": depthwise,
    "speed": speed,
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.fpga", description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="where the results go")
    parser.add_argument("--sets", default=",".join(SETS), help="what to run")
    parser.add_argument("--cases", type=int, default=Options.cases, help="of each kind of program")
    parser.add_argument("--inputs", type=int, default=Options.inputs, help="for each network")
    parser.add_argument("--models", default=",".join(NETWORKS), help="whole networks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--add", action="store_true", help="keep the other sets that the file has from before"
    )
    given = parser.parse_args(arguments)
    names, chosen = given.sets.split(","), given.models.split(",")
    for name, there in ((names, tuple(SETS)), (chosen, NETWORKS)):
        for one in name:
            if one not in there:
                parser.error(f"there is no '{one}'; there are {', '.join(there)}")
    if min(given.cases, given.inputs) < 1:
        parser.error("at least one case and one input would do")
    options = Options(given.seed, given.cases, CROSSED, given.inputs, chosen)
    try:
        engine("verilator")
    except HetschedError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    content = record(given.seed) | {"engines": {name: _versions(name) for name in PACKAGES}}
    wanted = {name: partial(SETS[name], options) for name in names}
    return sets.run(given.json, content, wanted, given.add, 160)


def _versions(name: str) -> dict[str, str]:
    return {package: version(package) for package in PACKAGES[name]}


if __name__ == "__main__":
    sys.exit(main())
