"""What the tables of all verbs share: columns, numbers with their units, names that fit."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from math import isfinite
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hetsched.device import Device
from hetsched.energy import energy
from hetsched.errors import DeviceError
from hetsched.plan import Recipe
from hetsched.schedule import Schedule, gantt

Document = dict[str, Any]

# Of a long list the largest are shown and the rest counted; the document has all.
MOST_ROWS = 12
# Beside the cells of a Gantt row: the device's name, two bars and the share.
GANTT_MARGIN = 14


def table(title: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> RenderableType:
    """A title and columns, numbers to the right where the head begins with `>`."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=any(heads))
    for head in heads:
        right = head.startswith(">")
        made.add_column(
            head.lstrip(">"),
            justify="right" if right else "left",
            no_wrap=right,
            overflow="fold",
            header_style="dim",
        )
    for row in rows:
        made.add_row(*row)
    return Group(Text(title, "bold"), made)


def hardware(devices: Iterable[Device]) -> Document:
    """What each device is, by its name; a report that has it ends with it."""
    return {"hardware": {device.name: device.description or "unknown" for device in devices}}


def hardware_view(document: Document) -> Iterator[RenderableType]:
    kinds: dict[str, list[str]] = {}
    for name, description in document.get("hardware", {}).items():
        kinds.setdefault(description, []).append(name)
    if kinds:
        yield ""
        yield table(
            "Hardware", ("", ""), ((", ".join(names), what) for what, names in kinds.items())
        )


def links_view(title: str, links: Sequence[Mapping[str, Any]]) -> Iterator[RenderableType]:
    if not links:
        return
    yield ""
    yield table(
        title,
        ("from", "to", ">latency us", ">GB/s"),
        (
            (
                link["source"],
                link["sink"],
                scaled(link["seconds"], 1e-6, 1),
                scaled(link["bytes_per_second"], 1e9, 1),
            )
            for link in links
        ),
    )


def transfers_view(transfers: Sequence[Mapping[str, Any]]) -> Iterator[RenderableType]:
    if not transfers:
        return
    shown = sorted(transfers, key=lambda move: -move["nbytes"])[:MOST_ROWS]
    yield ""
    yield table(
        "Transfers",
        ("tensor", "from", "to", ">kB", ">predicted us"),
        (
            (
                shortened(move["tensor"]),
                move["source"] or "host",
                move["sink"] or "host",
                scaled(move["nbytes"], 1e3, 1),
                scaled(move["finish"] - move["start"], 1e-6, 1),
            )
            for move in shown
        ),
    )
    if len(transfers) > len(shown):
        yield f"and {len(transfers) - len(shown)} smaller ones"


def gantt_view(schedule: Schedule, width: int) -> Iterator[RenderableType]:
    yield ""
    yield Text("Schedule", "bold")
    yield Text(gantt(schedule, chart_columns(schedule, width)))


def chart_columns(schedule: Schedule, width: int) -> int:
    """The columns that are left for the bars of a chart."""
    widest = max((len(device) for device in schedule.devices), default=0)
    return max(20, min(72, width - widest - GANTT_MARGIN))


def shortened(name: str, width: int = 40) -> str:
    """A name that fits in a column: of a longer one both ends, which tell it from its like.

    Examples
    --------
    >>> shortened("model/block_1/conv/weight", 15)
    'model/b…/weight'
    """
    if len(name) <= width:
        return name
    half = (width - 1) // 2
    return f"{name[: width - 1 - half]}…{name[-half:]}"


def what_of(label: str) -> str:
    """The label without the count of operations, which has a column of its own."""
    return shortened(label.rpartition(" (")[0] or label)


def scaled(value: float | None, unit: float, digits: int) -> str:
    if value is None:
        return "-"
    return f"{value / unit:.{digits}f}" if isfinite(value) else "unlimited"


def values_of(record: Device | Any) -> Document:
    return {f.name: getattr(record, f.name) for f in fields(record)}


def finite(value: Any) -> Any:
    """The value with null for what JSON has no number for."""
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def energy_document(recipe: Recipe) -> Document | None:
    """Joules of each device and link with their source, or None where nobody has said watts."""
    try:
        found = energy(recipe)
    except DeviceError:
        return None
    return {
        "joules": found.joules,
        "joule_seconds": found.delay_product,
        "uses": [values_of(use) for use in found.uses],
    }


def energy_view(document: Document | None) -> Iterator[RenderableType]:
    if document is None:
        return
    yield ""
    yield table(
        "Energy of one run, predicted",
        ("device or link", ">mJ", ">of it idle mJ", "by"),
        (
            (
                use["name"],
                scaled(use["joules"], 1e-3, 3),
                scaled(use["idle_joules"], 1e-3, 3),
                use["source"],
            )
            for use in document["uses"]
        ),
    )
    yield (
        f"{scaled(document['joules'], 1e-3, 3)} mJ together, energy-delay product "
        f"{scaled(document['joule_seconds'], 1e-6, 3)} uJ s"
    )
