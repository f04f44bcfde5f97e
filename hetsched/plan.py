"""A plan: which part of the graph runs where, and in which order. Plain data, in JSON."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import lcm
from types import NoneType
from typing import Any

from hetsched.cost import CostModel, Prices, price, roofline_seconds
from hetsched.device import Device
from hetsched.document import NUMBER, check, parse
from hetsched.errors import DeviceError, InfeasiblePlan, PlanError, SplitRefused
from hetsched.footprint import (
    Memory,
    crew_is_here,
    expected,
    is_known,
    memory,
)
from hetsched.forms import packed
from hetsched.fusion import Group
from hetsched.graph import Graph
from hetsched.op import Op, Tensor
from hetsched.operation import group_flops, group_nbytes
from hetsched.plugin import load
from hetsched.request import Step, views_between
from hetsched.rewrite import split
from hetsched.schedule import Schedule, Slot
from hetsched.split import Split
from hetsched.system import System
from hetsched.target import Target
from hetsched.tasks import (
    Edge,
    Task,
    TaskGraph,
    beside,
    check_limit,
    contract,
    memory_bytes,
    replay,
)

# Weights that a target packs take several times their room: Winograd's 4 x, whole blocks up to 16 x
# in single layers. Limits further away than this need no exact figure.
MOST_GROWTH = 6.0

FORMAT = "hetsched-plan"
VERSION = 3

# Of the devices that take turns, each counted as often as it comes.
MOST_TURNS = 16

# What a plan file holds: a type, a list of one shape, a record of named shapes, or, under `str`, a
# map from any name. The system's own reader checks `system`.
SHAPE = {
    "version": int,
    "graph": {"name": str, "sha256": str},
    "splits": [
        {
            "ops": [str],
            "exits": [{"tensor": str, "axes": [{"axis": int, "bounds": [int]}], "sum": bool}],
        }
    ],
    "partitioner": str,
    "objective": str,
    "cost_model": str,
    "notes": [str],
    "refusals": {str: {str: str}},
    "tasks": [
        {"name": str, "seconds": {str: NUMBER}, "memory_bytes": NUMBER, "flops": int, "nbytes": int}
    ],
    "edges": [{"source": (str, NoneType), "sink": (str, NoneType), "nbytes": int, "tensor": str}],
    "parts": [{"name": str, "device": str, "label": str, "tasks": [str]}],
    "replicas": {str: [str]},
    "system": {str: object},
}


@dataclass(frozen=True, eq=False)
class Part:
    """A run of the plan's order on one device: what is compiled, moved and timed as one."""

    name: str
    device: Device
    groups: tuple[Group, ...]
    border: Group

    @property
    def ops(self) -> tuple[Op, ...]:
        return self.border.ops

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return self.border.inputs

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        return self.border.outputs

    @property
    def weight_nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.border.constants)

    @property
    def activation_nbytes(self) -> int:
        """What the groups write, each tensor in a place of its own: an upper bound."""
        return sum(tensor.nbytes for group in self.groups for tensor in group.outputs)

    @property
    def step(self) -> Step:
        """The part in a run, without its code."""
        return Step(
            name=self.name,
            device=self.device,
            inputs=tuple(tensor.name for tensor in self.inputs),
            outputs=tuple(tensor.name for tensor in self.outputs),
            label=self.label,
        )

    @property
    def label(self) -> str:
        """What is inside, in a few words."""
        first, last = self.groups[0], self.groups[-1]
        ends = first.kinds if first is last else f"{first.ops[0].kind} .. {last.ops[-1].kind}"
        return f"{ends} ({len(self.ops)} ops)"


