"""The kernels of the catalogue's networks, each measured twice, for the sets of `bench.costs`."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter

from rich.progress import track

import hetsched
from bench import models
from bench.costing import HALVES, Options
from hetsched.files import write_text
from hetsched.graph import Graph
from hetsched.learning.drawn import networks
from hetsched.learning.model import rules_of
from hetsched.learning.work import Work, work_of
from hetsched.profiling import QUICK, Course, Key, measure
from hetsched.sequence import surroundings
from hetsched.store import Store
from hetsched.system import System

# Apart in time, so that what differs between them is how well a kernel can be measured.
PASSES = ("first", "second")


@dataclass(frozen=True)
class Network:
    """A network by its kernels: the key of each group, in order, and of each the work.

    Without groups that the device's target refuses. One that was drawn is in no `half`.
    """

    name: str
    half: int | None
    keys: tuple[Key, ...]
    works: Mapping[Key, Work]
    kinds: Mapping[Key, str]


@dataclass(frozen=True)
class Collection:
    """Networks, and the seconds of their kernels by each pass.

    `profiling_seconds` is what the first pass took, with compiling, as far as it was not kept.
    """

    networks: Sequence[Network]
    passes: tuple[Mapping[Key, float], Mapping[Key, float]]
    profiling_seconds: float

    def half(self, which: int | None) -> list[Network]:
        return [network for network in self.networks if network.half == which]


def collected(options: Options) -> Collection:
    """All kernels of the networks in both halves, from the folder or measured now."""
    options.folder.mkdir(parents=True, exist_ok=True)
    device = System.local(options.device).devices[0]
    measured_networks: list[Network] = []
    chosen = _chosen(options)
    spent = options.folder / "seconds.json"
    found: list[dict[Key, float]] = [{}, {}]
    for turn, label in enumerate(PASSES):
        store = Store(options.folder / f"{label}.sqlite")
        for name, read in track(list(chosen.items()), f"{label} pass", transient=True):
            graph = read()
            begin = perf_counter()
            course = Course(graph, graph.groups, device)
            measured = measure([course], store, QUICK)
            if measured.fresh and not turn:
                _add_seconds(spent, perf_counter() - begin)
            found[turn] |= {key: sample.seconds for key, sample in measured.samples.items()}
            if not turn:
                measured_networks.append(_network(name, course, measured.refused))
    seconds = json.loads(spent.read_text()) if spent.exists() else 0.0
    return Collection(measured_networks, (found[0], found[1]), seconds)


def _chosen(options: Options) -> dict[str, Callable[[], Graph]]:
    """How to read each network, by its name: those of the halves, and those that are drawn."""

    def read(model: models.Model) -> Graph:
        return hetsched.read_onnx(models.load(model, options.seed), shapes=model.shapes)

    there = {model.name: model for model in models.models(options.models)}
    found: dict[str, Callable[[], Graph]] = {
        name: partial(read, there[name])
        for half in HALVES
        for name in half
        if name in there and (not options.names or name in options.names)
    }
    for graph in networks(options.drawn, options.seed):
        found[graph.name] = partial(_same, graph)
    return found


def _same(graph: Graph) -> Graph:
    return graph


def _network(name: str, course: Course, refused: Mapping[Key, str]) -> Network:
    rules, megabytes = rules_of(course.device), surroundings(course.graph)
    every = {group.name: course.keys[group.name] for group in course.groups}
    keys = {name: key for name, key in every.items() if key not in refused}
    works = {key: work_of(course.parts[name], rules, megabytes) for name, key in keys.items()}
    kinds = {keys[group.name]: group.kinds for group in course.groups if group.name in keys}
    half = next((which for which, names in enumerate(HALVES) if name in names), None)
    return Network(name, half, tuple(keys.values()), works, kinds)


def _add_seconds(path: Path, seconds: float) -> None:
    before = json.loads(path.read_text()) if path.exists() else 0.0
    write_text(path, json.dumps(before + seconds))
