"""The profile store: what is committed stays, whoever else writes, and whatever kills a writer."""

import multiprocessing
import sqlite3
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import pytest
from graphs import Builder

from hetsched.cost_models import profiled
from hetsched.cost_models.profiled import Profiled
from hetsched.device import Device, Link
from hetsched.errors import CompileError, OutputFileError
from hetsched.graph import Graph
from hetsched.store import Sample, Store, default_path
from hetsched.target import Target

HERE = Device("cpu:0", "cpu", fingerprint="core")
THERE = Device("cpu:1", "cpu", fingerprint="core")
SAMPLE = Sample(1.25e-3, 2e-5, 17)

FORK = multiprocessing.get_context("fork")


def write(path: Path, who: str, count: int, said: Connection, start: Barrier | None) -> None:
    """Adds samples and says which have been committed."""
    store, device = Store(path), Device("d", "t", fingerprint=who)
    if start is not None:
        start.wait()
    for index in range(count):
        store.add(device, f"k{index}", "c", "Conv", Sample(index, 0.0, 1))
        said.send(index)


def writer(
    path: Path, who: str, count: int, start: Barrier | None = None
) -> tuple[BaseProcess, Connection]:
    heard, said = FORK.Pipe(duplex=False)
    process = FORK.Process(target=write, args=(path, who, count, said, start))
    process.start()
    # The child alone holds the other end, so that its death ends what is heard.
    said.close()
    return process, heard


def rest(heard: Connection) -> list[int]:
    found = []
    try:
        while True:
            found.append(heard.recv())
    except EOFError:
        heard.close()
    return found


def seconds_of(path: Path, who: str) -> list[float]:
    with sqlite3.connect(path) as database:
        query = "SELECT seconds FROM sample WHERE fingerprint = ? ORDER BY seconds"
        rows = database.execute(query, (who,)).fetchall()
    database.close()
    return [seconds for (seconds,) in rows]


def test_a_sample_comes_back_for_the_same_key_alone(tmp_path: Path) -> None:
    store = Store(tmp_path / "deep" / "profile.sqlite")
    assert store.sample(HERE, "k", "tvm 1") is None
    store.add(HERE, "k", "tvm 1", "Conv+Relu", SAMPLE)
    assert store.sample(HERE, "k", "tvm 1") == SAMPLE
    # Another core of the same kind; then another kernel, compiler and kind of device.
    assert store.sample(THERE, "k", "tvm 1") == SAMPLE
    assert store.sample(HERE, "other", "tvm 1") is None
    assert store.sample(HERE, "k", "tvm 2") is None
    assert store.sample(Device("cpu:0", "cpu", fingerprint="faster"), "k", "tvm 1") is None
    store.add(HERE, "k", "tvm 1", "Conv+Relu", Sample(2.0, 0.0, 5))
    assert store.sample(HERE, "k", "tvm 1") == Sample(2.0, 0.0, 5)


def test_a_link_comes_back_for_the_ordered_pair(tmp_path: Path) -> None:
    store = Store(tmp_path / "profile.sqlite")
    link = Link("cpu:0", "cpu:1", 5e-6, 3e9)
    store.add_link(HERE, THERE, link)
    assert store.link(HERE, THERE) == link
    assert store.link(THERE, HERE) is None
    shared = Link("cpu:0", "cpu:1", 0.0, float("inf"))
    store.add_link(HERE, THERE, shared)
    assert store.link(HERE, THERE) == shared