@dataclass(frozen=True, eq=False)
class Plan:
    """Placement and order of the kernel groups of `graph`, with the prices they were chosen by.

    A part is a run of `order` on one device. It ends where the device changes, before each of
    `cuts`, groups that start a part of their own, and before what reads a view of something that
    the part makes. The order is topological, so that parts cannot wait for each other in a circle.

    `replicas` says for a device of the placement which devices run its parts, one request each in
    turn, itself among them; one that comes twice has twice as many. No other parts are on these.

    A plan that splits operations is one for what `split` makes of the graph `unsplit`, which the
    plan belongs to.

    Raises
    ------
    PlanError
        A group is missing, placed where it cannot run, or comes before one that it reads from.
    """

    graph: Graph
    system: System
    placement: Mapping[str, str]
    order: tuple[str, ...]
    prices: Prices
    partitioner: str
    objective: str = "latency"
    notes: tuple[str, ...] = ()
    cuts: frozenset[str] = frozenset()
    splits: tuple[Split, ...] = ()
    unsplit: Graph | None = None
    replicas: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if bool(self.splits) != (self.unsplit is not None):
            raise PlanError("a plan has splits and the graph that they are of, or neither")
        groups = {group.name: group for group in self.graph.groups}
        devices = {device.name for device in self.system.devices}
        if len(self.order) != len(groups) or set(self.order) != set(groups):
            odd = sorted(set(self.order) ^ set(groups)) or sorted(self.order)
            raise PlanError(f"the order does not have each group once; look at '{odd[0]}'")
        written: set[str] = set()
        for name in self.order:
            device = self.placement.get(name)
            if device not in devices:
                raise PlanError(f"group '{name}' is on '{device}', which the system lacks")
            if device not in self.prices.seconds.get(name, {}):
                reason = self.prices.refusals.get(name, {}).get(str(device), "it has no price")
                raise PlanError(f"group '{name}' cannot run on '{device}': {reason}")
            read = (t for tensor in groups[name].inputs for t in self.graph.sources(tensor))
            for tensor in read:
                if tensor.name in self.graph.producers and tensor.name not in written:
                    raise PlanError(f"group '{name}' comes before what writes '{tensor.name}'")
            written.update(tensor.name for tensor in groups[name].outputs)
        _check_replicas(self.replicas, self.placement, self.prices.seconds, self.system)

    @property
    def original(self) -> Graph:
        """The graph before any split."""
        return self.unsplit or self.graph

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        groups = {group.name: group for group in self.graph.groups}
        runs: list[list[Group]] = []
        before = None
        made: set[str] = set()
        for name in self.order:
            viewed = {
                piece.name
                for tensor in groups[name].inputs
                for piece in self.graph.views.get(tensor.name, ())
            }
            if self.placement[name] != before or name in self.cuts or made & viewed:
                runs.append([])
                made = set()
            runs[-1].append(groups[name])
            made.update(tensor.name for tensor in groups[name].outputs)
            before = self.placement[name]
        found: list[Part] = []
        for members in runs:
            ops = [op for group in members for op in group.ops]
            border = self.graph.border(ops)
            device = self.system.device(self.placement[members[0].name])
            found.append(Part(f"part{len(found)}", device, tuple(members), border))
        return tuple(found)

    @cached_property
    def copies(self) -> tuple[Part, ...]:
        """The parts on each device that runs them: those of the placement, then their replicas."""
        others = tuple(
            replace(part, device=self.system.device(name))
            for part in self.parts
            for name in dict.fromkeys(self.replicas.get(part.device.name, ()))
            if name != part.device.name
        )
        return (*self.parts, *others)

    @property
    def routes(self) -> tuple[tuple[int, ...], ...]:
        """By request, the numbers of the `copies` that run it, until the first are due again."""
        numbers = {(part.name, part.device.name): n for n, part in enumerate(self.copies)}
        return tuple(
            tuple(numbers[name, device] for name, device, _ in recipe.parts)
            for recipe in self.recipe.turns
        )

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices that run a part, in the system's order."""
        used = {part.device.name for part in self.copies}
        return tuple(device.name for device in self.system.devices if device.name in used)

    @property
    def modelled(self) -> bool:
        """Whether a device that runs a part is modelled, so that the plan's time is."""
        return any(part.device.modelled for part in self.copies)

    @cached_property
    def recipe(self) -> "Recipe":
        """The plan without its graph: what a simulator needs."""
        return Recipe(
            tasks=group_tasks(self.graph, self.system, self.prices),
            work={
                group.name: (group_flops(group), group_nbytes(group)) for group in self.graph.groups
            },
            parts=tuple(
                (part.name, part.device.name, tuple(group.name for group in part.groups))
                for part in self.parts
            ),
            labels={part.name: part.label for part in self.parts},
            refusals=self.prices.refusals,
            replicas=self.replicas,
        )

    def memory_bytes(self) -> dict[str, float]:
        """Weights as the model has them, and activations without re-use, by device.

        It takes no time and needs no target; `memory` says what really is held.
        """
        held = [memory_bytes(recipe.tasks, recipe.placement) for recipe in self.recipe.turns]
        return {name: max(row[name] for row in held) for name in held[0]}

    @cached_property
    def graphs(self) -> tuple[Graph, ...]:
        """The graph of each of `copies`, with what it takes and gives in blocks of channels."""
        graph = replace(self.graph, packed=packed_between(self))
        return tuple(graph.part(part.ops, part.name) for part in self.copies)

    @cached_property
    def memory(self) -> Memory:
        """What each device holds, before anything is compiled.

        Exact where the target can tell, which takes a part of the time of compiling; it is kept
        with what is compiled.
        """
        graphs = zip(self.copies, self.graphs, strict=True)
        parts = [expected(part.step, graph) for part, graph in graphs]
        outputs = [tensor.name for tensor in self.original.outputs]
        crew = crew_is_here([part.device for part in self.copies])
        views = views_between(self.graph, self.graphs)
        return memory(parts, outputs, views, crew, self.routes)

    def without(self, device: str, reason: str) -> "Plan":
        """The plan with all that `device` runs moved to others, which its notes tell.

        Each group goes to the next device of the system that can run it, after the last to the
        first; where `device` has replicas, to the next of them. Parts keep their names and order.

        Raises
        ------
        InfeasiblePlan
            No other device can run a group.
        """
        names = [item.name for item in self.system.devices]
        at = names.index(device)
        others = (*names[at + 1 :], *names[:at])
        rings = {
            home: tuple(n for n in ring if n != device) for home, ring in self.replicas.items()
        }
        heirs = dict.fromkeys(
            n for home in rings if device in self.replicas[home] for n in rings[home]
        )
        ring = rings.pop(device, ())
        placement = dict(self.placement)
        for name in self.order:
            if placement[name] != device:
                continue
            able = [n for n in ring or others if n in self.prices.seconds[name]]
            if not able:
                raise InfeasiblePlan(f"no other device of the plan can run '{name}'")
            placement[name] = able[0]
            heirs[able[0]] = None
            if not ring:
                # A replica has no other parts.
                rings = {}
        rings |= {ring[0]: ring} if ring else {}
        told = f"{reason}; its parts run on {', '.join(map(repr, heirs))}"
        return replace(
            self,
            placement=placement,
            prices=self.prices.without(self.order, device, reason),
            notes=(*self.notes, told),
            cuts=frozenset(part.groups[0].name for part in self.parts),
            replicas={home: ring for home, ring in rings.items() if len(set(ring)) > 1},
        )

    def to_json(self) -> str:
        """The plan without its graph; the same text for the same plan."""
        return json.dumps(self.to_dict(), indent=1)

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "graph": {"name": self.original.name, "sha256": self.original.digest},
            "splits": [item.to_dict() for item in self.splits],
            "partitioner": self.partitioner,
            "objective": self.objective,
            "cost_model": self.prices.model,
            "notes": list(self.notes),
            "refusals": {name: dict(row) for name, row in self.prices.refusals.items() if row},
            **self.recipe.to_dict(),
            "system": self.system.to_dict(),
        }

    @classmethod
    def from_json(cls, text: str, graph: Graph, same_graph: bool = False) -> "Plan":
        """The plan that `to_json` wrote for `graph`; `same_graph` says that it is known to be.

        The splits are made again.

        Raises
        ------
        PlanError
            The text is no plan, is of another version, or belongs to another graph.
        """
        content = parse_plan(text)
        with _described():
            if not same_graph and content["graph"]["sha256"] != graph.digest:
                raise PlanError(
                    f"the plan belongs to '{content['graph']['name']}' with other shapes or weights"
                )
            system = System.from_dict(content["system"])
            recipe = Recipe.from_dict(content, system)
            refusals = content["refusals"]
            splits = tuple(map(Split.from_dict, content["splits"]))
            unsplit = graph if splits else None
            graph = split(graph, splits) if splits else graph
            return cls(
                graph=graph,
                system=system,
                placement=recipe.placement,
                order=tuple(name for _, _, members in recipe.parts for name in members),
                cuts=frozenset(members[0] for _, _, members in recipe.parts),
                prices=Prices(
                    str(content["cost_model"]),
                    {task.name: task.seconds for task in recipe.tasks.tasks},
                    {group.name: dict(refusals.get(group.name, {})) for group in graph.groups},
                    {group.name: group.members for group in graph.groups},
                ),
                partitioner=str(content["partitioner"]),
                objective=str(content["objective"]),
                notes=tuple(map(str, content["notes"])),
                splits=splits,
                unsplit=unsplit,
                replicas=recipe.replicas,
            )


