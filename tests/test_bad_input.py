"""What the command line cannot serve: one line on stderr, the right status, and no file left."""

import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from hetsched.cli import app

DATA = Path(__file__).parent / "data"
BRANCH = DATA / "digits_branch.onnx"
TWO_CORES = DATA / "two_cores.toml"
ON_TWO_CORES = ("--system", TWO_CORES)
HETSCHED = [sys.executable, "-c", "from hetsched.cli import main; main()"]


@pytest.fixture(scope="module", autouse=True)
def _store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HETSCHED_STORE", str(tmp_path_factory.mktemp("store") / "profile.sqlite"))
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package and its plan, to be damaged in copies."""
    folder = tmp_path_factory.mktemp("whole")
    options = ("--devices", "cpu:0", "--partitioner", "single")
    for command in (
        ("partition", BRANCH, "-o", folder / "plan.json", *options),
        ("compile", BRANCH, "-o", folder / "whole.hsp", *options),
    ):
        result = CliRunner().invoke(app, list(map(str, command)), catch_exceptions=False)
        assert result.exit_code == 0, result.output
    return folder / "whole.hsp"


@pytest.fixture
def refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[..., str]]:
    """Runs a command that must fail, and gives its one line; nothing may be written in `out`."""
    out = tmp_path / "out"
    out.mkdir()

    def run(*arguments: object, status: int = 1) -> str:
        before = sorted(tmp_path.rglob("*"))
        command = [str(item) for item in arguments]
        result = CliRunner().invoke(app, command, catch_exceptions=False)
        assert result.exit_code == status, result.output
        assert result.stdout == ""
        # What libraries write past Python counts too.
        lines = (result.stderr + capfd.readouterr().err).splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")
        assert "Traceback" not in lines[0]
        assert sorted(tmp_path.rglob("*")) == before
        return lines[0]

    yield run
    assert list(out.iterdir()) == []


def _model(
    nodes: list[onnx.NodeProto],
    shape: tuple[int | str, ...] = (1, 4),
    initializers: tuple[TensorProto, ...] = (),
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "bad",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        list(initializers),
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def _cyclic() -> bytes:
    nodes = [
        helper.make_node("Add", ["x", "b"], ["a"], "first"),
        helper.make_node("Relu", ["a"], ["b"], "second"),
        helper.make_node("Relu", ["b"], ["y"], "third"),
    ]
    return _model(nodes).SerializeToString()


def _without_external_data() -> bytes:
    weights = numpy_helper.from_array(np.ones((4, 4), np.float32), "w")
    weights.ClearField("raw_data")
    weights.data_location = TensorProto.EXTERNAL
    weights.external_data.add(key="location", value="nowhere.bin")
    node = helper.make_node("MatMul", ["x", "w"], ["y"], "product")
    return _model([node], initializers=(weights,)).SerializeToString()


def _open_shape() -> bytes:
    return _model([helper.make_node("Relu", ["x"], ["y"], "r")], ("batch", 4)).SerializeToString()


def _unknown_operator() -> bytes:
    return _model([helper.make_node("Frobnicate", ["x"], ["y"], "frob")]).SerializeToString()


MODELS: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "empty"),
    "random": (lambda: np.random.default_rng(0).bytes(5000), "ONNX"),
    "truncated": (lambda: BRANCH.read_bytes()[:7000], "ONNX"),
    "text": (lambda: b"name = 'no model'\n" * 40, "ONNX"),
    "cyclic": (_cyclic, "cycle"),
    "external data": (_without_external_data, "nowhere.bin"),
    "open shape": (_open_shape, "--shape x="),
    "unknown operator": (_unknown_operator, "Frobnicate"),
}


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, refused: Callable[..., str], tmp_path: Path) -> None:
    make, said = MODELS[name]
    path = tmp_path / "model.onnx"
    path.write_bytes(make())
    line = refused("compile", path, "-o", tmp_path / "out" / "m.hsp", *ON_TWO_CORES)
    assert str(path) in line
    assert said in line
    refused("verify", path, *ON_TWO_CORES)


def test_no_model_there(refused: Callable[..., str], tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing.onnx", BRANCH / "below"):
        assert str(path) in refused("partition", path, *ON_TWO_CORES)


@pytest.mark.parametrize("shape", ["x", "=1,2", "x=1,a", "x=1,,2", "x=-1", "x=1.5", "", "x=1,²"])
def test_malformed_shape(shape: str, refused: Callable[..., str]) -> None:
    assert "--shape" in refused("partition", BRANCH, "--shape", shape, status=2)


@pytest.mark.parametrize("shape", ["image=1,1,8,9", "image=1,8", "other=1,2", "image=0,1,8,8"])
def test_shape_that_does_not_fit(shape: str, refused: Callable[..., str]) -> None:
    assert shape.partition("=")[0] in refused("partition", BRANCH, "--shape", shape, *ON_TWO_CORES)


OPTIONS = {
    "absent core": (("--devices", "cpu:99"), "cpu:99"),
    "malformed core": (("--devices", "cpu:x"), "cpu:x"),
    "unknown target": (("--devices", "tpu:0"), "tpu"),
    "no device": (("--devices", ","), "device"),
    "device twice": (("--devices", "cpu:0,cpu:0"), "cpu:0"),
    "unknown partitioner": (("--partitioner", "heft", *ON_TWO_CORES), "heft"),
    "unknown option": (("--partitioner", "single:depth=3", *ON_TWO_CORES), "depth=3"),
    "unknown device": (("--partitioner", "single:device=gpu", *ON_TWO_CORES), "gpu"),
    "unknown objective": (("--objective", "beauty", *ON_TWO_CORES), "beauty"),
    "unknown cost model": (("--cost-model", "oracle", *ON_TWO_CORES), "oracle"),
    "path as name": (("--partitioner", "../auto", *ON_TWO_CORES), "../auto"),
    "no machine file": (("--system", "missing.toml"), "missing.toml"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name: str, refused: Callable[..., str], tmp_path: Path) -> None:
    options, said = OPTIONS[name]
    assert said in refused("compile", BRANCH, "-o", tmp_path / "out" / "m.hsp", *options)


def test_usage(refused: Callable[..., str], tmp_path: Path) -> None:
    for command in (
        ("partition",),
        ("frobnicate",),
        ("partition", BRANCH, "--frobnicate"),
        ("partition", BRANCH, "--devices", "cpu:0", *ON_TWO_CORES),
        ("compile", BRANCH),
        ("run", "m.hsp", "--repeat", "0"),
        ("run", "m.hsp", "--repeat", "many"),
        ("profile", BRANCH, "--budget", "soon"),
        ("profile", BRANCH, "--budget", "nan"),
        ("profile", BRANCH, "--budget", "-3s"),
    ):
        refused(*command, status=2)


def test_an_operation_for_one_device_only(refused: Callable[..., str], tmp_path: Path) -> None:
    """What no device can run is named; a device that can run it is enough, unless under strict."""
    node = helper.make_node("Det", ["x"], ["y"], "determinant")
    path = tmp_path / "model.onnx"
    path.write_bytes(_model([node], (3, 4, 4)).SerializeToString())
    line = refused("compile", path, "-o", tmp_path / "out" / "m.hsp", "--devices", "cpu:0")
    assert "Det" in line
    assert "determinant" in line
    assert "onnxruntime:0" in line
    both = ("--devices", "cpu:0,onnxruntime:0", "--cost-model", "roofline")
    refused("partition", path, "--strict", *both)
    result = CliRunner().invoke(app, ["partition", str(path), *both], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "Refused" in result.stdout
    assert "determinant" in result.stdout


def _arrays(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


IMAGE = np.zeros((1, 1, 8, 8), np.float32)
ARRAYS: dict[str, dict[str, np.ndarray]] = {
    "dtype": {"image": IMAGE.astype(np.float64)},
    "shape": {"image": IMAGE[..., :7]},
    "name": {"picture": IMAGE},
    "one too many": {"image": IMAGE, "mask": IMAGE},
    "none": {},
    "objects": {"image": np.array([{}], dtype=object)},
}


@pytest.mark.parametrize("name", ARRAYS)
def test_input_arrays(name: str, whole: Path, refused: Callable[..., str], tmp_path: Path) -> None:
    given, out = _arrays(tmp_path / "in.npz", **ARRAYS[name]), tmp_path / "out"
    line = refused("run", whole, "-i", given, "-o", out / "o.npz", "--trace", out / "t.json")
    assert "image" in line or "picture" in line or "mask" in line or str(given) in line
    refused("verify", whole, "-i", given)


def test_input_files(whole: Path, refused: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "in.npz"
    good = _arrays(tmp_path / "good.npz", image=IMAGE).read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    for content in (b"", b"nonsense", good[: len(good) // 2], good[:-1], bytes(flipped)):
        path.write_bytes(content)
        assert str(path) in refused("run", whole, "-i", path)
    np.save(tmp_path / "one.npy", IMAGE)
    for other in (tmp_path / "one.npy", tmp_path, tmp_path / "missing.npz"):
        assert str(other) in refused("run", whole, "-i", other)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.9999])
def test_truncated_package(
    share: float, whole: Path, refused: Callable[..., str], tmp_path: Path
) -> None:
    content = whole.read_bytes()
    path = tmp_path / "cut.hsp"
    path.write_bytes(content[: int(len(content) * share)])
    assert str(path) in refused("run", path, "-o", tmp_path / "out" / "o.npz")
    assert str(path) in refused("verify", path)


def test_a_flipped_byte_in_each_member(
    whole: Path, refused: Callable[..., str], tmp_path: Path
) -> None:
    content = whole.read_bytes()
    path = tmp_path / "flipped.hsp"
    with zipfile.ZipFile(whole) as archive:
        members = [(item.filename, archive.read(item)) for item in archive.infolist()]
    assert len(members) >= 5
    for name, data in members:
        start = content.index(data)
        for position in {start, start + len(data) // 2, start + len(data) - 1}:
            flipped = bytearray(content)
            flipped[position] ^= 0x20
            path.write_bytes(flipped)
            assert str(path) in refused("verify", path), name
            # A run reads the weights of the parts, which come first, and not those of the model.
            if name != "weights.bin" or position == start:
                assert str(path) in refused("run", path), name


def _rewritten(whole: Path, path: Path, edit: Callable[[dict[str, bytes]], None]) -> Path:
    """The package with edited members and a manifest that has their digests."""
    with zipfile.ZipFile(whole) as archive:
        members = {item.filename: archive.read(item) for item in archive.infolist()}
    edit(members)
    manifest = json.loads(members["manifest.json"])
    for name, data in members.items():
        if name in manifest.get("members", {}):
            manifest["members"][name] = hashlib.sha256(data).hexdigest()
    text = json.dumps(manifest).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, text if name == "manifest.json" else data)
        archive.comment = hashlib.sha256(text).hexdigest().encode()
    return path


def _edited_manifest(**values: Any) -> Callable[[dict[str, bytes]], None]:
    def edit(members: dict[str, bytes]) -> None:
        content = json.loads(members["manifest.json"]) | values
        members["manifest.json"] = json.dumps(content).encode()

    return edit


def _edited_plan(edit: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, bytes]], None]:
    def edit_members(members: dict[str, bytes]) -> None:
        content = json.loads(members["plan.json"])
        edit(content)
        members["plan.json"] = json.dumps(content).encode()

    return edit_members


PACKAGES: dict[str, tuple[Callable[[dict[str, bytes]], object], str]] = {
    "newer format": (_edited_manifest(version=99), "99"),
    "foreign format": (_edited_manifest(format="other"), "no package"),
    "no parts": (_edited_manifest(parts=[]), "damaged"),
    "parts of another kind": (_edited_manifest(parts=3), "damaged"),
    "arrays of another kind": (_edited_manifest(arrays=[["a", "b", "c"]]), "damaged"),
    "arrays out of bounds": (_edited_manifest(arrays=[[0, "float32", [1 << 40]]]), "damaged"),
    "missing member": (lambda members: members.pop("plan.json"), "plan.json"),
    "no weights": (lambda members: members.pop("weights.bin"), "weights.bin"),
    "no manifest in effect": (
        lambda members: members.update({"manifest.json": b"{}"}),
        "no package",
    ),
    "other model": (lambda members: members.update({"model.onnx": b"\x00\xff"}), "damaged"),
    "plan no JSON": (lambda members: members.update({"plan.json": b"{"}), "damaged"),
    "plan of a newer format": (_edited_plan(lambda plan: plan.update(version=99)), "99"),
    "plan with a device more": (
        _edited_plan(lambda plan: plan["parts"][0].update(device="cpu:7")),
        "cpu:7",
    ),
    "plan with a part less": (_edited_plan(lambda plan: plan["parts"].pop()), "damaged"),
    "plan with a task less": (_edited_plan(lambda plan: plan["tasks"].pop()), "damaged"),
    "plan in another order": (
        _edited_plan(lambda plan: plan["parts"][0]["tasks"].reverse()),
        "damaged",
    ),
    "code cut": (
        lambda members: members.update(
            {name: data[: len(data) // 2] for name, data in members.items() if "/part0/" in name}
        ),
        "damaged",
    ),
}


@pytest.mark.parametrize("name", PACKAGES)
def test_edited_package(
    name: str, whole: Path, refused: Callable[..., str], tmp_path: Path
) -> None:
    edit, said = PACKAGES[name]
    path = _rewritten(whole, tmp_path / "edited.hsp", edit)  # type: ignore[arg-type]
    assert said in refused("run", path, "-o", tmp_path / "out" / "o.npz")


def test_a_rewritten_package_is_served(whole: Path, tmp_path: Path) -> None:
    """The edits above are refused for what they change, not for being written anew."""
    path = _rewritten(whole, tmp_path / "same.hsp", lambda members: None)
    result = CliRunner().invoke(app, ["verify", str(path)], catch_exceptions=False)
    assert result.exit_code == 0, result.output


def test_no_package_there(refused: Callable[..., str], tmp_path: Path) -> None:
    archive = tmp_path / "some.hsp"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("readme", "no package")
    for path in (tmp_path, tmp_path / "missing.hsp", BRANCH, archive):
        assert str(path) in refused("run", path)


PLANS: dict[str, Callable[[dict[str, Any]], object]] = {
    "no parts": lambda plan: plan.pop("parts"),
    "no system": lambda plan: plan.pop("system"),
    "newer": lambda plan: plan.update(version=99),
    "device more": lambda plan: plan["parts"][0].update(device="cpu:7"),
    "task more": lambda plan: plan["parts"][0]["tasks"].append("no such"),
    "task twice": lambda plan: plan["parts"][0]["tasks"].append(plan["parts"][0]["tasks"][0]),
    "edge to nowhere": lambda plan: plan["edges"][0].update(sink="no such"),
    "parts of no order": lambda plan: plan["edges"].append(
        plan["edges"][0] | {"source": plan["tasks"][-1]["name"], "sink": plan["tasks"][0]["name"]}
    ),
    "no number": lambda plan: plan["tasks"][0].update(seconds={"cpu:0": float("nan")}),
    "price of text": lambda plan: plan["tasks"][0].update(seconds={"cpu:0": "soon"}),
    "tasks of numbers": lambda plan: plan.update(tasks=[1, 2]),
    "no price": lambda plan: plan["tasks"][0].update(seconds={}),
    "circle": lambda plan: plan["parts"][0]["tasks"].reverse(),
    "parts of nothing": lambda plan: plan["parts"].append(
        {"name": "p", "device": "cpu:0", "label": "", "tasks": []}
    ),
}


@pytest.mark.parametrize("name", PLANS)
def test_edited_plan(name: str, whole: Path, refused: Callable[..., str], tmp_path: Path) -> None:
    plan = json.loads((whole.parent / "plan.json").read_text())
    PLANS[name](plan)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan))
    assert str(path) in refused("simulate", path)
    out = tmp_path / "out" / "m.hsp"
    assert str(path) in refused("compile", BRANCH, "-o", out, "--plan", path)


def test_plans_to_explain_and_compare(
    whole: Path, refused: Callable[..., str], tmp_path: Path
) -> None:
    good, bad = whole.parent / "plan.json", tmp_path / "bad.json"
    bad.write_text("{}")
    for other in (bad, tmp_path / "missing.json"):
        assert str(other) in refused("explain", other)
        assert str(other) in refused("diff", good, other)
        assert str(other) in refused("diff", other, good)
    (tmp_path / "bad.hsp").write_bytes(b"PK")
    assert "bad.hsp" in refused("explain", tmp_path / "bad.hsp")
    assert "no node 'nothing' in the plan; there are" in refused("explain", good, "nothing")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON"),
        ('{"devices": []}', "instance lacks 'tasks'"),
        ('{"devices": ["a"], "tasks": [{"name": "t", "seconds": {}}]}', "no device can run 't'"),
    ],
)
def test_instances(text: str, message: str, refused: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "instance.json"
    path.write_text(text)
    line = refused("schedule", path)
    assert str(path) in line
    assert message in line


def test_no_plan_there(whole: Path, refused: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    good = (whole.parent / "plan.json").read_bytes()
    for content in (b"", b"[]", b"null", b"\xff\xfe", good[: len(good) // 2], b"[" * 100_000):
        path.write_bytes(content)
        assert str(path) in refused("simulate", path)
    for other in (tmp_path, tmp_path / "missing.json"):
        assert str(other) in refused("simulate", other)
    other = whole.parent / "plan.json"
    out = tmp_path / "out" / "m.hsp"
    line = refused("compile", DATA / "digits_cnn.onnx", "-o", out, "--plan", other)
    assert "belongs to" in line


MACHINES = {
    "empty": "",
    "no TOML": "device = [",
    "no device": 'name = "x"',
    "unknown key": '[[device]]\nname = "cpu:0"\ntarget = "cpu"\nspeed = 3\n',
    "unknown table": '[[engine]]\nname = "cpu:0"\n',
    "device no table": "device = 3",
    "without a target": '[[device]]\nname = "cpu:0"\n',
    "negative": '[[device]]\nname = "a"\ntarget = "cpu"\nflops_per_second = -1.0\n',
    "not a number": '[[device]]\nname = "a"\ntarget = "cpu"\nflops_per_second = nan\n',
    "zero speed": '[[device]]\nname = "a"\ntarget = "cpu"\nflops_per_second = 0\n',
    "text for number": '[[device]]\nname = "a"\ntarget = "cpu"\nmemory_bytes = "much"\n',
    "unknown target": '[[device]]\nname = "a"\ntarget = "abacus"\n',
    "too small": '[[device]]\nname = "a"\ntarget = "cpu"\nmemory_bytes = 10\n',
    "link to nowhere": (
        '[[device]]\nname = "a"\ntarget = "cpu"\n'
        '[[link]]\nsource = "a"\nsink = "b"\nseconds = 0\nbytes_per_second = 1\n'
    ),
    "slow link": (
        '[[device]]\nname = "a"\ntarget = "cpu"\n[[device]]\nname = "b"\ntarget = "cpu"\n'
        '[[link]]\nsource = "a"\nsink = "b"\nseconds = 0\nbytes_per_second = 0\n'
        '[[link]]\nsource = "b"\nsink = "a"\nseconds = 0\nbytes_per_second = 0\n'
    ),
}


@pytest.mark.parametrize("name", MACHINES)
def test_machine_files(name: str, refused: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "machine.toml"
    path.write_text(MACHINES[name])
    out = tmp_path / "out" / "plan.json"
    line = refused("partition", BRANCH, "--system", path, "-o", out)
    assert str(path) in line or name in ("too small", "unknown target")


def test_machine_file_that_is_no_text(refused: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "machine.toml"
    path.write_bytes(b"\xff\xfe\x00")
    assert str(path) in refused("partition", BRANCH, "--system", path)


def test_damaged_profile_store(refused: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "p.sqlite"
    folder = tmp_path / "folder"
    folder.mkdir()
    path.write_bytes(b"this is no database " * 100)
    for store in (path, folder, BRANCH / "p.sqlite"):
        options = ("--devices", "cpu:0", "--store", store)
        assert str(store) in refused("partition", BRANCH, *options)
        assert str(store) in refused("profile", BRANCH, *options)


def test_folders_that_take_no_file(
    whole: Path, refused: Callable[..., str], tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for out in (file / "o", tmp_path / "missing" / "o", tmp_path):
        for command in (
            ("partition", BRANCH, *ON_TWO_CORES, "-o", out),
            ("compile", BRANCH, *ON_TWO_CORES, "-o", out),
            ("run", whole, "-o", out),
            ("run", whole, "--trace", out),
            ("devices", "--devices", "cpu:0", "-o", out),
        ):
            assert f"cannot write '{out}'" in refused(*command)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk(whole: Path, refused: Callable[..., str]) -> None:
    for command in (
        ("partition", BRANCH, *ON_TWO_CORES, "-o"),
        ("compile", BRANCH, "--devices", "cpu:0", "-o"),
        ("run", whole, "-o"),
        ("run", whole, "--trace"),
        ("devices", "--devices", "cpu:0", "-o"),
    ):
        assert "No space left" in refused(*command, "/dev/full")
    assert Path("/dev/full").is_char_device()


def test_a_disk_that_fills_up_keeps_the_old_file(whole: Path, tmp_path: Path) -> None:
    """Beyond a limit on file sizes every write fails, as on a full disk."""
    path = tmp_path / "m.hsp"
    shutil.copy(whole, path)
    before = path.read_bytes()
    # What a device costs to start is measured once, and kept in the store.
    known = CliRunner().invoke(app, ["devices", "--devices", "onnxruntime:0"])
    assert known.exit_code == 0

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    for command in (
        ("partition", BRANCH, *ON_TWO_CORES, "-o", path),
        ("compile", BRANCH, "--devices", "onnxruntime:0", "--cost-model", "roofline", "-o", path),
    ):
        result = subprocess.run(
            [*HETSCHED, *map(str, command)],
            capture_output=True,
            text=True,
            preexec_fn=limit,
            check=False,
        )
        assert (result.returncode, result.stdout) == (1, "")
        assert result.stderr == f"error: cannot write '{path}': File too large\n"
        assert path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [path]


def test_a_link_is_written_through(tmp_path: Path) -> None:
    target, link = tmp_path / "plan.json", tmp_path / "link.json"
    link.symlink_to(target)
    command = ["partition", str(BRANCH), *map(str, ON_TWO_CORES), "-o", str(link)]
    assert CliRunner().invoke(app, command, catch_exceptions=False).exit_code == 0
    assert link.is_symlink()
    assert json.loads(target.read_text())["format"] == "hetsched-plan"
    assert os.listdir(tmp_path) in (["plan.json", "link.json"], ["link.json", "plan.json"])
