"""What the command line shows: documents of plain values, and tables drawn from them.

A document is what `--json` prints, in SI units. The tables are drawn from the same document, so
that both have the same numbers.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from itertools import pairwise
from math import isfinite
from statistics import median
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hetsched.api import Found, Profiled, Scheduled, Tuning
from hetsched.bounds import plan_bound
from hetsched.device import Device
from hetsched.explain import Border, Difference, Explanation
from hetsched.graph import Graph
from hetsched.objective import objective, seconds_a_request
from hetsched.plan import Plan, Recipe, simulate
from hetsched.schedule import Schedule, bars, gantt
from hetsched.split import Split
from hetsched.system import System
from hetsched.verify import Verification

Document = dict[str, Any]

# Of a long list the largest are shown and the rest counted; the document has all.
MOST_ROWS = 12
# Of a candidate's text in a table; longer are traces of schedules.
LONGEST_CANDIDATE = 40
# Beside the cells of a Gantt row: the device's name, two bars and the share.
GANTT_MARGIN = 14


def devices_document(found: Sequence[Found], system: System | None) -> Document:
    """What is here, what is not and why, and the links of `system`."""
    links = system.links if system else ()
    return {
        "system": system.name if system else None,
        "devices": [_values(item.device) for item in found if item.device],
        "absent": [{"name": item.name, "reason": item.reason} for item in found if not item.device],
        "links": [_values(link) for link in links],
    }


def devices_view(document: Document) -> Iterator[RenderableType]:
    devices = document["devices"]
    yield _table(
        "Devices",
        ("device", "target", "kind", "cores", ">clock GHz", ">memory GiB", ">GFLOP/s", ">GB/s"),
        (
            (
                device["name"],
                device["target"],
                device["kind"],
                _ranges(device["cores"]),
                _number(device["clock_hz"], 1e9, 2),
                _number(device["memory_bytes"], 2**30, 1),
                _number(device["flops_per_second"], 1e9, 0),
                _number(device["bytes_per_second"], 1e9, 0),
            )
            for device in devices
        ),
    )
    yield Text(
        "GFLOP/s and GB/s are peaks estimated from clock and vector width, not measured", "dim"
    )
    hardware: dict[tuple[str, str, str], list[str]] = {}
    for device in devices:
        caches = " + ".join(_size(nbytes) for nbytes in device["cache_nbytes"]) or "unknown"
        key = device["description"] or "unknown", device["isa"] or "unknown", caches
        hardware.setdefault(key, []).append(device["name"])
    for (description, isa, caches), names in hardware.items():
        yield ""
        yield _table(
            "Hardware",
            ("", ""),
            (
                ("devices", ", ".join(names)),
                ("processor", description),
                ("instructions", isa),
                ("caches of a core", caches),
            ),
        )
    yield from _links("Links, measured", document["links"])
    if document["absent"]:
        yield ""
        rows = ((item["name"], item["reason"]) for item in document["absent"])
        yield _table("Not here", ("target", "why"), rows)


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
        "links": [_values(link) for link in system.links],
    }


def profile_view(document: Document) -> Iterator[RenderableType]:
    def state(row: Mapping[str, Any]) -> str:
        if row["refusal"]:
            return f"cannot run: {row['refusal']}"
        if row["seconds"] is None:
            return "not measured"
        return "in the store already" if row["already"] else "measured now"

    yield _table(
        "Kernel groups",
        ("kinds", ">groups", "devices", ">ms", ">spread ms", ">GFLOP/s", "state"),
        (
            (
                row["kinds"],
                str(len(row["groups"])),
                " ".join(row["devices"]),
                _number(row["seconds"], 1e-3, 4),
                _number(row["spread_seconds"], 1e-3, 4),
                _number(row["flops_per_second"], 1e9, 2),
                state(row),
            )
            for row in document["kernels"]
        ),
    )
    yield from _links("Links", document["links"])
    yield ""
    yield (
        f"{document['measured']} measured now, {document['already']} in the store already, "
        f"{document['missing']} missing; store {document['store']}"
    )


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

    yield _table(
        "Kernels",
        ("workload", "devices", ">tried", ">first us", ">chosen us", ">gain", "chosen"),
        (
            (
                row["workload"],
                " ".join(row["devices"]),
                str(len(row["candidates"])),
                _number(row["first_seconds"], 1e-6, 1),
                _number(row["chosen_seconds"], 1e-6, 1),
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


def plan_document(plan: Plan) -> Document:
    """Splits, parts, transfers, memory and prediction of a plan, and what was refused."""
    schedule = simulate(plan)
    steady = plan.objective == "throughput"
    cost = seconds_a_request(schedule, plan.system) if steady else schedule.makespan
    bound = plan_bound(plan.recipe.tasks, plan.objective, cost)
    held = plan.memory_bytes()
    return {
        "model": plan.original.name,
        "system": plan.system.name,
        "partitioner": plan.partitioner,
        "objective": plan.objective,
        "cost_model": plan.prices.model,
        "splits": [_split_document(item, plan.original) for item in plan.splits],
        "parts": [
            {
                "name": part.name,
                "device": part.device.name,
                "operations": len(part.ops),
                "label": part.label,
                "weight_nbytes": part.weight_nbytes,
                "activation_nbytes": part.activation_nbytes,
                "predicted_seconds": schedule.slot(part.name).seconds,
            }
            for part in plan.parts
        ],
        "memory": [
            {
                "device": name,
                "held_nbytes": nbytes,
                "limit_nbytes": plan.system.device(name).memory_bytes,
            }
            for name, nbytes in held.items()
        ],
        "predicted": schedule.to_dict(),
        "makespan_seconds": schedule.makespan,
        "cost_seconds": cost,
        "lower_bound_seconds": bound.seconds,
        "lower_bounds_seconds": dict(bound.values),
        "gap": cost / bound.seconds - 1 if bound.seconds else None,
        "notes": list(plan.notes),
        "refusals": _refusals(plan),
    }


def plan_view(document: Document, schedule: Schedule, width: int) -> Iterator[RenderableType]:
    yield Text(f"{document['model']} on {document['system']}", "bold")
    yield (
        f"partitioner {document['partitioner']}, objective {document['objective']}, "
        f"cost model {document['cost_model']}"
    )
    if document["splits"]:
        yield ""
        yield _table(
            "Splits",
            ("operations", ">ops", ">pieces", "cut"),
            (
                (
                    " .. ".join(map(shortened, dict.fromkeys((row["first"], row["last"])))),
                    str(row["operations"]),
                    str(row["pieces"]),
                    row["cut"],
                )
                for row in document["splits"]
            ),
        )
    yield ""
    yield _table(
        "Parts",
        ("part", "device", ">ops", "what", ">weights MB", ">activations MB", ">predicted ms"),
        (
            (
                part["name"],
                part["device"],
                str(part["operations"]),
                _what(part["label"]),
                _number(part["weight_nbytes"], 1e6, 3),
                _number(part["activation_nbytes"], 1e6, 3),
                _number(part["predicted_seconds"], 1e-3, 3),
            )
            for part in document["parts"]
        ),
    )
    yield from _transfers(document["predicted"]["transfers"])
    yield ""
    yield _table(
        "Memory, weights and activations at most",
        ("device", ">held MB", ">has MB"),
        (
            (
                row["device"],
                _number(row["held_nbytes"], 1e6, 3),
                _number(row["limit_nbytes"], 1e6, 0),
            )
            for row in document["memory"]
        ),
    )
    yield from _gantt(schedule, width)
    yield ""
    gap = document["gap"]
    steady = document["objective"] == "throughput"
    predicted = f"{_number(document['makespan_seconds'], 1e-3, 3)} ms"
    if steady:
        predicted += f", {_number(document['cost_seconds'], 1e-3, 3)} ms a request in steady state"
    yield (
        f"predicted    {predicted}"
        + (f", {gap * 100:.1f} % above the lower bound" if gap is not None else "")
    )
    values = document["lower_bounds_seconds"]
    yield (
        f"lower bound  {_number(document['lower_bound_seconds'], 1e-3, 3)} ms"
        f"{' a request' if steady else ''}, the best of "
        + ", ".join(f"{name} {_number(value, 1e-3, 3)}" for name, value in values.items())
        + ":"
    )
    yield "             no placement of these kernel groups at these prices is faster"
    if "package" in document:
        nbytes = _number(document["package_nbytes"], 1e6, 3)
        yield f"package      {nbytes} MB, {document['package']}"
    if document["notes"]:
        yield ""
        yield _table("Notes", ("",), ((note,) for note in document["notes"]))
    if document["refusals"]:
        yield ""
        yield _table(
            "Refused",
            ("device", ">groups", "first", "why"),
            (
                (row["device"], str(len(row["groups"])), row["groups"][0], row["reason"])
                for row in document["refusals"]
            ),
        )


def front_document(
    goals: Sequence[str], found: Sequence[tuple[tuple[float, ...], Plan]]
) -> Document:
    """Plans that no other beats in all of `goals`, with their values in SI units."""
    return {
        "objectives": list(goals),
        "plans": [
            {
                "partitioner": plan.partitioner,
                "devices": list(plan.devices),
                "parts": len(plan.parts),
                "values": dict(zip(goals, values, strict=True)),
            }
            for values, plan in found
        ],
    }


def front_view(document: Document) -> Iterator[RenderableType]:
    goals = [objective(name) for name in document["objectives"]]
    yield _table(
        "Plans that no other beats in all of these, predicted",
        (">", *(f">{goal.name} {goal.unit}" for goal in goals), ">parts", "devices", "partitioner"),
        (
            (
                str(number),
                *(_number(plan["values"][goal.name], goal.scale, 3) for goal in goals),
                str(plan["parts"]),
                ", ".join(plan["devices"]),
                plan["partitioner"],
            )
            for number, plan in enumerate(document["plans"], start=1)
        ),
    )
    for number, plan in enumerate(document["plans"], start=1):
        if "file" in plan:
            yield f"{number} is in {plan['file']}"


def simulation_document(recipe: Recipe, planned: Schedule, schedule: Schedule) -> Document:
    """The schedule on the machine of `recipe`, beside that on the machine it was planned for."""
    return {
        "system": recipe.tasks.system.name,
        "makespan_seconds": schedule.makespan,
        "planned_seconds": planned.makespan,
        "parts": [
            {
                "name": name,
                "device": device,
                "label": recipe.labels.get(name, ""),
                "groups": len(members),
                "planned_seconds": planned.slot(name).seconds,
                "predicted_seconds": schedule.slot(name).seconds,
            }
            for name, device, members in recipe.parts
        ],
        "predicted": schedule.to_dict(),
    }


def simulation_view(document: Document, schedule: Schedule, width: int) -> Iterator[RenderableType]:
    yield _table(
        f"Parts on {document['system']}",
        ("part", "device", "what", ">as planned ms", ">predicted ms"),
        (
            (
                part["name"],
                part["device"],
                _what(part["label"]),
                _number(part["planned_seconds"], 1e-3, 3),
                _number(part["predicted_seconds"], 1e-3, 3),
            )
            for part in document["parts"]
        ),
    )
    yield from _transfers(document["predicted"]["transfers"])
    yield from _gantt(schedule, width)
    yield ""
    yield (
        f"predicted {_number(document['makespan_seconds'], 1e-3, 3)} ms; "
        f"as planned {_number(document['planned_seconds'], 1e-3, 3)} ms"
    )


def schedule_document(found: Scheduled) -> Document:
    """What a scheduler found for an instance."""
    solution = found.solution
    return {
        "makespan": solution.makespan,
        "lower_bound": solution.lower_bound,
        "optimal": solution.optimal,
        "slots": [vars(slot) | {} for slot in solution.schedule(found.problem).slots],
        "solver": solution.solver,
        "wall_seconds": found.wall_seconds,
    }


def schedule_view(document: Document, schedule: Schedule, width: int) -> Iterator[RenderableType]:
    yield Text(gantt(schedule, _columns(schedule, width)))
    yield ""
    gap = 1 - document["lower_bound"] / document["makespan"] if document["makespan"] else 0.0
    proof = "proved optimal" if document["optimal"] else f"gap {gap * 100:.2f} %"
    yield f"makespan     {document['makespan']:.9g} s"
    yield f"lower bound  {document['lower_bound']:.9g} s, {proof}"
    yield f"found by     {document['solver']} in {document['wall_seconds']:.3f} s"


def explanation_document(
    found: Sequence[Explanation], borders: Sequence[Border], makespan: float
) -> Document:
    """Nodes with their alternatives, and why each part is a part."""
    return {
        "makespan_seconds": makespan,
        "nodes": [
            {
                "node": item.node,
                "part": item.part,
                "device": item.device,
                "reason": item.reason,
                "alternatives": [vars(other) | {} for other in item.alternatives],
            }
            for item in found
        ],
        "parts": [vars(border) | {} for border in borders],
    }


def explanation_view(document: Document) -> Iterator[RenderableType]:
    if len(document["nodes"]) == 1:
        (node,) = document["nodes"]
        yield Text(node["node"], "bold")
        yield f"in {node['part']} on {node['device']}: {node['reason']}"
        yield ""
        yield _alternatives(node)
        return
    yield _table(
        "Nodes",
        ("node", "part", "device", ">there us", ">transfers us", "why"),
        (
            (
                shortened(node["node"]),
                node["part"],
                node["device"],
                _number(chosen["seconds"], 1e-6, 1),
                _number(chosen["transfer_seconds"], 1e-6, 1),
                node["reason"],
            )
            for node in document["nodes"]
            for chosen in node["alternatives"]
            if chosen["device"] == node["device"]
        ),
    )
    yield ""
    yield _table(
        "Parts, and why each begins where it does",
        ("part", "device", "first", "why"),
        (
            (part["part"], part["device"], shortened(part["first"]), part["reason"])
            for part in document["parts"]
        ),
    )
    yield ""
    yield (
        f"predicted {_number(document['makespan_seconds'], 1e-3, 3)} ms; "
        "name a node to see what it would cost on each device"
    )


def _alternatives(node: Document) -> RenderableType:
    return _table(
        "Alternatives",
        ("device", ">alone us", ">transfers us", ">whole run us", ""),
        (
            (
                item["device"],
                _number(item["seconds"], 1e-6, 1),
                _number(item["transfer_seconds"], 1e-6, 1),
                "-" if item["change"] is None else f"{item['change'] * 1e6:+.1f}",
                "chosen"
                if item["device"] == node["device"]
                else item["refusal"] or item["obstacle"],
            )
            for item in node["alternatives"]
        ),
    )


def difference_document(found: Difference) -> Document:
    """What two plans do not have in common."""
    return {
        "same": found.empty,
        "makespan_seconds": list(found.makespans),
        "parts": list(found.parts),
        "facts": {name: list(pair) for name, pair in found.facts.items()},
        "moves": [vars(move) | {} for move in found.moves],
        "only_before": list(found.only_before),
        "only_after": list(found.only_after),
        "repriced": [
            {"node": node, "device": device, "before_seconds": old, "after_seconds": new}
            for node, device, old, new in found.repriced
        ],
        "order_changed": found.order_changed,
    }


def difference_view(document: Document) -> Iterator[RenderableType]:
    before, after = document["makespan_seconds"]
    if document["same"]:
        yield "the plans are the same"
    elif facts := {
        **document["facts"],
        "parts": list(map(str, document["parts"])),
        "predicted ms": [_number(before, 1e-3, 3), _number(after, 1e-3, 3)],
    }:
        rows = ((name, *pair) for name, pair in facts.items() if pair[0] != pair[1])
        yield _table("Plans", ("", "before", "after"), rows)
    if moves := document["moves"]:
        yield ""
        yield _table(
            "Nodes that moved",
            ("node", "from", "to", ">before us", ">after us"),
            (
                (
                    shortened(move["node"]),
                    move["before"],
                    move["after"],
                    _number(move["before_seconds"], 1e-6, 1),
                    _number(move["after_seconds"], 1e-6, 1),
                )
                for move in moves
            ),
        )
    for title, key in (("Only before", "only_before"), ("Only after", "only_after")):
        if document[key]:
            yield ""
            yield _table(title, ("",), ((shortened(name, 90),) for name in document[key]))
    if rows := document["repriced"]:
        yield ""
        yield _table(
            "Prices that changed",
            ("node", "device", ">before us", ">after us"),
            (
                (
                    shortened(row["node"]),
                    row["device"],
                    _number(row["before_seconds"], 1e-6, 1),
                    _number(row["after_seconds"], 1e-6, 1),
                )
                for row in sorted(
                    rows, key=lambda row: -abs(row["after_seconds"] - row["before_seconds"])
                )[:MOST_ROWS]
            ),
        )
        if len(rows) > MOST_ROWS:
            yield f"and {len(rows) - MOST_ROWS} with smaller changes"
    if document["order_changed"]:
        yield ""
        yield "the nodes that both have come in another order"


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
            for name in predicted.devices
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
    yield _table(
        f"Latency, {document['runs']} runs",
        tuple(f">{name} ms" for name in latency),
        (tuple(_number(value, 1e-3, 3) for value in latency.values()),),
    )
    yield ""
    rows = [("whole", "", "", document["makespan"])]
    rows += [(row["name"], row["device"], _what(row["label"]), row) for row in document["parts"]]
    yield _table(
        f"Predicted beside {document['clock']}, median run",
        ("part", "device", "what", ">predicted ms", ">measured ms", ">measured / predicted"),
        (
            (
                name,
                device,
                what,
                _number(row["predicted_seconds"], 1e-3, 3),
                _number(row["measured_seconds"], 1e-3, 3),
                _number(row["ratio"], 1, 2),
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
        yield Text(bars(schedule, _columns(schedule, width), span))


def median_run(measured: Sequence[Schedule]) -> Schedule:
    """The run whose makespan is the median, the lower one of two."""
    return sorted(measured, key=lambda run: run.makespan)[(len(measured) - 1) // 2]


def verification_view(verification: Verification) -> Iterator[RenderableType]:
    yield _table(
        "Against ONNX Runtime",
        ("part", "device", "worst tensor", "dtype", ">deviation", ">tolerance", "result"),
        (
            (
                item.name,
                item.device,
                shortened(item.tensor),
                item.dtype,
                f"{item.deviation:.1e}",
                f"{item.tolerance:.0e}",
                item.problem or ("ok" if item.passed else "deviates"),
            )
            for item in verification.comparisons
        ),
    )
    yield ""
    for name in verification.independent:
        yield f"warning: output '{name}' does not depend on the inputs; its equality proves little"
    if verification.passed:
        parts = len(verification.comparisons) - 1
        yield f"verified: {parts} part{'s' * (parts != 1)} and the whole, seed {verification.seed}"


def finite(value: Any) -> Any:
    """The value with null for what JSON has no number for."""
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def _table(title: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> RenderableType:
    """A title and columns, numbers to the right where the head begins with `>`."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=any(heads))
    for head in heads:
        right = head.startswith(">")
        table.add_column(
            head.lstrip(">"),
            justify="right" if right else "left",
            no_wrap=right,
            overflow="fold",
            header_style="dim",
        )
    for row in rows:
        table.add_row(*row)
    return Group(Text(title, "bold"), table)


