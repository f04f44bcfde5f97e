"""What a plan holds in memory on each device: weights as the code stores them, tensors, workspaces.

What the caller of a run gives it is the caller's and does not count; what the run returns does. One
request is in flight; each further one needs its tensors again.
"""

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hetsched.cache import footprint
from hetsched.crew import Between, nbytes_of, tables_nbytes
from hetsched.device import Device
from hetsched.dtype import empty_nbytes, numpy_dtype
from hetsched.errors import CompileError
from hetsched.graph import Graph
from hetsched.liveness import peak_nbytes
from hetsched.plugin import load, names
from hetsched.request import Step, View
from hetsched.target import Artifact, Footprint, Target

# TVM's pool of temporary memory gives whole pages.
PAGE_NBYTES = 4096


@dataclass(frozen=True, eq=False)
class Loaded:
    """A part on its device, with what it holds; None where its target cannot tell."""

    step: Step
    graph: Graph
    footprint: Footprint | None


@dataclass(frozen=True)
class Holding:
    """Bytes that a device holds while a plan runs.

    `tensors_nbytes` are what its parts hand over and return, `workspace_nbytes` what lies within
    them, small weights among it, and the tables by which a crew runs them. If not `exact`, it holds
    as much at most, by the graph alone.
    """

    device: str
    weights_nbytes: int
    tensors_nbytes: int
    workspace_nbytes: int
    exact: bool

    @property
    def nbytes(self) -> int:
        return self.weights_nbytes + self.tensors_nbytes + self.workspace_nbytes


@dataclass(frozen=True)
class Memory:
    """What each device holds; `shared_nbytes` of weights are counted for several and there once."""

    devices: tuple[Holding, ...]
    shared_nbytes: int

    @property
    def nbytes(self) -> int:
        return sum(held.nbytes for held in self.devices) - self.shared_nbytes

    @property
    def exact(self) -> bool:
        return all(held.exact for held in self.devices)


def expected(step: Step, graph: Graph) -> Loaded:
    """What a part will hold, before it is compiled."""
    device = step.device
    if not is_known(device):
        return Loaded(step, graph, None)
    target = load(Target, device.target)
    if target.unavailable():
        return Loaded(step, graph, None)
    try:
        return Loaded(step, graph, footprint(target, graph, device))
    except CompileError:
        # Who compiles it will say so, and ask for another plan.
        return Loaded(step, graph, None)


def compiled(step: Step, graph: Graph, artifact: Artifact) -> Loaded:
    """What a part holds, once it is compiled."""
    return Loaded(step, graph, load(Target, step.device.target).held(artifact))


def memory(
    parts: Sequence[Loaded],
    outputs: Sequence[str],
    views: Mapping[str, View],
    crew: bool,
    routes: Sequence[tuple[int, ...]],
) -> Memory:
    """What the devices of `parts` hold in a run that returns `outputs`.

    `views` are joined of what several parts make. `crew` says that parts on several units hand over
    without Python, as far as they are all functions of addresses. Requests take `routes` in turn,
    each the numbers of its parts in the order of the plan, and what one needed stays there.
    """
    routes = list(dict.fromkeys(routes))
    courses = [[parts[number] for number in route] for route in routes]
    crew = crew and _is_crew(parts)
    weights: dict[str, dict[str, int]] = defaultdict(dict)
    workspace: dict[str, int] = defaultdict(int)
    exact = dict.fromkeys((part.step.device.name for part in parts), True)
    pools: dict[str, list[tuple[int, ...]]] = defaultdict(list)
    device_of = {part.step.device.unit: part.step.device.name for part in parts}
    for part in parts:
        device = part.step.device
        found = part.footprint
        if found is None:
            exact[device.name] = False
            weights[device.name] |= {n: array.nbytes for n, array in part.graph.constants.items()}
            workspace[device.name] += peak_nbytes(part.graph)
            continue
        weights[device.name] |= found.weights
        workspace[device.name] += found.own_nbytes
        pools[device.unit] += found.temporaries
    for unit, calls in pools.items():
        workspace[device_of[unit]] += pool_nbytes(calls)
    if crew:
        # Who waits for a run does the last unit's work, in a thread that has a pool of its own.
        last = [course[-1].step.device for course in courses]
        served = dict.fromkeys(device.unit for device in last if device.threads == 1)
        calls = [sizes for unit in served for sizes in pools[unit]]
        workspace[last[0].name] += pool_nbytes(calls)
        steps = [[part.step for part in course] for course in courses]
        addresses = {part.step: _addresses(part) for part in parts}
        workspace[last[0].name] += tables_nbytes(steps, addresses)
    tensors, known = _tensors(courses, outputs, views, crew)
    held = tuple(
        Holding(
            name,
            sum(weights[name].values()),
            tensors.get(name, 0),
            workspace[name],
            exact[name] and known,
        )
        for name in exact
    )
    spaces = {part.step.device.name: part.step.device.memory_space for part in parts}
    once = {(spaces[name], weight): n for name, own in weights.items() for weight, n in own.items()}
    return Memory(held, sum(item.weights_nbytes for item in held) - sum(once.values()))


