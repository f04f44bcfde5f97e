"""What `hetsched run` shows."""

from collections.abc import Iterator, Sequence
from statistics import median

import numpy as np
from rich.console import RenderableType
from rich.text import Text

from hetsched.report.tables import Document, chart_columns, hardware_view, scaled, table, what_of
from hetsched.schedule import Schedule, bars


def run_document(
    predicted: Schedule,
    measured: Sequence[Schedule],
    latencies: Sequence[float],
    wall_seconds: float,
) -> Document:
    """Latency, throughput, and predicted beside measured time, over the runs."""
    shown = median_run(measured)
    quantiles = np.percentile(latencies, (50, 90, 99))
    names = [slot.task for slot in predicted.slots]
    parts = {name: median(run.slot(name).seconds for run in measured) for name in names}
    return {
        "runs": len(measured),
        "latency_seconds": {
            "min": min(latencies),
            "median": float(quantiles[0]),
            "mean": sum(latencies) / len(latencies),
            "p90": float(quantiles[1]),
            "p99": float(quantiles[2]),
        },
        "runs_per_second": len(latencies) / wall_seconds,
        "makespan": _ratio(predicted.makespan, shown.makespan),
        "parts": [
            {
                "name": slot.task,
                "device": slot.device,
                "label": predicted.labels.get(slot.task, ""),
                **_ratio(slot.seconds, parts[slot.task]),
            }
            for slot in predicted.slots
        ],
        "busy": {
            name: sum(run.busy_seconds(name) for run in measured) / wall_seconds
            for name in dict.fromkeys(
                device for run in (predicted, *measured) for device in run.devices
            )
        },
        "clock": shown.clock,
    }


def run_view(
    document: Document, predicted: Schedule, measured: Schedule, width: int
) -> Iterator[RenderableType]:
    given, seed = document["inputs"], document["seed"]
    yield f"inputs from {given}" if given else f"inputs made from seed {seed}; give others with -i"
    yield ""
    latency = document["latency_seconds"]
    yield table(
        f"Latency, {document['runs']} runs",
        tuple(f">{name} ms" for name in latency),
        (tuple(scaled(value, 1e-3, 3) for value in latency.values()),),
    )
    yield ""
    rows = [("whole", "", "", document["makespan"])]
    rows += [(row["name"], row["device"], what_of(row["label"]), row) for row in document["parts"]]
    yield table(
        f"Predicted beside {document['clock']}, median run",
        ("part", "device", "what", ">predicted ms", ">measured ms", ">measured / predicted"),
        (
            (
                name,
                device,
                what,
                scaled(row["predicted_seconds"], 1e-3, 3),
                scaled(row["measured_seconds"], 1e-3, 3),
                scaled(row["ratio"], 1, 2),
            )
            for name, device, what, row in rows
        ),
    )
    yield ""
    busy = ", ".join(f"{name} {share * 100:.0f} %" for name, share in document["busy"].items())
    yield f"throughput {document['runs_per_second']:.1f} runs a second; busy: {busy}"
    yield ""
    yield Text("Schedules, on one time axis", "bold")
    for schedule in (predicted, measured):
        span = max(predicted.makespan, measured.makespan)
        yield Text(bars(schedule, chart_columns(schedule, width), span))
    for line in document["drift"]:
        yield Text(line, "yellow")
    yield from hardware_view(document)


def median_run(measured: Sequence[Schedule]) -> Schedule:
    """The run whose makespan is the median, the lower one of two."""
    return sorted(measured, key=lambda run: run.makespan)[(len(measured) - 1) // 2]


def _ratio(predicted: float, measured: float) -> Document:
    return {
        "predicted_seconds": predicted,
        "measured_seconds": measured,
        "ratio": measured / predicted if predicted else None,
    }
