"""What this machine has: cores, clock, instruction set, caches, memory.

Read from the operating system (Linux: /proc and /sys); what it does not tell stays at a stated
default.
"""

import os
import platform
import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from hashlib import sha256
from pathlib import Path

from hetsched.device import Device
from hetsched.errors import DeviceError

# Features that decide which kernels a core can run, in the order that /proc/cpuinfo names them.
ISA_FEATURES = (
    "sse4_2 avx avx2 fma f16c avx_vnni avx512f avx512bw avx512dq avx512vl avx512_vnni avx512_bf16 "
    "amx_int8 amx_bf16 asimd asimddp fphp sve v"
).split()

# float32 lanes of one vector register, by the widest feature there is.
LANES = {"avx512f": 16, "avx2": 8, "avx": 8, "sve": 8, "asimd": 4, "sse4_2": 4}
# Two fused multiply-add pipes a core are common to x86 and Arm cores of the last decade.
FMA_PIPES = 2
# Assumed where nothing was measured: one core's share of ordinary DRAM.
DRAM_BYTES_PER_SECOND = 12e9
DEFAULT_CLOCK_HZ = 2e9
# Handing a part to a worker thread and starting it.
LAUNCH_SECONDS = 10e-6


def cores() -> tuple[int, ...]:
    """The cores that this process may use, by the operating system's numbers."""
    if hasattr(os, "sched_getaffinity"):
        return _allowed()
    return tuple(range(os.cpu_count() or 1))


@cache
def _allowed() -> tuple[int, ...]:
    # Once, before any worker pins itself: a thread's own affinity is narrower.
    return tuple(sorted(os.sched_getaffinity(os.getpid())))


def cpu_devices(target: str) -> list[str]:
    """The device strings of a CPU target: all cores, then each alone."""
    return [target, *(f"{target}:{core}" for core in cores())]


def cpu_device(name: str, target: str) -> Device:
    """The device of a string such as `cpu`, `cpu:0` or `cpu:0-3`.

    Raises
    ------
    DeviceError
        The string does not parse, or this machine lacks a core of it.
    """
    chosen = _parse_cores(name, target)
    isa = _isa()
    lanes = next((LANES[feature] for feature in LANES if feature in isa.split()), 1)
    clock = _clock_hz()
    identity = f"{target} {_model_name()} {isa} {clock:.2e} {len(chosen)} {_caches(chosen[0])}"
    return Device(
        name=name,
        target=target,
        description=_model_name(),
        cores=chosen,
        clock_hz=clock,
        isa=isa,
        cache_nbytes=_caches(chosen[0]),
        memory_bytes=_memory_bytes(),
        flops_per_second=2.0 * FMA_PIPES * lanes * clock * len(chosen),
        bytes_per_second=DRAM_BYTES_PER_SECOND * len(chosen),
        launch_seconds=LAUNCH_SECONDS,
        fingerprint=sha256(identity.encode()).hexdigest()[:16],
    )


@contextmanager
def pinned(chosen: tuple[int, ...]) -> Iterator[None]:
    """Holds the calling thread on `chosen` cores; threads that it starts inherit them."""
    if not chosen or not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, chosen)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def threads() -> frozenset[int]:
    """The numbers of this process's threads, those that libraries have started among them."""
    try:
        return frozenset(map(int, os.listdir("/proc/self/task")))
    except OSError:
        return frozenset()


def hold(chosen: Iterable[int], on: Collection[int]) -> None:
    """Holds threads of this process, by their numbers, on the cores `on`; some may have ended."""
    if not on or not hasattr(os, "sched_setaffinity"):
        return
    for thread in chosen:
        with suppress(ProcessLookupError):
            os.sched_setaffinity(thread, on)


def _parse_cores(name: str, target: str) -> tuple[int, ...]:
    there = cores()
    head, colon, text = name.partition(":")
    if head != target or (colon and not text):
        raise DeviceError(f"'{name}' is no device of target '{target}'")
    if not colon:
        return there
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    if match is None:
        raise DeviceError(f"'{name}': write {target}, {target}:0 or {target}:0-3")
    first, last = int(match[1]), int(match[2] or match[1])
    chosen = tuple(range(first, last + 1))
    if not chosen or not set(chosen) <= set(there):
        raise DeviceError(
            f"no device '{name}': this machine has cores {', '.join(map(str, there))}"
        )
    return chosen


@cache
def _cpuinfo() -> dict[str, str]:
    """The fields of the first core."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    first = text.split("\n\n", 1)[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _model_name() -> str:
    info = _cpuinfo()
    name = info.get("model name") or platform.processor() or platform.machine()
    # Virtual machines hide the model; family and model number still tell cores apart.
    numbers = "/".join(info[key] for key in ("cpu family", "model") if key in info)
    return f"{name} ({numbers})" if numbers else name


def _isa() -> str:
    info = _cpuinfo()
    flags = (info.get("flags") or info.get("Features") or info.get("isa") or "").split()
    return " ".join([platform.machine(), *(f for f in ISA_FEATURES if f in flags)])


@cache
def _clock_hz() -> float:
    try:
        khz = Path("/sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq").read_text()
        return float(khz) * 1e3
    except (OSError, ValueError):
        pass
    # The current clock wavers; rounded, so that the same machine keeps its fingerprint.
    megahertz = float(_cpuinfo().get("cpu MHz", 0)) or DEFAULT_CLOCK_HZ / 1e6
    return round(megahertz, -2) * 1e6


@cache
def _caches(core: int) -> tuple[int, ...]:
    """Data and unified cache sizes in bytes, from the nearest."""
    found: dict[int, int] = {}
    for index in sorted(Path(f"/sys/devices/system/cpu/cpu{core}/cache").glob("index*")):
        try:
            if (index / "type").read_text().strip() == "Instruction":
                continue
            level = int((index / "level").read_text())
            size = (index / "size").read_text().strip()
        except (OSError, ValueError):
            continue
        unit = {"K": 2**10, "M": 2**20, "G": 2**30}.get(size[-1:])
        found[level] = int(size[:-1]) * unit if unit else int(size)
    return tuple(found[level] for level in sorted(found))


@cache
def _memory_bytes() -> float:
    try:
        pages, page = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return float("inf")
    return float(pages * page)
