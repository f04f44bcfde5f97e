"""What the JSON file of every benchmark says about where its numbers come from."""

import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hetsched.errors import OutputFileError
from hetsched.files import write_text
from hetsched.host import cores, cpu_device

PACKAGES = ("apache-tvm", "apache-tvm-ffi", "onnxruntime", "onnx", "numpy", "hetsched")
ROOT = Path(__file__).parents[1]


def record(seed: int) -> dict[str, Any]:
    """Commit, machine, versions, seed, date and command of this run.

    `changed` are the files that differ from the commit; it is null outside of a checkout.
    """
    changes = _git("status", "--porcelain")
    return {
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes),
        "changed": None if changes is None else [line[3:] for line in changes.splitlines()],
        "command": " ".join(["python", "-m", _module(), *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": seed,
        "machine": machine(),
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in PACKAGES},
    }


def machine() -> dict[str, Any]:
    """Processor, cores, memory, operating system, and how busy the machine is."""
    whole = cpu_device("cpu", "cpu")
    return {
        "cpu": whole.description,
        "isa": whole.isa,
        "cores": len(cores()),
        "memory_bytes": whole.memory_bytes,
        "os": platform.platform(),
        "load_average": list(os.getloadavg()),
    }


def write(path: str | Path, content: dict[str, Any]) -> None:
    """The content as JSON; an older file is replaced only by a whole new one.

    Raises
    ------
    OutputFileError
        The file or its folder cannot be written.
    """
    folder = Path(path).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputFileError(f"cannot make '{folder}': {error.strerror}") from None
    write_text(path, json.dumps(content, indent=1) + "\n")


def _module() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec else Path(sys.argv[0]).name


def _git(*arguments: str) -> str | None:
    """What git says of this checkout, or None where there is none."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.rstrip()
