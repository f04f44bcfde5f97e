"""Schedules for processors with vector registers: fixed rules, nothing is measured.

A family of operations is one file: the loops that define it, where they are its own, and the
schedule of those loops. `layout` plans which tensors have their channels in blocks, `legal` gives
other operations their loops, and `apply` schedules every function of a fused module.
"""
