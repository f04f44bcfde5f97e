"""Runs the parts of a plan: a worker thread for each unit, transfers as explicit, timed steps.

A part runs when its inputs are on its device and the parts before it in the plan's order on the
same unit have run; workers sleep until then. Several requests may be in flight: a unit that waits
in one request works for the next. Devices that share memory hand tensors over without a copy;
between others a thread for each ordered pair moves them while the devices go on. What a device runs
asynchronously begins before what precedes it there has ended. Where several
units run nothing but code on the host's memory, they do so as a crew, without Python.

What a plan asks for at each step is worked out once, when its executor starts: a run counts.
"""

import os
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from threading import Lock, Thread, current_thread
from time import perf_counter
from typing import Any, TypeVar
from weakref import finalize

import numpy as np

from hetsched.crew import Crew, CrewRequest
from hetsched.device import Device
from hetsched.errors import DeviceError, HetschedError, PartError
from hetsched.request import Request, Run, Step, View, failure, one_line
from hetsched.schedule import Transfer
from hetsched.target import Begun, Kernel

T = TypeVar("T")
HOST_SPACE = "host"


@dataclass(frozen=True, eq=False)
class _Way:
    """Brings a tensor from where it is made to one of the places that need it."""

    tensor: str
    # A device, or the host itself.
    source: str | None
    sink: str | None
    # Whether one of the two cannot read the memory of the other.
    between_memories: bool
    # Where a request keeps the value.
    place: int
    # The steps that wait for it, and their units.
    readers: tuple[int, ...]
    units: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class _Course:
    """What a run does, worked out ahead."""

    steps: tuple[Step, ...]
    # The kernel of each step.
    kernels: tuple[int, ...]
    # The steps of each unit, in the plan's order.
    order: Mapping[str, tuple[int, ...]]
    # By tensor.
    ways: Mapping[str, tuple[_Way, ...]]
    uses: tuple[int, ...]
    # The places that each step reads, and those of the results by name. A view has several.
    reads: tuple[tuple[int, ...], ...]
    results: Mapping[str, tuple[int, ...]]
    views: Mapping[str, View]

    def values(
        self,
        names: Iterable[str],
        found: Iterable[Any],
        copied: Callable[[View, list[Any]], Any] = View.copied,
    ) -> list[Any]:
        """The tensors of these names, of what is at their places; views are `copied`."""
        there = iter(found)
        return [
            copied(view, [next(there) for _ in view.pieces])
            if (view := self.views.get(name))
            else next(there)
            for name in names
        ]


class _Queued(Request):
    """One run in flight, of which workers take one step after the other."""

    def __init__(self, course: _Course) -> None:
        super().__init__(course.steps)
        self.course = course
        self._lock = Lock()
        # Held until the run has ended.
        self._ended = Lock()
        self._ended.acquire()
        self._over = False
        self._values: list[Any] = [None] * len(course.uses)
        self._uses = list(course.uses)
        self._missing = [len(reads) for reads in course.reads]
        # How many steps of each unit have run, or begun where the next need not wait.
        self._position = dict.fromkeys(course.order, 0)
        self._waiting_for = len(course.steps) + sum(map(len, course.results.values()))
        # Called once, at the end.
        self.at_end: Callable[[_Queued], None] | None = None

    def wait(self, timeout: float | None = None) -> bool:
        if not self._ended.acquire(timeout=-1 if timeout is None else timeout):
            return False
        self._ended.release()
        return True

    @property
    def failed(self) -> bool:
        return self._error is not None

    def put(self, way: _Way, value: Any) -> None:
        """Records a value where it is needed."""
        with self._lock:
            if self._over:
                return
            self._values[way.place] = value
            for index in way.readers:
                self._missing[index] -= 1

    def take(self, places: Sequence[int]) -> list[Any]:
        """The values of `places`; one that nothing reads any more is forgotten."""
        with self._lock:
            values = [self._values[place] for place in places]
            for place in places:
                self._uses[place] -= 1
                if not self._uses[place]:
                    self._values[place] = None
        return values

    def claim(self, unit: str) -> int | None:
        """The unit's next step, if all its inputs are there and nobody has claimed it."""
        order = self.course.order[unit]
        with self._lock:
            position = self._position[unit]
            if position == len(order) or self._missing[order[position]]:
                return None
            self._missing[order[position]] = CLAIMED
            return order[position]

    def pass_on(self, index: int) -> None:
        """The next step of the unit may run."""
        with self._lock:
            self._position[self._steps[index].device.unit] += 1

    def settle(self) -> None:
        """Counts a step or a result that is done; with the last one the run has its result."""
        with self._lock:
            self._waiting_for -= 1
            if self._waiting_for or self._over:
                return
            results = self.course.results
            places = [place for found in results.values() for place in found]
            values = self.course.values(results, [self._values[place] for place in places])
            self._result = dict(zip(results, values, strict=True))
            self._end()

    def fail(self, error: BaseException) -> None:
        with self._lock:
            if self._over:
                return
            self._error = error
            self._end()

    def _end(self) -> None:
        self._over = True
        self._values = [None] * len(self._values)
        if self.at_end:
            self.at_end(self)
        self._ended.release()


