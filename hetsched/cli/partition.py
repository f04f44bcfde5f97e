"""The verb `partition`."""

from pathlib import Path
from typing import Annotated

import typer

from hetsched import api
from hetsched.cli.given import check_writable, fallbacks_of, machine_of, read_model
from hetsched.cli.options import (
    CostModelName,
    Devices,
    Fallback,
    Json,
    MachineFile,
    Model,
    Objective,
    PartitionerName,
    Shapes,
    StoreFile,
    Strict,
    Verbose,
    Winograd,
)
from hetsched.cli.progress import Steps
from hetsched.cli.show import show, show_plan
from hetsched.files import write_text
from hetsched.report.plan import front_document, front_view, plan_document


def partition(
    model: Model,
    devices: Devices = None,
    system: MachineFile = None,
    winograd: Winograd = None,
    partitioner: PartitionerName = None,
    cost_model: CostModelName = None,
    objective: Objective = None,
    shape: Shapes = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="Write the plan, in JSON."),
    ] = None,
    front: Annotated[
        str | None,
        typer.Option(
            "--front",
            metavar="LIST",
            help="Show each plan that no other beats in all of these, such as latency,memory; -o "
            "writes them all, plan.1.json and so on.",
        ),
    ] = None,
    store: StoreFile = None,
    strict: Strict = False,
    fallback: Fallback = False,
    json_: Json = False,
    verbose: Verbose = False,
) -> None:
    """Plans which device runs what, with the predicted schedule and a bound from below.

    Example: hetsched partition model.onnx --devices cpu:0,cpu:1 -o plan.json
    """
    check_writable(output)
    told = fallbacks_of(fallback, strict)
    with Steps(verbose) as steps:
        graph = read_model(model, shape, steps)
        machine = machine_of(devices, system, winograd, store, steps, told)
        plans = api.plans(
            graph,
            machine,
            partitioner or "auto",
            objective,
            cost_model,
            store,
            strict,
            steps.begin("pricing"),
            told,
        )
    if front:
        goals = [item.strip() for item in front.split(",")]
        found = api.front(plans, goals)
        document = front_document(goals, found) | {"fallback": told or []}
        for number, (_, plan) in enumerate(found, start=1):
            if output:
                path = output.with_suffix(f".{number}{output.suffix}")
                write_text(path, plan.to_json())
                document["plans"][number - 1]["file"] = str(path)
        show(document, json_, front_view(document))
        return
    plan = plans[0]
    if output:
        write_text(output, plan.to_json())
    show_plan(plan, plan_document(plan) | {"fallback": told or []}, json_)
