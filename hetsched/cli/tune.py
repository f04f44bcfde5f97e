"""The verb `tune`."""

from typing import Annotated

import typer

from hetsched import api
from hetsched.cli.given import machine_of, read_model
from hetsched.cli.options import Devices, Json, Model, Shapes, Verbose, Winograd, seconds_of
from hetsched.cli.progress import Steps
from hetsched.cli.show import show
from hetsched.errors import LimitExceeded
from hetsched.report.tables import hardware
from hetsched.report.tune import tuning_document, tuning_view
from hetsched.store import default_path


def tune(
    model: Model,
    devices: Devices = None,
    winograd: Winograd = None,
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
    with Steps(verbose) as steps:
        graph = read_model(model, shape, steps)
        system = machine_of(devices, None, winograd, None, steps)
        tuning = api.tune(
            graph,
            system,
            tuner,
            trials or (64 if tuner == "metaschedule" else 4),
            budget if budget is not None else float("inf"),
            steps.begin("tuning"),
        )
    document = tuning_document(tuning, str(default_path())) | hardware(system.devices)
    show(document, json_, tuning_view(document))
    if not tuning.whole:
        raise LimitExceeded("the budget was spent; run the command again to go on")
