"""The verb `simulate`."""

from pathlib import Path
from typing import Annotated

import typer

from hetsched.cli.given import naming_file, text_of
from hetsched.cli.options import Json, MachineFile
from hetsched.cli.show import show, terminal_width
from hetsched.plan import read_recipe
from hetsched.report.simulate import simulation_document, simulation_view
from hetsched.system import System


def simulate_(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan file.", show_default=False)],
    system: MachineFile = None,
    json_: Json = False,
) -> None:
    """Predicts when each part of a plan runs, on its own machine or on a described one.

    Example: hetsched simulate plan.json --system faster.toml
    """
    with naming_file(plan):
        recipe = read_recipe(text_of(plan))
        planned = recipe.simulate()
    if system:
        recipe = recipe.on(System.load(system))
    schedule = recipe.simulate()
    document = simulation_document(recipe, planned, schedule)
    show(document, json_, simulation_view(document, schedule, terminal_width()))
