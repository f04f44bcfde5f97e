"""From a plan to compiled parts."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from hetsched.cache import compiled
from hetsched.errors import CompileError, DeviceError, RefusedPart
from hetsched.graph import Graph
from hetsched.host import cores
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
    """Every part of `plan`, replicas behind them, compiled by the target of its device or cached.

    Parts are compiled side by side; progress is told, and errors are raised, in their order.

    Raises
    ------
    DeviceError
        A target cannot compile here; the message says why.
    RefusedPart
        A target refuses a part; the message has the part, its device and the reason.
    """
    for device in plan.devices:
        reason = load(Target, plan.system.device(device).target).unavailable()
        if reason is not None:
            raise DeviceError(f"'{device}' cannot be compiled for here: {reason}", device)
    done = []
    with ThreadPoolExecutor(len(cores())) as workers:
        todo = zip(plan.graphs, plan.copies, strict=True)
        waiting = [workers.submit(_compiled, graph, part) for graph, part in todo]
        try:
            for index, (part, future) in enumerate(zip(plan.copies, waiting, strict=True)):
                if progress:
                    progress(f"{part.name} for {part.device.name}", index, len(plan.copies))
                done.append(future.result())
        finally:
            workers.shutdown(wait=False, cancel_futures=True)
    return tuple(done)


def culprits(plan: Plan, refused: RefusedPart) -> tuple[str, ...]:
    """The kernel groups of a refused part that its target does not compile alone either.

    All of the part's groups where each one alone compiles.
    """
    part = next(p for p in plan.copies if (p.name, p.device.name) == (refused.part, refused.device))
    if len(part.groups) == 1:
        return (part.groups[0].name,)
    target = load(Target, part.device.target)
    found = []
    for group in part.groups:
        try:
            compiled(target, plan.graph.part(group.ops, group.name), part.device)
        except CompileError:
            found.append(group.name)
    return tuple(found) or tuple(group.name for group in part.groups)


def _compiled(graph: Graph, part: Part) -> CompiledPart:
    try:
        target = load(Target, part.device.target)
        artifact = compiled(target, graph, part.device)
        target.prepare(artifact, part.device)
    except CompileError as error:
        raise RefusedPart(part.name, part.device.name, str(error)) from error
    return CompiledPart(part, graph, artifact)
