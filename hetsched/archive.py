"""A file of named bytes and of arrays that are mapped into memory where they lie, all checked.

A zip archive, stored, not compressed: small members, `weights.bin` with each distinct array once,
aligned, and `manifest.json` with the SHA-256 of every member, and place and CRC-32 of every array.
All of it is data: it is parsed and checked, never evaluated.
"""

import json
import os
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

import numpy as np

from hetsched.dtype import numpy_dtype, raw_bytes
from hetsched.errors import PackageError
from hetsched.files import replacing
from hetsched.host import cores

MANIFEST = "manifest.json"
WEIGHTS = "weights.bin"
# Of every array in weights.bin, and of weights.bin in the file: a cache line, which is also the
# widest vector and what DLPack asks for; pages for the whole.
ARRAY_ALIGNMENT = 64
FILE_ALIGNMENT = 4096
# Fixed, so that the same content makes the same file.
EPOCH = (1980, 1, 1, 0, 0, 0)
# Read at once where an array is checked: it is still in the second-level cache when it is summed.
CHUNK = 1 << 18
# More threads than this read no faster.
MOST_READERS = 4
# Of the zip format: a member's local header without name and extra fields, the field that a member
# of 2 GiB or more needs there, and an identifier that readers pass over.
LOCAL_HEADER_NBYTES = 30
ZIP64_FIELD_NBYTES = 20
PADDING_FIELD = 0xD935


@dataclass(frozen=True)
class _Stored:
    """Where an array lies in weights.bin, and the CRC-32 of its bytes."""

    offset: int
    dtype: str
    shape: tuple[int, ...]
    crc32: int

    @property
    def nbytes(self) -> int:
        return numpy_dtype(self.dtype).itemsize * int(np.prod(self.shape, dtype=np.int64))


