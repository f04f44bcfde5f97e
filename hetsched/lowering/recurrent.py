"""LSTM, GRU and RNN unrolled over time into operations that every compiler knows.

The input projection of all steps is one MatMul; a step is one MatMul with the recurrent weights
(two in a GRU that resets before it multiplies) and elementwise operations of the same shapes at
every step, so that a compiler which fuses them generates their code once.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from hetsched.dtype import numpy_dtype, onnx_code
from hetsched.errors import UnsupportedOperation
from hetsched.graph import Graph
from hetsched.op import Op, Tensor

FLOATS = ("float16", "float32", "float64", "bfloat16")
OLDEST_OPSET = 7
# Where, and comparisons of integers.
SELECT_OPSET = 9
# Min and Max that broadcast.
BROADCAST_BOUNDS_OPSET = 8
# Before it the bounds of Slice are attributes, which TVM does not read.
SLICE_OPSET = 10
# Before it the sizes of Split are an attribute.
SIZES_AS_INPUT_OPSET = 13

# The most pieces of a Split or Concat. Compilers make one function of each, with an argument for
# each piece, and a chain of as many conditions for each element: 300 pieces take seconds to build.
WIDEST = 16

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
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
ATTRIBUTES = {
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
DIRECTIONS = {
    "forward": ("forward",),
    "reverse": ("reverse",),
    "bidirectional": ("forward", "reverse"),
}

# Which rows of the batch a step is valid for: all, none, or those where a bool[batch, 1] is true.
Mask = bool | Tensor


def lower_recurrent(graph: Graph) -> Graph:
    """`graph` with every LSTM, GRU and RNN unrolled; the same object where there is none.

    Inputs, outputs, opsets and the names of the tensors that those operations write stay; new names
    begin with the operation's. Results are those of onnxruntime's CPU kernels, to rounding, also
    where these fill a gap of the standard: the defaults of `activation_alpha` and
    `activation_beta`, and the final state of a sequence of length 0, which is zero. What
    onnxruntime lacks (`layout` 1, float64, an RNN's activations in lower case) follows the
    standard. Lengths that are known only at run time are not checked: one beyond the steps means
    all of them.

    Raises
    ------
    UnsupportedOperation
        An attribute, input or opset whose meaning is not covered.

    References
    ----------
    https://onnx.ai/onnx/operators/onnx__LSTM.html, onnx__GRU.html, onnx__RNN.html
    """
    if not any(_is_recurrent(op) for op in graph.ops):
        return graph
    builder = _Builder(graph)
    for op in graph.ops:
        if _is_recurrent(op):
            _unroll(_read(op, builder), builder)
        else:
            builder.ops.append(op)
    return builder.graph()


def _spans(count: int) -> list[slice]:
    """`count` items in runs of `WIDEST`; the last may be shorter."""
    return [slice(start, min(start + WIDEST, count)) for start in range(0, count, WIDEST)]


def _is_recurrent(op: Op) -> bool:
    return op.domain == "" and op.kind in GATES


@dataclass(frozen=True)
class _Activation:
    name: str
    alpha: float
    beta: float


@dataclass(frozen=True)
class _Layer:
    """What a recurrent operation says, checked and with its defaults filled in."""

    op: Op
    name: str
    directions: tuple[str, ...]
    activations: tuple[tuple[_Activation, ...], ...]
    clip: float | None
    batch_first: bool
    steps: int
    batch: int
    hidden: int
    dtype: str

    def optional(self, index: int) -> Tensor | None:
        return self.op.input(index) if self.op.has_input(index) else None


class _Builder:
    """Collects the operations and constants of the new graph.

    What has only constant inputs is computed at once where that makes weights ready for use.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self.ops: list[Op] = []
        self.opset = graph.opsets.get("", 1)
        self.constants = dict(graph.constants)
        self._shared: dict[tuple[str, float | tuple[int, ...]], Tensor] = {}
        self._taken = {op.name for op in graph.ops} | set(graph.constants)
        self._taken |= {tensor.name for tensor in graph.inputs}
        self._taken |= {tensor.name for op in graph.ops for tensor in op.writes}

    def graph(self) -> Graph:
        """The new graph, without the constants that only the lowered operations read."""
        read = {tensor.name for op in self.ops for tensor in op.reads}
        read |= {tensor.name for tensor in self._graph.outputs}
        lowered = {
            tensor.name for op in self._graph.ops if _is_recurrent(op) for tensor in op.reads
        }
        unread = (lowered | (self.constants.keys() - self._graph.constants.keys())) - read
        return Graph(
            name=self._graph.name,
            ops=tuple(self.ops),
            inputs=self._graph.inputs,
            outputs=self._graph.outputs,
            constants={name: array for name, array in self.constants.items() if name not in unread},
            opsets=self._graph.opsets,
        )

    def constant(self, name: str, array: np.ndarray) -> Tensor:
        name = self._unique(name)
        # A 0-d result of arithmetic is a numpy scalar, which has no flags to freeze.
        self.constants[name] = np.array(array, order="C")
        return Tensor(name, array.shape, array.dtype.name)

    def shared(self, name: str, value: float | tuple[int, ...], dtype: str) -> Tensor:
        """The constant of that name and value, made when first asked for."""
        key = name, value
        if key not in self._shared:
            self._shared[key] = self.constant(name, np.array(value, numpy_dtype(dtype)))
        return self._shared[key]

    def emit(
        self,
        kind: str,
        name: str,
        inputs: Sequence[Tensor],
        shape: tuple[int, ...] | None = None,
        dtype: str | None = None,
        **attributes: Any,
    ) -> Tensor:
        """A new operation's output; shape and dtype are the first input's unless given."""
        name = self._unique(name)
        output = Tensor(
            name,
            inputs[0].shape if shape is None else shape,
            inputs[0].dtype if dtype is None else dtype,
        )
        self.ops.append(Op(name, kind, tuple(inputs), (output,), attributes))
        return output

    def add(self, name: str, left: Tensor, right: Tensor) -> Tensor:
        if left.name in self.constants and right.name in self.constants:
            return self.constant(name, self.constants[left.name] + self.constants[right.name])
        return self.emit("Add", name, [left, right], np.broadcast_shapes(left.shape, right.shape))

    def matmul(self, name: str, left: Tensor, right: Tensor) -> Tensor:
        return self.emit("MatMul", name, [left, right], (left.shape[0], right.shape[1]))

    def reshape(self, name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
        if tensor.shape == shape:
            return tensor
        if tensor.name in self.constants:
            return self.constant(name, self.constants[tensor.name].reshape(shape))
        target = self.constant(f"{name}/shape", np.array(shape, np.int64))
        return self.emit("Reshape", name, [tensor, target], shape)

    def transpose(self, name: str, tensor: Tensor, order: tuple[int, ...]) -> Tensor:
        if tensor.name in self.constants:
            return self.constant(name, self.constants[tensor.name].transpose(order))
        shape = tuple(tensor.shape[axis] for axis in order)
        return self.emit("Transpose", name, [tensor], shape, perm=order)

    def split(
        self, names: Sequence[str], tensor: Tensor, axis: int, sizes: Sequence[int]
    ) -> list[Tensor]:
        """`tensor` cut along `axis` into pieces of `sizes`, named `names`."""
        if len(names) == 1:
            return [tensor]
        if len(names) > WIDEST and tensor.name not in self.constants:
            spans = _spans(len(names))
            totals = [sum(sizes[span]) for span in spans]
            chunks = [f"{tensor.name}/from{span.start}" for span in spans]
            return [
                piece
                for span, chunk in zip(spans, self.split(chunks, tensor, axis, totals), strict=True)
                for piece in self.split(names[span], chunk, axis, sizes[span])
            ]
        if tensor.name in self.constants:
            cuts = np.split(self.constants[tensor.name], np.cumsum(sizes)[:-1], axis)
            return [self.constant(name, cut) for name, cut in zip(names, cuts, strict=True)]
        outputs = tuple(
            Tensor(
                self._unique(name),
                (*tensor.shape[:axis], size, *tensor.shape[axis + 1 :]),
                tensor.dtype,
            )
            for name, size in zip(names, sizes, strict=True)
        )
        name = self._unique(f"{tensor.name}/Split")
        inputs: list[Tensor] = [tensor]
        attributes: dict[str, Any] = {"axis": axis}
        if self.opset >= SIZES_AS_INPUT_OPSET:
            inputs.append(self.constant(f"{name}/sizes", np.array(sizes, np.int64)))
        else:
            attributes["split"] = tuple(sizes)
        self.ops.append(Op(name, "Split", tuple(inputs), outputs, attributes))
        return list(outputs)

    def select(self, name: str, mask: Mask, yes: Tensor, no: Tensor) -> Tensor:
        """The rows of `yes` where `mask` is true, elsewhere those of `no`."""
        if isinstance(mask, bool) or yes == no:
            return yes if mask else no
        if self.opset >= SELECT_OPSET:
            return self.emit("Where", name, [mask, yes, no], yes.shape, yes.dtype)
        rows = len(self.constants[mask.name])
        chosen = np.where(self.constants[mask.name][:, 0], 0, rows) + np.arange(rows)
        both = self.concat(f"{name}/both", [yes, no], 0)
        return self.emit(
            "Gather", name, [both, self.constant(f"{name}/rows", chosen)], yes.shape, axis=0
        )

    def concat(self, name: str, tensors: Sequence[Tensor], axis: int) -> Tensor:
        if len(tensors) == 1:
            return tensors[0]
        if len(tensors) > WIDEST:
            chunks = [
                self.concat(f"{name}/from{span.start}", tensors[span], axis)
                for span in _spans(len(tensors))
            ]
            return self.concat(name, chunks, axis)
        shape = list(tensors[0].shape)
        shape[axis] = sum(tensor.shape[axis] for tensor in tensors)
        return self.emit("Concat", name, tensors, tuple(shape), axis=axis)

    def rename(self, name: str, tensor: Tensor, output: Tensor) -> None:
        """Let `output`, which the original graph defines, be `tensor`, reshaped to fit."""
        target = self.constant(f"{name}/shape", np.array(output.shape, np.int64))
        self.ops.append(Op(self._unique(name), "Reshape", (tensor, target), (output,)))

    def _unique(self, name: str) -> str:
        found, suffix = name, 0
        while found in self._taken:
            suffix += 1
            found = f"{name}_{suffix}"
        self._taken.add(found)
        return found


def _read(op: Op, builder: _Builder) -> _Layer:
    """The operation's attributes and shapes.

    Raises
    ------
    UnsupportedOperation
        What the operation says has no meaning here.
    """
    if builder.opset < OLDEST_OPSET:
        raise UnsupportedOperation(
            f"{op} is of opset {builder.opset}; convert the model to opset {OLDEST_OPSET} or newer"
        )
    unknown = sorted(op.attributes.keys() - COMMON_ATTRIBUTES - ATTRIBUTES[op.kind])
    if unknown:
        raise UnsupportedOperation(f"{op} has an attribute '{unknown[0]}', which is not known")
    direction = op.attributes.get("direction", "forward")
    if direction not in DIRECTIONS:
        raise UnsupportedOperation(
            f"{op} has the direction '{direction}'; there are {', '.join(DIRECTIONS)}"
        )
    directions = DIRECTIONS[direction]
    x, recurrent = op.input(0), op.input(2)
    if x.dtype not in FLOATS:
        raise UnsupportedOperation(f"{op} computes in {x.dtype}; {', '.join(FLOATS)} would do")
    layout = op.attributes.get("layout", 0)
    if layout not in (0, 1):
        raise UnsupportedOperation(f"{op} has layout {layout}; 0 and 1 would do")
    steps, batch = (x.shape[1], x.shape[0]) if layout else x.shape[:2]
    hidden = recurrent.shape[2]
    layer = _Layer(
        op=op,
        name=op.name or op.kind,
        directions=directions,
        activations=_activations(op, len(directions)),
        clip=_clip(op),
        batch_first=bool(layout),
        steps=steps,
        batch=batch,
        hidden=hidden,
        dtype=x.dtype,
    )
    _check_shapes(layer)
    return layer


def _activations(op: Op, directions: int) -> tuple[tuple[_Activation, ...], ...]:
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
            _Activation(
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


def _check_shapes(layer: _Layer) -> None:
    op, count, gates = layer.op, len(layer.directions), GATES[layer.op.kind] * layer.hidden
    state = (layer.batch, count, layer.hidden)
    if not layer.batch_first:
        state = (count, layer.batch, layer.hidden)
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
        tensor = layer.optional(index)
        if tensor is not None and tensor.shape != shape:
            raise UnsupportedOperation(f"{op} reads {tensor}; the shape {list(shape)} would do")


def _unroll(layer: _Layer, builder: _Builder) -> None:
    masks = _masks(layer, builder)
    x = layer.op.input(0)
    if layer.batch_first:
        x = builder.transpose(f"{layer.name}/steps_first", x, (1, 0, 2))
    x = builder.reshape(f"{layer.name}/rows", x, (layer.steps * layer.batch, x.shape[2]))
    cells = _cells(layer, builder)
    zero = builder.constant(
        f"{layer.name}/zero", np.zeros((layer.batch, layer.hidden), numpy_dtype(layer.dtype))
    )
    initial = [
        _initial(layer, builder, f"initial_{letter}", index, zero)
        for letter, index in zip(cells[0].state_names, (5, 6), strict=False)
    ]
    runs = [
        _run(cell, x, states, masks, zero)
        for cell, states in zip(cells, zip(*initial, strict=True), strict=True)
    ]
    _write(layer, builder, runs)


def _masks(layer: _Layer, builder: _Builder) -> list[Mask]:
    """Of each step, the rows of the batch that have not ended before it."""
    lengths = layer.optional(4)
    if lengths is None:
        return [True] * layer.steps
    numbers = np.arange(layer.steps, dtype=np.int32)
    if lengths.name in builder.constants:
        array = builder.constants[lengths.name]
        if array.min() < 0 or array.max() > layer.steps:
            raise UnsupportedOperation(
                f"{layer.op} has sequence lengths of {array.min()} to {array.max()};"
                f" 0 to {layer.steps} would do"
            )
        known: dict[bytes, Mask] = {}
        masks: list[Mask] = []
        for number in numbers:
            rows = array[:, None] > number
            key = rows.tobytes()
            if key not in known:
                mixed = rows.any() and not rows.all()
                known[key] = (
                    builder.constant(f"{layer.name}/valid", rows) if mixed else bool(rows.all())
                )
            masks.append(known[key])
        return masks
    if builder.opset < SELECT_OPSET:
        raise UnsupportedOperation(
            f"{layer.op} reads its sequence lengths from '{lengths.name}' at run time; constant"
            f" ones, opset {SELECT_OPSET} or an onnxruntime device would do"
        )
    # Compared for all steps at once, so that the steps differ in no constant.
    column = builder.reshape(f"{layer.name}/lengths", lengths, (1, layer.batch, 1))
    steps = builder.constant(f"{layer.name}/step_numbers", numbers[:, None, None])
    shape = (layer.steps, layer.batch, 1)
    valid = builder.emit("Greater", f"{layer.name}/valid", [column, steps], shape, "bool")
    valid = builder.reshape(f"{layer.name}/valid_rows", valid, (layer.steps * layer.batch, 1))
    names = [f"{layer.name}/step{step}/valid" for step in range(layer.steps)]
    return list(builder.split(names, valid, 0, [layer.batch] * layer.steps))


def _initial(layer: _Layer, builder: _Builder, name: str, index: int, zero: Tensor) -> list[Tensor]:
    """The initial state of each direction, [batch, hidden]."""
    state = layer.optional(index)
    if state is None:
        return [zero] * len(layer.directions)
    axis = 1 if layer.batch_first else 0
    names = [f"{layer.name}/{direction}/{name}" for direction in layer.directions]
    pieces = builder.split(names, state, axis, [1] * len(names))
    return [
        builder.reshape(f"{name}_2d", piece, (layer.batch, layer.hidden))
        for name, piece in zip(names, pieces, strict=True)
    ]


def _per_direction(layer: _Layer, builder: _Builder, name: str, tensor: Tensor) -> list[Tensor]:
    """An input [directions, ...] cut along its first axis, which is dropped."""
    names = [f"{layer.name}/{direction}/{name}" for direction in layer.directions]
    pieces = builder.split(names, tensor, 0, [1] * len(names))
    return [
        builder.reshape(f"{name}/squeezed", piece, piece.shape[1:])
        for name, piece in zip(names, pieces, strict=True)
    ]


@dataclass(frozen=True)
class _Cell(ABC):
    """One direction of a layer: its weights, transposed to [inputs, gates * hidden], and a step.

    A bias is [gates * hidden], the peepholes are [3 * hidden].
    """

    state_names: ClassVar[tuple[str, ...]] = ("h",)

    name: str
    layer: _Layer
    builder: _Builder
    reverse: bool
    activations: tuple[_Activation, ...]
    input_weights: Tensor
    recurrent_weights: Tensor
    input_bias: Tensor | None
    recurrent_bias: Tensor | None
    peepholes: Tensor | None

    @property
    def projected_bias(self) -> Tensor | None:
        """What the projection adds for all steps at once: both biases where they meet in a sum."""
        if self.input_bias is None or self.recurrent_bias is None:
            return None
        return self.builder.add(f"{self.name}/bias", self.input_bias, self.recurrent_bias)

    @abstractmethod
    def step(
        self, name: str, projected: Sequence[Tensor], states: Sequence[Tensor]
    ) -> list[Tensor]:
        """The states after a step, in the order of `state_names`; the first is the output."""

    @property
    def projected_widths(self) -> tuple[int, ...]:
        """Where the projection is cut for all steps at once, so that no step need do it."""
        return (self.input_weights.shape[1],)

    def project(self, rows: Tensor) -> list[tuple[Tensor, ...]]:
        """What the input adds to the gates at each step, a [batch, width] for each width."""
        layer, builder, widths = self.layer, self.builder, self.projected_widths
        projected = builder.matmul(f"{self.name}/projected", rows, self.input_weights)
        bias = self.projected_bias
        if bias is not None:
            projected = builder.add(f"{self.name}/projected_biased", projected, bias)
        names = [f"{self.name}/projected{index}" for index in range(len(widths))]
        parts = [
            builder.split(
                [f"{self.name}/step{step}/projected{index}" for step in range(layer.steps)],
                part,
                0,
                [layer.batch] * layer.steps,
            )
            for index, part in enumerate(builder.split(names, projected, 1, widths))
        ]
        return list(zip(*parts, strict=True))

    def cut(self, names: Sequence[str], tensor: Tensor, widths: Sequence[int]) -> list[Tensor]:
        """`tensor` cut into gates.

        By Slice if possible: it fuses into what reads the gate, where Split is a kernel of its own.
        """
        if self.builder.opset < SLICE_OPSET:
            return self.builder.split(names, tensor, 1, widths)
        pieces, start = [], 0
        for name, width in zip(names, widths, strict=True):
            bounds = [self.index("from", start), self.index("to", start + width)]
            inputs = [tensor, *bounds, self.index("axis", 1)]
            pieces.append(self.builder.emit("Slice", name, inputs, (tensor.shape[0], width)))
            start += width
        return pieces

    def clip(self, name: str, tensor: Tensor) -> Tensor:
        bound = self.layer.clip
        if bound is None:
            return tensor
        if self.builder.opset < BROADCAST_BOUNDS_OPSET:
            return self.builder.emit("Clip", f"{name}/clipped", [tensor], min=-bound, max=bound)
        high = self.builder.emit("Min", f"{name}/below_clip", [tensor, self.scalar("clip", bound)])
        return self.builder.emit("Max", f"{name}/clipped", [high, self.scalar("-clip", -bound)])

    def activate(self, name: str, tensor: Tensor, index: int) -> Tensor:
        """The activation function at `index` of `tensor`.

        Those that old opsets lack, or that compilers know in float32 only, are written out.
        """
        function, emit = self.activations[index], self.builder.emit
        name = f"{name}/{function.name}"

        def times(x: Tensor, factor: float, letter: str) -> Tensor:
            return emit("Mul", f"{name}/{letter}", [x, self.scalar(f"{letter}{index}", factor)])

        if function.name == "Affine":
            product = times(tensor, function.alpha, "alpha")
            return emit("Add", name, [product, self.scalar(f"beta{index}", function.beta)])
        if function.name == "ScaledTanh":
            tanh = emit("Tanh", name, [times(tensor, function.beta, "beta")])
            return times(tanh, function.alpha, "alpha")
        if function.name == "Elu":
            positive = emit("Relu", f"{name}/positive", [tensor])
            minus = emit("Relu", f"{name}/minus", [emit("Neg", f"{name}/flipped", [tensor])])
            power = emit("Exp", f"{name}/exp", [emit("Neg", f"{name}/negative", [minus])])
            power = emit("Sub", f"{name}/exp_less_one", [power, self.scalar("one", 1.0)])
            return emit("Add", name, [positive, times(power, function.alpha, "alpha")])
        if function.name == "ThresholdedRelu":
            alpha = self.scalar(f"alpha{index}", function.alpha)
            above = emit("Greater", f"{name}/above", [tensor, alpha], dtype="bool")
            if self.builder.opset >= SELECT_OPSET:
                inputs = [above, tensor, self.scalar("nought", 0.0)]
                return emit("Where", name, inputs, tensor.shape, tensor.dtype)
            code = onnx_code(tensor.dtype)
            factor = emit("Cast", f"{name}/factor", [above], dtype=tensor.dtype, to=code)
            return emit("Mul", name, [tensor, factor])
        attributes: dict[str, Any] = {}
        if function.name in ("LeakyRelu", "HardSigmoid"):
            attributes["alpha"] = function.alpha
        if function.name == "HardSigmoid":
            attributes["beta"] = function.beta
        return emit(function.name, name, [tensor], **attributes)

    def scalar(self, name: str, value: float) -> Tensor:
        return self.builder.shared(f"{self.name}/{name}", value, self.layer.dtype)

    def index(self, name: str, value: int) -> Tensor:
        return self.builder.shared(f"{self.name}/{name}{value}", (value,), "int64")


@dataclass(frozen=True)
class _Rnn(_Cell):
    """h' = f(x W + h R + b)."""

    def step(
        self, name: str, projected: Sequence[Tensor], states: Sequence[Tensor]
    ) -> list[Tensor]:
        builder, (h,) = self.builder, states
        recurrent = builder.matmul(f"{name}/recurrent", h, self.recurrent_weights)
        total = self.clip(name, builder.add(f"{name}/gates", projected[0], recurrent))
        return [self.activate(f"{name}/h", total, 0)]


@dataclass(frozen=True)
class _Gru(_Cell):
    """h' = (1 - z) g(x W + (r h) R + b) + z h, with z the update and r the reset gate.

    Linear before reset: r (h R + b) in place of (r h) R.
    """

    @property
    def linear_before_reset(self) -> bool:
        return bool(self.layer.op.attributes.get("linear_before_reset", 0))

    @property
    def projected_bias(self) -> Tensor | None:
        return self.input_bias if self.linear_before_reset else super().projected_bias

    @property
    def projected_widths(self) -> tuple[int, ...]:
        return 2 * self.layer.hidden, self.layer.hidden

    @cached_property
    def split_weights(self) -> list[Tensor]:
        """The recurrent weights of both gates, and those of the new state."""
        hidden = self.layer.hidden
        names = [f"{self.name}/recurrent_weights_{gates}" for gates in ("zr", "h")]
        return self.builder.split(names, self.recurrent_weights, 1, [2 * hidden, hidden])

    def step(
        self, name: str, projected: Sequence[Tensor], states: Sequence[Tensor]
    ) -> list[Tensor]:
        builder, (h,), (x_zr, x_h) = self.builder, states, projected
        hidden = self.layer.hidden
        if self.linear_before_reset:
            recurrent = builder.matmul(f"{name}/recurrent", h, self.recurrent_weights)
            if self.recurrent_bias is not None:
                recurrent = builder.add(f"{name}/recurrent_biased", recurrent, self.recurrent_bias)
            names = [f"{name}/recurrent_{gates}" for gates in ("zr", "h")]
            h_zr, h_h = self.cut(names, recurrent, [2 * hidden, hidden])
        else:
            h_zr = builder.matmul(f"{name}/recurrent_zr", h, self.split_weights[0])
        total = self.clip(f"{name}/zr", builder.add(f"{name}/gates", x_zr, h_zr))
        gates = self.activate(f"{name}/zr", total, 0)
        z, r = self.cut([f"{name}/z", f"{name}/r"], gates, [hidden, hidden])
        if self.linear_before_reset:
            new = builder.emit("Mul", f"{name}/reset", [r, h_h])
        else:
            reset = builder.emit("Mul", f"{name}/reset", [r, h])
            new = builder.matmul(f"{name}/recurrent_h", reset, self.split_weights[1])
        new = self.clip(f"{name}/new", builder.add(f"{name}/new", x_h, new))
        new = self.activate(f"{name}/new", new, 1)
        rest = builder.emit("Sub", f"{name}/one_less_z", [self.scalar("one", 1.0), z], z.shape)
        new = builder.emit("Mul", f"{name}/h_new", [rest, new])
        return [builder.add(f"{name}/h", new, builder.emit("Mul", f"{name}/h_kept", [z, h]))]


@dataclass(frozen=True)
class _Lstm(_Cell):
    """c' = f c + i g(x W + h R + b), h' = o h(c'), with i, o, f the input, output, forget gate.

    Through peepholes i and f see c, and o sees c'.
    """

    state_names = ("h", "c")

    @cached_property
    def split_peepholes(self) -> list[Tensor] | None:
        """Those of the input, output and forget gate."""
        if self.peepholes is None:
            return None
        names = [f"{self.name}/peephole_{gate}" for gate in "iof"]
        return self.builder.split(names, self.peepholes, 0, [self.layer.hidden] * 3)

    def step(
        self, name: str, projected: Sequence[Tensor], states: Sequence[Tensor]
    ) -> list[Tensor]:
        builder, (h, c) = self.builder, states
        recurrent = builder.matmul(f"{name}/recurrent", h, self.recurrent_weights)
        total = builder.add(f"{name}/gates", projected[0], recurrent)
        names = [f"{name}/gates/{gate}" for gate in "iofg"]
        i, o, f, g = self.cut(names, total, [self.layer.hidden] * 4)
        i = self._gate(f"{name}/i", i, 0, c)
        if self.layer.op.attributes.get("input_forget", 0):
            f = builder.emit("Sub", f"{name}/one_less_i", [self.scalar("one", 1.0), i], i.shape)
        else:
            f = self._gate(f"{name}/f", f, 2, c)
        g = self.activate(f"{name}/g", self.clip(f"{name}/g", g), 1)
        kept = builder.emit("Mul", f"{name}/c_kept", [f, c])
        c = builder.add(f"{name}/c", kept, builder.emit("Mul", f"{name}/c_new", [i, g]))
        o = self._gate(f"{name}/o", o, 1, c)
        return [builder.emit("Mul", f"{name}/h", [o, self.activate(f"{name}/c", c, 2)]), c]

    def _gate(self, name: str, total: Tensor, index: int, cell: Tensor) -> Tensor:
        if self.split_peepholes is not None:
            seen = self.builder.emit("Mul", f"{name}/seen", [cell, self.split_peepholes[index]])
            total = self.builder.add(f"{name}/peephole", total, seen)
        return self.activate(name, self.clip(name, total), 0)


CELLS: Mapping[str, type[_Cell]] = {"LSTM": _Lstm, "GRU": _Gru, "RNN": _Rnn}


def _cells(layer: _Layer, builder: _Builder) -> list[_Cell]:
    """The cell of each direction."""
    weights = _per_direction(layer, builder, "W", layer.op.input(1))
    recurrent = _per_direction(layer, builder, "R", layer.op.input(2))
    bias, peepholes = layer.optional(3), layer.optional(7)
    biases = _per_direction(layer, builder, "B", bias) if bias else None
    peephole = _per_direction(layer, builder, "P", peepholes) if peepholes else None
    cells = []
    for index, direction in enumerate(layer.directions):
        name = f"{layer.name}/{direction}"
        input_bias = recurrent_bias = None
        if biases:
            names = [f"{name}/input_bias", f"{name}/recurrent_bias"]
            sizes = [biases[index].size // 2] * 2
            input_bias, recurrent_bias = builder.split(names, biases[index], 0, sizes)
        cells.append(
            CELLS[layer.op.kind](
                name=name,
                layer=layer,
                builder=builder,
                reverse=direction == "reverse",
                activations=layer.activations[index],
                input_weights=builder.transpose(f"{name}/input_weights", weights[index], (1, 0)),
                recurrent_weights=builder.transpose(
                    f"{name}/recurrent_weights", recurrent[index], (1, 0)
                ),
                input_bias=input_bias,
                recurrent_bias=recurrent_bias,
                peepholes=peephole[index] if peephole else None,
            )
        )
    return cells


def _run(
    cell: _Cell, rows: Tensor, states: Sequence[Tensor], masks: Sequence[Mask], zero: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """The output of each step, in the order of time, and the states after the last valid one."""
    select, steps = cell.builder.select, range(cell.layer.steps)
    projected = cell.project(rows)
    outputs = dict.fromkeys(steps, zero)
    for step in reversed(steps) if cell.reverse else steps:
        mask, name = masks[step], f"{cell.name}/step{step}"
        if mask is False:
            continue
        new = cell.step(name, projected[step], states)
        states = [
            select(f"{name}/{state}_held", mask, after, before)
            for state, after, before in zip(cell.state_names, new, states, strict=True)
        ]
        outputs[step] = select(f"{name}/output", mask, new[0], zero)
    # A sequence that is not valid even at the first step has no last state.
    final = [
        select(f"{cell.name}/{state}_final", masks[0], after, zero)
        for state, after in zip(cell.state_names, states, strict=True)
    ]
    return [outputs[step] for step in steps], final


def _write(
    layer: _Layer, builder: _Builder, runs: Sequence[tuple[list[Tensor], list[Tensor]]]
) -> None:
    """The outputs of the operation that are there, from those of each direction."""
    count, steps, batch, hidden = len(runs), layer.steps, layer.batch, layer.hidden
    for index, output in enumerate(layer.op.outputs):
        if output is None:
            continue
        name = f"{layer.name}/{('Y', 'Y_h', 'Y_c')[index]}"
        if index == 0:
            sequences = [
                builder.reshape(
                    f"{name}/{direction}",
                    builder.concat(f"{name}/{direction}_rows", outputs, 0),
                    (steps, 1, batch, hidden),
                )
                for direction, (outputs, _) in zip(layer.directions, runs, strict=True)
            ]
            whole = builder.concat(f"{name}/directions", sequences, 1)
        else:
            states = [final[index - 1] for _, final in runs]
            rows = builder.concat(f"{name}/rows", states, 0)
            whole = builder.reshape(name, rows, (count, batch, hidden))
        if layer.batch_first:
            # The batch comes first, whatever is before it moves back by one.
            order = (2, 0, 1, 3) if index == 0 else (1, 0, 2)
            whole = builder.transpose(f"{name}/batch_first", whole, order)
        builder.rename(name, whole, output)
