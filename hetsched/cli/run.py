"""The verb `run`."""

from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import typer

import hetsched
from hetsched.api import as_here
from hetsched.calibration import calibrate
from hetsched.cli.given import check_writable, fallbacks_of, inputs_of
from hetsched.cli.options import Fallback, Inputs, Json, Seed, Verbose
from hetsched.cli.progress import Steps
from hetsched.cli.show import show, terminal_width
from hetsched.executable import Executable
from hetsched.inputs import write_outputs
from hetsched.plan import simulate
from hetsched.report.run import median_run, run_document, run_view
from hetsched.report.tables import hardware
from hetsched.schedule import Schedule
from hetsched.store import Store, default_path
from hetsched.trace import write_trace


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
    in_flight: Annotated[
        int,
        typer.Option(
            "--in-flight", min=0, help="Runs that overlap; 0: as many as keep all devices busy."
        ),
    ] = 1,
    trace: Annotated[
        Path | None,
        typer.Option(
            "--trace",
            metavar="FILE",
            help="Write the predicted schedule and the median run as a Chrome trace.",
        ),
    ] = None,
    fallback: Fallback = False,
    seed: Seed = 0,
    json_: Json = False,
    verbose: Verbose = False,
) -> None:
    """Runs a package and sets measured times beside the predicted ones.

    Example: hetsched run model.hsp -i in.npz -o out.npz --repeat 100 --trace trace.json
    """
    check_writable(output)
    check_writable(trace)
    told = fallbacks_of(fallback)
    with Steps(verbose) as steps:
        steps.begin("loading")
        with hetsched.load(package, fallback=told) as executable:
            given = inputs_of(executable.plan.original, inputs, seed)
            loop = steps.begin("running")
            for turn in range(warmup):
                loop("warm-up", turn, warmup + repeat)
                executable.run(given)
            overlap = in_flight or executable.most_in_flight
            while True:
                before = len(told or ())
                begin = perf_counter()
                outputs, latencies, measured = run_repeatedly(
                    executable,
                    given,
                    repeat,
                    overlap,
                    lambda turn: loop("timed runs", warmup + turn, warmup + repeat),
                )
                wall_seconds = perf_counter() - begin
                if executable.plan.modelled:
                    # The simulators' own time is no time of the devices'.
                    latencies = [schedule.makespan for schedule in measured]
                    wall_seconds = sum(latencies)
                # Times are those of one plan.
                if len(told or ()) == before:
                    break
    predicted = simulate(executable.plan)
    if output:
        write_outputs(output, outputs)
    devices = as_here(executable.plan)
    if trace:
        write_trace(trace, [predicted, median_run(measured)], devices)
    # Runs that overlap wait for each other.
    drifts = calibrate(executable.plan, measured, Store(default_path())) if overlap == 1 else ()
    document = {
        "inputs": str(inputs) if inputs else None,
        "seed": None if inputs else seed,
        "warmup": warmup,
        "in_flight": overlap,
        **run_document(predicted, measured, latencies, wall_seconds),
        "drift": list(drifts),
        "fallback": told or [],
        **hardware(devices),
    }
    shown = median_run(measured)
    show(document, json_, run_view(document, predicted, shown, terminal_width()))


def run_repeatedly(
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
