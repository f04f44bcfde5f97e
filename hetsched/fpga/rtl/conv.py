"""CONV: the tiles of a convolution one after the other, and the addresses of their inputs.

A tile's weights come into a shadow while the tile before streams, so there is no gap between
tiles of at least `rows` positions. Stages are counted in cycles from the one in which a position's
address is known: `Array` does the arithmetic, this the order.
"""

from amaranth.hdl import Elaboratable, Module, Mux, Signal, Value
from amaranth.lib.data import StructLayout

from hetsched.fpga.isa import Conv, Overlay
from hetsched.fpga.rtl.queues import Queue, layout

CONV = layout(Conv)


def fields(*names: str) -> dict[str, object]:
    return {name: CONV[name].shape for name in names}


# What is needed of a tile while it streams and in the stages behind.
TILE = StructLayout(
    {
        **fields("input", "position_stride", "line_stride", "drop", "step", "lane"),
        **fields("first", "last", "depthwise", "widen", "maximum"),
        **fields("parameter", "accumulator", "output", "zero", "low", "high", "signal"),
        "last_position": 12,
        "last_line": 12,
        "ends": 1,
    }
)


class Stages:
    """Values of a tile at the stages where they are needed.

    `begins` is 1 while a tile's first position is at stage 0. A value is held from the cycle in
    which that position arrives at its stage until the next tile's does. Tiles are at least eight
    cycles apart, so one register is enough for eight stages.
    """

    APART = 8

    def __init__(self, module: Module, begins: Signal) -> None:
        self._module = module
        self._begins = {(0, 0): begins}
        self._held: dict[tuple[int, int, int], Value] = {}

    def begins(self, stage: int, copy: int = 0) -> Signal:
        if (stage, copy) not in self._begins:
            later = self.later(self.begins(stage - 1), f"begins{stage}")
            if copy:
                later.attrs["keep"] = 1
            self._begins[stage, copy] = later
        return self._begins[stage, copy]

    def later(self, value: Value, name: str, reset: bool = True) -> Signal:
        """`value` of a cycle before."""
        later = Signal.like(value, name=name, reset_less=not reset)
        self._module.d.sync += later.eq(value)
        return later

    def held(self, value: Value, stage: int, since: int = 0, copy: int = 0) -> Signal:
        """`value`, which holds from stage `since` on for as long as a tile does, at `stage`.

        Copies are kept apart in synthesis, with what tells them when to take it: each drives what
        is near to it.
        """
        while stage - since > self.APART:
            value, since = self.held(value, since + self.APART, since), since + self.APART
        key = id(value), stage, copy
        if key not in self._held:
            held = Signal.like(value, name=f"held{stage}", reset_less=True)
            if copy:
                held.attrs["keep"] = 1
            with self._module.If(self.begins(stage - 1, copy if stage > 1 else 0)):
                self._module.d.sync += held.eq(value)
            # The value is kept alive with its id.
            self._held[key] = held
            self._held[id(value), -1, 0] = value
        return self._held[key]


