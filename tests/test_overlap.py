"""Two devices work at the same time, by the stamps that the run recorded."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from math import inf
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pytest

import hetsched
from bench.overlap import handovers, layered
from hetsched import Executable, Slot, System
from hetsched.api import priced
from hetsched.compiler import CompiledPart
from hetsched.executor import Executor
from hetsched.host import cores, pinned
from hetsched.inputs import seeded_inputs
from hetsched.links import measure_link
from hetsched.plan import make_plan
from hetsched.plugin import load
from hetsched.request import Request
from hetsched.schedule import Schedule
from hetsched.store import Store
from hetsched.target import Kernel, Target
from hetsched.verify import verify

SIZE, LAYERS = 512, 8
# What else the machine does can keep two threads apart once, but not each time.
RUNS = 8
LEAST_SHARE = 0.5

pytestmark = pytest.mark.skipif(len(cores()) < 2, reason="this machine has one core")


def cut(
    branches: list[str], device_of: Callable[[str], str], folder: Path
) -> tuple[Executable, Mapping]:
    """A layered model with each group where `device_of` says, compiled and checked."""
    graph = hetsched.read_onnx(layered(branches, LAYERS, SIZE))
    system = System.local("cpu:0,cpu:1", Store(folder / "profile.sqlite"))
    order = [group.name for group in graph.groups]
    placement = {name: device_of(name) for name in order}
    prices = priced(graph, system, "roofline")
    plan = make_plan(graph, system, prices, placement, order, "test")
    executable = hetsched.compile(plan)
    inputs = seeded_inputs(graph)
    verify(executable, inputs).check()
    return executable, inputs


class Serial:
    """The parts of an executable one after the other, each alone on its device. A context."""

    def __init__(self, executable: Executable) -> None:
        self._parts = executable.parts
        self._outputs = [tensor.name for tensor in executable.outputs]
        devices = {item.part.device.name: item.part.device for item in self._parts}
        self._workers = {name: ThreadPoolExecutor(1) for name in devices}
        self._kernels = [self._on(item, partial(_kernel, item)) for item in self._parts]

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, float]:
        """The seconds of each part, by name."""
        values = dict(inputs)
        seconds = {}
        for item, kernel in zip(self._parts, self._kernels, strict=True):
            given = [values[tensor.name] for tensor in item.graph.inputs]
            took, found = self._on(item, partial(_one, kernel, given))
            seconds[item.part.name] = took
            values.update(zip([t.name for t in item.graph.outputs], found, strict=True))
        return seconds

    def __enter__(self) -> "Serial":
        return self

    def __exit__(self, *_: object) -> None:
        for item, kernel in zip(self._parts, self._kernels, strict=True):
            self._on(item, kernel.close)
        for worker in self._workers.values():
            worker.shutdown()

    def _on(self, item: CompiledPart, work: Callable[[], Any]) -> Any:
        device = item.part.device

        def held() -> Any:
            with pinned(device.cores):
                return work()

        return self._workers[device.name].submit(held).result()


def ideal_makespan(parts: Sequence[CompiledPart], seconds: Mapping[str, float]) -> float:
    """When the parts are done if nothing but their own work takes time, each on its device."""
    free: dict[str, float] = {}
    ready: dict[str, float] = {}
    for item in parts:
        device = item.part.device.name
        arrivals = [ready.get(tensor.name, 0.0) for tensor in item.graph.inputs]
        finish = max([free.get(device, 0.0), *arrivals]) + seconds[item.part.name]
        free[device] = finish
        ready.update((tensor.name, finish) for tensor in item.graph.outputs)
    return max(free.values())


def _kernel(item: CompiledPart) -> Kernel:
    target = load(Target, item.part.device.target)
    return target.load(item.artifact, item.graph, item.part.device)


def _one(kernel: Kernel, arrays: Sequence[np.ndarray]) -> tuple[float, list[np.ndarray]]:
    values = [kernel.receive(array) for array in arrays]
    start = perf_counter()
    results = kernel.run(values)
    seconds = perf_counter() - start
    return seconds, [kernel.send(result) for result in results]


@pytest.fixture(scope="module")
def forked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Executable, Mapping]]:
    """`part0` is the left branch on cpu:0, `part1` the right on cpu:1, `part2` joins on cpu:0."""
    executable, inputs = cut(
        ["left", "right"],
        lambda name: "cpu:1" if name.startswith("right") else "cpu:0",
        tmp_path_factory.mktemp("forked"),
    )
    with executable:
        yield executable, inputs


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Executable, Mapping]]:
    """A chain, its first half, `part0`, on cpu:0 and the rest, `part1`, on cpu:1."""
    first = [f"chain{layer}" for layer in range(LAYERS // 2)]
    executable, inputs = cut(
        ["chain"],
        lambda name: "cpu:0" if name in first else "cpu:1",
        tmp_path_factory.mktemp("pipeline"),
    )
    with executable:
        yield executable, inputs


def shared(one: Slot, other: Slot) -> float:
    """The time that two slots share, as a share of the shorter one."""
    together = min(one.finish, other.finish) - max(one.start, other.start)
    return together / min(one.seconds, other.seconds)


def since_epoch(request: Request) -> dict[str, Slot]:
    """The slots of a request by part, on the time axis that all requests have in common."""
    slots = request.schedule().slots
    begin = request.started
    return {s.task: Slot(s.task, s.device, begin + s.start, begin + s.finish) for s in slots}


def test_independent_branches_run_at_the_same_time(forked: tuple[Executable, Mapping]) -> None:
    executable, inputs = forked
    shares = []
    for _ in range(RUNS):
        executable.run(inputs)
        schedule = executable.schedule
        left, right, join = (schedule.slot(f"part{index}") for index in range(3))
        assert [left.device, right.device, join.device] == ["cpu:0", "cpu:1", "cpu:0"]
        assert join.start >= max(left.finish, right.finish)
        assert {move.sink for move in schedule.transfers} == {"cpu:0"}
        shares.append(shared(left, right))
    assert max(shares) > LEAST_SHARE, shares


def test_no_python_stands_between_the_parts(forked: tuple[Executable, Mapping]) -> None:
    executable, inputs = forked
    executor = executable.start()
    assert executor._crew is not None
    expected = executable.run(inputs)
    by_python = Executable(executable.plan, executable.parts)
    with by_python, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Executor, "_joined", lambda self: None)
        found = by_python.run(inputs)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)


def test_a_link_is_measured_as_plans_hand_over(monkeypatch: pytest.MonkeyPatch) -> None:
    target = load(Target, "cpu")
    first, second = (target.device(f"cpu:{core}") for core in cores()[:2])
    before = set(threading.enumerate())
    for _ in range(2):
        link = measure_link(first, second)
        assert (link.source, link.sink) == (first.name, second.name)
        # A fit to stamps on a machine that others use as well may find no latency.
        assert 0 <= link.seconds < 1
        assert 0 < link.bytes_per_second < inf
        # By Python, as for parts that are no code.
        monkeypatch.setattr(type(target), "crew", lambda self, device: None)
    assert measure_link(first, first).seconds == 0
    assert set(threading.enumerate()) <= before


def test_handovers_are_told_from_stamps(forked: tuple[Executable, Mapping]) -> None:
    executable, _ = forked
    slots = (
        Slot("part0", "cpu:0", 0.0, 3.0),
        Slot("part1", "cpu:1", 0.0, 5.0),
        Slot("part2", "cpu:0", 5.5, 6.0),
    )
    assert handovers(executable.parts, Schedule(slots)) == [0.5]
    # The unit itself was the last to be free: nothing was handed over.
    own = (Slot("part0", "cpu:0", 0.0, 5.25), *slots[1:])
    assert handovers(executable.parts, Schedule(own)) == []


def test_requests_in_flight_share_a_pipeline(pipeline: tuple[Executable, Mapping]) -> None:
    executable, inputs = pipeline
    shares = []
    for _ in range(RUNS):
        first, second = [since_epoch(r) for r in [executable.submit(inputs) for _ in range(2)]]
        assert first["part1"].start >= first["part0"].finish
        assert second["part0"].start >= first["part0"].finish
        assert second["part1"].start >= max(first["part1"].finish, second["part0"].finish)
        shares.append(shared(first["part1"], second["part0"]))
    assert max(shares) > LEAST_SHARE, shares


def test_parts_in_turn_and_their_ideal(forked: tuple[Executable, Mapping]) -> None:
    executable, inputs = forked
    with Serial(executable) as serial:
        seconds = serial.run(inputs)
    assert list(seconds) == ["part0", "part1", "part2"]
    assert all(value > 0 for value in seconds.values())
    # The branches run side by side, the join waits for the longer.
    known = {"part0": 3.0, "part1": 5.0, "part2": 1.0}
    assert ideal_makespan(executable.parts, known) == 6.0
