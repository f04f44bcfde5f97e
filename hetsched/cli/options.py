"""Arguments and options that several verbs have, and how their values are read."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

UNITS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


def seconds_of(text: str) -> float:
    """The seconds of a duration such as `30s`, `10m`, `1.5h` or `90`."""
    number = text.rstrip("hms")
    unit = text[len(number) :] or "s"
    try:
        seconds = float(number) * UNITS[unit]
    except (ValueError, KeyError):
        raise typer.BadParameter(f"'{text}' is no duration; write 30s, 10m or 1h") from None
    if not 0 <= seconds < float("inf"):
        raise typer.BadParameter(f"'{text}' is no duration; write 30s, 10m or 1h")
    return seconds


def shapes_of(items: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Shapes by name from `name=1,3,224,224`; a name may have any character, `=` too.

    >>> shapes_of(["x=y:0=1,3", "scalar="])
    {'x=y:0': (1, 3), 'scalar': ()}
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for item in items:
        name, equals, text = item.rpartition("=")
        sizes = [size.strip() for size in text.split(",")] if text.strip() else []
        if not equals or not name or not all(size.isascii() and size.isdigit() for size in sizes):
            raise typer.BadParameter(
                f"'{item}' is no shape; write name=1,3,224,224", param_hint="'--shape'"
            )
        if name in shapes:
            raise typer.BadParameter(f"'{name}' is given twice", param_hint="'--shape'")
        shapes[name] = tuple(map(int, sizes))
    return shapes


Model = Annotated[Path, typer.Argument(metavar="MODEL", help="The ONNX model.", show_default=False)]

Devices = Annotated[
    str | None,
    typer.Option(
        "--devices",
        metavar="LIST",
        help="Devices of this machine, such as cpu:0,opencl:0; hetsched devices has them all, and "
        "cpu is all cores as one device.",
    ),
]

MachineFile = Annotated[
    Path | None,
    typer.Option("--system", metavar="FILE", help="A described machine, in TOML."),
]

PartitionerName = Annotated[
    str | None,
    typer.Option(
        "--partitioner",
        metavar="NAME",
        help="What places the operations, such as auto (the default), single, task or "
        "layerwise:objective=throughput.",
    ),
]

CostModelName = Annotated[
    str | None,
    typer.Option(
        "--cost-model",
        metavar="NAME",
        help="Where times come from: profiled (measured here, the default) or roofline (computed, "
        "the default for machines that are only described).",
    ),
]

Objective = Annotated[
    str | None,
    typer.Option(
        "--objective",
        metavar="WHAT",
        help="What to plan for: latency (the default), throughput, energy (by the watts of a "
        "machine file), edp (energy times latency) or memory.",
    ),
]

Shapes = Annotated[
    list[str] | None,
    typer.Option(
        "--shape",
        metavar="NAME=SIZES",
        help="The shape of an input that the model leaves open, such as x=1,3,224,224; repeatable.",
    ),
]

StoreFile = Annotated[
    Path | None,
    typer.Option("--store", metavar="FILE", help="The profile store, by default the user's."),
]

Strict = Annotated[
    bool,
    typer.Option("--strict", help="Fail if any of the devices cannot run an operation."),
]

Fallback = Annotated[
    bool,
    typer.Option(
        "--fallback",
        help="Go on without a device that is missing or fails: the next of the list runs its "
        "parts, which a line on stderr tells.",
    ),
]

Winograd = Annotated[
    str | None,
    typer.Option(
        "--winograd",
        metavar="HOW",
        help="How cpu devices compute 3 x 3 convolutions: off (as they are defined), f2 (at most "
        "F(2x2,3x3), as exact), f4 (F(4x4,3x3) wherever it is defined) or auto (the fastest by a "
        "model, the default).",
    ),
]

Inputs = Annotated[
    Path | None,
    typer.Option(
        "-i",
        "--inputs",
        metavar="FILE",
        help="Input arrays by name, .npz; without it values are made from --seed.",
    ),
]

Seed = Annotated[int, typer.Option("--seed", min=0, help="Of the input values.")]

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document, in SI units.")]

Verbose = Annotated[
    bool, typer.Option("-v", "--verbose", help="Say each step on stderr, a line each.")
]
