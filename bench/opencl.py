"""OpenCL on the processor beside the cpu target and ONNX Runtime, all held on one core.

    python -m bench.opencl --json FILE [--sets models,kernels] [--models a b] [--add]

Two sets. *models* are whole networks; the goal is a geometric mean of at least 0.8 of the cpu
target's speed. *kernels* are single layers, or a chain of equal ones where layers take their data
in blocks, so that what converts it at both ends counts for little; dense ones as a share of the
core's measured peak of multiply-adds.

Each case has a process of its own, held on one core with all of its threads, PoCL's among them. In
it the engines take turns, a run each, in an order that is drawn anew for each round, so that each
finds the caches as the others left them. A ratio is of two runs of one round; what is told is its
median and quartiles over the rounds, and of times the medians. Outputs are compared with ONNX
Runtime's. PoCL is the processor under another name: nothing here is the speed of a GPU.

--add keeps the rows of FILE for cases that are not measured now. Exit status: 0 if every case ran
rightly, 3 if one failed.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from math import prod
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from rich.table import Table

import hetsched
from bench import engines, models
from bench.engines import ORT, Engine, EngineRefuses, Hetsched
from bench.peak import peak_flops
from bench.record import record, write
from bench.timing import Times, geometric_mean, seconds_of
from hetsched import System
from hetsched.errors import HetschedError, InputError
from hetsched.host import cores
from hetsched.inputs import seeded_inputs
from hetsched.verify import deviation

MODELS = ("resnet18", "mobilenet_v2", "squeezenet1_1", "googlenet", "vit_b_16")
OPENCL, CPU = "opencl", "cpu"
DIRECT = "opencl, no Winograd"
NAME = "OpenCL on CPU (PoCL)"
GOAL = 0.8
LEAST_ROUNDS = 15
MOST_ROUNDS = 300
SECONDS = 6.0
FAILED = 3
OPSET = 17

Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A model, the multiply-adds of a run of it if it is one of dense layers, and their goal.

    `direct` also measures it without Winograd's convolutions, whose share of the peak is then
    one of multiply-adds that are done.
    """

    name: str
    open: Callable[[int], tuple[onnx.ModelProto, dict[str, np.ndarray]]]
    macs: int = 0
    goal: float | None = None
    direct: bool = False


def _network(name: str, seed: int) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    (model,) = models.chosen(models.FOLDER, [name], float("inf"))
    proto = engines.bound(models.load(model, seed), model.shapes)
    graph = hetsched.read_onnx(proto, model.shapes)
    return proto, models.inputs(model, graph, seed)


@dataclass(frozen=True)
class Layer:
    """`count` equal operations, one behind another, from an input of `shape`.

    `weights` are the shapes of what each takes beside its data, drawn so that the size of values
    stays; a `fed` one is an input of the model too.
    """

    kind: str
    shape: tuple[int, ...]
    weights: tuple[tuple[int, ...], ...] = ()
    count: int = 1
    fed: bool = False
    relu: bool = False
    attributes: tuple[tuple[str, Any], ...] = ()

    def __call__(self, seed: int) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
        rng = np.random.default_rng(seed)
        nodes, initializers, last = [], [], "x"
        inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, self.shape)]
        for index in range(self.count):
            names = []
            for place, shape in enumerate(self.weights):
                names.append(f"w{index}_{place}")
                if self.fed:
                    inputs.append(
                        helper.make_tensor_value_info(names[-1], TensorProto.FLOAT, shape)
                    )
                    continue
                fan = prod(shape[1:]) if len(shape) > 2 else shape[0]
                values = rng.standard_normal(shape) * np.sqrt((2 if self.relu else 1) / fan)
                initializers.append(numpy_helper.from_array(values.astype(np.float32), names[-1]))
            made = f"y{index}"
            nodes.append(
                helper.make_node(self.kind, [last, *names], [made], **dict(self.attributes))
            )
            last = made
            if self.relu:
                nodes.append(helper.make_node("Relu", [last], [f"r{index}"]))
                last = f"r{index}"
        output = helper.make_tensor_value_info(last, TensorProto.FLOAT, None)
        graph = helper.make_graph(nodes, self.kind, inputs, [output], initializers)
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
        proto.ir_version = 8
        return proto, seeded_inputs(hetsched.read_onnx(proto), seed)


