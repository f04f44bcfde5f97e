"""The overlay as Verilog for others' tools, with what its user has to know and a test bench.

The test bench runs a program of every kind of layer. What it expects is computed from the meaning
of the layers (`reference.py`), not by a simulator of the core.
"""

import json
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from hetsched.errors import DeviceError, OutputFileError
from hetsched.fpga import reference
from hetsched.fpga.board import Board, board
from hetsched.fpga.engine import not_installed, rtlil, yosys
from hetsched.fpga.isa import BEAT, LAYOUTS, WORDS, Buffer, Overlay, Sync, Unit, encode
from hetsched.fpga.layers import (
    Convolution,
    Image,
    Layer,
    Maximum,
    Network,
    Rescale,
    Sum,
    Window,
    multiplier_and_shift,
)
from hetsched.fpga.program import Program, program
from hetsched.op import Tensor

TESTBENCH = Path(__file__).with_name("testbench.v")
CORE, CELLS, PARAMETERS, README = "overlay.v", "overlay_{}.v", "overlay.json", "README.md"
# Cycles from asking the test bench's memory to its answer, and without a beat before it gives up.
LATENCY, PATIENCE = 24, 100_000
HEIGHT, WIDTH = 12, 10
PORT = re.compile(r"^  (input|output) (?:\[(\d+):0\] )?(\w+);", re.MULTILINE)

WORDS_OF_PORTS = {
    "clk": "clock; everything happens at its rising edge; registers start as configured",
    "i_valid": "a beat of an instruction is offered",
    "i_ready": "it is taken, at the edge at which both are 1",
    "i_data": "the beat; four make an instruction, the lowest first",
    "r_valid": "a beat of memory is asked for",
    "r_ready": "the question is taken",
    "r_address": "its byte address, a multiple of 8",
    "d_valid": "an answer arrives; answers come in the order of the questions and are always taken",
    "d_data": "the answer",
    "w_valid": "a beat is to be written",
    "w_ready": "it is taken",
    "w_address": "its byte address, a multiple of 8",
    "w_data": "the beat",
    "busy": "0 when all that was given is done; two cycles after a beat was taken it tells of it",
    "cycles": "counts cycles in which the core is busy",
    "macs": "counts those in which the array takes an input word",
    "stall_load": "counts those in which it takes none and CONV waits for LOAD",
    "stall_store": "counts those in which it takes none and CONV waits for STORE",
    "load_cycles": "counts those in which LOAD is at work",
    "store_cycles": "counts those in which STORE is at work",
}


@dataclass(frozen=True)
class Export:
    """What was written: the folder, and the bytes of each file in it."""

    overlay: str
    folder: Path
    files: dict[str, int]


def export_overlay(overlay: str, folder: str | Path) -> Export:
    """Writes the core `overlay`, such as `ecp5-8x8`, as Verilog into a new `folder`.

    In it are the core as plain Verilog and with the family's own cells, its parameters and memory
    map as JSON, a test bench with a program and what it must leave in memory, and a README. The
    folder appears when all of it is there; the same overlay gives the same files.

    Raises
    ------
    DeviceError
        There is no such overlay, or the extra `fpga` is not installed.
    OutputFileError
        The folder has files already, or cannot be written.
    """
    found = board(overlay)
    reason = not_installed("cxxrtl")
    if reason:
        raise DeviceError(f"the overlay cannot be exported: {reason}")
    folder = Path(folder)
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise OutputFileError(f"'{folder}' is there already; an empty or new folder would do")
        with TemporaryDirectory(
            prefix=f".{folder.name}.", suffix=".part", dir=folder.absolute().parent
        ) as aside:
            made = Path(aside) / "made"
            made.mkdir()
            _write(found, overlay, made)
            files = {path.name: path.stat().st_size for path in sorted(made.iterdir())}
            made.replace(folder)
    except OSError as error:
        raise OutputFileError(f"cannot write '{folder}': {error.strerror or error}") from None
    return Export(overlay, folder, files)


