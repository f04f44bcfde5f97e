"""The OpenCL devices of this machine, without a driver in this process: a child asks them.

A driver that crashes, hangs or fails is a problem that is told by name, and never more: it is left
out, also when this process opens a device later.
"""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from hetsched.device import Device
from hetsched.document import check, parse
from hetsched.errors import DeviceError
from hetsched.host import DRAM_BYTES_PER_SECOND, cores, cpu_device

QUERY = Path(__file__).with_name("query.py")
# Where the loader finds the files that name drivers, and what overrides it.
VENDORS = Path("/etc/OpenCL/vendors")
VENDORS_VARIABLE = "OCL_ICD_VENDORS"
PATIENCE_SECONDS = 60.0

POCL = "Portable Computing Language"
# What this process asks PoCL for: a device for each core that computes on the calling thread, and
# one with threads of its own.
POCL_VARIABLE = "POCL_DEVICES"
POCL_THREADS = "pthread"
POCL_OWN = " ".join(["basic"] * len(cores()) + [POCL_THREADS])

KINDS = ("gpu", "cpu", "accelerator")
# float32 lanes of a compute unit, by a part of the vendor's name: peaks are estimates.
LANES = {"nvidia": 128, "advanced micro": 64, "amd": 64, "arm": 16, "qualcomm": 128, "intel": 8}
# Of a device with memory of its own.
OWN_BYTES_PER_SECOND = 200e9

_SHAPE = {
    "devices": [
        {
            "platform": str,
            "number": int,
            "name": str,
            "vendor": str,
            "kind": str,
            "driver": str,
            "available": bool,
            "compute_units": int,
            "clock_hz": (int, float),
            "group_items": int,
            "local_nbytes": int,
            "memory_nbytes": int,
            "shares_memory": bool,
            "features": [str],
        }
    ],
    "problems": [str],
}


@dataclass(frozen=True)
class Found:
    """A device as its driver tells of it: the `number`th of its platform."""

    platform: str
    number: int
    name: str
    vendor: str
    kind: str
    driver: str
    available: bool
    compute_units: int
    clock_hz: float
    group_items: int
    local_nbytes: int
    memory_nbytes: int
    shares_memory: bool
    features: tuple[str, ...]

    @property
    def is_pocl(self) -> bool:
        return self.platform == POCL

    def __str__(self) -> str:
        return f"{self.name} ({self.kind}, {self.platform})"


@dataclass(frozen=True)
class Survey:
    """All devices, the platforms one behind the other, and what is wrong with which driver.

    `vendors` is the folder of the drivers that work, where others do not.
    """

    devices: tuple[Found, ...]
    problems: tuple[str, ...]
    vendors: str | None = None


def survey() -> Survey:
    """What the drivers of this machine have; asked once for each place of drivers."""
    if find_spec("pyopencl") is None:
        return Survey((), ("the package pyopencl is not installed",))
    return _survey(os.environ.get(VENDORS_VARIABLE, ""))


def select(name: str, target: str) -> tuple[Found, tuple[int, ...]]:
    """The device that a string means, and the host's cores that it computes on, none on others.

    `opencl:0` is the first of all platforms, `opencl:gpu` the first of that type, `opencl:pocl` the
    first with that in the name of its platform or its own; `opencl` alone is the first. Cores come
    behind an `@`: `opencl:0@1`, `opencl:cpu@0-3`.

    Raises
    ------
    DeviceError
        There is none; the message lists what there is.
    """
    head, colon, rest = name.partition(":")
    wanted, at, where = rest.partition("@")
    if head != target or (colon and not wanted) or (at and not where):
        raise DeviceError(f"'{name}' is no device of target '{target}'")
    found = _wanted(wanted.strip().lower() or "0")
    there = "; ".join(f"{target}:{i} is {one}" for i, one in enumerate(survey().devices))
    if found is None:
        raise DeviceError(f"no device '{name}': {there or 'there is no OpenCL device here'}")
    if not found.available:
        raise DeviceError(f"'{name}', {found}, is not available: its driver says so")
    if found.kind != "cpu":
        if at:
            raise DeviceError(f"'{name}': {found} does not compute on the processor's cores")
        return found, ()
    if not at:
        return found, cores()
    try:
        return found, cpu_device(f"{target}:{where}", target).cores
    except DeviceError:
        there = ", ".join(map(str, cores()))
        raise DeviceError(
            f"'{name}': write {target}:{wanted}@0 or {target}:{wanted}@0-3; "
            f"this machine has cores {there}"
        ) from None


def device(name: str, target: str) -> Device:
    """The device of a string such as `opencl:0`; see `select`.

    Raises
    ------
    DeviceError
        There is none; the message lists what there is.
    """
    found, chosen = select(name, target)
    return _on_cores(name, target, found, chosen) if chosen else _own(name, target, found)


