"""Kernel groups that run one behind another on a device, and what each of them takes.

What a kernel takes depends on what ran before it: who made its inputs, and what has pushed its
weights out of the caches. So the groups of a graph run in their order, each on what the one before
has left, and each occurrence has weights of its own, as in a run of the graph.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import groupby
from math import ceil, inf, log2
from statistics import median
from threading import Thread
from time import perf_counter
from types import TracebackType
from typing import Any

import numpy as np

from hetsched.cache import compiled
from hetsched.cost import Progress, signature
from hetsched.crew import WORD_NBYTES, Crew, CrewRequest, copying
from hetsched.device import Device
from hetsched.dtype import numpy_dtype
from hetsched.errors import CompileError, DeviceError
from hetsched.forms import between
from hetsched.fusion import Group
from hetsched.graph import Graph
from hetsched.host import cores, pinned
from hetsched.inputs import seeded
from hetsched.op import Tensor
from hetsched.plugin import load
from hetsched.request import Step, views_between
from hetsched.target import Artifact, Code, Kernel, Target

# Changes with how the samples of a burst are taken: others are no substitute for them.
METHOD = "sequence 2"
# Of the code of a group, roughly.
CODE_NBYTES = 1 << 14

LEAST_PASSES = 2
# More in one burst tell nothing new, and each leaves its stamps.
MOST_PASSES = 2000
# Shorter than any kernel: what is left of one when the timer's own time is taken off.
LEAST_SECONDS = 1e-9
# The step that does nothing, by whose time the timer's own is known.
EMPTY = "(nothing)"
# Of the largest cache: so much has pushed out what was there before.
DISPLACING_CACHES = 2


def method(graph: Graph) -> str:
    """How samples of the groups of `graph` are taken; others are no substitute for them."""
    return f"{METHOD}, within {surroundings(graph)} MB"


def surroundings(graph: Graph) -> int:
    """What a run of `graph` touches, in megabytes rounded up to a power of four.

    Between two runs of a kernel all others run, so that in a large graph its code and weights are
    in no near cache: a kernel of 0.5 us in one of 4 MB takes 3 us in one of 30 MB. Weights count,
    and every tensor between kernels once, and code.
    """
    tensors = (*graph.inputs, *(tensor for group in graph.groups for tensor in group.outputs))
    nbytes = graph.weight_nbytes + sum(tensor.nbytes for tensor in tensors)
    nbytes += CODE_NBYTES * len(graph.groups)
    return int(4 ** max(0, ceil(log2(nbytes / 2**20) / 2)))


def left_out(graph: Graph, chosen: Collection[str], most: int) -> dict[str, int]:
    """By group of `chosen`, what others touch since the one of them before; `most` bytes in all.

    Before the first of them are also those behind the last.
    """
    found: dict[str, int] = {}
    since = 0
    for group in graph.groups:
        if group.name in chosen:
            found[group.name] = since
            since = 0
        else:
            since += CODE_NBYTES + sum(t.nbytes for t in (*group.constants, *group.outputs))
    if found:
        found[next(iter(found))] += since
    share = min(1.0, most / max(1, sum(found.values())))
    return {name: int(nbytes * share) for name, nbytes in found.items()}


def surroundings_of(method: str) -> int | None:
    """The megabytes in the text of a method; None where samples were taken in another way.

    Examples
    --------
    >>> surroundings_of("sequence 2, within 16 MB")
    16
    """
    found = re.fullmatch(rf"{METHOD}, within (\d+) MB", method)
    return int(found[1]) if found else None


@dataclass(frozen=True, eq=False)
class _Member:
    """A group with its kernel; the tensors by the names of the graph, as they are handed over."""

    group: str
    part: Graph
    kernel: Kernel
    code: Code | None

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return tuple(map(self.part.handed, self.part.inputs))

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        return tuple(map(self.part.handed, self.part.outputs))


class KernelSequence:
    """`groups` of `graph` on `device`, loaded; use it as a context, or `close` it.

    They run in the graph's order, and need not be all of its groups. What none of them makes has
    seeded values, the same in each pass, and is written to its place right before it is first
    read, so that it is in the caches as if it had been made. Where others are left out, as much of
    the host's memory is read and written in their place as they touch: few kernels would else find
    all that they need in the nearest cache, pass after pass. `refused` has the reasons of the
    groups that the device's target does not compile, by their names. Groups of one signature are
    compiled once, and the values of one's weights stand for all. They are compiled in the order in
    which `groups` come; those whose turn comes after `deadline`, by `perf_counter`, are left out.

    Raises
    ------
    DeviceError
        The device's target is not available here.
    """

    def __init__(
        self,
        graph: Graph,
        groups: Iterable[Group],
        device: Device,
        progress: Progress | None = None,
        deadline: float = inf,
    ) -> None:
        target = load(Target, device.target)
        if reason := target.unavailable():
            raise DeviceError(f"'{device.name}' cannot be measured here: {reason}", device.name)
        # Alone, a group reads and makes what it does among its neighbours.
        graph = between(graph, device)
        parts = {group.name: graph.part(group.ops, group.name) for group in groups}
        self.refused: dict[str, str] = {}
        self._device = device
        self._outputs = [tensor.name for tensor in graph.outputs]
        # Affinity and thread pools belong to threads: one that does all but to compile.
        self._worker = ThreadPoolExecutor(1)
        self._stretches: list[_InCode | _InPython] = []
        self._members: list[_Member] = []
        made = _compiled(target, list(parts.values()), device, progress, deadline)
        for group in graph.groups:
            if group.name in parts:
                self._done(self._load, target, parts[group.name], *made[group.name])
        self._done(self._connect, graph)

    def burst(self, seconds: float) -> dict[str, list[float]]:
        """The seconds of each group in each of several passes, which take about `seconds`.

        There are at least `LEAST_PASSES`, behind one that warms up. What the timer itself takes is
        taken off.

        Raises
        ------
        PartError
            A kernel fails.
        """
        found: dict[str, list[float]] = self._done(self._burst, seconds)
        return found

    def run(self) -> dict[str, np.ndarray]:
        """What the groups make of the graph's outputs, in one pass.

        Raises
        ------
        PartError
            A kernel fails.
        """
        values: dict[str, Any] = self._done(self._pass)
        return {name: np.asarray(values[name]) for name in self._outputs if name in values}

    def close(self) -> None:
        self._done(self._free)
        self._worker.shutdown()

    def __enter__(self) -> "KernelSequence":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _done(self, work: Callable[..., Any], *arguments: Any) -> Any:
        def held() -> Any:
            try:
                with pinned(self._device.cores):
                    return work(*arguments)
            except DeviceError as error:
                raise error.of(self._device.name) from None

        return self._worker.submit(held).result()

    def _load(
        self,
        target: Target,
        part: Graph,
        alike: Graph,
        artifact: Artifact | CompileError | None,
    ) -> None:
        """Takes up a part, with an artifact that was made for it or for another that is `alike`."""
        if artifact is None:
            return
        if isinstance(artifact, CompileError):
            self.refused[part.name] = str(artifact)
            return
        if part is not alike:
            own = {name: array.copy() for name, array in artifact.weights.items()}
            artifact = replace(artifact, weights=own)
        kernel = target.load(artifact, alike, self._device)
        # What a call of code waits for would count with each group, and a part waits once.
        code = None if kernel.asynchronous else kernel.code()
        self._members.append(_Member(part.name, part, kernel, code))

    def _connect(self, graph: Graph) -> None:
        """Makes stretches of members that are all code, or none of them."""
        runs = [list(run) for _, run in groupby(self._members, lambda m: m.code is None)]
        readers = [{tensor.name for m in run for tensor in m.inputs} for run in runs]
        most = DISPLACING_CACHES * max(self._device.cache_nbytes, default=0)
        others = left_out(graph, {member.group for member in self._members}, most)
        for index, run in enumerate(runs):
            wanted = {tensor.name for tensor in graph.outputs}.union(*readers[index + 1 :])
            made = {t.name for other in runs[:index] for m in other for t in m.outputs}
            if run[0].code is None:
                self._stretches.append(_InPython(run, wanted, made))
            else:
                self._stretches.append(_InCode(graph, run, wanted, made, others, self._device))

    def _burst(self, seconds: float) -> dict[str, list[float]]:
        self._pass()
        for stretch in self._stretches:
            stretch.seconds()
        begin = perf_counter()
        for done in range(MOST_PASSES):
            if done >= LEAST_PASSES and perf_counter() - begin >= seconds:
                break
            self._pass()
        return {
            name: times for stretch in self._stretches for name, times in stretch.seconds().items()
        }

    def _pass(self) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for stretch in self._stretches:
            stretch.run(values)
        return values

    def _free(self) -> None:
        for stretch in self._stretches:
            stretch.close()
        for member in self._members:
            member.kernel.close()
        self._stretches, self._members = [], []


class _InCode:
    """Members that are code on the host's memory: no Python between them."""

    def __init__(
        self,
        graph: Graph,
        members: Sequence[_Member],
        wanted: set[str],
        made: set[str],
        others: Mapping[str, int],
        device: Device,
    ) -> None:
        codes = [member.code for member in members if member.code is not None]
        own = {tensor.name for member in members for tensor in member.outputs}
        views = views_between(graph, [graph])
        views = {name: view for name, view in views.items() if own.issuperset(view.pieces)}
        there = own | views.keys() | made | {tensor.name for tensor in graph.inputs}
        library = codes[0].module
        self._given: dict[str, np.ndarray] = {}
        steps = [Step(EMPTY, device, (), ())]
        nothing = copying(library, ((0,), np.dtype(np.int64)))
        chosen = [replace(nothing, inputs=(), outputs=(), results=())]
        for member, code in zip(members, codes, strict=True):
            # Read as weights and inputs are, and as much written as outputs are.
            if words := others[member.group] // WORD_NBYTES:
                source = f"others before {member.group}"
                self._given[source] = np.ones(words, np.int64)
                steps.append(Step(source, device, (source,), (f"{source} (read)",)))
                chosen.append(copying(library, ((words,), np.dtype(np.int64))))
            for tensor in member.inputs:
                kind = numpy_dtype(tensor.dtype)
                if tensor.name in there:
                    if tensor.name not in own | views.keys() | made:
                        self._given[tensor.name] = seeded(tensor, seed=0)
                    continue
                there.add(tensor.name)
                if kind.kind != "f":
                    # It may be indices, and the copy alters what it copies.
                    self._given[tensor.name] = seeded(tensor, seed=0)
                    continue
                source = f"{tensor.name} (given)"
                self._given[source] = seeded(tensor, seed=0)
                steps.append(Step(source, device, (source,), (tensor.name,)))
                chosen.append(copying(library, (tensor.shape, kind)))
            read, written = tuple(_names(member.inputs)), tuple(_names(member.outputs))
            steps.append(Step(member.group, device, read, written))
            chosen.append(code)
        self._read = sorted(name for m in members for name in _names(m.inputs) if name in made)
        self._names = [member.group for member in members]
        results = sorted(wanted & (own | views.keys()))
        self._crew = Crew(steps, chosen, results, {}, views)
        self._requests: list[CrewRequest] = []
        self._thread = Thread(target=self._work, args=(device,))
        self._thread.start()

    def _work(self, device: Device) -> None:
        with pinned(device.cores):
            self._crew.work(device.unit)

    def run(self, values: dict[str, Any]) -> None:
        given = {name: values[name] for name in self._read}
        request = self._crew.submit(self._given | given, attended=True)
        self._crew.attend(request)
        values.update(request.result())
        self._requests.append(request)

    def seconds(self) -> dict[str, list[float]]:
        """The times of each member in the runs since this was last asked."""
        found: dict[str, list[float]] = {name: [] for name in (EMPTY, *self._names)}
        for request in self._requests:
            for slot in request.schedule().slots:
                if slot.task in found:
                    found[slot.task].append(slot.seconds)
        self._requests.clear()
        timer = median(found.pop(EMPTY) or [0.0])
        return {
            name: [max(one - timer, LEAST_SECONDS) for one in times]
            for name, times in found.items()
        }

    def close(self) -> None:
        self._crew.stop()
        self._thread.join()


