"""The queue of a unit's instructions, and the tokens by which units wait for each other."""

from amaranth.hdl import Elaboratable, Module, Mux, Signal
from amaranth.lib.data import StructLayout
from amaranth.lib.memory import Memory

from hetsched.fpga.isa import LAYOUTS

TOKEN_BITS = 8


def layout(kind: type) -> StructLayout:
    """The fields of an instruction as the RTL sees them, unsigned."""
    return StructLayout(dict(LAYOUTS[kind]))


class Fifo(Elaboratable):
    """`depth` words, a power of two, and one more at `head`, which is there while `ready`.

    Who writes knows that there is room. `take` takes the head; a new one is there in the next
    cycle. What is written to an empty queue is at the head two cycles later.
    """

    def __init__(self, width: int, depth: int) -> None:
        self._depth = depth
        self.write = Signal()
        self.data = Signal(width)
        self.ready = Signal()
        self.head = Signal(width, reset_less=True)
        self.take = Signal()

    def elaborate(self, platform: object) -> Module:
        module = Module()
        moves = Signal()
        some, first = stored(module, self._depth, self.write, self.data, moves)
        module.d.comb += moves.eq(some & (~self.ready | self.take))
        with module.If(~self.ready | self.take):
            module.d.sync += [self.head.eq(first), self.ready.eq(some)]
        return module


def stored(
    module: Module, depth: int, write: Signal, data: Signal, take: Signal
) -> tuple[Signal, Signal]:
    """Whether a ring of `depth` words has `some`, and the first, which `take` drops."""
    module.submodules += (memory := Memory(shape=len(data), depth=depth, init=[]))
    writing, reading = memory.write_port(), memory.read_port(domain="comb")
    # Rings that are filled and emptied together keep their own pointers: each is near to its words.
    produce = Signal(range(depth), attrs={"keep": 1})
    consume = Signal(range(depth), attrs={"keep": 1})
    filled, some = Signal(range(depth + 1)), Signal()
    module.d.comb += [
        writing.en.eq(write),
        writing.addr.eq(produce),
        writing.data.eq(data),
        reading.addr.eq(consume),
    ]
    with module.If(write):
        module.d.sync += produce.eq(produce + 1)
    with module.If(take):
        module.d.sync += consume.eq(consume + 1)
    with module.If(write & ~take):
        module.d.sync += [filled.eq(filled + 1), some.eq(1)]
    with module.Elif(take & ~write):
        module.d.sync += [filled.eq(filled - 1), some.eq(filled != 1)]
    return some, reading.data


class Credit(Elaboratable):
    """Counts the places of a queue that are neither filled nor promised: `free` if there is one.

    Who takes a place by `take` has it until it is given `back`.
    """

    def __init__(self, places: int) -> None:
        self._places = places
        self.free = Signal(init=1)
        self.take = Signal()
        self.back = Signal()

    def elaborate(self, platform: object) -> Module:
        module = Module()
        left = Signal(range(self._places + 1), init=self._places)
        with module.If(self.take & ~self.back):
            module.d.sync += [left.eq(left - 1), self.free.eq(left != 1)]
        with module.Elif(self.back & ~self.take):
            module.d.sync += [left.eq(left + 1), self.free.eq(1)]
        return module


class Queue(Elaboratable):
    """Instructions of one unit; the first is given when the tokens that it waits for are there.

    What is pushed is written in the next cycle, `data` still being there; two that are pushed are
    at least four cycles apart. `tokens` has, for each of the three units in the order of the bits
    of `wait`, how many tokens it has given that are not taken; the own unit's is never looked at.
    The unit takes `head` by `take` while `ready`; it reports each finished instruction by
    `finished`. `forget` drops all tokens.

    Each step between the tokens' arrival and the unit's start is a register: the units lie apart.
    """

    def __init__(self, kind: type, depth: int) -> None:
        self._depth = depth
        self.layout = layout(kind)
        self.push = Signal()
        self.room = Signal(init=1)
        self.data = Signal(self.layout.size)
        self.given = Signal(3)
        self.forget = Signal()
        self.ready = Signal()
        self.head = Signal(self.layout, reset_less=True)
        self.take = Signal()
        self.finished = Signal()
        self.idle = Signal(init=1)
        self.missing = Signal(3)

    def elaborate(self, platform: object) -> Module:
        module = Module()
        module.submodules.room = room = Credit(self._depth)
        write, moves, held = Signal(), Signal(), Signal()
        some, first = stored(module, self._depth, write, self.data, moves)
        module.d.sync += write.eq(self.push)
        module.d.comb += [
            room.take.eq(self.push),
            room.back.eq(moves),
            self.room.eq(room.free),
            moves.eq(some & ~held),
        ]
        with module.If(~held):
            module.d.sync += [self.head.eq(first), held.eq(some)]
        with module.Elif(self.take):
            module.d.sync += held.eq(0)
        module.d.sync += self.ready.eq(held & ~self.missing.any() & ~self.take)
        tokens = [Signal(TOKEN_BITS, name=f"tokens{unit}") for unit in range(3)]
        empty = [Signal(init=1, name=f"empty{unit}") for unit in range(3)]
        for unit in range(3):
            wanted = self.head.wait[unit]
            given, taken = Signal(name=f"given{unit}"), Signal(name=f"taken{unit}")
            changed = Signal(TOKEN_BITS, name=f"changed{unit}")
            module.d.sync += [given.eq(self.given[unit]), taken.eq(self.take & wanted)]
            module.d.comb += [
                self.missing[unit].eq(held & wanted & empty[unit]),
                changed.eq(tokens[unit] + Mux(given, 1, -1)),
            ]
            with module.If(given ^ taken):
                module.d.sync += [tokens[unit].eq(changed), empty[unit].eq(changed == 0)]
            with module.If(self.forget):
                module.d.sync += [tokens[unit].eq(0), empty[unit].eq(1)]
        running, runs = Signal(4), Signal()
        with module.If(self.take & ~self.finished):
            module.d.sync += [running.eq(running + 1), runs.eq(1)]
        with module.Elif(self.finished & ~self.take):
            module.d.sync += [running.eq(running - 1), runs.eq(running != 1)]
        waits = Signal()
        module.d.comb += waits.eq(self.push | write | some | held)
        module.d.sync += self.idle.eq(~waits & ~runs & ~self.finished)
        return module
