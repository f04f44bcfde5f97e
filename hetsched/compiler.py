"""From a plan to compiled parts."""

from collections.abc import Callable
from dataclasses import dataclass

from hetsched.errors import CompileError, DeviceError
from hetsched.graph import Graph
from hetsched.plan import Part, Plan
from hetsched.plugin import load
from hetsched.target import Artifact, Target

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, eq=False)
class CompiledPart:
    """A part, its graph and what its target made of it."""

    part: Part
    graph: Graph
    artifact: Artifact


def compile_parts(plan: Plan, progress: Progress | None = None) -> tuple[CompiledPart, ...]:
    """Every part of `plan`, compiled by the target of its device.

    Raises
    ------
    DeviceError
        A target cannot compile here; the message says why.
    CompileError
        A target refuses a part; the message has the part, its device and the reason.
    """
    compiled = []
    for index, part in enumerate(plan.parts):
        if progress:
            progress(f"{part.name} for {part.device.name}", index, len(plan.parts))
        target = load(Target, part.device.target)
        reason = target.unavailable()
        if reason is not None:
            raise DeviceError(f"'{part.device.name}' cannot be compiled for here: {reason}")
        graph = plan.graph.part(part.ops, part.name)
        try:
            artifact = target.compile(graph, part.device)
        except CompileError as error:
            raise CompileError(f"{part.name} on '{part.device.name}': {error}") from error
        compiled.append(CompiledPart(part, graph, artifact))
    return tuple(compiled)
