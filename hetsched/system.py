"""A machine: its devices, and a link for each ordered pair of them."""

import json
import platform
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from math import inf
from pathlib import Path
from typing import Any

from hetsched.device import Device as Device
from hetsched.device import Link as Link
from hetsched.document import plain, record
from hetsched.errors import DeviceError
from hetsched.links import link_between
from hetsched.overheads import DISPLACED_NBYTES, overheads
from hetsched.plugin import load
from hetsched.store import Store, default_path
from hetsched.target import Target

# Of what overheads were measured after, beyond which more displaces nothing that counts.
MOST_DISPLACED = 2.0


@dataclass(frozen=True)
class System:
    """Devices in order of preference, and links between them.

    A pair without a link cannot exchange data. A run takes `run_seconds` beside its parts, or
    `start_seconds` where it needs several units; where the run touches next to nothing, the share
    `warm_share` of that (`beside_parts`). All devices in the host's memory together read at
    most `bytes_per_second` of it, and while all of them compute, each takes `slowdown` times as
    long as by itself.

    Raises
    ------
    DeviceError
        `slowdown` is less than one or no number, `warm_share` not from 0 to 1, two devices share a
        name, overlap in some but not all cores, or a link leads nowhere.
    """

    name: str
    devices: tuple[Device, ...]
    links: tuple[Link, ...]
    run_seconds: float = 0.0
    start_seconds: float = 0.0
    bytes_per_second: float = inf
    slowdown: float = 1.0
    warm_share: float = 1.0

    def __post_init__(self) -> None:
        if not self.devices:
            raise DeviceError(f"system '{self.name}' has no device")
        if not 0.0 <= self.warm_share <= 1.0:
            raise DeviceError(f"'warm_share' is {self.warm_share}; it must be from 0 to 1")
        if not 1.0 <= self.slowdown < inf:
            raise DeviceError(f"'slowdown' is {self.slowdown}; it must be a number from 1 on")
        names = [device.name for device in self.devices]
        for name in names:
            if names.count(name) > 1:
                raise DeviceError(f"device '{name}' is there twice")
        for link in self.links:
            for end in (link.source, link.sink):
                if end not in names:
                    raise DeviceError(f"a link names '{end}'; there are {', '.join(names)}")
        for i, one in enumerate(self.devices):
            for other in self.devices[i + 1 :]:
                shared = set(one.cores) & set(other.cores)
                if shared and set(one.cores) != set(other.cores):
                    raise DeviceError(
                        f"'{one.name}' and '{other.name}' both use core {min(shared)}; "
                        "give devices that use the same cores or none in common"
                    )

    def device(self, name: str) -> Device:
        if name not in self._by_name:
            raise DeviceError(f"no device '{name}'; there are {', '.join(self._by_name)}")
        return self._by_name[name]

    def link(self, source: str, sink: str) -> Link | None:
        """The link of an ordered pair; None where no data can pass."""
        return self._by_pair.get((source, sink))

    def beside_parts(self, units: int, nbytes: float) -> float:
        """The seconds that a run on so many units takes beside its parts, which touch `nbytes`.

        What runs parts has to come from far again the more they touch: measured for 16 MiB, it is
        nearly twice as long for 32, and no longer for more.
        """
        cold = self.run_seconds if units == 1 else self.start_seconds
        share = min(MOST_DISPLACED, nbytes / DISPLACED_NBYTES)
        return cold * (self.warm_share + (1.0 - self.warm_share) * share)

    def without(self, name: str) -> "System":
        """The system without a device and its links.

        Raises
        ------
        DeviceError
            There is no other device.
        """
        devices = tuple(device for device in self.devices if device.name != name)
        links = tuple(link for link in self.links if name not in (link.source, link.sink))
        return replace(self, devices=devices, links=links)

    def with_options(self, target: str, **options: str) -> "System":
        """The same devices, those of `target` with options of it set.

        `System.local("cpu").with_options("cpu", winograd="off")` compiles without Winograd's
        convolution.

        Raises
        ------
        DeviceError
            No device is of that target.
        PluginError
            The target has no such option or value.
        """

        def changed(device: Device) -> Device:
            name, _, text = device.target.partition(":")
            if name != target:
                return device
            given = dict(item.split("=", 1) for item in filter(None, text.split(",")))
            listed = ",".join(f"{key}={value}" for key, value in (given | options).items())
            spec = f"{name}:{listed}"
            load(Target, spec)
            return replace(device, target=spec)

        devices = tuple(map(changed, self.devices))
        if devices == self.devices:
            there = ", ".join(device.name for device in devices)
            raise DeviceError(f"no device is of target '{target}'; there are {there}")
        return replace(self, devices=devices)

    @cached_property
    def _by_name(self) -> Mapping[str, Device]:
        return {device.name: device for device in self.devices}

    @cached_property
    def _by_pair(self) -> Mapping[tuple[str, str], Link]:
        return {(link.source, link.sink): link for link in self.links}

    @classmethod
    def local(
        cls,
        devices: str | Iterable[str],
        store: Store | None = None,
        fallback: Callable[[str], None] | None = None,
    ) -> "System":
        """This machine, seen as `devices`, such as `cpu:0,cpu:1`.

        A device that computes on the processor, but names no core, has those that no other names.
        Links, and what a run costs beside its parts, are measured once and then taken from the
        `store`, by default the user's. With a `fallback` a device that is not here is left out,
        if others are, and `fallback` is told so in one line.

        Raises
        ------
        DeviceError
            A device is not here; the message says what is.
        PluginError
            A device string names no target.
        """
        store = store or Store(default_path())
        found = _found(parse_devices(devices), fallback)
        # Checked before anything is measured.
        bare = cls(platform.node() or "machine", tuple(found), ())
        links = [link_between(a, b, store) for a in found for b in found if a != b]
        costs = overheads(found, store)
        return replace(
            bare,
            devices=tuple(
                replace(device, launch_seconds=costs.launch[device.name]) for device in found
            ),
            links=tuple(links),
            run_seconds=costs.call,
            start_seconds=costs.start,
            bytes_per_second=costs.memory,
            slowdown=costs.slowdown,
            warm_share=costs.warm,
        )

    @classmethod
    def load(cls, path: str | Path) -> "System":
        """Reads a machine file (TOML: `name`, `[[device]]`, `[[link]]`; keys as the fields here).

        Raises
        ------
        DeviceError
            The file is missing, is no TOML, or has a key or value that does not belong.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
            content = tomllib.loads(text)
        except OSError as error:
            raise DeviceError(f"machine file '{path}': {error.strerror}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise DeviceError(f"machine file '{path}' is no TOML: {error}") from None
        try:
            return cls.from_dict(content)
        except DeviceError as error:
            raise DeviceError(f"machine file '{path}': {error}") from None

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "System":
        """The system that `to_dict` wrote, or that a machine file describes."""
        known = {"name", *NUMBERS, "device", "link"}
        if unknown := set(content) - known:
            there = "name, device, link, " + ", ".join(NUMBERS)
            raise DeviceError(f"'{min(unknown)}' does not belong; there are {there}")
        numbers = record(_Numbers, {name: content[name] for name in NUMBERS if name in content})
        return cls(
            str(content.get("name", "machine")),
            tuple(record(Device, item) for item in _tables(content, "device")),
            tuple(record(Link, item) for item in _tables(content, "link")),
            **asdict(numbers),
        )

    def to_toml(self) -> str:
        """The text of a machine file, which `load` reads back to an equal system.

        Examples
        --------
        >>> print(System("small", (Device("cpu:0", "cpu", cores=(0,)),), ()).to_toml())
        name = "small"
        <BLANKLINE>
        [[device]]
        name = "cpu:0"
        target = "cpu"
        cores = [0]
        <BLANKLINE>
        """
        content = self.to_dict()
        tables = ("device", "link")
        lines = [f"{key} = {_toml(content[key])}" for key in content if key not in tables]
        for table in tables:
            for item in content[table]:
                lines += ["", f"[[{table}]]"]
                lines += [f"{key} = {_toml(value)}" for key, value in item.items()]
        return "\n".join(lines) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without fields that have their default."""
        return {
            "name": self.name,
            **plain(_Numbers(*(getattr(self, name) for name in NUMBERS))),
            "device": [plain(device) for device in self.devices],
            "link": [plain(link) for link in self.links],
        }


