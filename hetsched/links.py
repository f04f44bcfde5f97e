"""Measures hand-overs between devices."""

import statistics
from collections.abc import Callable, Sequence
from ctypes import CDLL
from dataclasses import dataclass, replace
from functools import cache
from hashlib import sha256
from math import inf
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory
from threading import Thread
from time import perf_counter

import numpy as np

from hetsched.confidence import margin
from hetsched.crew import WORD_NBYTES, Crew, copying
from hetsched.device import Device, Link
from hetsched.errors import DeviceError
from hetsched.host import pinned
from hetsched.plugin import load
from hetsched.request import Step
from hetsched.store import Store
from hetsched.target import Target

Progress = Callable[[str, int, int], None]

# A link is measured again until its margin is such a share, or so short, or so often.
TOLERANCE = 0.1
LEAST_SECONDS = 0.2e-6
MOST_BURSTS = 24
# Of the tensor by which links are compared.
TYPICAL_NBYTES = 1 << 18

HANDOVERS = 200
# Hand-overs there and back in one request.
ROUNDS = 10
# As tensors mostly are: small ones come from the other's cache much faster, large ones slower.
HANDOVER_NBYTES = 1 << 19


@cache
def runtime() -> str:
    """A digest of what hands over and of what measures it: with other code, links differ."""
    digest = sha256()
    for name in ("crew.c", "crew.py", "executor.py", "links.py", "overheads.py"):
        digest.update(Path(__file__).with_name(name).read_bytes())
    return digest.hexdigest()[:16]


def link_between(source: Device, sink: Device, store: Store) -> Link:
    """The link as the store has it, or as it is measured now and then kept.

    Raises
    ------
    DeviceError
        One of them does not compute in the host's memory.
    """
    return store.link(source, sink, runtime()) or measured_again(source, sink, store).link


@dataclass(frozen=True)
class Repeated:
    """A link, by the medians of several bursts: seconds and bytes a second of each."""

    link: Link
    bursts: tuple[tuple[float, float], ...]

    @property
    def seconds(self) -> list[float]:
        """What a tensor of `TYPICAL_NBYTES` took in each burst."""
        return [latency + TYPICAL_NBYTES / rate for latency, rate in self.bursts]

    @property
    def margin(self) -> float:
        """Of the seconds, with 95 % confidence."""
        return 0.0 if not any(self.seconds) else margin(self.seconds)

    @property
    def tight(self) -> bool:
        """Whether more bursts would tell nothing that counts."""
        enough = max(TOLERANCE * statistics.median(self.seconds), LEAST_SECONDS)
        return self.margin <= enough or len(self.bursts) >= MOST_BURSTS


def measured_again(source: Device, sink: Device, store: Store) -> Repeated:
    """The link with one burst more than the store has; the store has it then too."""
    one = measure_link(source, sink)
    bursts = store.link_bursts(source, sink, runtime())
    bursts = (*bursts[1 - MOST_BURSTS :], (one.seconds, one.bytes_per_second))
    latencies, rates = zip(*bursts, strict=True)
    seconds, rate = statistics.median(latencies), statistics.median(rates)
    found = Repeated(replace(one, seconds=seconds, bytes_per_second=rate), bursts)
    store.add_link(source, sink, runtime(), found.link, found.margin, bursts)
    return found


def measure_links(
    devices: Sequence[Device], store: Store, deadline: float = inf, progress: Progress | None = None
) -> list[Repeated]:
    """The link of each ordered pair, measured until it is tight; the pairs take turns.

    No burst begins after `deadline`, in seconds of `perf_counter`, but the first of a link.

    Raises
    ------
    DeviceError
        A device does not compute in the host's memory.
    """
    pairs = [(a, b) for a in devices for b in devices if a != b]
    found: dict[tuple[Device, Device], Repeated] = {}
    for source, sink in pairs:
        link = link_between(source, sink, store)
        found[source, sink] = Repeated(link, store.link_bursts(source, sink, runtime()))
    while loose := [pair for pair in pairs if not found[pair].tight]:
        for source, sink in loose:
            if perf_counter() >= deadline:
                return list(found.values())
            if progress:
                done = len(pairs) - len(loose)
                progress(f"{source.name} to {sink.name}", done, len(pairs))
            found[source, sink] = measured_again(source, sink, store)
    return list(found.values())


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
    loaded = load_library(library)
    words = HANDOVER_NBYTES // WORD_NBYTES
    kind = (words,), np.dtype(np.int64)
    code = copying(loaded, kind)
    # Of two copies on one unit the first reads what the other unit has written.
    devices = [(source, sink)[index // 2 % 2] for index in range(4 * ROUNDS)]
    steps = [
        Step(f"copy{index}", device, (f"t{index}",), (f"t{index + 1}",))
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


def load_library(library: bytes) -> CDLL:
    """A library from memory, which leaves no file behind."""
    with TemporaryDirectory(prefix="hetsched-") as folder:
        path = Path(folder) / "crew.so"
        path.write_bytes(library)
        return CDLL(str(path))


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
