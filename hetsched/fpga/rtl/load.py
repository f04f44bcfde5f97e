"""LOAD: strided copies from DRAM to the buffers, with a halo, one beat in a cycle."""

from amaranth.hdl import Cat, Elaboratable, Module, Mux, Signal
from amaranth.lib.data import StructLayout

from hetsched.fpga.isa import BEAT, Load, Overlay
from hetsched.fpga.rtl.queues import Credit, Fifo, Queue, stored

# What is known of a beat before its data arrive, but for whether there are any.
TAG = StructLayout({"real": 1, "buffer": 2, "address": 16, "fill": 8, "ends": 1, "signal": 3})
CONSTANT = ("buffer", "fill", "signal")
"""What all tags of a LOAD share."""


class LoadUnit(Elaboratable):
    """Walks over a LOAD's beats, halo and all, and leaves a tag for each; asks for the real ones.

    The second half takes the tags in order and writes the halo's byte, or what arrived. A step of
    the walk takes a place for a tag, and there are as many places for reads and their data: so
    nothing behind the walk's first stage ever stops. A read goes from `request` (with `address`,
    taken where `accepted`) to `arrived` (with `data`), in order.
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
        module.submodules.room = room = Credit(self._overlay.outstanding)
        module.submodules.asks = asks = Fifo(32, self._overlay.outstanding)
        module.d.comb += [
            self.request.eq(asks.ready),
            self.address.eq(asks.head),
            asks.take.eq(self.accepted),
        ]
        present, tag = self._walk(module, room, asks)
        self._write(module, room, present, tag)
        return module

    def _walk(self, module: Module, room: Credit, asks: Fifo) -> tuple[Signal, Signal]:
        """The tag that is `present`, if one is."""
        load = Signal(self.queue.layout, reset_less=True)
        # Set up in three cycles: take, add, compare.
        vacant, loaded, added, running = Signal(init=1), Signal(), Signal(), Signal()
        module.d.comb += self.queue.take.eq(self.queue.ready & vacant)
        # How many are left; the walk ends at 0.
        x, y, plane = Signal(17), Signal(13), Signal(12)
        final_x, final_y, final_plane = Signal(), Signal(), Signal()
        last_x, last_y = Signal(17), Signal(13)
        narrow, flat = Signal(), Signal()
        first_x, first_y = Signal(17), Signal(13)
        row_base, plane_base, target = Signal(32), Signal(32), Signal(16)
        # Where the beat is, and whether there is one.
        step = Signal()
        module.d.comb += [step.eq(running & room.free), room.take.eq(step)]
        with module.If(step):
            module.d.sync += [x.eq(x - 1), final_x.eq(x == 1)]
            with module.If(final_x):
                module.d.sync += [
                    x.eq(last_x), final_x.eq(narrow), y.eq(y - 1), final_y.eq(y == 1)
                ]  # fmt: skip
                with module.If(final_y):
                    module.d.sync += [
                        y.eq(last_y),
                        final_y.eq(flat),
                        plane.eq(plane - 1),
                        final_plane.eq(plane == 1),
                    ]
                    with module.If(final_plane):
                        module.d.sync += [running.eq(0), vacant.eq(1)]
        # How it lies to the halo, a cycle later, from copies near to the comparisons.
        at_x, at_y = Signal(17, reset_less=True), Signal(13, reset_less=True)
        stepped, ended = Signal(2), Signal(2)
        module.d.sync += [
            at_x.eq(x),
            at_y.eq(y),
            stepped.eq(Cat(step, stepped)),
            ended.eq(Cat(final_x & final_y & final_plane, ended)),
        ]
        inside = Signal(4)
        opens, closes, closes_plane = Signal(), Signal(), Signal()
        constant = Signal(StructLayout({name: TAG[name].shape for name in CONSTANT}))
        row_stride, plane_stride = Signal(32), Signal(32)
        module.d.sync += [
            inside.eq(
                Cat(at_x >= load.right, at_x <= first_x, at_y >= load.bottom, at_y <= first_y)
            ),
            opens.eq(at_x == first_x),
            closes.eq(at_x == load.right),
            closes_plane.eq(at_y == load.bottom),
            *(getattr(constant, name).eq(getattr(load, name)) for name in CONSTANT),
            row_stride.eq(load.row_stride),
            plane_stride.eq(load.plane_stride),
        ]
        # What it is; from here on, the next LOAD may be set up.
        present, real, opens_row = Signal(), Signal(), Signal()
        row_moves, plane_moves, from_plane = Signal(), Signal(), Signal()
        tag = Signal(TAG)
        module.d.sync += [
            present.eq(stepped[1]),
            real.eq(stepped[1] & inside.all()),
            opens_row.eq(opens),
            row_moves.eq(stepped[1] & inside.all() & closes | loaded),
            plane_moves.eq(stepped[1] & inside.all() & closes & closes_plane | loaded),
            from_plane.eq(closes_plane | loaded),
            tag.ends.eq(ended[1]),
            *(getattr(tag, name).eq(getattr(constant, name)) for name in CONSTANT),
        ]
        module.d.comb += [tag.real.eq(real), tag.address.eq(target)]
        with module.If(present):
            module.d.sync += target.eq(target + 1)
        # Its address.
        address = Signal(32, reset_less=True)
        module.d.sync += asks.write.eq(real)
        module.d.comb += asks.data.eq(address)
        with module.If(real):
            module.d.sync += address.eq(Mux(opens_row, row_base, address + BEAT))
        # Of a LOAD that is set up, too: its first row begins where its first plane does.
        with module.If(row_moves):
            module.d.sync += row_base.eq(Mux(from_plane, plane_base, row_base + row_stride))
        with module.If(plane_moves):
            module.d.sync += plane_base.eq(plane_base + plane_stride)
        with module.If(loaded):
            module.d.sync += plane_base.eq(load.dram)
        # What the first instruction is need not wait for whether it may start.
        with module.If(vacant):
            module.d.sync += [load.eq(self.queue.head), vacant.eq(~self.queue.take)]
        module.d.sync += [loaded.eq(self.queue.take), added.eq(loaded)]
        with module.If(loaded):
            module.d.sync += [
                first_x.eq(load.right + load.beats - 1),
                first_y.eq(load.bottom + load.rows - 1),
                last_x.eq(load.left + load.beats),
                last_y.eq(load.top + load.rows),
                narrow.eq((load.beats == 1) & (Cat(load.left, load.right) == 0)),
                flat.eq((load.rows == 1) & (Cat(load.top, load.bottom) == 0)),
                plane.eq(load.planes - 1),
                final_plane.eq(load.planes == 1),
            ]
        with module.If(added):
            module.d.sync += [
                running.eq(1),
                target.eq(load.start),
                *(place.eq(last_x + load.right - 1) for place in (x, last_x)),
                *(place.eq(last_y + load.bottom - 1) for place in (y, last_y)),
                final_x.eq(narrow),
                final_y.eq(flat),
            ]
        return present, tag

    def _write(self, module: Module, room: Credit, present: Signal, tag: Signal) -> None:
        # Whether data are waited for is known by itself, so that little hangs on whether they
        # are there: the tag and the data are read a cycle later, wanted or not.
        module.submodules.reals = reals = Fifo(1, self._overlay.outstanding)
        go, goes_on = Signal(), Signal()
        _, first_tag = stored(module, self._overlay.outstanding, present, tag.as_value(), go)
        half = 4 * BEAT
        some, low = stored(
            module, self._overlay.outstanding, self.arrived, self.data[:half], goes_on
        )
        _, high = stored(module, self._overlay.outstanding, self.arrived, self.data[half:], goes_on)
        went, tag_now, data_now = Signal(), Signal(TAG), Signal(8 * BEAT)
        module.d.comb += [
            reals.write.eq(present),
            reals.data.eq(tag.real),
            reals.take.eq(~reals.head | some),
            go.eq(reals.ready & reals.take),
            goes_on.eq(go & reals.head),
            room.back.eq(go),
        ]
        done = Signal(3)
        module.d.sync += [
            went.eq(go),
            tag_now.eq(first_tag),
            data_now.eq(Cat(low, high)),
            self.write.eq(Mux(went, 1 << tag_now.buffer, 0)),
            self.write_address.eq(tag_now.address),
            self.write_data.eq(Mux(tag_now.real, data_now, tag_now.fill.replicate(BEAT))),
            done.eq(Mux(went, Mux(tag_now.ends, tag_now.signal, 0), 0)),
            self.signal.eq(done),
            self.queue.finished.eq(went & tag_now.ends),
        ]