@dataclass(frozen=True, eq=False)
class Recipe:
    """A plan without its graph: tasks with their prices, and which of them run together where.

    `parts` are name, device and tasks; `work` is the FLOPs and bytes of each task; `refusals` are
    why a task cannot run on a device, by task and device; `replicas` are those of `Plan`.
    """

    tasks: TaskGraph
    work: Mapping[str, tuple[int, int]]
    parts: tuple[tuple[str, str, tuple[str, ...]], ...]
    labels: Mapping[str, str]
    refusals: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    replicas: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def placement(self) -> Mapping[str, str]:
        return {name: device for _, device, members in self.parts for name in members}

    @property
    def devices(self) -> tuple[Device, ...]:
        """Those that run a part, in the system's order."""
        used = {device for _, device, _ in self.parts}.union(*self.replicas.values())
        return tuple(device for device in self.tasks.system.devices if device.name in used)

    @cached_property
    def turns(self) -> tuple["Recipe", ...]:
        """The recipe of each request until the first device has its turn again everywhere."""
        if not self.replicas:
            return (self,)
        count = lcm(*map(len, self.replicas.values()))
        found = []
        for number in range(count):
            place = {home: ring[number % len(ring)] for home, ring in self.replicas.items()}
            parts = tuple((name, place.get(home, home), tasks) for name, home, tasks in self.parts)
            found.append(replace(self, parts=parts, replicas={}))
        return tuple(found)

    def simulate(self) -> Schedule:
        """When each part runs by the prices: the parts in order, each as soon as it can.

        Of replicas, the first request's.

        Raises
        ------
        InfeasiblePlan
            A part cannot run where it is placed, or its data cannot get there.
        """
        members = [names for _, _, names in self.parts]
        whole = contract(self.tasks, members, self.placement)
        order = [names[0] for names in members]
        schedule = replay(whole, self.placement, order)
        slowed = beside(whole, schedule)
        if slowed is not whole:
            schedule = replay(slowed, self.placement, order)
        named = {names[0]: name for name, _, names in self.parts}
        system = self.tasks.system
        units = {system.device(device).unit for device in self.placement.values()}
        start = system.beside_parts(len(units), sum(task.memory_bytes for task in self.tasks.tasks))
        slots = tuple(
            Slot(named[slot.task], slot.device, slot.start + start, slot.finish + start)
            for slot in schedule.slots
        )
        transfers = tuple(
            replace(move, start=move.start + start, finish=move.finish + start)
            for move in schedule.transfers
        )
        return Schedule(slots, transfers, schedule.clock, self.labels)

    def on(self, system: System) -> "Recipe":
        """The same parts on a described machine with devices of the same names.

        A device with the same fingerprint keeps its prices; any other is priced by its roofline.

        Raises
        ------
        DeviceError
            The machine lacks a device of the plan.
        """
        before = {device.name: device for device in self.tasks.system.devices}
        for recipe in self.turns:
            for _, name, _ in recipe.parts:
                system.device(name)

        def seconds(task: Task, device: Device) -> float | None:
            known = before.get(device.name)
            if known and known.fingerprint == device.fingerprint:
                return task.seconds.get(device.name)
            return roofline_seconds(*self.work[task.name], device)

        repriced = []
        for task in self.tasks.tasks:
            row = {device.name: seconds(task, device) for device in system.devices}
            kept = {name: value for name, value in row.items() if value is not None}
            repriced.append(Task(task.name, kept, task.memory_bytes))
        return replace(self, tasks=TaskGraph(system, tuple(repriced), self.tasks.edges))

    def to_dict(self) -> dict[str, Any]:
        return {
            "tasks": [
                {
                    "name": task.name,
                    "seconds": dict(task.seconds),
                    "memory_bytes": task.memory_bytes,
                    "flops": self.work[task.name][0],
                    "nbytes": self.work[task.name][1],
                }
                for task in self.tasks.tasks
            ],
            "edges": [
                {
                    "source": edge.source,
                    "sink": edge.sink,
                    "nbytes": edge.nbytes,
                    "tensor": edge.tensor,
                }
                for edge in self.tasks.edges
            ],
            "parts": [
                {"name": name, "device": device, "label": self.labels[name], "tasks": list(members)}
                for name, device, members in self.parts
            ],
            "replicas": {name: list(ring) for name, ring in self.replicas.items()},
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], system: System) -> "Recipe":
        tasks = [
            Task(
                str(task["name"]),
                {str(name): float(value) for name, value in task["seconds"].items()},
                float(task["memory_bytes"]),
            )
            for task in content["tasks"]
        ]
        known = {task.name for task in tasks} | {None}
        for task in tasks:
            if not 0 <= task.memory_bytes < float("inf"):
                raise PlanError(f"'{task.name}' is said to hold {task.memory_bytes} bytes")
            for device, seconds in task.seconds.items():
                system.device(device)
                if not 0 <= seconds < float("inf"):
                    raise PlanError(f"'{task.name}' on '{device}' is said to take {seconds} s")
        edges = [
            Edge(edge["source"], edge["sink"], int(edge["nbytes"]), str(edge["tensor"]))
            for edge in content["edges"]
        ]
        for edge in edges:
            if {edge.source, edge.sink} - known or edge.source == edge.sink:
                raise PlanError(f"the plan is damaged: '{edge.tensor}' leads to no task")
        parts = tuple(
            (str(part["name"]), str(part["device"]), tuple(map(str, part["tasks"])))
            for part in content["parts"]
        )
        _check_parts(parts, tasks, edges)
        replicas = {name: tuple(ring) for name, ring in content["replicas"].items()}
        placement = {name: device for _, device, members in parts for name in members}
        _check_replicas(replicas, placement, {t.name: t.seconds for t in tasks}, system)
        return cls(
            tasks=TaskGraph(system, tuple(tasks), tuple(edges)),
            work={
                str(task["name"]): (int(task["flops"]), int(task["nbytes"]))
                for task in content["tasks"]
            },
            parts=parts,
            labels={str(part["name"]): str(part["label"]) for part in content["parts"]},
            refusals={name: dict(row) for name, row in content["refusals"].items()},
            replicas=replicas,
        )


