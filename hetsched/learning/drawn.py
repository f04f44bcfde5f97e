"""Networks that nobody uses, drawn so that their kernels spread over shapes and kinds.

What a model has seen of a kind of kernel tells of others; a family that it has never seen is a
guess. So a device is also measured on networks that have a little of everything: convolutions of
all sorts, pooling, gates, transformers, recurrence, and what moves data.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from hetsched.graph import Graph
from hetsched.op import Op, Tensor

OPSET = 17


def networks(count: int, seed: int = 0) -> Iterator[Graph]:
    """`count` networks, of images, tokens and sequences in turn; the same for the same seed."""
    kinds: tuple[Callable[[np.random.Generator, str], Graph], ...] = (_image, _tokens, _sequence)
    for index in range(count):
        rng = np.random.default_rng((seed, index))
        # Images have most kinds of kernels.
        kind = kinds[(0, 1, 0, 2)[index % 4]]
        yield kind(rng, f"drawn{index}")


class _Network:
    """A network in the making: each method adds an operation and returns what it writes."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.ops: list[Op] = []
        self.constants: dict[str, np.ndarray] = {}

    def add(
        self,
        kind: str,
        *inputs: Tensor,
        shape: Sequence[int] | None = None,
        outputs: Sequence[Sequence[int]] = (),
        **attributes: object,
    ) -> Tensor:
        name = f"{kind.lower()}{len(self.ops)}"
        shapes = outputs or [inputs[0].shape if shape is None else shape]
        made = [
            Tensor(f"{name}.{i}", tuple(map(int, sizes)), "float32")
            for i, sizes in enumerate(shapes)
        ]
        self.ops.append(Op(name, kind, inputs, tuple(made), attributes))
        return made[0]

    def weights(self, *shape: int, inputs: int = 1) -> Tensor:
        values = self.rng.standard_normal(shape, np.float32) / np.float32(max(1, inputs) ** 0.5)
        return self.constant(values)

    def constant(self, values: np.ndarray) -> Tensor:
        name = f"constant{len(self.constants)}"
        self.constants[name] = values
        return Tensor(name, values.shape, values.dtype.name)

    def integers(self, *values: int) -> Tensor:
        return self.constant(np.array(values, np.int64))

    def conv(
        self, x: Tensor, filters: int, kernel: int = 1, stride: int = 1, group: int = 1
    ) -> Tensor:
        batch, channels, *image = x.shape
        pad = kernel // 2
        sides = [(size + 2 * pad - kernel) // stride + 1 for size in image]
        each = channels // group
        weights = self.weights(
            filters, each, *[kernel] * len(image), inputs=each * kernel ** len(image)
        )
        return self.add(
            "Conv", x, weights, self.weights(filters), shape=(batch, filters, *sides),
            kernel_shape=(kernel,) * len(image), strides=(stride,) * len(image),
            pads=(pad,) * 2 * len(image), dilations=(1,) * len(image), group=group,
        )  # fmt: skip

    def pool(self, x: Tensor, kind: str, kernel: int, stride: int) -> Tensor:
        pad = (kernel - 1) // 2
        sides = [(size + 2 * pad - kernel) // stride + 1 for size in x.shape[2:]]
        return self.add(
            kind, x, shape=(*x.shape[:2], *sides), kernel_shape=(kernel,) * len(sides),
            strides=(stride,) * len(sides), pads=(pad,) * 2 * len(sides),
        )  # fmt: skip

    def product(self, x: Tensor, columns: int) -> Tensor:
        made = self.add(
            "MatMul", x, self.weights(x.shape[-1], columns, inputs=x.shape[-1]),
            shape=(*x.shape[:-1], columns),
        )  # fmt: skip
        return self.add("Add", made, self.weights(columns))

    def active(self, x: Tensor) -> Tensor:
        """One of the activations in use."""
        kind = self.rng.choice(
            ["Relu", "Relu", "Clip", "Sigmoid", "HardSwish", "LeakyRelu", "Tanh"]
        )
        if kind == "Clip":
            bounds = [self.constant(np.array(value, np.float32)) for value in (0, 6)]
            return self.add("Clip", x, *bounds)
        if kind == "Sigmoid":
            return self.add("Mul", x, self.add("Sigmoid", x))
        return self.add(str(kind), x)

    def reshaped(self, x: Tensor, *shape: int) -> Tensor:
        return self.add("Reshape", x, self.integers(*shape), shape=shape)

    def turned(self, x: Tensor, *order: int) -> Tensor:
        return self.add("Transpose", x, shape=[x.shape[axis] for axis in order], perm=order)

    def graph(self, name: str, x: Tensor, result: Tensor) -> Graph:
        return Graph(name, tuple(self.ops), (x,), (result,), self.constants, {"": OPSET})


def _image(rng: np.random.Generator, name: str) -> Graph:
    net = _Network(rng)
    side = int(rng.choice([32, 56, 96, 160, 224]))
    x = value = Tensor("x", (1, 3, side, side), "float32")
    width = int(rng.integers(8, 72))
    value = net.active(net.conv(value, width, int(rng.choice([3, 5, 7])), 2))
    if rng.random() < 0.5:
        value = net.pool(value, "MaxPool", 3, 2)
    blocks = [_plain, _bottleneck, _separable, _gated, _branches, _grouped, _fire]
    while value.shape[2] >= 4 and len(net.ops) < 90:
        width = min(1024, int(width * rng.uniform(1.2, 2.2)))
        for block in rng.permutation(len(blocks))[: int(rng.integers(1, 4))]:
            value = blocks[block](net, value, width)
        way = rng.integers(3)
        if way == 0:
            value = net.pool(value, str(rng.choice(["MaxPool", "AveragePool"])), 2, 2)
        else:
            value = net.active(net.conv(value, width, (3, 1)[way - 1], 2))
    value = net.add("GlobalAveragePool", value, shape=(1, value.shape[1], 1, 1))
    value = net.add("Flatten", value, shape=(1, value.shape[1]))
    columns = int(rng.integers(5, 1200))
    value = net.add(
        "Gemm", value, net.weights(columns, value.shape[1], inputs=value.shape[1]),
        net.weights(columns), shape=(1, columns), transB=1,
    )  # fmt: skip
    return net.graph(name, x, net.add("Softmax", value, axis=-1))


def _plain(net: _Network, x: Tensor, width: int) -> Tensor:
    made = net.active(net.conv(x, width, 3))
    return net.add("Relu", net.add("Add", net.conv(made, width, 3), made))


def _bottleneck(net: _Network, x: Tensor, width: int) -> Tensor:
    narrow = max(4, int(width * net.rng.uniform(0.2, 0.6)))
    made = net.active(net.conv(x, narrow))
    made = net.active(net.conv(made, narrow, 3))
    return net.active(net.conv(made, width))


def _separable(net: _Network, x: Tensor, width: int) -> Tensor:
    wide = x.shape[1] * int(net.rng.integers(1, 4))
    made = net.active(net.conv(x, wide))
    made = net.active(net.conv(made, wide, int(net.rng.choice([3, 5, 7])), 1, wide))
    return net.conv(made, width)


def _gated(net: _Network, x: Tensor, width: int) -> Tensor:
    made = net.active(net.conv(x, width, int(net.rng.choice([1, 3]))))
    gate = net.add("GlobalAveragePool", made, shape=(1, width, 1, 1))
    gate = net.add("Relu", net.conv(gate, max(2, width // 4)))
    gate = net.add(str(net.rng.choice(["Sigmoid", "HardSigmoid"])), net.conv(gate, width))
    return net.add("Mul", made, gate)


def _branches(net: _Network, x: Tensor, width: int) -> Tensor:
    sizes = [max(2, int(width * share)) for share in net.rng.dirichlet([2.0] * 3)]
    if net.rng.random() < 0.6:
        sizes = [max(16, size // 16 * 16) for size in sizes]
    one = net.active(net.conv(x, sizes[0]))
    two = net.active(net.conv(net.active(net.conv(x, max(4, sizes[1] // 2))), sizes[1], 3))
    three = net.active(net.conv(net.pool(x, "MaxPool", 3, 1), sizes[2]))
    return net.add("Concat", one, two, three, shape=(1, sum(sizes), *x.shape[2:]), axis=1)


def _grouped(net: _Network, x: Tensor, width: int) -> Tensor:
    each = int(net.rng.choice([8, 16, 24]))
    groups = max(2, width // each)
    made = net.active(net.conv(x, groups * each))
    return net.active(net.conv(made, groups * each, 3, 1, groups))


def _fire(net: _Network, x: Tensor, width: int) -> Tensor:
    narrow = net.active(net.conv(x, max(8, width // 6)))
    half = max(8, width // 2)
    pair = [net.active(net.conv(narrow, half, kernel)) for kernel in (1, 3)]
    return net.add("Concat", *pair, shape=(1, 2 * half, *x.shape[2:]), axis=1)


def _tokens(rng: np.random.Generator, name: str) -> Graph:
    net = _Network(rng)
    length, heads = int(rng.integers(16, 220)), int(rng.choice([2, 4, 6, 12]))
    width = heads * int(rng.choice([16, 32, 64]))
    x = value = Tensor("x", (1, length, width), "float32")
    for _ in range(2):
        value = net.add("Add", value, _attention(net, _normalised(net, value), heads))
        inner = net.product(_normalised(net, value), int(width * rng.uniform(1.5, 4)))
        value = net.add("Add", value, net.product(_gelu(net, inner), width))
        width = value.shape[2]
    mean = net.add("ReduceMean", value, shape=(1, width), axes=(1,), keepdims=0)
    return net.graph(name, x, net.add("Tanh", net.product(mean, int(rng.integers(4, 600)))))


def _normalised(net: _Network, x: Tensor) -> Tensor:
    scale, shift = net.weights(x.shape[-1]), net.weights(x.shape[-1])
    return net.add("LayerNormalization", x, scale, shift, axis=-1, epsilon=1e-5)


def _gelu(net: _Network, x: Tensor) -> Tensor:
    root, one, half = (net.constant(np.array(value, np.float32)) for value in (2**0.5, 1.0, 0.5))
    inner = net.add("Add", net.add("Erf", net.add("Div", x, root)), one)
    return net.add("Mul", net.add("Mul", x, inner), half)


def _attention(net: _Network, x: Tensor, heads: int) -> Tensor:
    _, length, width = x.shape
    each = width // heads
    parts = [
        net.turned(net.reshaped(net.product(x, width), 1, length, heads, each), *order)
        for order in ((0, 2, 1, 3), (0, 2, 3, 1), (0, 2, 1, 3))
    ]
    scores = net.add("MatMul", parts[0], parts[1], shape=(1, heads, length, length))
    scores = net.add("Mul", scores, net.constant(np.array(each**-0.5, np.float32)))
    mixed = net.add(
        "MatMul", net.add("Softmax", scores, axis=-1), parts[2], shape=(1, heads, length, each)
    )
    return net.product(net.reshaped(net.turned(mixed, 0, 2, 1, 3), 1, length, width), width)


def _sequence(rng: np.random.Generator, name: str) -> Graph:
    net = _Network(rng)
    length, channels = int(rng.integers(40, 1200)), int(rng.integers(8, 100))
    x = value = Tensor("x", (1, channels, length), "float32")
    for _ in range(3):
        value = net.active(net.conv(value, int(rng.integers(16, 160)), int(rng.choice([3, 5, 9]))))
        value = net.pool(value, "MaxPool", 2, 2)
    _, channels, length = value.shape
    hidden = int(rng.integers(16, 160))
    value = net.turned(value, 2, 0, 1)
    kind, gates = [("LSTM", 4), ("GRU", 3)][int(rng.integers(2))]
    value = net.add(
        kind, value, net.weights(1, gates * hidden, channels, inputs=channels),
        net.weights(1, gates * hidden, hidden, inputs=hidden), net.weights(1, 2 * gates * hidden),
        outputs=[(length, 1, 1, hidden)], hidden_size=hidden,
    )  # fmt: skip
    value = net.add("Squeeze", value, net.integers(1), shape=(length, 1, hidden))
    rows = net.reshaped(value, length, hidden)
    wide = net.active(net.product(rows, int(rng.integers(20, 300))))
    largest = net.add("ReduceMax", wide, shape=(1, wide.shape[1]), axes=(0,), keepdims=1)
    spread = net.add("Sub", wide, largest)
    half = wide.shape[1] // 2
    left = net.add(
        "Slice", spread, net.integers(0), net.integers(half), net.integers(1),
        shape=(length, half),
    )  # fmt: skip
    joined = net.add("Concat", left, spread, shape=(length, half + wide.shape[1]), axis=1)
    filled = net.add("Pad", joined, net.integers(0, 3, 0, 2), shape=(length, joined.shape[1] + 5))
    total = net.add("ReduceSum", filled, net.integers(1), shape=(length, 1), keepdims=1)
    return net.graph(name, x, net.add("Sqrt", net.add("Mul", total, total)))
