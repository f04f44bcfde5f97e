"""Where tasks run so that the sum of all work and of all transfers is least: nothing overlaps."""

from dataclasses import dataclass, replace

import numpy as np
from ortools.graph.python import max_flow
from ortools.sat.python import cp_model

from hetsched.errors import InfeasiblePlan
from hetsched.stages.traffic import Traffic

# Integer capacities: of all arcs that may be cut together, and of one that must not be; a sum of
# 100,000 of these stays below 2^63.
CAPACITY = 1 << 44
UNCUTTABLE = 1 << 46
# What the search for an exact answer may cost, in the solver's own deterministic seconds, and the
# largest problem that it is tried for: tensors times pairs of devices.
SEARCH_SECONDS = 4.0
LARGEST_SEARCH = 20_000
STEPS = 24


@dataclass(frozen=True, eq=False)
class Serial:
    """(n) the device of each task, the sum in seconds, and what no placement is below."""

    device: np.ndarray
    seconds: float
    bound: float

    @property
    def optimal(self) -> bool:
        return self.seconds <= self.bound * (1 + 1e-9)


def serial_seconds(traffic: Traffic, device: np.ndarray) -> float:
    """The sum of all work and transfers, each tensor once to a device; no launches."""
    rows = np.arange(traffic.count)
    total = float((traffic.seconds[rows, device] + traffic.exit[rows, device]).sum())
    for tensor, producer in enumerate(traffic.producer):
        readers = traffic.readers[traffic.first[tensor] : traffic.first[tensor + 1]]
        for sink in sorted(set(map(int, device[readers]))):
            total += move_seconds(traffic, tensor, int(device[producer]), sink)
    for tensor, row in enumerate(traffic.entry):
        begin, end = traffic.entry_first[tensor : tensor + 2]
        for sink in sorted(set(map(int, device[traffic.entry_readers[begin:end]]))):
            total += float(row[sink])
    return total


def move_seconds(traffic: Traffic, tensor: int, source: int, sink: int) -> float:
    return float(
        traffic.latency[source, sink] + traffic.nbytes[tensor] * traffic.per_byte[source, sink]
    )


def fits(traffic: Traffic, device: np.ndarray) -> bool:
    held = np.bincount(device, traffic.memory, len(traffic.limit))
    return bool((held <= traffic.limit).all())


def cheapest(traffic: Traffic, back: bool = True) -> Serial:
    """The placement of least sum; without `back`, data never return to a device they have left.

    With two devices and memory enough, one minimum cut, which is exact. With more, cuts between
    two devices at a time until none helps, then a search with a limit of its own, which is told the
    bound; so too where memory is short, beginning from cuts with a price on the memory.

    Raises
    ------
    InfeasiblePlan
        No placement runs and holds everything, or none was found.
    """
    devices = len(traffic.limit)
    if devices == 1:
        found = np.zeros(traffic.count, np.int64)
        seconds = serial_seconds(traffic, found)
        if seconds == np.inf or not fits(traffic, found):
            raise InfeasiblePlan(_short(traffic))
        return Serial(found, seconds, seconds)
    if devices == 2:
        cut = minimum_cut(traffic, back)
        if cut is None:
            raise InfeasiblePlan(_short(traffic))
        seconds = serial_seconds(traffic, cut)
        if fits(traffic, cut):
            return Serial(cut, seconds, seconds)
        return _searched(traffic, back, _priced(traffic, back), seconds)
    return _searched(traffic, back, _swapped(traffic) if back else None, 0.0)


