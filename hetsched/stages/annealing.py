"""Local search over the stages of a pipeline: tasks change stages one by one."""

from typing import NamedTuple

import numpy as np
from numba import njit

from hetsched.stages.borders import Flow
from hetsched.stages.traffic import Traffic, lists

# What the bottleneck counts beside the seconds of all stages at their prices; the least price.
BOTTLENECK = 0.5
LEAST_PRICE = 0.01
# In mean seconds of a task, at the beginning and at the end.
HOT, COLD = 1.0, 0.005
# Steps between two sets of random numbers.
BATCH = 1_000_000
# How many times the bottleneck is what cannot be, so that a sum with it can be taken back.
IMPOSSIBLE = 1e3


class Board(NamedTuple):
    """A problem with a column for each stage instead of each device."""

    seconds: np.ndarray
    memory: np.ndarray
    limit: np.ndarray
    # Where the neighbours of each task begin, and which they are.
    before_first: np.ndarray
    before: np.ndarray
    behind_first: np.ndarray
    behind: np.ndarray
    flow: Flow
    # The tensors that each task writes.
    writes_first: np.ndarray
    writes: np.ndarray
    exit: np.ndarray
    latency: np.ndarray
    per_byte: np.ndarray


class Loads(NamedTuple):
    """Seconds of stages, of the host's data into and out of each, and from stage to stage.

    And what they come from: the stage of each task, how many tasks of each stage read each tensor
    and each input, and the bytes that each stage holds.
    """

    work: np.ndarray
    enter: np.ndarray
    leave: np.ndarray
    link: np.ndarray
    stage: np.ndarray
    readers: np.ndarray
    entry_readers: np.ndarray
    held: np.ndarray


@njit(cache=True, nogil=True)
def _shift(b: Board, now: Loads, task: int, source: int, sink: int) -> None:
    """Moves a task from stage to stage; its place in neither if it is -1."""
    for step in range(2):
        stage, sign = (source, -1) if step == 0 else (sink, 1)
        if stage < 0:
            continue
        now.work[stage] += sign * b.seconds[task, stage]
        now.leave[stage] += sign * b.exit[task, stage]
        now.held[stage] += sign * b.memory[task]
        for place in range(b.flow.reads_first[task], b.flow.reads_first[task + 1]):
            tensor = b.flow.reads[place]
            begin = now.stage[b.flow.producer[tensor]]
            was = now.readers[tensor, stage]
            now.readers[tensor, stage] += sign
            if begin != stage and was * now.readers[tensor, stage] == 0:
                now.link[begin, stage] += sign * (
                    b.latency[begin, stage] + b.flow.nbytes[tensor] * b.per_byte[begin, stage]
                )
        for place in range(b.flow.entry_first[task], b.flow.entry_first[task + 1]):
            tensor = b.flow.entry_reads[place]
            was = now.entry_readers[tensor, stage]
            now.entry_readers[tensor, stage] += sign
            if was * now.entry_readers[tensor, stage] == 0:
                now.enter[stage] += sign * b.flow.entry[tensor, stage]
        for place in range(b.writes_first[task], b.writes_first[task + 1]):
            tensor = b.writes[place]
            for end in range(len(now.work)):
                if end != stage and now.readers[tensor, end]:
                    now.link[stage, end] += sign * (
                        b.latency[stage, end] + b.flow.nbytes[tensor] * b.per_byte[stage, end]
                    )
    now.stage[task] = sink


@njit(cache=True, nogil=True)
def _bottleneck(now: Loads) -> float:
    most = 0.0
    for stage in range(len(now.work)):
        most = max(most, now.work[stage], now.enter[stage], now.leave[stage])
        for other in range(len(now.work)):
            most = max(most, now.link[stage, other])
    return most