def _links(title: str, links: Sequence[Mapping[str, Any]]) -> Iterator[RenderableType]:
    if not links:
        return
    yield ""
    yield _table(
        title,
        ("from", "to", ">latency us", ">GB/s"),
        (
            (
                link["source"],
                link["sink"],
                _number(link["seconds"], 1e-6, 1),
                _number(link["bytes_per_second"], 1e9, 1),
            )
            for link in links
        ),
    )


def _transfers(transfers: Sequence[Mapping[str, Any]]) -> Iterator[RenderableType]:
    if not transfers:
        return
    shown = sorted(transfers, key=lambda move: -move["nbytes"])[:MOST_ROWS]
    yield ""
    yield _table(
        "Transfers",
        ("tensor", "from", "to", ">kB", ">predicted us"),
        (
            (
                shortened(move["tensor"]),
                move["source"] or "host",
                move["sink"] or "host",
                _number(move["nbytes"], 1e3, 1),
                _number(move["finish"] - move["start"], 1e-6, 1),
            )
            for move in shown
        ),
    )
    if len(transfers) > len(shown):
        yield f"and {len(transfers) - len(shown)} smaller ones"


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


def _gantt(schedule: Schedule, width: int) -> Iterator[RenderableType]:
    yield ""
    yield Text("Schedule", "bold")
    yield Text(gantt(schedule, _columns(schedule, width)))


