"""Times the candidates of kernels, each against the others in turn.

A kernel is timed as a network runs it, between the others of its part, so that its data has left
the nearest caches: a candidate that is best on warm data need not be.

Importing this file loads TVM's compiler.
"""

import statistics
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import numpy as np
import tvm

from hetsched.dtype import numpy_dtype
from hetsched.graph import Graph
from hetsched.lowering.relax import CAREFUL, WRAPS, fuse, lowered
from hetsched.lowering.stack import ON_STACK
from hetsched.schedules.apply import scheduled
from hetsched.schedules.rules import CANDIDATE, CANDIDATES, WORKLOAD, Rules
from hetsched.trial import Step, Trial
from hetsched.tvm_runtime import quiet, to_tvm

# Workloads that are timed together; a kill loses at most their trials.
TOGETHER = 16
LEAST_ROUNDS = 9
LEAST_SECONDS = 2.0
SEED = 0


@dataclass(frozen=True, eq=False)
class Variant:
    """A function that computes `workload` by a candidate, which has this `place` in the ranking."""

    workload: str
    candidate: str
    place: int
    function: Any


def variants(graph: Graph, rules: Rules, count: int) -> tuple[Variant, ...]:
    """For each workload of `graph`, the functions of its first `count` candidates."""
    found: dict[tuple[str, str], Variant] = {}
    ranked: dict[str, Sequence[str]] = {}
    for place in range(count):
        chosen = {w: texts[place] for w, texts in ranked.items() if place < len(texts)}
        if place and not chosen:
            break
        tried = replace(rules, chosen=chosen)
        module = scheduled(fuse(lowered(graph, tried)).module, tried)
        for function in module.functions.values():
            attributes = getattr(function, "attrs", None) or {}
            if WORKLOAD not in attributes or not isinstance(function, tvm.tirx.PrimFunc):
                continue
            workload, candidate = str(attributes[WORKLOAD]), str(attributes[CANDIDATE])
            texts = ranked.setdefault(workload, [str(text) for text in attributes[CANDIDATES]])
            variant = Variant(workload, candidate, texts.index(candidate), function)
            found.setdefault((workload, candidate), variant)
    several = [v for v in found.values() if len(ranked[v.workload]) > 1]
    return tuple(sorted(several, key=lambda v: (list(ranked).index(v.workload), v.place)))


def trials(
    graph: Graph, rules: Rules, llvm: Mapping[str, Any], count: int, known: Collection[Trial]
) -> Iterator[Trial | Step]:
    """The trials of the candidates of `graph`, on the calling thread and its cores."""
    yield Step("lowering the candidates", 0, 1)
    with quiet():
        todo = variants(graph, rules, count)
    there = {(trial.workload, trial.candidate): trial for trial in known}
    missing = {v.workload for v in todo if (v.workload, v.candidate) not in there}
    for variant in todo:
        if variant.workload not in missing:
            yield there[variant.workload, variant.candidate]
    names = [w for w in dict.fromkeys(v.workload for v in todo) if w in missing]
    for start in range(0, len(names), TOGETHER):
        workloads = names[start : start + TOGETHER]
        # The candidates of a workload apart: the next to run would find its data warm.
        together = sorted(
            (variant for variant in todo if variant.workload in workloads),
            key=lambda variant: variant.place,
        )
        yield Step(f"timing {len(together)} candidates", start, len(names))
        seconds = measured([variant.function for variant in together], llvm)
        for variant, own in zip(together, seconds, strict=True):
            yield Trial(variant.workload, variant.candidate, variant.place, own)


def measured(functions: Sequence[Any], llvm: Mapping[str, Any]) -> list[float]:
    """Median seconds of each function, on random values; all are run in turn, again and again."""
    with quiet():
        entries = _entries(functions, llvm)
    drawn: dict[tuple[str, tuple[int, ...], int], Any] = {}
    calls = [_call(*item, drawn) for item in zip(entries, functions, strict=True)]
    times: list[list[float]] = [[] for _ in calls]
    begin = perf_counter()
    while len(times[0]) <= LEAST_ROUNDS or perf_counter() - begin < LEAST_SECONDS:
        for call, own in zip(calls, times, strict=True):
            start = perf_counter()
            call()
            own.append(perf_counter() - start)
    # The first round warms up.
    return [statistics.median(own[1:]) for own in times]


def _entries(functions: Sequence[Any], llvm: Mapping[str, Any]) -> list[Any]:
    """The functions as code that can be called."""
    wrapping = [bool(WRAPS.search(function.script())) for function in functions]
    entries: list[Any] = [None] * len(functions)
    for kind in set(wrapping):
        own = {f"kernel{i}": f for i, f in enumerate(functions) if wrapping[i] == kind}
        module = tvm.IRModule({name: f.with_attr("global_symbol", name) for name, f in own.items()})
        target = tvm.target.Target({**llvm, **(CAREFUL if kind else {})})
        code = tvm.tirx.build(module, target=target, pipeline=ON_STACK)
        # One that is compiled in memory.
        code = code.jit() if hasattr(code, "jit") else code
        for name in own:
            entries[int(name.removeprefix("kernel"))] = code[name]
    return entries


def _call(
    entry: Any, function: Any, drawn: dict[tuple[str, tuple[int, ...], int], Any]
) -> Callable[[], Any]:
    """A call on tensors that functions share: one for each shape, and more of the same shape."""
    rng = np.random.default_rng(SEED)
    keys: list[tuple[str, tuple[int, ...], int]] = []
    for parameter in function.params:
        kind = (str(parameter.dtype), tuple(int(dim) for dim in parameter.shape))
        keys.append((*kind, sum(key[:2] == kind for key in keys)))
    for key in keys:
        if key not in drawn:
            dtype = numpy_dtype(key[0])
            values = rng.standard_normal(key[1]) if dtype.kind == "f" else np.ones(key[1])
            drawn[key] = to_tvm(values.astype(dtype), dtype)
    tensors = [drawn[key] for key in keys]
    return lambda: entry(*tensors)