@njit(cache=True, nogil=True)
def _walk(
    b: Board,
    now: Loads,
    price: np.ndarray,
    tasks: np.ndarray,
    draws: np.ndarray,
    hot: float,
    cold: float,
    best: np.ndarray,
    shortest: float,
) -> float:
    """A step for each of `tasks`, ever colder; `best` gets what is below `shortest`."""
    stages = len(now.work)
    most = _bottleneck(now)
    ratio = np.log(cold / hot)
    for step in range(len(tasks)):
        task = tasks[step]
        here = now.stage[task]
        first, last = 0, stages - 1
        for place in range(b.before_first[task], b.before_first[task + 1]):
            first = max(first, now.stage[b.before[place]])
        if first == stages - 1:
            continue
        for place in range(b.behind_first[task], b.behind_first[task + 1]):
            last = min(last, now.stage[b.behind[place]])
        if first == last:
            continue
        there = first + int(draws[step, 0] * (last - first))
        if there >= here:
            there += 1
        if now.held[there] + b.memory[task] > b.limit[there]:
            continue
        less = now.work[here] - b.seconds[task, here]
        more = now.work[there] + b.seconds[task, there]
        change = price[there] * b.seconds[task, there] - price[here] * b.seconds[task, here]
        longest = max(less, more)
        for stage in range(stages):
            if stage != here and stage != there:
                longest = max(longest, now.work[stage])
        # What is kept, as the share of all that are drawn with such a change, is known before.
        heat = hot * np.exp(ratio * step / len(tasks))
        limit = -heat * np.log(1.0 - draws[step, 1])
        if (1 - BOTTLENECK) * change + BOTTLENECK * (longest - most) > limit:
            continue
        _shift(b, now, task, here, there)
        longest = _bottleneck(now)
        if (1 - BOTTLENECK) * change + BOTTLENECK * (longest - most) > limit:
            _shift(b, now, task, there, here)
            continue
        most = longest
        if most < shortest:
            shortest = most
            best[:] = now.stage
    return shortest


def _placed(board: Board, launch: np.ndarray, stage: np.ndarray) -> Loads:
    stages = board.seconds.shape[1]
    now = Loads(
        launch.copy(),
        np.zeros(stages),
        np.zeros(stages),
        np.zeros((stages, stages)),
        stage.astype(np.int64),
        np.zeros((len(board.flow.producer), stages), np.int64),
        np.zeros((len(board.flow.entry), stages), np.int64),
        np.zeros(stages),
    )
    for task, place in enumerate(stage.tolist()):
        _shift(board, now, task, -1, place)
    return now


def annealed(
    traffic: Traffic,
    flow: Flow,
    devices: tuple[int, ...],
    stage: np.ndarray,
    price: np.ndarray,
    steps: int,
    seed: int,
) -> np.ndarray:
    """(n) the stages of the pipeline on devices in a row that annealing from `stage` finds.

    A step moves a task to another stage between those of its neighbours. What counts is half the
    bottleneck, all transfers among it, and half the seconds of the stages at their `price`.

    References
    ----------
    Kirkpatrick, Gelatt and Vecchi, "Optimization by simulated annealing", Science 220(4598), 1983,
    https://doi.org/10.1126/science.220.4598.671
    """
    board = _board(traffic, flow, devices)
    now = _placed(board, traffic.launch[list(devices)], stage)
    price = np.maximum(price, LEAST_PRICE)
    price = price / price.sum()
    best = now.stage.copy()
    shortest = float(_bottleneck(now))
    finite = traffic.seconds[np.isfinite(traffic.seconds)]
    hot, cold = HOT * float(finite.mean()), COLD * float(finite.mean())
    random = np.random.default_rng(seed)
    for begin in range(0, steps, BATCH):
        some = min(BATCH, steps - begin)
        heats = [hot * (cold / hot) ** (place / steps) for place in (begin, begin + some)]
        tasks, draws = random.integers(traffic.count, size=some), random.random((some, 2))
        shortest = _walk(board, now, price, tasks, draws, *heats, best, shortest)
    return best


def _board(traffic: Traffic, flow: Flow, devices: tuple[int, ...]) -> Board:
    columns = list(devices)
    far = IMPOSSIBLE * float(np.where(np.isfinite(traffic.seconds), traffic.seconds, 0.0).sum())

    def possible(values: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(np.where(np.isfinite(values), values, far))

    square = np.ix_(columns, columns)
    return Board(
        possible(traffic.seconds[:, columns]),
        traffic.memory,
        traffic.limit[columns],
        *lists(traffic.predecessors),
        *lists(traffic.successors),
        flow._replace(entry=np.ascontiguousarray(traffic.entry[:, columns])),
        *traffic.writes,
        np.ascontiguousarray(traffic.exit[:, columns]),
        possible(traffic.latency[square]),
        possible(traffic.per_byte[square]),
    )
