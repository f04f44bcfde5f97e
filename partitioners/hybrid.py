"""Channels, rows, columns, tokens or the batch shared by devices, whatever suits a layer."""

from dataclasses import dataclass

from hetsched.cost import CostModel, price
from hetsched.graph import Graph
from hetsched.partitioner import Partitioner
from hetsched.plan import Plan
from hetsched.sharing.pieces import Way
from hetsched.sharing.search import Search
from hetsched.system import System


@dataclass(frozen=True)
class Hybrid(Partitioner):
    """Runs of layers that devices share by rows here and by channels there."""

    candidates: int = 8
    gain: float = 0.02
    least_seconds: float = 50e-6
    grain: int = 16

    def partition(self, graph: Graph, system: System, costs: CostModel) -> Plan:
        grain = self.grain
        ways = (
            Way((2,), 4),
            Way((3,), 4),
            Way((1,), 3),
            Way((2,), 3),
            Way((0,)),
            Way((1,), 4, grain=grain),
            Way((2,), 3, grain=grain),
            Way((1,), 3, grain=grain),
            Way((1,), 2, grain=grain),
            Way(sum=True, grain=grain),
        )
        prices = price(graph, system, costs)
        return Search(
            graph,
            system,
            prices,
            ways,
            self.name,
            self.candidates,
            self.gain,
            self.least_seconds,
        ).plan()
