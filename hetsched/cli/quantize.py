"""The verb `quantize`."""

from pathlib import Path
from typing import Annotated

import typer

import hetsched
from hetsched.cli.given import check_writable, read_model
from hetsched.cli.options import Json, Model, Shapes, Verbose
from hetsched.cli.progress import Report, Steps
from hetsched.cli.show import show
from hetsched.report.quantize import quantization_document, quantization_view


def _factor_of(text: str) -> float:
    """A number, or one over another such as `1/255`."""
    above, slash, below = text.partition("/")
    try:
        factor = float(above) / (float(below) if slash else 1.0)
    except (ValueError, ZeroDivisionError):
        raise typer.BadParameter(f"'{text}' is no factor; write 0.5 or 1/255") from None
    if not 0 < factor < float("inf"):
        raise typer.BadParameter(f"'{text}' is no factor; write 0.5 or 1/255")
    return factor


def quantize(
    model: Model,
    output: Annotated[
        Path,
        typer.Option("-o", "--output", metavar="FILE", help="Write the quantised model here."),
    ],
    calibration: Annotated[
        Path,
        typer.Option(
            "--calibration",
            metavar="FILE",
            help="A .npz file of inputs by name, samples along the first axis; integers named "
            "labels, label or y are their classes.",
        ),
    ],
    samples: Annotated[
        int | None,
        typer.Option(
            "--samples",
            metavar="N",
            min=1,
            help="Calibrate with the first N samples (128 by default); all are compared.",
        ),
    ] = None,
    scale: Annotated[
        float | None,
        typer.Option(
            "--scale",
            metavar="FACTOR",
            parser=_factor_of,
            help="Multiply the inputs, such as by 1/255 for pixels kept as bytes.",
        ),
    ] = None,
    shape: Shapes = None,
    json_: Json = False,
    verbose: Verbose = False,
) -> None:
    """Quantises a model to 8 bits (QDQ, int8 weights, uint8 activations); reports what that costs.

    Example: hetsched quantize model.onnx --calibration data.npz -o quantised.onnx
    """
    check_writable(output)
    with Steps(verbose) as steps:
        graph = read_model(model, shape, steps)
        stages: dict[str, Report] = {}

        def told(stage: str, done: int, of: int) -> None:
            if stage not in stages:
                stages[stage] = steps.begin(stage)
            stages[stage](f"sample {done + 1}", done, of)

        found = hetsched.quantize(graph, calibration, samples, scale, progress=told)
        found.save(output)
    show(quantization_document(found, output), json_, quantization_view(found, output))
