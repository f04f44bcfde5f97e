"""A pipeline by constraint programming: where its borders are too many for a table."""

from collections.abc import Sequence

import numpy as np
from ortools.sat.python import cp_model

from hetsched.stages.traffic import Traffic

# What the bottleneck that is known becomes in whole numbers.
SCALE = 1_000_000_000


def improved(
    traffic: Traffic,
    most: int,
    known: Sequence[tuple[int, Sequence[int]]],
    seconds: float,
    bound: float,
    work: float,
) -> tuple[list[tuple[int, tuple[int, ...]]], float]:
    """Stages at least as good as the `known` ones of `seconds`, and a lower bound.

    Each task is on one device, the devices stand in a row, and no task reads from a device behind
    its own. `work` limits the search, in the solver's own deterministic seconds.
    """
    count, devices = traffic.seconds.shape
    scale = SCALE / seconds

    def whole(value: float) -> int:
        # Down, so that what is proved of whole numbers is true of the sums.
        return int(value * scale)

    model = cp_model.CpModel()
    most_of_all = model.new_int_var(whole(bound), SCALE, "")
    used = [model.new_bool_var("") for _ in range(devices)]
    on = [[model.new_bool_var("") for _ in range(devices)] for _ in range(count)]
    first = {
        (one, other): model.new_bool_var("")
        for one in range(devices)
        for other in range(one + 1, devices)
    }

    def before(one: int, other: int) -> cp_model.LiteralT:
        return first[one, other] if one < other else ~first[other, one]

    for one in range(devices):
        for other in range(devices):
            for third in range(devices):
                if len({one, other, third}) == 3:
                    model.add_bool_or(
                        ~before(one, other), ~before(other, third), before(one, third)
                    )
    for unit in range(int(traffic.unit.max()) + 1):
        model.add_at_most_one(used[device] for device in np.flatnonzero(traffic.unit == unit))
    if most < devices:
        model.add(sum(used) <= most)
    loads: dict[object, list[cp_model.LinearExprT]] = {
        device: [whole(traffic.launch[device]) * used[device]] for device in range(devices)
    }
    for task in range(count):
        model.add_exactly_one(on[task])
        for device in range(devices):
            cost = traffic.seconds[task, device]
            if cost + traffic.launch[device] > seconds:
                model.add(on[task][device] == 0)
                continue
            model.add_implication(on[task][device], used[device])
            loads[device].append(whole(cost) * on[task][device])
            if traffic.exit[task, device]:
                exit_ = whole(traffic.exit[task, device]) * on[task][device]
                loads.setdefault(("out", device), []).append(exit_)
    for device in range(devices):
        if traffic.memory.sum() > traffic.limit[device]:
            held = sum(int(traffic.memory[task]) * on[task][device] for task in range(count))
            model.add(held <= int(traffic.limit[device]))
    for task, sinks in enumerate(traffic.successors):
        for sink in sinks:
            for one in range(devices):
                for other in range(devices):
                    if one != other:
                        model.add_bool_or(~on[task][one], ~on[sink][other], before(one, other))
    for tensor, producer in enumerate(traffic.producer):
        readers = traffic.readers[traffic.first[tensor] : traffic.first[tensor + 1]]
        for one in range(devices):
            for other in range(devices):
                if one == other:
                    continue
                cost = traffic.latency[one, other]
                cost += traffic.nbytes[tensor] * traffic.per_byte[one, other]
                if cost == 0:
                    continue
                sent = model.new_bool_var("")
                if cost > seconds:
                    model.add(sent == 0)
                else:
                    loads.setdefault(("link", one, other), []).append(whole(cost) * sent)
                for reader in readers:
                    model.add_bool_or(~on[producer][one], ~on[reader][other], sent)
    for tensor, row in enumerate(traffic.entry):
        begin, end = traffic.entry_first[tensor : tensor + 2]
        for device in map(int, np.flatnonzero(row)):
            sent = model.new_bool_var("")
            loads.setdefault(("in", device), []).append(whole(min(row[device], seconds)) * sent)
            for reader in traffic.entry_readers[begin:end]:
                model.add_implication(on[reader][device], sent)
    for terms in loads.values():
        model.add(sum(terms) <= most_of_all)
    model.minimize(most_of_all)
    where = {task: device for device, tasks in known for task in tasks}
    for task in range(count):
        for device in range(devices):
            model.add_hint(on[task][device], int(where[task] == device))
    row = [device for device, _ in known]
    row += [device for device in range(devices) if device not in row]
    for (one, other), flag in first.items():
        model.add_hint(flag, int(row.index(one) < row.index(other)))
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.linearization_level = 2
    solver.parameters.max_deterministic_time = work
    status = solver.solve(model)
    # One less than the bound: the known stages may be a rounding below the least whole number.
    least = max(bound, (solver.best_objective_bound - 1) / scale)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return [(device, tuple(tasks)) for device, tasks in known], bound
    ranks = [
        sum(solver.value(before(a, b)) for a in range(devices) if a != b) for b in range(devices)
    ]
    stages: dict[int, list[int]] = {}
    for task in range(count):
        device = next(d for d in range(devices) if solver.value(on[task][d]))
        stages.setdefault(device, []).append(task)
    ordered = sorted(stages, key=lambda device: ranks[device])
    return [(device, tuple(stages[device])) for device in ordered], least
