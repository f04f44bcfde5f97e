"""Plans which tensors of a module have their channels in blocks of vectors.

Convolutions with constant weights ask for blocks and make them; pooling, elementwise operations
and aligned concatenations keep them; anything else gets the plain tensor back. So conversions
stand only where the two meet.

Importing this file loads TVM's compiler.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import lcm, prod
from typing import Any

import numpy as np
from tvm import ir, relax, te, tirx

from hetsched.op import in_blocks
from hetsched.schedules import blocks, convolution, pooling, winograd
from hetsched.schedules.cycles import Form, Window, convolutions, dense_tiles, phase_window, tiles
from hetsched.schedules.loops import shape_of
from hetsched.schedules.rules import Choice, Rules
from hetsched.schedules.vectors import Tile
from hetsched.tvm_runtime import to_numpy, to_tvm

# Those of one tensor, or of tensors that broadcast. What fills the last block up with may become
# anything finite, as weights are zero there.
ELEMENTWISE = frozenset(
    f"relax.{name}"
    for name in "add subtract multiply minimum maximum negative abs clip sigmoid tanh erf nn.relu "
    "nn.gelu nn.silu nn.leakyrelu".split()
)
# Functions that the importer makes of Clip.
BOUNDS = {"maximum": tirx.max, "minimum": tirx.min}
CHANNELS_FIRST = ("NCHW", "NCW")
# The axis behind the channels: its elements lie behind each other in a block, as whole rows do.
ROWS = 2
# More channels than these in a group of a grouped convolution are not worth zeros between groups.
MOST_MERGED = 64


@dataclass
class _Form:
    """A tensor: plain, blocked, or both. `shape` is that of the plain one, [n, c, h, w]."""

    plain: Any = None
    blocked: Any = None
    shape: tuple[int, ...] = ()


def blocked(
    module: Any, rules: Rules, inputs: Collection[int] = (), outputs: Collection[int] = ()
) -> Any:
    """`module` with convolutions, and what can stay between them, on blocked tensors.

    `main` takes those of `inputs`, positions of its parameters, and gives those of `outputs` in
    blocks.
    """
    main = module["main"]
    idle = not any(_name(b.value) in HANDLERS for block in main.body.blocks for b in block.bindings)
    if idle and not inputs and not outputs:
        return module
    return _Planner(module, rules).planned(inputs, outputs)


class _Planner:
    """Writes `main` anew, binding by binding."""

    def __init__(self, module: Any, rules: Rules) -> None:
        self._module = module
        self.rules = rules
        self.lanes = rules.vectors.lanes
        self.builder = relax.BlockBuilder(module)
        self._forms: dict[Any, _Form] = {}
        # Variables that stand for tuples.
        self._tuples: dict[Any, Any] = {}

    def planned(self, inputs: Collection[int], outputs: Collection[int]) -> Any:
        old = self._module["main"]
        variable = self._module.get_global_var("main")
        parameters = list(old.params)
        for index, parameter in enumerate(old.params):
            shape = shape_of(parameter) or ()
            self._forms[parameter] = _Form(plain=parameter, shape=shape)
            if index in inputs:
                given = relax.TensorType(in_blocks(shape, self.lanes), "float32")
                parameters[index] = relax.Var(parameter.name, given)
                self._forms[parameter] = _Form(blocked=parameters[index], shape=shape)
        with self.builder.function("main_blocked", parameters):
            with self.builder.dataflow():
                for block in old.body.blocks:
                    for binding in block.bindings:
                        self._bind(binding.var, binding.value)
                result = self.builder.emit_output(self._results(old.body.body, outputs))
            self.builder.emit_func_output(result)
        module = self.builder.get()
        made = module["main_blocked"]
        for attribute, value in (old.attrs or {}).items():
            made = made.with_attr(attribute, value)
        functions = {v: f for v, f in module.functions.items() if v.name_hint != "main_blocked"}
        functions = {v: f for v, f in functions.items() if v.name_hint != "main"}
        return type(module)({**functions, variable: made.with_attr("global_symbol", "main")})

    def _results(self, value: Any, outputs: Collection[int]) -> Any:
        """What `main` gives, those of `outputs` in blocks."""
        value = self._tuples.get(value, value)
        if not isinstance(value, relax.Tuple):
            return self.blocked(value) if outputs else self.plain(value)
        fields = enumerate(value.fields)
        return relax.Tuple([(self.blocked if i in outputs else self.plain)(f) for i, f in fields])

    def _bind(self, variable: Any, value: Any) -> None:
        if isinstance(value, relax.Var):
            self._forms[variable] = self._forms[value]
            return
        if isinstance(value, relax.Tuple):
            self._tuples[variable] = value
        handler = HANDLERS.get(_name(value))
        made = None if handler is None else handler(self, value, shape_of(variable))
        if made is not None:
            self._forms[variable] = _Form(blocked=made, shape=shape_of(variable) or ())
            return
        self._forms[variable] = _Form(plain=self.builder.emit(self.plain(value)))

    def plain(self, value: Any) -> Any:
        """An expression over plain tensors."""
        if isinstance(value, relax.Var):
            form = self._forms[value]
            if form.plain is None:
                image = _image(form.shape)
                form.plain = self.call(blocks.unpack, form.blocked, shape=image)
                if image != form.shape:
                    form.plain = self.builder.emit(relax.op.reshape(form.plain, form.shape))
            return form.plain
        if isinstance(value, relax.Tuple):
            return relax.Tuple([self.plain(field) for field in value.fields])
        if isinstance(value, relax.TupleGetItem):
            return relax.TupleGetItem(self.plain(value.tuple_value), value.index)
        if isinstance(value, relax.Call):
            arguments = [self.plain(argument) for argument in value.args]
            return relax.Call(value.op, arguments, value.attrs, value.ty_args)
        return value

    def blocked(self, value: Any) -> Any:
        if not isinstance(value, relax.Var):
            return self.call(blocks.pack, self.plain(value), lanes=self.lanes)
        form = self._forms[value]
        if form.blocked is None:
            form.shape = shape_of(value) or ()
            tensor, image = form.plain, _image(form.shape)
            if image != form.shape:
                tensor = self.builder.emit(relax.op.reshape(tensor, image))
            form.blocked = self.call(blocks.pack, tensor, lanes=self.lanes)
        return form.blocked

    def shape(self, value: Any) -> tuple[int, ...]:
        """The shape of a tensor where it is plain."""
        form = self._forms[value]
        return form.shape or shape_of(value) or ()

    def is_blocked(self, value: Any) -> bool:
        return isinstance(value, relax.Var) and self._forms[value].blocked is not None

    def call(self, function: Callable[..., Any], *tensors: Any, **options: Any) -> Any:
        return self.builder.emit_te(
            lambda *x: function(*x, **options), *tensors, primfunc_name_hint=function.__name__
        )

    def constant(self, array: np.ndarray) -> Any:
        return relax.const(to_tvm(np.ascontiguousarray(array), np.dtype("float32")))


def _convolution(plan: _Planner, call: Any, result: tuple[int, ...] | None) -> Any:
    data, weights = call.args
    shape = shape_of(data)
    if shape is None or result is None or not isinstance(data, relax.Var):
        return None
    if not isinstance(weights, ir.GenericConst) or not _is_channels_first(call.attrs):
        return None
    array = to_numpy(weights.value)
    array = array.reshape(*array.shape[:2], *_image(array.shape)[2:])
    lanes = plan.lanes
    groups = int(call.attrs.groups)
    channels, outputs = shape[1], result[1]
    window = _window(call.attrs, array.shape[2:], shape, result)
    if window.source[1] == window.result[1] == window.kernel[1] == 1:
        # A column is stored as a row is, and tiles are of pixels of a row.
        window, array = window.turned, array.transpose(0, 1, 3, 2)
    if groups == channels == outputs and groups > 1:
        packed = plan.constant(convolution.pack_depthwise(array, lanes))
        choice = plan.rules.choose(
            f"depthwise {shape[0]}x{channels} {window.text}", tiles(window, plan.rules.vectors)
        )
        return plan.call(
            convolution.depthwise, plan.blocked(data), packed, window=window, choice=choice
        )
    if groups > 1:
        merged = _merged(array, groups, lanes)
        if merged is None:
            source = plan.blocked(data)
            packed = convolution.pack_uneven(array, groups, lanes)
            choice = _dense_choice(plan, source, len(packed), 1, window, groups)
            each = (outputs // groups, channels // groups)
            return _dense(plan, source, packed, window, groups, choice, uneven=each)
        array, groups = merged
    plain = groups == 1 and channels * 2 <= lanes and not plan.is_blocked(data)
    if plain:
        source = plan.plain(data)
        image = (*shape[:2], *window.source)
        if shape != image:
            source = plan.builder.emit(relax.op.reshape(source, image))
    else:
        source = plan.blocked(data)
    each_blocks = plan.rules.vectors.blocks(outputs // groups)
    choice = _dense_choice(
        plan, source, each_blocks * groups, each_blocks, window, groups,
        plain=plain, by_transform=groups == 1 and not plain,
    )  # fmt: skip
    if isinstance(choice.candidate, Form):
        turned = plan.constant(winograd.transformed(array, choice.candidate, lanes))
        return plan.call(
            winograd.convolution, source, turned,
            window=window, choice=choice, threads=plan.rules.threads,
        )  # fmt: skip
    packed = convolution.pack_dense(array, groups, lanes, plain=plain)
    return _dense(plan, source, packed, window, groups, choice, plain=plain)


def _dense(
    plan: _Planner,
    source: Any,
    packed: np.ndarray,
    window: Window,
    groups: int,
    choice: Choice[Tile],
    *,
    plain: bool = False,
    uneven: tuple[int, int] | None = None,
    phases: convolution.Phases | None = None,
) -> Any:
    return plan.call(
        convolution.dense, source, plan.constant(convolution.interleave(packed, choice)),
        window=window, groups=groups, choice=choice, plain=plain, uneven=uneven, phases=phases,
    )  # fmt: skip


def _dense_choice(
    plan: _Planner,
    source: Any,
    outputs: int,
    together: int,
    window: Window,
    groups: int,
    *,
    plain: bool = False,
    shifted: bool = False,
    by_transform: bool = False,
) -> Choice[Any]:
    """How to compute `outputs` blocks of channels, of which `together` read the same channels."""
    batch, channels, *_ = (int(dim) for dim in source.ty.shape)
    found: list[Any] = dense_tiles(
        window, together, plan.rules.vectors, plain=plain, shifted=shifted
    )
    if by_transform:
        found = convolutions((batch, channels, outputs), window, found, plan.rules)
    return plan.rules.choose(
        f"dense {batch}x{channels}x{outputs} {window.text} groups {groups} plain {plain}", found
    )


def _transposed(plan: _Planner, call: Any, result: tuple[int, ...] | None) -> Any:
    data, weights = call.args
    shape = shape_of(data)
    if shape is None or result is None or not isinstance(data, relax.Var):
        return None
    if not isinstance(weights, ir.GenericConst) or int(call.attrs.groups) != 1:
        return None
    if str(call.attrs.data_layout) not in CHANNELS_FIRST or not str(
        call.attrs.kernel_layout
    ).startswith("IO"):
        return None
    array = to_numpy(weights.value)
    array = array.reshape(*array.shape[:2], *_image(array.shape)[2:])
    window = _window(call.attrs, array.shape[2:], shape, result)
    if set(window.dilations) != {1}:
        return None
    if window.source == (1, 1):
        # One pixel makes the whole kernel, whatever the stride.
        window = replace(window, strides=window.kernel)
    packed = convolution.pack_phases(array, window, plan.lanes)
    phases = convolution.Phases(window.strides, window.padding[:2])
    shifted = any(phases.shift(phases.count - 1))
    small = phase_window(window)
    source, outputs = plan.blocked(data), len(packed)
    together = outputs // phases.count if shifted else outputs
    choice = _dense_choice(plan, source, outputs, together, small, 1, shifted=shifted)
    made = _dense(plan, source, packed, small, 1, choice, phases=phases if shifted else None)
    return plan.call(convolution.interleaved, made, window=window)


def _merged(weights: np.ndarray, groups: int, lanes: int) -> tuple[np.ndarray, int] | None:
    """Weights of fewer groups, of whole blocks of channels, with zeros between the old ones."""
    outputs, inputs = weights.shape[0] // groups, weights.shape[1]
    together = lcm(lcm(inputs, lanes) // inputs, lcm(outputs, lanes) // outputs)
    if groups % together or (together > 1 and together * inputs > MOST_MERGED):
        return None
    found = np.zeros((weights.shape[0], together * inputs, *weights.shape[2:]), weights.dtype)
    for index in range(groups):
        rows = slice(index * outputs, (index + 1) * outputs)
        start = index % together * inputs
        found[rows, start : start + inputs] = weights[rows]
    return found, groups // together


def _max_pool(plan: _Planner, call: Any, result: tuple[int, ...] | None) -> Any:
    window = _pool_window(plan, call, result)
    if window is None:
        return None
    choice = _pool_choice(plan, "max", window, call.args[0])
    return plan.call(pooling.max_pool, plan.blocked(call.args[0]), window=window, choice=choice)


def _average_pool(plan: _Planner, call: Any, result: tuple[int, ...] | None) -> Any:
    window = _pool_window(plan, call, result)
    if window is None or call.attrs.ceil_mode or set(window.dilations) != {1}:
        return None
    return plan.call(
        pooling.average_pool, plan.blocked(call.args[0]),
        window=window, choice=_pool_choice(plan, "average", window, call.args[0]),
        padding_counts=bool(call.attrs.count_include_pad),
    )  # fmt: skip


def _pool_choice(plan: _Planner, kind: str, window: Window, data: Any) -> Choice[Tile]:
    batch, channels, *_ = (int(dim) for dim in data.ty.shape)
    return plan.rules.choose(
        f"{kind} pool {batch}x{channels} {window.text}", tiles(window, plan.rules.vectors)
    )


def _pool_window(plan: _Planner, call: Any, result: tuple[int, ...] | None) -> Window | None:
    data = call.args[0]
    shape = shape_of(data)
    if shape is None or result is None or not isinstance(data, relax.Var):
        return None
    if not _is_channels_first(call.attrs):
        return None
    return _window(call.attrs, tuple(map(int, call.attrs.pool_size)), shape, result)


def _mean(plan: _Planner, call: Any, result: tuple[int, ...] | None) -> Any:
    data = call.args[0]
    if result is None or not plan.is_blocked(data) or not call.attrs.keepdims:
        return None
    rank = len(result)
    if sorted(int(axis) % rank for axis in call.attrs.axis or ()) != list(range(2, rank)):
        return None
    return plan.call(pooling.global_pool, plan.blocked(data))


def _elementwise(plan: _Planner, call: Any, result: tuple[int, ...] | None) -> Any:
    if result is None or not any(plan.is_blocked(argument) for argument in call.args):
        return None
    arguments = _aligned(plan, call.args, result)
    if arguments is None:
        return None
    return plan.builder.emit(relax.Call(call.op, arguments, call.attrs, call.ty_args))


def _divide(plan: _Planner, call: Any, result: tuple[int, ...] | None) -> Any:
    divisor = call.args[1]
    if isinstance(divisor, ir.GenericConst) and prod(divisor.ty.shape) == 1:
        return _elementwise(plan, call, result)
    return _partial(plan, call, result)


def _partial(plan: _Planner, call: Any, result: tuple[int, ...] | None) -> Any:
    """An operation that what fills up the last block may not be fit for: there must be none."""
    if result is None or len(result) < 2 or result[1] % plan.lanes:
        return None
    return _elementwise(plan, call, result)


def _bound(plan: _Planner, call: Any, result: tuple[int, ...] | None) -> Any:
    """The importer's maximum or minimum of a tensor and a constant."""
    bound = BOUNDS.get(call.args[0].name_hint.rstrip("0123456789"))
    given = call.args[1]
    operands: Sequence[Any] = given.fields if isinstance(given, relax.Tuple) else ()
    if bound is None or len(operands) != 2 or not plan.is_blocked(operands[0]):
        return None
    data, limit = operands
    if not isinstance(limit, ir.GenericConst) or result is None or shape_of(data) != result:
        return None
    array = to_numpy(limit.value)
    if array.size != 1 or str(array.dtype) != "float32":
        return None
    value = tirx.const(float(array.reshape(())), "float32")
    return plan.builder.emit_te(
        lambda x: te.compute(x.shape, lambda *i: bound(x[i], value), name="bounded"),
        plan.blocked(data),
    )


