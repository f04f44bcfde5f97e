"""The executor, with kernels that wait for events instead of computing."""

import gc
import os
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from queue import SimpleQueue
from threading import Event
from typing import Any

import numpy as np
import pytest

from hetsched.device import Device
from hetsched.errors import HetschedError, PartError
from hetsched.executor import Executor
from hetsched.request import Step, View
from hetsched.target import Begun, Kernel

# Long for a thread that is only waiting for its turn on a busy machine.
PATIENCE = 20.0
HOST_A = Device("a", "none")
HOST_B = Device("b", "none")
FAR = Device("far", "none", memory_space="far")
X = np.arange(4.0, dtype=np.float32)


class Fake(Kernel):
    """Calls `work` with its inputs, and counts what is handed in and out."""

    def __init__(self, work: Callable[..., Any], far: bool = False) -> None:
        self.work = work
        self.far = far
        self.received: list[Any] = []
        self.sent: list[Any] = []
        self.threads: set[str] = set()
        self.closed = 0

    def run(self, inputs: Sequence[Any]) -> Sequence[Any]:
        assert not self.closed
        self.threads.add(threading.current_thread().name)
        results = self.work(*inputs)
        return results if isinstance(results, tuple) else (results,)

    def receive(self, array: np.ndarray) -> Any:
        self.received.append(array)
        return Buffer(array) if self.far else super().receive(array)

    def send(self, buffer: Any) -> np.ndarray:
        self.sent.append(buffer)
        return buffer.array if self.far else super().send(buffer)

    def close(self) -> None:
        self.closed += 1


class Forgetful(Fake):
    """Keeps nothing of what it has seen."""

    def send(self, buffer: Any) -> np.ndarray:
        return np.asarray(buffer)

    def receive(self, array: np.ndarray) -> Any:
        return array


