"""The profile store: what is committed stays, whoever else writes, and whatever kills a writer."""

import multiprocessing
import sqlite3
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from hetsched.device import Device, Link
from hetsched.errors import OutputFileError
from hetsched.store import (
    FROM_SECOND,
    Factor,
    Kernel,
    Rejected,
    Residual,
    Sample,
    Store,
    default_path,
)
from hetsched.trial import Trial

HERE = Device("cpu:0", "cpu", fingerprint="core")
THERE = Device("cpu:1", "cpu", fingerprint="core")
SAMPLE = Sample(1.25e-3, 2e-5, 17, 1e-5, (1.25e-3, 1.26e-3))
CONV = Kernel("k", "Conv+Relu", b"a model")

# The tables of version 2, and what a user has in them.
SECOND = """
CREATE TABLE sample (
    fingerprint TEXT, signature TEXT, compiler TEXT, kinds TEXT, seconds REAL, spread REAL,
    repeats INTEGER, measured_at TEXT DEFAULT CURRENT_TIMESTAMP,
    PRIMARY KEY (fingerprint, signature, compiler)
) WITHOUT ROWID;
CREATE TABLE link (
    source TEXT, sink TEXT, seconds REAL, bytes_per_second REAL,
    measured_at TEXT DEFAULT CURRENT_TIMESTAMP,
    PRIMARY KEY (source, sink)
) WITHOUT ROWID;
CREATE TABLE trial (
    fingerprint TEXT, compiler TEXT, workload TEXT, candidate TEXT, place INTEGER, seconds REAL,
    measured_at TEXT DEFAULT CURRENT_TIMESTAMP,
    PRIMARY KEY (fingerprint, compiler, workload, candidate)
) WITHOUT ROWID;
PRAGMA user_version = 2;
INSERT INTO sample (fingerprint, signature, compiler, kinds, seconds, spread, repeats)
    VALUES ('core', 'k', 'tvm 1', 'Conv', 0.5, 0.01, 7), ('core', 'l', 'tvm 1', 'Gemm', 2, 0, 5);
INSERT INTO link (source, sink, seconds, bytes_per_second)
    VALUES ('core cpu:0', 'core cpu:1', 4e-5, 3e9);
INSERT INTO trial (fingerprint, compiler, workload, candidate, place, seconds)
    VALUES ('core', 'tvm 1', 'w', 'c', 0, 0.25);
"""

FORK = multiprocessing.get_context("fork")


def write(path: Path, who: str, count: int, said: Connection, start: Barrier | None) -> None:
    """Adds samples and says which have been committed."""
    store, device = Store(path), Device("d", "t", fingerprint=who)
    if start is not None:
        start.wait()
    for index in range(count):
        store.add(device, "c", "alone", [(Kernel(f"k{index}", "Conv"), Sample(index, 0.0, 1))])
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


def sample_of(store: Store, device: Device, signature: str, compiler: str) -> Sample | None:
    return store.samples(device, compiler, "alone", [signature]).get(signature)


def test_a_sample_comes_back_for_the_same_key_alone(tmp_path: Path) -> None:
    store = Store(tmp_path / "deep" / "profile.sqlite")
    assert sample_of(store, HERE, "k", "tvm 1") is None
    store.add(HERE, "tvm 1", "alone", [(CONV, SAMPLE)])
    assert sample_of(store, HERE, "k", "tvm 1") == SAMPLE
    # Another core of the same kind; then another kernel, compiler, kind of device and method.
    assert sample_of(store, THERE, "k", "tvm 1") == SAMPLE
    assert sample_of(store, HERE, "other", "tvm 1") is None
    assert sample_of(store, HERE, "k", "tvm 2") is None
    assert sample_of(store, Device("cpu:0", "cpu", fingerprint="faster"), "k", "tvm 1") is None
    assert store.samples(HERE, "tvm 1", "in sequence", ["k"]) == {}
    store.add(HERE, "tvm 1", "alone", [(CONV, Sample(2.0, 0.0, 5))])
    assert sample_of(store, HERE, "k", "tvm 1") == Sample(2.0, 0.0, 5)


