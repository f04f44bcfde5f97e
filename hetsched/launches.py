"""A part as kernels in source form and the launches of them: what OpenCL and CUDA devices run.

A `Program` is data. Whoever loads it compiles `source`, holds the regions of memory that the places
of arguments name, and starts the launches in their order, each after the end of the one before.
What a package says is checked before anything is compiled: every place lies in its region, every
kernel is in the source.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from math import prod
from typing import Any

from hetsched.document import check, parse
from hetsched.dtype import STRING, onnx_code
from hetsched.errors import PackageError
from hetsched.op import Tensor

# The language of a source, and the file of an artifact that has it.
SOURCES = {"opencl": "kernels.cl", "cuda": "kernels.cu"}
# The other files of an artifact.
LAUNCHES = "launches.json"
CONSTANTS = "constants.bin"
VERSION = 1
# The regions of memory, and what tells those of one kind apart.
INPUT, OUTPUT, WEIGHT, CONSTANT, WORKSPACE = "input", "output", "weight", "constants", "workspace"
NUMBERED = (INPUT, OUTPUT)
WRITABLE = (OUTPUT, WORKSPACE)
# Of a kernel: drivers make names of files of it, and PoCL ends the process where one is too long.
MOST_LETTERS = 200
IDENTIFIER = re.compile(rf"[A-Za-z_][A-Za-z0-9_]{{0,{MOST_LETTERS - 1}}}")
# Of a kernel in a source.
KERNEL = re.compile(
    r"\b(?:__kernel|kernel|__global__)\b[^;{}]*?\b(?!__launch_bounds__)([A-Za-z_][A-Za-z0-9_]*)\s*\("
)
# Stands before each kernel of a source, and the functions that it alone calls, where it needs else
# only what stands before the first of these lines.
APART = "\n// A kernel that may be built alone.\n"
MOST_AXES = 3
# Of work-items along an axis, and of bytes anywhere.
LARGEST_EXTENT = (1 << 31) - 1
LARGEST_NBYTES = (1 << 48) - 1

_SHAPE = {
    "version": int,
    "language": str,
    "digest": str,
    "inputs": [{"name": str, "shape": [int], "dtype": str}],
    "outputs": [{"name": str, "shape": [int], "dtype": str}],
    "weights": {str: int},
    "constants_nbytes": int,
    "workspace_nbytes": int,
    "launches": [
        {
            "kernel": str,
            "global": [int],
            "local": [int],
            "shared_nbytes?": int,
            "case?": int,
            "arguments": [{"place": [(int, str)], "written": bool}],
        }
    ],
}


@dataclass(frozen=True)
class Place:
    """The bytes that a kernel's pointer points to: `nbytes` in a region, from `start`.

    `region` is "input" or "output", of which `which` is the number, "weight", of which it is the
    name, or "constants" or "workspace", of which there is one each. Only what is `written` may
    change; it may be read as well.
    """

    region: str
    which: int | str
    start: int
    nbytes: int
    written: bool = False


@dataclass(frozen=True)
class Launch:
    """A call of a kernel on `global_size` work-items, in groups of `local_size`, which divides it.

    Arguments are pointers, in the order of the kernel's parameters. A kernel in OpenCL C may do one
    of several things: its last parameter is then an int, the `case`. `shared_nbytes` is the memory
    of a group that the launch has to ask for beside what the source declares (CUDA's dynamic shared
    memory).
    """

    kernel: str
    global_size: tuple[int, ...]
    local_size: tuple[int, ...]
    arguments: tuple[Place, ...]
    shared_nbytes: int = 0
    case: int | None = None

    @property
    def groups(self) -> tuple[int, ...]:
        """The number of work-groups along each axis: CUDA's grid."""
        return tuple(
            whole // part for whole, part in zip(self.global_size, self.local_size, strict=True)
        )


