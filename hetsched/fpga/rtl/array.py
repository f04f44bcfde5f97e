"""The array: dot products of an input word with each column's weights, accumulated, requantised.

Weight-stationary: a tile's weights stand still while its positions stream. All columns get the
same word, through two rows of registers; so no position waits for another column, and a tile
follows the other without a gap.

Stages, counted from the one in which the input word's address is known (`sum` is where the sum of
a column's products is; `total` where it is accumulated):

====================  ==========================================================================
1, 2, 3               address, block RAM, its output register
4, 5                  the word, and a column's copy of it (or the column's channel, `depthwise`)
6, 7, 8               multipliers
9 .. sum              tree of adders
sum - 4 .. sum        accumulators read, or the bias
sum + 1 .. sum + 3    compared, one of them dropped where it is a maximum, added: `total`
total                 written to the accumulators where the tile is not the last
total + 1 .. + 6      times the multiplier
total + 7 .. + 9      shifted by eights, by twos, by ones
total + 10 .. + 13    rounded
total + 14 .. + 16    saturated to int8, and to the instruction's bounds; written
====================  ==========================================================================
"""

from functools import reduce

from amaranth.hdl import Cat, Const, Elaboratable, Module, Mux, Signal, Value, signed

from hetsched.fpga.isa import FRACTION, SHIFTS, Overlay
from hetsched.fpga.rtl.blocks import BlockRam, Multiplier, Technology, copied
from hetsched.fpga.rtl.conv import ConvUnit, Stages

WORD = 4
"""The stage of the input word."""

COLUMN = 5
"""The stage of a column's copy, and of the weights."""

PRODUCT = 8
"""The stage of the products."""

TAPS = 8
"""Rows that get a tap where the tile is `depthwise`; the others' weights must be 0."""

WEIGHT_LATENCY = 4
"""Cycles from a weight word's address to its register."""

BIAS_BITS, MULTIPLIER_BITS, SHIFT_BITS = 32, 24, 5
PARAMETER_BITS = BIAS_BITS + MULTIPLIER_BITS + SHIFT_BITS
PRODUCT_BITS = BIAS_BITS + MULTIPLIER_BITS

LOW_BITS = 17
"""Bits of the multiplier, and of what it multiplies, that a DSP takes without a sign."""

LEAST_SHIFT = SHIFTS.start

KEPT = FRACTION + 9
"""Bits of the shifted product that matter if it is not clipped; the whole part's are signed."""

REQUANTISED = 16
"""Cycles from the total to its int8."""


