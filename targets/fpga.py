"""Our int8 overlay on an FPGA: parts of quantised models, in the cycles that its RTL takes.

There is no board here: the results are computed by a simulator of the core, bit for bit, and the
time is its cycles over the clock that the RTL reached when it was placed and routed. Wherever such
a time is shown, it is called modelled.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from hetsched import fpga
from hetsched.device import Device
from hetsched.document import check, parse
from hetsched.errors import (
    CompileError,
    DeviceError,
    PackageError,
    PluginError,
    UnsupportedOperation,
)
from hetsched.fpga.board import Board, board
from hetsched.fpga.engine import PACKAGES, Engine, Memory, why_not
from hetsched.fpga.isa import Overlay, Sync, decode, encode
from hetsched.fpga.layers import Image, network
from hetsched.fpga.program import Fold, Place, Program, fits, program
from hetsched.fpga.reference import signed, unsigned
from hetsched.graph import Graph
from hetsched.op import Tensor
from hetsched.target import Artifact, Begun, Done, Footprint, Kernel, Target

INSTRUCTIONS, LAYOUT = "instructions.bin", "layout.json"
CONSTANTS = "constants"
ENGINES = (*sorted(PACKAGES), "instructions")
# To write a few registers of the core and to hear of its end: an assumption, not a measurement.
LAUNCH_SECONDS = 5e-6
# By how many units results may differ from ONNX Runtime's. They are the same where it computes with
# integers; bytes with a sign it restores to floats, which it may round otherwise.
UNITS = 1
# Cycles in which nothing moves, after which a core is taken to be stuck.
PATIENCE = 1_000_000
# More than 32 bits of addresses reach is no program of ours.
MOST_NBYTES = 2**32

PLACE = {
    "start": int,
    "image": {"channels": int, "height": int, "width": int, "last": bool},
    "fold?": dict.fromkeys(("columns", "stride", "dilation", "before", "width", "fill"), int),
}
DOCUMENT = {
    "overlay": {str: int},
    "nbytes": int,
    "cycles": int,
    "inputs": [PLACE],
    "outputs": [PLACE],
}


@dataclass(frozen=True)
class Fpga(Target):
    """Device strings are `fpga:ecp5-8x8`, or another size of the overlay.

    `engine` runs the parts: `verilator` or `cxxrtl`, made from the RTL, or `instructions`, which
    needs no compiler and computes the same. `grade` is the part's speed grade. Memory answers a
    read after `latency` cycles, and takes a beat of 8 bytes every `period` cycles.
    """

    engine: str = "verilator"
    grade: int = 6
    latency: int = 24
    period: int = 1

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise PluginError(f"no engine '{self.engine}'; there are {', '.join(ENGINES)}")
        try:
            board("ecp5-8x8", self.grade)
            Memory(self.latency, 1, self.period)
        except DeviceError as error:
            raise PluginError(str(error)) from None

    def unavailable(self) -> str | None:
        return None if find_spec("numba") else "numba is not installed"

    def problems(self) -> tuple[str, ...]:
        reason = None if self.engine == "instructions" else why_not(self.engine)
        return () if reason is None else (f"{reason}, or fpga:engine=instructions",)

    def devices(self) -> list[str]:
        return ["fpga:ecp5-8x8", "fpga:ecp5-16x8"]

    def device(self, name: str) -> Device:
        target, colon, part = name.partition(":")
        if target != "fpga" or not colon:
            raise DeviceError(f"'{name}' is no overlay; fpga:ecp5-8x8 would do", name)
        found = board(part, self.grade)
        return Device(
            name=name,
            target=self.name,
            kind="fpga",
            description=found.description,
            clock_hz=found.clock_hz,
            isa=f"{part} grade {self.grade}",
            memory_bytes=float(MOST_NBYTES),
            memory_space="host",
            flops_per_second=2 * found.macs_per_second,
            bytes_per_second=found.bytes_per_second / self.period,
            launch_seconds=LAUNCH_SECONDS,
            fingerprint=f"{part} grade {self.grade} at {found.clock_hz:.0f} Hz",
            modelled=True,
        )

    def version(self) -> str:
        return f"overlay {_sources()}, latency {self.latency}, period {self.period}"

    def refusal(self, graph: Graph, device: Device) -> str | None:
        try:
            fits(network(graph), self._board(device).overlay)
        except UnsupportedOperation as error:
            return str(error)
        return None

    def seconds(self, graph: Graph, device: Device) -> float:
        made = self._program(graph, device)
        return self._cycles(made) / device.clock_hz

    def units(self, graph: Graph, device: Device) -> int:
        return UNITS

    def compile(self, graph: Graph, device: Device) -> Artifact:
        try:
            made = self._program(graph, device)
        except UnsupportedOperation as error:
            raise CompileError(f"part '{graph.name}' on '{device.name}': {error}") from None
        stored = made.network.stored

        def places(tensors: Sequence[Tensor]) -> list[dict[str, Any]]:
            return [_told(made.places[stored[tensor.name]]) for tensor in tensors]

        document = {
            "overlay": asdict(made.overlay),
            "nbytes": made.nbytes,
            "cycles": self._cycles(made),
            "inputs": places(made.network.inputs),
            "outputs": places(made.network.outputs),
        }
        files = {
            LAYOUT: json.dumps(document, sort_keys=True).encode(),
            INSTRUCTIONS: encode((Sync(), *made.instructions)).astype("<u8").tobytes(),
        }
        # By content: parts of one plan may have constants of one name.
        digest = sha256(made.constants.tobytes()).hexdigest()[:16]
        return Artifact(files, {f"{CONSTANTS} {digest}": made.constants}, requires=device.isa)

    def footprint(self, graph: Graph, device: Device) -> Footprint | None:
        return self.held(self.compile(graph, device))

    def held(self, artifact: Artifact) -> Footprint | None:
        nbytes = json.loads(artifact.files[LAYOUT])["nbytes"]
        weights = {name: array.nbytes for name, array in artifact.weights.items()}
        return Footprint(weights, nbytes - sum(weights.values()))

    def load(self, artifact: Artifact, graph: Graph, device: Device) -> Kernel:
        if self.engine != "instructions" and (reason := why_not(self.engine)):
            raise DeviceError(f"{reason}, or fpga:engine=instructions", device.name)
        return _Loaded(artifact, graph, device, self)

    def _program(self, graph: Graph, device: Device) -> Program:
        return program(network(graph), self._board(device).overlay)

    def _board(self, device: Device) -> Board:
        return board(device.name.partition(":")[2], self.grade)

    def _cycles(self, made: Program) -> int:
        # Late, because it loads Numba.
        from hetsched.fpga.cycles import cycles

        instructions = (Sync(), *made.instructions)
        return cycles(made.overlay, instructions, self.latency, 1, self.period).cycles


class _Loaded(Kernel):
    """A program with its memory, and the engine that runs it."""

    def __init__(self, artifact: Artifact, graph: Graph, device: Device, target: Fpga) -> None:
        self._name = graph.name
        document = self._document(artifact)
        self._graph = graph
        self._seconds = document["cycles"] / device.clock_hz
        try:
            self._overlay = Overlay(**document["overlay"])
            self._instructions = tuple(decode(np.frombuffer(artifact.files[INSTRUCTIONS], "<u8")))
        except (DeviceError, TypeError, ValueError) as error:
            raise self._damaged(str(error)) from None
        self._inputs = self._places(document, "inputs", len(graph.inputs))
        self._outputs = self._places(document, "outputs", len(graph.outputs))
        (constants,) = artifact.weights.values()
        self._memory = np.zeros(document["nbytes"], np.uint8)
        self._memory[: len(constants)] = constants
        self._core: Engine | None = None
        self._execute = self._engine(target)

    def _document(self, artifact: Artifact) -> dict[str, Any]:
        if set(artifact.files) != {LAYOUT, INSTRUCTIONS} or len(artifact.weights) != 1:
            raise self._damaged("its files are those of another target")
        text = artifact.files[LAYOUT].decode(errors="replace")
        document: dict[str, Any] = parse(text, PackageError, f"part '{self._name}': {LAYOUT}")
        check(document, DOCUMENT, "layout", PackageError, f"part '{self._name}': ")
        (constants,) = artifact.weights.values()
        if constants.dtype != np.uint8 or constants.ndim != 1:
            raise self._damaged("its constants are no bytes")
        if not len(constants) <= document["nbytes"] < MOST_NBYTES or document["cycles"] < 0:
            raise self._damaged(f"it has {document['nbytes']} bytes of memory")
        return document

    def _damaged(self, what: str) -> PackageError:
        return PackageError(f"part '{self._name}' is damaged: {what}")

    def _places(self, document: Mapping[str, Any], kind: str, count: int) -> list[Place]:
        found = []
        for item in document[kind]:
            fold = Fold(**item["fold"]) if item.get("fold") else None
            place = Place(item["start"], self._overlay.rows, Image(**item["image"]), fold)
            sizes = (place.start, place.image.height, place.image.width, place.image.channels)
            if min(sizes) < 0 or place.start + place.nbytes > document["nbytes"]:
                raise self._damaged(f"{kind} leave its memory")
            found.append(place)
        if len(found) != count:
            raise self._damaged(f"it has {len(found)} {kind}, not {count}")
        return found

    def _engine(self, target: Fpga) -> Callable[[], None]:
        if target.engine == "instructions":
            # Late, because it loads Numba.
            from hetsched.fpga.simulator import execute

            return lambda: execute(self._overlay, self._instructions, self._memory)
        engine, words = Engine(self._overlay, target.engine), encode(self._instructions)
        self._core = engine
        dram = Memory(target.latency, 1, target.period)

        def launch() -> None:
            engine.run(words, self._memory, dram, PATIENCE)

        return launch

    def run(self, inputs: Sequence[Any]) -> Sequence[Any]:
        for place, tensor, array in zip(self._inputs, self._graph.inputs, inputs, strict=True):
            values = signed(np.asarray(array)).reshape(tensor.shape)
            source = place.image if place.fold is None else _before(tensor)
            place.write(self._memory, source.array(values))
        self._execute()
        found = []
        for place, tensor in zip(self._outputs, self._graph.outputs, strict=True):
            values = place.image.values(place.read(self._memory), tensor.shape)
            found.append(unsigned(values) if tensor.dtype == "uint8" else values)
        return found

    def begin(self, inputs: Sequence[Any]) -> Begun:
        """The call, with the time that the core would take instead of the simulator's."""
        start = perf_counter()
        outputs = self.run(inputs)
        return Done(outputs, (start, start + self._seconds))

    def close(self) -> None:
        if self._core is not None:
            self._core.close()


def _before(tensor: Tensor) -> Image:
    """An image before it is folded."""
    _, channels, *area = tensor.shape
    return Image(channels, area[0] if len(area) == 2 else 1, area[-1])


def _told(place: Place) -> dict[str, Any]:
    told = {"start": place.start, "image": asdict(place.image)}
    return told | ({"fold": asdict(place.fold)} if place.fold else {})


def _sources() -> str:
    """A digest of what makes programs and their times."""
    digest = sha256()
    for path in sorted(Path(fpga.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
