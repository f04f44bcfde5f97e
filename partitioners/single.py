"""The whole graph on one device."""

from dataclasses import dataclass
from functools import partial

from hetsched.cost import CostModel
from hetsched.graph import Graph
from hetsched.partitioner import Partitioner, alone, quickest
from hetsched.plan import Plan
from hetsched.system import System


@dataclass(frozen=True)
class Single(Partitioner):
    """All groups on `device`; without one, on the device that is predicted fastest."""

    device: str = ""

    def partition(self, graph: Graph, system: System, costs: CostModel) -> Plan:
        devices = [system.device(self.device)] if self.device else system.devices
        return quickest(
            partial(alone, device.name, graph, system, costs, f"{self.name}:device={device.name}")
            for device in devices
        )
