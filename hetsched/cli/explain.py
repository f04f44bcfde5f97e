"""The verb `explain`."""

from pathlib import Path
from typing import Annotated

import typer

from hetsched import api
from hetsched.calibration import History, histories
from hetsched.cli.given import naming_file, plan_of, plan_text, store_of
from hetsched.cli.options import Json, StoreFile
from hetsched.cli.show import show
from hetsched.explain import Account
from hetsched.plan import Recipe, read_recipe_and_facts
from hetsched.report.explain import explanation_document, explanation_view


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
    store: StoreFile = None,
    json_: Json = False,
) -> None:
    """Says why each node runs where it does, and what it would cost on the other devices.

    Every alternative is the same plan with that one node moved, by the plan's own prices. What
    earlier runs of the model on these devices took is held against what was predicted, as far as
    the profile store has them.

    Example: hetsched explain model.hsp /layer1/conv1/Conv
    """
    chosen = plan_of(plan)
    recipe = chosen if isinstance(chosen, Recipe) else chosen.recipe
    account = Account(recipe)
    with naming_file(plan):
        found = api.explain(chosen, node)
    borders = () if node else account.borders()
    kept = store_of(store)
    past: tuple[History, ...] = ()
    if node is None and kept.path.is_file():
        with naming_file(plan):
            _, facts = read_recipe_and_facts(plan_text(plan))
        past = histories(facts["graph"], recipe.devices, kept)
    document = explanation_document(found, borders, account.makespan, recipe, past)
    show(document, json_, explanation_view(document))
