"""The processor, through ONNX Runtime: it runs what TVM cannot compile."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from math import prod
from typing import Any

import numpy as np
import onnx
import onnxruntime
from google.protobuf.message import DecodeError

from hetsched.device import Device
from hetsched.dtype import dtype_name, itemsize, numpy_dtype
from hetsched.errors import CompileError, ModelError, PackageError, PartError
from hetsched.graph import DETACHED_NBYTES, Graph, to_onnx
from hetsched.host import cpu_device, cpu_devices
from hetsched.oracle import ERRORS, first_line, from_ort, open_session, session_options, to_ort
from hetsched.target import Artifact, Kernel, Target

MODEL = "part.onnx"


@dataclass(frozen=True)
class OnnxRuntime(Target):
    """Cores of this machine; ONNX Runtime compiles when it loads, so an artifact fits any."""

    def unavailable(self) -> str | None:
        return None

    def devices(self) -> list[str]:
        return cpu_devices(self.name)

    def device(self, name: str) -> Device:
        return cpu_device(name, self.name)

    def version(self) -> str:
        return f"onnxruntime {version('onnxruntime')}"

    def refusal(self, graph: Graph, device: Device) -> str | None:
        try:
            _session(to_onnx(graph, weights=False), graph.constants, threads=1)
        except ModelError as error:
            return str(error)
        return None

    def compile(self, graph: Graph, device: Device) -> Artifact:
        why = self.refusal(graph, device)
        if why is not None:
            raise CompileError(f"part '{graph.name}': {why}")
        model = to_onnx(graph, weights=False)
        weights = {name: graph.constants[name] for name in _detached(model)}
        return Artifact({MODEL: model.SerializeToString(deterministic=True)}, weights)

    def load(self, artifact: Artifact, graph: Graph, device: Device) -> Kernel:
        return OnnxRuntimeKernel(artifact, graph, device.threads)


class OnnxRuntimeKernel(Kernel):
    """A session, and the weights that it reads where they are."""

    def __init__(self, artifact: Artifact, graph: Graph, threads: int) -> None:
        try:
            model = onnx.ModelProto.FromString(artifact.files[MODEL])
            self._weights = {name: artifact.weights[name] for name in _detached(model)}
        except (KeyError, DecodeError) as error:
            raise PackageError(f"part '{graph.name}' is damaged: {MODEL}: {error!r}") from None
        try:
            self._session: onnxruntime.InferenceSession | None
            self._session, self._values = _session(model, self._weights, threads)
        except ModelError as error:
            raise PackageError(f"part '{graph.name}' does not load: {error}") from error
        self.any_thread = threads == 1
        self._name = graph.name
        self._inputs = [(tensor.name, numpy_dtype(tensor.dtype)) for tensor in graph.inputs]
        self._outputs = [tensor.name for tensor in graph.outputs]
        # ONNX Runtime hands narrow floats to Python in a slower way only.
        self._narrow = any(
            numpy_dtype(tensor.dtype).isbuiltin != 1 for tensor in (*graph.inputs, *graph.outputs)
        )

    def close(self) -> None:
        self._session = None
        self._values = []
        self._weights = {}

    def run(self, inputs: Sequence[Any]) -> Sequence[Any]:
        assert self._session is not None, f"part '{self._name}' is closed"
        feeds = {
            name: np.asarray(array, dtype, order="C")
            for (name, dtype), array in zip(self._inputs, inputs, strict=True)
        }
        try:
            results = self._results(self._session, feeds)
        except ERRORS as error:
            raise PartError(f"part '{self._name}' failed: {first_line(error)}") from error
        # An input that is passed through is copied: the caller may write to it later.
        return [
            array.copy() if name in feeds else array
            for name, array in zip(self._outputs, results, strict=True)
        ]

    def _results(
        self, session: onnxruntime.InferenceSession, feeds: Mapping[str, np.ndarray]
    ) -> list[np.ndarray]:
        if not self._narrow:
            return list(session.run(self._outputs, feeds))
        values = {name: to_ort(array) for name, array in feeds.items()}
        return list(map(from_ort, session.run_with_ort_values(self._outputs, values)))


def _session(
    model: onnx.ModelProto, weights: Mapping[str, np.ndarray], threads: int
) -> tuple[onnxruntime.InferenceSession, list[onnxruntime.OrtValue]]:
    """A session that reads `weights` in place, and what must live as long as it.

    ONNX Runtime may still make a copy of a weight in the order that its kernel likes.
    """
    names = _detached(model)
    values = [to_ort(weights[name]) for name in names]
    bound = onnx.ModelProto()
    bound.CopyFrom(model)
    for tensor in bound.graph.initializer:
        if tensor.name in names:
            # Only an initializer that is said to be in a file may be handed over; none is opened.
            tensor.data_location = onnx.TensorProto.EXTERNAL
            tensor.external_data.add(key="location", value="weights")
    options = session_options(threads)
    if names:
        options.add_external_initializers(names, values)
    return open_session(bound, options), values


def _detached(model: onnx.ModelProto) -> list[str]:
    """The initializers without data."""
    return [
        tensor.name
        for tensor in model.graph.initializer
        if prod(tensor.dims) * itemsize(dtype_name(tensor.data_type)) >= DETACHED_NBYTES
        and tensor.data_type != onnx.TensorProto.STRING
    ]
