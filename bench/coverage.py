"""Every model through every partitioner, compiled, run and compared with ONNX Runtime.

    python -m bench.coverage --json FILE [--models a,b] [--largest-gmac X] [--devices cpu:0,cpu:1]
                             [--add]

Beside the partitioners named there is `random`, a cut that takes no account of time, so that models
too small to be worth cutting are cut all the same. By default groups are priced by their roofline:
what is tested is that any plan is right, and not that it is fast.

The file is written after each model. With `--add` the rows that it has stay, and of all models only
those that it lacks are run: so a run that was stopped goes on, and models can be run in slices.

Exit status: 0 if all models pass, 3 if one fails.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import onnx
import onnxruntime
from rich.console import Console
from rich.table import Table

import hetsched
from bench import models
from bench.accuracy import RECOGNISED, recognised
from bench.models import Model
from bench.record import record, write
from hetsched import oracle
from hetsched.api import priced
from hetsched.compiler import compile_parts
from hetsched.cost import Prices
from hetsched.dtype import tolerance
from hetsched.errors import HetschedError, UnsupportedOperation, VerificationFailed
from hetsched.executable import Executable
from hetsched.graph import Graph, to_onnx
from hetsched.operation import group_flops
from hetsched.partitioner import Partitioner
from hetsched.plan import Plan, make_plan
from hetsched.plugin import load
from hetsched.system import System
from hetsched.verify import WHOLE, deviation, verify

# `auto` last: what it chooses has mostly been compiled for another.
PARTITIONERS = ("single", "task", "layerwise", "mincut", "channel", "tile", "hybrid", "auto")
RANDOM = "random"
CUTS = 4
REPEATS = 3
# A second run of what takes longer than this tells nothing more here.
SLOW_SECONDS = 2.0
FAILED = 3

Report = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """What is the same for all models."""

    devices: str
    partitioners: tuple[str, ...]
    cost_model: str
    seed: int


@dataclass(frozen=True)
class Attempt:
    """A model through one partitioner. Deviations are of the peak; seconds are this machine's.

    `deviation` is the worst of all parts and of the whole, `parts_deviation` that of the parts,
    each given right inputs. `run_seconds` is the median of `repeats`. `compiled` of the parts had
    to be compiled, the others had been for an earlier partitioner. With `same_plan_as` nothing was
    done again: the plan is that of an earlier partitioner. `recognised` counts images.
    """

    partitioner: str
    passed: bool
    reason: str = ""
    same_plan_as: str = ""
    devices: tuple[str, ...] = ()
    parts: int = 0
    compiled: int = 0
    deviation: float | None = None
    parts_deviation: float | None = None
    recognised: int | None = None
    partition_seconds: float = 0.0
    compile_seconds: float = 0.0
    verify_seconds: float = 0.0
    run_seconds: float = 0.0
    repeats: int = 0


@dataclass(frozen=True)
class Row:
    """A model, and how it fared.

    `change` is by how much of its peak another input changes an output, the most sensitive one.
    `noise` is how far ONNX Runtime is from itself without its own rewrites of the graph: what
    rounding alone does to the model. `import_deviation` is between what ONNX Runtime makes of the
    file and of the imported graph. `notes` say what was done for this model only, `refusals` what
    a device cannot run, and why. `hardware` says what the devices are, `commit` what was run.
    """

    model: str
    source: str
    real: bool
    gmac: float = 0.0
    operations: int = 0
    groups: int = 0
    devices: str = ""
    change: float = 0.0
    noise: float = 0.0
    import_deviation: float = 0.0
    import_seconds: float = 0.0
    price_seconds: float = 0.0
    attempts: tuple[Attempt, ...] = ()
    reason: str = ""
    notes: tuple[str, ...] = ()
    refusals: tuple[str, ...] = ()
    hardware: Mapping[str, str] = field(default_factory=dict)
    commit: str | None = None

    @property
    def passed(self) -> bool:
        return not self.reason and all(attempt.passed for attempt in self.attempts)

    @property
    def problem(self) -> str:
        """Everything that went wrong, in one line."""
        failed = [a for a in self.attempts if not a.passed]
        told = {
            reason: ", ".join(a.partitioner for a in failed if a.reason == reason)
            for reason in dict.fromkeys(a.reason for a in failed)
        }
        return "; ".join(
            filter(None, [self.reason, *(f"{who}: {why}" for why, who in told.items())])
        )


def cover(model: Model, options: Options) -> Row:
    """The model through every partitioner; a failure of hetsched is told in the row."""
    report = _reporter(model.name)
    row = Row(model.name, model.source, model.real)
    try:
        report("import")
        proto = models.load(model, options.seed)
        seconds, graph = _timed(lambda: hetsched.read_onnx(proto, model.shapes))
        row = replace(
            row,
            gmac=sum(map(group_flops, graph.groups)) / 2e9,
            operations=len(graph.ops),
            groups=len(graph.groups),
            import_seconds=seconds,
        )
        inputs = models.inputs(model, graph, options.seed)
        others = models.inputs(model, graph, options.seed + 1)
        change, noise, imported = sensitivity(proto, graph, inputs, others)
        row = replace(row, change=change, noise=noise, import_deviation=imported)
        if imported > _limit(graph):
            return replace(row, reason=f"the imported graph is {imported:.1e} from the file")
        report("price")
        seconds, (system, prices, note) = _timed(lambda: _priced(graph, options))
        row = replace(
            _noted(row, note),
            devices=",".join(device.name for device in system.devices),
            hardware={device.name: device.description for device in system.devices},
            refusals=_refusals(prices),
            price_seconds=seconds,
        )
    except HetschedError as error:
        return replace(row, reason=f"{type(error).__name__}: {error}")
    trial = Trial(model, graph, system, prices, inputs, options.seed, report)
    for name in (*options.partitioners, RANDOM):
        attempt = trial.attempt(name)
        report(f"{name}: {'passed' if attempt.passed else attempt.reason}")
        row = replace(row, attempts=(*row.attempts, attempt))
    return row


def sensitivity(
    proto: onnx.ModelProto,
    graph: Graph,
    inputs: Mapping[str, np.ndarray],
    others: Mapping[str, np.ndarray],
) -> tuple[float, float, float]:
    """By how much of their peak the outputs move: for other inputs, by rounding, and by import."""
    model = to_onnx(graph)
    options = oracle.session_options(threads=1)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    literal = oracle.open_session(model, options)
    names = [output.name for output in literal.get_outputs()]
    plain = dict(zip(names, literal.run(names, dict(inputs)), strict=True))
    found = oracle.run(model, inputs)
    change, noise, imported = (
        max(deviation(result[name], found[name]) for name in names)
        for result in (oracle.run(model, others), plain, oracle.run(proto, inputs))
    )
    return change, noise, imported


def random_cut(graph: Graph, system: System, prices: Prices, seed: int) -> Plan:
    """A plan that changes the device at a few random places of the topological order."""
    order = [group.name for group in graph.groups]
    places = range(1, len(order))
    rng = np.random.default_rng(seed)
    chosen = sorted(rng.choice(places, min(CUTS, len(places)), replace=False)) if places else []
    names = [device.name for device in system.devices]
    placement = {}
    for index, group in enumerate(order):
        run = int(np.searchsorted(chosen, index, side="right"))
        wanted = names[run % len(names)]
        there = prices.seconds[group]
        placement[group] = wanted if wanted in there else next(iter(there))
    return make_plan(graph, system, prices, placement, order, f"{RANDOM}:seed={seed}")


class Trial:
    """A model on a system with inputs; what one partitioner needed is there for the next."""

    def __init__(
        self,
        model: Model,
        graph: Graph,
        system: System,
        prices: Prices,
        inputs: Mapping[str, np.ndarray],
        seed: int,
        report: Report,
    ) -> None:
        self._model = model
        self._graph = graph
        self._system = system
        self._prices = prices
        self._inputs = inputs
        self._seed = seed
        self._report = report
        self._compiled: set[tuple[str, str, str]] = set()
        self._attempts: dict[object, Attempt] = {}

    def attempt(self, partitioner: str) -> Attempt:
        """A plan, compiled, verified and timed; a failure of hetsched is told in the result."""
        attempt = Attempt(partitioner, passed=False)
        key: object = None
        try:
            seconds, plan = _timed(lambda: self._plan(partitioner))
            parts = tuple(
                (part.device.name, tuple(group.name for group in part.groups))
                for part in plan.parts
            )
            # Pieces of other bounds have the same names.
            key = plan.splits, parts, tuple(plan.replicas.items())
            if key in self._attempts:
                earlier = self._attempts[key]
                return replace(
                    earlier,
                    partitioner=partitioner,
                    same_plan_as=earlier.partitioner,
                    compiled=0,
                    partition_seconds=seconds,
                    compile_seconds=0.0,
                    verify_seconds=0.0,
                )
            attempt = replace(
                attempt, partition_seconds=seconds, parts=len(plan.parts), devices=plan.devices
            )
            seconds, (executable, new) = _timed(lambda: self._compile(plan))
            attempt = replace(attempt, compile_seconds=seconds, compiled=new)
            with executable:
                attempt = self._checked(attempt, executable)
                if attempt.passed:
                    times = self._run_seconds(executable)
                    attempt = replace(
                        attempt, run_seconds=statistics.median(times), repeats=len(times)
                    )
        except HetschedError as error:
            attempt = replace(attempt, passed=False, reason=f"{type(error).__name__}: {error}")
        if key is not None:
            self._attempts[key] = attempt
        return attempt

    def _plan(self, partitioner: str) -> Plan:
        if partitioner == RANDOM:
            return random_cut(self._graph, self._system, self._prices, self._seed)
        return load(Partitioner, partitioner).partition(self._graph, self._system, self._prices)

    def _compile(self, plan: Plan) -> tuple[Executable, int]:
        """The plan's executable, and how many of its parts were new."""
        found = compile_parts(
            plan,
            lambda what, index, of: self._report(
                f"{plan.partitioner}: {what}, {index + 1} of {of}"
            ),
        )
        keys = {
            (replace(item.graph, name="").digest, item.part.device.target, item.part.device.isa)
            for item in found
        }
        new = len(keys - self._compiled)
        self._compiled |= keys
        return Executable(plan, found), new

    def _checked(self, attempt: Attempt, executable: Executable) -> Attempt:
        seconds, found = _timed(lambda: verify(executable, self._inputs, self._seed))
        parts = [item.deviation for item in found.comparisons if item.name != WHOLE]
        attempt = replace(
            attempt,
            verify_seconds=seconds,
            deviation=max(item.deviation for item in found.comparisons),
            parts_deviation=max(parts),
        )
        try:
            found.check()
        except VerificationFailed as error:
            return replace(attempt, reason=f"{type(error).__name__}: {error}")
        expected = RECOGNISED.get(self._model.name)
        if expected is None:
            return replace(attempt, passed=True)
        count = recognised(executable.run)
        reason = "" if count == expected else f"{count} images are recognised, not {expected}"
        return replace(attempt, recognised=count, reason=reason, passed=not reason)

    def _run_seconds(self, executable: Executable) -> list[float]:
        times: list[float] = []
        while len(times) < REPEATS and sum(times) < SLOW_SECONDS:
            seconds, _ = _timed(lambda: executable.run(self._inputs))
            times.append(seconds)
        return times