def minimum_cut(
    traffic: Traffic,
    back: bool = True,
    pair: tuple[int, int] = (0, 1),
    fixed: np.ndarray | None = None,
    extra: np.ndarray | None = None,
) -> np.ndarray | None:
    """The placement of least sum on two devices, memory aside; None if there is none.

    The tasks that `fixed` has on other devices than `pair` stay there. `extra` (n, p) is added to
    the work. A tensor is sent once, however many tasks read it: the arc that costs the transfer
    leads to a node of its own, from which uncuttable arcs lead to the readers. Without `back` only
    the first of the pair sends to the second.

    References
    ----------
    Hu et al., "Dynamic adaptive DNN surgery for inference acceleration on the edge" (DADS),
    INFOCOM 2019, https://doi.org/10.1109/INFOCOM.2019.8737614
    """
    here, there = pair
    count = traffic.count
    work = traffic.seconds + traffic.exit + (0.0 if extra is None else extra)
    free = np.ones(count, bool) if fixed is None else np.isin(fixed, pair)
    device = np.full(count, -1) if fixed is None else np.where(free, -1, fixed)
    if not free.any():
        return device
    source, sink = count, count + 1
    # Senders: tensors of tasks, and inputs, which come from a place that is fixed, as do the
    # tensors of tasks that stay elsewhere.
    loose = free[traffic.producer]
    origin = np.where(loose, here, device[traffic.producer])
    forward = traffic.latency[origin, there] + traffic.nbytes * traffic.per_byte[origin, there]
    origin = np.where(loose, there, origin)
    backward = traffic.latency[origin, here] + traffic.nbytes * traffic.per_byte[origin, here]
    if not back:
        backward[loose] = np.inf
    outside = len(traffic.entry)
    tail = np.concatenate([np.where(loose, traffic.producer, source), np.full(outside, source)])
    head = np.concatenate([np.where(loose, traffic.producer, sink), np.full(outside, sink)])
    forward = np.concatenate([forward, traffic.entry[:, there]])
    backward = np.concatenate([backward, traffic.entry[:, here]])
    sizes = np.concatenate([np.diff(traffic.first), np.diff(traffic.entry_first)])
    reader = np.concatenate([traffic.readers, traffic.entry_readers])
    sender = np.repeat(np.arange(len(sizes)), sizes)
    sender, reader = sender[free[reader]], reader[free[reader]]
    # A sender with one reader needs no node of its own, one without none at all.
    found = np.bincount(sender, minlength=len(sizes))
    alone = sender[found[sender] == 1]
    target = reader[found[sender] == 1]
    shared = np.flatnonzero(found > 1)
    node = np.full(len(sizes), -1)
    node[shared] = count + 2 + 2 * np.arange(len(shared))
    sender, reader = sender[found[sender] > 1], reader[found[sender] > 1]
    tasks = np.flatnonzero(free)
    never = np.full(len(sender), np.inf)
    arcs = [
        # On the sink's side a task is on the second device, and cuts the arc from the source.
        (np.full(len(tasks), source), tasks, work[tasks, there]),
        (tasks, np.full(len(tasks), sink), work[tasks, here]),
        (tail[alone], target, forward[alone]),
        (target, head[alone], backward[alone]),
        (tail[shared], node[shared], forward[shared]),
        (node[sender], reader, never),
        (node[shared] + 1, head[shared], backward[shared]),
        (reader, node[sender] + 1, never),
    ]
    if fixed is not None:
        # What tasks that stay elsewhere read, each tensor once to a device.
        away = np.repeat(np.arange(len(traffic.producer)), np.diff(traffic.first))
        pairs = np.stack([away, device[traffic.readers]], axis=1)
        pairs = np.unique(pairs[~free[traffic.readers] & loose[away]], axis=0)
        for tensor, other in pairs:
            producer = traffic.producer[tensor : tensor + 1]
            for ends, start in (((source, producer[0]), there), ((producer[0], sink), here)):
                cost = move_seconds(traffic, tensor, start, int(other))
                arcs.append((np.array([ends[0]]), np.array([ends[1]]), np.array([cost])))
    tails, heads, values = (np.concatenate(column) for column in zip(*arcs, strict=True))
    finite = np.isfinite(values)
    total = float(values[finite].sum()) or 1.0
    capacity = np.full(len(values), UNCUTTABLE, np.int64)
    capacity[finite] = np.rint(values[finite] / total * CAPACITY)
    flow = max_flow.SimpleMaxFlow()
    flow.add_arcs_with_capacity(tails.astype(np.int32), heads.astype(np.int32), capacity)
    if flow.solve(source, sink) != flow.OPTIMAL or flow.optimal_flow() >= UNCUTTABLE:
        return None
    side = np.zeros(count + 2 + 2 * len(shared), bool)
    side[flow.get_source_side_min_cut()] = True
    return np.where(free, np.where(side[:count], here, there), device)


def _priced(traffic: Traffic, back: bool) -> np.ndarray | None:
    """A minimum cut that fits, by a price on the memory of one of two devices."""
    best = None
    for device in (0, 1):
        low, high = 0.0, 1.0
        scale = float(np.nanmean(np.where(np.isfinite(traffic.seconds), traffic.seconds, np.nan)))
        scale /= float(traffic.memory.mean()) or 1.0
        for _ in range(STEPS):
            extra = np.zeros_like(traffic.seconds)
            extra[:, device] = traffic.memory * scale * high
            cut = minimum_cut(traffic, back, extra=extra)
            if cut is not None and fits(traffic, cut):
                if best is None or serial_seconds(traffic, cut) < serial_seconds(traffic, best):
                    best = cut
                high = (low + high) / 2
            else:
                low, high = high, 2 * high if best is None else high + (high - low) / 2
    return best


def _swapped(traffic: Traffic) -> np.ndarray | None:
    """From each device alone and the cheapest of each task, cuts between two until none helps."""
    count, devices = traffic.seconds.shape
    starts = [np.argmin(traffic.seconds, axis=1)]
    starts += [np.full(count, device) for device in range(devices)]
    best, least = None, np.inf
    for start in starts:
        seconds = serial_seconds(traffic, start)
        changed = seconds < np.inf
        while changed:
            changed = False
            for one in range(devices):
                for other in range(one + 1, devices):
                    cut = minimum_cut(traffic, True, (one, other), start)
                    if cut is None:
                        continue
                    found = serial_seconds(traffic, cut)
                    if found < seconds * (1 - 1e-12):
                        start, seconds, changed = cut, found, True
        if seconds < least:
            best, least = start, seconds
    return best


