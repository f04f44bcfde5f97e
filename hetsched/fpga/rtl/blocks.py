"""What an FPGA has ready-made: block RAMs and multipliers, as ECP5 instances or as plain RTL.

Both forms take the same number of cycles, so what is simulated is what is placed.
"""

from dataclasses import dataclass
from enum import Enum

from amaranth.hdl import (
    ClockSignal,
    Const,
    Elaboratable,
    Instance,
    Module,
    Signal,
    Value,
    signed,
)
from amaranth.lib.memory import Memory


class Technology(Enum):
    """Whose primitives are instantiated.

    `GENERIC` leaves them to synthesis or a simulator. `SIMULATION` is the same, and computes a
    column's dot product in one step, as late as its result is looked at, in place of a tree of
    registers: nothing else can be told apart from outside, and a simulator is thrice as fast.
    """

    GENERIC = "generic"
    SIMULATION = "simulation"
    ECP5 = "ecp5"


@dataclass(frozen=True)
class Shape:
    """A way to use a DP16KD: words of `width` bits; word 0's lowest address bit is `lowest`."""

    width: int
    lowest: int

    @property
    def depth(self) -> int:
        return 1 << 14 - self.lowest


# 16 of the 18 bits of the widest are used where words are whole bytes; a ninth bit is, too.
SHAPES = (Shape(18, 4), Shape(9, 3), Shape(4, 2), Shape(2, 1), Shape(1, 0))


# Blocks that one copy of an address drives: block RAMs are spread over the whole device.
TOGETHER = 8


def copied(module: Module, value: Value, name: str, copies: int) -> list[Signal]:
    """`value` of a cycle before, in registers that synthesis keeps apart."""
    later = [
        Signal(len(value), name=f"{name}{copy}", reset_less=True, attrs={"keep": 1})
        for copy in range(copies)
    ]
    module.d.sync += [register.eq(value) for register in later]
    return later


