"""How the time of schedulers grows with the number of tasks."""

import time
from collections.abc import Iterable, Sequence
from math import log
from statistics import median

from bench.instances import layered
from hetsched.plugin import load
from hetsched.scheduler import Scheduler

SCHEDULERS = ("heft", "cpop", "peft", "ippts", "lookahead")
SIZES = (10_000, 100_000, 1_000_000)
# Small problems are repeated until so many tasks have been scheduled.
WORTH = 500_000


def scaling(
    schedulers: Iterable[str] = SCHEDULERS,
    sizes: Sequence[int] = SIZES,
    devices: int = 3,
    ratio: float = 1.0,
    seed: int = 1,
    repeats: int = 3,
) -> list[dict[str, object]]:
    """Rows of scheduler, tasks, edges, seconds, and exponent of time since the first size.

    The median of wall seconds, of `repeats` or more, from the arrays to the solution, ranks, order and placement; what is
    compiled is compiled before.
    """
    rows: list[dict[str, object]] = []
    for tasks in sizes:
        problem = layered(tasks, devices, ratio, seed)
        # Its indices belong to the problem, whoever schedules it.
        edges = len(problem.arrays.reader)
        for name in schedulers:
            scheduler = load(Scheduler, name)
            scheduler.schedule(layered(10, devices, ratio, seed))
            found = []
            for _ in range(max(repeats, WORTH // tasks)):
                begin = time.perf_counter()
                scheduler.schedule(problem)
                found.append(time.perf_counter() - begin)
            row: dict[str, object] = {"scheduler": name, "tasks": tasks, "edges": edges}
            rows.append(row | {"seconds": median(found), "exponent": None})
    by_name = {(row["scheduler"], row["tasks"]): row for row in rows}
    for row in rows:
        first = by_name[row["scheduler"], sizes[0]]
        if row is not first:
            growth = log(row["seconds"] / first["seconds"])
            row["exponent"] = growth / log(row["tasks"] / first["tasks"])
    return rows
