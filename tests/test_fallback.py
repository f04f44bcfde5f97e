"""A device that is missing or fails: an error by name, or, where allowed, a told fallback."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from graphs import Builder
from typer.testing import CliRunner, Result

import hetsched
import hetsched.targets
from hetsched.cli import app
from hetsched.cost import Prices
from hetsched.device import Device, Link
from hetsched.errors import DeviceError, HetschedError, InfeasiblePlan, PartError
from hetsched.executable import Executable
from hetsched.graph import Graph
from hetsched.host import cores
from hetsched.plan import Plan, make_plan
from hetsched.plugin import load
from hetsched.system import System
from hetsched.target import Target

BRANCH = str(Path(__file__).parent / "data" / "digits_branch.onnx")
HERE = f"onnxruntime:{cores()[0]}"
DEVICES = f"failing:0,{HERE}"
STAGES = {
    "load": "4 GB wanted",
    "run": "does not answer",
    "receive": "no room",
    "send": "does not answer",
}
X = np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32)


@pytest.fixture(scope="module", autouse=True)
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A folder of targets in which `failing` is one."""
    folder = tmp_path_factory.mktemp("targets")
    shutil.copy(Path(__file__).parent / "failing.py", folder)
    hetsched.targets.__path__.append(str(folder))
    yield
    hetsched.targets.__path__.remove(str(folder))


@pytest.fixture
def failing() -> Iterator[ModuleType]:
    module = __import__("hetsched.targets.failing", fromlist=["failing"])
    yield module
    module.stage, module.calls_before = "", 0


def graph() -> Graph:
    """Three products, one behind the other."""
    build = Builder()
    value = build.input("x", 4, 4)
    for number in range(3):
        weight = build.constant(np.eye(4, dtype=np.float32) + number)
        value = build.op("MatMul", value, weight, name=f"product{number}")
    return build.graph(value)


def expected() -> np.ndarray:
    result = X
    for number in range(3):
        result = result @ (np.eye(4, dtype=np.float32) + number)
    return result


def plan_of(places: str, names: str = DEVICES, **replicas: tuple[str, ...]) -> Plan:
    """The three products where `places` says, each the number of a device."""
    model = graph()
    devices = tuple(load(Target, name.partition(":")[0]).device(name) for name in names.split(","))
    links = tuple(Link(a.name, b.name, 1e-6, 1e9) for a in devices for b in devices if a != b)
    groups = [group.name for group in model.groups]
    prices = Prices(
        "said",
        {name: {device.name: 1e-6 for device in devices} for name in groups},
        {name: {} for name in groups},
    )
    placement = {name: devices[int(place)].name for name, place in zip(groups, places, strict=True)}
    system = System("said", devices, links)
    return make_plan(model, system, prices, placement, groups, "said")


def compiled(plan: Plan, told: list[str] | None) -> Executable:
    return hetsched.compile(plan, fallback=None if told is None else told.append)


def right(outputs: Mapping[str, np.ndarray]) -> None:
    (result,) = outputs.values()
    np.testing.assert_allclose(result, expected(), rtol=1e-5)


def by_run(executable: Executable) -> Mapping[str, np.ndarray]:
    return executable.run({"x": X})


def by_bind(executable: Executable) -> Mapping[str, np.ndarray]:
    call = executable.bind({"x": X})
    call()
    return call()


def by_submit(executable: Executable) -> Mapping[str, np.ndarray]:
    inputs = {"x": X}
    requests = [executable.submit(inputs) for _ in range(4)]
    # What the caller does with the mapping is of no account, even for a run that begins again.
    inputs.clear()
    for request in requests:
        right(request.result(20))
    return requests[-1].result()


WAYS = [by_run, by_bind, by_submit]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("places", ["010", "000"])
def test_a_run_goes_on_where_that_is_allowed(
    failing: ModuleType,
    stage: str,
    places: str,
    way: Callable[[Executable], Mapping[str, np.ndarray]],
) -> None:
    told: list[str] = []
    with compiled(plan_of(places), told) as executable:
        failing.stage = stage
        right(way(executable))
        assert executable.plan.devices == (HERE,)
        assert executable.plan.notes[-1:] == tuple(told)
        right(by_run(executable))
        assert {slot.device for slot in executable.schedule.slots} == {HERE}
    (line,) = told
    assert line.startswith("'failing:0': ")
    assert STAGES[stage] in line
    assert line.endswith(f"its parts run on '{HERE}'")
    assert "\n" not in line


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("stage", STAGES)
def test_it_is_an_error_by_name_where_it_is_not_allowed(
    failing: ModuleType,
    stage: str,
    way: Callable[[Executable], Mapping[str, np.ndarray]],
) -> None:
    with compiled(plan_of("010"), None) as executable:
        failing.stage = stage
        with pytest.raises((DeviceError, PartError), match=STAGES[stage]):
            way(executable)
        assert executable.plan.devices == ("failing:0", HERE)


