"""The RTL of a core as Yosys reads it: `python -m hetsched.fpga.rtl.netlist OVERLAY TECHNOLOGY`.

A program of its own, so that nobody else loads Amaranth.
"""

import json
import sys

from amaranth.back import rtlil

from hetsched.fpga.isa import Overlay
from hetsched.fpga.rtl.blocks import Technology
from hetsched.fpga.rtl.core import Core


def netlist(overlay: Overlay, technology: Technology) -> str:
    """The core as RTLIL, its top module `top`; the same text for the same RTL."""
    core = Core(overlay, technology)
    return str(rtlil.convert(core, name="top", ports=core.ports, emit_src=False))


if __name__ == "__main__":
    sizes, technology = sys.argv[1:]
    sys.stdout.write(netlist(Overlay(**json.loads(sizes)), Technology(technology)))
