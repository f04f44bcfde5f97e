"""NVIDIA's processors: kernels in CUDA C by TVM's code generation, run by CUDA's driver."""

import json
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from importlib.util import find_spec
from typing import Any

import numpy as np

from hetsched.cache import default_cache
from hetsched.cuda import compiler, driver, runtime
from hetsched.cuda.devices import capability, count, device, number_of, runs
from hetsched.device import Device
from hetsched.errors import BuildError, CompileError, DeviceError, PackageError
from hetsched.graph import Graph
from hetsched.launches import Program
from hetsched.programs import footprint, generator, given, kept_refusal, program_of
from hetsched.schedules.gpu.limits import Limits
from hetsched.target import Artifact, Begun, Footprint, Kernel, Results, Target

LANGUAGE = "cuda"
CUBIN = "kernels.cubin"
# What TVM tells a device by, beside its tags of known models; more than a group of any can have.
GROUP_ITEMS, LOCAL_NBYTES, WARP = 1024, 48 << 10, 32


@dataclass(frozen=True)
class Cuda(Target):
    """A processor of NVIDIA's, or one that a machine file names by its `isa`.

    That is an architecture such as `sm_87`, or one of TVM's tags, `nvidia/nvidia-h100`. It need not
    be here to compile for: the package has the kernels in CUDA C, and as machine code if a compiler
    of CUDA C is installed.
    """

    def unavailable(self) -> str | None:
        if driver.library() is None and find_spec("tvm") is None:
            return "neither a CUDA driver nor the package apache-tvm is installed"
        return None

    def problems(self) -> tuple[str, ...]:
        try:
            count(driver.driver())
        except (DeviceError, driver.Failed) as error:
            return (str(error),)
        return ()

    def devices(self) -> list[str]:
        if self.problems():
            return []
        return [f"{self.name}:{index}" for index in range(count(driver.driver()))]

    def device(self, name: str) -> Device:
        return device(name, self.name)

    def version(self) -> str:
        return generator()

    def refusal(self, graph: Graph, device: Device) -> str | None:
        # Late, because it loads TVM's compiler.
        from hetsched.lowering.gpu import why_not

        return kept_refusal("gpu", graph, why_not)

    def settings(self, device: Device) -> str:
        limits = device.group_items, device.local_nbytes, device.compute_units
        return f"{device.isa}; {limits}; {compiler.version()}"

    def compile(self, graph: Graph, device: Device) -> Artifact:
        program, weights, arch = self._program(graph, device)
        files = program.files()
        if program.launches and compiler.compiler() is not None:
            try:
                files[CUBIN] = compiler.cubin(program.source, arch)
            except BuildError as error:
                raise CompileError(f"part '{graph.name}': {error}") from error
        return Artifact(files, {**weights, **given(graph)}, requires=arch)

    def footprint(self, graph: Graph, device: Device) -> Footprint | None:
        program, weights, _ = self._program(graph, device)
        return footprint(program, {**weights, **given(graph)})

    def held(self, artifact: Artifact) -> Footprint | None:
        return footprint(Program.from_files(artifact.files, LANGUAGE), artifact.weights)

    def copying(self, device: Device, words: int) -> Kernel:
        return CudaCopying("copy", device)

    def load(self, artifact: Artifact, graph: Graph, device: Device) -> Kernel:
        program = program_of(artifact, graph, LANGUAGE)
        # The device as it is here, whatever a machine file says of it.
        there = self.device(device.name)
        return CudaKernel(program, _code(artifact, program, graph, there), artifact, graph, there)

    def _program(
        self, graph: Graph, device: Device
    ) -> tuple[Program, Mapping[str, np.ndarray], str]:
        """The program, its weights, and the architecture that it is for."""
        from hetsched.lowering.gpu import architecture, program

        if not device.isa:
            raise CompileError(
                f"part '{graph.name}': '{device.name}' has no isa; nvidia/nvidia-h100 or sm_90 "
                "would be one"
            )
        described = _described(device)
        try:
            arch = architecture(described)
            limits = _limits(device, arch)
        except DeviceError as error:
            raise CompileError(f"part '{graph.name}': '{device.name}': {error}") from None
        if not graph.computed:
            return Program(LANGUAGE, "", graph.inputs, (), ()), {}, arch
        return *program(graph, described, limits), arch


