"""What the schedules for graphics processors go by."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Of a device: `units` multiprocessors, each of `lanes` multiply-adds a cycle.

    A unit has `registers` of 4 bytes, `shared_nbytes_unit` of shared memory and room for
    `threads_unit` threads; a group of threads may have `shared_nbytes_group` and `threads_group` of
    them. `warp` threads run in step.
    """

    units: int = 16
    lanes: int = 128
    threads_group: int = 256
    threads_unit: int = 1536
    registers: int = 65536
    shared_nbytes_group: int = 32768
    shared_nbytes_unit: int = 65536
    warp: int = 32
