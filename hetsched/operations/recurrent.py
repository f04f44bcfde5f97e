"""Recurrent layers: LSTM, GRU and the plain RNN."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from hetsched.errors import ModelError
from hetsched.op import Op
from hetsched.operation import (
    Call,
    Compiler,
    Known,
    Operation,
    Piece,
    interpreted,
    keep,
    refused,
    wholes,
)
from hetsched.operations._arithmetic import matrix_product, sum_dtype
from hetsched.region import Region

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
# Per hidden unit, beyond its gates: the new state from the gates and the old one.
UPDATE_FLOPS = {"LSTM": 5, "GRU": 5, "RNN": 0}
ACTIVATIONS = {"LSTM": ("Sigmoid", "Tanh", "Tanh"), "GRU": ("Sigmoid", "Tanh"), "RNN": ("Tanh",)}

Activation = Callable[[np.ndarray], np.ndarray]


def _sigmoid(x: np.ndarray, alpha: float, beta: float) -> np.ndarray:
    # Half a tangent, because an exponential of a large negative number overflows.
    return 0.5 * np.tanh(0.5 * x) + 0.5


# The default alpha and beta of each, and the function.
FUNCTIONS: Mapping[str, tuple[float, float, Callable[[np.ndarray, float, float], np.ndarray]]] = {
    "affine": (1.0, 0.0, lambda x, alpha, beta: alpha * x + beta),
    "elu": (1.0, 0.0, lambda x, alpha, beta: np.where(x < 0, alpha * np.expm1(x), x)),
    "hardsigmoid": (0.2, 0.5, lambda x, alpha, beta: np.clip(alpha * x + beta, 0, 1)),
    "leakyrelu": (0.01, 0.0, lambda x, alpha, beta: np.where(x < 0, alpha * x, x)),
    "relu": (0.0, 0.0, lambda x, alpha, beta: np.maximum(x, 0)),
    "scaledtanh": (1.0, 1.0, lambda x, alpha, beta: alpha * np.tanh(beta * x)),
    "sigmoid": (0.0, 0.0, _sigmoid),
    "softplus": (0.0, 0.0, lambda x, alpha, beta: np.logaddexp(x, 0)),
    "softsign": (0.0, 0.0, lambda x, alpha, beta: x / (1 + np.abs(x))),
    "tanh": (0.0, 0.0, lambda x, alpha, beta: np.tanh(x)),
    "thresholdedrelu": (1.0, 0.0, lambda x, alpha, beta: np.where(x > alpha, x, 0)),
}
TAKES_ALPHA = {
    "affine", "elu", "hardsigmoid", "leakyrelu", "scaledtanh", "thresholdedrelu"
}  # fmt: skip
TAKES_BETA = {"affine", "hardsigmoid", "scaledtanh"}


@dataclass(frozen=True, eq=False)
class Cell:
    """One direction of a layer: its weights, and how it steps from state to state.

    `weight` is [inputs, gates * hidden], `recurrence` [hidden, gates * hidden], `bias` both biases
    of each gate, `peepholes` those of the gates i, o and f.
    """

    weight: np.ndarray
    recurrence: np.ndarray
    bias: np.ndarray
    peepholes: np.ndarray
    activations: tuple[Activation, ...]
    clip: Activation
    flag: bool
    compiler: Compiler

    def times(self, x: np.ndarray, w: np.ndarray) -> np.ndarray:
        return matrix_product(x, w, self.compiler)

    def lstm(self, x: np.ndarray, h: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The states after one step; `x` are the inputs times their weights, biases added.

        The flag couples the forget gate to the input gate.
        """
        f, g, out = self.activations
        i_sum, o_sum, f_sum, c_sum = np.split(x + self.times(h, self.recurrence), 4, -1)
        i_peep, o_peep, f_peep = np.split(self.peepholes, 3)
        take = f(self.clip(i_sum + i_peep * c))
        forget = 1 - take if self.flag else f(self.clip(f_sum + f_peep * c))
        state = forget * c + take * g(self.clip(c_sum))
        return f(self.clip(o_sum + o_peep * state)) * out(state), state

    def gru(self, x: np.ndarray, h: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The flag applies the reset gate behind the recurrent product and its bias."""
        f, g = self.activations
        z_x, r_x, h_x = np.split(x, 3, -1)
        z_w, r_w, h_w = np.split(self.recurrence, 3, -1)
        bias = np.split(self.bias, 6)[5]
        update = f(self.clip(z_x + self.times(h, z_w)))
        reset = f(self.clip(r_x + self.times(h, r_w)))
        if self.flag:
            inner = h_x - bias + reset * (self.times(h, h_w) + bias)
        else:
            inner = h_x + self.times(reset * h, h_w)
        return (1 - update) * g(self.clip(inner)) + update * h, c

    def rnn(self, x: np.ndarray, h: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        (f,) = self.activations
        return f(self.clip(x + self.times(h, self.recurrence))), c


class Recurrent(Operation):
    """A state that each step of a sequence updates."""

    onnx_types = tuple(GATES)
    defined = onnx_types
    examples = (
        "(float[5,4,3] x, float[2,24,3] w, float[2,24,6] r, float[2,48] b, float[2,4,6] h, "
        "float[2,4,6] c, float[2,18] p) => (y, yh, yc) { y, yh, yc = LSTM <hidden_size=6, "
        'direction="bidirectional"> (x, w, r, b, , h, c, p) }',
        "(float[5,4,3] x, float[1,18,3] w, float[1,18,6] r, float[1,36] b) => (y, yh) <int32[4] "
        "n = {5, 3, 1, 2}> { y, yh = GRU <hidden_size=6, linear_before_reset=1> (x, w, r, b, n) "
        "}",
        "(float[5,4,3] x, float[2,6,3] w, float[2,6,6] r) => (y, yh) { y, yh = RNN "
        '<hidden_size=6, direction="bidirectional", activations=["Tanh", "Relu"]> (x, w, r) }',
    )

    def flops(self, op: Op) -> int:
        x, weight, recurrence = op.input(0), op.input(1), op.input(2)
        gates = GATES[op.kind]
        rows = x.shape[0] * x.shape[1] * weight.shape[0]
        hidden = recurrence.shape[-1]
        # Both products, their sum and the activation, and the two biases.
        each_gate = 2 * (x.shape[2] + hidden) + 2 + 2 * int(op.has_input(3))
        peepholes = 6 if op.kind == "LSTM" and op.has_input(7) else 0
        return rows * hidden * (gates * each_gate + UPDATE_FLOPS[op.kind] + peepholes)

    def piece(self, op: Op, index: int, region: Region, known: Known) -> Piece:
        """Any rows of the batch, and one of two directions."""
        batch_first = bool(op.attributes.get("layout"))
        steps = op.input(0).shape[1 if batch_first else 0]
        directions = op.input(1).shape[0]
        # Of Y, and of the last states.
        own = ((0, 2) if batch_first else (2, 1)), ((0, 1) if batch_first else (1, 0))
        batch_axis, direction_axis = own[min(index, 1)]
        others = {*range(len(region.intervals))} - {batch_axis, direction_axis}
        keep(op, index, region, sorted(others), "each step needs all units of the step before")
        batch, direction = region.intervals[batch_axis], region.intervals[direction_axis]
        hidden = (0, op.input(2).shape[-1])
        state = Region((batch, direction, hidden) if batch_first else (direction, batch, hidden))
        every = (
            Region((batch, (0, steps), direction, hidden))
            if batch_first
            else Region(((0, steps), direction, batch, hidden))
        )
        reads = wholes(op)
        reads[0] = Region.whole(op.input(0).shape).along(0 if batch_first else 1, *batch)
        for place, tensor in enumerate(op.inputs[1:], 1):
            if tensor is None:
                continue
            if place == 4:
                reads[place] = Region((batch,))
            elif place in (5, 6):
                reads[place] = state
            else:
                reads[place] = Region.whole(tensor.shape).along(0, *direction)
        attributes: dict[str, Any] = {}
        if direction != (0, directions):
            if op.attributes.get("activation_alpha") or op.attributes.get("activation_beta"):
                raise refused(op, "its activations share a list of values", direction_axis)
            attributes["direction"] = ("forward", "reverse")[direction[0]]
            if functions := op.attributes.get("activations"):
                half = len(functions) // 2
                attributes["activations"] = functions[direction[0] * half :][:half]
        written = {i: every if i == 0 else state for i in range(len(op.outputs)) if op.outputs[i]}
        return Piece.of(op, reads, written, **attributes)

    def reference(
        self, call: Call, inputs: Sequence[Any], compiler: Compiler = interpreted
    ) -> tuple[np.ndarray, ...]:
        x, w, r, bias, lengths, h, c, peepholes = (*inputs, *[None] * 8)[:8]
        wide = sum_dtype(x.dtype)
        batch_first = bool(call.attributes.get("layout"))
        directions, hidden = w.shape[0], r.shape[-1]

        def states(given: np.ndarray | None, batch: int) -> np.ndarray:
            if given is None:
                return np.zeros((directions, batch, hidden), wide)
            return (given.swapaxes(0, 1) if batch_first else given).astype(wide)

        steps = (x.swapaxes(0, 1) if batch_first else x).astype(wide)
        length, batch = steps.shape[:2]
        lengths = np.full(batch, length) if lengths is None else lengths
        gates = GATES[call.kind]
        bias = np.zeros((directions, 2 * gates * hidden), wide) if bias is None else bias
        peepholes = np.zeros((directions, 3 * hidden), wide) if peepholes is None else peepholes
        functions = _activations(call, directions)
        results = []
        for d, backward in zip(range(directions), _backward(call), strict=True):
            cell = Cell(
                weight=w[d].T.astype(wide, "C"),
                recurrence=r[d].T.astype(wide, "C"),
                bias=bias[d].astype(wide),
                peepholes=peepholes[d].astype(wide),
                activations=functions[d],
                clip=_clip(call.attributes.get("clip")),
                flag=bool(
                    call.attributes.get("linear_before_reset")
                    or call.attributes.get("input_forget")
                ),
                compiler=compiler,
            )
            states_of = states(h, batch)[d], states(c, batch)[d]
            results.append(_walk(cell, call.kind, steps, lengths, backward, *states_of))
        y, y_h, y_c = (np.stack(parts) for parts in zip(*results, strict=True))
        # From [directions, steps, batch, hidden].
        y = y.transpose(2, 1, 0, 3) if batch_first else y.transpose(1, 0, 2, 3)
        if batch_first:
            y_h, y_c = y_h.swapaxes(0, 1), y_c.swapaxes(0, 1)
        return tuple(result.astype(x.dtype) for result in (y, y_h, y_c)[: call.results])


def _walk(
    cell: Cell,
    kind: str,
    x: np.ndarray,
    lengths: np.ndarray,
    backward: bool,
    h: np.ndarray,
    c: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All states and the last ones; a sequence is left alone beyond its length."""
    step = {"LSTM": cell.lstm, "GRU": cell.gru, "RNN": cell.rnn}[kind]
    bias = np.add(*np.split(cell.bias, 2))
    products = cell.times(x.reshape(-1, x.shape[2]), cell.weight).reshape(*x.shape[:2], -1) + bias
    y = np.zeros((*x.shape[:2], h.shape[-1]), x.dtype)
    order = range(len(x) - 1, -1, -1) if backward else range(len(x))
    for t in order:
        inside = (t < lengths)[:, np.newaxis]
        new_h, new_c = step(products[t], h, c)
        h, c = np.where(inside, new_h, h), np.where(inside, new_c, c)
        y[t] = np.where(inside, h, 0)
    return y, h, c


def _backward(call: Call) -> tuple[bool, ...]:
    direction = call.attributes.get("direction") or "forward"
    return {"forward": (False,), "reverse": (True,), "bidirectional": (False, True)}[direction]


def _clip(limit: float | None) -> Activation:
    return (lambda x: np.clip(x, -limit, limit)) if limit else (lambda x: x)


def _activations(call: Call, directions: int) -> list[tuple[Activation, ...]]:
    """The functions of each direction; alphas and betas go in turn to those that take one."""
    default = ACTIVATIONS[call.kind]
    found = call.attributes.get("activations") or default
    # An opset's schema gives the default for one direction only.
    wanted = found if len(found) == len(default) * directions else tuple(found) * directions
    alphas = iter(call.attributes.get("activation_alpha") or ())
    betas = iter(call.attributes.get("activation_beta") or ())
    functions = [_activation(name, alphas, betas) for name in wanted]
    return [tuple(functions[d * len(default) : (d + 1) * len(default)]) for d in range(directions)]


def _activation(name: str, alphas: Iterator[float], betas: Iterator[float]) -> Activation:
    key = name.lower()
    if key not in FUNCTIONS:
        raise ModelError(f"activation '{name}'; there are {', '.join(FUNCTIONS)}")
    alpha, beta, function = FUNCTIONS[key]
    if key in TAKES_ALPHA:
        alpha = float(next(chain(alphas, [alpha])))
    if key in TAKES_BETA:
        beta = float(next(chain(betas, [beta])))
    return lambda x: function(x, alpha, beta).astype(x.dtype)