class _InPython:
    """Members that need Python to be called. All begin before the first has to have ended."""

    def __init__(self, members: Sequence[_Member], wanted: set[str], made: set[str]) -> None:
        self._members = members
        self._wanted = wanted
        own = {tensor.name for member in members for tensor in member.outputs}
        self._given: dict[str, Any] = {}
        for member in members:
            for tensor in member.inputs:
                if tensor.name not in own | made | self._given.keys():
                    value = seeded(tensor, seed=0)
                    self._given[tensor.name] = member.kernel.receive(value)
        self._times: dict[str, list[float]] = {member.group: [] for member in members}

    def run(self, values: dict[str, Any]) -> None:
        buffers = dict(self._given)
        waiting = []
        for member in self._members:
            for tensor in member.inputs:
                if tensor.name not in buffers:
                    buffers[tensor.name] = member.kernel.receive(values[tensor.name])
            begun = member.kernel.begin([buffers[tensor.name] for tensor in member.inputs])
            names = list(_names(member.outputs))
            buffers.update(zip(names, begun.outputs, strict=True))
            waiting.append((member, names, begun))
        for member, names, begun in waiting:
            start, finish = begun.finish()
            self._times[member.group].append(finish - start)
            for name in self._wanted.intersection(names):
                values[name] = member.kernel.send(buffers[name])

    def seconds(self) -> dict[str, list[float]]:
        """The times of each member in the runs since this was last asked."""
        found = self._times
        self._times = {name: [] for name in found}
        return found

    def close(self) -> None:
        self._given = {}