def _check_replicas(
    replicas: Mapping[str, tuple[str, ...]],
    placement: Mapping[str, str],
    seconds: Mapping[str, Mapping[str, float]],
    system: System,
) -> None:
    """
    Raises
    ------
    PlanError
        Devices take turns that cannot, or that have other parts.
    """
    used = dict.fromkeys(placement.values())
    owner: dict[str, str] = {}
    for home in used:
        for name in dict.fromkeys((home, *replicas.get(home, ()))):
            unit = system.device(name).unit
            other = owner.setdefault(unit, home)
            if other != home and {home, other} & set(replicas):
                raise PlanError(f"'{name}' would run parts of '{other}' and of '{home}'")
    for home, ring in replicas.items():
        if home not in used or ring[:1] != (home,):
            raise PlanError(f"'{home}' has no parts, or is not the first of its replicas")
        for name in set(ring):
            for task, device in placement.items():
                if device == home and name not in seconds[task]:
                    raise PlanError(f"'{task}' has replicas on '{name}', where it has no price")
    if lcm(*map(len, replicas.values())) > MOST_TURNS:
        raise PlanError(f"replicas take turns over more than {MOST_TURNS} requests")


def _check_parts(
    parts: Sequence[tuple[str, str, tuple[str, ...]]],
    tasks: Sequence[Task],
    edges: Sequence[Edge],
) -> None:
    """
    Raises
    ------
    PlanError
        The parts do not have each task once, where it has a price, and after what it reads.
    """
    if len({part for part, _, _ in parts}) != len(parts):
        raise PlanError("two parts have one name")
    order = [name for _, _, members in parts for name in members]
    position = {name: index for index, name in enumerate(order)}
    names = {task.name for task in tasks}
    odd = sorted(position.keys() ^ names)
    if len(order) != len(position):
        odd = [name for index, name in enumerate(order) if position[name] != index]
    if odd:
        raise PlanError(f"the parts do not have each task once; look at '{odd[0]}'")
    seconds = {task.name: task.seconds for task in tasks}
    for part, device, members in parts:
        if not members:
            raise PlanError(f"{part} has no task")
        for name in members:
            if device not in seconds[name]:
                raise PlanError(f"{part} has '{name}' on '{device}', where it has no price")
    for edge in edges:
        if edge.source and edge.sink and position[edge.source] >= position[edge.sink]:
            raise PlanError(f"'{edge.sink}' comes before what writes '{edge.tensor}'")


