"""hetsched beside the fastest runtimes: ONNX Runtime and OpenVINO, on the same cores.

    python -m bench.peers --json FILE [--models a b] [--threads 1] [--repeats 15] [--merge]

The figure of a model is the median time of the fastest peer over ours: above 1, hetsched is faster.
Each is measured twice. *Interleaved*, all engines take turns in one process, a run each, in an
order that is drawn anew for each round: every engine finds the caches as the others left them.
*Apart*, each engine has a process of its own, and they take turns by bursts of runs; the processes
whose turn it is not are stopped by a signal, so that a peer which spins disturbs none. With several
threads a peer that spins has only this second figure.

hetsched compiles for the cores through TVM alone, no part of a plan is ONNX Runtime's. All
engines are held on the same cores, have the same inputs, and their outputs are compared with
those of ONNX Runtime. `bench/engines.py` says how each is called: by default as fast as it can be,
and with `--calls arrays` as hetsched is. --merge keeps the rows of FILE for models that are not
measured now.

Exit status: 0 if hetsched ran all models rightly, 3 if one failed.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from math import ceil
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import hetsched
from bench import classes, engines, models
from bench.engines import OPENVINO, OURS, PEERS, SPINNING, Engine, EngineRefuses, Hetsched
from bench.models import Model
from bench.record import record, write
from bench.timing import Times, geometric_mean, seconds_of
from bench.turns import Worker
from hetsched.dtype import tolerance
from hetsched.errors import HetschedError, InputError
from hetsched.host import cores
from hetsched.verify import deviation

LEAST_REPEATS = 15
MOST_REPEATS = 300
# What a run takes of fast models; it is shared by the engines, and repeats come first.
INTERLEAVED_SECONDS = 4.0
APART_SECONDS = 4.0
TURNS = 5
# Runs that find the caches as another engine left them.
WARM = 2
SLOW_SECONDS = 0.05
GOAL = 0.9
# A load of the machine at which times are not to be trusted.
BUSY = 0.5
FAILED = 3
PACKAGE = "model.hsp"
INTERLEAVED, APART = "interleaved", "apart"
WAYS = (INTERLEAVED, APART)
CALLS = ("bound", "arrays")

Row = dict[str, Any]
Report = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """What is the same for all models; `peers` are those that are here."""

    threads: int
    repeats: int
    seed: int
    peers: tuple[str, ...]
    bind: bool

    @property
    def cores(self) -> tuple[int, ...]:
        return cores()[: self.threads]


def measure(model: Model, options: Options, report: Report) -> Row:
    """The row of a model; what an engine refuses is told in it."""
    with TemporaryDirectory(prefix="hetsched-peers-") as folder:
        package = str(Path(folder) / PACKAGE)
        report("compile, compare, interleave")
        row = _in_process(together, model, options, package)
        if row["reason"]:
            return row
        report("each engine in its own process")
        row[APART], refused = apart(model, options, package)
    row["refused"] |= refused
    row["reason"] = refused.get(OURS, "")
    return row | figures(row)


def together(model: Model, options: Options, package: str) -> Row:
    """All engines in this process: the compiled package, errors, and interleaved times."""
    proto = engines.bound(models.load(model, options.seed), model.shapes)
    dtype = engines.dtype(proto)
    row: Row = {
        "model": model.name,
        "source": model.source,
        "class": classes.class_of(model.name, dtype),
        "families": classes.families_of(model.name),
        "dtype": dtype,
        "gmac": model.gmac,
        "reason": "",
        "refused": {},
    }
    with ExitStack() as stack:
        try:
            graph = hetsched.read_onnx(proto, model.shapes)
            inputs = models.inputs(model, graph, options.seed)
            # One device has nothing to be priced, and nothing is measured for it.
            plan = hetsched.partition(
                graph, engines.device(options.threads), "single", cost_model="roofline"
            )
            # From nothing: without what earlier runs have stored.
            os.environ.pop("HETSCHED_STORE", None)
            os.environ["XDG_CACHE_HOME"] = str(Path(package).parent)
            start = perf_counter()
            executable = stack.enter_context(hetsched.compile(plan))
            row["compile_seconds"] = perf_counter() - start
            row["targets"] = sorted({part.device.target for part in plan.parts})
            executable.save(package)
            os.sched_setaffinity(0, options.cores)
            running: dict[str, Engine] = {OURS: Hetsched(executable, inputs, options.bind)}
            running[OURS].run()
        except HetschedError as error:
            return row | {"reason": f"{type(error).__name__}: {error}"}
        for name in options.peers:
            try:
                running[name] = engines.open_peer(
                    name, proto, inputs, options.threads, options.bind
                )
                running[name].run()
            except EngineRefuses as error:
                row["refused"][name] = str(error)
                running.pop(name, None)
        row["deviations"] = _deviations(running)
        row["reason"] = _wrong(row["deviations"].get(OURS, {}), running[OURS], dtype)
        if options.threads > 1 and SPINNING in running:
            running.pop(SPINNING).close()
        row[INTERLEAVED] = {
            name: asdict(Times.of(seconds)) for name, seconds in interleaved(running, options)
        }
    return row


def interleaved(running: Mapping[str, Engine], options: Options) -> list[tuple[str, list[float]]]:
    """The seconds of each engine's runs, one a round."""
    once = 0.0
    for engine in running.values():
        engine.run()
        once += seconds_of(engine.run)
    rounds = repeats(options.repeats, once, INTERLEAVED_SECONDS)
    names = list(running)
    times: dict[str, list[float]] = {name: [] for name in names}
    rng = np.random.default_rng(options.seed)
    for _ in range(rounds):
        for index in rng.permutation(len(names)):
            name = names[index]
            times[name].append(seconds_of(running[name].run))
    return list(times.items())


