"""What `hetsched schedule` shows."""

from collections.abc import Iterator

from rich.console import RenderableType
from rich.text import Text

from hetsched.api import Scheduled
from hetsched.report.tables import Document, chart_columns
from hetsched.schedule import Schedule, gantt


def schedule_document(found: Scheduled) -> Document:
    """What a scheduler found for an instance."""
    solution = found.solution
    return {
        "makespan": solution.makespan,
        "lower_bound": solution.lower_bound,
        "optimal": solution.optimal,
        "slots": [vars(slot) | {} for slot in solution.schedule(found.problem).slots],
        "solver": solution.solver,
        "wall_seconds": found.wall_seconds,
        "history": [vars(moment) | {} for moment in solution.history],
    }


def schedule_view(document: Document, schedule: Schedule, width: int) -> Iterator[RenderableType]:
    yield Text(gantt(schedule, chart_columns(schedule, width)))
    yield ""
    gap = 1 - document["lower_bound"] / document["makespan"] if document["makespan"] else 0.0
    proof = "proved optimal" if document["optimal"] else f"gap {gap * 100:.2f} %"
    yield f"makespan     {document['makespan']:.9g} s"
    yield f"lower bound  {document['lower_bound']:.9g} s, {proof}"
    yield f"found by     {document['solver']} in {document['wall_seconds']:.3f} s"
