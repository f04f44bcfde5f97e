"""Programs of the overlay, run by the simulator of its instructions: bit for bit the reference."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

import hetsched
from bench import models
from bench.fpga_parts import Build, between_bytes, drawn, drawn_part
from hetsched.errors import PartError, UnsupportedOperation
from hetsched.fpga import reference
from hetsched.fpga.isa import Buffer, Conv, Instruction, Load, Overlay, Store, Unit, decode, encode
from hetsched.fpga.layers import network
from hetsched.fpga.program import Program, program
from hetsched.fpga.simulator import execute, simulate
from hetsched.graph import Graph

# Buffers so small that every way to cut a layer is taken.
SMALL = Overlay(8, 8, 256, 128, 8, 32, 64)
OVERLAYS = (SMALL, Overlay.parse("8x8"), Overlay.parse("16x8"), Overlay.parse("16x16"))
UNITS = (Unit.LOAD, Unit.CONV, Unit.STORE)


@pytest.mark.parametrize("overlay", OVERLAYS, ids=["small", "8x8", "16x8", "16x16"])
def test_drawn_parts_are_bit_exact(overlay: Overlay) -> None:
    refused = 0
    for seed in range(120 if overlay is SMALL else 60):
        graph = drawn_part(seed)
        found = network(graph)
        inputs = drawn(graph, seed)
        try:
            made = program(found, overlay)
        except UnsupportedOperation as error:
            if overlay is not SMALL or "not even a window" not in str(error):
                raise
            refused += 1
            continue
        for array, wanted in zip(simulate(made, inputs), reference.run(found, inputs), strict=True):
            np.testing.assert_array_equal(array, wanted, err_msg=f"seed {seed}")
    assert refused <= 12


def large(name: str) -> Graph:
    """Layers that are large in one way each."""
    build, rng = Build(), np.random.default_rng(0)

    def weights(*shape: int) -> str:
        values = rng.integers(-127, 128, shape).astype(np.int8)
        return build.weights(values, np.full(shape[0], 1 / np.sqrt(values[0].size) / 150))

    if name == "wide":
        y = build.op("Conv", build.input(1, 3, 4, 3000), weights(9, 3, 3, 3), pads=[1] * 4)
    elif name == "deep":
        y = build.op("Conv", build.input(1, 2100, 5, 5), weights(12, 2100, 3, 3), pads=[1] * 4)
    elif name == "kernel":
        y = build.op("Conv", build.input(1, 2, 40, 90), weights(3, 2, 31, 70), pads=[7, 20] * 2)
    elif name == "depthwise":
        y = build.op(
            "Conv", build.input(1, 20, 30, 40), weights(20, 1, 5, 13), pads=[2, 12, 2, 12],
            group=20, dilations=[1, 2], strides=[2, 3],
        )  # fmt: skip
    elif name == "far":
        x = build.input(1, 8, 40, 40)
        y = build.op("Conv", x, weights(8, 8, 3, 3), dilations=[12, 12], pads=[12] * 4)
    else:
        y = build.op("MaxPool", build.input(1, 9, 70, 60), kernel_shape=[33, 40], strides=[1, 2])
    return build.graph(build.rounded(y))


@pytest.mark.parametrize("name", ["wide", "deep", "kernel", "depthwise", "far", "pool"])
def test_large_layers_are_bit_exact(name: str) -> None:
    graph = large(name)
    inputs = drawn(graph, 0)
    for overlay in OVERLAYS[1:3]:
        found = simulate(program(network(graph), overlay), inputs)
        np.testing.assert_array_equal(found[0], reference.run(network(graph), inputs)[0])


def test_every_layer_of_resnet18() -> None:
    """Chained as the network has them, on an image's worth of data."""
    model = next(model for model in models.models() if model.name == "resnet18_int8")
    graph = hetsched.read_onnx(models.load(model))
    part = between_bytes(graph)
    found, overlay = network(part), Overlay.parse("8x8")
    made = program(found, overlay)
    inputs = drawn(part, 0)
    memory = made.memory(inputs)
    execute(overlay, made.instructions, memory)
    images = reference.images_of(found, inputs)
    assert len(made.spans) == len(found.layers) == 31
    for layer in found.layers:
        image = found.images[layer.result]
        images[layer.result] = reference.compute(layer, images, (image.height, image.width))
        result = made.read(memory, layer.result)
        np.testing.assert_array_equal(result, images[layer.result], err_msg=layer.name)
        assert len(np.unique(result)) > 40
    assert sum(span.macs for span in made.spans) == found.macs > 1.8e9
    # The stem has its columns folded into channels: 19 % more cycles than all rows would take.
    cycles = sum(
        max(one.positions * one.lines, 9) * one.outer * one.middle * one.inner
        for one in made.instructions
        if isinstance(one, Conv)
    )
    assert found.macs / (cycles * overlay.macs) > 0.96


