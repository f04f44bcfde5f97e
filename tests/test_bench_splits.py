"""What `bench.splits` keeps of a run that broke off, and how it judges the best share."""

from math import inf
from pathlib import Path
from typing import Any

from bench.splits import Options, _commits, _judged, _kept, _rows


def options(end: float, **rows: str) -> Options:
    """Of commit `new`; the file has `rows`, each with its commit."""
    kept = {"layer": {name: {"layer": name, "commit": commit} for name, commit in rows.items()}}
    return Options("cpu:0,cpu:1", 0, 0, 3, 3, (), Path("store"), "new", end, kept)


def made(name: str) -> dict[str, Any]:
    return {"made": True}


def test_only_rows_that_are_missing_or_of_another_commit_are_made() -> None:
    given = options(inf, other="old", a="new", b="old")
    *_, rows = _rows("layer", ["a", "b", "c"], given, made)
    assert [(row["layer"], row["commit"], "made" in row) for row in rows] == [
        ("other", "old", False), ("a", "new", False), ("b", "new", True), ("c", "new", True)
    ]  # fmt: skip


def test_each_row_is_told_of_at_once() -> None:
    assert [len(rows) for rows in _rows("layer", ["a", "b"], options(inf), made)] == [0, 1, 2]


def test_no_row_is_begun_when_the_time_is_over() -> None:
    (rows,) = _rows("layer", ["a", "b"], options(-inf, a="old"), made)
    assert rows == [{"layer": "a", "commit": "old"}]


def test_rows_of_other_devices_are_not_kept() -> None:
    found = {"devices": "cpu:0,cpu:1", "commit": "old", "rows": [{"layer": "a"}]}
    assert _kept({"layers": found}, "cpu:0,opencl:0") == {}
    assert _kept({"layers": found}, "cpu:0,cpu:1") == {
        "layer": {"a": {"layer": "a", "commit": "old"}}
    }


def test_a_title_tells_the_commits_of_its_rows() -> None:
    rows = [{"commit": "aaaaaaaaa"}, {"commit": "bbbbbbbbb"}, {}]
    assert _commits({"rows": rows[:1]}, "ccc") == "commit aaaaaaa"
    assert _commits({"rows": []}, "ccc") == "commit ccc"
    told = _commits({"rows": rows, "commit": "bbbbbbbbb"}, "ccc")
    assert told == "rows by commit: 1 of aaaaaaa, 2 of bbbbbbb"


def test_the_rounds_that_choose_do_not_judge() -> None:
    """`lucky` has its quick runs where it is chosen, and takes 4 otherwise."""
    choosing, judging = _judged({"steady": [2.0, 3.0, 2.0, 3.0], "lucky": [1.0, 4.0, 1.0, 4.0]})
    best = min(choosing, key=choosing.__getitem__)
    assert (best, judging[best]) == ("lucky", 4.0)
