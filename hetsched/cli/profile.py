"""The verb `profile`."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from hetsched import api
from hetsched.cli.given import check_writable, read_model, refuse, store_of, with_winograd
from hetsched.cli.options import (
    Devices,
    Json,
    Shapes,
    StoreFile,
    Verbose,
    Winograd,
    seconds_of,
)
from hetsched.cli.progress import Steps
from hetsched.cli.show import show
from hetsched.errors import LimitExceeded
from hetsched.files import write_text
from hetsched.frontend.load import parse
from hetsched.quality import page, quality
from hetsched.report.profile import profile_document, profile_view, store_document, store_view
from hetsched.report.tables import hardware
from hetsched.store import Store
from hetsched.system import System


def profile(
    models: Annotated[
        list[Path] | None,
        typer.Argument(metavar="MODEL...", help="ONNX models.", show_default=False),
    ] = None,
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
    merge: Annotated[
        list[Path] | None,
        typer.Option(
            "--merge",
            metavar="FILE",
            help="First add what another profile store has; the better sample stays; repeatable.",
        ),
    ] = None,
    show_: Annotated[
        bool, typer.Option("--show", help="Measure nothing; show what the store has.")
    ] = False,
    device: Annotated[
        str | None,
        typer.Option("--device", metavar="TEXT", help="With --show: devices with this in them."),
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option("--kind", metavar="TEXT", help="With --show: kernels with this in them."),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            "--report",
            metavar="FILE",
            help="Measure nothing; write how good the prices are as one page of HTML: predicted "
            "against measured, errors, repeatability, what to measure next.",
        ),
    ] = None,
    json_: Json = False,
    verbose: Verbose = False,
) -> None:
    """Measures the kernel groups of models and the links into the profile store.

    Groups that are alike are measured once, again and again until their times are known to 2 %;
    what counts most comes first. After an interruption the same command goes on.

    Example: hetsched profile model.onnx --devices cpu:0,cpu:1 --budget 10m
    """
    kept = store_of(store)
    if not show_:
        refuse({"--device": device, "--kind": kind}, "is for --show")
    elif models:
        raise typer.BadParameter("--show measures nothing; give no model")
    elif report:
        raise typer.BadParameter("--show and --report are two things; give one")
    if report and models:
        raise typer.BadParameter("--report measures nothing; give no model")
    check_writable(report)
    if not models and not merge and not show_ and not report:
        wanted = "give a model, --show, --report or --merge"
        raise typer.BadParameter(wanted, param_hint="'MODEL...'")
    counts = [kept.merge(Store(path)) for path in merge or ()]
    if models:
        _measure(models, devices, winograd, shape, kept, budget, json_, verbose)
    elif report:
        with Steps(verbose) as steps:
            steps.begin("predicting each kernel from the others")
            found = quality(kept)
        write_text(report, page(found))
        document = {
            "store": str(kept.path),
            "report": str(report),
            "kernels": len(found.points),
            "residuals": len(found.residuals),
            "skipped": list(found.skipped),
        }
        lines = [f"{len(found.points)} kernels and {len(found.residuals)} runs of plans: {report}"]
        show(document, json_, [*lines, *(f"left out: {text}" for text in found.skipped)])
    elif show_:
        document = store_document(kept, device, kind)
        show(document, json_, store_view(document))
    else:
        added = {name: sum(count[name] for count in counts) for name in counts[0]}
        told = ", ".join(f"{count} {name}s" for name, count in added.items() if count)
        show({"store": str(kept.path), "added": added}, json_, [f"added {told or 'nothing'}"])


def _measure(
    models: list[Path],
    devices: str | None,
    winograd: str | None,
    shape: list[str] | None,
    kept: Store,
    budget: float | None,
    json_: bool,
    verbose: bool,
) -> None:
    with Steps(verbose) as steps:
        # By the names of the files: models of one framework often have one name.
        graphs = [
            replace(read_model(model, shapes, steps), name=model.stem)
            for model, shapes in zip(models, _shapes_by_model(models, shape), strict=True)
        ]
        steps.begin("measuring links")
        system = with_winograd(System.local(devices or "cpu", kept), winograd)
        limit = budget if budget is not None else float("inf")
        profiling = api.profile(graphs, system, kept.path, limit, steps.begin("profiling"))
    document = profile_document(profiling, str(kept.path), budget)
    document |= hardware(system.devices)
    show(document, json_, profile_view(document))
    if document["missing"]:
        raise LimitExceeded(
            f"the budget was spent with {document['missing']} of {len(profiling.rows)} kernels "
            "not measured; run the command again to go on"
        )


def _shapes_by_model(models: list[Path], shapes: list[str] | None) -> list[list[str]]:
    """The shapes of each model: of several models, those of the inputs that it has."""
    if len(models) == 1:
        return [shapes or []]
    found = []
    for model in models:
        names = {value.name for value in parse(model)[0].graph.input} if shapes else set()
        found.append([text for text in shapes or () if text.rpartition("=")[0] in names])
    for text in shapes or ():
        if not any(text in own for own in found):
            raise typer.BadParameter(f"no model has an input for '{text}'", param_hint="'--shape'")
    return found
