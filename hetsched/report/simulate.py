"""What `hetsched simulate` shows."""

from collections.abc import Iterator

from rich.console import RenderableType

from hetsched.plan import Recipe
from hetsched.report.tables import (
    Document,
    energy_document,
    energy_view,
    gantt_view,
    hardware,
    hardware_view,
    scaled,
    table,
    transfers_view,
    what_of,
)
from hetsched.schedule import Schedule


def simulation_document(recipe: Recipe, planned: Schedule, schedule: Schedule) -> Document:
    """The schedule on the machine of `recipe`, beside that on the machine it was planned for."""
    return {
        "system": recipe.tasks.system.name,
        "makespan_seconds": schedule.makespan,
        "planned_seconds": planned.makespan,
        "parts": [
            {
                "name": name,
                "device": device,
                "label": recipe.labels.get(name, ""),
                "groups": len(members),
                "planned_seconds": planned.slot(name).seconds,
                "predicted_seconds": schedule.slot(name).seconds,
            }
            for name, device, members in recipe.parts
        ],
        "energy": energy_document(recipe),
        "predicted": schedule.to_dict(),
        **hardware(recipe.tasks.system.devices),
    }


def simulation_view(document: Document, schedule: Schedule, width: int) -> Iterator[RenderableType]:
    yield table(
        f"Parts on {document['system']}",
        ("part", "device", "what", ">as planned ms", ">predicted ms"),
        (
            (
                part["name"],
                part["device"],
                what_of(part["label"]),
                scaled(part["planned_seconds"], 1e-3, 3),
                scaled(part["predicted_seconds"], 1e-3, 3),
            )
            for part in document["parts"]
        ),
    )
    yield from transfers_view(document["predicted"]["transfers"])
    yield from energy_view(document["energy"])
    yield from gantt_view(schedule, width)
    yield ""
    yield (
        f"predicted {scaled(document['makespan_seconds'], 1e-3, 3)} ms; "
        f"as planned {scaled(document['planned_seconds'], 1e-3, 3)} ms"
    )
    yield from hardware_view(document)
