"""Time from arithmetic and traffic alone."""

from dataclasses import dataclass

from hetsched.cost import CostModel, roofline_seconds
from hetsched.device import Device
from hetsched.fusion import Group
from hetsched.graph import Graph
from hetsched.operation import group_flops, group_nbytes


@dataclass(frozen=True)
class Roofline(CostModel):
    """The roofline of the device: a bound from below, which needs no measurement and no device.

    It prices machines that are only described.
    """

    def compute_seconds(self, graph: Graph, group: Group, device: Device) -> float:
        return roofline_seconds(group_flops(group), group_nbytes(group), device)
