"""The figures of the documents, from the results that the benches wrote.

The README has the summary of each bench, docs/figures.md its tables.

python -m bench.figures            rewrites both
python -m bench.figures --check    exit status 1 if they are not what the results say
"""

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.opencl import summary as opencl_words
from bench.opencl import tables as opencl_tables
from bench.overlap import tables as overlap_tables
from bench.splits import tables as split_tables
from hetsched.files import write_text

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
TABLES = ROOT / "docs" / "figures.md"
RESULTS = ROOT / "bench" / "results"
# A result that the package needs is there.
PACKAGED = {"place_and_route": ROOT / "hetsched" / "fpga" / "place_and_route.json"}
TITLE = (
    "# Figures\n\n"
    "Tables of the benches, made from `bench/results` by `python -m bench.figures`.\n\n"
)
# Of the reference kernels, in the summary.
CASES = ("matmul 512", "conv 3x3, 64 of 56")
# Sets of the FPGA's bench in the summary.
FPGA = ("layers", "depthwise")
SPREAD = ("geomean", "p95", "max")
BEGIN, END = "<!-- figures -->\n", "<!-- end of figures -->\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.figures", description=__doc__)
    parser.add_argument("--check", action="store_true", help="only compare")
    given = parser.parse_args(arguments)
    there = [name for name in PARTS if _path(name).exists()]
    parts = [(PARTS[name], _result(name)) for name in there]
    summary = "\n".join(part.summary(result) for part, result in parts)
    tables = "\n".join(part.tables(result) for part, result in parts if part.tables)
    pattern = re.escape(BEGIN) + ".*?" + re.escape(END)
    readme = README.read_text(encoding="utf-8")
    texts = {
        README: re.sub(pattern, lambda _: BEGIN + summary + END, readme, flags=re.DOTALL),
        TABLES: TITLE + tables,
    }
    if given.check:
        return int(any(path.read_text(encoding="utf-8") != text for path, text in texts.items()))
    for path, text in texts.items():
        write_text(path, text)
    return 0


def coverage_summary(result: Mapping[str, Any]) -> str:
    deviations = [
        attempt["deviation"]
        for row in result["rows"]
        for attempt in row["attempts"]
        if attempt["deviation"] is not None
    ]
    names = ", ".join([*result["options"]["partitioners"], "random cuts"])
    labels = {
        name: what for row in result["rows"] for name, what in row.get("hardware", {}).items()
    }
    what = "".join(f" `{name}` is {label}." for name, label in labels.items() if "OpenCL" in label)
    return (
        f"## Coverage, {result['options']['devices']}\n\n"
        f"{result['passed']} of {result['models']} models pass: imported, planned for "
        f"`{result['options']['devices']}` by each partitioner ({names}), compiled, run, and every "
        f"part and the whole compared with ONNX Runtime.{what} The largest deviation of all is "
        f"{max(deviations):.0e} of the output's peak; 1e-4 is allowed in float32. "
        f"{_where(result)}{_commits(result)}\n"
    )


def _commits(result: Mapping[str, Any]) -> str:
    """How many rows are of which commit, if they are of several."""
    counts = Counter(row.get("commit", result["commit"]) for row in result["rows"])
    told = ", ".join(f"{count} of {commit[:7]}" for commit, count in counts.items())
    return f" Models by commit: {told}." if len(counts) > 1 else ""


def coverage(result: Mapping[str, Any]) -> str:
    """A row a model: parts of each partitioner, and how far the worst result is from right."""
    names = [*result["options"]["partitioners"], "random"]
    heads = ["model", "GMAC", "operations", "groups", *names, "worst"]
    rows = []
    for row in result["rows"]:
        attempts = {attempt["partitioner"]: attempt for attempt in row["attempts"]}
        deviations = [a["deviation"] for a in attempts.values() if a["deviation"] is not None]
        rows.append(
            [
                row["model"],
                f"{row['gmac']:.4g}",
                str(row["operations"]),
                str(row["groups"]),
                *(str(attempts[name]["parts"]) if name in attempts else "" for name in names),
                f"{max(deviations):.0e}" if row["passed"] else "failed",
            ]
        )
    return (
        f"{coverage_summary(result)}\n"
        "Columns have the number of parts, `random` cuts at random places; *worst* is the largest "
        f"deviation of all.\n\n{_table(heads, rows)}\n"
    )