def test_a_device_that_is_lost_after_some_runs(failing: ModuleType) -> None:
    told: list[str] = []
    with compiled(plan_of("010"), told) as executable:
        failing.stage, failing.calls_before = "run", 7
        many = [{"x": X + number} for number in range(9)]
        found = list(executable.map(many, in_flight=3))
        assert len(told) == 1
        weights = [np.eye(4, dtype=np.float32) + number for number in range(3)]
        for inputs, outputs in zip(many, found, strict=True):
            right_one = inputs["x"] @ weights[0] @ weights[1] @ weights[2]
            np.testing.assert_allclose(next(iter(outputs.values())), right_one, rtol=1e-5)


def test_a_device_that_cannot_build_is_left_when_it_compiles(failing: ModuleType) -> None:
    failing.stage = "compile"
    with pytest.raises(DeviceError, match="no such type"):
        compiled(plan_of("010"), None)
    told: list[str] = []
    with compiled(plan_of("010"), told) as executable:
        right(executable.run({"x": X}))
        assert executable.plan.devices == (HERE,)
        assert told == list(executable.plan.notes)


def test_no_other_device_is_an_error(failing: ModuleType) -> None:
    told: list[str] = []
    plan = plan_of("000")
    prices = plan.prices.without(["product1"], HERE, "too large")
    with compiled(replace(plan, prices=prices), told) as executable:
        failing.stage = "run"
        with pytest.raises(DeviceError, match=r"does not answer.*no fallback.*no other device"):
            executable.run({"x": X})
    assert told == []


def test_other_errors_are_no_reason_to_go_on(failing: ModuleType) -> None:
    told: list[str] = []
    with compiled(plan_of("010"), told) as executable:
        with pytest.raises(HetschedError, match="float32"):
            executable.run({"x": X[:2]})
        failing.reach = _wrong
        try:
            with pytest.raises(PartError, match="of its own"):
                executable.run({"x": X})
        finally:
            del failing.reach
            __import__("importlib").reload(failing)
    assert told == []


def _wrong(name: str, error: Exception) -> None:
    if name == "run":
        raise ValueError("a fault of its own")


def test_the_next_of_the_list_takes_over(failing: ModuleType) -> None:
    names = f"{HERE},failing:0,reference:{cores()[0]}"
    plan = plan_of("010", names)
    last = plan.without("failing:0", "gone")
    assert last.devices == (HERE, f"reference:{cores()[0]}")
    # Behind the last comes the first.
    first = plan_of("121", names).without(f"reference:{cores()[0]}", "gone")
    assert first.devices == (HERE, "failing:0")
    assert [part.name for part in first.parts] == [part.name for part in plan.parts]
    with pytest.raises(InfeasiblePlan, match="no other device"):
        plan_of("000", HERE).without(HERE, "gone")


def test_a_group_goes_where_it_can_run(failing: ModuleType) -> None:
    names = f"failing:0,{HERE},reference:{cores()[0]}"
    plan = plan_of("000", names)
    prices = plan.prices.without(["product1"], HERE, "too large")
    moved = replace(plan, prices=prices).without("failing:0", "gone")
    assert moved.placement["product1"] == f"reference:{cores()[0]}"
    assert {moved.placement["product0"], moved.placement["product2"]} == {HERE}


def described(*names: str) -> tuple[Device, ...]:
    return tuple(Device(name, "imagined") for name in names)


def replicated(replicas: Mapping[str, tuple[str, ...]]) -> Plan:
    model = graph()
    devices = described("a", "b", "c", "d")
    links = tuple(Link(p.name, q.name, 1e-6, 1e9) for p in devices for q in devices if p != q)
    groups = [group.name for group in model.groups]
    prices = Prices(
        "said",
        {name: {device.name: 1e-6 for device in devices} for name in groups},
        {name: {} for name in groups},
    )
    placement = dict(zip(groups, "aac", strict=True))
    return Plan(
        model,
        System("said", devices, links),
        placement,
        tuple(groups),
        prices,
        "said",
        replicas=replicas,
    )


@pytest.mark.parametrize(
    ("lost", "places", "replicas"),
    [
        ("a", "bbc", {}),
        ("b", "aac", {}),
        # What shares no parts takes no turns with others.
        ("c", "aad", {}),
    ],
)
def test_replicas_take_over(lost: str, places: str, replicas: object) -> None:
    plan = replicated({"a": ("a", "b")}).without(lost, "gone")
    assert "".join(plan.placement[name] for name in plan.order) == places
    assert plan.replicas == replicas
    assert "its parts run on" in plan.notes[-1]


def test_of_three_replicas_two_go_on() -> None:
    plan = replicated({"a": ("a", "b", "d", "b")}).without("a", "gone")
    assert plan.replicas == {"b": ("b", "d", "b")}


def test_a_device_that_is_not_here_is_left_out(failing: ModuleType) -> None:
    for stage, reason in {"unavailable": "no platform", "device": "there are none"}.items():
        failing.stage = stage
        with pytest.raises(DeviceError, match=reason):
            System.local(DEVICES)
        told: list[str] = []
        for names in (DEVICES, f"{HERE},failing:0"):
            assert [d.name for d in System.local(names, fallback=told.append).devices] == [HERE]
        assert reason in told[0]
        assert "failing:0" in told[0]
        assert told[0].endswith("; it is left out")
        assert told[0] == told[1]
        with pytest.raises(DeviceError, match=reason):
            System.local("failing:0", fallback=told.append)


