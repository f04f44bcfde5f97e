"""Measures hand-overs between devices."""

import statistics
from collections.abc import Callable, Sequence
from ctypes import c_int32, c_void_p
from dataclasses import dataclass, replace
from functools import cache, partial
from hashlib import sha256
from itertools import combinations, permutations
from math import inf
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from hetsched import crew
from hetsched.confidence import margin
from hetsched.crew import ADDRESS, VALUE, WORD_NBYTES, address
from hetsched.device import Device, Link
from hetsched.disturbance import Witness
from hetsched.dtype import empty
from hetsched.errors import DeviceError
from hetsched.executor import HOST_SPACE, Executor
from hetsched.native import opened
from hetsched.plugin import load
from hetsched.request import Step
from hetsched.store import Store
from hetsched.target import Code, Kernel, Target

Progress = Callable[[str, int, int], None]

# A link is measured again until its margin is such a share, or so short, or so often.
TOLERANCE = 0.1
LEAST_SECONDS = 0.2e-6
MOST_BURSTS = 24
# Of the tensor by which links are compared.
TYPICAL_NBYTES = 1 << 18

HANDOVERS = 80
# Hand-overs there and back in one request.
ROUNDS = 10
# Parts behind each other on one device, the first of which still find the other's data.
ALONE, OWN = 8, 3
# As tensors mostly are: larger ones no cache holds. The first is a hand-over and nothing else.
SIZES = (WORD_NBYTES, 1 << 16, 1 << 17, 1 << 18, 1 << 19)
MOST_BYTES_PER_SECOND = 1e12
# A burst that something else disturbed is repeated so often.
ATTEMPTS = 3


@cache
def runtime() -> str:
    """A digest of what hands over and of what measures it: with other code, links differ."""
    digest = sha256()
    for name in ("crew.c", "crew.py", "executor.py", "links.py", "overheads.py"):
        digest.update(Path(__file__).with_name(name).read_bytes())
    return digest.hexdigest()[:16]


def link_between(source: Device, sink: Device, store: Store) -> Link:
    """The link as the store has it, or as it is measured now and then kept.

    A device that is modelled has one that is computed.

    Raises
    ------
    DeviceError
        There is no way to compute on one of them.
    """
    if source.modelled or sink.modelled:
        # As the slower one's port to memory takes it; there is nothing to be measured.
        rate = min(source.bytes_per_second, sink.bytes_per_second)
        return Link(source.name, sink.name, 0.0, rate)
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
    def rates(self) -> tuple[float, float]:
        """Bytes a second at least and at most, with 95 % confidence; infinite if nothing limits.

        Of a single burst nothing is sure.
        """
        each = [1 / rate for _, rate in self.bursts]
        if not each:
            return (self.link.bytes_per_second,) * 2
        middle, reach = statistics.median(each), margin(each)
        slowest, quickest = middle + reach, middle - reach
        unlimited = quickest <= 1 / MOST_BYTES_PER_SECOND
        return 1 / slowest if slowest else inf, inf if unlimited else 1 / quickest

    @property
    def tight(self) -> bool:
        """Whether more bursts would tell nothing that counts; what is computed has none."""
        if not self.bursts:
            return True
        enough = max(TOLERANCE * statistics.median(self.seconds), LEAST_SECONDS)
        return self.margin <= enough or len(self.bursts) >= MOST_BURSTS


def measured_again(source: Device, sink: Device, store: Store, deadline: float = inf) -> Repeated:
    """The link with one burst more than the store has; the store has it then too.

    A burst that was disturbed is repeated, but not after `deadline`.
    """
    one = _undisturbed(source, sink, deadline)
    bursts = store.link_bursts(source, sink, runtime())
    bursts = (*bursts[1 - MOST_BURSTS :], (one.seconds, one.bytes_per_second))
    latencies, rates = zip(*bursts, strict=True)
    seconds, rate = statistics.median(latencies), statistics.median(rates)
    found = Repeated(replace(one, seconds=seconds, bytes_per_second=rate), bursts)
    store.add_link(source, sink, runtime(), found.link, found.margin, bursts)
    return found


def _undisturbed(source: Device, sink: Device, deadline: float) -> Link:
    """A burst in which nothing else had a part of the machine, if one of a few is such."""
    # Both devices, as far as anything can be told of them.
    both = replace(source, cores=tuple(dict.fromkeys((*source.cores, *sink.cores))))
    witness = Witness()
    for _ in range(ATTEMPTS):
        witness.begin(both)
        link = measure_link(source, sink)
        if not witness.end(both) or perf_counter() >= deadline:
            break
    return link


