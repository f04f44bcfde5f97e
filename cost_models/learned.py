"""Time as measured where it was, and as kernels like it take where it was not."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from hetsched.cost import CostModel, Progress, signature
from hetsched.device import Device
from hetsched.forms import between
from hetsched.fusion import Group
from hetsched.graph import Graph
from hetsched.learning.model import Model
from hetsched.learning.regression import Estimate
from hetsched.plugin import load
from hetsched.sequence import method, surroundings
from hetsched.store import Store, default_path
from hetsched.target import Target


@dataclass(frozen=True)
class Learned(CostModel):
    """What the profile store has of a kernel group, else what its samples of others say.

    Nothing is measured. The model is fitted to the samples of the device when it is asked, in about
    a second; without any it begins with those of other devices, and without those it is the
    roofline. `store` is the path of the profile store, by default the user's.
    """

    store: str = ""

    def compute_seconds(self, graph: Graph, group: Group, device: Device) -> float:
        return self.all_seconds(graph, [(group, device)])[0]

    def all_seconds(
        self,
        graph: Graph,
        wanted: Sequence[tuple[Group, Device]],
        progress: Progress | None = None,
    ) -> list[float]:
        return [estimate.seconds for estimate in self.estimates(graph, wanted)]

    def deviations(
        self, graph: Graph, wanted: Sequence[tuple[Group, Device]]
    ) -> list[float | None]:
        estimates = self.estimates(graph, wanted)
        return [None if one.is_measured else one.deviation for one in estimates]

    def estimates(self, graph: Graph, wanted: Sequence[tuple[Group, Device]]) -> list[Estimate]:
        """The seconds of each pair, and how uncertain they are: not at all if they are measured."""
        store = Store(Path(self.store) if self.store else default_path())
        found: dict[tuple[Group, Device], Estimate] = {}
        for device in dict.fromkeys(device for _, device in wanted):
            groups = [group for group, other in wanted if other == device]
            found |= zip(
                [(group, device) for group in groups],
                _estimates(store, graph, groups, device),
                strict=True,
            )
        return [found[pair] for pair in wanted]


def _estimates(
    store: Store, graph: Graph, groups: Sequence[Group], device: Device
) -> list[Estimate]:
    """Of groups of `graph`, as they are among their neighbours on one device."""
    handing = between(graph, device)
    parts = [handing.part(group.ops, group.name) for group in groups]
    signatures = [signature(part) for part in parts]
    compiler = load(Target, device.target).configuration(device)
    known = store.samples(device, compiler, method(graph), signatures)
    missing = [p for p, s in zip(parts, signatures, strict=True) if s not in known]
    if missing:
        model = _model(store, _stamp(store), device)
        predicted = iter(model.estimates(missing, surroundings(graph)))
    return [
        Estimate(known[one].seconds, 0.0) if one in known else next(predicted) for one in signatures
    ]


def _stamp(store: Store) -> tuple[int, int]:
    """What changes when something is written to the store."""
    try:
        status = store.path.stat()
    except OSError:
        return 0, 0
    return status.st_mtime_ns, status.st_size


@lru_cache(maxsize=16)
def _model(store: Store, stamp: tuple[int, int], device: Device) -> Model:
    """Fitted once as long as the store stays as it is."""
    return Model.of(device, store.records())