def _convolution(
    channels: int, size: int, kernel: int, count: int, group: int = 1, outputs: int = 0
) -> Layer:
    made = outputs or channels
    pads = (kernel // 2,) * 4
    return Layer(
        "Conv", (1, channels, size, size), ((made, channels // group, kernel, kernel),), count,
        relu=True, attributes=(("pads", pads), ("group", group)),
    )  # fmt: skip


KERNELS = (
    Case("matmul 768", Layer("MatMul", (768, 768), ((768, 768),)), 768**3, 0.8),
    Case("matmul 768, both given", Layer("MatMul", (768, 768), ((768, 768),), fed=True), 768**3),
    Case("matmul 512", Layer("MatMul", (512, 512), ((512, 512),)), 512**3),
    Case("matmul 197x768x3072", Layer("MatMul", (197, 768), ((768, 3072),)), 197 * 768 * 3072),
    Case(
        "matmul 12 of 197x64x197",
        Layer("MatMul", (12, 197, 64), ((12, 64, 197),), fed=True),
        12 * 197 * 64 * 197,
    ),
    Case("dense 1x2048x1000", Layer("MatMul", (1, 2048), ((2048, 1000),)), 2048 * 1000),
    Case("8 of 3x3, 64 of 56", _convolution(64, 56, 3, 8), 8 * 9 * (64 * 56) ** 2, 0.6, True),
    Case("8 of 3x3, 256 of 14", _convolution(256, 14, 3, 8), 8 * 9 * (256 * 14) ** 2, None, True),
    Case("8 of 1x1, 256 of 28", _convolution(256, 28, 1, 8), 8 * (256 * 28) ** 2),
    Case("8 of depthwise 3x3, 144 of 56", _convolution(144, 56, 3, 8, group=144)),
    Case(
        "transposed 4x4, 128 of 28 to 64 of 56",
        Layer(
            "ConvTranspose", (1, 128, 28, 28), ((128, 64, 4, 4),),
            attributes=(("strides", (2, 2)), ("pads", (1, 1, 1, 1))),
        ),
    ),
    Case(
        "4 of max pool 3x3, 64 of 56",
        Layer(
            "MaxPool", (1, 64, 56, 56), count=4,
            attributes=(("kernel_shape", (3, 3)), ("pads", (1, 1, 1, 1))),
        ),
    ),
    Case("mean of 56x56, 512", Layer("GlobalAveragePool", (1, 512, 56, 56))),
    Case("4 of softmax 12x197x197", Layer("Softmax", (12, 197, 197), count=4)),
    Case(
        "4 of layer norm 197x768",
        Layer("LayerNormalization", (1, 197, 768), ((768,), (768,)), count=4),
    ),
    Case("4 of erf 197x3072", Layer("Erf", (197, 3072), count=4)),
)  # fmt: skip


@dataclass(frozen=True)
class Options:
    core: int
    device: str
    rounds: int
    seconds: float
    seed: int


def measure(case: Case, options: Options) -> Row:
    """The row of a case, in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as worker:
        running = worker.submit(together, case, options)
        error = running.exception()
    if error is None:
        return running.result()
    text = " ".join(str(error).split()) or "no message"
    return {"case": case.name, "reason": f"{type(error).__name__}: {text}"}


def together(case: Case, options: Options) -> Row:
    """All engines in this process, in turns."""
    # Before any driver starts threads.
    os.sched_setaffinity(0, (options.core,))
    proto, inputs = case.open(options.seed)
    row: Row = {"case": case.name, "goal": case.goal, "macs": case.macs, "reason": ""}
    with ExitStack() as stack:
        try:
            running = _engines(case, proto, inputs, options, stack, row)
            expected = running[ORT].outputs()
        except (HetschedError, EngineRefuses) as error:
            return row | {"reason": f"{type(error).__name__}: {error}"}
        found = running[OPENCL].outputs()
        row["deviation"] = max(
            deviation(np.asarray(found[name]), expected[name]) for name in expected
        )
        times, peaks = _interleaved(running, options)
    row["peak_flops_per_second"] = float(np.median(peaks))
    row["seconds"] = {name: asdict(Times.of(seconds)) for name, seconds in times.items()}
    for peer in (CPU, ORT):
        ratios = np.divide(times[peer], times[OPENCL])
        row[f"{peer}_ratio"] = asdict(Times.of(ratios.tolist()))
    if case.macs:
        row["share"] = {
            name: 2 * case.macs / found["median"] / row["peak_flops_per_second"]
            for name, found in row["seconds"].items()
        }
    return row


def _engines(
    case: Case,
    proto: onnx.ModelProto,
    inputs: Mapping[str, np.ndarray],
    options: Options,
    stack: ExitStack,
    row: Row,
) -> dict[str, Engine]:
    """The engines of a case, each of which has run once."""
    graph = hetsched.read_onnx(proto)
    systems = {OPENCL: System.local(options.device), CPU: System.local(f"cpu:{options.core}")}
    if case.direct:
        direct = systems[OPENCL].with_options("opencl", winograd="off")
        systems[DIRECT] = direct
    running: dict[str, Engine] = {}
    for name, system in systems.items():
        plan = hetsched.partition(graph, system, "single", cost_model="roofline")
        executable = stack.enter_context(hetsched.compile(plan))
        if name == OPENCL:
            row["device"] = plan.parts[0].device.description
        running[name] = Hetsched(executable, inputs)
    running[ORT] = engines.open_peer(ORT, proto, inputs, 1)
    for engine in running.values():
        engine.run()
    return running


def _interleaved(
    running: Mapping[str, Engine], options: Options
) -> tuple[dict[str, list[float]], list[float]]:
    """The seconds of each engine's runs, one a round, and the core's peak in each round."""
    once = sum(seconds_of(engine.run) for engine in running.values())
    rounds = max(options.rounds, min(MOST_ROUNDS, int(options.seconds / once)))
    names = list(running)
    times: dict[str, list[float]] = {name: [] for name in names}
    peaks = []
    rng = np.random.default_rng(options.seed)
    for _ in range(rounds):
        peaks.append(peak_flops())
        for index in rng.permutation(len(names)):
            times[names[index]].append(seconds_of(running[names[index]].run))
    return times, peaks


def mean(rows: Sequence[Row]) -> float | None:
    """The geometric mean of the speed of OpenCL over that of the cpu target."""
    return geometric_mean(row["cpu_ratio"]["median"] for row in rows if not row["reason"])


def summary(result: Mapping[str, Any]) -> str:
    """What the goals are about, in words."""
    rows = result["sets"].get("models", [])
    text = []
    average = mean(rows)
    if average is not None:
        text.append(
            f"{', '.join(row['case'] for row in rows)} on {NAME} run at {average:.2f} of the cpu "
            f"target's speed in the geometric mean, both on one core; the goal is {GOAL}."
        )
    told = [
        f"{row['case']} {_share(row, DIRECT if DIRECT in row['share'] else OPENCL)}"
        f" ({row['goal']:.0%})"
        for row in result["sets"].get("kernels", [])
        if row.get("goal") and not row["reason"]
    ]
    if told:
        text.append(
            "Of the core's measured peak, without Winograd's convolutions, and what is wanted: "
            f"{', '.join(told)}."
        )
    return " ".join(text)


def tables(result: Mapping[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """A title, heads and cells for each set that `result` has."""
    found = []
    sets = result["sets"]
    if rows := sets.get("models"):
        average = mean(rows)
        title = f"whole models, {NAME}, one core"
        if average is not None:
            title += f"; geometric mean {average:.2f} of the cpu target's speed"
        found.append((title, _heads("model"), [_cells(row) for row in rows]))
    if rows := sets.get("kernels"):
        heads = [*_heads("layers"), "of peak", "cpu of peak", "no Winograd"]
        cells = [
            [*_cells(row), *([] if row["reason"] else (_share(row, name) for name in _SHARED))]
            for row in rows
        ]
        found.append((f"layers, {NAME}, one core", heads, cells))
    return found


_SHARED = (OPENCL, CPU, DIRECT)


def _heads(first: str) -> list[str]:
    names = [f"{name} ms" for name in (OPENCL, CPU, ORT)]
    return [first, *names, "over cpu", "over onnxruntime", "deviation"]


def _cells(row: Row) -> list[str]:
    if row["reason"]:
        return [row["case"], "failed"]
    return [
        row["case"],
        *(f"{row['seconds'][name]['median'] * 1e3:.3f}" for name in (OPENCL, CPU, ORT)),
        *(_ratio(row[f"{peer}_ratio"]) for peer in (CPU, ORT)),
        f"{row['deviation']:.0e}",
    ]


def _ratio(times: Mapping[str, float]) -> str:
    first, third = times["first_quartile"], times["third_quartile"]
    return f"{times['median']:.2f} ({first:.2f}-{third:.2f})"


def _share(row: Row, name: str) -> str:
    share = row.get("share", {}).get(name)
    return "" if share is None else f"{share:.0%}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.opencl",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, required=True, help="where the results go")
    parser.add_argument("--sets", default="models,kernels", help="of models, kernels")
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--kernels", nargs="*", default=[], help="words of their names; none: all")
    parser.add_argument("--device", help="an OpenCL device; default: opencl:pocl on the core")
    parser.add_argument("--core", type=int, default=cores()[0], help="on which all is held")
    parser.add_argument("--rounds", type=int, default=LEAST_ROUNDS, help="at least 15")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of a case, beyond rounds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--add", action="store_true", help="keep other rows of FILE")
    given = parser.parse_args(arguments)
    try:
        return _run(given)
    except HetschedError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status


def _run(given: argparse.Namespace) -> int:
    options = Options(
        given.core,
        given.device or f"opencl:pocl@{given.core}",
        max(given.rounds, LEAST_ROUNDS),
        given.seconds,
        given.seed,
    )
    cases = _cases(given)
    content: dict[str, Any] = record(given.seed) | {
        "device": options.device,
        "core": options.core,
        "rounds": options.rounds,
        "sets": _earlier(given.json) if given.add else {},
    }
    for name, wanted in cases.items():
        rows: list[Row] = content["sets"].setdefault(name, [])
        for case in wanted:
            print(f"{name}: {case.name}", file=sys.stderr, flush=True)
            row = measure(case, options) | {"commit": content["commit"]}
            rows[:] = _merged(rows, row)
            # After each, so that a run that is stopped leaves what it found.
            write(given.json, content)
    console = Console(width=None if sys.stdout.isatty() else 180)
    for title, heads, cells in tables(content):
        shown = Table(title=title)
        for index, head in enumerate(heads):
            shown.add_column(head, justify="right" if index else "left")
        for line in cells:
            shown.add_row(*line)
        console.print(shown)
    reasons = [
        f"{row['case']}: {row['reason']}"
        for rows in content["sets"].values()
        for row in rows
        if row["reason"]
    ]
    for reason in reasons:
        console.print(reason, highlight=False, markup=False)
    return FAILED if reasons else 0


def _merged(rows: Sequence[Row], row: Row) -> list[Row]:
    """The rows of a set with a later one of its case, in the order of all cases."""
    order = {case: index for index, case in enumerate((*MODELS, *(c.name for c in KERNELS)))}
    found = {one["case"]: one for one in (*rows, row)}
    return sorted(found.values(), key=lambda one: order.get(one["case"], len(order)))


def _cases(given: argparse.Namespace) -> dict[str, list[Case]]:
    names = {model.name for model in models.models()}
    for name in given.models:
        if name not in names:
            raise InputError(f"no model '{name}'; there are {', '.join(sorted(names))}")
    there = {
        "models": [Case(name, partial(_network, name)) for name in given.models],
        "kernels": [
            case
            for case in KERNELS
            if not given.kernels or any(word in case.name for word in given.kernels)
        ],
    }
    wanted = given.sets.split(",")
    for name in wanted:
        if name not in there:
            raise InputError(f"no set '{name}'; there are {', '.join(there)}")
    return {name: there[name] for name in wanted}


def _earlier(path: Path) -> dict[str, list[Row]]:
    """The rows that an earlier run wrote."""
    if not path.exists():
        return {}
    try:
        sets: dict[str, list[Row]] = json.loads(path.read_text(encoding="utf-8"))["sets"]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"'{path}' is no result of this bench: {error!r}") from None
    return sets


if __name__ == "__main__":
    sys.exit(main())