def _columns(schedule: Schedule, width: int) -> int:
    """The columns that are left for the bars of a chart."""
    widest = max((len(device) for device in schedule.devices), default=0)
    return max(20, min(72, width - widest - GANTT_MARGIN))


def _split_document(item: Split, graph: Graph) -> Document:
    """What is split, and how the last of its results is cut, also in words."""
    last = item.exits[-1]
    written = graph.producers[last.tensor].writes
    rank = next(len(tensor.shape) for tensor in written if tensor.name == last.tensor)
    axes = [
        {
            "axis": "sum" if last.sum else axis_name(axis, rank),
            "sizes": [end - start for start, end in pairwise(bounds)],
        }
        for axis, bounds in last.axes
    ]
    return {
        "first": item.ops[0],
        "last": item.ops[-1],
        "operations": len(item.ops),
        "pieces": item.pieces,
        "axes": axes,
        "cut": " by ".join(f"{cut['axis']} {' | '.join(map(str, cut['sizes']))}" for cut in axes),
    }


def axis_name(axis: int, rank: int) -> str:
    """What an axis is called: the last two are rows and columns, the first is the batch.

    Examples
    --------
    >>> [axis_name(axis, 4) for axis in range(4)]
    ['batch', 'channels', 'rows', 'columns']
    """
    names = ("rows", "columns") if rank > 1 else ("columns",)
    known = {2: (), 3: ("batch",), 4: ("batch", "channels")}.get(rank, ())
    every = (*known, *names)
    return every[axis] if len(every) == rank else f"axis {axis}"


def _refusals(plan: Plan) -> list[Document]:
    """Groups by the device that refused them and its reason, in the order of the graph."""
    found: dict[tuple[str, str], list[str]] = {}
    for group in plan.graph.groups:
        for device, reason in plan.prices.refusals.get(group.name, {}).items():
            found.setdefault((device, reason), []).append(f"{group.kinds} '{group.name}'")
    return [
        {"device": device, "reason": reason, "groups": names}
        for (device, reason), names in found.items()
    ]


def _ratio(predicted: float, measured: float) -> Document:
    return {
        "predicted_seconds": predicted,
        "measured_seconds": measured,
        "ratio": measured / predicted if predicted else None,
    }


def _values(record: Device | Any) -> Document:
    return {f.name: getattr(record, f.name) for f in fields(record)}


def _what(label: str) -> str:
    """The label without the count of operations, which has a column of its own."""
    return shortened(label.rpartition(" (")[0] or label)


def _number(value: float | None, unit: float, digits: int) -> str:
    if value is None:
        return "-"
    return f"{value / unit:.{digits}f}" if isfinite(value) else "unlimited"


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
