"""Are prices right? Predicted beside measured, for kernels, networks, plans and memory.

    python -m bench.costs --json FILE [--sets groups,models,...] [--device cpu:0] [--folder FOLDER]

Each set is a file `bench/cost_NAME.py`. What is measured is kept in FOLDER: a run that was broken
off goes on where it was, and a set that is asked again measures nothing.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from time import perf_counter

from rich.console import Console
from rich.table import Table

from bench.costing import Options, Result
from bench.models import FOLDER
from bench.record import record, write
from hetsched.errors import HetschedError

HERE = Path(__file__).parent


def sets() -> list[str]:
    """The sets there are, from the file names alone."""
    return sorted(path.stem.removeprefix("cost_") for path in HERE.glob("cost_*.py"))


def main(arguments: Sequence[str] | None = None) -> int:
    there = sets()
    parser = argparse.ArgumentParser(prog="python -m bench.costs", description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="where the results go")
    parser.add_argument("--sets", default=",".join(there), help=f"of {', '.join(there)}")
    parser.add_argument("--device", default="cpu:0", help="whose prices the sets are about")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--models", type=Path, default=FOLDER, help="the folder of the models")
    parser.add_argument("--names", default="", help="only these models; none: all")
    parser.add_argument("--drawn", type=int, default=16, help="networks to learn from besides")
    parser.add_argument(
        "--folder", type=Path, default=Path("costs"), help="where measurements are kept"
    )
    parser.add_argument("--fresh", action="store_true", help="forget the sets that FILE has")
    given = parser.parse_args(arguments)
    wanted = given.sets.split(",")
    for name in wanted:
        if name not in there:
            parser.error(f"no set '{name}'; there are {', '.join(there)}")
    names = tuple(filter(None, given.names.split(",")))
    options = Options(given.device, given.seed, given.models, given.folder, names, given.drawn)
    where = record(given.seed)
    content = where | {"sets": {}}
    if given.json.exists() and not given.fresh:
        content["sets"] = json.loads(given.json.read_text(encoding="utf-8"))["sets"]
    console = Console(width=None if sys.stdout.isatty() else 140)
    try:
        for name in wanted:
            start = perf_counter()
            result: Result = import_module(f"bench.cost_{name}").measured(options)
            content["sets"][name] = vars(result) | {
                "seconds": perf_counter() - start,
                "commit": where["commit"],
                "dirty": where["dirty"],
            }
            # After each set, so that a long run that breaks off has told something.
            write(given.json, content)
            show(console, name, result)
    except HetschedError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    return 0


def show(console: Console, name: str, result: Result) -> None:
    table = Table(title=name)
    for index, head in enumerate(result.heads):
        table.add_column(head, justify="right" if index else "left")
    for cells in result.cells:
        table.add_row(*cells)
    console.print(result.text)
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
