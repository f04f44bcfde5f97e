"""The roofline of a machine that is only described."""

from pathlib import Path

import pytest

from hetsched.cost import roofline_seconds
from hetsched.device import Device
from hetsched.errors import DeviceError
from hetsched.system import System

BOARD = """
[[device]]
name = "big"
target = "cpu"
flops_per_second = 10e9
bytes_per_second = 1e9
cache_nbytes = [1000, 100000]
cache_bytes_per_second = [8e9, 4e9]
call_seconds = 1e-6
"""


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_bandwidth_is_that_of_the_nearest_cache_that_holds_the_data(tmp_path: Path) -> None:
    (device,) = System.load(written(tmp_path / "board.toml", BOARD)).devices
    assert device.cache_bytes_per_second == (8e9, 4e9)
    for nbytes, bandwidth in [(1000, 8e9), (1001, 4e9), (100_000, 4e9), (100_001, 1e9)]:
        assert roofline_seconds(0, nbytes, device) == 1e-6 + nbytes / bandwidth
    # Arithmetic hides behind what takes longer.
    assert roofline_seconds(100_000, 1000, device) == 1e-6 + 1e-5


def test_without_bandwidths_all_data_are_in_memory() -> None:
    device = Device("d", "cpu", cache_nbytes=(1000,), bytes_per_second=1e9)
    assert roofline_seconds(0, 500, device) == 500 / 1e9
    nearest = Device("d", "cpu", cache_nbytes=(1000, 2000), cache_bytes_per_second=(4e9,))
    assert roofline_seconds(0, 1500, nearest) == 1500 / 1e9


def test_a_machine_file_keeps_the_bandwidths(tmp_path: Path) -> None:
    system = System.load(written(tmp_path / "board.toml", BOARD))
    assert System.load(written(tmp_path / "again.toml", system.to_toml())) == system


@pytest.mark.parametrize("value", ["[8e9, 0]", "[-1.0]", '"fast"', "8e9", '["fast"]'])
def test_what_is_no_bandwidth_is_refused(value: str, tmp_path: Path) -> None:
    text = BOARD.replace("[8e9, 4e9]", value)
    with pytest.raises(DeviceError, match="cache_bytes_per_second"):
        System.load(written(tmp_path / "board.toml", text))
