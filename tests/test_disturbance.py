"""What tells that a burst was disturbed, by recorded counters and times."""

from pathlib import Path

import pytest

from hetsched.device import Device
from hetsched.disturbance import Reading, Witness, reading, stolen_seconds

CORE = Device("cpu:0", "cpu", cores=(0,), fingerprint="core")
PAIR = Device("cpu", "cpu", cores=(0, 1), fingerprint="pair")
QUIET = Reading(0.0, stolen=5.0, switches=100, compute=1e-3, memory=2e-3)


def told(*readings: Reading, device: Device = CORE) -> list[str]:
    """Of bursts between each two readings."""
    following = iter(readings)
    witness = Witness(lambda _: next(following))
    found = []
    for _ in range(len(readings) // 2):
        witness.begin(device)
        found.append(witness.end(device))
    return found


def test_a_quiet_burst_is_not_disturbed() -> None:
    later = Reading(1.0, stolen=5.01, switches=103, compute=1.05e-3, memory=2.2e-3)
    assert told(QUIET, later) == [""]


@pytest.mark.parametrize(
    ("later", "why"),
    [
        (Reading(1.0, 5.3, 100, 1e-3, 2e-3), "30% of the processor stolen"),
        (Reading(0.5, 5.0, 300, 1e-3, 2e-3), "400 involuntary switches/s"),
        (Reading(1.0, 5.0, 100, 1.6e-3, 2e-3), "compute reference 1.60 x its best"),
        (Reading(1.0, 5.0, 100, 1e-3, 5e-3), "memory reference 2.50 x its best"),
    ],
)
def test_each_sign_is_told(later: Reading, why: str) -> None:
    assert told(QUIET, later) == [why]
    # Two cores have twice the time: of them it is half the share.
    halved = told(QUIET, Reading(1.0, 5.03, 100, 1e-3, 2e-3), device=PAIR)
    assert halved == [""]


def test_a_reference_is_held_against_its_best_so_far() -> None:
    """What begins in a disturbed moment is found out as soon as there was a better one."""
    slow = Reading(0.0, compute=1.5e-3, memory=2e-3)
    again = Reading(1.0, compute=1.5e-3, memory=2e-3)
    quick = Reading(2.0, compute=1.0e-3, memory=2e-3)
    first, second, third = told(slow, again, quick, quick, slow, again)
    assert first == second == ""
    assert third == "compute reference 1.50 x its best"


def test_units_have_bests_of_their_own() -> None:
    slow = Reading(0.0, compute=9e-3, memory=9e-3)
    witness = Witness(lambda device: QUIET if device == CORE else slow)
    for device in (CORE, PAIR):
        witness.begin(device)
        assert witness.end(device) == ""


def test_stolen_time_is_read_for_the_cores_that_count(tmp_path: Path) -> None:
    path = tmp_path / "stat"
    path.write_text(
        "cpu 1 2 3 4 5 6 7 900 0 0\ncpu0 1 2 3 4 5 6 7 300 0 0\ncpu1 1 2 3 4 5 6 7 600 0\n"
    )
    one, both = stolen_seconds((0,), path), stolen_seconds((0, 1), path)
    assert both == pytest.approx(3 * one)
    assert one > 0
    path.write_text("cpu0 1 2 3\n")
    assert stolen_seconds((0, 7), path) == 0
    assert stolen_seconds((0,), tmp_path / "absent") == 0


def test_this_machine_can_be_read() -> None:
    from hetsched.host import cores

    found = reading(Device("cpu", "cpu", cores=cores()[:1]))
    assert found.compute > 0
    assert found.memory > 0
    assert reading(Device("gpu", "cuda")).compute == 0
