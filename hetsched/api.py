"""The verbs of hetsched, as the command line and the Python API have them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from math import inf
from pathlib import Path
from time import perf_counter

from hetsched.calibration import calibrate
from hetsched.compiler import compile_parts, culprits
from hetsched.contest import latencies, paces
from hetsched.corun import measured_slowdown, sharing_units
from hetsched.cost import CostModel, Prices, price, refusals
from hetsched.device import Device
from hetsched.errors import (
    CompileError,
    DeviceError,
    HetschedError,
    InfeasiblePlan,
    PlanError,
    RefusedPart,
    UnsupportedOperation,
    device_failure,
)
from hetsched.executable import Executable
from hetsched.explain import Account, Explanation
from hetsched.graph import Graph
from hetsched.host import pinned
from hetsched.inputs import seeded_inputs
from hetsched.instance import read_instance
from hetsched.learning.regression import Estimate
from hetsched.links import Repeated, measure_links
from hetsched.objective import front as pareto_front
from hetsched.objective import objective as objective_of
from hetsched.operation import group_flops
from hetsched.partitioner import Partitioner, check_objective, serving
from hetsched.plan import Plan, Recipe
from hetsched.plugin import load as load_plugin
from hetsched.plugin import names
from hetsched.problem import Problem, Solution
from hetsched.profiling import THOROUGH, Course, Effort, Key, measure
from hetsched.scheduler import Scheduler
from hetsched.store import Factor, Sample, Store, default_path
from hetsched.system import System
from hetsched.target import Target
from hetsched.tasks import TaskGraph
from hetsched.trial import Trial, choices

Progress = Callable[[str, int, int], None]
# Is told, in a line, of each device that is gone on without.
Fallback = Callable[[str], None]

# Plans of several devices that are measured beside the best single device.
MOST_MEASURED = 3
# Of a budget for profiling, what may go to links.
LINKS_SHARE = 0.2
# Graphs by which it is measured how devices slow each other down.
FEW = 3


def partition(
    graph: Graph,
    system: System | str,
    partitioner: str = "auto",
    objective: str | None = None,
    cost_model: str | None = None,
    store: str | Path | None = None,
    strict: bool = False,
    progress: Progress | None = None,
    fallback: Fallback | None = None,
) -> Plan:
    """A plan for `graph` on `system`, a `System` or device strings of this machine.

    `partitioner` and `cost_model` name extensions, with options: `layerwise:objective=latency`.
    Without a cost model, devices that are here are measured (`profiled`), and machines that are
    only described are priced by their `roofline`. `strict` makes an error of an operation that any
    of the devices cannot run, which otherwise is placed on another. With a `fallback`, a device
    that is not here, or fails while it is measured, is left out, and `fallback` told in one line.

    Raises
    ------
    UnsupportedOperation
        No device can run an operation, or not every device under `strict`.
    InfeasiblePlan
        The devices cannot hold the graph.
    PluginError
        There is no such partitioner, cost model, objective or option.
    """
    found = plans(
        graph, system, partitioner, objective, cost_model, store, strict, progress, fallback
    )
    return found[0]


def plans(
    graph: Graph,
    system: System | str,
    partitioner: str = "auto",
    objective: str | None = None,
    cost_model: str | None = None,
    store: str | Path | None = None,
    strict: bool = False,
    progress: Progress | None = None,
    fallback: Fallback | None = None,
) -> tuple[Plan, ...]:
    """The plan of `partition`, and behind it others that are worth measuring, the best first.

    Raises
    ------
    UnsupportedOperation, InfeasiblePlan, PluginError
        As `partition`.
    """
    if isinstance(system, str):
        system = System.local(system, Store(Path(store)) if store else None, fallback)
    chosen = partitioner_for(partitioner, objective)
    while True:
        try:
            prices = priced(graph, system, cost_model, store, progress)
            break
        except HetschedError as error:
            system = _left(system, error, fallback)
    if strict:
        for name, refusals in prices.refusals.items():
            for device, reason in refusals.items():
                raise UnsupportedOperation(f"'{device}' cannot run '{name}': {reason}")
    found = chosen.plans(graph, system, prices)
    if prices.told is None:
        return found
    return tuple(replace(plan, notes=(*plan.notes, prices.told)) for plan in found)


def _left(system: System, error: HetschedError, fallback: Fallback | None) -> System:
    """The system without the device that failed, where `fallback` allows it and is told.

    Raises
    ------
    HetschedError
        `error`, where it is no device's, or nothing is left.
    """
    failed = device_failure(error)
    names = [device.name for device in system.devices]
    if fallback is None or failed is None or failed.device not in names or len(names) == 1:
        raise error
    fallback(f"{failed}; it is left out")
    return system.without(failed.device)


def front(found: Sequence[Plan], objectives: Sequence[str]) -> list[tuple[tuple[float, ...], Plan]]:
    """The plans that no other one is at least as good as for all objectives, with their values.

    Seconds, joules and bytes, in the order of `objectives`; the best for the first one first.

    Raises
    ------
    PluginError
        There is no such objective.
    DeviceError
        A device has no watts, which energy needs.
    """
    goals = [objective_of(name) for name in objectives]
    return pareto_front((tuple(goal.value(plan) for goal in goals), plan) for plan in found)


def priced(
    graph: Graph,
    system: System,
    cost_model: str | None = None,
    store: str | Path | None = None,
    progress: Progress | None = None,
) -> Prices:
    """The price of every kernel group on every device, measured where the cost model measures.

    Raises
    ------
    UnsupportedOperation
        No device can run a group.
    DeviceError
        A device is not here, and the cost model has to measure.
    """
    chosen = cost_model or ("profiled" if is_here(system) else "roofline")
    costs = load_plugin(CostModel, chosen)
    if store and any(f.name == "store" for f in _options(costs)):
        costs = replace(costs, store=str(store))  # type: ignore[type-var]
    return price(graph, system, costs, progress)


@dataclass(frozen=True)
class Profiled:
    """A distinct kernel on one kind of device, and what was measured.

    `groups` are the kernel groups that it stands for, with the name of their graph where there are
    several, and `devices` those that it is measured for. `already` says that nothing new was
    measured, `tight` that its time is known as well as it was wanted. Without a `sample` there is
    a `refusal`, or the budget was spent; then there is an `estimate` by what was measured.
    """

    kinds: str
    groups: tuple[str, ...]
    devices: tuple[str, ...]
    flops: int
    sample: Sample | None = None
    already: bool = False
    tight: bool = False
    refusal: str = ""
    estimate: Estimate | None = None

    @property
    def missing(self) -> bool:
        return self.sample is None and not self.refusal


@dataclass(frozen=True)
class Profiling:
    """What is known of kernels and links when profiling ends.

    `drift` is by how much slower the machine became meanwhile, and `since` by how much slower it
    is than when older samples of the store were taken; None where that was not measured.
    `disturbed` of `bursts` did not count. `slowdown` is how many times as long kernels take while
    all devices compute; None of one device, or where no time was left.
    """

    rows: tuple[Profiled, ...]
    links: tuple[Repeated, ...]
    seconds: float
    drift: float | None = None
    since: float | None = None
    bursts: int = 0
    disturbed: int = 0
    slowdown: Factor | None = None


def profile(
    graphs: Graph | Sequence[Graph],
    system: System | str,
    store: str | Path | None = None,
    budget_seconds: float = inf,
    progress: Progress | None = None,
    effort: Effort = THOROUGH,
) -> Profiling:
    """Measures each distinct kernel group and each link into the store, until they are known well.

    Begins with what is not known and counts most; of several devices in one memory, how they slow
    each other down comes last, by the kernels of `FEW` graphs. No measurement begins after
    `budget_seconds`; another call goes on where this one ended, however it did.

    Raises
    ------
    DeviceError
        A device is not here.
    """
    begin = perf_counter()
    kept = Store(Path(store) if store else default_path())
    if isinstance(system, str):
        system = System.local(system, kept)
    graphs = (graphs,) if isinstance(graphs, Graph) else tuple(graphs)
    links = measure_links(system.devices, kept, begin + LINKS_SHARE * budget_seconds, progress)
    kinds: dict[str, list[Device]] = {}
    for device in system.devices:
        kinds.setdefault(device.fingerprint, []).append(device)
    courses = [
        Course(graph, graph.groups, alike[0]) for graph in graphs for alike in kinds.values()
    ]
    refused: dict[Key, str] = {}
    for course in courses:
        reasons = refusals(list(course.parts.values()), course.device)
        for name, reason in zip(course.parts, reasons, strict=True):
            if reason is not None:
                refused[course.keys[name]] = reason
    wanted = [
        replace(course, groups=[g for g in course.groups if course.keys[g.name] not in refused])
        for course in courses
    ]
    found = measure(wanted, kept, effort, begin + budget_seconds, progress)
    refused.update(found.refused)
    rows: dict[Key, Profiled] = {}
    for course in courses:
        for group in course.groups:
            key = course.keys[group.name]
            name = group.name if len(graphs) == 1 else f"{course.graph.name}/{group.name}"
            sample = found.samples.get(key)
            first = Profiled(
                group.kinds,
                (),
                tuple(device.name for device in kinds[key[0]]),
                group_flops(group),
                sample,
                already=sample is not None and key not in found.fresh,
                tight=sample is not None and effort.settles(sample),
                refusal=refused.get(key, ""),
                estimate=found.estimates.get(key),
            )
            row = rows.setdefault(key, first)
            rows[key] = replace(row, groups=(*row.groups, name))
    slowdown = None
    if len(sharing_units(system.devices)) > 1 and perf_counter() < begin + budget_seconds:
        slowdown = measured_slowdown(graphs[:FEW], system.devices, kept)
    order = sorted(rows.values(), key=lambda row: -row.flops * len(row.groups))
    return Profiling(
        tuple(order),
        tuple(links),
        perf_counter() - begin,
        found.drift,
        found.since,
        found.bursts,
        found.disturbed,
        slowdown,
    )


@dataclass(frozen=True)
class Tuned:
    """A kernel's workload on one kind of device, and what was tried for it, the first first."""

    workload: str
    devices: tuple[str, ...]
    trials: tuple[Trial, ...]
    already: bool

    @property
    def first(self) -> Trial:
        """What is compiled without tuning."""
        return min(self.trials, key=lambda trial: trial.place)

    @property
    def chosen(self) -> Trial:
        """What is compiled from now on."""
        candidate = choices(self.trials).get(self.workload, self.first.candidate)
        return next(trial for trial in self.trials if trial.candidate == candidate)


