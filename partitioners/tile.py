"""Rows, columns, tokens or the batch shared by devices, or tile after tile on one."""

from dataclasses import dataclass

from hetsched.cost import CostModel, Prices, price
from hetsched.errors import InfeasiblePlan, PluginError
from hetsched.graph import Graph
from hetsched.partitioner import Partitioner
from hetsched.plan import Plan, make_plan, simulate
from hetsched.rewrite import split
from hetsched.sharing.memory import Tiling
from hetsched.sharing.search import TILES, Search
from hetsched.system import System


@dataclass(frozen=True)
class Tile(Partitioner):
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

    splits = True
    covered = True
    candidates: int = 4
    gain: float = 0.02
    least_seconds: float = 50e-6
    tiles: str = ""
    extra: float = 0.05

    def partition(self, graph: Graph, system: System, costs: CostModel) -> Plan:
        prices = price(graph, system, costs)
        if self.tiles:
            return self._tiled(graph, system, prices)
        return Search(
            graph,
            system,
            prices,
            TILES,
            self.name,
            self.candidates,
            self.gain,
            self.least_seconds,
        ).plan()

    def _tiled(self, graph: Graph, system: System, prices: Prices) -> Plan:
        """The graph in tiles on the device that is fastest so."""
        rows, _, columns = self.tiles.partition("x")
        if not rows.isdecimal() or not columns.isdecimal():
            raise PluginError(f"'{self.tiles}' is no grid of tiles; write 5x5")
        splits = Tiling(graph, (int(rows), int(columns)), self.extra).splits()
        rewritten = split(graph, splits)
        found = price(rewritten, system, prices)
        order = [group.name for group in rewritten.groups]
        plans: list[Plan] = []
        refused: list[str] = []
        for device in system.devices:
            lacking = next((n for n in order if device.name not in found.seconds[n]), None)
            if lacking is not None:
                refused.append(f"'{device.name}' alone cannot run '{lacking}'")
                continue
            spec = f"{self.name}:tiles={self.tiles}"
            placement = dict.fromkeys(order, device.name)
            unsplit = graph if splits else None
            try:
                plans.append(
                    make_plan(rewritten, system, found, placement, order, spec, (), splits, unsplit)
                )
            except InfeasiblePlan as error:
                refused.append(str(error))
        if not plans:
            raise InfeasiblePlan("; ".join(refused))
        return min(plans, key=lambda plan: simulate(plan).makespan)
