"""Time as measured where it was, and as kernels like it take where it was not."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hetsched.cost import CostModel, Progress, signature
from hetsched.device import Device
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

    def estimates(self, graph: Graph, wanted: Sequence[tuple[Group, Device]]) -> list[Estimate]:
        """The seconds of each pair, and how uncertain they are: not at all if they are measured."""
        store = Store(Path(self.store) if self.store else default_path())
        parts = [graph.part(group.ops, group.name) for group, _ in wanted]
        signatures = [signature(part) for part in parts]
        found: list[Estimate | None] = [None] * len(wanted)
        for device in dict.fromkeys(device for _, device in wanted):
            compiler = load(Target, device.target).configuration(device)
            own = [index for index, (_, other) in enumerate(wanted) if other == device]
            known = store.samples(
                device, compiler, method(graph), {signatures[index] for index in own}
            )
            for index in own:
                if signatures[index] in known:
                    found[index] = Estimate(known[signatures[index]].seconds, 0.0)
            missing = [index for index in own if found[index] is None]
            if missing:
                model = Model.of(device, store.records())
                told = model.estimates([parts[index] for index in missing], surroundings(graph))
                for index, estimate in zip(missing, told, strict=True):
                    found[index] = estimate
        return [estimate for estimate in found if estimate is not None]
