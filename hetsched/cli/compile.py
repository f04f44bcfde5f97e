"""The verb `compile`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from hetsched import api
from hetsched.cli.given import (
    check_writable,
    fallbacks_of,
    machine_of,
    naming_file,
    read_model,
    refuse,
    text_of,
)
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
from hetsched.cli.show import show_plan
from hetsched.plan import Plan
from hetsched.report.plan import plan_document


def compile_(
    model: Model,
    output: Annotated[
        Path,
        typer.Option(
            "-o", "--output", metavar="FILE", help="The package to write.", show_default=False
        ),
    ],
    devices: Devices = None,
    system: MachineFile = None,
    winograd: Winograd = None,
    partitioner: PartitionerName = None,
    cost_model: CostModelName = None,
    objective: Objective = None,
    shape: Shapes = None,
    plan: Annotated[
        Path | None,
        typer.Option("--plan", metavar="FILE", help="Compile this plan of the same model."),
    ] = None,
    measure: Annotated[
        bool | None,
        typer.Option(
            "--measure/--no-measure",
            help="Run a plan of several devices beside the best single one, and package what is "
            "faster; the default for auto on this machine.",
            show_default=False,
        ),
    ] = None,
    store: StoreFile = None,
    strict: Strict = False,
    fallback: Fallback = False,
    json_: Json = False,
    verbose: Verbose = False,
) -> None:
    """Plans, compiles and writes one package that runs without a compiler.

    Parts that were compiled before come from the cache; HETSCHED_CACHE is its folder, or off.

    Example: hetsched compile model.onnx -o model.hsp --devices cpu:0,cpu:1
    """
    check_writable(output)
    planning = {
        "--devices": devices,
        "--system": system,
        "--winograd": winograd,
        "--partitioner": partitioner,
        "--cost-model": cost_model,
        "--objective": objective,
        "--strict": strict,
    }
    if plan:
        refuse(planning, "has no effect with --plan, which has it settled")
    told = fallbacks_of(fallback, strict)
    with Steps(verbose) as steps:
        graph = read_model(model, shape, steps)
        if plan:
            with naming_file(plan):
                plans: Sequence[Plan] = [Plan.from_json(text_of(plan), graph)]
        else:
            plans = api.plans(
                graph,
                machine_of(devices, system, winograd, store, steps, told),
                partitioner or "auto",
                objective,
                cost_model,
                store,
                strict,
                steps.begin("pricing"),
                told,
            )
        if measure is None:
            measure = (
                not plan and (partitioner or "auto") == "auto" and api.is_here(plans[0].system)
            )
        compiling = steps.begin("compiling")
        # A plan that was given is compiled as it stands.
        settled = plan or strict
        replan = None if settled else api.partitioner_for(partitioner or "auto", objective)
        executable = api.compile(
            plans, measure=measure, progress=compiling, replan=replan, fallback=told
        )
        with executable:
            steps.begin("writing the package")
            executable.save(output)
            chosen, memory = executable.plan, executable.memory
    document = plan_document(chosen, memory) | {"fallback": told or []}
    if output.is_file():
        document |= {"package": str(output), "package_nbytes": output.stat().st_size}
    show_plan(chosen, document, json_)