def touched(one: Instruction, overlay: Overlay) -> Iterator[tuple[str, bool, int, int]]:
    """What an instruction reads and writes: where, whether it writes, from and to, in beats."""
    if isinstance(one, Load):
        lines = (one.top + one.rows + one.bottom) * one.planes
        size = lines * (one.left + one.beats + one.right)
        yield f"buffer{one.buffer}", True, one.start, one.start + size
        for plane in range(one.planes):
            for row in range(one.rows):
                start = (one.dram + plane * one.plane_stride + row * one.row_stride) // 8
                yield "dram", False, start, start + one.beats
    elif isinstance(one, Store):
        yield "output", False, one.start, one.start + one.beats * one.rows
        for row in range(one.rows):
            start = (one.dram + row * one.row_stride) // 8
            yield "dram", True, start, start + (one.beats - 1) * one.step // 8 + 1
    elif isinstance(one, Conv):
        tiles = one.outer * one.middle * one.inner
        words = [
            one.input
            + o * one.outer_stride + m * one.middle_stride + i * one.inner_stride
            + line * one.line_stride
            for o in {0, one.outer - 1} for m in {0, one.middle - 1} for i in {0, one.inner - 1}
            for line in {0, one.lines - 1}
        ]  # fmt: skip
        last = max(words) + (one.positions - 1) * one.position_stride + 1
        beats = overlay.input_beats
        if not one.depthwise:
            # Taps of a depthwise kernel that are no taps read beyond, and count for nothing.
            yield f"buffer{Buffer.INPUT}", False, min(words) * beats, last * beats
        beats = overlay.column_beats
        stop = one.weights + tiles * overlay.rows
        yield f"buffer{Buffer.WEIGHTS}", False, one.weights * beats, stop * beats
        start = one.parameter * overlay.columns
        yield f"buffer{Buffer.PARAMETERS}", False, start, start + overlay.columns
        if one.last:
            count = one.lines * ((one.positions - 1 - one.drop) // one.step + 1)
            yield "output", True, one.output * beats, (one.output + count) * beats


def hazards(overlay: Overlay, instructions: tuple[Instruction, ...]) -> list[str]:
    """Instructions of two units that can touch the same beats at once, one of them writing.

    Tokens are counted as the units count them; the latest that an instruction may know of another
    unit is what its tokens and those of its predecessors tell.
    """
    given: dict[tuple[int, int], list[int]] = {(a, b): [] for a in UNITS for b in UNITS}
    places = dict.fromkeys(UNITS, 0)
    for one in instructions:
        places[one.unit] += 1
        for unit in UNITS:
            if one.signal & unit:
                given[one.unit, unit].append(places[one.unit])
    taken = dict.fromkeys(given, 0)
    # Of each unit's instructions, how many of each unit's have ended when it starts.
    known: dict[int, list[dict[int, int]]] = {unit: [] for unit in UNITS}
    order, places = [], dict.fromkeys(UNITS, 0)
    for one in instructions:
        seen = dict(known[one.unit][-1]) if known[one.unit] else dict.fromkeys(UNITS, 0)
        for unit in UNITS:
            if one.wait & unit:
                place = given[unit, one.unit][taken[unit, one.unit]]
                taken[unit, one.unit] += 1
                assert place <= places[unit], "it waits for what stands behind it"
                seen = {u: max(seen[u], known[unit][place - 1][u]) for u in UNITS}
                seen[unit] = max(seen[unit], place)
        known[one.unit].append(seen)
        places[one.unit] += 1
        order.append((one, places[one.unit], seen))
    assert all(taken[key] == len(given[key]) for key in given), "a token is left"
    found = []
    spaces: dict[str, list[tuple[int, int, bool, int, int]]] = {}
    for one, place, seen in order:
        for space, writes, start, stop in touched(one, overlay):
            users = spaces.setdefault(space, [])
            for low, high, wrote, unit, number in users:
                both = low < stop and start < high and (wrote or writes)
                if both and unit != one.unit and number > seen[unit]:
                    found.append(f"{one} races with {number} of {unit} in {space}")
            users.append((start, stop, writes, one.unit, place))
    return found


@pytest.mark.parametrize("overlay", OVERLAYS[:3], ids=["small", "8x8", "16x8"])
def test_tokens_keep_units_apart(overlay: Overlay) -> None:
    checked = 0
    for seed in range(24):
        made = program(network(drawn_part(seed)), overlay)
        if len(made.instructions) < 600:
            assert hazards(overlay, made.instructions) == []
            checked += 1
    assert checked > 10


def test_tokens_matter() -> None:
    """Without one of them the check above fails."""
    made = program(network(drawn_part(3)), SMALL)
    waits = [n for n, one in enumerate(made.instructions) if one.wait]
    for index in waits[:5]:
        one = made.instructions[index]
        assert isinstance(one, Load | Conv | Store)
        other = one.wait & -one.wait
        giver = next(
            n
            for n in range(index - 1, -1, -1)
            if made.instructions[n].unit == other and made.instructions[n].signal & one.unit
        )
        broken = list(made.instructions)
        broken[index] = replace(one, wait=one.wait & ~other)
        broken[giver] = replace(broken[giver], signal=broken[giver].signal & ~one.unit)
        assert hazards(SMALL, tuple(broken))


def test_programs_survive_their_encoding() -> None:
    for seed in range(8):
        made = program(network(drawn_part(seed)), SMALL)
        assert tuple(decode(encode(made.instructions))) == made.instructions


def test_programs_repeat() -> None:
    first, again = (program(network(drawn_part(4)), SMALL) for _ in range(2))
    assert first.instructions == again.instructions
    np.testing.assert_array_equal(first.constants, again.constants)


def test_places_of_a_program_do_not_overlap() -> None:
    made = program(network(drawn_part(7)), SMALL)
    spans = sorted(
        (p.start, p.start + -(-p.image.channels // 8) * 8 * p.image.positions)
        for p in made.places.values()
    )
    assert spans[0][0] >= len(made.constants)
    assert spans[-1][1] <= made.nbytes
    assert all(first[1] <= second[0] for first, second in pairwise(spans))


def test_a_halo_beyond_the_loader_is_refused_by_name() -> None:
    build = Build()
    values = np.ones((4, 3, 3, 3), np.int8)
    w = build.weights(values, np.full(4, 1e-3))
    y = build.op("Conv", build.input(1, 3, 60, 60), w, dilations=[20, 20], pads=[20] * 4)
    with pytest.raises(UnsupportedOperation, match="halo of 20 at its top; 15 would do"):
        program(network(build.graph(build.rounded(y))), OVERLAYS[1])


def test_channels_that_begin_within_a_block_are_refused_by_name() -> None:
    build = Build()
    y = build.op("Concat", *(build.input(1, 8, 3, 3) for _ in range(2)), axis=1)
    graph = build.graph(build.rounded(y))
    inputs = drawn(graph, 0)
    made = program(network(graph), OVERLAYS[1])
    np.testing.assert_array_equal(simulate(made, inputs)[0], np.concatenate(inputs, 1))
    with pytest.raises(UnsupportedOperation, match="begins at channel 8, within a block"):
        program(network(graph), OVERLAYS[2])


def test_an_address_beyond_the_memory_is_an_error() -> None:
    made: Program = program(network(drawn_part(0)), SMALL)
    with pytest.raises(PartError, match="beyond the memory"):
        execute(SMALL, made.instructions, made.memory(drawn(drawn_part(0), 0))[:-64].copy())


def test_no_more_tokens_are_left_than_a_unit_counts() -> None:
    build, rng = Build(), np.random.default_rng(0)
    w = build.weights(rng.integers(-9, 9, (8, 5000)).astype(np.int8), np.full(5000, 1e-3), axis=1)
    graph = build.graph(build.rounded(build.op("MatMul", build.input(12, 8), w)))
    overlay = OVERLAYS[1]
    made = program(network(graph), overlay)
    tokens = dict.fromkeys(((a, b) for a in UNITS for b in UNITS), 0)
    most = 0
    for one in made.instructions:
        for unit in UNITS:
            tokens[unit, one.unit] -= bool(one.wait & unit)
            tokens[one.unit, unit] += bool(one.signal & unit)
        most = max(most, *tokens.values())
    # The core counts to 255, and a unit may be behind by its queue.
    assert 100 < most <= 255 - 2 * overlay.queue
    inputs = drawn(graph, 0)
    np.testing.assert_array_equal(
        simulate(made, inputs)[0], reference.run(network(graph), inputs)[0]
    )
