"""Lower bounds: by hand, and never above what brute force finds."""

import numpy as np
import pytest

from bench.instances import planted


@pytest.mark.parametrize("ratio", [0.1, 1, 5])
@pytest.mark.parametrize(("tasks", "devices"), [(3, 3), (40, 2), (2000, 3)])
def test_a_planted_schedule_is_right_and_full(tasks: int, devices: int, ratio: float) -> None:
    problem, solution = planted(tasks, devices, ratio, seed=tasks)
    place, start = solution.device, solution.start
    seconds = problem.seconds[np.arange(tasks), place]
    finish = start + seconds
    delay = np.where(place[problem.source] == place[problem.sink], 0, problem.nbytes)
    assert (finish[problem.source] + delay <= start[problem.sink]).all()
    for device in range(devices):
        own = np.flatnonzero(place == device)
        own = own[np.argsort(start[own])]
        assert start[own[0]] == 0
        assert (start[own[1:]] == finish[own[:-1]]).all()
        assert finish[own[-1]] == solution.makespan
    assert solution.optimal
    if tasks == 2000:
        assert problem.nbytes.mean() == pytest.approx(ratio, rel=0.3)
        tight = finish[problem.source] + delay == start[problem.sink]
        assert (tight & (delay > 0)).mean() > 0.01
        assert (np.argmin(problem.seconds, axis=1) != place).mean() > 0
