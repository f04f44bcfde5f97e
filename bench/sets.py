"""Benches of several sets: each is written and shown before the next begins."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

from rich.console import Console
from rich.table import Table

from bench.record import write
from hetsched.errors import HetschedError


class Result(Protocol):
    """What a set found: words, and a table of `cells` below `heads`; all its fields are kept."""

    text: str
    heads: Sequence[str]
    cells: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Found:
    """A result with the figures that its words and its table are made of, by name."""

    text: str
    heads: Sequence[str]
    cells: Sequence[Sequence[str]]
    figures: Mapping[str, Any] = field(default_factory=dict)


def run(
    path: Path,
    content: dict[str, Any],
    sets: Mapping[str, Callable[[], Result]],
    keep: bool,
    width: int,
) -> int:
    """Measures `sets` into the file at `path`, behind what `content` says of the run.

    Sets that the file has from before stay with `keep`. Returns the exit status; tables are as wide
    as the terminal, or `width` where there is none.
    """
    content = content | {"sets": {}}
    if keep and path.exists():
        content["sets"] = json.loads(path.read_text(encoding="utf-8"))["sets"]
    console = Console(width=None if sys.stdout.isatty() else width)
    try:
        for name, measured in sets.items():
            start = perf_counter()
            result = measured()
            content["sets"][name] = vars(result) | {
                "seconds": perf_counter() - start,
                "commit": content["commit"],
                "dirty": content["dirty"],
            }
            # After each set, so that a long run that breaks off has told something.
            write(path, content)
            _show(console, name, result)
    except HetschedError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    return 0


def _show(console: Console, name: str, result: Result) -> None:
    table = Table(title=name)
    for index, head in enumerate(result.heads):
        table.add_column(head, justify="right" if index else "left")
    for cells in result.cells:
        table.add_row(*cells)
    console.print(result.text)
    console.print(table)
