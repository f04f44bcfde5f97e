"""Schedules and partitions ONNX models over CPU, GPU and FPGA, and compiles the parts through TVM.

>>> import hetsched
>>> hetsched.System.local("cpu:0").devices[0].cores
(0,)
"""

from hetsched.api import compile, devices, explain, partition, priced, profile, schedule, tune
from hetsched.device import Device, Link
from hetsched.errors import HetschedError
from hetsched.executable import Executable
from hetsched.executable import load_executable as load
from hetsched.fpga.export import export_overlay
from hetsched.frontend.reader import read_onnx
from hetsched.graph import Graph
from hetsched.instance import read_instance
from hetsched.op import Op, Tensor
from hetsched.plan import Plan, simulate
from hetsched.quantization import quantize
from hetsched.schedule import Schedule, Slot, Transfer
from hetsched.system import System
from hetsched.verify import verify

__version__ = "0.1.0"

__all__ = [
    "Device",
    "Executable",
    "Graph",
    "HetschedError",
    "Link",
    "Op",
    "Plan",
    "Schedule",
    "Slot",
    "System",
    "Tensor",
    "Transfer",
    "compile",
    "devices",
    "explain",
    "export_overlay",
    "load",
    "partition",
    "priced",
    "profile",
    "quantize",
    "read_instance",
    "read_onnx",
    "schedule",
    "simulate",
    "tune",
    "verify",
]
