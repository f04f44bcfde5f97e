"""What finds a schedule for a task graph."""

from abc import abstractmethod

from hetsched.plugin import Plugin
from hetsched.problem import Problem, Solution


class Scheduler(Plugin):
    """Chooses a device and a start for each task; deterministic.

    A scheduler that can go on looking has options `seconds`, `iterations` and `seed`; with a number
    of iterations and no limit of seconds it finds the same on any machine.
    """

    package = "hetsched.schedulers"

    @abstractmethod
    def schedule(self, problem: Problem) -> Solution:
        """
        Raises
        ------
        InfeasiblePlan
            No schedule was found that holds what the tasks need; the message says what is short.
        """
