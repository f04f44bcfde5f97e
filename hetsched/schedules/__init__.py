"""Schedules for processors with vector registers: constructive rules.

A family of operations is one file: the loops that define it, where they are its own, and the
schedule of those loops. `layout` plans which tensors have their channels in blocks, `legal` gives
other operations their loops, and `apply` schedules every function of a fused module. `rules` says
which of a kernel's candidates is used: the best by a model of the core, or one that was measured.
"""