def _tensors(
    courses: Sequence[Sequence[Loaded]],
    outputs: Sequence[str],
    views: Mapping[str, View],
    crew: bool,
) -> tuple[dict[str, int], bool]:
    """The bytes of what parts hand over and return, by device, and whether they are exact."""
    found: dict[str, int] = defaultdict(int)
    kinds = {
        tensor.name: (part.graph.handed(tensor).shape, numpy_dtype(tensor.dtype))
        for part in courses[0]
        for tensor in part.graph.outputs
    }
    if not crew:
        nbytes = {name: nbytes_of(kind) for name, kind in kinds.items()}
        steps = [part.step for part in courses[0]]
        tensors, known = _by_python(steps, nbytes, outputs, views)
        for course in courses[1:]:
            for step in (part.step for part in course if part not in courses[0]):
                tensors[step.device.name] += sum(nbytes[name] for name in step.outputs)
        return tensors, known and len(courses) == 1
    for number, course in enumerate(courses):
        steps = [part.step for part in course]
        between = Between(steps, kinds, outputs, views)
        for device, charged in between.charged.items():
            found[device] += charged
        # The results are of one request, whichever way it took.
        for name, kind in between.results.items() if not number else ():
            found[steps[min(between.made[name])].device.name] += empty_nbytes(nbytes_of(kind))
    return found, True


def _is_crew(parts: Sequence[Loaded]) -> bool:
    """Whether the parts hand over without Python, where their devices can."""
    return len({part.step.device.unit for part in parts}) > 1 and all(map(_is_code, parts))


def _addresses(part: Loaded) -> int:
    """What the code of a part takes: tensors, weights, small ones and the workspace."""
    weights = part.footprint.weights if part.footprint is not None else {}
    return len(part.step.inputs) + len(part.step.outputs) + len(weights) + 2


def _is_code(part: Loaded) -> bool:
    made = [t.name for t in part.graph.outputs if t.name in part.graph.producers]
    return part.footprint is not None and len(set(made)) == len(part.graph.outputs)


def _by_python(
    steps: Sequence[Step],
    nbytes: Mapping[str, int],
    outputs: Sequence[str],
    views: Mapping[str, View],
) -> tuple[dict[str, int], bool]:
    """The same where Python hands over: on one device everything stays to the end of the run."""
    found: dict[str, int] = defaultdict(int)
    for step in steps:
        found[step.device.name] += sum(nbytes[name] for name in step.outputs)
    # A copy for each reader, while it runs, and one for the caller.
    whole = {name: sum(nbytes[piece] for piece in view.pieces) for name, view in views.items()}
    copies: dict[str, int] = defaultdict(int)
    for step in steps:
        read = sum(whole.get(name, 0) for name in step.inputs)
        copies[step.device.name] = max(copies[step.device.name], read)
    for device, most in copies.items():
        found[device] += most
    found[steps[-1].device.name] += sum(whole.get(name, 0) for name in outputs)
    devices = {step.device for step in steps}
    return found, len(steps) == 1 or (len(devices) == 1 and steps[0].device.threads == 1)


def pool_nbytes(calls: Sequence[Sequence[int]]) -> int:
    """What TVM's pool of a thread holds after calls that each take so many bytes at once.

    The pool keeps every piece that it once gave. A call gets the smallest that is large enough;
    where none is, the largest is replaced by one that is.

    Examples
    --------
    >>> pool_nbytes([(4096, 8192), (8000,)])
    12288
    """
    free: list[int] = []
    # From the second run on, nothing is new.
    for sizes in (*calls, *calls):
        taken = []
        for nbytes in sizes:
            needed = -(-nbytes // PAGE_NBYTES) * PAGE_NBYTES
            fits = bisect_left(free, needed)
            if fits < len(free):
                taken.append(free.pop(fits))
            else:
                if free:
                    free.pop()
                taken.append(needed)
        for piece in taken:
            insort(free, piece)
    return sum(free)


def is_known(device: Device) -> bool:
    """Whether its target is one of ours: a device of an instance need have none."""
    return device.target.partition(":")[0] in names(Target)


def crew_is_here(devices: Sequence[Device]) -> bool:
    """Whether parts on these devices can hand over without Python, if they are code."""
    return all(
        is_known(device)
        and not (target := load(Target, device.target)).unavailable()
        and target.crew(device) is not None
        for device in devices
    )
