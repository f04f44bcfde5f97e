"""LSTM, GRU and RNN in Relax, which has no such operations.

The inputs of all steps times their weights are one product of matrices, and the steps one call of
the function that `schedules.recurrent` makes. Weights that are constants are packed when they are
folded, others each time.

Importing this file loads TVM's compiler.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tvm import relax

from hetsched.errors import UnsupportedOperation
from hetsched.op import Op
from hetsched.schedules import recurrent
from hetsched.schedules.recurrent import Activation, Layer
from hetsched.schedules.vectors import Vectors
from hetsched.tvm_runtime import to_tvm

KINDS = frozenset(recurrent.CELLS)
FLOATS = ("float16", "float32", "float64", "bfloat16")
# Those that are computed in; the others are float32 on the way.
WIDE = ("float32", "float64")

# The activation functions of the standard, with the alpha and beta that stand in for those which
# the node does not give; None where the function takes none.
ACTIVATIONS: Mapping[str, tuple[float | None, float | None]] = {
    "Affine": (0.0, 0.0),
    "Elu": (1.0, None),
    "HardSigmoid": (0.2, 0.5),
    "LeakyRelu": (0.01, None),
    "Relu": (None, None),
    "ScaledTanh": (0.0, 0.0),
    "Sigmoid": (None, None),
    "Softplus": (None, None),
    "Softsign": (None, None),
    "Tanh": (None, None),
    "ThresholdedRelu": (0.0, None),
}
CANONICAL = {name.lower(): name for name in ACTIVATIONS}
DEFAULT_ACTIVATIONS = {
    "LSTM": ("Sigmoid", "Tanh", "Tanh"),
    "GRU": ("Sigmoid", "Tanh"),
    "RNN": ("Tanh",),
}
# What makes the flag of a layer.
FLAGS = {
    "LSTM": {"input_forget"},
    "GRU": {"linear_before_reset"},
    "RNN": set[str](),
}
COMMON_ATTRIBUTES = {
    "activation_alpha",
    "activation_beta",
    "activations",
    "clip",
    "direction",
    "hidden_size",
    "layout",
}
# Whether each direction goes back in time.
DIRECTIONS = {
    "forward": (False,),
    "reverse": (True,),
    "bidirectional": (False, True),
}


def read(op: Op, constants: Mapping[str, np.ndarray]) -> Layer:
    """What `op` says, checked and with its defaults filled in.

    Results are those of onnxruntime's CPU kernels, to rounding, also where these fill a gap of the
    standard: the defaults of `activation_alpha` and `activation_beta`, and the final state of a
    sequence of length 0, which is zero. What onnxruntime lacks (`layout` 1, float64, an RNN's
    activations in lower case) follows the standard. Lengths that are known only at run time are
    not checked: one beyond the steps means all of them.

    Raises
    ------
    UnsupportedOperation
        An attribute or input whose meaning is not covered.

    References
    ----------
    https://onnx.ai/onnx/operators/onnx__LSTM.html, onnx__GRU.html, onnx__RNN.html
    """
    unknown = sorted(op.attributes.keys() - COMMON_ATTRIBUTES - FLAGS[op.kind])
    if unknown:
        raise UnsupportedOperation(f"{op} has an attribute '{unknown[0]}', which is not known")
    direction = op.attributes.get("direction", "forward")
    if direction not in DIRECTIONS:
        raise UnsupportedOperation(
            f"{op} has the direction '{direction}'; there are {', '.join(DIRECTIONS)}"
        )
    backward = DIRECTIONS[direction]
    x = op.input(0)
    if x.dtype not in FLOATS:
        raise UnsupportedOperation(f"{op} computes in {x.dtype}; {', '.join(FLOATS)} would do")
    if op.attributes.get("layout", 0) not in (0, 1):
        raise UnsupportedOperation(f"{op} has layout {op.attributes['layout']}; 0 and 1 would do")
    steps, batch = (x.shape[1], x.shape[0]) if _is_batch_first(op) else x.shape[:2]
    layer = Layer(
        kind=op.kind,
        backward=backward,
        activations=_activations(op, len(backward)),
        clip=_clip(op),
        flag=any(op.attributes.get(flag, 0) for flag in FLAGS[op.kind]),
        steps=steps,
        batch=batch,
        hidden=op.input(2).shape[2],
        dtype=x.dtype if x.dtype in WIDE else WIDE[0],
    )
    _check_shapes(op, layer)
    _check_lengths(op, layer, constants)
    return layer


def convert(
    builder: Any, op: Op, layer: Layer, inputs: Sequence[Any], vectors: Vectors | None
) -> list[Any]:
    """The outputs of `op`, of which `layer` was read, as expressions of Relax."""
    x, w, r, bias, lengths, h, c, peepholes = (*inputs, *[None] * 8)[:8]
    turned = _turned if _is_batch_first(op) else lambda expression, axes: expression
    directions, gates = len(layer.backward), layer.cell.gates
    lanes, wide = layer.lanes(vectors), layer.padded(vectors)
    columns = directions * gates * wide

    def shaped(expression: Any, *shape: int, axis: int) -> Any:
        """In the type that is computed in, its hidden units along `axis` filled up."""
        expression = relax.op.reshape(_cast(expression, op, layer), shape)
        widths = [0] * (2 * len(shape))
        widths[2 * axis + 1] = wide - layer.hidden
        return relax.op.nn.pad(expression, widths) if any(widths) else expression

    rows = relax.op.reshape(
        turned(_cast(x, op, layer), (1, 0, 2)), (layer.steps * layer.batch, op.input(0).shape[2])
    )
    w = shaped(w, directions, gates, layer.hidden, op.input(0).shape[2], axis=2)
    w = relax.op.permute_dims(relax.op.reshape(w, (columns, op.input(0).shape[2])), (1, 0))
    projected = relax.op.matmul(rows, w)
    r = shaped(r, directions, gates, layer.hidden, layer.hidden, axis=2)
    # Threads, without vectors, read neighbours.
    lanes = wide if vectors is None else lanes
    r = relax.op.reshape(r, (directions, gates, wide // lanes, lanes, layer.hidden))
    given = {"weights": relax.op.permute_dims(r, (0, 2, 4, 1, 3))}
    if bias is not None:
        both = shaped(bias, directions, 2, gates, layer.hidden, axis=3)
        of_input, recurrent_bias = (
            relax.op.take(both, relax.const(index, "int64"), axis=1) for index in (0, 1)
        )
        # [directions, gates, H]; where a gate is apart, its recurrent bias comes later.
        apart = {gate for phase in layer.cell.phases(layer.flag) for gate in phase.apart}
        there = np.array([gate not in apart for gate in range(gates)], layer.dtype)
        total = of_input + recurrent_bias * _constant(there.reshape(-1, 1))
        projected += relax.op.reshape(total, (columns,))
        if apart:
            given["bias"] = relax.op.reshape(recurrent_bias, (directions, gates * wide))
    if peepholes is not None:
        given["peepholes"] = shaped(peepholes, directions, 3, layer.hidden, axis=2)
    if lengths is not None:
        given["lengths"] = lengths
    for name, state in zip(layer.cell.states, (h, c), strict=False):
        if state is not None:
            given[name] = turned(_cast(state, op, layer), (1, 0, 2))
    given = {"projected": projected, **given}
    arguments = {name: builder.emit(expression) for name, expression in given.items()}
    shapes = {name: tuple(map(int, argument.ty.shape)) for name, argument in arguments.items()}
    loops = recurrent.loops(layer, shapes, vectors)
    function = builder.add_func(loops, op.kind.lower())
    # The builder names the variable apart from others, but not the symbol.
    builder.update_func(function, loops.with_attr("global_symbol", function.name_hint))
    state_shape = (directions, layer.batch, layer.hidden)
    results = [(layer.steps, *state_shape), *[state_shape] * len(layer.cell.states)]
    made = builder.emit(
        relax.call_tir(
            function,
            relax.Tuple(list(arguments.values())),
            [relax.TensorType(shape, layer.dtype) for shape in results],
        )
    )
    axes = [(2, 0, 1, 3), *[(1, 0, 2)] * len(layer.cell.states)]
    return [
        builder.emit(turned(_cast(relax.TupleGetItem(made, index), op, layer, back=True), order))
        for index, order in enumerate(axes)
    ]


def _activations(op: Op, directions: int) -> tuple[tuple[Activation, ...], ...]:
    """Of each direction; alphas and betas go in turn to the functions that take one."""
    defaults = DEFAULT_ACTIVATIONS[op.kind]
    names = op.attributes.get("activations") or defaults * directions
    if op.kind == "RNN" and directions == 1 and len(names) == 2:
        # The standard's default of both directions, written out.
        names = names[:1]
    if len(names) != len(defaults) * directions:
        raise UnsupportedOperation(
            f"{op} has {len(names)} activations; {len(defaults) * directions} would do"
        )
    alphas = iter(op.attributes.get("activation_alpha", ()))
    betas = iter(op.attributes.get("activation_beta", ()))
    activations = []
    for name in names:
        canonical = CANONICAL.get(name.lower())
        if canonical is None:
            raise UnsupportedOperation(
                f"{op} has an activation '{name}'; there are {', '.join(ACTIVATIONS)}"
            )
        alpha, beta = ACTIVATIONS[canonical]
        activations.append(
            Activation(
                canonical,
                0.0 if alpha is None else next(alphas, alpha),
                0.0 if beta is None else next(betas, beta),
            )
        )
    count = len(defaults)
    return tuple(tuple(activations[i : i + count]) for i in range(0, len(activations), count))


def _clip(op: Op) -> float | None:
    clip: float | None = op.attributes.get("clip")
    if clip is None or (op.kind == "RNN" and clip < 0):
        return None
    if op.kind != "RNN" and not clip > 0:
        raise UnsupportedOperation(
            f"{op} has a clip of {clip:g}; a positive one, or none, would do"
        )
    return clip


def _check_shapes(op: Op, layer: Layer) -> None:
    count, gates = len(layer.backward), layer.cell.gates * layer.hidden
    state = (count, layer.batch, layer.hidden)
    if _is_batch_first(op):
        state = (layer.batch, count, layer.hidden)
    expected = {
        1: (count, gates, op.input(0).shape[-1]),
        2: (count, gates, layer.hidden),
        3: (count, 2 * gates),
        4: (layer.batch,),
        5: state,
        6: state,
        7: (count, 3 * layer.hidden),
    }
    if 0 in op.input(0).shape:
        raise UnsupportedOperation(f"{op} has an empty input, {op.input(0)}; a step would do")
    hidden = op.attributes.get("hidden_size", layer.hidden)
    if hidden != layer.hidden:
        raise UnsupportedOperation(
            f"{op} has a hidden_size of {hidden}, but weights for {layer.hidden}"
        )
    for index, shape in expected.items():
        if op.has_input(index) and op.input(index).shape != shape:
            raise UnsupportedOperation(
                f"{op} reads {op.input(index)}; the shape {list(shape)} would do"
            )


def _check_lengths(op: Op, layer: Layer, constants: Mapping[str, np.ndarray]) -> None:
    array = constants.get(op.input(4).name) if op.has_input(4) else None
    if array is not None and (array.min() < 0 or array.max() > layer.steps):
        raise UnsupportedOperation(
            f"{op} has sequence lengths of {array.min()} to {array.max()};"
            f" 0 to {layer.steps} would do"
        )


def _is_batch_first(op: Op) -> bool:
    return bool(op.attributes.get("layout", 0))


def _turned(expression: Any, axes: Sequence[int]) -> Any:
    return relax.op.permute_dims(expression, axes)


def _cast(expression: Any, op: Op, layer: Layer, back: bool = False) -> Any:
    """In the type that the layer computes in, or `back` in that of the operation."""
    given = op.input(0).dtype
    if given == layer.dtype:
        return expression
    return relax.op.astype(expression, given if back else layer.dtype)


def _constant(array: np.ndarray) -> Any:
    return relax.const(to_tvm(array, array.dtype))