def parse_plan(text: str) -> Mapping[str, Any]:
    """The content of a plan file.

    Raises
    ------
    PlanError
        The text is no plan, or of another version.
    """
    content = parse(text, PlanError, "the plan")
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise PlanError(f'this is no plan: it lacks "format": "{FORMAT}"')
    if content.get("version") != VERSION:
        raise PlanError(
            f"the plan has version {content.get('version')}; this hetsched reads {VERSION}"
        )
    check(content, SHAPE, "plan", PlanError, "the plan is damaged: ")
    return content


def read_recipe(text: str) -> Recipe:
    """The recipe of a plan file, which can be simulated without its model.

    Raises
    ------
    PlanError
        The text is no plan, or is damaged.
    """
    return read_recipe_and_facts(text)[0]


def read_recipe_and_facts(text: str) -> tuple[Recipe, dict[str, str]]:
    """With the recipe what the file says of itself, by name: model, system, partitioner, ...

    Raises
    ------
    PlanError
        The text is no plan, or is damaged.
    """
    content = parse_plan(text)
    with _described():
        recipe = Recipe.from_dict(content, System.from_dict(content["system"]))
    return recipe, {
        "model": content["graph"]["name"],
        "graph": content["graph"]["sha256"][:12],
        "system": str(content["system"].get("name", "")),
        "partitioner": content["partitioner"],
        "objective": content["objective"],
        "cost model": content["cost_model"],
        "replicas": "; ".join(" ".join(map(str, ring)) for ring in content["replicas"].values()),
    }


