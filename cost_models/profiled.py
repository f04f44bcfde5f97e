"""Time as measured on the device."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hetsched.cost import CostModel, Progress
from hetsched.device import Device
from hetsched.fusion import Group
from hetsched.graph import Graph
from hetsched.profiling import QUICK, Course, measure
from hetsched.store import Store, default_path


@dataclass(frozen=True)
class Profiled(CostModel):
    """Each distinct kernel group, run on its device; measured once, then from the store.

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
        asked: dict[tuple[str, str], dict[Group, Device]] = {}
        kinds = [(device.fingerprint, device.target) for _, device in wanted]
        for (group, device), kind in zip(wanted, kinds, strict=True):
            asked.setdefault(kind, {}).setdefault(group, device)
        courses = {
            kind: Course(graph, list(groups), next(iter(groups.values())))
            for kind, groups in asked.items()
        }
        found = measure(list(courses.values()), store, QUICK, progress=progress)
        return [
            found.seconds(courses[kind].keys[group.name])
            for (group, _), kind in zip(wanted, kinds, strict=True)
        ]
