"""What the schedules go by: the core that they are for, and the candidate that each kernel uses."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from hetsched.schedules.vectors import Vectors

Candidate = TypeVar("Candidate")

# Annotations of a kernel's main block, and attributes of its function once it is scheduled.
WORKLOAD = "hetsched.workload"
CANDIDATE = "hetsched.candidate"
CANDIDATES = "hetsched.candidates"
# Which forms of Winograd's convolution are used.
WINOGRAD = ("off", "f2", "f4", "auto")


@dataclass(frozen=True)
class Choice(Generic[Candidate]):
    """The way that a kernel is computed, of the `candidates` for its `workload`, best first."""

    workload: str
    candidate: Candidate
    candidates: tuple[str, ...]

    @property
    def attributes(self) -> dict[str, Any]:
        """What a tuner has to know of the kernel, as annotations of its main block."""
        if not self.candidates:
            return {}
        return {
            WORKLOAD: self.workload,
            CANDIDATE: str(self.candidate),
            CANDIDATES: list(self.candidates),
        }


@dataclass(frozen=True)
class Rules:
    """`chosen` has the text of a workload's candidate where that is not the first.

    `threads` compute a kernel together. `winograd` is one of `WINOGRAD`: none, at most F(2 x 2),
    F(4 x 4) wherever it is defined, or what is fastest by the model.
    """

    vectors: Vectors
    threads: int = 1
    chosen: Mapping[str, str] = field(default_factory=dict)
    winograd: str = "auto"

    def choose(self, workload: str, candidates: Sequence[Candidate]) -> Choice[Candidate]:
        """The candidate that was chosen for `workload`, else the first.

        >>> Rules(Vectors(16, 32), chosen={"product": "6x4"}).choose("product", ["8x3", "6x4"])
        Choice(workload='product', candidate='6x4', candidates=('8x3', '6x4'))
        """
        texts = tuple(map(str, candidates))
        wanted = self.chosen.get(workload)
        index = texts.index(wanted) if wanted in texts else 0
        return Choice(workload, candidates[index], texts)
