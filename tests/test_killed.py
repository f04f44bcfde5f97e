"""Profiling survives a kill at any moment; bench.costs has the same with a hundred of them."""

from pathlib import Path

import pytest

from bench import cost_kill
from bench.cost_kill import MODEL, Kill, killed, measured
from bench.costing import Options
from hetsched.profiling import MOST_BURSTS
from hetsched.store import Kernel, Record, Sample, Store


def test_a_kill_loses_at_most_the_burst_in_flight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HETSCHED_CACHE", str(tmp_path / "compiled"))
    found = list(killed(MODEL, "cpu:0", tmp_path, kills=3, seed=4))
    assert all(kill.sound for kill in found), found
    # Else nothing was shown.
    assert all(kill.begun for kill in found), found
    assert sum(kill.kept for kill in found), found


def test_a_lost_burst_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lives = iter([(3, True), (4, True)])
    monkeypatch.setattr(cost_kill, "_lived", lambda *arguments: next(lives))
    monkeypatch.setattr(Store, "records", lambda store: ())
    first, second = killed(MODEL, "cpu:0", tmp_path, kills=2, seed=0)
    assert (first.lost, second.lost) == (2, 3)
    assert not first.sound
    assert not Kill(1.0, 2, 2, 1, altered=False).sound
    assert not Kill(1.0, 2, 2, 0, altered=True).sound
    assert Kill(1.0, 2, 1, 0, altered=False).sound


def test_a_full_sample_may_forget_its_oldest_bursts_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bursts(*seconds: float) -> tuple[Record, ...]:
        sample = Sample(seconds[-1], 0.0, 1, bursts=seconds)
        return (Record("here", "tvm", "sequence", Kernel("one", "Relu"), sample, ""),)

    full = tuple(map(float, range(MOST_BURSTS)))
    stores = iter(
        [
            bursts(*full),
            bursts(*full[2:], 50.0, 51.0),
            # Another than the oldest is gone.
            bursts(*full[2:-1], 50.0, 51.0, 52.0),
            # Nothing is left of what was there, and no process said so much.
            bursts(*(one + 100 for one in full)),
        ]
    )
    lives = iter([(MOST_BURSTS, True), (2, True), (1, True), (1, True)])
    monkeypatch.setattr(cost_kill, "_lived", lambda *arguments: next(lives))
    monkeypatch.setattr(Store, "check", lambda store: None)
    monkeypatch.setattr(Store, "records", lambda store: next(stores))
    found = list(killed(MODEL, "cpu:0", tmp_path, kills=4, seed=0))
    assert [kill.kept for kill in found[:2]] == [MOST_BURSTS, 2]
    assert [kill.sound for kill in found] == [True, True, False, False], found


def test_a_process_that_fails_by_itself_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost_kill, "KILLS", 1)
    options = Options("none:0", 0, MODEL.parent, MODEL.parent)
    result = measured(options)
    assert result.passed is False
    assert "1 processes that ended by themselves" in result.text
