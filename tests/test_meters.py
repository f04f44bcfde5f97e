"""Meters of energy, read from a tree of files and from a library that stand in for the system's."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hetsched.errors import DeviceError
from hetsched.meters import Counter, Meter, Sensor, Unreadable, meters


def files(root: Path, **texts: str) -> Path:
    for name, text in texts.items():
        root.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")
    return root


def no_library() -> Any:
    raise OSError("there is none")


@pytest.fixture
def sysfs(tmp_path: Path) -> Path:
    zones = tmp_path / "class" / "powercap"
    files(zones / "intel-rapl:0", name="package-0", energy_uj="100", max_energy_range_uj="999")
    files(zones / "intel-rapl:0:0", name="dram", energy_uj="7")
    files(zones / "intel-rapl:1", name="package-1", energy_uj="none")
    sensors = tmp_path / "class" / "hwmon"
    files(sensors / "hwmon0", name="coretemp", power1_input="5")
    files(sensors / "hwmon1", name="ina219", power1_input="2000000")
    files(sensors / "hwmon2", name="ina238", energy1_input="3", energy1_label="rail of the GPU")
    return tmp_path


def test_what_is_there_is_found_and_told(sysfs: Path) -> None:
    found = meters(sysfs, no_library)
    assert [(meter.name, meter.source) for meter in found] == [
        ("package-0", "RAPL"),
        ("package-0 dram", "RAPL"),
        ("package-1", "RAPL"),
        ("hwmon1 rail 1", "INA219 sensor"),
        ("rail of the GPU", "INA238 sensor"),
    ]
    broken = found[2]
    assert isinstance(broken, Unreadable)
    assert "has 'none', which is no number" in broken.reason


def test_nothing_is_there(tmp_path: Path) -> None:
    assert meters(tmp_path, no_library) == ()


def test_a_counter_that_begins_again(sysfs: Path) -> None:
    package = meters(sysfs, no_library)[0]
    assert isinstance(package, Counter)
    assert package.over(lambda: package.path.write_text("600")) == pytest.approx(500e-6)
    assert package.over(lambda: package.path.write_text("50")) == pytest.approx(450e-6)
    endless = Counter("x", "RAPL", package.path)
    with pytest.raises(DeviceError, match="counts backwards"):
        endless.over(lambda: package.path.write_text("10"))


def test_what_can_no_longer_be_read_is_told(sysfs: Path) -> None:
    package = meters(sysfs, no_library)[0]
    assert isinstance(package, Counter)
    with pytest.raises(DeviceError, match="cannot be read"):
        package.over(package.path.unlink)


def test_power_is_added_up(sysfs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two watts at each sample, from the first to the last."""
    sensor = meters(sysfs, no_library)[3]
    assert isinstance(sensor, Sensor)
    now = iter(range(10_000))
    monkeypatch.setattr("hetsched.meters.perf_counter", lambda: float(next(now)))
    joules = sensor.over(lambda: None)
    assert joules == pytest.approx(2.0 * (next(now) - 1))


def library(status: int = 0) -> Any:
    """NVML of two cards, of which the second does not count."""
    counts = iter([0, 1500, 4000])

    def count(number: Any) -> None:
        number._obj.value = 2

    def handle(index: int, found: Any) -> None:
        found._obj.value = index + 1

    def name(_: Any, found: Any, __: int) -> None:
        found.value = b"Card"

    def energy(card: Any, total: Any) -> int:
        if card.value == 2:
            return 3
        total._obj.value = next(counts)
        return 0

    return SimpleNamespace(
        nvmlInit_v2=lambda: status,
        nvmlDeviceGetCount_v2=count,
        nvmlDeviceGetHandleByIndex_v2=handle,
        nvmlDeviceGetName=name,
        nvmlDeviceGetTotalEnergyConsumption=energy,
    )


def test_cards(tmp_path: Path) -> None:
    card, other = meters(tmp_path, library)
    assert isinstance(card, Meter)
    assert (card.name, card.source) == ("Card 0", "NVML")
    assert card.over(lambda: None) == pytest.approx(2.5)
    assert isinstance(other, Unreadable)
    assert other.reason.endswith("error 3")


def test_a_driver_that_does_not_start(tmp_path: Path) -> None:
    (found,) = meters(tmp_path, lambda: library(9))
    assert isinstance(found, Unreadable)
    assert "error 9" in found.reason
