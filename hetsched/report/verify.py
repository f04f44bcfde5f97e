"""What `hetsched verify` shows."""

from collections.abc import Iterator

from rich.console import RenderableType

from hetsched.report.tables import Document, hardware_view, shortened, table
from hetsched.verify import Verification


def verification_view(document: Document, verification: Verification) -> Iterator[RenderableType]:
    yield table(
        "Against ONNX Runtime",
        ("part", "device", "worst tensor", "dtype", ">deviation", ">tolerance", "result"),
        (
            (
                item.name,
                item.device,
                shortened(item.tensor),
                item.dtype,
                f"{item.deviation:.1e}",
                f"{item.tolerance:.0e}",
                item.problem or ("ok" if item.passed else "deviates"),
            )
            for item in verification.comparisons
        ),
    )
    yield from hardware_view(document)
    yield ""
    for name in verification.independent:
        yield f"warning: output '{name}' does not depend on the inputs; its equality proves little"
    if verification.passed:
        parts = len(verification.comparisons) - 1
        yield f"verified: {parts} part{'s' * (parts != 1)} and the whole, seed {verification.seed}"
