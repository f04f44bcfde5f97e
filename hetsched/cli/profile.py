"""The verb `profile`."""

from typing import Annotated

import typer

from hetsched import api
from hetsched.cli.given import read_model, store_of, with_winograd
from hetsched.cli.options import (
    Devices,
    Json,
    Model,
    Shapes,
    StoreFile,
    Verbose,
    Winograd,
    seconds_of,
)
from hetsched.cli.progress import Steps
from hetsched.cli.show import show
from hetsched.errors import LimitExceeded
from hetsched.report.profile import profile_document, profile_view
from hetsched.system import System


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
    kept = store_of(store)
    with Steps(verbose) as steps:
        graph = read_model(model, shape, steps)
        steps.begin("measuring links")
        system = with_winograd(System.local(devices or "cpu", kept), winograd)
        limit = budget if budget is not None else float("inf")
        rows = api.profile(graph, system, kept.path, limit, steps.begin("profiling"))
    document = profile_document(rows, system, str(kept.path))
    show(document, json_, profile_view(document))
    if document["missing"]:
        raise LimitExceeded(
            f"the budget was spent with {document['missing']} of {len(rows)} kernels not measured; "
            "run the command again to go on"
        )
