"""Operations on integers as functions of Relax: with kernels of their own, or else in plain int32.

Importing this file loads TVM's compiler.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from tvm import ir, relax, te, tirx

from hetsched.dtype import numpy_dtype
from hetsched.lowering.quantized import BYTES, addition
from hetsched.schedules import integer
from hetsched.schedules.cycles import Window
from hetsched.schedules.vectors import Vectors
from hetsched.tvm_runtime import to_numpy, to_tvm

Shape = tuple[int, ...]


@dataclass(frozen=True)
class _Source:
    """What a tensor of bytes is quantised from."""

    data: Any
    scale: float
    zero_point: int


class Integers:
    """Emits operations on integers into `builder`, in kernels for `vectors` where that is given.

    Between two kernels a tensor stays blocked. Its plain form is there too, for whoever else
    reads it; if nobody does, it is dead code.
    """

    def __init__(self, builder: Any, vectors: Vectors | None) -> None:
        self._builder = builder
        self._vectors = vectors
        self._blocked: dict[tuple[Any, int], Any] = {}
        self._sources: dict[Any, _Source] = {}
        self._variables: dict[Any, Any] = {}

    def emitted(self, kind: str, inputs: Sequence[Any], attributes: Mapping[str, Any]) -> Any:
        """The result of an operation, or None where it is none of those here."""
        emit = {
            "ConvInteger": self._convolution_of_integers,
            "DequantizeLinear": self._dequantised,
            "MatMulInteger": self._product_of_integers,
            "MaxPool": self._max_pool,
            "QGemm": self._linear,
            "QLinearAdd": self._sum,
            "QLinearConcat": self._concatenation,
            "QLinearConv": self._convolution,
            "QLinearGlobalAveragePool": self._mean,
            "QLinearMatMul": self._product,
            "QuantizeLinear": self._quantised,
        }.get(kind)
        return None if emit is None else emit([self._bound(x) for x in inputs], attributes)

    def _bound(self, value: Any) -> Any:
        """A variable for what is computed, the same each time."""
        if not isinstance(value, relax.Call):
            return value
        if value not in self._variables:
            self._variables[value] = self._builder.emit(value)
        return self._variables[value]

    def _quantised(self, inputs: Sequence[Any], attributes: Mapping[str, Any]) -> Any:
        data, scale, zero = (*inputs, None)[:3]
        factor, point = _scalar(scale), 0 if zero is None else _scalar(zero)
        dtype = "uint8" if zero is None else _dtype(zero)
        if zero is None and attributes.get("output_dtype", 2) != 2:
            return None
        if factor is None or point is None or dtype not in BYTES or _dtype(data) != "float32":
            return None
        limits = np.iinfo(dtype)
        low, high, whole = (
            tirx.const(float(value), "float32")
            for value in (limits.min - point, limits.max - point, point)
        )
        divisor = tirx.const(np.float32(factor), "float32")

        def element(x: Any) -> Any:
            nearest = tirx.nearbyint(tirx.max(tirx.min(x / divisor, high), low))
            return (nearest.astype("int32") + whole.astype("int32")).astype(dtype)

        made = self._builder.emit_te(
            lambda x: te.compute(x.shape, lambda *i: element(x[i]), name="quantized"), data
        )
        if isinstance(data, relax.Var):
            self._sources[made] = _Source(data, float(factor), point - int(limits.min))
        return made

    def _dequantised(self, inputs: Sequence[Any], attributes: Mapping[str, Any]) -> Any:
        data, scale, zero = (*inputs, None)[:3]
        factor, point = _scalar(scale), 0 if zero is None else _scalar(zero)
        if factor is None or point is None or _dtype(data) not in BYTES:
            return None
        if _dtype(scale) != "float32":
            return None
        return self._builder.emit_te(
            lambda x: te.compute(
                x.shape,
                lambda *i: (
                    (x[i].astype("int32") - tirx.const(point, "int32")).astype("float32")
                    * tirx.const(np.float32(factor), "float32")
                ),
                name="dequantized",
            ),
            data,
        )

    def _convolution(self, inputs: Sequence[Any], attributes: Mapping[str, Any]) -> Any:
        x, x_scale, x_zero, w, w_scale, w_zero, y_scale, y_zero, bias = (*inputs, None)[:9]
        window = _window(x, w, attributes)
        found = self._blocked_convolution(inputs, attributes, window)
        if found is not None:
            return found
        sums = self._sums(x, x_zero, w, w_zero, attributes)
        rank = len(_shape(x))
        if bias is not None:
            sums = self._emit(relax.op.add(sums, self._upright(bias, rank)))
        scale = self._scale(x_scale, self._upright(w_scale, rank), y_scale)
        return self._requantised(sums, scale, y_zero)

    def _blocked_convolution(
        self, inputs: Sequence[Any], attributes: Mapping[str, Any], window: Window | None
    ) -> Any:
        x, x_scale, x_zero, w, w_scale, w_zero, y_scale, y_zero, bias = (*inputs, None)[:9]
        known = [_array(item) for item in (x_scale, x_zero, w, w_scale, w_zero, y_scale, y_zero)]
        added = None if bias is None else _array(bias)
        if self._vectors is None or window is None or not isinstance(x, relax.Var):
            return None
        if any(item is None for item in known) or (bias is not None and added is None):
            return None
        _, x_point, given, _, w_point, _, y_point = (item for item in known if item is not None)
        weights = _signed(given, w_point.reshape(-1))
        groups = int(attributes.get("group", 1))
        if weights is None or x_point.size != 1 or y_point.size != 1:
            return None
        batch, channels, *_ = _shape(x)
        outputs = weights.shape[0]
        weights = weights.reshape(
            *weights.shape[:2], *(1,) * (4 - weights.ndim), *weights.shape[2:]
        )
        lanes = self._vectors.lanes
        depthwise = groups == channels == outputs and groups > 1
        if (
            not depthwise
            and groups > 1
            and (channels // groups % lanes or outputs // groups % lanes)
        ):
            return None
        x_least, y_least = (np.iinfo(item.dtype).min for item in (x_point, y_point))
        points = int(x_point.reshape(())) - x_least, int(y_point.reshape(())) - y_least
        offset = integer.offset(self._vectors)
        factor = _factor(known[0], known[3], known[5])
        scale = np.broadcast_to(factor.reshape(-1), (outputs,))
        total = weights.astype(np.int64).sum((1, 2, 3)) * (offset - points[0])
        total += 0 if added is None else added.astype(np.int64).reshape(-1)
        terms = integer.by_lane(total.astype(np.int32), lanes), integer.by_lane(scale, lanes)
        if depthwise:
            source = self.blocked(x, lanes)
            shape = _shape(source)
            packed = integer.pack_depthwise(weights, lanes, integer.depthwise_shifts(window))
            function = integer.depthwise(window, shape, points, self._vectors)
        else:
            source = self.blocked(x, self._inner(channels) if groups == 1 else lanes)
            shape = _shape(source)
            packed = integer.pack_dense(weights, shape[3], lanes)
            function = integer.convolution(
                window, shape, len(packed), groups, points, self._vectors
            )
        result = (batch, outputs, *window.result[2 - len(_shape(x)[2:]) :])
        made = self._call(function, [source, *map(_constant, (packed, *terms))])
        return self._plain(made, result, str(y_point.dtype))

    def _linear(self, inputs: Sequence[Any], attributes: Mapping[str, Any]) -> Any:
        a, a_scale, a_zero, b, b_scale, b_zero, bias, y_scale, y_zero = (*inputs, None)[:9]
        if attributes.get("transB", 0):
            b = self._transposed(b)
        if attributes.get("transA", 0):
            a = self._transposed(a)
        return self._matrix((a, a_scale, a_zero, b, b_scale, b_zero, y_scale, y_zero, bias))

    def _product(self, inputs: Sequence[Any], attributes: Mapping[str, Any]) -> Any:
        return self._matrix((*inputs, None)[:9])

    def _matrix(self, inputs: Sequence[Any]) -> Any:
        a, a_scale, a_zero, b, b_scale, b_zero, y_scale, y_zero, bias = inputs
        found = self._rows(inputs)
        if found is not None:
            return found
        sums = self._emit(
            relax.op.matmul(self._centred(a, self._by_row(a_zero)), self._centred(b, b_zero))
        )
        if bias is not None:
            sums = self._emit(relax.op.add(sums, bias))
        return self._requantised(sums, self._scale(self._by_row(a_scale), b_scale, y_scale), y_zero)

    def _rows(self, inputs: Sequence[Any]) -> Any:
        """A product with a constant matrix as a convolution of one pixel for each row."""
        a, *_, bias = inputs
        known = [_array(item) for item in inputs[1:8]]
        added = None if bias is None else _array(bias)
        if self._vectors is None or not isinstance(a, relax.Var):
            return None
        if any(item is None for item in known) or (bias is not None and added is None):
            return None
        a_scale, a_point, weights, b_scale, b_point, y_scale, y_point = (
            item for item in known if item is not None
        )
        if weights.ndim != 2 or any(
            item.size != 1 for item in (a_scale, a_point, y_scale, y_point)
        ):
            return None
        if str(a_point.dtype) != str(y_point.dtype) and _dtype(a) not in BYTES:
            return None
        depth, columns = weights.shape
        turned = _signed(np.ascontiguousarray(weights.T), b_point.reshape(-1))
        shape = _shape(a)
        if turned is None or depth % integer.TOGETHER or len(shape) < 2 or 0 in shape:
            return None
        if added is not None and added.size not in (1, columns):
            return None
        vectors = self._vectors
        rows = prod(shape[:-1])
        points = tuple(
            int(item.reshape(())) - int(np.iinfo(item.dtype).min) for item in (a_point, y_point)
        )
        factor = np.broadcast_to(_factor(a_scale, b_scale, y_scale).reshape(-1), (columns,))
        total = turned.astype(np.int64).sum(1) * (integer.offset(vectors) - points[0])
        total += 0 if added is None else added.astype(np.int64).reshape(-1)
        packed = integer.pack_dense(turned.reshape(columns, depth, 1, 1), depth, vectors.lanes)
        window = Window((1, 1), (1, 1), (1, 1), (0, 0, 0, 0), (1, rows), (1, rows))
        source = self._emit(relax.op.reshape(a, (1, 1, rows, depth)))
        if _dtype(a) == "int8":
            source = self._flipped(source, "uint8")
        function = integer.convolution(
            window, (1, 1, rows, depth), len(packed), 1, (points[0], points[1]), vectors, rows=True
        )
        terms = [
            _constant(integer.by_lane(values, vectors.lanes))
            for values in (total.astype(np.int32), factor)
        ]
        made = self._call(function, [source, _constant(packed), *terms])
        if columns % vectors.lanes:
            made = self._emit(relax.op.strided_slice(made, [1], [0], [columns]))
        if str(y_point.dtype) == "int8":
            made = self._flipped(made, "int8")
        return self._emit(relax.op.reshape(made, (*shape[:-1], columns)))

    def _sum(self, inputs: Sequence[Any], attributes: Mapping[str, Any]) -> Any:
        a, a_scale, a_zero, b, b_scale, b_zero, y_scale, y_zero = inputs
        scalars = [_scalar(item) for item in (a_scale, b_scale, y_scale, a_zero, b_zero, y_zero)]
        if any(item is None for item in scalars):
            raise NotImplementedError("QLinearAdd with scales that are no constants")
        factors, fixed = addition(scalars[:3], scalars[3:])
        least = int(np.iinfo(_dtype(y_zero)).min)
        both = [a, b]
        shape = _shape(a)
        vectors = self._vectors
        if vectors is None or shape != _shape(b) or not all(isinstance(x, relax.Var) for x in both):
            return self._plain_sum(both, factors, fixed, least)
        blocked = [self._blocked.get((x, vectors.lanes)) for x in both]
        sources = blocked
        if None in blocked:
            sources = [self._flipped(x, "uint8") if least else x for x in both]
        whole = _shape(sources[0])
        flat = [self._emit(relax.op.reshape(x, (prod(whole),))) for x in sources]
        function = integer.added(prod(whole), least, factors, fixed, vectors)
        made = self._emit(relax.op.reshape(self._call(function, flat), whole))
        if None not in blocked:
            return self._plain(made, shape, _dtype(a))
        return self._flipped(made, "int8") if least else made

    def _plain_sum(
        self, both: Sequence[Any], ratios: tuple[float, float], fixed: float, least: int
    ) -> Any:
        """The sum of tensors that broadcast."""
        shape = np.broadcast_shapes(*(_shape(x) for x in both))
        whole = [self._emit(relax.op.broadcast_to(x, shape)) for x in both]
        low, high = (tirx.const(float(end), "float32") for end in (least, least + integer.LARGEST))

        def element(*values: Any) -> Any:
            total = tirx.const(fixed, "float32")
            for value, ratio in zip(reversed(values), reversed(ratios), strict=True):
                factor = tirx.const(ratio, "float32")
                operands = value.astype("float32"), factor, total
                if self._vectors is None:
                    # As CUDA C and OpenCL C call it.
                    total = tirx.call_pure_extern("float32", "fma", *operands)
                else:
                    total = tirx.call_llvm_pure_intrin("float32", "llvm.fma", *operands)
            return tirx.nearbyint(tirx.max(tirx.min(total, high), low)).astype(_dtype(both[0]))

        return self._builder.emit_te(
            lambda a, b: te.compute(a.shape, lambda *i: element(a[i], b[i]), name="sum"), *whole
        )

    def _concatenation(self, inputs: Sequence[Any], attributes: Mapping[str, Any]) -> Any:
        scalars = [_scalar(x) for index, x in enumerate(inputs) if index < 2 or index % 3 != 2]
        if any(item is None for item in scalars):
            raise NotImplementedError("QLinearConcat with scales that are no constants")
        parts, (scale, point), own = inputs[2::3], scalars[:2], scalars[2:]
        dtype = _dtype(inputs[1])
        least = int(np.iinfo(dtype).min)
        changes = [
            integer.change((x_scale, x_point - least), (scale, point - least))
            for x_scale, x_point in zip(own[::2], own[1::2], strict=True)
        ]
        rank = len(_shape(parts[0]))
        axis = int(attributes["axis"]) % rank
        joined = [_shape(x)[axis] for x in parts]
        result = (*_shape(parts[0])[:axis], sum(joined), *_shape(parts[0])[axis + 1 :])
        vectors = self._vectors
        if vectors is not None:
            sources = [
                self._blocked.get((x, vectors.lanes)) if isinstance(x, relax.Var) else None
                for x in parts
            ]
            whole = all(size % vectors.lanes == 0 for size in joined[:-1])
            if axis == 1 and whole and None not in sources:
                shapes = [_shape(source) for source in sources]
                function = integer.concatenated(shapes, changes)
                return self._plain(self._call(function, sources), result, dtype)
        made = [
            x if change is None else self._changed(x, change, least)
            for x, change in zip(parts, changes, strict=True)
        ]
        return self._emit(relax.op.concat(made, axis))

    def _changed(self, x: Any, change: integer.Change, least: int) -> Any:
        """A tensor in its plain form, whose type has `least` for its least value, changed."""
        dtype = _dtype(x)

        def element(value: Any) -> Any:
            return (change(value.astype("int32") - least, 1) + least).astype(dtype)

        return self._builder.emit_te(
            lambda x: te.compute(x.shape, lambda *i: element(x[i]), name="changed"), x
        )

    def _mean(self, inputs: Sequence[Any], attributes: Mapping[str, Any]) -> Any:
        x, x_scale, x_zero, y_scale, y_zero = inputs
        scalars = [_scalar(item) for item in (x_scale, y_scale, x_zero, y_zero)]
        if any(item is None for item in scalars) or attributes.get("channels_last", 0):
            raise NotImplementedError("QLinearGlobalAveragePool of this form")
        shape = _shape(x)
        pixels = prod(shape[2:])
        scale = np.float32(scalars[0]) / np.float32(np.float32(scalars[1]) * np.float32(pixels))
        if self._vectors is None or not isinstance(x, relax.Var):
            axes = list(range(2, len(shape)))
            sums = self._emit(relax.op.sum(self._centred(x, x_zero), axes, keepdims=True))
            return self._requantised(sums, relax.const(scale), y_zero)
        least = int(np.iinfo(_dtype(x)).min)
        points = int(scalars[2]) - least, int(scalars[3]) - least
        source = self.blocked(x, self._vectors.lanes)
        function = integer.mean(_shape(source), float(scale), points, self._vectors)
        result = (*shape[:2], *(1,) * (len(shape) - 2))
        return self._plain(self._call(function, [source]), result, _dtype(x))

    def _max_pool(self, inputs: Sequence[Any], attributes: Mapping[str, Any]) -> Any:
        x = inputs[0]
        if self._vectors is None or _dtype(x) not in BYTES or not isinstance(x, relax.Var):
            return None
        if attributes.get("storage_order", 0):
            return None
        window = _window(x, None, attributes)
        if window is None:
            return None
        source = self.blocked(x, self._vectors.lanes)
        function = integer.max_pool(window, _shape(source), self._vectors)
        shape = _shape(x)
        result = (*shape[:2], *window.result[2 - len(shape[2:]) :])
        return self._plain(self._call(function, [source]), result, _dtype(x))

    def _convolution_of_integers(self, inputs: Sequence[Any], attributes: Mapping[str, Any]) -> Any:
        x, w, x_zero, w_zero = (*inputs, None, None)[:4]
        return self._sums(x, x_zero, w, w_zero, attributes)

    def _product_of_integers(self, inputs: Sequence[Any], attributes: Mapping[str, Any]) -> Any:
        a, b, a_zero, b_zero = (*inputs, None, None)[:4]
        return self._emit(
            relax.op.matmul(self._centred(a, self._by_row(a_zero)), self._centred(b, b_zero))
        )

    def _sums(self, x: Any, x_zero: Any, w: Any, w_zero: Any, attributes: Mapping[str, Any]) -> Any:
        """A convolution in int32."""
        window = _window(x, w, attributes)
        rank = len(_shape(x))
        if window is None:
            raise NotImplementedError(f"a convolution of integers over {rank - 2} axes")
        axes = rank - 2
        zero = None if w_zero is None else self._upright(w_zero, rank + 1)
        top, left, bottom, right = window.padding
        image, kernel = self._centred(x, x_zero), self._centred(w, zero)
        image = self._emit(relax.op.reshape(image, _image(_shape(x))))
        kernel = self._emit(relax.op.reshape(kernel, _image(_shape(w))))
        sums = relax.op.nn.conv2d(
            image, kernel, strides=window.strides, padding=(top, left, bottom, right),
            dilation=window.dilations, groups=int(attributes.get("group", 1)), out_dtype="int32",
        )  # fmt: skip
        result = (_shape(x)[0], _shape(w)[0], *window.result[2 - axes :])
        return self._emit(relax.op.reshape(self._emit(sums), result))

    def _centred(self, x: Any, zero: Any) -> Any:
        wide = self._emit(relax.op.astype(x, "int32"))
        if zero is None:
            return wide
        return self._emit(relax.op.subtract(wide, self._emit(relax.op.astype(zero, "int32"))))

    def _scale(self, first: Any, second: Any, result: Any) -> Any:
        both = self._emit(relax.op.multiply(first, second))
        return self._emit(relax.op.divide(both, result))

    def _requantised(self, sums: Any, scale: Any, zero: Any) -> Any:
        limits = np.iinfo(_dtype(zero))
        shape = _shape(sums)
        dtype = _dtype(zero)
        whole = self._emit(relax.op.broadcast_to(scale, shape))
        point = self._emit(relax.op.broadcast_to(self._emit(relax.op.astype(zero, "int32")), shape))

        def element(x: Any, factor: Any, least: Any) -> Any:
            # Beyond these bounds the result is an end of its type whatever its zero point.
            scaled = tirx.max(tirx.min(x.astype("float32") * factor, 1024.0), -1024.0)
            moved = tirx.nearbyint(scaled).astype("int32") + least
            low, high = (tirx.const(int(end), "int32") for end in (limits.min, limits.max))
            return tirx.max(tirx.min(moved, high), low).astype(dtype)

        return self._builder.emit_te(
            lambda x, s, z: te.compute(
                x.shape, lambda *i: element(x[i], s[i], z[i]), name="requantized"
            ),
            sums, whole, point,
        )  # fmt: skip

    def _upright(self, values: Any, rank: int) -> Any:
        """A value for each channel, or one, to broadcast over an image of `rank` axes."""
        return self._emit(relax.op.reshape(values, (-1, *(1,) * (rank - 2))))

    def _by_row(self, values: Any) -> Any:
        if values is None or len(_shape(values)) != 1:
            return values
        return self._emit(relax.op.reshape(values, (-1, 1)))

    def _transposed(self, matrix: Any) -> Any:
        array = _array(matrix)
        if array is not None:
            return _constant(np.ascontiguousarray(array.T))
        return self._emit(relax.op.permute_dims(matrix))

    def _inner(self, channels: int) -> int:
        """Channels beside each other of a tensor that only a dense convolution reads."""
        assert self._vectors is not None
        lanes = self._vectors.lanes
        few = -(-channels // integer.TOGETHER) * integer.TOGETHER
        return few if few < lanes else lanes

    def blocked(self, x: Any, inner: int) -> Any:
        """The blocked form of a tensor of bytes."""
        if (x, inner) not in self._blocked:
            image = _image(_shape(x))
            source = self._sources.get(x)
            data = x if source is None else source.data
            quantise = None if source is None else (source.scale, source.zero_point)
            flat = self._emit(relax.op.reshape(data, (*image[:2], image[2] * image[3])))
            function = integer.pack(image, inner, _dtype(data), quantise)
            self._blocked[x, inner] = self._call(function, [flat])
        return self._blocked[x, inner]

    def _plain(self, made: Any, shape: Shape, dtype: str) -> Any:
        """The plain form of a blocked tensor, which is remembered beside it."""
        function = integer.unpack(_shape(made), shape[1], dtype)
        plain = self._emit(relax.op.reshape(self._call(function, [made]), shape))
        self._blocked[plain, _shape(made)[3]] = made
        return plain

    def _flipped(self, x: Any, dtype: str) -> Any:
        shape = _shape(x)
        flat = self._emit(relax.op.reshape(x, (prod(shape),)))
        made = self._call(integer.flipped(prod(shape), _dtype(x), dtype), [flat])
        return self._emit(relax.op.reshape(made, shape))

    def _call(self, function: Any, inputs: Sequence[Any]) -> Any:
        result = function.params[-1]
        name = str(function.attrs["global_symbol"])
        variable = self._builder.add_func(function.without_attr("global_symbol"), name)
        shape = [int(size) for size in result.shape]
        return self._emit(
            relax.call_tir(variable, list(inputs), relax.TensorType(shape, str(result.dtype)))
        )

    def _emit(self, value: Any) -> Any:
        return self._builder.emit(value)


def _signed(weights: np.ndarray, zero_point: np.ndarray) -> np.ndarray | None:
    """Weights less their zero point, of each output channel, where bytes with a sign hold them."""
    shape = (-1, *(1,) * (weights.ndim - 1))
    centred = weights.astype(np.int16) - zero_point.astype(np.int16).reshape(shape)
    limits = np.iinfo(np.int8)
    if centred.size and (centred.min() < limits.min or centred.max() > limits.max):
        return None
    return centred.astype(np.int8)


def _factor(first: Any, second: Any, result: Any) -> np.ndarray:
    """The scales of both factors over that of the result, in the order that rounds as defined."""
    found: np.ndarray = first.reshape(-1) * second.reshape(-1) / result.reshape(-1)
    return found.astype(np.float32)


def _window(x: Any, w: Any, attributes: Mapping[str, Any]) -> Window | None:
    """Where a convolution, or without weights `w` a pool, reads; of one or two axes."""
    sizes = _shape(x)[2:]
    axes = len(sizes)
    if axes not in (1, 2):
        return None
    kernel = tuple(attributes["kernel_shape"]) if w is None else _shape(w)[2:]
    strides = tuple(attributes.get("strides") or (1,) * axes)
    dilations = tuple(attributes.get("dilations") or (1,) * axes)
    pads = tuple(attributes.get("pads") or (0,) * (2 * axes))
    mode = attributes.get("auto_pad", "NOTSET")
    mode = mode.decode() if isinstance(mode, bytes) else mode
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    if mode.startswith("SAME"):
        needed = [
            max(0, (-(-size // s) - 1) * s + r - size)
            for size, s, r in zip(sizes, strides, reach, strict=True)
        ]
        less = [n // 2 for n in needed]
        more = [n - half for n, half in zip(needed, less, strict=True)]
        pads = (*less, *more) if mode == "SAME_UPPER" else (*more, *less)
    elif mode == "VALID":
        pads = (0,) * (2 * axes)
    result = []
    for size, before, after, r, s in zip(
        sizes, pads[:axes], pads[axes:], reach, strides, strict=True
    ):
        count = (size + before + after - r) // s + 1
        if attributes.get("ceil_mode", 0) and (size + before + after - r) % s:
            # A window more, if it begins within the image or the padding before it.
            count += int(count * s < size + before)
        result.append(count)
    one, zero = (1,) * (2 - axes), (0,) * (2 - axes)
    return Window(
        kernel=_pair((*one, *kernel)),
        strides=_pair((*one, *strides)),
        dilations=_pair((*one, *dilations)),
        padding=(*_pair((*zero, *pads[:axes])), *_pair((*zero, *pads[axes:]))),
        source=_pair((*one, *sizes)),
        result=_pair((*one, *result)),
    )


def _pair(sizes: Sequence[int]) -> tuple[int, int]:
    first, second = (int(size) for size in sizes)
    return first, second


def _image(shape: Shape) -> Shape:
    return shape if len(shape) == 4 else (*shape[:2], *(1,) * (4 - len(shape)), *shape[2:])


def _shape(x: Any) -> Shape:
    return tuple(int(size) for size in x.ty.shape)


def _dtype(x: Any) -> str:
    return str(x.ty.dtype)


def _array(x: Any) -> np.ndarray | None:
    return to_numpy(x.value) if isinstance(x, ir.GenericConst) else None


def _scalar(x: Any) -> Any:
    """The value of a constant of one element."""
    array = _array(x)
    if array is None or array.size != 1:
        return None
    value = array.reshape(())[()]
    return int(value) if array.dtype.kind in "iu" else value


def _constant(array: np.ndarray) -> Any:
    return relax.const(to_tvm(np.ascontiguousarray(array), numpy_dtype(array.dtype.name)))
