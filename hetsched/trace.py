"""A schedule as a trace that ui.perfetto.dev and chrome://tracing open."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hetsched.device import Device
from hetsched.files import write_text
from hetsched.schedule import Schedule

MICROSECONDS = 1e6


def trace(schedules: Sequence[Schedule], devices: Iterable[Device] = ()) -> dict[str, Any]:
    """Chrome trace events: a process for each schedule, a track for each device and link.

    The tracks of `devices` also say what these are. Predicted and measured stand one below the
    other on the same time axis.

    References
    ----------
    "Trace Event Format", Google, https://chromium.googlesource.com/catapult (docs)
    """
    events: list[dict[str, Any]] = []
    shown = {item.name: f"{item.name}, {item.description}" for item in devices if item.description}
    for process, schedule in enumerate(schedules, start=1):
        events.append(_named("process_name", process, 0, schedule.clock))
        links = [f"{m.source or 'host'} -> {m.sink or 'host'}" for m in schedule.transfers]
        tracks = {name: i for i, name in enumerate(dict.fromkeys([*schedule.devices, *links]), 1)}
        events += [
            _named("thread_name", process, track, shown.get(name, name))
            for name, track in tracks.items()
        ]
        for slot in schedule.slots:
            label = schedule.labels.get(slot.task, "")
            arguments = {"label": label, "device": slot.device, "clock": schedule.clock}
            where = process, tracks[slot.device]
            events.append(_slice(slot.task, *where, slot.start, slot.seconds, arguments))
        for link, move in zip(links, schedule.transfers, strict=True):
            arguments = {"nbytes": str(move.nbytes), "clock": schedule.clock}
            where = process, tracks[link]
            events.append(_slice(move.tensor, *where, move.start, move.seconds, arguments))
    return {"displayTimeUnit": "ms", "traceEvents": events}


def write_trace(
    path: str | Path, schedules: Sequence[Schedule], devices: Iterable[Device] = ()
) -> None:
    """Writes `trace` as JSON.

    Raises
    ------
    OutputFileError
        The file cannot be written.
    """
    write_text(path, json.dumps(trace(schedules, devices)))


def _named(kind: str, process: int, track: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": process, "tid": track, "args": {"name": name}}


def _slice(
    name: str, process: int, track: int, start: float, seconds: float, arguments: dict[str, Any]
) -> dict[str, Any]:
    return {
        "ph": "X",
        "name": name,
        "pid": process,
        "tid": track,
        "ts": start * MICROSECONDS,
        "dur": seconds * MICROSECONDS,
        "args": arguments,
    }
