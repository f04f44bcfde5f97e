"""What counts energy on this machine: RAPL (processors), NVML (NVIDIA), INA sensors (boards).

A meter tells of a whole package, card or rail, not of one device of ours.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import suppress
from ctypes import CDLL, byref, c_char, c_uint, c_ulonglong, c_void_p
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from threading import Event, Thread
from time import perf_counter

from hetsched.errors import DeviceError

SYSFS = Path("/sys")
NVML = "libnvidia-ml.so.1"
MICRO, MILLI = 1e-6, 1e-3
# Sensors of power are read so often.
SAMPLE_SECONDS = 0.005
# The driver of these sensors is called so, with a number behind.
SENSORS = ("ina2", "ina3")


class Meter(ABC):
    """Counts joules; `name` says of what, `source` who says so."""

    name: str
    source: str

    @abstractmethod
    def over(self, work: Callable[[], object]) -> float:
        """The joules from the beginning to the end of `work`.

        Raises
        ------
        DeviceError
            It can no longer be read.
        """


@dataclass(frozen=True)
class Unreadable:
    """A meter that is there and does not tell, and what would do."""

    name: str
    source: str
    reason: str


@dataclass(frozen=True)
class Counter(Meter):
    """A file that counts `unit`s of a joule, and begins again at `wraps`, if it does."""

    name: str
    source: str
    path: Path
    wraps: int | None = None
    unit: float = MICRO

    def over(self, work: Callable[[], object]) -> float:
        before = _number(self.path)
        work()
        passed = _number(self.path) - before
        if passed < 0:
            if self.wraps is None:
                raise DeviceError(f"{self.source}: '{self.path}' counts backwards")
            passed += self.wraps
        return passed * self.unit


@dataclass(frozen=True)
class Sensor(Meter):
    """A file that has the power of the moment, in microwatts; a thread samples it meanwhile."""

    name: str
    source: str
    path: Path

    def over(self, work: Callable[[], object]) -> float:
        samples = [(perf_counter(), _number(self.path))]
        over = Event()

        def sample() -> None:
            with suppress(DeviceError):
                while not over.wait(SAMPLE_SECONDS):
                    samples.append((perf_counter(), _number(self.path)))

        thread = Thread(target=sample)
        thread.start()
        try:
            work()
        finally:
            over.set()
            thread.join()
        samples.append((perf_counter(), _number(self.path)))
        return sum((b - a) * (p + q) / 2 for (a, p), (b, q) in pairwise(samples)) * MICRO


class Card(Meter):
    """A card of NVIDIA, whose driver counts millijoules since it was loaded."""

    source = "NVML"

    def __init__(self, library: CDLL, handle: c_void_p, name: str) -> None:
        self._library, self._handle, self.name = library, handle, name

    def over(self, work: Callable[[], object]) -> float:
        before = self._count()
        work()
        return (self._count() - before) * MILLI

    def _count(self) -> int:
        total = c_ulonglong()
        status = self._library.nvmlDeviceGetTotalEnergyConsumption(self._handle, byref(total))
        if status:
            raise DeviceError(f"NVML does not count the energy of '{self.name}': error {status}")
        return total.value


def meters(
    sysfs: Path = SYSFS, nvml: Callable[[], CDLL] = lambda: CDLL(NVML)
) -> tuple[Meter | Unreadable, ...]:
    """The meters that are here, those that cannot be read among them."""
    return (*_rapl(sysfs), *_sensors(sysfs), *_cards(nvml))


def _rapl(sysfs: Path) -> Iterator[Meter | Unreadable]:
    """The zones of RAPL: packages, and within them the cores and the memory."""
    for zone in sorted((sysfs / "class" / "powercap").glob("*-rapl*:*")):
        names = [_text(zone / "name") or zone.name]
        if zone.name.count(":") > 1:
            outer = zone.parent / zone.name.rpartition(":")[0]
            names.insert(0, _text(outer / "name") or outer.name)
        wraps = _text(zone / "max_energy_range_uj")
        counter = Counter(
            " ".join(names),
            "RAPL",
            zone / "energy_uj",
            int(wraps) + 1 if wraps and wraps.isdecimal() else None,
        )
        yield _checked(counter, counter.path)


def _sensors(sysfs: Path) -> Iterator[Meter | Unreadable]:
    """INA sensors: some count energy, the others tell the power of the moment."""
    for folder in sorted((sysfs / "class" / "hwmon").glob("hwmon*")):
        driver = _text(folder / "name") or ""
        if not driver.startswith(SENSORS):
            continue
        counters = sorted(folder.glob("energy*_input"))
        for path in counters or sorted(folder.glob("power*_input")):
            number = path.name.removesuffix("_input").removeprefix("energy").removeprefix("power")
            label = _text(path.with_name(path.name.replace("input", "label")))
            name = label or f"{folder.name} rail {number}"
            source = f"{driver.upper()} sensor"
            meter = Counter(name, source, path) if counters else Sensor(name, source, path)
            yield _checked(meter, path)


def _cards(nvml: Callable[[], CDLL]) -> Iterator[Meter | Unreadable]:
    try:
        library = nvml()
    except OSError:
        return
    if status := library.nvmlInit_v2():
        yield Unreadable("NVIDIA cards", "NVML", f"its driver does not start: error {status}")
        return
    count = c_uint()
    library.nvmlDeviceGetCount_v2(byref(count))
    for index in range(count.value):
        handle = c_void_p()
        name = (c_char * 96)()
        library.nvmlDeviceGetHandleByIndex_v2(index, byref(handle))
        library.nvmlDeviceGetName(handle, name, len(name))
        card = Card(library, handle, f"{name.value.decode()} {index}")
        try:
            card._count()
        except DeviceError as error:
            yield Unreadable(card.name, "NVML", str(error))
        else:
            yield card


def _checked(meter: Counter | Sensor, path: Path) -> Meter | Unreadable:
    try:
        _number(path)
    except DeviceError as error:
        return Unreadable(meter.name, meter.source, str(error))
    return meter


def _number(path: Path) -> int:
    """
    Raises
    ------
    DeviceError
        The file cannot be read, or holds no number; the message says what would do.
    """
    try:
        text = path.read_text(encoding="ascii").strip()
    except PermissionError:
        raise DeviceError(f"only root may read '{path}': sudo chmod a+r '{path}'") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DeviceError(f"'{path}' cannot be read: {error}") from None
    if not text.lstrip("-").isdecimal():
        raise DeviceError(f"'{path}' has '{text[:40]}', which is no number")
    return int(text)


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
