"""Time as measured on the device."""

from dataclasses import dataclass
from pathlib import Path

from hetsched.cost import CostModel, signature
from hetsched.device import Device
from hetsched.errors import CompileError
from hetsched.fusion import Group
from hetsched.graph import Graph
from hetsched.measure import measure_kernel
from hetsched.plugin import load
from hetsched.store import Store, default_path
from hetsched.target import Target


@dataclass(frozen=True)
class Profiled(CostModel):
    """Each distinct kernel group, run alone on its device; measured once, then from the store.

    `store` is the path of the profile store, by default the user's.
    """

    store: str = ""

    def compute_seconds(self, graph: Graph, group: Group, device: Device) -> float:
        store = Store(Path(self.store) if self.store else default_path())
        part = graph.part(group.ops, group.name)
        key = signature(part)
        compiler = load(Target, device.target).configuration(device)
        sample = store.sample(device, key, compiler)
        if sample is None:
            try:
                sample = measure_kernel(part, device)
            except CompileError:
                return float("inf")
            store.add(device, key, compiler, group.kinds, sample)
        return sample.seconds