def overlap(result: Mapping[str, Any]) -> str:
    """Networks on two devices at once, and what a hand-over takes."""
    found = "".join(
        f"{title[0].upper()}{title[1:]}:\n\n{_table(heads, cells)}\n\n"
        for title, heads, cells in overlap_tables(result)
    )
    return (
        f"## Overlap, {result['devices']}\n\n"
        "What `auto` ships for two devices beside each device alone, the same "
        "code with two threads, and ONNX Runtime with two threads: medians of "
        f"{result['repeats']} rounds in turns. By the recorded stamps both devices work at once "
        "for so long; *possible* is the sum of the devices' rates over the better one. The threads "
        "of two libraries that spin after a run disturb each other: alone, what runs on two "
        "threads is at times faster than its columns say. "
        f"{_where(result)}\n\n{found}"
    )


def opencl_summary(result: Mapping[str, Any]) -> str:
    return f"## OpenCL on the processor\n\n{opencl_words(result)} {_where(result)}\n"


def opencl(result: Mapping[str, Any]) -> str:
    """The table of each set."""
    found = "".join(
        f"{title[0].upper()}{title[1:]}:\n\n{_table(heads, cells)}\n"
        for title, heads, cells in opencl_tables(result)
    )
    return (
        "## OpenCL on the processor\n\n"
        "PoCL computes on the processor: nothing here is the speed of a GPU. All engines are held "
        "on one core and take turns, a run each, in an order drawn anew for each round. Medians; "
        "*over* is the other's time over that of OpenCL in the same round, with quartiles, above 1 "
        "where OpenCL is faster; *deviation* from ONNX Runtime is a share of the output's peak; "
        "*of peak* is of the core's measured multiply-adds, where Winograd's convolutions do fewer "
        f"than they count. {_where(result)}\n\n{found}"
    )


def pipelines(result: Mapping[str, Any]) -> str:
    """Throughput of stages on a device each, and of stages with replicas."""
    rows = []
    for row in result["rows"]:
        cells = [row["model"], _ms(min(row["single_seconds"].values()))]
        for name in ("stages", "replicas"):
            own = row.get(name)
            cells += (
                [_ms(own["seconds"]), f"{own['share']:.1%}", f"{own['speedup']:.2f}"]
                if own
                else [""] * 3
            )
        rows.append([*cells, f"{row['possible']:.2f}"])
    heads = ["model", "single ms", "stages ms", "of 1/bottleneck", "speed-up"]
    heads += ["replicas ms", "of 1/bottleneck", "speed-up", "possible"]
    return (
        "## Pipelines\n\n"
        "Milliseconds from result to result with many requests in flight, on two cores, each a "
        "device: a stage on each, and whole networks or stages on both in turn; what the busiest "
        "core computes for a request over that time, by the stamps of the same run; and the rate "
        f"over that of the better core alone. {_where(result)}\n\n{_table(heads, rows)}\n"
    )


def peers_summary(result: Mapping[str, Any]) -> str:
    """The means of the classes."""
    threads = result["threads"]
    means = [
        [name, str(mean["models"]), _ratio(mean["interleaved"]), _ratio(mean["apart"])]
        for name, mean in result["summary"]["means"].items()
    ]
    return (
        f"## Beside other runtimes, {threads} thread{'s' if threads > 1 else ''}\n\n"
        f"The median time of the fastest of {', '.join(result['peers'])} over ours (TVM alone): "
        "above 1, hetsched is faster. *Interleaved*, all take turns in one process, a run each; "
        "*apart*, each has a process, of which one works at a time. "
        f"{_where(result)}\n\n"
        + _table(["geometric mean of", "models", "interleaved", "apart"], means)
    )


def peers(result: Mapping[str, Any]) -> str:
    """A row a model: medians apart, and both figures."""
    threads, names = result["threads"], ["hetsched", *result["peers"]]
    rows = []
    for row in result["rows"]:
        apart = row.get("apart", {})
        rows.append(
            [
                row["model"],
                row["class"],
                *(_spread(apart.get(name)) for name in names),
                _ratio(row.get("figure_interleaved")),
                "failed" if row["reason"] else _ratio(row.get("figure_apart")),
                f"{max(row['deviations']['hetsched'].values()):.0e}" if "deviations" in row else "",
                f"{row['compile_seconds']:.1f}" if "compile_seconds" in row else "",
            ]
        )
    below = {
        way: ", ".join(f"{name} {figure:.2f}" for name, figure in found.items()) or "none"
        for way, found in result["summary"]["below"].items()
    }
    heads = ["model", "class", *names, "interleaved", "apart", "deviation", "compile s"]
    return (
        f"## Beside other runtimes, {threads} thread{'s' if threads > 1 else ''}\n\n"
        "The figure of a model is the median time of the fastest peer over ours: above 1, hetsched "
        "(TVM alone) is faster. *Interleaved*, all take turns in one process, a run each; *apart*, "
        "each has a process, of which one works at a time. Medians and half the distance of the "
        f"quartiles of at least {result['repeats']} runs apart, milliseconds; *deviation* from "
        "ONNX Runtime is a share of the output's peak. OpenVINO computes in float32 with the hint "
        f"for latency. {_where(result)}\n\n"
        + f"Below 0.9 interleaved: {below['interleaved']}. Apart: {below['apart']}.\n\n"
        + _table(heads, rows)
        + "\n"
    )


