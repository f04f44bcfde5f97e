"""The FPGA's core, simulated from its RTL, against what numpy computes."""

import numpy as np
import pytest

from hetsched.fpga.engine import Engine, Memory, why_not
from hetsched.fpga.isa import Overlay, encode
from tests.fpga_cases import Case, Layer, case
