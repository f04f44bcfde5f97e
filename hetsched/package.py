"""The package `.hsp`: a compiled plan in one file that loads without a compiler.

A zip archive, stored, not compressed: `manifest.json` (format version, SHA-256 and size of each
member, what each part needs of its device), `plan.json`, `model.onnx` (the graph without large
weights), `parts/NAME/...` (what the targets compiled) and `weights.bin`, in which each distinct
array stands once, aligned, so that it is mapped into memory where it lies. All of it is data: it is
parsed and checked, and only a target's own loader makes code of a part.
"""

import json
import struct
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError

from hetsched.compiler import CompiledPart
from hetsched.dtype import numpy_dtype, raw_bytes
from hetsched.errors import HetschedError, PackageError
from hetsched.files import replacing
from hetsched.graph import DETACHED_NBYTES, from_onnx, to_onnx
from hetsched.plan import Plan
from hetsched.target import Artifact

FORMAT = "hetsched-package"
VERSION = 1
# Of every array in weights.bin, and of weights.bin in the file: a cache line, which is also the
# widest vector and what DLPack asks for; pages for the whole.
ARRAY_ALIGNMENT = 64
FILE_ALIGNMENT = 4096
# Fixed, so that the same content makes the same file.
EPOCH = (1980, 1, 1, 0, 0, 0)
CHUNK = 1 << 22
# Of the zip format: a member's local header without name and extra fields, the field that a member
# of 2 GiB or more needs there, and an identifier that readers pass over.
LOCAL_HEADER_NBYTES = 30
ZIP64_FIELD_NBYTES = 20
PADDING_FIELD = 0xD935


@dataclass(frozen=True)
class _Stored:
    """Where an array lies in weights.bin."""

    offset: int
    dtype: str
    shape: tuple[int, ...]


class _Weights:
    """The content of weights.bin in the making: each distinct array once."""

    def __init__(self) -> None:
        self.arrays: list[np.ndarray] = []
        self.stored: list[_Stored] = []
        self._index: dict[tuple[str, tuple[int, ...], bytes], int] = {}
        self.nbytes = 0

    def add(self, array: np.ndarray) -> int:
        """The number of `array` in the file."""
        array = np.asarray(array, order="C")
        key = (array.dtype.name, array.shape, sha256(raw_bytes(array)).digest())
        if key not in self._index:
            offset = -(-self.nbytes // ARRAY_ALIGNMENT) * ARRAY_ALIGNMENT
            self._index[key] = len(self.arrays)
            self.arrays.append(array)
            self.stored.append(_Stored(offset, array.dtype.name, array.shape))
            self.nbytes = offset + array.nbytes
        return self._index[key]

    def pieces(self) -> Iterator[bytes | memoryview]:
        """The content, padding and arrays in turn."""
        position = 0
        for array, stored in zip(self.arrays, self.stored, strict=True):
            yield bytes(stored.offset - position)
            yield raw_bytes(array)
            position = stored.offset + array.nbytes


def write(path: str | Path, plan: Plan, parts: Sequence[CompiledPart]) -> None:
    """Writes the package aside, then in the place of `path`.

    Raises
    ------
    OutputFileError
        The file cannot be written; an older one is untouched.
    """
    weights = _Weights()
    graph = plan.graph
    constants = {
        name: weights.add(array)
        for name, array in graph.constants.items()
        if array.nbytes >= DETACHED_NBYTES and array.dtype != object
    }
    members: dict[str, bytes] = {
        "plan.json": plan.to_json().encode(),
        "model.onnx": to_onnx(graph, weights=False).SerializeToString(deterministic=True),
    }
    described = []
    for item in parts:
        folder = f"parts/{item.part.name}"
        members |= {f"{folder}/{name}": data for name, data in item.artifact.files.items()}
        described.append(
            {
                "name": item.part.name,
                "device": item.part.device.name,
                "target": item.part.device.target,
                "requires": item.artifact.requires,
                "files": list(item.artifact.files),
                "weights": [
                    [name, weights.add(array)] for name, array in item.artifact.weights.items()
                ],
            }
        )
    with replacing(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        digests = {name: _member(archive, name, data) for name, data in members.items()}
        digests["weights.bin"] = _weights_member(archive, file, weights)
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "members": digests,
            "constants": constants,
            "arrays": [[s.offset, s.dtype, list(s.shape)] for s in weights.stored],
            "parts": described,
        }
        text = json.dumps(manifest, indent=1).encode()
        archive.comment = _member(archive, "manifest.json", text).encode()


def read(path: str | Path) -> tuple[Plan, tuple[CompiledPart, ...]]:
    """The plan and the compiled parts of a package; weights stay in the file, mapped.

    Raises
    ------
    PackageError
        The file is missing, truncated, edited, foreign, or of a newer format.
    """
    path = Path(path)
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            return _read(path, file, archive)
    except OSError as error:
        raise PackageError(f"cannot read '{path}': {error.strerror or error}") from None
    except (zipfile.BadZipFile, EOFError, NotImplementedError, struct.error) as error:
        raise PackageError(f"'{path}' is no package, or is truncated: {error}") from None
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RecursionError) as error:
        raise PackageError(f"'{path}' is damaged: its manifest does not fit ({error})") from None
    except DecodeError:
        raise PackageError(f"'{path}' is damaged: model.onnx does not parse") from None
    except PackageError:
        raise
    except HetschedError as error:
        raise PackageError(f"'{path}' is damaged: {error}") from None


