"""Measured times, kept in SQLite for the next run.

A sample belongs to a device fingerprint, a group signature and a compiler version: the same kernel
on the same kind of device is measured once. Each sample is committed by itself, so a kill loses at
most the one in flight; several processes may write at once.
"""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from hetsched.device import Device, Link
from hetsched.errors import OutputFileError
from hetsched.trial import Trial

SCHEMA = """
CREATE TABLE IF NOT EXISTS sample (
    fingerprint TEXT, signature TEXT, compiler TEXT, kinds TEXT, seconds REAL, spread REAL,
    repeats INTEGER, measured_at TEXT DEFAULT CURRENT_TIMESTAMP,
    PRIMARY KEY (fingerprint, signature, compiler)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS link (
    source TEXT, sink TEXT, seconds REAL, bytes_per_second REAL,
    measured_at TEXT DEFAULT CURRENT_TIMESTAMP,
    PRIMARY KEY (source, sink)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS trial (
    fingerprint TEXT, compiler TEXT, workload TEXT, candidate TEXT, place INTEGER, seconds REAL,
    measured_at TEXT DEFAULT CURRENT_TIMESTAMP,
    PRIMARY KEY (fingerprint, compiler, workload, candidate)
) WITHOUT ROWID;
"""
VERSION = 2
# How long a writer waits for another process.
BUSY_SECONDS = 30.0


@dataclass(frozen=True)
class Sample:
    """Median seconds of a kernel, and the spread: half the distance between the quartiles."""

    seconds: float
    spread: float
    repeats: int


def default_path() -> Path:
    """`$HETSCHED_STORE`, or the user's cache folder."""
    if "HETSCHED_STORE" in os.environ:
        return Path(os.environ["HETSCHED_STORE"])
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "hetsched" / "profile.sqlite"


@dataclass(frozen=True)
class Store:
    """The profile store at `path`; made when something is first written."""

    path: Path

    def sample(self, device: Device, signature: str, compiler: str) -> Sample | None:
        """What was measured for this kernel on this kind of device, or None."""
        query = (
            "SELECT seconds, spread, repeats FROM sample "
            "WHERE fingerprint = ? AND signature = ? AND compiler = ?"
        )
        with self._open() as database:
            row = database.execute(query, (device.fingerprint, signature, compiler)).fetchone()
        return Sample(*row) if row else None

    def add(
        self, device: Device, signature: str, compiler: str, kinds: str, sample: Sample
    ) -> None:
        with self._open() as database:
            database.execute(
                "INSERT OR REPLACE INTO sample "
                "(fingerprint, signature, compiler, kinds, seconds, spread, repeats) "
                "VALUES (?, ?, ?, ?, ?, ?, ?)",
                (
                    device.fingerprint,
                    signature,
                    compiler,
                    kinds,
                    sample.seconds,
                    sample.spread,
                    sample.repeats,
                ),
            )

    def link(self, source: Device, sink: Device) -> Link | None:
        """What was measured between these two devices, or None."""
        with self._open() as database:
            row = database.execute(
                "SELECT seconds, bytes_per_second FROM link WHERE source = ? AND sink = ?",
                (_end(source), _end(sink)),
            ).fetchone()
        return Link(source.name, sink.name, *row) if row else None

    def add_link(self, source: Device, sink: Device, link: Link) -> None:
        with self._open() as database:
            database.execute(
                "INSERT OR REPLACE INTO link (source, sink, seconds, bytes_per_second) "
                "VALUES (?, ?, ?, ?)",
                (_end(source), _end(sink), link.seconds, link.bytes_per_second),
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
        with self._open() as database:
            database.execute(
                "INSERT OR REPLACE INTO trial "
                "(fingerprint, compiler, workload, candidate, place, seconds) "
                "VALUES (?, ?, ?, ?, ?, ?)",
                (
                    device.fingerprint,
                    compiler,
                    trial.workload,
                    trial.candidate,
                    trial.place,
                    trial.seconds,
                ),
            )

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self.path, timeout=BUSY_SECONDS)) as database:
                self._prepare(database)
                with database:
                    yield database
        except (OSError, sqlite3.Error) as error:
            raise OutputFileError(
                f"profile store '{self.path}': {error}; name another with --store"
            ) from None

    def _prepare(self, database: sqlite3.Connection) -> None:
        (version,) = database.execute("PRAGMA user_version").fetchone()
        if version == VERSION:
            return
        if version > VERSION:
            raise OutputFileError(
                f"profile store '{self.path}' is of a newer hetsched; name another with --store"
            )
        # All at once: another process may be making the same file.
        database.executescript(
            f"BEGIN IMMEDIATE; {SCHEMA} PRAGMA user_version = {VERSION}; COMMIT;"
        )


def _end(device: Device) -> str:
    """The name too: two cores of one kind may be near or far."""
    return f"{device.fingerprint} {device.name}"