@dataclass(frozen=True, eq=False)
class Program:
    """The kernels of a part in `source`, and their `launches` in order.

    Inputs and outputs are compact tensors as the part's graph hands them over, outputs those that
    operations make, each once. `weights` are the bytes of each array that kernels read, in an order
    of the program's own; `constants` are small ones behind each other, each aligned as its
    places say. The workspace means nothing before and after a run.

    Raises
    ------
    PackageError
        A launch that no kernel of the source fits, or a place that is not in its region.
    """

    language: str
    source: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    launches: tuple[Launch, ...]
    weights: Mapping[str, int] = field(default_factory=dict)
    constants: bytes = b""
    workspace_nbytes: int = 0

    def __post_init__(self) -> None:
        if self.language not in SOURCES:
            raise PackageError(f"'{self.language}' is no language; there are {', '.join(SOURCES)}")
        for tensor in (*self.inputs, *self.outputs):
            _check_tensor(tensor)
        for name, nbytes in (*self.weights.items(), (WORKSPACE, self.workspace_nbytes)):
            if not 0 <= nbytes <= LARGEST_NBYTES:
                raise PackageError(f"'{name}' has {nbytes} bytes")
        kernels = frozenset(KERNEL.findall(self.source))
        for index, launch in enumerate(self.launches):
            where = f"launch {index}, of '{launch.kernel:.40}',"
            if not IDENTIFIER.fullmatch(launch.kernel) or launch.kernel not in kernels:
                raise PackageError(f"{where} is of no kernel in the source")
            _check_sizes(launch, where)
            if launch.case is not None and self.language != "opencl":
                raise PackageError(f"{where} has a case, which kernels of {self.language} have not")
            for place in launch.arguments:
                self._check_place(place, where)

    def region_nbytes(self, region: str, which: int | str = 0) -> int:
        """The size of a region.

        Raises
        ------
        PackageError
            There is none of that name.
        """
        if region in NUMBERED and isinstance(which, int):
            tensors = self.inputs if region == INPUT else self.outputs
            if 0 <= which < len(tensors):
                return tensors[which].nbytes
        elif region == WEIGHT and isinstance(which, str) and which in self.weights:
            return self.weights[which]
        elif region == CONSTANT and which == 0:
            return len(self.constants)
        elif region == WORKSPACE and which == 0:
            return self.workspace_nbytes
        raise PackageError(f"no region '{region:.40}' {which!r:.40}")

    def _check_place(self, place: Place, where: str) -> None:
        size = self.region_nbytes(place.region, place.which)
        if place.start < 0 or place.nbytes <= 0 or place.start + place.nbytes > size:
            raise PackageError(
                f"{where} wants {place.nbytes} bytes from {place.start} of the {size} of "
                f"{place.region} {place.which!r:.40}"
            )
        if place.written and place.region not in WRITABLE:
            raise PackageError(f"{where} writes to {place.region} {place.which!r:.40}")

    def to_json(self) -> str:
        """Everything but `source` and `constants`, which are files of their own."""
        return json.dumps(
            {
                "version": VERSION,
                "language": self.language,
                "digest": _digest(self.source, self.constants),
                "inputs": list(map(_plain, self.inputs)),
                "outputs": list(map(_plain, self.outputs)),
                "weights": dict(self.weights),
                "constants_nbytes": len(self.constants),
                "workspace_nbytes": self.workspace_nbytes,
                "launches": [
                    {
                        "kernel": launch.kernel,
                        "global": launch.global_size,
                        "local": launch.local_size,
                        "shared_nbytes": launch.shared_nbytes,
                        **({} if launch.case is None else {"case": launch.case}),
                        "arguments": [
                            {
                                "place": [place.region, place.which, place.start, place.nbytes],
                                "written": place.written,
                            }
                            for place in launch.arguments
                        ],
                    }
                    for launch in self.launches
                ],
            },
            indent=1,
        )

    @classmethod
    def from_json(cls, text: str, source: str, constants: bytes = b"") -> "Program":
        """What `to_json` wrote, with the files beside it.

        Raises
        ------
        PackageError
            The text is no program, of another version, or does not fit the files.
        """
        found = parse(text, PackageError, LAUNCHES)
        check(found, _SHAPE, LAUNCHES, PackageError)
        if found["version"] != VERSION:
            raise PackageError(f"{LAUNCHES} has version {found['version']}, not {VERSION}")
        if found["constants_nbytes"] != len(constants):
            raise PackageError(
                f"{CONSTANTS} has {len(constants)} bytes, not {found['constants_nbytes']}"
            )
        if found["digest"] != _digest(source, constants):
            raise PackageError(f"{SOURCES.get(found['language'])} or {CONSTANTS} was changed")
        return cls(
            found["language"],
            source,
            _tensors(found["inputs"]),
            _tensors(found["outputs"]),
            tuple(map(_launch, found["launches"])),
            dict(found["weights"]),
            constants,
            found["workspace_nbytes"],
        )

    def files(self) -> dict[str, bytes]:
        """The files of an artifact that `from_files` reads."""
        files = {SOURCES[self.language]: self.source.encode(), LAUNCHES: self.to_json().encode()}
        if self.constants:
            files[CONSTANTS] = self.constants
        return files

    @classmethod
    def from_files(cls, files: Mapping[str, bytes], language: str) -> "Program":
        """The program in the files of an artifact.

        Raises
        ------
        PackageError
            A file is missing or damaged, or the program is in another language.
        """
        text, source = (_text(files, name) for name in (LAUNCHES, SOURCES[language]))
        program = cls.from_json(text, source, files.get(CONSTANTS, b""))
        if program.language != language:
            raise PackageError(f"{LAUNCHES} is in {program.language}, not {language}")
        return program


