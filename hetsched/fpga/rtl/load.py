"""LOAD: strided copies from DRAM to the buffers, with a halo, one beat in a cycle."""

from amaranth.hdl import Cat, Elaboratable, Module, Mux, Signal, Value
from amaranth.lib.data import StructLayout
from amaranth.lib.fifo import SyncFIFOBuffered

from hetsched.fpga.isa import BEAT, Load, Overlay
from hetsched.fpga.rtl.queues import Queue

# What is known of a beat before its data arrive.
TAG = StructLayout(
    {"real": 1, "buffer": 2, "address": 16, "fill": 8, "ends": 1, "signal": 3},
)


class LoadUnit(Elaboratable):
    """Walks over a LOAD's beats, halo and all, and leaves a tag for each; asks for the real ones.

    The second half takes the tags in order and writes the halo's byte, or what arrived. There are
    as many places for data as for tags, so what was asked for always has a place. A read goes from
    `request` (with `address`, taken where `accepted`) to `arrived` (with `data`), in order.
    """

    def __init__(self, overlay: Overlay) -> None:
        self._overlay = overlay
        self.queue = Queue(Load, overlay.queue)
        self.request = Signal()
        self.accepted = Signal()
        self.address = Signal(32)
        self.arrived = Signal()
        self.data = Signal(8 * BEAT)
        self.signal = Signal(3)
        self.write = Signal(3)
        self.write_address = Signal(16, reset_less=True)
        self.write_data = Signal(8 * BEAT, reset_less=True)

    def elaborate(self, platform: object) -> Module:
        module = Module()
        module.submodules.queue = self.queue
        module.submodules.tags = tags = SyncFIFOBuffered(
            width=TAG.size, depth=self._overlay.outstanding
        )
        module.submodules.beats = beats = SyncFIFOBuffered(
            width=8 * BEAT, depth=self._overlay.outstanding
        )
        # Whether DRAM takes a read is known late: only this queue's end depends on it.
        module.submodules.asks = asks = SyncFIFOBuffered(width=32, depth=4)
        module.d.comb += [
            self.request.eq(asks.r_rdy),
            self.address.eq(asks.r_data),
            asks.r_en.eq(self.accepted),
        ]
        self._walk(module, tags, asks)
        self._write(module, tags, beats)
        return module

    def _walk(self, module: Module, tags: SyncFIFOBuffered, asks: SyncFIFOBuffered) -> None:
        head = self.queue.head
        load = Signal(self.queue.layout, reset_less=True)
        # Set up in three cycles: take, add, compare.
        stage = Signal(2)
        loaded, added, running = Signal(), Signal(), Signal()
        present = Signal()
        module.d.comb += self.queue.take.eq(self.queue.ready & (stage == 0) & ~running & ~present)
        module.d.comb += [loaded.eq(stage == 1), added.eq(stage == 2)]
        x, y, plane = Signal(17), Signal(13), Signal(12)
        last_x, last_y, last_plane = Signal(17), Signal(13), Signal(12)
        end_x, end_y = Signal(17), Signal(13)
        row_base, plane_base = Signal(32), Signal(32)
        target = Signal(16)
        # What the first instruction is need not wait for whether it may start.
        with module.If((stage == 0) & ~running & ~present):
            module.d.sync += load.eq(head)
        with module.If(self.queue.take):
            module.d.sync += stage.eq(1)
        with module.If(loaded):
            module.d.sync += [
                stage.eq(2),
                end_x.eq(load.left + load.beats),
                end_y.eq(load.top + load.rows),
                row_base.eq(load.dram),
                plane_base.eq(load.dram + load.plane_stride),
                last_plane.eq(load.planes - 1),
                target.eq(load.start),
            ]
        with module.If(added):
            module.d.sync += [
                stage.eq(0),
                running.eq(1),
                last_x.eq(end_x + load.right - 1),
                last_y.eq(end_y + load.bottom - 1),
            ]
        # A register, as much hangs on it: whether both queues will have a place.
        go = Signal(init=1)
        module.d.sync += go.eq(_will_take(module, tags) & _will_take(module, asks))
        # First stage: where the beat is.
        with module.If(running & go):
            module.d.sync += x.eq(x + 1)
            with module.If(x == last_x):
                module.d.sync += [x.eq(0), y.eq(y + 1)]
                with module.If(y == last_y):
                    module.d.sync += [y.eq(0), plane.eq(plane + 1)]
                    with module.If(plane == last_plane):
                        module.d.sync += [plane.eq(0), running.eq(0)]
        # Second stage: what it is.
        real = Signal()
        opens, closes, closes_plane, ends = Signal(), Signal(), Signal(), Signal()
        tag = Signal(TAG)
        with module.If(go):
            module.d.sync += [
                present.eq(running),
                real.eq(running & (x >= load.left) & (x < end_x) & (y >= load.top) & (y < end_y)),
                opens.eq(x == load.left),
                closes.eq(x + 1 == end_x),
                closes_plane.eq(y + 1 == end_y),
                ends.eq((x == last_x) & (y == last_y) & (plane == last_plane)),
                tag.buffer.eq(load.buffer),
                tag.fill.eq(load.fill),
                tag.signal.eq(load.signal),
            ]
            with module.If(present):
                module.d.sync += target.eq(target + 1)
        module.d.comb += [
            tags.w_en.eq(present & go),
            tags.w_data.eq(Cat(real, tag.buffer, target, tag.fill, ends, Mux(ends, tag.signal, 0))),
        ]
        # Third stage: its address.
        address, asked = Signal(32), Signal()
        module.d.comb += [asks.w_en.eq(asked & go), asks.w_data.eq(address)]
        with module.If(go):
            module.d.sync += asked.eq(real)
            with module.If(real):
                module.d.sync += address.eq(Mux(opens, row_base, address + BEAT))
                with module.If(closes):
                    module.d.sync += row_base.eq(
                        Mux(closes_plane, plane_base, row_base + load.row_stride)
                    )
                    with module.If(closes_plane):
                        module.d.sync += plane_base.eq(plane_base + load.plane_stride)

    def _write(self, module: Module, tags: SyncFIFOBuffered, beats: SyncFIFOBuffered) -> None:
        tag = Signal(TAG)
        here, go = Signal(), Signal()
        module.d.comb += [
            beats.w_en.eq(self.arrived),
            beats.w_data.eq(self.data),
            tag.eq(tags.r_data),
            here.eq(~tag.real | beats.r_rdy),
            go.eq(tags.r_rdy & here),
            tags.r_en.eq(here),
            beats.r_en.eq(tags.r_rdy & tag.real),
        ]
        done = Signal(3)
        module.d.sync += [
            self.write.eq(Mux(go, 1 << tag.buffer, 0)),
            done.eq(Mux(go, tag.signal, 0)),
            self.signal.eq(done),
            self.queue.finished.eq(go & tag.ends),
        ]
        with module.If(go):
            module.d.sync += [
                self.write_address.eq(tag.address),
                self.write_data.eq(Mux(tag.real, beats.r_data, tag.fill.replicate(BEAT))),
            ]


def _will_take(module: Module, queue: SyncFIFOBuffered) -> Value:
    """Whether `queue` has a place in the next cycle, whatever is put and taken in this one."""
    filled, put, taken = Signal(range(queue.depth + 1)), Signal(), Signal()
    module.d.comb += [put.eq(queue.w_en & queue.w_rdy), taken.eq(queue.r_en & queue.r_rdy)]
    with module.If(put & ~taken):
        module.d.sync += filled.eq(filled + 1)
    with module.Elif(taken & ~put):
        module.d.sync += filled.eq(filled - 1)
    will_take = Signal()
    module.d.comb += will_take.eq(
        (filled < queue.depth - 1) | (filled == queue.depth - 1) & ~(put & ~taken) | taken & ~put
    )
    return will_take
