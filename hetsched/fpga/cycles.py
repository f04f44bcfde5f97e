"""How long a stream of instructions takes on the core, counted without computing anything.

The control of the core (its queues, tokens, loader, tiles and storer, and the one port to memory)
is stepped cycle by cycle, and cycles in which nothing but a tile's words go by are skipped, so a
network of tens of millions of cycles is counted in about a second. Of data only their number
matters: a tile takes `max(words, rows)` cycles, as the next one's weights come meanwhile.
Compared with the RTL in the tests.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numba import njit

from hetsched.fpga.isa import WORDS, Conv, Instruction, Load, Overlay, Store, Sync

# Cycles from the last word of a CONV to its end: what is behind the sum of products, without it.
BEHIND_SUM = 28
# Of an instruction in the table: code, wait, signal, then what its kind has.
COLUMNS = 10


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
        table(instructions), overlay.rows, overlay.queue, overlay.outstanding, behind, latency,
        beats, period,
    )  # fmt: skip
    return Cycles(*(int(value) for value in found))


@njit(cache=True)
def _count(
    table: np.ndarray,
    rows: int,
    queue: int,
    outstanding: int,
    behind: int,
    latency: int,
    shared: int,
    period: int,
) -> tuple[int, int, int, int, int, int]:
    count = len(table) * WORDS
    # Of the three queues: what is pushed and not yet at the head, in order.
    depth = queue
    fifo = np.zeros((3, depth), np.int64)
    fifo_first = np.zeros(3, np.int64)
    inner = np.zeros(3, np.int64)
    places = np.full(3, queue, np.int64)
    pushed = np.zeros(3, np.int64)
    pushed_index = np.zeros(3, np.int64)
    held = np.zeros(3, np.int64)
    head = np.zeros(3, np.int64)
    tokens = np.zeros((3, 3), np.int64)
    running = np.zeros(3, np.int64)
    idle = np.ones(3, np.int64)
    signals = np.zeros(3, np.int64)
    given = np.zeros((3, 3), np.int64)
    taken = np.zeros((3, 3), np.int64)
    finished = np.zeros(3, np.int64)
    missing = np.zeros((3, 3), np.int64)
    ready = np.zeros(3, np.int64)
    take = np.zeros(3, np.int64)
    taken_index = np.zeros(3, np.int64)
    push = np.zeros(3, np.int64)
    # Dispatch.
    given_beats, beats, whole_word, full, i_ready, busy = 0, 0, 0, 0, 1, 0
    # LOAD: walking, its tags, requests and data.
    stage, walking, load = 0, 0, 0
    x, y, plane = 0, 0, 0
    # Of a step of the walk, by how many cycles ago it was: whether it was, is real, ends; signal.
    steps = np.zeros((4, 4), np.int64)
    tag_places = outstanding
    tags = np.zeros((outstanding, 3), np.int64)
    tags_first, tags_inner, tags_ready = 0, 0, 0
    tag = np.zeros(3, np.int64)
    data_inner = 0
    asks_inner, asks_ready = 0, 0
    went = np.zeros(3, np.int64)
    load_done = 0
    due = np.zeros(outstanding + 8, np.int64)
    due_first, due_count = 0, 0
    # CONV: tiles, weights, words.
    tiling, fresh, tile_present, conv, tile = 0, 0, 0, 0, 0
    here, weights_ready, weight, weight_row = 0, 0, 0, 0
    next_words, next_ends, next_signal = 0, 0, 0
    streams, left, tile_ends, tile_signal = 0, 0, 0, 0
    ending = np.zeros((64, 2), np.int64)
    ending_first, ending_count = 0, 0
    # STORE.
    storing, store_loaded, store_left, store_signal, room, back = 0, 0, 0, 0, 16, 0
    later = np.zeros((4, 3), np.int64)
    writes_fifo = np.zeros((16, 2), np.int64)
    writes_first, writes_inner, offered = 0, 0, 0
    offer = np.zeros(2, np.int64)
    write_next = 0
    total, words, stall_load, stall_store, reads, writes = 0, 0, 0, 0, 0, 0
    now, moved, credit = 0, 0, 0
    while True:
        active = 0
        # The port to memory.
        offers = given_beats < count
        gives = offers and i_ready == 1
        reading, writing = asks_ready == 1, offered == 1
        credit += shared
        open_ = credit >= period
        read = open_ and reading and not (writing and write_next == 1)
        write = open_ and writing and not read
        if open_ and reading and writing:
            write_next = 1 if read else 0
        if read or write:
            credit -= period
        credit = min(credit, period)
        arrives = due_count > 0 and due[due_first] <= now
        if read:
            due[(due_first + due_count) % len(due)] = now + latency
            due_count += 1
            reads += 1
        if write:
            writes += 1
        if arrives:
            due_first = (due_first + 1) % len(due)
            due_count -= 1
        if gives or read or write or arrives or due_count > 0:
            active = 1
        # What the units tell in this cycle.
        signals[1], finished[1] = 0, 0
        if ending_count > 0:
            active = 1
            if ending[ending_first, 0] == now:
                signals[1], finished[1] = ending[ending_first, 1], 1
                ending_first = (ending_first + 1) % 64
                ending_count -= 1
        for unit in range(3):
            for other in range(3):
                wants = table[head[unit], 1] >> other & 1
                missing[unit, other] = held[unit] * wants * (tokens[unit, other] == 0)
        take[0] = ready[0] * (stage == 0) * (1 - walking)
        take[1] = ready[1] * (1 - tiling)
        take[2] = ready[2] * (1 - storing) * (1 - store_loaded)
        # Dispatch.
        taken_beat = 1 if gives else 0
        instruction = (given_beats - 1) // WORDS
        code = table[max(instruction, 0), 0]
        all_idle = idle[0] * idle[1] * idle[2]
        passing = 0
        for unit in range(3):
            push[unit] = full * (code == unit + 1) * (places[unit] > 0)
            passing += push[unit]
        syncs = full * (code == 4) * all_idle
        passing += syncs
        if busy:
            total += 1
            words += streams
            if not streams:
                if missing[1, 0]:
                    stall_load += 1
                elif missing[1, 2]:
                    stall_store += 1
        busy_next = 1 if full + whole_word + beats + taken_beat + 1 - all_idle > 0 else 0
        if busy_next != busy:
            active = 1
        # Start of a tile, and the loader's steps, before anything changes.
        start = weights_ready == 1 and (streams == 0 or left == 1)
        taken_tile = tile_present == 1 and (here == 0 or start)
        whole = tile == table[conv, 3] - 1
        step = walking == 1 and tag_places > 0
        tag_take = tag[0] == 0 or data_inner > 0
        tag_go = tags_ready == 1 and tag_take
        read_beat = storing == 1 and room > 0
        if (
            start or taken_tile or tag_go or step or read_beat
            or passing + whole_word + weight + offered + walking + stage + back + store_loaded > 0
            or steps[:, 0].sum() + tags_inner + tags_ready + data_inner > 0
            or asks_inner + asks_ready + load_done + went[0] + writes_inner > 0
            or later[:, 0].sum() + take.sum() + pushed.sum() + given.sum() + taken.sum() > 0
            or finished[0] + finished[2] + signals[0] + signals[1] + signals[2] > 0
            or (tiling == 1 and tile_present == 0)
        ):  # fmt: skip
            active = 1
        # Queues.
        for unit in range(3):
            moves = inner[unit] > 0 and held[unit] == 0
            busy_unit = (
                push[unit] + pushed[unit] + inner[unit] + held[unit] + running[unit]
                + finished[unit] > 0
            )  # fmt: skip
            if busy_unit == (idle[unit] == 1) or moves:
                active = 1
            idle[unit] = 0 if busy_unit else 1
            running[unit] += take[unit] - finished[unit]
            will_be = held[unit] * (1 - take[unit]) * (missing[unit].sum() == 0)
            if will_be != ready[unit]:
                active = 1
            ready[unit] = will_be
            for other in range(3):
                tokens[unit, other] += given[unit, other] - taken[unit, other]
                if syncs:
                    tokens[unit, other] = 0
                given[unit, other] = signals[other] >> unit & 1
                taken[unit, other] = take[unit] * (table[head[unit], 1] >> other & 1)
            if take[unit]:
                taken_index[unit] = head[unit]
                held[unit] = 0
            if moves:
                head[unit] = fifo[unit, fifo_first[unit]]
                held[unit] = 1
                fifo_first[unit] = (fifo_first[unit] + 1) % depth
                inner[unit] -= 1
            if pushed[unit]:
                fifo[unit, (fifo_first[unit] + inner[unit]) % depth] = pushed_index[unit]
                inner[unit] += 1
            places[unit] += (1 if moves else 0) - push[unit]
            pushed[unit] = push[unit]
            if push[unit]:
                pushed_index[unit] = instruction
        # LOAD, its second half: tags and data to the buffers.
        signals[0] = load_done
        finished[0] = 1 if went[0] == 1 and went[1] == 1 else 0
        load_done = went[2] if went[0] == 1 and went[1] == 1 else 0
        tag_places += (1 if tag_go else 0) - (1 if step else 0)
        went[0], went[1], went[2] = 1 if tag_go else 0, tag[1], tag[2]
        data_inner += (1 if arrives else 0) - (1 if tag_go and tag[0] == 1 else 0)
        if tags_ready == 0 or tag_take:
            tags_ready = 1 if tags_inner > 0 else 0
            if tags_ready:
                tag[:] = tags[tags_first]
                tags_first = (tags_first + 1) % outstanding
                tags_inner -= 1
        if steps[2, 0]:
            tags[(tags_first + tags_inner) % outstanding] = steps[2, 1:]
            tags_inner += 1
        if asks_ready == 0 or read:
            asks_ready = 1 if asks_inner > 0 else 0
            asks_inner -= asks_ready
        if steps[3, 1]:
            asks_inner += 1
        # LOAD, its first half: the walk.
        for place in range(3, 0, -1):
            steps[place] = steps[place - 1].copy()
        steps[0, 0], steps[0, 1], steps[0, 2], steps[0, 3] = 0, 0, 0, 0
        if step:
            end_x = table[load, 3] + table[load, 4]
            end_y = table[load, 6] + table[load, 7]
            last_x = end_x + table[load, 5] - 1
            last_y = end_y + table[load, 8] - 1
            last_plane = table[load, 9] - 1
            inside = table[load, 3] <= x < end_x and table[load, 6] <= y < end_y
            ends = x == last_x and y == last_y and plane == last_plane
            steps[0, 0], steps[0, 1] = 1, 1 if inside else 0
            steps[0, 2], steps[0, 3] = 1 if ends else 0, table[load, 2]
            x += 1
            if x == last_x + 1:
                x = 0
                y += 1
                if y == last_y + 1:
                    y = 0
                    plane += 1
                    if plane == last_plane + 1:
                        plane = 0
                        walking = 0
        if take[0]:
            load, stage = taken_index[0], 1
        elif stage == 1:
            stage = 2
        elif stage == 2:
            stage, walking = 0, 1
        # CONV: words, weights, tiles.
        if streams and left == 1 and tile_ends:
            ending[(ending_first + ending_count) % 64, 0] = now + behind
            ending[(ending_first + ending_count) % 64, 1] = tile_signal
            ending_count += 1
        if streams:
            left -= 1
            if left == 0:
                streams = 0
        if start:
            streams, left = 1, next_words
            tile_ends, tile_signal = next_ends, next_signal
            here, weights_ready = 0, 0
        if weight:
            if weight_row == rows - 2:
                weights_ready = 1
            if weight_row == rows - 1:
                weight = 0
            weight_row += 1
        if taken_tile:
            next_words = table[conv, 4]
            next_ends = 1 if whole else 0
            next_signal = table[conv, 2] if whole else 0
            here, weights_ready, weight, weight_row = 1, 0, 1, 0
            tile_present = 0
            if whole:
                tiling = 0
        elif tiling and fresh:
            fresh, tile_present = 0, 1
        elif tiling and not tile_present:
            tile_present = 1
            tile += 1
        if take[1]:
            conv, tiling, fresh, tile = taken_index[1], 1, 1, 0
        # STORE: to the queue of writes, whose head is offered to memory.
        signals[2] = offer[1] if write and offer[0] == 1 else 0
        finished[2] = 1 if write and offer[0] == 1 else 0
        room += back - (1 if read_beat else 0)
        back = 1 if write else 0
        if offered == 0 or write:
            offered = 1 if writes_inner > 0 else 0
            if offered:
                offer[:] = writes_fifo[writes_first]
                writes_first = (writes_first + 1) % 16
                writes_inner -= 1
        if later[3, 0]:
            writes_fifo[(writes_first + writes_inner) % 16] = later[3, 1:]
            writes_inner += 1
        for place in range(3, 0, -1):
            later[place] = later[place - 1].copy()
        later[0, 0], later[0, 1], later[0, 2] = 0, 0, 0
        if read_beat:
            last = store_left == 1
            later[0, 0], later[0, 1], later[0, 2] = 1, 1 if last else 0, store_signal
            store_left -= 1
            if last:
                storing = 0
        if store_loaded:
            storing = 1
        store_loaded = take[2]
        if take[2]:
            one = taken_index[2]
            store_left, store_signal = table[one, 3], table[one, 2]
        # Dispatch.
        was_whole = whole_word
        whole_word = 0
        if taken_beat:
            beats += 1
            given_beats += 1
            if beats == WORDS:
                beats, whole_word, i_ready = 0, 1, 0
        elif not full and not was_whole:
            i_ready = 1
        if was_whole:
            full = 1
        if passing:
            full, i_ready = 0, 1
        busy = busy_next
        if active:
            moved = now
        now += 1
        if given_beats == count and not busy and now > moved + 3:
            break
        if not active and streams and left > 2:
            skipped = left - 2
            left -= skipped
            credit = min(period, credit + shared * skipped)
            now += skipped
            moved += skipped
            total += skipped
            words += skipped
        elif now > moved + 1000:
            total = -1
            break
    return total, words, stall_load, stall_store, reads, writes