def test_the_path_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HETSCHED_STORE", "/here/mine.sqlite")
    assert default_path() == Path("/here/mine.sqlite")
    monkeypatch.delenv("HETSCHED_STORE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert default_path() == Path("/cache/hetsched/profile.sqlite")


def test_no_committed_sample_is_lost_when_a_writer_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "profile.sqlite"
    committed = 0
    for kill in range(20):
        process, heard = writer(path, f"writer {kill}", 10**6)
        # The first kills may hit the making of the file, the later ones the middle of a write.
        said = [heard.recv() for _ in range(kill // 2)]
        time.sleep(0.0007 * kill)
        process.kill()
        said += rest(heard)
        process.join()
        committed += len(said)
        # Through the store first, which makes the tables where a kill came before them.
        Store(path).sample(HERE, "", "")
        there = seconds_of(path, f"writer {kill}")
        assert there[: len(said)] == said
        # At most one that was committed and not yet told.
        assert len(there) - len(said) in (0, 1)
    assert committed > 20
    store = Store(path)
    store.add(HERE, "k", "c", "Conv", SAMPLE)
    assert store.sample(HERE, "k", "c") == SAMPLE


def test_two_writers_at_once(tmp_path: Path) -> None:
    for attempt in range(4):
        path = tmp_path / f"{attempt}.sqlite"
        start = FORK.Barrier(2)
        writers = [writer(path, who, 30, start) for who in ("one", "other")]
        for process, heard in writers:
            assert rest(heard) == list(range(30))
            process.join()
            assert process.exitcode == 0
        assert seconds_of(path, "one") == seconds_of(path, "other") == list(range(30))


def test_a_newer_store_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "profile.sqlite"
    Store(path).add(HERE, "k", "c", "Conv", SAMPLE)
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA user_version = 99")
    database.close()
    before = path.read_bytes()
    with pytest.raises(OutputFileError, match="newer hetsched; name another with --store"):
        Store(path).sample(HERE, "k", "c")
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"no database at all, but text" * 100, b"\x00" * 5000])
def test_what_is_no_database_gives_one_line_and_stays(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "profile.sqlite"
    path.write_bytes(content)
    with pytest.raises(OutputFileError) as caught:
        Store(path).add(HERE, "k", "c", "Conv", SAMPLE)
    message = str(caught.value)
    assert str(path) in message
    assert "--store" in message
    assert "\n" not in message
    assert path.read_bytes() == content


def test_a_folder_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(OutputFileError, match="--store"):
        Store(tmp_path).sample(HERE, "k", "c")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputFileError, match="--store"):
        Store(tmp_path / "file" / "profile.sqlite").sample(HERE, "k", "c")


def chain() -> Graph:
    """Two equal groups, and one that differs."""
    build = Builder()
    x = build.input("x", 2, 4)
    square = build.constant(np.ones((4, 4), np.float32))
    other = build.constant(np.zeros((4, 4), np.float32))
    wide = build.constant(np.ones((4, 6), np.float32))
    x = build.op("MatMul", x, square)
    x = build.op("MatMul", x, other)
    return build.graph(build.op("MatMul", x, wide, shape=(2, 6)))


class Compiler(Target):
    """A target that only has a version."""

    def __init__(self) -> None:
        self.text = "compiler 1"

    def version(self) -> str:
        return self.text


for method in Compiler.__abstractmethods__:
    setattr(Compiler, method, None)
Compiler.__abstractmethods__ = frozenset()


def test_profiled_measures_each_distinct_group_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler, measured = Compiler(), []

    def measure(kernels: Sequence[tuple[Graph, Device]]) -> Iterator[Sample]:
        for part, device in kernels:
            measured.append((part.ops[0].name, device.name))
            yield Sample(1.0 + len(measured), 0.0, 5)

    monkeypatch.setattr(profiled, "load", lambda kind, name: compiler)
    monkeypatch.setattr(profiled, "measure_kernels", measure)
    graph = chain()
    first, same, different = graph.groups
    costs = Profiled(str(tmp_path / "profile.sqlite"))
    assert costs.compute_seconds(graph, first, HERE) == 2.0
    # The same shapes with other weights, then another core of the same kind.
    assert costs.compute_seconds(graph, same, HERE) == 2.0
    assert costs.compute_seconds(graph, first, THERE) == 2.0
    assert costs.compute_seconds(graph, different, HERE) == 3.0
    # A later process.
    again = Profiled(str(tmp_path / "profile.sqlite"))
    assert again.compute_seconds(chain(), chain().groups[2], HERE) == 3.0
    assert len(measured) == 2
    both = [(group, device) for group in graph.groups for device in (HERE, THERE)]
    assert again.all_seconds(graph, both) == [2.0, 2.0, 2.0, 2.0, 3.0, 3.0]
    assert len(measured) == 2
    compiler.text = "compiler 2"
    assert costs.compute_seconds(graph, first, HERE) == 4.0
    compiler.text = "compiler 1"
    assert costs.compute_seconds(graph, first, HERE) == 2.0
    assert len(measured) == 3


def test_profiled_has_no_price_for_what_does_not_compile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(kernels: Sequence[tuple[Graph, Device]]) -> Iterator[CompileError]:
        for _ in kernels:
            yield CompileError("no")

    monkeypatch.setattr(profiled, "load", lambda kind, name: Compiler())
    monkeypatch.setattr(profiled, "measure_kernels", measure)
    graph = chain()
    costs = Profiled(str(tmp_path / "profile.sqlite"))
    assert costs.compute_seconds(graph, graph.groups[0], HERE) == float("inf")
