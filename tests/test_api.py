"""The verbs of the Python API that no other file of tests calls."""

from dataclasses import replace
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import hetsched
from hetsched import api
from hetsched.contest import LEAST_RUNS, _in_turns, latencies
from hetsched.errors import HetschedError, InputError, PluginError
from hetsched.executable import Executable
from hetsched.host import cores
from hetsched.plan import make_plan
from hetsched.system import System

DIGITS = Path(__file__).parent / "data" / "digits_branch.onnx"
TWO_CORES = pytest.mark.skipif(len(cores()) < 2, reason="takes two cores as two devices")


@pytest.fixture
def hybrid() -> Executable:
    """The first half on one core, the second on another, whether it pays or not."""
    system = System.local("onnxruntime:{},onnxruntime:{}".format(*cores()[:2]))
    graph = hetsched.read_onnx(DIGITS)
    order = [group.name for group in graph.groups]
    devices = [device.name for device in system.devices]
    placement = {name: devices[2 * i // len(order)] for i, name in enumerate(order)}
    prices = hetsched.priced(graph, system, "roofline")
    return hetsched.compile(make_plan(graph, system, prices, placement, order, "by hand"))


@TWO_CORES
@pytest.mark.parametrize("seconds", [(1.0, 2.0), (2.0, 1.0), (1.0, 1.0)])
def test_what_is_measured_faster_ships(
    seconds: tuple[float, float], hybrid: Executable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def latencies(ways: list[Executable], inputs: dict[str, np.ndarray]) -> tuple[list[float], int]:
        for way in ways:
            way.run(inputs)
        return list(seconds[::-1]), 5

    monkeypatch.setattr(api, "latencies", latencies)
    chosen = hetsched.compile(hybrid.plan, measure=True)
    assert len(chosen.plan.devices) == (2 if seconds[0] < seconds[1] else 1)
    assert any("first quartiles of 5 runs" in note for note in chosen.plan.notes)
    assert any("hybrid does not pay" in n for n in chosen.plan.notes) == (seconds[0] >= seconds[1])
    image = np.random.default_rng(0).standard_normal((1, 1, 8, 8)).astype(np.float32)
    with chosen, hybrid:
        (logits,) = chosen.run({"image": image}).values()
        np.testing.assert_allclose(logits, hybrid.run({"image": image})["logits"], rtol=1e-5)


@TWO_CORES
def test_several_plans_are_measured(hybrid: Executable, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []

    def latencies(ways: list[Executable], inputs: dict[str, np.ndarray]) -> tuple[list[float], int]:
        for way in ways:
            way.run(inputs)
        measured.append(len(ways))
        return [2.0, 3.0, 1.0, 4.0][: len(ways)], 5

    monkeypatch.setattr(api, "latencies", latencies)
    plans = [replace(hybrid.plan, partitioner=f"way {i}") for i in range(5)]
    with hybrid, hetsched.compile(plans, measure=True) as chosen:
        assert measured == [1 + api.MOST_MEASURED]
        assert chosen.plan.partitioner == "way 1"
        # A note on drift may follow.
        assert any("way 0 3000.000 ms, way 1 1000.000 ms" in note for note in chosen.plan.notes)


def test_the_contest_takes_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    class Named:
        plan = SimpleNamespace(modelled=False)

        def __init__(self, name: str) -> None:
            self.name = name

        def run(self, inputs: object) -> None:
            calls.append(self.name)

    monkeypatch.setattr("hetsched.contest.SECONDS", 0.0)
    _, runs = latencies([Named("a"), Named("b")], {})  # type: ignore[list-item]
    assert runs == LEAST_RUNS
    # Each finds caches as it left them itself.
    assert calls == ["a", "a", "b", "b"] * LEAST_RUNS


def test_the_contest_goes_by_runs_that_nothing_disturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two devices, most runs met a host that had one core for both."""
    monkeypatch.setattr("hetsched.contest.SECONDS", 0.0)
    shared = cycle([3.0, 3.0, 1.0, 1.0, 3.0, 3.0, 1.0, 1.0, 3.0, 3.0])
    (together, alone), _ = _in_turns([lambda: next(shared), lambda: 1.5])
    assert together < alone


def test_a_plan_of_one_device_is_left_alone() -> None:
    graph = hetsched.read_onnx(DIGITS)
    plan = hetsched.partition(graph, f"onnxruntime:{cores()[0]}", cost_model="roofline")
    executable = hetsched.compile(plan, measure=True)
    assert executable.plan is plan


def test_objectives() -> None:
    graph = hetsched.read_onnx(DIGITS)
    device = f"onnxruntime:{cores()[0]}"
    with pytest.raises(PluginError, match="'task' serves latency, not throughput"):
        hetsched.partition(graph, device, "task", "throughput", "roofline")
    with pytest.raises(PluginError, match="no objective 'speed'; there are latency, throughput"):
        hetsched.partition(graph, device, "auto", "speed", "roofline")
    for spec in ("auto", "layerwise"):
        plan = hetsched.partition(graph, device, spec, "throughput", "roofline")
        assert plan.objective == "throughput"


def test_a_bound_call_reads_its_arrays_anew() -> None:
    graph = hetsched.read_onnx(DIGITS)
    (tensor,) = graph.inputs
    x = np.zeros(tensor.shape, np.float32)
    rng = np.random.default_rng(0)
    with hetsched.compile(graph, "cpu:0", "single") as executable:
        call = executable.bind({tensor.name: x})
        first = call()
        for _ in range(2):
            x[...] = rng.standard_normal(x.shape)
            found = call()
            for name, right in executable.run({tensor.name: x.copy()}).items():
                np.testing.assert_array_equal(found[name], right)
                assert found[name] is first[name]
        with pytest.raises(InputError, match="was given float64"):
            executable.bind({tensor.name: x.astype(np.float64)})
        with pytest.raises(InputError, match="cannot be bound"):
            executable.bind({tensor.name: np.asfortranarray(x)})
    with pytest.raises(HetschedError, match="closed"):
        call()


@TWO_CORES
def test_a_plan_of_several_devices_is_bound_too(hybrid: Executable) -> None:
    (tensor,) = hybrid.inputs
    x = np.random.default_rng(0).random(tensor.shape, np.float32)
    inputs = {tensor.name: x}
    with hybrid:
        call = hybrid.bind(inputs)
        # What the caller does with the mapping is of no account.
        inputs.clear()
        found = call()
        for name, right in hybrid.run({tensor.name: x}).items():
            np.testing.assert_array_equal(found[name], right)
