"""What a hand-over costs, told from stamps that are given."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pytest

from hetsched import links
from hetsched.device import Device
from hetsched.links import HANDOVER_NBYTES, measure_link
from hetsched.request import Step
from hetsched.schedule import Schedule, Slot

# A part on data of its own device, and by how much longer on what another has touched.
ALONE, SHARING = 1e-5, 3e-5
# From part to part on a device, and from device to device.
STARTING, WAITING = 1e-7, 5e-7


@dataclass(frozen=True)
class Stamped:
    """Runs steps by the clock above: memory that two tensors take in turns stays an owner's."""

    steps: Sequence[Step]
    outputs: tuple[str, ...]
    constants: Mapping[str, object]

    def run(self, inputs: Mapping[str, object]) -> tuple[None, "Stamped"]:
        return None, self

    def schedule(self) -> Schedule:
        slots: list[Slot] = []
        time = 0.0
        owner = {}
        for index, step in enumerate(self.steps):
            device = step.device.name
            time += WAITING if slots and slots[-1].device != device else STARTING
            read, written = owner.get((index - 1) % 2), owner.get(index % 2)
            seconds = ALONE + (SHARING / 2) * ((read != device) + (written != device))
            owner[index % 2] = owner[(index - 1) % 2] = device
            slots.append(Slot(step.name, device, time, time + seconds))
            time += seconds
        return Schedule(tuple(slots))

    def close(self) -> None:
        pass


def test_a_link_counts_what_sharing_costs_who_reads_and_who_writes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(links, "Executor", Stamped)
    link = measure_link(Device("p", "none"), Device("q", "none"))
    assert link.seconds == pytest.approx(WAITING - STARTING)
    assert link.bytes_per_second == pytest.approx(HANDOVER_NBYTES / SHARING)
