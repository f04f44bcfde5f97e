"""What `hetsched explain` shows."""

from collections.abc import Iterator, Sequence

from rich.console import RenderableType
from rich.text import Text

from hetsched.calibration import History
from hetsched.explain import Border, Explanation
from hetsched.plan import Recipe
from hetsched.report.tables import (
    Document,
    energy_document,
    energy_view,
    hardware,
    hardware_view,
    scaled,
    shortened,
    table,
)


def explanation_document(
    found: Sequence[Explanation],
    borders: Sequence[Border],
    makespan: float,
    recipe: Recipe,
    past: Sequence[History] = (),
) -> Document:
    """Nodes with their alternatives, why each part is a part, energy, and earlier runs."""
    return {
        "makespan_seconds": makespan,
        "nodes": [
            {
                "node": item.node,
                "part": item.part,
                "device": item.device,
                "reason": item.reason,
                "alternatives": [vars(other) | {} for other in item.alternatives],
            }
            for item in found
        ],
        "parts": [vars(border) | {} for border in borders],
        "energy": energy_document(recipe),
        "slowdown": recipe.tasks.system.slowdown,
        "history": [
            {
                "device": history.device or None,
                "runs": len(history.residuals),
                "predicted_seconds": history.residuals[-1].predicted,
                "measured_seconds": history.residuals[-1].measured,
                "ratio": history.ratio,
                "measured_at": history.residuals[-1].measured_at,
                "drift": history.drift,
            }
            for history in past
        ],
        **hardware(recipe.tasks.system.devices),
    }


def explanation_view(document: Document) -> Iterator[RenderableType]:
    if len(document["nodes"]) == 1:
        (node,) = document["nodes"]
        yield Text(node["node"], "bold")
        yield f"in {node['part']} on {node['device']}: {node['reason']}"
        yield ""
        yield _alternatives(node)
        yield from hardware_view(document)
        return
    yield table(
        "Nodes",
        ("node", "part", "device", ">there us", ">transfers us", "why"),
        (
            (
                shortened(node["node"]),
                node["part"],
                node["device"],
                scaled(chosen["seconds"], 1e-6, 1),
                scaled(chosen["transfer_seconds"], 1e-6, 1),
                node["reason"],
            )
            for node in document["nodes"]
            for chosen in node["alternatives"]
            if chosen["device"] == node["device"]
        ),
    )
    yield ""
    yield table(
        "Parts, and why each begins where it does",
        ("part", "device", "first", "why"),
        (
            (part["part"], part["device"], shortened(part["first"]), part["reason"])
            for part in document["parts"]
        ),
    )
    yield from energy_view(document["energy"])
    yield from _history_view(document["history"])
    yield ""
    if document["slowdown"] > 1.0:
        yield f"while all devices compute, each takes {document['slowdown']:.2f} x its price"
    yield (
        f"predicted {scaled(document['makespan_seconds'], 1e-3, 3)} ms; "
        "name a node to see what it would cost on each device"
    )
    yield from hardware_view(document)


def _history_view(history: Sequence[Document]) -> Iterator[RenderableType]:
    if not history:
        return
    yield ""
    yield table(
        "Runs before, and what was predicted for them",
        ("of", ">times", ">predicted ms", ">measured ms", ">off", ">off, median", "last"),
        (
            (
                f"parts on {row['device']}" if row["device"] else "this model here",
                str(row["runs"]),
                scaled(row["predicted_seconds"], 1e-3, 3),
                scaled(row["measured_seconds"], 1e-3, 3),
                f"{row['predicted_seconds'] / row['measured_seconds'] - 1:+.1%}",
                f"{1 / row['ratio'] - 1:+.1%}",
                row["measured_at"][:16],
            )
            for row in history
        ),
    )
    for row in history:
        if row["drift"]:
            yield f"'{row['device']}' drifts: its parts took {row['drift']}; measure it again"


def _alternatives(node: Document) -> RenderableType:
    return table(
        "Alternatives",
        ("device", ">alone us", ">transfers us", ">whole run us", ""),
        (
            (
                item["device"],
                scaled(item["seconds"], 1e-6, 1),
                scaled(item["transfer_seconds"], 1e-6, 1),
                "-" if item["change"] is None else f"{item['change'] * 1e6:+.1f}",
                "chosen"
                if item["device"] == node["device"]
                else item["refusal"] or item["obstacle"],
            )
            for item in node["alternatives"]
        ),
    )
