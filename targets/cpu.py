"""The processor, through TVM and LLVM."""

import json
import os
import platform
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from ctypes import CDLL, c_void_p, cast
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from hetsched.device import Device
from hetsched.dtype import ALIGNMENT, empty, empty_nbytes, numpy_dtype
from hetsched.errors import CompileError, PackageError, PartError, PluginError
from hetsched.graph import Graph
from hetsched.host import cpu_device, cpu_devices
from hetsched.native import crew_code, damage_of, linker_for, no_linker
from hetsched.programs import generator, kept_refusal
from hetsched.schedules.rules import WINOGRAD, Rules
from hetsched.schedules.vectors import Vectors
from hetsched.store import Store, default_path
from hetsched.target import Artifact, Code, Footprint, Kernel, Results, Target
from hetsched.trial import Step, Trial, choices

# From one step of a crew to the next on a core, stamps and all.
LAUNCH_SECONDS = 1e-6

CODE = "code.so"
# In it: the part by TVM's convention of calls, and what runs it without Python.
MAIN = "__tvm_ffi_main"
CREW = "crew_work"
CONSTANTS = "constants.bin"
LAYOUT = "layout.json"

# The processor families of LLVM, by what a core must have to be of one; the first that fits.
X86_LEVELS = (
    ("x86-64-v4", {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx2", "fma", "f16c"}),
    ("x86-64-v3", {"avx2", "fma", "f16c"}),
    ("x86-64-v2", {"sse4_2"}),
    ("x86-64", set[str]()),
)
# LLVM's names of the features that no level has.
FEATURES = {
    "avx_vnni": "avxvnni",
    "avx512_vnni": "avx512vnni",
    "avx512_bf16": "avx512bf16",
    "amx_int8": "amx-int8",
    "amx_bf16": "amx-bf16",
    "asimd": "neon",
    "asimddp": "dotprod",
    "fphp": "fullfp16",
    "sve": "sve",
    "v": "v",
}


@dataclass(frozen=True)
class Cpu(Target):
    """Cores of this machine, or of one whose instruction set the device names.

    Parts that are `interpreted` by TVM's virtual machine are slower; it can tell what each of their
    kernels takes.

    `winograd` says how convolutions by 3 x 3 are computed: `off`, as they are defined; `f2`, by at
    most F(2 x 2, 3 x 3), which is as exact; `f4`, by F(4 x 4, 3 x 3) wherever it is defined;
    `auto`, as is fastest by a model of the core. `cpu:winograd=off` is a target with the option.
    """

    interpreted: bool = False
    winograd: str = "auto"

    def __post_init__(self) -> None:
        if self.winograd not in WINOGRAD:
            there = ", ".join(WINOGRAD)
            raise PluginError(f"'{self.winograd}' is no winograd of cpu; there are {there}")

    def unavailable(self) -> str | None:
        if find_spec("tvm") is None:
            return "the package apache-tvm is not installed"
        if os.name != "posix":
            return "shared libraries of TVM are loaded on POSIX systems only"
        return None

    def devices(self) -> list[str]:
        return cpu_devices(self.name)

    def device(self, name: str) -> Device:
        return replace(cpu_device(name, self.name), launch_seconds=LAUNCH_SECONDS)

    def version(self) -> str:
        return f"{generator()}, winograd {self.winograd}"

    def configuration(self, device: Device) -> str:
        chosen = self._chosen(device)
        if not chosen:
            return self.version()
        told = sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:8]
        return f"{self.version()}, tuned {told}"

    def _rules(self, device: Device) -> Rules:
        vectors = Vectors.of(_isa(device))
        return Rules(vectors, device.threads, self._chosen(device), self.winograd)

    def tuners(self) -> tuple[str, ...]:
        return ("candidates", "metaschedule")

    def trials(
        self, graph: Graph, device: Device, tuner: str, count: int, known: Collection[Trial]
    ) -> Iterator[Trial | Step]:
        if tuner not in self.tuners():
            raise PluginError(f"no tuner '{tuner}'; there are {', '.join(self.tuners())}")
        # Late, because it loads TVM's compiler.
        from hetsched import tvm_runtime
        from hetsched.lowering import metaschedule, trials

        isa = _isa(device)
        rules = self._rules(device)
        tvm_runtime.use_threads(device.threads)
        module = trials if tuner == "candidates" else metaschedule
        try:
            yield from module.trials(graph, rules, llvm(isa), count, known)
        except tvm_runtime.ERRORS as error:
            why = tvm_runtime.first_line(error)
            raise CompileError(f"'{graph.name}' cannot be tuned: {why}") from error

    def _chosen(self, device: Device) -> dict[str, str]:
        """What trials have found to be better on such a device than what the rules put first."""
        path = default_path()
        if not path.is_file():
            return {}
        return choices(Store(path).trials(device, self.version()))

    def refusal(self, graph: Graph, device: Device) -> str | None:
        # Late, because it loads TVM's compiler.
        from hetsched.lowering.relax import refusal_of

        isa = _isa(device)
        if linker_for(isa) is None:
            return no_linker(isa)
        return kept_refusal(self.name, graph, refusal_of)

    def lanes(self, device: Device) -> int:
        return Vectors.of(_isa(device)).lanes

    def settings(self, device: Device) -> str:
        isa = _isa(device)
        linker = linker_for(isa)
        path = shutil.which(linker) if linker else None
        status = Path(path).stat() if path else None
        made = f"{status.st_size} {status.st_mtime_ns}" if status else ""
        return f"{isa}; {device.threads} threads; {linker} {made}"

    def crew(self, device: Device) -> bytes | None:
        linker = linker_for(_isa(device))
        return None if linker is None or self.interpreted else crew_code(linker, "-shared")

    def compile(self, graph: Graph, device: Device) -> Artifact:
        from hetsched.lowering.relax import compile_part, part_temporaries

        isa = _isa(device)
        linker = linker_for(isa)
        if linker is None:
            raise CompileError(f"part '{graph.name}': {no_linker(isa)}")
        files: dict[str, bytes] = {}
        weights: dict[str, np.ndarray] = {}
        workspace = None
        threads = 1
        temporaries: tuple[tuple[int, ...], ...] = ()
        if graph.computed:
            files[CODE], part = compile_part(
                graph,
                lambda module: _shared_library(module, isa, linker),
                self._rules(device),
                self.interpreted,
            )
            weights.update(part.weights)
            if part.constants:
                files[CONSTANTS] = part.constants
            workspace = part.workspace_nbytes
            if device.threads > 1 and part.is_parallel:
                threads = device.threads
            temporaries = part_temporaries(part, llvm(isa), threads)
        constants = [tensor.name for tensor in graph.outputs if tensor.name in graph.constants]
        layout = {
            "tvm": _tvm_version(),
            "winograd": self.winograd,
            "weights": list(weights),
            "outputs": constants,
            "constants_nbytes": len(files.get(CONSTANTS, b"")),
            "workspace_nbytes": workspace,
            "temporaries": temporaries,
            "threads": threads,
            "packed": dict(graph.packed),
        }
        files[LAYOUT] = json.dumps(layout).encode()
        weights.update((name, graph.constants[name]) for name in constants)
        return Artifact(files, weights, requires=isa)

    def footprint(self, graph: Graph, device: Device) -> Footprint | None:
        from hetsched.lowering.relax import part_of, part_temporaries

        given = {t.name for t in graph.outputs if t.name in graph.constants}
        weights = {name: graph.constants[name].nbytes for name in given}
        if not graph.computed:
            return Footprint(weights, 0)
        if self.interpreted:
            return None
        part = part_of(graph, self._rules(device))
        if part.workspace_nbytes is None:
            return None
        threads = device.threads if device.threads > 1 and part.is_parallel else 1
        return Footprint(
            weights | {name: array.nbytes for name, array in part.weights.items()},
            _own_nbytes(len(part.constants), part.workspace_nbytes),
            part_temporaries(part, llvm(_isa(device)), threads),
        )

    def held(self, artifact: Artifact) -> Footprint | None:
        layout = _layout(artifact)
        if layout.workspace_nbytes is None and CODE in artifact.files:
            return None
        return Footprint(
            {name: array.nbytes for name, array in artifact.weights.items()},
            _own_nbytes(len(artifact.files.get(CONSTANTS, b"")), layout.workspace_nbytes or 0),
            layout.temporaries,
        )

    def load(self, artifact: Artifact, graph: Graph, device: Device) -> Kernel:
        here = cpu_device(self.name, self.name).isa
        lacking = [feature for feature in artifact.requires.split() if feature not in here.split()]
        if lacking:
            raise PackageError(
                f"part '{graph.name}' needs {', '.join(lacking)}, which this processor lacks"
            )
        return CpuKernel(artifact, graph, device.threads)


def _own_nbytes(constants: int, workspace: int) -> int:
    """What a part holds for itself: small weights as an aligned copy, and its workspace."""
    return constants + ALIGNMENT + empty_nbytes(workspace)


class CpuKernel(Kernel):
    """A shared library of TVM and the weights that it reads."""

    def __init__(self, artifact: Artifact, graph: Graph, threads: int) -> None:
        # Late, because it loads TVM.
        from hetsched import tvm_runtime

        self._tvm = tvm_runtime
        self._name = graph.name
        try:
            layout = _layout(artifact)
        except PackageError as error:
            raise PackageError(f"part '{graph.name}': {error}") from None
        if layout.packed != graph.packed:
            raise PackageError(
                f"part '{graph.name}' is damaged: its code has {layout.packed or 'nothing'} in "
                f"blocks of channels, not {dict(graph.packed) or 'nothing'}"
            )
        weights = [artifact.weights[name] for name in layout.weights]
        self._threads = min(threads, layout.threads)
        # TVM's workers stay on the cores of the thread that first asked for them.
        self.any_thread = self._threads == 1
        constants = {name: artifact.weights[name] for name in layout.outputs}
        self._results = Results(graph, constants)
        self._compute: Callable[[Sequence[Any]], list[np.ndarray]] | None = None
        if graph.computed:
            module, library = _module(artifact.files.get(CODE, b""), graph.name)
            if layout.workspace_nbytes is None:
                self._compute = _Program(module, graph, weights)
            else:
                # Small weights are together in one file. Bytes may happen to be aligned, and what a
                # part holds is known before it is loaded: always a copy.
                small = np.frombuffer(artifact.files.get(CONSTANTS, b""), np.uint8)
                weights.append(tvm_runtime.aligned_copy(small, small.dtype))
                self._compute = _Function(module, library, graph, weights, layout.workspace_nbytes)

    def run(self, inputs: Sequence[Any]) -> Sequence[Any]:
        if not self._results.computed:
            computed = []
        else:
            assert self._compute is not None, f"part '{self._name}' is closed"
            try:
                self._tvm.use_threads(self._threads)
                computed = self._compute(inputs)
            except self._tvm.ERRORS as error:
                why = self._tvm.first_line(error)
                raise PartError(f"part '{self._name}' failed: {why}") from error
        return self._results.of(computed, inputs)

    def bind(self, inputs: Sequence[Any]) -> Callable[[], Sequence[Any]]:
        if not isinstance(self._compute, _Function) or not self._results.all_computed:
            return super().bind(inputs)
        compute, use_threads = self._compute.bound(inputs), self._tvm.use_threads
        threads = self._threads

        def call() -> Sequence[Any]:
            use_threads(threads)
            return compute()

        return call

    def code(self) -> Code | None:
        if not isinstance(self._compute, _Function) or not self._results.all_computed:
            return None
        return self._compute.code(self._threads, partial(self._tvm.use_threads, self._threads))

    def close(self) -> None:
        self._compute = None


class _Function:
    """Calls the function of a library, whose only argument is a table of addresses.

    The table has a row for each input, each weight, each output and the workspace.
    """

    def __init__(
        self,
        module: Any,
        library: CDLL,
        graph: Graph,
        weights: Sequence[np.ndarray],
        workspace_nbytes: int,
    ) -> None:
        from hetsched.tvm_runtime import address, aligned, raised

        self._address, self._raised = address, raised
        self._main = module["main"]
        self._library = library
        self._inputs, self._outputs = (
            [(graph.handed(tensor).shape, numpy_dtype(tensor.dtype)) for tensor in tensors]
            for tensors in (graph.inputs, graph.computed)
        )
        # Kept, as the table has their addresses only.
        self._weights = [aligned(array, array.dtype) for array in weights]
        self._workspace = empty((workspace_nbytes,), np.dtype(np.uint8))
        first_output = len(self._inputs) + len(weights)
        table = np.zeros((first_output + len(self._outputs) + 1, 2), np.uint64)
        for row, array in enumerate(self._weights, len(self._inputs)):
            table[row, 1] = array.ctypes.data
        table[-1, 1] = self._workspace.ctypes.data
        self._table = table
        self._argument = c_void_p(table.ctypes.data)
        # Of one row, the address is the second of two numbers.
        addresses = table.reshape(-1)[1::2]
        self._input_addresses = addresses[: len(self._inputs)]
        self._output_addresses = addresses[first_output:-1]

    def __call__(self, inputs: Sequence[Any]) -> list[np.ndarray]:
        # The arrays are kept until the call has ended.
        outputs, _ = self._placed(inputs)
        self._checked(self._main(self._argument))
        return outputs

    def bound(self, inputs: Sequence[Any]) -> Callable[[], list[np.ndarray]]:
        """A call that reads these arrays and writes to its own, the same ones each time."""
        outputs, arrays = self._placed(inputs)
        table = self._table.copy()
        argument = c_void_p(table.ctypes.data)
        main, checked = self._main, self._checked

        def call(_kept: object = (table, arrays)) -> list[np.ndarray]:
            checked(main(argument))
            return outputs

        return call

    def code(self, threads: int, enter: Callable[[], None]) -> Code | None:
        if not hasattr(self._library, CREW):
            return None
        outputs = range(len(self._table) - 1 - len(self._outputs), len(self._table) - 1)
        # Of one row, the address is the second of two numbers.
        return Code(
            function=cast(getattr(self._library, MAIN), c_void_p).value or 0,
            table=self._table.copy(),
            inputs=tuple(2 * row + 1 for row in range(len(self._inputs))),
            outputs=tuple(2 * row + 1 for row in outputs),
            results=tuple(self._outputs),
            threads=threads,
            enter=enter,
            module=self._library,
            raised=self._raised,
        )

    def _placed(self, inputs: Sequence[Any]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """New outputs, and the inputs as the code reads them; the table has their addresses."""
        arrays = []
        for row, (array, (shape, dtype)) in enumerate(zip(inputs, self._inputs, strict=True)):
            if array.dtype != dtype or not array.flags.c_contiguous:
                array = np.asarray(array, dtype, order="C")
            if array.shape != shape:
                raise ValueError(f"an input of shape {array.shape} in place of {shape}")
            self._input_addresses[row] = self._address(array)
            arrays.append(array)
        outputs = []
        for row, (shape, dtype) in enumerate(self._outputs):
            array = empty(shape, dtype)
            self._output_addresses[row] = self._address(array)
            outputs.append(array)
        return outputs, arrays

    def _checked(self, status: int) -> None:
        if status:
            raise RuntimeError(self._raised() or f"TVM's runtime gave {status}")


class _Program:
    """Calls the function of a library that TVM's virtual machine interprets."""

    def __init__(self, module: Any, graph: Graph, weights: Sequence[np.ndarray]) -> None:
        import tvm

        from hetsched import tvm_runtime

        self._tvm = tvm_runtime
        self._main = tvm.runtime.vm.VirtualMachine(module, tvm.cpu())["main"]
        self._dtypes = [numpy_dtype(tensor.dtype) for tensor in graph.inputs]
        self._weights = [tvm_runtime.to_tvm(array, array.dtype) for array in weights]
        self._weight_addresses = {weight.data_ptr() for weight in self._weights}
        self._single = len(graph.computed) == 1

    def __call__(self, inputs: Sequence[Any]) -> list[np.ndarray]:
        tensors = list(map(self._tvm.to_tvm, inputs, self._dtypes))
        result = self._main(*tensors, *self._weights)
        results = [result] if self._single else result
        arrays = list(map(self._tvm.to_numpy, results))
        # A reshape alone gives back the memory of what it reads.
        lent = self._weight_addresses.union(tensor.data_ptr() for tensor in tensors)
        for index, tensor in enumerate(results):
            if tensor.data_ptr() in lent:
                arrays[index] = arrays[index].copy()
        return arrays


@dataclass(frozen=True)
class _Layout:
    """What is beside the code of a part: names of the weights that it reads, in order, and of the
    outputs that are constants; the bytes of its workspace, or None where TVM's virtual machine has
    its own; what its functions hold beside; how many threads it has use for; and which tensors it
    takes and gives in blocks of how many channels.
    """

    weights: tuple[str, ...]
    outputs: tuple[str, ...]
    workspace_nbytes: int | None
    temporaries: tuple[tuple[int, ...], ...]
    threads: int
    packed: Mapping[str, int]


def _layout(artifact: Artifact) -> _Layout:
    """
    Raises
    ------
    PackageError
        The artifact is damaged, or another TVM has made it.
    """
    try:
        layout = json.loads(artifact.files[LAYOUT])
        compiler = layout["tvm"]
        workspace = layout["workspace_nbytes"]
        found = _Layout(
            weights=tuple(map(str, layout["weights"])),
            outputs=tuple(map(str, layout["outputs"])),
            workspace_nbytes=None if workspace is None else int(workspace),
            temporaries=tuple(tuple(map(int, sizes)) for sizes in layout["temporaries"]),
            threads=int(layout["threads"]),
            packed=dict(layout["packed"]),
        )
        lacking = sorted({*found.weights, *found.outputs} - artifact.weights.keys())
        whole = len(artifact.files.get(CONSTANTS, b"")) == layout["constants_nbytes"]
    except (KeyError, TypeError, ValueError) as error:
        raise PackageError(f"it is damaged: {LAYOUT}: {error!r}") from None
    if lacking:
        raise PackageError(f"it is damaged: {LAYOUT}: there is no weight '{lacking[0]}'")
    if not whole:
        raise PackageError(f"it is damaged: {CONSTANTS} is cut short")
    if compiler != _tvm_version():
        raise PackageError(
            f"it was compiled by TVM {compiler}, and this is {_tvm_version()}: "
            "compile the model again"
        )
    return found


def _module(code: bytes, name: str) -> tuple[Any, CDLL]:
    """A shared library, as TVM's module and as it is, which leaves no file behind."""
    import tvm

    from hetsched.tvm_runtime import ERRORS, first_line

    damage = damage_of(code)
    if damage is not None:
        raise PackageError(f"part '{name}' is damaged: {CODE} {damage}")
    try:
        with TemporaryDirectory(prefix="hetsched-") as folder:
            # The loader knows libraries by their path, so that no two may share one.
            path = Path(folder) / CODE
            path.write_bytes(code)
            return tvm.runtime.load_module(str(path)), CDLL(str(path))
    except ERRORS as error:
        raise PackageError(f"part '{name}' does not load: {first_line(error)}") from error


def _shared_library(module: Any, isa: str, linker: str) -> bytes:
    from tvm.support.cc import create_shared

    from hetsched.lowering.relax import build

    with TemporaryDirectory(prefix="hetsched-") as folder:
        objects = build(module, llvm(isa), Path(folder))
        if (made := crew_code(linker, "-c")) is not None:
            objects.append(Path(folder) / "crew.o")
            objects[-1].write_bytes(made)
        path = Path(folder) / CODE
        create_shared(str(path), list(map(str, objects)), cc=linker)
        return path.read_bytes()


def llvm(isa: str) -> dict[str, Any]:
    """TVM's target for the instruction set that a device names."""
    architecture, *features = isa.split()
    known = set(features)
    family = "generic"
    if architecture == "x86_64":
        family, covered = next(level for level in X86_LEVELS if level[1] <= known)
        known -= covered
    return {
        "kind": "llvm",
        "mtriple": f"{architecture}-linux-gnu",
        "mcpu": family,
        "mattr": [
            f"+{FEATURES[feature]}" for feature in features if feature in known & set(FEATURES)
        ],
    }


def _isa(device: Device) -> str:
    return device.isa or platform.machine()


def _tvm_version() -> str:
    return version("apache-tvm")
