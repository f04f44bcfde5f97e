"""HEFT that looks ahead at the children of a task."""

from dataclasses import dataclass

from hetsched.problem import Problem, Solution
from hetsched.scheduler import Scheduler
from hetsched.schedulers._list import list_schedule
from hetsched.schedulers._rank import upward_rank


@dataclass(frozen=True)
class Lookahead(Scheduler):
    """By upward rank, each task where the last of its children can finish first.

    References
    ----------
    Bittencourt, Sakellariou and Madeira, "DAG scheduling using a lookahead variant of the
    heterogeneous earliest finish time algorithm", PDP 2010, https://doi.org/10.1109/PDP.2010.56
    """

    insertion: bool = True

    def schedule(self, problem: Problem) -> Solution:
        rank = upward_rank(problem.arrays)
        return list_schedule(problem, self.name, rank, ahead=True, insertion=self.insertion)