def _searched(traffic: Traffic, back: bool, hint: np.ndarray | None, bound: float) -> Serial:
    """The best within the search's limit, at least as good as `hint` if that fits."""
    start = None
    if hint is not None and fits(traffic, hint) and serial_seconds(traffic, hint) < np.inf:
        start = Serial(hint, serial_seconds(traffic, hint), bound)
        if start.optimal:
            return start
    pairs = len(traffic.producer) * len(traffic.limit) ** 2
    if start is not None and pairs > LARGEST_SEARCH:
        return start
    found = _integer_program(traffic, back, hint, SEARCH_SECONDS if start else np.inf)
    if found is None:
        if start is None:
            raise InfeasiblePlan(_short(traffic))
        return start
    best = found if start is None or found.seconds < start.seconds else start
    return replace(best, bound=min(best.seconds, max(bound, found.bound)))


def _integer_program(
    traffic: Traffic, back: bool, hint: np.ndarray | None, seconds: float
) -> Serial | None:
    """By CP-SAT: a flag for each task on each device, and for each transfer."""
    count, devices = traffic.seconds.shape
    finite = traffic.seconds[np.isfinite(traffic.seconds)]
    scale = float(1 << 40) / max(float(finite.sum()), 1e-30)

    def whole(value: float) -> int:
        return round(value * scale)

    model = cp_model.CpModel()
    terms: list[tuple[cp_model.IntVar, int]] = []
    on = [[model.new_bool_var("") for _ in range(devices)] for _ in range(count)]
    for task in range(count):
        model.add_exactly_one(on[task])
        for device in range(devices):
            cost = traffic.seconds[task, device] + traffic.exit[task, device]
            if cost == np.inf:
                model.add(on[task][device] == 0)
            else:
                terms.append((on[task][device], whole(cost)))
    for device in range(devices):
        if traffic.memory.sum() > traffic.limit[device]:
            model.add(
                sum(int(traffic.memory[task]) * on[task][device] for task in range(count))
                <= int(traffic.limit[device])
            )
    for tensor, producer in enumerate(traffic.producer):
        readers = traffic.readers[traffic.first[tensor] : traffic.first[tensor + 1]]
        for sink in range(devices):
            sent = []
            for source in range(devices):
                if source == sink:
                    continue
                cost = move_seconds(traffic, tensor, source, sink)
                forbidden = cost == np.inf or (not back and source > sink)
                flag = model.new_bool_var("")
                if forbidden:
                    model.add(flag == 0)
                else:
                    terms.append((flag, whole(cost)))
                sent.append(flag)
                for reader in readers:
                    model.add_bool_or(~on[producer][source], ~on[reader][sink], flag)
            for reader in readers:
                model.add_bool_or(on[producer][sink], ~on[reader][sink], *sent)
    for tensor, row in enumerate(traffic.entry):
        begin, end = traffic.entry_first[tensor : tensor + 2]
        for sink in map(int, np.flatnonzero(row)):
            flag = model.new_bool_var("")
            terms.append((flag, whole(row[sink])))
            for reader in traffic.entry_readers[begin:end]:
                model.add_implication(on[reader][sink], flag)
    model.minimize(sum(flag * cost for flag, cost in terms))
    if hint is not None:
        for task in range(count):
            for device in range(devices):
                model.add_hint(on[task][device], int(hint[task] == device))
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.linearization_level = 2
    if seconds < np.inf:
        solver.parameters.max_deterministic_time = seconds
    else:
        # Any placement will do then, and the best that comes soon.
        solver.parameters.max_deterministic_time = 10 * SEARCH_SECONDS
    status = solver.solve(model)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return None
    found = np.array(
        [next(d for d in range(devices) if solver.value(row[d])) for row in on], np.int64
    )
    total = serial_seconds(traffic, found)
    if status == cp_model.OPTIMAL:
        return Serial(found, total, total)
    return Serial(found, total, min(total, solver.best_objective_bound / scale * (1 - 1e-6)))


def _short(traffic: Traffic) -> str:
    held = traffic.memory.sum() / 2**20
    limits = ", ".join(
        f"'{name}' {limit / 2**20:.1f} MiB"
        for name, limit in zip(traffic.devices, traffic.limit, strict=True)
    )
    return (
        f"no placement was found that runs everything and holds {held:.1f} MiB of weights and "
        f"activations on {limits}; add a device, a link, or raise memory_bytes"
    )


def in_runs(traffic: Traffic, device: np.ndarray) -> list[int]:
    """A topological order of the tasks that stays on a device for as long as it can."""
    missing = [len(row) for row in traffic.predecessors]
    ready = [task for task, count in enumerate(missing) if not count]
    order: list[int] = []
    current = -1
    while ready:
        here = [task for task in ready if device[task] == current]
        task = min(here or ready)
        current = int(device[task])
        ready.remove(task)
        order.append(task)
        for sink in traffic.successors[task]:
            missing[sink] -= 1
            if not missing[sink]:
                ready.append(sink)
    return order
