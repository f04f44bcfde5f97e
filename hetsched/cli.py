"""The command line: `hetsched VERB`, one Python function of the same name behind each.

Tables and JSON go to stdout; progress, hints and the one line of an error go to stderr.
"""

import json
import os
import shutil
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)
from typer.core import TyperGroup

import hetsched
from hetsched import api, report
from hetsched.errors import DeviceError, HetschedError, LimitExceeded, OutputFileError, PlanError
from hetsched.executable import Executable
from hetsched.explain import Account, difference
from hetsched.files import write_text
from hetsched.graph import Graph
from hetsched.inputs import read_inputs, seeded_inputs, write_outputs
from hetsched.plan import Plan, Recipe, plan_facts, read_recipe, simulate
from hetsched.schedule import Schedule
from hetsched.store import Store, default_path
from hetsched.system import System
from hetsched.trace import write_trace
from hetsched.verify import verify as verify_executable

# Of a table that goes to a file or a pipe.
PLAIN_WIDTH = 100
# Links are measured between this many cores unless --devices names others: all pairs are many.
MOST_LINKED_CORES = 4
INTERRUPTED = 130
BROKEN_PIPE = 141
UNITS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}

Report = Callable[[str, int, int], None]


class Commands(TyperGroup):
    """Ends every command the same way: one line on stderr and the exit status of the error."""

    def main(self, *args: Any, **options: Any) -> Any:
        try:
            status = super().main(*args, **options | {"standalone_mode": False})
        except typer.TyperException as error:
            context = getattr(error, "ctx", None)
            command = context.command_path if context else "hetsched"
            _complain(f"{error.format_message().rstrip('.')} (see {command} --help)")
            status = error.exit_code
        sys.exit(status)

    def invoke(self, ctx: Any) -> Any:
        interrupts: list[int] = []

        def interrupted(number: int, _: object) -> None:
            interrupts.append(number)
            raise KeyboardInterrupt

        before = signal.signal(signal.SIGINT, interrupted)
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except (HetschedError, KeyboardInterrupt) as error:
            # A compiler may pass an interrupt on as a failure of its own.
            if interrupts or not isinstance(error, HetschedError):
                _say("interrupted")
                raise SystemExit(INTERRUPTED) from None
            _complain(str(error))
            raise typer.Exit(error.exit_status) from None
        except BrokenPipeError:
            # The reader has gone; what is left in the buffer must not fail again at the exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(BROKEN_PIPE) from None
        finally:
            signal.signal(signal.SIGINT, before)
        return result


