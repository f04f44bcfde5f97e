"""Documents on stdout, as JSON or as tables."""

import json
import shutil
from collections.abc import Iterable

from rich.console import Console, RenderableType

from hetsched.plan import Plan, simulate
from hetsched.report.plan import plan_view
from hetsched.report.tables import Document, finite

# Of a table that goes to a file or a pipe.
PLAIN_WIDTH = 100


def show_plan(plan: Plan, document: Document, json_: bool) -> None:
    show(document, json_, plan_view(document, simulate(plan), terminal_width()))


def show(document: Document, json_: bool, view: Iterable[RenderableType]) -> None:
    if json_:
        print(json.dumps(finite(document), indent=1))
    else:
        console = Console(width=terminal_width(), markup=False, highlight=False, emoji=False)
        # Rich would end the program itself when a pipe is closed.
        with console.capture() as drawn:
            for item in view:
                console.print(item)
        print(drawn.get(), end="")


def terminal_width() -> int:
    return shutil.get_terminal_size((PLAIN_WIDTH, 24)).columns
