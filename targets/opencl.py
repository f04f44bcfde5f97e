"""OpenCL devices: kernels of TVM's code generation in OpenCL C, run by pyopencl."""

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from hetsched.device import Device
from hetsched.errors import (
    CompileError,
    DeviceError,
    DeviceLost,
    HetschedError,
    PackageError,
    PluginError,
)
from hetsched.graph import Graph
from hetsched.host import cores
from hetsched.launches import INPUT, OUTPUT, Launch, Place, Program
from hetsched.native import crew_code, damage_of, linker_for, opened
from hetsched.op import Tensor
from hetsched.opencl.devices import VENDORS, VENDORS_VARIABLE, device, select, survey
from hetsched.programs import footprint, generator, given, kept_refusal, program_of
from hetsched.schedules.gpu.limits import Limits
from hetsched.schedules.rules import WINOGRAD, Rules
from hetsched.schedules.vectors import Vectors
from hetsched.target import Artifact, Begun, Code, Footprint, Kernel, Results, Target

LANGUAGE = "opencl"
# The features without which no kernel has values of a type.
NEEDED = {"float16": "fp16", "float64": "fp64"}
# What OpenCL promises of any device, and what its kernels use at most.
GROUP_ITEMS, LOCAL_NBYTES = 64, 32 << 10
MOST_GROUP_ITEMS, MOST_LOCAL_NBYTES = 256, 32 << 10
# What calls OpenCL without Python, where device and host share memory.
CREW = "crew.so"
# Copies words, each work-item those that lie together.
COPYING = """__attribute__((reqd_work_group_size({groups}, 1, 1)))
__kernel void copy_words(__global const long* restrict given, __global long* restrict made) {{
  size_t first = get_global_id(0) * {each};
  for (int i = 0; i < {each}; ++i) made[first + i] = given[first + i] + 1;
}}
"""


