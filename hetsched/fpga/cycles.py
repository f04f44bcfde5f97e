"""How long a stream of instructions takes on the core, counted without computing anything.

The control of the core (its queues, tokens, loader, tiles and storer, and the one port to memory)
is stepped cycle by cycle, and cycles in which nothing but a tile's words go by are skipped, so a
network of tens of millions of cycles is counted in about a second. Of data only their number
matters: a tile takes `max(words, rows)` cycles, as the next one's weights come meanwhile.
Compared with the RTL in the tests.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numba import njit

from hetsched.fpga.isa import WORDS, Conv, Instruction, Load, Overlay, Store, Sync

# Cycles from the last word of a CONV to its end: what is behind the sum of products, without it.
BEHIND_SUM = 28
# Of an instruction in the table: code, wait, signal, then what its kind has.
COLUMNS = 10
LOAD, CONV, STORE = 0, 1, 2
UNITS = 3
# One record of a type below; its fields are read and written as attributes.
Registers: TypeAlias = Any


def _registers(names: str, **arrays: tuple[int, ...]) -> np.dtype[np.void]:
    """Whole numbers by name, and arrays of them by shape."""
    single = [(name, np.int64, ()) for name in names.split()]
    return np.dtype(single + [(name, np.int64, shape) for name, shape in arrays.items()])


# Of each unit: its queue of instructions, which it takes from, and its tokens, by the other unit.
# `pushed` comes into the queue in the next cycle, `held` is at its head, `ready` to be taken.
QUEUE = _registers(
    "first inner places push pushed pushed_index head held ready takes taken_index running idle "
    "finished signal",
    tokens=(3,), given=(3,), taken=(3,), missing=(3,),
)  # fmt: skip
# Beats of instructions that came, those of the word that is begun, and whether the next may come.
DISPATCH = _registers("given beats whole full ready busy will_be_busy passing syncs instruction")
# `first` and `count` are of a ring of the cycles in which data that was read arrives.
PORT = _registers("read write arrives credit write_next first count reads writes")
# The walk over a tile's beats, with padding; `steps` by how many cycles ago they were: whether one
# was, is of memory, is the last; signal. Tags of steps wait for their data in a ring.
WALK = _registers("stage walking load x y plane step places", steps=(4, 4))
TAGS = _registers(
    "first inner ready takes go data asks asks_ready done", tag=(3,), went=(3,)
)  # fmt: skip
# Tiles of an instruction, the weights of the next one, and the words of the one that streams.
TILES = _registers(
    "tiling fresh present instruction tile taken whole here weights_ready weight weight_row start "
    "next_words next_ends next_signal streams left ends signal first count",
    ending=(64, 2),
)  # fmt: skip
# Beats that are read from the buffer, and those that are to be written, in a ring.
STORER = _registers(
    "storing loaded left signal room back read first inner offered",
    later=(4, 3), fifo=(16, 2), offer=(2,),
)  # fmt: skip
CORE = np.dtype(
    [
        ("queues", QUEUE, (UNITS,)),
        ("dispatch", DISPATCH),
        ("port", PORT),
        ("walk", WALK),
        ("tags", TAGS),
        ("tiles", TILES),
        ("storer", STORER),
    ]
)


@dataclass(frozen=True)
class Cycles:
    """What a launch takes: `words` of them the array takes an input word in.

    In `stall_load` and `stall_store` cycles it takes none because CONV waits for what LOAD or STORE
    has to do first.
    """

    cycles: int
    words: int
    stall_load: int
    stall_store: int
    reads: int
    writes: int


def table(instructions: Sequence[Instruction]) -> np.ndarray:
    """What the time of each instruction depends on."""
    rows = np.zeros((len(instructions), COLUMNS), np.int64)
    for row, one in zip(rows, instructions, strict=True):
        row[0] = one.code
        if isinstance(one, Sync):
            continue
        row[1], row[2] = one.wait, one.signal
        if isinstance(one, Load):
            row[3:] = one.left, one.beats, one.right, one.top, one.rows, one.bottom, one.planes
        elif isinstance(one, Conv):
            row[3:5] = one.outer * one.middle * one.inner, one.lines * one.positions
        elif isinstance(one, Store):
            row[3] = one.rows * one.beats
    return rows


def cycles(
    overlay: Overlay,
    instructions: Sequence[Instruction],
    latency: int = 24,
    beats: int = 1,
    period: int = 1,
) -> Cycles:
    """The time of a launch on a core that is idle.

    What is read from memory arrives `latency` cycles after it was asked for; reads and writes share
    `beats` beats of 8 bytes in `period` cycles.
    """
    behind = BEHIND_SUM + (overlay.rows - 1).bit_length()
    found = _count(
        np.zeros(1, CORE)[0], table(instructions), overlay.rows, overlay.queue,
        overlay.outstanding, behind, latency, beats, period,
    )  # fmt: skip
    return Cycles(*(int(value) for value in found))


@njit(cache=True)
def _count(
    core: Registers,
    table: np.ndarray,
    rows: int,
    depth: int,
    outstanding: int,
    behind: int,
    latency: int,
    shared: int,
    period: int,
) -> tuple[int, int, int, int, int, int]:
    count = len(table) * WORDS
    queues, dispatch, port = core.queues, core.dispatch, core.port
    walk, tags, tiles, storer = core.walk, core.tags, core.tiles, core.storer
    # In flight: of tags whether data comes, the end and its signal, and of data when it arrives.
    wait, due = np.zeros((outstanding, 3), np.int64), np.zeros(outstanding + 8, np.int64)
    fifo = np.zeros((UNITS, depth), np.int64)
    for unit in range(UNITS):
        queues[unit].idle, queues[unit].places = 1, depth
    dispatch.ready, walk.places, storer.room = 1, outstanding, 16
    total, words, stall_load, stall_store = 0, 0, 0, 0
    now, moved = 0, 0
    while True:
        # First what all tell each other in this cycle, then what that changes.
        gives = dispatch.given < count and dispatch.ready == 1
        _grant(port, due, now, latency, shared, period, tags.asks_ready, storer.offered)
        active = gives or port.read or port.write or port.arrives
        active = active or port.count > 0 or tiles.count > 0
        _end(queues[CONV], tiles, now)
        _offer(queues, table, walk, tiles, storer)
        _pass(dispatch, queues, table, gives)
        if dispatch.busy:
            total += 1
            words += tiles.streams
            if not tiles.streams:
                if queues[CONV].missing[LOAD]:
                    stall_load += 1
                elif queues[CONV].missing[STORE]:
                    stall_store += 1
        _look(table, walk, tags, tiles, storer)
        if _moves(dispatch, queues, walk, tags, tiles, storer):
            active = True
        if _queue(queues, fifo, table, dispatch):
            active = True
        _fill(queues[LOAD], tags, wait, walk, port)
        _walk(queues[LOAD], walk, table)
        _convolve(queues[CONV], tiles, table, rows, now + behind)
        _store(queues[STORE], storer, table, port.write)
        _receive(dispatch, gives)
        if active:
            moved = now
        now += 1
        if dispatch.given == count and not dispatch.busy and now > moved + 3:
            break
        if not active and tiles.streams and tiles.left > 2:
            skipped = tiles.left - 2
            tiles.left -= skipped
            port.credit = min(period, port.credit + shared * skipped)
            now += skipped
            moved += skipped
            total += skipped
            words += skipped
        elif now > moved + 1000:
            total = -1
            break
    return total, words, stall_load, stall_store, port.reads, port.writes


@njit(cache=True)
def _grant(
    port: Registers,
    due: np.ndarray,
    now: int,
    latency: int,
    shared: int,
    period: int,
    reading: int,
    writing: int,
) -> None:
    """Whether the port to memory reads or writes, and whether what it read earlier arrives."""
    port.credit += shared
    open_ = port.credit >= period
    read = open_ and reading == 1 and not (writing == 1 and port.write_next == 1)
    write = open_ and writing == 1 and not read
    if open_ and reading == 1 and writing == 1:
        port.write_next = 1 if read else 0
    if read or write:
        port.credit -= period
    port.credit = min(port.credit, period)
    arrives = port.count > 0 and due[port.first] <= now
    if read:
        due[(port.first + port.count) % len(due)] = now + latency
        port.count += 1
        port.reads += 1
    if write:
        port.writes += 1
    if arrives:
        port.first = (port.first + 1) % len(due)
        port.count -= 1
    port.read, port.write, port.arrives = int(read), int(write), int(arrives)


@njit(cache=True)
def _end(queue: Registers, tiles: Registers, now: int) -> None:
    """CONV tells the end of an instruction whose last word has come through the array."""
    queue.signal, queue.finished = 0, 0
    if tiles.count > 0 and tiles.ending[tiles.first, 0] == now:
        queue.signal, queue.finished = tiles.ending[tiles.first, 1], 1
        tiles.first = (tiles.first + 1) % 64
        tiles.count -= 1


@njit(cache=True)
def _offer(
    queues: np.ndarray, table: np.ndarray, walk: Registers, tiles: Registers, storer: Registers
) -> None:
    """Which tokens the head of each queue lacks, and whether its unit takes it."""
    for unit in range(UNITS):
        one = queues[unit]
        for other in range(UNITS):
            wants = table[one.head, 1] >> other & 1
            one.missing[other] = one.held * wants * (one.tokens[other] == 0)
    queues[LOAD].takes = queues[LOAD].ready * (walk.stage == 0) * (1 - walk.walking)
    queues[CONV].takes = queues[CONV].ready * (1 - tiles.tiling)
    queues[STORE].takes = queues[STORE].ready * (1 - storer.storing) * (1 - storer.loaded)


@njit(cache=True)
def _pass(dispatch: Registers, queues: np.ndarray, table: np.ndarray, gives: int) -> None:
    """Where the instruction that is whole goes: to a queue with a place, or past idle units."""
    dispatch.instruction = (dispatch.given - 1) // WORDS
    code = table[max(dispatch.instruction, 0), 0]
    idle, pushes = 1, 0
    for unit in range(UNITS):
        one = queues[unit]
        one.push = dispatch.full * (code == unit + 1) * (one.places > 0)
        pushes += one.push
        idle *= one.idle
    dispatch.syncs = dispatch.full * (code == 4) * idle
    dispatch.passing = pushes + dispatch.syncs
    begun = dispatch.full + dispatch.whole + dispatch.beats + gives
    dispatch.will_be_busy = int(begun > 0 or not idle)


@njit(cache=True)
def _look(
    table: np.ndarray, walk: Registers, tags: Registers, tiles: Registers, storer: Registers
) -> None:
    """What each unit does in this cycle, by what it holds at the start of it."""
    start = tiles.weights_ready == 1 and (tiles.streams == 0 or tiles.left == 1)
    tiles.start = int(start)
    tiles.taken = int(tiles.present == 1 and (tiles.here == 0 or start))
    tiles.whole = int(tiles.tile == table[tiles.instruction, 3] - 1)
    walk.step = int(walk.walking == 1 and walk.places > 0)
    takes = tags.tag[0] == 0 or tags.data > 0
    tags.takes, tags.go = int(takes), int(tags.ready == 1 and takes)
    storer.read = int(storer.storing == 1 and storer.room > 0)


@njit(cache=True)
def _moves(
    dispatch: Registers,
    queues: np.ndarray,
    walk: Registers,
    tags: Registers,
    tiles: Registers,
    storer: Registers,
) -> bool:
    """Whether anything but the words of a tile is under way."""
    if dispatch.busy != dispatch.will_be_busy:
        return True
    if tiles.start + tiles.taken + tiles.weight + tiles.tiling * (1 - tiles.present) > 0:
        return True
    if dispatch.passing + dispatch.whole + walk.step + walk.walking + walk.stage > 0:
        return True
    if tags.go + tags.inner + tags.ready + tags.data + tags.asks + tags.asks_ready > 0:
        return True
    if tags.done + tags.went[0] + storer.read + storer.offered + storer.back > 0:
        return True
    if storer.loaded + storer.inner + walk.steps[:, 0].sum() + storer.later[:, 0].sum() > 0:
        return True
    for unit in range(UNITS):
        one = queues[unit]
        if one.takes + one.pushed + one.signal + one.given.sum() + one.taken.sum() > 0:
            return True
    return bool(queues[LOAD].finished + queues[STORE].finished > 0)


@njit(cache=True)
def _queue(queues: np.ndarray, fifo: np.ndarray, table: np.ndarray, dispatch: Registers) -> bool:
    """Queues and tokens, a cycle on; whether one of them changes."""
    changes = False
    for unit in range(UNITS):
        one = queues[unit]
        moves = one.inner > 0 and one.held == 0
        waiting = one.push + one.pushed + one.inner + one.held
        idle = int(waiting + one.running + one.finished == 0)
        ready = one.held * (1 - one.takes) * (one.missing.sum() == 0)
        if moves or idle != one.idle or ready != one.ready:
            changes = True
        one.running += one.takes - one.finished
        one.idle, one.ready = idle, ready
        for other in range(UNITS):
            one.tokens[other] += one.given[other] - one.taken[other]
            if dispatch.syncs:
                one.tokens[other] = 0
            one.given[other] = queues[other].signal >> unit & 1
            one.taken[other] = one.takes * (table[one.head, 1] >> other & 1)
        if one.takes:
            one.taken_index = one.head
            one.held = 0
        if moves:
            one.head = fifo[unit, one.first]
            one.held = 1
            one.first = (one.first + 1) % fifo.shape[1]
            one.inner -= 1
        if one.pushed:
            fifo[unit, (one.first + one.inner) % fifo.shape[1]] = one.pushed_index
            one.inner += 1
        one.places += int(moves) - one.push
        one.pushed = one.push
        if one.push:
            one.pushed_index = dispatch.instruction
    return changes


@njit(cache=True)
def _fill(
    queue: Registers, tags: Registers, wait: np.ndarray, walk: Registers, port: Registers
) -> None:
    """LOAD, its second half: tags and data to the buffers, and requests to memory."""
    ends = tags.went[0] * tags.went[1]
    queue.signal, queue.finished = tags.done, ends
    tags.done = tags.went[2] * ends
    walk.places += tags.go - walk.step
    tags.went[0], tags.went[1], tags.went[2] = tags.go, tags.tag[1], tags.tag[2]
    tags.data += port.arrives - tags.go * tags.tag[0]
    if tags.ready == 0 or tags.takes:
        tags.ready = int(tags.inner > 0)
        if tags.ready:
            tags.tag[:] = wait[tags.first]
            tags.first = (tags.first + 1) % len(wait)
            tags.inner -= 1
    if walk.steps[2, 0]:
        wait[(tags.first + tags.inner) % len(wait)] = walk.steps[2, 1:]
        tags.inner += 1
    if tags.asks_ready == 0 or port.read:
        tags.asks_ready = int(tags.asks > 0)
        tags.asks -= tags.asks_ready
    if walk.steps[3, 1]:
        tags.asks += 1


@njit(cache=True)
def _walk(queue: Registers, walk: Registers, table: np.ndarray) -> None:
    """LOAD, its first half: over rows and planes of beats, of which those inside are read."""
    for place in range(3, 0, -1):
        walk.steps[place] = walk.steps[place - 1]
    walk.steps[0] = 0
    if walk.step:
        one = table[walk.load]
        end_x, end_y = one[3] + one[4], one[6] + one[7]
        columns, lines, planes = end_x + one[5], end_y + one[8], one[9]
        inside = one[3] <= walk.x < end_x and one[6] <= walk.y < end_y
        walk.x += 1
        if walk.x == columns:
            walk.x = 0
            walk.y += 1
        if walk.y == lines:
            walk.y = 0
            walk.plane += 1
        ends = walk.plane == planes
        if ends:
            walk.plane, walk.walking = 0, 0
        walk.steps[0, 0], walk.steps[0, 1] = 1, int(inside)
        walk.steps[0, 2], walk.steps[0, 3] = int(ends), one[2]
    if queue.takes:
        walk.load, walk.stage = queue.taken_index, 1
    elif walk.stage == 1:
        walk.stage = 2
    elif walk.stage == 2:
        walk.stage, walk.walking = 0, 1


@njit(cache=True)
def _convolve(queue: Registers, tiles: Registers, table: np.ndarray, rows: int, out: int) -> None:
    """CONV: words of a tile, weights of the next, and tiles; the last word is out at `out`."""
    if tiles.streams:
        if tiles.left == 1 and tiles.ends:
            place = (tiles.first + tiles.count) % 64
            tiles.ending[place, 0], tiles.ending[place, 1] = out, tiles.signal
            tiles.count += 1
        tiles.left -= 1
        if tiles.left == 0:
            tiles.streams = 0
    if tiles.start:
        tiles.streams, tiles.left = 1, tiles.next_words
        tiles.ends, tiles.signal = tiles.next_ends, tiles.next_signal
        tiles.here, tiles.weights_ready = 0, 0
    if tiles.weight:
        if tiles.weight_row == rows - 2:
            tiles.weights_ready = 1
        if tiles.weight_row == rows - 1:
            tiles.weight = 0
        tiles.weight_row += 1
    if tiles.taken:
        tiles.next_words = table[tiles.instruction, 4]
        tiles.next_ends = tiles.whole
        tiles.next_signal = table[tiles.instruction, 2] * tiles.whole
        tiles.here, tiles.weights_ready, tiles.weight, tiles.weight_row = 1, 0, 1, 0
        tiles.present = 0
        if tiles.whole:
            tiles.tiling = 0
    elif tiles.tiling and tiles.fresh:
        tiles.fresh, tiles.present = 0, 1
    elif tiles.tiling and not tiles.present:
        tiles.present = 1
        tiles.tile += 1
    if queue.takes:
        tiles.instruction, tiles.tiling = queue.taken_index, 1
        tiles.fresh, tiles.tile = 1, 0


@njit(cache=True)
def _store(queue: Registers, storer: Registers, table: np.ndarray, written: int) -> None:
    """STORE: to the ring of writes, whose head is offered to memory."""
    ends = written * storer.offer[0]
    queue.signal, queue.finished = storer.offer[1] * ends, ends
    storer.room += storer.back - storer.read
    storer.back = written
    if storer.offered == 0 or written:
        storer.offered = int(storer.inner > 0)
        if storer.offered:
            storer.offer[:] = storer.fifo[storer.first]
            storer.first = (storer.first + 1) % 16
            storer.inner -= 1
    if storer.later[3, 0]:
        storer.fifo[(storer.first + storer.inner) % 16] = storer.later[3, 1:]
        storer.inner += 1
    for place in range(3, 0, -1):
        storer.later[place] = storer.later[place - 1]
    storer.later[0] = 0
    if storer.read:
        last = int(storer.left == 1)
        storer.later[0, 0], storer.later[0, 1] = 1, last
        storer.later[0, 2] = storer.signal
        storer.left -= 1
        if last:
            storer.storing = 0
    if storer.loaded:
        storer.storing = 1
    storer.loaded = queue.takes
    if queue.takes:
        one = table[queue.taken_index]
        storer.left, storer.signal = one[3], one[2]


@njit(cache=True)
def _receive(dispatch: Registers, gives: int) -> None:
    """A beat of the instructions; the word that it completes waits until it has passed on."""
    was_whole = dispatch.whole
    dispatch.whole = 0
    dispatch.busy = dispatch.will_be_busy
    if gives:
        dispatch.beats += 1
        dispatch.given += 1
        if dispatch.beats == WORDS:
            dispatch.beats, dispatch.whole, dispatch.ready = 0, 1, 0
    elif not dispatch.full and not was_whole:
        dispatch.ready = 1
    if was_whole:
        dispatch.full = 1
    if dispatch.passing:
        dispatch.full, dispatch.ready = 0, 1
