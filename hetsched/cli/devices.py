"""The verb `devices`."""

from pathlib import Path
from typing import Annotated

import typer

from hetsched import api
from hetsched.cli.given import check_writable, store_of
from hetsched.cli.options import Devices, Json, StoreFile, Verbose
from hetsched.cli.progress import Steps, say
from hetsched.cli.show import show
from hetsched.errors import DeviceError
from hetsched.files import write_text
from hetsched.links import links_by_copy
from hetsched.meters import meters
from hetsched.report.devices import devices_document, devices_view
from hetsched.system import System

# Links are measured between this many cores unless --devices names others: all pairs are many.
MOST_LINKED_CORES = 4


def devices(
    devices: Devices = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="Write a machine file, in TOML."),
    ] = None,
    store: StoreFile = None,
    json_: Json = False,
    verbose: Verbose = False,
) -> None:
    """Shows what is here, how fast data passes between the cores, and what is absent and why.

    Example: hetsched devices --devices cpu:0,cpu:1 -o machine.toml
    """
    check_writable(output)
    found = api.devices()
    chosen = devices
    left_out = 0
    if chosen is None:
        singles = [item.name for item in found if item.device and item.name.startswith("cpu:")]
        left_out = len(singles) - len(singles[:MOST_LINKED_CORES])
        chosen = ",".join(singles[:MOST_LINKED_CORES])
    with Steps(verbose) as steps:
        steps.begin("measuring links")
        system = System.local(chosen, store_of(store)) if chosen else None
        copies = links_by_copy(system.devices, store_of(store)) if system else []
    if output and system:
        write_text(output, system.to_toml())
    elif output:
        raise DeviceError("no device is here that a machine file could describe")
    document = devices_document(found, system, meters(), copies)
    show(document, json_, devices_view(document))
    if left_out:
        say(f"links of {left_out} more cores are not shown; choose cores with --devices")
