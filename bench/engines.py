"""Engines that run a model on the processor, each called the fastest way that Python has.

hetsched    what `Executable.bind` gives, of a plan for the cores through TVM alone
onnxruntime a session with its inputs and outputs bound once (`run_with_iobinding`): of `run`,
            `run_with_ort_values` and this, this was the fastest, by 1 to 50 % of a run
spinning    the same, its idle threads allowed to spin; of one thread there are none, so that the
            two differ by noise alone
openvino    an infer request whose input tensors are set once, and shared, `infer(share_outputs)`:
            by 1 to 80 % faster than handing the arrays over with each call

Bound so, an engine takes no arrays and makes none in a call. With `bind=False` each is given arrays
and gives new ones, as most users call it, which tells of small models what the call takes. Peers
have the model's file, its open shapes bound; the graph that hetsched imports runs as fast in both.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np
import onnx

from hetsched import oracle
from hetsched.errors import HetschedError
from hetsched.executable import Executable
from hetsched.host import cores

OURS = "hetsched"
ORT = "onnxruntime"
SPINNING = "onnxruntime spinning"
OPENVINO = "openvino"
PEERS = (ORT, SPINNING, OPENVINO)
INSTALL = "openvino is not installed and is left out; `make bench-peers` or `pip install openvino`"


class EngineRefuses(HetschedError):
    """An engine that does not serve the model, or is not installed."""


class Engine(Protocol):
    """`run` is what is timed; `outputs` are those of the last run, by name."""

    def run(self) -> None: ...

    def outputs(self) -> Mapping[str, np.ndarray]: ...

    def close(self) -> None: ...


def device(threads: int) -> str:
    """The device string of as many cores, the first ones.

    Raises
    ------
    HetschedError
        This machine has fewer.
    """
    there = cores()
    if threads > len(there):
        raise HetschedError(f"{threads} threads need as many cores; this process has {len(there)}")
    if threads == len(there) > 1:
        return "cpu"
    first, last = there[0], there[threads - 1]
    return f"cpu:{first}" if threads == 1 else f"cpu:{first}-{last}"


def installed(peers: tuple[str, ...]) -> tuple[str, ...]:
    """Those of `peers` that are here."""
    return tuple(name for name in peers if name != OPENVINO or find_spec("openvino"))


def open_peer(
    name: str,
    proto: onnx.ModelProto,
    inputs: Mapping[str, np.ndarray],
    threads: int,
    bind: bool = True,
) -> Engine:
    """The peer with the model, its inputs given.

    Raises
    ------
    EngineRefuses
        It does not serve the model.
    """
    try:
        if name == OPENVINO:
            return OpenVino(proto, inputs, threads, bind)
        return OnnxRuntime(proto, inputs, threads, name == SPINNING, bind)
    except (HetschedError, ImportError, *oracle.ERRORS) as error:
        lines = str(error).split("\n")
        raise EngineRefuses(f"{name}: {next(filter(None, lines), type(error).__name__)}") from error


def bound(proto: onnx.ModelProto, shapes: Mapping[str, tuple[int, ...]]) -> onnx.ModelProto:
    """The model with these shapes of its inputs written into it."""
    for value in proto.graph.input:
        if value.name in shapes:
            dims = value.type.tensor_type.shape
            del dims.dim[:]
            for size in shapes[value.name]:
                dims.dim.add().dim_value = size
    return proto


def dtype(proto: onnx.ModelProto) -> str:
    """`int8` of a quantised model, else `float32`."""
    quantised = any(node.op_type in ("QuantizeLinear", "QLinearConv") for node in proto.graph.node)
    return "int8" if quantised else "float32"


@dataclass
class Hetsched:
    """An executable and its inputs, which are set once if they are to `bind`."""

    executable: Executable
    inputs: Mapping[str, np.ndarray]
    bind: bool = True

    def __post_init__(self) -> None:
        run = partial(self.executable.run, self.inputs)
        self._run = self.executable.bind(self.inputs) if self.bind else run

    def run(self) -> None:
        self._last = self._run()

    def outputs(self) -> Mapping[str, np.ndarray]:
        return self._last

    def close(self) -> None:
        self.executable.close()


class OnnxRuntime:
    """A session with its inputs, and with outputs that it writes to if it is to `bind` them."""

    def __init__(
        self,
        proto: onnx.ModelProto,
        inputs: Mapping[str, np.ndarray],
        threads: int,
        spinning: bool = False,
        bind: bool = True,
        profile: str = "",
    ) -> None:
        options = oracle.session_options(threads)
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
        if profile:
            options.enable_profiling = True
            options.profile_file_prefix = profile
        self.session = oracle.open_session(proto, options)
        self._names = [output.name for output in self.session.get_outputs()]
        self._inputs = {value.name: inputs[value.name] for value in self.session.get_inputs()}
        self._run: Callable[[], Any] = partial(self.session.run, self._names, self._inputs)
        self._found: Sequence[np.ndarray] = self._run()
        if not bind:
            return
        # What is bound shares the memory of arrays, and does not keep them.
        self._inputs = {n: np.asarray(array, order="C") for n, array in self._inputs.items()}
        self._found = [np.array(array) for array in self._found]
        binding = self.session.io_binding()
        for name, array in self._inputs.items():
            binding.bind_ortvalue_input(name, oracle.to_ort(array))
        for name, array in zip(self._names, self._found, strict=True):
            binding.bind_ortvalue_output(name, oracle.to_ort(array))
        self._run = partial(self.session.run_with_iobinding, binding)

    def run(self) -> None:
        found = self._run()
        if found is not None:
            self._found = found

    def outputs(self) -> Mapping[str, np.ndarray]:
        return dict(zip(self._names, self._found, strict=True))

    def close(self) -> None:
        del self._run, self.session


class OpenVino:
    """An infer request with its inputs; float32 arithmetic, tuned for latency."""

    def __init__(
        self,
        proto: onnx.ModelProto,
        inputs: Mapping[str, np.ndarray],
        threads: int,
        bind: bool = True,
    ) -> None:
        import openvino

        core = openvino.Core()
        compiled = core.compile_model(
            core.read_model(proto.SerializeToString(), b""),
            "CPU",
            {
                "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_NUM_THREADS": threads,
                "INFERENCE_PRECISION_HINT": "f32",
            },
        )
        self._names = [value.name for value in proto.graph.output]
        self._request: Any = compiled.create_infer_request()
        # What is bound shares the memory of arrays, and does not keep them.
        self._inputs = [
            np.asarray(next(inputs[name] for name in port.get_names() if name in inputs), order="C")
            for port in compiled.inputs
        ]
        if bind:
            for index, array in enumerate(self._inputs):
                self._request.set_input_tensor(index, openvino.Tensor(array, shared_memory=True))
            self._run = partial(self._request.infer, share_outputs=True)
        else:
            self._run = partial(
                self._request.infer, self._inputs, share_inputs=True, share_outputs=True
            )

    def run(self) -> None:
        self._run()

    def outputs(self) -> Mapping[str, np.ndarray]:
        found = enumerate(self._names)
        return {name: np.array(self._request.get_output_tensor(i).data) for i, name in found}

    def close(self) -> None:
        del self._run, self._request
