"""Plans as predicted and as measured: every partitioner on every model, on two devices.

Kernels are measured first, each group of the model and of the pieces that a plan has, and how much
longer the model's own groups take while both devices compute. Then all plans of a model run in
turns, in one process. What counts is the median latency of a call, over bursts before and after
which the cores were no threads of one; such hand over twenty times as fast, and compute half as
fast. The figures are the error of the latency that was predicted when the plan was made, how well
prediction ranks the plans of a model (Kendall's tau b), and how much slower than the best measured
that plan is which prediction puts first. Half the interval of 95 % says how well a latency is
known.

What neighbours on the host take of the cores changes by the minute. So kernels and links are
measured again between the runs, and beside the error stands that of a prediction by these prices:
what would be left without drift. What is measured of a model is kept, and not measured again.
"""

import json
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import combinations
from math import inf, sqrt
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from rich.progress import track

import hetsched
from bench import models
from bench.cores import WHOLE, Probe, settled
from bench.costing import Options, Result
from bench.timing import seconds_of
from hetsched.api import priced
from hetsched.confidence import margin
from hetsched.corun import measured_slowdown
from hetsched.errors import InfeasiblePlan
from hetsched.files import write_text
from hetsched.graph import Graph
from hetsched.links import measure_link
from hetsched.partitioner import Partitioner, serving
from hetsched.plan import Plan, simulate
from hetsched.plugin import load, names
from hetsched.sequence import KernelSequence
from hetsched.store import Store
from hetsched.system import Link, System

MODELS = (
    "digits_cnn mobilenet_v2 squeezenet1_1 light_bvlc_alexnet googlenet resnet18 light_resnet50 "
    "light_vgg19 bert_base_like lstm_text mobilenet_v3_small"
).split()
DEVICES = "cpu:0,cpu:1"
PARTITIONERS = tuple(name for name in names(Partitioner) if name != "single")
# Of each plan of a model: rounds until both are reached, but no longer than `PATIENCE_SECONDS`.
LEAST_ROUNDS = 10
# Runs in a row, as they are in use; before them some bring back what the others have displaced.
WARM, BURST = 2, 5
# Of the kernels of a plan on a device, in each turn.
PRICING_SECONDS = 0.015
# Measurements of the links before plans are made.
LINK_TURNS = 3
SECONDS = 6.0
PATIENCE_SECONDS = 30.0
# Plans that are closer than this, or measured closer than they are known, are equally good.
TIE = 0.01


HEADS = (
    "model",
    "partitioner",
    "parts",
    "predicted ms",
    "measured ms",
    "error %",
    "known to %",
    "without drift ms",
    "error %",
)


def measured(options: Options) -> Result:
    """Each partitioner on two devices."""
    found = rows(options, "plans", MODELS, DEVICES, PARTITIONERS)
    figures = summary(found)
    text = (
        f"{figures['plans']} plans of {figures['models']} models on {DEVICES}: error of the "
        f"prediction {figures['median_error']:.1%} (median), {figures['p90_error']:.1%} (p90), "
        f"without drift {figures['without_drift']['median_error']:.1%} and "
        f"{figures['without_drift']['p90_error']:.1%}; "
        f"Kendall's tau b {figures['tau_mean'] or 0:.2f} (mean over the models); the plan "
        f"predicted best takes {figures['worst_regret']:.3f} x the best measured at the most; a "
        f"latency is known to {figures['median_margin']:.1%} (median)"
    )
    passed = (
        figures["median_error"] <= 0.04
        and figures["p90_error"] <= 0.10
        and (figures["tau_mean"] or 1.0) >= 0.9
        and figures["worst_regret"] <= 1.02
    )
    return Result(text, HEADS, cells(found), figures | {"rows": found}, passed)


def rows(
    options: Options,
    kept: str,
    default: Sequence[str],
    devices: str,
    partitioners: Sequence[str],
) -> list[dict[str, Any]]:
    """The rows of the models that are asked for, from the folder where they are there."""
    options.folder.mkdir(parents=True, exist_ok=True)
    store = options.folder / "prices.sqlite"
    system = settled(devices, Store(store))
    found: list[dict[str, Any]] = []
    chosen = models.chosen(options.models, options.names or default, inf)
    for model in track(chosen, description=kept):
        path = options.folder / f"{kept} {model.name}.json"
        if not path.is_file():
            own = of_model(model, system, str(store), options.seed, partitioners)
            write_text(path, json.dumps(own))
        found += json.loads(path.read_text(encoding="utf-8"))
    return found


