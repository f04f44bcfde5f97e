"""What `hetsched profile` shows."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import RenderableType

from hetsched.api import Profiled
from hetsched.report.tables import Document, links_view, scaled, table, values_of
from hetsched.system import System


def profile_document(rows: Sequence[Profiled], system: System, store: str) -> Document:
    return {
        "store": store,
        "already": sum(row.already for row in rows),
        "measured": sum(row.sample is not None and not row.already for row in rows),
        "missing": sum(row.missing for row in rows),
        "kernels": [
            {
                "kinds": row.kinds,
                "groups": list(row.groups),
                "devices": list(row.devices),
                "flops": row.flops,
                "seconds": row.sample.seconds if row.sample else None,
                "spread_seconds": row.sample.spread if row.sample else None,
                "flops_per_second": row.flops / row.sample.seconds if row.sample else None,
                "already": row.already,
                "refusal": row.refusal or None,
            }
            for row in rows
        ],
        "links": [values_of(link) for link in system.links],
    }


def profile_view(document: Document) -> Iterator[RenderableType]:
    def state(row: Mapping[str, Any]) -> str:
        if row["refusal"]:
            return f"cannot run: {row['refusal']}"
        if row["seconds"] is None:
            return "not measured"
        return "in the store already" if row["already"] else "measured now"

    yield table(
        "Kernel groups",
        ("kinds", ">groups", "devices", ">ms", ">spread ms", ">GFLOP/s", "state"),
        (
            (
                row["kinds"],
                str(len(row["groups"])),
                " ".join(row["devices"]),
                scaled(row["seconds"], 1e-3, 4),
                scaled(row["spread_seconds"], 1e-3, 4),
                scaled(row["flops_per_second"], 1e9, 2),
                state(row),
            )
            for row in document["kernels"]
        ),
    )
    yield from links_view("Links", document["links"])
    yield ""
    yield (
        f"{document['measured']} measured now, {document['already']} in the store already, "
        f"{document['missing']} missing; store {document['store']}"
    )
