"""What `hetsched tune` shows."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import RenderableType

from hetsched.api import Tuning
from hetsched.report.tables import Document, hardware_view, scaled, table

# Of a candidate's text in a table; longer are traces of schedules.
LONGEST_CANDIDATE = 40


def tuning_document(tuning: Tuning, store: str) -> Document:
    return {
        "store": store,
        "whole": tuning.whole,
        "kernels": [
            {
                "workload": row.workload,
                "devices": list(row.devices),
                "candidates": [
                    {"candidate": trial.candidate, "seconds": trial.seconds}
                    for trial in sorted(row.trials, key=lambda trial: trial.place)
                ],
                "first_seconds": row.first.seconds,
                "chosen": row.chosen.candidate,
                "chosen_seconds": row.chosen.seconds,
                "already": row.already,
            }
            for row in tuning.rows
        ],
    }


def tuning_view(document: Document) -> Iterator[RenderableType]:
    rows = document["kernels"]

    def told(row: Mapping[str, Any]) -> str:
        if row["chosen_seconds"] == row["first_seconds"]:
            return "the first"
        return row["chosen"] if len(row["chosen"]) <= LONGEST_CANDIDATE else "a trace"

    yield table(
        "Kernels",
        ("workload", "devices", ">tried", ">first us", ">chosen us", ">gain", "chosen"),
        (
            (
                row["workload"],
                " ".join(row["devices"]),
                str(len(row["candidates"])),
                scaled(row["first_seconds"], 1e-6, 1),
                scaled(row["chosen_seconds"], 1e-6, 1),
                f"{row['first_seconds'] / row['chosen_seconds']:.2f}x",
                told(row),
            )
            for row in rows
        ),
    )
    changed = sum(row["chosen_seconds"] != row["first_seconds"] for row in rows)
    already = sum(row["already"] for row in rows)
    yield ""
    yield (
        f"{changed} of {len(rows)} kernels are computed in another way from now on, {already} were "
        f"tried before; store {document['store']}"
    )
    yield from hardware_view(document)