def _concat(plan: _Planner, call: Any, result: tuple[int, ...] | None) -> Any:
    if result is None or not isinstance(call.args[0], relax.Tuple):
        return None
    parts = call.args[0].fields
    shapes = [shape_of(part) for part in parts]
    axis = int(call.attrs.axis) % len(result)
    if axis > ROWS or not all(map(plan.is_blocked, parts)):
        return None
    if axis == 1 and any(shape is None or shape[1] % plan.lanes for shape in shapes[:-1]):
        return None
    return plan.builder.emit(relax.op.concat([plan.blocked(part) for part in parts], axis=axis))


def _slice(plan: _Planner, call: Any, result: tuple[int, ...] | None) -> Any:
    """Rows, channels from one block to another, or images of the batch."""
    data, *given = call.args
    if result is None or len(given) != len("axes begin end strides".split()):
        return None
    if not plan.is_blocked(data) or any(isinstance(item, relax.Var) for item in given):
        return None
    shape = plan.shape(data)
    axes, begins, _, strides = ([int(value) for value in item.fields] for item in given)
    starts = [0] * 3
    for axis, begin, stride in zip(axes, begins, strides, strict=True):
        axis %= len(shape)
        if axis > ROWS or stride != 1:
            return None
        starts[axis] = max(0, begin + shape[axis] if begin < 0 else begin)
    whole = starts[1] + result[1] == shape[1] or result[1] % plan.lanes == 0
    if starts[1] % plan.lanes or not whole:
        return None
    starts[1] //= plan.lanes
    starts[ROWS] *= prod(shape[ROWS + 1 :])
    return plan.call(
        blocks.cut, plan.blocked(data), starts=starts, shape=in_blocks(result, plan.lanes)
    )