class Buffer:
    """Memory of a device that the host cannot read."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array.copy()


class Queue:
    """A device with a memory of its own, which does what is enqueued in order, on its thread."""

    def __init__(self) -> None:
        self._commands: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work)
        self._thread.start()

    def put(self, command: Callable[[], None]) -> None:
        self._commands.put(command)

    def close(self) -> None:
        self._commands.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (command := self._commands.get()) is not None:
            command()


class Enqueued(Begun):
    """What a queue computes into a buffer that is empty before."""

    def __init__(self, queue: Queue, work: Callable[..., Any], inputs: Sequence[Any]) -> None:
        made = Buffer(np.full(4, np.nan, np.float32))
        self.outputs = (made,)
        self._times = [0.0, 0.0]
        self._error: Exception | None = None
        self._done = Event()

        def command() -> None:
            self._times[0] = time.perf_counter()
            try:
                made.array[:] = work(*(buffer.array for buffer in inputs))
            except OSError as error:
                self._error = error
            self._times[1] = time.perf_counter()
            self._done.set()

        queue.put(command)

    def finish(self) -> tuple[float, float]:
        wait(self._done)
        if self._error is not None:
            raise self._error
        start, finish = self._times
        return start, finish


class Asynchronous(Fake):
    """A kernel that is enqueued."""

    asynchronous = True

    def __init__(self, queue: Queue, work: Callable[..., Any]) -> None:
        super().__init__(work, far=True)
        self.queue = queue

    def begin(self, inputs: Sequence[Any]) -> Begun:
        self.threads.add(threading.current_thread().name)
        return Enqueued(self.queue, self.work, inputs)

    def run(self, inputs: Sequence[Any]) -> Sequence[Any]:
        raise AssertionError("it is asynchronous")


@pytest.fixture
def queue(nothing_left: None):
    made = Queue()
    yield made
    made.close()


def step(
    name: str,
    device: Device,
    inputs: str,
    outputs: str,
    kernel: Kernel | Callable[..., Any],
) -> Step:
    made = kernel if isinstance(kernel, Kernel) else Fake(kernel)
    return Step(name, device, tuple(inputs.split()), tuple(outputs.split()), lambda: made)


def wait(event: Event) -> None:
    assert event.wait(PATIENCE), "the other side never came"


@pytest.fixture
def run_with(nothing_left: None):
    """Makes executors and closes them."""
    opened: list[Executor] = []

    def make(steps: Sequence[Step], outputs: str, **constants: np.ndarray) -> Executor:
        opened.append(Executor(steps, outputs.split(), constants))
        return opened[-1]

    yield make
    for executor in opened:
        executor.close()


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Every test ends with the threads and open files that it began with, and leaves no file."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    gc.collect()
    threads, files = set(threading.enumerate()), open_files()
    yield
    assert set(threading.enumerate()) <= threads
    assert open_files() <= files
    assert list(tmp_path.iterdir()) == []


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_slots_follow_the_plan(run_with) -> None:
    log: list[str] = []

    def logged(name: str, *results: str) -> Callable[..., Any]:
        def work(*inputs: np.ndarray) -> Any:
            log.append(name)
            return sum(inputs) + 1

        return work

    # second and third do not depend on each other; on a they keep the plan's order.
    executor = run_with(
        [
            step("first", HOST_A, "x", "p", logged("first")),
            step("other", HOST_B, "p", "q", logged("other")),
            step("second", HOST_A, "q", "r", logged("second")),
            step("third", HOST_A, "p", "s", logged("third")),
        ],
        "r s",
    )
    request = executor.submit({"x": X})
    outputs = request.result(PATIENCE)
    assert list(outputs) == ["r", "s"]
    np.testing.assert_array_equal(outputs["r"], X + 3)
    np.testing.assert_array_equal(outputs["s"], X + 2)
    assert log == ["first", "other", "second", "third"]
    schedule = request.schedule()
    assert schedule.clock == "measured"
    assert [slot.task for slot in schedule.slots] == log
    assert [slot.device for slot in schedule.slots] == ["a", "b", "a", "a"]
    for before, behind in zip(schedule.slots, schedule.slots[1:], strict=False):
        assert 0 <= before.start <= before.finish <= behind.start


def test_a_modelled_device_shows_in_the_clock(run_with) -> None:
    modelled = Device("fpga", "none", modelled=True)
    request = run_with([step("p", modelled, "x", "y", lambda x: x)], "y").submit({"x": X})
    assert request.schedule().clock == "measured, modelled"


def test_units_work_at_the_same_time(run_with) -> None:
    left, right = Event(), Event()

    def meet(mine: Event, other: Event) -> Callable[[np.ndarray], np.ndarray]:
        def work(x: np.ndarray) -> np.ndarray:
            mine.set()
            wait(other)
            return x

        return work

    executor = run_with(
        [
            step("left", HOST_A, "x", "p", meet(left, right)),
            step("right", HOST_B, "x", "q", meet(right, left)),
        ],
        "p q",
    )
    request = executor.submit({"x": X})
    request.result(PATIENCE)
    assert request.schedule().overlap_seconds() > 0


def test_devices_of_one_unit_take_turns(run_with) -> None:
    core = min(os.sched_getaffinity(0))
    pair = [Device(name, "none", cores=(core,)) for name in "pq"]
    kernels = [Fake(lambda x: (time.sleep(0.01), x)[1]) for _ in pair]
    executor = run_with(
        [
            step(f"on {device.name}", device, "x", f"y{device.name}", kernel)
            for device, kernel in zip(pair, kernels, strict=True)
        ],
        "yp yq",
    )
    requests = [executor.submit({"x": X}) for _ in range(3)]
    for request in requests:
        request.result(PATIENCE)
        assert request.schedule().overlap_seconds() == 0
    assert kernels[0].threads == kernels[1].threads
    assert len(kernels[0].threads) == 1


def test_a_transfer_goes_on_while_both_devices_compute(run_with) -> None:
    moving, computing = Event(), Event()

    class Slow(Fake):
        def receive(self, array: np.ndarray) -> Any:
            moving.set()
            wait(computing)
            return super().receive(array)

    def meanwhile(x: np.ndarray) -> np.ndarray:
        wait(moving)
        computing.set()
        return x * 2

    far = Slow(lambda buffer: Buffer(buffer.array + 1), far=True)
    near = Fake(lambda x: x * 3)
    executor = run_with(
        [
            step("make", HOST_A, "x", "p", near),
            step("go on", HOST_A, "x", "q", meanwhile),
            step("far", FAR, "p", "r", far),
        ],
        "q r",
    )
    request = executor.submit({"x": X})
    outputs = request.result(PATIENCE)
    np.testing.assert_array_equal(outputs["q"], X * 2)
    np.testing.assert_array_equal(outputs["r"], X * 3 + 1)
    there, back = request.schedule().transfers
    assert there.copied
    assert back.copied
    assert (there.tensor, there.nbytes, there.source, there.sink) == ("p", X.nbytes, "a", "far")
    assert (back.tensor, back.nbytes, back.source, back.sink) == ("r", X.nbytes, "far", None)
    slots = {slot.task: slot for slot in request.schedule().slots}
    assert slots["make"].finish <= there.start <= there.finish <= slots["far"].start
    assert slots["far"].finish <= back.start <= back.finish
    # The step and the transfer overlapped.
    assert there.start < slots["go on"].finish
    assert slots["go on"].start < there.finish


def test_what_waits_for_its_own_device_alone_begins_before_that_has_ended(
    queue: Queue, run_with
) -> None:
    begun = Event()

    class Second(Asynchronous):
        def begin(self, inputs: Sequence[Any]) -> Begun:
            begun.set()
            return super().begin(inputs)

    def first(x: np.ndarray) -> np.ndarray:
        wait(begun)
        return x + 1

    executor = run_with(
        [
            step("first", FAR, "x", "p", Asynchronous(queue, first)),
            step("second", FAR, "p", "q", Second(queue, lambda p: p * 2)),
            step("third", HOST_A, "p q", "y", lambda p, q: p + q),
            step("fourth", FAR, "y", "z", Asynchronous(queue, lambda y: -y)),
        ],
        "q z",
    )
    requests = []
    for _ in range(3):
        begun.clear()
        requests.append(executor.submit({"x": X}))
        outputs = requests[-1].result(PATIENCE)
        np.testing.assert_array_equal(outputs["q"], (X + 1) * 2)
        np.testing.assert_array_equal(outputs["z"], -(X + 1) * 3)
    for request in requests:
        slots = [request.schedule().slot(name) for name in ("first", "second", "third", "fourth")]
        for before, behind in pairwise(slots):
            assert 0 <= before.start <= before.finish <= behind.start
        moves = [(move.tensor, move.sink) for move in request.schedule().transfers]
        assert sorted(moves, key=str) == sorted(
            [("x", "far"), ("p", "a"), ("q", "a"), ("q", None), ("y", "far"), ("z", None)], key=str
        )


def test_a_call_that_fails_after_it_has_begun_is_named_and_others_go_on(
    queue: Queue, run_with
) -> None:
    def first(x: np.ndarray) -> np.ndarray:
        if x[0] == 1:
            raise OSError("out of resources")
        return x

    executor = run_with(
        [
            step("first", FAR, "x", "p", Asynchronous(queue, first)),
            step("second", FAR, "p", "q", Asynchronous(queue, lambda p: p + 1)),
            step("third", HOST_A, "q", "y", lambda q: q),
        ],
        "y",
    )
    requests = [executor.submit({"x": np.full(4, i, np.float32)}) for i in range(3)]
    with pytest.raises(PartError, match="first on 'far' failed: out of resources"):
        requests[1].result(PATIENCE)
    for index in (0, 2):
        assert requests[index].result(PATIENCE)["y"][0] == index + 1


def test_devices_of_one_unit_take_turns_if_one_is_asynchronous(queue: Queue, run_with) -> None:
    core = min(os.sched_getaffinity(0))
    far = Device("far", "none", cores=(core,), memory_space="far")
    near = Device("near", "none", cores=(core,))

    def slow(x: np.ndarray) -> np.ndarray:
        time.sleep(0.01)
        return x

    executor = run_with(
        [
            step("far", far, "x", "p", Asynchronous(queue, slow)),
            step("near", near, "x", "q", slow),
        ],
        "p q",
    )
    for _ in range(3):
        request = executor.submit({"x": X})
        request.result(PATIENCE)
        assert request.schedule().overlap_seconds() == 0


def test_pieces_are_joined_when_they_are_there(queue: Queue, nothing_left: None) -> None:
    later = Event()

    def slow(x: np.ndarray) -> np.ndarray:
        later.wait(0.02)
        return x + 1

    views = {"whole": View(("p", "q"), (8,), np.dtype(np.float32))}
    far = [Asynchronous(queue, slow), Asynchronous(queue, slow)]

    class Whole(Asynchronous):
        def begin(self, inputs: Sequence[Any]) -> Begun:
            return Enqueued(self.queue, lambda w: w[::2], inputs)

    steps = [
        step("one", FAR, "x", "p", far[0]),
        step("two", FAR, "x", "q", far[1]),
        step("read", FAR, "whole", "y", Whole(queue, slow)),
    ]
    executor = Executor(steps, ["y"], {}, views)
    try:
        outputs = executor.submit({"x": X}).result(PATIENCE)
        np.testing.assert_array_equal(outputs["y"], np.tile(X + 1, 2)[::2])
    finally:
        executor.close()


def test_a_tensor_is_moved_once_to_each_device_that_reads_it(run_with) -> None:
    other = Device("farther", "none", memory_space="farther")
    near = Fake(lambda x: x + 1)
    far = Fake(lambda b: Buffer(b.array), far=True)
    again = Fake(lambda b: Buffer(b.array * 2), far=True)
    farther = Fake(lambda b: Buffer(b.array * 3), far=True)
    executor = run_with(
        [
            step("make", HOST_A, "x", "p", near),
            step("one", FAR, "p", "q", far),
            step("two", FAR, "p", "r", again),
            step("three", other, "p", "s", farther),
        ],
        "p q r s",
    )
    request = executor.submit({"x": X})
    outputs = request.result(PATIENCE)
    np.testing.assert_array_equal(outputs["s"], (X + 1) * 3)
    moves = [(move.tensor, move.source, move.sink) for move in request.schedule().transfers]
    assert sorted(moves, key=str) == sorted(
        [
            ("p", "a", "far"),
            ("p", "a", "farther"),
            ("q", "far", None),
            ("r", "far", None),
            ("s", "farther", None),
        ],
        key=str,
    )
    # Both kernels of a device share what came; either may have taken it in.
    assert len(far.received + again.received) == 1
    assert len(farther.received) == 1
    assert len(far.sent + again.sent) == 2
    # Once to each of two devices, and once as a result.
    assert len(near.sent) == 3


def test_memory_that_is_shared_is_handed_over_as_it_is(run_with) -> None:
    seen: list[np.ndarray] = []

    def keep(x: np.ndarray) -> np.ndarray:
        seen.append(x)
        return x

    made = X + 1
    executor = run_with(
        [
            step("make", HOST_A, "x", "p", lambda x: (seen.append(x), made)[1]),
            step("read", HOST_B, "p", "q", keep),
        ],
        "q",
    )
    request = executor.submit({"x": X})
    assert request.result(PATIENCE)["q"] is made
    assert seen[0] is X
    assert seen[1] is made
    # The hand-over is timed all the same.
    (move,) = request.schedule().transfers
    assert (move.tensor, move.nbytes, move.source, move.sink) == ("p", X.nbytes, "a", "b")
    assert not move.copied


def test_what_a_device_copies_in_the_memory_that_it_shares_is_told(run_with) -> None:
    class Copying(Fake):
        def receive(self, array: np.ndarray) -> Any:
            return array.copy()

    executor = run_with(
        [
            step("make", HOST_A, "x", "p", lambda x: x + 1),
            step("read", HOST_B, "p", "q", Copying(lambda p: p)),
        ],
        "q",
    )
    request = executor.submit({"x": X})
    request.result(PATIENCE)
    assert [move.copied for move in request.schedule().transfers] == [True]


def test_requests_overlap_and_do_not_mix(run_with) -> None:
    first_again, last_once = Event(), Event()
    starts: list[float] = []

    def first(x: np.ndarray) -> np.ndarray:
        starts.append(float(x[0]))
        if len(starts) == 2:
            first_again.set()
            wait(last_once)
        return x + 1

    def last(x: np.ndarray) -> np.ndarray:
        last_once.set()
        wait(first_again)
        return x * 10

    executor = run_with(
        [step("first", HOST_A, "x", "p", first), step("last", HOST_B, "p", "y", last)], "y"
    )
    inputs = [np.full(4, value, np.float32) for value in range(12)]
    requests = [executor.submit({"x": x}) for x in inputs]
    for x, request in zip(inputs, requests, strict=True):
        np.testing.assert_array_equal(request.result(PATIENCE)["y"], (x + 1) * 10)
        assert [slot.task for slot in request.schedule().slots] == ["first", "last"]
    assert starts == [float(x[0]) for x in inputs]
    # The second request was in its first part while the first was in its last.
    one, two = requests[0].schedule().slots[1], requests[1].schedule().slots[0]
    offset = requests[1].started - requests[0].started
    assert one.start < two.finish + offset
    assert two.start + offset < one.finish


def fails_at(number: float) -> Callable[[np.ndarray], np.ndarray]:
    def work(x: np.ndarray) -> np.ndarray:
        if x[0] == number:
            raise ValueError(f"no {number}\nand a second line")
        return x

    return work


def test_a_part_that_fails_is_named_and_other_requests_go_on(run_with) -> None:
    executor = run_with(
        [
            step("part0", HOST_A, "x", "p", lambda x: x),
            step("part1", HOST_B, "p", "q", fails_at(1.0)),
            step("part2", HOST_A, "q", "y", lambda x: x + 1),
        ],
        "y p",
    )
    requests = [executor.submit({"x": np.full(4, i, np.float32)}) for i in range(4)]
    for index, request in enumerate(requests):
        if index == 1:
            with pytest.raises(PartError) as caught:
                request.result(PATIENCE)
            assert str(caught.value) == "part1 on 'b' failed: no 1.0 and a second line"
            assert isinstance(caught.value.__cause__, ValueError)
            assert [slot.task for slot in request.schedule().slots] == ["part0"]
        else:
            assert request.result(PATIENCE)["y"][0] == index + 1


def test_a_part_with_too_few_results_is_named(run_with) -> None:
    executor = run_with([step("part0", HOST_A, "x", "p q", lambda x: x)], "p q")
    with pytest.raises(PartError, match="part0 on 'a'"):
        executor.submit({"x": X}).result(PATIENCE)


@pytest.mark.parametrize("way", ["receive", "send"])
def test_a_transfer_that_fails_is_named_and_other_requests_go_on(run_with, way: str) -> None:
    class Broken(Fake):
        def receive(self, array: np.ndarray) -> Any:
            if way == "receive" and array[0] == 1:
                raise OSError("the bus is gone")
            return super().receive(array)

        def send(self, buffer: Any) -> np.ndarray:
            if way == "send" and buffer.array[0] == 1:
                raise OSError("the bus is gone")
            return super().send(buffer)

    executor = run_with(
        [
            step("part0", HOST_A, "x", "p", lambda x: x),
            step("part1", FAR, "p", "y", Broken(lambda b: Buffer(b.array), far=True)),
        ],
        "y",
    )
    requests = [executor.submit({"x": np.full(4, i, np.float32)}) for i in range(3)]
    where = "'p' to 'far'" if way == "receive" else "'y' to 'host'"
    with pytest.raises(PartError, match=f"transfer of {where} failed: the bus is gone"):
        requests[1].result(PATIENCE)
    for index in (0, 2):
        assert requests[index].result(PATIENCE)["y"][0] == index


def test_an_input_that_its_device_refuses_is_named(run_with) -> None:
    class Picky(Fake):
        def receive(self, array: np.ndarray) -> Any:
            raise OSError("not aligned")

    executor = run_with([step("part0", HOST_A, "x", "y", Picky(lambda x: x))], "y")
    with pytest.raises(PartError, match="'x' to 'a' failed: not aligned"):
        executor.submit({"x": X}).result(PATIENCE)


def test_a_part_that_does_not_load_is_named_and_the_others_are_closed() -> None:
    good = Fake(lambda x: x)

    def load() -> Kernel:
        raise MemoryError("too large")

    steps = [
        step("part0", HOST_A, "x", "p", good),
        Step("part1", HOST_B, ("p",), ("y",), load),
    ]
    with pytest.raises(PartError, match="part1 on 'b' does not load: too large"):
        Executor(steps, ["y"], {})
    assert good.closed == 1


def test_what_a_loader_refuses_keeps_its_kind() -> None:
    def load() -> Kernel:
        raise HetschedError("part 'part0' is damaged")

    with pytest.raises(HetschedError, match=r"^part 'part0' is damaged$"):
        Executor([Step("part0", HOST_A, ("x",), ("y",), load)], ["y"], {})


def test_a_core_that_is_not_there_is_named() -> None:
    absent = Device("a", "none", cores=(4095,))
    with pytest.raises(HetschedError, match="'a'"):
        Executor([step("part0", absent, "x", "y", lambda x: x)], ["y"], {})


def test_close_waits_for_requests_and_refuses_new_ones() -> None:
    entered, let_go = Event(), Event()

    def work(x: np.ndarray) -> np.ndarray:
        entered.set()
        wait(let_go)
        return x

    class Slow(Fake):
        def receive(self, array: np.ndarray) -> Any:
            time.sleep(0.05)
            return super().receive(array)

    kernels = [Fake(work), Slow(lambda b: Buffer(b.array), far=True)]
    executor = Executor(
        [step("part0", HOST_A, "x", "p", kernels[0]), step("part1", FAR, "p", "y", kernels[1])],
        ["y"],
        {},
    )
    request = executor.submit({"x": X})
    wait(entered)
    closing = threading.Thread(target=executor.close)
    closing.start()
    closing.join(0.05)
    assert closing.is_alive()
    with pytest.raises(HetschedError, match="closed"):
        executor.submit({"x": X})
    let_go.set()
    closing.join(PATIENCE)
    assert not closing.is_alive()
    np.testing.assert_array_equal(request.result(0)["y"], X)
    assert [kernel.closed for kernel in kernels] == [1, 1]
    executor.close()
    assert [kernel.closed for kernel in kernels] == [1, 1]


def test_close_after_a_failure_leaves_no_thread_of_what_still_runs() -> None:
    """One part fails while another computes, whose result would open a way not used before."""
    entered, let_go = Event(), Event()

    def slow(x: np.ndarray) -> np.ndarray:
        entered.set()
        wait(let_go)
        return x

    def broken(x: np.ndarray) -> np.ndarray:
        wait(entered)
        raise ValueError("broken")

    executor = Executor(
        [
            step("slow", HOST_A, "x", "p", slow),
            step("broken", HOST_B, "x", "q", broken),
            step("far", FAR, "p", "y", Fake(lambda b: Buffer(b.array), far=True)),
        ],
        ["q", "y"],
        {},
    )
    request = executor.submit({"x": X})
    with pytest.raises(PartError, match="broken"):
        request.result(PATIENCE)
    closing = threading.Thread(target=executor.close)
    closing.start()
    time.sleep(0.05)
    let_go.set()
    closing.join(PATIENCE)
    assert not closing.is_alive()
    assert not [t.name for t in threading.enumerate() if t.name.startswith("hetsched")]


def test_a_value_is_released_when_its_last_reader_has_run(run_with) -> None:
    made: list[weakref.ref] = []
    alive: dict[str, bool] = {}

    def make(x: np.ndarray) -> np.ndarray:
        y = x + 1
        made.append(weakref.ref(y))
        return y

    class Last(Forgetful):
        def receive(self, array: np.ndarray) -> Any:
            # Of x, then of s, when its step has run but may not have returned.
            alive["hand over"] = bool(made) and made[0]() is not None
            return array

    def look(name: str) -> Callable[..., np.ndarray]:
        def work(*inputs: np.ndarray) -> np.ndarray:
            alive[name] = made[0]() is not None
            return inputs[0] * 2

        return work

    executor = run_with(
        [
            step("make", HOST_A, "x", "p", Forgetful(make)),
            step("read", HOST_A, "p", "q", Forgetful(look("read"))),
            step("unrelated", HOST_A, "q", "r", Forgetful(look("unrelated"))),
            step("read again", HOST_B, "p r", "s", Forgetful(look("read again"))),
            step("last", HOST_A, "s", "t", Last(look("last"))),
        ],
        "t",
    )
    executor.submit({"x": X}).result(PATIENCE)
    assert alive == {
        "hand over": False,
        "read": True,
        "unrelated": True,
        "read again": True,
        "last": False,
    }


def test_results_that_no_step_writes(run_with) -> None:
    constant = np.ones(3)
    executor = run_with([step("p", HOST_A, "x", "y", lambda x: x + 1)], "y x c y", c=constant)
    outputs = executor.submit({"x": X}).result(PATIENCE)
    assert list(outputs) == ["y", "x", "c"]
    assert outputs["x"] is X
    assert outputs["c"] is constant


def test_a_worker_is_held_on_its_cores(run_with) -> None:
    core = max(os.sched_getaffinity(0))
    before = os.sched_getaffinity(0)
    seen: list[set[int]] = []
    device = Device("pinned", "none", cores=(core,))

    def work(x: np.ndarray) -> np.ndarray:
        seen.append(os.sched_getaffinity(0))
        return x

    executor = run_with(
        [step("here", device, "x", "p", work), step("free", HOST_A, "p", "y", work)], "y"
    )
    executor.submit({"x": X}).result(PATIENCE)
    assert seen == [{core}, before]
    assert os.sched_getaffinity(0) == before


def test_idle_workers_use_no_time(run_with) -> None:
    executor = run_with(
        [
            step("near", HOST_A, "x", "p", lambda x: x),
            step("far", FAR, "p", "q", Fake(lambda b: Buffer(b.array), far=True)),
            step("back", HOST_B, "q", "y", lambda x: x),
        ],
        "y",
    )
    executor.submit({"x": X}).result(PATIENCE)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.03


class Anywhere(Fake):
    any_thread = True


def test_a_plan_of_one_device_runs_on_the_callers_thread(run_with) -> None:
    core = max(os.sched_getaffinity(0))
    before = os.sched_getaffinity(0)
    seen: list[set[int]] = []
    device = Device("pinned", "none", cores=(core,))

    def work(x: np.ndarray) -> np.ndarray:
        seen.append(os.sched_getaffinity(0))
        return x + 1

    kernels = [Anywhere(work), Anywhere(work)]
    executor = run_with(
        [step("first", device, "x", "p", kernels[0]), step("last", device, "p", "y", kernels[1])],
        "y c x",
        c=X,
    )
    outputs, run = executor.run({"x": X})
    assert list(outputs) == ["y", "c", "x"]
    np.testing.assert_array_equal(outputs["y"], X + 2)
    assert kernels[0].threads == kernels[1].threads == {threading.current_thread().name}
    assert seen == [{core}, {core}]
    assert os.sched_getaffinity(0) == before
    schedule = run.schedule()
    assert [slot.task for slot in schedule.slots] == ["first", "last"]
    assert schedule.slots[0].finish <= schedule.slots[1].start
    assert schedule.clock == "measured"


def test_on_the_callers_thread_a_part_that_fails_is_named(run_with) -> None:
    before = os.sched_getaffinity(0)
    device = Device("pinned", "none", cores=(max(before),))
    executor = run_with([step("part0", device, "x", "y", Anywhere(fails_at(1.0)))], "y")
    with pytest.raises(PartError, match=r"part0 on 'pinned' failed: no 1\.0 and a second line"):
        executor.run({"x": np.ones(4, np.float32)})
    assert os.sched_getaffinity(0) == before
    np.testing.assert_array_equal(executor.run({"x": X})[0]["y"], X)
    executor.close()
    with pytest.raises(HetschedError, match="closed"):
        executor.run({"x": X})


@pytest.mark.parametrize("devices", [(HOST_A, HOST_B), (HOST_A, FAR)])
def test_other_plans_run_on_their_workers(run_with, devices: Sequence[Device]) -> None:
    kernels = [Anywhere(lambda x: x), Fake(lambda x: x)]
    executor = run_with(
        [
            step(device.name, device, source, sink, kernel)
            for device, source, sink, kernel in zip(devices, "xp", "py", kernels, strict=True)
        ],
        "y",
    )
    outputs, run = executor.run({"x": X})
    np.testing.assert_array_equal(outputs["y"], X)
    assert len(run.schedule().slots) == 2
    assert threading.current_thread().name not in kernels[0].threads | kernels[1].threads


def test_callers_and_requests_take_turns(run_with) -> None:
    inside, most = [0], [0]

    def work(x: np.ndarray) -> np.ndarray:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.001)
        inside[0] -= 1
        return x * 2

    executor = run_with([step("part0", HOST_A, "x", "y", Anywhere(work))], "y")
    found: list[np.ndarray] = []

    def call() -> None:
        for _ in range(10):
            found.append(executor.run({"x": X})[0]["y"])

    callers = [threading.Thread(target=call) for _ in range(3)]
    for caller in callers:
        caller.start()
    requests = [executor.submit({"x": X}) for _ in range(10)]
    found += [request.result(PATIENCE)["y"] for request in requests]
    for caller in callers:
        caller.join(PATIENCE)
    assert len(found) == 40
    assert all(np.array_equal(y, X * 2) for y in found)
    assert most == [1]


def test_an_executor_that_is_forgotten_leaves_no_thread(nothing_left: None) -> None:
    executor = Executor([step("part0", HOST_A, "x", "y", lambda x: x)], ["y"], {})
    executor.submit({"x": X}).result(PATIENCE)
    del executor
    gc.collect()


def test_a_result_that_is_late(run_with) -> None:
    let_go = Event()
    executor = run_with([step("part0", HOST_A, "x", "y", lambda x: (wait(let_go), x)[1])], "y")
    request = executor.submit({"x": X})
    with pytest.raises(TimeoutError):
        request.result(0.01)
    let_go.set()
    assert request.result(PATIENCE)["y"] is X
    assert request.result(0)["y"] is X