def _digest(source: str, constants: bytes) -> str:
    return sha256(source.encode() + b"\0" + constants).hexdigest()


def _text(files: Mapping[str, bytes], name: str) -> str:
    if name not in files:
        raise PackageError(f"'{name}' is missing")
    try:
        return files[name].decode()
    except UnicodeDecodeError:
        raise PackageError(f"'{name}' is no text") from None


def _plain(tensor: Tensor) -> dict[str, Any]:
    return {"name": tensor.name, "shape": tensor.shape, "dtype": tensor.dtype}


def _tensors(found: Sequence[Mapping[str, Any]]) -> tuple[Tensor, ...]:
    return tuple(Tensor(item["name"], tuple(item["shape"]), item["dtype"]) for item in found)


def _launch(found: Mapping[str, Any]) -> Launch:
    return Launch(
        found["kernel"],
        tuple(found["global"]),
        tuple(found["local"]),
        tuple(map(_place, found["arguments"])),
        found.get("shared_nbytes", 0),
        found.get("case"),
    )


def _place(found: Mapping[str, Any]) -> Place:
    match found["place"]:
        case [str(region), (int() | str()) as which, int(start), int(nbytes)]:
            return Place(region, which, start, nbytes, found["written"])
    raise PackageError(f"{found['place']!r:.40} is no place")


def _check_tensor(tensor: Tensor) -> None:
    try:
        onnx_code(tensor.dtype)
    except KeyError:
        raise PackageError(
            f"'{tensor.name:.40}' is of the unknown type {tensor.dtype:.40}"
        ) from None
    if tensor.dtype == STRING:
        raise PackageError(f"'{tensor.name:.40}' is of strings")
    if min(tensor.shape, default=1) < 1 or tensor.nbytes > LARGEST_NBYTES:
        raise PackageError(f"'{tensor.name:.40}' has the shape {list(tensor.shape)!r:.60}")


def _check_sizes(launch: Launch, where: str) -> None:
    wide, local = launch.global_size, launch.local_size
    if not 1 <= len(wide) == len(local) <= MOST_AXES:
        raise PackageError(f"{where} has {len(wide)} global and {len(local)} local sizes")
    for whole, part in zip(wide, local, strict=True):
        if not 1 <= part <= whole <= LARGEST_EXTENT or whole % part:
            raise PackageError(f"{where} has {whole} work-items in groups of {part}")
    if prod(local) > LARGEST_EXTENT or not 0 <= launch.shared_nbytes <= LARGEST_EXTENT:
        raise PackageError(f"{where} has {launch.shared_nbytes} shared bytes for {prod(local)}")
    if launch.case is not None and not 0 <= launch.case <= LARGEST_EXTENT:
        raise PackageError(f"{where} is for the case {launch.case}")
