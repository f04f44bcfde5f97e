"""Measures kernels on their devices and hand-overs between them."""

import statistics
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from ctypes import CDLL, c_void_p, cast
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory
from threading import Thread
from time import perf_counter

import numpy as np

from hetsched.cache import compiled
from hetsched.crew import Crew
from hetsched.device import Device, Link
from hetsched.errors import CompileError, DeviceError
from hetsched.graph import Graph
from hetsched.host import cores, pinned
from hetsched.inputs import seeded
from hetsched.plugin import load
from hetsched.request import Step
from hetsched.store import Sample
from hetsched.target import Artifact, Code, Kernel, Target

# A kernel is repeated until both are reached, or the longest time.
LEAST_REPEATS = 5
LEAST_SECONDS = 0.05
MOST_SECONDS = 1.0
# One call of a kernel that is slower than this tells enough.
SLOW_SECONDS = 0.5
# Kernels that are compiled side by side before they are measured, alone; they are in memory.
AHEAD = 32

HANDOVERS = 200
# Hand-overs there and back in one request.
ROUNDS = 10
# Large enough to leave the nearest caches, small enough to be quick.
HANDOVER_NBYTES = 1 << 21


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
            inputs = [
                kernel.receive(seeded(graph.handed(tensor), seed=0)) for tensor in graph.inputs
            ]
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


def measure_link(source: Device, sink: Device) -> Link:
    """What a hand-over between two devices of the host's memory costs.

    Bandwidth is that at which a part reads what another core has written, less what it needs for
    data of its own core. Latency is the time from the finish of a part to the start of one that
    waits for it, as the executor has it; where that needs Python, half a round trip between two
    pinned, sleeping threads.

    Raises
    ------
    DeviceError
        One of them does not compute in the host's memory.
    """
    for device in (source, sink):
        if device.memory_space != "host":
            raise DeviceError(f"no way to measure a link of '{device.name}' yet; give one")
    if source.unit == sink.unit:
        # The same thread runs both: there is nothing to wait for and nothing to move.
        return Link(source.name, sink.name, 0.0, float("inf"))
    libraries = [load(Target, device.target).crew(device) for device in (source, sink)]
    if libraries[0] is not None and libraries[1] is not None:
        return _crew_link(source, sink, libraries[0])
    latency = _round_trip(source, sink, None) / 2
    data = np.ones(HANDOVER_NBYTES, np.uint8)
    there = _round_trip(source, sink, data)
    here = _round_trip(source, source, data)
    extra = max(there - here, HANDOVER_NBYTES / 1e12)
    return Link(source.name, sink.name, latency, HANDOVER_NBYTES / extra)


def _crew_link(source: Device, sink: Device, library: bytes) -> Link:
    """The link between two units of a crew, from the stamps of copies that take turns in pairs."""
    loaded = _loaded(library)
    words = HANDOVER_NBYTES // 8
    kind = (words,), np.dtype(np.int64)
    function = cast(loaded.crew_copy, c_void_p).value or 0
    table = np.array([words, 0, 0], np.uint64)
    code = Code(function, table, (1,), (2,), (kind,), 1, lambda: None, loaded)
    # Of two copies on one unit the first reads what the other unit has written.
    devices = [(source, sink)[index // 2 % 2] for index in range(4 * ROUNDS)]
    steps = [
        Step(f"copy{index}", device, (f"t{index}",), (f"t{index + 1}",), _no_kernel)
        for index, device in enumerate(devices)
    ]
    crew = Crew(steps, [code] * len(steps), (f"t{len(steps)}",), {})

    def work(device: Device) -> None:
        with pinned(device.cores):
            crew.work(device.unit)

    threads = [Thread(target=work, args=(device,)) for device in (source, sink)]
    for thread in threads:
        thread.start()
    try:
        data = {"t0": np.zeros(words, np.int64)}
        schedules = []
        for _ in range(HANDOVERS // ROUNDS):
            request = crew.submit(data)
            request.result()
            schedules.append(request.schedule())
    finally:
        crew.stop()
        for thread in threads:
            thread.join()
    waits, there, here = [], [], []
    for schedule in schedules:
        # Behind the first of each unit, which is woken.
        for index in range(6, len(steps), 4):
            before, first, second = schedule.slots[index - 1 : index + 2]
            waits.append(first.start - before.finish)
            there.append(first.seconds)
            here.append(second.seconds)
    extra = statistics.median(there) - statistics.median(here)
    bandwidth = HANDOVER_NBYTES / max(extra, HANDOVER_NBYTES / 1e12)
    return Link(source.name, sink.name, statistics.median(waits), bandwidth)


def _loaded(library: bytes) -> CDLL:
    """A library from memory, which leaves no file behind."""
    with TemporaryDirectory(prefix="hetsched-") as folder:
        path = Path(folder) / "crew.so"
        path.write_bytes(library)
        return CDLL(str(path))


def _no_kernel() -> Kernel:
    raise NotImplementedError("a copy has code alone")


def _round_trip(source: Device, sink: Device, data: np.ndarray | None) -> float:
    """Median seconds from handing `data` to a thread on `sink`, which reads it, to its answer."""
    there: SimpleQueue[np.ndarray | None] = SimpleQueue()
    back: SimpleQueue[object] = SimpleQueue()

    def answer() -> None:
        with pinned(sink.cores[:1]):
            for _ in range(HANDOVERS):
                received = there.get()
                back.put(None if received is None else int(received.sum()))

    times = []
    other = Thread(target=answer)
    with pinned(source.cores[:1]):
        other.start()
        for turn in range(HANDOVERS):
            if data is not None:
                data.fill(turn % 2)
            start = perf_counter()
            there.put(data)
            back.get()
            times.append(perf_counter() - start)
    other.join()
    return statistics.median(times)
