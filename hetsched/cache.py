"""Compiled parts and refusals, kept on disk by content for the next process that asks.

An entry belongs to all that decides what a compiler makes: the graph with its weights, the target
with its version and settings, and the source files of hetsched. Each is an archive of its own,
written aside and then put in place, so that several processes may use one folder. The entries that
were not read for the longest go when there are too many bytes.
"""

import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path

from hetsched.archive import Arrays, reading, write
from hetsched.device import Device
from hetsched.errors import CompileError, OutputFileError, PackageError
from hetsched.graph import Graph, to_onnx
from hetsched.store import default_path
from hetsched.target import Artifact, Footprint, Target

NAME = "cache-entry"
SUFFIX = ".hsc"
OFF = "off"
LIMIT_NBYTES = 4 << 30
REFUSALS = "refusals.json"
FOOTPRINT = "footprint.json"


@dataclass(frozen=True)
class Cache:
    """Entries in `folder`, made when something is first kept; without a folder it keeps nothing.

    What cannot be read or written counts as absent: a cache is never the reason of a failure.
    """

    folder: Path | None
    limit_nbytes: int = LIMIT_NBYTES

    def read(self, key: str) -> Artifact | None:
        """What is kept under `key`, arrays mapped, or None; a damaged entry is removed."""
        if self.folder is None:
            return None
        path = self._path(key)
        try:
            with reading(path, NAME) as archive:
                manifest = archive.manifest
                artifact = Artifact(
                    files={name: archive.member(name) for name in manifest["members"]},
                    weights={name: archive.arrays[i] for name, i in manifest["weights"]},
                    requires=str(manifest["requires"]),
                )
                archive.check()
        except PackageError:
            self._remove(path)
            return None
        # Another process may have removed it meanwhile; what is mapped stays.
        with suppress(OSError):
            _stamp(path)
        return artifact

    def keep(self, key: str, artifact: Artifact) -> None:
        """Keeps the artifact under `key`, and removes what is too much."""
        if self.folder is None:
            return
        arrays = Arrays()
        about = {
            "format": f"hetsched-{NAME}",
            "weights": [[name, arrays.add(array)] for name, array in artifact.weights.items()],
            "requires": artifact.requires,
        }
        with suppress(OSError, OutputFileError):
            self.folder.mkdir(parents=True, exist_ok=True)
            write(self._path(key), about, artifact.files, arrays, durable=False)
            _stamp(self._path(key))
            self._evict()

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{key}{SUFFIX}"

    def _evict(self) -> None:
        assert self.folder is not None
        found = []
        for path in self.folder.glob(f"*{SUFFIX}"):
            try:
                status = path.stat()
            except OSError:
                continue
            found.append((status.st_mtime_ns, path.name, status.st_size))
        total = sum(nbytes for _, _, nbytes in found)
        for _, name, nbytes in sorted(found):
            if total <= self.limit_nbytes:
                break
            self._remove(self.folder / name)
            total -= nbytes

    def _remove(self, path: Path) -> None:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _stamp(path: Path) -> None:
    """Notes that the entry was used, finer than the clock that the system stamps files by."""
    now = time.time_ns()
    os.utime(path, ns=(now, now))


def default_cache() -> Cache:
    """`$HETSCHED_CACHE`, a folder or `off`, else a folder beside the profile store.

    `$HETSCHED_CACHE_BYTES` is the most that the folder may take, by default 4 GiB.
    """
    chosen = os.environ.get("HETSCHED_CACHE", "")
    folder = Path(chosen) if chosen else default_path().with_suffix(".compiled")
    limit = os.environ.get("HETSCHED_CACHE_BYTES", "")
    return Cache(
        None if chosen == OFF else folder, int(limit) if limit.isdecimal() else LIMIT_NBYTES
    )


def compiled(target: Target, graph: Graph, device: Device) -> Artifact:
    """What `target` makes of `graph`, from the cache where it has been made before.

    Raises
    ------
    CompileError
        The target refuses the graph.
    """
    for name, lanes in graph.packed.items():
        if lanes != target.lanes(device):
            there = f"blocks of {target.lanes(device)}" if target.lanes(device) else "no blocks"
            raise CompileError(
                f"'{graph.name}' hands '{name}' over in blocks of {lanes} channels, "
                f"and '{device.name}' knows {there}"
            )
    found = default_cache()
    settings = target.settings(device)
    if settings is None or found.folder is None:
        return target.compile(graph, device)
    key = _key(target, device, settings, "artifact", graph.digest)
    artifact = found.read(key)
    if artifact is None:
        artifact = target.compile(graph, device)
        found.keep(key, artifact)
    return artifact


def footprint(target: Target, graph: Graph, device: Device) -> Footprint | None:
    """What `graph` would hold on `device`, from the cache where it was asked or compiled before.

    None where the target cannot tell.

    Raises
    ------
    CompileError
        The target refuses the graph.
    """
    found = default_cache()
    settings = target.settings(device)
    if settings is None or found.folder is None:
        return target.footprint(graph, device)
    key = _key(target, device, settings, "footprint", graph.digest)
    kept = found.read(key)
    if kept is not None and FOOTPRINT in kept.files:
        content = json.loads(kept.files[FOOTPRINT])
        if content is None:
            return None
        temporaries = tuple(map(tuple, content["temporaries"]))
        return Footprint(content["weights"], content["own_nbytes"], temporaries)
    made = target.footprint(graph, device)
    told = None if made is None else asdict(made)
    found.keep(key, Artifact({FOOTPRINT: json.dumps(told).encode()}))
    return made


def refusals(target: Target, parts: Sequence[Graph], device: Device) -> list[str | None]:
    """Why `target` cannot compile each of `parts`, or None; asked once for parts of one structure.

    Refusals depend on structure and small constants, not on the values of weights.
    """
    found = default_cache()
    settings = target.settings(device)
    if settings is None or found.folder is None:
        return [target.refusal(part, device) for part in parts]
    structures = sha256()
    for part in parts:
        model = to_onnx(part, weights=False).SerializeToString(deterministic=True)
        structures.update(sha256(model).digest())
    key = _key(target, device, settings, "refusals", structures.hexdigest())
    kept = found.read(key)
    if kept is not None and REFUSALS in kept.files:
        reasons: list[str | None] = json.loads(kept.files[REFUSALS])
        return reasons
    reasons = [target.refusal(part, device) for part in parts]
    found.keep(key, Artifact({REFUSALS: json.dumps(reasons).encode()}))
    return reasons


def _key(target: Target, device: Device, settings: str, kind: str, content: str) -> str:
    module = sys.modules[type(target).__module__]
    sources = [_sources(Path(str(file)).parent) for file in (__file__, module.__file__)]
    decisive = (
        sources,
        target.name,
        repr(target),
        target.configuration(device),
        settings,
        kind,
        content,
    )
    return sha256(json.dumps(decisive).encode()).hexdigest()


@cache
def _sources(folder: Path) -> str:
    """A digest of the source files below `folder`: with other rules, code is other code."""
    digest = sha256()
    for path in sorted([*folder.rglob("*.py"), *folder.rglob("*.c")]):
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()