@contextmanager
def _described() -> Iterator[None]:
    try:
        yield
    except (DeviceError, SplitRefused, OverflowError) as error:
        raise PlanError(f"the plan is damaged: {error}") from None


def simulate(plan: Plan) -> Schedule:
    """The schedule that the plan's prices predict."""
    return plan.recipe.simulate()


def packed_between(plan: Plan) -> dict[str, int]:
    """The tensors that parts of `plan` hand over in blocks of channels, and their channels.

    Those of `packed` whose makers and readers all are on devices of equal blocks.
    """
    kinds = {}
    for part in plan.copies:
        device = part.device
        kinds[device] = load(Target, device.target).lanes(device) if is_known(device) else None
    found = {lanes: packed(plan.graph, lanes) for lanes in kinds.values() if lanes}
    views = plan.graph.views
    # What is joined without a copy has one form with its pieces.
    whole = {piece.name: name for name, pieces in views.items() for piece in pieces}
    users: dict[str, set[int | None]] = {}
    crossing: dict[str, None] = {}
    for part in plan.copies:
        for tensor in (*part.inputs, *part.outputs):
            crossing[tensor.name] = None
            users.setdefault(whole.get(tensor.name, tensor.name), set()).add(kinds[part.device])
    chosen = {}
    for name in crossing:
        lanes, *others = users[whole.get(name, name)]
        if lanes and not others and name in found[lanes]:
            chosen[name] = lanes
    return chosen


