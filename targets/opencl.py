"""OpenCL devices: kernels of TVM's code generation in OpenCL C, run by pyopencl."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from hetsched import lowering, schedules
from hetsched.device import Device
from hetsched.errors import PackageError, PartError
from hetsched.graph import Graph, to_onnx
from hetsched.launches import Program
from hetsched.opencl_devices import VENDORS, VENDORS_VARIABLE, device, survey
from hetsched.schedules.rules import Rules
from hetsched.schedules.vectors import Vectors
from hetsched.target import Artifact, Footprint, Kernel, Results, Target

LANGUAGE = "opencl"

# Refusals by structure, for the groups that a network repeats.
_refusals: dict[tuple[str, bytes], str | None] = {}


@dataclass(frozen=True)
class Opencl(Target):
    """Whatever OpenCL runs on here: GPUs, and by PoCL the processor's cores.

    A device that computes on the processor gets the loops of the `cpu` target, a GPU kernels by
    the rules for GPUs.
    """

    def unavailable(self) -> str | None:
        if find_spec("pyopencl") is None:
            return "the package pyopencl is not installed"
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

    def version(self) -> str:
        return f"tvm {_installed('apache-tvm')}, rules {_rules()}"

    def refusal(self, graph: Graph, device: Device) -> str | None:
        # Late, because it loads TVM's compiler.
        from hetsched.lowering.opencl import refusal_of

        structure = to_onnx(graph, weights=False)
        structure.graph.name = ""
        key = self.settings(device), structure.SerializeToString(deterministic=True)
        if key not in _refusals:
            _refusals[key] = refusal_of(graph, device, self._rules(device))
        return _refusals[key]

    def lanes(self, device: Device) -> int | None:
        return Vectors.of(device.isa).lanes if device.kind == "cpu" else None

    def settings(self, device: Device) -> str:
        limits = device.group_items, device.local_nbytes, device.compute_units
        return f"{device.kind}; {device.isa}; {device.threads} threads; {limits}"

    def compile(self, graph: Graph, device: Device) -> Artifact:
        program, weights = self._program(graph, device)
        given = {
            t.name: graph.constants[t.name] for t in graph.outputs if t.name in graph.constants
        }
        return Artifact(program.files(), {**weights, **given})

    def footprint(self, graph: Graph, device: Device) -> Footprint | None:
        program, weights = self._program(graph, device)
        given = {
            t.name: graph.constants[t.name] for t in graph.outputs if t.name in graph.constants
        }
        return _footprint(program, {**weights, **given})

    def held(self, artifact: Artifact) -> Footprint | None:
        return _footprint(Program.from_files(artifact.files, LANGUAGE), artifact.weights)

    def load(self, artifact: Artifact, graph: Graph, device: Device) -> Kernel:
        return OpenclKernel(artifact, graph, device)

    def _program(self, graph: Graph, device: Device) -> tuple[Program, Mapping[str, np.ndarray]]:
        if not graph.computed:
            return Program(LANGUAGE, "", graph.inputs, (), ()), {}
        from hetsched.lowering.opencl import program

        return program(graph, device, self._rules(device))

    def _rules(self, device: Device) -> Rules:
        return Rules(Vectors.of(device.isa or "opencl"), device.threads)


class OpenclKernel(Kernel):
    """A program of launches with its buffers, on an opened device.

    Buffers are arrays where the device computes in the host's memory, and else `Resident` ones.
    """

    # What it begins goes on while the caller does something else.
    asynchronous = True

    def __init__(self, artifact: Artifact, graph: Graph, device: Device) -> None:
        # Late, because it loads pyopencl and starts drivers.
        from hetsched import opencl

        self._opencl = opencl
        self._name = graph.name
        self._shares_memory = device.memory_space == "host"
        # By the thread that calls, or by the driver's own.
        self.any_thread = self._shares_memory
        try:
            program = Program.from_files(artifact.files, LANGUAGE)
        except PackageError as error:
            raise PackageError(f"part '{graph.name}' is damaged: {error}") from None
        given = _given(graph)
        _check(program, graph, given, artifact.weights)
        try:
            self.loaded = opencl.Loaded(program, artifact.weights, device, graph.name)
            constants = {name: self.receive(artifact.weights[name]) for name in given}
        except opencl.Failed as error:
            raise PartError(f"part '{graph.name}' does not load: {error}") from error
        self._results = Results(graph, constants)

    def run(self, inputs: Sequence[Any]) -> Sequence[Any]:
        begun = self.begin(inputs)
        begun.finish()
        return begun.outputs

    def begin(self, inputs: Sequence[Any]) -> "OpenclRun":
        return OpenclRun(self, inputs)

    def seconds(self, inputs: Sequence[Any]) -> list[tuple[str, float]]:
        """The kernel of each launch, in order, and what it took by the device's own clock.

        Raises
        ------
        PartError
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
        self.loaded.close()

    def results(self, computed: Sequence[Any], inputs: Sequence[Any]) -> Sequence[Any]:
        """The part's outputs, of what was computed and what it was given."""
        copied = np.copy if self._shares_memory else self.loaded.opened.copied
        return self._results.of(computed, inputs, copied)

    @contextmanager
    def failing(self) -> Iterator[None]:
        """Raises a `PartError` with the part's name for whatever OpenCL answers with."""
        try:
            yield
        except self._opencl.Failed as error:
            raise PartError(f"part '{self._name}' failed: {error}") from error


class OpenclRun:
    """A call of a kernel that has been enqueued."""

    def __init__(self, kernel: OpenclKernel, inputs: Sequence[Any]) -> None:
        self._kernel = kernel
        with kernel.failing():
            self._started = kernel.loaded.start(inputs)
        self.outputs = kernel.results(self._started.outputs, inputs)

    def finish(self) -> tuple[float, float]:
        with self._kernel.failing():
            return self._started.finish()


def _given(graph: Graph) -> dict[str, np.ndarray]:
    """The outputs that are constants."""
    names = [tensor.name for tensor in graph.outputs]
    return {name: graph.constants[name] for name in names if name in graph.constants}


def _check(
    program: Program, graph: Graph, given: Iterable[str], weights: Mapping[str, np.ndarray]
) -> None:
    """
    Raises
    ------
    PackageError
        The program is not that of the graph, or its weights are not these.
    """
    damaged = f"part '{graph.name}' is damaged:"
    for what, own, tensors in (
        ("inputs", program.inputs, graph.inputs),
        ("outputs", program.outputs, graph.computed),
    ):
        expected = [(t.shape, t.dtype) for t in map(graph.handed, tensors)]
        if [(t.shape, t.dtype) for t in own] != expected:
            raise PackageError(f"{damaged} its program has other {what} than the part")
    for name in (*program.weights, *given):
        if name not in weights:
            raise PackageError(f"{damaged} there is no weight '{name}'")
    for name, nbytes in program.weights.items():
        if weights[name].nbytes != nbytes:
            raise PackageError(
                f"{damaged} weight '{name}' has {weights[name].nbytes} bytes, not {nbytes}"
            )


def _footprint(program: Program, weights: Mapping[str, np.ndarray]) -> Footprint:
    own = len(program.constants) + program.workspace_nbytes
    return Footprint({name: array.nbytes for name, array in weights.items()}, own)


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


@cache
def _rules() -> str:
    """A digest of what shapes the code beside TVM: with other rules, times are others too."""
    digest = sha256()
    for package in (lowering, schedules):
        for path in sorted(Path(str(package.__path__[0])).glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:8]
