"""What `hetsched fpga export` shows."""

from collections.abc import Iterator

from rich.console import RenderableType

from hetsched.fpga.export import Export
from hetsched.report.tables import Document, table


def export_document(found: Export) -> Document:
    return {"overlay": found.overlay, "folder": str(found.folder), "files": found.files}


def export_view(found: Export) -> Iterator[RenderableType]:
    yield table(
        f"The overlay {found.overlay}, in {found.folder}",
        ("file", ">bytes"),
        ((name, str(nbytes)) for name, nbytes in found.files.items()),
    )