@dataclass(frozen=True)
class Tuning:
    """What was tried; not `whole` if the budget was spent first."""

    rows: tuple[Tuned, ...]
    whole: bool


def tune(
    graph: Graph,
    devices: System | str = "cpu",
    tuner: str | None = None,
    trials: int = 4,
    budget_seconds: float = float("inf"),
    progress: Progress | None = None,
) -> Tuning:
    """Measures candidates for the kernels of `graph`; what is compiled later uses the fastest.

    `tuner` is one of the target's, by default its first; `trials` is how many candidates of a
    kernel are tried. Trials are kept in the user's profile store as they are made, and not made
    again; no work begins after `budget_seconds`.

    Raises
    ------
    DeviceError
        A device is not here, or its target has no tuner.
    PluginError
        There is no such tuner.
    CompileError
        The graph cannot be compiled for a device.
    """
    store = Store(default_path())
    begin = perf_counter()
    kinds: dict[str, list[Device]] = {}
    system = System.local(devices, store) if isinstance(devices, str) else devices
    for device in system.devices:
        kinds.setdefault(device.fingerprint, []).append(device)
    rows: list[Tuned] = []
    whole = True
    for alike in kinds.values():
        target = load_plugin(Target, alike[0].target)
        if not target.tuners():
            raise DeviceError(f"'{alike[0].name}': target '{target.name}' has no tuner")
        device, compiler = alike[0], target.version()
        known = store.trials(device, compiler)
        found: dict[str, list[Trial]] = {}
        with pinned(device.cores):
            for item in target.trials(
                graph.part(graph.ops, "model"), device, tuner or target.tuners()[0], trials, known
            ):
                if isinstance(item, Trial):
                    if item not in known:
                        store.add_trial(device, compiler, item)
                    found.setdefault(item.workload, []).append(item)
                    continue
                if perf_counter() - begin > budget_seconds:
                    whole = False
                    break
                if progress:
                    progress(f"{item.doing} on {device.name}", item.index, item.total)
        names = tuple(item.name for item in alike)
        rows += [
            Tuned(workload, names, tuple(own), own[0] in known) for workload, own in found.items()
        ]
    return Tuning(tuple(rows), whole)


