"""The main job from end to end, by the commands that a user types.

    python -m examples.demo MODEL.onnx --shape NAME=1,3,224,224 --folder demo

Takes the first two cores of this machine as two devices, compares every partitioner, compiles the
best plan, runs it, draws it and verifies it.
"""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

from hetsched.host import cores


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--shape", action="append", default=[], metavar="NAME=SIZES")
    parser.add_argument("--folder", type=Path, default=Path("demo"))
    arguments = parser.parse_args()

    devices = ",".join(f"cpu:{core}" for core in cores()[:2])
    arguments.folder.mkdir(parents=True, exist_ok=True)
    package = arguments.folder / f"{arguments.model.stem}.hsp"
    trace = arguments.folder / "trace.json"
    shapes = [item for shape in arguments.shape for item in ("--shape", shape)]
    steps = [
        ("What is here", ["devices", "--devices", devices]),
        (
            "Measure, plan, compile and package",
            ["compile", str(arguments.model), *shapes, "--devices", devices, "-o", str(package)],
        ),
        (
            "Run, predicted beside measured",
            ["run", str(package), "--repeat", "5", "--trace", str(trace)],
        ),
        ("Every part and the whole against ONNX Runtime", ["verify", str(package)]),
    ]
    for number, (title, command) in enumerate(steps, start=1):
        print(f"\n[{number}/{len(steps)}] {title}\n$ hetsched {shlex.join(command)}", flush=True)
        status = subprocess.run([sys.executable, "-m", "hetsched", *command]).returncode
        if status:
            return status
    print(f"\nThe package is {package}. Open {trace} in ui.perfetto.dev to see the schedule.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
