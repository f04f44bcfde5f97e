"""Latency and bandwidth from hand-overs of several sizes; what they take is made up."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from math import inf
from pathlib import Path

import pytest

from hetsched import links
from hetsched.device import Device, Link
from hetsched.links import Repeated, fitted, measure_link, measured_again
from hetsched.request import Step
from hetsched.schedule import Schedule, Slot
from hetsched.store import Store

HERE = Device("a", "none", cores=(0,), fingerprint="one")
THERE = Device("b", "none", cores=(1,), fingerprint="other")


def made_up(monkeypatch: pytest.MonkeyPatch, factors: Iterator[float]) -> None:
    """2 us and a byte in 0.1 ns, times a factor for each hand-over."""
    monkeypatch.setattr(
        links,
        "_handover_seconds",
        lambda source, sink, nbytes: (2e-6 + 1e-10 * nbytes) * next(factors),
    )
    monkeypatch.setattr(links.Witness, "begin", lambda self, device: None)
    monkeypatch.setattr(links.Witness, "end", lambda self, device: "")


def test_latency_and_bandwidth_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    made_up(monkeypatch, repeat(1.0))
    link = measure_link(HERE, THERE)
    assert link.seconds == pytest.approx(2e-6)
    assert link.bytes_per_second == pytest.approx(1e10)


@pytest.mark.parametrize("wrong", range(5))
def test_one_size_that_is_disturbed_changes_little(
    monkeypatch: pytest.MonkeyPatch, wrong: int
) -> None:
    made_up(monkeypatch, iter([3.0 if index == wrong else 1.0 for index in range(5)]))
    link = measure_link(HERE, THERE)
    assert link.bytes_per_second == pytest.approx(1e10, rel=1e-6)
    assert link.seconds == pytest.approx(2e-6, rel=1e-6)


def test_what_costs_nothing_is_unlimited_and_never_negative() -> None:
    assert fitted([(8, 3e-6), (1000, 2e-6), (2000, 1e-6)])[1] == 0.0
    assert fitted([(8, 0.0), (1000, 1e-6), (2000, 3e-6)])[0] == 0.0


def test_the_bandwidth_has_an_interval() -> None:
    """Bursts from 8 to 1000 GB/s: the median alone would look sure."""
    steady = Repeated(Link("a", "b", 1e-6, 1e10), ((1e-6, 1e10), (1e-6, 1.02e10)) * 6)
    least, most = steady.rates
    assert 0.97e10 < least < 1.01e10 < most < 1.05e10
    wild = Repeated(Link("a", "b", 1e-6, 5e10), ((1e-6, 8e9), (1e-6, 5e10), (1e-6, 1e12)) * 4)
    least, most = wild.rates
    assert least < 2e10
    assert most == inf
    alone = Repeated(Link("a", "b", 1e-6, 1e10), ((1e-6, 1e10),))
    assert alone.rates == (0.0, inf)
    unlimited = Repeated(Link("a", "b", 0.0, inf), ((0.0, inf),) * 3)
    assert unlimited.rates == (inf, inf)
    computed = Repeated(Link("a", "b", 0.0, 1e9), ())
    assert computed.rates == (1e9, 1e9)
    assert computed.tight


def test_a_disturbed_burst_of_a_link_is_repeated(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made_up(monkeypatch, iter([4.0] * 5 + [1.0] * 5))
    seen: list[tuple[int, ...]] = []
    told = iter(["30% of the processor stolen", ""])

    def end(self: object, device: Device) -> str:
        seen.append(device.cores)
        return next(told)

    monkeypatch.setattr(links.Witness, "end", end)
    found = measured_again(HERE, THERE, Store(tmp_path / "profile.sqlite"))
    assert found.link.seconds == pytest.approx(2e-6)
    # Both ends are watched.
    assert seen == [(0, 1), (0, 1)]


# Seconds from part to part on a device, and from device to device.
STARTING, WAITING = 1e-7, 5e-7
# Seconds a byte that a part reads and writes, and how many more for what another has touched last.
OWN, SHARING = 1e-10, 3e-10


@dataclass(frozen=True)
class Stamped:
    """Runs steps by the clock above; two pieces of memory take turns to hold the tensors."""

    steps: Sequence[Step]
    outputs: tuple[str, ...]
    constants: Mapping[str, object]

    def run(self, inputs: Mapping[str, object]) -> tuple[None, "Stamped"]:
        return None, self

    def schedule(self) -> Schedule:
        slots: list[Slot] = []
        time = 0.0
        owner: dict[int, str] = {}
        for step in self.steps:
            device = step.device.name
            time += WAITING if slots and slots[-1].device != device else STARTING
            others = sum(owner.get(piece) != device for piece in (0, 1))
            words = step.load.args[1]  # type: ignore[attr-defined]
            seconds = links.WORD_NBYTES * words * (OWN + SHARING * others / 2)
            owner = {0: device, 1: device}
            slots.append(Slot(step.name, device, time, time + seconds))
            time += seconds
        return Schedule(tuple(slots))

    def close(self) -> None:
        pass


def test_a_link_counts_what_sharing_costs_who_reads_and_who_writes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The difference of two copies, one of which read and both of which wrote, told too little."""
    monkeypatch.setattr(links, "Executor", Stamped)
    link = measure_link(HERE, THERE)
    assert link.seconds == pytest.approx(WAITING - STARTING)
    assert link.bytes_per_second == pytest.approx(1 / SHARING)
