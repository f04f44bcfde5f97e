"""Random chains of operations with random splits, to compare with the whole."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from hetsched import oracle
from hetsched.errors import SplitRefused
from hetsched.graph import Graph, to_onnx
from hetsched.op import Op, Tensor
from hetsched.operation import operation_of
from hetsched.rewrite import rewrite
from hetsched.split import Exit, Split

OPSETS = {"": 17, "com.microsoft": 1}
# What a chain computes with: floats, bytes with QuantizeLinear around floats, integers alone.
ARITHMETIC = ("float32", "quantised", "integer")
# So often another way to cut is drawn where operations refuse one.
ATTEMPTS = 8
LEAST_ROWS = 4


@dataclass(frozen=True, eq=False)
class Chain:
    """A graph, splits of it, their ways such as `rows`, and what was drawn and refused."""

    arithmetic: str
    graph: Graph
    splits: tuple[Split, ...]
    ways: tuple[str, ...]
    refused: int
    inputs: dict[str, np.ndarray]

    def deviation(self) -> float:
        """How far the pieces are from the whole, as a share of its peak.

        Of integers it is infinite where one differs.
        """
        whole = oracle.run(to_onnx(self.graph), self.inputs)
        pieces = oracle.run(to_onnx(rewrite(self.graph, self.splits).graph), self.inputs)
        return max(deviation(pieces[name], whole[name]) for name in whole)


def chain(seed: int, arithmetic: str = "") -> Chain:
    """The chain of a seed: convolutions, pools and residuals, or of attention."""
    rng = random.Random(seed)
    arithmetic = arithmetic or rng.choice(ARITHMETIC)
    build = _Builder(rng, np.random.default_rng(seed))
    if arithmetic == "float32":
        blocks = _attention if rng.random() < 0.2 else _image
    else:
        blocks = _quantised if arithmetic == "quantised" else _integer
    segments = blocks(build)
    graph = build.graph()
    splits, ways, refused = drawn_splits(rng, graph, segments)
    inputs = {}
    for tensor in graph.inputs:
        drawn = np.random.default_rng(seed + 1)
        if tensor.dtype == "float32":
            inputs[tensor.name] = drawn.standard_normal(tensor.shape, np.float32)
        else:
            inputs[tensor.name] = drawn.integers(0, 256, tensor.shape).astype(tensor.dtype)
    return Chain(arithmetic, graph, tuple(splits), tuple(ways), refused, inputs)


@dataclass
class _Builder:
    """A graph in the making; each call adds an operation of one result."""

    rng: random.Random
    values: np.random.Generator
    ops: list[Op] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    outputs: list[Tensor] = field(default_factory=list)

    def input(self, shape: Sequence[int], dtype: str) -> Tensor:
        self.inputs.append(Tensor(f"x{len(self.inputs)}", tuple(shape), dtype))
        return self.inputs[-1]

    def constant(self, values: Any) -> Tensor:
        array = np.asarray(values)
        name = f"c{len(self.constants)}"
        self.constants[name] = array
        return Tensor(name, array.shape, array.dtype.name)

    def weights(self, *shape: int) -> Tensor:
        """Floats that keep the size of what they are multiplied with."""
        scale = max(1, np.prod(shape[1:])) ** -0.5
        return self.constant((self.values.standard_normal(shape) * scale).astype(np.float32))

    def op(
        self,
        kind: str,
        *inputs: Tensor | None,
        shape: Sequence[int] | None = None,
        dtype: str = "",
        domain: str = "",
        **attributes: Any,
    ) -> Tensor:
        name = f"{kind.lower()}{len(self.ops)}"
        first = inputs[0]
        assert first is not None
        written = Tensor(
            f"{name}.y", first.shape if shape is None else tuple(shape), dtype or first.dtype
        )
        self.ops.append(Op(name, kind, inputs, (written,), attributes, domain))
        return written

    def graph(self) -> Graph:
        """What nobody reads leaves the graph, and now and then another."""
        read = {tensor.name for op in self.ops for tensor in op.reads}
        unread = [t for op in self.ops for t in op.writes if t.name not in read]
        constants = {name: array for name, array in self.constants.items() if name in read}
        return Graph(
            "chain",
            tuple(self.ops),
            tuple(self.inputs),
            tuple(dict.fromkeys([*unread, *self.outputs])),
            constants,
            OPSETS,
        )


@dataclass(frozen=True)
class _Sliding:
    """A window drawn for an input: its attributes, and the shape of the places it takes."""

    kernel: tuple[int, ...]
    attributes: dict[str, Any]
    places: tuple[int, ...]


def _window(rng: random.Random, sizes: Sequence[int], pool: bool = False) -> _Sliding:
    kernel, strides, dilations, heads, tails, places = [], [], [], [], [], []
    for size in sizes:
        k = rng.choice([1, 2, 3, 3, 5] if size >= 8 else [1, 2, 3])
        d = rng.choice([1, 1, 1, 2]) if (k - 1) * 2 < size else 1
        s = rng.choice([1, 1, 1, 2, 3]) if size >= 2 * LEAST_ROWS else 1
        extent = (k - 1) * d + 1
        head, tail = (rng.randint(0, k - 1 if pool else extent - 1) for _ in range(2))
        if rng.random() < 0.5:
            head = tail = extent // 2 if not pool or d == 1 else min(extent // 2, k - 1)
        if head + size + tail < extent + 1:
            k, d, s, head, tail, extent = 1, 1, 1, 0, 0, 1
        kernel.append(k)
        strides.append(s)
        dilations.append(d)
        heads.append(head)
        tails.append(tail)
        places.append((head + size + tail - extent) // s + 1)
    attributes: dict[str, Any] = {
        "kernel_shape": tuple(kernel),
        "strides": tuple(strides),
        "dilations": tuple(dilations),
        "pads": (*heads, *tails),
    }
    return _Sliding(tuple(kernel), attributes, tuple(places))


def _groups(rng: random.Random, channels: int) -> tuple[int, int]:
    """Groups of a convolution, and its output channels."""
    divisors = [g for g in range(1, channels + 1) if channels % g == 0]
    group = rng.choice([1, 1, 1, channels, rng.choice(divisors)])
    return group, group * rng.randint(1, max(1, 12 // group))


def _image(build: _Builder) -> list[list[str]]:
    """Windows over signals, images or volumes, elementwise tails and residuals."""
    rng = build.rng
    rank = rng.choice([1, 2, 2, 2, 2, 3])
    sizes = [rng.randint(8, {1: 40, 2: 20, 3: 9}[rank]) for _ in range(rank)]
    x = build.input((rng.choice([1, 1, 2, 3]), rng.randint(1, 8), *sizes), "float32")
    pool = [x]
    starts = []
    for _ in range(rng.randint(2, 9)):
        starts.append(len(build.ops))
        x = _layer(build, x, pool)
        pool.append(x)
    return _segments(rng, build.ops, starts)


def _layer(build: _Builder, x: Tensor, pool: list[Tensor]) -> Tensor:
    rng = build.rng
    batch, channels, *sizes = x.shape
    kind = rng.choice(["conv", "conv", "conv", "pool", "tail", "tail", "residual", "other"])
    if kind == "conv":
        group, filters = _groups(rng, channels)
        window = _window(rng, sizes)
        bias = [build.weights(filters)] if rng.random() < 0.6 else []
        weight = build.weights(filters, channels // group, *window.kernel)
        attributes = {**window.attributes, "group": group}
        shape = (batch, filters, *window.places)
        x = build.op("Conv", x, weight, *bias, shape=shape, **attributes)
        return build.op("Relu", x) if rng.random() < 0.5 else x
    if kind == "pool":
        if build.ops and build.ops[-1].kind == "Pad":
            # ONNX Runtime makes the two one pool, even where that has more padding than kernel.
            x = build.op("Sigmoid", x)
        window = _window(rng, sizes, pool=True)
        attributes = dict(window.attributes)
        name = rng.choice(["MaxPool", "AveragePool"])
        if name == "AveragePool":
            # It has no dilations until opset 19.
            del attributes["dilations"]
            if any(d > 1 for d in window.attributes["dilations"]):
                return build.op("Sigmoid", x)
            attributes["count_include_pad"] = rng.randint(0, 1)
        return build.op(name, x, shape=(batch, channels, *window.places), **attributes)
    if kind == "tail":
        by_channel = build.weights(channels, *(1,) * len(sizes))
        name = rng.choice(["Add", "Mul", "Tanh", "Softplus", "Clip"])
        if name in ("Add", "Mul"):
            return build.op(name, x, by_channel)
        if name == "Clip":
            ends = (build.constant(np.float32(end)) for end in (-1, 1.5))
            return build.op(name, x, *ends)
        return build.op(name, x)
    same = [t for t in pool if t.shape == x.shape]
    if kind == "residual" and len(same) > 1:
        return build.op("Add", x, rng.choice(same))
    beside = [t for t in pool if (t.shape[0], *t.shape[2:]) == (batch, *sizes)]
    name = rng.choice(["Concat", "Pad", "Resize", "BatchNormalization", "ConvTranspose"])
    if name == "Concat":
        other = rng.choice(beside)
        shape = (batch, channels + other.shape[1], *sizes)
        return build.op(name, x, other, shape=shape, axis=1)
    if name == "Pad":
        heads, tails = ([0, 0, *(rng.randint(0, 2) for _ in sizes)] for _ in range(2))
        total = [h + n + t for h, n, t in zip(heads, x.shape, tails, strict=True)]
        pads = build.constant(np.array([*heads, *tails]))
        return build.op(name, x, pads, shape=total)
    if name == "Resize" and max(sizes) <= 12:
        ratio = rng.choice([2, 3])
        scales = build.constant(np.array([1, 1, *[ratio] * len(sizes)], np.float32))
        mode = rng.choice(["nearest", "linear"]) if len(sizes) == 2 else "nearest"
        shape = (batch, channels, *(size * ratio for size in sizes))
        return build.op(name, x, None, scales, shape=shape, mode=mode)
    if name == "ConvTranspose" and len(sizes) < 3 and max(sizes) <= 12:
        group, filters = _groups(rng, channels)
        k, s = rng.choice([2, 3]), rng.choice([1, 2])
        weight = build.weights(channels, filters // group, *[k] * len(sizes))
        shape = (batch, filters, *((size - 1) * s + k for size in sizes))
        return build.op(name, x, weight, shape=shape, group=group, strides=(s,) * len(sizes))
    values = [build.weights(channels) for _ in range(3)]
    variance = build.constant(build.values.uniform(0.5, 2, channels).astype(np.float32))
    return build.op("BatchNormalization", x, *values, variance)


def _attention(build: _Builder) -> list[list[str]]:
    """Blocks of a transformer: heads, and two products with a tail between."""
    rng = build.rng
    batch, tokens = rng.choice([1, 1, 2]), rng.randint(4, 12)
    heads, size = rng.choice([2, 3, 4]), rng.choice([2, 4, 8])
    width = heads * size
    x = build.input((batch, tokens, width), "float32")
    segments = []

    def product(x: Tensor, columns: int) -> Tensor:
        weight = build.weights(x.shape[-1], columns)
        shape = (*x.shape[:-1], columns)
        return build.op("Add", build.op("MatMul", x, weight, shape=shape), build.weights(columns))

    def split_heads(x: Tensor, *order: int) -> Tensor:
        sizes = build.constant(np.array([batch, tokens, heads, size]))
        x = build.op("Reshape", x, sizes, shape=(batch, tokens, heads, size))
        shape = tuple(x.shape[axis] for axis in order)
        return build.op("Transpose", x, shape=shape, perm=order)

    for _ in range(rng.choice([1, 1, 2])):
        start = len(build.ops)
        scale, shift = build.weights(width), build.weights(width)
        normal = build.op("LayerNormalization", x, scale, shift)
        segments.append(start)
        start = len(build.ops)
        query = split_heads(product(normal, width), 0, 2, 1, 3)
        key = split_heads(product(normal, width), 0, 2, 3, 1)
        value = split_heads(product(normal, width), 0, 2, 1, 3)
        scores = build.op("MatMul", query, key, shape=(batch, heads, tokens, tokens))
        scores = build.op("Mul", scores, build.constant(np.float32(size**-0.5)))
        seen = build.op("Softmax", scores, axis=-1)
        mixed = build.op("MatMul", seen, value, shape=query.shape)
        mixed = build.op("Transpose", mixed, shape=(batch, tokens, heads, size), perm=(0, 2, 1, 3))
        sizes = build.constant(np.array([batch, tokens, width]))
        mixed = build.op("Reshape", mixed, sizes, shape=(batch, tokens, width))
        weight = build.weights(width, width)
        projected = build.op("MatMul", mixed, weight, shape=(batch, tokens, width))
        segments.append(start)
        start = len(build.ops)
        x = build.op("Add", projected, x)
        segments.append(start)
        start = len(build.ops)
        inner = build.op("Tanh", product(x, rng.randint(2, 40)))
        weight = build.weights(inner.shape[-1], width)
        outer = build.op("MatMul", inner, weight, shape=x.shape)
        segments.append(start)
        start = len(build.ops)
        x = build.op("Add", outer, x)
        segments.append(start)
    return runs(build.ops, segments[1:])


def _quantised(build: _Builder) -> list[list[str]]:
    """Bytes between layers, each dequantised, computed in floats and quantised again."""
    rng = build.rng
    sizes = [rng.randint(8, 20) for _ in range(2)]
    x = build.input((rng.choice([1, 1, 2]), rng.randint(1, 8), *sizes), "uint8")
    scales = {x.name: np.float32(0.02)}
    zeros = {x.name: 128}
    pool, starts = [x], []

    def real(x: Tensor) -> Tensor:
        scale, zero = build.constant(scales[x.name]), build.constant(np.uint8(zeros[x.name]))
        return build.op("DequantizeLinear", x, scale, zero, dtype="float32")

    def byte(x: Tensor, scale: float, zero: int) -> Tensor:
        constants = build.constant(np.float32(scale)), build.constant(np.uint8(zero))
        y = build.op("QuantizeLinear", x, *constants, dtype="uint8")
        scales[y.name], zeros[y.name] = np.float32(scale), zero
        return y

    for _ in range(rng.randint(2, 7)):
        starts.append(len(build.ops))
        batch, channels, *sizes = x.shape
        same = [t for t in pool if t.shape == x.shape]
        kind = rng.choice(["conv", "conv", "conv", "pool", "add"])
        if kind == "conv":
            group, filters = _groups(rng, channels)
            window = _window(rng, sizes)
            shape = (filters, channels // group, *window.kernel)
            # Seven bits: without instructions for it, two products overflow 16 bits.
            weight = build.constant(build.values.integers(-63, 64, shape).astype(np.int8))
            each = build.values.uniform(0.002, 0.01, filters).astype(np.float32)
            zero = build.constant(np.zeros(filters, np.int8))
            weight_scale = build.constant(each)
            weight = build.op(
                "DequantizeLinear", weight, weight_scale, zero, dtype="float32", axis=0
            )
            bias_scale = build.constant(each * scales[x.name])
            bias = build.constant(build.values.integers(-999, 999, filters).astype(np.int32))
            offset = build.constant(np.zeros(filters, np.int32))
            bias = build.op("DequantizeLinear", bias, bias_scale, offset, dtype="float32", axis=0)
            places = (batch, filters, *window.places)
            attributes = {**window.attributes, "group": group}
            y = build.op("Conv", real(x), weight, bias, shape=places, **attributes)
            y = build.op("Relu", y) if rng.random() < 0.5 else y
            x = byte(y, rng.uniform(0.01, 0.05), rng.choice([0, 100, 128]))
        elif kind == "pool":
            window = _window(rng, sizes, pool=True)
            shape = (batch, channels, *window.places)
            y = build.op("MaxPool", real(x), shape=shape, **window.attributes)
            x = byte(y, scales[x.name], zeros[x.name])
        else:
            y = build.op("Add", real(x), real(rng.choice(same)))
            x = byte(y, rng.uniform(0.01, 0.05), rng.choice([100, 128]))
        pool.append(x)
    return _segments(rng, build.ops, starts)


def _integer(build: _Builder) -> list[list[str]]:
    """Operations on bytes, and a last sum in 32 bits."""
    rng = build.rng
    sizes = [rng.randint(8, 20) for _ in range(2)]
    x = build.input((rng.choice([1, 1, 2]), rng.randint(1, 8), *sizes), "uint8")
    scale, zero = build.constant(np.float32(0.02)), build.constant(np.uint8(120))
    pool, starts = [x], []
    for _ in range(rng.randint(2, 7)):
        starts.append(len(build.ops))
        batch, channels, *sizes = x.shape
        same = [t for t in pool if t.shape == x.shape]
        kind = rng.choice(["conv", "conv", "conv", "pool", "add", "concat"])
        if kind == "conv":
            group, filters = _groups(rng, channels)
            window = _window(rng, sizes)
            shape = (filters, channels // group, *window.kernel)
            weight = build.constant(build.values.integers(-63, 64, shape).astype(np.int8))
            each = build.constant(build.values.uniform(0.002, 0.02, filters).astype(np.float32))
            zeros = build.constant(np.zeros(filters, np.int8))
            bias = build.constant(build.values.integers(-999, 999, filters).astype(np.int32))
            x = build.op(
                "QLinearConv",
                *(x, scale, zero, weight, each, zeros, scale, zero, bias),
                shape=(batch, filters, *window.places),
                **{**window.attributes, "group": group},
            )
        elif kind == "pool":
            window = _window(rng, sizes, pool=True)
            shape = (batch, channels, *window.places)
            x = build.op("MaxPool", x, shape=shape, **window.attributes)
        elif kind == "add":
            inputs = (x, scale, zero, rng.choice(same), scale, zero, scale, zero)
            x = build.op("QLinearAdd", *inputs, domain="com.microsoft")
        else:
            other = rng.choice([t for t in pool if t.shape[2:] == x.shape[2:]])
            shape = (batch, channels + other.shape[1], *sizes)
            x = build.op("Concat", x, other, shape=shape, axis=1)
        pool.append(x)
    if rng.random() < 0.6:
        starts.append(len(build.ops))
        window = _window(rng, x.shape[2:])
        shape = (rng.randint(1, 8), x.shape[1], *window.kernel)
        weight = build.constant(build.values.integers(-63, 64, shape).astype(np.uint8))
        places = (x.shape[0], shape[0], *window.places)
        attributes = window.attributes
        build.op("ConvInteger", x, weight, zero, shape=places, dtype="int32", **attributes)
    return _segments(rng, build.ops, starts)


def _segments(rng: random.Random, ops: Sequence[Op], starts: Sequence[int]) -> list[list[str]]:
    """Runs of some layers each, which a split or none is drawn for."""
    return runs(ops, [start for start in starts[1:] if rng.random() < 0.4])


def runs(ops: Sequence[Op], borders: Sequence[int]) -> list[list[str]]:
    """The names of the operations between places in their order."""
    return [[op.name for op in ops[a:b]] for a, b in pairwise([0, *borders, len(ops)])]


def drawn_splits(
    rng: random.Random, graph: Graph, segments: Sequence[Sequence[str]]
) -> tuple[list[Split], list[str], int]:
    """A split for most of some runs of operations; their ways, and how many were refused.

    A run that refuses all that is drawn for it stays whole.
    """
    splits: list[Split] = []
    ways: list[str] = []
    refused = 0
    for names in segments:
        for _ in range(ATTEMPTS if rng.random() < 0.9 else 0):
            drawn = _drawn(rng, graph, names)
            if drawn is None:
                continue
            way, item = drawn
            try:
                rewrite(graph, [*splits, item])
            except SplitRefused:
                refused += 1
                continue
            splits.append(item)
            ways.append(way)
            break
    return splits, ways, refused


def _drawn(rng: random.Random, graph: Graph, names: Sequence[str]) -> tuple[str, Split] | None:
    """A way to cut what a segment hands over, if it can be cut so at all."""
    inside = set(names)
    read = {t.name for op in graph.ops if op.name not in inside for t in op.reads}
    read.update(tensor.name for tensor in graph.outputs)
    written = [t for op in graph.ops if op.name in inside for t in op.writes if t.name in read]
    way = rng.choice(["batch", "channels", "rows", "columns", "tiles", "tiles", "sum", "sum"])
    pieces = rng.choice([2, 2, 3, 4])
    if way == "sum":
        (tensor, *others) = written
        if others:
            return None
        op = graph.producers[tensor.name]
        try:
            depth = operation_of(op).depth(op)
        except SplitRefused:
            return None
        bounds = _bounds(rng, depth, min(pieces, depth))
        return way, Split(tuple(names), (Exit(tensor.name, ((0, bounds),), sum=True),))
    axes = {"batch": (0,), "channels": (1,), "rows": (2,), "columns": (-1,), "tiles": (2, 3)}[way]
    exits = []
    for tensor in written:
        cuts = []
        for axis in axes:
            axis = axis % len(tensor.shape) if axis < len(tensor.shape) else -1
            if axis < 0 or tensor.shape[axis] < pieces:
                return None
            count = 2 if way == "tiles" else pieces
            cuts.append((axis, _bounds(rng, tensor.shape[axis], count)))
        exits.append(Exit(tensor.name, tuple(cuts)))
    return way, Split(tuple(names), tuple(exits))


def _bounds(rng: random.Random, size: int, pieces: int) -> tuple[int, ...]:
    """Uneven shares, of many small divisors now and then, as groups and heads have them."""
    steps = [s for s in range(1, size + 1) if size % s == 0 and size // s >= pieces]
    step = rng.choice([1, rng.choice(steps)])
    inner = sorted(rng.sample(range(1, size // step), pieces - 1))
    return (0, *(place * step for place in inner), size)


def deviation(found: np.ndarray, wanted: np.ndarray) -> float:
    """How far results are apart, as a share of the peak; infinite where integers differ."""
    assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
    if found.dtype.kind != "f":
        return 0.0 if np.array_equal(found, wanted) else np.inf
    same = (found == wanted) | (np.isnan(found) & np.isnan(wanted))
    error = np.abs(np.where(same, 0, found - np.where(same, found, wanted)))
    peak = np.abs(wanted[np.isfinite(wanted)]).max(initial=1e-30)
    return float(np.nan_to_num(error, nan=np.inf).max(initial=0) / peak)
