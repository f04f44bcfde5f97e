"""Scheduling instances: a task graph and its machine in one JSON file, without any model."""

from pathlib import Path
from typing import Any

import networkx

from hetsched.device import Device, Link
from hetsched.document import NUMBER, check, parse
from hetsched.errors import DeviceError, InfeasiblePlan, InstanceError
from hetsched.system import System
from hetsched.tasks import Edge, Task, TaskGraph

# What an instance file holds; `memory_bytes` is by device.
SHAPE = {
    "devices": [str],
    "links?": [{"source": str, "sink": str, "seconds": NUMBER, "bytes_per_second": NUMBER}],
    "memory_bytes?": {str: NUMBER},
    "tasks": [{"name": str, "seconds": {str: (int, float, type(None))}, "memory_bytes?": NUMBER}],
    "edges?": [{"source": str, "sink": str, "nbytes": NUMBER}],
}


def read_instance(path: str | Path) -> TaskGraph:
    """The task graph of an instance file.

    Raises
    ------
    InstanceError
        The file is missing or does not say what an instance says; the message has the place.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise InstanceError(f"instance '{path}': {error.strerror}") from None
    except UnicodeDecodeError:
        raise InstanceError(f"instance '{path}' is not text") from None
    try:
        return parse_instance(text)
    except InstanceError as error:
        raise InstanceError(f"instance '{path}': {error}") from None


def parse_instance(text: str) -> TaskGraph:
    """The task graph of the text of an instance; its tasks are put in topological order.

    Examples
    --------
    >>> tasks = parse_instance('''{"devices": ["cpu"], "tasks":
    ...     [{"name": "b", "seconds": {"cpu": 1}}, {"name": "a", "seconds": {"cpu": 2}}],
    ...     "edges": [{"source": "a", "sink": "b", "nbytes": 8}]}''')
    >>> [task.name for task in tasks.tasks]
    ['a', 'b']

    Raises
    ------
    InstanceError
        Something is missing, negative, unknown, there twice, or leads in a circle.
    """
    content = parse(text, InstanceError, "it")
    check(content, SHAPE, "instance", InstanceError)
    system = _system(content)
    tasks = _tasks(content, {device.name for device in system.devices})
    edges = _edges(content, tasks)
    view = networkx.DiGraph()
    view.add_nodes_from(tasks)
    view.add_edges_from((edge.source, edge.sink) for edge in edges)
    place = {name: index for index, name in enumerate(tasks)}
    try:
        order = list(networkx.lexicographical_topological_sort(view, place.__getitem__))
    except networkx.NetworkXUnfeasible:
        circle = [source for source, _ in networkx.find_cycle(view)]
        raise InstanceError(f"the edges lead in a circle: {' -> '.join(circle[:6])}") from None
    try:
        return TaskGraph(system, tuple(tasks[name] for name in order), tuple(edges))
    except InfeasiblePlan as error:
        raise InstanceError(str(error)) from None


def _system(content: Any) -> System:
    limits = content.get("memory_bytes", {})
    for name, limit in limits.items():
        if name not in content["devices"]:
            raise InstanceError(f"memory_bytes names '{name}', which is no device")
        _check_number(limit, f"memory_bytes.{name}")
    devices = [
        Device(name, target="", memory_bytes=float(limits.get(name, float("inf"))))
        for name in content["devices"]
    ]
    links = []
    for index, link in enumerate(content.get("links", [])):
        where = f"links[{index}]"
        _check_number(link["seconds"], f"{where}.seconds")
        _check_number(link["bytes_per_second"], f"{where}.bytes_per_second", least=None)
        rate = float(link["bytes_per_second"])
        links.append(Link(link["source"], link["sink"], float(link["seconds"]), rate))
    pairs = [(link.source, link.sink) for link in links]
    for source, sink in pairs:
        if pairs.count((source, sink)) > 1:
            raise InstanceError(f"the link from '{source}' to '{sink}' is there twice")
    try:
        return System("instance", tuple(devices), tuple(links))
    except DeviceError as error:
        raise InstanceError(str(error)) from None


def _tasks(content: Any, devices: set[str]) -> dict[str, Task]:
    tasks: dict[str, Task] = {}
    for item in content["tasks"]:
        name = item["name"]
        if name in tasks:
            raise InstanceError(f"task '{name}' is there twice")
        for device, value in item["seconds"].items():
            if device not in devices:
                raise InstanceError(f"task '{name}' has seconds on '{device}', which is no device")
            if value is not None:
                _check_number(value, f"seconds of '{name}' on '{device}'")
        memory = item.get("memory_bytes", 0.0)
        _check_number(memory, f"memory_bytes of '{name}'")
        seconds = {d: float(value) for d, value in item["seconds"].items() if value is not None}
        tasks[name] = Task(name, seconds, float(memory))
    return tasks


def _edges(content: Any, tasks: dict[str, Task]) -> list[Edge]:
    edges = []
    for index, item in enumerate(content.get("edges", [])):
        for end in ("source", "sink"):
            if item[end] not in tasks:
                raise InstanceError(f"edges[{index}].{end} is '{item[end]}', which is no task")
        _check_number(item["nbytes"], f"edges[{index}].nbytes")
        edges.append(Edge(item["source"], item["sink"], item["nbytes"]))
    return edges


def _check_number(value: float, where: str, least: float | None = 0.0) -> None:
    """
    Raises
    ------
    InstanceError
        The value is below `least`, or with None not positive; or it is no finite number.
    """
    fits = value > 0 if least is None else value >= least
    if not fits or not value < float("inf"):
        must = "positive" if least is None else "not negative"
        raise InstanceError(f"{where} is {value}; it must be finite and {must}")