def _priced(graph: Graph, options: Options) -> tuple[System, Prices, str]:
    """The system and its prices; with ONNX Runtime added if the devices cannot run the graph."""
    system = System.local(options.devices)
    try:
        return system, priced(graph, system, options.cost_model), ""
    except UnsupportedOperation as error:
        # On cores that are there already: ONNX Runtime takes only what the others refuse.
        extra = f"onnxruntime:{system.devices[0].cores[0]}"
        system = System.local(f"{options.devices},{extra}")
        note = f"'{extra}' added: {error}"
        return system, priced(graph, system, options.cost_model), note


def _refusals(prices: Prices) -> tuple[str, ...]:
    """Each reason of a device, with the first of the groups that it is about and their number."""
    found: dict[tuple[str, str], list[str]] = {}
    for group, reasons in prices.refusals.items():
        for device, reason in reasons.items():
            found.setdefault((device, reason), []).append(group)
    return tuple(
        f"{device} refuses '{groups[0]}'{f' and {len(groups) - 1} more' * (len(groups) > 1)}: "
        f"{reason}"
        for (device, reason), groups in found.items()
    )


def _limit(graph: Graph) -> float:
    """The tightest tolerance of a float output; infinite without one."""
    limits = [tolerance(tensor.dtype).relative for tensor in graph.outputs]
    return min((limit for limit in limits if limit), default=float("inf"))