def _compiled(
    target: Target,
    parts: Sequence[Graph],
    device: Device,
    progress: Progress | None,
    deadline: float,
) -> dict[str, tuple[Graph, Artifact | CompileError | None]]:
    """What is made for each part, by name, and the part of the same signature it was made of.

    None where it was too late.
    """

    def attempt(part: Graph) -> Artifact | CompileError | None:
        if perf_counter() >= deadline:
            return None
        try:
            artifact = compiled(target, part, device)
            target.prepare(artifact, device)
            return artifact
        except CompileError as error:
            return error

    keys = {part.name: signature(part) for part in parts}
    first: dict[str, Graph] = {}
    for part in parts:
        first.setdefault(keys[part.name], part)
    found = {}
    with ThreadPoolExecutor(len(cores())) as workers:
        waiting = {key: workers.submit(attempt, part) for key, part in first.items()}
        try:
            for index, (key, part) in enumerate(first.items()):
                if progress:
                    kinds = "+".join(op.kind for op in part.ops)
                    progress(f"compiling {kinds}", index, len(first))
                found[key] = part, waiting[key].result()
        finally:
            # An interruption does not wait for what has not begun.
            workers.shutdown(wait=False, cancel_futures=True)
    return {part.name: found[keys[part.name]] for part in parts}


def _names(tensors: Iterable[Tensor]) -> Iterable[str]:
    return (tensor.name for tensor in tensors)
