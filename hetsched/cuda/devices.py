"""CUDA devices: those that the driver finds, and what an architecture is without one."""

import re
from collections.abc import Mapping
from ctypes import byref, c_int, c_size_t, create_string_buffer
from dataclasses import dataclass
from hashlib import sha256

from hetsched.cuda.driver import Driver, Failed, driver
from hetsched.device import Device
from hetsched.errors import DeviceError

ARCHITECTURE = re.compile(r"sm_(\d+)(\d)([a-z]?)")
NAME_NBYTES = 256
# Launching a part's first kernel, and to call one more, as measured on no device: a rule of thumb.
LAUNCH_SECONDS = 10e-6
CALL_SECONDS = 3e-6

# The driver's numbers of what it tells of a device.
GROUP_ITEMS, LOCAL_NBYTES, CLOCK_KHZ, UNITS = 1, 8, 13, 16
MEMORY_KHZ, BUS_BITS, CACHE_NBYTES, MAJOR, MINOR = 36, 37, 38, 75, 76


@dataclass(frozen=True)
class Capability:
    """Of a multiprocessor: multiply-adds a cycle, threads, and bytes of shared memory."""

    lanes: int
    threads: int
    shared_nbytes: int


# By compute capability, from the tables of the CUDA C++ Programming Guide.
CAPABILITIES: Mapping[int, Capability] = {
    60: Capability(64, 2048, 64 << 10),
    61: Capability(128, 2048, 96 << 10),
    70: Capability(64, 2048, 96 << 10),
    72: Capability(64, 2048, 96 << 10),
    75: Capability(64, 1024, 64 << 10),
    80: Capability(64, 2048, 164 << 10),
    86: Capability(128, 1536, 100 << 10),
    87: Capability(128, 1536, 164 << 10),
    89: Capability(128, 1536, 100 << 10),
    90: Capability(128, 2048, 228 << 10),
    100: Capability(128, 2048, 228 << 10),
    120: Capability(128, 1536, 100 << 10),
}


def capability(arch: str) -> Capability:
    """What a multiprocessor of an architecture has, or of the latest before it that is known.

    >>> capability("sm_90a").threads
    2048
    """
    number = number_of(arch)
    known = [version for version in CAPABILITIES if version <= number]
    return CAPABILITIES[max(known, default=min(CAPABILITIES))]


def number_of(arch: str) -> int:
    """The compute capability of an architecture, times 10.

    Raises
    ------
    DeviceError
        It is no architecture.
    """
    match = ARCHITECTURE.fullmatch(arch)
    if match is None:
        raise DeviceError(f"'{arch}' is no architecture of CUDA; sm_90 would be one")
    return 10 * int(match[1]) + int(match[2])


def runs(arch: str, on: str) -> bool:
    """Whether machine code for `arch` runs on a device of architecture `on`.

    That for one of the same major number and a lesser minor one does, but for architectures with
    a letter, whose code is theirs alone.

    >>> runs("sm_80", "sm_87"), runs("sm_87", "sm_80"), runs("sm_80", "sm_90")
    (True, False, False)
    """
    own, other = number_of(arch), number_of(on)
    if arch[-1].isalpha():
        return own == other
    return own // 10 == other // 10 and own <= other


def count(there: Driver) -> int:
    return there.number("cuDeviceGetCount", what="devices cannot be counted")


def device(name: str, target: str) -> Device:
    """The device of a string such as `cuda:0`.

    Raises
    ------
    DeviceError
        There is no driver, or no such device.
    """
    head, colon, text = name.partition(":")
    if head != target or not (text.isdecimal() if colon else not text):
        raise DeviceError(f"'{name}': write {target}:0, {target}:1 and so on")
    number = int(text or 0)
    there = driver()
    try:
        found = count(there)
        if number >= found:
            names = ", ".join(f"{target}:{index}" for index in range(found)) or "none"
            raise DeviceError(f"no device '{name}'; there are {names}")
        return _described(name, target, there, number)
    except Failed as error:
        raise error.of("it cannot be asked", name) from error


def _described(name: str, target: str, there: Driver, number: int) -> Device:
    handle = c_int(there.number("cuDeviceGet", number))
    text = create_string_buffer(NAME_NBYTES)
    there.call("cuDeviceGetName", text, NAME_NBYTES, handle)
    memory = c_size_t()
    there.call("cuDeviceTotalMem_v2", byref(memory), handle)

    def attribute(which: int) -> int:
        return there.number("cuDeviceGetAttribute", which, handle)

    arch = f"sm_{attribute(MAJOR)}{attribute(MINOR)}"
    units, clock = attribute(UNITS), 1e3 * attribute(CLOCK_KHZ)
    # Data come twice a cycle of the memory's clock.
    bandwidth = 2e3 * attribute(MEMORY_KHZ) * attribute(BUS_BITS) / 8
    version = there.number("cuDriverGetVersion")
    described = text.value.decode(errors="replace")
    identity = (described, arch, units, clock, memory.value, version)
    return Device(
        name=name,
        target=target,
        kind="gpu",
        description=described,
        clock_hz=clock,
        isa=arch,
        cache_nbytes=(attribute(CACHE_NBYTES),),
        compute_units=units,
        group_items=attribute(GROUP_ITEMS),
        local_nbytes=attribute(LOCAL_NBYTES),
        memory_bytes=float(memory.value),
        memory_space=name,
        flops_per_second=max(1e9, 2.0 * capability(arch).lanes * units * clock),
        bytes_per_second=bandwidth or 1e11,
        launch_seconds=LAUNCH_SECONDS,
        call_seconds=CALL_SECONDS,
        fingerprint=sha256(repr(identity).encode()).hexdigest()[:16],
    )
