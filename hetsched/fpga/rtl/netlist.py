"""The RTL of a core as Yosys reads it.

`python -m hetsched.fpga.rtl.netlist SIZES TECHNOLOGY [scan]` prints it; SIZES are an overlay's in
JSON. A program of its own, so that nobody else loads Amaranth.
"""

import json
import sys

from amaranth.back import rtlil
from amaranth.hdl import Cat, Elaboratable, Module, Signal

from hetsched.fpga.isa import Overlay
from hetsched.fpga.rtl.blocks import Technology
from hetsched.fpga.rtl.core import Core


class Scan(Elaboratable):
    """A core whose ports hang on a chain of registers, for place and route.

    The core's ports are more than a package's pins and would be timed as such; four pins and
    registers leave the core's own paths, and the clock is a real one.
    """

    def __init__(self, core: Core) -> None:
        self._core = core
        self.data_in = Signal()
        self.data_out = Signal()
        self.shift = Signal()
        self.take = Signal()
        self.ports = (core.clock.clk, self.data_in, self.data_out, self.shift, self.take)

    def elaborate(self, platform: object) -> Module:
        module = Module()
        module.submodules.core = self._core
        inputs, outputs = Cat(self._core.inputs), Cat(self._core.outputs)
        incoming, held, outgoing = (
            Signal(len(inputs)),
            Signal(len(inputs)),
            Signal(len(outputs)),
        )
        with module.If(self.shift):
            module.d.sync += [
                incoming.eq(Cat(self.data_in, incoming)),
                outgoing.eq(outgoing[1:]),
            ]
        with module.If(self.take):
            module.d.sync += [held.eq(incoming), outgoing.eq(outputs)]
        module.d.comb += inputs.eq(held)
        module.d.sync += self.data_out.eq(outgoing[0])
        return module


def netlist(overlay: Overlay, technology: Technology, scan: bool = False) -> str:
    """The core as RTLIL, its top module `top`; the same text for the same RTL."""
    core = Core(overlay, technology)
    top = Scan(core) if scan else core
    return str(rtlil.convert(top, name="top", ports=top.ports, emit_src=False))


if __name__ == "__main__":
    sizes, technology, *options = sys.argv[1:]
    sys.stdout.write(netlist(Overlay(**json.loads(sizes)), Technology(technology), bool(options)))