def test_many_samples_are_one_query_and_one_step(tmp_path: Path) -> None:
    store = Store(tmp_path / "profile.sqlite")
    measured = [(Kernel(f"k{i}", "Conv"), Sample(1.0 + i, 0.0, 5)) for i in range(3000)]
    store.add(HERE, "c", "alone", measured)
    wanted = [f"k{i}" for i in range(1000, 4000)]
    found = store.samples(HERE, "c", "alone", wanted)
    assert found == {kernel.signature: sample for kernel, sample in measured[1000:]}


def test_what_was_measured_can_be_fitted_from_the_store_alone(tmp_path: Path) -> None:
    store = Store(tmp_path / "profile.sqlite")
    store.add(HERE, "c", "alone", [(CONV, SAMPLE)])
    # Who does not know the model takes none away.
    store.add(HERE, "c", "in sequence", [(Kernel("k", "Conv+Relu"), Sample(2.0, 0.0, 5))])
    one, other = store.records()
    assert (one.fingerprint, one.compiler, one.method) == ("core", "c", "alone")
    assert (one.kernel, one.sample, other.kernel) == (CONV, SAMPLE, CONV)
    assert one.measured_at <= other.measured_at
    assert store.devices() == {"core": HERE}


def test_a_link_comes_back_for_the_ordered_pair_and_runtime(tmp_path: Path) -> None:
    store = Store(tmp_path / "profile.sqlite")
    link = Link("cpu:0", "cpu:1", 5e-6, 3e9)
    store.add_link(HERE, THERE, "new", link, 1e-7, [(4e-6, 3e9), (6e-6, 3e9)])
    assert store.link(HERE, THERE, "new") == link
    assert store.link_bursts(HERE, THERE, "new") == ((4e-6, 3e9), (6e-6, 3e9))
    assert store.link(THERE, HERE, "new") is None
    assert store.link(HERE, THERE, "old") is None
    assert store.link_bursts(HERE, THERE, "old") == ()
    shared = Link("cpu:0", "cpu:1", 0.0, float("inf"))
    store.add_link(HERE, THERE, "new", shared)
    assert store.link(HERE, THERE, "new") == shared


def test_factors_and_residuals(tmp_path: Path) -> None:
    store = Store(tmp_path / "profile.sqlite")
    store.add_factor("corun", "core core", Factor(1.2))
    store.add_factor("corun", "core core", Factor(1.25, 0.05, 9))
    assert store.factors("corun") == {"core core": Factor(1.25, 0.05, 9)}
    assert store.factors("launch") == {}
    for seconds in (1.0, 2.0):
        store.add_residual(Residual("plan", 1.5, seconds, 3))
        time.sleep(0.002)
    store.add_residual(Residual("other", 9.0, 9.0, 1))
    assert [residual.measured for residual in store.residuals("plan")] == [1.0, 2.0]
    assert len(store.residuals()) == 3


def test_a_store_of_version_2_is_brought_to_this_one(tmp_path: Path) -> None:
    path = tmp_path / "profile.sqlite"
    with sqlite3.connect(path) as database:
        database.executescript(SECOND)
    database.close()
    store = Store(path)
    first, second = store.records()
    assert (first.kernel, first.sample) == (Kernel("k", "Conv"), Sample(0.5, 0.01, 7))
    assert (second.kernel.kinds, second.sample.seconds) == ("Gemm", 2.0)
    assert first.method == "alone"
    assert store.trials(HERE, "tvm 1") == (Trial("w", "c", 0, 0.25),)
    # A link of a runtime that nobody knows is kept, and measured anew.
    (kept,) = store.links()
    assert (kept.runtime, kept.link.seconds) == ("", 4e-5)
    assert store.link(HERE, THERE, "new") is None
    store.add(HERE, "tvm 1", "alone", [(CONV, SAMPLE)])
    assert sample_of(store, HERE, "k", "tvm 1") == SAMPLE
    store.add_trial(HERE, "tvm 1", Trial("w", "d", 1, 0.2))
    assert len(store.trials(HERE, "tvm 1")) == 2


