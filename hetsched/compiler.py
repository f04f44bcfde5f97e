"""From a plan to compiled parts."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from hetsched.cache import compiled
from hetsched.errors import CompileError, DeviceError, RefusedPart
from hetsched.forms import packed
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
            raise DeviceError(f"'{device}' cannot be compiled for here: {reason}")
    graph = replace(plan.graph, packed=packed_between(plan))
    done = []
    with ThreadPoolExecutor(len(cores())) as workers:
        waiting = [workers.submit(_compiled, graph, part) for part in plan.copies]
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


def packed_between(plan: Plan) -> dict[str, int]:
    """The tensors that parts of `plan` hand over in blocks of channels, and their channels.

    Those of `packed` whose makers and readers all are on devices of one target and block.
    """
    kinds = {}
    for part in plan.copies:
        target = part.device.target
        kinds[part.device] = (target, load(Target, target).lanes(part.device))
    found = {lanes: packed(plan.graph, lanes) for _, lanes in kinds.values() if lanes}
    views = plan.graph.views
    # What is joined without a copy has one form with its pieces.
    whole = {piece.name: name for name, pieces in views.items() for piece in pieces}
    users: dict[str, set[tuple[str, int | None]]] = {}
    crossing: dict[str, None] = {}
    for part in plan.copies:
        for tensor in (*part.inputs, *part.outputs):
            crossing[tensor.name] = None
            users.setdefault(whole.get(tensor.name, tensor.name), set()).add(kinds[part.device])
    chosen = {}
    for name in crossing:
        (_, lanes), *others = users[whole.get(name, name)]
        if lanes and not others and name in found[lanes]:
            chosen[name] = lanes
    return chosen


def _compiled(whole: Graph, part: Part) -> CompiledPart:
    graph = whole.part(part.ops, part.name)
    try:
        artifact = compiled(load(Target, part.device.target), graph, part.device)
    except CompileError as error:
        raise RefusedPart(part.name, part.device.name, str(error)) from error
    return CompiledPart(part, graph, artifact)
