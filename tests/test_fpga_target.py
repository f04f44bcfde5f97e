"""The target fpga: parts on the overlay, in modelled time, beside a processor."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import numpy as np
import pytest

import hetsched
from bench.fpga_parts import Build, convolution, drawn
from hetsched.device import Device
from hetsched.errors import CompileError, DeviceError, PackageError, PluginError
from hetsched.fpga import board as boards
from hetsched.fpga import reference
from hetsched.fpga.board import ASSUMED_HZ, board
from hetsched.fpga.layers import network
from hetsched.graph import Graph
from hetsched.plugin import load
from hetsched.request import Run, Step
from hetsched.schedule import Transfer
from hetsched.system import System
from hetsched.target import Artifact, Target

ROOT = Path(__file__).parents[1]
HOST = ROOT / "examples" / "small_host.toml"
NAME = "fpga:ecp5-8x8"


@pytest.fixture(autouse=True)
def _store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HETSCHED_STORE", str(tmp_path / "profile.sqlite"))


@pytest.fixture(scope="module")
def target() -> Target:
    return load(Target, "fpga:engine=instructions")


def small_host() -> System:
    return System.load(HOST).with_options("fpga", engine="instructions")


@pytest.mark.parametrize("name", [NAME, "fpga:ecp5-16x8"])
def test_parts_compute_what_their_layers_mean(target: Target, name: str) -> None:
    device = target.device(name)
    for seed in range(12):
        graph = convolution(seed)
        assert target.refusal(graph, device) is None
        inputs = drawn(graph, seed)
        with target.load(target.compile(graph, device), graph, device) as kernel:
            for _ in range(2):
                found = kernel.run(inputs)
                for array, wanted in zip(found, reference.run(network(graph), inputs), strict=True):
                    assert array.dtype == wanted.dtype
                    np.testing.assert_array_equal(array, wanted)


def test_a_part_takes_its_cycles_whatever_simulates_it(target: Target) -> None:
    device, graph = target.device(NAME), convolution(3)
    seconds = target.seconds(graph, device)
    assert seconds is not None
    assert 1e-7 < seconds < 1e-3
    assert target.seconds(graph, replace(device, clock_hz=device.clock_hz * 2)) == seconds / 2
    slow = load(Target, "fpga:engine=instructions,period=4")
    assert (slow.seconds(graph, slow.device(NAME)) or 0) > 1.2 * seconds
    with target.load(target.compile(graph, device), graph, device) as kernel:
        start, finish = kernel.begin(drawn(graph, 0)).finish()
    assert finish - start == pytest.approx(seconds, abs=1e-9)


def test_devices_say_what_they_are(target: Target) -> None:
    device = target.device(NAME)
    assert device.modelled
    assert device.kind == "fpga"
    assert "MHz" in device.description
    assert device.flops_per_second == 2 * 64 * device.clock_hz
    for name in ("fpga:ice40-8x8", "fpga:ecp5-7x8", "fpga:ecp5", "fpga", "fpga:ecp5-8x16"):
        with pytest.raises(DeviceError):
            target.device(name)
    for option in ("engine=pysim", "grade=5", "latency=0"):
        with pytest.raises(PluginError):
            load(Target, f"fpga:{option}")


def test_the_clock_is_that_of_place_and_route(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = {
        "device": "LFE5U-85F", "overlay": "8x8", "grade": 8, "clock_hz": 1.5e8, "lut": 6000,
        "seeds": [1, 2, 3],
    }  # fmt: skip
    path = tmp_path / "place_and_route.json"
    path.write_text(json.dumps({"parts": [found]}))
    monkeypatch.setattr(boards, "RESULTS", path)
    boards._results.cache_clear()
    try:
        assert board("ecp5-8x8", 8).clock_hz == 1.5e8
        assert board("ecp5-8x8", 8).description.endswith(
            "150.0 MHz routed (median of 3 seeds); 6000 LUT"
        )
        assert board("ecp5-16x8", 8).clock_hz == ASSUMED_HZ
        assert "assumed" in board("ecp5-16x8", 8).description
    finally:
        boards._results.cache_clear()


def test_what_the_overlay_cannot_do_is_refused_by_name(target: Target) -> None:
    build = Build()
    graph = build.graph(build.rounded(build.op("Sigmoid", build.input(1, 3, 4, 4))))
    device = target.device(NAME)
    why = target.refusal(graph, device)
    assert why is not None
    assert "Sigmoid" in why
    with pytest.raises(CompileError, match="Sigmoid"):
        target.compile(graph, device)


def test_damaged_artifacts_are_refused(target: Target) -> None:
    device, graph = target.device(NAME), convolution(0)
    artifact = target.compile(graph, device)
    layout = json.loads(artifact.files["layout.json"])

    def changed(**values: object) -> Artifact:
        files = {**artifact.files, "layout.json": json.dumps({**layout, **values}).encode()}
        return replace(artifact, files=files)

    place = layout["inputs"][0]
    damaged = [
        replace(artifact, files={**artifact.files, "layout.json": b"{"}),
        replace(artifact, files={**artifact.files, "instructions.bin": b"\xff" * 32}),
        replace(artifact, files={**artifact.files, "instructions.bin": b"\1" * 33}),
        replace(artifact, files={"layout.json": artifact.files["layout.json"]}),
        changed(nbytes=8),
        changed(nbytes=2**40),
        changed(nbytes="many"),
        changed(cycles=-1),
        changed(overlay={"rows": 7}),
        changed(overlay={"cells": 8}),
        changed(inputs=[]),
        changed(inputs=[{**place, "start": layout["nbytes"]}]),
        changed(inputs=[{**place, "start": -64}]),
    ]
    for wrong in damaged:
        with pytest.raises(PackageError):
            target.load(wrong, graph, device)


def network_of_kinds() -> Graph:
    """A dense convolution, what the overlay has no layer for, and a dense one again."""
    build, rng = Build(dtype="uint8"), np.random.default_rng(0)

    def dense(x: str) -> str:
        values = rng.integers(-127, 128, (64, 64, 3, 3)).astype(np.int8)
        w = build.weights(values, np.full(64, 1 / 24 / 150))
        y = build.op("Conv", x, w, pads=[1] * 4, kernel_shape=[3, 3])
        return build.again(build.rounded(y), like=x)

    x = build.input(1, 64, 20, 20)
    first = dense(x)
    middle = build.again(build.rounded(build.op("Softmax", first, axis=1)), like=x)
    y = dense(middle)
    return build.graph(build.rounded(build.op("Relu", y)))


def test_auto_sends_dense_convolutions_there_and_keeps_the_rest() -> None:
    plan = hetsched.partition(network_of_kinds(), small_host())
    placed = {op.kind: part.device.name for part in plan.parts for op in part.ops}
    # How much of the convolutions each device computes: the processor may take a share.
    convolved = Counter[str]()
    for part in plan.parts:
        for op in part.ops:
            if op.kind == "Conv":
                convolved[part.device.name] += op.output().size
    assert convolved[NAME] >= 0.7 * convolved.total()
    assert placed["Softmax"] == "cpu:0"
    assert hetsched.simulate(plan).clock == "predicted, modelled"


def test_a_quantised_model_runs_on_both(tmp_path: Path) -> None:
    with np.load(ROOT / "tests/data/digits_test.npz") as data:
        images, labels = data["x"][:60] / np.float32(16), data["y"][:60]
    found = hetsched.quantize(ROOT / "tests/data/digits_cnn.onnx", {"image": images})
    plan = hetsched.partition(hetsched.read_onnx(found.model), small_host(), "task")
    assert set(plan.devices) == {"cpu:0", NAME}
    with hetsched.compile(plan) as executable:
        executable.save(tmp_path / "digits.hsp")
    with hetsched.load(tmp_path / "digits.hsp") as executable:
        verification = hetsched.verify(executable)
        verification.check()
        right = 0
        for image, label in zip(images, labels, strict=True):
            outputs = executable.run({"image": image[None]})
            right += int(np.argmax(outputs["logits"]) == label)
        assert right >= 58
        begin = perf_counter()
        executable.run({"image": images[:1]})
        schedule, wall = executable.schedule, perf_counter() - begin
    assert schedule.clock == "measured, modelled"
    # The overlay's part is in its modelled time, not in the simulator's.
    busy = schedule.busy_seconds(NAME)
    assert 1e-6 < busy < 1e-3
    assert schedule.makespan < wall


def test_a_run_is_replayed_on_one_clock() -> None:
    cpu, core = Device("cpu", "cpu"), Device("core", "fpga", modelled=True)
    steps = [
        Step("a", cpu, ("x",), ("p",)),
        Step("b", core, ("p",), ("q",)),
        Step("c", cpu, ("x",), ("r",)),
        Step("d", cpu, ("q", "r"), ("y",)),
    ]
    run = Run(steps)
    start = run.started
    # What simulated b took from 3 to 90; the core would take 4 seconds.
    for index, begin, finish in ((0, 1, 3), (1, 3, 7), (2, 3, 4), (3, 91, 93)):
        run.record(index, start + begin, start + finish)
    run.record_transfer(Transfer("q", 8, "core", "cpu", 90.0, 90.5, True))
    schedule = run.schedule()
    found = {slot.task: (slot.start, slot.finish) for slot in schedule.slots}
    expected = {"a": (0, 2), "b": (2, 6), "c": (2, 3), "d": (6.5, 8.5)}
    for task, times in expected.items():
        assert found[task] == pytest.approx(times), task
    assert schedule.transfers[0].start == pytest.approx(6)
    assert schedule.clock == "measured, modelled"