def _noted(row: Row, note: str) -> Row:
    return replace(row, notes=(*row.notes, note)) if note else row


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = perf_counter()
    result = work()
    return perf_counter() - start, result


def _reporter(name: str) -> Report:
    start = perf_counter()

    def report(text: str) -> None:
        print(f"{name:<20} {perf_counter() - start:7.1f} s  {text}", file=sys.stderr, flush=True)

    return report


def apart(model: Model, options: Options) -> Row:
    """`cover` in a process of its own: a crash, or memory that is kept, is that model's alone."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as worker:
        running = worker.submit(cover, model, options)
        error = running.exception()
    if error is None:
        return running.result()
    text = " ".join(str(error).split()) or "no message"
    return Row(model.name, model.source, model.real, reason=f"{type(error).__name__}: {text}")


def table(rows: Sequence[Row], partitioners: Sequence[str]) -> Table:
    """A row a model: parts and the largest deviation for each partitioner, then seconds."""
    shown = Table(title="parts and largest deviation from ONNX Runtime, by partitioner")
    shown.add_column("model", no_wrap=True)
    for title in ("GMAC", "ops", "groups", *partitioners, "import s", "compile s", "run ms"):
        shown.add_column(title, justify="right", no_wrap=True)
    shown.add_column("status")
    for row in rows:
        cells = {a.partitioner: _cell(a) for a in row.attempts}
        compiled = sum(attempt.compile_seconds for attempt in row.attempts)
        run = row.attempts[0].run_seconds if row.attempts else 0.0
        shown.add_row(
            row.model,
            f"{row.gmac:.3f}",
            str(row.operations),
            str(row.groups),
            *(cells.get(name, "") for name in partitioners),
            f"{row.import_seconds:.1f}",
            f"{compiled:.1f}",
            f"{run * 1e3:.1f}",
            "passed" if row.passed else "FAILED",
        )
    return shown


def _cell(attempt: Attempt) -> str:
    if attempt.deviation is None:
        return "failed"
    return f"{attempt.parts}: {attempt.deviation:.0e}"


def _content(rows: Sequence[Row], options: Options, about: Mapping[str, Any]) -> dict[str, Any]:
    passed = sum(row.passed for row in rows)
    return {
        **about,
        "options": asdict(options),
        "why_this_cost_model": "what is tested is that any plan is right, not that it is fast",
        "cuts_of_random": CUTS,
        "largest_repeats": REPEATS,
        "models": len(rows),
        "passed": passed,
        "rows": [asdict(row) | {"passed": row.passed, "problem": row.problem} for row in rows],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.coverage", description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="where the results go")
    parser.add_argument("--models", default="", help="names with commas between; default: all")
    parser.add_argument("--models-dir", type=Path, default=models.FOLDER)
    parser.add_argument("--largest-gmac", type=float, default=float("inf"))
    parser.add_argument("--devices", default="cpu:0,cpu:1")
    parser.add_argument("--partitioners", default=",".join(PARTITIONERS))
    parser.add_argument("--cost-model", default="roofline")
    parser.add_argument("--add", action="store_true", help="to the rows of the file")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    options = Options(given.devices, _names(given.partitioners), given.cost_model, given.seed)
    # Before anything is written, which would make the checkout differ.
    about = record(given.seed)
    rows: list[Row] = _earlier(given.json, options) if given.add else []
    try:
        selected = models.chosen(given.models_dir, _names(given.models), given.largest_gmac)
        if not given.models:
            there = {row.model for row in rows}
            selected = [model for model in selected if model.name not in there]
        named = {model.name for model in selected}
        rows = [row for row in rows if row.model not in named]
        for index, model in enumerate(selected):
            print(f"[{index + 1}/{len(selected)}] {model.name}", file=sys.stderr, flush=True)
            rows.append(replace(apart(model, options), commit=about["commit"]))
            # After each model, so that a run that is stopped leaves what it found.
            write(given.json, _content(rows, options, about))
    except HetschedError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(table(rows, (*options.partitioners, RANDOM)))
    for row in rows:
        for text in (*row.notes, *row.refusals, row.problem):
            if text:
                console.print(f"{row.model}: {text}", highlight=False, markup=False)
    for name, what in {k: v for row in rows for k, v in row.hardware.items()}.items():
        console.print(f"{name} is {what}", highlight=False, markup=False)
    passed = sum(row.passed for row in rows)
    console.print(f"{passed} of {len(rows)} models pass")
    return 0 if passed == len(rows) else FAILED


def _earlier(path: Path, options: Options) -> list[Row]:
    """The rows of a file of a run with the same options.

    Raises
    ------
    HetschedError
        Its options were others.
    """
    if not path.exists():
        return []
    content = json.loads(path.read_text(encoding="utf-8"))
    if content["options"] != json.loads(json.dumps(asdict(options))):
        raise HetschedError(f"'{path}' is of a run with other options: {content['options']}")
    fields_of = {item.name for item in fields(Row)}
    return [
        Row(
            **{name: value for name, value in row.items() if name in fields_of}
            | {
                "attempts": tuple(Attempt(**attempt) for attempt in row["attempts"]),
                "notes": tuple(row["notes"]),
                "refusals": tuple(row.get("refusals", ())),
                "commit": row.get("commit", content["commit"]),
            }
        )
        for row in content["rows"]
    ]


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


if __name__ == "__main__":
    sys.exit(main())
