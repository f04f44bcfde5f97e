"""What `hetsched profile` shows: what was measured, and what is in the store."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from rich.console import RenderableType

from hetsched.api import Profiled, Profiling
from hetsched.links import Repeated, runtime
from hetsched.profiling import IGNORED_SHARE, MOST_DRIFT, THOROUGH
from hetsched.report.tables import MOST_ROWS, Document, hardware_view, scaled, table, values_of
from hetsched.store import Record, Store


def profile_document(profiling: Profiling, store: str, budget: float | None = None) -> Document:
    """`budget` are the seconds that were given, if there is a limit."""
    rows = profiling.rows
    kinds = dict.fromkeys(row.devices for row in rows)
    return {
        "store": store,
        "seconds": profiling.seconds,
        "budget_seconds": budget,
        "already": sum(row.already for row in rows),
        "measured": sum(row.sample is not None and not row.already for row in rows),
        "missing": sum(row.missing for row in rows),
        "loose": sum(row.sample is not None and not row.tight for row in rows),
        "drift": profiling.drift,
        "since": profiling.since,
        "bursts": profiling.bursts,
        "disturbed_bursts": profiling.disturbed,
        "slowdown": profiling.slowdown.value if profiling.slowdown else None,
        "devices": [
            _device(devices, [row for row in rows if row.devices == devices]) for devices in kinds
        ],
        "kernels": [_kernel(row) for row in rows],
        "links": [_link(repeated) for repeated in profiling.links],
    }


def _device(devices: Sequence[str], rows: Sequence[Profiled]) -> Document:
    samples = [(row, row.sample) for row in rows if row.sample]
    return {
        "devices": list(devices),
        "kernels": len(rows),
        "already": sum(row.already for row in rows),
        "measured": sum(row.sample is not None and not row.already for row in rows),
        "missing": sum(row.missing for row in rows),
        "refused": sum(bool(row.refusal) for row in rows),
        "loose": sum(row.sample is not None and not row.tight for row in rows),
        "groups_seconds": sum(sample.seconds * len(row.groups) for row, sample in samples),
        "relative_margin": median([s.relative_margin for _, s in samples]) if samples else None,
    }


def _kernel(row: Profiled) -> Document:
    sample = row.sample
    return {
        "kinds": row.kinds,
        "groups": list(row.groups),
        "devices": list(row.devices),
        "flops": row.flops,
        "seconds": sample.seconds if sample else None,
        "spread_seconds": sample.spread if sample else None,
        "margin_seconds": sample.margin if sample else None,
        "repeats": sample.repeats if sample else 0,
        "rejected": [asdict(one) for one in sample.rejected] if sample else [],
        "disturbed": sample is not None and sample.is_rejected,
        "predicted_seconds": row.estimate.seconds if row.estimate else None,
        "predicted_deviation": row.estimate.deviation if row.estimate else None,
        "flops_per_second": row.flops / sample.seconds if sample else None,
        "already": row.already,
        "tight": row.tight,
        "refusal": row.refusal or None,
    }


def _link(repeated: Repeated) -> Document:
    least, most = repeated.rates
    return {
        **values_of(repeated.link),
        "margin_seconds": repeated.margin,
        "least_bytes_per_second": least,
        "most_bytes_per_second": most,
        "repeats": len(repeated.bursts),
        "tight": repeated.tight,
    }


def profile_view(document: Document) -> Iterator[RenderableType]:
    def state(row: Mapping[str, Any]) -> str:
        if row["refusal"]:
            return f"cannot run: {row['refusal']}"
        if row["predicted_seconds"] is not None:
            off = row["predicted_deviation"]
            return f"predicted from others, to {off:.0%}" if off < 1 else "guessed from its work"
        if row["seconds"] is None:
            return "not measured"
        known = "in the store already" if row["already"] else "measured now"
        if row["disturbed"]:
            return f"{known}, each time disturbed"
        return known if row["tight"] else f"{known}, not yet tight"

    def weight(row: Mapping[str, Any]) -> float:
        return (row["seconds"] or 0.0) * len(row["groups"])

    # What is not as it should be is always told.
    kernels = sorted(document["kernels"], key=weight, reverse=True)
    shown = [row for i, row in enumerate(kernels) if i < MOST_ROWS or row["seconds"] is None]
    yield table(
        "Kernel groups",
        ("kinds", ">groups", "devices", ">ms", ">margin", ">GFLOP/s", "state"),
        (
            (
                row["kinds"],
                str(len(row["groups"])),
                " ".join(row["devices"]),
                scaled(row["seconds"] or row["predicted_seconds"], 1e-3, 4),
                _share(row["margin_seconds"], row["seconds"]),
                scaled(row["flops_per_second"], 1e9, 2),
                state(row),
            )
            for row in shown
        ),
    )
    if len(kernels) > len(shown):
        yield f"and {len(kernels) - len(shown)} that take less"
    yield from _links_view(document["links"])
    yield ""
    yield table(
        "Devices",
        ("device", ">kernels", ">known", ">new", ">missing", ">not tight", ">ms", ">margin"),
        (
            (
                " ".join(row["devices"]),
                str(row["kernels"]),
                str(row["already"]),
                str(row["measured"]),
                str(row["missing"]),
                str(row["loose"]),
                scaled(row["groups_seconds"], 1e-3, 3),
                _percent(row["relative_margin"]),
            )
            for row in document["devices"]
        ),
    )
    yield ""
    budget = document["budget_seconds"]
    yield (
        f"{document['measured']} measured now, {document['already']} in the store already, "
        f"{document['missing']} missing; {document['seconds']:.1f} s"
        f"{f' of {budget:g} s' if budget else ''}; store {document['store']}"
    )
    loose = sum(weight(row) for row in kernels if row["seconds"] and not row["tight"])
    if loose > IGNORED_SHARE * sum(map(weight, kernels)):
        yield (
            f"{document['loose']} are not yet tight, that is known to {THOROUGH.tolerance:.0%}; "
            "the same command goes on with them"
        )
    if document["disturbed_bursts"]:
        yield (
            f"{document['disturbed_bursts']} of {document['bursts']} bursts were disturbed and do "
            "not count; `hetsched profile --show` has by what"
        )
    if document["slowdown"] is not None:
        yield (
            "while all devices compute, kernels take "
            f"{document['slowdown']:.2f} x as long as by themselves"
        )
    for change, when in (
        (document["drift"], "became {} while this was measured"),
        (document["since"], "is {} than when the store's older samples were taken"),
    ):
        if change is not None and abs(change) > MOST_DRIFT:
            told = f"{abs(change):.0%} {'slower' if change > 0 else 'faster'}"
            yield f"the machine {when.format(told)}; profile again when it does nothing else"
    yield from hardware_view(document)


def store_document(store: Store, device: str | None, kind: str | None) -> Document:
    """What the store has of devices and kernels whose text has `device` and `kind` in it."""
    devices = store.devices()

    def is_wanted(fingerprint: str) -> bool:
        found = devices.get(fingerprint)
        about = f"{found.name} {found.target} {found.description}" if found else ""
        return device is None or device.lower() in f"{fingerprint} {about}".lower()

    def shown(record: Record) -> bool:
        named = kind is None or kind.lower() in record.kernel.kinds.lower()
        return named and is_wanted(record.fingerprint)

    return {
        "store": str(store.path),
        "devices": [
            {"fingerprint": name, **values_of(found)}
            for name, found in devices.items()
            if is_wanted(name)
        ],
        "samples": [
            {
                "fingerprint": record.fingerprint,
                "device": devices[record.fingerprint].description
                if record.fingerprint in devices
                else "",
                "compiler": record.compiler,
                "method": record.method,
                "signature": record.kernel.signature,
                "kinds": record.kernel.kinds,
                "seconds": record.sample.seconds,
                "spread_seconds": record.sample.spread,
                "margin_seconds": record.sample.margin,
                "repeats": record.sample.repeats,
                "bursts": list(record.sample.bursts),
                "rejected": [asdict(one) for one in record.sample.rejected],
                "measured_at": record.measured_at,
            }
            for record in store.records()
            if shown(record)
        ],
        "links": [
            {
                **_link(Repeated(record.link, record.bursts)),
                "runtime": record.runtime,
                "current": record.runtime == runtime(),
                "margin_seconds": record.margin,
                "measured_at": record.measured_at,
            }
            for record in store.links()
            if any(is_wanted(end.partition(" ")[0]) for end in (record.source, record.sink))
        ],
        "factors": [
            {"kind": name, "subject": subject, **asdict(factor)}
            for name in store.factor_kinds()
            for subject, factor in store.factors(name).items()
        ],
        "residuals": [asdict(residual) for residual in store.residuals()],
    }


def store_view(document: Document) -> Iterator[RenderableType]:
    alike: dict[tuple[str, ...], list[Mapping[str, Any]]] = defaultdict(list)
    for row in document["samples"]:
        key = ("device", "fingerprint", "compiler", "method", "kinds")
        alike[tuple(row[name] for name in key)].append(row)
    kinds: dict[tuple[str, ...], list[Mapping[str, Any]]] = defaultdict(list)
    for row in document["samples"]:
        kinds[row["device"], row["fingerprint"], row["compiler"], row["method"]].append(row)
    yield table(
        "Devices and compilers",
        ("device", "fingerprint", "compiler", "method", ">samples", ">spread", ">margin", "newest"),
        (
            (*key, str(len(rows)), *_typical(rows), max(row["measured_at"] for row in rows)[:16])
            for key, rows in kinds.items()
        ),
    )
    yield ""
    order = sorted(alike.items(), key=lambda item: -sum(row["seconds"] for row in item[1]))
    yield table(
        "Kernels",
        ("kinds", "fingerprint", "method", ">samples", ">ms from", ">to", ">spread", ">margin"),
        (
            (
                *(key[4], key[1], key[3], str(len(rows))),
                scaled(min(row["seconds"] for row in rows), 1e-3, 4),
                scaled(max(row["seconds"] for row in rows), 1e-3, 4),
                *_typical(rows),
            )
            for key, rows in order[:MOST_ROWS]
        ),
    )
    if len(order) > MOST_ROWS:
        yield f"and {len(order) - MOST_ROWS} kinds that take less; --kind and --device choose"
    yield from _rejected_view(document["samples"])
    yield from _links_view([link for link in document["links"] if link["current"]])
    old = sum(not link["current"] for link in document["links"])
    yield ""
    if old:
        yield f"{old} links were measured by another version and will be measured again"
    yield (
        f"{len(document['samples'])} samples, {len(document['factors'])} factors, "
        f"{len(document['residuals'])} residuals; store {document['store']}"
    )


def _rejected_view(samples: Sequence[Mapping[str, Any]]) -> Iterator[RenderableType]:
    """The samples that were disturbed most often, what they took then, and by what at last."""
    found = sorted(
        (row for row in samples if row["rejected"]), key=lambda row: -len(row["rejected"])
    )
    if not found:
        return
    yield ""
    yield table(
        "Disturbed bursts, which do not count",
        ("kinds", "fingerprint", ">bursts", ">rejected", ">ms", ">ms rejected", "last by"),
        (
            (
                *(row["kinds"], row["fingerprint"]),
                *(str(len(row["bursts"])), str(len(row["rejected"]))),
                scaled(row["seconds"], 1e-3, 4),
                scaled(median(one["seconds"] for one in row["rejected"]), 1e-3, 4),
                row["rejected"][-1]["why"],
            )
            for row in found[:MOST_ROWS]
        ),
    )
    if len(found) > MOST_ROWS:
        yield f"and {len(found) - MOST_ROWS} that were disturbed as often or less"


def _typical(rows: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """The median spread and margin of samples, relative."""
    return (
        _percent(median(row["spread_seconds"] / row["seconds"] for row in rows)),
        _percent(median(row["margin_seconds"] / row["seconds"] for row in rows)),
    )


def _links_view(links: Sequence[Mapping[str, Any]]) -> Iterator[RenderableType]:
    if not links:
        return
    yield ""
    yield table(
        "Links",
        ("from", "to", ">latency us", ">margin us", ">GB/s", ">at least", ">at most", ">bursts"),
        (
            (
                link["source"],
                link["sink"],
                scaled(link["seconds"], 1e-6, 2),
                scaled(link["margin_seconds"], 1e-6, 2),
                *(
                    scaled(link[f"{name}bytes_per_second"], 1e9, 1)
                    for name in ("", "least_", "most_")
                ),
                str(link["repeats"]),
            )
            for link in links
        ),
    )


def _share(margin: float | None, seconds: float | None) -> str:
    return "-" if margin is None or not seconds else _percent(margin / seconds)


def _percent(value: float | None) -> str:
    return "-" if value is None or value == float("inf") else f"{value:.1%}"
