"""Which tensors kernel groups hand over in blocks of channels, as their convolutions have them.

A part that makes or reads a tensor in blocks would else convert it at its border. The rule follows
`schedules/layout.py`, which plans what stands in blocks inside a part; where it misjudges that, a
part converts, which costs time and changes no result.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import prod

import numpy as np

from hetsched.device import Device
from hetsched.graph import Graph
from hetsched.op import Op, Tensor, in_blocks
from hetsched.plugin import load
from hetsched.target import Target

# Their results are in blocks if what they read is.
ELEMENTWISE = frozenset(
    """Abs Add BatchNormalization Clip Div Erf Gelu HardSigmoid HardSwish Identity LRN LeakyRelu
    Mul Neg Reciprocal Relu Sigmoid Softsign Sqrt Sub Sum Tanh""".split()
)
# Those of them that only whole blocks are fit for: what fills one up may be zero, or negative.
PARTIAL = frozenset("Div LRN Reciprocal Softsign Sqrt".split())
# They read one tensor beside constants.
UNARY = frozenset(("BatchNormalization", "Clip"))


def between(graph: Graph, device: Device) -> Graph:
    """`graph` with its tensors as parts hand them over if all are on devices like `device`.

    So that a part of it is what runs, and takes the time that it takes, among its neighbours.
    """
    lanes = load(Target, device.target).lanes(device)
    return replace(graph, packed=dict.fromkeys(packed(graph, lanes), lanes)) if lanes else graph


def packed(graph: Graph, lanes: int) -> frozenset[str]:
    """The tensors of `graph` that stand in blocks of `lanes` channels wherever parts meet.

    An operation makes each in blocks, and one at least reads it so. What the graph takes and gives
    is plain. What `views` put together is in blocks if all of its pieces are, each but the last of
    whole blocks.
    """
    made: set[str] = set()
    wanted: set[str] = set()
    for op in graph.ops:
        if _is_blocked(op, graph, made, lanes):
            made.add(op.output().name)
            wanted.update(tensor.name for tensor in op.reads)
    given = {tensor.name for tensor in graph.outputs}
    found = (made & wanted) - given
    for name, pieces in graph.views.items():
        names = {name, *(piece.name for piece in pieces)}
        whole = all(piece.shape[1] % lanes == 0 for piece in pieces[:-1])
        if names & found and names <= made - given and whole:
            found |= names
        else:
            found -= names
    return frozenset(found)


def pack(array: np.ndarray, lanes: int) -> np.ndarray:
    """An array [n, c, ...] in blocks of channels, filled up with zeros."""
    batch, blocks, pixels, _ = in_blocks(array.shape, lanes)
    flat = array.reshape(batch, array.shape[1], pixels)
    filled = np.pad(flat, ((0, 0), (0, blocks * lanes - array.shape[1]), (0, 0)))
    apart = filled.reshape(batch, blocks, lanes, pixels)
    return np.ascontiguousarray(apart.transpose(0, 1, 3, 2))


def unpack(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The plain array of `shape` that stands in blocks in `array`."""
    batch, blocks, pixels, lanes = array.shape
    flat = array.transpose(0, 1, 3, 2).reshape(batch, blocks * lanes, pixels)
    return np.ascontiguousarray(flat[:, : shape[1]]).reshape(shape)


def _is_blocked(op: Op, graph: Graph, made: set[str], lanes: int) -> bool:
    """Whether `op` computes on blocks, where the tensors `made` stand in them."""
    if op.domain or len(op.writes) != 1 or not op.reads:
        return False
    data, result = op.reads[0], op.output()
    if not _is_image(data) or not _is_image(result):
        return False
    if op.kind in FAMILIES:
        return FAMILIES[op.kind](op, graph)
    if op.kind == "GlobalAveragePool":
        return data.name in made
    if op.kind == "ReduceMean":
        image = data.shape[:2] + (1,) * len(data.shape[2:])
        return data.name in made and result.shape == image and prod(data.shape[2:]) > 1
    if op.kind == "Concat":
        whole = all(tensor.shape[1] % lanes == 0 for tensor in op.reads[:-1])
        axis = int(op.attributes["axis"]) % len(result.shape)
        fits = axis in (0, 2) or (axis == 1 and whole)
        return fits and all(tensor.name in made for tensor in op.reads)
    if op.kind == "Slice":
        return data.name in made and _slices(op, graph, lanes)
    if op.kind not in ELEMENTWISE or not any(tensor.name in made for tensor in op.reads):
        return False
    divided = op.kind == "Div" and op.input(1).name in graph.constants and op.input(1).size == 1
    if op.kind in PARTIAL and not divided and result.shape[1] % lanes:
        return False
    operands = op.reads[:1] if op.kind in UNARY else op.reads
    return all(_fits(tensor, result, graph) for tensor in operands)


def _is_image(tensor: Tensor) -> bool:
    return tensor.dtype == "float32" and len(tensor.shape) in (3, 4)


def _fits(tensor: Tensor, result: Tensor, graph: Graph) -> bool:
    """Whether an operand is of the result's channels, or broadcast as blocks can be."""
    image = result.shape[2:]
    if tensor.name not in graph.constants:
        pixels = tensor.shape[2:]
        return tensor.shape[:2] == result.shape[:2] and pixels in (image, (1,) * len(image))
    shape = (1,) * (len(result.shape) - len(tensor.shape)) + tensor.shape
    return tensor.size == 1 or shape[1] == prod(shape) == result.shape[1]


def _slices(op: Op, graph: Graph, lanes: int) -> bool:
    """Whether the slice is of whole rows, of channels from a block on, or of the batch."""
    shape, result = op.input(0).shape, op.output().shape
    constants = [graph.constants.get(op.input(i).name) for i in range(1, len(op.reads))]
    if len(constants) < 3 or any(array is None for array in constants) or shape[3:] != result[3:]:
        return False
    starts, _, axes, *steps = (array.tolist() for array in constants if array is not None)
    start = (
        dict(zip((axis % len(shape) for axis in axes), starts, strict=True)).get(1, 0) % shape[1]
    )
    whole = start + result[1] == shape[1] or result[1] % lanes == 0
    return start % lanes == 0 and whole and all(step == 1 for row in steps for step in row)


def _convolves(op: Op, graph: Graph) -> bool:
    return op.input(1).name in graph.constants


def _transposes(op: Op, graph: Graph) -> bool:
    apart = set(op.attributes.get("dilations", ())) <= {1}
    return apart and op.attributes.get("group", 1) == 1 and _convolves(op, graph)


def _averages(op: Op, graph: Graph) -> bool:
    apart = set(op.attributes.get("dilations", ())) <= {1}
    return apart and not op.attributes.get("ceil_mode", 0)


# By operation that computes on blocks whatever it reads.
FAMILIES: Mapping[str, Callable[[Op, Graph], bool]] = {
    "AveragePool": _averages,
    "Conv": _convolves,
    "ConvTranspose": _transposes,
    "MaxPool": lambda op, graph: True,
}