app = typer.Typer(
    cls=Commands,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """The console script `hetsched`."""
    try:
        app()
    except SystemExit as end:
        if end.code == INTERRUPTED:
            # At once: what a compiler was at need not be taken down in order.
            os._exit(INTERRUPTED)
        raise


def seconds_of(text: str) -> float:
    """The seconds of a duration such as `30s`, `10m`, `1.5h` or `90`."""
    number = text.rstrip("hms")
    unit = text[len(number) :] or "s"
    try:
        seconds = float(number) * UNITS[unit]
    except (ValueError, KeyError):
        raise typer.BadParameter(f"'{text}' is no duration; write 30s, 10m or 1h") from None
    if not 0 <= seconds < float("inf"):
        raise typer.BadParameter(f"'{text}' is no duration; write 30s, 10m or 1h")
    return seconds


def shapes_of(items: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Shapes by name from `name=1,3,224,224`; a name may have any character, `=` too.

    >>> shapes_of(["x=y:0=1,3", "scalar="])
    {'x=y:0': (1, 3), 'scalar': ()}
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for item in items:
        name, equals, text = item.rpartition("=")
        sizes = [size.strip() for size in text.split(",")] if text.strip() else []
        if not equals or not name or not all(size.isascii() and size.isdigit() for size in sizes):
            raise typer.BadParameter(
                f"'{item}' is no shape; write name=1,3,224,224", param_hint="'--shape'"
            )
        if name in shapes:
            raise typer.BadParameter(f"'{name}' is given twice", param_hint="'--shape'")
        shapes[name] = tuple(map(int, sizes))
    return shapes


Model = Annotated[Path, typer.Argument(metavar="MODEL", help="The ONNX model.", show_default=False)]
Devices = Annotated[
    str | None,
    typer.Option(
        "--devices",
        metavar="LIST",
        help="Devices of this machine, such as cpu:0,cpu:1; cpu is all cores as one device.",
    ),
]
MachineFile = Annotated[
    Path | None,
    typer.Option("--system", metavar="FILE", help="A described machine, in TOML."),
]
PartitionerName = Annotated[
    str | None,
    typer.Option(
        "--partitioner",
        metavar="NAME",
        help="What places the operations, such as auto (the default), single, task or "
        "layerwise:objective=throughput.",
    ),
]
CostModelName = Annotated[
    str | None,
    typer.Option(
        "--cost-model",
        metavar="NAME",
        help="Where times come from: profiled (measured here, the default) or roofline (computed, "
        "the default for machines that are only described).",
    ),
]
Objective = Annotated[
    str | None,
    typer.Option(
        "--objective",
        metavar="WHAT",
        help="What to plan for: latency (the default), throughput, energy (by the watts of a "
        "machine file) or memory.",
    ),
]
Shapes = Annotated[
    list[str] | None,
    typer.Option(
        "--shape",
        metavar="NAME=SIZES",
        help="The shape of an input that the model leaves open, such as x=1,3,224,224; repeatable.",
    ),
]
StoreFile = Annotated[
    Path | None,
    typer.Option("--store", metavar="FILE", help="The profile store, by default the user's."),
]
Strict = Annotated[
    bool,
    typer.Option("--strict", help="Fail if any of the devices cannot run an operation."),
]
Winograd = Annotated[
    str | None,
    typer.Option(
        "--winograd",
        metavar="HOW",
        help="How cpu devices compute 3 x 3 convolutions: off (as they are defined), f2 (at most "
        "F(2x2,3x3), as exact), f4 (F(4x4,3x3) wherever it is defined) or auto (the fastest by a "
        "model, the default).",
    ),
]
Inputs = Annotated[
    Path | None,
    typer.Option(
        "-i",
        "--inputs",
        metavar="FILE",
        help="Input arrays by name, .npz; without it values are made from --seed.",
    ),
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Of the input values.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document, in SI units.")]
Verbose = Annotated[
    bool, typer.Option("-v", "--verbose", help="Say each step on stderr, a line each.")
]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"hetsched {hetsched.__version__}")
        raise typer.Exit


@app.callback()
def hetsched_(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Partitions ONNX models over the devices of a machine, compiles, runs and verifies them."""


@app.command()
def devices(
    devices: Devices = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="Write a machine file, in TOML."),
    ] = None,
    store: StoreFile = None,
    json_: Json = False,
    verbose: Verbose = False,
) -> None:
    """Shows what is here, how fast data passes between the cores, and what is absent and why.

    Example: hetsched devices --devices cpu:0,cpu:1 -o machine.toml
    """
    _check_writable(output)
    found = api.devices()
    chosen = devices
    left_out = 0
    if chosen is None:
        singles = [item.name for item in found if item.device and item.name.startswith("cpu:")]
        left_out = len(singles) - len(singles[:MOST_LINKED_CORES])
        chosen = ",".join(singles[:MOST_LINKED_CORES])
    with _Steps(verbose) as steps:
        steps.begin("measuring links")
        system = System.local(chosen, _store(store)) if chosen else None
    if output and system:
        write_text(output, system.to_toml())
    elif output:
        raise DeviceError("no device is here that a machine file could describe")
    document = report.devices_document(found, system)
    _show(document, json_, report.devices_view(document))
    if left_out:
        _say(f"links of {left_out} more cores are not shown; choose cores with --devices")


@app.command()
def profile(
    model: Model,
    devices: Devices = None,
    winograd: Winograd = None,
    shape: Shapes = None,
    store: StoreFile = None,
    budget: Annotated[
        float | None,
        typer.Option(
            "--budget",
            metavar="TIME",
            parser=seconds_of,
            help="Begin no measurement after this time, such as 30s or 10m; what is measured is "
            "kept, and the exit status is 4 if anything is missing.",
        ),
    ] = None,
    json_: Json = False,
    verbose: Verbose = False,
) -> None:
    """Measures the model's kernel groups and the links into the profile store.

    Example: hetsched profile model.onnx --devices cpu:0,cpu:1 --budget 10m
    """
    kept = _store(store)
    with _Steps(verbose) as steps:
        graph = _read(model, shape, steps)
        steps.begin("measuring links")
        system = _with_winograd(System.local(devices or "cpu", kept), winograd)
        limit = budget if budget is not None else float("inf")
        rows = api.profile(graph, system, kept.path, limit, steps.begin("profiling"))
    document = report.profile_document(rows, system, str(kept.path))
    _show(document, json_, report.profile_view(document))
    if document["missing"]:
        raise LimitExceeded(
            f"the budget was spent with {document['missing']} of {len(rows)} kernels not measured; "
            "run the command again to go on"
        )


@app.command()
def tune(
    model: Model,
    devices: Devices = None,
    shape: Shapes = None,
    tuner: Annotated[
        str | None,
        typer.Option(
            "--tuner",
            metavar="NAME",
            help="candidates (the default) measures those that the schedules' own rules rank "
            "first; metaschedule searches for what no rule covers.",
        ),
    ] = None,
    trials: Annotated[
        int | None,
        typer.Option(
            "--trials",
            min=1,
            help="Most candidates of a kernel, by default 4, or 64 for metaschedule.",
            show_default=False,
        ),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            "--budget",
            metavar="TIME",
            parser=seconds_of,
            help="Begin nothing after this time, such as 30s or 10m; what was tried is kept, and "
            "the exit status is 4 if anything is left.",
        ),
    ] = None,
    json_: Json = False,
    verbose: Verbose = False,
) -> None:
    """Measures several ways to compute each kernel; what is compiled later uses the fastest.

    Example: hetsched tune model.onnx --devices cpu:0
    """
    with _Steps(verbose) as steps:
        graph = _read(model, shape, steps)
        tuning = api.tune(
            graph,
            devices or "cpu",
            tuner,
            trials or (64 if tuner == "metaschedule" else 4),
            budget if budget is not None else float("inf"),
            steps.begin("tuning"),
        )
    document = report.tuning_document(tuning, str(default_path()))
    _show(document, json_, report.tuning_view(document))
    if not tuning.whole:
        raise LimitExceeded("the budget was spent; run the command again to go on")


@app.command()
def partition(
    model: Model,
    devices: Devices = None,
    system: MachineFile = None,
    winograd: Winograd = None,
    partitioner: PartitionerName = None,
    cost_model: CostModelName = None,
    objective: Objective = None,
    shape: Shapes = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="Write the plan, in JSON."),
    ] = None,
    front: Annotated[
        str | None,
        typer.Option(
            "--front",
            metavar="LIST",
            help="Show each plan that no other beats in all of these, such as latency,memory; -o "
            "writes them all, plan.1.json and so on.",
        ),
    ] = None,
    store: StoreFile = None,
    strict: Strict = False,
    json_: Json = False,
    verbose: Verbose = False,
) -> None:
    """Plans which device runs what, with the predicted schedule and a bound from below.

    Example: hetsched partition model.onnx --devices cpu:0,cpu:1 -o plan.json
    """
    _check_writable(output)
    with _Steps(verbose) as steps:
        graph = _read(model, shape, steps)
        machine = _machine(devices, system, winograd, store, steps)
        plans = api.plans(
            graph,
            machine,
            partitioner or "auto",
            objective,
            cost_model,
            store,
            strict,
            steps.begin("pricing"),
        )
    if front:
        goals = [item.strip() for item in front.split(",")]
        found = api.front(plans, goals)
        document = report.front_document(goals, found)
        for number, (_, plan) in enumerate(found, start=1):
            if output:
                path = output.with_suffix(f".{number}{output.suffix}")
                write_text(path, plan.to_json())
                document["plans"][number - 1]["file"] = str(path)
        _show(document, json_, report.front_view(document))
        return
    plan = plans[0]
    if output:
        write_text(output, plan.to_json())
    _show_plan(plan, report.plan_document(plan), json_)


@app.command(name="simulate")
def simulate_(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan file.", show_default=False)],
    system: MachineFile = None,
    json_: Json = False,
) -> None:
    """Predicts when each part of a plan runs, on its own machine or on a described one.

    Example: hetsched simulate plan.json --system faster.toml
    """
    with _of_file(plan):
        recipe = read_recipe(_text(plan))
        planned = recipe.simulate()
    if system:
        recipe = recipe.on(System.load(system))
    schedule = recipe.simulate()
    document = report.simulation_document(recipe, planned, schedule)
    _show(document, json_, report.simulation_view(document, schedule, _width()))


@app.command()
def explain(
    plan: Annotated[
        Path,
        typer.Argument(
            metavar="PLAN|PACKAGE", help="A plan file, or a package.", show_default=False
        ),
    ],
    node: Annotated[
        str | None,
        typer.Argument(metavar="NODE", help="An operation or kernel group.", show_default=False),
    ] = None,
    json_: Json = False,
) -> None:
    """Says why each node runs where it does, and what it would cost on the other devices.

    Every alternative is the same plan with that one node moved, by the plan's own prices.

    Example: hetsched explain model.hsp /layer1/conv1/Conv
    """
    chosen = _plan_of(plan)
    account = Account(chosen if isinstance(chosen, Recipe) else chosen.recipe)
    with _of_file(plan):
        found = api.explain(chosen, node)
    borders = () if node else account.borders()
    document = report.explanation_document(found, borders, account.makespan)
    _show(document, json_, report.explanation_view(document))


@app.command()
def diff(
    before: Annotated[
        Path, typer.Argument(metavar="A", help="A plan file, or a package.", show_default=False)
    ],
    after: Annotated[
        Path, typer.Argument(metavar="B", help="A plan file, or a package.", show_default=False)
    ],
    json_: Json = False,
) -> None:
    """Shows what two plans do not have in common: places, prices, order and prediction.

    Example: hetsched diff a.plan.json b.plan.json
    """
    one, other = _plan_text(before), _plan_text(after)
    with _of_file(before):
        old, facts = read_recipe(one), plan_facts(one)
    with _of_file(after):
        new, later = read_recipe(other), plan_facts(other)
    both = {name: (value, later[name]) for name, value in facts.items()}
    document = report.difference_document(difference(old, new, both))
    _show(document, json_, report.difference_view(document))


@app.command()
def schedule(
    instance: Annotated[
        Path,
        typer.Argument(metavar="INSTANCE", help="A task graph, in JSON.", show_default=False),
    ],
    scheduler: Annotated[
        str,
        typer.Option(
            "--scheduler",
            metavar="NAME",
            help="portfolio (the default) is all of the others and a search; heft, cpop, peft, "
            "lookahead, ippts, exact.",
            show_default=False,
        ),
    ] = "portfolio",
    budget: Annotated[
        float | None,
        typer.Option(
            "--budget",
            metavar="TIME",
            parser=seconds_of,
            help="How long to look for something better, such as 2s or 1m.",
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Of the search.")] = None,
    contention: Annotated[
        bool,
        typer.Option("--contention", help="Each link serves one transfer at a time."),
    ] = False,
    json_: Json = False,
) -> None:
    """Schedules any task graph, with a lower bound: no model and no machine is needed.

    docs/files.md has the form of the file.

    Example: hetsched schedule instance.json --budget 10s
    """
    options = {"seconds": budget, "seed": seed}
    given = ",".join(f"{name}={value}" for name, value in options.items() if value is not None)
    spec = scheduler + ("," if ":" in scheduler else ":") + given if given else scheduler
    found = api.schedule(instance, spec, contention)
    document = report.schedule_document(found)
    drawn = found.solution.schedule(found.problem)
    _show(document, json_, report.schedule_view(document, drawn, _width()))


@app.command(name="compile")
def compile_(
    model: Model,
    output: Annotated[
        Path,
        typer.Option(
            "-o", "--output", metavar="FILE", help="The package to write.", show_default=False
        ),
    ],
    devices: Devices = None,
    system: MachineFile = None,
    winograd: Winograd = None,
    partitioner: PartitionerName = None,
    cost_model: CostModelName = None,
    objective: Objective = None,
    shape: Shapes = None,
    plan: Annotated[
        Path | None,
        typer.Option("--plan", metavar="FILE", help="Compile this plan of the same model."),
    ] = None,
    measure: Annotated[
        bool | None,
        typer.Option(
            "--measure/--no-measure",
            help="Run a plan of several devices beside the best single one, and package what is "
            "faster; the default for auto on this machine.",
            show_default=False,
        ),
    ] = None,
    store: StoreFile = None,
    strict: Strict = False,
    json_: Json = False,
    verbose: Verbose = False,
) -> None:
    """Plans, compiles and writes one package that runs without a compiler.

    Parts that were compiled before come from the cache; HETSCHED_CACHE is its folder, or off.

    Example: hetsched compile model.onnx -o model.hsp --devices cpu:0,cpu:1
    """
    _check_writable(output)
    planning = {
        "--devices": devices,
        "--system": system,
        "--winograd": winograd,
        "--partitioner": partitioner,
        "--cost-model": cost_model,
        "--objective": objective,
        "--strict": strict,
    }
    if plan:
        _refuse(planning, "has no effect with --plan, which has it settled")
    with _Steps(verbose) as steps:
        graph = _read(model, shape, steps)
        if plan:
            with _of_file(plan):
                plans: Sequence[Plan] = [Plan.from_json(_text(plan), graph)]
        else:
            plans = api.plans(
                graph,
                _machine(devices, system, winograd, store, steps),
                partitioner or "auto",
                objective,
                cost_model,
                store,
                strict,
                steps.begin("pricing"),
            )
        if measure is None:
            measure = (
                not plan and (partitioner or "auto") == "auto" and api.is_here(plans[0].system)
            )
        compiling = steps.begin("compiling")
        # A plan that was given is compiled as it stands.
        settled = plan or strict
        replan = None if settled else api.partitioner_for(partitioner or "auto", objective)
        with api.compile(plans, measure=measure, progress=compiling, replan=replan) as executable:
            steps.begin("writing the package")
            executable.save(output)
            chosen = executable.plan
    document = report.plan_document(chosen)
    if output.is_file():
        document |= {"package": str(output), "package_nbytes": output.stat().st_size}
    _show_plan(chosen, document, json_)


@app.command()
def run(
    package: Annotated[
        Path, typer.Argument(metavar="PACKAGE", help="A compiled package.", show_default=False)
    ],
    inputs: Inputs = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="Write the output arrays, .npz."),
    ] = None,
    repeat: Annotated[int, typer.Option("--repeat", min=1, help="Runs that are timed.")] = 10,
    warmup: Annotated[int, typer.Option("--warmup", min=0, help="Runs before them.")] = 2,
    in_flight: Annotated[int, typer.Option("--in-flight", min=1, help="Runs that overlap.")] = 1,
    trace: Annotated[
        Path | None,
        typer.Option(
            "--trace",
            metavar="FILE",
            help="Write the predicted schedule and the median run as a Chrome trace.",
        ),
    ] = None,
    seed: Seed = 0,
    json_: Json = False,
    verbose: Verbose = False,
) -> None:
    """Runs a package and sets measured times beside the predicted ones.

    Example: hetsched run model.hsp -i in.npz -o out.npz --repeat 100 --trace trace.json
    """
    _check_writable(output)
    _check_writable(trace)
    with _Steps(verbose) as steps:
        steps.begin("loading")
        with hetsched.load(package) as executable:
            given = _inputs(executable.plan.original, inputs, seed)
            loop = steps.begin("running")
            for turn in range(warmup):
                loop("warm-up", turn, warmup + repeat)
                executable.run(given)
            begin = perf_counter()
            outputs, latencies, measured = _run(
                executable,
                given,
                repeat,
                in_flight,
                lambda turn: loop("timed runs", warmup + turn, warmup + repeat),
            )
            wall_seconds = perf_counter() - begin
    predicted = simulate(executable.plan)
    if output:
        write_outputs(output, outputs)
    if trace:
        write_trace(trace, [predicted, report.median_run(measured)])
    document = {
        "inputs": str(inputs) if inputs else None,
        "seed": None if inputs else seed,
        "warmup": warmup,
        "in_flight": in_flight,
        **report.run_document(predicted, measured, latencies, wall_seconds),
    }
    shown = report.median_run(measured)
    _show(document, json_, report.run_view(document, predicted, shown, _width()))


@app.command()
def verify(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="PACKAGE|MODEL", help="A package, or an ONNX model.", show_default=False
        ),
    ],
    devices: Devices = None,
    system: MachineFile = None,
    winograd: Winograd = None,
    partitioner: PartitionerName = None,
    cost_model: CostModelName = None,
    objective: Objective = None,
    shape: Shapes = None,
    inputs: Inputs = None,
    seed: Seed = 0,
    store: StoreFile = None,
    strict: Strict = False,
    json_: Json = False,
    verbose: Verbose = False,
) -> None:
    """Compares every part and the whole with ONNX Runtime, and names the first that deviates.

    Example: hetsched verify model.hsp
    """
    planning = {
        "--devices": devices,
        "--system": system,
        "--winograd": winograd,
        "--partitioner": partitioner,
        "--cost-model": cost_model,
        "--objective": objective,
        "--shape": shape,
        "--store": store,
        "--strict": strict,
    }
    packaged = _is_package(model)
    if packaged:
        _refuse(planning, "has no effect on a package, which has it settled")
    with _Steps(verbose) as steps:
        if packaged:
            executable = hetsched.load(model, whole=True)
        else:
            graph = _read(model, shape, steps)
            plan = api.partition(
                graph,
                _machine(devices, system, winograd, store, steps),
                partitioner or "auto",
                objective,
                cost_model,
                store,
                strict,
                steps.begin("pricing"),
            )
            executable = api.compile(plan, progress=steps.begin("compiling"))
        with executable:
            given = read_inputs(inputs) if inputs else None
            verification = verify_executable(executable, given, seed, steps.begin("verifying"))
    _show(verification.to_dict(), json_, report.verification_view(verification))
    verification.check()


class _Steps:
    """What is going on, on stderr: a bar on a terminal, lines if they are asked for, or nothing."""

    def __init__(self, verbose: bool) -> None:
        self._verbose = verbose
        self._bar: Progress | None = None

    def __enter__(self) -> "_Steps":
        if sys.stderr.isatty() and not self._verbose:
            # A stream of its own: stderr is elsewhere while a compiler is kept quiet.
            self._stream = os.fdopen(os.dup(sys.stderr.fileno()), "w")
            self._bar = Progress(
                SpinnerColumn(),
                TextColumn("{task.fields[stage]}", markup=False),
                BarColumn(),
                TextColumn("{task.fields[count]}", markup=False),
                TimeRemainingColumn(),
                TextColumn("{task.fields[what]}", markup=False),
                console=Console(file=self._stream),
                transient=True,
            )
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()
            self._stream.close()

    def begin(self, stage: str) -> Report:
        """Starts a stage; what it returns is told each item, its number and how many there are."""
        if self._verbose:
            _say(stage)
        if self._bar is None:
            return lambda what, done, of: (
                _say(f"{stage}: {what} ({done + 1} of {of})") if self._verbose else None
            )
        for task in list(self._bar.task_ids):
            self._bar.remove_task(task)
        bar, task = self._bar, self._bar.add_task("", total=None, stage=stage, what="", count="")
        return lambda what, done, of: bar.update(
            task, completed=done, total=of, what=what, count=f"{done}/{of}"
        )


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _complain(text: str) -> None:
    _say(f"error: {' '.join(text.split())}")


def _read(model: Path, shape: list[str] | None, steps: _Steps) -> Graph:
    shapes = shapes_of(shape or ())
    stage = steps.begin("reading the model")
    count = 0

    def told(what: str) -> None:
        nonlocal count
        count += 1
        stage(what, count - 1, count)

    return hetsched.read_onnx(model, shapes, told)


def _machine(
    devices: str | None,
    system: Path | None,
    winograd: str | None,
    store: Path | None,
    steps: _Steps,
) -> System:
    if devices and system:
        raise typer.BadParameter("give --devices or --system, not both", param_hint="'--system'")
    if system:
        return _with_winograd(System.load(system), winograd)
    steps.begin("measuring links")
    return _with_winograd(System.local(devices or "cpu", _store(store)), winograd)


def _with_winograd(system: System, winograd: str | None) -> System:
    return system if winograd is None else system.with_options("cpu", winograd=winograd)


def _store(path: Path | None) -> Store:
    return Store(path or default_path())


def _inputs(graph: Graph, path: Path | None, seed: int) -> Mapping[str, Any]:
    return read_inputs(path) if path else seeded_inputs(graph, seed)


def _run(
    executable: Executable,
    inputs: Mapping[str, Any],
    repeat: int,
    in_flight: int,
    told: Callable[[int], None],
) -> tuple[dict[str, Any], list[float], list[Schedule]]:
    """The last outputs; of each run the seconds from its submission to its result, and the times.

    At most `in_flight` runs overlap.
    """
    waiting: deque[tuple[float, Any]] = deque()
    latencies: list[float] = []
    measured: list[Schedule] = []
    outputs: dict[str, Any] = {}
    for turn in range(repeat + in_flight):
        if len(waiting) == in_flight or turn >= repeat:
            if not waiting:
                break
            start, request = waiting.popleft()
            outputs = request.result()
            latencies.append(perf_counter() - start)
            measured.append(request.schedule())
            told(len(measured))
        if turn < repeat:
            waiting.append((perf_counter(), executable.submit(inputs)))
    return outputs, latencies, measured


def _plan_of(path: Path) -> Plan | Recipe:
    """The plan of a package, or what a plan file has of one."""
    if _is_package(path):
        return hetsched.load(path).plan
    with _of_file(path):
        return read_recipe(_text(path))


def _plan_text(path: Path) -> str:
    if _is_package(path):
        return hetsched.load(path).plan.to_json()
    with _of_file(path):
        return _text(path)


def _is_package(path: Path) -> bool:
    if path.suffix == ".hsp":
        return True
    try:
        with path.open("rb") as file:
            return file.read(2) == b"PK"
    except OSError:
        # Whoever reads it will say what is wrong.
        return False


def _refuse(options: Mapping[str, object], why: str) -> None:
    for name, value in options.items():
        if value:
            raise typer.BadParameter(f"{name} {why}")


def _check_writable(path: Path | None) -> None:
    """Says before long work what would only be said after it."""
    if path is None:
        return
    if path.is_dir():
        raise OutputFileError(f"cannot write '{path}': it is a folder")
    if not path.parent.is_dir():
        raise OutputFileError(f"cannot write '{path}': '{path.parent}' is no folder")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise PlanError(str(error.strerror)) from None
    except UnicodeDecodeError:
        raise PlanError("it is not text") from None


@contextmanager
def _of_file(path: Path) -> Iterator[None]:
    """Names the file that an error of its content comes from."""
    try:
        yield
    except HetschedError as error:
        raise type(error)(f"plan file '{path}': {error}") from None


def _show_plan(plan: Plan, document: report.Document, json_: bool) -> None:
    _show(document, json_, report.plan_view(document, simulate(plan), _width()))


def _show(document: report.Document, json_: bool, view: Iterable[RenderableType]) -> None:
    if json_:
        print(json.dumps(report.finite(document), indent=1))
    else:
        console = Console(width=_width(), markup=False, highlight=False, emoji=False)
        # Rich would end the program itself when a pipe is closed.
        with console.capture() as drawn:
            for item in view:
                console.print(item)
        print(drawn.get(), end="")


def _width() -> int:
    return shutil.get_terminal_size((PLAIN_WIDTH, 24)).columns
