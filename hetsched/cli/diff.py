"""The verb `diff`."""

from pathlib import Path
from typing import Annotated

import typer

from hetsched.cli.given import naming_file, plan_text
from hetsched.cli.options import Json
from hetsched.cli.show import show
from hetsched.explain import difference
from hetsched.plan import read_recipe_and_facts
from hetsched.report.diff import difference_document, difference_view
from hetsched.report.tables import hardware


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
    one, other = plan_text(before), plan_text(after)
    with naming_file(before):
        old, facts = read_recipe_and_facts(one)
    with naming_file(after):
        new, later = read_recipe_and_facts(other)
    both = {name: (value, later[name]) for name, value in facts.items()}
    document = difference_document(difference(old, new, both))
    document |= hardware((*old.tasks.system.devices, *new.tasks.system.devices))
    show(document, json_, difference_view(document))
