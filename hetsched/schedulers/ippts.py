"""Improved predict priority task scheduling (IPPTS)."""

from dataclasses import dataclass

import numpy as np

from hetsched.problem import Problem, Solution
from hetsched.scheduler import Scheduler
from hetsched.schedulers._list import list_schedule
from hetsched.schedulers._rank import ahead, mean_rows, remaining


@dataclass(frozen=True)
class Ippts(Scheduler):
    """By predicted cost times readers, each task where finish and predicted remainder are least.

    References
    ----------
    Djigal, Feng, Lu and Ge, "IPPTS: an efficient algorithm for scientific workflow scheduling in
    heterogeneous computing systems", IEEE TPDS 32(5), 2021,
    https://doi.org/10.1109/TPDS.2020.3041829
    """

    insertion: bool = True

    def schedule(self, problem: Problem) -> Solution:
        a = problem.arrays
        table = remaining(a, 1.0)
        priority = mean_rows(a, table) * np.diff(a.begins)
        bias = ahead(a, table)
        return list_schedule(problem, self.name, priority, bias, insertion=self.insertion)