@dataclass(frozen=True)
class Opencl(Target):
    """Whatever OpenCL runs on here: GPUs, and by PoCL the processor's cores.

    A device that computes on the processor gets the loops of the `cpu` target, a GPU kernels by
    the rules for GPUs. `winograd` says how the processor computes convolutions by 3 x 3, as for
    `cpu`.
    """

    winograd: str = "auto"
    can_copy: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.winograd not in WINOGRAD:
            there = ", ".join(WINOGRAD)
            raise PluginError(f"'{self.winograd}' is no winograd of opencl; there are {there}")

    def unavailable(self) -> str | None:
        found = survey()
        if any(one.available for one in found.devices):
            return None
        if found.problems:
            return "; ".join(found.problems)
        if found.devices:
            return "; ".join(f"{one} is not available, says its driver" for one in found.devices)
        place = os.environ.get(VENDORS_VARIABLE) or VENDORS
        return (
            f"no OpenCL driver in {place} has a device; "
            "Debian's pocl-opencl-icd runs OpenCL on the processor"
        )

    def problems(self) -> tuple[str, ...]:
        return survey().problems

    def devices(self) -> list[str]:
        order = ("gpu", "accelerator", "other", "cpu")
        found = [(index, one) for index, one in enumerate(survey().devices) if one.available]
        found.sort(key=lambda item: order.index(item[1].kind))
        return [f"{self.name}:{index}" for index, _ in found]

    def device(self, name: str) -> Device:
        return device(name, self.name)

    def picks_cores(self, name: str) -> bool:
        try:
            return "@" not in name and bool(select(name, self.name)[1])
        except DeviceError:
            return False

    def beside(self, name: str, taken: Collection[int]) -> Device:
        left = [core for core in cores() if core not in taken]
        if len(left) in (0, len(cores())):
            return self.device(name)
        # A device string has cores that follow each other: the most of them, the first ones.
        runs: list[list[int]] = []
        for core in left:
            if runs and runs[-1][-1] + 1 == core:
                runs[-1].append(core)
            else:
                runs.append([core])
        chosen = max(runs, key=len)
        where = f"{chosen[0]}-{chosen[-1]}" if len(chosen) > 1 else f"{chosen[0]}"
        return self.device(f"{name if ':' in name else f'{name}:0'}@{where}")

    def version(self) -> str:
        return f"{generator()}, winograd {self.winograd}"

    def refusal(self, graph: Graph, device: Device) -> str | None:
        # Late, because it loads TVM's compiler.
        from hetsched.lowering import gpu, opencl

        if device.kind != "cpu" and (lack := _lack(graph, device)):
            return lack
        if device.kind == "cpu":
            return kept_refusal(self.name, graph, opencl.why_not)
        return kept_refusal("gpu", graph, gpu.why_not)

    def lanes(self, device: Device) -> int | None:
        return Vectors.of(device.isa).lanes if device.kind == "cpu" else None

    def settings(self, device: Device) -> str:
        limits = device.group_items, device.local_nbytes, device.compute_units
        return f"{device.kind}; {device.isa}; {device.threads} threads; {limits}"

    def compile(self, graph: Graph, device: Device) -> Artifact:
        program, weights = self._program(graph, device)
        files = program.files()
        if (crew := self.crew(device)) is not None:
            files[CREW] = crew
        return Artifact(files, {**weights, **given(graph)})

    def crew(self, device: Device) -> bytes | None:
        # On other devices a driver may copy what a call is lent.
        linker = linker_for(device.isa) if device.kind == "cpu" else None
        return crew_code(linker, "-shared") if linker is not None else None

    def prepare(self, artifact: Artifact, device: Device) -> None:
        # Late, because it loads pyopencl and starts drivers.
        from hetsched.opencl import runtime

        # A failure, or that it is another machine's, is told by who loads it.
        with suppress(runtime.Failed, DeviceError):
            runtime.prepare(Program.from_files(artifact.files, LANGUAGE), device)

    def footprint(self, graph: Graph, device: Device) -> Footprint | None:
        program, weights = self._program(graph, device)
        return footprint(program, {**weights, **given(graph)})

    def held(self, artifact: Artifact) -> Footprint | None:
        return footprint(Program.from_files(artifact.files, LANGUAGE), artifact.weights)

    def copying(self, device: Device, words: int) -> Kernel:
        # On the processor each unit copies what lies together, on others each item a word.
        wanted = device.compute_units if device.kind == "cpu" else words
        items = next(n for n in range(min(words, wanted), 0, -1) if words % n == 0)
        groups = 64 if device.kind != "cpu" and items % 64 == 0 else 1
        given, made = Tensor("given", (words,), "int64"), Tensor("made", (words,), "int64")
        arguments = (
            Place(INPUT, 0, 0, given.nbytes),
            Place(OUTPUT, 0, 0, made.nbytes, written=True),
        )
        launch = Launch("copy_words", (items,), (groups,), arguments)
        source = COPYING.format(each=words // items, groups=groups)
        program = Program(LANGUAGE, source, (given,), (made,), (launch,))
        return OpenclKernel(program, {}, device, "copy", library=self.crew(device))

    def load(self, artifact: Artifact, graph: Graph, device: Device) -> Kernel:
        program = program_of(artifact, graph, LANGUAGE)
        library = artifact.files.get(CREW)
        if library is not None and (damage := damage_of(library)) is not None:
            raise PackageError(f"part '{graph.name}' is damaged: {CREW} {damage}")
        return OpenclKernel(program, artifact.weights, device, graph.name, graph, library)

    def _program(self, graph: Graph, device: Device) -> tuple[Program, Mapping[str, np.ndarray]]:
        if not graph.computed:
            return Program(LANGUAGE, "", graph.inputs, (), ()), {}
        # Late, because they load TVM's compiler.
        from hetsched.lowering import gpu, opencl

        if device.kind == "cpu":
            rules = Rules(Vectors.of(device.isa), device.threads, winograd=self.winograd)
            return opencl.program(graph, rules, max(1, device.compute_units))
        if lack := _lack(graph, device):
            raise CompileError(f"part '{graph.name}': {lack}")
        return gpu.program(graph, _described(device), _limits(device))


class OpenclKernel(Kernel):
    """A program of launches with its buffers, on an opened device.

    Buffers are arrays where the device computes in the host's memory, and else `Resident` ones.
    """

    def __init__(
        self,
        program: Program,
        weights: Mapping[str, np.ndarray],
        device: Device,
        name: str,
        graph: Graph | None = None,
        library: bytes | None = None,
    ) -> None:
        # Late, because it loads pyopencl and starts drivers.
        from hetsched.opencl import runtime

        self._runtime = runtime
        self._name, self._device = name, device.name
        self._shares_memory = device.memory_space == "host"
        # By the thread that calls, or by the driver's own.
        self.any_thread = self._shares_memory
        self._results: Results | None = None
        self._library = library
        try:
            self.loaded = runtime.Loaded(program, weights, device, name)
            if graph is not None:
                constants = {name: self.receive(weights[name]) for name in given(graph)}
                self._results = Results(graph, constants)
        except runtime.Failed as error:
            raise error.of(f"part '{name}' does not load", device.name) from error
        # Whether what it begins goes on while the caller does something else.
        self.asynchronous = not self.loaded.opened.on_caller
        self._caller = self._calling()

    def run(self, inputs: Sequence[Any]) -> Sequence[Any]:
        if self._caller is not None:
            outputs: Sequence[Any] = self._caller(inputs)
            return outputs
        begun = self.begin(inputs)
        begun.finish()
        return begun.outputs

    def begin(self, inputs: Sequence[Any]) -> "OpenclRun":
        return OpenclRun(self, inputs)

    def code(self) -> Code | None:
        if self._library is None or (self._results and not self._results.all_computed):
            return None
        # Late, as above.
        from hetsched.opencl import crew

        return crew.code(self.loaded, opened(self._library))

    def bind(self, inputs: Sequence[Any]) -> Callable[[], Sequence[Any]]:
        return super().bind(inputs) if self._caller is None else self._caller.bound(inputs)

    def _calling(self) -> Any:
        """What runs it without Python, where it may keep the thread that calls."""
        code = self.code() if self.loaded.opened.on_caller else None
        if code is None:
            return None
        # Late, as above.
        from hetsched.opencl import crew

        return crew.Caller(self.loaded, code, self._failure)

    def seconds(self, inputs: Sequence[Any]) -> list[tuple[str, float]]:
        """The kernel of each launch, in order, and what it took by the device's own clock.

        Raises
        ------
        PartError, DeviceError
            A launch failed.
        """
        with self.failing():
            started = self.loaded.start(inputs, stamped=True)
            started.finish()
            names = [launch.kernel for launch in self.loaded.program.launches]
            return list(zip(names, started.seconds(), strict=True))

    def receive(self, array: np.ndarray) -> Any:
        return array if self._shares_memory else self.loaded.opened.receive(array)

    def send(self, buffer: Any) -> np.ndarray:
        if self._shares_memory:
            return np.asarray(buffer)
        return self.loaded.opened.send(buffer)

    def close(self) -> None:
        self._caller = None
        self.loaded.close()

    def results(self, computed: Sequence[Any], inputs: Sequence[Any]) -> Sequence[Any]:
        """The part's outputs, of what was computed and what it was given."""
        if self._results is None:
            return computed
        copied = np.copy if self._shares_memory else self.loaded.opened.copied
        return self._results.of(computed, inputs, copied)

    @contextmanager
    def failing(self) -> Iterator[None]:
        """Raises an error with the part and its device for whatever OpenCL answers with."""
        try:
            yield
        except self._runtime.Failed as error:
            raise self._failure(error) from error

    def _failure(self, error: Any) -> HetschedError:
        """What a user meets of what OpenCL answers with in a run."""
        found: HetschedError = error.of(f"part '{self._name}' failed", self._device)
        if isinstance(found, DeviceLost):
            self._runtime.forget(self.loaded.opened)
        return found


class OpenclRun(Begun):
    """A call of a kernel that has been enqueued."""

    def __init__(self, kernel: OpenclKernel, inputs: Sequence[Any]) -> None:
        self._kernel = kernel
        with kernel.failing():
            self._started = kernel.loaded.start(inputs)
        self.outputs = kernel.results(self._started.outputs, inputs)

    def finish(self) -> tuple[float, float]:
        with self._kernel.failing():
            return self._started.finish()


def _described(device: Device) -> Mapping[str, Any]:
    """TVM's target for a device that is no processor."""
    return {
        "kind": "opencl",
        "max_num_threads": device.group_items or GROUP_ITEMS,
        "max_threads_per_block": device.group_items or GROUP_ITEMS,
        "max_shared_memory_per_block": device.local_nbytes or LOCAL_NBYTES,
        # Work-items of a group need not run in step.
        "thread_warp_size": 1,
    }


def _limits(device: Device) -> Limits:
    return Limits(
        units=device.compute_units or Limits().units,
        threads_group=min(device.group_items or GROUP_ITEMS, MOST_GROUP_ITEMS),
        shared_nbytes_group=min(device.local_nbytes or LOCAL_NBYTES, MOST_LOCAL_NBYTES),
        warp=1,
    )


def _lack(graph: Graph, device: Device) -> str | None:
    """The tensor of a type that a device which is no processor cannot compute with, if any."""
    tensors = (*graph.inputs, *(tensor for op in graph.ops for tensor in op.writes))
    for tensor in tensors:
        feature = NEEDED.get(tensor.dtype)
        if feature is not None and feature not in device.isa.split():
            return f"'{tensor.name}' is {tensor.dtype}, and '{device.name}' has no {feature}"
    return None