# More inputs missing than any step has, so that a claimed step is never ready again.
CLAIMED = 1 << 30
# A method, the request that it is for, and what else it takes.
_Task = tuple[Callable[..., Any], Any, tuple[Any, ...]]


class _Worker:
    """A thread that does one thing after another, each for a request."""

    def __init__(self, name: str) -> None:
        self._tasks: SimpleQueue[_Task | None] = SimpleQueue()
        # What the thread does when nothing else is to do.
        self._later: deque[_Task] = deque()
        self._crew: Crew | None = None
        # That of the step that began last.
        self.device: Device | None = None
        # A thread that nobody stops must not keep the process from its end.
        waiting = (self._tasks, self._later)
        self._thread = Thread(target=_work, args=waiting, name=name, daemon=True)
        self._thread.start()

    def put(self, work: Callable[..., None], request: _Queued, *arguments: Any) -> None:
        """Calls `work` with the request, which fails with what that raises, and `arguments`."""
        self._tasks.put((work, request, arguments))

    def put_later(self, work: Callable[..., Any], request: _Queued, *arguments: Any) -> None:
        """The same, as soon as there is nothing else to do; only the thread itself calls this."""
        self._later.append((work, request, arguments))

    def do_later(self) -> None:
        """Does now what was put for later; only the thread itself calls this."""
        while self._later:
            _do(self._later.popleft())

    def call(self, function: Callable[..., Any], *arguments: Any) -> "Future[Any]":
        future: Future[Any] = Future()
        self._tasks.put((_answer, future, (function, *arguments)))
        return future

    def join(self, crew: Crew, unit: str) -> None:
        """Works in the crew from now on; nothing else is done until it stops."""
        self._crew = crew
        self.call(crew.work, unit)

    def stop(self) -> None:
        """Returns when all that was put has been done."""
        if self._crew is not None:
            self._crew.stop()
        self._tasks.put(None)
        # The last to forget an executor can be its own worker.
        if self._thread is not current_thread():
            self._thread.join()


def _work(tasks: "SimpleQueue[_Task | None]", later: "deque[_Task]") -> None:
    while True:
        try:
            task = tasks.get(block=not later)
        except Empty:
            task = later.popleft()
        if task is None:
            while later:
                _do(later.popleft())
            return
        _do(task)
        # While it waits it must not keep alive what it has done.
        del task


def _do(task: _Task) -> None:
    work, request, arguments = task
    try:
        work(request, *arguments)
    # Whatever it is: else nothing would ever end the request.
    except BaseException as error:  # noqa: BLE001
        request.fail(error)


def _answer(future: "Future[Any]", function: Callable[..., Any], *arguments: Any) -> None:
    try:
        future.set_result(function(*arguments))
    except HetschedError as error:
        future.set_exception(error)


