"""The command line as a user meets it: what it prints, what it writes, how it ends."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from time import sleep
from typing import Any

import numpy as np
import onnxruntime
import pytest
from typer.testing import CliRunner, Result

import hetsched
from hetsched.cli import app
from hetsched.cli.options import seconds_of, shapes_of
from hetsched.errors import VerificationFailed
from hetsched.store import Residual, Store
from hetsched.system import System

DATA = Path(__file__).parent / "data"
GOLDEN = Path(__file__).parent / "golden"
BRANCH = str(DATA / "digits_branch.onnx")
TWO_CORES = str(DATA / "two_cores.toml")
HETSCHED = [sys.executable, "-c", "from hetsched.cli import main; main()"]


@pytest.fixture(scope="module", autouse=True)
def _store(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A profile store of the tests' own, and the width of a file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HETSCHED_STORE", str(tmp_path_factory.mktemp("store") / "profile.sqlite"))
        patch.setenv("COLUMNS", "100")
        yield


def hetsched_(*arguments: object, status: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(item) for item in arguments], catch_exceptions=False)
    assert result.exit_code == status, result.output
    return result


def document(*arguments: object, status: int = 0) -> dict[str, Any]:
    """What `--json` prints: one document and nothing else."""
    found = json.loads(
        hetsched_(*arguments, "--json", status=status).stdout, parse_constant=pytest.fail
    )
    assert isinstance(found, dict)
    return found


def two_devices() -> str:
    """Two devices that every machine has, on different cores where it has two."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
    return f"cpu:{cores[0]},cpu:{cores[1]}" if len(cores) > 1 else "cpu:0,onnxruntime:0"


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("package") / "branch.hsp"
    hetsched_("compile", BRANCH, "-o", path, "--devices", two_devices(), "--partitioner", "task")
    return path


@pytest.mark.parametrize("partitioner", ["single", "task", "auto"])
def test_compile_run_verify(partitioner: str, tmp_path: Path) -> None:
    path, given, outputs = tmp_path / "m.hsp", tmp_path / "in.npz", tmp_path / "out.npz"
    options = ("--devices", two_devices(), "--partitioner", partitioner)
    text = hetsched_("compile", BRANCH, "-o", path, *options).stdout
    assert "part0" in text
    assert f"{path.stat().st_size / 1e6:.3f} MB" in text
    image = np.random.default_rng(3).standard_normal((1, 1, 8, 8)).astype(np.float32)
    np.savez(given, image=image)
    assert f"inputs from {given}" in hetsched_("run", path, "-i", given, "-o", outputs).stdout
    expected = onnxruntime.InferenceSession(BRANCH).run(None, {"image": image})[0]
    with np.load(outputs) as found:
        np.testing.assert_allclose(found["logits"], expected, rtol=1e-4, atol=1e-5)
    assert "verified" in hetsched_("verify", path, "-i", given).stdout.splitlines()[-1]


@pytest.mark.parametrize("partitioner", ["auto", "task", "single"])
def test_partition_reads_as_it_should(partitioner: str) -> None:
    text = hetsched_(
        "partition", BRANCH, "--system", TWO_CORES, "--partitioner", partitioner
    ).stdout
    golden = GOLDEN / f"partition_{partitioner}.txt"
    text = "\n".join(line.rstrip() for line in text.splitlines()) + "\n"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(text)
    assert text == golden.read_text(), "if this is meant, run the test with UPDATE_GOLDEN=1"


def test_json_has_the_numbers_of_the_table() -> None:
    options = ("partition", BRANCH, "--system", TWO_CORES, "--partitioner", "task")
    found, text = document(*options), hetsched_(*options).stdout
    assert len(found["parts"]) > 1
    for part in found["parts"]:
        row = next(line for line in text.splitlines() if line.startswith(f"{part['name']} "))
        assert row.split()[1] == part["device"]
        assert row.split()[-1] == f"{part['predicted_seconds'] * 1e3:.3f}"
    assert f"predicted    {found['makespan_seconds'] * 1e3:.3f} ms" in text
    assert f"lower bound  {found['lower_bound_seconds'] * 1e3:.3f} ms" in text
    assert found["lower_bound_seconds"] <= found["makespan_seconds"]
    assert found["predicted"]["makespan"] == found["makespan_seconds"]


