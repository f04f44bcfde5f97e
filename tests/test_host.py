"""The threads of this process and their cores; devices that take the cores that are left."""

import os
from collections.abc import Collection
from pathlib import Path
from threading import Event, Thread

import pytest

from hetsched import system
from hetsched.device import Device
from hetsched.errors import DeviceError
from hetsched.host import cores, hold, threads
from hetsched.store import Store
from hetsched.system import System


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads have no affinity here")
def test_a_thread_of_a_library_can_be_held_on_cores_later() -> None:
    before, started, ended = threads(), Event(), Event()

    def wait() -> None:
        started.set()
        ended.wait()

    thread = Thread(target=wait)
    thread.start()
    try:
        started.wait()
        (number,) = threads() - before
        hold([number], cores()[-1:])
        assert os.sched_getaffinity(number) == set(cores()[-1:])
        assert os.sched_getaffinity(0) == set(cores())
    finally:
        ended.set()
        thread.join()
    # It is there no more.
    hold([number], cores())


class Picking:
    """A target whose devices share the processor: `any` has the cores that are left."""

    asked: list[str]

    def __init__(self) -> None:
        self.asked = []

    def unavailable(self) -> None:
        return None

    def picks_cores(self, name: str) -> bool:
        return name.startswith("any")

    def device(self, name: str) -> Device:
        self.asked.append(name)
        return Device(name, "none", cores=(int(name.partition(":")[2]),))

    def beside(self, name: str, taken: Collection[int]) -> Device:
        self.asked.append(name)
        left = tuple(core for core in range(3) if core not in taken) or (0, 1, 2)
        return Device(f"{name}@{left[0]}", "none", cores=left)


def test_devices_keep_off_the_cores_that_others_name(monkeypatch: pytest.MonkeyPatch) -> None:
    target = Picking()
    monkeypatch.setattr(system, "load", lambda base, name: target)
    found = system._found(["any", "core:1"], None)
    assert [(device.name, device.cores) for device in found] == [
        ("any@0", (0, 2)),
        ("core:1", (1,)),
    ]
    # It is asked last, as it may start threads that stay where they are started.
    assert target.asked == ["core:1", "any"]
    assert [device.cores for device in system._found(["any"], None)] == [(0, 1, 2)]


def test_a_device_that_shares_some_cores_of_another_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(system, "load", lambda base, name: Picking())
    with pytest.raises(DeviceError, match="both use core 0"):
        # Nothing is left, so that it takes turns with all others: they do not with each other.
        System.local("any,core:0,core:1,core:2", Store(tmp_path / "profile.sqlite"))
