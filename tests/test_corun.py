"""How much longer kernels take while all devices compute: measured, kept, and counted."""

from collections.abc import Mapping
from pathlib import Path
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
    """A sequence of groups that take known times."""

    seconds: Mapping[str, list[float]] = {}

    def __init__(self, graph: Graph, groups: list[object], device: Device) -> None:
        self._device = device

    def burst(self, seconds: float) -> dict[str, list[float]]:
        return {"kernels": self.seconds[self._device.name]}

    def __enter__(self) -> "Known":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass


def prices(graph: Graph) -> dict[str, dict[str, float]]:
    return {group.name: {"p": 1.0, "q": 2.0} for group in graph.groups}


def test_the_factor_is_what_kernels_take_at_once_over_their_prices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, store = chain(), Store(tmp_path / "profile.sqlite")
    total = len(graph.groups)
    devices = [Device("p", "none"), Device("q", "none")]
    # Half as long again on one, and a quarter on the other; a wrong moment counts little.
    Known.seconds = {"p": [1.5 * total, 1.5 * total, 9.0], "q": [2.5 * total]}
    monkeypatch.setattr(module, "KernelSequence", Known)
    waits: list[None] = []
    found = measured_slowdown([(graph, prices(graph))], devices, store, lambda: waits.append(None))
    assert (found.value, found.repeats) == (1.375, module.TURNS)
    assert len(waits) == module.TURNS
    (kept,) = store.factors(module.SLOWDOWN).values()
    assert kept == found
    # What is quicker at once than alone was measured at two speeds of the machine.
    Known.seconds = {"p": [0.5 * total], "q": [1.0 * total]}
    assert measured_slowdown([(graph, prices(graph))], devices, store).value == 1.0


def test_devices_apart_do_not_slow_each_other(tmp_path: Path) -> None:
    """One unit, another memory, or no prices: nothing is measured and nothing is kept."""
    graph, store = chain(), Store(tmp_path / "profile.sqlite")
    one, other = Device("p", "none", cores=(0,)), Device("q", "none", cores=(0,))
    far = Device("q", "none", memory_space="far")
    for devices in ([one, other], [one, far]):
        assert measured_slowdown([(graph, prices(graph))], devices, store).value == 1.0
    apart = [one, Device("q", "none", cores=(1,))]
    assert measured_slowdown([(graph, {})], apart, store).value == 1.0
    assert store.factor_kinds() == ()


@pytest.mark.skipif(len(cores()) < 2, reason="needs two cores")
def test_a_system_has_what_was_measured(tmp_path: Path) -> None:
    store = Store(tmp_path / "profile.sqlite")
    graph = chain()
    names = [f"cpu:{core}" for core in cores()[:2]]
    devices = [load(Target, "cpu").device(name) for name in names]
    assert overheads(devices, store).slowdown == 1.0
    # Prices so low that the factor is above one however fast the machine is.
    rows = {group.name: dict.fromkeys(names, 1e-12) for group in graph.groups}
    found = measured_slowdown([(graph, rows)], devices, store)
    assert found.value > 1.0
    assert overheads(devices, store).slowdown == found.value
    assert System.local(names, store).slowdown == found.value
