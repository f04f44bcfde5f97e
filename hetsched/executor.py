"""Runs the parts of a plan: a worker thread for each unit, transfers as explicit, timed steps.

A part runs when its inputs are on its device and the parts before it in the plan's order on the
same unit have run; workers sleep until then. Several requests may be in flight: a unit that waits
in one request works for the next. Devices that share memory hand tensors over without a copy;
between others a thread for each ordered pair moves them while the devices go on.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from threading import Lock
from time import perf_counter
from typing import Any

import numpy as np

from hetsched.device import Device
from hetsched.errors import DeviceError, HetschedError, PartError
from hetsched.schedule import Schedule, Slot, Transfer
from hetsched.target import Kernel

HOST_SPACE = "host"


@dataclass(frozen=True, eq=False)
class Step:
    """A part as the executor sees it; `load` makes its kernel, in the worker's thread."""

    name: str
    device: Device
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    load: Callable[[], Kernel]
    label: str = ""


# Where a value is: the tensor, and the device that can compute on it; None is the host.
Place = tuple[str, str | None]


class Request:
    """One run in flight. Its time counts from the submission."""

    def __init__(self, steps: Sequence[Step], outputs: Sequence[str], uses: Counter[Place]) -> None:
        self.started = perf_counter()
        self._steps = steps
        self._outputs = outputs
        self._future: Future[dict[str, np.ndarray]] = Future()
        self._lock = Lock()
        self._values: dict[Place, Any] = {}
        self._uses = uses
        self._missing = [len(step.inputs) for step in steps]
        # How many steps of each unit have run.
        self._position: Counter[str] = Counter()
        self._waiting_for = len(steps) + len(outputs)
        self._slots: list[Slot] = []
        self._transfers: list[Transfer] = []

    def result(self, timeout: float | None = None) -> dict[str, np.ndarray]:
        """The outputs by name, once they are there.

        Raises
        ------
        PartError
            A part failed; the message has its name.
        TimeoutError
            They are not there within `timeout` seconds.
        """
        return self._future.result(timeout)

    def schedule(self) -> Schedule:
        """The measured schedule; waits for the end of the run."""
        self._future.exception()
        clock = "measured"
        if any(step.device.modelled for step in self._steps):
            clock += ", modelled"
        return Schedule(
            tuple(sorted(self._slots, key=lambda slot: slot.start)),
            tuple(sorted(self._transfers, key=lambda move: move.start)),
            clock,
            {step.name: step.label for step in self._steps},
        )

    @property
    def failed(self) -> bool:
        return self._future.done() and self._future.exception() is not None

    def since(self, time: float) -> float:
        return time - self.started

    def put(self, place: Place, value: Any, readers: Iterable[int]) -> None:
        """Records a value where it is needed; `readers` are the steps that waited for it."""
        with self._lock:
            self._values[place] = value
            for index in readers:
                self._missing[index] -= 1

    def take(self, places: Sequence[Place]) -> list[Any]:
        """The values of `places`; one that nothing reads any more is forgotten."""
        with self._lock:
            values = [self._values[place] for place in places]
            for place in places:
                self._uses[place] -= 1
                if not self._uses[place]:
                    del self._values[place]
        return values

    def claim(self, unit: str, order: Sequence[int]) -> int | None:
        """The unit's next step, if all its inputs are there and nobody has claimed it."""
        with self._lock:
            position = self._position[unit]
            if position == len(order) or self._missing[order[position]]:
                return None
            self._missing[order[position]] = CLAIMED
            return order[position]

    def record(self, unit: str, slot: Slot) -> None:
        with self._lock:
            self._position[unit] += 1
            self._slots.append(slot)

    def record_transfer(self, transfer: Transfer) -> None:
        with self._lock:
            self._transfers.append(transfer)

    def settle(self) -> None:
        """Counts a step or a result that is done; with the last one the run has its result."""
        with self._lock:
            self._waiting_for -= 1
            if self._waiting_for or self._future.done():
                return
            result = {name: self._values[name, None] for name in self._outputs}
        self._future.set_result(result)

    def fail(self, error: BaseException) -> None:
        with self._lock:
            if self._future.done():
                return
            self._values.clear()
            self._future.set_exception(error)


# More inputs missing than any step has, so that a claimed step is never ready again.
CLAIMED = 1 << 30


