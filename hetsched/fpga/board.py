"""Parts of the FPGA kind by name: which overlay, how fast it is clocked, what it fills.

The clock is what the RTL reached when it was placed and routed, as `place_and_route.json` beside
this file has it; a size that is not there is taken to run at `ASSUMED_HZ`, and the device says so.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hetsched.errors import DeviceError
from hetsched.fpga.isa import BEAT, Overlay

RESULTS = Path(__file__).with_name("place_and_route.json")
ASSUMED_HZ = 100e6
# Device strings are FAMILY-SIZE; of each family, the part that was placed and routed.
FAMILIES = {"ecp5": "LFE5U-85F"}
SIZES = ("8x8", "16x8", "16x16")
GRADES = (6, 7, 8)


@dataclass(frozen=True)
class Board:
    """An overlay on a part; `found` is what placing and routing it has told, empty if nothing."""

    family: str
    overlay: Overlay
    grade: int
    clock_hz: float
    found: Mapping[str, Any]

    @property
    def bytes_per_second(self) -> float:
        """Of the port to memory."""
        return BEAT * self.clock_hz

    @property
    def macs_per_second(self) -> float:
        return self.overlay.macs * self.clock_hz

    @property
    def description(self) -> str:
        clock = f"{self.clock_hz / 1e6:.1f} MHz"
        part = FAMILIES[self.family]
        if not self.found:
            return f"int8 overlay {self.overlay.name} on {part}, {clock} assumed"
        area = ", ".join(
            f"{self.found[name]} {name.upper()}"
            for name in ("lut", "ff", "dsp", "ebr")
            if name in self.found
        )
        seeds = len(self.found.get("seeds", ()))
        routed = f"{clock} routed" + (f" (median of {seeds} seeds)" if seeds > 1 else "")
        return f"int8 overlay {self.overlay.name} on {part}-{self.grade}, {routed}; {area}"


def board(name: str, grade: int = 6) -> Board:
    """The board that a name such as `ecp5-8x8` means.

    Raises
    ------
    DeviceError
        There is no such family, size or speed grade.
    """
    family, dash, size = name.partition("-")
    if not dash or family not in FAMILIES:
        there = ", ".join(f"{family}-{size}" for family in FAMILIES for size in SIZES)
        raise DeviceError(f"no overlay '{name}'; there are {there}")
    if grade not in GRADES:
        raise DeviceError(f"no speed grade {grade}; there are {', '.join(map(str, GRADES))}")
    overlay = Overlay.parse(size)
    for found in _results():
        told = (found.get("device"), found.get("overlay"), found.get("grade"))
        if told == (FAMILIES[family], overlay.name, grade):
            return Board(family, overlay, grade, float(found["clock_hz"]), found)
    return Board(family, overlay, grade, ASSUMED_HZ, {})


@cache
def _results() -> tuple[Mapping[str, Any], ...]:
    if not RESULTS.is_file():
        return ()
    return tuple(json.loads(RESULTS.read_text(encoding="utf-8"))["parts"])
