"""Machine code beside the parts: `crew.c`, and shared libraries that are read from memory."""

import os
import platform
import shutil
import struct
import subprocess
from ctypes import CDLL
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from hetsched import crew

LINKERS = ("gcc", "cc", "clang", "g++", "c++", "clang++")
ELF_MACHINES = {"x86_64": 62, "aarch64": 183, "riscv64": 243}
ELF_SHARED = 3
# Of the file header: type, machine, and where the segment and section headers are.
ELF_HEADER = struct.Struct("<16xHH4x8xQQ4x2xHHHH2x")
# Of a segment header: the place and size in the file.
ELF_SEGMENT = struct.Struct("<8xQ16xQ16x")
ELF_SECTION_NBYTES = 64


def linker_for(isa: str) -> str | None:
    """The compiler driver that links shared libraries for `isa`, if there is one."""
    architecture = isa.split()[0]
    if architecture != platform.machine():
        return shutil.which(f"{architecture}-linux-gnu-gcc")
    chosen = os.environ.get("CC")
    return chosen or next(filter(None, map(shutil.which, LINKERS)), None)


def no_linker(isa: str) -> str:
    """What to say where there is none."""
    if isa.split()[0] != platform.machine():
        return f"no linker for {isa.split()[0]}: install {isa.split()[0]}-linux-gnu-gcc"
    return f"no linker: install one of {', '.join(LINKERS)}"


@cache
def crew_code(linker: str, kind: str) -> bytes | None:
    """What `crew.c` becomes, by the option `-c` or `-shared`; without it Python hands over."""
    with TemporaryDirectory(prefix="hetsched-") as folder:
        path = Path(folder) / "crew"
        command = [linker, "-x", "c", "-O2", "-fPIC", kind, str(crew.SOURCE), "-o", str(path)]
        made = subprocess.run(command, capture_output=True, check=False)
        return path.read_bytes() if made.returncode == 0 else None


@cache
def opened(library: bytes) -> CDLL:
    """A shared library, which leaves no file behind; each is there once.

    Raises
    ------
    OSError
        It does not load.
    """
    with TemporaryDirectory(prefix="hetsched-") as folder:
        # The loader knows libraries by their path, so that no two may share one.
        path = Path(folder) / "library.so"
        path.write_bytes(library)
        return CDLL(str(path))


def damage_of(code: bytes) -> str | None:
    """Why `code` is no whole shared library of this machine; to map one that is cut short kills."""
    if len(code) < ELF_HEADER.size or code[:6] != b"\x7fELF\x02\x01":
        return "is no 64-bit shared library"
    (
        kind,
        machine,
        segments,
        sections,
        segment_size,
        segment_count,
        section_size,
        section_count,
    ) = ELF_HEADER.unpack_from(code)
    if kind != ELF_SHARED or machine != ELF_MACHINES.get(platform.machine(), machine):
        return f"is no shared library for {platform.machine()}"
    if segment_size != ELF_SEGMENT.size or section_size != ELF_SECTION_NBYTES:
        return "has headers of the wrong size"
    ends = [segments + segment_count * segment_size, sections + section_count * section_size]
    if max(ends) <= len(code):
        for index in range(segment_count):
            start, nbytes = ELF_SEGMENT.unpack_from(code, segments + index * segment_size)
            ends.append(start + nbytes)
    if max(ends) > len(code):
        return f"has {len(code)} of {max(ends)} bytes"
    return None