def test_a_store_of_version_3_has_room_for_what_was_rejected(tmp_path: Path) -> None:
    store = Store(tmp_path / "profile.sqlite")
    store.add(HERE, "tvm 1", "alone", [(CONV, SAMPLE)])
    with sqlite3.connect(store.path) as database:
        database.executescript("ALTER TABLE sample DROP COLUMN rejected; PRAGMA user_version = 3;")
    database.close()
    assert sample_of(store, HERE, "k", "tvm 1") == SAMPLE
    disturbed = replace(SAMPLE, rejected=(Rejected(2e-3, "30% of the processor stolen"),))
    store.add(HERE, "tvm 1", "alone", [(CONV, disturbed)])
    assert sample_of(store, HERE, "k", "tvm 1") == store.records()[0].sample == disturbed


def migrate(path: Path, start: Barrier, heard: Connection) -> None:
    start.wait()
    heard.send(len(Store(path).records()))


def test_two_processes_bring_a_store_to_this_version_at_once(tmp_path: Path) -> None:
    path = tmp_path / "profile.sqlite"
    with sqlite3.connect(path) as database:
        database.executescript(SECOND)
    database.close()
    start = FORK.Barrier(3)
    pipes = [FORK.Pipe(duplex=False) for _ in range(3)]
    found = [FORK.Process(target=migrate, args=(path, start, said)) for _, said in pipes]
    for process in found:
        process.start()
    assert [heard.recv() for heard, _ in pipes] == [2, 2, 2]
    for process in found:
        process.join()


def test_a_kill_while_a_store_is_brought_to_this_version_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "profile.sqlite"
    with sqlite3.connect(path) as database:
        database.executescript(SECOND)
    database.close()
    with monkeypatch.context() as patch:
        patch.setattr("hetsched.store.FROM_SECOND", FROM_SECOND + "SELECT * FROM nothing;")
        with pytest.raises(OutputFileError, match="nothing"):
            Store(path).records()
    assert len(Store(path).records()) == 2


def test_the_better_sample_survives_a_merge(tmp_path: Path) -> None:
    mine, theirs = Store(tmp_path / "mine.sqlite"), Store(tmp_path / "theirs.sqlite")
    kernels = [Kernel(name, "Conv") for name in ("a", "b", "c")]
    few, many = Sample(1.0, 0.0, 5), Sample(2.0, 0.0, 50)
    mine.add(HERE, "c", "alone", [(kernels[0], few), (kernels[1], many)])
    theirs.add(HERE, "c", "alone", [(kernels[0], many), (kernels[1], few), (kernels[2], few)])
    theirs.add(HERE, "c", "alone", [(Kernel("a", "Conv", b"model"), many)])
    mine.add_link(HERE, THERE, "r", Link("cpu:0", "cpu:1", 1.0, 1.0), 0.0, [(1.0, 1.0)] * 3)
    theirs.add_link(HERE, THERE, "r", Link("cpu:0", "cpu:1", 2.0, 1.0), 0.0, [(2.0, 1.0)])
    theirs.add_link(THERE, HERE, "r", Link("cpu:1", "cpu:0", 2.0, 1.0))
    theirs.add_trial(HERE, "c", Trial("w", "x", 0, 1.0))
    theirs.add_factor("corun", "core core", Factor(1.2))
    theirs.add_residual(Residual("plan", 1.0, 2.0, 3))
    before = theirs.path.read_bytes()
    counts = mine.merge(theirs)
    assert (counts["sample"], counts["link"], counts["trial"]) == (2, 1, 1)
    assert mine.samples(HERE, "c", "alone", ["a", "b", "c"]) == {"a": many, "b": many, "c": few}
    assert mine.link(HERE, THERE, "r") == Link("cpu:0", "cpu:1", 1.0, 1.0)
    assert mine.link(THERE, HERE, "r") == Link("cpu:1", "cpu:0", 2.0, 1.0)
    assert mine.records()[0].kernel.model == b"model"
    assert mine.factors("corun") == {"core core": Factor(1.2)}
    assert len(mine.residuals()) == 1
    assert theirs.path.read_bytes() == before
    # Once more adds nothing.
    assert not any(mine.merge(theirs).values())


