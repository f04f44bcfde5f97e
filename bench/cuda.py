"""Every model compiled for devices of CUDA that need not be here.

    python -m bench.cuda --json FILE [--models a,b] [--largest-gmac X] [--add]

A model is one part of a plan on a device that only a machine file describes. Counted are its
distinct kernels, their launches, the source, and the machine code where a compiler of CUDA C is
installed. Nothing runs, so that nothing here is a speed.

The file is written after each model. With `--add` the rows that it has stay, but those of refusals,
and only what it lacks is compiled.

Exit status: 0 if all models compile, 3 if one is refused.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from rich.console import Console
from rich.table import Table

import hetsched
from bench import models
from bench.models import Model
from bench.record import record, write
from hetsched.cuda import compiler
from hetsched.errors import HetschedError
from hetsched.launches import Program
from hetsched.plugin import load
from hetsched.system import System
from hetsched.target import Target

EXAMPLES = Path(__file__).parents[1] / "examples"
MACHINES = ("h100", "jetson_orin_nano")
CUBIN = "kernels.cubin"
REFUSED = 3


@dataclass(frozen=True)
class Row:
    """A model for one device; with a `reason` it is refused."""

    model: str
    device: str
    arch: str = ""
    operations: int = 0
    kernels: int = 0
    launches: int = 0
    source_nbytes: int = 0
    cubin_nbytes: int = 0
    workspace_nbytes: int = 0
    source_seconds: float = 0.0
    cubin_seconds: float = 0.0
    reason: str = ""


def compiled(model: Model, machine: str, seed: int) -> Row:
    """What the model becomes for the device of a machine file; a refusal is told in the row."""
    device = System.load(EXAMPLES / f"{machine}.toml").device("cuda:0")
    target = load(Target, device.target)
    try:
        graph = hetsched.read_onnx(models.load(model, seed), model.shapes)
        start = perf_counter()
        made, _, arch = target._program(graph, device)  # type: ignore[attr-defined]
        middle = perf_counter()
        code = b""
        if compiler.compiler() is not None:
            code = compiler.cubin(made.source, arch)
        end = perf_counter()
    except HetschedError as error:
        return Row(model.name, device.isa, reason=f"{type(error).__name__}: {error}")
    program = Program.from_files(made.files(), "cuda")
    return Row(
        model.name,
        device.isa,
        arch,
        len(graph.ops),
        len({launch.kernel for launch in program.launches}),
        len(program.launches),
        len(program.source),
        len(code),
        program.workspace_nbytes,
        middle - start,
        end - middle,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="every model compiled for devices of CUDA")
    parser.add_argument("--json", required=True, type=Path)
    parser.add_argument("--models", default="")
    parser.add_argument("--largest-gmac", type=float, default=float("inf"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--add", action="store_true")
    given = parser.parse_args(arguments)
    names = [name for name in given.models.split(",") if name]
    content: dict[str, Any] = record(given.seed) | {"compiler": compiler.version(), "rows": []}
    if given.add and given.json.exists():
        rows = json.loads(given.json.read_text(encoding="utf-8"))["rows"]
        content["rows"] = [row for row in rows if not row["reason"]]
    done = {(row["model"], row["device"]) for row in content["rows"]}
    try:
        chosen = models.chosen(models.FOLDER, names, given.largest_gmac)
        for model in chosen:
            for machine in MACHINES:
                device = System.load(EXAMPLES / f"{machine}.toml").device("cuda:0").isa
                if (model.name, device) in done:
                    continue
                row = compiled(model, machine, given.seed)
                content["rows"].append(asdict(row))
                write(given.json, content)
                told = row.reason or f"{row.kernels} kernels, {row.source_nbytes >> 10} KiB"
                print(f"{model.name} for {device}: {told}", file=sys.stderr, flush=True)
    except HetschedError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    _show([Row(**row) for row in content["rows"]], content["compiler"])
    return REFUSED if any(row["reason"] for row in content["rows"]) else 0


def _show(rows: Sequence[Row], by: str) -> None:
    table = Table(title=f"CUDA C, machine code by {by}")
    heads = (
        "model",
        "device",
        "kernels",
        "launches",
        "source KB",
        "cubin KB",
        "s",
        "s cubin",
        "refusal",
    )
    for index, head in enumerate(heads):
        table.add_column(head, justify="left" if index < 2 or head == "refusal" else "right")
    for row in rows:
        table.add_row(
            row.model,
            row.device.removeprefix("nvidia/"),
            str(row.kernels),
            str(row.launches),
            f"{row.source_nbytes / 1e3:.0f}",
            f"{row.cubin_nbytes / 1e3:.0f}" if row.cubin_nbytes else "no",
            f"{row.source_seconds:.1f}",
            f"{row.cubin_seconds:.1f}",
            row.reason,
        )
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
    there = sum(not row.reason for row in rows)
    coded = sum(bool(row.cubin_nbytes) for row in rows)
    console.print(f"{there} of {len(rows)} compile to source, {coded} of these to machine code")


if __name__ == "__main__":
    sys.exit(main())
