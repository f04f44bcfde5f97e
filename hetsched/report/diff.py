"""What `hetsched diff` shows."""

from collections.abc import Iterator

from rich.console import RenderableType

from hetsched.explain import Difference
from hetsched.report.tables import MOST_ROWS, Document, hardware_view, scaled, shortened, table


def difference_document(found: Difference) -> Document:
    """What two plans do not have in common."""
    return {
        "same": found.empty,
        "makespan_seconds": list(found.makespans),
        "parts": list(found.parts),
        "facts": {name: list(pair) for name, pair in found.facts.items()},
        "moves": [vars(move) | {} for move in found.moves],
        "only_before": list(found.only_before),
        "only_after": list(found.only_after),
        "repriced": [
            {"node": node, "device": device, "before_seconds": old, "after_seconds": new}
            for node, device, old, new in found.repriced
        ],
        "order_changed": found.order_changed,
    }


def difference_view(document: Document) -> Iterator[RenderableType]:
    before, after = document["makespan_seconds"]
    if document["same"]:
        yield "the plans are the same"
    elif facts := {
        **document["facts"],
        "parts": list(map(str, document["parts"])),
        "predicted ms": [scaled(before, 1e-3, 3), scaled(after, 1e-3, 3)],
    }:
        rows = ((name, *pair) for name, pair in facts.items() if pair[0] != pair[1])
        yield table("Plans", ("", "before", "after"), rows)
    if moves := document["moves"]:
        yield ""
        yield table(
            "Nodes that moved",
            ("node", "from", "to", ">before us", ">after us"),
            (
                (
                    shortened(move["node"]),
                    move["before"],
                    move["after"],
                    scaled(move["before_seconds"], 1e-6, 1),
                    scaled(move["after_seconds"], 1e-6, 1),
                )
                for move in moves
            ),
        )
    for title, key in (("Only before", "only_before"), ("Only after", "only_after")):
        if document[key]:
            yield ""
            yield table(title, ("",), ((shortened(name, 90),) for name in document[key]))
    if rows := document["repriced"]:
        yield ""
        yield table(
            "Prices that changed",
            ("node", "device", ">before us", ">after us"),
            (
                (
                    shortened(row["node"]),
                    row["device"],
                    scaled(row["before_seconds"], 1e-6, 1),
                    scaled(row["after_seconds"], 1e-6, 1),
                )
                for row in sorted(
                    rows, key=lambda row: -abs(row["after_seconds"] - row["before_seconds"])
                )[:MOST_ROWS]
            ),
        )
        if len(rows) > MOST_ROWS:
            yield f"and {len(rows) - MOST_ROWS} with smaller changes"
    if document["order_changed"]:
        yield ""
        yield "the nodes that both have come in another order"
    yield from hardware_view(document)