def group_tasks(graph: Graph, system: System, costs: CostModel) -> TaskGraph:
    """The kernel groups as tasks: what a partitioner schedules."""
    prices = price(graph, system, costs)
    producer = {tensor.name: group.name for group in graph.groups for tensor in group.outputs}
    tasks = [
        Task(
            group.name,
            prices.seconds[group.name],
            sum(tensor.nbytes for tensor in (*group.constants, *group.outputs)),
        )
        for group in graph.groups
    ]
    return TaskGraph(
        system, tuple(tasks), _edges([(g.name, g.inputs) for g in graph.groups], producer, graph)
    )


def _edges(
    readers: Sequence[tuple[str, tuple[Tensor, ...]]], producer: Mapping[str, str], graph: Graph
) -> tuple[Edge, ...]:
    inner = [
        Edge(producer.get(tensor.name), name, tensor.nbytes, tensor.name)
        for name, inputs in readers
        for tensor in dict.fromkeys(t for whole in inputs for t in graph.sources(whole))
    ]
    results = [
        Edge(producer[tensor.name], None, tensor.nbytes, tensor.name)
        for tensor in dict.fromkeys(t for whole in graph.outputs for t in graph.sources(whole))
        if tensor.name in producer
    ]
    return (*inner, *results)


def make_plan(
    graph: Graph,
    system: System,
    costs: CostModel,
    placement: Mapping[str, str],
    order: Sequence[str],
    partitioner: str,
    cuts: Iterable[str] = (),
    splits: Sequence[Split] = (),
    unsplit: Graph | None = None,
    replicas: Mapping[str, tuple[str, ...]] | None = None,
) -> Plan:
    """A checked plan for a placement and a topological order of the groups.

    A part ends where the device changes, and before each of `cuts`. `graph` is what `splits` make
    of `unsplit`, if there are any; `replicas` are devices that take turns.

    Raises
    ------
    InfeasiblePlan
        A device would need more memory than it has, or data cannot get from device to device.
    """
    plan = Plan(
        graph=graph,
        system=system,
        placement=dict(placement),
        order=tuple(order),
        prices=price(graph, system, costs),
        partitioner=partitioner,
        cuts=frozenset(cuts),
        splits=tuple(splits),
        unsplit=unsplit,
        replicas=dict(replicas or {}),
    )
    check_plan_memory(plan)
    for recipe in plan.recipe.turns:
        recipe.simulate()
    return plan


def check_plan_memory(plan: Plan) -> None:
    """
    Raises
    ------
    InfeasiblePlan
        A device would hold more than it has. What it would hold is exact where its target can tell,
        and that is in question.
    """
    limits = {name: plan.system.device(name).memory_bytes for name in plan.devices}
    rough = plan.memory_bytes()
    if all(rough[name] * MOST_GROWTH <= limit for name, limit in limits.items()):
        return
    exact = {held.device: held for held in plan.memory.devices if held.exact}
    for name, limit in limits.items():
        check_limit(name, exact[name].nbytes if name in exact else rough[name], limit)
