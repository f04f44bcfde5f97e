"""Channels of convolutions and matrix products shared by devices."""

from dataclasses import dataclass

from hetsched.sharing.pieces import Way
from hetsched.sharing.search import Shares, channels


@dataclass(frozen=True)
class Channel(Shares):
    """Each device computes some of the output channels, or adds up some of the input channels.

    Output channels are kept apart through the layers that need no others: elementwise, depthwise,
    pooling, the heads of attention. A contraction behind them can take each device's own channels
    and add up the results, so that data meet only at its end. Bounds are multiples of `grain`
    channels. At most `candidates` are priced, as each is compiled and measured; splits have to
    save the share `gain` of the time, and a run of groups is shared only if that leaves each
    device `least_seconds` of work.

    References
    ----------
    Kim et al., "uLayer: low latency on-device inference using cooperative single-layer
    acceleration and processor-friendly quantization", EuroSys 2019,
    https://doi.org/10.1145/3302424.3303950
    """

    covered = True
    candidates: int = 8
    grain: int = 16

    def menus(self) -> tuple[tuple[Way, ...], ...]:
        return (channels(self.grain),)
