"""Prices of kernels that nobody has measured, from those of others."""
