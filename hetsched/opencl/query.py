"""Asks the OpenCL drivers what there is, as a process of its own: a script that prints JSON.

A driver is code of others that a look at its devices already runs: it may crash, hang, or start
threads on cores that nobody has chosen yet. So who wants to know runs this file (`devices.py`).
The last line of its output is one object: `devices`, in the order of the platforms, and `problems`,
texts that name a driver or platform and say what is wrong with it.
"""

import json
import os
import sys
from collections.abc import Callable
from ctypes import CDLL
from functools import partial
from pathlib import Path
from typing import Any

import pyopencl as cl

KINDS = (
    (cl.device_type.GPU, "gpu"),
    (cl.device_type.CPU, "cpu"),
    (cl.device_type.ACCELERATOR, "accelerator"),
)


def main() -> None:
    problems = driver_problems(sys.argv[1:])
    devices: list[dict[str, Any]] = []
    try:
        platforms = cl.get_platforms()
    except cl.Error as error:
        # Without any driver that is what the loader says; the caller knows better words.
        problems += [] if "PLATFORM_NOT_FOUND" in str(error) else [f"no platform: {error}"]
        platforms = []
    for platform in platforms:
        name = asked(partial(getattr, platform, "name"), "a platform without a name")
        try:
            found = platform.get_devices()
        except cl.Error as error:
            if "DEVICE_NOT_FOUND" not in str(error):
                problems.append(f"platform '{name}': {error}")
            continue
        for number, device in enumerate(found):
            try:
                devices.append({"platform": name, "number": number, **about(device)})
            except cl.Error as error:
                problems.append(f"device {number} of platform '{name}': {error}")
    print(json.dumps({"devices": devices, "problems": problems}))


def driver_problems(files: list[str]) -> list[str]:
    """Why drivers do not load, of the files that name them."""
    found = []
    for file in files:
        try:
            library = Path(file).read_text(errors="replace").split("\n", 1)[0].strip()
            if not library:
                found.append(f"{file} names no driver")
                continue
            CDLL(library, os.RTLD_LAZY)
        except OSError as error:
            found.append(f"the driver in {file} does not load: {error}")
    return found


def about(device: cl.Device) -> dict[str, Any]:
    """What hetsched wants to know of a device; what a driver does not tell has the least value."""
    extensions = device.extensions.split()
    return {
        "name": " ".join(device.name.split()),
        "vendor": asked(lambda: device.vendor, ""),
        "kind": next((name for kind, name in KINDS if device.type & kind), "other"),
        "driver": asked(lambda: f"{device.version} {device.driver_version}", ""),
        "available": bool(device.available and device.compiler_available),
        "compute_units": device.max_compute_units,
        "clock_hz": device.max_clock_frequency * 1e6,
        "group_items": device.max_work_group_size,
        "local_nbytes": device.local_mem_size,
        "memory_nbytes": device.global_mem_size,
        "shares_memory": bool(asked(lambda: device.host_unified_memory, False)),
        "features": [
            feature
            for feature, has in {
                "fp16": "cl_khr_fp16" in extensions,
                "fp64": "cl_khr_fp64" in extensions or bool(asked(lambda: device.double_fp_config)),
                "images": bool(device.image_support),
                "int8dot": "cl_khr_integer_dot_product" in extensions,
            }.items()
            if has
        ],
    }


def asked(question: Callable[[], Any], otherwise: Any = 0) -> Any:
    try:
        return question()
    except cl.Error:
        return otherwise


if __name__ == "__main__":
    main()
