"""The verbs of hetsched, as the command line and the Python API have them."""

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path

from hetsched.compiler import compile_parts
from hetsched.cost import CostModel, Prices, price
from hetsched.device import Device
from hetsched.errors import DeviceError, PluginError, UnsupportedOperation
from hetsched.executable import Executable
from hetsched.graph import Graph
from hetsched.partitioner import Partitioner, check_objective
from hetsched.plan import Plan
from hetsched.plugin import load as load_plugin
from hetsched.plugin import names
from hetsched.store import Store
from hetsched.system import System
from hetsched.target import Target

Progress = Callable[[str, int, int], None]


def partition(
    graph: Graph,
    system: System | str,
    partitioner: str = "auto",
    objective: str | None = None,
    cost_model: str | None = None,
    store: str | Path | None = None,
    strict: bool = False,
    progress: Progress | None = None,
) -> Plan:
    """A plan for `graph` on `system`, a `System` or device strings of this machine.

    `partitioner` and `cost_model` name extensions, with options: `layerwise:objective=latency`.
    Without a cost model, devices that are here are measured (`profiled`), and machines that are
    only described are priced by their `roofline`. `strict` makes an error of an operation that any
    of the devices cannot run, which otherwise is placed on another.

    Raises
    ------
    UnsupportedOperation
        No device can run an operation, or not every device under `strict`.
    InfeasiblePlan
        The devices cannot hold the graph.
    PluginError
        There is no such partitioner, cost model, objective or option.
    """
    if isinstance(system, str):
        system = System.local(system, Store(Path(store)) if store else None)
    chosen = with_objective(load_plugin(Partitioner, partitioner), objective)
    prices = priced(graph, system, cost_model, store, progress)
    if strict:
        for name, refusals in prices.refusals.items():
            for device, reason in refusals.items():
                raise UnsupportedOperation(f"'{device}' cannot run '{name}': {reason}")
    return chosen.partition(graph, system, prices)


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
    here = is_here(system)
    costs = load_plugin(CostModel, cost_model or ("profiled" if here else "roofline"))
    if store and any(f.name == "store" for f in _options(costs)):
        costs = replace(costs, store=str(store))  # type: ignore[type-var]
    return price(graph, system, costs, progress)


def is_here(system: System) -> bool:
    """Whether each device of `system` is one of this machine, by its fingerprint."""
    for device in system.devices:
        if device.target not in names(Target):
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


def with_objective(partitioner: Partitioner, objective: str | None) -> Partitioner:
    """The partitioner with its `objective` set; latency is what one without the option serves.

    Raises
    ------
    PluginError
        There is no such objective, or the partitioner does not serve it.
    """
    if objective is None:
        return partitioner
    check_objective(objective)
    if any(f.name == "objective" for f in _options(partitioner)):
        return replace(partitioner, objective=objective)  # type: ignore[type-var]
    if objective != "latency":
        raise PluginError(f"partitioner '{partitioner.name}' serves latency, not {objective}")
    return partitioner


def compile(
    plan: Plan | Graph,
    devices: str = "cpu",
    partitioner: str = "auto",
    progress: Progress | None = None,
) -> Executable:
    """The plan's parts, compiled; for a graph, first a plan for `devices` by `partitioner`.

    Raises
    ------
    CompileError
        A target refuses a part.
    """
    if isinstance(plan, Graph):
        plan = partition(plan, devices, partitioner)
    return Executable(plan, compile_parts(plan, progress))


@dataclass(frozen=True)
class Found:
    """A device string of this machine: the device, or the reason why there is none."""

    name: str
    device: Device | None
    reason: str = ""


def devices() -> list[Found]:
    """Every device of every target, and each target that has none here, with the reason."""
    found = []
    for name in names(Target):
        target = load_plugin(Target, name)
        reason = target.unavailable()
        if reason:
            found.append(Found(name, None, reason))
        else:
            found += [Found(text, target.device(text)) for text in target.devices()]
    return found


def _options(plugin: object) -> tuple:
    return fields(plugin) if is_dataclass(plugin) and not isinstance(plugin, type) else ()