class Array(Elaboratable):
    """What a `ConvUnit` streams, computed; results go to `output_data`.

    The three buffers that LOAD fills are read at `input_address`, `weight_address` and
    `parameter_address`; their data come three cycles later.
    """

    def __init__(self, overlay: Overlay, unit: ConvUnit, technology: Technology) -> None:
        self._overlay, self._unit, self._technology = overlay, unit, technology
        rows, columns = overlay.rows, overlay.columns
        self._sum = PRODUCT + (rows - 1).bit_length()
        self._total = self._sum + 3
        # How much later the word and the weights are looked at where the sum takes one cycle.
        simulated = technology is Technology.SIMULATION
        self._late = self._sum - 1 - WORD if simulated else 0
        self.input_address = Signal.like(unit.position)
        self.input_data = Signal(8 * rows)
        self.weight_address = Signal.like(unit.weight_address)
        self.weight_data = Signal(8 * columns)
        self.parameter_address = Signal.like(unit.tile.parameter)
        self.parameter_data = [Signal(64, name=f"parameter{c}") for c in range(columns)]
        self.output_write = Signal()
        self.output_address = Signal.like(unit.tile.output, reset_less=True)
        self.output_data = Signal(8 * columns)
        self.signal = Signal(3)
        self.finished = Signal()

    def elaborate(self, platform: object) -> Module:
        module = Module()
        unit = self._unit
        self._module = module
        self._stages = Stages(module, unit.begins)
        end = self._total + REQUANTISED + 1
        self._valid = self._pipe(unit.kept, end, "valid")
        ends = self._pipe(unit.ends, end, "ends")
        signal = self._stages.held(unit.tile.signal, end)
        module.d.comb += self.finished.eq(ends[end])
        module.d.comb += self.signal.eq(Mux(ends[end], signal, 0))
        weights = self._weights()
        if self._technology is Technology.SIMULATION:
            sums = self._sums(weights)
        else:
            inputs = self._inputs()
            sums = [self._dot(*column) for column in zip(inputs, weights, strict=True)]
        self._accumulate(sums)
        return module

    def _pipe(self, value: Value, stages: int, name: str, reset: bool = True) -> list[Value]:
        piped = [value]
        for stage in range(stages):
            piped.append(self._stages.later(piped[-1], f"{name}{stage + 1}", reset))
        return piped

    def _register(self, value: Value, name: str) -> Signal:
        return self._stages.later(value, name, reset=False)

    def _weights(self) -> list[list[Signal]]:
        """The weights by column and row where they are used: a shadow fills, then all change."""
        module, unit = self._module, self._unit
        rows, columns = self._overlay.rows, self._overlay.columns
        module.d.comb += self.weight_address.eq(unit.weight_address)
        late = self._late - (COLUMN - WORD) if self._late else 0
        word = self._pipe(self.weight_data, 1 + late, "weight_word", reset=False)[-1]
        valid = self._pipe(unit.weight, WEIGHT_LATENCY - 1 + late, "weight_valid")[-1]
        row = self._pipe(unit.weight_row, WEIGHT_LATENCY - 1 + late, "weight_row")[-1]
        # A simulator multiplies words of its own width fastest.
        bits = signed(32 if self._late else 8)
        table: list[list[tuple[Signal, Signal]]] = []
        for c in range(columns):
            table.append([])
            for r in range(rows):
                shadow = Signal(bits, name=f"shadow{r}_{c}", reset_less=True)
                weight = Signal(bits, name=f"weight{r}_{c}", reset_less=True)
                table[-1].append((shadow, weight))
        for r in range(rows):
            copies = 1 if self._late else 2
            for copy, fills in enumerate(copied(module, valid & (row == r), f"fills{r}_", copies)):
                with module.If(fills):
                    module.d.sync += [
                        table[c][r][0].eq(word[8 * c : 8 * c + 8].as_signed())
                        for c in range(columns)
                        if c * copies // columns == copy
                    ]
        for c in range(columns):
            swap = self._register(self._stages.begins(COLUMN - 2 + late), f"swap{c}")
            swap.attrs["keep"] = 1
            with module.If(swap):
                module.d.sync += [weight.eq(shadow) for shadow, weight in table[c]]
        return [[weight for _, weight in column] for column in table]

    def _word(self) -> tuple[Value, list[Value]]:
        """The input word at stage `WORD`, and a column's own channel of it and of those before."""
        module, unit = self._module, self._unit
        rows, columns = self._overlay.rows, self._overlay.columns
        module.d.comb += self.input_address.eq(unit.position)
        word = self._pipe(self.input_data, 1 + self._late, "word", reset=False)[-1]
        blocks = rows // columns
        own = word
        if blocks > 1:
            lane = self._stages.held(unit.tile.lane, WORD + self._late)
            own = word.word_select(lane[: blocks.bit_length() - 1], 8 * columns)
        taps = [own]
        for tap in range(1, TAPS):
            taps.append(self._register(taps[-1], f"tap{tap}"))
        return word, taps

    def _inputs(self) -> list[list[Value]]:
        """The input at stage `COLUMN`, by column and row."""
        rows, columns = self._overlay.rows, self._overlay.columns
        word, taps = self._word()
        inputs = []
        flag = self._unit.tile.depthwise
        for c in range(columns):
            depthwise = self._stages.held(flag, WORD, copy=c + 1)
            column = []
            for r in range(rows):
                value = word[8 * r : 8 * r + 8]
                if r < TAPS:
                    value = Mux(depthwise, taps[r][8 * c : 8 * c + 8], value)
                copy = Signal(signed(8), name=f"input{r}_{c}", reset_less=True)
                if r >= TAPS:
                    copy.attrs["keep"] = 1
                self._module.d.sync += copy.eq(value)
                column.append(copy)
            inputs.append(column)
        return inputs

    def _sums(self, weights: list[list[Signal]]) -> list[Signal]:
        """The sums of the columns' products at stage `sum`, in one step."""
        module, columns = self._module, self._overlay.columns
        word, taps = self._word()
        depthwise = self._stages.held(self._unit.tile.depthwise, WORD + self._late)
        sums = [Signal(signed(32), name=f"sum{c}", reset_less=True) for c in range(columns)]
        channels = []
        for r in range(self._overlay.rows):
            channels.append(Signal(signed(32), name=f"channel{r}"))
            module.d.comb += channels[r].eq(word[8 * r : 8 * r + 8].as_signed())

        def dot(values: list[Value], column: int) -> Value:
            products = (
                (value * weight)[:32]
                for value, weight in zip(values, weights[column], strict=False)
            )
            return reduce(lambda total, product: (total + product)[:32], products)

        with module.If(depthwise):
            module.d.sync += [
                total.eq(dot([tap[8 * c : 8 * c + 8].as_signed() for tap in taps], c))
                for c, total in enumerate(sums)
            ]
        with module.Else():
            module.d.sync += [total.eq(dot(channels, c)) for c, total in enumerate(sums)]
        return sums

    def _dot(self, column: list[Value], weights: list[Signal]) -> Signal:
        """The sum of a column's products, at stage `sum`."""
        level: list[Signal] = []
        for value, weight in zip(column, weights, strict=True):
            multiplier = Multiplier(8, 8, self._technology)
            self._module.submodules += multiplier
            self._module.d.comb += [multiplier.a.eq(value), multiplier.b.eq(weight)]
            level.append(multiplier.product)
        while len(level) > 1:
            level = [
                self._register(left + right, "sum")
                for left, right in zip(level[::2], level[1::2], strict=True)
            ]
        return level[0]

    def _counter(self, start: Value, stage: int, name: str) -> Signal:
        """The address of the output at `stage`: `start`, and one more after each output."""
        counter = Signal.like(start, name=name, reset_less=True)
        first = self._stages.held(start, stage - 1) if stage > Stages.APART else start
        with self._module.If(self._valid[stage]):
            self._module.d.sync += counter.eq(counter + 1)
        with self._module.If(self._stages.begins(stage - 1)):
            self._module.d.sync += counter.eq(first)
        return counter

    def _accumulate(self, sums: list[Signal]) -> None:
        module, tile = self._module, self._unit.tile
        overlay, held = self._overlay, self._stages.held
        columns = overlay.columns
        memory = BlockRam(32 * columns, overlay.accumulator_words, self._technology)
        module.submodules.accumulators = memory
        # The block RAM's three cycles, and one more. Eight cycles, which tiles are apart at
        # least, later what is written is read.
        read, write = self._sum - 4, self._total
        last = held(tile.last, write)
        # Whether the position at a stage from `total` on is requantised. On an FPGA the stages go
        # on all the same: that is less wiring.
        done = self._pipe(self._valid[write] & last, REQUANTISED, "done")
        module.d.comb += [
            memory.read_address.eq(self._counter(tile.accumulator, read, "read")),
            memory.write_address.eq(self._counter(tile.accumulator, write, "write")),
            memory.write_enable.eq(self._valid[write] & ~last),
            self.parameter_address.eq(held(tile.parameter, read - 1)),
        ]
        copies = [0] * columns if self._late else list(range(1, columns + 1))
        first, widen, maximum = tile.first, tile.widen, tile.maximum & ~tile.first
        flags = [
            (
                held(first, self._sum, copy=c),
                held(widen, self._sum, copy=c),
                held(maximum, self._sum + 1, copy=c),
            )
            for c in copies
        ]
        results = []
        for c in range(columns):
            parameter = self.parameter_data[c]
            old = memory.read_data[32 * c : 32 * c + 32]
            total = self._total_of(sums[c], old, parameter, flags[c], copies[c])
            module.d.comb += memory.write_data[32 * c : 32 * c + 32].eq(total)
            gates = [Const(1)] * len(done) if self._technology is Technology.ECP5 else done
            results.append(self._requantised(total, parameter, gates, copies[c]))
        module.d.comb += [
            self.output_write.eq(done[-1]),
            self.output_address.eq(self._counter(tile.output, write + REQUANTISED, "output")),
            self.output_data.eq(Cat(*results)),
        ]

    def _total_of(
        self,
        addend: Signal,
        old: Value,
        parameter: Value,
        flags: tuple[Value, Value, Value],
        copy: int,
    ) -> Signal:
        """The accumulator with `addend`, at stage `total`."""
        module = self._module
        first, widen, maximum = flags
        bias = self._stages.held(parameter[:BIAS_BITS], self._sum, since=self._sum - 2, copy=copy)
        old = self._register(old, "old")
        base = Signal(signed(32), name="base", reset_less=True)
        greater = Signal(name="greater", reset_less=True)
        module.d.sync += [
            base.eq(Mux(first, bias, Mux(widen, old << 7, old))),
            # Only where the base is what was there before.
            greater.eq(old[:9].as_signed() > addend[:9].as_signed()),
        ]
        addend = self._register(addend, "addend")
        left = Signal(signed(32), name="left", reset_less=True)
        right = Signal.like(addend, name="right", reset_less=True)
        total = Signal(signed(32), name="total", reset_less=True)
        module.d.sync += [
            left.eq(Mux(maximum & ~greater, 0, base)),
            right.eq(Mux(maximum & greater, 0, addend)),
            total.eq(left + right),
        ]
        return total

    def _requantised(self, total: Signal, parameter: Value, done: list[Value], copy: int) -> Signal:
        """The int8 of `total`, as late as `REQUANTISED`; a stage may stand if it is not `done`.

        What is named is there as many cycles after `total` as the stage that it is assigned in.
        """
        module, stages, tile = self._module, self._stages, self._unit.tile
        at, since = self._total, self._sum - 2
        bits = slice(BIAS_BITS, BIAS_BITS + MULTIPLIER_BITS)
        multiplier = stages.held(parameter[bits], at, since=since, copy=copy)
        bits = slice(BIAS_BITS + MULTIPLIER_BITS, PARAMETER_BITS)
        # Held here: within a condition they would be held by it.
        eights = stages.held(parameter[bits], at + 6, since=since, copy=copy)
        twos = stages.held(eights, at + 7, since=at + 6)
        ones = stages.held(twos[0], at + 8, since=at + 7)
        zero = stages.held(tile.zero, at + 12, copy=copy)
        bottom = stages.held(tile.low, at + 14, copy=copy)
        top = stages.held(tile.high, at + 14, copy=copy)
        lowest = stages.held(bottom, at + 15, since=at + 14)
        highest = stages.held(top, at + 15, since=at + 14)
        others = stages.held(multiplier[LOW_BITS:], at + 1, since=at)

        def later(value: Value, stage: int, name: str) -> Signal:
            signal = Signal.like(value, name=name, reset_less=True)
            with module.If(done[stage - 1]):
                module.d.sync += signal.eq(value)
            return signal

        # 4: times the multiplier's low bits in two halves, times its others by adders.
        low, high = Multiplier(18, 18, self._technology), Multiplier(18, 18, self._technology)
        module.submodules += [low, high]
        module.d.comb += [
            low.a.eq(total[:LOW_BITS]),
            low.b.eq(multiplier[:LOW_BITS]),
            low.wanted.eq(Cat(done[:3])),
            high.a.eq(total[LOW_BITS:].as_signed()),
            high.b.eq(multiplier[:LOW_BITS]),
            high.wanted.eq(Cat(done[:3])),
        ]
        near_total = later(total, 1, "near_total")
        terms: list[Value] = [Mux(bit, near_total, 0) for bit in others]
        for stage in range(2, 5):
            step = 1 << stage - 2
            pairs = [
                first + (second[0] << step) if second else first
                for first, *second in (terms[i : i + 2] for i in range(0, len(terms), 2))
            ]
            terms = [later(pair, stage, "term") for pair in pairs]
        high_product = later(high.product[:BIAS_BITS].as_signed(), 4, "high_product")
        lower = later(low.product[: 2 * LOW_BITS], 4, "lower")
        # 6: the product; 9: shifted, with more bits above than are kept.
        upper = later(high_product + terms[0], 5, "upper")
        lower = later(lower, 5, "lower")
        product = Signal(signed(PRODUCT_BITS), name="product", reset_less=True)
        with module.If(done[5]):
            module.d.sync += product.eq((upper << LOW_BITS) + lower)
        wide = Cat(Const(0, FRACTION - LEAST_SHIFT), product).as_signed()
        shifted = later((wide >> (eights & 0x18))[: KEPT + 7].as_signed(), 7, "shifted")
        shifted = later(shifted >> (twos & 6)[:3], 8, "shifted")
        shifted = later(shifted >> ones, 9, "shifted")
        # Whether what is above is more than the sign: by groups of a shift of eight.
        above = [bit ^ wide[-1] for bit in wide[KEPT + 6 : -1]]
        by_eights = (Cat(above[i : i + 8]).any() for i in range(0, len(above), 8))
        groups = later(Cat(*by_eights), 7, "above")
        cut = later(later((groups >> twos[3:]).any(), 8, "cut"), 9, "cut")
        sign = later(later(later(product[-1], 7, "sign"), 8, "sign"), 9, "sign")
        # 10: the whole part of nine bits, the fraction's side of the half and distance from it.
        outside = cut | (shifted[KEPT - 1 :] != sign.replicate(8))
        extreme = Cat((~sign).replicate(8), sign)
        whole = later(Mux(outside, extreme, shifted[FRACTION:KEPT]).as_signed(), 10, "whole")
        size = later(shifted[FRACTION : KEPT - 1] ^ shifted[KEPT - 1].replicate(8), 10, "size")
        half = shifted[FRACTION - 1]
        distance = later(shifted[: FRACTION - 1] ^ (~half).replicate(FRACTION - 1), 10, "distance")
        upward = later(half, 10, "upward")
        even = later(half == shifted[KEPT - 1], 10, "even")
        # 11, 12: whether it is so near to the half that float32 has it there.
        far = later(distance[9:].any(), 11, "far")
        none = later(Cat(~size[bit:].any() for bit in range(8)), 11, "none")
        lowest_bits = later(distance[:9], 11, "lowest_bits")
        even, upward = later(even, 11, "even"), later(upward, 11, "upward")
        whole = later(whole, 11, "whole")
        apart = far | (lowest_bits[1:] & none).any() | (none[0] & lowest_bits[0] & even)
        near = later(~apart, 12, "near")
        whole, upward = later(whole, 12, "whole"), later(upward, 12, "upward")
        # 13: rounded; 14: as int8; 16: within the instruction's bounds.
        carry = Mux(near, whole[0], upward)
        twice = Cat(carry, whole).as_signed() + Cat(carry, zero).as_signed()
        rounded = later((twice >> 1).as_signed(), 13, "rounded")
        sign = rounded[-1]
        clipped = Mux(
            ~sign & rounded[7:-1].any(), 127, Mux(sign & ~rounded[7:-1].all(), -128, rounded[:8])
        )
        byte = later(clipped[:8].as_signed(), 14, "byte")
        kept = later(byte, 15, "kept")
        below = later(byte < bottom.as_signed(), 15, "below")
        beyond = later(byte > top.as_signed(), 15, "beyond")
        return later(Mux(below, lowest, Mux(beyond, highest, kept))[:8], 16, "result")
