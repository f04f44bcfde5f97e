"""Rows, columns, tokens or the batch shared by devices, or tile after tile on one."""

from dataclasses import dataclass
from functools import partial

from hetsched.cost import CostModel, Prices, price
from hetsched.errors import PluginError
from hetsched.graph import Graph
from hetsched.partitioner import alone, quickest
from hetsched.plan import Plan
from hetsched.rewrite import split
from hetsched.sharing.memory import Tiling
from hetsched.sharing.pieces import Way
from hetsched.sharing.search import TILES, Shares
from hetsched.system import System


@dataclass(frozen=True)
class Tile(Shares):
    """Each device computes some of the rows or columns of a chain of layers, or of the batch.

    At most `candidates` are priced, as each is compiled and measured; splits have to save the
    share `gain` of the time, and a run of groups is shared only if that leaves each device
    `least_seconds` of work.

    With `tiles`, such as 5x5, one device computes tile after tile instead, in grids of at most so
    many rows and columns, so that the least memory is held at once by activations; that may take
    the share `extra` more arithmetic.

    References
    ----------
    Zhou et al., "Adaptive parallel execution of deep neural networks on heterogeneous edge
    devices" (AOFL), SEC 2019, https://doi.org/10.1145/3318216.3363312

    Zhao, Barijough and Gerstlauer, "DeepThings: distributed adaptive deep learning inference on
    resource-constrained IoT edge clusters", IEEE TCAD 37(11), 2018,
    https://doi.org/10.1109/TCAD.2018.2858384
    """

    covered = True
    tiles: str = ""
    extra: float = 0.05

    def menus(self) -> tuple[tuple[Way, ...], ...]:
        return (TILES,)

    def plans(self, graph: Graph, system: System, costs: CostModel) -> tuple[Plan, ...]:
        if self.tiles:
            return (self._tiled(graph, system, price(graph, system, costs)),)
        return super().plans(graph, system, costs)

    def _tiled(self, graph: Graph, system: System, prices: Prices) -> Plan:
        """The graph in tiles on the device that is fastest so."""
        rows, _, columns = self.tiles.partition("x")
        if not rows.isdecimal() or not columns.isdecimal():
            raise PluginError(f"'{self.tiles}' is no grid of tiles; write 5x5")
        splits = Tiling(graph, (int(rows), int(columns)), self.extra).splits()
        rewritten = split(graph, splits)
        found = price(rewritten, system, prices)
        spec = f"{self.name}:tiles={self.tiles}"
        original = graph if splits else None
        return quickest(
            partial(alone, device.name, rewritten, system, found, spec, splits, original)
            for device in system.devices
        )
