"""Targets: a file each, named by the first word of a device string."""