def _write(found: Board, name: str, folder: Path) -> None:
    overlay = found.overlay
    core = _verilog(overlay, "generic")
    cells = CELLS.format(found.family)
    (folder / CORE).write_text(core, encoding="utf-8")
    (folder / cells).write_text(_verilog(overlay, found.family), encoding="utf-8")
    ports = _ports(core)
    made, values = _program(overlay)
    words = encode((Sync(), *made.instructions)).reshape(-1)
    before, after = _memories(made, values)
    for file, array in (
        ("instructions.hex", words),
        ("memory.hex", before.view("<u8")),
        ("expected.hex", after.view("<u8")),
    ):
        lines = "".join(f"{value:016x}\n" for value in array.tolist())
        (folder / file).write_text(lines, encoding="ascii")
    sizes = {
        "INSTRUCTION_BEATS": len(words),
        "MEMORY_BEATS": len(before) // BEAT,
        "MEMORY_LATENCY": LATENCY,
        "PATIENCE": PATIENCE,
    }
    header = "".join(f"`define {key} {value}\n" for key, value in sizes.items())
    (folder / "testbench.vh").write_text(header, encoding="ascii")
    shutil.copyfile(TESTBENCH, folder / TESTBENCH.name)
    document = {
        "overlay": name,
        "board": found.description,
        "sizes": asdict(overlay),
        "ports": ports,
        "buffers": _buffers(overlay),
        "instructions": _instructions(),
        "test": {
            "latency": LATENCY,
            "instructions": len(words) // WORDS,
            "memory_nbytes": len(before),
            "memory": _map(made),
        },
    }
    (folder / PARAMETERS).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    (folder / README).write_text(_readme(found, name, cells, ports), encoding="utf-8")


def _verilog(overlay: Overlay, technology: str) -> str:
    with TemporaryDirectory(prefix="hetsched-fpga-") as folder:
        (Path(folder) / "top.il").write_text(rtlil(overlay, technology), encoding="utf-8")
        commands = [
            "read_rtlil top.il",
            "hierarchy -top top",
            "proc",
            "opt_clean",
            "rename top overlay",
            "write_verilog -noattr top.v",
        ]
        yosys(commands, Path(folder))
        return (Path(folder) / "top.v").read_text(encoding="utf-8")


def _ports(verilog: str) -> list[dict[str, Any]]:
    """The ports of the module `overlay`, in the order of their meanings."""
    start = verilog.index("\nmodule overlay(")
    text = verilog[start : verilog.index("\nendmodule", start)]
    there = {name: (way, int(high or 0) + 1) for way, high, name in PORT.findall(text)}
    names = [
        *(n for n in WORDS_OF_PORTS if n in there),
        *(n for n in there if n not in WORDS_OF_PORTS),
    ]
    return [
        {
            "name": name,
            "direction": there[name][0],
            "bits": there[name][1],
            "meaning": WORDS_OF_PORTS.get(name, ""),
        }
        for name in names
    ]


def _buffers(overlay: Overlay) -> dict[str, dict[str, Any]]:
    """The memories of the core; LOAD and STORE count their beats, CONV their words."""
    rows, columns = overlay.rows, overlay.columns
    sizes = {
        "input": (overlay.input_words, rows, Buffer.INPUT),
        "weights": (overlay.weight_words, columns, Buffer.WEIGHTS),
        "parameters": (overlay.parameter_words, BEAT * columns, Buffer.PARAMETERS),
        "accumulators": (overlay.accumulator_words, 4 * columns, None),
        "output": (overlay.output_words, columns, None),
    }
    return {
        name: {
            "words": words,
            "word_nbytes": nbytes,
            "beats": words * nbytes // BEAT,
            "load_buffer": buffer,
        }
        for name, (words, nbytes, buffer) in sizes.items()
    }


def _instructions() -> dict[str, Any]:
    """Bits of the fields, from the lowest on."""
    found = {}
    for kind, layout in LAYOUTS.items():
        start, fields = 0, {}
        for name, bits in layout:
            fields[name] = [start, bits]
            start += bits
        found[kind.__name__.upper()] = {"code": kind.code, "fields": fields}  # type: ignore[attr-defined]
    units = {"LOAD": Unit.LOAD, "CONV": Unit.CONV, "STORE": Unit.STORE}
    return {"nbytes": WORDS * BEAT, "tokens": units, "kinds": found}


def _map(made: Program) -> list[dict[str, Any]]:
    """What lies where in the memory of the test."""
    constants = {"name": "constants", "start": 0, "nbytes": len(made.constants)}
    places = sorted(made.places.items(), key=lambda item: item[1].start)
    return [
        constants,
        *(
            {
                "name": name,
                "start": place.start,
                "nbytes": place.nbytes,
                "channels": place.image.channels,
                "height": place.image.height,
                "width": place.image.width,
            }
            for name, place in places
        ),
    ]


