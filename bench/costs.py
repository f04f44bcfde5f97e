"""Are prices right? Predicted beside measured, for kernels, networks, plans and memory.

    python -m bench.costs --json FILE [--sets groups,models,...] [--device cpu:0] [--folder FOLDER]

Each set is a file `bench/cost_NAME.py`. What is measured is kept in FOLDER: a run that was broken
off goes on where it was, and a set that is asked again measures nothing.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from pathlib import Path

from bench.costing import Options
from bench.models import FOLDER
from bench.record import record
from bench.sets import run

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
    options = Options(given.device, given.seed, given.models, given.folder, names)
    found = {
        name: partial(import_module(f"bench.cost_{name}").measured, options) for name in wanted
    }
    return run(given.json, record(given.seed), found, keep=not given.fresh, width=140)


if __name__ == "__main__":
    sys.exit(main())