class BlockRam(Elaboratable):
    """`depth` words of `width` bits with a write port and a read port of three cycles.

    The word at `read_address` in one cycle is `read_data` three cycles later: one for registers
    of the address, near to the blocks, one for the block, and one for its own output register,
    without which it is 5 ns slower. What is written in one cycle is there for a `read_address`
    of the next; a word that is read while it is written is undefined.
    """

    def __init__(self, width: int, depth: int, technology: Technology) -> None:
        self._width, self._depth, self._technology = width, depth, technology
        bits = (depth - 1).bit_length()
        self.write_enable = Signal()
        self.write_address = Signal(bits)
        self.write_data = Signal(width)
        self.read_address = Signal(bits)
        self.read_data = Signal(width, reset_less=True)

    def elaborate(self, platform: object) -> Module:
        module = Module()
        if self._technology is Technology.ECP5:
            self._instances(module)
            return module
        module.submodules.memory = memory = Memory(shape=self._width, depth=self._depth, init=[])
        write, read = memory.write_port(), memory.read_port()
        enable = Signal()
        module.d.sync += [
            enable.eq(self.write_enable),
            write.addr.eq(self.write_address),
            write.data.eq(self.write_data),
            read.addr.eq(self.read_address),
            self.read_data.eq(read.data),
        ]
        module.d.comb += [write.en.eq(enable), read.en.eq(1)]
        return module

    def _instances(self, module: Module) -> None:
        # The widest shape that is deep enough needs no multiplexer behind the blocks.
        shape = next((shape for shape in SHAPES if shape.depth >= self._depth), None)
        assert shape is not None, "a block RAM has at most 16384 words"
        starts = range(0, self._width, shape.width)
        copies = -(-len(starts) // TOGETHER)
        enables = copied(module, self.write_enable, "write", copies)
        writes = copied(module, self.write_address, "write_place", copies)
        reads = copied(module, self.read_address, "read_place", copies)
        (data,) = copied(module, self.write_data, "write_data", 1)
        for index, start in enumerate(starts):
            copy = index * copies // len(starts)
            bits = range(start, min(start + shape.width, self._width))
            ports: dict[str, object] = {
                "p_DATA_WIDTH_A": shape.width,
                "p_DATA_WIDTH_B": shape.width,
                "p_REGMODE_A": "NOREG",
                "p_REGMODE_B": "OUTREG",
                "p_RESETMODE": "SYNC",
                "p_WRITEMODE_A": "NORMAL",
                "p_WRITEMODE_B": "NORMAL",
                "p_GSR": "DISABLED",
                "i_CLKA": ClockSignal(),
                "i_CLKB": ClockSignal(),
                "i_WEA": enables[copy],
                "i_WEB": Const(0),
                "i_CEA": Const(1),
                "i_CEB": Const(1),
                "i_OCEA": Const(1),
                "i_OCEB": Const(1),
                "i_RSTA": Const(0),
                "i_RSTB": Const(0),
            }
            for port in "AB":
                address = writes[copy] if port == "A" else reads[copy]
                for select in range(3):
                    ports[f"i_CS{port}{select}"] = Const(0)
                for bit in range(14):
                    index_bit = bit - shape.lowest
                    if 0 <= index_bit < len(address):
                        value: object = address[index_bit]
                    else:
                        # The two lowest bits of the widest shape enable its bytes.
                        value = Const(int(shape.width == 18 and bit < 2))
                    ports[f"i_AD{port}{bit}"] = value
            for place, bit in enumerate(bits):
                ports[f"i_DIA{place}"] = data[bit]
                ports[f"o_DOB{place}"] = self.read_data[bit]
            module.submodules[f"block{start}"] = Instance("DP16KD", **ports)


class Multiplier(Elaboratable):
    """`product` is `a * b` of three cycles before, signed, of up to 18 bits each.

    `wanted` has a bit for each of the three cycles: a product that is not wanted in one of them
    may be anything, which a simulator need not compute.

    Registers stand at the inputs and the output of the DSP, and one more behind it: the way from
    a DSP to the logic is long.
    """

    def __init__(self, a_bits: int, b_bits: int, technology: Technology) -> None:
        self._technology = technology
        self.a = Signal(signed(a_bits))
        self.b = Signal(signed(b_bits))
        self.product = Signal(signed(a_bits + b_bits), reset_less=True)
        self.wanted = Signal(3, init=7)

    def elaborate(self, platform: object) -> Module:
        module = Module()
        if self._technology is Technology.ECP5:
            self._instance(module)
            return module
        a = Signal.like(self.a, reset_less=True)
        b = Signal.like(self.b, reset_less=True)
        product = Signal.like(self.product)
        with module.If(self.wanted[0]):
            module.d.sync += [a.eq(self.a), b.eq(self.b)]
        with module.If(self.wanted[1]):
            module.d.sync += product.eq(a * b)
        with module.If(self.wanted[2]):
            module.d.sync += self.product.eq(product)
        return module

    def _instance(self, module: Module) -> None:
        a, b, product = Signal(signed(18)), Signal(signed(18)), Signal(36)
        module.d.comb += [a.eq(self.a), b.eq(self.b)]
        ports: dict[str, object] = {
            "p_REG_INPUTA_CLK": "CLK0",
            "p_REG_INPUTB_CLK": "CLK0",
            "p_REG_OUTPUT_CLK": "CLK0",
            "i_CLK0": ClockSignal(),
            "i_CE0": Const(1),
            "i_RST0": Const(0),
            "i_SIGNEDA": Const(1),
            "i_SIGNEDB": Const(1),
            "i_SOURCEA": Const(0),
            "i_SOURCEB": Const(0),
        }
        ports |= {f"i_A{bit}": a[bit] for bit in range(18)}
        ports |= {f"i_B{bit}": b[bit] for bit in range(18)}
        ports |= {f"o_P{bit}": product[bit] for bit in range(36)}
        module.submodules.dsp = Instance("MULT18X18D", **ports)
        module.d.sync += self.product.eq(product)
