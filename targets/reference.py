"""The definition of each operation, run as it stands: slow, simple, and what the others must match.

Convolutions, matrix products, pools and recurrent layers are the loops of `hetsched/operations`,
compiled by Numba; the rest is ONNX's own reference evaluator on numpy.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from threading import Lock
from types import CodeType, FunctionType
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from hetsched.device import Device
from hetsched.dtype import dtype_name, numpy_dtype
from hetsched.errors import CompileError, PackageError, PartError
from hetsched.graph import DETACHED_NBYTES, Graph, to_onnx
from hetsched.host import cpu_device, cpu_devices
from hetsched.op import Tensor
from hetsched.operation import Call, Compiler, Loops, Operation, operations
from hetsched.target import Artifact, Kernel, Target

FILE = "part.onnx"


class Reference(Target):
    """Device strings are `reference`, all cores, and `reference:K`, core K."""

    def unavailable(self) -> str | None:
        return None if find_spec("numba") else "numba is not installed"

    def devices(self) -> list[str]:
        return cpu_devices("reference")

    def device(self, name: str) -> Device:
        return cpu_device(name, "reference")

    def version(self) -> str:
        return f"onnx {version('onnx')}, numba {version('numba')}"

    def refusal(self, graph: Graph, device: Device) -> str | None:
        if reason := self.unavailable():
            return reason
        model = to_onnx(graph, weights=False)
        border = (*model.graph.input, *model.graph.value_info)
        types = {value.name: value for value in border}
        for node in model.graph.node:
            alone = onnx.GraphProto(
                node=[node], input=[types[name] for name in node.input if name in types]
            )
            try:
                ReferenceEvaluator(alone, opsets=dict(graph.opsets), new_ops=_overrides(False))
            except (NotImplementedError, RuntimeError, TypeError, onnx.defs.SchemaError):
                opset = graph.opsets.get(node.domain, "unknown")
                name = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
                return f"{name} '{node.name}' has no reference implementation in opset {opset}"
        return None

    def compile(self, graph: Graph, device: Device) -> Artifact:
        if reason := self.refusal(graph, device):
            raise CompileError(f"part '{graph.name}' on '{device.name}': {reason}")
        weights = {
            name: array
            for name, array in graph.constants.items()
            if array.nbytes >= DETACHED_NBYTES and array.dtype != object
        }
        model = to_onnx(graph, weights=False)
        return Artifact({FILE: model.SerializeToString(deterministic=True)}, weights)

    def load(self, artifact: Artifact, graph: Graph, device: Device) -> Kernel:
        if FILE not in artifact.files:
            raise PackageError(f"part '{graph.name}' has no {FILE}")
        try:
            model = onnx.ModelProto.FromString(artifact.files[FILE])
            _detach(model.graph, artifact.weights)
            evaluator = ReferenceEvaluator(model, new_ops=_overrides(device.threads > 1))
        except (DecodeError, RuntimeError, TypeError, ValueError) as error:
            raise PackageError(f"part '{graph.name}' is damaged: {error}") from error
        if evaluator.output_names != [tensor.name for tensor in graph.outputs]:
            raise PackageError(f"part '{graph.name}' is damaged: {FILE} is of another part")
        return _Evaluation(evaluator, graph, artifact.weights, device.threads)


class _Evaluation(Kernel):
    def __init__(
        self,
        evaluator: ReferenceEvaluator,
        graph: Graph,
        weights: Mapping[str, np.ndarray],
        threads: int,
    ) -> None:
        self._evaluator = evaluator
        self._graph = graph
        self._weights = weights
        # Numba counts cores when it is first imported, which a pinned worker must not be the one
        # to do: it would find its own alone.
        self._limit = _thread_limit(threads)

    def run(self, inputs: Sequence[Any]) -> Sequence[Any]:
        self._limit()
        feeds = {
            tensor.name: np.asarray(array, numpy_dtype(tensor.dtype))
            for tensor, array in zip(self._graph.inputs, inputs, strict=True)
        }
        with np.errstate(all="ignore"):
            results = self._evaluator.run(
                [tensor.name for tensor in self._graph.outputs], {**self._weights, **feeds}
            )
        return [
            self._checked(result, tensor)
            for result, tensor in zip(results, self._graph.outputs, strict=True)
        ]

    def close(self) -> None:
        self._weights = {}

    def _checked(self, result: Any, tensor: Tensor) -> np.ndarray:
        # A copy, because the evaluator may hand out a view of an input or a weight.
        array = np.array(result, numpy_dtype(tensor.dtype), order="C")
        if array.shape != tensor.shape:
            raise PartError(
                f"part '{self._graph.name}': '{tensor.name}' has shape {array.shape}, "
                f"not {tensor.shape}"
            )
        return array


def compiled(parallel: bool) -> Compiler:
    """Numba as a compiler of loops, on one core or on several; each function once a process."""

    def compiler(loops: Loops, /) -> Loops:
        found: Loops = _compiled(loops, parallel)
        return found

    return compiler


_LOCK = Lock()
_COMPILED: dict[tuple[CodeType, bool], Any] = {}
_JITTED: dict[tuple[CodeType, bool], Any] = {}
_PARALLEL = Lock()


def _compiled(loops: Any, parallel: bool) -> Any:
    with _LOCK:
        key = (loops.__code__, parallel)
        if key not in _COMPILED:
            jitted = _jitted(loops, parallel)
            _COMPILED[key] = _parallel_call(jitted) if parallel else _call(jitted)
        return _COMPILED[key]


def _jitted(function: Any, parallel: bool) -> Any:
    """What compiles the function, and those of ours that it calls, once types are known."""
    import numba

    key = (function.__code__, parallel)
    if key not in _JITTED:
        scope = {**function.__globals__, "prange": numba.prange}
        for name in function.__code__.co_names:
            called = scope.get(name)
            if isinstance(called, FunctionType) and called is not function:
                scope[name] = _jitted(called, parallel=False)
        marked = FunctionType(function.__code__, scope)
        # A product may be added before it is rounded; all else is computed as Python does.
        options = {"nogil": True, "parallel": parallel, "fastmath": {"contract"}}
        _JITTED[key] = numba.njit(marked, **options)
    return _JITTED[key]


def _call(jitted: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        return jitted(*map(_uniform, arguments))

    return call


def _parallel_call(jitted: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        uniform = list(map(_uniform, arguments))
        if _serves_many_threads():
            return jitted(*uniform)
        with _PARALLEL:
            return jitted(*uniform)

    return call


def _serves_many_threads() -> bool:
    """Whether two threads may run parallel loops at once: Numba's own pool aborts the process."""
    import numba

    try:
        return bool(numba.threading_layer() != "workqueue")
    except ValueError:
        # It is chosen when the first parallel loop runs.
        return False