def _program(overlay: Overlay) -> tuple[Program, dict[str, np.ndarray]]:
    """A layer of each kind, and all values that they make of data at random."""
    rng = np.random.default_rng(0)
    channels, outputs = 2 * overlay.rows - 3, 2 * overlay.rows
    window = Window((3, 3), before=(1, 1))

    def rescale(spread: float, count: int = outputs) -> Rescale:
        """So that results spread over the bytes, where sums spread so."""
        found = multiplier_and_shift(np.full(count, 50 / spread) * (0.8 + 0.4 * rng.random(count)))
        bias = rng.integers(-int(spread), int(spread) + 1, count)
        return Rescale(bias, *found, zero=3, low=-120, high=127)

    def weights(inputs: int) -> np.ndarray:
        return rng.integers(-128, 128, (outputs, inputs, 3, 3)).astype(np.int8)

    spread = 5000.0 * 3
    scale, shift = multiplier_and_shift(np.full(outputs, 50 / (1_200_000 * 70.0)))
    layers: tuple[Layer, ...] = (
        Convolution(
            "conv", "x", "conv", window, weights(channels), 1, rescale(spread * channels**0.5)
        ),
        Convolution("depthwise", "conv", "depthwise", window, weights(1), outputs, rescale(spread)),
        Sum(
            "sum",
            ("conv", "depthwise"),
            "sum",
            (1_211_111, 603_777),
            Rescale(np.zeros(outputs, np.int64), scale, shift),
        ),
        Maximum("maximum", "sum", "maximum", Window((2, 2), strides=(2, 2))),
    )
    whole = Image(outputs, HEIGHT, WIDTH)
    half = Image(outputs, HEIGHT // 2, WIDTH // 2)
    images = {
        "x": Image(channels, HEIGHT, WIDTH),
        **dict.fromkeys(("conv", "depthwise", "sum"), whole),
        "maximum": half,
    }
    tensors = [
        Tensor(name, (1, image.channels, image.height, image.width), "int8")
        for name, image in (("x", images["x"]), ("maximum", half))
    ]
    part = Network(
        "test", (tensors[0],), (tensors[1],), layers, images, {"x": "x", "maximum": "maximum"}
    )
    values = {"x": rng.integers(-128, 128, tensors[0].shape[1:]).astype(np.int8)}
    for layer in layers:
        made = images[layer.result]
        values[layer.result] = reference.compute(layer, values, (made.height, made.width))
    return program(part, overlay), values


def _memories(made: Program, values: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Memory before the program and after it."""
    before = made.memory([values["x"][None]])
    before = np.pad(before, (0, -len(before) % BEAT))
    after = before.copy()
    for name, place in made.places.items():
        if name != "x":
            place.write(after, values[name])
    return before, after


def _readme(found: Board, name: str, cells: str, ports: list[dict[str, Any]]) -> str:
    rows = "".join(
        f"| `{port['name']}` | {port['direction']} | {port['bits']} | {port['meaning']} |\n"
        for port in ports
    )
    overlay = found.overlay
    return f"""# The overlay {name}

An int8 core that multiplies {overlay.rows} input channels with {overlay.columns} output channels
in a cycle: {found.description}.

| file | what it is |
| --- | --- |
| `{CORE}` | the core as plain Verilog: module `overlay`; simulates and synthesises anywhere |
| `{cells}` | the same core, to the cycle, with block RAMs and multipliers as cells of the family |
| `{PARAMETERS}` | sizes, ports, buffers, the bits of instructions, the map of the test's memory |
| `testbench.v` | runs `instructions.hex` on `memory.hex`, which must become `expected.hex` |

## Ports

A beat has 8 bytes. Instructions, questions and writes are handed over by `valid` and `ready`.

| port | direction | bits | meaning |
| --- | --- | ---: | --- |
{rows}
## Memory

Addresses are bytes of one memory of at most 4 GiB. An image is [channels / {overlay.rows}][height]
[width][{overlay.rows}] bytes, channels filled up to a multiple of {overlay.rows}. The buffers of
the core have no addresses of their own: LOAD fills them, STORE empties `output`, both in beats.

## Test

The program has a convolution, a depthwise one, a sum and a maximum. It prints PASS, or FAIL and
ends with an error. With Verilator 5:

    verilator --binary --timing -Wno-fatal --top-module testbench testbench.v {CORE}
    obj_dir/Vtestbench

A Verilator that was not configured for its compiler, such as the wheel from PyPI, also needs

    -CFLAGS "-std=c++20 -fcoroutines" -MAKEFLAGS "CFG_CXXFLAGS_PCH_I=-include CFG_GCH_IF_CLANG="

With Icarus Verilog, which has not been tried:

    iverilog -g2012 -o test testbench.v {CORE} && vvp test
"""