def layers(result: Mapping[str, Any]) -> str:
    """A row for each kind of layer of each model."""
    rows = []
    for found in result["models"]:
        for kind, row in found["summary"].items():
            peer, share = row["peer_seconds"], row["median_share"]
            rows.append(
                [
                    found["model"],
                    kind,
                    str(row["kernels"]),
                    f"{row['seconds'] * 1e3:.2f}",
                    "" if peer is None else f"{peer * 1e3:.2f}",
                    f"{row['flops'] / row['seconds'] / 1e9:.0f}" if row["flops"] else "",
                    "" if share is None else f"{share:.0%}",
                ]
            )
    peaks = " and ".join(f"{m['peak_flops_per_second'] / 1e9:.0f}" for m in result["models"])
    heads = ["model", "layers", "kernels", "ms", "onnxruntime ms", "GFLOP/s", "median of peak"]
    return (
        "## Layers\n\n"
        "Kernels within the model on one core, beside ONNX Runtime's own profile of the same "
        "layers. The core's peak is that of a loop of multiply-adds in the same run: "
        f"{peaks} GFLOP/s. Medians of {result['repeats']} rounds. {_where(result)}\n\n"
        + _table(heads, rows)
        + "\n"
    )


def compiling(result: Mapping[str, Any]) -> str:
    """A row a model: from nothing, again, and the package loaded."""
    rows = [
        [
            row["model"],
            f"{row['cold']['process']:.1f}",
            f"{row['cached']['process']:.1f}",
            _ms(row["load_seconds"]),
            _ms(row["start_seconds"]),
            f"{row['weight_nbytes'] / 1e6:.0f}",
            f"{row['resident_share']:.2f}",
        ]
        for row in result["rows"]
    ]
    heads = ["model", "from nothing s", "again s", "load ms", "code ms", "weights MB", "resident"]
    return (
        "## Compiling\n\n"
        "A process that imports, measures prices, compiles and packages for one core, from nothing "
        "and a second time, and one that loads the package, its weights mapped, then the code. "
        "*Resident* is the memory that is in use after the first run over the bytes of the "
        f"weights. Medians of {result['repeats']}. {_where(result)}\n\n" + _table(heads, rows)
    )


def reference(result: Mapping[str, Any]) -> str:
    """A row a case and number of threads."""
    rows = [
        [
            row["case"],
            str(row["threads"]),
            f"{row['seconds'] * 1e3:.2f}",
            f"{row['onnxruntime_seconds'] * 1e3:.2f}",
            f"{row['flops_per_second'] / 1e9:.0f}",
            f"{row['share']:.0%}",
        ]
        for row in result["rows"]
    ]
    heads = ["case", "threads", "ms", "onnxruntime ms", "GFLOP/s", "of peak"]
    return (
        "## Reference kernels\n\n"
        "The Numba loops that define the operations. "
        f"Medians of {result['repeats']}. {_where(result)}\n\n" + _table(heads, rows) + "\n"
    )


def reference_summary(result: Mapping[str, Any]) -> str:
    rows = [row for row in result["rows"] if row["threads"] == 1 and row["case"] in CASES]
    told = ", ".join(f"{row['case']} {row['share']:.0%}" for row in rows)
    return (
        "## Reference kernels\n\n"
        f"The Numba loops that define the operations, share of one core's peak: {told}. "
        f"{_where(result)}\n"
    )


def schedulers_summary(result: Mapping[str, Any]) -> str:
    """What each set says of the scheduler that is judged, by its worst and its mean."""
    rows = []
    for name, found in result["sets"].items():
        told = found["figures"].get("schedulers", {}).get(found["figures"].get("first"))
        if told and told["count"]:
            spread = (f"{told[key]:.4f}" for key in SPREAD)
            rows.append([name, str(told["count"]), *spread, found["commit"][:7]])
    if not rows:
        return ""
    return (
        "## Schedules beside the shortest known\n\n"
        f"Makespan of `{result['options']['scheduler']}` over the reference of each set: optima "
        "that CP-SAT proves (proved, memory), optima that instances were made around (planted)"
        + (", what CP-SAT finds in a minute on two cores (medium)" * ("medium" in result["sets"]))
        + f". {_where(result)}\n\n"
        + _table(["set", "instances", "geometric mean", "95th percentile", "worst", "commit"], rows)
    )


