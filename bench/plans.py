"""Plans as predicted and as measured: every partitioner on every model, on two devices.

    python -m bench.plans --json FILE [--models NAMES] [--devices cpu:0,cpu:1] [--store FILE]

Kernels are measured first, each group of the model and of the pieces that a plan has. Then all
plans of a model run in turns, in one process; what counts is the median latency of a call. A row
for each plan; rows that the file has already are not measured again.

Figures: the error of the predicted latency, how well prediction ranks the plans of a model
(Kendall's tau), and how much slower than the best measured the plan is that prediction puts first.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import combinations
from pathlib import Path
from time import perf_counter
from typing import Any

from rich.console import Console
from rich.table import Table

import hetsched
from bench import models
from bench.record import record, write
from bench.timing import seconds_of
from hetsched.api import priced
from hetsched.errors import HetschedError, InfeasiblePlan
from hetsched.graph import Graph
from hetsched.partitioner import Partitioner, serving
from hetsched.plan import Plan, simulate
from hetsched.plugin import load, names
from hetsched.system import System

MODELS = (
    "digits_cnn mobilenet_v2 squeezenet1_1 light_bvlc_alexnet googlenet resnet18 light_resnet50 "
    "light_vgg19 bert_base_like lstm_text mobilenet_v3_small"
).split()
# Of each plan of a model: rounds until both are reached, or the longest time.
LEAST_ROUNDS = 15
SECONDS = 8.0
# Plans that are measured closer than this are equally good.
TIE = 0.01


def plans(graph: Graph, system: System, store: str) -> Iterator[tuple[str, Plan]]:
    """The plan of each partitioner for latency, by its name; each device alone comes first."""
    prices = priced(graph, system, None, store or None)
    alone = [f"single:device={device.name}" for device in system.devices]
    for name in (*alone, *(name for name in names(Partitioner) if name != "single")):
        partitioner = load(Partitioner, name)
        if "latency" not in partitioner.objectives:
            continue
        try:
            yield name, serving(partitioner, "latency").partition(graph, system, prices)
        except InfeasiblePlan:
            continue


def measured(model: models.Model, system: System, store: str, seed: int) -> list[dict[str, Any]]:
    """A row for each partitioner; plans that do the same are measured as one."""
    graph = hetsched.read_onnx(models.load(model, seed), shapes=model.shapes)
    begin = perf_counter()
    found = list(plans(graph, system, store))
    planning = perf_counter() - begin
    distinct: dict[object, Plan] = {}
    for _, plan in found:
        distinct.setdefault(_does(plan), plan)
    times: dict[object, list[float]] = {key: [] for key in distinct}
    inputs = models.inputs(model, graph, seed)
    with ExitStack() as stack:
        ways = {key: stack.enter_context(hetsched.compile(plan)) for key, plan in distinct.items()}
        for way in ways.values():
            way.run(inputs)
        begin = perf_counter()
        while len(times[_does(found[0][1])]) < LEAST_ROUNDS or perf_counter() - begin < SECONDS:
            for key, way in ways.items():
                times[key].append(seconds_of(lambda way=way: way.run(inputs)))
    return [
        {
            "model": model.name,
            "partitioner": name,
            "devices": list(plan.devices),
            "parts": len(plan.parts),
            "splits": len(plan.splits),
            "predicted": simulate(plan).makespan,
            "measured": statistics.median(times[_does(plan)]),
            "least": min(times[_does(plan)]),
            "rounds": len(times[_does(plan)]),
            "same_as": next(other for other, its in found if _does(its) == _does(plan)),
            "planning_seconds": planning,
        }
        for name, plan in found
    ]


def _does(plan: Plan) -> object:
    return plan.splits, plan.order, plan.cuts, tuple(sorted(plan.placement.items()))


def error(row: Mapping[str, Any]) -> float:
    return abs(row["predicted"] / row["measured"] - 1)


def tau(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Kendall's tau of predicted and measured, over pairs of plans that are told apart.

    Pairs that are measured closer than `TIE` have no order.

    >>> tau([{"predicted": p, "measured": m} for p, m in ((1, 1), (2, 3), (3, 2), (4, 4.001))])
    0.6666666666666666

    References
    ----------
    Kendall, "A new measure of rank correlation", Biometrika 30, 1938,
    https://doi.org/10.1093/biomet/30.1-2.81
    """
    signs = [
        1 if (a["predicted"] - b["predicted"]) * (a["measured"] - b["measured"]) > 0 else -1
        for a, b in combinations(rows, 2)
        if abs(a["measured"] - b["measured"]) > TIE * min(a["measured"], b["measured"])
    ]
    return statistics.fmean(signs) if signs else None


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of all rows; plans that do the same count once."""
    rows = [row for row in rows if row["same_as"] == row["partitioner"]]
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
        "models": len(by_model),
        "plans": len(rows),
        "median_error": statistics.median(errors),
        "p90_error": errors[min(len(errors) - 1, int(0.9 * len(errors)))],
        "tau_mean": statistics.fmean(taus) if taus else None,
        "tau_least": min(taus, default=None),
        "regret": regrets,
        "worst_regret": max(regrets.values()),
        "single_within_10": statistics.fmean(one <= 0.10 for one in alone),
        "single_within_5": statistics.fmean(one <= 0.05 for one in alone),
    }


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    shown = Table("model", "partitioner", "parts", "predicted ms", "measured ms", "error %")
    for row in rows:
        same = row["same_as"] != row["partitioner"]
        shown.add_row(
            row["model"],
            row["partitioner"] + (f" = {row['same_as']}" if same else ""),
            str(row["parts"]),
            f"{row['predicted'] * 1e3:.3f}",
            f"{row['measured'] * 1e3:.3f}",
            f"{(row['predicted'] / row['measured'] - 1) * 100:+.1f}",
        )
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", help="write all figures to this file, after each model")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--devices", default="cpu:0,cpu:1")
    parser.add_argument("--store", default="", help="profile store, by default the user's")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    console = Console(width=110)
    rows: list[dict[str, Any]] = []
    if chosen.json and Path(chosen.json).is_file():
        rows = json.loads(Path(chosen.json).read_text())["rows"]
    system = System.local(chosen.devices)
    for model in models.chosen(models.FOLDER, chosen.models.split(","), float("inf")):
        if any(row["model"] == model.name for row in rows):
            continue
        own = measured(model, system, chosen.store, chosen.seed)
        console.print(table(own))
        rows += own
        if chosen.json:
            about = record(chosen.seed) | {"devices": chosen.devices}
            write(chosen.json, about | {"summary": summary(rows), "rows": rows})
    console.print_json(data=summary(rows))


if __name__ == "__main__":
    try:
        main()
    except HetschedError as error_:
        sys.exit(f"bench.plans: {error_}")