def test_a_plan_is_simulated_on_another_machine(tmp_path: Path) -> None:
    plan, faster = tmp_path / "plan.json", tmp_path / "faster.toml"
    hetsched_("partition", BRANCH, "--system", TWO_CORES, "--partitioner", "task", "-o", plan)
    text = Path(TWO_CORES).read_text()
    faster.write_text(
        text.replace("flops_per_second = 1e9", "flops_per_second = 1e10")
        .replace("\nbytes_per_second = 1e9", "\nbytes_per_second = 1e10")
        .replace("slow", "fast")
    )
    same, other = document("simulate", plan), document("simulate", plan, "--system", faster)
    assert same["makespan_seconds"] == same["planned_seconds"] == other["planned_seconds"]
    assert other["makespan_seconds"] < same["makespan_seconds"]
    assert (
        f"{other['makespan_seconds'] * 1e3:.3f} ms"
        in hetsched_("simulate", plan, "--system", faster).stdout
    )


TEN_TASKS = Path(__file__).parents[1] / "examples" / "ten_tasks.json"


@pytest.mark.parametrize(
    ("scheduler", "makespan"), [("heft", 80), ("cpop", 86), ("exact", 73), ("portfolio", 73)]
)
def test_an_instance_is_scheduled(scheduler: str, makespan: float) -> None:
    options = ("schedule", TEN_TASKS, "--scheduler", scheduler)
    found = document(*options)
    keys = ["makespan", "lower_bound", "optimal", "slots", "solver", "wall_seconds", "history"]
    assert list(found) == keys
    assert found["makespan"] == makespan
    known = [last["makespan"] for last in found["history"][-1:]]
    assert known == [pytest.approx(makespan)] * (scheduler == "portfolio")
    assert found["lower_bound"] <= makespan
    assert found["optimal"] == (found["lower_bound"] == pytest.approx(makespan))
    assert all(list(slot) == ["task", "device", "start", "finish"] for slot in found["slots"])
    assert sorted(slot["task"] for slot in found["slots"]) == sorted(f"n{i + 1}" for i in range(10))
    text = hetsched_(*options).stdout
    assert f"makespan     {makespan} s" in text
    assert ("proved optimal" in text) == found["optimal"]


def test_links_that_contend_take_longer(tmp_path: Path) -> None:
    """Two results of one second each leave a device at once, on one link."""
    instance = {
        "devices": ["p", "q"],
        "links": [
            {"source": a, "sink": b, "seconds": 0, "bytes_per_second": 1}
            for a, b in (("p", "q"), ("q", "p"))
        ],
        "tasks": [
            {"name": "a", "seconds": {"p": 1}},
            {"name": "b", "seconds": {"q": 1}},
            {"name": "c", "seconds": {"q": 1}},
        ],
        "edges": [{"source": "a", "sink": sink, "nbytes": 5} for sink in ("b", "c")],
    }
    path = tmp_path / "instance.json"
    path.write_text(json.dumps(instance))
    assert document("schedule", path)["makespan"] == 8
    assert document("schedule", path, "--contention")["makespan"] == 12


def test_a_budget_and_a_seed_are_given_on(tmp_path: Path) -> None:
    found = document("schedule", TEN_TASKS, "--budget", "1s", "--seed", 3)
    assert found["makespan"] == 73
    line = hetsched_("schedule", TEN_TASKS, "--scheduler", "heft", "--seed", 3, status=1).stderr
    assert "seed" in line


