"""Devices, and the links between them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """One place where parts run, one at a time.

    `name` is the device string, `target` the extension that compiles for it,
    with its options: `cpu`, or `cpu:winograd=off`. `cores` are the
    host's cores that it occupies; devices with the same cores take turns. Devices of one
    `memory_space` hand tensors over without a copy. `fingerprint` says what measured times belong
    to: two devices with the same one are the same kind of hardware under the same settings. Watts
    and joules are 0 where nobody has said them; those of a multiply-add and of a byte moved count
    instead of the active watts. `energy_source` says where such figures come from. `cache_nbytes`
    and `cache_bytes_per_second` are those of the caches, from the nearest; without the second, all
    data are as far as memory. To call a kernel takes `call_seconds`, to start a part of several
    `launch_seconds`. `isa` are the instructions and features that code may use. A device that runs
    work-groups has `compute_units` for them, each of at most `group_items` work-items with
    `local_nbytes` of memory in common; all three are 0 for others.
    """

    name: str
    target: str
    kind: str = "cpu"
    description: str = ""
    cores: tuple[int, ...] = ()
    clock_hz: float = 0.0
    isa: str = ""
    cache_nbytes: tuple[int, ...] = ()
    compute_units: int = 0
    group_items: int = 0
    local_nbytes: int = 0
    memory_bytes: float = float("inf")
    memory_space: str = "host"
    flops_per_second: float = 1e9
    bytes_per_second: float = 1e9
    cache_bytes_per_second: tuple[float, ...] = ()
    launch_seconds: float = 0.0
    call_seconds: float = 0.0
    idle_watts: float = 0.0
    active_watts: float = 0.0
    joules_per_mac: float = 0.0
    joules_per_byte: float = 0.0
    energy_source: str = ""
    fingerprint: str = ""
    modelled: bool = False

    @property
    def threads(self) -> int:
        return max(1, len(self.cores))

    @property
    def unit(self) -> str:
        """What the device holds while it works: devices of one unit cannot overlap."""
        return "cores " + ",".join(map(str, self.cores)) if self.cores else self.name


@dataclass(frozen=True)
class Link:
    """A way from one device to another: `seconds` of latency, then `bytes_per_second`."""

    source: str
    sink: str
    seconds: float
    bytes_per_second: float
    joules_per_byte: float = 0.0
    energy_source: str = ""

    def transfer_seconds(self, nbytes: int) -> float:
        """The time that `nbytes` need from device to device."""
        return self.seconds + nbytes / self.bytes_per_second