class Executor:
    """Workers with loaded kernels. `outputs` are the names that a run returns.

    `constants` are results that no step writes, `views` what steps read and runs return as one that
    several steps write. Runs take `routes` in turn, each the numbers of its steps, by default all;
    the steps of two routes are the same parts in the same order. `most_in_flight` is how many runs
    a crew has at once before `submit` waits, by default as many as keep it busy. A failed load
    leaves nothing running.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        outputs: Iterable[str],
        constants: Mapping[str, np.ndarray],
        views: Mapping[str, View] | None = None,
        routes: Sequence[tuple[int, ...]] = (),
        most_in_flight: int = 0,
    ) -> None:
        self._steps = tuple(steps)
        self._routes = tuple(routes) or (tuple(range(len(steps))),)
        names = tuple(dict.fromkeys(outputs))
        courses = {route: _course(steps, route, names, views or {}) for route in self._routes}
        # Of a run by its number, modulo theirs.
        self._courses = [courses[route] for route in self._routes]
        self._course = self._courses[0]
        self._count = 0
        self._most_in_flight = most_in_flight
        self._constants = dict(constants)
        self._kernels: list[Kernel] = []
        self._in_flight: set[_Queued] = set()
        self._lock = Lock()
        self._closed = False
        units = dict.fromkeys(step.device.unit for step in steps)
        self._workers = {unit: _Worker(f"hetsched {unit}") for unit in units}
        pairs = dict.fromkeys(
            (way.source, way.sink)
            for course in courses.values()
            for ways in course.ways.values()
            for way in ways
            if way.between_memories
        )
        self._couriers = {
            (source, sink): _Worker(f"hetsched {source or 'host'} to {sink or 'host'}")
            for source, sink in pairs
        }
        # An executor that is forgotten, or lives when Python ends, stops its threads too.
        self._stop = finalize(self, _stop, [*self._workers.values(), *self._couriers.values()])
        # Held by who computes, where that may be the caller of `run`.
        self._turn = Lock()
        self._load()
        self._cores = frozenset(self._steps[0].device.cores) if self._steps else frozenset()
        self._here = self._runs_on_any_thread()
        self._crew = self._joined()

    def run(self, inputs: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], Run]:
        """The outputs by name, and when it took place; waits for the end.

        A plan that needs one device alone runs on the calling thread, held on the device's cores
        meanwhile, if the kernels allow it and nothing else is in flight: to wake a worker and wait
        for it takes longer than a small network does.

        Raises
        ------
        HetschedError
            The executor is closed.
        PartError
            A part failed; the message has its name.
        """
        if self._here and not self._in_flight and self._turn.acquire(blocking=False):
            try:
                if self._closed:
                    raise HetschedError("this executable is closed")
                return self._held(partial(self._run_here, inputs))
            finally:
                self._turn.release()
        request = self._started(inputs, attended=True)
        if self._crew is not None and isinstance(request, CrewRequest):
            self._crew.attend(request)
        return request.result(), request

    def bind(self, inputs: Mapping[str, np.ndarray]) -> Callable[[], dict[str, np.ndarray]]:
        """`run` on these very arrays; what it returns may be the same arrays at each call.

        A plan of one part that may run on the calling thread has all else settled here; for others
        it is a call of `run`.
        """
        if not self._here or len(self._steps) != 1:
            return lambda: self.run(inputs)[0]
        (step,), (kernel,) = self._steps, self._kernels
        values = {**self._constants, **inputs}
        compute = kernel.bind([values[name] for name in step.inputs])

        def call() -> dict[str, np.ndarray]:
            with self._turn:
                if self._closed:
                    raise HetschedError("this executable is closed")
                try:
                    results = self._held(compute)
                except Exception as error:
                    raise failure(step, step.device.name, error) from error
            made = {**values, **dict(zip(step.outputs, results, strict=True))}
            return {name: self._value(made, name) for name in self._course.results}

        return call

    def submit(self, inputs: Mapping[str, np.ndarray]) -> Request:
        """Starts a run and returns at once; a crew first waits if it has very many in flight.

        Raises
        ------
        HetschedError
            The executor is closed.
        """
        return self._started(inputs)

    def _started(self, inputs: Mapping[str, np.ndarray], attended: bool = False) -> Request:
        with self._lock:
            if self._closed:
                raise HetschedError("this executable is closed")
            if self._crew is not None:
                return self._crew.submit(inputs, attended)
            course = self._courses[self._count % len(self._courses)]
            self._count += 1
            request = _Queued(course)
            self._in_flight.add(request)
        request.at_end = self._in_flight.discard
        try:
            for name, array in (self._constants | dict(inputs)).items():
                self._publish(request, course.ways.get(name, ()), array)
            for unit in course.order:
                self._start_ready(request, unit)
        except BaseException as error:
            # Else nothing would ever end it, and `close` would wait for it.
            request.fail(error)
            raise
        return request

    def close(self) -> None:
        """Waits for the runs in flight, then stops all threads and frees the kernels."""
        with self._lock:
            self._closed = True
            waiting = list(self._in_flight)
        for request in waiting:
            request.wait()
        self._stop()
        with self._turn:
            for kernel in self._kernels:
                kernel.close()
            self._kernels = []

    def _load(self) -> None:
        loading = [self._workers[step.device.unit].call(_loaded, step) for step in self._steps]
        errors = [future.exception() for future in loading]
        self._kernels = [
            future.result() for future, error in zip(loading, errors, strict=True) if not error
        ]
        self._by_device = {
            step.device.name: kernel
            for step, kernel in zip(self._steps, self._kernels, strict=False)
        }
        for error in errors:
            if error is not None:
                self.close()
                raise error

    def _runs_on_any_thread(self) -> bool:
        devices = {step.device for step in self._steps}
        return (
            len(devices) == 1
            and all(kernel.any_thread for kernel in self._kernels)
            and not self._couriers
        )

    def _joined(self) -> Crew | None:
        """The workers as a crew, if there are several and all that they run is code."""
        codes = [code for kernel in self._kernels if (code := kernel.code()) is not None]
        if len(self._workers) < 2 or self._couriers or len(codes) < len(self._steps):
            return None
        crew = Crew(
            self._steps,
            codes,
            tuple(self._course.results),
            self._constants,
            self._course.views,
            self._routes,
            self._most_in_flight,
        )
        for unit, worker in self._workers.items():
            worker.join(crew, unit)
        return crew

    def _held(self, work: Callable[[], T]) -> T:
        """What `work` gives, the calling thread on the cores of the device meanwhile."""
        if not self._cores or not hasattr(os, "sched_setaffinity"):
            return work()
        before = os.sched_getaffinity(0)
        if before <= self._cores:
            return work()
        os.sched_setaffinity(0, self._cores)
        try:
            return work()
        finally:
            os.sched_setaffinity(0, before)

    def _run_here(self, inputs: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], Run]:
        run = Run(self._steps)
        values = {**self._constants, **inputs}
        for index, step in enumerate(self._steps):
            read = [self._value(values, name) for name in step.inputs]
            try:
                begun = self._kernels[index].begin(read)
                run.record(index, *begun.finish())
                values.update(zip(step.outputs, begun.outputs, strict=True))
            except Exception as error:
                raise failure(step, step.device.name, error) from error
        return {name: self._value(values, name) for name in self._course.results}, run

    def _value(self, values: Mapping[str, Any], name: str) -> Any:
        view = self._course.views.get(name)
        return view.copied([values[piece] for piece in view.pieces]) if view else values[name]

    def _publish(self, request: _Queued, ways: Iterable[_Way], value: Any) -> None:
        """Brings a new value to every place that needs it."""
        for way in ways:
            if way.between_memories:
                self._couriers[way.source, way.sink].put(self._move, request, way, value)
            else:
                self._move(request, way, value)

    def _move(self, request: _Queued, way: _Way, value: Any) -> None:
        if way.source != way.sink:
            start = perf_counter()
            at, given = way.source, value
            try:
                array = self._by_device[way.source].send(value) if way.source else value
                at = way.sink
                value = self._by_device[way.sink].receive(array) if way.sink else array
            except Exception as error:
                where = f"transfer of '{way.tensor}' to '{way.sink or 'host'}'"
                raise failure(where, at, error) from error
            finish = perf_counter()
            # Between a device and the host's own memory nothing moves where they share it.
            if None not in (way.source, way.sink) or way.between_memories:
                times = request.since(start), request.since(finish)
                copied = way.between_memories or not np.may_share_memory(given, value)
                request.record_transfer(
                    Transfer(way.tensor, array.nbytes, way.source, way.sink, *times, copied)
                )
        request.put(way, value)
        for unit in way.units:
            self._start_ready(request, unit)
        if way.sink is None:
            request.settle()

    def _start_ready(self, request: _Queued, unit: str) -> None:
        index = request.claim(unit)
        if index is not None:
            self._workers[unit].put(self._run, request, index)

    def _run(self, request: _Queued, index: int) -> None:
        if request.failed:
            return
        course = request.course
        step = course.steps[index]
        pieces = request.take(course.reads[index])
        kernel = self._kernels[course.kernels[index]]
        worker = self._workers[step.device.unit]
        joined = any(name in course.views for name in step.inputs)
        if joined or not kernel.asynchronous or worker.device != step.device:
            # What shares the unit does not overlap, unless one queue of the device has both; and
            # pieces have to be there to be copied.
            worker.do_later()
        worker.device = step.device
        if self._here:
            self._turn.acquire()
        try:
            inputs = course.values(step.inputs, pieces, partial(_copied, kernel))
            begun = kernel.begin(inputs)
            outputs = list(zip(step.outputs, begun.outputs, strict=True))
        except Exception as error:
            raise failure(step, step.device.name, error) from error
        finally:
            if self._here:
                self._turn.release()
        if kernel.asynchronous:
            worker.put_later(self._complete, request, index, begun, outputs, inputs)
        else:
            request.record(index, *begun.finish())
        # Before anything that waits for this step starts: the memory may be its to use.
        del inputs, pieces
        request.pass_on(index)
        for name, value in outputs:
            ways = course.ways.get(name, ())
            if kernel.asynchronous:
                ways = tuple(way for way in ways if way.sink == step.device.name)
            self._publish(request, ways, value)
        self._start_ready(request, step.device.unit)
        if not kernel.asynchronous:
            request.settle()

    def _complete(
        self,
        request: _Queued,
        index: int,
        begun: Begun,
        outputs: Sequence[tuple[str, Any]],
        _inputs: Sequence[Any],
    ) -> None:
        """Waits for the end of a step, as its inputs do, and hands over to other devices."""
        course = request.course
        step = course.steps[index]
        try:
            start, finish = begun.finish()
        except Exception as error:
            raise failure(step, step.device.name, error) from error
        if request.failed:
            return
        request.record(index, start, finish)
        for name, value in outputs:
            ways = course.ways.get(name, ())
            others = tuple(way for way in ways if way.sink != step.device.name)
            self._publish(request, others, value)
        request.settle()


def _course(
    every: Sequence[Step], route: tuple[int, ...], names: Sequence[str], views: Mapping[str, View]
) -> _Course:
    def pieces(name: str) -> tuple[str, ...]:
        return views[name].pieces if name in views else (name,)

    steps = [every[number] for number in route]
    order: dict[str, list[int]] = defaultdict(list)
    readers: dict[tuple[str, str | None], list[int]] = defaultdict(list)
    for index, step in enumerate(steps):
        order[step.device.unit].append(index)
        for whole in step.inputs:
            for name in pieces(whole):
                readers[name, step.device.name].append(index)
    uses = Counter({place: len(indices) for place, indices in readers.items()})
    uses.update((name, None) for whole in names for name in pieces(whole))
    places = {place: number for number, place in enumerate(uses)}
    source = {name: step.device.name for step in steps for name in step.outputs}
    spaces = {step.device.name: step.device.memory_space for step in steps}
    ways: dict[str, list[_Way]] = defaultdict(list)
    for (name, sink), number in places.items():
        start = source.get(name)
        waiting = readers.get((name, sink), [])
        space, other = (spaces[at] if at else HOST_SPACE for at in (start, sink))
        units = tuple(dict.fromkeys(steps[index].device.unit for index in waiting))
        ways[name].append(_Way(name, start, sink, space != other, number, tuple(waiting), units))
    return _Course(
        tuple(steps),
        route,
        {unit: tuple(indices) for unit, indices in order.items()},
        {name: tuple(found) for name, found in ways.items()},
        tuple(uses.values()),
        tuple(
            tuple(places[n, step.device.name] for name in step.inputs for n in pieces(name))
            for step in steps
        ),
        {name: tuple(places[piece, None] for piece in pieces(name)) for name in names},
        views,
    )


def _copied(kernel: Kernel, view: View, pieces: Sequence[Any]) -> Any:
    return kernel.receive(view.copied([kernel.send(piece) for piece in pieces]))


def _stop(workers: Iterable[_Worker]) -> None:
    # Those of the units first: what they end may still have to be moved.
    for worker in workers:
        worker.stop()


def _loaded(step: Step) -> Kernel:
    """The kernel of `step`, on the calling thread, which stays on the cores of its device."""
    try:
        _hold(step.device)
        return step.load()
    except DeviceError as error:
        raise error.of(step.device.name) from None
    except HetschedError:
        raise
    except Exception as error:
        raise PartError(f"{step} does not load: {one_line(error)}") from error


def _hold(device: Device) -> None:
    """Keeps the calling thread on the cores of `device`, if it has any."""
    if not device.cores or not hasattr(os, "sched_setaffinity"):
        return
    try:
        os.sched_setaffinity(0, device.cores)
    except OSError:
        raise DeviceError(
            f"'{device.name}' cannot be held on core {', '.join(map(str, device.cores))}: "
            "this machine has no such core for this process"
        ) from None
