"""The verb `verify`."""

from pathlib import Path
from typing import Annotated

import typer

import hetsched
from hetsched import api
from hetsched.cli.given import fallbacks_of, is_package, machine_of, read_model, refuse
from hetsched.cli.options import (
    CostModelName,
    Devices,
    Fallback,
    Inputs,
    Json,
    MachineFile,
    Objective,
    PartitionerName,
    Seed,
    Shapes,
    StoreFile,
    Strict,
    Verbose,
    Winograd,
)
from hetsched.cli.progress import Steps
from hetsched.cli.show import show
from hetsched.inputs import read_inputs
from hetsched.report.tables import hardware
from hetsched.report.verify import verification_view
from hetsched.verify import verify as verify_executable


def verify(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="PACKAGE|MODEL", help="A package, or an ONNX model.", show_default=False
        ),
    ],
    devices: Devices = None,
    system: MachineFile = None,
    winograd: Winograd = None,
    partitioner: PartitionerName = None,
    cost_model: CostModelName = None,
    objective: Objective = None,
    shape: Shapes = None,
    inputs: Inputs = None,
    seed: Seed = 0,
    store: StoreFile = None,
    strict: Strict = False,
    fallback: Fallback = False,
    json_: Json = False,
    verbose: Verbose = False,
) -> None:
    """Compares every part and the whole with ONNX Runtime, and names the first that deviates.

    Example: hetsched verify model.hsp
    """
    planning = {
        "--devices": devices,
        "--system": system,
        "--winograd": winograd,
        "--partitioner": partitioner,
        "--cost-model": cost_model,
        "--objective": objective,
        "--shape": shape,
        "--store": store,
        "--strict": strict,
    }
    packaged = is_package(model)
    if packaged:
        refuse(planning, "has no effect on a package, which has it settled")
    told = fallbacks_of(fallback, strict)
    with Steps(verbose) as steps:
        if packaged:
            executable = hetsched.load(model, whole=True, fallback=told)
        else:
            graph = read_model(model, shape, steps)
            plan = api.partition(
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
            executable = api.compile(plan, progress=steps.begin("compiling"), fallback=told)
        with executable:
            if told is not None:
                # What then runs where is what is compared.
                executable.start()
            given = read_inputs(inputs) if inputs else None
            verification = verify_executable(executable, given, seed, steps.begin("verifying"))
    document = verification.to_dict() | {"fallback": told or []}
    document |= hardware(api.as_here(executable.plan))
    show(document, json_, verification_view(document, verification))
    verification.check()
