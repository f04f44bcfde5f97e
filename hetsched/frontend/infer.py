"""Shapes: from onnx, then from ONNX Runtime for what onnx does not know."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

import onnx
import onnxruntime
from onnx import helper, numpy_helper, shape_inference

from hetsched import oracle
from hetsched.dtype import dtype_name
from hetsched.errors import ModelError
from hetsched.frontend.check import one_line
from hetsched.frontend.model import Model, fresh, to_proto, typed
from hetsched.graph import reads
from hetsched.op import Tensor

# The element types as ONNX Runtime writes them.
RUNTIME_TYPES = {
    f"tensor({name.lower()})": code
    for name, code in onnx.TensorProto.DataType.items()
    if code != onnx.TensorProto.UNDEFINED
}
DATA_DEPENDENT = frozenset(
    """Compress ConcatFromSequence ImageDecoder NonMaxSuppression NonZero RegexFullMatch StringSplit
    TfIdfVectorizer Unique""".split()
)
SHAPE_ARGUMENTS = frozenset(
    """AffineGrid BlackmanWindow CenterCropPad ConstantOfShape DFT Expand HammingWindow HannWindow
    MaxUnpool MelWeightMatrix OneHot Pad Range Reshape Resize STFT Slice Split Squeeze Tile TopK
    Unsqueeze Upsample""".split()
)
FIRST_INPUT_COUNTS = frozenset(
    "BlackmanWindow ConstantOfShape HammingWindow HannWindow MelWeightMatrix Range".split()
)
BRANCHING = frozenset(("If", "Loop", "Scan"))
# A list that names everything helps nobody.
MOST_NAMED = 5
INFERENCE_ERRORS = (shape_inference.InferenceError, RuntimeError, TypeError, ValueError)


def infer(model: Model) -> Model:
    """The model with the shapes that onnx can tell."""
    found = dict(model.tensors)
    for node in model.nodes:
        if node.op_type in OWN_RULES and not node.domain:
            found |= {tensor.name: tensor for tensor in OWN_RULES[node.op_type](model, node)}
    richer = replace(model, tensors=found)
    proto = _inferable(richer)
    try:
        inferred = shape_inference.infer_shapes(
            proto, check_type=True, strict_mode=True, data_prop=True
        )
    except INFERENCE_ERRORS:
        # Some of its rules refuse what runs; `confirm` asks ONNX Runtime who is right.
        try:
            inferred = shape_inference.infer_shapes(proto, data_prop=True)
        except INFERENCE_ERRORS as error:
            raise ModelError(one_line(error)) from None
    for value in (*inferred.graph.value_info, *inferred.graph.output):
        tensor = _static(value)
        if tensor and value.name not in model.constants:
            found.setdefault(value.name, tensor)
    return model if len(found) == len(model.tensors) else replace(model, tensors=found)


def ask_runtime(model: Model) -> Model:
    """The model with the shapes that only ONNX Runtime can tell."""
    own = {o for node in model.nodes if node.op_type in OWN_RULES for o in node.output}
    try:
        values = _open(model, unknown(model)).get_outputs()
        scalars = _scalars(model, [value.name for value in values if not value.shape])
    except ModelError:
        return model
    found = dict(model.tensors)
    for value in values:
        known = bool(value.shape) or value.name in scalars
        static = all(isinstance(dim, int) and dim >= 0 for dim in value.shape)
        if known and static and value.type in RUNTIME_TYPES and value.name not in own:
            dtype = dtype_name(RUNTIME_TYPES[value.type])
            found[value.name] = Tensor(value.name, tuple(value.shape), dtype)
    return model if len(found) == len(model.tensors) else replace(model, tensors=found)


def confirm(model: Model) -> None:
    """Asks ONNX Runtime about a model that onnx itself finds inconsistent.

    Raises
    ------
    ModelError
        Both refuse it.
    """
    try:
        proto = _inferable(model)
        shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True)
    except INFERENCE_ERRORS as error:
        try:
            _open(model, model.outputs)
        except ModelError:
            raise ModelError(_inconsistency(one_line(error))) from None


def unknown(model: Model) -> list[str]:
    """The tensors whose shape or element type is not known yet."""
    return [
        name for node in model.nodes for name in node.output if name and name not in model.tensors
    ]


def refuse_unknown(model: Model) -> None:
    """Refuses a model that still has tensors of unknown shape.

    Raises
    ------
    ModelError
        The message names the operations where it begins, and why.
    """
    lost = set(unknown(model))
    if not lost:
        return
    confirm(model)
    first = [
        node
        for node in model.nodes
        if lost.intersection(node.output) and not lost.intersection(reads(node))
    ]
    named = "; ".join(
        f"{node.op_type} '{node.name}': {_reason(model, node)}" for node in first[:MOST_NAMED]
    )
    more = f"; and {len(first) - MOST_NAMED} more" if len(first) > MOST_NAMED else ""
    raise ModelError(
        f"{named}{more}; every shape must be known before the model runs: export it without "
        "this, or cut it off there"
    )


def _reason(model: Model, node: onnx.NodeProto) -> str:
    if "Sequence" in node.op_type or node.op_type.startswith("Optional"):
        return "it makes a sequence or an optional value, not a tensor"
    if node.op_type in BRANCHING:
        return "its condition or its number of steps is only known when it runs"
    if node.op_type in DATA_DEPENDENT:
        return "its output shape depends on the data"
    if node.op_type in SHAPE_ARGUMENTS:
        open_inputs = [f"'{n}'" for n in list(node.input)[1:] if n and n not in model.constants]
        if open_inputs or node.op_type in FIRST_INPUT_COUNTS:
            what = ", ".join(open_inputs) or f"'{node.input[0]}'"
            return f"its output shape depends on the data in {what}"
    try:
        _open(model, (name for name in node.output if name))
    except ModelError as error:
        return f"its output shape is not known ({error})"
    return "neither onnx nor ONNX Runtime can tell its output shape"


def _inferable(model: Model) -> onnx.ModelProto:
    """The model for onnx's inference: what it is wrong about is given to it."""
    nodes = [node for node in model.nodes if node.op_type not in OWN_RULES or node.domain]
    proto = to_proto(model, nodes=nodes)
    if len(nodes) == len(model.nodes):
        return proto
    written = {name for node in nodes for name in node.output}
    given = [name for node in model.nodes for name in node.output if name and name not in written]
    kept = [value for value in proto.graph.value_info if value.name not in given]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(kept)
    proto.graph.input.extend(
        typed(model.tensors[name]) if name in model.tensors else onnx.ValueInfoProto(name=name)
        for name in given
    )
    return proto


