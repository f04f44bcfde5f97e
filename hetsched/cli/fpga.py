"""The verbs of `hetsched fpga`."""

from pathlib import Path
from typing import Annotated

import typer

import hetsched
from hetsched.cli.options import Json, Verbose
from hetsched.cli.progress import Steps
from hetsched.cli.show import show
from hetsched.report.fpga import export_document, export_view

fpga = typer.Typer(help="The FPGA's overlay, for others' tools.")


@fpga.callback()
def fpga_() -> None:
    """The FPGA's overlay, for others' tools.

    Example: hetsched fpga export --overlay ecp5-8x8 -o overlay
    """


@fpga.command()
def export(
    output: Annotated[
        Path,
        typer.Option("-o", "--output", metavar="FOLDER", help="Write into this new folder."),
    ],
    overlay: Annotated[
        str, typer.Option("--overlay", metavar="NAME", help="The overlay's family and size.")
    ] = "ecp5-8x8",
    json_: Json = False,
    verbose: Verbose = False,
) -> None:
    """Writes the overlay as Verilog, its parameters and memory map, and a test bench that checks.

    Example: hetsched fpga export --overlay ecp5-8x8 -o overlay
    """
    with Steps(verbose) as steps:
        steps.begin("writing the overlay")
        found = hetsched.export_overlay(overlay, output)
    show(export_document(found), json_, export_view(found))
