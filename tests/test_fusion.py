"""Kernel groups: their invariants over random graphs, and golden text for known patterns."""

import random

import networkx
import numpy as np
import pytest
from graphs import Builder, random_graph
from hypothesis import given, settings
from hypothesis import strategies as st

from hetsched.fusion import Group, fuse
from hetsched.graph import Graph
from hetsched.op import Op, Tensor

KINDS = (
    "Relu Add Mul Sigmoid Reshape Conv MatMul Softmax Split DequantizeLinear QuantizeLinear"
).split()


def random_ops(rng: random.Random) -> tuple[list[Op], list[Tensor]]:
    """Operations of any kind and arity: what they compute does not matter to the groups."""
    tensors = [Tensor(f"x{i}", (4,), "float32") for i in range(2)]
    ops = []
    for index in range(rng.randint(1, 25)):
        near = tensors[-rng.randint(1, 5) :]
        inputs = tuple(rng.choice(near) for _ in range(rng.randint(1, 3)))
        outputs = tuple(
            Tensor(f"t{index}.{port}", (4,), "float32")
            for port in range(rng.choice([1, 1, 1, 1, 2]))
        )
        domain = rng.choice(["", "", "", "custom"])
        ops.append(Op(f"op{index}", rng.choice(KINDS), inputs, outputs, domain=domain))
        tensors.extend(outputs)
    read = {tensor.name for op in ops for tensor in op.reads}
    written = [tensor for op in ops for tensor in op.writes]
    return ops, [t for t in written if t.name not in read or rng.random() < 0.1]


def check_groups(groups: tuple[Group, ...], ops: list[Op], outputs: list[Tensor]) -> None:
    assert sorted(op.name for group in groups for op in group.ops) == sorted(op.name for op in ops)
    owner = {op.name: group.name for group in groups for op in group.ops}
    producer = {tensor.name: op for op in ops for tensor in op.writes}
    view = networkx.DiGraph()
    view.add_nodes_from(group.name for group in groups)
    for op in ops:
        for tensor in op.reads:
            if tensor.name in producer:
                view.add_edge(owner[producer[tensor.name].name], owner[op.name])
    view.remove_edges_from(networkx.selfloop_edges(view))
    assert networkx.is_directed_acyclic_graph(view)
    # In the order of the groups, and of the operations in them, all is written before it is read.
    position = {op.name: i for i, op in enumerate(op for group in groups for op in group.ops)}
    for op in ops:
        for tensor in op.reads:
            if tensor.name in producer:
                assert position[producer[tensor.name].name] < position[op.name]
    # What crosses the borders is what others read, or what leaves the graph.
    kept = {tensor.name for tensor in outputs}
    for group in groups:
        inside = {op.name for op in group.ops}
        written = [tensor for op in group.ops for tensor in op.writes]
        readers = {t.name: [op.name for op in ops if t in op.reads] for t in written}
        leaving = [t for t in written if t.name in kept or set(readers[t.name]) - inside]
        assert list(group.outputs) == leaving
        read = {t.name for op in group.ops for t in op.reads} - {t.name for t in written}
        assert {t.name for t in group.inputs + group.constants} == read
        # One exit: nothing but the last operation hands anything over.
        if len(group.ops) > 1:
            assert {t.name for t in leaving} <= {t.name for t in group.ops[-1].writes}


@settings(max_examples=500)
@given(st.integers(0, 1 << 32).map(random.Random))
def test_groups_of_any_operations(rng: random.Random) -> None:
    ops, outputs = random_ops(rng)
    check_groups(fuse(ops, outputs, {}), ops, outputs)


@settings(max_examples=60)
@given(st.integers(0, 1 << 32).map(random.Random))
def test_groups_of_models(rng: random.Random) -> None:
    graph = random_graph(rng, 25)
    check_groups(graph.groups, list(graph.ops), list(graph.outputs))


def test_random_operations_do_fuse() -> None:
    sizes = [
        len(group.ops) for seed in range(50) for group in fuse(*random_ops(random.Random(seed)), {})
    ]
    assert sum(size > 1 for size in sizes) > 50
    assert max(sizes) >= 4