def schedulers(result: Mapping[str, Any]) -> str:
    """The words and the table of each set."""
    return _sets("Schedules beside the shortest known", result)


def splits_summary(result: Mapping[str, Any]) -> str:
    """What two cores that share a network's layers bring, and what tiles save."""
    text = []
    if chains := result.get("chains"):
        worst = max(row["worst"] for row in chains["rows"])
        text.append(
            f"{chains['chains']} random chains in random pieces equal the whole: integers bit for "
            f"bit, float32 to {worst:.0e} of the peak."
        )
    if tiles := result.get("tiles"):
        best = next(row for row in tiles["rows"] if row["grid"] == "5x5")
        text.append(
            f"Tiles of 5 x 5 cut the peak activation memory of {tiles['model']} by "
            f"{best['saved']:.0%} for {best['extra_flops']:.1%} more FLOPs."
        )
    if networks := result.get("models"):
        text.append(
            f"{len(networks['rows'])} networks shared by two cores, each a device of its own, are "
            f"{networks['mean_speedup']:.2f} times as fast as on the better one "
            f"({networks['mean_of_possible']:.2f} of what is possible), "
            f"{networks['mean_of_threads']:.2f} times the same code with two threads; pipelines "
            f"reach {networks['mean_pipeline']:.2f} of the rate of their longest stage. In "
            f"{networks['cores']['disturbed_rounds']} rounds the host gave less than two whole "
            "cores."
        )
    if layers := result.get("layers"):
        text.append(
            f"{len(layers['rows'])} single layers by shares of channels on {layers['devices']}: "
            f"{layers['mean_speedup']:.2f} times the better device alone, the least "
            f"{layers['least_speedup']:.2f}, which is {layers['mean_share']:.3f} of what the best "
            f"share of all brings ({layers['mean_planned_share']:.3f} before plans are measured); "
            "the best is chosen by half of the rounds and judged by the others."
        )
    return f"## Operations in pieces\n\n{' '.join(text)} {_where(result)}\n"


def splits(result: Mapping[str, Any]) -> str:
    """The table of each set."""
    found = "".join(
        f"### {title}\n\n{_table(heads, cells)}\n" for title, heads, cells in split_tables(result)
    )
    return f"## Operations in pieces\n\n{_where(result)}\n\n{found}"


def costs_summary(result: Mapping[str, Any]) -> str:
    """The words of each set."""
    words = "\n".join(f"- {name}: {found['text']}" for name, found in result["sets"].items())
    return f"## Prices beside what was measured\n\n{_where(result)}\n\n{words}\n"


def costs(result: Mapping[str, Any]) -> str:
    """The words and the table of each set."""
    return _sets("Prices beside what was measured", result)


def cuda_summary(result: Mapping[str, Any]) -> str:
    rows = result["rows"]
    devices = " and ".join(f"`{device}`" for device in dict.fromkeys(r["device"] for r in rows))
    done = [row for row in rows if not row["reason"]]
    coded = sum(bool(row["cubin_nbytes"]) for row in done)
    return (
        "## CUDA without a GPU\n\n"
        f"{len(done)} of {len(rows)} packages compile to source, of "
        f"{len({row['model'] for row in rows})} models for {devices}, and {coded} to machine code "
        f"({result['compiler']}). None has run: no GPU was there. {_where(result)}\n"
    )


def cuda(result: Mapping[str, Any]) -> str:
    """A row a model and device."""
    heads = "model", "device", "kernels", "launches", "source KB", "cubin KB", "s", "s cubin"
    rows = [
        [
            row["model"],
            row["device"].removeprefix("nvidia/"),
            *(row["reason"] or str(row["kernels"]), str(row["launches"])),
            f"{row['source_nbytes'] / 1e3:.0f}",
            f"{row['cubin_nbytes'] / 1e3:.0f}" if row["cubin_nbytes"] else "no",
            f"{row['source_seconds']:.1f}",
            f"{row['cubin_seconds']:.1f}",
        ]
        for row in result["rows"]
    ]
    return f"{cuda_summary(result)}\n{_table(heads, rows)}\n"


def fpga_summary(result: Mapping[str, Any]) -> str:
    words = " ".join(found["text"] for name, found in result["sets"].items() if name in FPGA)
    return f"## FPGA\n\n{words} {_where(result)}\n"


def fpga(result: Mapping[str, Any]) -> str:
    """The table of each set."""
    return _sets("FPGA", result)


