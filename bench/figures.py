"""The figures of the README, from the results that the benches wrote.

python -m bench.figures            rewrites the README
python -m bench.figures --check    exit status 1 if it is not what the results say
"""

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hetsched.files import write_text

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- figures -->\n", "<!-- end of figures -->\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.figures", description=__doc__)
    parser.add_argument("--check", action="store_true", help="only compare")
    given = parser.parse_args(arguments)
    before = README.read_text(encoding="utf-8")
    after = replaced(before)
    if given.check:
        return int(after != before)
    write_text(README, after)
    return 0


def replaced(readme: str) -> str:
    """The README with the section between the two marks made anew."""
    section = coverage(_result("coverage")) + overlap(_result("overlap"))
    pattern = re.escape(BEGIN) + ".*?" + re.escape(END)
    return re.sub(pattern, lambda _: BEGIN + section + END, readme, flags=re.DOTALL)


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
        "## Coverage\n\n"
        f"{result['passed']} of {result['models']} models pass: imported, planned for "
        f"`{result['options']['devices']}` by each partitioner, compiled, run, and every part and "
        "the whole compared with ONNX Runtime. Columns have the number of parts, `random` cuts at "
        "random places; *worst* is the largest deviation of all, as a share of the output's peak "
        "(1e-4 is allowed in float32). "
        f"{_where(result)}\n\n" + _table(heads, rows) + "\n"
    )


def overlap(result: Mapping[str, Any]) -> str:
    """The ways to run a model of two independent branches."""
    branches = result["branches"]
    rows = [
        [
            row["name"].replace("'", "`"),
            ", ".join(row["devices"]),
            str(row["threads"]),
            _ms(row["predicted_seconds"]),
            f"{_ms(row['median_seconds'])} ± {_ms(row['spread_seconds'])}",
        ]
        for row in branches["rows"]
    ]
    return (
        "## Overlap\n\n"
        "Two independent branches on two cores: by the recorded stamps both work at once for "
        f"{_ms(branches['overlap_seconds'])} ms of a run, and the plan is "
        f"{branches['speedup_over_best_single']:.2f} times as fast as the better core alone. "
        f"Medians and half the distance of the quartiles of {result['repeats']} rounds in turns, "
        f"milliseconds. {_where(result)}\n\n"
        + _table(["way", "devices", "threads", "predicted ms", "measured ms"], rows)
        + "\n"
    )


def _result(name: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def _where(result: Mapping[str, Any]) -> str:
    machine = result["machine"]
    return (
        f"`{result['command']}`, {machine['cpu']}, {machine['cores']} cores, "
        f"commit {result['commit'][:7]}."
    )


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.1f}"


if __name__ == "__main__":
    sys.exit(main())