class ConvUnit(Elaboratable):
    """Cuts CONVs into tiles, brings each tile's weights, and streams its positions' addresses.

    `weight_address` is of the weight word for row `weight_row` where `weight` is 1. `position` is
    the input word of stage 0; `streams` says that there is one, `kept` that it makes an output;
    `tile` is its tile, from `begins` on.
    """

    def __init__(self, overlay: Overlay) -> None:
        self._rows = overlay.rows
        self.queue = Queue(Conv, overlay.queue)
        self.weight = Signal()
        self.weight_row = Signal(range(overlay.rows))
        self.weight_address = Signal(CONV["weights"].shape)
        self.streams = Signal()
        self.kept = Signal()
        self.position = Signal(CONV["input"].shape)
        self.tile = Signal(TILE, reset_less=True)
        self.begins = Signal()
        self.ends = Signal()

    def elaborate(self, platform: object) -> Module:
        module = Module()
        module.submodules.queue = self.queue
        taken = Signal()
        found, address, present = self._tiles(module, taken)
        ready, following, shape, start = self._weights(module, taken, found, address, present)
        self._stream(module, ready, following, shape, start)
        return module

    def _tiles(self, module: Module, taken: Signal) -> tuple[Signal, Signal, Signal]:
        """The tiles of the instructions, one in two cycles; `present` until it is `taken`."""
        conv = Signal(CONV, reset_less=True)
        running, fresh, present = Signal(), Signal(), Signal()
        module.d.comb += self.queue.take.eq(self.queue.ready & ~running)
        tile = Signal(TILE, reset_less=True)
        address = Signal.like(self.weight_address, reset_less=True)
        bases = [Signal(CONV["input"].shape, name=f"base{loop}") for loop in range(2)]
        left = {loop: Signal(CONV[loop].shape, name=loop) for loop in ("inner", "middle", "outer")}
        final = {loop: Signal(name=f"final_{loop}") for loop in left}
        # What the first instruction is need not wait for whether it may start.
        with module.If(~running):
            module.d.sync += [
                conv.eq(self.queue.head),
                running.eq(self.queue.take),
                fresh.eq(self.queue.take),
            ]
        with module.If(running & fresh):
            module.d.sync += [
                fresh.eq(0),
                present.eq(1),
                *(
                    getattr(tile, name).eq(getattr(conv, name))
                    for name in TILE.members
                    if name in CONV.members and name not in ("widen", "last", "signal")
                ),
                tile.widen.eq(0),
                tile.last_position.eq(conv.positions - 1),
                tile.last_line.eq(conv.lines - 1),
                address.eq(conv.weights),
                *(base.eq(conv.input) for base in bases),
                *(left[loop].eq(getattr(conv, loop) - 1) for loop in left),
                *(final[loop].eq(getattr(conv, loop) == 1) for loop in left),
            ]
        whole = final["inner"] & final["middle"] & final["outer"]
        # Where the next tile may begin: added while this one is there, in time for the next.
        next_of = {loop: Signal(CONV["input"].shape, name=f"next_{loop}") for loop in left}
        module.d.sync += [
            next_of["inner"].eq(tile.input + conv.inner_stride),
            next_of["middle"].eq(bases[0] + conv.middle_stride),
            next_of["outer"].eq(bases[1] + conv.outer_stride),
        ]
        turn, both = Signal(attrs={"keep": 1}), Signal()
        module.d.sync += [
            turn.eq(present & taken & ~whole),
            both.eq(final["inner"] & final["middle"]),
        ]
        with module.If(present & taken):
            module.d.sync += [present.eq(0), running.eq(~whole)]
        with module.If(turn):
            module.d.sync += [
                present.eq(1),
                address.eq(address + self._rows),
                tile.first.eq(0),
                tile.widen.eq(0),
                left["inner"].eq(left["inner"] - 1),
                final["inner"].eq(left["inner"] == 1),
                tile.input.eq(next_of["inner"]),
            ]
            with module.If(final["inner"]):
                module.d.sync += [
                    left["inner"].eq(conv.inner - 1),
                    final["inner"].eq(conv.inner == 1),
                    left["middle"].eq(left["middle"] - 1),
                    final["middle"].eq(left["middle"] == 1),
                    tile.widen.eq(conv.widen & ~final["middle"]),
                    tile.input.eq(next_of["middle"]),
                    bases[0].eq(next_of["middle"]),
                ]
            with module.If(both):
                module.d.sync += [
                    left["middle"].eq(conv.middle - 1),
                    final["middle"].eq(conv.middle == 1),
                    left["outer"].eq(left["outer"] - 1),
                    final["outer"].eq(left["outer"] == 1),
                    tile.input.eq(next_of["outer"]),
                    bases[0].eq(next_of["outer"]),
                    bases[1].eq(next_of["outer"]),
                ]
        found = Signal(TILE)
        module.d.comb += [
            found.eq(tile),
            found.ends.eq(whole),
            found.last.eq(conv.last & whole),
            found.signal.eq(Mux(whole, conv.signal, 0)),
        ]
        return found, address, present

    def _weights(
        self, module: Module, taken: Signal, found: Signal, address: Signal, present: Signal
    ) -> tuple[Signal, Signal, Signal, Signal]:
        """The tile that follows the one that streams, and when it starts.

        Its weights are `ready` in the next cycle, so late that the last is there when needed.
        """
        following = Signal(TILE, reset_less=True)
        here, ready, was_ready, start = Signal(), Signal(), Signal(), Signal()
        shape = Signal(2)
        module.d.comb += [
            taken.eq(present & (~here | start)),
            ready.eq(self.weight & (self.weight_row == self._rows - 2) | was_ready & ~start),
        ]
        module.d.sync += was_ready.eq(ready)
        with module.If(start):
            module.d.sync += here.eq(0)
        with module.If(self.weight):
            module.d.sync += [
                self.weight_address.eq(self.weight_address + 1),
                self.weight_row.eq(self.weight_row + 1),
            ]
            with module.If(self.weight_row == self._rows - 1):
                module.d.sync += self.weight.eq(0)
        # The tile that is taken stays for a cycle, and is not needed before its weights are there.
        takes = Signal(attrs={"keep": 1})
        module.d.sync += takes.eq(taken)
        with module.If(takes):
            module.d.sync += [
                following.eq(found),
                shape.eq((found.last_position == 0) | (found.last_line == 0) << 1),
            ]
        with module.If(taken):
            module.d.sync += [
                here.eq(1),
                self.weight.eq(1),
                self.weight_address.eq(address),
                self.weight_row.eq(0),
            ]
        return ready, following, shape, start

    def _stream(
        self, module: Module, ready: Signal, following: Signal, shape: Signal, start: Signal
    ) -> None:
        """Positions of the tile, one in a cycle."""
        tile = self.tile
        left, lines, line = Signal(12), Signal(12), Signal.like(self.position)
        final, final_line, narrow = Signal(), Signal(), Signal()
        skipped = Signal(CONV["drop"].shape)
        module.d.comb += [
            self.ends.eq(self.streams & final & final_line & tile.ends),
            self.kept.eq(self.streams & (skipped == 0)),
        ]
        # The start is a register, as much hangs on it: what will be is known a cycle before.
        streams, closes = Signal(), Signal()
        module.d.comb += [
            streams.eq(start | self.streams & ~(final & final_line)),
            closes.eq(
                Mux(
                    start,
                    shape.all(),
                    Mux(final, narrow & (lines == 1), final_line & (left == 1)),
                )
            ),
        ]
        module.d.sync += [
            self.begins.eq(start),
            start.eq(ready & (~streams | closes)),
        ]
        with module.If(self.streams):
            module.d.sync += [
                left.eq(left - 1),
                final.eq(left == 1),
                self.position.eq(self.position + tile.position_stride),
                skipped.eq(Mux(skipped == 0, tile.step, skipped) - 1),
            ]
            with module.If(final):
                module.d.sync += [
                    left.eq(tile.last_position),
                    final.eq(narrow),
                    lines.eq(lines - 1),
                    final_line.eq(lines == 1),
                    line.eq(line + tile.line_stride),
                    self.position.eq(line + tile.line_stride),
                    skipped.eq(tile.drop),
                    self.streams.eq(~final_line),
                ]
        with module.If(start):
            module.d.sync += [
                tile.eq(following),
                self.streams.eq(1),
                left.eq(following.last_position),
                final.eq(shape[0]),
                narrow.eq(shape[0]),
                lines.eq(following.last_line),
                final_line.eq(shape[1]),
                line.eq(following.input),
                self.position.eq(following.input),
                skipped.eq(following.drop),
            ]
