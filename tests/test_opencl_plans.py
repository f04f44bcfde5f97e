"""Plans over the processor and OpenCL: without Python and copies where memory is shared."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from test_overlap import RUNS, shared

import hetsched
from bench.overlap import exchanging, layered
from hetsched import Executable, System, links
from hetsched.api import priced
from hetsched.device import Device, Link
from hetsched.errors import PartError
from hetsched.executor import Executor
from hetsched.host import cores
from hetsched.inputs import seeded_inputs
from hetsched.links import copying, links_by_copy, measure_link, runtime
from hetsched.overheads import overheads
from hetsched.plan import Plan, make_plan
from hetsched.plugin import load
from hetsched.store import Store
from hetsched.target import Code, Target
from hetsched.verify import verify

SIZE, LAYERS = 192, 3

pytestmark = pytest.mark.skipif(len(cores()) < 2, reason="this machine has one core")


@pytest.fixture(scope="module")
def devices() -> tuple[Device, Device]:
    """A core, and OpenCL on another."""
    target = load(Target, "opencl")
    if reason := target.unavailable():
        pytest.skip(reason)
    first = load(Target, "cpu").device(f"cpu:{cores()[0]}")
    second = target.beside("opencl:cpu", first.cores)
    assert not set(first.cores) & set(second.cores)
    return first, second


def on(
    devices: tuple[Device, Device], graph: hetsched.Graph, second: Callable[[str], bool]
) -> Plan:
    """The groups by whose names `second` asks for it on the second device."""
    links = tuple(Link(a.name, b.name, 1e-6, 1e10) for a in devices for b in devices if a != b)
    system = System("test", devices, links)
    order = [group.name for group in graph.groups]
    placement = {name: devices[second(name)].name for name in order}
    return make_plan(graph, system, priced(graph, system, "roofline"), placement, order, "test")


def right(name: str) -> bool:
    return name.startswith("right")


@pytest.fixture(scope="module")
def exchange(devices: tuple[Device, Device]) -> Iterator[tuple[Executable, Mapping]]:
    graph = hetsched.read_onnx(exchanging(LAYERS, SIZE))
    with hetsched.compile(on(devices, graph, right)) as executable:
        yield executable, seeded_inputs(graph)


def test_parts_hand_over_without_python_and_without_a_copy(
    exchange: tuple[Executable, Mapping], devices: tuple[Device, Device]
) -> None:
    executable, inputs = exchange
    verify(executable, inputs).check()
    assert executable.start()._crew is not None
    for _ in range(3):
        executable.run(inputs)
        moves = executable.schedule.transfers
        assert len(moves) >= 2 * (LAYERS - 1)
        assert not any(move.copied for move in moves)
        assert {slot.device for slot in executable.schedule.slots} == {d.name for d in devices}


def test_requests_in_flight_do_not_mix(exchange: tuple[Executable, Mapping]) -> None:
    executable, inputs = exchange
    many = [{"x": inputs["x"] * scale} for scale in (1.0, 0.5, -1.0, 0.0, 2.0, 3.0)]
    expected = [executable.run(each)["y"] for each in many]
    for found, wanted in zip(executable.map(many, in_flight=4), expected, strict=True):
        np.testing.assert_array_equal(found["y"], wanted)


def test_by_python_it_is_the_same(
    exchange: tuple[Executable, Mapping], monkeypatch: pytest.MonkeyPatch
) -> None:
    executable, inputs = exchange
    expected = executable.run(inputs)["y"]
    monkeypatch.setattr(Executor, "_joined", lambda self: None)
    with Executable(executable.plan, executable.parts) as other:
        np.testing.assert_array_equal(other.run(inputs)["y"], expected)
        assert not any(move.copied for move in other.schedule.transfers)


def test_between_memories_it_is_copied_and_the_same(
    exchange: tuple[Executable, Mapping], devices: tuple[Device, Device]
) -> None:
    executable, inputs = exchange
    first, second = devices
    apart = replace(second, memory_space="its own")
    graph = hetsched.read_onnx(exchanging(LAYERS, SIZE))
    with hetsched.compile(on((first, apart), graph, right)) as other:
        found = other.run(inputs)["y"]
        moves = other.schedule.transfers
    np.testing.assert_allclose(found, executable.run(inputs)["y"], rtol=1e-5, atol=1e-6)
    assert moves
    assert all(move.copied for move in moves)
    link = measure_link(first, apart)
    assert 0 <= link.seconds < 1
    assert link.bytes_per_second > 0


def test_copies_and_launches_of_several_requests_take_turns(devices: tuple[Device, Device]) -> None:
    """PoCL waits for itself where two threads enqueue to a device that computes on the caller."""
    first, second = devices
    apart = replace(second, memory_space="its own")
    graph = hetsched.read_onnx(exchanging(LAYERS, SIZE))
    inputs = seeded_inputs(graph)
    with hetsched.compile(on((first, apart), graph, right)) as executable:
        expected = executable.run(inputs)["y"]
        found: list[Mapping[str, np.ndarray]] = []
        requests = [inputs] * 400
        work = Thread(
            target=lambda: found.extend(executable.map(requests, in_flight=4)), daemon=True
        )
        work.start()
        work.join(60)
        assert not work.is_alive(), "it waits for ever"
    assert len(found) == 400
    for one in found:
        np.testing.assert_array_equal(one["y"], expected)


@pytest.mark.parametrize("by_python", [(False, False), (False, True), (True, True)])
def test_plans_on_one_device_run_in_several_threads(
    devices: tuple[Device, Device], by_python: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They take turns there, with Python between their parts or without."""
    graph = hetsched.read_onnx(exchanging(LAYERS, SIZE))
    inputs = seeded_inputs(graph)

    def work(executable: Executable) -> None:
        for _ in range(300):
            found[executable] = executable.run(inputs)["y"]

    plan = on(devices, graph, right)
    with hetsched.compile(plan) as first, hetsched.compile(plan) as second:
        for executable, python in zip((first, second), by_python, strict=True):
            with monkeypatch.context() as patch:
                if python:
                    patch.setattr(Executor, "_joined", lambda self: None)
                assert (executable.start()._crew is None) == python
        expected = first.run(inputs)["y"]
        found: dict[Executable, np.ndarray] = {}
        threads = [Thread(target=work, args=(each,), daemon=True) for each in (first, second)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive(), "it waits for ever"
    for one in (first, second):
        np.testing.assert_array_equal(found[one], expected)


def test_links_by_copy_are_told_beside(
    devices: tuple[Device, Device], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "profile.sqlite")
    found = links_by_copy(devices, store)
    names = [device.name for device in devices]
    assert [(link.source, link.sink) for link in found] == [tuple(names), tuple(names[::-1])]
    assert all(link.bytes_per_second > 0 for link in found)
    # They are no links of plans, and measured once.
    assert store.link(*devices, runtime()) is None
    monkeypatch.setattr(links, "measure_link", None)
    assert links_by_copy(devices, store) == found
    assert links_by_copy(devices[:1], store) == []


def test_the_devices_work_at_the_same_time(devices: tuple[Device, Device]) -> None:
    graph = hetsched.read_onnx(layered(["left", "right"], 8, 512))
    inputs = seeded_inputs(graph)
    shares = []
    with hetsched.compile(on(devices, graph, right)) as executable:
        verify(executable, inputs).check()
        for _ in range(RUNS):
            executable.run(inputs)
            slots = executable.schedule.slots
            one = max((s for s in slots if s.device == devices[0].name), key=lambda s: s.seconds)
            other = max((s for s in slots if s.device == devices[1].name), key=lambda s: s.seconds)
            shares.append(shared(one, other))
    assert max(shares) > 0, shares


def test_a_package_hands_over_without_python(
    exchange: tuple[Executable, Mapping], tmp_path: Path
) -> None:
    executable, inputs = exchange
    executable.save(tmp_path / "m.hsp")
    with hetsched.load(tmp_path / "m.hsp") as other:
        np.testing.assert_array_equal(other.run(inputs)["y"], executable.run(inputs)["y"])
        assert other.start()._crew is not None


def test_what_opencl_answers_is_the_error_of_the_part(
    exchange: tuple[Executable, Mapping], monkeypatch: pytest.MonkeyPatch
) -> None:
    from hetsched.opencl import crew as opencl_crew

    made = opencl_crew.code

    def refused(*given: Any) -> Code | None:
        code = made(*given)
        assert code is not None
        # A launch on so many axes is none.
        _, launches, *_ = code.enter.args  # type: ignore[attr-defined]
        launches["axes"] = 7
        return code

    monkeypatch.setattr(opencl_crew, "code", refused)
    executable, inputs = exchange
    with Executable(executable.plan, executable.parts) as other:
        other.start()
        for _ in range(2):
            with pytest.raises(PartError, match=r"on 'opencl:cpu@\d'.* failed.*WORK_DIM") as caught:
                other.run(inputs)
            assert isinstance(caught.value.__cause__, PartError)


def test_the_copy_to_measure_by_runs_anywhere(devices: tuple[Device, Device]) -> None:
    for device in (*devices, replace(devices[1], memory_space="its own")):
        kernel = copying(device, 1000)
        given = np.arange(1000)
        (made,) = kernel.run([kernel.receive(given)])
        np.testing.assert_array_equal(kernel.send(made), given + 1)
        kernel.close()


def test_what_a_part_costs_is_told_of_each_device(
    devices: tuple[Device, Device], tmp_path: Path
) -> None:
    found = overheads(devices, Store(tmp_path / "profile.sqlite"))
    assert list(found.launch) == [device.name for device in devices]
