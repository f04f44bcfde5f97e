"""What a kernel group makes a core do: cycles of arithmetic and bytes moved, by a count.

The count follows the rules by which kernels are scheduled (`schedules/cycles.py`): which tile of a
product stays in registers, whether a convolution is computed by transforms, what is copied to be
padded or put in blocks. It knows the graph of the group alone and compiles nothing, so that it
takes well below a millisecond.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import lcm, log2, prod
from typing import Any

from hetsched.graph import Graph
from hetsched.op import Op, Tensor
from hetsched.operation import operation_of
from hetsched.schedules.cycles import (
    FLOAT_NBYTES,
    TRANSFORM_CYCLES,
    Form,
    Window,
    convolutions,
    dense_tiles,
    phase_window,
    tiles,
)
from hetsched.schedules.rules import Rules
from hetsched.schedules.vectors import STARTED, Tile, busy_cycles

# What an operation on a vector takes beside an addition: functions by polynomials, and chains.
DEAR = {
    "Exp": 0.7, "Sigmoid": 1.0, "Tanh": 1.0, "Erf": 1.0, "Gelu": 1.5, "Swish": 1.0, "Softplus": 1.5,
    "Elu": 1.0, "Celu": 1.0, "Selu": 1.0, "Mish": 2.0, "Log": 1.0, "Pow": 0.2, "Sin": 1.5,
    "Cos": 1.5, "Sqrt": 0.3, "Div": 0.3, "Reciprocal": 0.3, "Softsign": 0.4,
}  # fmt: skip
CHEAP = {"Clip": 2, "HardSwish": 4, "HardSigmoid": 3, "LeakyRelu": 2, "Where": 2}
ENDS = frozenset(["QuantizeLinear", "DequantizeLinear"])
# The passes of a softmax, as functions of a vector, and what an element by itself takes.
SOFTMAX, SOFTMAX_ROW = 5, 20
# They ask of each element which input it comes from.
CHOOSING = frozenset(["Concat", "Pad"])
COPIES = frozenset("Concat Slice Pad Split Gather Expand Tile Resize".split())
# Their results have channels in blocks.
IN_BLOCKS = frozenset(["Conv", "ConvTranspose", "MaxPool", "AveragePool", "LRN"])
VIEWS = frozenset(["Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Dropout"])
# Bytes of an integer kernel that a lane takes together.
TOGETHER = 4
# Of what a kernel touches, that the second cache still has when the next one reads it.
KEPT_NBYTES = 1 << 20
# Elements that are reduced so few at a time are taken in vectors, whatever their axis.
UNROLLED = 8
# Of the weights of a tile, that the first cache holds beside what passes through.
NEAREST_NBYTES = 1 << 15
# Logarithms of the megabytes between two runs that leave all in the near caches, and nothing.
WARM, COLD = 2.0, 5.0
# More channels than these in a group of a grouped convolution are not worth zeros between groups.
MOST_MERGED = 64


@dataclass
class Work:
    """Of one run of a kernel, computed in the way that `family` names.

    `cycles` are those in which a core is busy, or bytes and elements that it has to move, by what
    they are for; `sizes` are plain counts that say more of the shape.
    """

    family: str = "other"
    cycles: dict[str, float] = field(default_factory=dict)
    sizes: dict[str, float] = field(default_factory=dict)

    def add(self, **cycles: float) -> None:
        for name, value in cycles.items():
            self.cycles[name] = self.cycles.get(name, 0.0) + value


def work_of(part: Graph, rules: Rules, megabytes: float) -> Work:
    """What one run of `part`, a kernel group as a graph, takes.

    The graph that it is of touches so many `megabytes` in a run.
    """
    anchor = next((op for op in part.ops if op.kind not in ENDS | VIEWS), part.ops[0])
    found = Work()
    integer = any(op.kind in ENDS for op in part.ops) and anchor.kind not in ENDS
    count = FAMILIES.get(anchor.kind)
    if count is None or not count(found, part, anchor, rules, integer):
        _passes(found, part, rules)
    _borders(found, part, anchor, rules)
    made = max(tensor.size for tensor in anchor.writes)
    if any(tensor.size > made for tensor in part.outputs) and "busy" in found.cycles:
        found.family = "gate"
    if integer:
        found.family = f"integer {found.family}"
    cold = min(1.0, max(0.0, (log2(megabytes) - WARM) / (COLD - WARM)))
    found.add(
        cold=cold,
        filters_cold=cold * found.cycles["filters"],
        moved_cold=cold * found.cycles["moved"],
    )
    found.sizes["megabytes"] = megabytes
    return found


def _passes(found: Work, part: Graph, rules: Rules) -> None:
    """Operations without an anchor that is known: passes over their results."""
    sizes = {t.size for op in part.ops for t in op.writes}
    found.family = "elementwise" if len(sizes) == 1 else "other"
    if any(op.kind in COPIES for op in part.ops):
        found.family = "copy"
    if all(op.kind in VIEWS for op in part.ops):
        found.family = "view"
    if all(op.kind in VIEWS | ENDS for op in part.ops) and part.ops[0].kind in ENDS:
        found.family = "quantisation"
    # The chain is one pass, over the largest of its results.
    op, tensor = max(
        ((op, tensor) for op in part.ops for tensor in op.writes), key=lambda pair: pair[1].size
    )
    run = _run(found, part, op, tensor)
    lanes = rules.vectors.lanes
    if any(op.kind in ENDS for op in part.ops) and found.family == "copy":
        # Bytes, of which each is scaled on its way.
        found.add(scalar=float(tensor.size))
    elif run % lanes == 0:
        found.add(plain=_vectors(tensor, rules))
    elif run > lanes and _is_cut(op) and all(other.kind in COPIES | VIEWS for other in part.ops):
        found.add(rows=tensor.size / run, copied=tensor.size / run * -(-run // lanes))
    else:
        # Short loops cost more to begin than to run.
        longer = [size for size in tensor.shape if size > 1]
        found.add(rows=tensor.size / longer[-1] if longer else 1.0)
        # In long runs it is asked for once, not for each element.
        asks = any(o.kind in CHOOSING and (run < lanes or not _is_constant(o)) for o in part.ops)
        asks = asks and not _is_told(part, op, tensor)
        found.add(**{"chosen" if asks else "scalar": float(tensor.size)})


def _is_cut(op: Op) -> bool:
    """Whether rows are copied as they are, if not whole, or not to the end of those of the result.

    Where rows are reflected, each element is asked for.
    """
    return op.kind == "Slice" or (op.kind == "Pad" and _is_constant(op))


def _is_constant(op: Op) -> bool:
    return op.attributes.get("mode", "constant") == "constant"


def _is_told(part: Graph, op: Op, tensor: Tensor) -> bool:
    """Whether the loops tell which input an element comes from, so that none is asked for it.

    An axis of few elements is unrolled, and a transposition can make one of several the outer one.
    """
    if op.kind != "Concat":
        return False
    axis = int(op.attributes["axis"]) % len(tensor.shape)
    if prod(tensor.shape[axis + 1 :]) == 1 and tensor.shape[axis] <= UNROLLED:
        return True
    moved = next((other for other in part.ops if other.kind == "Transpose"), None)
    return moved is not None and not _is_last(moved, axis)


def _run(found: Work, part: Graph, op: Op, tensor: Tensor) -> int:
    """How many elements of a result lie beside each other that are made in the same way."""
    handed = next((other for other in part.outputs if other.shape == tensor.shape), tensor)
    if found.family == "elementwise" or _is_packed(part, handed):
        return tensor.size
    if op.kind == "Concat":
        axis = int(op.attributes["axis"]) % len(tensor.shape)
        return prod(tensor.shape[axis + 1 :])
    return next((size for size in reversed(tensor.shape) if size > 1), 1)


def _vectors(tensor: Tensor, rules: Rules) -> float:
    return tensor.size / rules.vectors.lanes


def _borders(found: Work, part: Graph, anchor: Op, rules: Rules) -> None:
    """What is read and written, and the operations behind the anchor."""
    taken: dict[str, float] = {}
    for op in part.ops:
        for tensor in op.reads:
            nbytes = operation_of(op).read_nbytes(op, tensor)
            taken[tensor.name] = max(float(nbytes), taken.get(tensor.name, 0.0))
    read = sum(taken.get(tensor.name, 0.0) for tensor in part.inputs)
    weights = sum(nbytes for name, nbytes in taken.items() if name in part.constants)
    written = float(sum(tensor.nbytes for tensor in part.outputs))
    held = read + written + found.cycles.get("padded", 0.0) * FLOAT_NBYTES
    beyond = min(1.0, max(0.0, held / KEPT_NBYTES - 0.5))
    found.add(moved=read + written, far=(read + written) * beyond)
    if "filters" not in found.cycles:
        found.add(filters=weights)
    found.add(launch=1.0, called=float(len(taken)))
    behind = False
    for op in part.ops:
        if op is anchor:
            behind = True
            if op.kind not in DEAR and op.kind != "Transpose":
                continue
        if op.kind in VIEWS or op.kind in ENDS:
            continue
        size = sum(_vectors(t, rules) for t in op.writes)
        if op.kind in DEAR:
            found.add(dear=size * DEAR[op.kind])
        elif op.kind == "Transpose":
            kept = _keeps_nearest(op, anchor)
            found.add(**{"shifted" if kept else "turned": size * rules.vectors.lanes})
        elif behind:
            found.add(cheap=size * CHEAP.get(op.kind, 1))
    found.sizes["outputs"] = float(sum(t.size for t in part.outputs))
    found.sizes["inputs"] = float(sum(t.size for t in part.inputs))
    found.sizes["ops"] = float(len(part.ops))


def _keeps_nearest(op: Op, anchor: Op) -> bool:
    """Whether elements that lie beside each other still do so behind a transposition.

    What a kernel in blocks of channels hands to it has channels beside each other.
    """
    shape = op.input(0).shape
    in_blocks = anchor.kind in IN_BLOCKS and shape == anchor.output().shape
    longer = [axis for axis in range(len(shape)) if shape[axis] > 1]
    return _is_last(op, 1 if in_blocks else (longer or [0])[-1])


def _is_last(op: Op, axis: int) -> bool:
    """Whether a transposition makes this axis the last one of several elements."""
    shape = op.input(0).shape
    order: Any = op.attributes.get("perm", range(len(shape))[::-1])
    longer = [int(one) for one in order if shape[int(one)] > 1]
    return not longer or longer[-1] == axis


def _window(op: Op, kernel: tuple[int, ...], *, spatial: int) -> Window:
    """The window of an operation whose tensors are [n, c, ...], of two axes."""
    source, result = op.input(0).shape[2:], op.output().shape[2:]
    attributes = op.attributes

    def pair(values: Any, default: int) -> tuple[int, int]:
        values = tuple(values or (default,) * spatial)
        return (default, int(values[0])) if spatial == 1 else (int(values[0]), int(values[1]))

    def size(values: tuple[int, ...]) -> tuple[int, int]:
        return (1, values[0]) if spatial == 1 else (values[0], values[1])

    pads = tuple(attributes.get("pads") or (0,) * (2 * spatial))
    before, after = pads[:spatial], pads[spatial:]
    found = Window(
        kernel=size(kernel),
        strides=pair(attributes.get("strides"), 1),
        dilations=pair(attributes.get("dilations"), 1),
        padding=(*pair(before, 0), *pair(after, 0)),
        source=size(source),
        result=size(result),
    )
    if found.source[1] == found.result[1] == found.kernel[1] == 1:
        return found.turned
    return found


def _is_packed(part: Graph, tensor: Tensor) -> bool:
    return tensor.name in part.packed


def _packed(found: Work, op: Op) -> None:
    """Elements of bytes, which no neighbour has in blocks: put in blocks, and back."""
    found.add(packs=float(op.input(0).size), unpacks=float(op.output().size))


def _conversions(found: Work, part: Graph, *, skip: Tensor | None = None) -> None:
    """Elements that are put in blocks, or back, because neighbours have them plain."""
    for tensor in part.inputs:
        if tensor is not skip and len(tensor.shape) >= 3 and not _is_packed(part, tensor):
            found.add(blocked=float(tensor.size))
    for tensor in part.outputs:
        if len(tensor.shape) >= 2 and not _is_packed(part, tensor):
            found.add(unblocked=float(tensor.size))


def _steps(found: Work, steps: float, tile: Tile, lanes: int, *, depth: float = 0.0) -> None:
    """Cycles of `steps` multiply-adds of a whole tile, each tile of `depth` of them.

    Weights of a tile that the first cache does not hold come from the second for each tile.
    """
    panel = depth * tile.vectors * lanes * FLOAT_NBYTES
    streamed = min(1.0, max(0.0, panel / NEAREST_NBYTES - 0.5))
    found.add(
        busy=steps * busy_cycles(tile.broadcasts, tile.vectors),
        started=steps * STARTED,
        streamed=steps * tile.vectors * streamed,
    )
    found.sizes["broadcasts"] = tile.broadcasts
    found.sizes["vectors"] = tile.vectors


def _convolution(found: Work, part: Graph, op: Op, rules: Rules, integer: bool) -> bool:
    weight = op.input(1)
    spatial = len(weight.shape) - 2
    if spatial not in (1, 2) or (weight.name not in part.constants and not integer):
        return False
    window = _window(op, weight.shape[2:], spatial=spatial)
    lanes = rules.vectors.lanes
    groups = int(op.attributes.get("group", 1))
    batch, channels = op.input(0).shape[:2]
    outputs = op.output().shape[1]
    found.sizes.update(
        channels=channels, filters=outputs, rows=window.result[0], columns=window.result[1],
        taps=prod(window.kernel), stride=window.strides[1], batch=batch,
    )  # fmt: skip
    if groups == channels == outputs and groups > 1:
        return _depthwise(found, part, op, window, rules, integer)
    plain = groups == 1 and channels * 2 <= lanes and not _is_packed(part, op.input(0))
    if integer:
        return _integer_convolution(found, op, window, (batch, channels, outputs, groups), rules)
    zeros = 1.0
    if groups > 1:
        each, inner = outputs // groups, channels // groups
        together = lcm(lcm(inner, lanes) // inner, lcm(each, lanes) // each)
        if groups % together or (together > 1 and together * inner > MOST_MERGED):
            found.family = "uneven"
            blocks_in, blocks, same = _reach(outputs, each, inner, lanes), -(-outputs // lanes), 1
        else:
            found.family = "grouped"
            zeros = together
            groups //= together
            blocks_in = rules.vectors.blocks(channels // groups)
            same = rules.vectors.blocks(outputs // groups)
            blocks = same * groups
    else:
        found.family = "first" if plain else "dense"
        blocks_in, blocks = rules.vectors.blocks(channels), rules.vectors.blocks(outputs)
        same = blocks
    candidates: list[Any] = dense_tiles(window, same, rules.vectors, plain=plain)
    if groups == 1 and not plain and found.family == "dense":
        candidates = convolutions((batch, blocks_in, blocks), window, candidates, rules)
    found.sizes["zeros"] = zeros
    _conversions(found, part, skip=op.input(0) if plain else None)
    chosen = candidates[0]
    if isinstance(chosen, Form):
        return _winograd(found, chosen, (batch, blocks_in, blocks), window, rules)
    if window.is_pointwise and not plain:
        rows, columns = 1, chosen.covering(prod(window.result))
        found.family += " pointwise"
        if prod(window.result) * batch == 1:
            # Each weight is used once.
            found.family += " row"
    else:
        rows, columns = window.result[0], chosen.covering(window.result[1])
        seen = window.reach(columns)
        if seen != window.source:
            depth = channels if plain else rules.vectors.blocks(channels) * lanes
            found.add(padded=float(batch * depth * prod(seen)))
    inner = channels if plain else lanes
    depth = (1 if plain else blocks_in) * inner * prod(window.kernel)
    if channels < lanes and not plain:
        depth = channels * prod(window.kernel)
    count = batch * rows * columns * blocks / (chosen.broadcasts * chosen.vectors)
    _steps(found, count * depth, chosen, lanes, depth=depth)
    found.add(tiles=count)
    found.sizes["depth"] = depth
    found.add(filters=float(blocks * depth * lanes * FLOAT_NBYTES))
    found.sizes["again"] = rows * columns / chosen.broadcasts
    return True


def _reach(outputs: int, each: int, inner: int, lanes: int) -> int:
    """Blocks of input channels that a block of outputs reads of groups that are no whole blocks.

    Groups are of `each` outputs and of `inner` inputs.
    """
    reaches = []
    for start in range(0, outputs, lanes):
        last = min(start + lanes, outputs) - 1
        reaches.append(-(-(last // each + 1) * inner // lanes) - start // each * inner // lanes)
    return max(reaches)


def _winograd(
    found: Work, form: Form, shape: tuple[int, int, int], window: Window, rules: Rules
) -> bool:
    found.family = f"winograd {form.m}"
    (batch, inputs, outputs), lanes = shape, rules.vectors.lanes
    down, across = (-(-size // form.m) for size in window.result)
    places, per_chunk = (form.m + 2) ** 2, form.rows * across
    chunks = batch * -(-down // form.rows)
    steps = places * form.tile.covering(per_chunk) * outputs * inputs * lanes
    steps //= form.tile.broadcasts * form.tile.vectors
    _steps(found, float(chunks * steps), form.tile, lanes)
    nbytes = places * inputs * outputs * lanes**2 * FLOAT_NBYTES
    between = places * per_chunk * (inputs + form.group) * lanes * FLOAT_NBYTES
    found.add(
        transforms=chunks * places * per_chunk * (inputs + outputs) * TRANSFORM_CYCLES,
        filters=float(nbytes),
        filters_again=float(nbytes * (chunks - 1)),
        tiles=float(chunks * places * outputs / form.tile.vectors),
        padded=float(batch * inputs * lanes * prod(window.reach(window.result[1]))),
    )
    found.sizes.update(depth=inputs * lanes, between=between, chunks=chunks, again=chunks)
    return True


def _integer_convolution(
    found: Work, op: Op, window: Window, shape: tuple[int, int, int, int], rules: Rules
) -> bool:
    batch, channels, outputs, groups = shape
    lanes = rules.vectors.lanes
    found.family = "dense pointwise" if window.is_pointwise else "dense"
    blocks = rules.vectors.blocks(outputs)
    inner = lanes if channels >= lanes else -(-channels // TOGETHER) * TOGETHER
    depth = -(-channels // groups // inner) if channels >= inner * groups else 1
    height, width = window.result
    if window.is_pointwise:
        height, width = 1, height * width
    tile = rules.vectors.tiles(width, max(1, blocks // groups), exact=True)[0]
    count = batch * height * -(-width // tile.broadcasts) * blocks / tile.vectors
    steps = depth * inner // TOGETHER * prod(window.kernel)
    _steps(found, count * steps, tile, lanes)
    found.add(tiles=count, filters=float(blocks * lanes * depth * inner * prod(window.kernel)))
    if not window.is_pointwise:
        reach = window.reach(width)
        found.add(padded=float(batch * channels * prod(reach)))
    _packed(found, op)
    found.sizes["depth"] = steps
    return True


def _depthwise(
    found: Work, part: Graph, op: Op, window: Window, rules: Rules, integer: bool
) -> bool:
    found.family = "depthwise"
    lanes = rules.vectors.lanes
    blocks = rules.vectors.blocks(prod(op.input(0).shape[:2]))
    tile = tiles(window, rules.vectors)[0]
    columns = tile.covering(window.result[1])
    count = blocks * window.result[0] * columns / tile.broadcasts
    _steps(found, count * prod(window.kernel), tile, lanes)
    found.add(tiles=count, loads=count * prod(window.kernel) * tile.broadcasts)
    if integer:
        _packed(found, op)
    else:
        _conversions(found, part)
    padded = window.reach(columns) != window.source
    found.sizes["masked"] = 2.0 if padded else 1.0
    return True


def _transposed(found: Work, part: Graph, op: Op, rules: Rules, integer: bool) -> bool:
    weight = op.input(1)
    spatial = len(weight.shape) - 2
    if spatial not in (1, 2) or weight.name not in part.constants or integer:
        return False
    if int(op.attributes.get("group", 1)) != 1:
        return False
    found.family = "transposed"
    window = _window(op, weight.shape[2:], spatial=spatial)
    if window.source == (1, 1):
        window = Window(
            window.kernel, window.kernel, window.dilations, window.padding, window.source,
            window.result,
        )  # fmt: skip
    lanes = rules.vectors.lanes
    small = phase_window(window)
    batch, channels = op.input(0).shape[:2]
    outputs = op.output().shape[1]
    blocks = rules.vectors.blocks(outputs) * prod(window.strides)
    blocks_in = rules.vectors.blocks(channels)
    tile = dense_tiles(small, rules.vectors.blocks(outputs), rules.vectors, plain=False)[0]
    rows, columns = small.result[0], tile.covering(small.result[1])
    depth = blocks_in * lanes * prod(small.kernel)
    count = batch * rows * columns * blocks / (tile.broadcasts * tile.vectors)
    _steps(found, count * depth, tile, lanes, depth=depth)
    found.add(
        tiles=count,
        filters=float(blocks * depth * lanes * FLOAT_NBYTES),
        padded=float(batch * blocks_in * lanes * prod(small.reach(columns))),
        interleaved=float(op.output().size),
    )
    found.sizes.update(
        channels=channels, filters=outputs, rows=window.result[0], columns=window.result[1],
        taps=prod(window.kernel), stride=window.strides[1], batch=batch, depth=depth,
    )  # fmt: skip
    _conversions(found, part)
    return True


def _product(found: Work, part: Graph, op: Op, rules: Rules, integer: bool) -> bool:
    left, right = op.input(0).shape, op.input(1).shape
    if len(left) < 2 or len(right) < 2:
        return False
    if op.kind == "Gemm":
        if op.attributes.get("transA"):
            left = left[::-1]
        if op.attributes.get("transB"):
            right = right[::-1]
    constant = op.input(1).name in part.constants or integer
    lanes = rules.vectors.lanes
    batch = 1 if constant else prod(right[:-2])
    depth, columns = right[-2], right[-1]
    count = prod(left[:-1]) // batch
    found.family = "product of weights" if constant else "product"
    if count == 1:
        found.family += " row"
    blocks = rules.vectors.blocks(columns)
    tile = rules.vectors.tiles(count, blocks)[0]
    wide = -(-blocks // tile.vectors) * tile.vectors
    together = TOGETHER if integer else 1
    tiles_ = batch * tile.covering(count) * wide / (tile.broadcasts * tile.vectors)
    steps = tiles_ * -(-depth // together)
    _steps(found, steps, tile, lanes, depth=depth / together)
    nbytes = batch * wide * lanes * depth * (1 if integer else FLOAT_NBYTES)
    found.add(tiles=tiles_, filters=float(nbytes))
    if not constant and columns % (tile.vectors * lanes):
        found.add(padded=float(nbytes / FLOAT_NBYTES))
    found.sizes.update(
        channels=depth, filters=columns, rows=count, batch=batch, depth=depth,
        again=-(-count // tile.broadcasts),
    )  # fmt: skip
    return True


def _pool(found: Work, part: Graph, op: Op, rules: Rules, integer: bool) -> bool:
    spatial = len(op.input(0).shape) - 2
    kernel = op.attributes.get("kernel_shape")
    if spatial not in (1, 2) or not kernel:
        return False
    window = _window(op, tuple(kernel), spatial=spatial)
    found.family = "pool"
    if op.kind == "AveragePool":
        found.family = "average"
    planes = prod(op.input(0).shape[:2])
    _depthwise_like(found, planes, window, rules)
    found.sizes.update(
        channels=planes, rows=window.result[0], columns=window.result[1],
        taps=prod(window.kernel), stride=window.strides[1],
    )  # fmt: skip
    if integer:
        _packed(found, op)
    else:
        _conversions(found, part)
    return True


def _depthwise_like(found: Work, planes: int, window: Window, rules: Rules) -> None:
    blocks = rules.vectors.blocks(planes)
    tile = tiles(window, rules.vectors)[0]
    columns = tile.covering(window.result[1])
    count = blocks * window.result[0] * columns / tile.broadcasts
    found.add(tiles=count, loads=count * prod(window.kernel) * tile.broadcasts)


def _global(found: Work, part: Graph, op: Op, rules: Rules, integer: bool) -> bool:
    found.family = "mean"
    shape = op.input(0).shape
    if _is_packed(part, op.input(0)) or integer:
        blocks = rules.vectors.blocks(prod(shape[:2]))
        sums = next(count for count in range(8, 0, -1) if blocks % count == 0)
        found.add(loads=_vectors(op.input(0), rules), waits=_vectors(op.input(0), rules) / sums)
    else:
        found.family = "plain mean"
        found.add(serial=float(op.input(0).size))
    found.sizes.update(channels=prod(shape[:2]), rows=prod(shape[2:]))
    return True


def _row_wise(found: Work, part: Graph, op: Op, rules: Rules, integer: bool) -> bool:
    found.family = "softmax" if op.kind in ("Softmax", "LogSoftmax") else "normalisation"
    shape = op.input(0).shape
    lanes = rules.vectors.lanes
    of_one = found.family == "softmax" and part.opsets.get("", 13) >= 13
    # A softmax is of one axis, others, and those of old models, of all from theirs on.
    default = -1 if of_one or found.family == "normalisation" else 1
    axis = int(op.attributes.get("axis", default)) % len(shape)
    columns = shape[axis] if of_one else prod(shape[axis:])
    rows = prod(shape) // columns
    ragged = rows * (columns % lanes)
    found.add(loads=_vectors(op.input(0), rules), tiles=float(rows))
    if found.family == "softmax":
        # A maximum, exponentials, their sum and a quotient; what is no whole vector one by one.
        found.add(dear=SOFTMAX * rows * (columns // lanes), ragged=float(SOFTMAX_ROW * ragged))
    else:
        found.add(ragged=float(ragged))
    found.sizes.update(rows=rows, columns=columns)
    return True


def _reduction(found: Work, part: Graph, op: Op, rules: Rules, integer: bool) -> bool:
    found.family = "reduction"
    source, result = op.input(0), op.output()
    across = 0 if _is_packed(part, source) else _across(part, op, rules)
    if integer or across is None:
        found.add(serial=float(source.size))
    else:
        # The lanes of a vector are reduced one behind another.
        found.add(loads=_vectors(source, rules), serial=float(across * rules.vectors.lanes))
    found.sizes.update(rows=result.size, depth=source.size / max(1, result.size))
    return True


def _across(part: Graph, op: Op, rules: Rules) -> int | None:
    """Of a reduction in vectors, how many of them are reduced to one element; None: of none."""
    shape, lanes = op.input(0).shape, rules.vectors.lanes
    axes: Any = op.attributes.get("axes")
    if len(op.inputs) > 1 and op.inputs[1] is not None:
        axes = part.constants.get(op.input(1).name)
    every = range(len(shape))
    reduced = sorted(int(axis) % len(shape) for axis in (every if axes is None else axes))
    if not reduced or len(reduced) == len(shape):
        return None
    if reduced == list(every)[-len(reduced) :]:
        depth = prod(shape[axis] for axis in reduced)
        if depth <= UNROLLED:
            return 0
        return op.output().size if depth % lanes == 0 else None
    return 0 if reduced[-1] != len(shape) - 1 and shape[-1] % lanes == 0 else None


def _local(found: Work, part: Graph, op: Op, rules: Rules, integer: bool) -> bool:
    """Sums of squares over neighbouring channels, as a product with a matrix of ones and zeros."""
    tensor = op.input(0)
    if len(tensor.shape) != 4:
        return False
    found.family = "local normalisation"
    lanes, channels = rules.vectors.lanes, tensor.shape[1]
    blocks, pixels = rules.vectors.blocks(channels), prod(tensor.shape) // channels
    window = Window((1, 1), (1, 1), (1, 1), (0, 0, 0, 0), (1, pixels), (1, pixels))
    tile = dense_tiles(window, blocks, rules.vectors, plain=False)[0]
    depth = blocks * lanes
    count = tile.covering(pixels) * blocks / (tile.broadcasts * tile.vectors)
    _steps(found, count * depth, tile, lanes, depth=depth)
    # The squares are a pass of their own, and the root of a root and a quotient come behind.
    found.add(tiles=count, plain=_vectors(tensor, rules), dear=_vectors(tensor, rules))
    found.sizes.update(channels=channels, rows=pixels, depth=depth)
    _conversions(found, part)
    return True


def _recurrent(found: Work, part: Graph, op: Op, rules: Rules, integer: bool) -> bool:
    found.family = op.kind
    steps, batch, inputs = op.input(0).shape
    weights = op.input(1).shape
    directions, gates = weights[0], weights[1]
    hidden = op.input(2).shape[2]
    lanes = rules.vectors.lanes
    wide = -(-gates // lanes)
    # Weights that the first cache does not hold come from the second for each step.
    panel = hidden * gates * FLOAT_NBYTES
    streamed = min(1.0, max(0.0, panel / NEAREST_NBYTES - 0.5))
    found.add(
        streamed=directions * steps * batch * hidden * wide * streamed,
        busy=directions * steps * batch * inputs * wide / 2,
        recurrence=directions * steps * batch * hidden * wide / 2,
        dear=directions * steps * batch * wide,
        tiles=float(directions * steps),
        filters=float(directions * (inputs + hidden) * gates * FLOAT_NBYTES),
    )
    found.sizes.update(
        channels=inputs, filters=hidden, rows=steps, batch=batch, depth=hidden, again=steps
    )
    return True


FAMILIES: Mapping[str, Callable[[Work, Graph, Op, Rules, bool], bool]] = {
    "Conv": _convolution,
    "ConvTranspose": _transposed,
    "MatMul": _product,
    "Gemm": _product,
    "MaxPool": _pool,
    "AveragePool": _pool,
    "GlobalAveragePool": _global,
    "GlobalMaxPool": _global,
    "Softmax": _row_wise,
    "LogSoftmax": _row_wise,
    "LayerNormalization": _row_wise,
    "LRN": _local,
    "ReduceMean": _reduction,
    "ReduceSum": _reduction,
    "ReduceMax": _reduction,
    "ReduceMin": _reduction,
    "LSTM": _recurrent,
    "GRU": _recurrent,
    "RNN": _recurrent,
}
