"""Measured times, kept in SQLite for the next run.

A sample belongs to a device fingerprint, a compiler with what it was tuned to, a method of
measuring and a kernel's signature: the same kernel on the same kind of device is measured once.
What is added at once is committed at once, so a kill loses at most what is in flight; several
processes may write at the same time. The kernels are there too, as ONNX models without weights, so
that another cost model can be fitted to what the store has.
"""

import json
import os
import sqlite3
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, fields
from math import inf, isfinite
from pathlib import Path
from tempfile import TemporaryDirectory

from hetsched.device import Device, Link
from hetsched.document import plain, record
from hetsched.errors import DeviceError, OutputFileError
from hetsched.trial import Trial

TABLES = """
CREATE TABLE device (fingerprint TEXT PRIMARY KEY, content TEXT) WITHOUT ROWID;
CREATE TABLE kernel (signature TEXT PRIMARY KEY, kinds TEXT, model BLOB);
CREATE TABLE sample (
    fingerprint TEXT, compiler TEXT, method TEXT, signature TEXT,
    seconds REAL, spread REAL, margin REAL, repeats INTEGER, bursts TEXT, measured_at TEXT,
    rejected TEXT DEFAULT '[]',
    PRIMARY KEY (fingerprint, compiler, method, signature)
) WITHOUT ROWID;
CREATE TABLE link (
    source TEXT, sink TEXT, runtime TEXT,
    seconds REAL, bytes_per_second REAL, margin REAL, repeats INTEGER, bursts TEXT,
    measured_at TEXT,
    PRIMARY KEY (source, sink, runtime)
) WITHOUT ROWID;
CREATE TABLE factor (
    kind TEXT, subject TEXT, value REAL, margin REAL, repeats INTEGER, measured_at TEXT,
    PRIMARY KEY (kind, subject)
) WITHOUT ROWID;
CREATE TABLE residual (
    subject TEXT, predicted REAL, measured REAL, repeats INTEGER, measured_at TEXT,
    PRIMARY KEY (subject, measured_at)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS trial (
    fingerprint TEXT, compiler TEXT, workload TEXT, candidate TEXT, place INTEGER, seconds REAL,
    measured_at TEXT,
    PRIMARY KEY (fingerprint, compiler, workload, candidate)
) WITHOUT ROWID;
"""
# Versions 1 and 2 timed each kernel alone, and knew neither margins nor what handed over.
FROM_SECOND = """
ALTER TABLE sample RENAME TO old_sample;
ALTER TABLE link RENAME TO old_link;
{tables}
INSERT OR IGNORE INTO kernel SELECT signature, kinds, NULL FROM old_sample;
INSERT INTO sample SELECT fingerprint, compiler, 'alone', signature, seconds, spread, 9e999,
    repeats, '[]', measured_at, '[]' FROM old_sample;
INSERT INTO link SELECT source, sink, '', seconds, bytes_per_second, 9e999, 1, '[]', measured_at
    FROM old_link;
DROP TABLE old_sample;
DROP TABLE old_link;
"""
# Version 3 did not keep what was disturbed.
FROM_THIRD = "ALTER TABLE sample ADD COLUMN rejected TEXT DEFAULT '[]'"
VERSION = 4
# The mark of the file: the first letters of hetsched as a number.
APPLICATION = int.from_bytes(b"hets")
NOW = "strftime('%Y-%m-%d %H:%M:%f', 'now')"
# How long a writer waits for another process.
BUSY_SECONDS = 30.0
# The largest model of a kernel that is read; it has no weights.
MOST_MODEL_NBYTES = 1 << 26


@dataclass(frozen=True)
class Rejected:
    """Seconds of a kernel in a burst that was disturbed, and by what."""

    seconds: float
    why: str


@dataclass(frozen=True)
class Sample:
    """Median seconds of a kernel over its `repeats`.

    `spread` is half the distance between the quartiles. `margin` is half the width of the interval
    that has the median with 95 % confidence, infinite where too little is known. `bursts` are the
    medians of the times that were taken in one go each, in the order of time. `rejected` are those
    that do not count as something else had a part of the machine; if there are no others, the time
    is the least of them, of which nothing is sure.
    """

    seconds: float
    spread: float
    repeats: int
    margin: float = inf
    bursts: tuple[float, ...] = ()
    rejected: tuple[Rejected, ...] = ()

    @property
    def is_rejected(self) -> bool:
        """Whether all that is known of it was disturbed."""
        return bool(self.rejected) and not self.bursts

    @property
    def relative_margin(self) -> float:
        return self.margin / self.seconds if self.seconds > 0 else inf