def _aligned(plan: _Planner, arguments: Sequence[Any], result: tuple[int, ...]) -> list[Any] | None:
    """Arguments of an operation on blocked tensors, broadcast only over pixels or by constants."""
    channels = result[1]
    lanes = plan.lanes
    aligned: list[Any] = []
    for argument in arguments:
        shape = shape_of(argument)
        if isinstance(argument, relax.Var):
            same = shape is not None and len(shape) == len(result) and shape[:2] == result[:2]
            if not same or shape is None or shape[2:] not in (result[2:], (1,) * len(result[2:])):
                return None
            aligned.append(argument)
        elif isinstance(argument, ir.GenericConst):
            array = to_numpy(argument.value)
            if array.size == 1:
                aligned.append(plan.constant(array.reshape(())))
            elif shape is not None and array.size == channels and _is_of_channels(shape, result):
                padded = np.pad(array.reshape(-1), (0, -channels % lanes))
                aligned.append(plan.constant(padded.reshape(1, -1, 1, lanes)))
            else:
                return None
        else:
            aligned.append(argument)
    return [plan.blocked(item) if isinstance(item, relax.Var) else item for item in aligned]


def _is_of_channels(shape: tuple[int, ...], result: tuple[int, ...]) -> bool:
    padded = (1,) * (len(result) - len(shape)) + shape
    return padded[1] == result[1] and prod(padded) == result[1]


