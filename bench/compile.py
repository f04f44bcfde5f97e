"""What compiling costs, from nothing and again, and what loading a package costs.

    python -m bench.compile --json FILE [--models resnet50,mobilenet_v2] [--repeats 3]

Every number is of a fresh process. Cold is with an empty profile store and cache, cached is a
second process with the same; both plan for one device, compile and write the package, as
`hetsched compile` does. Loading is of a process that has TVM imported: until the package is
checked, until its code is loaded, and the first run; resident memory is counted after that run,
less before.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

STAGES = ("import", "read", "plan", "compile", "write")
MODELS = "resnet50,mobilenet_v2,bert_base_like,googlenet"


@dataclass(frozen=True)
class Row:
    """A model: seconds of each stage and of the whole process, each a median of the repeats."""

    model: str
    weight_nbytes: int
    package_nbytes: int
    cold: dict[str, float]
    cached: dict[str, float]
    load_seconds: float
    start_seconds: float
    first_run_seconds: float
    resident_nbytes: int

    @property
    def resident_share(self) -> float:
        return self.resident_nbytes / self.weight_nbytes


def compile_once(path: Path, package: Path, device: str) -> dict[str, float]:
    """The seconds of each stage; imports are late, because they are measured."""
    stamps = [perf_counter()]
    import hetsched
    import hetsched.cli

    stamps.append(perf_counter())
    graph = hetsched.read_onnx(path)
    stamps.append(perf_counter())
    plan = hetsched.partition(graph, device, "single")
    stamps.append(perf_counter())
    executable = hetsched.compile(plan)
    stamps.append(perf_counter())
    executable.save(package)
    stamps.append(perf_counter())
    pairs = itertools.pairwise(stamps)
    return dict(zip(STAGES, (after - before for before, after in pairs), strict=True))


def load_once(name: str, package: Path, seed: int) -> dict[str, float]:
    """Seconds of loading and of the first run, and the bytes of memory that both took."""
    import hetsched
    import hetsched.tvm_runtime
    from bench.models import inputs, models

    model = next(model for model in models() if model.name == name)
    # What any use of the libraries takes is there before: not what this package needs.
    before = _resident_nbytes()
    begin = perf_counter()
    executable = hetsched.load(package)
    loaded = perf_counter()
    executable.start()
    started = perf_counter()
    given = inputs(model, executable.plan.original, seed)
    run = perf_counter()
    executable.run(given)
    finish = perf_counter()
    return {
        "load_seconds": loaded - begin,
        "start_seconds": started - loaded,
        "first_run_seconds": finish - run,
        "resident_nbytes": _resident_nbytes() - before,
        "weight_nbytes": executable.plan.original.weight_nbytes,
    }


def measured(name: str, device: str, repeats: int, seed: int) -> Row:
    """The medians of a model, each repeat with a store and a cache of its own."""
    import onnx

    from bench.models import load, models

    model = next((model for model in models() if model.name == name), None)
    if model is None:
        raise SystemExit(f"error: no model '{name}'; see bench/models.py")
    cold, cached, loads = [], [], []
    with TemporaryDirectory(prefix="hetsched-bench-") as folder:
        path, package = Path(folder) / f"{name}.onnx", Path(folder) / f"{name}.hsp"
        onnx.save(load(model, seed), path)
        for repeat in range(repeats):
            own = {
                "HETSCHED_STORE": f"{folder}/{repeat}/profile.sqlite",
                "HETSCHED_CACHE": f"{folder}/{repeat}/cache",
            }
            for found in (cold, cached):
                begin = perf_counter()
                stages = _child(["--compile", str(path), str(package), device], own)
                found.append(stages | {"process": perf_counter() - begin})
            loads.append(_child(["--load", name, str(package), str(seed)], own))
        nbytes = package.stat().st_size
    of = {key: statistics.median(row[key] for row in loads) for key in loads[0]}
    return Row(
        name,
        int(of["weight_nbytes"]),
        nbytes,
        _medians(cold),
        _medians(cached),
        of["load_seconds"],
        of["start_seconds"],
        of["first_run_seconds"],
        int(of["resident_nbytes"]),
    )


def _child(arguments: Sequence[str], own: dict[str, str]) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-m", "bench.compile", *arguments],
        env=os.environ | own,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, float] = json.loads(done.stdout)
    return found


def _medians(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


def _resident_nbytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def table(rows: Sequence[Row]) -> Any:
    from rich.table import Table

    shown = Table(title="seconds to compile; milliseconds and memory to load")
    shown.add_column("model")
    for name in ("", *STAGES, "process", "load ms", "start ms", "first run ms", "resident/weights"):
        shown.add_column(name, justify="right")
    for row in rows:
        for way, seconds in (("cold", row.cold), ("cached", row.cached)):
            cells = [f"{seconds[stage]:.2f}" for stage in (*STAGES, "process")]
            if way == "cold":
                cells += [
                    f"{value * 1e3:.1f}"
                    for value in (row.load_seconds, row.start_seconds, row.first_run_seconds)
                ]
                cells.append(f"{row.resident_share:.2f}")
            shown.add_row(row.model if way == "cold" else "", way, *cells)
    return shown


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compile", description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="where the results go")
    parser.add_argument("--models", default=MODELS, help="names, with commas between")
    parser.add_argument("--device", default="cpu:0", help="the device that is compiled for")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    from rich.console import Console

    from bench.record import record, write
    from hetsched.errors import HetschedError

    about = record(given.seed)
    try:
        rows = [
            measured(name, given.device, given.repeats, given.seed)
            for name in given.models.split(",")
        ]
        found = [asdict(row) | {"resident_share": row.resident_share} for row in rows]
        write(given.json, {**about, "repeats": given.repeats, "rows": found})
    except HetschedError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    Console(width=None if sys.stdout.isatty() else 140).print(table(rows))
    return 0


def child(arguments: Sequence[str]) -> int:
    """What a fresh process does for the bench: one measurement, printed as JSON."""
    what, first, package, last = arguments
    if what == "--compile":
        print(json.dumps(compile_once(Path(first), Path(package), last)))
    else:
        print(json.dumps(load_once(first, Path(package), int(last))))
    return 0


if __name__ == "__main__":
    inside = sys.argv[1:2] in (["--compile"], ["--load"])
    sys.exit(child(sys.argv[1:]) if inside else main())
