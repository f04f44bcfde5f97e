"""What a kernel group costs on a device: the one input of every partitioner."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from math import exp
from statistics import median

import numpy as np
import onnx
from google.protobuf.message import DecodeError

from hetsched.cache import refusals as kept_refusals
from hetsched.device import Device
from hetsched.dtype import dtype_name, numpy_dtype
from hetsched.errors import ModelError, UnsupportedOperation
from hetsched.fusion import ELEMENTWISE, HEAD, Group
from hetsched.graph import DETACHED_NBYTES, Graph, from_onnx, to_onnx
from hetsched.op import Tensor
from hetsched.plugin import Plugin, load
from hetsched.store import Kernel
from hetsched.system import System
from hetsched.target import Target

Progress = Callable[[str, int, int], None]

# Integer constants of at most so many bytes are parameters, larger ones are weights.
MOST_INTEGER_NBYTES = 1024
# Of other constants, those of at most so many bytes may be parameters.
DECISIVE_NBYTES = 64


class CostModel(Plugin):
    """Seconds of a kernel group on a device. Machines are unrelated; links are the system's."""

    package = "hetsched.cost_models"

    @abstractmethod
    def compute_seconds(self, graph: Graph, group: Group, device: Device) -> float:
        """The time of one run of `group`, a group of `graph`; infinite if it cannot run there."""

    def all_seconds(
        self,
        graph: Graph,
        wanted: Sequence[tuple[Group, Device]],
        progress: Progress | None = None,
    ) -> list[float]:
        """`compute_seconds` of each pair; overridden where they are found quicker together."""
        found = []
        for index, (group, device) in enumerate(wanted):
            if progress:
                progress(group.kinds, index, len(wanted))
            found.append(self.compute_seconds(graph, group, device))
        return found

    def deviations(
        self, graph: Graph, wanted: Sequence[tuple[Group, Device]]
    ) -> list[float | None]:
        """How uncertain each of `all_seconds` is that is predicted from other kernels.

        The standard deviation of its logarithm. None for what is measured, or computed.
        """
        return [None] * len(wanted)


def roofline_seconds(flops: int, nbytes: int, device: Device) -> float:
    """The call, and the longer of computing at the device's peak and moving at full bandwidth.

    The bandwidth is that of the nearest cache that holds all `nbytes`, as far as the device says
    what it is, and else that of the memory.

    References
    ----------
    Williams, Waterman and Patterson, "Roofline: an insightful visual performance model for
    multicore architectures", CACM 52(4), 2009, https://doi.org/10.1145/1498765.1498785
    Ilic, Pratas and Sousa, "Cache-aware roofline model: upgrading the loft", IEEE Computer
    Architecture Letters 13(1), 2014, https://doi.org/10.1109/L-CA.2013.6
    """
    levels = zip(device.cache_nbytes, device.cache_bytes_per_second, strict=False)
    held = (rate for size, rate in levels if nbytes <= size)
    bandwidth = next(held, device.bytes_per_second)
    return device.call_seconds + max(flops / device.flops_per_second, nbytes / bandwidth)


@dataclass(frozen=True)
class Prices(CostModel):
    """A cost model that has been asked already: a table for one graph and one system.

    `seconds` and `refusals` are by group name, then device name; a pair is in one of them.
    `members` are the operations of each group, without which its name alone says what it is, and
    `source` prices what the table lacks: the pieces of the same graph, split. `predicted` has the
    deviations of the prices that are predicted from other kernels.
    """

    model: str
    seconds: Mapping[str, Mapping[str, float]]
    refusals: Mapping[str, Mapping[str, str]]
    members: Mapping[str, tuple[str, ...]] = field(default_factory=dict, compare=False, repr=False)
    source: CostModel | None = field(default=None, compare=False, repr=False)
    predicted: Mapping[str, Mapping[str, float]] = field(
        default_factory=dict, compare=False, repr=False
    )

    @property
    def told(self) -> str | None:
        """Which of the prices are not measured but predicted, in words; None if none is."""
        deviations = [value for row in self.predicted.values() for value in row.values()]
        if not deviations:
            return None
        every = sum(map(len, self.seconds.values()))
        return (
            f"{len(deviations)} of {every} prices are predicted by {self.model}, not measured: "
            f"uncertain by {exp(median(deviations)) - 1:.0%} (median)"
        )

    def has(self, group: Group) -> bool:
        """Whether the table has this very group."""
        known = group.name in self.seconds
        return known and self.members.get(group.name, group.members) == group.members

    def compute_seconds(self, graph: Graph, group: Group, device: Device) -> float:
        return self.seconds[group.name].get(device.name, float("inf"))

    def without(self, groups: Iterable[str], device: str, reason: str) -> "Prices":
        """The same prices, but that `device` cannot run `groups`, for this reason."""
        seconds = {name: dict(row) for name, row in self.seconds.items()}
        refusals = {name: dict(row) for name, row in self.refusals.items()}
        for name in groups:
            seconds[name].pop(device, None)
            refusals.setdefault(name, {})[device] = reason
        return replace(self, seconds=seconds, refusals=refusals)


