"""Operations between dequantised and quantised tensors as operations on the integers themselves.

What is found becomes QLinearConv and QLinearMatMul of ONNX, and QGemm, QLinearAdd, QLinearConcat
and QLinearGlobalAveragePool of ONNX Runtime, whose meaning they have: sums of products are int32,
and a result is the sum in float32, times the scales of its factors over its own, rounded to the
nearest, ties to even, moved by its zero point and kept within its type. Operations that only choose
or move elements take the integers as they are where both sides agree in scale and zero point.
Anything else stays in floating point.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from hetsched.dtype import numpy_dtype
from hetsched.graph import Graph
from hetsched.op import Op, Tensor

CONTRIBUTED = "com.microsoft"
# The operations that lowering has kernels for, with their domain.
INTEGER = frozenset(
    [("", kind) for kind in ("ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul")]
    + [(CONTRIBUTED, kind) for kind in ("QGemm", "QLinearAdd", "QLinearConcat")]
    + [(CONTRIBUTED, "QLinearGlobalAveragePool")]
)
BYTES = ("int8", "uint8")
# Functions that a range of integers replaces, as they grow with their argument.
BOUNDS = ("Clip", "Relu")
# They choose or move elements.
MOVING = frozenset(
    "Concat DepthToSpace Expand Flatten Gather MaxPool Reshape Slice SpaceToDepth Squeeze Tile "
    "Transpose Unsqueeze".split()
)
# A bias may say its scale in another rounding than the product of the two scales.
NEARLY = 1e-5


@dataclass(frozen=True, eq=False)
class Quantized:
    """The integers of a tensor, and what they stand for: (tensor - zero_point) * scale."""

    tensor: Tensor
    scale: Tensor
    zero_point: Tensor
    axis: int = 1


def quantized(graph: Graph) -> Graph:
    """`graph` with integer operations where it has the pattern; the same object where it has none.

    Constants that are dequantised for operations in floating point are so once, here.
    """
    if not any(op.kind == "DequantizeLinear" for op in graph.ops):
        return graph
    finder = _Finder(graph)
    ops = [new for op in graph.ops for new in finder.rewritten(op)]
    return _pruned(replace(graph, ops=tuple(ops), constants=finder.constants))


def addition(
    scales: Sequence[np.float32], zeros: Sequence[int]
) -> tuple[tuple[float, float], float]:
    """What QLinearAdd takes its terms times, and what it adds: `added` has the rest.

    `scales` and `zeros` are those of the two terms and of the result. Values are of float32; one
    product is rounded, the other goes into the sum as it is, in ONNX Runtime's order.
    """
    ratios = scales[0] / scales[2], scales[1] / scales[2]
    shift = float(ratios[0]) * zeros[0] + float(ratios[1] * np.float32(zeros[1]))
    fixed = np.float32(zeros[2]) - np.float32(shift)
    return (float(ratios[0]), float(ratios[1])), float(fixed)


def added(
    ratios: tuple[float, float], fixed: float, first: np.ndarray, second: np.ndarray
) -> np.ndarray:
    """The sums of integers that QLinearAdd makes, before it keeps them within its type."""
    # Products of a byte and a float32 are exact in float64, so these are fused as in hardware.
    inner = (ratios[1] * second + fixed).astype(np.float32)
    return np.rint((ratios[0] * first + inner.astype(np.float64)).astype(np.float32)).astype(int)


class _Finder:
    """Goes through the operations in order; `constants` grow by what is made on the way."""

    def __init__(self, graph: Graph) -> None:
        self.constants = dict(graph.constants)
        self._producer = dict(graph.producers)
        self._readers = Counter(t.name for op in graph.ops for t in op.reads)
        self._readers.update(tensor.name for tensor in graph.outputs)

    def rewritten(self, op: Op) -> list[Op]:
        if op.domain:
            return [op]
        if op.kind == "QuantizeLinear":
            return self._integer(op) or [op]
        if op.kind == "DequantizeLinear" and op.input(0).name in self.constants:
            self._dequantise(op)
            return [op] if op.output().name not in self.constants else []
        return [op]

    def _integer(self, end: Op) -> list[Op]:
        """The operations that stand for `end` and what is before it, if that has the pattern."""
        result = self._result(end)
        if result is None:
            return []
        last = self._sole(end.input(0))
        bounds = None
        if last is not None and last.kind in BOUNDS and not last.domain:
            bounds = self._range(last, result)
            last = self._sole(last.input(0)) if bounds is not None else None
        if last is None or last.domain or len(last.writes) != 1:
            return []
        found = None
        if last.kind in MOVING and bounds is None:
            found = self._moved(last, end, result)
        if found is None and last.kind in PATTERNS:
            found = PATTERNS[last.kind](self, last, result)
        if found is None:
            return []
        limits = np.iinfo(numpy_dtype(result.tensor.dtype))
        lowest, highest = bounds or (limits.min, limits.max)
        if lowest <= limits.min and highest >= limits.max:
            return [replace(found, name=end.name, outputs=(result.tensor,))]
        whole = Tensor(f"{result.tensor.name}/whole", result.tensor.shape, result.tensor.dtype)
        ends = [
            self._constant(f"{end.name}/{name}", np.array(value), result.tensor.dtype)
            for name, value in (("lowest", lowest), ("highest", highest))
        ]
        return [
            replace(found, name=end.name, outputs=(whole,)),
            Op(f"{end.name}/clip", "Clip", (whole, *ends), (result.tensor,)),
        ]

    def of(self, tensor: Tensor, *, dtypes: tuple[str, ...] = BYTES) -> Quantized | None:
        """The integers that `tensor` is made of, with constant scales and zero points."""
        op = self._producer.get(tensor.name)
        if op is None or op.kind != "DequantizeLinear" or op.domain:
            return None
        if op.input(0).dtype not in dtypes or op.attributes.get("block_size", 0):
            return None
        return self._parameters(op, op.input(0), op.input(0).dtype)

    def values(self, tensor: Tensor) -> np.ndarray:
        return self.constants[tensor.name]

    def single(self, found: Quantized | None) -> Quantized | None:
        """`found` where it has one scale for the whole tensor."""
        if found is None or found.scale.size != 1 or found.zero_point.size != 1:
            return None
        scale, zero = (self._scalar(tensor) for tensor in (found.scale, found.zero_point))
        return replace(found, scale=scale, zero_point=zero)

    def bias(self, op: Op, data: Quantized, weights: Quantized) -> tuple[Tensor, ...] | None:
        """The bias of `op` in units of the sums; empty where it has none, None where that fails."""
        if not op.has_input(2):
            return ()
        found = self.of(op.input(2), dtypes=("int32",))
        if found is None or found.tensor.name not in self.constants:
            return None
        unit = self.values(data.scale) * self.values(weights.scale).reshape(-1)
        scale = self.values(found.scale).reshape(-1)
        if self.values(found.zero_point).any() or len(found.tensor.shape) != 1:
            return None
        if scale.size not in (1, unit.size) and unit.size != 1:
            return None
        return (found.tensor,) if np.allclose(scale, unit, rtol=NEARLY, atol=0) else None

    def _sole(self, tensor: Tensor) -> Op | None:
        """The operation that makes `tensor` for one reader alone."""
        return self._producer.get(tensor.name) if self._readers[tensor.name] == 1 else None

    def _result(self, end: Op) -> Quantized | None:
        if end.output().dtype not in BYTES or end.attributes.get("block_size", 0):
            return None
        if end.input(0).dtype != "float32":
            return None
        return self.single(self._parameters(end, end.output(), end.output().dtype))

    def _parameters(self, op: Op, tensor: Tensor, dtype: str) -> Quantized | None:
        scale = op.input(1)
        if scale.name not in self.constants or scale.dtype != "float32" or len(scale.shape) > 1:
            return None
        if op.has_input(2):
            zero = op.input(2)
            if zero.name not in self.constants or zero.dtype != dtype:
                return None
        else:
            zero = self._constant(f"{op.name}/zero", np.zeros(scale.shape), dtype)
        axis = int(op.attributes.get("axis", 1))
        return Quantized(tensor, scale, zero, axis % max(1, len(tensor.shape)))

    def _range(self, op: Op, result: Quantized) -> tuple[int, int] | None:
        """The integers of `result` that the ends of the range of `op` are."""
        low, high = (0.0, np.inf) if op.kind == "Relu" else (-np.inf, np.inf)
        if op.kind == "Clip":
            ends = []
            for place, name, default in ((1, "min", low), (2, "max", high)):
                if not op.has_input(place):
                    ends.append(float(op.attributes.get(name, default)))
                elif op.input(place).name in self.constants:
                    ends.append(float(self.values(op.input(place)).reshape(())))
                else:
                    return None
            low, high = ends
        if not low <= high:
            return None
        limits = np.iinfo(numpy_dtype(result.tensor.dtype))
        scale = self.values(result.scale).reshape(())
        zero = int(self.values(result.zero_point).reshape(()))
        with np.errstate(over="ignore"):
            places = [np.rint(np.float32(end) / scale) for end in (low, high)]
        lowest, highest = (float(np.clip(p + zero, limits.min, limits.max)) for p in places)
        return int(lowest), int(highest)

    def _moved(self, op: Op, end: Op, result: Quantized) -> Op | None:
        """`op` on integers, where what it reads has the scale and zero point of `result`."""
        count = len(op.reads) if op.kind == "Concat" else 1
        sources = [self.single(self.of(op.input(index))) for index in range(count)]
        for source in sources:
            if source is None or source.tensor.dtype != result.tensor.dtype:
                return None
            if not (
                np.array_equal(self.values(source.scale), self.values(result.scale))
                and np.array_equal(self.values(source.zero_point), self.values(result.zero_point))
            ):
                return None
        integers = tuple(source.tensor for source in sources if source is not None)
        return replace(op, name=end.name, inputs=(*integers, *op.inputs[count:]))

    def _dequantise(self, op: Op) -> None:
        found = self.of(op.output(), dtypes=(*BYTES, "int32"))
        if found is None or op.output().dtype != "float32":
            return
        shape = [1] * len(found.tensor.shape)
        if found.scale.size != 1:
            shape[found.axis] = -1
        zero, scale = (
            self.values(tensor).reshape(shape) for tensor in (found.zero_point, found.scale)
        )
        whole = self.values(found.tensor).astype(np.int32) - zero.astype(np.int32)
        # Its integers stay beside it: what reads both keeps one.
        self.constants[op.output().name] = whole.astype(np.float32) * scale

    def _scalar(self, tensor: Tensor) -> Tensor:
        if not tensor.shape:
            return tensor
        name = f"{tensor.name}/scalar"
        self.constants[name] = self.values(tensor).reshape(())
        return Tensor(name, (), tensor.dtype)

    def _constant(self, name: str, array: np.ndarray, dtype: str) -> Tensor:
        self.constants[name] = array.astype(numpy_dtype(dtype))
        return Tensor(name, array.shape, dtype)


def _convolution(finder: _Finder, op: Op, result: Quantized) -> Op | None:
    data, weights = finder.single(finder.of(op.input(0))), finder.of(op.input(1))
    if data is None or weights is None or (weights.scale.size > 1 and weights.axis != 0):
        return None
    bias = finder.bias(op, data, weights)
    if bias is None:
        return None
    factors = (*_fields(data), *_fields(weights))
    inputs = (*factors, result.scale, result.zero_point, *bias)
    return Op(op.name, "QLinearConv", inputs, (), op.attributes)


def _product(finder: _Finder, op: Op, result: Quantized) -> Op | None:
    first, second = finder.single(finder.of(op.input(0))), finder.of(op.input(1))
    if first is None or second is None:
        return None
    one = finder.single(second)
    if one is None and (len(second.tensor.shape) != 2 or second.axis != 1):
        return None
    inputs = (*_fields(first), *_fields(one or second), result.scale, result.zero_point)
    return Op(op.name, "QLinearMatMul", inputs, ())


def _linear(finder: _Finder, op: Op, result: Quantized) -> Op | None:
    data, weights = finder.single(finder.of(op.input(0))), finder.of(op.input(1))
    if data is None or weights is None:
        return None
    columns = 0 if op.attributes.get("transB", 0) else 1
    if weights.scale.size > 1 and weights.axis != columns:
        return None
    if (
        float(op.attributes.get("alpha", 1.0)) != 1.0
        or float(op.attributes.get("beta", 1.0)) != 1.0
    ):
        return None
    bias = finder.bias(op, data, weights)
    if bias is None:
        return None
    inputs = (*_fields(data), *_fields(weights), *(bias or (None,)))
    flags = {name: int(op.attributes.get(name, 0)) for name in ("transA", "transB")}
    return Op(
        op.name, "QGemm", (*inputs, result.scale, result.zero_point), (),
        {"alpha": 1.0, **flags}, CONTRIBUTED,
    )  # fmt: skip


def _sum(finder: _Finder, op: Op, result: Quantized) -> Op | None:
    both = [finder.single(finder.of(op.input(index))) for index in (0, 1)]
    if any(item is None or item.tensor.dtype != result.tensor.dtype for item in both):
        return None
    factors = tuple(field for item in both if item for field in _fields(item))
    inputs = (*factors, result.scale, result.zero_point)
    return Op(op.name, "QLinearAdd", inputs, (), {}, CONTRIBUTED)


def _concatenation(finder: _Finder, op: Op, result: Quantized) -> Op | None:
    parts = [finder.single(finder.of(tensor)) for tensor in op.reads]
    if any(part is None or part.tensor.dtype != result.tensor.dtype for part in parts):
        return None
    fields = tuple(field for part in parts if part for field in _fields(part))
    inputs = (result.scale, result.zero_point, *fields)
    return Op(op.name, "QLinearConcat", inputs, (), op.attributes, CONTRIBUTED)


def _mean(finder: _Finder, op: Op, result: Quantized) -> Op | None:
    data = finder.single(finder.of(op.input(0)))
    if data is None or data.tensor.dtype != result.tensor.dtype:
        return None
    inputs = (*_fields(data), result.scale, result.zero_point)
    return Op(op.name, "QLinearGlobalAveragePool", inputs, (), {"channels_last": 0}, CONTRIBUTED)


def _fields(found: Quantized) -> tuple[Tensor, Tensor, Tensor]:
    return found.tensor, found.scale, found.zero_point


PATTERNS: Mapping[str, Callable[[_Finder, Op, Quantized], Op | None]] = {
    "Add": _sum,
    "Concat": _concatenation,
    "Conv": _convolution,
    "Gemm": _linear,
    "GlobalAveragePool": _mean,
    "MatMul": _product,
}


def _pruned(graph: Graph) -> Graph:
    """`graph` without operations and constants that nothing reads."""
    live = {tensor.name for tensor in graph.outputs}
    kept = []
    for op in reversed(graph.ops):
        if live & {tensor.name for tensor in op.writes}:
            kept.append(op)
            live.update(tensor.name for tensor in op.reads)
    constants = {name: array for name, array in graph.constants.items() if name in live}
    ops = tuple(reversed(kept))
    opsets = dict(graph.opsets)
    if any(op.domain == CONTRIBUTED for op in ops):
        opsets.setdefault(CONTRIBUTED, 1)
    return replace(graph, ops=ops, constants=constants, opsets=opsets)
