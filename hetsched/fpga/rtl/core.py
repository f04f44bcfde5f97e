"""The core: three units, their buffers, and the stream of instructions that they share out."""

from collections.abc import Iterable

from amaranth.hdl import Array as Choice
from amaranth.hdl import Cat, ClockDomain, Const, Elaboratable, Module, Signal, Value

from hetsched.fpga.isa import BEAT, WORDS, Buffer, Conv, Load, Overlay, Store, Sync
from hetsched.fpga.rtl.array import PARAMETER_BITS, Array
from hetsched.fpga.rtl.blocks import BlockRam, Technology
from hetsched.fpga.rtl.conv import ConvUnit
from hetsched.fpga.rtl.load import LoadUnit
from hetsched.fpga.rtl.store import StoreUnit

COUNTERS = ("cycles", "macs", "stall_load", "stall_store", "load_cycles", "store_cycles")
"""Cycles that the core is busy, that the array takes an input word, that it takes none because
CONV waits for LOAD's or for STORE's token, and that LOAD or STORE have something to do."""


class Banks:
    """A buffer of words of several beats: a block RAM for each beat of a word."""

    def __init__(
        self, module: Module, name: str, words: int, beats: int, bits: int, technology: Technology
    ) -> None:
        self.memories = [BlockRam(bits, words, technology) for _ in range(beats)]
        for index, memory in enumerate(self.memories):
            module.submodules[f"{name}{index}"] = memory
        self._select = (beats - 1).bit_length()

    def write_beats(self, module: Module, write: Value, place: Value, beat: Value) -> None:
        """Writes `beat` to the one at `place`, a cycle later: registers of the buffer's own."""
        enable = Signal(name="write")
        address = Signal.like(place, name="write_place", reset_less=True)
        data = Signal.like(beat, name="write_beat", reset_less=True)
        module.d.sync += [enable.eq(write), address.eq(place), data.eq(beat)]
        for index, memory in enumerate(self.memories):
            module.d.comb += [
                memory.write_enable.eq(enable & (address[: self._select] == index)),
                memory.write_address.eq(address[self._select :]),
                memory.write_data.eq(data),
            ]

    def write_words(self, module: Module, enable: Value, address: Value, data: Value) -> None:
        for index, memory in enumerate(self.memories):
            module.d.comb += [
                memory.write_enable.eq(enable),
                memory.write_address.eq(address),
                memory.write_data.eq(data[8 * BEAT * index : 8 * BEAT * (index + 1)]),
            ]

    def read_words(self, module: Module, address: Value) -> list[Value]:
        module.d.comb += [memory.read_address.eq(address) for memory in self.memories]
        return [memory.read_data for memory in self.memories]

    def read_beats(self, module: Module, address: Value) -> Value:
        """The beat at the `address` of three cycles before."""
        module.d.comb += [
            memory.read_address.eq(address[self._select :]) for memory in self.memories
        ]
        if not self._select:
            return self.memories[0].read_data
        bank = address[: self._select]
        for _ in range(3):
            later = Signal.like(bank, name="bank")
            module.d.sync += later.eq(bank)
            bank = later
        return Choice(memory.read_data for memory in self.memories)[bank]