@dataclass(frozen=True)
class Scheduled:
    """A schedule of an instance, what is known of it, and the seconds that it took to find."""

    problem: Problem
    solution: Solution
    wall_seconds: float


def schedule(
    instance: TaskGraph | str | Path, scheduler: str = "portfolio", contention: bool = False
) -> Scheduled:
    """A schedule for any task graph, or the file of an instance, without model or machine.

    `scheduler` names an extension, with options: `portfolio:seconds=10`. With `contention` each
    link serves one transfer at a time.

    Raises
    ------
    InstanceError
        The file is missing, or does not say what an instance says.
    InfeasiblePlan
        The devices cannot run or hold the tasks.
    PluginError
        There is no such scheduler or option.
    """
    tasks = instance if isinstance(instance, TaskGraph) else read_instance(instance)
    problem = Problem.of(tasks, contention)
    chosen = load_plugin(Scheduler, scheduler)
    begin = perf_counter()
    solution = chosen.schedule(problem)
    return Scheduled(problem, solution, perf_counter() - begin)


def explain(plan: Plan | Recipe, node: str | None = None) -> tuple[Explanation, ...]:
    """Why each node of the plan, or `node` alone, is where it is, and what else there was.

    A node is a kernel group, by its name or, for a plan with its graph, that of any operation in
    it.

    Raises
    ------
    PlanError
        There is no such node; or it is a join that nothing has to compute.
    """
    recipe = plan if isinstance(plan, Recipe) else plan.recipe
    account = Account(recipe)
    if node is None:
        return tuple(map(account.explanation, account.nodes()))
    if isinstance(plan, Plan):
        groups = {op.name: group.name for group in plan.graph.groups for op in group.ops}
        for whole, pieces in plan.graph.views.items():
            if node in (whole, plan.graph.producers[whole].name):
                makers = (groups[plan.graph.producers[piece.name].name] for piece in pieces)
                raise PlanError(
                    f"'{node}' joins without a copy what is written one behind the other: it takes "
                    f"no time and has no device; explain {', '.join(map(repr, makers))}"
                )
        node = groups.get(node, node)
    return (account.explanation(node),)