def test_groups_visit_each_operation_a_bounded_number_of_times() -> None:
    visits = []
    for count in (200, 400):
        counted = _Counted(Op, count)
        fuse(counted, [counted[-1].output()], {})
        visits.append(counted.visits)
    assert visits[1] <= 2.1 * visits[0]


class _Counted(list):
    """A chain of operations that counts how often one of them is looked at."""

    def __init__(self, kind: type[Op], count: int) -> None:
        tensors = [Tensor(f"t{i}", (4,), "float32") for i in range(count + 1)]
        kinds = ["Conv", "Relu", "Softmax", "Add"]
        super().__init__(
            kind(f"op{i}", kinds[i % 4], (tensors[i],), (tensors[i + 1],)) for i in range(count)
        )
        self.visits = 0

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        self.visits += 1
        return super().__getitem__(index)


def text(graph: Graph) -> str:
    """A line for each group: operations, then what goes in and comes out."""
    return "\n".join(
        f"{group.kinds}({', '.join(t.name for t in group.inputs)}"
        f"; {', '.join(t.name for t in group.constants)})"
        f" -> {', '.join(t.name for t in group.outputs)}"
        for group in graph.groups
    )


def weight(build: Builder, name: str, *shape: int) -> Tensor:
    return build.constant(np.ones(shape, np.float32), name)


def conv(build: Builder, x: Tensor, name: str, bias: bool = False) -> Tensor:
    channels = x.shape[1]
    weights = [weight(build, f"{name}.w", channels, channels, 3, 3)]
    if bias:
        weights.append(weight(build, f"{name}.b", channels))
    return build.op("Conv", x, *weights, name=name, pads=(1, 1, 1, 1))


def residual_block(build: Builder) -> Graph:
    x = build.input("x", 1, 4, 8, 8)
    first = build.op("Relu", conv(build, x, "conv1"), name="relu1")
    second = conv(build, first, "conv2")
    total = build.op("Add", second, x, name="add")
    return build.graph(build.op("Relu", total, name="relu2"))


def projected_block(build: Builder) -> Graph:
    """The shortcut has a convolution too: the sum goes into the one that ends later."""
    x = build.input("x", 1, 4, 8, 8)
    main = conv(build, x, "main")
    shortcut = conv(build, x, "shortcut")
    return build.graph(build.op("Relu", build.op("Add", main, shortcut, name="add"), name="relu"))


def quantised_block(build: Builder) -> Graph:
    """What crosses the borders are integers; dequantisation stands in the group that needs it."""
    scale = build.constant(np.array(0.1, np.float32), "scale")
    x = build.input("x", 1, 4, 8, 8)
    weights = build.constant(np.ones((4, 4, 3, 3), np.int8), "w")

    def real(tensor: Tensor, name: str) -> Tensor:
        return build.op("DequantizeLinear", tensor, scale, name=name, shape=tensor.shape)

    def whole(tensor: Tensor, name: str) -> Tensor:
        return build.op("QuantizeLinear", tensor, scale, name=name)

    integers = whole(x, "q0")
    made = build.op(
        "Conv", real(integers, "d0"), real(weights, "dw"), name="conv", shape=x.shape,
        pads=(1, 1, 1, 1),
    )  # fmt: skip
    result = whole(build.op("Relu", made, name="relu"), "q1")
    total = build.op("Add", real(result, "d1"), real(integers, "d2"), name="add")
    return build.graph(real(whole(total, "q2"), "d3"))


def silu(build: Builder) -> Graph:
    x = conv(build, build.input("x", 1, 4, 8, 8), "conv")
    return build.graph(build.op("Mul", x, build.op("Sigmoid", x, name="sigmoid"), name="mul"))


def gelu(build: Builder) -> Graph:
    x = build.op("MatMul", build.input("x", 2, 4), weight(build, "w", 4, 4), name="matmul")
    half = build.constant(np.array(0.5, np.float32), "half")
    one = build.constant(np.array(1.0, np.float32), "one")
    root = build.constant(np.array(2**0.5, np.float32), "root")
    scaled = build.op("Erf", build.op("Div", x, root, name="div"), name="erf")
    moved = build.op("Add", scaled, one, name="add")
    return build.graph(build.op("Mul", build.op("Mul", x, moved, name="mul1"), half, name="mul2"))


