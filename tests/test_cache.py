"""The cache of compiled parts: the same code as the first time, and never a reason to fail."""

import multiprocessing
import os
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from graphs import Builder

import hetsched
from hetsched import cache
from hetsched.cache import Cache, compiled, default_cache, refusals
from hetsched.compiler import compile_parts
from hetsched.cost import price
from hetsched.cost import refusals as reasons
from hetsched.cost_models.roofline import Roofline
from hetsched.device import Device
from hetsched.errors import CompileError
from hetsched.graph import Graph
from hetsched.plugin import load
from hetsched.store import default_path
from hetsched.system import System
from hetsched.target import Artifact, Target

DEVICE = Device("d", "t", isa="any")
FORK = multiprocessing.get_context("fork")


@dataclass(eq=False)
class Counting(Target):
    """A target that counts what it is asked."""

    text: str = "1"
    setting: str | None = "plain"
    compiled: int = field(default=0, repr=False)
    asked: int = field(default=0, repr=False)

    def version(self) -> str:
        return self.text

    def settings(self, device: Device) -> str | None:
        return self.setting

    def unavailable(self) -> str | None:
        return None

    def refusal(self, graph: Graph, device: Device) -> str | None:
        self.asked += 1
        return "no" if graph.ops[0].kind == "Softmax" else None

    def compile(self, graph: Graph, device: Device) -> Artifact:
        self.compiled += 1
        weights = {name: array * 2 for name, array in graph.constants.items()}
        return Artifact({"code": graph.name.encode()}, weights, requires="much")


for method in ("devices", "device", "load"):
    setattr(Counting, method, None)
Counting.__abstractmethods__ = frozenset()


def product(weight: float = 1.0, size: int = 64, name: str = "part") -> Graph:
    build = Builder()
    x = build.input("x", 2, size)
    wide = build.constant(np.full((size, size), weight, np.float32), "w")
    return build.graph(build.op("MatMul", x, wide, shape=(2, size)), name=name)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HETSCHED_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def same(left: Artifact, right: Artifact) -> bool:
    return (
        left.files == right.files
        and left.requires == right.requires
        and list(left.weights) == list(right.weights)
        and all(
            array.dtype == other.dtype and np.array_equal(array, other)
            for array, other in zip(left.weights.values(), right.weights.values(), strict=True)
        )
    )


def test_what_was_compiled_is_not_compiled_again(folder: Path) -> None:
    target = Counting()
    first = compiled(target, product(), DEVICE)
    again = compiled(Counting(), product(), DEVICE)
    assert same(first, again)
    assert same(again, compiled(target, product(), DEVICE))
    assert target.compiled == 1
    assert len(list(folder.iterdir())) == 1
    # Mapped where it lies in the file, not read.
    base = again.weights["w"]
    while isinstance(base, np.ndarray):
        base = base.base
    assert type(base).__name__ == "mmap"


@pytest.mark.parametrize(
    "other", [{"text": "2"}, {"setting": "fancy"}, {"weight": 2.0}, {"size": 32}, {"name": "q"}]
)
def test_what_decides_the_code_is_in_the_key(folder: Path, other: dict) -> None:
    compiled(Counting(), product(), DEVICE)
    target = Counting(**{key: value for key, value in other.items() if key in ("text", "setting")})
    graph = product(**{k: v for k, v in other.items() if k in ("weight", "size", "name")})
    assert same(compiled(target, graph, DEVICE), Counting().compile(graph, DEVICE))
    assert target.compiled == 1


