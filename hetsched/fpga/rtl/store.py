"""STORE: strided copies from the output buffer to DRAM, one beat in a cycle."""

from amaranth.hdl import Cat, Elaboratable, Module, Mux, Signal
from amaranth.lib.data import StructLayout

from hetsched.fpga.isa import BEAT, Overlay, Store
from hetsched.fpga.rtl.queues import Credit, Fifo, Queue

# From the read's address to the beat behind the multiplexer of banks.
LATENCY = 4
DEPTH = 16
WRITE = StructLayout({"address": 32, "data": 8 * BEAT, "ends": 1, "signal": 3})


class StoreUnit(Elaboratable):
    """Walks over a STORE's beats; each is read, waits in a short queue, and is offered to DRAM.

    A beat is read only where the queue has a place for it. `read_data` is the beat at
    `read_address` of `LATENCY` cycles before. A write is `offered` (with `address` and `data`)
    until `accepted`.
    """

    def __init__(self, overlay: Overlay) -> None:
        self.queue = Queue(Store, overlay.queue)
        self.read_address = Signal(16)
        self.read_data = Signal(8 * BEAT)
        self.offered = Signal()
        self.accepted = Signal()
        self.address = Signal(32)
        self.data = Signal(8 * BEAT)
        self.signal = Signal(3)

    def elaborate(self, platform: object) -> Module:
        module = Module()
        module.submodules.queue = self.queue
        module.submodules.beats = beats = Fifo(WRITE.size, DEPTH)
        module.submodules.room = room = Credit(DEPTH)
        store = Signal(self.queue.layout, reset_less=True)
        vacant, loaded, running = Signal(init=1), Signal(), Signal()
        module.d.comb += self.queue.take.eq(self.queue.ready & vacant)
        x, y = Signal(16), Signal(12)
        place, row_base, source = Signal(32), Signal(32), Signal(16)
        last_x, last_y = Signal(), Signal()
        read = Signal()
        module.d.comb += [read.eq(running & room.free), room.take.eq(read)]
        # What the first instruction is need not wait for whether it may start.
        with module.If(vacant):
            module.d.sync += [store.eq(self.queue.head), vacant.eq(~self.queue.take)]
        module.d.sync += loaded.eq(self.queue.take)
        with module.If(loaded):
            module.d.sync += [
                running.eq(1),
                place.eq(store.dram),
                source.eq(store.start),
                x.eq(store.beats - 1),
                last_x.eq(store.beats == 1),
                y.eq(store.rows - 1),
                last_y.eq(store.rows == 1),
            ]
        with module.If(loaded | read & last_x):
            module.d.sync += row_base.eq(Mux(loaded, store.dram, row_base) + store.row_stride)
        with module.If(read):
            module.d.sync += [
                source.eq(source + 1),
                x.eq(x - 1),
                last_x.eq(x == 1),
                place.eq(place + store.step),
            ]
            with module.If(last_x):
                module.d.sync += [
                    x.eq(store.beats - 1),
                    last_x.eq(store.beats == 1),
                    place.eq(row_base),
                    y.eq(y - 1),
                    last_y.eq(y == 1),
                    running.eq(~last_y),
                    vacant.eq(last_y),
                ]
        ends = last_x & last_y
        beat = Cat(place, ends, store.signal, read)
        module.d.comb += self.read_address.eq(source)
        for _ in range(LATENCY):
            later = Signal.like(beat, name="later")
            module.d.sync += later.eq(beat)
            beat = later
        module.d.comb += [
            beats.write.eq(beat[-1]),
            beats.data.eq(Cat(beat[:32], self.read_data, beat[32:36])),
        ]
        write = Signal(WRITE)
        done = Signal()
        module.d.comb += [
            write.eq(beats.head),
            beats.take.eq(self.accepted),
            done.eq(beats.ready & self.accepted),
            self.offered.eq(beats.ready),
            self.address.eq(write.address),
            self.data.eq(write.data),
        ]
        module.d.sync += [
            room.back.eq(done),
            self.signal.eq(Mux(done & write.ends, write.signal, 0)),
            self.queue.finished.eq(done & write.ends),
        ]
        return module