def _short_time_fourier_transform(model: Model, node: onnx.NodeProto) -> list[Tensor]:
    """onnx counts the bins of both sides even where only one is asked for."""
    signal = model.tensor(node.input[0])
    step = model.constants.get(node.input[1])
    window = model.tensor(node.input[2]) if len(node.input) > 2 and node.input[2] else None
    length = model.constants.get(node.input[3]) if len(node.input) > 3 else None
    if signal is None or step is None or step.size != 1 or len(signal.shape) < 2:
        return []
    size = window.size if window else 0
    if length is not None and length.size == 1:
        size = int(length.item())
    if not 1 <= size <= signal.shape[1] or step.item() < 1:
        return []
    onesided = next((item.i for item in node.attribute if item.name == "onesided"), 1)
    frames = (signal.shape[1] - size) // int(step.item()) + 1
    bins = size // 2 + 1 if onesided else size
    return [Tensor(node.output[0], (signal.shape[0], frames, bins, 2), signal.dtype)]


def _elementwise(model: Model, node: onnx.NodeProto) -> list[Tensor]:
    """onnx has no rule for it."""
    tensor = model.tensor(node.input[0])
    return [replace(tensor, name=node.output[0])] if tensor else []


def _loop(model: Model, node: onnx.NodeProto) -> list[Tensor]:
    """The state of a loop, where one step leaves its shape as it is; then all steps do.

    onnx tells no shape at all, as the number of steps is open.
    """
    body = next(item.g for item in node.attribute if item.name == "body")
    states = [model.tensor(name) for name in node.input[2:]]
    own = {value.name for value in body.input} | {item.name for item in body.initializer}
    outer = [model.tensors[name] for name in reads(node) if name in model.tensors]
    if None in states or len(body.input) != len(states) + 2:
        return []
    given = [Tensor(body.input[0].name, (), "int64"), Tensor(body.input[1].name, (), "bool")]
    for value, state in zip(body.input[2:], states, strict=True):
        if state:
            given.append(replace(state, name=value.name))
    given += [tensor for tensor in outer if tensor.name not in own]
    weights = {item.name: numpy_helper.to_array(item) for item in body.initializer}
    step = infer(
        Model(
            name=body.name,
            nodes=tuple(body.node),
            inputs=tuple(map(typed, given)),
            outputs=tuple(value.name for value in body.output),
            constants={**model.constants, **weights},
            opsets=model.opsets,
            tensors={tensor.name: tensor for tensor in given},
        )
    )
    after = [step.tensor(value.name) for value in body.output[1 : len(states) + 1]]
    if any(
        old is None or new is None or (old.shape, old.dtype) != (new.shape, new.dtype)
        for old, new in zip(states, after, strict=True)
    ):
        return []
    results = zip(states, node.output, strict=False)
    return [replace(state, name=name) for state, name in results if state and name]


OWN_RULES = {
    "Loop": _loop,
    "MeanVarianceNormalization": _elementwise,
    "STFT": _short_time_fourier_transform,
}


def _static(value: onnx.ValueInfoProto) -> Tensor | None:
    kind = value.type.tensor_type
    if not kind.elem_type or not kind.HasField("shape"):
        return None
    if not all(dim.HasField("dim_value") and dim.dim_value >= 0 for dim in kind.shape.dim):
        return None
    return Tensor(
        value.name, tuple(dim.dim_value for dim in kind.shape.dim), dtype_name(kind.elem_type)
    )


def _scalars(model: Model, names: Sequence[str]) -> set[str]:
    """Those of `names` that have no dimensions; a session lists tensors of unknown rank alike."""
    if not names:
        return set()
    taken = {*model.tensors, *model.constants, *names}
    ranks = {fresh(f"{name}_shape", taken): name for name in names}
    nodes = [helper.make_node("Shape", [name], [rank]) for rank, name in ranks.items()]
    opened = _open(replace(model, nodes=(*model.nodes, *nodes)), ranks)
    return {ranks[value.name] for value in opened.get_outputs() if value.shape == [0]}


def _open(model: Model, outputs: Iterable[str]) -> onnxruntime.InferenceSession:
    options = oracle.session_options(threads=1)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return oracle.open_session(to_proto(model, outputs=outputs), options)


def _inconsistency(text: str) -> str:
    """What onnx says is inconsistent, and at which node, without where in its source it says so.

    Examples
    --------
    >>> _inconsistency("[A] (op_type:MatMul, node name: m): [B] (f:3) at 4: [C] No such size")
    "MatMul 'm': No such size"
    """
    node = re.search(r"op_type: ?([^,)]*), node name: ?([^)]*)\)", text)
    place = f"{node[1]} '{node[2]}': " if node else ""
    reason = re.split(r"\] |\): ", text)[-1]
    return place + reason
