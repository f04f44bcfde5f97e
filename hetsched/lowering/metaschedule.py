"""Search for schedules of the functions that no family covers, by TVM's MetaSchedule.

What it finds is a trace of schedule primitives, kept as JSON among the trials of the device.

Importing this file loads TVM's compiler.

References
----------
Shao et al., "Tensor program optimization with probabilistic programs", NeurIPS 2022,
https://arxiv.org/abs/2205.13603
"""

import json
import logging
from collections.abc import Collection, Iterator, Mapping
from importlib.util import find_spec
from tempfile import TemporaryDirectory
from typing import Any

import tvm

from hetsched.errors import CompileError
from hetsched.graph import Graph
from hetsched.lowering.relax import fuse, lowered
from hetsched.lowering.trials import measured
from hetsched.schedules.apply import traced, uncovered
from hetsched.schedules.rules import Rules
from hetsched.trial import Step, Trial
from hetsched.tvm_runtime import quiet

# What its search needs beside TVM, and the package that learns which schedules to try.
NEEDED = ("cloudpickle", "psutil")
LEARNER = "xgboost"
AT_ONCE = 16
# For a schedule to be built, or run: the process that does it has to load TVM first.
LONGEST_SECONDS = 600.0
# Of the evolution between measurements: TVM's own, and for a short search in proportion to it.
LARGEST_POPULATION = 512
POPULATION_PER_TRIAL = 8
SEED = 1


def trials(
    graph: Graph, rules: Rules, llvm: Mapping[str, Any], count: int, known: Collection[Trial]
) -> Iterator[Trial | Step]:
    """Searches `count` schedules for each function that no family and none of `known` covers.

    What to try is learned from what was measured where xgboost is installed, else drawn.

    Raises
    ------
    CompileError
        A package that the search needs is not installed.
    """
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise CompileError(
            f"MetaSchedule needs {', '.join(missing)}: install hetsched with the extra 'tune'"
        )
    yield Step("lowering", 0, 1)
    with quiet():
        todo = uncovered(fuse(lowered(graph, rules)).module, rules.vectors)
    done = {trial.workload for trial in known}
    yield from (trial for trial in known if trial.workload in todo)
    for index, (workload, function) in enumerate(todo.items()):
        if workload in done:
            continue
        yield Step(f"searching schedules, {count} trials", index, len(todo))
        trace = _searched(function, {**llvm, "num-cores": rules.threads}, count)
        functions = [function] if trace is None else [function, traced(function, trace)]
        seconds = measured(functions, llvm)
        # The search itself is what costs: that it found nothing better is kept too.
        texts = ["", trace or ""]
        for place, (own, text) in enumerate(zip(seconds, texts, strict=False)):
            yield Trial(workload, text, place, own)


def _searched(function: Any, llvm: Mapping[str, Any], count: int) -> str | None:
    """The trace of the best of `count` schedules, or None if none could be made."""
    from tvm.s_tir import meta_schedule

    target = tvm.target.Target(dict(llvm))
    module = tvm.IRModule({"main": function.with_attr("global_symbol", "main")})
    logging.getLogger("tvm.s_tir.meta_schedule").setLevel(logging.ERROR)
    with quiet(), TemporaryDirectory(prefix="hetsched-") as folder:
        database = meta_schedule.tune_tir(
            module,
            target,
            folder,
            max_trials_global=count,
            num_trials_per_iter=min(AT_ONCE, count),
            builder=meta_schedule.builder.LocalBuilder(max_workers=1, timeout_sec=LONGEST_SECONDS),
            runner=meta_schedule.runner.LocalRunner(timeout_sec=LONGEST_SECONDS),
            strategy=meta_schedule.search_strategy.EvolutionarySearch(
                population_size=min(LARGEST_POPULATION, POPULATION_PER_TRIAL * count)
            ),
            num_tuning_cores=1,
            cost_model="xgb" if find_spec(LEARNER) else "random",
            seed=SEED,
        )
        record = database.query_tuning_record(module, target, "main")
    if record is None:
        return None
    return json.dumps(json.loads(tvm.ir.save_json(record.trace.as_json())))
