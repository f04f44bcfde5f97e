"""What TVM's ONNX importer gets wrong: repaired by a rewrite where one is small, else refused.

Found by running the node tests of ONNX, and older opsets against ONNX Runtime. What the importer
refuses by itself is not listed.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import numpy as np
import onnx

from hetsched.dtype import numpy_dtype
from hetsched.graph import Graph
from hetsched.lowering.quantized import INTEGER
from hetsched.op import Op, Tensor

PLACE = "coordinate_transformation_mode"
# Attributes of Resize and Upsample that the sizes of the output stand in for.
SIZING = frozenset(("axes", "keep_aspect_ratio_policy", "scales"))
# Opset 7 gave BatchNormalization its present inputs, and operators numpy's broadcasting.
OLDEST_OPSET = 7


def for_tvm(graph: Graph) -> Graph:
    """`graph` with operations that TVM imports rightly; the same object where all are."""
    constants = dict(graph.constants)
    ops: list[Op] = []
    for op in graph.ops:
        rewrite = REWRITES.get(op.kind) if op.domain == "" else None
        ops.extend([op] if rewrite is None else rewrite(op, graph, constants))
    if all(new is old for new, old in zip(ops, graph.ops, strict=False)):
        return graph
    return replace(graph, ops=tuple(ops), constants=constants)


def refusal(op: Op, graph: Graph) -> str | None:
    """Why TVM must not have `op`, though it would take it; None where its result is right."""
    if op.domain and (op.domain, op.kind) not in INTEGER:
        return "TVM knows the operations of ONNX's own domain only"
    if _changed(op.kind, _opset(graph)):
        return f"its meaning changed since opset {_opset(graph)}"
    if any(isinstance(value, bytes) for value in op.attributes.values()):
        return "it has nested graphs"
    for wrong, reason in DEFECTS.get(op.kind, ()):
        if wrong(op, graph):
            return reason
    return None


def _scale_and_shift(op: Op, graph: Graph, constants: dict[str, np.ndarray]) -> Iterator[Op]:
    """BatchNormalization with constant statistics as x * scale + shift.

    TVM takes it apart into operations on the statistics, which then run each time.
    """
    tensors = op.inputs[1:5]
    if len(op.writes) != 1 or not all(t is not None and t.name in constants for t in tensors):
        yield op
        return
    data, output = op.input(0), op.output()
    gamma, beta, mean, variance = (
        constants[op.input(i).name].astype(np.float64) for i in range(1, 5)
    )
    scale = gamma / np.sqrt(variance + float(op.attributes.get("epsilon", 1e-5)))
    shape = (-1, *[1] * (len(data.shape) - 2))
    factor = _constant(f"{op.name}/scale", scale.reshape(shape), data.dtype, constants)
    term = _constant(
        f"{op.name}/shift", (beta - mean * scale).reshape(shape), data.dtype, constants
    )
    scaled = Tensor(f"{op.name}/scaled", data.shape, data.dtype)
    yield Op(f"{op.name}/scale", "Mul", (data, factor), (scaled,))
    yield Op(op.name, "Add", (scaled, term), (output,))


def _to_sizes(op: Op, graph: Graph, constants: dict[str, np.ndarray]) -> Iterator[Op]:
    """Upsample and Resize as the Resize to sizes that all opsets of the importer share."""
    if op.has_input(1) and op.kind == "Resize" and op.attributes.get(PLACE) == "tf_crop_and_resize":
        yield op
        return
    attributes = {key: value for key, value in op.attributes.items() if key not in SIZING}
    shape = np.array(op.output().shape)
    if op.kind == "Upsample" or _opset(graph) < 11:
        shrinks = shape < op.input(0).shape
        if shrinks.any() and (shape > op.input(0).shape).any():
            yield op
            return
        # As ONNX Runtime has it, where the standard is silent.
        attributes |= {PLACE: "asymmetric", "nearest_mode": "ceil" if shrinks.any() else "floor"}
    sizes = _constant(f"{op.name}/sizes", shape, "int64", constants)
    yield Op(op.name, "Resize", (op.input(0), None, None, sizes), op.outputs, attributes)


def _to_inputs(op: Op, graph: Graph, constants: dict[str, np.ndarray]) -> Iterator[Op]:
    """Slice before opset 10, which has attributes in place of inputs."""
    if "starts" not in op.attributes:
        yield op
        return
    starts, ends = op.attributes["starts"], op.attributes["ends"]
    axes = op.attributes.get("axes") or range(len(starts))
    places = [
        _constant(f"{op.name}/{name}", np.array(values), "int64", constants)
        for name, values in (("starts", starts), ("ends", ends), ("axes", tuple(axes)))
    ]
    yield Op(op.name, "Slice", (op.input(0), *places), op.outputs)


def _to_additions(op: Op, graph: Graph, constants: dict[str, np.ndarray]) -> Iterator[Op]:
    """Sum, which TVM imports as the sum of a stack of broadcast copies, as additions."""
    total, *others = op.reads
    if not others:
        yield op
        return
    output = op.output()
    for index, other in enumerate(others):
        shape = tuple(np.broadcast_shapes(total.shape, other.shape))
        made = Tensor(f"{op.name}/sum{index}", shape, output.dtype)
        made = output if index == len(others) - 1 else made
        yield Op(f"{op.name}/add{index}", "Add", (total, other), (made,))
        total = made


def _to_band(op: Op, graph: Graph, constants: dict[str, np.ndarray]) -> Iterator[Op]:
    """LRN with the sum over neighbouring channels as a convolution by a band of weights.

    TVM takes the mean as a pooling over channels, for which it has no fast loops.
    """
    data, output = op.input(0), op.output()
    exponent = float(op.attributes.get("beta", 0.75))
    if data.dtype != "float32" or len(data.shape) != 4 or exponent not in (0.5, 0.75, 1.0):
        yield op
        return
    size, channels = int(op.attributes["size"]), data.shape[1]
    apart = np.arange(channels) - np.arange(channels)[:, None]
    near = (apart >= -((size - 1) // 2)) & (apart <= size // 2)
    band = near[:, :, None, None] * float(op.attributes.get("alpha", 1e-4)) / size
    weights = _constant(f"{op.name}/band", band, data.dtype, constants)
    bias = np.full(channels, float(op.attributes.get("bias", 1.0)))
    shift = _constant(f"{op.name}/bias", bias, data.dtype, constants)
    square, total, root, fourth, power = (
        Tensor(f"{op.name}/{name}", data.shape, data.dtype)
        for name in ("square", "total", "root", "fourth", "power")
    )
    yield Op(f"{op.name}/square", "Mul", (data, data), (square,))
    yield Op(f"{op.name}/total", "Conv", (square, weights, shift), (total,))
    divisor = total
    if exponent < 1:
        yield Op(f"{op.name}/root", "Sqrt", (total,), (root,))
        divisor = root
    if exponent == 0.75:
        yield Op(f"{op.name}/fourth", "Sqrt", (root,), (fourth,))
        yield Op(f"{op.name}/power", "Mul", (root, fourth), (power,))
        divisor = power
    yield Op(op.name, "Div", (data, divisor), (output,))


def _constant(name: str, array: np.ndarray, dtype: str, constants: dict[str, np.ndarray]) -> Tensor:
    constants[name] = array.astype(numpy_dtype(dtype))
    return Tensor(name, array.shape, dtype)


REWRITES: Mapping[str, Callable[[Op, Graph, dict[str, np.ndarray]], Iterator[Op]]] = {
    "BatchNormalization": _scale_and_shift,
    "LRN": _to_band,
    "Resize": _to_sizes,
    "Slice": _to_inputs,
    "Sum": _to_additions,
    "Upsample": _to_sizes,
}


def _opset(graph: Graph) -> int:
    return graph.opsets.get("", OLDEST_OPSET)


def _changed(kind: str, opset: int) -> bool:
    """Whether an operation of before `OLDEST_OPSET` is another one there."""
    if opset >= OLDEST_OPSET:
        return False
    try:
        now, then = (onnx.defs.get_schema(kind, version) for version in (OLDEST_OPSET, opset))
    except onnx.defs.SchemaError:
        return False
    return bool(now.since_version != then.since_version)


def _trains(op: Op, graph: Graph) -> bool:
    return bool(op.attributes.get("training_mode", 0)) or len(op.writes) > 1


def _drops(op: Op, graph: Graph) -> bool:
    if not op.has_input(2):
        return False
    mode = graph.constants.get(op.input(2).name)
    return mode is None or bool(mode.any())


def _is_signed(op: Op, graph: Graph) -> bool:
    return op.input(0).dtype.startswith("int")


def _is_float(op: Op, graph: Graph) -> bool:
    return "float" in op.input(0).dtype


def _is_unsortable(op: Op, graph: Graph) -> bool:
    return op.input(0).dtype not in ("float32", "float64", "int32", "int64")


def _uneven(op: Op, graph: Graph) -> bool:
    """Scales that do not give a whole number of elements: TVM takes the ratio of sizes instead."""
    index = 1 if op.kind == "Upsample" or _opset(graph) < 11 else 2
    scales = op.attributes.get("scales")
    if scales is None:
        if not op.has_input(index) or not op.input(index).size:
            return False
        scales = graph.constants.get(op.input(index).name)
    if scales is None:
        return True
    axes = op.attributes.get("axes") or range(len(scales))
    shape = op.input(0).shape
    sizes = [shape[axis] * float(scale) for axis, scale in zip(axes, scales, strict=True)]
    return any(abs(size - round(size)) > 1e-4 for size in sizes)


def _keeps_aspect(op: Op, graph: Graph) -> bool:
    return bool(op.attributes.get("keep_aspect_ratio_policy", "stretch") != "stretch")


def _has(attribute: str, *values: object) -> Callable[[Op, Graph], bool]:
    return lambda op, graph: op.attributes.get(attribute) in values


def _always(op: Op, graph: Graph) -> bool:
    return True


# By operation: when TVM's result is wrong, and how to say so.
DEFECTS: Mapping[str, tuple[tuple[Callable[[Op, Graph], bool], str], ...]] = {
    "Attention": ((_always, "TVM imports the operation of this name of com.microsoft"),),
    "BatchNormalization": ((_trains, "TVM normalises by the running mean, not the batch's"),),
    "BitShift": ((_is_signed, "TVM shifts signed integers by more than their width wrongly"),),
    "Dropout": ((_drops, "TVM never drops"),),
    "IsInf": (
        (_has("detect_negative", 0), "TVM detects both infinities"),
        (_has("detect_positive", 0), "TVM detects both infinities"),
    ),
    "Mod": ((_is_float, "TVM's remainder of floats is wrong at infinities and zeros"),),
    "Resize": (
        (_has("antialias", 1), "TVM ignores antialias"),
        (_uneven, "TVM replaces scales by the ratio of sizes"),
        (_keeps_aspect, "TVM ignores keep_aspect_ratio_policy"),
    ),
    "RoiAlign": ((_has("mode", "max"), "TVM takes the maximum before it interpolates"),),
    "SpaceToDepth": ((_has("mode", "CRD"), "TVM knows the order DCR only"),),
    "TopK": ((_is_unsortable, "TVM cannot sort this element type"),),
    "Upsample": ((_uneven, "TVM replaces scales by the ratio of sizes"),),
}
