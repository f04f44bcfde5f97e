"""What compiles a part for a device, and what runs it there."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from ctypes import CDLL
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from types import TracebackType
from typing import Any, ClassVar

import numpy as np

from hetsched.device import Device
from hetsched.errors import HetschedError, PluginError
from hetsched.graph import Graph
from hetsched.plugin import Plugin
from hetsched.trial import Step, Trial


@dataclass(frozen=True, eq=False)
class Artifact:
    """A compiled part: bytes that load without a compiler.

    `files` hold the code, by file name. `weights` are the arrays that the code reads, kept apart
    so that a package stores each once and maps it into memory; their order and names are the
    target's own. `requires` says what the device must have, as `Target.requirements` says it.
    """

    files: Mapping[str, bytes]
    weights: Mapping[str, np.ndarray] = field(default_factory=dict)
    requires: str = ""


@dataclass(frozen=True)
class Footprint:
    """What a loaded part holds beside its inputs and outputs.

    `weights` are the bytes of each array that the code reads, by the array's name: parts of one
    plan share those of one name. `own_nbytes`, small weights and the workspace, are held as long as
    the part is loaded. `temporaries` are what functions of the part hold at once, for each call in
    order: a pool of the thread keeps that for the next one.
    """

    weights: Mapping[str, int]
    own_nbytes: int
    temporaries: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, eq=False)
class Code:
    """A loaded part as machine code on the host's memory, for threads that need no Python.

    `function` is the address of a function by TVM's convention of calls. It takes the address of a
    table; `inputs` and `outputs` are the cells with the addresses of those tensors, compact and in
    the order of the graph, and `results` the shapes and dtypes of the outputs. `table` has the
    other cells; each caller needs a copy. One thread at a time may call it, after `enter`, which
    prepares a thread for code of so many `threads` or fewer. `module` has the functions of
    `crew.c`. `raised` tells once, on the thread of a call that failed, what failed, if that is
    known; `failed` makes an error of what the function gave. It is valid until the kernel is
    closed.

    Code with `allocate` takes a tensor more quickly that lies in memory which that has made, of so
    many bytes; `within` are the cells for the begin and the end of that. Else they are 0.
    """

    function: int
    table: np.ndarray
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    results: tuple[tuple[tuple[int, ...], np.dtype], ...]
    threads: int
    enter: Callable[[], None]
    module: CDLL
    raised: Callable[[], str] = str
    allocate: Callable[[int], np.ndarray] | None = None
    within: tuple[int, int] | None = None
    failed: Callable[[int], HetschedError] | None = None


class Results:
    """How the outputs of a part come to be: computed, or passed on, inputs or `constants` by name.

    `computed` is how many an operation makes; `all_computed`, that there are no others.
    """

    def __init__(self, graph: Graph, constants: Mapping[str, Any]) -> None:
        self._constants = list(constants.values())
        passed = [tensor.name for tensor in (*graph.computed, *graph.inputs)]
        names = [*passed, *constants]
        self.computed = len(graph.computed)
        self._picks = [names.index(tensor.name) for tensor in graph.outputs]
        self.all_computed = self._picks == list(range(self.computed))

    def of(
        self,
        computed: Sequence[Any],
        inputs: Sequence[Any],
        copied: Callable[[Any], Any] = np.copy,
    ) -> Sequence[Any]:
        """The outputs, in the order of the graph.

        What is passed on is `copied`: the caller may write to an input, or to a result.
        """
        if self.all_computed:
            return computed
        there = [*computed, *inputs, *self._constants]
        return [there[i] if i < self.computed else copied(there[i]) for i in self._picks]


class Begun(ABC):
    """A call of a kernel that has been handed to its device and may still be running there.

    `outputs` are the buffers that it writes: calls on the same device that begin later may read
    them at once.
    """

    outputs: Sequence[Any]

    @abstractmethod
    def finish(self) -> tuple[float, float]:
        """When the device began and ended, by `perf_counter`; waits for the end, without Python's
        lock.

        Raises
        ------
        PartError
            The call failed.
        """


@dataclass(frozen=True, eq=False)
class Done(Begun):
    """A call that has ended."""

    outputs: Sequence[Any]
    times: tuple[float, float]

    def finish(self) -> tuple[float, float]:
        return self.times


class Kernel(ABC):
    """A part that is loaded on its device.

    `run` is called by one thread, the worker of the device; `receive` and `send` also by those that
    hand tensors over, while `run` works. A buffer is whatever the device computes on. Where device
    and host share memory it is a numpy array, or made from one without a copy.
    """

    # Whether any thread may run it, if one at a time, and on arrays as they are.
    any_thread = False
    # Whether `begin` returns before the device has computed.
    asynchronous = False

    @abstractmethod
    def run(self, inputs: Sequence[Any]) -> Sequence[Any]:
        """The part's output buffers for its input buffers, in the order of its graph."""

    def begin(self, inputs: Sequence[Any]) -> Begun:
        """`run`, without waiting for the end where the kernel is `asynchronous`.

        Calls on one device take place in the order in which they begin.
        """
        start = perf_counter()
        outputs = self.run(inputs)
        return Done(outputs, (start, perf_counter()))

    def bind(self, inputs: Sequence[Any]) -> Callable[[], Sequence[Any]]:
        """`run` on these very buffers, whose values may change between the calls.

        What a call returns may be the same buffers as before, with new values.
        """
        return partial(self.run, inputs)

    def code(self) -> Code | None:
        """`run` without Python, where it is no more than a call on addresses."""
        return None

    def receive(self, array: np.ndarray) -> Any:
        """A buffer on this device with the values of `array`; not to be written to."""
        return array

    def send(self, buffer: Any) -> np.ndarray:
        """The values of a buffer as an array on the host; a view where memory is shared."""
        return np.asarray(buffer)

    @abstractmethod
    def close(self) -> None:
        """Frees what the kernel holds; it is not run any more."""

    def __enter__(self) -> "Kernel":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Target(Plugin):
    """A compiler and loader for one kind of device. Importing its file needs no heavy library."""

    package = "hetsched.targets"
    # Whether a device that shares the host's memory copies if its `memory_space` is another.
    can_copy: ClassVar[bool] = False

    @abstractmethod
    def unavailable(self) -> str | None:
        """Why nothing can be compiled or run here, or None."""

    def problems(self) -> tuple[str, ...]:
        """What is wrong with drivers of this machine, though others may work; a line for each."""
        return ()

    @abstractmethod
    def devices(self) -> list[str]:
        """The device strings that this machine has, the most capable first."""

    @abstractmethod
    def device(self, name: str) -> Device:
        """The device that `name` means on this machine.

        Raises
        ------
        DeviceError
            There is no such device here; the message says what there is.
        """

    def picks_cores(self, name: str) -> bool:
        """Whether the device of this string, by the string alone, occupies what cores are left."""
        return False

    def beside(self, name: str, taken: Collection[int]) -> Device:
        """`device` on a machine where others have `taken` cores, for one that picks its own.

        Where none is left, it shares all of them.

        Raises
        ------
        DeviceError
            As `device`.
        """
        return self.device(name)

    @abstractmethod
    def version(self) -> str:
        """Compiler and version; what it was tuned to belongs to one."""

    def configuration(self, device: Device) -> str:
        """The version and what it is tuned to on `device`; measured times are kept apart by it."""
        return self.version()

    @abstractmethod
    def refusal(self, graph: Graph, device: Device) -> str | None:
        """Why `graph` cannot be compiled for `device`, or None.

        Quick, so that a partitioner can ask for each kernel group.
        """

    def seconds(self, graph: Graph, device: Device) -> float | None:
        """What one run of `graph` takes on a device that is `modelled`.

        None, the default, where the target does not know: then a cost model is asked.

        Raises
        ------
        UnsupportedOperation
            It is refused.
        """
        return None

    def units(self, graph: Graph, device: Device) -> int:
        """By how many units bytes of `graph` may differ from ONNX Runtime's on `device`.

        None at all, by default. A device that rounds otherwise has one, or more.
        """
        return 0

    def lanes(self, device: Device) -> int | None:
        """The channels in a block of what parts on `device` hand over (`forms.py`), if they can."""
        return None

    def settings(self, device: Device) -> str | None:
        """What beside graph, options and version decides what `compile` makes for `device`.

        Artifacts are kept on disk by it. None, the default, where compiling is so quick that none
        need be kept.
        """
        return None

    @abstractmethod
    def compile(self, graph: Graph, device: Device) -> Artifact:
        """The part as an artifact. Several threads may call this at once.

        Raises
        ------
        CompileError
            The compiler refuses it.
        """

    def prepare(self, artifact: Artifact, device: Device) -> None:
        """Does ahead what `load` would have to do once here, such as a driver's compiling.

        Several threads may call this at once.
        """

    def footprint(self, graph: Graph, device: Device) -> Footprint | None:
        """What `graph` would hold on `device`, exactly, before it is compiled.

        None, the default, where the target cannot tell.

        Raises
        ------
        CompileError
            The compiler refuses it.
        """
        return None

    def held(self, artifact: Artifact) -> Footprint | None:
        """What a compiled part holds when it is loaded; None where the target cannot tell."""
        return None

    def crew(self, device: Device) -> bytes | None:
        """The shared library of `crew.c` for `device`, if parts hand over there without Python."""
        return None

    def copying(self, device: Device, words: int) -> Kernel | None:
        """What adds one to `words` integers of 64 bits on `device`: to measure by.

        None, the default, where code on the host's memory does it.
        """
        return None

    def tuners(self) -> tuple[str, ...]:
        """The ways to tune this target, the usual one first."""
        return ()

    def trials(
        self, graph: Graph, device: Device, tuner: str, count: int, known: Collection[Trial]
    ) -> Iterator[Trial | Step]:
        """Candidates for the kernels of `graph`, measured on `device` as `tuner` does it.

        At most `count` are tried of a kernel. Trials that are `known` are yielded as they are. A
        step says what comes next. What is yielded belongs into the user's store, from where
        `compile` takes its choices.

        Raises
        ------
        CompileError
            The compiler refuses the graph.
        """
        raise PluginError(f"target '{self.name}' has no tuner")

    @abstractmethod
    def load(self, artifact: Artifact, graph: Graph, device: Device) -> Kernel:
        """The artifact of `graph`, ready to run on `device`; needs no compiler.

        Raises
        ------
        PackageError
            The artifact is damaged, or needs what this device lacks.
        """
