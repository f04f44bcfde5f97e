"""How good the prices are: what a profile store says of them, as one page of HTML.

Kernels are predicted from the store's other kernels: samples are dealt into folds, and those of a
fold are predicted by a model that has not seen them. Nothing is measured.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from html import escape
from math import ceil, floor, isfinite, log10
from statistics import fmean, median

from hetsched.cost import graph_of
from hetsched.device import Device
from hetsched.errors import ModelError, PluginError
from hetsched.learning.model import Model
from hetsched.sequence import surroundings_of
from hetsched.store import Record, Residual, Store

FOLDS = 5
# Fewer samples of a device than this tell nothing of one another.
LEAST_SAMPLES = 10
# A margin above this share asks for another measurement.
TIGHT = 0.02
MOST_ROWS = 15
# A prediction that is off by no more than this is near.
NEAR = 0.1
# Of a chart, in its own units.
WIDTH, HEIGHT, EDGE = 640, 400, 56


@dataclass(frozen=True)
class Point:
    """A kernel on a device: seconds measured, and predicted by those who have not seen it."""

    device: str
    kinds: str
    measured: float
    predicted: float
    deviation: float
    margin: float

    @property
    def error(self) -> float:
        return abs(self.predicted / self.measured - 1)

    @property
    def first(self) -> str:
        """The kind of its first operation."""
        return self.kinds.partition("+")[0]


@dataclass(frozen=True)
class Next:
    """Something to measure, and why."""

    device: str
    kinds: str
    seconds: float
    why: str


@dataclass(frozen=True)
class Quality:
    """What a store says of its prices; `skipped` says what could not be used and why."""

    store: str
    points: tuple[Point, ...]
    residuals: tuple[Residual, ...]
    next: tuple[Next, ...]
    skipped: tuple[str, ...]


def quality(store: Store) -> Quality:
    """The points of all devices that the store has enough samples of.

    It fits a model for each fold of each device, which takes seconds.
    """
    records = store.records()
    devices = store.devices()
    per_device: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        if surroundings_of(record.method) is not None and record.kernel.model:
            per_device.setdefault((record.fingerprint, record.compiler), []).append(record)
    points: list[Point] = []
    skipped: list[str] = []
    for (fingerprint, compiler), own in per_device.items():
        device = devices.get(fingerprint)
        if device is None:
            skipped.append(f"{len(own)} samples of device {fingerprint}, which is not described")
        elif len(own) < LEAST_SAMPLES:
            skipped.append(f"{len(own)} samples of '{device.name}', {compiler}: too few")
        else:
            try:
                points += _predicted(device, own)
            except (ModelError, PluginError) as error:
                skipped.append(f"{len(own)} samples of '{device.name}', {compiler}: {error}")
    alone = len(records) - sum(map(len, per_device.values()))
    if alone:
        skipped.append(f"{alone} samples of older methods, or of kernels that are not known")
    return Quality(str(store.path), tuple(points), store.residuals(), _next(points), tuple(skipped))


def _predicted(device: Device, records: Sequence[Record]) -> Iterable[Point]:
    ordered = sorted(records, key=lambda record: (record.kernel.signature, record.method))
    for fold in range(FOLDS):
        held = ordered[fold::FOLDS]
        signatures = {record.kernel.signature for record in held}
        rest = [record for record in ordered if record.kernel.signature not in signatures]
        model = Model.of(device, rest)
        for record in held:
            megabytes = surroundings_of(record.method)
            assert megabytes is not None
            (estimate,) = model.estimates([graph_of(record.kernel)], megabytes)
            yield Point(
                device.name,
                record.kernel.kinds,
                record.sample.seconds,
                estimate.seconds,
                estimate.deviation,
                record.sample.relative_margin,
            )


def _next(points: Sequence[Point]) -> tuple[Next, ...]:
    """Kernels that are known least, weighed by their time: loose margins, then large errors."""
    loose = [
        Next(
            p.device,
            p.kinds,
            p.measured,
            f"known to {_percent(p.margin)} only: measure it again"
            if isfinite(p.margin)
            else "measured once, or disturbed each time: measure it again",
        )
        for p in sorted(points, key=lambda p: -p.measured * min(1.0, p.margin))
        if p.margin > TIGHT
    ]
    odd = [
        Next(
            p.device,
            p.kinds,
            p.measured,
            f"its like say {_percent(p.predicted / p.measured - 1, sign=True)}: "
            "measure more kernels of this kind",
        )
        for p in sorted(points, key=lambda p: -p.measured * p.error)
        if p.margin <= TIGHT and p.error > max(0.1, 3 * p.margin)
    ]
    return (*loose[: MOST_ROWS // 2], *odd[: MOST_ROWS - MOST_ROWS // 2])


def page(found: Quality) -> str:
    """All of it as one file of HTML, which needs nothing else."""
    body = [
        f"<h1>How good the prices are</h1><p>Profile store <code>{escape(found.store)}</code></p>",
        _summary(found.points),
        _section(
            "Predicted against measured",
            "Each dot is a kernel on a device, predicted from the other kernels of the store. On "
            "the line both are equal; the band is 10 % to either side.",
            scatter(found.points),
        ),
        _section(
            "Error by kind of operation",
            "The median of what predictions are off, of the kinds that take the most time.",
            bars(_errors(found.points, lambda point: point.first)),
        ),
        _section(
            "Residuals by kind of operation and device",
            "Of kernels that begin with the operation: its share of the time of all, the mean of "
            "what predictions are off, their median with its sign, and how many are within 10 %. "
            "What takes the most time comes first.",
            _residuals(found.points),
        ),
        _section(
            "Error by device",
            "The median of what predictions are off.",
            bars(_errors(found.points, lambda point: point.device)),
        ),
        _section(
            "Repeatability",
            "How far the median of a kernel's times is known, with 95 % confidence: no prediction "
            "can be shown to be better than this.",
            bars(_shares([point.margin for point in found.points])),
        ),
        _section(
            "Whole plans over time",
            "Predicted makespans of plans less what a run measured, as a share of it.",
            course(found.residuals),
        ),
        _section("What to measure next", "", _table(found.next)),
    ]
    if found.skipped:
        items = "".join(f"<li>{escape(text)}</li>" for text in found.skipped)
        body.append(_section("Left out", "", f"<ul>{items}</ul>"))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<title>hetsched: how good the prices are</title>"
        f"<style>{STYLE}</style></head><body><main>{''.join(body)}</main></body></html>\n"
    )


def scatter(points: Sequence[Point]) -> str:
    """Predicted over measured seconds, both by decades; a colour for each device."""
    drawn = [p for p in points if p.measured > 0 and p.predicted > 0]
    if not drawn:
        return EMPTY
    values = [value for p in drawn for value in (p.measured, p.predicted)]
    low, high = (
        floor(log10(min(values))),
        max(ceil(log10(max(values))), floor(log10(min(values))) + 1),
    )
    across, up = WIDTH - 2 * EDGE, HEIGHT - 2 * EDGE

    def place(measured: float, predicted: float) -> tuple[float, float]:
        x, y = ((log10(v) - low) / (high - low) for v in (measured, predicted))
        return EDGE + x * across, HEIGHT - EDGE - y * up

    marks = []
    for decade in range(low, high + 1):
        x, y = place(10.0**decade, 10.0**decade)
        text = seconds_text(10.0**decade)
        marks.append(
            _line(x, EDGE, x, HEIGHT - EDGE, "grid") + _line(EDGE, y, WIDTH - EDGE, y, "grid")
        )
        marks.append(
            _text(x, HEIGHT - EDGE + 20, text, "middle") + _text(EDGE - 6, y + 4, text, "end")
        )
    begin, end = 10.0**low, 10.0**high
    corners = [
        place(begin, begin * 0.9),
        place(end, end * 0.9),
        place(end, end * 1.1),
        place(begin, begin * 1.1),
    ]
    marks.append(
        f'<polygon class="band" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in corners)}"/>'
    )
    marks.append(_line(*place(begin, begin), *place(end, end), "even"))
    names = list(dict.fromkeys(p.device for p in drawn))
    for p in drawn:
        x, y = place(p.measured, p.predicted)
        told = (
            f"{p.kinds} on {p.device}: measured {seconds_text(p.measured)}, "
            f"predicted {seconds_text(p.predicted)}"
        )
        kind = names.index(p.device) % COLOURS
        marks.append(
            f'<circle class="c{kind}" cx="{x:.1f}" cy="{y:.1f}" r="3.5">'
            f"<title>{escape(told)}</title></circle>"
        )
    marks.append(_text(WIDTH / 2, HEIGHT - 10, "measured", "middle"))
    marks.append(_text(EDGE, EDGE - 16, "predicted", "middle"))
    legend = "".join(
        f'<li><span class="dot c{index % COLOURS}"></span>{escape(name)}</li>'
        for index, name in enumerate(names)
    )
    return (
        _svg(f"{len(drawn)} kernels, predicted against measured seconds", marks, HEIGHT)
        + f'<ul class="legend">{legend}</ul>'
    )


def bars(rows: Sequence[tuple[str, float, str]]) -> str:
    """Bars of a name, a length and what stands behind it."""
    if not rows:
        return EMPTY
    longest = max(length for _, length, _ in rows) or 1.0
    marks = []
    for index, (name, length, text) in enumerate(rows):
        y = 8 + 28 * index
        width = (WIDTH - 320) * length / longest
        marks.append(_text(172, y + 15, name if len(name) < 24 else f"{name[:22]}…", "end"))
        marks.append(f'<rect class="c0" x="180" y="{y}" width="{width:.1f}" height="20" rx="3"/>')
        marks.append(_text(186 + width, y + 15, text, "start"))
    return _svg("; ".join(f"{name} {text}" for name, _, text in rows), marks, 16 + 28 * len(rows))


def course(residuals: Sequence[Residual]) -> str:
    """How far predictions of plans were off, in the order of time; the oldest on the left."""
    drawn = [r for r in residuals if r.measured > 0 and r.predicted > 0]
    if not drawn:
        return EMPTY
    errors = [r.predicted / r.measured - 1 for r in drawn]
    most = max(0.1, max(map(abs, errors)))
    middle, up = HEIGHT / 2, HEIGHT / 2 - EDGE
    times = [_moment(r.measured_at) for r in drawn]
    begin, length = min(times), (max(times) - min(times)) or 1.0
    marks = []
    for share in (-most, -most / 2, 0.0, most / 2, most):
        y = middle - share / most * up
        marks.append(_line(EDGE, y, WIDTH - EDGE, y, "even" if share == 0 else "grid"))
        marks.append(_text(EDGE - 6, y + 4, _percent(share, sign=True), "end"))
    for r, error, time in zip(drawn, errors, times, strict=True):
        x = EDGE + (time - begin) / length * (WIDTH - 2 * EDGE)
        told = f"{r.subject}, {r.measured_at}: {_percent(error, sign=True)}"
        marks.append(
            f'<circle class="c0" cx="{x:.1f}" cy="{middle - error / most * up:.1f}" r="4">'
            f"<title>{escape(told)}</title></circle>"
        )
    first, last = min(r.measured_at for r in drawn), max(r.measured_at for r in drawn)
    marks.append(
        _text(EDGE, HEIGHT - 16, first[:16], "start")
        + _text(WIDTH - EDGE, HEIGHT - 16, last[:16], "end")
    )
    return _svg(f"{len(drawn)} runs of plans, prediction less measurement over time", marks, HEIGHT)


def _summary(points: Sequence[Point]) -> str:
    if not points:
        return (
            "<p>The store has too few samples to compare predictions with: profile some models.</p>"
        )
    errors = [point.error for point in points]
    margins = [point.margin for point in points if isfinite(point.margin)]
    facts = (
        (str(len(points)), "kernels predicted by others"),
        (_percent(sum(errors) / len(errors)), "mean error"),
        (_percent(median(errors)), "median error"),
        (_percent(sum(error <= NEAR for error in errors) / len(errors)), "within 10 %"),
        (_percent(median(margins)) if margins else "unknown", "median margin of a measurement"),
    )
    return (
        '<dl class="facts">'
        + "".join(f"<div><dd>{a}</dd><dt>{b}</dt></div>" for a, b in facts)
        + "</dl>"
    )


def _errors(points: Sequence[Point], key: Callable[[Point], str]) -> list[tuple[str, float, str]]:
    found: dict[str, list[Point]] = {}
    for point in points:
        found.setdefault(key(point), []).append(point)
    ranked = sorted(found.items(), key=lambda item: -sum(p.measured for p in item[1]))[:MOST_ROWS]
    return [
        (name, (off := median(p.error for p in own)), f"{_percent(off)} of {len(own)}")
        for name, own in ranked
    ]


def _residuals(points: Sequence[Point]) -> str:
    """A table of kinds on devices."""
    found: dict[tuple[str, str], list[Point]] = {}
    for point in points:
        found.setdefault((point.first, point.device), []).append(point)
    if not found:
        return EMPTY
    total = sum(point.measured for point in points)
    times = {key: sum(point.measured for point in own) for key, own in found.items()}
    rows = [
        (
            kind,
            device,
            str(len(own := found[kind, device])),
            _percent(times[kind, device] / total),
            _percent(fmean(p.error for p in own)),
            _percent(median(p.predicted / p.measured - 1 for p in own), sign=True),
            _percent(fmean(p.error <= NEAR for p in own)),
        )
        for kind, device in sorted(found, key=lambda key: -times[key])
    ]
    heads = ("operation", "device", "kernels", "of the time", "mean error", "median", "within 10 %")
    return _cells(heads, rows)


def _shares(margins: Sequence[float]) -> list[tuple[str, float, str]]:
    bounds = (0.005, 0.01, 0.02, 0.05, 0.1, float("inf"))
    rows, before = [], 0.0
    for bound in bounds:
        count = sum(before <= margin < bound for margin in margins)
        if bound == bounds[-1]:
            count = sum(margin >= before for margin in margins)
        name = f"below {_percent(bound)}" if isfinite(bound) else f"{_percent(before)} or more"
        rows.append((name, float(count), str(count)))
        before = bound
    return rows if margins else []


def _table(rows: Sequence[Next]) -> str:
    if not rows:
        return "<p>Nothing stands out.</p>"
    return _cells(
        ("kernel", "device", "time", "why"),
        [(row.kinds, row.device, seconds_text(row.seconds), row.why) for row in rows],
    )


def _cells(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in heads)
    lines = "".join(
        f"<tr>{''.join(f'<td>{escape(text)}</td>' for text in row)}</tr>" for row in rows
    )
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )


def _section(title: str, text: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{f'<p>{text}</p>' if text else ''}{content}</section>"


def _svg(title: str, marks: Sequence[str], height: float) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{''.join(marks)}</svg>"
    )


def _line(x: float, y: float, to_x: float, to_y: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x:.1f}" y1="{y:.1f}" x2="{to_x:.1f}" y2="{to_y:.1f}"/>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _percent(share: float, sign: bool = False) -> str:
    if not isfinite(share):
        return "unknown"
    return f"{share * 100:{'+' if sign else ''}.3g} %"


def seconds_text(seconds: float) -> str:
    """Seconds in the unit that fits.

    Examples
    --------
    >>> [seconds_text(value) for value in (2.5, 0.004, 1.2e-5, 3e-8)]
    ['2.5 s', '4 ms', '12 us', '30 ns']
    """
    for unit, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if seconds >= unit * 0.9999:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds / 1e-9:.3g} ns"


def _moment(text: str) -> float:
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return 0.0


COLOURS = 4
EMPTY = '<p class="empty">The store has nothing of this yet.</p>'
# Contrasts are 4.5 to 1 or more in both schemes.
STYLE = """
:root{color-scheme:light dark;--back:#fff;--text:#1d2430;--soft:#5a6472;--rule:#d9dee6;
--band:#e8edf5;--c0:#1f5fbf;--c1:#b3470b;--c2:#1b7a43;--c3:#8a3fa0}
@media(prefers-color-scheme:dark){:root{--back:#14181f;--text:#e7ebf1;--soft:#a4afbd;--rule:#333c49;
--band:#222a36;--c0:#7db0ff;--c1:#ff9d66;--c2:#6fd699;--c3:#dba3ec}}
body{margin:0;background:var(--back);color:var(--text);font:16px/1.5 system-ui,sans-serif}
main{max-width:46rem;margin:0 auto;padding:1rem}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin:2rem 0 .25rem}
p{margin:.25rem 0 .75rem;color:var(--soft)}
code{overflow-wrap:anywhere}
svg{width:100%;height:auto;display:block}svg text{fill:var(--soft);font-size:13px}
.grid{stroke:var(--rule)}.even{stroke:var(--soft)}.band{fill:var(--band)}
.c0{fill:var(--c0);background:var(--c0)}.c1{fill:var(--c1);background:var(--c1)}
.c2{fill:var(--c2);background:var(--c2)}.c3{fill:var(--c3);background:var(--c3)}
.legend{display:flex;flex-wrap:wrap;gap:1rem;list-style:none;padding:0;margin:.5rem 0}
.dot{display:inline-block;width:.75em;height:.75em;border-radius:50%;margin-right:.4em}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(8rem,1fr));gap:.75rem;
margin:1rem 0}
.facts div{border:1px solid var(--rule);border-radius:8px;padding:.5rem .75rem}
.facts dd{margin:0;font-size:1.4rem}.facts dt{color:var(--soft);font-size:.85rem}
.wide{overflow-x:auto}table{border-collapse:collapse;width:100%}
th,td{text-align:left;padding:.35rem .6rem;border-bottom:1px solid var(--rule)}
"""
