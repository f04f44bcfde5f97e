"""The verb `schedule`."""

from pathlib import Path
from typing import Annotated

import typer

from hetsched import api
from hetsched.cli.options import Json, seconds_of
from hetsched.cli.progress import Steps
from hetsched.cli.show import show, terminal_width
from hetsched.report.schedule import schedule_document, schedule_view


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

    docs/files.md has the form of the file. With --json also when makespan and bound got better.

    Example: hetsched schedule instance.json --budget 10s
    """
    options = {"seconds": budget, "seed": seed}
    given = ",".join(f"{name}={value}" for name, value in options.items() if value is not None)
    spec = scheduler + ("," if ":" in scheduler else ":") + given if given else scheduler
    with Steps(verbose=False) as steps:
        steps.begin("scheduling; the first time ever its loops are compiled for some seconds")
        found = api.schedule(instance, spec, contention)
    document = schedule_document(found)
    drawn = found.solution.schedule(found.problem)
    show(document, json_, schedule_view(document, drawn, terminal_width()))
