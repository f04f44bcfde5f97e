"""A model of a device's kernels, fitted to what the profile store has of it."""

from collections.abc import Sequence
from dataclasses import dataclass

from hetsched.cost import graph_of, roofline_seconds
from hetsched.device import Device
from hetsched.errors import ModelError
from hetsched.graph import Graph
from hetsched.learning.regression import Estimate, Regression
from hetsched.learning.work import Work, work_of
from hetsched.operation import group_flops, group_nbytes
from hetsched.plugin import load
from hetsched.schedules.rules import Rules
from hetsched.schedules.vectors import Vectors
from hetsched.sequence import surroundings_of
from hetsched.store import Record
from hetsched.target import Target

# Where nobody has said a clock.
CLOCK_HZ = 2e9
# Of a device of which nothing is known but peak and bandwidth: the deviation of a logarithm.
UNKNOWN = 1.0
# More samples take longer to fit than they are worth; the newest count.
MOST_SAMPLES = 1000


@dataclass(frozen=True, eq=False)
class Model:
    """Estimates for the kernels of one device, `seen` of which are measured.

    `samples` is how many the regression is fitted to.
    """

    device: Device
    regression: Regression
    samples: int = 0

    @classmethod
    def of(cls, device: Device, records: Sequence[Record]) -> "Model":
        """The model of `device`, from what the store has of it, or else of others.

        Samples of the same kind of device with the same compiler count most. What other compilers
        made there, or other devices ran, is what it begins with.
        """
        compiler = load(Target, device.target).configuration(device)
        own = [
            record
            for record in records
            if (record.fingerprint, record.compiler) == (device.fingerprint, compiler)
        ]
        chosen = {id(record) for record in own}
        begin = Regression(device.clock_hz or CLOCK_HZ)
        for group in _by_kind([record for record in records if id(record) not in chosen], device):
            begin = _fitted(begin, group, device)[0]
        regression, count = _fitted(begin, own, device)
        return cls(device, regression, count)

    def estimates(self, parts: Sequence[Graph], megabytes: int) -> list[Estimate]:
        """Of each of `parts`, kernel groups of a graph that touches `megabytes` in a run."""
        if self.regression.table is None:
            return [Estimate(_roofline(part, self.device), UNKNOWN) for part in parts]
        return self.regression.estimates([self.work(part, megabytes) for part in parts])

    def work(self, part: Graph, megabytes: int) -> Work:
        return work_of(part, rules_of(self.device), megabytes)


def rules_of(device: Device) -> Rules:
    """What schedules for the device go by, as far as its name tells."""
    return Rules(Vectors.of(device.isa or "x86_64"), device.threads)


def _by_kind(records: Sequence[Record], device: Device) -> list[list[Record]]:
    """Records by device and compiler; those of the same device last, as the nearest."""
    kinds: dict[tuple[bool, str, str], list[Record]] = {}
    for record in records:
        same = record.fingerprint == device.fingerprint
        kinds.setdefault((same, record.fingerprint, record.compiler), []).append(record)
    return [kinds[kind] for kind in sorted(kinds)]


def _fitted(
    regression: Regression, records: Sequence[Record], device: Device
) -> tuple[Regression, int]:
    """`regression` after what `records` say, and how many of them could be read."""
    works, seconds = [], []
    newest = sorted(records, key=lambda record: record.measured_at, reverse=True)
    for record in newest[:MOST_SAMPLES]:
        megabytes = surroundings_of(record.method)
        if megabytes is None or not record.sample.seconds > 0:
            continue
        try:
            part = graph_of(record.kernel)
        except ModelError:
            # An old store may lack what its kernels are.
            continue
        works.append(work_of(part, rules_of(device), megabytes))
        seconds.append(record.sample.seconds)
    return (regression.fitted(works, seconds) if works else regression), len(works)


def _roofline(part: Graph, device: Device) -> float:
    group = part.border(part.ops)
    return roofline_seconds(group_flops(group), group_nbytes(group), device)
