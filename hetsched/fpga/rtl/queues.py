"""The queue of a unit's instructions, and the tokens by which units wait for each other."""

from amaranth.hdl import Elaboratable, Module, Mux, Signal
from amaranth.lib.data import StructLayout
from amaranth.lib.fifo import SyncFIFOBuffered

from hetsched.fpga.isa import LAYOUTS

TOKEN_BITS = 8


def layout(kind: type) -> StructLayout:
    """The fields of an instruction as the RTL sees them, unsigned."""
    return StructLayout(dict(LAYOUTS[kind]))


class Queue(Elaboratable):
    """Instructions of one unit; the first is given when the tokens that it waits for are there.

    `tokens` has, for each of the three units in the order of the bits of `wait`, how many tokens
    it has given that are not taken; the own unit's is never looked at. The unit takes `head` by
    `take` while `ready`; it reports each finished instruction by `finished`. `forget` drops all
    tokens.
    """

    def __init__(self, kind: type, depth: int) -> None:
        self._depth = depth
        self.layout = layout(kind)
        self.push = Signal()
        self.room = Signal()
        self.data = Signal(self.layout.size)
        self.given = Signal(3)
        self.forget = Signal()
        self.ready = Signal()
        self.head = Signal(self.layout)
        self.take = Signal()
        self.finished = Signal()
        self.idle = Signal(init=1)
        self.missing = Signal(3)

    def elaborate(self, platform: object) -> Module:
        module = Module()
        module.submodules.queue = queue = SyncFIFOBuffered(
            width=self.layout.size, depth=self._depth
        )
        held = Signal()
        tokens = [Signal(TOKEN_BITS, name=f"tokens{unit}") for unit in range(3)]
        empty = [Signal(init=1, name=f"empty{unit}") for unit in range(3)]
        module.d.comb += [queue.w_en.eq(self.push), queue.w_data.eq(self.data)]
        module.d.comb += [
            self.room.eq(queue.w_rdy),
            queue.r_en.eq(~held),
            self.ready.eq(held & ~self.missing.any()),
        ]
        with module.If(~held):
            module.d.sync += [self.head.eq(queue.r_data), held.eq(queue.r_rdy)]
        with module.Elif(self.take):
            module.d.sync += held.eq(0)
        for unit in range(3):
            wanted = self.head.wait[unit]
            taken = Signal(name=f"taken{unit}")
            changed = Signal(TOKEN_BITS, name=f"changed{unit}")
            module.d.comb += [
                self.missing[unit].eq(held & wanted & empty[unit]),
                taken.eq(self.take & wanted),
                changed.eq(tokens[unit] + Mux(self.given[unit], 1, -1)),
            ]
            with module.If(self.given[unit] ^ taken):
                module.d.sync += [tokens[unit].eq(changed), empty[unit].eq(changed == 0)]
            with module.If(self.forget):
                module.d.sync += [tokens[unit].eq(0), empty[unit].eq(1)]
        running = Signal(4)
        with module.If(self.take & ~self.finished):
            module.d.sync += running.eq(running + 1)
        with module.Elif(self.finished & ~self.take):
            module.d.sync += running.eq(running - 1)
        module.d.sync += self.idle.eq(
            ~self.push & (queue.level == 0) & ~held & (running == 0) & ~self.finished
        )
        return module