def plans(
    graph: Graph, system: System, store: str, partitioners: Sequence[str] = ()
) -> Iterator[tuple[str, Plan]]:
    """The plan of each partitioner for latency, by its name; each device alone comes first."""
    prices = priced(graph, system, None, store or None)
    alone = [f"single:device={device.name}" for device in system.devices]
    for name in (*alone, *partitioners):
        partitioner = load(Partitioner, name)
        if "latency" not in partitioner.objectives:
            continue
        try:
            yield name, serving(partitioner, "latency").partition(graph, system, prices)
        except InfeasiblePlan:
            continue


def of_model(
    model: models.Model, system: System, store: str, seed: int, partitioners: Sequence[str]
) -> list[dict[str, Any]]:
    """A row for each partitioner; plans that do the same are measured as one."""
    graph = hetsched.read_onnx(models.load(model, seed), shapes=model.shapes)
    with Probe.of(system) as probe:
        begin = perf_counter()
        slowed = measured_slowdown([graph], system.devices, Store(Path(store)), probe.separate)
        links = Links(system, probe)
        for _ in range(LINK_TURNS):
            links.measure()
        system = replace(links.now, slowdown=slowed.value)
        found = list(plans(graph, system, store, partitioners))
        planning = perf_counter() - begin
        distinct: dict[object, Plan] = {}
        for _, plan in found:
            distinct.setdefault(_does(plan), plan)
        ways = {key: Way(plan, models.inputs(model, graph, seed)) for key, plan in distinct.items()}
        try:
            _take_turns(list(ways.values()), links, probe)
            system = replace(links.now, slowdown=slowed.value)
            measured = {key: way.row(system) for key, way in ways.items()}
        finally:
            for way in ways.values():
                way.close()
    return [
        {
            "model": model.name,
            "partitioner": name,
            "devices": list(plan.devices),
            "parts": len(plan.parts),
            "splits": len(plan.splits),
            "predicted": simulate(plan).makespan,
            **measured[_does(plan)],
            "slowdown": slowed.value,
            "links": {
                when: [(link.seconds, link.bytes_per_second) for link in used.links]
                for when, used in (("planned", plan.system), ("measured", system))
            },
            "same_as": next(other for other, its in found if _does(its) == _does(plan)),
            "planning_seconds": planning,
        }
        for name, plan in found
    ]


class Links:
    """The links of a system, as often as they were measured while the cores were no threads of one.

    That changes by the second, and one measurement of each may be of the wrong moment.
    """

    def __init__(self, system: System, probe: Probe) -> None:
        self._system = system
        self._probe = probe
        self._found: list[tuple[Link, ...]] = []

    def measure(self) -> None:
        self._probe.separate()
        devices = self._system.device
        pairs = [(devices(link.source), devices(link.sink)) for link in self._system.links]
        links = tuple(measure_link(*pair) for pair in pairs)
        if self._probe.together() <= WHOLE:
            self._found.append(links)

    @property
    def now(self) -> System:
        """The system with the medians of what was measured."""
        links = [
            replace(
                link,
                seconds=statistics.median(other.seconds for other in each),
                bytes_per_second=statistics.median(other.bytes_per_second for other in each),
            )
            for link, *each in zip(self._system.links, *self._found, strict=True)
            if each
        ]
        return replace(self._system, links=tuple(links) or self._system.links)


class Way:
    """A plan that runs, and its kernels by themselves on each of its units."""

    def __init__(self, plan: Plan, inputs: Mapping[str, np.ndarray]) -> None:
        self.plan = plan
        self._executable = hetsched.compile(plan)
        self._run = partial(self._executable.run, inputs)
        self._own: dict[str, KernelSequence] = {}
        for device in plan.devices:
            self._own[device] = KernelSequence(
                plan.graph, plan.graph.groups, plan.system.device(device)
            )
        self._run()
        # Seconds of runs, burst by burst, and of each group in each burst of kernels.
        self.kept: list[list[float]] = []
        self._disturbed: list[list[float]] = []
        self._groups: dict[tuple[str, str], list[float]] = defaultdict(list)

    def burst(self, probe: Probe) -> None:
        for device, own in self._own.items():
            for name, times in own.burst(PRICING_SECONDS).items():
                self._groups[name, device].append(statistics.median(times))
        for _ in range(WARM):
            self._run()
        times = [seconds_of(self._run) for _ in range(BURST)]
        separate = probe.together() <= WHOLE
        (self.kept if separate else self._disturbed).append(times)
        if not separate:
            probe.separate()

    def row(self, system: System) -> dict[str, Any]:
        """What was measured, and what is predicted by prices and links of the same minutes."""
        bursts = [statistics.median(burst) for burst in self.kept or self._disturbed]
        seconds = {name: dict(row) for name, row in self.plan.prices.seconds.items()}
        for (name, device), times in self._groups.items():
            seconds[name][device] = statistics.median(times)
        prices = replace(self.plan.prices, seconds=seconds)
        again = replace(self.plan, system=system, prices=prices)
        return {
            "without_drift": simulate(again).makespan,
            "measured": statistics.median(bursts),
            "margin": margin(bursts),
            "least": min(map(min, self.kept or self._disturbed)),
            "runs": BURST * len(bursts),
            "disturbed_bursts": len(self._disturbed),
        }

    def close(self) -> None:
        for own in self._own.values():
            own.close()
        self._executable.close()