def measure_links(
    devices: Sequence[Device], store: Store, deadline: float = inf, progress: Progress | None = None
) -> list[Repeated]:
    """The link of each ordered pair, measured until it is tight; the pairs take turns.

    No burst begins after `deadline`, in seconds of `perf_counter`, but the first of a link.

    Raises
    ------
    DeviceError
        There is no way to compute on a device.
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
            found[source, sink] = measured_again(source, sink, store, deadline)
    return list(found.values())


def links_by_copy(devices: Sequence[Device], store: Store) -> list[Link]:
    """What the links would be if devices copied that share the host's memory, where they can.

    Nothing uses them: they tell what sharing saves.
    """
    found = []
    for source, sink in permutations(devices, 2):
        ends = [_apart(end) for end in (source, sink)]
        if ends == [source, sink] or source.unit == sink.unit:
            continue
        link = store.link(source, sink, by_copy := f"{runtime()} by copy")
        if link is None:
            link = measure_link(*ends)
            bursts = ((link.seconds, link.bytes_per_second),)
            store.add_link(source, sink, by_copy, link, margin([link.seconds]), bursts)
        found.append(link)
    return found


def _apart(device: Device) -> Device:
    """The same device with a memory of its own, if it would copy then and does not now."""
    shares = device.memory_space == HOST_SPACE and load(Target, device.target).can_copy
    return replace(device, memory_space=f"copies for {device.name}") if shares else device


def measure_link(source: Device, sink: Device) -> Link:
    """What a hand-over between two devices costs, from the stamps of copies.

    Latency is the time from the finish of a part to the start of one that waits for it, less what
    passes between two parts on one device: that is counted in what it takes to start a part.
    Bandwidth is that of the transfer; where memory is shared, by how much longer a part takes that
    reads what another unit has written and writes where that has read. Both are fitted to tensors
    of several sizes.

    Raises
    ------
    DeviceError
        There is no way to compute on one of them.
    """
    if source.unit == sink.unit and source.memory_space == sink.memory_space:
        # The same thread runs both: there is nothing to wait for and nothing to move.
        return Link(source.name, sink.name, 0.0, inf)
    latency, per_byte = fitted([(n, _handover_seconds(source, sink, n)) for n in SIZES])
    return Link(source.name, sink.name, latency, 1 / max(per_byte, 1 / MOST_BYTES_PER_SECOND))


def fitted(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Seconds, and seconds a byte, of a line through sizes and seconds; neither is negative.

    The slope is the median of those of all pairs, so that a wrong point of five changes little.

    Examples
    --------
    >>> fitted([(0, 1.0), (10, 2.0), (20, 3.0), (30, 9.0), (40, 5.0)])
    (1.0, 0.1)

    References
    ----------
    Sen, "Estimates of the regression coefficient based on Kendall's tau", JASA 63(324), 1968,
    https://doi.org/10.1080/01621459.1968.10480934
    """
    slopes = [(b - a) / (other - one) for (one, a), (other, b) in combinations(points, 2)]
    slope = max(0.0, statistics.median(slopes))
    return max(0.0, statistics.median(y - slope * x for x, y in points)), slope


def _handover_seconds(source: Device, sink: Device, nbytes: int) -> float:
    """From part to part, beyond what starting one takes, the transfer among it, and by how much
    longer the second computes than one on data of its own device: it reads what the other has
    written, and writes where that has read, which takes longer still between caches.

    Of a tensor that copies pass to and fro, and then from one to the next on `sink` alone.
    """
    words = nbytes // WORD_NBYTES
    devices = [source, sink] * ROUNDS + [sink] * ALONE
    steps = [
        Step(f"copy{i}", device, (f"t{i}",), (f"t{i + 1}",), partial(copying, device, words))
        for i, device in enumerate(devices)
    ]
    executor = Executor(steps, (f"t{len(steps)}",), {})
    try:
        data = {"t0": np.zeros(words, np.int64)}
        schedules = [executor.run(data)[1].schedule() for _ in range(HANDOVERS // ROUNDS)]
    finally:
        executor.close()
    waits, there, here, between = [], [], [], []
    for schedule in schedules:
        slots = [schedule.slot(step.name) for step in steps]
        # Behind the first of each unit, which is woken.
        for index in range(5, 2 * ROUNDS, 2):
            waits.append(slots[index].start - slots[index - 1].finish)
            there.append(slots[index].seconds)
        # When the memory that the tensors take in turns is the device's own again.
        for index in range(2 * ROUNDS + OWN, len(steps)):
            between.append(slots[index].start - slots[index - 1].finish)
            here.append(slots[index].seconds)
    starting = statistics.median(between)
    waiting = max(0.0, statistics.median(waits) - starting)
    return waiting + statistics.median(there) - statistics.median(here)


def copying(device: Device, words: int) -> Kernel:
    """A part that adds one to `words` integers of 64 bits on `device`.

    Raises
    ------
    DeviceError
        There is no way to do so.
    """
    target = load(Target, device.target)
    found = target.copying(device, words)
    if found is not None:
        return found
    if device.memory_space != HOST_SPACE:
        raise DeviceError(f"no way to measure a link of '{device.name}' yet; give one")
    return _Copying(target.crew(device), words)


class _Copying(Kernel):
    """The same on the host's memory: by the code of a crew, or by Python."""

    any_thread = True

    def __init__(self, library: bytes | None, words: int) -> None:
        self._kind = (words,), np.dtype(np.int64)
        self._library = opened(library) if library is not None else None
        self._table = np.array([words, 0, 0], np.uint64)
        self._given = np.array([(ADDRESS, 0, address(self._table))], VALUE)
        self._result = np.zeros(1, VALUE)
        self._arguments = None, address(self._given), 1, address(self._result)
        if self._library is not None:
            self._copy = self._library.crew_copy
            self._copy.argtypes = (c_void_p, c_void_p, c_int32, c_void_p)

    def run(self, inputs: Sequence[Any]) -> Sequence[Any]:
        (array,) = inputs
        made = empty(*self._kind)
        if self._library is None:
            np.add(array, 1, out=made)
        else:
            # As code is called from Python: by the addresses in a table.
            self._table[1], self._table[2] = address(array), address(made)
            self._copy(*self._arguments)
        return [made]

    def code(self) -> Code | None:
        return crew.copying(self._library, self._kind) if self._library is not None else None

    def close(self) -> None:
        self._library = None
