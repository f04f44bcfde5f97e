"""Random graphs that ONNX Runtime can run, and systems for them."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper, numpy_helper

from hetsched.cost import Prices
from hetsched.device import Device, Link
from hetsched.graph import Graph, from_onnx
from hetsched.op import Op, Tensor
from hetsched.system import System

OPSET = 17
INFINITY = float("inf")


class Builder:
    """A graph in the making: each call adds an operation and returns what it writes."""

    def __init__(self) -> None:
        self.ops: list[Op] = []
        self.inputs: list[Tensor] = []
        self.constants: dict[str, np.ndarray] = {}

    def input(self, name: str, *shape: int, dtype: str = "float32") -> Tensor:
        self.inputs.append(Tensor(name, shape, dtype))
        return self.inputs[-1]

    def constant(self, array: np.ndarray, name: str = "") -> Tensor:
        name = name or f"c{len(self.constants)}"
        self.constants[name] = array
        return Tensor(name, array.shape, array.dtype.name)

    def op(
        self,
        kind: str,
        *inputs: Tensor | None,
        shape: tuple[int, ...] | None = None,
        dtype: str = "",
        name: str = "",
        **attributes: object,
    ) -> Tensor:
        """An operation with one output, by default like its first input, named after itself."""
        name = name or f"{kind.lower()}{len(self.ops)}"
        first = next(tensor for tensor in inputs if tensor is not None)
        output = Tensor(f"{name}.y", first.shape if shape is None else shape, dtype or first.dtype)
        self.ops.append(Op(name, kind, inputs, (output,), attributes))
        return output

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        name = f"split{len(self.ops)}"
        first = x.shape[1] // 2
        sizes = self.constant(np.array([first, x.shape[1] - first], np.int64))
        halves = tuple(
            Tensor(f"{name}.{i}", (x.shape[0], int(size), *x.shape[2:]), x.dtype)
            for i, size in enumerate((first, x.shape[1] - first))
        )
        self.ops.append(Op(name, "Split", (x, sizes), halves, {"axis": 1}))
        return halves[0], halves[1]

    def graph(self, *outputs: Tensor, name: str = "graph") -> Graph:
        return Graph(
            name,
            tuple(self.ops),
            tuple(self.inputs),
            outputs,
            self.constants,
            {"": OPSET},
        )


def random_graph(rng: random.Random, most: int = 12) -> Graph:
    """Branches, residuals, shared tensors, several outputs and inputs, five dtypes."""
    build = Builder()
    values = np.random.default_rng(rng.randint(0, 1 << 30))
    pool = [build.input("x", 2, 4), build.input("image", 1, 2, 4, 4)]
    if rng.random() < 0.3:
        pool.append(build.input("z", 2, 4))

    def weight(*shape: int) -> Tensor:
        return build.constant(values.standard_normal(shape).astype(np.float32))

    for _ in range(rng.randint(1, most)):
        # Recent tensors are read more often, old ones now and then: a deep graph with shortcuts.
        x = pool[max(rng.randrange(len(pool)), rng.randrange(len(pool)))]
        pool.extend(_step(rng, build, x, pool, weight))
    read = {tensor.name for op in build.ops for tensor in op.reads}
    written = [tensor for op in build.ops for tensor in op.writes]
    outputs = [t for t in written if t.name not in read or rng.random() < 0.12]
    rng.shuffle(outputs)
    return build.graph(*outputs)


def _step(
    rng: random.Random,
    build: Builder,
    x: Tensor,
    pool: list[Tensor],
    weight: Callable[..., Tensor],
) -> tuple[Tensor, ...]:
    if x.dtype != "float32":
        if x.dtype == "bool":
            same = [t for t in pool if t.shape == x.shape and t.dtype == "float32"]
            if len(same) >= 2 and rng.random() < 0.5:
                one, other = rng.sample(same, 2)
                return (build.op("Where", x, one, other, dtype="float32"),)
        elif rng.random() < 0.3:
            return (build.op("Add", x, x),)
        return (build.op("Cast", x, dtype="float32", to=1),)
    kinds = ["unary", "unary", "binary", "binary", "product", "concat", "split", "cast", "other"]
    kind = rng.choice(kinds)
    rows, columns = x.shape[0], x.shape[1]
    if kind == "unary":
        return (build.op(rng.choice(["Relu", "Sigmoid", "Tanh", "Neg", "Abs"]), x),)
    if kind == "binary":
        other = rng.choice([t for t in pool if (t.shape, t.dtype) == (x.shape, x.dtype)])
        if rng.random() < 0.2:
            other = weight(*x.shape[1:])
        return (build.op(rng.choice(["Add", "Mul", "Sub", "Max"]), x, other),)
    if kind == "product":
        if len(x.shape) == 4:
            wide = rng.choice([2, 3])
            kernel, bias = weight(wide, columns, 3, 3), weight(wide)
            shape = (rows, wide, *x.shape[2:])
            return (build.op("Conv", x, kernel, bias, shape=shape, pads=(1, 1, 1, 1)),)
        wide = rng.choice([4, 6])
        return (build.op("MatMul", x, weight(columns, wide), shape=(rows, wide)),)
    if kind == "concat":
        fits = [
            t
            for t in pool
            if t.dtype == x.dtype and (t.shape[0], *t.shape[2:]) == (rows, *x.shape[2:])
        ]
        other = rng.choice(fits)
        shape = (rows, columns + other.shape[1], *x.shape[2:])
        return (build.op("Concat", x, other, shape=shape, axis=1),)
    if kind == "split" and columns > 1:
        return build.split(x)
    if kind == "cast":
        if rng.random() < 0.5:
            return (build.op("Greater", x, weight(1), dtype="bool"),)
        dtype, code = rng.choice([("int32", 6), ("float64", 11), ("int64", 7)])
        return (build.op("Cast", x, dtype=dtype, to=code),)
    if len(x.shape) == 4:
        flat = columns * x.shape[2] * x.shape[3]
        return (build.op("Flatten", x, shape=(rows, flat), axis=1),)
    if rng.random() < 0.5:
        return (build.op("Softmax", x, axis=1),)
    target = build.constant(np.array([rows, columns], np.int64))
    turned = build.op("Transpose", x, shape=(columns, rows), perm=(1, 0))
    return (build.op("Reshape", turned, target, shape=(rows, columns)),)


def random_order(rng: random.Random, graph: Graph) -> list[str]:
    """The groups in any topological order, all orders possible."""
    producer = {tensor.name: group.name for group in graph.groups for tensor in group.outputs}
    waits = {
        group.name: {producer[t.name] for t in group.inputs if t.name in producer}
        for group in graph.groups
    }
    order: list[str] = []
    while len(order) < len(waits):
        ready = [name for name in waits if name not in order and waits[name] <= set(order)]
        order.append(rng.choice(ready))
    return order


@dataclass(frozen=True)
class Table:
    """Prices drawn for each pair of group and device; some pairs have none."""

    rng: random.Random
    refused: float = 0.0

    def prices(self, graph: Graph, system: System) -> Prices:
        seconds: dict[str, Mapping[str, float]] = {}
        refusals: dict[str, Mapping[str, str]] = {}
        for group in graph.groups:
            row = {
                device.name: self.rng.choice([0.0, 1e-3, self.rng.uniform(1e-4, 1e-2)])
                for device in system.devices
            }
            kept = [name for name in row if self.rng.random() >= self.refused] or [*row][:1]
            seconds[group.name] = {name: row[name] for name in kept}
            refusals[group.name] = {name: "drawn" for name in row if name not in kept}
        return Prices("table", seconds, refusals)


def random_system(rng: random.Random, targets: tuple[str, ...] = ("imagined",)) -> System:
    """Two or three devices, all pairs linked, of one memory space or several."""
    count = rng.randint(2, 3)
    devices = tuple(
        Device(
            f"d{index}",
            rng.choice(targets),
            memory_space="host" if index == 0 or rng.random() < 0.5 else f"space{index}",
            flops_per_second=rng.choice([1e6, 1e7, 1e8]),
            bytes_per_second=rng.choice([1e6, 1e8]),
            launch_seconds=rng.choice([0.0, 1e-4]),
            fingerprint=f"kind {index}",
        )
        for index in range(count)
    )
    links = tuple(
        Link(a.name, b.name, rng.choice([0.0, 1e-5, 1e-3]), rng.choice([1e6, 1e9, INFINITY]))
        for a in devices
        for b in devices
        if a != b
    )
    return System("random", devices, links)


def graph_of(
    nodes: Sequence[onnx.NodeProto], shape: tuple[int, ...], constants: Mapping[str, np.ndarray]
) -> Graph:
    """From x to y, both of float32, each node named by its kind and place."""
    for index, node in enumerate(nodes):
        node.name = f"{node.op_type.lower()}{index}"
    graph = helper.make_graph(
        nodes,
        "part",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)
    return from_onnx(onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True))
