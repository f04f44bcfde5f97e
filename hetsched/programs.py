"""What targets that generate code by TVM share: its version, refusals, programs in artifacts."""

from collections.abc import Callable, Mapping
from functools import cache
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from hetsched import lowering, schedules
from hetsched.errors import PackageError
from hetsched.graph import Graph, to_onnx
from hetsched.launches import Program
from hetsched.target import Artifact, Footprint

# By who refuses, and by structure.
_refusals: dict[tuple[str, bytes], str | None] = {}


def kept_refusal(kind: str, graph: Graph, why_not: Callable[[Graph], str | None]) -> str | None:
    """What `why_not` of `kind` says of `graph`; asked once for groups that a network repeats."""
    structure = to_onnx(graph, weights=False)
    structure.graph.name = ""
    key = kind, structure.SerializeToString(deterministic=True)
    if key not in _refusals:
        _refusals[key] = why_not(graph)
    return _refusals[key]


def program_of(artifact: Artifact, graph: Graph, language: str) -> Program:
    """The program of an artifact, checked to be that of the graph and to have its weights.

    Raises
    ------
    PackageError
        It is damaged.
    """
    damaged = f"part '{graph.name}' is damaged:"
    try:
        program = Program.from_files(artifact.files, language)
    except PackageError as error:
        raise PackageError(f"{damaged} {error}") from None
    for what, own, tensors in (
        ("inputs", program.inputs, graph.inputs),
        ("outputs", program.outputs, graph.computed),
    ):
        expected = [(t.shape, t.dtype) for t in map(graph.handed, tensors)]
        if [(t.shape, t.dtype) for t in own] != expected:
            raise PackageError(f"{damaged} its program has other {what} than the part")
    weights = artifact.weights
    for name in (*program.weights, *given(graph)):
        if name not in weights:
            raise PackageError(f"{damaged} there is no weight '{name}'")
    for name, nbytes in program.weights.items():
        if weights[name].nbytes != nbytes:
            raise PackageError(
                f"{damaged} weight '{name}' has {weights[name].nbytes} bytes, not {nbytes}"
            )
    return program


def given(graph: Graph) -> dict[str, np.ndarray]:
    """The outputs that are constants."""
    names = [tensor.name for tensor in graph.outputs]
    return {name: graph.constants[name] for name in names if name in graph.constants}


def footprint(program: Program, weights: Mapping[str, np.ndarray]) -> Footprint:
    """What a loaded program holds, with all weights of its artifact."""
    own = len(program.constants) + program.workspace_nbytes
    return Footprint({name: array.nbytes for name, array in weights.items()}, own)


@cache
def generator() -> str:
    """TVM's version and a digest of what shapes the code beside it: with others, times differ."""
    try:
        tvm = version("apache-tvm")
    except PackageNotFoundError:
        tvm = "absent"
    digest = sha256()
    for package in (lowering, schedules):
        for path in sorted(Path(str(package.__path__[0])).rglob("*.py")):
            digest.update(path.read_bytes())
    return f"tvm {tvm}, rules {digest.hexdigest()[:8]}"
