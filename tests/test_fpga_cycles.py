"""The model of the core's time against its RTL: cycle for cycle; and the programs on the RTL."""

import numpy as np
import pytest

from bench.fpga_cases import MEMORIES
from bench.fpga_parts import drawn, drawn_part
from hetsched.fpga import reference
from hetsched.fpga.cycles import Cycles, cycles
from hetsched.fpga.engine import Counts, Engine, why_not
from hetsched.fpga.isa import Conv, Load, Overlay, Store, Sync, encode
from hetsched.fpga.layers import network
from hetsched.fpga.program import program

OVERLAY = Overlay.parse("8x8")
CASES = 200


@pytest.fixture(scope="module")
def engine() -> Engine:
    reason = why_not("verilator")
    if reason:
        pytest.skip(reason)
    made = Engine(OVERLAY)
    # A core that has just been made is busy for a cycle.
    made.run(encode([Sync()]), np.zeros(64, np.uint8))
    return made


def same(model: Cycles, counts: Counts) -> bool:
    return (model.cycles, model.words, model.reads, model.writes) == (
        counts.cycles, counts.macs, counts.reads, counts.writes
    )  # fmt: skip


def test_programs_are_right_on_the_core_in_the_cycles_that_are_predicted(engine: Engine) -> None:
    exact = 0
    for seed in range(CASES):
        graph = drawn_part(seed)
        made = program(network(graph), OVERLAY)
        inputs = drawn(graph, seed)
        memory, dram = made.memory(inputs), MEMORIES[seed % len(MEMORIES)]
        instructions = (Sync(), *made.instructions)
        counts = engine.run(encode(instructions), memory, dram)
        for found, wanted in zip(
            made.outputs(memory), reference.run(network(graph), inputs), strict=True
        ):
            np.testing.assert_array_equal(found, wanted, err_msg=f"seed {seed}")
        model = cycles(OVERLAY, instructions, dram.latency, dram.beats, dram.period)
        exact += same(model, counts)
        assert abs(model.cycles - counts.cycles) <= 0.02 * counts.cycles, seed
    assert exact >= 0.9 * CASES


def test_a_tile_takes_its_words_or_the_time_of_the_next_weights() -> None:
    """Of tiles in a row, one more takes `max(words, rows)` cycles."""
    for words in (1, 8, 9, 10, 100):
        tiles = [
            cycles(OVERLAY, [Conv(input=0, positions=words, inner=count)]).cycles
            for count in (10, 11)
        ]
        assert tiles[1] - tiles[0] == max(words, 8)


def test_loads_and_stores_move_a_beat_in_a_cycle() -> None:
    for one in (Load(dram=0, start=0, beats=500), Store(dram=0, start=0, beats=500)):
        longer = type(one)(dram=0, start=0, beats=700)
        found = [cycles(OVERLAY, [item]).cycles for item in (one, longer)]
        assert found[1] - found[0] == 200
        slow = [cycles(OVERLAY, [item], period=2).cycles for item in (one, longer)]
        assert slow[1] - slow[0] == 400


def test_units_that_wait_in_vain_are_told() -> None:
    found = cycles(OVERLAY, [Conv(input=0, positions=9, wait=1)])
    assert found.cycles == -1
