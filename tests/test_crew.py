"""Workers without Python between steps; the parts are functions that C calls, made of Python."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from ctypes import CDLL, CFUNCTYPE, POINTER, Structure, c_int, c_int32, c_int64, c_void_p, cast
from math import prod
from pathlib import Path
from shutil import which
from threading import Event
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetsched import crew
from hetsched.device import Device
from hetsched.errors import HetschedError, PartError
from hetsched.executor import Executor
from hetsched.request import Step, View
from hetsched.target import Code, Kernel

PATIENCE = 30.0
SHAPE, DTYPE = (4,), np.dtype(np.float32)
DEVICES = tuple(Device(name, "none") for name in "abc")
X = np.arange(4, dtype=DTYPE)

pytestmark = pytest.mark.skipif(which("cc") is None, reason="there is no C compiler")


class Value(Structure):
    _fields_ = (("kind", c_int32), ("unused", c_int32), ("content", c_int64))


FUNCTION = CFUNCTYPE(c_int, c_void_p, POINTER(Value), c_int32, POINTER(Value))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> CDLL:
    path = tmp_path_factory.mktemp("crew") / "crew.so"
    strict = ["-std=c11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror"]
    subprocess.run(
        ["cc", "-O2", "-fPIC", "-shared", *strict, str(crew.SOURCE), "-o", str(path)], check=True
    )
    return CDLL(str(path))


class Coded(Kernel):
    """`work` on arrays, as a function of a table of addresses; it fails with what `work` returns
    if that is a number. Inputs are of four floats, or of so many as `sizes` say."""

    def __init__(
        self,
        library: CDLL,
        inputs: int,
        outputs: int,
        work: Callable[..., Any],
        sizes: Sequence[int] = (),
    ) -> None:
        self.sizes = [*(sizes or [4] * inputs), *[4] * outputs]
        self.module, self.inputs, self.outputs, self.work = library, inputs, outputs, work
        self.threads: set[int] = set()
        self.found = 0
        self.runs = 0
        self.closed = 0
        self.function = FUNCTION(self.call)

    def call(self, _: Any, arguments: Any, count: int, result: Any) -> int:
        assert count == 1
        assert arguments[0].kind == 4
        self.threads.add(threading.get_ident())
        rows = self.inputs + self.outputs
        table = np.ctypeslib.as_array((c_int64 * rows).from_address(arguments[0].content))
        arrays = [
            np.frombuffer((c_int32 * size).from_address(int(address)), DTYPE)
            for address, size in zip(table, self.sizes, strict=True)
        ]
        found = self.work(*arrays[: self.inputs])
        if isinstance(found, int):
            self.found = found
            result[0] = Value(1, 0, found)
            return 0
        for array, value in zip(arrays[self.inputs :], np.atleast_2d(found), strict=True):
            array[...] = value
        return 0

    def run(self, inputs: Sequence[Any]) -> Sequence[Any]:
        self.runs += 1
        return [np.array(value) for value in np.atleast_2d(self.work(*inputs))]

    def code(self) -> Code | None:
        rows = self.inputs + self.outputs
        return Code(
            cast(self.function, c_void_p).value or 0,
            np.zeros(rows, np.uint64),
            tuple(range(self.inputs)),
            tuple(range(self.inputs, rows)),
            ((SHAPE, DTYPE),) * self.outputs,
            1,
            lambda: None,
            self.module,
            lambda: f"{self.found} will not do" if self.found else "",
        )

    def close(self) -> None:
        self.closed += 1


class Plain(Coded):
    """The same for Python only."""

    def code(self) -> Code | None:
        return None


@pytest.fixture
def make(library: CDLL) -> Iterator[Callable[..., Executor]]:
    """Makes an executor of (name, device, inputs, outputs, work), and closes it at the end."""
    opened: list[Executor] = []
    threads = set(threading.enumerate())

    def made(
        parts: Sequence[tuple[str, Device, str, str, Callable[..., Any]]],
        outputs: str,
        kind: type[Coded] = Coded,
        views: Mapping[str, View] | None = None,
        routes: Sequence[tuple[int, ...]] = (),
        **constants: np.ndarray,
    ) -> Executor:
        steps = []
        for name, device, inputs, results, work in parts:
            names = inputs.split()
            sizes = [prod(views[n].shape) if views and n in views else 4 for n in names]
            kernel = kind(library, len(names), len(results.split()), work, sizes)
            steps.append(
                Step(
                    name,
                    device,
                    tuple(inputs.split()),
                    tuple(results.split()),
                    lambda kernel=kernel: kernel,
                )
            )
        opened.append(Executor(steps, outputs.split(), constants, views, routes))
        return opened[-1]

    yield made
    for executor in opened:
        executor.close()
    assert set(threading.enumerate()) <= threads


def kernels(executor: Executor) -> list[Any]:
    return list(executor._kernels)


def wait(event: Event) -> None:
    assert event.wait(PATIENCE), "the other side never came"


def test_the_structures_are_those_of_c(library: CDLL, tmp_path: Path) -> None:
    dtypes = {"step": crew.STEP, "state": crew.STATE, "slot": crew.SLOT, "unit": crew.UNIT}
    dtypes |= {"crew": crew.CREW, "progress": crew.PROGRESS, "share": crew.SHARE}
    checks = [f"sizeof(struct {name}) == {dtype.itemsize}" for name, dtype in dtypes.items()]
    checks += [
        f"offsetof(struct {name}, {field}) == {dtype.fields[field][1]}"
        for name, dtype in dtypes.items()
        for field in dtype.names
        if field != "counts"
    ]
    source = tmp_path / "check.c"
    asserts = "".join(f'_Static_assert({check}, "{check}");\n' for check in checks)
    source.write_text(f'#include "{crew.SOURCE}"\n{asserts}')
    subprocess.run(["cc", "-c", str(source), "-o", str(tmp_path / "check.o")], check=True)


def test_steps_follow_the_plan_and_are_stamped(make: Callable[..., Executor]) -> None:
    a, b, _ = DEVICES
    log: list[str] = []

    def logged(name: str) -> Callable[..., Any]:
        return lambda *inputs: (log.append(name), sum(inputs) + 1)[1]

    executor = make(
        [
            ("first", a, "x", "p", logged("first")),
            ("other", b, "p", "q", logged("other")),
            ("second", a, "q", "r", logged("second")),
            ("third", a, "p", "s", logged("third")),
        ],
        "r s x c",
        c=X,
    )
    for how in ("run", "submit"):
        log.clear()
        if how == "run":
            outputs, run = executor.run({"x": X})
        else:
            run = executor.submit({"x": X})
            outputs = run.result(PATIENCE)
        assert list(outputs) == ["r", "s", "x", "c"]
        np.testing.assert_array_equal(outputs["r"], X + 3)
        np.testing.assert_array_equal(outputs["s"], X + 2)
        assert outputs["x"] is X
        assert outputs["c"] is X
        assert log == ["first", "other", "second", "third"]
        schedule = run.schedule()
        assert [slot.task for slot in schedule.slots] == log
        assert [slot.device for slot in schedule.slots] == ["a", "b", "a", "a"]
        for before, behind in zip(schedule.slots, schedule.slots[1:], strict=False):
            assert 0 <= before.start <= before.finish <= behind.start
        there, back = schedule.transfers
        assert (there.tensor, there.nbytes, there.source, there.sink) == ("p", 16, "a", "b")
        assert (back.tensor, back.source, back.sink) == ("q", "b", "a")
        slot = schedule.slot("first")
        assert slot.finish == there.start <= there.finish
        assert run.schedule() == schedule
    assert [kernel.runs for kernel in kernels(executor)] == [0] * 4


def test_the_caller_does_the_work_of_the_last_unit(make: Callable[..., Executor]) -> None:
    a, b, _ = DEVICES
    parts = [("one", a, "x", "p", lambda x: x + 1), ("two", b, "p", "y", lambda p: p * 2)]
    executor = make(parts, "y")
    one, two = kernels(executor)
    # The unit's own thread may be there first, if it has not gone to sleep yet.
    for _ in range(100):
        outputs, _ = executor.run({"x": X})
        np.testing.assert_array_equal(outputs["y"], (X + 1) * 2)
        if threading.get_ident() in two.threads:
            break
    assert threading.get_ident() in two.threads
    assert threading.get_ident() not in one.threads
    executor.submit({"x": X}).result(PATIENCE)
    assert len(two.threads) == 2


@st.composite
def plans(draw: Any) -> tuple[list[tuple[str, Device, str, str, Any]], str, dict[str, View]]:
    """Steps in topological order on up to three units, each of one to three tensors, and views."""
    names = ["x"]
    parts = []
    views: dict[str, View] = {}
    pieces: set[str] = set()
    for index in range(draw(st.integers(2, 12))):
        free = [name for name in names[1:] if name not in pieces and name not in views]
        if len(free) > 1 and draw(st.booleans()):
            found = draw(st.lists(st.sampled_from(free), min_size=2, max_size=3, unique=True))
            views[f"v{index}"] = View(tuple(found), (4 * len(found),), DTYPE)
            pieces.update(found)
            names.append(f"v{index}")
        inputs = draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True))
        count = draw(st.integers(1, 2))
        outputs = [f"t{index}_{i}" for i in range(count)]

        def work(*arrays: np.ndarray, index: int = index, count: int = count) -> Any:
            rows = np.concatenate([array.reshape(-1, 4) for array in arrays])
            total = (rows.T * np.arange(1, len(rows) + 1)).sum(axis=1)
            return [total % 17 + index * (i + 1) for i in range(count)]

        device = draw(st.sampled_from(DEVICES))
        parts.append((f"part{index}", device, " ".join(inputs), " ".join(outputs), work))
        names += outputs
    whole = [name for name in names[1:] if name not in pieces]
    results = draw(st.lists(st.sampled_from(whole), min_size=1, max_size=3, unique=True))
    return parts, " ".join(results), views


def by_hand(parts: Sequence[Any], x: np.ndarray, views: dict[str, View]) -> dict[str, np.ndarray]:
    values = {"x": x}
    for _, _, inputs, outputs, work in parts:
        for name, view in views.items():
            if name not in values and values.keys() >= set(view.pieces):
                values[name] = np.concatenate([values[piece] for piece in view.pieces])
        found = np.atleast_2d(work(*(values[name] for name in inputs.split())))
        values.update(zip(outputs.split(), found.astype(DTYPE), strict=True))
    for name, view in views.items():
        values[name] = np.concatenate([values[piece] for piece in view.pieces])
    return values


@pytest.mark.parametrize("kind", [Coded, Plain])
@given(plan=plans(), others=st.lists(st.permutations(DEVICES), max_size=3))
def test_any_plan_gives_what_its_parts_give(
    library: CDLL, kind: Any, plan: Any, others: list[Any]
) -> None:
    """The first request is placed as the plan says, and each of `others` by its own devices."""
    parts, outputs, views = plan
    xs = [X + i for i in range(20)]
    steps: list[Step] = []
    routes = []
    for devices in (DEVICES, *others):
        place = dict(zip(DEVICES, devices, strict=True))
        route = []
        for name, home, inputs, results, work in parts:
            sides = tuple(inputs.split()), tuple(results.split())
            sizes = [views[name].shape[0] if name in views else 4 for name in sides[0]]
            kernel = kind(library, len(sizes), len(sides[1]), work, sizes)
            same = [i for i, s in enumerate(steps) if (s.name, s.device) == (name, place[home])]
            route += same or [len(steps)]
            if not same:
                steps.append(Step(name, place[home], *sides, lambda kernel=kernel: kernel))
        routes.append(tuple(route))
    executor = Executor(steps, outputs.split(), {}, views, routes)
    try:
        found = [executor.run({"x": xs[0]})[0]]
        requests = [executor.submit({"x": x}) for x in xs]
        found += [request.result(PATIENCE) for request in requests]
        for x, values in zip([xs[0], *xs], found, strict=True):
            expected = by_hand(parts, x, views)
            assert list(values) == outputs.split()
            for name, value in values.items():
                np.testing.assert_array_equal(value, expected[name])
        for number, request in enumerate(requests, start=1):
            slots = {slot.task: slot.device for slot in request.schedule().slots}
            route = [steps[index] for index in routes[number % len(routes)]]
            assert slots == {step.name: step.device.name for step in route}
    finally:
        executor.close()


@pytest.mark.parametrize("kind", [Coded, Plain])
def test_a_unit_that_is_seldom_on_a_route(make: Callable[..., Executor], kind: Any) -> None:
    """Its turn comes after more requests than are told apart by their numbers, again and again."""
    a, b, c = DEVICES
    parts = [
        ("first", a, "x", "p", lambda x: x + 1),
        ("often", b, "p", "y", lambda p: p * 2),
        ("seldom", c, "p", "y", lambda p: p * 2),
    ]
    executor = make(parts, "y", kind, routes=[(0, 1)] * 15 + [(0, 2)])
    for first in range(0, 400, 5):
        requests = [executor.submit({"x": X + first + i}) for i in range(5)]
        for i, request in enumerate(requests):
            np.testing.assert_array_equal(request.result(PATIENCE)["y"], (X + first + i + 1) * 2)
            slots = {slot.task for slot in request.schedule().slots}
            assert slots == {"first", "seldom" if (first + i) % 16 == 15 else "often"}


def test_the_other_replica_works_while_one_waits(make: Callable[..., Executor]) -> None:
    a, b, _ = DEVICES
    late = Event()
    parts = [
        ("part0", a, "x", "y", lambda x: (wait(late), x + 1)[1]),
        ("part0", b, "x", "y", lambda x: x + 1),
    ]
    executor = make(parts, "y", routes=[(0,), (1,)])
    slow, quick = (executor.submit({"x": X + i}) for i in range(2))
    np.testing.assert_array_equal(quick.result(PATIENCE)["y"], X + 2)
    assert not slow.wait(0.01)
    late.set()
    np.testing.assert_array_equal(slow.result(PATIENCE)["y"], X + 1)
    assert [executor.run({"x": X})[1].schedule().slots[0].device for _ in range(3)] == [
        "a",
        "b",
        "a",
    ]


def test_pieces_are_written_to_their_place(make: Callable[..., Executor]) -> None:
    """Who reads a view waits for all pieces, and finds them without a step between."""
    a, b, _ = DEVICES
    late = Event()
    parts = [
        ("left", a, "x", "p", lambda x: x + 1),
        ("right", b, "x", "q", lambda x: (wait(late), x + 2)[1]),
        ("reader", a, "pq", "y", lambda pq: pq[:4] * pq[4:]),
        ("piece", b, "q", "z", lambda q: q * 2),
    ]
    executor = make(parts, "y z pq", views={"pq": View(("p", "q"), (2, 4), DTYPE)})
    request = executor.submit({"x": X})
    assert not request.wait(0.01)
    late.set()
    first = request.result(PATIENCE)
    again = executor.run({"x": X + 5})[0]
    for x, found in ((X, first), (X + 5, again)):
        np.testing.assert_array_equal(found["y"], (x + 1) * (x + 2))
        np.testing.assert_array_equal(found["z"], (x + 2) * 2)
        np.testing.assert_array_equal(found["pq"], [x + 1, x + 2])
    moved = [(move.tensor, move.nbytes, move.sink) for move in request.schedule().transfers]
    assert moved == [("q", 16, "a")]


def test_results_are_not_written_to_again(make: Callable[..., Executor]) -> None:
    a, b, _ = DEVICES
    parts = [("one", a, "x", "p", lambda x: x + 1), ("two", b, "p", "y", lambda p: p * 2)]
    executor = make(parts, "p y")
    found = [executor.run({"x": X + i})[0] for i in range(10)]
    for i, values in enumerate(found):
        np.testing.assert_array_equal(values["p"], X + i + 1)
        np.testing.assert_array_equal(values["y"], (X + i + 1) * 2)


def test_inputs_of_any_strides(make: Callable[..., Executor]) -> None:
    a, b, _ = DEVICES
    parts = [("one", a, "x", "p", lambda x: x + 1), ("two", b, "p", "y", lambda p: p * 2)]
    executor = make(parts, "y")
    wide = np.arange(8, dtype=DTYPE)
    wide.flags.writeable = False
    for x in (wide[::2], wide[:4], wide[:4].copy()):
        np.testing.assert_array_equal(executor.run({"x": x})[0]["y"], (x + 1) * 2)


def test_where_an_array_begins() -> None:
    fixed = np.arange(4)
    fixed.flags.writeable = False
    for array in (np.arange(4), fixed, np.empty((0, 3)), np.float32([1.0]).astype("bfloat16")):
        assert crew.address(array) == array.ctypes.data


def test_units_work_at_the_same_time(make: Callable[..., Executor]) -> None:
    left, right = Event(), Event()

    def meet(mine: Event, other: Event) -> Callable[[np.ndarray], Any]:
        return lambda x: (mine.set(), wait(other), x + 1)[2]

    a, b, _ = DEVICES
    executor = make(
        [("left", a, "x", "p", meet(left, right)), ("right", b, "x", "q", meet(right, left))],
        "p q",
    )
    _, run = executor.run({"x": X})
    assert run.schedule().overlap_seconds() > 0


def test_a_unit_that_waits_works_for_the_next_request(make: Callable[..., Executor]) -> None:
    again = Event()
    seen: list[float] = []

    def first(x: np.ndarray) -> Any:
        seen.append(float(x[0]))
        if len(seen) == 2:
            again.set()
        return x + 1

    def middle(p: np.ndarray) -> Any:
        # Of the first request it ends only when the other unit is at the second.
        wait(again)
        return p * 2

    a, b, _ = DEVICES
    executor = make(
        [
            ("first", a, "x", "p", first),
            ("middle", b, "p", "q", middle),
            ("last", a, "q", "y", lambda q: q + 3),
        ],
        "y",
    )
    requests = [executor.submit({"x": X + i}) for i in range(3)]
    for i, request in enumerate(requests):
        np.testing.assert_array_equal(request.result(PATIENCE)["y"], (X + i + 1) * 2 + 3)
    assert seen == [0.0, 1.0, 2.0]


def test_a_part_that_fails_is_named_and_other_requests_go_on(
    make: Callable[..., Executor],
) -> None:
    a, b, _ = DEVICES
    executor = make(
        [
            ("part0", a, "x", "p", lambda x: x + 1),
            ("part1", b, "p", "q", lambda p: 7 if p[0] == 2 else p * 2),
            ("part2", a, "q", "y", lambda q: q + 3),
        ],
        "y p",
    )
    requests = [executor.submit({"x": X + i}) for i in range(12)]
    for i, request in enumerate(requests):
        if i == 1:
            with pytest.raises(PartError) as caught:
                request.result(PATIENCE)
            assert str(caught.value) == "part1 on 'b' failed: 7 will not do"
            assert [slot.task for slot in request.schedule().slots] == ["part0"]
        else:
            np.testing.assert_array_equal(request.result(PATIENCE)["y"], (X + i + 1) * 2 + 3)
    with pytest.raises(PartError, match="part1"):
        executor.run({"x": X + 1})
    np.testing.assert_array_equal(executor.run({"x": X})[0]["p"], X + 1)


def test_many_callers(make: Callable[..., Executor]) -> None:
    a, b, c = DEVICES
    executor = make(
        [
            ("one", a, "x", "p", lambda x: x + 1),
            ("two", b, "p", "q", lambda p: p * 2),
            ("three", c, "p", "r", lambda p: p * 3),
            ("four", a, "q r", "y", lambda q, r: q + r),
        ],
        "y",
    )
    wrong: list[float] = []

    def call(first: int) -> None:
        for i in range(first, first + 25):
            found = executor.run({"x": X + i})[0] if i % 3 else None
            found = found or executor.submit({"x": X + i}).result(PATIENCE)
            if not np.array_equal(found["y"], (X + i + 1) * 5):
                wrong.append(i)

    callers = [threading.Thread(target=call, args=(100 * i,)) for i in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(PATIENCE)
        assert not caller.is_alive()
    assert wrong == []


def test_close_waits_for_requests_and_refuses_new_ones(make: Callable[..., Executor]) -> None:
    entered, let_go = Event(), Event()
    a, b, _ = DEVICES
    executor = make(
        [
            ("part0", a, "x", "p", lambda x: (entered.set(), wait(let_go), x + 1)[2]),
            ("part1", b, "p", "y", lambda p: p * 2),
        ],
        "y",
    )
    loaded = kernels(executor)
    requests = [executor.submit({"x": X}) for _ in range(2)]
    wait(entered)
    closing = threading.Thread(target=executor.close)
    closing.start()
    closing.join(0.05)
    assert closing.is_alive()
    for attempt in (executor.submit, executor.run):
        with pytest.raises(HetschedError, match="closed"):
            attempt({"x": X})
    let_go.set()
    closing.join(PATIENCE)
    assert not closing.is_alive()
    for request in requests:
        np.testing.assert_array_equal(request.result(0)["y"], (X + 1) * 2)
    assert [kernel.closed for kernel in loaded] == [1, 1]


def test_close_while_a_caller_works(make: Callable[..., Executor]) -> None:
    entered, let_go = Event(), Event()
    a, b, _ = DEVICES
    executor = make(
        [
            ("part0", a, "x", "p", lambda x: x + 1),
            ("part1", b, "p", "y", lambda p: (entered.set(), wait(let_go), p * 2)[2]),
        ],
        "y",
    )
    found: list[Any] = []
    caller = threading.Thread(target=lambda: found.append(executor.run({"x": X})[0]))
    caller.start()
    wait(entered)
    closing = threading.Thread(target=executor.close)
    closing.start()
    closing.join(0.05)
    assert closing.is_alive()
    let_go.set()
    for thread in (closing, caller):
        thread.join(PATIENCE)
        assert not thread.is_alive()
    np.testing.assert_array_equal(found[0]["y"], (X + 1) * 2)


def test_a_result_that_is_late(make: Callable[..., Executor]) -> None:
    let_go = Event()
    a, b, _ = DEVICES
    executor = make(
        [
            ("part0", a, "x", "p", lambda x: (wait(let_go), x + 1)[1]),
            ("part1", b, "p", "y", lambda p: p * 2),
        ],
        "y",
    )
    request = executor.submit({"x": X})
    with pytest.raises(TimeoutError):
        request.result(0.01)
    let_go.set()
    np.testing.assert_array_equal(request.result(PATIENCE)["y"], (X + 1) * 2)
    assert request.result(0) is request.result(0)


def test_idle_and_waiting_units_use_no_time(make: Callable[..., Executor]) -> None:
    let_go = Event()
    a, b, _ = DEVICES
    executor = make(
        [
            ("part0", a, "x", "p", lambda x: (wait(let_go), x + 1)[1]),
            ("part1", b, "p", "y", lambda p: p * 2),
        ],
        "y",
    )
    before = time.process_time()
    time.sleep(0.2)
    request = executor.submit({"x": X})
    time.sleep(0.2)
    assert time.process_time() - before < 0.03
    let_go.set()
    request.result(PATIENCE)


def test_one_part_without_code_makes_all_run_by_python(make: Callable[..., Executor]) -> None:
    a, b, _ = DEVICES
    parts = [("one", a, "x", "p", lambda x: x + 1), ("two", b, "p", "y", lambda p: p * 2)]
    executor = make(parts, "y", Plain)
    np.testing.assert_array_equal(executor.run({"x": X})[0]["y"], (X + 1) * 2)
    assert [kernel.runs for kernel in kernels(executor)] == [1, 1]


def test_an_executor_that_is_forgotten_leaves_no_thread(
    make: Callable[..., Executor], library: CDLL
) -> None:
    a, b, _ = DEVICES
    before = set(threading.enumerate())
    works = [Coded(library, 1, 1, lambda x: x + 1) for _ in range(2)]
    executor = Executor(
        [
            Step("one", a, ("x",), ("p",), lambda: works[0]),
            Step("two", b, ("p",), ("y",), lambda: works[1]),
        ],
        ["y"],
        {},
    )
    executor.submit({"x": X}).result(PATIENCE)
    del executor
    deadline = time.monotonic() + PATIENCE
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert set(threading.enumerate()) <= before


def test_a_process_ends_with_its_workers_asleep(library: CDLL) -> None:
    code = f"""
import sys
sys.path[:0] = {sys.path!r}
from ctypes import CDLL
from tests import test_crew as t
works = [t.Coded(CDLL({library._name!r}), 1, 1, lambda x: x + 1) for _ in range(2)]
executor = t.Executor(
    [
        t.Step("one", t.DEVICES[0], ("x",), ("p",), lambda: works[0]),
        t.Step("two", t.DEVICES[1], ("p",), ("y",), lambda: works[1]),
    ],
    ["y"],
    {{}},
)
print(executor.run({{"x": t.X}})[0]["y"].tolist())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[2.0, 3.0, 4.0, 5.0]"
