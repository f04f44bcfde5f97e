"""A compiled plan, ready to run."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from math import ceil
from pathlib import Path
from threading import Lock
from types import TracebackType

import numpy as np

from hetsched import package
from hetsched.compiler import CompiledPart, compile_parts
from hetsched.dtype import numpy_dtype
from hetsched.errors import DeviceError, HetschedError, InputError, device_failure
from hetsched.executor import Executor
from hetsched.footprint import Memory, compiled, memory
from hetsched.graph import dtype_of
from hetsched.objective import objective
from hetsched.op import Tensor
from hetsched.plan import Plan
from hetsched.plugin import load
from hetsched.request import Request, Run, View, views_between
from hetsched.schedule import Schedule
from hetsched.target import Kernel, Target

# As long as this the requests in flight keep the units busy that nobody has submitted another: one
# who wants the same cores can wait for some time. Not fewer than each unit can work on, and no more
# than a crew takes.
AHEAD_SECONDS = 10e-3
MOST_AHEAD = 32


class Executable:
    """The parts of `plan`, compiled. `run` runs them; use it as a context, or `close` it.

    `parts` are those of the plan, then their replicas.

    Workers start with the first run: a thread for each unit, held on its cores.

    With a `fallback`, a device that is not there, or fails in a run, is no error while others of
    the plan can run its parts: these are compiled for the next device (`Plan.without`), the run
    begins again, and `fallback` is told so in one line, as the notes of `plan` are from then on.
    """

    def __init__(
        self,
        plan: Plan,
        parts: Sequence[CompiledPart],
        fallback: Callable[[str], None] | None = None,
    ) -> None:
        self.plan = plan
        self.parts = tuple(parts)
        self.fallback = fallback
        # Held while parts move from one device to the next.
        self._moving = Lock()
        self._executor: Executor | None = None
        self._last: Run | None = None
        self._expected = [
            (tensor.name, tensor.shape, numpy_dtype(tensor.dtype)) for tensor in self.inputs
        ]

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return self.plan.original.inputs

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        return self.plan.original.outputs

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Output arrays by name, for input arrays by name.

        Raises
        ------
        InputError
            An input is missing, unknown, or has another shape or dtype.
        PartError
            A part failed; the message has its name.
        """
        checked = self._checked(inputs)
        while True:
            executor = self._executor or self.start()
            try:
                outputs, self._last = executor.run(checked)
            except HetschedError as error:
                self.go_on(error, executor)
            else:
                return outputs

    def bind(self, inputs: Mapping[str, np.ndarray]) -> Callable[[], dict[str, np.ndarray]]:
        """A call that runs on these very arrays, whose values may change between calls.

        Everything else is settled once, which matters for networks that take microseconds. What it
        returns may be the same arrays at each call; `schedule` does not tell of such runs.

        Raises
        ------
        InputError
            An input is missing, unknown, or has another shape or dtype, or is not contiguous.
        """
        checked = dict(self._checked(inputs))
        for name, array in checked.items():
            if array is not inputs[name] or not array.flags.c_contiguous:
                raise InputError(
                    f"input '{name}' cannot be bound: it has to be a C-contiguous array"
                )
        executor = self.start()
        bound = executor.bind(checked)
        if self.fallback is None:
            return bound

        def call() -> dict[str, np.ndarray]:
            nonlocal executor, bound
            while True:
                try:
                    return bound()
                except HetschedError as error:
                    self.go_on(error, executor)
                    executor = self.start()
                    bound = executor.bind(checked)

        return call

    def map(
        self, many: Iterable[Mapping[str, np.ndarray]], in_flight: int = 0
    ) -> Iterator[dict[str, np.ndarray]]:
        """The outputs for each of `many` inputs, in their order, with several runs in flight.

        Inputs are taken as outputs are: never more than `in_flight` ahead, by default as many as
        keep a pipeline busy. So neither has to fit into memory as a whole. After an error, whatever
        is in flight ends unseen.

        Raises
        ------
        InputError, PartError
            As `run`, at the run that it is about.
        """
        waiting: deque[Request] = deque()
        most = in_flight or self.most_in_flight
        for inputs in many:
            waiting.append(self.submit(inputs))
            if len(waiting) == most:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    @cached_property
    def most_in_flight(self) -> int:
        """How many runs `map` has in flight; the plan's prices tell how long they take."""
        units = {item.part.device.unit for item in self.parts}
        least = 2 * len(units) + 2
        seconds = objective("throughput").value(self.plan)
        return max(least, min(MOST_AHEAD, ceil(AHEAD_SECONDS / max(seconds, 1e-9))))

    def submit(self, inputs: Mapping[str, np.ndarray]) -> Request:
        """Begins a run; `result` of what it returns waits for the end.

        Several may be in flight; where there are `most_in_flight` or more, it may wait.
        """
        checked = dict(self._checked(inputs))
        request = (
            self.start().submit(checked) if self.fallback is None else _Repeated(self, checked)
        )
        self._last = request
        return request

    def start(self) -> Executor:
        """Loads the kernels on their workers, which the first run does otherwise.

        Raises
        ------
        DeviceError
            A device of the plan is not here, or cannot hold its parts.
        """
        while self._executor is None:
            try:
                self._executor = self._start()
            except HetschedError as error:
                self.go_on(error, None)
        return self._executor

    def go_on(self, error: HetschedError, executor: Executor | None) -> None:
        """Moves the parts of the device that failed in `executor`, or while it was started.

        Raises
        ------
        HetschedError
            `error`, where it is no device's, where there is no `fallback`, or nothing is left that
            can run the parts.
        """
        failed = device_failure(error)
        if self.fallback is None:
            raise error
        with self._moving:
            if executor is not self._executor:
                # Another run has moved them meanwhile.
                return
            if failed is None or failed.device not in self.plan.devices:
                raise error
            try:
                plan = self.plan.without(failed.device, str(failed))
                parts = compile_parts(plan)
            except HetschedError as other:
                raise DeviceError(f"{error}; there is no fallback: {other}") from error
            self.close()
            self.plan, self.parts = plan, parts
        self.fallback(plan.notes[-1])

    @cached_property
    def memory(self) -> Memory:
        """What each device holds, by what was compiled for it; exact where the target can tell."""
        parts = [compiled(item.part.step, item.graph, item.artifact) for item in self.parts]
        outputs = [tensor.name for tensor in self.outputs]
        # What hands over without Python was compiled into the parts.
        return memory(parts, outputs, self._views, True, self.plan.routes)

    @property
    def schedule(self) -> Schedule:
        """The last run as it was measured.

        Raises
        ------
        InputError
            Nothing has run yet.
        """
        if self._last is None:
            raise InputError("nothing has run yet, so that there is no measured schedule")
        return self._last.schedule()

    def save(self, path: str | Path) -> None:
        """Writes the package `.hsp`; an older file is replaced only by a whole new one.

        Raises
        ------
        OutputFileError
            The file cannot be written.
        """
        package.write(path, self.plan, self.parts)

    def close(self) -> None:
        """Waits for runs in flight, stops the workers and frees the kernels."""
        if self._executor is not None:
            self._executor.close()
            self._executor = None

    def __enter__(self) -> "Executable":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _checked(self, inputs: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """`inputs` themselves if they are what is expected; a caller may change them later."""
        if len(inputs) == len(self._expected):
            for name, shape, dtype in self._expected:
                array = inputs.get(name)
                if array.__class__ is not np.ndarray or (array.shape, array.dtype) != (
                    shape,
                    dtype,
                ):
                    break
            else:
                return inputs
        unknown = sorted(set(inputs) - {tensor.name for tensor in self.inputs})
        if unknown:
            there = ", ".join(map(str, self.inputs)) or "none"
            raise InputError(f"no input '{unknown[0]}'; there are {there}")
        return {tensor.name: _fitting(tensor, inputs) for tensor in self.inputs}

    def _start(self) -> Executor:
        steps = [replace(item.part.step, load=partial(_load_kernel, item)) for item in self.parts]
        names = [tensor.name for tensor in self.outputs]
        constants = self.plan.original.constants
        given = {name: constants[name] for name in names if name in constants}
        return Executor(steps, names, given, self._views, self.plan.routes, self.most_in_flight)

    @property
    def _views(self) -> Mapping[str, View]:
        return views_between(self.plan.graph, [item.graph for item in self.parts])


class _Repeated(Request):
    """A run that begins again where its device fails and others can go on."""

    def __init__(self, executable: Executable, inputs: Mapping[str, np.ndarray]) -> None:
        super().__init__(())
        self._executable = executable
        self._inputs = inputs
        self._begin()

    def _begin(self) -> None:
        self._executor = self._executable.start()
        self._request = self._executor.submit(self._inputs)

    def result(self, timeout: float | None = None) -> dict[str, np.ndarray]:
        while True:
            try:
                return self._request.result(timeout)
            except HetschedError as error:
                self._executable.go_on(error, self._executor)
                self._begin()

    def wait(self, timeout: float | None = None) -> bool:
        return self._request.wait(timeout)

    def schedule(self) -> Schedule:
        return self._request.schedule()


def load_executable(
    path: str | Path, whole: bool = False, fallback: Callable[[str], None] | None = None
) -> Executable:
    """The executable in a package; nothing is compiled.

    All that a run reads is checked; if `whole`, also the weights that only the model has. With a
    `fallback`, such as `print`, runs go on without a device that is missing or fails, which it is
    told; that takes the compiler, and the model, which the package has.

    Raises
    ------
    PackageError
        The file is damaged, foreign, of a newer format, or made for another machine.
    """
    return Executable(*package.read(path, whole), fallback)


def _load_kernel(item: CompiledPart) -> Kernel:
    target = load(Target, item.part.device.target)
    return target.load(item.artifact, item.graph, item.part.device)


def _fitting(tensor: Tensor, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """The array of an input, which must fit exactly: nothing is cast or broadcast."""
    if tensor.name not in inputs:
        raise InputError(f"input '{tensor.name}' is missing; it is {tensor}")
    array = np.asarray(inputs[tensor.name])
    if array.shape != tensor.shape or dtype_of(array) != tensor.dtype:
        found = f"{dtype_of(array)}[{', '.join(map(str, array.shape))}]"
        raise InputError(f"input {tensor} was given {found}")
    return array.astype(numpy_dtype(tensor.dtype), copy=False)
