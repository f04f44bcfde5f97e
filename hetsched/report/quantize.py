"""What `hetsched quantize` shows."""

from collections.abc import Iterator
from pathlib import Path

from rich.console import RenderableType

from hetsched.quantization import Quantization
from hetsched.report.tables import Document, shortened, table


def quantization_document(found: Quantization, path: Path) -> Document:
    return {"path": str(path), "nbytes": path.stat().st_size, **found.to_dict()}


def quantization_view(found: Quantization, path: Path) -> Iterator[RenderableType]:
    for note in found.notes:
        yield f"note: {note}"
    yield table(
        f"Against the float model, over {found.compared} samples",
        ("output", ">SQNR dB", ">largest error", ">largest value"),
        (
            (
                shortened(item.name),
                f"{item.sqnr:.1f}",
                f"{item.largest_error:.3g}",
                f"{item.largest_value:.3g}",
            )
            for item in found.outputs
        ),
    )
    if found.accuracy:
        right = found.accuracy
        rows = (("float", right.float_right), ("int8", right.quantised_right))
        yield ""
        yield table(
            f"Recognised by the largest of '{right.output}'",
            ("model", ">right", ">of", ">top-1"),
            (
                (name, str(count), str(right.samples), f"{count / right.samples:.2%}")
                for name, count in rows
            ),
        )
        yield f"both say the same of {right.agreeing} of {right.samples}"
    yield ""
    kinds = ", ".join(f"{count} {kind}" for kind, count in found.layers.items())
    yield f"{path}: {path.stat().st_size / 1e6:.3f} MB, calibrated with {found.calibrated} samples"
    yield f"in 8 bits: {kinds}"