def _read(
    path: Path, file: IO[bytes], archive: zipfile.ZipFile
) -> tuple[Plan, tuple[CompiledPart, ...]]:
    manifest = _manifest(path, archive)
    _check_members(path, manifest, archive)
    arrays = _map_weights(path, file, archive, manifest["arrays"])
    model = onnx.ModelProto.FromString(archive.read("model.onnx"))
    weights = {str(name): arrays[index] for name, index in manifest["constants"].items()}
    graph = from_onnx(model, weights)
    plan = Plan.from_json(archive.read("plan.json").decode(), graph)
    described = {str(part["name"]): part for part in manifest["parts"]}
    if list(described) != [part.name for part in plan.parts]:
        raise PackageError(f"'{path}' is damaged: its parts are not those of its plan")
    parts = []
    for part in plan.parts:
        entry = described[part.name]
        artifact = Artifact(
            files={name: archive.read(f"parts/{part.name}/{name}") for name in entry["files"]},
            weights={str(name): arrays[index] for name, index in entry["weights"]},
            requires=str(entry["requires"]),
        )
        parts.append(CompiledPart(part, graph.part(part.ops, part.name), artifact))
    return plan, tuple(parts)


def _manifest(path: Path, archive: zipfile.ZipFile) -> dict[str, Any]:
    if "manifest.json" not in archive.namelist():
        raise PackageError(f"'{path}' is a zip archive but no package: it has no manifest.json")
    text = archive.read("manifest.json")
    if archive.comment != sha256(text).hexdigest().encode():
        raise PackageError(f"'{path}' is damaged: manifest.json does not have its SHA-256")
    try:
        manifest = json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise PackageError(f"'{path}' is damaged: manifest.json does not parse") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise PackageError(f"'{path}' is no package of hetsched")
    if manifest.get("version") != VERSION:
        raise PackageError(
            f"'{path}' has package format {manifest.get('version')}; this hetsched reads "
            f"{VERSION}; compile the model again"
        )
    return manifest


def _check_members(path: Path, manifest: Mapping[str, Any], archive: zipfile.ZipFile) -> None:
    expected = dict(manifest["members"])
    there = archive.namelist()
    odd = sorted(set(there) ^ {*expected, "manifest.json"})
    if odd or len(there) != len(set(there)):
        raise PackageError(f"'{path}' is damaged: '{(odd or there)[0]}' is missing or too many")
    for name, digest in expected.items():
        found = sha256()
        with archive.open(name) as member:
            while chunk := member.read(CHUNK):
                found.update(chunk)
        if found.hexdigest() != digest:
            raise PackageError(f"'{path}' is damaged: '{name}' does not have its SHA-256")


def _map_weights(
    path: Path, file: IO[bytes], archive: zipfile.ZipFile, entries: Sequence[Sequence[Any]]
) -> list[np.ndarray]:
    info = archive.getinfo("weights.bin")
    if info.compress_type != zipfile.ZIP_STORED:
        raise PackageError(f"'{path}' is damaged: weights.bin is compressed")
    if info.file_size == 0:
        whole = np.zeros(0, np.uint8)
    else:
        # Copy on write: the file stays as it is, and no reader insists on a writable array.
        whole = np.memmap(path, np.uint8, "c", _data_offset(file, info), (info.file_size,))
    arrays = []
    for offset, dtype, shape in entries:
        kind = numpy_dtype(str(dtype))
        nbytes = kind.itemsize * int(np.prod(shape, dtype=np.int64))
        if offset < 0 or nbytes < 0 or offset + nbytes > whole.size:
            raise PackageError(f"'{path}' is damaged: an array lies outside of weights.bin")
        arrays.append(whole[offset : offset + nbytes].view(kind).reshape(tuple(shape)))
    return arrays


def _data_offset(file: IO[bytes], info: zipfile.ZipInfo) -> int:
    """Where a member's bytes begin: behind its local header, which has a name and extra fields."""
    file.seek(info.header_offset)
    header = file.read(LOCAL_HEADER_NBYTES)
    name: int
    extra: int
    name, extra = struct.unpack("<26xHH", header)
    return info.header_offset + LOCAL_HEADER_NBYTES + name + extra


def _member(archive: zipfile.ZipFile, name: str, data: bytes) -> str:
    archive.writestr(zipfile.ZipInfo(name, EPOCH), data)
    return sha256(data).hexdigest()


def _weights_member(archive: zipfile.ZipFile, file: IO[bytes], weights: _Weights) -> str:
    """Writes weights.bin where a page begins, by a padding field in its header."""
    info = zipfile.ZipInfo("weights.bin", EPOCH)
    large = weights.nbytes > zipfile.ZIP64_LIMIT // 2
    start = file.tell() + LOCAL_HEADER_NBYTES + len(info.filename) + large * ZIP64_FIELD_NBYTES
    # An extra field has four bytes of its own.
    padding = -(start + 4) % FILE_ALIGNMENT
    info.extra = struct.pack("<HH", PADDING_FIELD, padding) + bytes(padding)
    digest = sha256()
    with archive.open(info, "w", force_zip64=large) as member:
        for piece in weights.pieces():
            digest.update(piece)
            member.write(piece)
    return digest.hexdigest()
