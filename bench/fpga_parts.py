"""Parts of quantised models, made node by node or drawn from a seed."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper

import hetsched
from hetsched.graph import Graph, to_onnx


@dataclass
class Build:
    """A part of a quantised model, made node by node; values between nodes are bytes."""

    dtype: str = "int8"
    scale: float = 0.05

    def __post_init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}
        self.inputs: list[onnx.ValueInfoProto] = []
        self.zero = 128 if self.dtype == "uint8" else 0

    def constant(self, name: str, array: Any) -> str:
        self.constants[name] = np.asarray(array)
        return name

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        name = f"{kind}{len(self.nodes)}"
        node = helper.make_node(kind, inputs, [f"{name}/y"], name, **attributes)
        self.nodes.append(node)
        return f"{name}/y"

    def scales(self, scale: float, zero: int | None) -> tuple[str, str]:
        count = len(self.constants)
        value = np.asarray(self.zero if zero is None else zero).astype(self.dtype)
        return (
            self.constant(f"scale{count}", np.float32(scale)),
            self.constant(f"zero{count}", value),
        )

    def input(self, *shape: int, scale: float | None = None, zero: int | None = None) -> str:
        name = f"x{len(self.inputs)}"
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(self.dtype))
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return self.op("DequantizeLinear", name, *self.scales(scale or self.scale, zero))

    def weights(self, array: np.ndarray, scale: Any, axis: int = 0) -> str:
        name = f"w{len(self.constants)}"
        scale = np.asarray(scale, np.float32)
        return self.op(
            "DequantizeLinear",
            self.constant(name, array),
            self.constant(f"{name}/scale", scale),
            self.constant(f"{name}/zero", np.zeros(scale.shape, array.dtype)),
            axis=axis,
        )

    def rounded(self, tensor: str, scale: float | None = None, zero: int | None = None) -> str:
        return self.op("QuantizeLinear", tensor, *self.scales(scale or self.scale, zero))

    def again(self, tensor: str, like: str) -> str:
        node = next(node for node in self.nodes if node.output[0] == like)
        return self.op("DequantizeLinear", tensor, *node.input[1:])

    def graph(self, *results: str) -> Graph:
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(self.dtype))
        outputs = [helper.make_tensor_value_info(name, kind, None) for name in results]
        constants = [numpy_helper.from_array(a, name) for name, a in self.constants.items()]
        graph = helper.make_graph(self.nodes, "part", self.inputs, outputs, constants)
        opsets = [helper.make_opsetid("", 17)]
        return hetsched.read_onnx(helper.make_model(graph, opset_imports=opsets, ir_version=8))


def drawn(graph: Graph, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    limits = [np.iinfo(tensor.dtype) for tensor in graph.inputs]
    return [
        rng.integers(limit.min, limit.max + 1, tensor.shape).astype(tensor.dtype)
        for tensor, limit in zip(graph.inputs, limits, strict=True)
    ]


def runtime(graph: Graph, inputs: list[np.ndarray]) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(to_onnx(graph).SerializeToString())
    named = {tensor.name: array for tensor, array in zip(graph.inputs, inputs, strict=True)}
    return list(session.run([tensor.name for tensor in graph.outputs], named))


def convolution(seed: int) -> Graph:
    """A drawn convolution, its Relu or Clip or none."""
    rng = np.random.default_rng(seed)
    build = Build(dtype=("int8", "uint8")[seed % 2])
    group = int(rng.choice([1, 1, 1, 2, 4]))
    inputs, outputs = (int(rng.integers(1, 7)) * group for _ in range(2))
    if seed % 5 == 0:
        group, outputs = inputs, inputs
    kernel, strides, dilations = (rng.integers(1, high, 2).tolist() for high in (4, 3, 3))
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    height, width = (int(r + rng.integers(0, 9)) for r in reach)
    pads = [int(rng.integers(0, r)) for r in (*reach, *reach)]
    zero = int(rng.integers(-20, 20)) + build.zero
    x = build.input(1, inputs, height, width, zero=zero)
    weights = rng.integers(-127, 128, (outputs, inputs // group, *kernel)).astype(np.int8)
    scale = (rng.random(outputs) + 0.5) / np.sqrt(weights[0].size) / 150
    w = build.weights(weights, scale)
    bias = rng.integers(-500, 500, outputs).astype(np.int32)
    b = build.weights(bias, scale.astype(np.float32) * np.float32(0.05))
    y = build.op(
        "Conv", x, w, b, group=group, strides=strides, dilations=dilations, pads=pads,
        kernel_shape=kernel,
    )  # fmt: skip
    if seed % 3 == 0:
        y = build.op("Relu", y)
    elif seed % 3 == 1:
        ends = (build.constant("low", np.float32(-1)), build.constant("high", np.float32(2.5)))
        y = build.op("Clip", y, *ends)
    return build.graph(build.rounded(y, zero=int(rng.integers(-20, 20)) + build.zero))


def product(seed: int, kind: str) -> Graph:
    rng = np.random.default_rng(seed)
    build = Build(dtype=("int8", "uint8")[seed % 2])
    rows, inputs, outputs = (int(size) for size in rng.integers(1, 40, 3))
    x = build.input(*((2, rows) if kind == "MatMul" else (rows,)), inputs)
    upright = bool(seed % 3 == 0 and kind == "Gemm")
    shape = (outputs, inputs) if upright else (inputs, outputs)
    weights = rng.integers(-127, 128, shape).astype(np.int8)
    scale = (rng.random(outputs) + 0.5) / np.sqrt(inputs) / 150
    w = build.weights(weights, scale, axis=0 if upright else 1)
    if kind == "MatMul":
        return build.graph(build.rounded(build.op("MatMul", x, w)))
    bias = rng.integers(-500, 500, outputs).astype(np.int32)
    b = build.weights(bias, scale.astype(np.float32) * np.float32(0.05))
    return build.graph(build.rounded(build.op("Gemm", x, w, b, transB=int(upright))))


def joined(seed: int) -> Graph:
    """Images behind each other by channel, of one scale or of several."""
    rng = np.random.default_rng(seed)
    build = Build(dtype=("int8", "uint8")[seed % 2])
    area = rng.integers(1, 20, 2).tolist()
    parts = []
    for channels in (*(16 * rng.integers(1, 4, rng.integers(1, 4))), rng.integers(1, 30)):
        scale = float(rng.uniform(0.02, 0.05)) if seed % 3 else None
        zero = build.zero + int(rng.integers(-20, 20)) if seed % 3 else None
        parts.append(build.input(1, int(channels), *area, scale=scale, zero=zero))
    y = build.op("Concat", *parts, axis=1)
    y = build.op("Relu", y) if seed % 3 == 1 else y
    return build.graph(build.rounded(y))


def drawn_part(seed: int) -> Graph:
    """A convolution, a product, images behind each other, or a pool and a sum in a row."""
    rng = np.random.default_rng(seed)
    choice = seed % 4
    if choice < 2:
        return convolution(seed // 4)
    if choice == 2:
        return product(seed // 4, ("Gemm", "MatMul")[seed // 4 % 2])
    if seed // 4 % 2:
        return joined(seed // 8)
    build = Build(dtype=("int8", "uint8")[seed // 8 % 2])
    shape = (1, *(int(size) for size in rng.integers(1, 30, 3)))
    x, other = build.input(*shape), build.input(*shape, scale=0.02)
    kernel = [int(rng.integers(1, min(size, 6) + 1)) for size in shape[2:]]
    y = build.op(
        "MaxPool", x, kernel_shape=kernel, strides=rng.integers(1, 4, 2).tolist(),
        pads=[k // 2 for k in kernel] * 2,
    )  # fmt: skip
    pooled = build.rounded(y)
    mean = build.rounded(build.op("GlobalAveragePool", build.again(pooled, like=x)), 0.03)
    return build.graph(build.rounded(build.op("Add", x, other), 0.07), mean)


def square(size: int) -> Graph:
    """A product of two square matrices, the second one constant."""
    build, rng = Build(), np.random.default_rng(0)
    values = rng.integers(-127, 128, (size, size)).astype(np.int8)
    w = build.weights(values, np.full(size, 1 / np.sqrt(size) / 150), axis=1)
    return build.graph(build.rounded(build.op("MatMul", build.input(size, size), w)))


def between_bytes(graph: Graph) -> Graph:
    """The part of a quantised model that computes: without what only rounds, or restores."""
    kinds = {"QuantizeLinear", "DequantizeLinear"}
    groups = [group for group in graph.groups if not {op.kind for op in group.ops} <= kinds]
    return graph.part([op for group in groups for op in group.ops], graph.name)