def test_other_sources_are_other_code(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = Counting()
    compiled(target, product(), DEVICE)
    monkeypatch.setattr(cache, "_sources", lambda folder: "edited")
    compiled(target, product(), DEVICE)
    assert target.compiled == 2


def test_a_damaged_entry_is_made_again(folder: Path) -> None:
    target = Counting()
    good = compiled(target, product(), DEVICE)
    (path,) = folder.iterdir()
    content = path.read_bytes()
    start = content.index(np.full(64 * 64, 2.0, np.float32).tobytes())
    damages = [content[: len(content) * share // 10] for share in range(10)]
    for position in (0, content.index(b"part"), start, start + 64 * 64 * 4 - 1, len(content) - 1):
        flipped = bytearray(content)
        flipped[position] ^= 0x10
        damages.append(bytes(flipped))
    for count, damage in enumerate(damages, 1):
        path.write_bytes(damage)
        assert same(compiled(target, product(), DEVICE), good)
        assert target.compiled == 1 + count
        assert path.read_bytes() == content


def test_what_was_not_read_for_the_longest_goes(tmp_path: Path) -> None:
    entry = Counting().compile(product(), DEVICE)
    Cache(tmp_path).keep("size", entry)
    (whole,) = tmp_path.iterdir()
    limited = Cache(tmp_path / "limited", limit_nbytes=2 * whole.stat().st_size + 100)
    limited.keep("a", entry)
    limited.keep("b", entry)
    assert limited.read("a") is not None
    limited.keep("c", entry)
    assert limited.read("b") is None
    mapped = limited.read("a")
    assert mapped is not None
    assert limited.read("c") is not None
    limited.keep("d", entry)
    # Gone from the folder, and still there for who has it mapped.
    assert limited.read("a") is None
    assert same(mapped, entry)
    # What never fits is not kept.
    Cache(tmp_path / "small", limit_nbytes=10).keep("a", entry)
    assert list((tmp_path / "small").iterdir()) == []


def test_the_cache_can_be_moved_and_switched_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HETSCHED_CACHE", "off")
    target = Counting()
    compiled(target, product(), DEVICE)
    compiled(target, product(), DEVICE)
    refusals(target, [product()], DEVICE)
    assert target.compiled == 2
    assert default_cache().folder is None
    monkeypatch.delenv("HETSCHED_CACHE")
    assert default_cache().folder == default_path().with_suffix(".compiled")
    monkeypatch.setenv("HETSCHED_STORE", str(tmp_path / "profile.sqlite"))
    assert default_cache().folder == tmp_path / "profile.compiled"
    monkeypatch.setenv("HETSCHED_CACHE_BYTES", "1000")
    assert default_cache().limit_nbytes == 1000
    unsettled = Counting(setting=None)
    compiled(unsettled, product(), DEVICE)
    compiled(unsettled, product(), DEVICE)
    assert unsettled.compiled == 2
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_is_no_reason_to_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("HETSCHED_CACHE", str(tmp_path / "file"))
    target = Counting()
    assert same(compiled(target, product(), DEVICE), compiled(target, product(), DEVICE))
    assert target.compiled == 2


def hammer(folder: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    shared = Cache(folder, limit_nbytes=100_000)
    for _ in range(150):
        weight = int(rng.integers(8))
        expected = Counting().compile(product(weight), DEVICE)
        found = shared.read(str(weight))
        assert found is None or same(found, expected)
        if found is None or rng.random() < 0.3:
            shared.keep(str(weight), expected)


def test_several_processes_at_once(tmp_path: Path) -> None:
    others = [FORK.Process(target=hammer, args=(tmp_path, seed)) for seed in range(3)]
    for process in others:
        process.start()
    for process in others:
        process.join()
    assert [process.exitcode for process in others] == [0, 0, 0]
    # No half-written file is left either.
    assert all(path.suffix == cache.SUFFIX for path in tmp_path.iterdir())


def test_refusals_are_kept_by_structure(folder: Path) -> None:
    build = Builder()
    odd = build.graph(build.op("Softmax", build.input("x", 2, 3), shape=(2, 3)))
    target = Counting()
    assert refusals(target, [product(), odd], DEVICE) == [None, "no"]
    assert refusals(target, [product(weight=3.0), odd], DEVICE) == [None, "no"]
    assert target.asked == 2
    assert refusals(target, [odd, product()], DEVICE) == ["no", None]
    assert target.asked == 4


def test_devices_of_one_kind_are_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    target = Counting(setting=None)
    monkeypatch.setattr("hetsched.cost.load", lambda kind, name: target)
    devices = tuple(Device(f"d{i}", "t", isa="any") for i in range(4))
    price(product(), System("four", devices, ()), Roofline())
    assert target.asked == 1
    assert reasons([product()], replace(DEVICE, isa="other")) == [None]


def branches(count: int) -> Graph:
    """Products of several sizes, each with a remainder in its loops or without, in one graph."""
    build = Builder()
    outputs = []
    for index in range(count):
        x = build.input(f"x{index}", 4, 8 + 8 * index)
        weight = build.constant(np.ones((8 + 8 * index, 24), np.float32), f"w{index}")
        outputs.append(build.op("MatMul", x, weight, shape=(4, 24)))
        outputs.append(build.op("Softmax", outputs[-1], shape=(4, 24)))
    return build.graph(*outputs)


def test_the_code_is_the_same_whatever_the_number_of_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from hetsched.lowering import relax

    target = load(Target, "cpu")
    device = target.device("cpu:0")
    graph = branches(3)
    found = []
    for count in (1, 3):
        monkeypatch.setattr(relax, "cores", lambda count=count: tuple(range(count)))
        found.append(target.compile(graph, device))
    assert same(*found)


def test_altered_options_of_llvm_are_seen_by_nobody_else() -> None:
    from hetsched.lowering.relax import _Options

    options, inside, seen = _Options(), [], []

    def build(altered: bool) -> None:
        for _ in range(200):
            with options.altered() if altered else options.as_they_are():
                inside.append(altered)
                seen.append(tuple(inside))
                inside.remove(altered)

    threads = [Thread(target=build, args=(altered,)) for altered in (True, False, False, True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 800
    assert all(them == (True,) for them in seen if True in them)


def test_parts_compiled_side_by_side_are_those_compiled_in_turn(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = branches(2)
    plan = hetsched.partition(graph, "cpu:0", "single", cost_model="roofline")
    plan = replace(plan, cuts=frozenset(plan.order))
    assert len(plan.parts) > 3
    monkeypatch.setattr("hetsched.compiler.cores", lambda: (0, 1, 2))
    told: list[tuple[str, int, int]] = []
    parts = compile_parts(plan, lambda *what: told.append(what))
    assert [index for _, index, _ in told] == list(range(len(plan.parts)))
    target = load(Target, "cpu")
    for item in parts:
        assert same(item.artifact, target.compile(item.graph, item.part.device))
    # The second time no target compiles.
    monkeypatch.setattr(type(target), "compile", None)
    again = compile_parts(plan)
    for before, after in zip(parts, again, strict=True):
        assert same(before.artifact, after.artifact)


def test_the_first_part_that_is_refused_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(target: Target, graph: Graph, device: Device) -> Artifact:
        raise CompileError(f"not {graph.name}")

    plan = hetsched.partition(branches(3), "cpu:0", "single", cost_model="roofline")
    monkeypatch.setattr("hetsched.compiler.compiled", refuse)
    with pytest.raises(CompileError, match="part0 on 'cpu:0': not part0"):
        compile_parts(plan)


def test_the_second_process_loads_no_compiler(tmp_path: Path) -> None:
    model = Path(__file__).parent / "data" / "digits_cnn.onnx"
    code = (
        "import sys; from hetsched.cli import app; from hetsched.disturbance import Witness\n"
        # What was disturbed is measured again, for which kernels are compiled.
        "Witness.end = lambda self, device: ''\n"
        f"sys.argv = ['hetsched', 'compile', {str(model)!r}, '-o', sys.argv[1],\n"
        "            '--devices', 'cpu:0', '--partitioner', 'single']\n"
        "try: app()\n"
        "except SystemExit as end: assert not end.code\n"
        "print('tvm' in sys.modules, file=sys.stderr)\n"
    )
    environment = os.environ | {
        "HETSCHED_STORE": str(tmp_path / "profile.sqlite"),
        "HETSCHED_CACHE": str(tmp_path / "cache"),
    }
    said = []
    for name in ("first.hsp", "second.hsp"):
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / name)],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        said.append(done.stderr.split()[-1])
    assert said == ["True", "False"]
    assert (tmp_path / "first.hsp").read_bytes() == (tmp_path / "second.hsp").read_bytes()