def biased_conv(build: Builder) -> Graph:
    x = conv(build, build.input("x", 1, 4, 8, 8), "conv", bias=True)
    scale = weight(build, "scale", 4, 1, 1)
    return build.graph(build.op("Clip", build.op("Mul", x, scale, name="mul"), name="clip"))


def shared_tensor(build: Builder) -> Graph:
    """Two convolutions read one activation: the tail ends there."""
    x = build.op("Relu", conv(build, build.input("x", 1, 4, 8, 8), "stem"), name="relu")
    left, right = conv(build, x, "left"), conv(build, x, "right")
    return build.graph(build.op("Tanh", left, name="tanh"), right)


def output_in_the_middle(build: Builder) -> Graph:
    x = build.op("Relu", conv(build, build.input("x", 1, 4, 8, 8), "conv"), name="relu")
    return build.graph(x, build.op("Tanh", build.op("Neg", x, name="neg"), name="tanh"))


def attention(build: Builder) -> Graph:
    x = build.input("x", 2, 4)
    mask = build.input("mask", 2, 2)
    q, k, v = (
        build.op("MatMul", x, weight(build, f"w{n}", 4, 4), name=n, shape=(2, 4)) for n in "qkv"
    )
    turned = build.op("Transpose", k, name="transpose", shape=(4, 2), perm=(1, 0))
    scores = build.op("MatMul", q, turned, name="scores", shape=(2, 2))
    scaled = build.op("Mul", scores, weight(build, "scale", 1), name="scale_scores")
    shares = build.op("Softmax", build.op("Add", scaled, mask, name="masked"), name="softmax")
    return build.graph(build.op("MatMul", shares, v, name="mix", shape=(2, 4)))


GOLDEN = {
    residual_block: """
Conv+Relu(x; conv1.w) -> relu1.y
Conv+Add+Relu(relu1.y, x; conv2.w) -> relu2.y
""",
    projected_block: """
Conv(x; main.w) -> main.y
Conv+Add+Relu(x, main.y; shortcut.w) -> relu.y
""",
    quantised_block: """
QuantizeLinear(x; scale) -> q0.y
DequantizeLinear+DequantizeLinear+Conv+Relu+QuantizeLinear(q0.y; scale, w) -> q1.y
DequantizeLinear+DequantizeLinear+Add+QuantizeLinear(q1.y, q0.y; scale) -> q2.y
DequantizeLinear(q2.y; scale) -> d3.y
""",
    silu: """
Conv+Sigmoid+Mul(x; conv.w) -> mul.y
""",
    gelu: """
MatMul+Div+Erf+Add+Mul+Mul(x; w, root, one, half) -> mul2.y
""",
    biased_conv: """
Conv+Mul+Clip(x; conv.w, conv.b, scale) -> clip.y
""",
    shared_tensor: """
Conv+Relu(x; stem.w) -> relu.y
Conv(relu.y; right.w) -> right.y
Conv+Tanh(relu.y; left.w) -> tanh.y
""",
    output_in_the_middle: """
Conv+Relu(x; conv.w) -> relu.y
Neg+Tanh(relu.y; ) -> tanh.y
""",
    attention: """
MatMul(x; wq) -> q.y
MatMul(x; wv) -> v.y
MatMul+Transpose(x; wk) -> transpose.y
MatMul+Mul+Add(q.y, transpose.y, mask; scale) -> masked.y
Softmax(masked.y; ) -> softmax.y
MatMul(softmax.y, v.y; ) -> mix.y
""",
}


@pytest.mark.parametrize("pattern", GOLDEN, ids=lambda pattern: pattern.__name__)
def test_groups_of_a_known_pattern(pattern) -> None:  # type: ignore[no-untyped-def]
    assert text(pattern(Builder())) == GOLDEN[pattern].strip()
