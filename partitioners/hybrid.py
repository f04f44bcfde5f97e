"""Channels, rows, columns, tokens or the batch shared by devices, whatever suits a layer."""

from dataclasses import dataclass

from hetsched.cost import CostModel, price
from hetsched.graph import Graph
from hetsched.partitioner import Partitioner
from hetsched.plan import Plan
from hetsched.sharing.search import TILES, Search, channels
from hetsched.system import System


@dataclass(frozen=True)
class Hybrid(Partitioner):
    """Runs of layers, of which devices share some as `tile` does and others as `channel` does.

    References
    ----------
    Jia et al., "CoDL: efficient CPU-GPU co-execution for deep learning inference on mobile
    devices", MobiSys 2022, https://doi.org/10.1145/3498361.3538932
    """

    splits = True
    candidates: int = 4
    gain: float = 0.02
    least_seconds: float = 50e-6
    grain: int = 16

    def partition(self, graph: Graph, system: System, costs: CostModel) -> Plan:
        return Search(
            graph,
            system,
            price(graph, system, costs),
            TILES + channels(self.grain),
            self.name,
            self.candidates,
            self.gain,
            self.least_seconds,
        ).plan()