def test_a_device_that_fails_while_it_is_measured_is_left_out(failing: ModuleType) -> None:
    failing.stage = "run"
    system = plan_of("010").system
    with pytest.raises(HetschedError, match="does not answer"):
        hetsched.partition(graph(), system, "single", cost_model="profiled")
    told: list[str] = []
    plan = hetsched.partition(
        graph(), system, "single", cost_model="profiled", fallback=told.append
    )
    assert plan.devices == (HERE,)
    assert told == ["'failing:0': it does not answer; it is left out"]


def command(*arguments: object, status: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(item) for item in arguments], catch_exceptions=False)
    assert result.exit_code == status, result.output
    return result


@pytest.fixture
def package(tmp_path: Path, failing: ModuleType) -> Path:
    path = tmp_path / "m.hsp"
    compiled(plan_of("010"), None).save(path)
    return path


@pytest.mark.parametrize("stage", ["unavailable", *STAGES])
def test_the_command_run(failing: ModuleType, package: Path, stage: str) -> None:
    failing.stage = stage
    alone = command("run", package, "--repeat", 3, status=1)
    assert alone.stderr.count("\n") == 1
    assert alone.stderr.startswith("error: ")
    assert "failing:0" in alone.stderr
    allowed = command("run", package, "--repeat", 3, "--fallback", "--json")
    document = json.loads(allowed.stdout)
    (line,) = document["fallback"]
    assert allowed.stderr == f"fallback: {line}\n"
    assert "failing:0" in line
    assert {row["device"] for row in document["parts"]} == {HERE}


def test_a_device_that_fails_in_the_middle_is_not_among_the_times(
    failing: ModuleType, package: Path
) -> None:
    failing.stage, failing.calls_before = "run", 9
    document = json.loads(
        command("run", package, "--repeat", 20, "--warmup", 1, "--fallback", "--json").stdout
    )
    assert len(document["fallback"]) == 1
    assert document["runs"] == 20
    assert set(document["busy"]) == {HERE}


def test_reports_of_runs_tell_the_hardware_that_ran(failing: ModuleType, package: Path) -> None:
    """Not that of the machine where the package was made, nor what has failed."""
    plan = hetsched.load(package).plan
    system = plan.system
    said = tuple(replace(device, description="another machine") for device in system.devices)
    plan = replace(plan, system=replace(system, devices=said))
    compiled(plan, None).save(package)
    here = load(Target, "onnxruntime").device(HERE).description
    for verb in ("run", "verify"):
        document = json.loads(command(verb, package, "--json").stdout)
        assert document["hardware"] == {"failing:0": here, HERE: here}
    failing.stage = "run"
    document = json.loads(command("run", package, "--fallback", "--json").stdout)
    assert document["hardware"] == {HERE: here}


def test_the_command_verify(failing: ModuleType, package: Path) -> None:
    failing.stage = "load"
    assert "failing:0" in command("verify", package, status=3).output
    result = command("verify", package, "--fallback", "--json")
    document = json.loads(result.stdout)
    assert document["passed"]
    assert result.stderr == f"fallback: {document['fallback'][0]}\n"
    assert {row["device"] for row in document["comparisons"]} == {HERE}


def test_the_command_compile(failing: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "m.hsp"
    failing.stage = "unavailable"
    options = ("-o", path, "--devices", DEVICES, "--partitioner", "single")
    alone = command("compile", BRANCH, *options, status=1)
    assert alone.stderr == "error: 'failing:0' is not available: no platform\n"
    assert not path.exists()
    result = command("compile", BRANCH, *options, "--fallback", "--json")
    assert json.loads(result.stdout)["fallback"] == [
        "'failing:0' is not available: no platform; it is left out"
    ]
    assert result.stderr.count("\n") == 1
    assert hetsched.load(path).plan.devices == (HERE,)
    both = command("compile", BRANCH, *options, "--fallback", "--strict", status=2)
    assert "--strict forbids" in both.stderr


def test_a_package_for_opencl_where_there_is_no_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: ModuleType
) -> None:
    target = load(Target, "opencl")
    if reason := target.unavailable():
        pytest.skip(reason)
    name = f"opencl:0@{cores()[0]}" if target.device("opencl:0").cores else "opencl:0"
    path = tmp_path / "m.hsp"
    compiled(plan_of("010", f"{HERE},{name}"), None).save(path)
    here = command("run", path, "--repeat", 1, "--json")
    assert json.loads(here.stdout)["hardware"][name] == target.device(name).description
    monkeypatch.setenv("OCL_ICD_VENDORS", str(tmp_path))
    alone = command("run", path, status=1)
    assert alone.stderr == f"error: no device '{name}': there is no OpenCL device here\n"
    allowed = command("run", path, "--repeat", 1, "--fallback", "--json")
    assert allowed.stderr == (
        f"fallback: no device '{name}': there is no OpenCL device here; its parts run on '{HERE}'\n"
    )
    assert {row["device"] for row in json.loads(allowed.stdout)["parts"]} == {HERE}
