"""A step of a run, and a run: in flight, or over and measured."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from time import perf_counter

import numpy as np

from hetsched.device import Device
from hetsched.dtype import numpy_dtype
from hetsched.errors import DeviceError, PartError
from hetsched.graph import Graph
from hetsched.op import in_blocks
from hetsched.schedule import Schedule, Slot, Transfer
from hetsched.target import Kernel


def _no_kernel() -> Kernel:
    raise NotImplementedError("a step of a plan, or one of code alone, has no kernel to load")


@dataclass(frozen=True, eq=False)
class Step:
    """A part as the executor sees it; `load` makes its kernel, in the worker's thread.

    A step that only says what is read and written, or that is run by its code, has none.
    """

    name: str
    device: Device
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    load: Callable[[], Kernel] = _no_kernel
    label: str = ""

    def __str__(self) -> str:
        return f"{self.name} on '{self.device.name}'"


@dataclass(frozen=True)
class View:
    """Tensors that lie one behind the other, `pieces` by name, as one of this shape and dtype."""

    pieces: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: np.dtype

    def copied(self, pieces: Sequence[np.ndarray]) -> np.ndarray:
        """The whole, of pieces that lie elsewhere."""
        return np.concatenate([piece.reshape(-1) for piece in pieces]).reshape(self.shape)


def views_between(graph: Graph, parts: Iterable[Graph]) -> dict[str, View]:
    """What is joined in `graph` without a copy, as its `parts` make and read it."""
    packed = {name: lanes for part in parts for name, lanes in part.packed.items()}
    found = {}
    for name, pieces in graph.views.items():
        whole = graph.producers[name].output()
        shape = in_blocks(whole.shape, packed[name]) if name in packed else whole.shape
        found[name] = View(tuple(piece.name for piece in pieces), shape, numpy_dtype(whole.dtype))
    return found


class Run:
    """When the steps and transfers of one run took place; its time counts from the start."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self.started = perf_counter()
        self._steps = steps
        # Of steps (index, start, finish), as the clock had it.
        self._slots: list[tuple[int, float, float]] = []
        self._transfers: list[Transfer] = []

    def schedule(self) -> Schedule:
        """The measured schedule; waits for the end of the run.

        With a device that is modelled it is the run on one virtual clock: each step takes the time
        that was measured, or that its device tells, and starts when its device is free and its
        inputs are there. A step of such a device hands over within its own time.
        """
        clock = "measured"
        times = [(i, self.since(start), self.since(end)) for i, start, end in self._slots]
        transfers = tuple(sorted(self._transfers, key=lambda move: move.start))
        if any(step.device.modelled for step in self._steps):
            clock += ", modelled"
            times, transfers = self._replayed(times, transfers)
        slots = [
            Slot(self._steps[i].name, self._steps[i].device.name, start, finish)
            for i, start, finish in times
        ]
        return Schedule(
            tuple(sorted(slots, key=lambda slot: slot.start)),
            transfers,
            clock,
            {step.name: step.label for step in self._steps},
        )

    def _replayed(
        self, times: Sequence[tuple[int, float, float]], transfers: Sequence[Transfer]
    ) -> tuple[list[tuple[int, float, float]], tuple[Transfer, ...]]:
        """Steps and transfers where they are without what it took to simulate."""
        moves = {(move.tensor, move.sink): move for move in transfers}
        there: dict[tuple[str, str | None], float] = {}
        made: dict[str, float] = {}
        free: dict[str, float] = {}
        found, moved = [], {}
        for index, begin, end in sorted(times, key=lambda item: item[1]):
            step = self._steps[index]
            start = free.get(step.device.unit, 0.0)
            for name in step.inputs:
                key = (name, step.device.name)
                if key not in there:
                    there[key] = made.get(name, 0.0)
                    if key in moves and name in made:
                        move = moves[key]
                        there[key] += move.finish - move.start
                        moved[key] = replace(move, start=made[name], finish=there[key])
                start = max(start, there[key])
            finish = start + end - begin
            free[step.device.unit] = finish
            made.update(dict.fromkeys(step.outputs, finish))
            found.append((index, start, finish))
        return found, tuple(sorted(moved.values(), key=lambda move: move.start))

    def since(self, time: float) -> float:
        return time - self.started

    def record(self, index: int, start: float, finish: float) -> None:
        self._slots.append((index, start, finish))

    def record_transfer(self, transfer: Transfer) -> None:
        self._transfers.append(transfer)


class Request(Run, ABC):
    """One run in flight."""

    def __init__(self, steps: Sequence[Step]) -> None:
        super().__init__(steps)
        self._result: dict[str, np.ndarray] = {}
        self._error: BaseException | None = None

    def result(self, timeout: float | None = None) -> dict[str, np.ndarray]:
        """The outputs by name, once they are there.

        Raises
        ------
        PartError
            A part failed; the message has its name.
        TimeoutError
            They are not there within `timeout` seconds.
        """
        if not self.wait(timeout):
            raise TimeoutError(f"no result within {timeout} seconds")
        if self._error is not None:
            raise self._error
        return self._result

    @abstractmethod
    def wait(self, timeout: float | None = None) -> bool:
        """Whether the run has ended, well or not, within `timeout` seconds."""

    def schedule(self) -> Schedule:
        self.wait()
        return super().schedule()


def failure(what: object, device: str | None, error: Exception) -> PartError:
    """Whatever a kernel of `device`, or of the host, raises, as an error that says where."""
    if isinstance(error, DeviceError):
        error.of(device or "")
    return PartError(f"{what} failed: {one_line(error)}")


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or repr(error)
