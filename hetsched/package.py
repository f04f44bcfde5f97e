"""The package `.hsp`: a compiled plan in one file that loads without a compiler.

An archive (`archive.py`) of `plan.json`, `model.onnx` (the graph before any split, without large
weights), `parts/NAME/...` (what the targets compiled) and the arrays of all. Only a target's own
loader makes code of a part.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from hetsched.archive import Archive, Arrays, reading
from hetsched.archive import write as write_archive
from hetsched.compiler import CompiledPart
from hetsched.errors import HetschedError, PackageError
from hetsched.graph import DETACHED_NBYTES, from_onnx, to_onnx
from hetsched.plan import Part, Plan
from hetsched.target import Artifact

NAME = "package"
VERSION = 3


def write(path: str | Path, plan: Plan, parts: Sequence[CompiledPart]) -> None:
    """Writes the package aside, then in the place of `path`.

    Raises
    ------
    OutputFileError
        The file cannot be written; an older one is untouched.
    """
    arrays = Arrays()
    graph = plan.original
    members: dict[str, bytes] = {
        "plan.json": plan.to_json().encode(),
        "model.onnx": to_onnx(graph, weights=False).SerializeToString(deterministic=True),
    }
    described = []
    for item in parts:
        folder = _folder(plan, item.part)
        members |= {f"{folder}/{name}": data for name, data in item.artifact.files.items()}
        described.append(
            {
                "name": item.part.name,
                "device": item.part.device.name,
                "target": item.part.device.target,
                "requires": item.artifact.requires,
                "files": list(item.artifact.files),
                "weights": [
                    [name, arrays.add(array)] for name, array in item.artifact.weights.items()
                ],
            }
        )
    constants = {
        name: arrays.add(array)
        for name, array in graph.constants.items()
        if array.nbytes >= DETACHED_NBYTES and array.dtype != object
    }
    about = {
        "format": f"hetsched-{NAME}",
        "version": VERSION,
        "constants": constants,
        "packed": {name: lanes for item in parts for name, lanes in item.graph.packed.items()},
        "parts": described,
    }
    write_archive(path, about, members, arrays)


def _folder(plan: Plan, part: Part) -> str:
    """Of a part, or of a replica by the number of its device."""
    home = plan.placement[part.groups[0].name]
    number = [device.name for device in plan.system.devices].index(part.device.name)
    return f"parts/{part.name}" + ("" if part.device.name == home else f".{number}")


def read(path: str | Path, whole: bool = False) -> tuple[Plan, tuple[CompiledPart, ...]]:
    """The plan and the compiled parts of a package; weights stay in the file, mapped.

    All that a run reads is checked. Weights that only the model has, and no part reads, are checked
    if `whole`.

    Raises
    ------
    PackageError
        The file is missing, truncated, edited, foreign, or of another format.
    """
    with reading(path, NAME) as archive:
        try:
            return _read(Path(path), archive, whole)
        except DecodeError:
            raise PackageError(f"'{path}' is damaged: model.onnx does not parse") from None
        except PackageError:
            raise
        except HetschedError as error:
            raise PackageError(f"'{path}' is damaged: {error}") from None


def _read(path: Path, archive: Archive, whole: bool) -> tuple[Plan, tuple[CompiledPart, ...]]:
    manifest, arrays = archive.manifest, archive.arrays
    if manifest.get("version") != VERSION:
        raise PackageError(
            f"'{path}' has package format {manifest.get('version')}; this hetsched reads "
            f"{VERSION}; compile the model again"
        )
    model = onnx.ModelProto.FromString(archive.member("model.onnx"))
    constants = {str(name): index for name, index in manifest["constants"].items()}
    graph = from_onnx(model, {name: arrays[index] for name, index in constants.items()})
    plan = Plan.from_json(archive.member("plan.json").decode(), graph, same_graph=True)
    described = {(str(part["name"]), str(part["device"])): part for part in manifest["parts"]}
    copies = [(part.name, part.device.name) for part in plan.copies]
    if list(described) != copies:
        raise PackageError(f"'{path}' is damaged: its parts are not those of its plan")
    packed = {str(name): int(lanes) for name, lanes in manifest["packed"].items()}
    split = replace(plan.graph, packed=packed)
    given = {tensor.name for tensor in graph.outputs}
    needed = [index for name, index in constants.items() if name in given]
    parts = []
    for part in plan.copies:
        entry = described[part.name, part.device.name]
        folder = _folder(plan, part)
        artifact = Artifact(
            files={name: archive.member(f"{folder}/{name}") for name in entry["files"]},
            weights={str(name): arrays[index] for name, index in entry["weights"]},
            requires=str(entry["requires"]),
        )
        needed += [index for _, index in entry["weights"]]
        parts.append(CompiledPart(part, split.part(part.ops, part.name), artifact))
    archive.check(None if whole else needed)
    return plan, tuple(parts)
