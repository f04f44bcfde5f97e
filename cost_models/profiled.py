"""Time as measured on the device."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hetsched.cost import CostModel, Progress, signature
from hetsched.device import Device
from hetsched.errors import CompileError
from hetsched.forms import between
from hetsched.fusion import Group
from hetsched.graph import Graph
from hetsched.measure import measure_kernels
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
        return self.all_seconds(graph, [(group, device)])[0]

    def all_seconds(
        self,
        graph: Graph,
        wanted: Sequence[tuple[Group, Device]],
        progress: Progress | None = None,
    ) -> list[float]:
        store = Store(Path(self.store) if self.store else default_path())
        known: dict[tuple[str, ...], float] = {}
        missing: dict[tuple[str, ...], tuple[Group, Graph, Device]] = {}
        keys: list[tuple[str, ...]] = []
        # Once a device: what it is tuned to is asked of the store.
        devices = dict.fromkeys(device for _, device in wanted)
        compilers = {d: load(Target, d.target).configuration(d) for d in devices}
        # Alone, a group reads and makes what it does among its neighbours.
        graphs = {device: between(graph, device) for device in devices}
        for group, device in wanted:
            part = graphs[device].part(group.ops, group.name)
            compiler = compilers[device]
            keys.append((signature(part), device.fingerprint, compiler))
            key = keys[-1]
            if key in known or key in missing:
                continue
            sample = store.sample(device, key[0], compiler)
            if sample is None:
                missing[key] = (group, part, device)
            else:
                known[key] = sample.seconds
        kernels = [(part, device) for _, part, device in missing.values()]
        measured = measure_kernels(kernels)
        for index, (key, (group, _, device)) in enumerate(missing.items()):
            if progress:
                progress(group.kinds, index, len(missing))
            found = next(measured)
            if isinstance(found, CompileError):
                known[key] = float("inf")
            else:
                store.add(device, key[0], key[2], group.kinds, found)
                known[key] = found.seconds
        return [known[key] for key in keys]
