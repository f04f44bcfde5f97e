"""Measures kernels on their devices and hand-overs between them."""

import statistics
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter

from hetsched.cache import compiled
from hetsched.device import Device
from hetsched.errors import CompileError, DeviceError
from hetsched.graph import Graph
from hetsched.host import cores, pinned
from hetsched.inputs import seeded
from hetsched.plugin import load
from hetsched.store import Sample
from hetsched.target import Artifact, Kernel, Target

# How kernels are timed: what was timed in another way is another sample.
METHOD = "alone"

# A kernel is repeated until both are reached, or the longest time.
LEAST_REPEATS = 5
LEAST_SECONDS = 0.05
MOST_SECONDS = 1.0
# One call of a kernel that is slower than this tells enough.
SLOW_SECONDS = 0.5
# Kernels that are compiled side by side before they are measured, alone; they are in memory.
AHEAD = 32


def measure_kernel(graph: Graph, device: Device) -> Sample:
    """Compiles `graph`, runs it alone on `device` and takes the median.

    The values are random, and the same at each call; integers, which may be indices, are 0 or 1.

    Raises
    ------
    DeviceError
        The device's target is not available here.
    CompileError
        The target refuses the graph.
    """
    target = load(Target, device.target)
    if reason := target.unavailable():
        raise DeviceError(f"'{device.name}' cannot be measured here: {reason}")
    return _measured(compiled(target, graph, device), graph, device)


def measure_kernels(
    kernels: Sequence[tuple[Graph, Device]],
) -> Iterator[Sample | CompileError]:
    """What `measure_kernel` returns or raises for each in turn; they are compiled side by side.

    Nothing compiles while anything is measured.

    Raises
    ------
    DeviceError
        The target of a device is not available here.
    """
    for first in range(0, len(kernels), AHEAD):
        chosen = kernels[first : first + AHEAD]
        for _, device in chosen:
            if reason := load(Target, device.target).unavailable():
                raise DeviceError(f"'{device.name}' cannot be measured here: {reason}")
        with ThreadPoolExecutor(len(cores())) as workers:
            made = list(workers.map(_attempt, *zip(*chosen, strict=True)))
        for (graph, device), artifact in zip(chosen, made, strict=True):
            if isinstance(artifact, CompileError):
                yield artifact
            else:
                yield _measured(artifact, graph, device)


def _attempt(graph: Graph, device: Device) -> Artifact | CompileError:
    try:
        return compiled(load(Target, device.target), graph, device)
    except CompileError as error:
        return error


def _measured(artifact: Artifact, graph: Graph, device: Device) -> Sample:
    target = load(Target, device.target)

    def measure() -> Sample:
        with pinned(device.cores), target.load(artifact, graph, device) as kernel:
            inputs = [kernel.receive(seeded(tensor, seed=0)) for tensor in graph.inputs]
            return time_kernel(kernel, inputs)

    # A thread of its own: affinity and thread pools belong to threads.
    with ThreadPoolExecutor(1) as worker:
        return worker.submit(measure).result()


def time_kernel(kernel: Kernel, inputs: Sequence[object]) -> Sample:
    """The median time of `run` after a warm-up, and its spread."""
    begin = perf_counter()
    kernel.run(inputs)
    first = perf_counter() - begin
    if first > SLOW_SECONDS:
        return Sample(first, 0.0, 1)
    times: list[float] = []
    begin = perf_counter()
    while True:
        start = perf_counter()
        kernel.run(inputs)
        finish = perf_counter()
        times.append(finish - start)
        total = finish - begin
        enough = len(times) >= LEAST_REPEATS and total >= LEAST_SECONDS
        if enough or (total >= MOST_SECONDS and len(times) > 1):
            break
    quartiles = statistics.quantiles(times, n=4)
    return Sample(statistics.median(times), (quartiles[2] - quartiles[0]) / 2, len(times))
