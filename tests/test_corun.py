"""How much longer kernels take while all devices compute: measured, kept, and counted."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from threading import get_ident
from types import TracebackType

import pytest
from graphs import Builder

from hetsched import corun as module
from hetsched.corun import measured_slowdown
from hetsched.device import Device
from hetsched.graph import Graph
from hetsched.host import cores
from hetsched.overheads import overheads
from hetsched.plugin import load
from hetsched.store import Store
from hetsched.system import System
from hetsched.target import Target


def chain() -> Graph:
    build = Builder()
    x = build.op("Relu", build.input("x", 4), name="first")
    return build.graph(build.op("Softmax", x, name="second"))


class Known:
    """A sequence of groups that take known times: alone, and once a neighbour has begun."""

    alone: Mapping[str, float] = {}
    at_once: Mapping[str, float] = {}

    def __init__(self, graph: Graph, groups: list[object], device: Device) -> None:
        self._device = device.name
        self._main = get_ident()

    def burst(self, seconds: float) -> dict[str, list[float]]:
        known = self.alone if get_ident() == self._main else self.at_once
        # A wrong moment counts little.
        return {"kernels": [known[self._device], known[self._device], 9.0]}

    def __enter__(self) -> "Known":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass


def test_the_factor_is_what_kernels_take_at_once_over_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "profile.sqlite")
    devices = [Device("p", "none", cores=(0,)), Device("q", "none", cores=(1,))]
    monkeypatch.setattr(module, "KernelSequence", Known)
    monkeypatch.setattr(Known, "alone", {"p": 1.0, "q": 2.0})
    # Half as long again on one, and a quarter on the other.
    monkeypatch.setattr(Known, "at_once", {"p": 1.5, "q": 2.5})
    waits: list[None] = []
    found = measured_slowdown([chain()], devices, store, lambda: waits.append(None))
    assert (found.value, found.repeats) == (1.375, module.TURNS)
    assert len(waits) == module.TURNS
    assert store.factors(module.SLOWDOWN) == {module.ends_of(devices): found}
    # What is quicker at once was measured at two speeds of the machine.
    monkeypatch.setattr(Known, "at_once", {"p": 0.5, "q": 1.0})
    assert measured_slowdown([chain()], devices, store).value == 1.0


def test_devices_apart_do_not_slow_each_other(tmp_path: Path) -> None:
    """Of one unit, or of another memory: nothing is measured and nothing is kept."""
    store = Store(tmp_path / "profile.sqlite")
    one, other = Device("p", "none", cores=(0,)), Device("q", "none", cores=(0,))
    far = Device("q", "none", memory_space="far")
    for devices in ([one, other], [one, far]):
        assert measured_slowdown([chain()], devices, store).value == 1.0
    assert store.factor_kinds() == ()


@pytest.mark.skipif(len(cores()) < 2, reason="needs two cores")
def test_a_system_has_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path / "profile.sqlite")
    names = [f"cpu:{core}" for core in cores()[:2]]
    devices = [load(Target, "cpu").device(name) for name in names]
    assert overheads(devices, store).slowdown == 1.0
    monkeypatch.setattr(module, "TURNS", 2)
    found = measured_slowdown([chain()], devices, store)
    assert found.value >= 1.0
    # As if the host had put both on one core.
    store.add_factor(module.SLOWDOWN, module.ends_of(devices), replace(found, value=1.75))
    assert overheads(devices, store).slowdown == 1.75
    assert System.local(names, store).slowdown == 1.75
