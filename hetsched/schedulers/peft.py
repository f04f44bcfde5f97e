"""Predict earliest finish time (PEFT)."""

from dataclasses import dataclass

from hetsched.problem import Problem, Solution
from hetsched.scheduler import Scheduler
from hetsched.schedulers._list import list_schedule
from hetsched.schedulers._rank import mean_rows, remaining


@dataclass(frozen=True)
class Peft(Scheduler):
    """By what remains behind a task in the mean, each where finish and that remainder are least.

    The remainder (optimistic cost table) counts each transfer with the link that it would take.

    References
    ----------
    Arabnejad and Barbosa, "List scheduling algorithm for heterogeneous systems by an optimistic
    cost table", IEEE TPDS 25(3), 2014, https://doi.org/10.1109/TPDS.2013.57
    """

    insertion: bool = True

    def schedule(self, problem: Problem) -> Solution:
        a = problem.arrays
        table = remaining(a, 0.0)
        # The table has the way back to the host in it, as the finish has.
        return list_schedule(
            problem, self.name, mean_rows(a, table), table - problem.exit, insertion=self.insertion
        )
