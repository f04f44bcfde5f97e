"""Rows, columns, tokens or the batch shared by devices."""

from dataclasses import dataclass

from hetsched.cost import CostModel, price
from hetsched.graph import Graph
from hetsched.partitioner import Partitioner
from hetsched.plan import Plan
from hetsched.sharing.pieces import Way
from hetsched.sharing.search import Search
from hetsched.system import System


@dataclass(frozen=True)
class Tile(Partitioner):
    """Each device computes some of the rows or columns of a chain of layers, or of the batch.

    At most `candidates` are priced, as each is compiled and measured; splits have to save the
    share `gain` of the time, and a run of groups is shared only if that leaves each device
    `least_seconds` of work.

    References
    ----------
    Zhou et al., "Adaptive parallel execution of deep neural networks on heterogeneous edge
    devices" (AOFL), SEC 2019, https://doi.org/10.1145/3318216.3363312
    """

    candidates: int = 8
    gain: float = 0.02
    least_seconds: float = 50e-6

    def partition(self, graph: Graph, system: System, costs: CostModel) -> Plan:
        ways = (Way((2,), 4), Way((3,), 4), Way((1,), 3), Way((2,), 3), Way((0,)))
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
