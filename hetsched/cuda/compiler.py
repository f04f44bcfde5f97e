"""CUDA C to machine code: by NVRTC, a library of pip's packages, else by nvcc."""

import shutil
import subprocess
from ctypes import CDLL, byref, c_char_p, c_int, c_size_t, c_void_p, create_string_buffer
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hetsched.errors import BuildError

# NVRTC where the system's linker finds it.
SYSTEM = "libnvrtc.so"
LOG_LINES = 8
# Products and sums as one instruction, which is exact where others round twice.
OPTIONS = ("--std=c++17",)
PATIENCE_SECONDS = 600.0
MISSING = (
    "no compiler of CUDA C: the packages of 'hetsched[cuda]' have NVRTC, NVIDIA's toolkit nvcc"
)


def compiler() -> str | None:
    """The name of the compiler that `cubin` uses, or None where there is none."""
    if _nvrtc() is not None:
        return "nvrtc"
    return "nvcc" if shutil.which("nvcc") else None


def version() -> str:
    """The compiler and its version; what it makes belongs to one."""
    nvrtc = _nvrtc()
    if nvrtc is not None:
        major, minor = c_int(), c_int()
        nvrtc.nvrtcVersion(byref(major), byref(minor))
        return f"nvrtc {major.value}.{minor.value}"
    return _nvcc_version() if shutil.which("nvcc") else "none"


def cubin(source: str, arch: str) -> bytes:
    """The machine code of a source for an architecture such as `sm_90`.

    Raises
    ------
    BuildError
        There is no compiler, or it refuses the source; the message has what it says.
    """
    match compiler():
        case "nvrtc":
            return _by_nvrtc(_nvrtc(), source, arch)
        case "nvcc":
            return _by_nvcc(source, arch)
    raise BuildError(MISSING)


def _by_nvcc(source: str, arch: str) -> bytes:
    with TemporaryDirectory(prefix="hetsched-") as folder:
        path, made = Path(folder) / "kernels.cu", Path(folder) / "kernels.cubin"
        path.write_text(source, encoding="utf-8")
        command = ["nvcc", "-w", "-cubin", f"-arch={arch}", *OPTIONS, "-o", str(made), str(path)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=PATIENCE_SECONDS
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise BuildError(f"nvcc does not work: {error}") from error
        if done.returncode:
            raise BuildError(f"nvcc refuses a kernel: {_told(done.stderr + done.stdout)}")
        return made.read_bytes()


def _by_nvrtc(nvrtc: Any, source: str, arch: str) -> bytes:
    program = c_void_p()
    _checked(
        nvrtc,
        nvrtc.nvrtcCreateProgram(byref(program), source.encode(), b"kernels.cu", 0, None, None),
    )
    try:
        given = [f"--gpu-architecture={arch}", *OPTIONS, *(f"-I{path}" for path in _headers())]
        options = (c_char_p * len(given))(*(option.encode() for option in given))
        status = nvrtc.nvrtcCompileProgram(program, len(given), options)
        if status:
            log = _taken(nvrtc, program, "ProgramLog").rstrip(b"\0")
            raise BuildError(f"nvrtc refuses a kernel: {_told(log.decode(errors='replace'))}")
        return _taken(nvrtc, program, "CUBIN")
    finally:
        nvrtc.nvrtcDestroyProgram(byref(program))


def _taken(nvrtc: Any, program: c_void_p, what: str) -> bytes:
    size = c_size_t()
    _checked(nvrtc, getattr(nvrtc, f"nvrtcGet{what}Size")(program, byref(size)))
    buffer = create_string_buffer(size.value)
    _checked(nvrtc, getattr(nvrtc, f"nvrtcGet{what}")(program, buffer))
    return buffer.raw


def _checked(nvrtc: Any, status: int) -> None:
    if status:
        raise BuildError(f"nvrtc fails: {nvrtc.nvrtcGetErrorString(status).decode()}")


def _told(log: str) -> str:
    lines = [" ".join(line.split()) for line in log.splitlines()]
    wanted = [line for line in lines if "error" in line] or [line for line in lines if line]
    return "; ".join(wanted[:LOG_LINES])


@cache
def _nvrtc() -> Any:
    """The library of NVRTC in pip's packages, or where the system looks; None if there is none."""
    folders = sorted(path for folder in _packages() for path in folder.glob("*/lib"))
    for path in [*(str(p) for folder in folders for p in folder.glob("libnvrtc.so.*")), SYSTEM]:
        try:
            # What it looks for by its name alone, and finds if it is there already.
            for beside in sorted(Path(path).parent.glob("libnvrtc-builtins.so.*")):
                CDLL(str(beside))
            found = CDLL(path)
        except OSError:
            continue
        found.nvrtcGetErrorString.restype = c_char_p
        return found
    return None


@cache
def _headers() -> tuple[Path, ...]:
    """Folders of CUDA's headers, which sources with half floats include."""
    folders = [path for folder in _packages() for path in sorted(folder.glob("*/include"))]
    folders += [path / "cccl" for path in folders if (path / "cccl").is_dir()]
    return tuple(folders)


def _packages() -> tuple[Path, ...]:
    spec = find_spec("nvidia")
    return tuple(map(Path, spec.submodule_search_locations or ())) if spec else ()


@cache
def _nvcc_version() -> str:
    try:
        done = subprocess.run(
            ["nvcc", "--version"], capture_output=True, text=True, check=False, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return "nvcc"
    release = [word for word in done.stdout.split() if word.startswith("V")]
    return f"nvcc {release[-1][1:]}" if release else "nvcc"