@dataclass(frozen=True)
class Kernel:
    """A kernel by its signature; `model` is its graph in ONNX without weights, if it is known."""

    signature: str
    kinds: str
    model: bytes = b""


@dataclass(frozen=True)
class Record:
    """A sample of the store, and what it belongs to. `measured_at` is in UTC."""

    fingerprint: str
    compiler: str
    method: str
    kernel: Kernel
    sample: Sample
    measured_at: str


@dataclass(frozen=True)
class LinkRecord:
    """A link of the store between two ends, each a fingerprint and a name, by a runtime.

    `bursts` are seconds and bytes a second of each time that it was measured.
    """

    source: str
    sink: str
    runtime: str
    link: Link
    margin: float
    bursts: tuple[tuple[float, float], ...]
    measured_at: str


@dataclass(frozen=True)
class Factor:
    """A measured number, such as by how much two devices slow each other down."""

    value: float
    margin: float = inf
    repeats: int = 1


@dataclass(frozen=True)
class Residual:
    """What was predicted and what was measured, in seconds."""

    subject: str
    predicted: float
    measured: float
    repeats: int
    measured_at: str = ""


def default_path() -> Path:
    """`$HETSCHED_STORE`, or the user's cache folder."""
    if "HETSCHED_STORE" in os.environ:
        return Path(os.environ["HETSCHED_STORE"])
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "hetsched" / "profile.sqlite"


