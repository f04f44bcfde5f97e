"""The overlay's RTL in Amaranth: block RAM and multipliers, the three units, and the core."""