def _on_cores(name: str, target: str, found: Found, chosen: tuple[int, ...]) -> Device:
    """A device that computes on the processor: what is known of those cores, and its limits."""
    host = cpu_device(f"{target}:{chosen[0]}-{chosen[-1]}", target)
    driver = "PoCL" if found.is_pocl else found.platform
    return Device(
        name=name,
        target=target,
        kind="cpu",
        description=f"OpenCL on CPU ({driver}), {host.description}",
        cores=chosen,
        clock_hz=host.clock_hz,
        isa=" ".join([host.isa, *found.features]),
        cache_nbytes=host.cache_nbytes,
        compute_units=len(chosen),
        group_items=found.group_items,
        local_nbytes=found.local_nbytes,
        memory_bytes=host.memory_bytes,
        flops_per_second=host.flops_per_second,
        bytes_per_second=host.bytes_per_second,
        launch_seconds=host.launch_seconds,
        fingerprint=_fingerprint(found, host.fingerprint),
    )


def _own(name: str, target: str, found: Found) -> Device:
    vendor = found.vendor.lower()
    lanes = next((LANES[part] for part in LANES if part in vendor), min(LANES.values()))
    memory = DRAM_BYTES_PER_SECOND if found.shares_memory else OWN_BYTES_PER_SECOND
    return Device(
        name=name,
        target=target,
        kind="gpu" if found.kind == "gpu" else "accelerator",
        description=f"{found.name} by OpenCL ({found.platform})",
        clock_hz=found.clock_hz,
        isa=" ".join(("opencl", *found.features)),
        compute_units=found.compute_units,
        group_items=found.group_items,
        local_nbytes=found.local_nbytes,
        memory_bytes=float(found.memory_nbytes),
        memory_space="host" if found.shares_memory else name,
        flops_per_second=max(1e9, 2.0 * lanes * found.compute_units * found.clock_hz),
        bytes_per_second=memory,
        fingerprint=_fingerprint(found, ""),
    )


def _fingerprint(found: Found, host: str) -> str:
    # Of a device on the processor, units and clock are those of the cores that it is told to use.
    own = (host,) if host else (found.compute_units, found.clock_hz)
    identity = found.platform, found.name, found.driver, *own
    return sha256(repr(identity).encode()).hexdigest()[:16]


def _wanted(text: str) -> Found | None:
    devices = survey().devices
    if re.fullmatch(r"\d+", text):
        return devices[int(text)] if int(text) < len(devices) else None
    if text in KINDS:
        return next((found for found in devices if found.kind == text), None)

    def fits(found: Found) -> bool:
        names = (found.platform, found.name, found.driver)
        return any(text in part.lower() for part in names)

    return next(filter(fits, devices), None)


@cache
def _survey(vendors: str) -> Survey:
    files = icd_files(vendors)
    whole = _asked(files, vendors)
    if isinstance(whole, Survey):
        return whole
    # One of them brings the process down: each alone tells which.
    devices: list[Found] = []
    problems: list[str] = []
    good = []
    for file in files:
        alone = _asked([file], str(file))
        if isinstance(alone, Survey):
            good.append(file)
            devices += alone.devices
            problems += alone.problems
        else:
            problems.append(f"the driver in {file} {alone}")
    if not files:
        problems.append(f"the OpenCL loader {whole}")
    return Survey(tuple(devices), tuple(problems), _folder_of(good))


def icd_files(vendors: str) -> list[Path]:
    """The files that name drivers, in a folder or given as one file."""
    place = Path(vendors) if vendors else VENDORS
    return [place] if place.is_file() else sorted(place.glob("*.icd"))


def _folder_of(files: Sequence[Path]) -> str:
    folder = Path(mkdtemp(prefix="hetsched-opencl-"))
    for index, file in enumerate(files):
        (folder / f"{index:03}-{file.name}").write_bytes(file.read_bytes())
    return str(folder)


def _asked(files: Sequence[Path], vendors: str) -> Survey | str:
    """What a child finds, or what became of it."""
    environment = dict(os.environ)
    if vendors:
        environment[VENDORS_VARIABLE] = vendors
    if environment.get(POCL_VARIABLE) == POCL_OWN:
        del environment[POCL_VARIABLE]
    try:
        done = subprocess.run(
            [sys.executable, "-P", str(QUERY), *map(str, files)],
            env=environment,
            capture_output=True,
            check=False,
            timeout=PATIENCE_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f"did not answer within {PATIENCE_SECONDS:g} s"
    except OSError as error:
        return f"could not be asked: {error.strerror}"
    if done.returncode < 0:
        return f"crashed ({signal.Signals(-done.returncode).name})"
    lines = done.stdout.decode(errors="replace").splitlines()
    if done.returncode or not lines:
        last = done.stderr.decode(errors="replace").strip().splitlines()
        return f"failed: {last[-1] if last else f'exit status {done.returncode}'}"
    try:
        content = parse(lines[-1], DeviceError, "the answer")
        check(content, _SHAPE, "the answer", DeviceError)
    except DeviceError as error:
        return f"gave no answer: {error}"
    return Survey(tuple(map(_found, content["devices"])), tuple(content["problems"]))


def _found(content: Mapping[str, Any]) -> Found:
    return Found(**{**content, "features": tuple(content["features"])})