class Executor:
    """Workers with loaded kernels. `outputs` are the names that a run returns.

    `constants` are results that no step writes. A failed load leaves nothing running.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        outputs: Iterable[str],
        constants: Mapping[str, np.ndarray],
    ) -> None:
        self._steps = tuple(steps)
        self._outputs = tuple(dict.fromkeys(outputs))
        self._constants = dict(constants)
        self._kernels: list[Kernel] = []
        self._in_flight: set[Request] = set()
        self._lock = Lock()
        self._closed = False
        self._spaces = {step.device.name: step.device.memory_space for step in self._steps}
        self._order: dict[str, list[int]] = defaultdict(list)
        self._readers: dict[Place, list[int]] = defaultdict(list)
        for index, step in enumerate(self._steps):
            self._order[step.device.unit].append(index)
            for name in step.inputs:
                self._readers[name, step.device.name].append(index)
        self._uses = Counter({place: len(steps) for place, steps in self._readers.items()})
        self._uses.update((name, None) for name in self._outputs)
        # Where each tensor is needed; the host, None, for a result.
        self._sinks: dict[str, list[str | None]] = defaultdict(list)
        for name, device in self._uses:
            self._sinks[name].append(device)
        self._workers = {
            step.device.unit: ThreadPoolExecutor(1, f"hetsched {step.device.unit}")
            for step in self._steps
        }
        self._couriers = self._all_couriers()
        self._load()

    def submit(self, inputs: Mapping[str, np.ndarray]) -> Request:
        """Starts a run and returns at once.

        Raises
        ------
        HetschedError
            The executor is closed.
        """
        request = Request(self._steps, self._outputs, self._uses.copy())
        with self._lock:
            if self._closed:
                raise HetschedError("this executable is closed")
            self._in_flight.add(request)
        request._future.add_done_callback(lambda _: self._in_flight.discard(request))
        try:
            for name, array in (self._constants | dict(inputs)).items():
                self._publish(request, name, None, array)
            self._start_ready(request, self._order)
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
            request._future.exception()
        for pool in (*self._workers.values(), *self._couriers.values()):
            pool.shutdown()
        for kernel in self._kernels:
            kernel.close()
        self._kernels = []

    def _load(self) -> None:
        loading = [self._workers[step.device.unit].submit(_loaded, step) for step in self._steps]
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

    def _publish(self, request: Request, name: str, device: str | None, value: Any) -> None:
        """Brings a new value to every place that needs it."""
        for sink in self._sinks[name]:
            if self._space(device) == self._space(sink):
                self._move(request, name, device, sink, value)
            else:
                courier = self._couriers[device, sink]
                move = courier.submit(self._move, request, name, device, sink, value)
                move.add_done_callback(partial(_fail_if, request))

    def _move(
        self, request: Request, name: str, device: str | None, sink: str | None, value: Any
    ) -> None:
        if device != sink:
            start = perf_counter()
            with _named(f"transfer of '{name}' to '{sink or 'host'}'"):
                array = self._by_device[device].send(value) if device else value
                value = self._by_device[sink].receive(array) if sink else array
            finish = perf_counter()
            # Between a device and the host's own memory nothing moves where they share it.
            if None not in (device, sink) or self._space(device) != self._space(sink):
                times = request.since(start), request.since(finish)
                request.record_transfer(Transfer(name, array.nbytes, device, sink, *times))
        readers = self._readers.get((name, sink), [])
        request.put((name, sink), value, readers)
        self._start_ready(request, {self._steps[index].device.unit for index in readers})
        if sink is None:
            request.settle()

    def _start_ready(self, request: Request, units: Iterable[str]) -> None:
        for unit in units:
            index = request.claim(unit, self._order[unit])
            if index is not None:
                running = self._workers[unit].submit(self._run, request, index)
                running.add_done_callback(partial(_fail_if, request))

    def _run(self, request: Request, index: int) -> None:
        if request.failed:
            return
        step = self._steps[index]
        device = step.device.name
        inputs = request.take([(name, device) for name in step.inputs])
        start = perf_counter()
        with _named(f"{step.name} on '{device}'"):
            results = self._kernels[index].run(inputs)
            outputs = dict(zip(step.outputs, results, strict=True))
        finish = perf_counter()
        # Before anything that waits for this step starts: the memory may be its to use.
        del inputs
        slot = Slot(step.name, device, request.since(start), request.since(finish))
        request.record(step.device.unit, slot)
        for name, value in outputs.items():
            self._publish(request, name, device, value)
        self._start_ready(request, [step.device.unit])
        request.settle()

    def _all_couriers(self) -> dict[tuple[str | None, str | None], ThreadPoolExecutor]:
        """One for each ordered pair of places with something to move; a thread starts with work."""
        source = {name: step.device.name for step in self._steps for name in step.outputs}
        pairs = dict.fromkeys(
            (source.get(name), sink) for name, sinks in self._sinks.items() for sink in sinks
        )
        return {
            (device, sink): ThreadPoolExecutor(
                1, f"hetsched {device or 'host'} to {sink or 'host'}"
            )
            for device, sink in pairs
            if self._space(device) != self._space(sink)
        }

    def _space(self, device: str | None) -> str:
        return self._spaces[device] if device else HOST_SPACE


def _loaded(step: Step) -> Kernel:
    """The kernel of `step`, on the calling thread, which stays on the cores of its device."""
    cores = step.device.cores
    if cores and hasattr(os, "sched_setaffinity"):
        try:
            os.sched_setaffinity(0, cores)
        except OSError:
            raise DeviceError(
                f"'{step.device.name}' cannot be held on core {', '.join(map(str, cores))}: "
                "this machine has no such core for this process"
            ) from None
    try:
        return step.load()
    except HetschedError:
        raise
    except Exception as error:
        what = f"{step.name} on '{step.device.name}'"
        raise PartError(f"{what} does not load: {_one_line(error)}") from error


@contextmanager
def _named(what: str) -> Iterator[None]:
    """Whatever kernels raise, as an error that says where."""
    try:
        yield
    except Exception as error:
        raise PartError(f"{what} failed: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or repr(error)


def _fail_if(request: Request, done: Future[None]) -> None:
    error = done.exception()
    if error is not None:
        request.fail(error)
