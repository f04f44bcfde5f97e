"""The large weights of a model file, found without reading them.

protobuf copies a weight three times on its way to an array. Here the rest of the file is parsed,
and each large weight read once, to where it stays.

References
----------
https://protobuf.dev/programming-guides/encoding
"""

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx

# The numbers of the fields in onnx.proto.
GRAPH, INITIALIZER = 7, 5
RAW_DATA, EXTERNAL_DATA, DATA_LOCATION = 9, 13, 14
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
LARGE_NBYTES = 2**16


def outline(file: Path) -> bytes:
    """A model file whose large weights are external data in that very file.

    What is not encoded as a model comes back as it is.

    Raises
    ------
    OSError
        The file cannot be read.
    """
    if file.stat().st_size < LARGE_NBYTES:
        return file.read_bytes()
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            fields = list(_fields(data, 0, len(data)))
            if sum(field.number == GRAPH for field in fields) == 1:
                return b"".join(_outlined(data, field, file.name) for field in fields)
        except _MalformedError:
            pass
        return data[:]


class _MalformedError(Exception):
    """Not the encoding of a protobuf."""


@dataclass(frozen=True)
class _Field:
    number: int
    kind: int
    start: int
    """Where its tag begins; `value` is where its content does."""
    value: int
    stop: int


def _outlined(data: mmap.mmap, field: _Field, location: str) -> bytes:
    if field.number != GRAPH or field.kind != BYTES:
        return data[field.start : field.stop]
    parts = _fields(data, field.value, field.stop)
    return _encoded(GRAPH, b"".join(_light(data, part, location) for part in parts))


def _light(data: mmap.mmap, part: _Field, location: str) -> bytes:
    """A part of the graph; a large weight says where it is instead of what."""
    large = part.number == INITIALIZER and part.kind == BYTES
    if large and part.stop - part.value >= LARGE_NBYTES:
        fields = list(_fields(data, part.value, part.stop))
        raw = [field for field in fields if field.number == RAW_DATA and field.kind == BYTES]
        is_plain = all(field.number not in (EXTERNAL_DATA, DATA_LOCATION) for field in fields)
        if is_plain and len(raw) == 1 and raw[0].stop - raw[0].value >= LARGE_NBYTES:
            entries = {
                "location": location,
                "offset": str(raw[0].value),
                "length": str(raw[0].stop - raw[0].value),
            }
            return _encoded(
                INITIALIZER,
                b"".join(data[f.start : f.stop] for f in fields if f.number != RAW_DATA)
                + b"".join(_entry(key, value) for key, value in entries.items())
                + _as_varint(DATA_LOCATION << 3 | VARINT)
                + _as_varint(onnx.TensorProto.EXTERNAL),
            )
    return data[part.start : part.stop]


def _entry(key: str, value: str) -> bytes:
    return _encoded(EXTERNAL_DATA, _encoded(1, key.encode()) + _encoded(2, value.encode()))


def _fields(data: mmap.mmap, position: int, stop: int) -> Iterator[_Field]:
    while position < stop:
        start = position
        tag, position = _varint(data, position, stop)
        value = position
        if tag & 7 == VARINT:
            _, position = _varint(data, position, stop)
        elif tag & 7 == BYTES:
            length, value = _varint(data, position, stop)
            position = value + length
        elif tag & 7 in (FIXED64, FIXED32):
            position += 8 if tag & 7 == FIXED64 else 4
        else:
            raise _MalformedError
        if position > stop or not tag >> 3:
            raise _MalformedError
        yield _Field(tag >> 3, tag & 7, start, value, position)


def _varint(data: mmap.mmap, position: int, stop: int) -> tuple[int, int]:
    """Seven bits a byte, the lowest first; the value, and where it ends."""
    value = shift = 0
    while True:
        if position >= stop or shift > 63:
            raise _MalformedError
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
        shift += 7


def _encoded(number: int, content: bytes) -> bytes:
    return _as_varint(number << 3 | BYTES) + _as_varint(len(content)) + content


def _as_varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)