def is_here(system: System) -> bool:
    """Whether each device of `system` is one of this machine, by its fingerprint."""
    for device in system.devices:
        if device.target.partition(":")[0] not in names(Target):
            return False
        target = load_plugin(Target, device.target)
        if target.unavailable():
            return False
        try:
            if target.device(device.name).fingerprint != device.fingerprint:
                return False
        except DeviceError:
            return False
    return True


def partitioner_for(spec: str, objective: str | None) -> Partitioner:
    """The partitioner with its `objective` set; latency is what one without the option serves.

    Raises
    ------
    PluginError
        There is no such partitioner or objective, or the one does not serve the other.
    """
    partitioner = load_plugin(Partitioner, spec)
    if objective is None:
        return partitioner
    check_objective(partitioner, objective)
    return serving(partitioner, objective)


def compile(
    plan: Plan | Graph | Sequence[Plan],
    devices: System | str = "cpu",
    partitioner: str = "auto",
    measure: bool = False,
    progress: Progress | None = None,
    replan: Partitioner | None = None,
    fallback: Fallback | None = None,
) -> Executable:
    """The plan's parts, compiled; for a graph, first plans for `devices` by `partitioner`.

    Of several plans the first is compiled. With `measure`, the first `MOST_MEASURED` of several
    devices run beside the best single device, and what is fastest is returned; its notes have all
    times. What a target refuses only when it compiles becomes a constraint, and `replan` plans
    again, which the notes tell; for a graph that is `partitioner`, and a plan is by default
    compiled as it stands. With a `fallback`, such as `print`, work goes on without a device that
    is missing, or fails here or in a later run, and `fallback` is told so in one line.

    Raises
    ------
    CompileError
        A target refuses a part.
    """
    if isinstance(plan, Graph):
        replan = replan or load_plugin(Partitioner, partitioner)
        plan = plans(plan, devices, partitioner, fallback=fallback)
    found = [plan] if isinstance(plan, Plan) else list(plan)
    executable = _compiled(found[0], progress, replan, fallback)
    return _fastest(executable, found[1:], progress) if measure else executable


def _compiled(
    plan: Plan, progress: Progress | None, replan: Partitioner | None, fallback: Fallback | None
) -> Executable:
    while True:
        try:
            return Executable(plan, compile_parts(plan, progress), fallback)
        except RefusedPart as refused:
            if replan is None:
                raise
            plan = _without(plan, refused, replan)
        except DeviceError as error:
            if fallback is None or error.device not in plan.devices:
                raise
            plan = plan.without(error.device, str(error))
            fallback(plan.notes[-1])