HANDLERS: Mapping[str, Callable[[_Planner, Any, tuple[int, ...] | None], Any]] = {
    "relax.nn.conv1d": _convolution,
    "relax.nn.conv2d": _convolution,
    "relax.nn.conv1d_transpose": _transposed,
    "relax.nn.conv2d_transpose": _transposed,
    "relax.nn.max_pool1d": _max_pool,
    "relax.nn.max_pool2d": _max_pool,
    "relax.nn.avg_pool1d": _average_pool,
    "relax.nn.avg_pool2d": _average_pool,
    "relax.mean": _mean,
    "relax.concat": _concat,
    "relax.strided_slice": _slice,
    "relax.call_tir": _bound,
    "relax.divide": _divide,
    "relax.sqrt": _partial,
    **dict.fromkeys(ELEMENTWISE, _elementwise),
}


def _window(
    attributes: Any, kernel: Sequence[int], shape: tuple[int, ...], result: tuple[int, ...]
) -> Window:
    padding = [int(size) for size in attributes.padding]
    before, after = padding[: len(padding) // 2], padding[len(padding) // 2 :]
    return Window(
        kernel=_pair(kernel, 1),
        strides=_pair(attributes.strides, 1),
        dilations=_pair(attributes.dilation, 1),
        padding=(*_pair(before, 0), *_pair(after, 0)),
        source=_pair(shape[2:], 1),
        result=_pair(result[2:], 1),
    )


def _pair(sizes: Sequence[Any], filler: int) -> tuple[int, int]:
    *first, last = (int(size) for size in sizes)
    return (first[0] if first else filler, last)


def _image(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape [n, c, h, w] of a tensor of one or two spatial dimensions."""
    return shape if len(shape) == 4 else (*shape[:2], 1, *shape[2:])


def _is_channels_first(attributes: Any) -> bool:
    layout = str(getattr(attributes, "data_layout", "") or attributes.layout)
    kernel = str(getattr(attributes, "kernel_layout", "OI"))
    return layout in CHANNELS_FIRST and kernel.startswith("OI")


def _name(value: Any) -> str:
    return getattr(getattr(value, "op", None), "name", "")
