"""A target that fails at the stage that a test says: ONNX Runtime on a device of its own memory."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from hetsched.device import Device
from hetsched.errors import BuildError, DeviceError, DeviceLost, OutOfMemory
from hetsched.graph import Graph
from hetsched.host import cores
from hetsched.target import Artifact, Kernel, Target
from hetsched.targets.onnxruntime import OnnxRuntime as Parent

# The stage that fails, and after how many calls of it; none by default.
stage = ""
calls_before = 0


def reach(name: str, error: Exception) -> None:
    global calls_before
    if stage != name:
        return
    if calls_before:
        calls_before -= 1
        return
    raise error


class Failing(Target):
    def unavailable(self) -> str | None:
        return "no platform" if stage == "unavailable" else None

    def devices(self) -> list[str]:
        return ["failing:0"]

    def device(self, name: str) -> Device:
        reach("device", DeviceError(f"no '{name}'; there are none"))
        if name != "failing:0":
            raise DeviceError(f"no '{name}'; there is failing:0")
        here = Parent().device(f"onnxruntime:{cores()[0]}")
        return replace(
            here, name=name, target="failing", cores=(), memory_space="far", fingerprint="failing"
        )

    def version(self) -> str:
        return "failing 1"

    def refusal(self, graph: Graph, device: Device) -> str | None:
        return Parent().refusal(graph, device)

    def compile(self, graph: Graph, device: Device) -> Artifact:
        reach("compile", BuildError("its compiler says: no such type", device.name))
        return Parent().compile(graph, device)

    def load(self, artifact: Artifact, graph: Graph, device: Device) -> Kernel:
        if reason := self.unavailable():
            raise DeviceError(f"'{device.name}' is not here: {reason}")
        reach("load", OutOfMemory("4 GB wanted, 2 GB there"))
        return FailingKernel(Parent().load(artifact, graph, device))


class FailingKernel(Kernel):
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def run(self, inputs: Sequence[Any]) -> Sequence[Any]:
        reach("run", DeviceLost("it does not answer"))
        return self.kernel.run(inputs)

    def receive(self, array: np.ndarray) -> Any:
        reach("receive", OutOfMemory("no room for an input"))
        return array.copy()

    def send(self, buffer: Any) -> np.ndarray:
        reach("send", DeviceLost("it does not answer"))
        return np.array(buffer)

    def close(self) -> None:
        self.kernel.close()