def test_a_front_of_plans(tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    options = ("partition", BRANCH, "--system", TWO_CORES, "--front", "latency,memory", "-o", plan)
    text = hetsched_(*options).stdout
    found = document(*options)["plans"]
    values = [(item["values"]["latency"], item["values"]["memory"]) for item in found]
    assert values == sorted(values)
    assert [memory for _, memory in values] == sorted((m for _, m in values), reverse=True)
    for item in found:
        assert f"{item['values']['latency'] * 1e3:.3f}" in text
        same = document("simulate", item["file"])
        assert same["makespan_seconds"] == item["values"]["latency"]
    hetsched_(*options[:4], "--front", "latency,speed", status=1)
    # Nobody has said what these cores draw.
    hetsched_(*options[:4], "--front", "energy", status=1)


def test_a_plan_and_its_nodes_are_explained(tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    hetsched_("partition", BRANCH, "--system", TWO_CORES, "--partitioner", "task", "-o", plan)
    whole = document("explain", plan)
    text = hetsched_("explain", plan).stdout
    assert len(whole["nodes"]) == 6
    for node in whole["nodes"]:
        assert node["node"] in text
        one = document("explain", plan, node["node"])
        assert one["nodes"] == [node]
        assert {item["device"] for item in node["alternatives"]} == {"cpu:0", "cpu:1"}
        drawn = hetsched_("explain", plan, node["node"]).stdout
        (elsewhere,) = (a for a in node["alternatives"] if a["device"] != node["device"])
        assert f"{elsewhere['change'] * 1e6:+.1f}" in drawn
    assert whole["makespan_seconds"] == document("simulate", plan)["makespan_seconds"]


def test_a_package_is_explained_by_any_operation_in_it(package: Path) -> None:
    # The activation behind a convolution, which is part of its group.
    (node,) = document("explain", package, "/Relu")["nodes"]
    assert node["node"] == "/c/Conv"


def test_what_runs_took_is_held_against_the_prediction(package: Path, tmp_path: Path) -> None:
    """From run to explain, and a device that takes thrice as long is told of."""
    with pytest.MonkeyPatch.context() as patch:
        store = Store(tmp_path / "profile.sqlite")
        patch.setenv("HETSCHED_STORE", str(store.path))
        assert document("explain", package)["history"] == []
        for _ in range(2):
            document("run", package, "--repeat", 3)
        found = document("explain", package)["history"]
        text = hetsched_("explain", package).stdout
        assert found[0]["device"] is None
        assert {row["device"] for row in found[1:]} <= {"cpu:0", "cpu:1", "onnxruntime:0"}
        assert len(found) > 1
        for row in found:
            assert (row["runs"], row["drift"]) == (2, "")
            assert f"{row['measured_seconds'] * 1e3:.3f}" in text
        assert "drifts" not in text
        subject = store.residuals()[-1].subject
        for factor in (1.0, 1.0, 1.0, 1.0, 90.0):
            store.add_residual(Residual(subject, 1.0, factor, 3))
            # They are told apart by milliseconds.
            sleep(0.002)
        text = hetsched_("explain", package).stdout
        assert re.search("'.+' drifts: its parts took 90.00 x the prediction", text)


def test_two_plans_are_compared(tmp_path: Path) -> None:
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    for path, partitioner in ((a, "task"), (b, "single:device=cpu:0")):
        options = ("--system", TWO_CORES, "--partitioner", partitioner)
        hetsched_("partition", BRANCH, *options, "-o", path)
    found = document("diff", a, b)
    text = hetsched_("diff", a, b).stdout
    assert found["facts"] == {"partitioner": ["task", "single:device=cpu:0"]}
    assert found["moves"]
    for move in found["moves"]:
        assert re.search(rf"{re.escape(move['node'])} +cpu:1 +cpu:0", text)
    assert "the plans are the same" in hetsched_("diff", a, a).stdout
    assert document("diff", a, a)["same"]


def test_a_plan_is_compiled_as_it_stands(tmp_path: Path) -> None:
    plan, path = tmp_path / "plan.json", tmp_path / "m.hsp"
    options = ("--devices", two_devices(), "--partitioner", "task")
    planned = document("partition", BRANCH, *options, "-o", plan)
    compiled = document("compile", BRANCH, "-o", path, "--plan", plan)
    assert compiled["parts"] == planned["parts"]
    assert compiled["package_nbytes"] == path.stat().st_size
    hetsched_("compile", BRANCH, "-o", path, "--plan", plan, *options, status=2)


def test_run_measures_what_it_shows(package: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    found = document("run", package, "--repeat", 5, "--warmup", 1, "--trace", trace)
    latency = found["latency_seconds"]
    assert 0 < latency["min"] <= latency["median"] <= latency["p90"] <= latency["p99"]
    assert (found["runs"], found["seed"], found["inputs"]) == (5, 0, None)
    for row in (found["makespan"], *found["parts"]):
        assert row["ratio"] == pytest.approx(row["measured_seconds"] / row["predicted_seconds"])
    assert all(0 < share <= 1 for share in found["busy"].values())
    events = json.loads(trace.read_text())["traceEvents"]
    clocks = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert sorted(clocks.values()) == ["measured", "predicted"]
    slices = [event for event in events if event["ph"] == "X"]
    assert {event["pid"] for event in slices} == set(clocks)
    assert all(event["ts"] >= 0 and event["dur"] >= 0 for event in slices)
    measured = next(pid for pid, clock in clocks.items() if clock == "measured")
    ends = [event["ts"] + event["dur"] for event in slices if event["pid"] == measured]
    assert max(ends) / 1e6 == pytest.approx(found["makespan"]["measured_seconds"])


def test_overlapping_runs(package: Path, tmp_path: Path) -> None:
    for in_flight in (1, 3, 8):
        outputs = tmp_path / f"{in_flight}.npz"
        options = ("--repeat", 5, "--in-flight", in_flight, "-o", outputs, "--seed", 7)
        assert document("run", package, *options)["runs"] == 5
    with np.load(tmp_path / "1.npz") as one, np.load(tmp_path / "8.npz") as other:
        np.testing.assert_array_equal(one["logits"], other["logits"])


def test_seeded_inputs_are_said(package: Path) -> None:
    assert "inputs made from seed 4" in hetsched_("run", package, "--seed", 4).stdout


def test_verify_fails_with_status_3(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert document("verify", package)["passed"]
    monkeypatch.setattr(sys.modules["hetsched.verify"], "deviation", lambda *_: 0.5)
    result = hetsched_("verify", package, status=VerificationFailed.exit_status)
    assert "part0" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert "deviates" in result.stdout
    assert "verified" not in result.stdout
    assert not document("verify", package, status=3)["passed"]


def test_verify_takes_a_model() -> None:
    text = hetsched_("verify", BRANCH, "--devices", "cpu:0", "--partitioner", "single").stdout
    assert text.splitlines()[-1].startswith("verified: 1 part and the whole")


def test_winograd_is_an_option_of_the_devices(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    options = ("--devices", "cpu:0", "--partitioner", "single")
    hetsched_("partition", BRANCH, *options, "--winograd", "off", "-o", path)
    devices = json.loads(path.read_text())["system"]["device"]
    assert [device["target"] for device in devices] == ["cpu:winograd=off"]
    refused = hetsched_("partition", BRANCH, *options, "--winograd", "f3", status=1)
    assert "'f3' is no winograd of cpu; there are off, f2, f4, auto" in refused.stderr
    assert "--winograd" in hetsched_("compile", "--help").stdout


def test_planning_options_are_refused_for_a_package(package: Path) -> None:
    result = hetsched_("verify", package, "--devices", "cpu:0", status=2)
    assert "--devices has no effect on a package" in result.stderr


def test_profile_measures_once(tmp_path: Path) -> None:
    path = tmp_path / "p.sqlite"
    options = ("profile", BRANCH, "--devices", "cpu:0", "--store", path)
    spent = document(*options, "--budget", "0s", status=4)
    assert spent["missing"] == len(spent["kernels"])
    first, second = document(*options), document(*options, "--budget", "0s")
    assert (first["missing"], first["already"]) == (0, 0)
    assert (second["missing"], second["measured"]) == (0, 0)
    assert [row["seconds"] for row in first["kernels"]] == [
        row["seconds"] for row in second["kernels"]
    ]
    groups = [name for row in first["kernels"] for name in row["groups"]]
    assert sorted(groups) == sorted(g.name for g in hetsched.read_onnx(BRANCH).groups)
    assert "in the store already" in hetsched_(*options, "--budget", "0s").stdout
    shown = document("profile", "--show", "--store", path)
    assert {row["seconds"] for row in shown["samples"]} == {r["seconds"] for r in first["kernels"]}
    conv = document("profile", "--show", "--store", path, "--kind", "conv", "--device", "cpu")
    assert 0 < len(conv["samples"]) < len(shown["samples"])
    assert "Devices and compilers" in hetsched_("profile", "--show", "--store", path).stdout
    other = tmp_path / "other.sqlite"
    text = hetsched_("profile", "--merge", path, "--store", other).stdout
    assert f"{len(shown['samples'])} samples" in text
    assert document("profile", "--show", "--store", other)["samples"] == shown["samples"]
    assert "added nothing" in hetsched_("profile", "--merge", path, "--store", other).stdout


def test_several_models_are_profiled_as_one(tmp_path: Path) -> None:
    """A shape goes to the models that have its input; a group that both have is one kernel."""
    copy = tmp_path / "copy.onnx"
    copy.write_bytes(Path(BRANCH).read_bytes())
    cnn = str(DATA / "digits_branch.onnx")
    options = ("--devices", "cpu:0", "--budget", "0s", "--store", tmp_path / "p.sqlite")
    alone = document("profile", cnn, *options, status=4)
    both = document("profile", cnn, copy, "--shape", "image=1,1,8,8", *options, status=4)
    assert len(both["kernels"]) == len(alone["kernels"])
    names = {name for row in both["kernels"] for name in row["groups"]}
    assert {name.partition("/")[0] for name in names} == {"digits_branch", "copy"}
    told = hetsched_("profile", cnn, copy, "--shape", "other=1", *options, status=2).output
    assert "no model has an input for 'other=1'" in told


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "give a model, --show, --report or --merge"),
        (("--show", BRANCH), "give no model"),
        ((BRANCH, "--kind", "Conv"), "--kind is for --show"),
        (("--merge", BRANCH), "damaged or no profile store"),
        (("--merge", "absent.sqlite"), "there is no such file"),
        (("--show", "--store", BRANCH), "damaged or no profile store"),
    ],
)
def test_what_profile_cannot_do_is_one_line(
    arguments: tuple[str, ...], told: str, tmp_path: Path
) -> None:
    options = () if "--store" in arguments else ("--store", str(tmp_path / "p.sqlite"))
    result = CliRunner().invoke(app, ["profile", *arguments, *options])
    assert result.exit_code in (1, 2)
    assert told in result.stderr
    assert result.stderr.count("\n") == 1


def test_devices_writes_a_machine_file_that_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "machine.toml"
    found = document("devices", "--devices", two_devices(), "-o", path)
    assert System.load(path) == System.local(two_devices())
    assert {device["name"] for device in found["devices"]} >= set(two_devices().split(","))
    assert len(found["links"]) == 2
    text = hetsched_("devices", "--devices", two_devices()).stdout
    assert "GFLOP/s" in text
    assert "Links" in text


@pytest.mark.parametrize("name", ['a "b" \\ c', "π\n\t\x7f", "plain"])
def test_a_machine_file_keeps_every_value(name: str, tmp_path: Path) -> None:
    device = hetsched.Device("cpu:0", "cpu", description=name, cores=(0, 2), modelled=True)
    other = hetsched.Device("gpu", "gpu", memory_bytes=1e-7, flops_per_second=1e22)
    links = (hetsched.Link("cpu:0", "gpu", 0.1 + 0.2, float("inf")),)
    system = System(name, (device, other), links)
    path = tmp_path / "machine.toml"
    path.write_text(system.to_toml(), encoding="utf-8")
    assert System.load(path) == system


def test_progress_is_told_only_on_request() -> None:
    options = ("partition", BRANCH, "--system", TWO_CORES)
    assert hetsched_(*options).stderr == ""
    assert "pricing: " in hetsched_(*options, "--verbose").stderr


def test_a_terminal_gets_a_bar_and_stdout_stays_clean(tmp_path: Path) -> None:
    pty = pytest.importorskip("pty")
    terminal, stderr = pty.openpty()
    with (
        # Not a pipe: the terminal is read all the time, or a slow run's bar fills it and waits.
        (tmp_path / "stdout").open("wb") as stdout,
        subprocess.Popen(
            [*HETSCHED, "partition", BRANCH, "--system", TWO_CORES, "--json"],
            stdout=stdout,
            stderr=stderr,
        ) as process,
    ):
        os.close(stderr)
        shown = b""
        # A terminal that nobody holds any more ends with an error, not with nothing.
        with contextlib.suppress(OSError):
            while piece := os.read(terminal, 1 << 16):
                shown += piece
    os.close(terminal)
    assert process.returncode == 0
    assert json.loads((tmp_path / "stdout").read_bytes())["parts"]
    assert b"pricing" in shown


@pytest.mark.parametrize(
    ("text", "seconds"), [("30s", 30.0), ("10m", 600.0), ("1.5h", 5400.0), ("90", 90.0)]
)
def test_durations(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds


def test_shapes_may_have_any_name() -> None:
    assert shapes_of(["a/b:0=c=1, 3", "scalar="]) == {"a/b:0=c": (1, 3), "scalar": ()}


def test_help_has_a_sentence_and_an_example_for_each_command() -> None:
    commands = "devices quantize profile partition simulate compile run verify".split()
    listed = hetsched_("--help").stdout
    for command in commands:
        assert re.search(rf"\b{command}\b", listed)
        assert f"Example: hetsched {command}" in hetsched_(command, "--help").stdout
    assert hetsched_("--version").stdout == f"hetsched {hetsched.__version__}\n"


def test_a_closed_pipe_is_quiet() -> None:
    with subprocess.Popen(
        [*HETSCHED, "partition", BRANCH, "--system", TWO_CORES],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


@pytest.mark.parametrize("step", ["pricing: compiling Conv (3 of 6)", "compiling: part0"])
def test_an_interrupt_leaves_nothing_behind(step: str, tmp_path: Path) -> None:
    environment = os.environ | {"HETSCHED_STORE": str(tmp_path / "store" / "p.sqlite")}
    work = tmp_path / "work"
    work.mkdir()
    with subprocess.Popen(
        [*HETSCHED, "compile", BRANCH, "-o", str(work / "m.hsp"), "--devices", "cpu:0", "-v"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        start_new_session=True,
    ) as process:
        assert process.stderr
        while step not in process.stderr.readline().decode():
            assert process.poll() is None, f"it ended before '{step}'"
        process.send_signal(signal.SIGINT)
        lines = process.stderr.read().decode().splitlines()
    assert process.returncode == 130
    assert lines[-1] == "interrupted"
    assert not any("Traceback" in line for line in lines)
    assert list(work.iterdir()) == []