def _without(plan: Plan, refused: RefusedPart, partitioner: Partitioner) -> Plan:
    """Another plan, in which the device of the refused part does not run what it refused.

    Raises
    ------
    RefusedPart
        Nothing else can run it.
    """
    device = refused.device
    groups = _before_splits(plan, culprits(plan, refused))
    known = price(plan.original, plan.system, plan.prices)
    prices = known.without(groups, device, refused.reason)
    told = f"'{device}' refused {', '.join(groups)}: {refused.reason}; planned again without"
    try:
        found = partitioner.partition(plan.original, plan.system, prices)
    except (InfeasiblePlan, UnsupportedOperation):
        raise refused from None
    earlier = tuple(note for note in plan.notes if note.endswith("; planned again without"))
    return replace(found, notes=(*found.notes, *earlier, told))


def _before_splits(plan: Plan, groups: Sequence[str]) -> tuple[str, ...]:
    """The groups of the original graph that `groups` are, or are pieces of.

    Those of all splits where `groups` only cut or join pieces.
    """
    if not plan.splits:
        return tuple(groups)
    pieces = {
        op.partition("#")[0] for g in plan.graph.groups if g.name in groups for op in g.members
    }
    split = {op for item in plan.splits for op in item.ops}
    for wanted in (pieces, split):
        found = [g.name for g in plan.original.groups if wanted.intersection(g.members)]
        if found:
            return tuple(found)
    return ()


def _fastest(
    executable: Executable, others: Sequence[Plan], progress: Progress | None
) -> Executable:
    """`executable`, one of the other plans or the best single device: what is measured fastest.

    Leaves alone a plan of one device, for another objective than latency or throughput, or of
    devices that no single one could replace.
    """
    plan = executable.plan
    if len(plan.devices) < 2 or plan.objective not in ("latency", "throughput"):
        return executable
    try:
        chooser = load_plugin(Partitioner, "single")
        single = chooser.partition(plan.original, plan.system, plan.prices)
    except InfeasiblePlan:
        return executable
    ways = []
    further = [other for other in others if len(other.devices) > 1]
    # First the single device, which a tie goes to.
    for other in (single, *further[: MOST_MEASURED - 1]):
        try:
            ways.append(Executable(other, compile_parts(other, progress), executable.fallback))
        except CompileError:
            if other is single:
                return executable
    ways.insert(1, executable)
    steady = plan.objective == "throughput"
    compare = paces if steady else latencies
    seconds, runs = compare(ways, seeded_inputs(plan.original))
    times = ", ".join(
        f"{way.plan.partitioner} {time * 1e3:.3f} ms"
        for way, time in zip(ways, seconds, strict=True)
    )
    told = [f"measured in turns, first quartiles of {runs} runs: {times}"]
    best = ways[min(range(len(ways)), key=seconds.__getitem__)]
    notes = best.plan.notes
    if best.plan is single:
        notes = plan.notes
        told.append(f"hybrid does not pay: '{single.devices[0]}' alone ships")
    for way in ways:
        if not steady:
            told += calibrate(way.plan, [way.schedule], Store(default_path()))
        # The one that is returned starts again when it is first used.
        way.close()
    plan = replace(best.plan, notes=(*notes, *told))
    return Executable(plan, best.parts, executable.fallback)


@dataclass(frozen=True)
class Found:
    """A device string of this machine: the device, or the reason why there is none."""

    name: str
    device: Device | None
    reason: str = ""


def devices() -> list[Found]:
    """Every device of every target; each target that has none here, and problems, with reasons."""
    found = []
    for name in names(Target):
        target = load_plugin(Target, name)
        reason = target.unavailable()
        if reason:
            found.append(Found(name, None, reason))
        else:
            found += [Found(text, target.device(text)) for text in target.devices()]
            found += [Found(name, None, problem) for problem in target.problems()]
    return found


def as_here(plan: Plan) -> list[Device]:
    """The devices that run a part, as this machine has them, or as the plan says if it has none."""
    found = []
    for device in map(plan.system.device, plan.devices):
        target = load_plugin(Target, device.target)
        try:
            found.append(device if target.unavailable() else target.device(device.name))
        except DeviceError:
            found.append(device)
    return found


def _options(plugin: object) -> tuple:
    return fields(plugin) if is_dataclass(plugin) and not isinstance(plugin, type) else ()
