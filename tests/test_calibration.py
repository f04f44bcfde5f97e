"""What is kept of runs beside their predictions, and when a device is said to drift."""

from dataclasses import replace
from pathlib import Path

from test_overheads import chain, system

from hetsched.calibration import calibrate
from hetsched.cost import Prices
from hetsched.plan import Plan, make_plan, simulate
from hetsched.schedule import Schedule
from hetsched.store import Store


def plan() -> Plan:
    graph = chain()
    names = [group.name for group in graph.groups]
    costs = Prices(
        "by hand", {name: {"p": 2.0, "q": 3.0} for name in names}, {name: {} for name in names}
    )
    return make_plan(graph, system(), costs, dict(zip(names, "pq", strict=True)), names, "")


def run(found: Plan, **slower: float) -> Schedule:
    """The predicted schedule, with the parts of some devices slower."""
    predicted = simulate(found)
    slots = tuple(
        replace(slot, finish=slot.start + slot.seconds * slower.get(slot.device, 1.0))
        for slot in predicted.slots
    )
    return replace(predicted, slots=slots, clock="measured")


def test_a_device_that_changes_is_told_of_once_it_is_known(tmp_path: Path) -> None:
    store, found = Store(tmp_path / "profile.sqlite"), plan()
    for _ in range(4):
        assert calibrate(found, [run(found, q=2.0)], store) == ()
    # Unlike the four before, which are too few; then five of which one is unlike.
    assert calibrate(found, [run(found)], store) == ()
    assert calibrate(found, [run(found, q=2.05)], store) == ()
    (line,) = calibrate(found, [run(found, q=3.0)], store)
    expected = "3.00 x the prediction, in earlier runs 1.80 to 2.20; measure it again"
    assert line == f"'q' drifts: its parts take {expected}"


def test_what_was_predicted_and_measured_is_kept(tmp_path: Path) -> None:
    store, found = Store(tmp_path / "profile.sqlite"), plan()
    calibrate(found, [run(found, p=1.0), run(found, p=3.0), run(found, p=2.0)], store)
    kept = {r.subject.partition(" ")[0] + r.subject[-2:]: r for r in store.residuals()}
    assert (kept["parts p"].predicted, kept["parts p"].measured) == (3.0, 6.0)
    assert (kept["parts q"].predicted, kept["parts q"].measured) == (4.0, 4.0)
    assert kept["run q"].predicted == simulate(found).makespan
    assert {residual.repeats for residual in kept.values()} == {3}


def test_a_store_that_cannot_be_written_to_fails_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert calibrate(plan(), [run(plan())], Store(tmp_path / "file" / "profile.sqlite")) == ()
