"""The worst instances for a scheduler that a search finds: beside the optimum, and beside others.

Instances are annealed, as PISA does: a step changes a task's seconds, an edge or its bytes, and is
kept if it makes the ratio larger, or by chance.

References
----------
Coleman and Krishnamachari, "PISA: An adversarial approach to comparing task graph scheduling
algorithms", 2024, https://arxiv.org/abs/2403.07120
"""

from collections.abc import Callable
from dataclasses import replace
from math import exp
from statistics import median
from typing import Any

import numpy as np
from rich.progress import track

from bench.instances import layered
from hetsched.plugin import load
from hetsched.problem import Problem
from hetsched.scheduler import Scheduler

MEMBERS = ("heft", "cpop", "peft", "lookahead", "ippts")
# What is attacked: counted iterations, so that an attack is the same on any machine.
PORTFOLIO = "portfolio:seconds=0,iterations=1000"
EXACT = "exact:seconds=20"
MOST = 12
DEVICES = 3
# Of the ratio at the begin; it falls to a hundredth of that.
TEMPERATURE = 0.1
# Least and most seconds of a task, and bytes of an edge, of which a link moves one a second.
LEAST, MOST_SECONDS = 0.05, 2.0
MOST_BYTES = 10.0


def attacked(
    ratio: Callable[[Problem], float], steps: int, seed: int
) -> tuple[float, Problem, list[float]]:
    """The largest ratio that annealing finds from a random instance, and its instance.

    The list has the largest so far after each step.
    """
    rng = np.random.default_rng(seed)
    now = layered(int(rng.integers(4, MOST + 1)), DEVICES, float(rng.choice([0.1, 1, 5])), seed)
    value = ratio(now)
    best, worst, so_far = value, now, []
    for step in range(steps):
        temperature = TEMPERATURE * 0.01 ** (step / steps)
        tried = changed(now, rng)
        found = ratio(tried)
        if found >= value or rng.random() < exp((found - value) / temperature):
            now, value = tried, found
        if value > best:
            best, worst = value, now
        so_far.append(best)
    return best, worst, so_far


def changed(problem: Problem, rng: np.random.Generator) -> Problem:
    """With another number of seconds or bytes, or with an edge more or less."""
    kind = int(rng.integers(0, 4))
    edges = len(problem.source)
    if kind == 0 or not edges:
        seconds = problem.seconds.copy()
        i, q = rng.integers(0, problem.tasks), rng.integers(0, DEVICES)
        seconds[i, q] = rng.uniform(LEAST, MOST_SECONDS)
        if rng.random() < 0.1 and np.isfinite(np.delete(seconds[i], q)).any():
            seconds[i, q] = np.inf
        return replace(problem, seconds=seconds)
    if kind == 1:
        nbytes = problem.nbytes.copy()
        nbytes[rng.integers(0, edges)] = rng.uniform(0.0, MOST_BYTES) * rng.random()
        return replace(problem, nbytes=nbytes)
    ends = {
        (int(sink), int(source)): float(nbytes)
        for sink, source, nbytes in zip(problem.sink, problem.source, problem.nbytes, strict=True)
    }
    if kind == 2:
        source, sink = sorted(rng.choice(problem.tasks, 2, replace=False).tolist())
        ends[sink, source] = float(rng.uniform(0.0, MOST_BYTES) * rng.random())
    else:
        del ends[list(ends)[rng.integers(0, edges)]]
    pairs = np.array(sorted(ends), np.int64).reshape(-1, 2)
    return replace(
        problem,
        source=pairs[:, 1],
        sink=pairs[:, 0],
        nbytes=np.array([ends[key] for key in sorted(ends)]),
        tensor=np.empty(0, np.int64),
    )


def over_optimum(spec: str) -> Callable[[Problem], float]:
    """The makespan of a scheduler over the shortest.

    What a proof comes with is the shortest: the portfolio's own bound, else one of CP-SAT alone.
    """
    scheduler, portfolio = load(Scheduler, spec), load(Scheduler, PORTFOLIO)
    exact = load(Scheduler, EXACT)

    def ratio(problem: Problem) -> float:
        found = scheduler.schedule(problem)
        best = found if scheduler == portfolio else portfolio.schedule(problem)
        if not best.optimal:
            best = exact.schedule(problem)
        # Where nothing is proved it is not known how far it is: nothing to gain here.
        return found.makespan / best.makespan if best.optimal else 1.0

    return ratio


def over_members(spec: str) -> Callable[[Problem], float]:
    scheduler, members = load(Scheduler, spec), [load(Scheduler, name) for name in MEMBERS]

    def ratio(problem: Problem) -> float:
        best = min(member.schedule(problem).makespan for member in members)
        return scheduler.schedule(problem).makespan / best

    return ratio


RATIOS = {"optimum": over_optimum, "best list scheduler": over_members}


def attack(
    seed: int = 0, instances: int = 0, scheduler: str = "portfolio", steps: int = 1000
) -> tuple[str, tuple[str, ...], list[list[str]], list[dict[str, Any]], dict[str, Any]]:
    """The set of `bench.schedulers`: what it says, heads and cells of its table, rows, figures.

    `instances` is the number of restarts of each attack.
    """
    restarts = instances or 10
    scheduler = PORTFOLIO if scheduler == "portfolio" else scheduler
    cells, rows, figures = [], [], {}
    for spec in (scheduler, "heft"):
        for name, made in RATIOS.items():
            ratio, values = made(spec), []
            for restart in track(range(restarts), f"{spec}, {name}", transient=True):
                value, worst, so_far = attacked(ratio, steps, seed + restart)
                values.append(value)
                rows.append(
                    {"scheduler": spec, "over": name, "seed": seed + restart, "ratio": value}
                    | {"instance": _content(worst), "so_far": so_far[::50]}
                )
            figures[f"{spec}, {name}"] = {"max": max(values), "median": median(values)}
            cells.append([spec, name, f"{max(values):.6f}", f"{median(values):.6f}"])
    text = (
        f"Instances of at most {MOST} tasks on {DEVICES} devices, annealed in {restarts} x {steps} "
        "steps so that the makespan over the optimum, or over that of the best list scheduler, is "
        "as large as can be: the largest ratio found, and the median of the restarts."
    )
    return text, ("scheduler", "over", "max", "median"), cells, rows, figures


def _content(problem: Problem) -> dict[str, Any]:
    """What makes the instance again; null is where a task cannot run."""
    return {
        "seconds": [[x if np.isfinite(x) else None for x in row] for row in problem.seconds],
        "edges": [
            [int(i), int(j), float(nbytes)]
            for i, j, nbytes in zip(problem.source, problem.sink, problem.nbytes, strict=True)
        ],
    }
