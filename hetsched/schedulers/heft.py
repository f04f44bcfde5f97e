"""Heterogeneous earliest finish time (HEFT)."""

from dataclasses import dataclass

from hetsched.problem import Problem, Solution
from hetsched.scheduler import Scheduler
from hetsched.schedulers._list import list_schedule
from hetsched.schedulers._rank import upward_rank


@dataclass(frozen=True)
class Heft(Scheduler):
    """By upward rank, the longest way to the end, each task where it finishes first.

    References
    ----------
    Topcuoglu, Hariri and Wu, "Performance-effective and low-complexity task scheduling for
    heterogeneous computing", IEEE TPDS 13(3), 2002, https://doi.org/10.1109/71.993206
    """

    insertion: bool = True

    def schedule(self, problem: Problem) -> Solution:
        rank = upward_rank(problem.arrays)
        return list_schedule(problem, self.name, rank, insertion=self.insertion)