def placed_summary(result: Mapping[str, Any]) -> str:
    clocks = ", ".join(
        f"{part['overlay']} at grade {part['grade']} {part['clock_hz'] / 1e6:.1f} MHz "
        f"({len(part['seeds'])})"
        for part in result["parts"]
    )
    (device,) = {part["device"] for part in result["parts"]}
    return (
        "## The overlay, placed and routed\n\n"
        f"On {device}, the median clock of so many seeds: {clocks}. "
        f"{_where({**result['record'], 'command': 'make fpga-pnr'})}\n"
    )


def placed(result: Mapping[str, Any]) -> str:
    """A row for each overlay and grade, and what synthesis says of other families."""
    heads = ["overlay", "grade", "seeds", "MHz", "least", "most", "LUT", "FF", "DSP", "EBR"]
    rows = []
    for part in result["parts"]:
        key = {name: part[name] for name in ("overlay", "grade")}
        clocks = [run["clock_hz"] for run in result["runs"] if key.items() <= run.items()]
        rows.append(
            [
                *(part["overlay"], str(part["grade"]), ", ".join(map(str, part["seeds"]))),
                *(f"{clock / 1e6:.1f}" for clock in (part["clock_hz"], min(clocks), max(clocks))),
                *(str(part[name]) for name in ("lut", "ff", "dsp", "ebr")),
                part["slowest_path"],
            ]
        )
    estimates = [
        [run["overlay"], run["family"], ", ".join(f"{n} {kind}" for kind, n in _cells(run))]
        for run in result["estimates"]
    ]
    others = _table(["overlay", "family", "cells"], estimates) if estimates else ""
    return f"{placed_summary(result)}\n{_table([*heads, 'slowest path'], rows)}\n" + (
        f"Synthesis only, neither placed nor timed:\n\n{others}\n" if others else ""
    )


def _cells(run: Mapping[str, Any]) -> list[tuple[str, int]]:
    """The kinds of cells of an estimate, those of which there are most first."""
    return sorted(run["cells"].items(), key=lambda item: (-item[1], item[0]))


@dataclass(frozen=True)
class Part:
    """What the documents say of a result."""

    summary: Callable[[Mapping[str, Any]], str]
    tables: Callable[[Mapping[str, Any]], str] | None = None


PARTS = {
    "coverage": Part(coverage_summary, coverage),
    "coverage_opencl": Part(coverage_summary, coverage),
    "coverage_cpu_opencl": Part(coverage_summary, coverage),
    "overlap": Part(overlap),
    "overlap_opencl": Part(overlap),
    "opencl": Part(opencl_summary, opencl),
    "pipelines": Part(pipelines),
    "peers": Part(peers_summary, peers),
    "peers2": Part(peers_summary, peers),
    "layers": Part(layers),
    "compile": Part(compiling),
    "reference": Part(reference_summary, reference),
    "schedulers": Part(schedulers_summary, schedulers),
    "splits": Part(splits_summary, splits),
    "splits_opencl": Part(splits_summary, splits),
    "costs": Part(costs_summary, costs),
    "cuda": Part(cuda_summary, cuda),
    "fpga": Part(fpga_summary, fpga),
    "place_and_route": Part(placed_summary, placed),
}


def _spread(times: Mapping[str, float] | None) -> str:
    if times is None:
        return ""
    half = (times["third_quartile"] - times["first_quartile"]) / 2
    return f"{times['median'] * 1e3:.3g} ± {half * 1e3:.1g}"


def _ratio(figure: float | None) -> str:
    return "" if figure is None else f"{figure:.2f}"


def _result(name: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = json.loads(_path(name).read_text(encoding="utf-8"))
    return found


def _path(name: str) -> Path:
    return PACKAGED.get(name, RESULTS / f"{name}.json")


def _where(result: Mapping[str, Any]) -> str:
    machine = result["machine"]
    return (
        f"`{result['command']}`, {machine['cpu']}, {machine['cores']} cores, "
        f"commit {result['commit'][:7]}."
    )


def _sets(title: str, result: Mapping[str, Any]) -> str:
    sets = "".join(
        f"### {name}{_other_commit(found, result)}\n\n"
        f"{found['text']}\n\n{_table(found['heads'], found['cells'])}\n"
        for name, found in result["sets"].items()
    )
    return f"## {title}\n\n{_where(result)}\n\n{sets}"


def _other_commit(found: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """Of a set that was kept from an earlier run than the whole."""
    same = found["commit"] == result["commit"]
    return "" if same else f", commit {found['commit'][:7]}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.1f}"


if __name__ == "__main__":
    sys.exit(main())