def price(
    graph: Graph,
    system: System,
    costs: CostModel,
    progress: Progress | None = None,
) -> Prices:
    """The price of every group on every device, and the reason where there is none.

    Of `Prices` what they have is kept, and their source is asked for the rest.

    Raises
    ------
    UnsupportedOperation
        A group that no device can run; the message has operation, node, reasons and what would do.
    PluginError
        Prices without a source lack a group, and no cost model has their name.
    """
    if not isinstance(costs, Prices):
        return _asked(graph, graph.groups, system, costs, progress)
    lacking = [group for group in graph.groups if not costs.has(group)]
    if not lacking:
        return costs
    source = costs.source or load(CostModel, costs.model)
    found = _asked(graph, lacking, system, source, progress)
    merged = {group.name: found if group.name in found.seconds else costs for group in graph.groups}
    return Prices(
        costs.model,
        {name: table.seconds[name] for name, table in merged.items()},
        {name: table.refusals.get(name, {}) for name, table in merged.items()},
        {group.name: group.members for group in graph.groups},
        source,
        {name: table.predicted.get(name, {}) for name, table in merged.items()},
    )


def _asked(
    graph: Graph,
    groups: Sequence[Group],
    system: System,
    costs: CostModel,
    progress: Progress | None,
) -> Prices:
    """What `costs` says of `groups`, which are of `graph`."""
    seconds: dict[str, dict[str, float]] = {group.name: {} for group in groups}
    reasons: dict[str, dict[str, str]] = {group.name: {} for group in groups}
    wanted = []
    for group, answers in zip(groups, _answers(graph, groups, system), strict=True):
        for device, reason in zip(system.devices, answers, strict=True):
            if reason is None:
                wanted.append((group, device))
            else:
                reasons[group.name][device.name] = reason
        if len(reasons[group.name]) == len(system.devices):
            # Before anything is measured in vain.
            raise UnsupportedOperation(_unsupported(group, reasons[group.name]))
    modelled = _modelled(graph, wanted)
    asked = [pair for pair in wanted if pair not in modelled]
    told = dict(zip(asked, costs.all_seconds(graph, asked, progress), strict=True))
    for pair in wanted:
        (group, device), value = pair, modelled[pair] if pair in modelled else told[pair]
        if value < float("inf"):
            seconds[group.name][device.name] = value
        else:
            reasons[group.name][device.name] = "the cost model has no price for it"
    for group in groups:
        if not seconds[group.name]:
            raise UnsupportedOperation(_unsupported(group, reasons[group.name]))
    members = {group.name: group.members for group in groups}
    predicted: dict[str, dict[str, float]] = {}
    for (group, device), deviation in zip(asked, costs.deviations(graph, asked), strict=True):
        if deviation is not None:
            predicted.setdefault(group.name, {})[device.name] = deviation
    return Prices(costs.name, seconds, reasons, members, costs, predicted)


def _modelled(
    graph: Graph, wanted: Sequence[tuple[Group, Device]]
) -> dict[tuple[Group, Device], float]:
    """The seconds of those pairs whose target computes them, once for groups that are alike."""
    found = {}
    known: dict[tuple[str, Device], float | None] = {}
    for group, device in wanted:
        if not device.modelled:
            continue
        part = graph.part(group.ops, group.name)
        key = (signature(part), device)
        if key not in known:
            known[key] = load(Target, device.target).seconds(part, device)
        seconds = known[key]
        if seconds is not None:
            found[group, device] = seconds
    return found


def _answers(graph: Graph, groups: Sequence[Group], system: System) -> list[tuple[str | None, ...]]:
    """Why each device cannot run each group, or None; asked once for devices of one kind."""
    parts = [graph.part(group.ops, group.name) for group in groups]
    asked: dict[tuple[str, str], list[str | None]] = {}
    for device in system.devices:
        kind = (device.target, device.isa)
        if kind not in asked:
            asked[kind] = refusals(parts, device)
    kinds = [(device.target, device.isa) for device in system.devices]
    return [tuple(asked[kind][index] for kind in kinds) for index in range(len(parts))]


