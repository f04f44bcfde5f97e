"""Memory, predicted before anything is compiled against what a run of the package takes.

    python -m bench.footprint --json FILE [--models a,b] [--devices cpu:0,cpu:1]

Each plan is compiled, written as a package and run in a process of its own, all of whose heap is
counted (`heap.c`, loaded before the C library). Measured is what the plan has of it at its peak,
while kernels are loaded and run: the arrays of numpy and the temporary memory of TVM's runtime,
told by who asks for a block; and the weights that the code reads where they are mapped. Beside it
stands the same with all else that loading and running adds to the heap: objects of Python, the
stacks of TVM's calls, the tables of the linker, which are some kilobytes for each part. The package
has run there before once, so that what Python and TVM need for themselves is there already. The
growth of the resident set has code and what a page rounds up as well.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from ctypes import CDLL, c_longlong, c_size_t
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from time import process_time, sleep
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import hetsched
from bench import models
from bench.coverage import random_cut
from bench.models import Model
from bench.record import record, write
from hetsched.api import priced
from hetsched.cost import Prices
from hetsched.errors import HetschedError, InfeasiblePlan
from hetsched.executable import Executable
from hetsched.graph import Graph
from hetsched.partitioner import Partitioner, alone
from hetsched.plan import Plan
from hetsched.plugin import load
from hetsched.system import System

MODELS = """digits_branch digits_lstm silero_vad_16k_op15 attacut_sc ppocrv2_cls magika
mobilenet_v3_small crepe_tiny light_shufflenet depthwise_stride2 mobilenet_v2 squeezenet1_1
mobilenet_v2_int8 regnet_y_400mf efficientnet_b0 dnsmos_p808_v8 light_inception_v1 googlenet
resnet18 resnet18_int8 light_densenet121""".split()
# Groups on devices in turns, in the ways of these partitioners, and cut at random.
SINGLE, RANDOM = "single", "random"
PLANS = (SINGLE, RANDOM, "layerwise", "channel", "tile")
RUNS = 3
SETTLE_SECONDS = 0.2
# Workers that have nothing to do are asleep then, and a caller that waits does the work of one.
ASLEEP_SECONDS = 0.05
# The libraries that get the memory of plans: numpy's arrays, the pools of TVM's runtime.
OWNERS = ("_multiarray_umath", "libtvm_runtime")
COUNTER = Path(__file__).with_name("heap.c")
# The goal: the share of what is measured that a prediction may be off.
GOAL = 0.02

Report = Callable[[str], None]
Row = dict[str, Any]


def rows(
    chosen: Sequence[Model], devices: str = "cpu:0,cpu:1", seed: int = 0, report: Report = print
) -> list[Row]:
    """A row for each model and plan: bytes predicted, told after compiling, and measured.

    A plan that is as one before it is left out.
    """
    found = []
    with TemporaryDirectory(prefix="hetsched-heap-") as folder:
        counter = Path(folder) / "heap.so"
        command = ["cc", "-O2", "-fPIC", "-shared", str(COUNTER), "-o", str(counter)]
        subprocess.run(command, check=True)
        for model in chosen:
            graph = hetsched.read_onnx(models.load(model, seed), shapes=model.shapes)
            system = System.local(devices)
            prices = priced(graph, system, "roofline")
            inputs = Path(folder) / "inputs.npz"
            np.savez(inputs, **models.inputs(model, graph, seed))  # type: ignore[arg-type]
            seen = set()
            for name in PLANS:
                try:
                    plan = _plan(name, graph, system, prices, seed)
                except InfeasiblePlan as error:
                    report(f"{model.name}, {name}: {error}")
                    continue
                members = tuple((p.device.name, *(g.name for g in p.groups)) for p in plan.parts)
                key = plan.splits, members
                if key not in seen:
                    report(f"{model.name}, {name}: {len(plan.parts)} parts")
                    found.append(_row(model, name, plan, counter, inputs))
                    seen.add(key)
    return found


def _plan(name: str, graph: Graph, system: System, prices: Prices, seed: int) -> Plan:
    if name == SINGLE:
        return alone(system.devices[0].name, graph, system, prices, SINGLE)
    if name == RANDOM:
        return random_cut(graph, system, prices, seed)
    return load(Partitioner, name).partition(graph, system, prices)


def _row(model: Model, name: str, plan: Plan, counter: Path, inputs: Path) -> Row:
    begin = process_time()
    predicted = plan.memory
    middle = process_time()
    executable = hetsched.compile(plan)
    end = process_time()
    package = inputs.with_name("package.hsp")
    executable.save(package)
    told = hetsched.load(package).memory
    command = [sys.executable, "-m", "bench.footprint", "--measure", str(package), str(inputs)]
    environment = {**os.environ, "LD_PRELOAD": str(counter)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise HetschedError(f"{model.name}, {name}: {done.stderr.strip().splitlines()[-1:]}")
    measured: Mapping[str, int] = json.loads(done.stdout)
    nbytes = measured["owned_nbytes"] + measured["mapped_nbytes"]
    whole = measured["heap_nbytes"] + measured["mapped_nbytes"]
    return {
        "model": model.name,
        "plan": name,
        "devices": list(plan.devices),
        "parts": len(plan.parts),
        "exact": predicted.exact,
        "rough_nbytes": sum(plan.memory_bytes().values()),
        "model_weight_nbytes": plan.original.weight_nbytes,
        "weight_nbytes": sum(h.weights_nbytes for h in told.devices) - told.shared_nbytes,
        "predicted_nbytes": predicted.nbytes,
        "compiled_nbytes": told.nbytes,
        "measured_nbytes": nbytes,
        "whole_nbytes": whole,
        "resident_nbytes": measured["resident_nbytes"],
        "error": predicted.nbytes / nbytes - 1,
        "whole_error": predicted.nbytes / whole - 1,
        # Of processor time.
        "predict_seconds": middle - begin,
        "compile_seconds": end - middle,
    }


def measure(package: str, inputs: str) -> dict[str, int]:
    """Bytes that loading and running adds to the heap at most, maps, and has resident."""
    values = dict(np.load(inputs))
    library = CDLL(None)
    for name in ("heap_live", "heap_peak", "heap_owned", "heap_owned_peak"):
        getattr(library, name).restype = c_longlong
    library.heap_owner.argtypes = (c_size_t, c_size_t)
    executables = [hetsched.load(package) for _ in range(2)]
    found: dict[str, int] = {}

    def run(executable: Executable) -> None:
        """In a thread of its own: TVM keeps temporary memory by threads."""
        live, owned, resident = library.heap_live(), library.heap_owned(), _resident()
        library.heap_peak()
        library.heap_owned_peak()
        routes = executable.plan.routes
        for _ in range(RUNS):
            # By each route once.
            for _ in routes:
                sleep(ASLEEP_SECONDS)
                executable.run(values)
            if len({part.part.device.unit for part in executable.parts}) > 1:
                # Who waits for a run does some of its work, and who comes later does not.
                for _ in routes:
                    executable.submit(values).result()
        found["heap_nbytes"] = library.heap_peak() - live
        found["owned_nbytes"] = library.heap_owned_peak() - owned
        found["resident_nbytes"] = _resident() - resident
        executable.close()

    for executable in executables:
        thread = Thread(target=run, args=(executable,))
        thread.start()
        thread.join()
        # Python does not wait for what the system frees when a thread has ended.
        sleep(SETTLE_SECONDS)
        if executable is executables[0]:
            # Now that they are all loaded.
            for start, end in _code_of(OWNERS):
                library.heap_owner(start, end)
    # Of what each part reads, where it lies: an array that several read is there once.
    mapped = {
        array.__array_interface__["data"][0]: array.nbytes
        for part in executables[-1].parts
        for array in part.artifact.weights.values()
    }
    return {**found, "mapped_nbytes": sum(mapped.values())}


def _code_of(libraries: Sequence[str]) -> list[tuple[int, int]]:
    """The addresses, from and to, of the code of loaded libraries whose names begin so."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, rights, *_, path = line.split(maxsplit=5)
        if "x" in rights and Path(path).name.startswith(tuple(libraries)):
            start, end = (int(text, 16) for text in addresses.split("-"))
            found.append((start, end))
    return found


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def summary(found: Sequence[Row]) -> dict[str, Any]:
    """The figures over all rows; `within` is the share that the goal holds for."""
    errors = [abs(row["error"]) for row in found]
    resident = [row["resident_nbytes"] / row["measured_nbytes"] for row in found]
    return {
        "plans": len(found),
        "models": len({row["model"] for row in found}),
        "within": sum(error <= GOAL for error in errors) / len(errors),
        "whole_within": sum(abs(row["whole_error"]) <= GOAL for row in found) / len(found),
        "median_error": statistics.median(errors),
        "largest_error": max(errors),
        "compiled_as_predicted": sum(r["predicted_nbytes"] == r["compiled_nbytes"] for r in found),
        "median_resident": statistics.median(resident),
        "predict_share": sum(row["predict_seconds"] for row in found)
        / sum(row["compile_seconds"] for row in found),
    }


