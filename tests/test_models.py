"""Whole models: imported, cut, compiled, run, and compared with ONNX Runtime part by part."""

from pathlib import Path

import numpy as np
import pytest

import hetsched
from bench import models
from bench.accuracy import RECOGNISED
from bench.coverage import RANDOM, Options, cover
from bench.models import CATALOGUE, Model
from hetsched.host import cores
from hetsched.operation import group_flops

LARGEST_GMAC = 0.4
OPTIONS = Options(devices="cpu:0,cpu:1", partitioners=("task",), cost_model="roofline", seed=0)
# What a test run has no time for; `python -m bench.coverage` covers them.
LEFT_OUT = {
    "light_squeezenet": "the network of squeezenet1_1 with other weights",
    "squeezenet1_1_int8": "mobilenet_v2_int8 has the same kinds of layers",
}


def small() -> list[Model]:
    return [model for model in models.models() if model.gmac < LARGEST_GMAC]


@pytest.fixture(autouse=True)
def store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The links between devices are measured for the test alone."""
    monkeypatch.setenv("HETSCHED_STORE", str(tmp_path / "profile.sqlite"))


def test_all_files_are_there() -> None:
    assert {model.name for model in models.models()} == {model.name for model in CATALOGUE}


@pytest.mark.skipif(len(cores()) < 2, reason="this machine has one core")
@pytest.mark.parametrize("model", small(), ids=lambda model: model.name)
def test_every_cut_is_right(model: Model) -> None:
    if model.name in LEFT_OUT:
        pytest.skip(LEFT_OUT[model.name])
    row = cover(model, OPTIONS)
    assert row.passed, row.problem
    assert row.gmac == pytest.approx(model.gmac, rel=0.05, abs=5e-5)
    assert row.change > 1e-3, "the output hardly depends on the input"
    assert row.import_deviation < 1e-5
    by_name = {attempt.partitioner: attempt for attempt in row.attempts}
    assert by_name.keys() == {"task", RANDOM}
    assert by_name[RANDOM].parts > 1
    assert by_name[RANDOM].devices == ("cpu:0", "cpu:1")
    assert all(attempt.recognised == RECOGNISED.get(model.name) for attempt in row.attempts)


@pytest.mark.parametrize("model", small(), ids=lambda model: model.name)
def test_drawn_weights_repeat(model: Model) -> None:
    first, again = (models.load(model, seed=1) for _ in range(2))
    assert first == again
    other = models.load(model, seed=2)
    assert (first == other) is model.real


def test_light_topologies_keep_their_arithmetic() -> None:
    """Of the file as shipped, all of whose weights are equal, and of that with drawn ones."""
    model = next(m for m in models.models() if m.name == "light_squeezenet")
    shipped = hetsched.read_onnx(model.path)
    drawn = hetsched.read_onnx(models.load(model))
    assert sum(map(group_flops, shipped.groups)) == sum(map(group_flops, drawn.groups))
    ranges = [float(np.ptp(array)) for array in shipped.constants.values() if array.ndim == 4]
    assert ranges
    assert not any(ranges)
    assert all(np.ptp(array) > 0 for array in drawn.constants.values() if array.ndim == 4)
