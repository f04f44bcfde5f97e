"""Recurrent layers: one function walks all steps, for each direction and a few sequences at once.

The inputs times their weights come in for all steps. In a step the accumulators of all gates of a
few vectors of hidden units, for a few sequences, stay in registers while the state is multiplied
by the recurrent weights; activations and the new state follow while they are there.

On a graphics processor a group of threads walks the steps of one sequence, each thread some of the
hidden units, and all of them meet after each phase. That is the work of one multiprocessor: a layer
of one sequence leaves the others idle.

Importing this file loads TVM's compiler.

References
----------
Hochreiter and Schmidhuber, "Long short-term memory", Neural Computation 9(8), 1997,
https://doi.org/10.1162/neco.1997.9.8.1735
Cho et al., "Learning phrase representations using RNN encoder-decoder for statistical machine
translation", EMNLP 2014, https://doi.org/10.3115/v1/D14-1179
https://onnx.ai/onnx/operators/onnx__LSTM.html, onnx__GRU.html, onnx__RNN.html
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any, ClassVar

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as tir

from hetsched.schedules.vectors import LATENCY, LOADS, PIPES, Vectors

# A step of fewer multiply-adds is done sooner by one thread than shared, and so are all steps.
SHARED_STEP = 1 << 19
SHARED_SEQUENCE = 1 << 17
# Bytes in a cycle that the weights come with, which are too many for the first cache.
STREAM = 32
# The most threads of a group.
GROUP = 256
# A function with this pattern is fused with none.
OPAQUE = 8


@dataclass(frozen=True)
class Activation:
    """A function of ONNX by its name, with its parameters where it takes some."""

    name: str
    alpha: float = 0.0
    beta: float = 0.0

    def __call__(self, x: Any) -> Any:
        return FUNCTIONS[self.name](x, _like(self.alpha, x), _like(self.beta, x))


def _like(value: float, x: Any) -> Any:
    return tirx.const(value, str(x.ty.dtype))


def _sigmoid(x: Any) -> Any:
    half = _like(0.5, x)
    return tirx.tanh(x * half) * half + half


def _where(condition: Any, yes: Any, no: Any) -> Any:
    return tirx.Select(condition, yes, no)


def _softplus(x: Any) -> Any:
    # exp of a large number would be infinite.
    zero = _like(0, x)
    size = tirx.max(x, zero - x)
    return tirx.max(x, zero) + tirx.log(_like(1, x) + tirx.exp(zero - size))


FUNCTIONS: Mapping[str, Callable[[Any, Any, Any], Any]] = {
    "Affine": lambda x, alpha, beta: alpha * x + beta,
    "Elu": lambda x, alpha, beta: _where(
        x < _like(0, x), alpha * (tirx.exp(tirx.min(x, _like(0, x))) - _like(1, x)), x
    ),
    "HardSigmoid": lambda x, alpha, beta: tirx.max(
        tirx.min(alpha * x + beta, _like(1, x)), _like(0, x)
    ),
    "LeakyRelu": lambda x, alpha, beta: _where(x < _like(0, x), alpha * x, x),
    "Relu": lambda x, alpha, beta: tirx.max(x, _like(0, x)),
    "ScaledTanh": lambda x, alpha, beta: alpha * tirx.tanh(beta * x),
    "Sigmoid": lambda x, alpha, beta: _sigmoid(x),
    "Softplus": lambda x, alpha, beta: _softplus(x),
    "Softsign": lambda x, alpha, beta: x / (_like(1, x) + tirx.max(x, _like(0, x) - x)),
    "Tanh": lambda x, alpha, beta: tirx.tanh(x),
    "ThresholdedRelu": lambda x, alpha, beta: _where(x > alpha, x, _like(0, x)),
}


@dataclass(frozen=True)
class Layer:
    """What shapes the function of a recurrent operation.

    `backward` and `activations` are of each direction. `flag` is `input_forget` of an LSTM, and
    `linear_before_reset` of a GRU.
    """

    kind: str
    backward: tuple[bool, ...]
    activations: tuple[tuple[Activation, ...], ...]
    clip: float | None
    flag: bool
    steps: int
    batch: int
    hidden: int
    dtype: str

    @property
    def cell(self) -> "Cell":
        return CELLS[self.kind]

    def lanes(self, vectors: Vectors | None) -> int:
        """How many elements of this layer's type a vector holds; 1 without vectors."""
        if vectors is None:
            return 1
        return max(1, vectors.lanes * 4 // np.dtype(self.dtype).itemsize)

    def padded(self, vectors: Vectors | None) -> int:
        """The hidden size filled up to whole vectors."""
        return -(-self.hidden // self.lanes(vectors)) * self.lanes(vectors)


class Units:
    """A vector of hidden units of one sequence: what a cell reads, once its products are summed."""

    def __init__(self, walk: "_Walk", sums: Mapping[int, Any], row: int, block: Any, time: Any):
        self._walk = walk
        self._sums = sums
        self._row = row
        self._block = block
        self._time = time

    def sum(self, gate: int) -> Any:
        """The product of `gate`, on top of what its accumulator began with."""
        return self._sums[gate]

    def projected(self, gate: int) -> Any:
        """The input times its weights, and the bias."""
        return self._walk.projected(gate, self._row, self._block, self._time)

    def state(self, name: str) -> Any:
        """Before the step."""
        return self._walk.now[name][self._row, self._walk.vector(self._block)]

    def fresh(self, name: str) -> Any:
        """What an earlier phase has put."""
        return self._walk.new[name][self._row, self._walk.vector(self._block)]

    def put(self, name: str, value: Any) -> Any:
        """Stores a state after the step, or an intermediate value, and returns it."""
        value = tir.Bind(value)
        tir.buffer_store(self._walk.new[name], value, [self._row, self._walk.vector(self._block)])
        return value

    def activate(self, index: int, value: Any) -> Any:
        """The activation function at `index` of `value`."""
        return tir.Bind(self._walk.activations[index](tir.Bind(value)))

    def clip(self, value: Any) -> Any:
        bound = self._walk.layer.clip
        if bound is None:
            return value
        return tirx.max(tirx.min(value, _like(bound, value)), _like(-bound, value))

    def peephole(self, index: int, value: Any, seen: Any) -> Any:
        """`value` and what the peephole at `index` adds of the state `seen`."""
        weights = self._walk.tensors.get("peepholes")
        if weights is None:
            return value
        return value + weights[self._walk.direction, index, self._walk.vector(self._block)] * seen


@dataclass(frozen=True)
class Phase:
    """Gates that multiply the same vector, and what is made of their sums.

    `source` names a state, or what an earlier phase of the step has put. The accumulators of the
    gates `apart` begin with their recurrent bias, those of the others with what the inputs give.
    """

    gates: tuple[int, ...]
    source: str
    finish: Callable[[Units], None]
    apart: tuple[int, ...] = ()


class Cell(ABC):
    """How a kind of layer steps from state to state."""

    gates: ClassVar[int]
    states: ClassVar[tuple[str, ...]] = ("h",)
    # What one phase of a step leaves for another.
    intermediate: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def phases(self, flag: bool) -> Sequence[Phase]:
        """Of a step, in order."""


class Rnn(Cell):
    """h' = f(x W + h R + b)."""

    gates = 1

    def phases(self, flag: bool) -> Sequence[Phase]:
        return [Phase((0,), "h", self._finish)]

    def _finish(self, units: Units) -> None:
        units.put("h", units.activate(0, units.clip(units.sum(0))))


class Lstm(Cell):
    """c' = f c + i g(x W + h R + b), h' = o h(c'), with i, o, f the input, output, forget gate.

    Through peepholes i and f see c, and o sees c'. The flag couples f to i: f = 1 - i.
    """

    gates = 4
    states = ("h", "c")

    def phases(self, flag: bool) -> Sequence[Phase]:
        return [Phase((0, 1, 2, 3), "h", self._coupled if flag else self._free)]

    def _free(self, units: Units) -> None:
        self._finish(units, self._gate(units, 0, 0), self._gate(units, 2, 2))

    def _coupled(self, units: Units) -> None:
        take = self._gate(units, 0, 0)
        self._finish(units, take, _like(1, take) - take)

    def _gate(self, units: Units, gate: int, peephole: int) -> Any:
        seen = units.peephole(peephole, units.sum(gate), units.state("c"))
        return units.activate(0, units.clip(seen))

    def _finish(self, units: Units, take: Any, keep: Any) -> None:
        new = units.activate(1, units.clip(units.sum(3)))
        c = units.put("c", keep * units.state("c") + take * new)
        out = units.activate(0, units.clip(units.peephole(1, units.sum(1), c)))
        units.put("h", out * units.activate(2, c))


class Gru(Cell):
    """h' = (1 - z) g(x W + (r h) R + b) + z h, with z the update and r the reset gate.

    The flag applies the reset gate behind the product: r (h R + b) in place of (r h) R.
    """

    gates = 3
    intermediate = ("z", "rh")

    def phases(self, flag: bool) -> Sequence[Phase]:
        if flag:
            return [Phase((0, 1, 2), "h", self._linear, apart=(2,))]
        return [Phase((0, 1), "h", self._reset), Phase((2,), "rh", self._new)]

    def _linear(self, units: Units) -> None:
        z, r = self._gate(units, 0), self._gate(units, 1)
        self._finish(units, z, units.projected(2) + r * units.sum(2))

    def _reset(self, units: Units) -> None:
        units.put("z", self._gate(units, 0))
        units.put("rh", self._gate(units, 1) * units.state("h"))

    def _new(self, units: Units) -> None:
        self._finish(units, units.fresh("z"), units.sum(2))

    def _gate(self, units: Units, gate: int) -> Any:
        return units.activate(0, units.clip(units.sum(gate)))

    def _finish(self, units: Units, z: Any, inner: Any) -> None:
        new = units.activate(1, units.clip(inner))
        units.put("h", new + z * (units.state("h") - new))


CELLS: Mapping[str, Cell] = {"LSTM": Lstm(), "GRU": Gru(), "RNN": Rnn()}


def loops(layer: Layer, given: Mapping[str, tuple[int, ...]], vectors: Vectors | None) -> Any:
    """The TensorIR function of a layer; its parameters are those `given` by shape, then outputs.

    It is for a processor with `vectors`, or without for a graphics processor, whose threads read
    neighbours: weights[directions, 1, hidden, G, H] then.

    With H for the hidden size in whole vectors and G for the gates, it reads
    projected[steps * batch, directions * G * H], weights[directions, H / lanes, hidden, G, lanes]
    and, where given, bias[directions, G * H] of the gates that are apart,
    peepholes[directions, 3, H], lengths[batch] of int32, and the states h and
    c[directions, batch, hidden]. It writes Y[steps, directions, batch, hidden], and each state
    after the last step.
    """
    directions = len(layer.backward)
    rows = 1 if vectors is None else _rows(layer, vectors)
    tiles = -(-layer.batch // rows)
    work = layer.batch * layer.hidden**2 * layer.cell.gates
    # Threads take whole sequences where there are several; else they meet at each step.
    is_step_shared = directions * tiles == 1 and work >= SHARED_STEP
    is_shared = directions * tiles > 1 and work * layer.steps >= SHARED_SEQUENCE
    shape = (directions, layer.batch, layer.hidden)
    with IRBuilder() as builder, tir.prim_func(s_tir=True):
        tir.func_name(layer.kind.lower())
        tir.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": OPAQUE})
        tensors = {
            name: tir.arg(name, tir.buffer(dims, "int32" if name == "lengths" else layer.dtype))
            for name, dims in given.items()
        }
        outputs = {"Y": tir.arg("Y", tir.buffer((layer.steps, *shape), layer.dtype))}
        for name in layer.cell.states:
            outputs[name] = tir.arg(f"Y_{name}", tir.buffer(shape, layer.dtype))

        def walk(direction: int, tile: Any, thread: Any = None) -> None:
            # The last rows again where there is no whole tile of them.
            first = tirx.min(tile * rows, layer.batch - rows)
            written = _Walk(layer, vectors, tensors, outputs, direction, first, rows, thread)
            written.emit(is_step_shared)

        if vectors is None:
            # A kernel for each direction: where threads meet, a kernel must not branch.
            for direction in range(directions):
                with (
                    tir.thread_binding(tiles, thread="blockIdx.x") as tile,
                    tir.thread_binding(_group(layer), thread="threadIdx.x") as thread,
                ):
                    walk(direction, tile, thread)
        else:
            with (tir.parallel if is_shared else tir.serial)(directions * tiles) as index:
                if directions == 1:
                    walk(0, index)
                else:
                    with tir.If(index < tiles):
                        with tir.Then():
                            walk(0, index)
                        with tir.Else():
                            walk(1, index - tiles)
    return builder.get()


def _group(layer: Layer) -> int:
    """The threads of a group."""
    return min(GROUP, layer.hidden)


def _rows(layer: Layer, vectors: Vectors) -> int:
    """How many sequences go together: the best of the phase with the most gates."""
    gates = max(len(phase.gates) for phase in layer.cell.phases(layer.flag))
    most = range(1, 1 + min(layer.batch, vectors.registers))
    return min(
        most,
        key=lambda rows: (
            -(-layer.batch // rows)
            * _cycles(layer, gates, rows, _width(layer, gates, rows, vectors), vectors)
        ),
    )


def _width(layer: Layer, gates: int, rows: int, vectors: Vectors) -> int:
    """How many vectors of hidden units of `rows` sequences go together."""
    fitting = range(1, 1 + layer.padded(vectors) // layer.lanes(vectors))
    return min(fitting, key=lambda width: _cycles(layer, gates, rows, width, vectors))


def _cycles(layer: Layer, gates: int, rows: int, width: int, vectors: Vectors) -> float:
    """Of `rows` sequences, for each element of the state that multiplies; infinite if too many."""
    columns = width * gates
    if rows * columns + min(rows, columns) + 1 > vectors.registers and rows * width > 1:
        return float("inf")
    loads = rows / LOADS + columns * max(1 / LOADS, vectors.lanes * 4 / STREAM)
    busy = max(rows * columns / PIPES, loads, LATENCY)
    return -(-layer.padded(vectors) // (layer.lanes(vectors) * width)) * (busy + 0.5)


class _Walk:
    """Writes the steps of one direction for the sequences `first` to `first` + `rows`."""

    def __init__(
        self,
        layer: Layer,
        vectors: Vectors | None,
        tensors: Mapping[str, Any],
        outputs: Mapping[str, Any],
        direction: int,
        first: Any,
        rows: int,
        thread: Any,
    ) -> None:
        self.layer = layer
        self.tensors = tensors
        self.direction = direction
        self.activations = layer.activations[direction]
        self._vectors = vectors
        self._outputs = outputs
        self._first = first
        self._rows = rows
        self._thread = thread
        self._lanes = layer.lanes(vectors)
        self._wide = layer.padded(vectors)
        cell = layer.cell
        self.now = {name: self._buffer() for name in cell.states}
        self.new = {name: self._buffer() for name in (*cell.states, *cell.intermediate)}

    def vector(self, block: Any) -> Any:
        """The indices of a vector of hidden units."""
        return self._ramp(block * self._lanes)

    def projected(self, gate: int, row: int, block: Any, time: Any) -> Any:
        column = (self.direction * self.layer.cell.gates + gate) * self._wide
        lanes = self._ramp(column + block * self._lanes)
        return self.tensors["projected"][time * self.layer.batch + self._first + row, lanes]

    def emit(self, is_step_shared: bool) -> None:
        steps = self.layer.steps
        self._begin()
        with tir.serial(steps) as step:
            time = steps - 1 - step if self.layer.backward[self.direction] else step
            # Every other step from the last weights to the first, so that the caches still have
            # those which it begins with.
            parity = step - tirx.floordiv(step, 2) * 2
            for phase in self.layer.cell.phases(self.layer.flag):
                self._phase(phase, time, parity, is_step_shared)
            self._keep(time)
        self._end()

    def _begin(self) -> None:
        for name, state in self.now.items():
            with tir.serial(self._rows) as row, self._over(self._wide) as unit:
                tir.buffer_store(state, self._zero, [row, unit])
            if name in self.tensors:
                with tir.serial(self._rows) as row, self._over(self.layer.hidden) as unit:
                    value = self.tensors[name][self.direction, self._first + row, unit]
                    tir.buffer_store(state, value, [row, unit])

    def _phase(self, phase: Phase, time: Any, parity: Any, is_shared: bool) -> None:
        layer, rows = self.layer, range(self._rows)
        count = self._wide // self._lanes
        width = 1
        if self._vectors is not None:
            width = _width(layer, len(phase.gates), self._rows, self._vectors)
        source = {**self.new, **self.now}[phase.source]
        weights = self.tensors["weights"]
        places = list(product(range(width), phase.gates))
        lanes = self._ramp(0)
        tiles = -(-count // width)
        with tir.parallel(tiles) if is_shared else self._over(tiles) as index:
            tile = index + parity * (tiles - 1 - 2 * index)
            first = tirx.min(tile * width, count - width)
            shape = (self._rows, width, layer.cell.gates, self._lanes)
            sums = tir.alloc_buffer(shape, layer.dtype, scope="local")
            for row, (place, gate) in product(rows, places):
                start = self._start(phase, gate, row, first + place, time)
                tir.buffer_store(sums, start, [row, place, gate, lanes])
            with tir.serial(layer.hidden) as unit:
                # The shorter side of the tile inside, as what it loads stays in registers.
                by_row = ((row, place) for row, place in product(rows, places))
                by_place = ((row, place) for place, row in product(places, rows))
                for row, (place, gate) in by_row if len(rows) > len(places) else by_place:
                    block = first + place
                    at = (
                        (block, unit, gate, lanes)
                        if self._thread is None
                        else (0, unit, gate, block)
                    )
                    term = weights[self.direction, *at]
                    total = sums[row, place, gate, lanes] + source[row, unit] * term
                    tir.buffer_store(sums, total, [row, place, gate, lanes])
            for row, place in product(rows, range(width)):
                found = {gate: sums[row, place, gate, lanes] for gate in phase.gates}
                phase.finish(Units(self, found, row, first + place, time))

    def _start(self, phase: Phase, gate: int, row: int, block: Any, time: Any) -> Any:
        if gate not in phase.apart:
            return self.projected(gate, row, block, time)
        if "bias" not in self.tensors:
            return tirx.const(0, self.layer.dtype + (f"x{self._lanes}" if self._lanes > 1 else ""))
        column = gate * self._wide + block * self._lanes
        return self.tensors["bias"][self.direction, self._ramp(column)]

    def _keep(self, time: Any) -> None:
        """Writes the output of a step, and takes the new states where the sequence goes on."""
        with tir.serial(self._rows) as row:
            if "lengths" not in self.tensors:
                self._take(row, time)
                return
            with tir.If(time < self.tensors["lengths"][self._first + row]):
                with tir.Then():
                    self._take(row, time)
                with tir.Else():
                    self._write(row, time, lambda unit: self._zero)

    def _take(self, row: Any, time: Any) -> None:
        for name, state in self.now.items():
            with self._over(self._wide) as unit:
                tir.buffer_store(state, self.new[name][row, unit], [row, unit])
        self._write(row, time, lambda unit: self.new["h"][row, unit])

    def _write(self, row: Any, time: Any, value: Callable[[Any], Any]) -> None:
        with self._over(self.layer.hidden) as unit:
            place = [time, self.direction, self._first + row, unit]
            tir.buffer_store(self._outputs["Y"], value(unit), place)

    def _end(self) -> None:
        """The last states; a sequence of length 0 has none, which is zero."""
        for name, state in self.now.items():
            with tir.serial(self._rows) as row, self._over(self.layer.hidden) as unit:
                value = state[row, unit]
                if "lengths" in self.tensors:
                    length = self.tensors["lengths"][self._first + row]
                    value = tirx.Select(length > 0, value, self._zero)
                place = [self.direction, self._first + row, unit]
                tir.buffer_store(self._outputs[name], value, place)

    @property
    def _zero(self) -> Any:
        return tirx.const(0, self.layer.dtype)

    def _buffer(self) -> Any:
        scope = "global" if self._thread is None else "shared"
        return tir.alloc_buffer((self._rows, self._wide), self.layer.dtype, scope=scope)

    def _ramp(self, first: Any) -> Any:
        return tirx.Ramp(first, 1, self._lanes) if self._lanes > 1 else first

    @contextmanager
    def _over(self, count: int) -> Iterator[Any]:
        """A loop, shared out to the threads of a group."""
        if self._thread is None:
            with tir.serial(count) as index:
                yield index
            return
        threads = _group(self.layer)
        with tir.serial(-(-count // threads)) as turn:
            index = turn * threads + self._thread
            if count % threads == 0:
                yield index
                return
            with tir.If(index < count), tir.Then():
                yield index