def _uniform(argument: Any) -> Any:
    """Arrays contiguous and read-only: each variety would be compiled for on its own."""
    if not isinstance(argument, np.ndarray):
        return argument
    view = np.ascontiguousarray(argument).view()
    view.flags.writeable = False
    return view


def _thread_limit(threads: int) -> Callable[[], None]:
    """What sets the number of threads of parallel loops for the thread that calls it."""
    import numba

    count = min(threads, numba.config.NUMBA_NUM_THREADS)

    def limit() -> None:
        numba.set_num_threads(count)

    return limit


@cache
def _overrides(parallel: bool) -> list[type]:
    """The evaluator's classes for all types that hetsched defines itself."""
    return [
        _override(kind, operation, compiled(parallel))
        for operation in operations()
        for kind in operation.defined
    ]


def _override(kind: str, operation: Operation, compiler: Compiler) -> type:
    def start(self: Any, node: onnx.NodeProto, run_params: dict[str, Any]) -> None:
        # The schema of the model's opset, which has its defaults; the evaluator takes the newest.
        self.opset = run_params["opsets"][node.domain]
        OpRun.__init__(self, node, run_params, onnx.defs.get_schema(kind, self.opset, node.domain))

    def run(self: Any, *inputs: Any, **attributes: Any) -> tuple[np.ndarray, ...]:
        call = Call(kind, attributes, self.opset, len(self.onnx_node.output))
        return operation.reference(call, inputs, compiler)

    return type(kind, (OpRun,), {"__init__": start, "_run": run})


def _detach(graph: onnx.GraphProto, weights: Mapping[str, np.ndarray]) -> None:
    """Drops the initializers that `weights` has, once they are seen to fit."""
    kept = []
    for initializer in graph.initializer:
        if initializer.name not in weights:
            kept.append(initializer)
            continue
        array = weights[initializer.name]
        if array.shape != tuple(initializer.dims) or array.dtype != numpy_dtype(
            dtype_name(initializer.data_type)
        ):
            raise ValueError(f"the weights of '{initializer.name}' do not fit")
    del graph.initializer[:]
    graph.initializer.extend(kept)
