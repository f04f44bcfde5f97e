"""What `hetsched partition` and `hetsched compile` show: one plan, or a front of several."""

from collections.abc import Iterator, Sequence
from itertools import pairwise

from rich.console import RenderableType
from rich.text import Text

from hetsched.bounds import plan_bound
from hetsched.footprint import Memory
from hetsched.graph import Graph
from hetsched.objective import objective
from hetsched.plan import Plan, simulate
from hetsched.report.tables import (
    Document,
    energy_document,
    energy_view,
    gantt_view,
    hardware,
    hardware_view,
    scaled,
    shortened,
    table,
    transfers_view,
    what_of,
)
from hetsched.schedule import Schedule
from hetsched.split import Split


def plan_document(plan: Plan, memory: Memory | None = None) -> Document:
    """Splits, parts, transfers, memory and prediction of a plan, and what was refused.

    With `memory` what devices hold is that, else what the graph alone says without re-use.
    """
    schedule = simulate(plan)
    steady = plan.objective == "throughput"
    cost = objective("throughput").value(plan) if steady else schedule.makespan
    bound = plan_bound(plan.recipe.tasks, plan.objective, cost)
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
                "replicas": list(plan.replicas.get(part.device.name, ())),
                "operations": len(part.ops),
                "label": part.label,
                "weight_nbytes": part.weight_nbytes,
                "activation_nbytes": part.activation_nbytes,
                "predicted_seconds": schedule.slot(part.name).seconds,
            }
            for part in plan.parts
        ],
        "memory": _memory(plan, memory),
        "energy": energy_document(plan.recipe),
        "predicted": schedule.to_dict(),
        "makespan_seconds": schedule.makespan,
        "cost_seconds": cost,
        "lower_bound_seconds": bound.seconds,
        "lower_bounds_seconds": dict(bound.values),
        "gap": cost / bound.seconds - 1 if bound.seconds else None,
        "notes": list(plan.notes),
        "refusals": _refusals(plan),
        **hardware(plan.system.devices),
    }


def plan_view(document: Document, schedule: Schedule, width: int) -> Iterator[RenderableType]:
    yield Text(f"{document['model']} on {document['system']}", "bold")
    yield (
        f"partitioner {document['partitioner']}, objective {document['objective']}, "
        f"cost model {document['cost_model']}"
    )
    if document["splits"]:
        yield ""
        yield table(
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
    yield table(
        "Parts",
        ("part", "device", ">ops", "what", ">weights MB", ">activations MB", ">predicted ms"),
        (
            (
                part["name"],
                ", ".join(part["replicas"]) or part["device"],
                str(part["operations"]),
                what_of(part["label"]),
                scaled(part["weight_nbytes"], 1e6, 3),
                scaled(part["activation_nbytes"], 1e6, 3),
                scaled(part["predicted_seconds"], 1e-3, 3),
            )
            for part in document["parts"]
        ),
    )
    yield from transfers_view(document["predicted"]["transfers"])
    yield ""
    yield from _memory_view(document["memory"])
    yield from energy_view(document["energy"])
    yield from gantt_view(schedule, width)
    yield ""
    gap = document["gap"]
    steady = document["objective"] == "throughput"
    predicted = f"{scaled(document['makespan_seconds'], 1e-3, 3)} ms"
    if steady:
        predicted += f", {scaled(document['cost_seconds'], 1e-3, 3)} ms a request in steady state"
    yield (
        f"predicted    {predicted}"
        + (f", {gap * 100:.1f} % above the lower bound" if gap is not None else "")
    )
    values = document["lower_bounds_seconds"]
    yield (
        f"lower bound  {scaled(document['lower_bound_seconds'], 1e-3, 3)} ms"
        f"{' a request' if steady else ''}, the best of "
        + ", ".join(f"{name} {scaled(value, 1e-3, 3)}" for name, value in values.items())
        + ":"
    )
    yield "             no placement of these kernel groups at these prices is faster"
    if "package" in document:
        nbytes = scaled(document["package_nbytes"], 1e6, 3)
        yield f"package      {nbytes} MB, {document['package']}"
    if document["notes"]:
        yield ""
        yield table("Notes", ("",), ((note,) for note in document["notes"]))
    if document["refusals"]:
        yield ""
        yield table(
            "Refused",
            ("device", ">groups", "first", "why"),
            (
                (row["device"], str(len(row["groups"])), row["groups"][0], row["reason"])
                for row in document["refusals"]
            ),
        )
    yield from hardware_view(document)


def _memory(plan: Plan, memory: Memory | None) -> list[Document]:
    """What each device holds and has; `exact` where a compiled plan says so."""
    limits = {device.name: device.memory_bytes for device in plan.system.devices}
    if memory is None:
        return [
            {"device": name, "held_nbytes": held, "exact": False, "limit_nbytes": limits[name]}
            for name, held in plan.memory_bytes().items()
        ]
    return [
        {
            "device": held.device,
            "held_nbytes": held.nbytes,
            "exact": held.exact,
            "limit_nbytes": limits[held.device],
            "weights_nbytes": held.weights_nbytes,
            "tensors_nbytes": held.tensors_nbytes,
            "workspace_nbytes": held.workspace_nbytes,
        }
        for held in memory.devices
    ]


def _memory_view(rows: Sequence[Document]) -> Iterator[RenderableType]:
    keys = ("held_nbytes", "weights_nbytes", "tensors_nbytes", "workspace_nbytes")
    compiled = all("weights_nbytes" in row for row in rows)
    known = keys if compiled else keys[:1]
    heads = (">held MB", ">weights MB", ">between parts MB", ">workspace MB")
    yield table(
        "Memory of one run, as compiled" if compiled else "Memory, by the graph without re-use",
        ("device", *heads[: len(known)], ">has MB"),
        (
            (
                row["device"],
                *(scaled(row[key], 1e6, 3) for key in known),
                scaled(row["limit_nbytes"], 1e6, 0),
            )
            for row in rows
        ),
    )


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
        **hardware(found[0][1].system.devices if found else ()),
    }


def front_view(document: Document) -> Iterator[RenderableType]:
    goals = [objective(name) for name in document["objectives"]]
    yield table(
        "Plans that no other beats in all of these, predicted",
        (">", *(f">{goal.name} {goal.unit}" for goal in goals), ">parts", "devices", "partitioner"),
        (
            (
                str(number),
                *(scaled(plan["values"][goal.name], goal.scale, 3) for goal in goals),
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
    yield from hardware_view(document)