class Core(Elaboratable):
    """An overlay. All outputs are registers, all inputs are taken at the rising edge.

    Instructions come as beats, taken where `i_valid` and `i_ready` are 1. A read of DRAM is asked
    for by `r_valid`, `r_address` and taken where `r_ready` is 1; its data come in order with
    `d_valid`, and are always taken. A write is offered by `w_valid`, `w_address`, `w_data` and
    taken where `w_ready` is 1. `busy` is 0 when all that was given is done.

    There is no reset: registers start with what the FPGA's configuration gives them.
    """

    def __init__(self, overlay: Overlay, technology: Technology = Technology.GENERIC) -> None:
        self._overlay, self._technology = overlay, technology
        self.clock = ClockDomain("sync", reset_less=True)
        self.i_valid = Signal()
        self.i_ready = Signal()
        self.i_data = Signal(8 * BEAT)
        self.r_valid = Signal()
        self.r_ready = Signal()
        self.r_address = Signal(32)
        self.d_valid = Signal()
        self.d_data = Signal(8 * BEAT)
        self.w_valid = Signal()
        self.w_ready = Signal()
        self.w_address = Signal(32)
        self.w_data = Signal(8 * BEAT)
        self.busy = Signal(init=1)
        self.counters = {name: Signal(32, name=name) for name in COUNTERS}

    @property
    def inputs(self) -> tuple[Signal, ...]:
        return (self.i_valid, self.i_data, self.r_ready, self.d_valid, self.d_data, self.w_ready)

    @property
    def outputs(self) -> tuple[Signal, ...]:
        return (
            self.i_ready,
            self.r_valid,
            self.r_address,
            self.w_valid,
            self.w_address,
            self.w_data,
            self.busy,
            *self.counters.values(),
        )

    @property
    def ports(self) -> Iterable[Signal]:
        return (self.clock.clk, *self.inputs, *self.outputs)

    def elaborate(self, platform: object) -> Module:
        module = Module()
        module.domains += self.clock
        overlay = self._overlay
        module.submodules.load = load = LoadUnit(overlay)
        module.submodules.conv = conv = ConvUnit(overlay)
        module.submodules.store = store = StoreUnit(overlay)
        module.submodules.array = array = Array(overlay, conv, self._technology)
        self._buffers(module, load, array, store)
        queues = (load.queue, conv.queue, store.queue)
        signals = (load.signal, array.signal, store.signal)
        for taker, queue in enumerate(queues):
            module.d.comb += queue.given.eq(Cat(signal[taker] for signal in signals))
        module.d.comb += [
            conv.queue.finished.eq(array.finished),
            load.accepted.eq(self.r_ready),
            load.arrived.eq(self.d_valid),
            load.data.eq(self.d_data),
            self.r_valid.eq(load.request),
            self.r_address.eq(load.address),
            store.accepted.eq(self.w_ready),
            self.w_valid.eq(store.offered),
            self.w_address.eq(store.address),
            self.w_data.eq(store.data),
        ]
        idle = Signal()
        module.d.comb += idle.eq(load.queue.idle & conv.queue.idle & store.queue.idle)
        self._dispatch(module, queues, idle)
        stalls, missing = ~conv.streams, conv.queue.missing
        counted = {
            "macs": conv.streams,
            "stall_load": stalls & missing[0],
            "stall_store": stalls & ~missing[0] & missing[2],
            "load_cycles": ~load.queue.idle,
            "store_cycles": ~store.queue.idle,
        }
        # A cycle later, while the core is still busy.
        counts: dict[str, Value] = {"cycles": Const(1)}
        for name, value in counted.items():
            counts[name] = later = Signal(name=f"counts_{name}")
            module.d.sync += later.eq(value)
        with module.If(self.busy):
            for name, counter in self.counters.items():
                module.d.sync += counter.eq(counter + counts[name])
        return module

    def _dispatch(self, module: Module, queues: tuple, idle: Signal) -> None:
        """Beats to instructions, instructions to the queues."""
        word = Signal(64 * WORDS)
        beats, full, passing = Signal(range(WORDS)), Signal(), Signal()
        taken, shifts, whole = Signal(), Signal(), Signal()
        beat = Signal(8 * BEAT, reset_less=True)
        module.d.comb += taken.eq(self.i_valid & self.i_ready)
        # A beat waits in a register, so that the shift hangs on one alone.
        module.d.sync += [
            beat.eq(self.i_data),
            shifts.eq(taken),
            whole.eq(0),
            full.eq(full | whole),
        ]
        with module.If(shifts):
            module.d.sync += word.eq(Cat(word[8 * BEAT :], beat))
        with module.If(taken):
            module.d.sync += beats.eq(beats + 1)
            with module.If(beats == WORDS - 1):
                module.d.sync += [whole.eq(1), self.i_ready.eq(0)]
        with module.Elif(~full & ~whole):
            module.d.sync += self.i_ready.eq(1)
        code = word[:3]
        codes = (Load.code, Conv.code, Store.code)
        for own, queue in zip(codes, queues, strict=True):
            fits = full & (code == own)
            module.d.comb += [
                queue.data.eq(word[: len(queue.data)]),
                queue.push.eq(fits & queue.room),
            ]
        syncs = Signal()
        module.d.comb += syncs.eq(full & (code == Sync.code) & idle)
        module.d.comb += [queue.forget.eq(syncs) for queue in queues]
        module.d.comb += passing.eq(syncs | Cat(queue.push for queue in queues).any())
        with module.If(passing):
            module.d.sync += [full.eq(0), self.i_ready.eq(1)]
        module.d.sync += self.busy.eq(full | whole | (beats != 0) | taken | ~idle)

    def _buffers(self, module: Module, load: LoadUnit, array: Array, store: StoreUnit) -> None:
        overlay, technology = self._overlay, self._technology
        bits = 8 * BEAT
        inputs = Banks(module, "input", overlay.input_words, overlay.input_beats, bits, technology)
        weights = Banks(
            module, "weights", overlay.weight_words, overlay.column_beats, bits, technology
        )
        parameters = Banks(
            module,
            "parameters",
            overlay.parameter_words,
            overlay.columns,
            PARAMETER_BITS,
            technology,
        )
        outputs = Banks(
            module, "output", overlay.output_words, overlay.column_beats, bits, technology
        )
        for place, buffer in (
            (Buffer.INPUT, inputs),
            (Buffer.WEIGHTS, weights),
            (Buffer.PARAMETERS, parameters),
        ):
            buffer.write_beats(module, load.write[place], load.write_address, load.write_data)
        module.d.comb += [
            array.input_data.eq(Cat(inputs.read_words(module, array.input_address))),
            array.weight_data.eq(Cat(weights.read_words(module, array.weight_address))),
        ]
        words = parameters.read_words(module, array.parameter_address)
        for parameter, word in zip(array.parameter_data, words, strict=True):
            module.d.comb += parameter.eq(word)
        outputs.write_words(module, array.output_write, array.output_address, array.output_data)
        beat = Signal(bits)
        module.d.sync += beat.eq(outputs.read_beats(module, store.read_address))
        module.d.comb += store.read_data.eq(beat)
