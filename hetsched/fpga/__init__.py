"""The FPGA's own int8 overlay: its instructions, its RTL, and what simulates and places it."""