def refusals(parts: Sequence[Graph], device: Device) -> list[str | None]:
    """Why the device's target cannot compile each of `parts`, or None.

    Asked once for parts that are alike.
    """
    keys = [(signature(part), _decisive(part)) for part in parts]
    first: dict[object, int] = {}
    for index, key in enumerate(keys):
        first.setdefault(key, index)
    answers = _each_refusal([parts[index] for index in first.values()], device)
    alike = dict(zip(first, answers, strict=True))
    found = [alike[key] for key in keys]
    # A reason names the operation.
    named = [i for i, key in enumerate(keys) if found[i] is not None and first[key] != i]
    if named:
        reasons = _each_refusal([parts[index] for index in named], device)
        for index, reason in zip(named, reasons, strict=True):
            found[index] = reason
    return found


def _decisive(part: Graph) -> tuple[object, ...]:
    """The small constants that a compiler may look at, such as the scales of a Resize.

    What an elementwise operation reads is no reason to refuse it.
    """
    read = {t.name for op in part.ops if op.kind not in ELEMENTWISE | {HEAD} for t in op.reads}
    found = (part.constants[name] for name in part.constants if name in read)
    return tuple(
        repr(array.tolist()) if array.dtype == object else array.tobytes()
        for array in found
        if array.nbytes <= DECISIVE_NBYTES
    )


def _each_refusal(parts: Sequence[Graph], device: Device) -> list[str | None]:
    target = load(Target, device.target)
    if target.unavailable():
        # A machine that is described but not here cannot be asked; its compiler will say so later.
        return [None] * len(parts)
    return kept_refusals(target, parts, device)


def _unsupported(group: Group, reasons: Mapping[str, str]) -> str:
    what = str(group.ops[0]) if len(group.ops) == 1 else f"{group.kinds} at '{group.name}'"
    told = "; ".join(f"{device}: {reason}" for device, reason in reasons.items())
    hint = "add an onnxruntime device, for example --devices cpu:0,onnxruntime:0"
    if any(device.startswith("onnxruntime") for device in reasons):
        hint = "replace the operation in the model"
    return f"no device can run {what} ({told}); {hint}"


def signature(part: Graph) -> str:
    """What two groups have in common that take the same time: all but names and weight values.

    Which tensors at the border are packed is part of it.

    Integer constants count with their values, for they are axes, shapes and indices.
    """
    places: dict[str, int] = {}

    def place(tensor: Tensor | None) -> object:
        """The number of a tensor, and what it is where it is first met."""
        if tensor is None:
            return None
        known = len(places)
        number = places.setdefault(tensor.name, known)
        return (number, tensor.dtype, tensor.shape) if number == known else number

    content: list[object] = [sorted(part.opsets.items()), [place(tensor) for tensor in part.inputs]]
    for op in part.ops:
        told = [(name, _plain(op.attributes[name])) for name in sorted(op.attributes)]
        ends = [[place(tensor) for tensor in tensors] for tensors in (op.inputs, op.outputs)]
        content.append((op.kind, op.domain, told, ends))
    content.append([place(tensor) for tensor in part.outputs])
    for name, array in part.constants.items():
        if np.issubdtype(array.dtype, np.integer) and array.nbytes <= MOST_INTEGER_NBYTES:
            content.append((places.get(name), array.tolist()))
        else:
            content.append(places.get(name))
    content.append(sorted((places[name], lanes) for name, lanes in part.packed.items()))
    return sha256(repr(content).encode()).hexdigest()[:32]


def _plain(value: object) -> object:
    """A value of an attribute, as one that `repr` shows whole."""
    if isinstance(value, np.ndarray):
        return (value.dtype.str, value.shape, value.tolist())
    return value


def kernel_of(part: Graph) -> Kernel:
    """What the profile store keeps of a part: its signature, and its graph without weights."""
    model = to_onnx(part, weights=False).SerializeToString(deterministic=True)
    return Kernel(signature(part), "+".join(op.kind for op in part.ops), model)


def graph_of(kernel: Kernel) -> Graph:
    """The part that a kernel of the store was made from, with weights of zero.

    Raises
    ------
    ModelError
        The store has no model of it, or one that cannot be read.
    """
    try:
        model = onnx.ModelProto.FromString(kernel.model)
        zeros = {
            tensor.name: np.broadcast_to(
                np.zeros((), numpy_dtype(dtype_name(tensor.data_type))), tuple(tensor.dims)
            )
            for tensor in model.graph.initializer
            if tensor.data_type != onnx.TensorProto.STRING
        }
        detached = {name: array for name, array in zeros.items() if array.nbytes >= DETACHED_NBYTES}
        if not model.graph.node:
            raise ValueError("no operations")
        return from_onnx(model, detached)
    except (DecodeError, ValueError, KeyError) as error:
        raise ModelError(f"the profile store has no graph of '{kernel.kinds}': {error}") from None