class _OnDevice(Kernel):
    """Something that runs on a device, whose errors have its name."""

    asynchronous = True

    def __init__(self, name: str, device: Device) -> None:
        self._name, self._device = name, device.name
        with self.failing("does not load"):
            self._opened = runtime.opened(device)

    @abstractmethod
    def begin(self, inputs: Sequence[Any]) -> "CudaRun":
        """Starts it, and returns at once."""

    def run(self, inputs: Sequence[Any]) -> Sequence[Any]:
        begun = self.begin(inputs)
        begun.finish()
        return begun.outputs

    def receive(self, array: np.ndarray) -> runtime.Resident:
        with self.failing("cannot have its input"):
            return self._opened.receive(np.asarray(array))

    def send(self, buffer: Any) -> np.ndarray:
        with self.failing():
            return self._opened.send(buffer)

    @contextmanager
    def failing(self, what: str = "failed") -> Iterator[None]:
        """Raises an error with the part and its device for whatever the driver answers with."""
        try:
            yield
        except driver.Failed as error:
            raise error.of(f"part '{self._name}' {what}", self._device) from error


class CudaKernel(_OnDevice):
    """A program of launches with its memory on a device."""

    def __init__(
        self, program: Program, code: bytes, artifact: Artifact, graph: Graph, device: Device
    ) -> None:
        super().__init__(graph.name, device)
        with self.failing("does not load"):
            self.loaded = runtime.Loaded(program, code, artifact.weights, device, graph.name)
            constants = {name: self.receive(artifact.weights[name]) for name in given(graph)}
        self._results = Results(graph, constants)

    def begin(self, inputs: Sequence[Any]) -> "CudaRun":
        with self.failing():
            started = self.loaded.start(inputs)
            # What is passed on is copied behind it.
            outputs = self._results.of(started.outputs, inputs, self._opened.copied)
        return CudaRun(self, started, outputs)

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

    def close(self) -> None:
        with self.failing("cannot be unloaded"):
            self.loaded.close()


class CudaCopying(_OnDevice):
    """Copies its one input on the device, by the driver: what links are measured by."""

    def begin(self, inputs: Sequence[Any]) -> "CudaRun":
        (copied,) = inputs
        with self.failing():
            started = runtime.Copying(self._opened, copied)
        return CudaRun(self, started, started.outputs)

    def close(self) -> None:
        pass


@dataclass(frozen=True, eq=False)
class CudaRun(Begun):
    """A call of a kernel that has been started."""

    kernel: _OnDevice
    started: runtime.Started | runtime.Copying
    outputs: Sequence[Any]

    def finish(self) -> tuple[float, float]:
        with self.kernel.failing():
            return self.started.finish()


def _code(artifact: Artifact, program: Program, graph: Graph, device: Device) -> bytes:
    """The machine code of a part for a device that is here.

    Raises
    ------
    PackageError
        There is none for it, and no compiler that could make it.
    """
    if not program.launches:
        return b""
    made = artifact.files.get(CUBIN)
    try:
        if made is not None and runs(artifact.requires, device.isa):
            return made
    except DeviceError as error:
        raise PackageError(f"part '{graph.name}' is damaged: {error}") from None
    if compiler.compiler() is None:
        there = f"is for {artifact.requires}" if made is not None else "is in CUDA C"
        raise PackageError(
            f"part '{graph.name}' {there}, and '{device.name}' is {device.isa}: {compiler.MISSING}"
        )
    decisive = compiler.version(), device.isa, program.source
    key = sha256(json.dumps(decisive).encode()).hexdigest()
    kept = default_cache()
    found = kept.read(key)
    if found is None or CUBIN not in found.files:
        try:
            found = Artifact({CUBIN: compiler.cubin(program.source, device.isa)})
        except BuildError as error:
            raise error.of(device.name) from None
        kept.keep(key, found)
    return found.files[CUBIN]


def _described(device: Device) -> Mapping[str, Any] | str:
    """TVM's target for a device, or its tag of one."""
    if "/" in device.isa:
        return device.isa
    return {
        "kind": "cuda",
        "arch": device.isa,
        "max_num_threads": device.group_items or GROUP_ITEMS,
        "max_threads_per_block": device.group_items or GROUP_ITEMS,
        "max_shared_memory_per_block": device.local_nbytes or LOCAL_NBYTES,
        "thread_warp_size": WARP,
    }


def _limits(device: Device, arch: str) -> Limits:
    unit = capability(arch)
    number_of(arch)
    return Limits(
        units=device.compute_units or Limits().units,
        lanes=unit.lanes,
        threads_group=device.group_items or GROUP_ITEMS,
        threads_unit=unit.threads,
        shared_nbytes_group=min(device.local_nbytes or LOCAL_NBYTES, LOCAL_NBYTES),
        shared_nbytes_unit=unit.shared_nbytes,
        warp=WARP,
    )