@dataclass(frozen=True)
class _Numbers:
    """The fields of a system that are numbers, as a record of a machine file."""

    run_seconds: float = 0.0
    start_seconds: float = 0.0
    bytes_per_second: float = inf
    slowdown: float = 1.0
    warm_share: float = 1.0


NUMBERS = tuple(field.name for field in fields(_Numbers))


def parse_devices(text: str | Iterable[str]) -> list[str]:
    """The device strings in `cpu:0,cpu:1`.

    Examples
    --------
    >>> parse_devices("cpu:0, cpu:1")
    ['cpu:0', 'cpu:1']
    """
    items = text.split(",") if isinstance(text, str) else list(text)
    found = [item.strip() for item in items if item.strip()]
    if not found:
        raise DeviceError("no device is named; give for example cpu:0,cpu:1")
    return found


def _found(names: Sequence[str], fallback: Callable[[str], None] | None) -> list[Device]:
    """The devices of these strings; those that pick their cores keep off those that others name."""
    targets = {name: load(Target, name.partition(":")[0]) for name in names}
    picking = {name: target.picks_cores(name) for name, target in targets.items()}
    found: dict[str, Device] = {}
    missing = {}
    # Who picks comes last.
    for name in sorted(names, key=picking.__getitem__):
        target = targets[name]
        taken = {core for other in found if not picking[other] for core in found[other].cores}
        try:
            if reason := target.unavailable():
                raise DeviceError(f"'{name}' is not available: {reason}", name)
            device = target.beside(name, sorted(taken)) if picking[name] else target.device(name)
        except DeviceError as error:
            if fallback is None:
                raise
            missing[name] = error.of(name)
        else:
            found[name] = device
    if not found:
        raise missing.popitem()[1]
    if fallback is not None:
        for lost in missing.values():
            fallback(f"{lost}; it is left out")
    return [found[name] for name in names if name in found]


def _tables(content: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    tables = content.get(key, [])
    if not isinstance(tables, list) or not all(isinstance(item, Mapping) for item in tables):
        raise DeviceError(f"'{key}' must be tables, written [[{key}]]")
    return tables


def _toml(value: Any) -> str:
    if isinstance(value, float):
        return repr(value)
    # The rest of what JSON writes is TOML too, but for one control character.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
