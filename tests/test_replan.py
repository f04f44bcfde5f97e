"""A target that refuses a part when it compiles: the plan is made again without."""

from dataclasses import replace

import numpy as np
import pytest
from graphs import Builder

import hetsched
from hetsched import compiler
from hetsched.device import Device
from hetsched.errors import CompileError, RefusedPart
from hetsched.graph import Graph
from hetsched.host import cores
from hetsched.partitioner import Partitioner
from hetsched.plugin import load
from hetsched.system import Link, System
from hetsched.target import Artifact, Target


def graph() -> Graph:
    build = Builder()
    x = build.input("x", 4, 4)
    weight = build.constant(np.eye(4, dtype=np.float32))
    first = build.op("MatMul", x, weight, name="first")
    second = build.op("MatMul", build.op("Softmax", first, name="soft"), weight, name="second")
    return build.graph(second)


@pytest.fixture
def system() -> System:
    core = cores()[0]
    devices = [load(Target, name).device(f"{name}:{core}") for name in ("cpu", "onnxruntime")]
    # The first is said to be much faster, so that it gets all.
    devices = [
        replace(device, flops_per_second=speed, fingerprint=f"said {speed}")
        for device, speed in zip(devices, (1e12, 1e3), strict=True)
    ]
    names = [device.name for device in devices]
    links = [Link(a, b, 0.0, 1e12) for a in names for b in names if a != b]
    return System("said", tuple(devices), tuple(links))


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of operations that the target cpu refuses from now on, when it compiles."""
    names: set[str] = set()
    before = compiler.compiled

    def compiled(target: Target, part: Graph, device: Device) -> Artifact:
        if target.name == "cpu" and names & {op.name for op in part.ops}:
            raise CompileError("out of registers")
        return before(target, part, device)

    monkeypatch.setattr(compiler, "compiled", compiled)
    return names


def test_what_is_refused_goes_elsewhere(system: System, refusing: set[str]) -> None:
    refusing.add("soft")
    model = graph()
    with hetsched.compile(model, system, "task") as executable:
        plan = executable.plan
        placed = {name: device.partition(":")[0] for name, device in plan.placement.items()}
        assert placed == {"first": "cpu", "soft": "onnxruntime", "second": "cpu"}
        assert plan.notes[-1].endswith("refused soft: out of registers; planned again without")
        x = np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32)
        (result,) = executable.run({"x": x}).values()
    exponents = np.exp(x - x.max(1, keepdims=True))
    np.testing.assert_allclose(result, exponents / exponents.sum(1, keepdims=True), rtol=1e-5)


def test_each_refusal_is_told(system: System, refusing: set[str]) -> None:
    refusing.update(["first", "second"])
    with hetsched.compile(graph(), system, "task") as executable:
        told = [note for note in executable.plan.notes if "refused" in note]
    assert any("first" in note for note in told)
    assert any("second" in note for note in told)


def test_a_plan_is_compiled_as_it_stands(system: System, refusing: set[str]) -> None:
    refusing.add("second")
    plan = hetsched.partition(graph(), system, "task")
    with pytest.raises(RefusedPart, match=r"part0 on 'cpu:\d+': out of registers"):
        hetsched.compile(plan)


def test_nothing_else_can_run_it(system: System, refusing: set[str]) -> None:
    refusing.add("second")
    alone = System("alone", system.devices[:1], ())
    with pytest.raises(RefusedPart, match="out of registers"):
        hetsched.compile(graph(), alone, "single")


def test_a_part_that_is_refused_only_whole(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    """None of its groups is refused alone: all of them leave the device."""
    before = compiler.compiled

    def compiled(target: Target, part: Graph, device: Device) -> Artifact:
        if target.name == "cpu" and len(part.ops) > 1:
            raise CompileError("too long")
        return before(target, part, device)

    monkeypatch.setattr(compiler, "compiled", compiled)
    with hetsched.compile(graph(), system, "task") as executable:
        assert set(executable.plan.placement.values()) == {system.devices[1].name}


def test_a_refused_piece_is_a_refusal_of_the_whole(refusing: set[str]) -> None:
    """A device that does not compile a piece gets nothing of that layer in the next plan."""
    names = load(Target, "cpu").devices()[1:3]
    if len(names) < 2:
        pytest.skip("this machine has one core")
    devices = tuple(
        replace(load(Target, "cpu").device(name), fingerprint=f"said {name}", flops_per_second=1e6)
        for name in names
    )
    links = [Link(a, b, 0.0, 1e12) for a in names for b in names if a != b]
    system = System("said", devices, tuple(links))
    build = Builder()
    x = build.input("x", 1, 4, 16, 16)
    weights = build.constant(np.ones((32, 4, 3, 3), np.float32))
    y = build.op("Conv", x, weights, shape=(1, 32, 16, 16), pads=(1, 1, 1, 1), name="conv")
    model = build.graph(y)
    plan = hetsched.partition(model, system, "channel", cost_model="roofline")
    assert plan.splits
    refusing.add("conv#1")
    with hetsched.compile(plan, replan=load(Partitioner, "channel")) as executable:
        assert executable.plan.splits == ()
        assert executable.plan.original is model
        assert "planned again without" in executable.plan.notes[-1]
