"""The energy of a run, by device and link, each figure with where it comes from."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from hetsched.device import Device, Link
from hetsched.errors import DeviceError
from hetsched.plan import Recipe
from hetsched.schedule import Schedule
from hetsched.system import System

UNNAMED = "the machine file, which names no source"


@dataclass(frozen=True)
class Use:
    """Joules of a device or a link in one run; `source` says where its figures are from.

    `idle_joules` is what it draws anyway until the run ends, `joules` all of it.
    """

    name: str
    joules: float
    idle_joules: float
    source: str


@dataclass(frozen=True)
class Energy:
    """What each device of the system and each link that moves something uses in one run."""

    uses: tuple[Use, ...]
    seconds: float

    @property
    def joules(self) -> float:
        return sum(use.joules for use in self.uses)

    @property
    def delay_product(self) -> float:
        """Joules times seconds: what a run that is quicker may cost."""
        return self.joules * self.seconds


def energy(recipe: Recipe, schedule: Schedule | None = None) -> Energy:
    """The energy of one run of a plan by its prediction, or as `schedule` says that it went.

    A device draws its idle watts until the run ends; while it works, what its active watts are
    above these, or, where they are known, what its multiply-adds and bytes cost. A link counts by
    its bytes.

    Raises
    ------
    DeviceError
        Nobody has said what a device draws while it works.
    """
    schedule = schedule or recipe.simulate()
    work: dict[str, tuple[int, int]] = {}
    for _, device, members in recipe.parts:
        all_flops, all_nbytes = work.get(device, (0, 0))
        for flops, nbytes in map(recipe.work.__getitem__, members):
            all_flops, all_nbytes = all_flops + flops, all_nbytes + nbytes
        work[device] = all_flops, all_nbytes
    return used(schedule, recipe.tasks.system, work)


def used(
    schedule: Schedule, system: System, work: Mapping[str, tuple[int, int]] = MappingProxyType({})
) -> Energy:
    """The same for a schedule and the FLOPs and bytes of all that each device computes.

    Raises
    ------
    DeviceError
        As `energy`.
    """
    uses = []
    for device in system.devices:
        busy = schedule.busy_seconds(device.name)
        idle = device.idle_watts * schedule.makespan
        active = 0.0
        if busy:
            flops, nbytes = work.get(device.name, (0, 0))
            active = active_joules(device, busy, flops, nbytes)
        uses.append(Use(device.name, idle + active, idle, source_of(device)))
    moved: dict[tuple[str, str], int] = {}
    for move in schedule.transfers:
        if move.source and move.sink:
            pair = move.source, move.sink
            moved[pair] = moved.get(pair, 0) + move.nbytes
    for pair, nbytes in moved.items():
        link = system.link(*pair)
        if link and link.joules_per_byte:
            joules = nbytes * link.joules_per_byte
            uses.append(Use(" to ".join(pair), joules, 0.0, source_of(link)))
    return Energy(tuple(uses), schedule.makespan)


def active_joules(device: Device, seconds: float, flops: int, nbytes: int) -> float:
    """What work of so many seconds costs beyond the watts that the device draws anyway.

    Raises
    ------
    DeviceError
        Nobody has said what the device draws while it works.
    """
    if device.joules_per_mac or device.joules_per_byte:
        return flops / 2 * device.joules_per_mac + nbytes * device.joules_per_byte
    check_watts(device)
    return seconds * (device.active_watts - device.idle_watts)


def check_watts(device: Device) -> None:
    """
    Raises
    ------
    DeviceError
        Nobody has said what the device draws while it works.
    """
    if not (device.active_watts or device.joules_per_mac or device.joules_per_byte):
        raise DeviceError(
            f"'{device.name}' has no active_watts, so that energy is not known; "
            "give it, or joules_per_mac and joules_per_byte, in a machine file"
        )


def source_of(item: Device | Link) -> str:
    """Where the figures of a device or a link come from."""
    return item.energy_source or UNNAMED