def apart(
    model: Model, options: Options, package: str
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """The times of each engine in a process of its own, in turns, and why one has none."""
    refused: dict[str, str] = {}
    times: dict[str, list[float]] = {}
    workers: dict[str, Worker] = {}
    warm: dict[str, int] = {}
    counts: dict[str, int] = {}
    with ExitStack() as stack:

        def attempt(name: str, work: Callable[[], None]) -> None:
            try:
                work()
            except EngineRefuses as error:
                refused[name] = str(error)
                times.pop(name, None)

        def start(name: str) -> None:
            worker = Worker(name, options.cores, _opened, name, model, options, package)
            workers[name] = stack.enter_context(worker)
            once = min(worker.burst(1, 2))
            warm[name] = 1 if once > SLOW_SECONDS else WARM
            share = APART_SECONDS / (1 + len(options.peers))
            counts[name] = ceil(repeats(options.repeats, once, share) / TURNS)
            times[name] = []

        def burst(name: str) -> None:
            times[name] += workers[name].burst(warm[name], counts[name])

        for name in (OURS, *options.peers):
            attempt(name, partial(start, name))
        for _ in range(TURNS):
            for name in list(times):
                attempt(name, partial(burst, name))
    return {name: asdict(Times.of(seconds)) for name, seconds in times.items()}, refused


def repeats(least: int, seconds: float, budget: float) -> int:
    """How often what takes `seconds` is repeated: as the budget allows, but `least` times.

    >>> repeats(15, 1.0, 4.0), repeats(15, 0.1, 4.0), repeats(15, 1e-6, 4.0)
    (15, 40, 300)
    """
    return max(least, min(MOST_REPEATS, int(budget / seconds)))


def figures(row: Mapping[str, Any]) -> Row:
    """Of both ways to measure: the fastest peer, and its median time over ours."""
    found: Row = {}
    for way in WAYS:
        medians = {name: times["median"] for name, times in row[way].items()}
        ours = medians.pop(OURS, None)
        fastest = min(medians, key=lambda name: medians[name], default=None)
        whole = ours is not None and fastest is not None
        found[f"fastest_{way}"] = fastest
        found[f"figure_{way}"] = medians[fastest] / ours if whole else None
    return found


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Geometric means of each class, of each family and of all in float32, and what is below 0.9.

    Integers are a class of their own, which no other mean has.
    """
    floats = [row for row in rows if row["dtype"] == "float32"]
    groups: dict[str, list[Mapping[str, Any]]] = {"all float32": floats}
    for name in classes.CLASSES:
        groups[name] = [row for row in rows if row["class"] == name]
    for name in classes.FAMILIES:
        groups[name] = [row for row in floats if name in row["families"]]
    return {
        "means": {
            name: {"models": len(members)} | {way: _mean(members, way) for way in WAYS}
            for name, members in groups.items()
            if members
        },
        "below": {
            way: {row["model"]: row[f"figure_{way}"] for row in rows if _below(row, way)}
            for way in WAYS
        },
        "failed": {row["model"]: row["reason"] for row in rows if row["reason"]},
    }


def merged(earlier: Sequence[Row], rows: Sequence[Row]) -> list[Row]:
    """The rows of both, in the order of the catalogue; a later one of a model counts."""
    by_name = {row["model"]: row for row in (*earlier, *rows)}
    order = [model.name for model in models.models()]
    return sorted(by_name.values(), key=lambda row: order.index(row["model"]))


def _mean(rows: Sequence[Mapping[str, Any]], way: str) -> float | None:
    found = (row.get(f"figure_{way}") for row in rows)
    return geometric_mean(figure for figure in found if figure is not None)


def _below(row: Mapping[str, Any], way: str) -> bool:
    figure = row.get(f"figure_{way}")
    return figure is not None and figure < GOAL


def _deviations(running: Mapping[str, Engine]) -> dict[str, dict[str, float]]:
    """How far each output of each engine is from ONNX Runtime's, as a share of its peak."""
    expected = next((running[n].outputs() for n in running if n not in (OURS, OPENVINO)), {})
    return {
        name: {key: deviation(np.asarray(found[key]), expected[key]) for key in expected}
        for name, engine in running.items()
        if (found := engine.outputs())
    }


def _wrong(deviations: Mapping[str, float], ours: Engine, dtype: str) -> str:
    """What is wrong with our outputs; integer models round in their own ways, which is printed."""
    if dtype == classes.INTEGER:
        return ""
    for name, found in deviations.items():
        limit = tolerance(str(ours.outputs()[name].dtype)).relative
        if found > limit:
            return f"output '{name}' deviates by {found:.1e} of its peak"
    return ""


def _opened(name: str, model: Model, options: Options, package: str) -> Engine:
    """An engine, in the process that it has for itself."""
    proto = engines.bound(models.load(model, options.seed), model.shapes)
    inputs = models.inputs(model, hetsched.read_onnx(proto, model.shapes), options.seed)
    if name == OURS:
        return Hetsched(hetsched.load(package), inputs, options.bind)
    return engines.open_peer(name, proto, inputs, options.threads, options.bind)


def _in_process(work: Callable[..., Row], model: Model, options: Options, package: str) -> Row:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as worker:
        running = worker.submit(work, model, options, package)
        error = running.exception()
    if error is None:
        return running.result()
    text = " ".join(str(error).split()) or "no message"
    return {
        "model": model.name,
        "source": model.source,
        "class": classes.class_of(model.name),
        "families": classes.families_of(model.name),
        "dtype": "float32",
        "gmac": model.gmac,
        "reason": f"{type(error).__name__}: {text}",
        "refused": {},
    }


def table(rows: Sequence[Row], options: Options) -> Table:
    """A row a model: milliseconds of each engine, apart, and the figures of both ways."""
    many = "s" if options.threads > 1 else ""
    shown = Table(title=f"{options.threads} thread{many}, medians in ms, apart")
    shown.add_column("model", no_wrap=True)
    shown.add_column("class", no_wrap=True)
    for title in (OURS, *options.peers, *WAYS, "deviation", "compile s"):
        shown.add_column(title, justify="right")
    for row in rows:
        if row["reason"]:
            shown.add_row(row["model"], row["class"], row["reason"], style="red")
            continue
        shown.add_row(
            row["model"],
            row["class"],
            *(_ms(row[APART].get(name)) for name in (OURS, *options.peers)),
            *(_figure(row[f"figure_{way}"]) for way in WAYS),
            f"{max(row['deviations'][OURS].values(), default=0):.0e}",
            f"{row['compile_seconds']:.1f}",
        )
    return shown


def means_table(found: Mapping[str, Any]) -> Table:
    shown = Table(title="geometric means of the fastest peer's median over ours")
    shown.add_column("models", no_wrap=True)
    for title in ("count", *WAYS):
        shown.add_column(title, justify="right")
    for name, mean in found["means"].items():
        shown.add_row(name, str(mean["models"]), *(_figure(mean[way]) for way in WAYS))
    return shown


def _ms(times: Mapping[str, float] | None) -> str:
    if times is None:
        return "none"
    spread = Times(**times).spread  # type: ignore[arg-type]
    return f"{times['median'] * 1e3:.3f} ±{spread * 1e3:.3f}"


def _figure(figure: float | None) -> str:
    return "none" if figure is None else f"{figure:.2f}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.peers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, required=True, help="where the results go")
    parser.add_argument("--models", nargs="*", default=[], help="names; default: all")
    parser.add_argument("--largest-gmac", type=float, default=float("inf"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=LEAST_REPEATS, help="at least 15")
    parser.add_argument("--peers", nargs="*", default=[], help=f"of {', '.join(PEERS)}")
    parser.add_argument("--calls", choices=CALLS, default=CALLS[0], help="how peers are called")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--merge", action="store_true", help="keep other rows of FILE")
    given = parser.parse_args(arguments)
    try:
        return _run(given)
    except HetschedError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status


def _run(given: argparse.Namespace) -> int:
    for name in given.peers:
        if name not in PEERS:
            raise InputError(f"no peer '{name}'; there are {', '.join(PEERS)}")
    wanted = tuple(given.peers) or PEERS
    there = engines.installed(wanted)
    if there != wanted:
        if given.peers:
            raise InputError(engines.INSTALL)
        print(engines.INSTALL, file=sys.stderr)
    options = Options(
        given.threads, max(given.repeats, LEAST_REPEATS), given.seed, there, given.calls == CALLS[0]
    )
    device = engines.device(options.threads)
    # Before anything is written, which would make the checkout differ.
    about = record(given.seed)
    if OPENVINO in there:
        about["versions"][OPENVINO] = version(OPENVINO)
    busy = about["machine"]["load_average"][0]
    if busy > BUSY:
        print(f"the machine has a load of {busy:.1f}: times will suffer from it", file=sys.stderr)
    rows: list[Row] = _earlier(given.json, about, options) if given.merge else []
    names = [name for text in given.models for name in text.split(",") if name]
    selected = models.chosen(models.FOLDER, names, given.largest_gmac)
    for index, model in enumerate(selected):
        report = _reporter(f"[{index + 1}/{len(selected)}] {model.name}")
        row = measure(model, options, report) | {"commit": about["commit"]}
        told = row["reason"] or ", ".join(f"{way} {_figure(row[f'figure_{way}'])}" for way in WAYS)
        report(told)
        rows = merged(rows, [row])
        content = {
            **about,
            "threads": options.threads,
            "cores": options.cores,
            "device": device,
            "repeats": options.repeats,
            "peers": options.peers,
            "calls": given.calls,
            "summary": summary(rows),
            "rows": rows,
        }
        # After each model, so that a run that is stopped leaves what it found.
        write(given.json, content)
    return _tell(rows, options)


def _earlier(path: Path, about: Mapping[str, Any], options: Options) -> list[Row]:
    """The rows of an earlier run, which has to be of the same machine, threads and peers."""
    if not path.exists():
        return []
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        same = (
            content["threads"] == options.threads
            and content["seed"] == options.seed
            and tuple(content["peers"]) == options.peers
            and content["calls"] == CALLS[not options.bind]
            and content["machine"]["cpu"] == about["machine"]["cpu"]
        )
        rows: list[Row] = content["rows"]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"'{path}' is no result of this bench: {error!r}") from None
    if not same:
        raise InputError(f"'{path}' is of another machine, seed, number of threads, peers or calls")
    return rows


def _tell(rows: Sequence[Row], options: Options) -> int:
    width = None if sys.stdout.isatty() else max(160, shutil.get_terminal_size().columns)
    console = Console(width=width)
    found = summary(rows)
    console.print(table(rows, options))
    console.print(means_table(found))
    for way in WAYS:
        below = found["below"][way]
        names = ", ".join(f"{name} {figure:.2f}" for name, figure in below.items())
        console.print(f"{way}: {len(below)} below {GOAL}{': ' if names else ''}{names}")
    for row in rows:
        for text in row["refused"].values():
            console.print(f"{row['model']}: {text}", highlight=False, markup=False)
    return FAILED if found["failed"] else 0


def _reporter(name: str) -> Report:
    start = perf_counter()

    def report(text: str) -> None:
        print(f"{name:<30} {perf_counter() - start:6.1f} s  {text}", file=sys.stderr, flush=True)

    return report


if __name__ == "__main__":
    sys.exit(main())