def _take_turns(ways: Sequence[Way], links: Links, probe: Probe) -> None:
    """Bursts of all until there are enough that count; where there are none such, all count."""
    begin = perf_counter()
    while (passed := perf_counter() - begin) < PATIENCE_SECONDS and (
        passed < SECONDS or min(len(way.kept) for way in ways) < LEAST_ROUNDS
    ):
        links.measure()
        for way in ways:
            way.burst(probe)


def _does(plan: Plan) -> object:
    return plan.splits, plan.order, plan.cuts, tuple(sorted(plan.placement.items()))


def error(row: Mapping[str, Any]) -> float:
    return abs(row["predicted"] / row["measured"] - 1)


def tau(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Kendall's tau b of predicted and measured; None where all are equal in one of them.

    Plans that are measured closer than `TIE`, or closer than the margins of both together, are a
    tie of what is measured, and those predicted closer than `TIE` one of what is predicted. Who
    orders plans that are a tie of the other loses by it.

    >>> tau([{"predicted": p, "measured": m} for p, m in ((1, 1), (2, 3), (3, 2), (4, 4.001))])
    0.6666666666666666
    >>> tau([{"predicted": p, "measured": m} for p, m in ((1, 1), (2, 3), (2.01, 3.01))])
    1.0

    References
    ----------
    Kendall, "The treatment of ties in ranking problems", Biometrika 33, 1945,
    https://doi.org/10.1093/biomet/33.3.239
    """
    score = in_predicted = in_measured = 0
    for a, b in combinations(rows, 2):
        margins = a.get("margin", 0.0) + b.get("margin", 0.0)
        predicted = _sign(a["predicted"], b["predicted"], 0.0)
        found = _sign(a["measured"], b["measured"], margins)
        score += predicted * found
        in_predicted += abs(predicted)
        in_measured += abs(found)
    return score / sqrt(in_predicted * in_measured) if in_predicted and in_measured else None


def _sign(one: float, other: float, least: float) -> int:
    apart = max(TIE * min(one, other), least)
    return (one - other > apart) - (other - one > apart)


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of all rows; plans that do the same count once."""
    rows = [row for row in rows if row["same_as"] == row["partitioner"]]
    again = [{**row, "predicted": row["without_drift"]} for row in rows]
    return judged(rows) | {
        "models": len({row["model"] for row in rows}),
        "plans": len(rows),
        "median_margin": statistics.median(row["margin"] / row["measured"] for row in rows),
        "without_drift": judged(again),
    }


def judged(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How good the predictions of `rows` are."""
    by_model: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_model.setdefault(row["model"], []).append(row)
    errors = sorted(map(error, rows))
    taus = [found for own in by_model.values() if (found := tau(own)) is not None]
    regrets = {
        name: min(own, key=lambda row: row["predicted"])["measured"]
        / min(row["measured"] for row in own)
        for name, own in by_model.items()
    }
    alone = [error(row) for row in rows if row["partitioner"].startswith("single")]
    return {
        "median_error": statistics.median(errors),
        "p90_error": errors[min(len(errors) - 1, int(0.9 * len(errors)))],
        "tau_mean": statistics.fmean(taus) if taus else None,
        "tau_least": min(taus, default=None),
        "regret": regrets,
        "worst_regret": max(regrets.values()),
        "single_within_10": statistics.fmean(one <= 0.10 for one in alone),
        "single_within_5": statistics.fmean(one <= 0.05 for one in alone),
    }


def cells(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    return [
        (
            row["model"],
            row["partitioner"]
            + (f" = {row['same_as']}" if row["same_as"] != row["partitioner"] else ""),
            str(row["parts"]),
            f"{row['predicted'] * 1e3:.3f}",
            f"{row['measured'] * 1e3:.3f}",
            f"{(row['predicted'] / row['measured'] - 1) * 100:+.1f}",
            f"{row['margin'] / row['measured'] * 100:.1f}",
            f"{row['without_drift'] * 1e3:.3f}",
            f"{(row['without_drift'] / row['measured'] - 1) * 100:+.1f}",
        )
        for row in rows
    ]