def test_a_store_of_version_2_is_merged_and_stays_one(tmp_path: Path) -> None:
    path = tmp_path / "old.sqlite"
    with sqlite3.connect(path) as database:
        database.executescript(SECOND)
    database.close()
    before = path.read_bytes()
    store = Store(tmp_path / "mine.sqlite")
    assert store.merge(Store(path))["sample"] == 2
    assert path.read_bytes() == before


@pytest.mark.parametrize("what", ["absent", "text", "foreign", "value", "model", "cut", "newer"])
def test_what_cannot_be_merged_changes_nothing(tmp_path: Path, what: str) -> None:
    mine, path = Store(tmp_path / "mine.sqlite"), tmp_path / "theirs.sqlite"
    mine.add(HERE, "c", "alone", [(CONV, SAMPLE)])
    kernels = [(Kernel(f"k{i}", "Conv"), SAMPLE) for i in range(500)]
    Store(path).add(HERE, "c", "alone", kernels)
    scripts = {
        "value": "UPDATE sample SET seconds = 'soon' WHERE signature = 'k7'",
        "model": "UPDATE kernel SET model = x'00112233' WHERE signature = 'k7'",
        "newer": "PRAGMA user_version = 99",
    }
    if what == "absent":
        path.unlink()
    elif what == "text":
        path.write_text("no database at all " * 100)
    elif what == "cut":
        path.write_bytes(path.read_bytes()[:-9000])
    elif what == "foreign":
        path.unlink()
        with sqlite3.connect(path) as database:
            database.execute("CREATE TABLE songs (title TEXT)")
        database.close()
    else:
        with sqlite3.connect(path) as database:
            database.execute(scripts[what])
        database.close()
    before = mine.path.read_bytes()
    with pytest.raises(OutputFileError) as caught:
        mine.merge(Store(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert mine.path.read_bytes() == before
    assert what != "absent" or not path.exists()


def test_a_database_of_others_is_refused_and_stays(tmp_path: Path) -> None:
    path = tmp_path / "songs.sqlite"
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE songs (title TEXT)")
    database.close()
    before = path.read_bytes()
    with pytest.raises(OutputFileError, match="no profile store; name another with --store"):
        Store(path).records()
    assert path.read_bytes() == before


def test_a_damaged_value_is_no_price(tmp_path: Path) -> None:
    store = Store(tmp_path / "profile.sqlite")
    store.add(HERE, "c", "alone", [(CONV, SAMPLE)])
    for value in ("'soon'", "-1.0", "NULL", "x'00'"):
        with sqlite3.connect(store.path) as database:
            database.execute(f"UPDATE sample SET seconds = {value}")
        database.close()
        with pytest.raises(OutputFileError, match="damaged"):
            store.samples(HERE, "c", "alone", ["k"])


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
        Store(path).records()
        there = seconds_of(path, f"writer {kill}")
        assert there[: len(said)] == said
        # At most one that was committed and not yet told.
        assert len(there) - len(said) in (0, 1)
    assert committed > 20
    store = Store(path)
    store.add(HERE, "c", "alone", [(CONV, SAMPLE)])
    assert sample_of(store, HERE, "k", "c") == SAMPLE


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
    Store(path).add(HERE, "c", "alone", [(CONV, SAMPLE)])
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA user_version = 99")
    database.close()
    before = path.read_bytes()
    with pytest.raises(OutputFileError, match="newer hetsched; name another with --store"):
        Store(path).records()
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"no database at all, but text" * 100, b"\x00" * 5000])
def test_what_is_no_database_gives_one_line_and_stays(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "profile.sqlite"
    path.write_bytes(content)
    with pytest.raises(OutputFileError) as caught:
        Store(path).add(HERE, "c", "alone", [(CONV, SAMPLE)])
    message = str(caught.value)
    assert str(path) in message
    assert "--store" in message
    assert "\n" not in message
    assert path.read_bytes() == content


def test_a_folder_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(OutputFileError, match="--store"):
        Store(tmp_path).records()
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputFileError, match="--store"):
        Store(tmp_path / "file" / "profile.sqlite").records()