def cells(found: Sequence[Row]) -> tuple[tuple[str, ...], list[list[str]]]:
    """Heads and rows of the table."""
    heads = (
        "model",
        "plan",
        "parts",
        "weights of the model, MB",
        "as stored, MB",
        "predicted, MB",
        "measured, MB",
        "off",
        "all of the heap, MB",
        "resident, MB",
    )
    return heads, [
        [
            row["model"],
            row["plan"],
            str(row["parts"]),
            *(
                f"{row[key] / 1e6:.3f}"
                for key in (
                    "model_weight_nbytes",
                    "weight_nbytes",
                    "predicted_nbytes",
                    "measured_nbytes",
                )
            ),
            f"{row['error'] * 100:+.2f} %",
            f"{row['whole_nbytes'] / 1e6:.3f}",
            f"{row['resident_nbytes'] / 1e6:.3f}",
        ]
        for row in found
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.footprint", description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--devices", default="cpu:0,cpu:1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--measure", nargs=2, metavar=("PACKAGE", "INPUTS"))
    given = parser.parse_args(arguments)
    if given.measure:
        print(json.dumps(measure(*given.measure)))
        return 0
    chosen = models.chosen(models.FOLDER, given.models.split(","), float("inf"))
    error = Console(stderr=True)
    found = rows(chosen, given.devices, given.seed, lambda text: error.print(text))
    heads, body = cells(found)
    table = Table(*heads)
    for line in body:
        table.add_row(*line)
    Console().print(table)
    totals = summary(found)
    for key, value in totals.items():
        print(f"{key:24} {value:.4g}")
    if given.json:
        write(given.json, {**record(given.seed), "summary": totals, "rows": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