@dataclass(frozen=True)
class Store:
    """The profile store at `path`; made when something is first asked or written.

    Raises
    ------
    OutputFileError
        The file is no profile store, is damaged, is of a newer hetsched, or cannot be written.
    """

    path: Path

    def samples(
        self, device: Device, compiler: str, method: str, signatures: Collection[str]
    ) -> dict[str, Sample]:
        """What was measured of these kernels on this kind of device, by signature."""
        query = (
            "SELECT signature, seconds, spread, repeats, margin, bursts, rejected FROM sample "
            "WHERE fingerprint = ? AND compiler = ? AND method = ? "
            "AND signature IN (SELECT value FROM json_each(?))"
        )
        asked = (device.fingerprint, compiler, method, json.dumps(list(signatures)))
        with self._open() as database:
            rows = database.execute(query, asked).fetchall()
        return {signature: self._sample(*row) for signature, *row in rows}

    def add(
        self,
        device: Device,
        compiler: str,
        method: str,
        measured: Iterable[tuple[Kernel, Sample]],
    ) -> None:
        """Keeps samples in place of older ones, all in one step."""
        measured = list(measured)
        kernels = [
            (kernel.signature, kernel.kinds, zlib.compress(kernel.model) if kernel.model else None)
            for kernel, _ in measured
        ]
        rows = [
            (
                *(device.fingerprint, compiler, method, kernel.signature),
                *(sample.seconds, sample.spread, sample.margin, sample.repeats),
                json.dumps(sample.bursts),
                json.dumps([(one.seconds, one.why) for one in sample.rejected]),
            )
            for kernel, sample in measured
        ]
        with self._open() as database:
            database.execute(
                "INSERT OR REPLACE INTO device VALUES (?, ?)",
                (device.fingerprint, json.dumps(plain(device))),
            )
            database.executemany(
                "INSERT INTO kernel VALUES (?, ?, ?) ON CONFLICT DO UPDATE "
                "SET kinds = excluded.kinds, model = coalesce(excluded.model, model)",
                kernels,
            )
            database.executemany(
                f"INSERT OR REPLACE INTO sample VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, {NOW}, ?)", rows
            )

    def records(self) -> tuple[Record, ...]:
        """All samples, those of one device and compiler together."""
        with self._open() as database:
            rows = database.execute(
                "SELECT fingerprint, compiler, method, signature, coalesce(kinds, ''), model, "
                "measured_at, seconds, spread, repeats, margin, bursts, rejected "
                "FROM sample LEFT JOIN kernel USING (signature) "
                "ORDER BY fingerprint, compiler, method, signature"
            ).fetchall()
        return tuple(
            Record(
                *(fingerprint, compiler, method),
                Kernel(signature, kinds, self._model(model)),
                self._sample(*row),
                measured_at,
            )
            for fingerprint, compiler, method, signature, kinds, model, measured_at, *row in rows
        )

    def devices(self) -> dict[str, Device]:
        """The devices that were measured, one for each fingerprint, as they were last seen.

        One that only an old version has measured is not there.
        """
        with self._open() as database:
            rows = database.execute("SELECT fingerprint, content FROM device").fetchall()
        return {fingerprint: self._device(content) for fingerprint, content in rows}

    def link(self, source: Device, sink: Device, runtime: str) -> Link | None:
        """What was measured between these two devices with this runtime, or None."""
        with self._open() as database:
            row = database.execute(
                "SELECT seconds, bytes_per_second FROM link "
                "WHERE source = ? AND sink = ? AND runtime = ?",
                (_end(source), _end(sink), runtime),
            ).fetchone()
        if row is None:
            return None
        seconds, bytes_per_second = map(self._number, row)
        return Link(source.name, sink.name, seconds, bytes_per_second)

    def link_bursts(
        self, source: Device, sink: Device, runtime: str
    ) -> tuple[tuple[float, float], ...]:
        """Seconds and bytes a second of each time that the link was measured."""
        with self._open() as database:
            row = database.execute(
                "SELECT bursts FROM link WHERE source = ? AND sink = ? AND runtime = ?",
                (_end(source), _end(sink), runtime),
            ).fetchone()
        return self._link_bursts(row[0]) if row else ()

    def add_link(
        self,
        source: Device,
        sink: Device,
        runtime: str,
        link: Link,
        margin: float = inf,
        bursts: Sequence[tuple[float, float]] = (),
    ) -> None:
        """Keeps a link in place of an older one; `margin` is of its seconds."""
        with self._open() as database:
            database.execute(
                f"INSERT OR REPLACE INTO link VALUES (?, ?, ?, ?, ?, ?, ?, ?, {NOW})",
                (
                    *(_end(source), _end(sink), runtime),
                    *(link.seconds, link.bytes_per_second, margin),
                    *(max(1, len(bursts)), json.dumps(list(bursts))),
                ),
            )

    def links(self) -> tuple[LinkRecord, ...]:
        """All links, those of older runtimes too."""
        with self._open() as database:
            rows = database.execute(
                "SELECT source, sink, runtime, seconds, bytes_per_second, margin, bursts, "
                "measured_at FROM link ORDER BY source, sink, runtime"
            ).fetchall()
        return tuple(
            LinkRecord(
                *(source, sink, runtime),
                Link(source, sink, self._number(seconds), self._number(rate)),
                *(self._number(margin), self._link_bursts(bursts), measured_at),
            )
            for source, sink, runtime, seconds, rate, margin, bursts, measured_at in rows
        )

    def factors(self, kind: str) -> dict[str, Factor]:
        """The numbers of one kind, by what they belong to."""
        with self._open() as database:
            rows = database.execute(
                "SELECT subject, value, margin, repeats FROM factor WHERE kind = ?", (kind,)
            ).fetchall()
        return {
            subject: Factor(self._number(value), self._number(margin), repeats)
            for subject, value, margin, repeats in rows
        }

    def factor_kinds(self) -> tuple[str, ...]:
        """The kinds of numbers that there are."""
        with self._open() as database:
            rows = database.execute("SELECT DISTINCT kind FROM factor ORDER BY kind").fetchall()
        return tuple(kind for (kind,) in rows)

    def add_factor(self, kind: str, subject: str, factor: Factor) -> None:
        """Keeps a number in place of an older one."""
        with self._open() as database:
            database.execute(
                f"INSERT OR REPLACE INTO factor VALUES (?, ?, ?, ?, ?, {NOW})",
                (kind, subject, factor.value, factor.margin, factor.repeats),
            )

    def residuals(self, subject: str | None = None) -> tuple[Residual, ...]:
        """What was predicted and measured, of one subject or of all, the oldest first."""
        with self._open() as database:
            rows = database.execute(
                "SELECT subject, predicted, measured, repeats, measured_at FROM residual "
                "WHERE ? IS NULL OR subject = ? ORDER BY measured_at, subject",
                (subject, subject),
            ).fetchall()
        return tuple(
            Residual(subject, self._number(predicted), self._number(measured), repeats, when)
            for subject, predicted, measured, repeats, when in rows
        )

    def add_residual(self, residual: Residual) -> None:
        """Keeps it beside the older ones."""
        with self._open() as database:
            database.execute(
                f"INSERT OR REPLACE INTO residual VALUES (?, ?, ?, ?, {NOW})",
                (residual.subject, residual.predicted, residual.measured, residual.repeats),
            )

    def trials(self, device: Device, compiler: str) -> tuple[Trial, ...]:
        """What was tried on this kind of device with this compiler, in order of the workloads."""
        with self._open() as database:
            rows = database.execute(
                "SELECT workload, candidate, place, seconds FROM trial "
                "WHERE fingerprint = ? AND compiler = ? ORDER BY workload, place, candidate",
                (device.fingerprint, compiler),
            ).fetchall()
        return tuple(Trial(*row) for row in rows)

    def add_trial(self, device: Device, compiler: str, trial: Trial) -> None:
        """Keeps a trial in place of an older one."""
        with self._open() as database:
            database.execute(
                f"INSERT OR REPLACE INTO trial VALUES (?, ?, ?, ?, ?, ?, {NOW})",
                (
                    *(device.fingerprint, compiler, trial.workload),
                    *(trial.candidate, trial.place, trial.seconds),
                ),
            )

    def merge(self, other: "Store") -> dict[str, int]:
        """Adds what `other` has, all in one step; says how much it was, by table.

        Of two samples, links or numbers of one key that with more repeats stays, and the newer if
        they have as many; of two trials that of the shorter time. `other` is only read.

        Raises
        ------
        OutputFileError
            One of them is no profile store or damaged; this one is as it was.
        """
        with TemporaryDirectory(prefix="hetsched-") as folder:
            # A copy, which is brought to this version where it is older.
            copy = Store(Path(folder) / "copy.sqlite")
            other._copy(copy.path)
            try:
                copy.check()
            except OutputFileError as error:
                raise OutputFileError(str(error).replace(str(copy.path), str(other.path))) from None
            with self._open(str(copy.path)) as database:
                return {table: database.execute(text).rowcount for table, text in MERGES.items()}

    def check(self) -> None:
        """Reads all there is.

        Raises
        ------
        OutputFileError
            It is damaged.
        """
        with self._open() as database:
            (found,) = database.execute("PRAGMA integrity_check(1)").fetchone()
        if found != "ok":
            raise self._damaged(found)
        for read in (self.records, self.devices, self.links, self.residuals):
            read()
        for kind in self.factor_kinds():
            self.factors(kind)

    def _copy(self, path: Path) -> None:
        """Writes the store as it stands to `path`, while others may write to it."""
        if not self.path.is_file():
            raise OutputFileError(f"profile store '{self.path}': there is no such file")
        try:
            # Not made if it is absent; written to only where a killed writer left a journal.
            source = sqlite3.connect(
                f"{self.path.resolve().as_uri()}?mode=rw", uri=True, timeout=BUSY_SECONDS
            )
            with closing(source), closing(sqlite3.connect(path)) as copy:
                source.backup(copy)
        except sqlite3.Error as error:
            raise self._damaged(str(error)) from None

    @contextmanager
    def _open(self, attached: str | None = None) -> Iterator[sqlite3.Connection]:
        """A transaction, which is committed when the block ends without an error."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self.path, timeout=BUSY_SECONDS)) as database:
                self._prepare(database)
                if attached is not None:
                    database.execute("ATTACH ? AS other", (attached,))
                with database:
                    yield database
        except (OSError, sqlite3.OperationalError) as error:
            raise OutputFileError(
                f"profile store '{self.path}': {error}; name another with --store"
            ) from None
        except sqlite3.Error as error:
            raise self._damaged(str(error)) from None

    def _prepare(self, database: sqlite3.Connection) -> None:
        """Makes the tables, or brings those of an older version to this one."""
        database.isolation_level = None
        # What is read of the version belongs together, whatever another process writes meanwhile.
        database.execute("BEGIN")
        try:
            version = self._version(database)
        finally:
            database.execute("ROLLBACK")
        if version == VERSION:
            database.isolation_level = "DEFERRED"
            return
        # All at once, and asked again: another process may be doing the same.
        database.execute("BEGIN IMMEDIATE")
        try:
            version = self._version(database)
            if version == 0:
                script = TABLES
            elif version < 3:
                script = FROM_SECOND.format(tables=TABLES)
            elif version < VERSION:
                script = FROM_THIRD
            else:
                script = ""
            for statement in filter(str.strip, script.split(";")):
                database.execute(statement)
            database.execute(f"PRAGMA application_id = {APPLICATION}")
            database.execute(f"PRAGMA user_version = {VERSION}")
            database.execute("COMMIT")
        except BaseException:
            database.execute("ROLLBACK")
            raise
        database.isolation_level = "DEFERRED"

    def _version(self, database: sqlite3.Connection) -> int:
        """The version of the tables; 0 of a new file.

        Raises
        ------
        OutputFileError
            The file is not one that this version can read.
        """
        (version,) = database.execute("PRAGMA user_version").fetchone()
        (application,) = database.execute("PRAGMA application_id").fetchone()
        if application == APPLICATION and version > VERSION:
            raise OutputFileError(
                f"profile store '{self.path}' is of a newer hetsched; name another with --store"
            )
        if application == APPLICATION and version in (3, VERSION):
            return int(version)
        names = {name for (name,) in database.execute("SELECT name FROM sqlite_master")}
        old = application == 0 and version in (1, 2) and {"sample", "link"} <= names
        new = application == 0 and version == 0 and not names
        if not old and not new:
            raise OutputFileError(
                f"'{self.path}' is a database, but no profile store; name another with --store"
            )
        return int(version)

    def _sample(
        self,
        seconds: object,
        spread: object,
        repeats: object,
        margin: object,
        bursts: object,
        rejected: object,
    ) -> Sample:
        count = self._number(repeats)
        return Sample(
            self._number(seconds),
            self._number(spread),
            int(count) if isfinite(count) else 0,
            self._number(margin),
            tuple(map(self._number, self._list(bursts))),
            tuple(map(self._rejected, self._list(rejected))),
        )

    def _link_bursts(self, text: object) -> tuple[tuple[float, float], ...]:
        found = []
        for burst in self._list(text):
            match burst:
                case [seconds, rate] if self._number(rate) > 0:
                    found.append((self._number(seconds), self._number(rate)))
                case _:
                    raise self._damaged(f"it says {burst!r:.40} where a burst should be")
        return tuple(found)

    def _rejected(self, found: object) -> Rejected:
        match found:
            case [seconds, str(why)]:
                return Rejected(self._number(seconds), why)
        raise self._damaged(f"it says {found!r:.40} where a rejected burst should be")

    def _number(self, value: object) -> float:
        """A number that is not negative, maybe infinite: what a time or a rate can be."""
        if isinstance(value, int | float) and value >= 0:
            return float(value)
        raise self._damaged(f"it says {value!r:.40} where a number should be")

    def _list(self, text: object) -> list:
        try:
            found = json.loads(str(text))
        except ValueError:
            found = None
        if isinstance(found, list):
            return found
        raise self._damaged(f"it says {text!r:.40} where a list should be")

    def _model(self, packed: bytes | None) -> bytes:
        if packed is None:
            return b""
        reader = zlib.decompressobj()
        try:
            return reader.decompress(packed, MOST_MODEL_NBYTES)
        except (zlib.error, TypeError):
            raise self._damaged("the model of a kernel cannot be unpacked") from None

    def _device(self, content: str) -> Device:
        known = {f.name for f in fields(Device)}
        try:
            found = json.loads(content)
            return record(Device, {key: found[key] for key in found if key in known})
        except (ValueError, TypeError, DeviceError) as error:
            raise self._damaged(f"a device: {error}") from None

    def _damaged(self, what: str) -> OutputFileError:
        return OutputFileError(
            f"profile store '{self.path}' is damaged or no profile store: {what}; it is left as it "
            "is, name another with --store"
        )


def _end(device: Device) -> str:
    """The name too: two cores of one kind may be near or far."""
    return f"{device.fingerprint} {device.name}"


def _merge(table: str, better: str) -> str:
    """Inserts what this store lacks or has worse. SQLite needs the WHERE to tell ON apart."""
    columns = COLUMNS[table]
    values = ", ".join(f"{name} = excluded.{name}" for name in columns)
    return (
        f"INSERT INTO main.{table} ({', '.join(columns)}) SELECT {', '.join(columns)} "
        f"FROM other.{table} WHERE true ON CONFLICT DO UPDATE SET {values} WHERE {better}"
    )


COLUMNS: Mapping[str, tuple[str, ...]] = {
    "device": ("fingerprint", "content"),
    "kernel": ("signature", "kinds", "model"),
    "sample": (
        *("fingerprint", "compiler", "method", "signature", "seconds", "spread", "margin"),
        *("repeats", "bursts", "measured_at", "rejected"),
    ),
    "link": (
        *("source", "sink", "runtime", "seconds", "bytes_per_second", "margin", "repeats"),
        *("bursts", "measured_at"),
    ),
    "factor": ("kind", "subject", "value", "margin", "repeats", "measured_at"),
    "residual": ("subject", "predicted", "measured", "repeats", "measured_at"),
    "trial": (
        *("fingerprint", "compiler", "workload", "candidate", "place", "seconds"),
        "measured_at",
    ),
}
REPEATED = "(excluded.repeats, excluded.measured_at) > ({0}.repeats, {0}.measured_at)"
MERGES = {
    "device": _merge("device", "false"),
    "kernel": _merge("kernel", "kernel.model IS NULL AND excluded.model IS NOT NULL"),
    "sample": _merge("sample", REPEATED.format("sample")),
    "link": _merge("link", REPEATED.format("link")),
    "factor": _merge("factor", REPEATED.format("factor")),
    "residual": _merge("residual", "false"),
    "trial": _merge("trial", "excluded.seconds < trial.seconds"),
}
