"""Channels, rows, columns, tokens or the batch shared by devices, whatever suits a layer."""

from dataclasses import dataclass

from hetsched.sharing.pieces import Way
from hetsched.sharing.search import TILES, Shares, channels


@dataclass(frozen=True)
class Hybrid(Shares):
    """Runs of layers, of which devices share some as `tile` does and others as `channel` does.

    References
    ----------
    Jia et al., "CoDL: efficient CPU-GPU co-execution for deep learning inference on mobile
    devices", MobiSys 2022, https://doi.org/10.1145/3498361.3538932
    """

    grain: int = 16

    def menus(self) -> tuple[tuple[Way, ...], ...]:
        return channels(self.grain), TILES