class Arrays:
    """The arrays of an archive in the making: each distinct one once."""

    def __init__(self) -> None:
        self.nbytes = 0
        self.stored: list[_Stored] = []
        self._arrays: list[np.ndarray] = []
        self._alike: dict[tuple[str, tuple[int, ...], int], list[int]] = {}
        # Of the array objects themselves, which live as long as this.
        self._known: dict[int, tuple[int, np.ndarray]] = {}

    def add(self, array: np.ndarray) -> int:
        """The number of `array` in the file."""
        if id(array) not in self._known:
            self._known[id(array)] = self._number(np.asarray(array, order="C")), array
        return self._known[id(array)][0]

    def _number(self, array: np.ndarray) -> int:
        content = raw_bytes(array)
        crc32 = zlib.crc32(content)
        alike = self._alike.setdefault((array.dtype.name, array.shape, crc32), [])
        for index in alike:
            if raw_bytes(self._arrays[index]) == content:
                return index
        alike.append(len(self._arrays))
        offset = -(-self.nbytes // ARRAY_ALIGNMENT) * ARRAY_ALIGNMENT
        self.stored.append(_Stored(offset, array.dtype.name, array.shape, crc32))
        self._arrays.append(array)
        self.nbytes = offset + array.nbytes
        return alike[-1]

    def pieces(self) -> Iterator[bytes | memoryview]:
        """The content, padding and arrays in turn."""
        position = 0
        for array, stored in zip(self._arrays, self.stored, strict=True):
            yield bytes(stored.offset - position)
            yield raw_bytes(array)
            position = stored.offset + array.nbytes


def write(
    path: str | Path,
    about: Mapping[str, Any],
    members: Mapping[str, bytes],
    arrays: Arrays,
    durable: bool = True,
) -> None:
    """Writes the archive aside, then in the place of `path`; the manifest begins with `about`.

    Raises
    ------
    OutputFileError
        The file cannot be written; an older one is untouched.
    """
    with (
        replacing(path, durable) as file,
        zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
    ):
        digests = {name: _member(archive, name, data) for name, data in members.items()}
        _write_arrays(archive, file, arrays)
        manifest = {
            **about,
            "members": digests,
            "arrays": [[s.offset, s.dtype, list(s.shape), s.crc32] for s in arrays.stored],
        }
        text = json.dumps(manifest, indent=1).encode()
        archive.comment = _member(archive, MANIFEST, text).encode()


class Archive:
    """An open archive: its manifest, members and arrays. Arrays are mapped, and stay so."""

    def __init__(self, path: Path, file: IO[bytes], archive: zipfile.ZipFile, name: str) -> None:
        self._path = path
        self._file = file
        self._archive = archive
        self.manifest = self._manifest(name)
        self._digests = dict(self.manifest["members"])
        self._check_names()
        self._stored = [
            _Stored(int(offset), str(dtype), tuple(shape), int(crc32))
            for offset, dtype, shape, crc32 in self.manifest["arrays"]
        ]
        self._start, self.arrays = self._map()

    def member(self, name: str) -> bytes:
        """The bytes of a member, checked."""
        data = self._archive.read(name)
        if sha256(data).hexdigest() != self._digests[name]:
            raise self._damage(f"'{name}' does not have its SHA-256")
        return data

    def check(self, numbers: Iterable[int] | None = None) -> None:
        """Reads these arrays, or all, and compares their checksums.

        Read rather than touched where they are mapped: what only is checked takes no memory.
        """
        chosen = range(len(self._stored)) if numbers is None else sorted(set(numbers))
        # The longest first, so that the threads end together.
        order = sorted(chosen, key=lambda number: -self._stored[number].nbytes)
        with ThreadPoolExecutor(min(MOST_READERS, len(cores()))) as readers:
            for number, whole in zip(order, readers.map(self._is_whole, order), strict=True):
                if not whole:
                    raise self._damage(f"array {number} of {WEIGHTS} does not have its CRC-32")

    def _is_whole(self, number: int) -> bool:
        stored = self._stored[number]
        buffer = memoryview(bytearray(min(CHUNK, stored.nbytes)))
        crc32, done = 0, 0
        while done < stored.nbytes:
            room = buffer[: stored.nbytes - done]
            count = os.preadv(self._file.fileno(), [room], self._start + stored.offset + done)
            if not count:
                return False
            crc32 = zlib.crc32(room[:count], crc32)
            done += count
        return crc32 == stored.crc32

    def _manifest(self, name: str) -> dict[str, Any]:
        if MANIFEST not in self._archive.namelist():
            raise PackageError(
                f"'{self._path}' is a zip archive but no {name}: it has no {MANIFEST}"
            )
        text = self._archive.read(MANIFEST)
        if self._archive.comment != sha256(text).hexdigest().encode():
            raise self._damage(f"{MANIFEST} does not have its SHA-256")
        try:
            manifest = json.loads(text)
        except (json.JSONDecodeError, UnicodeDecodeError):
            raise self._damage(f"{MANIFEST} does not parse") from None
        form = manifest.get("format") if isinstance(manifest, dict) else None
        if form != f"hetsched-{name}":
            raise PackageError(f"'{self._path}' is no {name} of hetsched")
        return dict(manifest)

    def _check_names(self) -> None:
        there = self._archive.namelist()
        odd = sorted(set(there) ^ {*self._digests, WEIGHTS, MANIFEST})
        if odd or len(there) != len(set(there)):
            raise self._damage(f"'{(odd or there)[0]}' is missing or too many")

    def _map(self) -> tuple[int, list[np.ndarray]]:
        info = self._archive.getinfo(WEIGHTS)
        if info.compress_type != zipfile.ZIP_STORED:
            raise self._damage(f"{WEIGHTS} is compressed")
        start = self._data_offset(info)
        if info.file_size == 0:
            whole = np.zeros(0, np.uint8)
        else:
            # Copy on write: the file stays as it is, and no reader insists on a writable array.
            whole = np.memmap(self._path, np.uint8, "c", start, (info.file_size,)).view(np.ndarray)
        arrays = []
        for stored in self._stored:
            nbytes = stored.nbytes
            if stored.offset < 0 or nbytes < 0 or stored.offset + nbytes > whole.size:
                raise self._damage(f"an array lies outside of {WEIGHTS}")
            piece = whole[stored.offset : stored.offset + nbytes]
            arrays.append(piece.view(numpy_dtype(stored.dtype)).reshape(stored.shape))
        return start, arrays

    def _data_offset(self, info: zipfile.ZipInfo) -> int:
        """Where a member's bytes begin: behind its local header, with a name and extra fields."""
        self._file.seek(info.header_offset)
        name: int
        extra: int
        name, extra = struct.unpack("<26xHH", self._file.read(LOCAL_HEADER_NBYTES))
        return info.header_offset + LOCAL_HEADER_NBYTES + name + extra

    def _damage(self, what: str) -> PackageError:
        return PackageError(f"'{self._path}' is damaged: {what}")


@contextmanager
def reading(path: str | Path, name: str) -> Iterator[Archive]:
    """The archive at `path`, which must be a `name`: what it is called, and its format.

    Raises
    ------
    PackageError
        The file is missing, truncated, edited or foreign, or the block cannot make sense of it.
    """
    path = Path(path)
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            yield Archive(path, file, archive, name)
    except OSError as error:
        raise PackageError(f"cannot read '{path}': {error.strerror or error}") from None
    except (zipfile.BadZipFile, EOFError, NotImplementedError, struct.error) as error:
        raise PackageError(f"'{path}' is no {name}, or is truncated: {error}") from None
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RecursionError) as error:
        raise PackageError(f"'{path}' is damaged: its manifest does not fit ({error})") from None


def _member(archive: zipfile.ZipFile, name: str, data: bytes) -> str:
    archive.writestr(zipfile.ZipInfo(name, EPOCH), data)
    return sha256(data).hexdigest()


def _write_arrays(archive: zipfile.ZipFile, file: IO[bytes], arrays: Arrays) -> None:
    """Writes weights.bin where a page begins, by a padding field in its header."""
    info = zipfile.ZipInfo(WEIGHTS, EPOCH)
    large = arrays.nbytes > zipfile.ZIP64_LIMIT // 2
    start = file.tell() + LOCAL_HEADER_NBYTES + len(info.filename) + large * ZIP64_FIELD_NBYTES
    # An extra field has four bytes of its own.
    padding = -(start + 4) % FILE_ALIGNMENT
    info.extra = struct.pack("<HH", PADDING_FIELD, padding) + bytes(padding)
    with archive.open(info, "w", force_zip64=large) as member:
        for piece in arrays.pieces():
            member.write(piece)
