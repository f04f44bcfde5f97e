"""What `hetsched devices` shows."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from hetsched.api import Found
from hetsched.meters import Meter, Unreadable
from hetsched.report.tables import Document, links_view, scaled, table, values_of
from hetsched.system import Link, System


def devices_document(
    found: Sequence[Found],
    system: System | None,
    meters: Sequence[Meter | Unreadable] = (),
    copies: Sequence[Link] = (),
) -> Document:
    """What is here, what is not and why, the links of `system`, and what counts energy.

    `copies` are its links as they would be by copy, where memory is shared.
    """
    links = system.links if system else ()
    return {
        "system": system.name if system else None,
        "devices": [values_of(item.device) for item in found if item.device],
        "absent": [{"name": item.name, "reason": item.reason} for item in found if not item.device],
        "links": [values_of(link) for link in links],
        "links_by_copy": [values_of(link) for link in copies],
        "meters": [
            {
                "name": meter.name,
                "source": meter.source,
                "reason": meter.reason if isinstance(meter, Unreadable) else None,
            }
            for meter in meters
        ],
    }


def devices_view(document: Document) -> Iterator[RenderableType]:
    devices = document["devices"]
    yield table(
        "Devices",
        ("device", "target", "kind", "cores", ">clock GHz", ">memory GiB", ">GFLOP/s", ">GB/s"),
        (
            (
                device["name"],
                device["target"],
                device["kind"],
                _ranges(device["cores"]),
                scaled(device["clock_hz"], 1e9, 2),
                scaled(device["memory_bytes"], 2**30, 1),
                scaled(device["flops_per_second"], 1e9, 0),
                scaled(device["bytes_per_second"], 1e9, 0),
            )
            for device in devices
        ),
    )
    yield Text(
        "GFLOP/s and GB/s are peaks estimated from clock and vector width, not measured", "dim"
    )
    hardware: dict[tuple[str, ...], list[str]] = {}
    for device in devices:
        caches = " + ".join(_size(nbytes) for nbytes in device["cache_nbytes"]) or "unknown"
        key = (
            *(device["description"] or "unknown", device["isa"] or "unknown"),
            *(caches, _groups(device)),
        )
        hardware.setdefault(key, []).append(device["name"])
    for (description, isa, caches, groups), names in hardware.items():
        yield ""
        about = [
            ("devices", ", ".join(names)),
            ("processor", description),
            ("instructions", isa),
            ("caches of a core", caches),
        ]
        yield table("Hardware", ("", ""), [*about, ("work-groups", groups)] if groups else about)
    yield from links_view("Links, measured", document["links"])
    yield from links_view(
        "The same by copy, which nothing does where memory is shared", document["links_by_copy"]
    )
    yield ""
    if document["meters"]:
        yield table(
            "Meters of energy",
            ("of", "by", ""),
            (
                (meter["name"], meter["source"], meter["reason"] or "readable")
                for meter in document["meters"]
            ),
        )
    else:
        yield Text(
            "No meter of energy is here (RAPL, NVML, INA sensors): watts are the machine file's",
            "dim",
        )
    if document["absent"]:
        yield ""
        absent = ((item["name"], item["reason"]) for item in document["absent"])
        yield table("Not here", ("target", "why"), absent)


def _groups(device: Mapping[str, Any]) -> str:
    """The limits of a device that runs work-groups."""
    if not device["compute_units"]:
        return ""
    units = device["compute_units"]
    return (
        f"{units} compute unit{'s' if units > 1 else ''}, groups of at most "
        f"{device['group_items']} work-items with {_size(device['local_nbytes'])} in common"
    )


def _size(nbytes: int) -> str:
    for unit, name in ((2**20, "MiB"), (2**10, "KiB")):
        if nbytes >= unit:
            return f"{nbytes / unit:g} {name}"
    return f"{nbytes} B"


def _ranges(cores: Sequence[int]) -> str:
    """Cores as in `0-3,8`."""
    runs: list[list[int]] = []
    for core in cores:
        if runs and runs[-1][-1] + 1 == core:
            runs[-1].append(core)
        else:
            runs.append([core])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
