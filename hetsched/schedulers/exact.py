"""The shortest schedule of all, for small graphs, and a bound where time runs out."""

from dataclasses import dataclass
from math import inf

from hetsched.errors import InfeasiblePlan
from hetsched.problem import Problem, Solution
from hetsched.scheduler import Scheduler
from hetsched.schedulers._cpsat import Limit, solve
from hetsched.schedulers._list import list_schedule
from hetsched.schedulers._rank import upward_rank


@dataclass(frozen=True)
class Exact(Scheduler):
    """Constraint programming: the best schedule within `seconds`, and how much better one could be.

    Up to thirty tasks on three devices are mostly proved in a second. With `iterations`,
    thousandths of CP-SAT's own unit of work, and no limit of seconds (`seconds=0`) the result is
    the same on any machine; more than one of `workers` share the work and need not agree.
    `process` limits the seconds of all of them together, and is not moved by what else the machine
    does. `linearization` is CP-SAT's level: 0 is mostly the better one here, 1 now and then.

    References
    ----------
    Perron, Didier and Gay, "The CP-SAT-LP Solver", CP 2023,
    https://doi.org/10.4230/LIPIcs.CP.2023.3
    """

    seconds: float = 10.0
    iterations: int = 0
    seed: int = 0
    workers: int = 1
    process: float = 0.0
    linearization: int = 0

    def schedule(self, problem: Problem) -> Solution:
        limit = Limit(
            self.seconds or inf,
            self.iterations / 1000 or inf,
            self.workers,
            self.process or inf,
            self.linearization,
        )
        try:
            known = list_schedule(problem, self.name, upward_rank(problem.arrays))
        except InfeasiblePlan as error:
            # It says what is short, should there be none.
            known, reason = None, error
        try:
            found = solve(problem, limit, known, self.seed)
        except InfeasiblePlan:
            raise reason from None
        if found is None:
            raise InfeasiblePlan(
                "no schedule was found within the limits, nor that there is none; "
                "give it more, or use another scheduler"
            )
        return found
