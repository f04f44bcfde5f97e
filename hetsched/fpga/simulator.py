"""What instructions do, one after the other: the meaning of the overlay, without its time.

Numba compiles the loops, so that streams of whole networks are run in seconds. Tokens are not
looked at: a stream that is right in order is right on the overlay if its tokens keep its units
apart, which is checked elsewhere.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy as np
from numba import njit

from hetsched.errors import PartError
from hetsched.fpga.isa import Buffer, Conv, Instruction, Load, Overlay, Sync
from hetsched.fpga.program import Program


@dataclass(frozen=True, eq=False)
class State:
    """The buffers of a core."""

    inputs: np.ndarray
    weights: np.ndarray
    parameters: np.ndarray
    accumulators: np.ndarray
    outputs: np.ndarray

    @classmethod
    def of(cls, overlay: Overlay) -> "State":
        return cls(
            np.zeros((overlay.input_words, overlay.rows), np.int8),
            np.zeros((overlay.weight_words, overlay.columns), np.int8),
            np.zeros((overlay.parameter_words, overlay.columns), np.uint64),
            np.zeros((overlay.accumulator_words, overlay.columns), np.int32),
            np.zeros((overlay.output_words, overlay.columns), np.int8),
        )


def simulate(program: Program, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The outputs of a program for inputs of its part."""
    memory = program.memory(inputs)
    execute(program.overlay, program.instructions, memory)
    return program.outputs(memory)


def execute(
    overlay: Overlay,
    instructions: Sequence[Instruction],
    memory: np.ndarray,
    state: State | None = None,
) -> None:
    """Runs `instructions` in order on `memory`, bytes that are changed in place.

    Raises
    ------
    PartError
        An instruction leaves the memory.
    """
    state = state or State.of(overlay)
    buffers = {
        Buffer.INPUT: state.inputs.reshape(-1).view(np.uint8),
        Buffer.WEIGHTS: state.weights.reshape(-1).view(np.uint8),
        Buffer.PARAMETERS: state.parameters.reshape(-1).view(np.uint8),
    }
    results = state.outputs.reshape(-1).view(np.uint8)
    for place, one in enumerate(instructions):
        if isinstance(one, Sync):
            continue
        values = np.array(astuple(one), np.int64)
        if isinstance(one, Conv):
            _convolve(
                values,
                state.inputs,
                state.weights,
                state.parameters,
                state.accumulators,
                state.outputs,
            )
        elif isinstance(one, Load):
            if not _load(values, memory, buffers[one.buffer]):
                raise PartError(f"instruction {place} reads beyond the memory: {one}")
        elif not _store(values, memory, results):
            raise PartError(f"instruction {place} writes beyond the memory: {one}")


@njit(cache=True)
def _load(one: np.ndarray, memory: np.ndarray, buffer: np.ndarray) -> bool:
    (dram, start, beats, rows, planes, row_stride, plane_stride) = one[:7]
    (left, right, top, bottom, fill) = one[7:12]
    to, size = start * 8, buffer.size
    for plane in range(planes):
        for row in range(-top, rows + bottom):
            inside = 0 <= row < rows
            for beat in range(-left, beats + right):
                if inside and 0 <= beat < beats:
                    source = dram + plane * plane_stride + row * row_stride + beat * 8
                    if source < 0 or source + 8 > memory.size:
                        return False
                    for byte in range(8):
                        buffer[(to + byte) % size] = memory[source + byte]
                else:
                    for byte in range(8):
                        buffer[(to + byte) % size] = fill & 255
                to += 8
    return True


@njit(cache=True)
def _store(one: np.ndarray, memory: np.ndarray, results: np.ndarray) -> bool:
    (dram, start, beats, rows, row_stride, step) = one[:6]
    source = start * 8
    for row in range(rows):
        for beat in range(beats):
            to = dram + row * row_stride + beat * step
            if to < 0 or to + 8 > memory.size:
                return False
            for byte in range(8):
                memory[to + byte] = results[(source + byte) % results.size]
            source += 8
    return True


@njit(cache=True)
def _convolve(
    one: np.ndarray,
    inputs: np.ndarray,
    weights: np.ndarray,
    parameters: np.ndarray,
    accumulators: np.ndarray,
    outputs: np.ndarray,
) -> None:
    (start, positions, position_stride, lines, line_stride) = one[:5]
    (inner, inner_stride, middle, middle_stride, outer, outer_stride) = one[5:11]
    (tile, parameter, accumulator, output, drop, step, lane, zero, low, high) = one[11:21]
    (first, last, depthwise, widen, maximum) = one[21:26]
    words, rows = inputs.shape
    columns = weights.shape[1]
    sums = np.zeros(columns, np.int32)
    # The words of the positions before, the latest first.
    before = np.zeros(rows, np.int64)
    for o in range(outer):
        for m in range(middle):
            for i in range(inner):
                fresh = o == 0 and m == 0 and i == 0
                final = o == outer - 1 and m == middle - 1 and i == inner - 1
                wider = widen != 0 and m > 0 and i == 0
                origin = start + o * outer_stride + m * middle_stride + i * inner_stride
                done = 0
                before[:] = -1
                for line in range(lines):
                    for position in range(positions):
                        word = origin + line * line_stride + position * position_stride
                        word = word % words
                        if depthwise:
                            for row in range(rows - 1, 0, -1):
                                before[row] = before[row - 1]
                            before[0] = word
                        if position < drop or (position - drop) % step:
                            continue
                        sums[:] = 0
                        for row in range(rows):
                            if depthwise:
                                if before[row] >= 0:
                                    for column in range(columns):
                                        sums[column] += np.int32(
                                            inputs[before[row], lane * columns + column]
                                        ) * np.int32(weights[(tile + row) % len(weights), column])
                            else:
                                value = np.int32(inputs[word, row])
                                for column in range(columns):
                                    sums[column] += value * np.int32(
                                        weights[(tile + row) % len(weights), column]
                                    )
                        place = (accumulator + done) % len(accumulators)
                        to = (output + done) % len(outputs)
                        for column in range(columns):
                            known = accumulators[place, column]
                            if fresh and first:
                                bias = np.int32(
                                    np.int64(parameters[parameter, column] & 0xFFFFFFFF)
                                )
                                known = np.int32(sums[column] + bias)
                            else:
                                if wider:
                                    known = np.int32(known * 128)
                                if maximum:
                                    known = max(known, sums[column])
                                else:
                                    known = np.int32(known + sums[column])
                            if final and last:
                                told = parameters[parameter, column]
                                value = _requantised(known, told)
                                outputs[to, column] = np.int8(min(max(value + zero, low), high))
                            else:
                                accumulators[place, column] = known
                        done += 1
                tile += rows


@njit(cache=True)
def _requantised(accumulator: np.int32, parameter: np.uint64) -> np.int64:
    """`isa.requantise` of one value, without its zero point and bounds."""
    product = np.int64(accumulator) * np.int64((parameter >> 32) & 0xFFFFFF)
    fixed = (product << 3) >> np.int64(parameter >> 56)
    whole = fixed >> 26
    fraction = fixed & 0x3FFFFFF
    above, negative = fraction >> 25, fixed < 0
    distance = fraction - 0x2000000 if above else 0x1FFFFFF - fraction
    magnitude = ~whole if negative else whole
    if magnitude == 0:
        steps = 1 if (above != 0) == negative else 2
    else:
        steps = 2
        while magnitude and steps < 512:
            magnitude >>= 1
            steps <<= 1
    return whole + ((whole & 1) if distance < steps else above)
