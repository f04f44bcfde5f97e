"""Critical path on a processor (CPOP)."""

from dataclasses import dataclass

import numpy as np

from hetsched.problem import Problem, Solution
from hetsched.scheduler import Scheduler
from hetsched.schedulers._list import list_schedule
from hetsched.schedulers._rank import downward_rank, upward_rank


@dataclass(frozen=True)
class Cpop(Scheduler):
    """By the longest way through a task; the longest of all stays on the device that is best at it.

    Tasks that cannot run there, or find it full, go where they finish first, as all others do.

    References
    ----------
    Topcuoglu, Hariri and Wu, "Performance-effective and low-complexity task scheduling for
    heterogeneous computing", IEEE TPDS 13(3), 2002, https://doi.org/10.1109/71.993206
    """

    insertion: bool = True

    def schedule(self, problem: Problem) -> Solution:
        a = problem.arrays
        priority = upward_rank(a) + downward_rank(a)
        path = _path(problem, priority)
        runs = np.isfinite(problem.seconds[path])
        # The device that can run most of the path, and of these the one that is fastest at it.
        seconds = np.where(runs, problem.seconds[path], 0.0).sum(axis=0)
        on = np.lexsort((seconds, -runs.sum(axis=0)))[0]
        bias = np.zeros_like(problem.seconds)
        # Longer than all tasks and all that they wait for.
        bias[path] = 1e3 * priority.max(initial=1.0) * (1 + problem.tasks)
        bias[path, on] = 0.0
        return list_schedule(problem, self.name, priority, bias, insertion=self.insertion)


def _path(problem: Problem, priority: np.ndarray) -> np.ndarray:
    """The tasks of the longest path, from one without inputs to one without readers."""
    begins, outgoing = problem.outgoing
    first = np.flatnonzero(np.diff(problem.incoming) == 0)
    path = [int(first[np.argmax(priority[first])])] if len(first) else []
    while path and begins[path[-1]] < begins[path[-1] + 1]:
        readers = problem.sink[outgoing[begins[path[-1]] : begins[path[-1] + 1]]]
        path.append(int(readers[np.argmax(priority[readers])]))
    return np.array(path, np.int64)
