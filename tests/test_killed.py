"""Profiling survives a kill at any moment; bench.costs has the same with a hundred of them."""

from pathlib import Path

import pytest

from bench.cost_kill import MODEL, Kill, killed
from hetsched.store import Store


def test_a_kill_loses_at_most_the_burst_in_flight(tmp_path: Path) -> None:
    found = list(killed(MODEL, "cpu:0", tmp_path, kills=3, seed=4, longest_seconds=6.0))
    assert all(kill.sound for kill in found), found


def test_a_lost_burst_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lives = iter([3, 4])

    def lived(model: Path, device: str, path: Path, seconds: float) -> int:
        return next(lives)

    def records(store: Store) -> list[object]:
        return []

    monkeypatch.setattr("bench.cost_kill._lived", lived)
    monkeypatch.setattr(Store, "records", records)
    first, second = killed(MODEL, "cpu:0", tmp_path, kills=2, seed=0)
    assert (first.lost, second.lost) == (2, 3)
    assert not first.sound
    assert not Kill(1.0, 2, 2, 1, altered=False).sound
    assert not Kill(1.0, 2, 2, 0, altered=True).sound
    assert Kill(1.0, 2, 1, 0, altered=False).sound
