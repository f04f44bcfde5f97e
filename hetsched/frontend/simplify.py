"""What inference does not need: unused nodes, Identity, Dropout, BatchNormalization after Conv.

And what it needs in another form: a DequantizeLinear for each reader.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx
from onnx import helper

from hetsched.frontend.model import Model, fresh
from hetsched.graph import reads


def prune(model: Model) -> Model:
    """The model without what no output depends on; its inputs all stay."""
    live = set(model.outputs)
    kept = []
    for node in reversed(model.nodes):
        if live.intersection(filter(None, node.output)):
            kept.append(node)
            live.update(reads(node))
    constants = {name: array for name, array in model.constants.items() if name in live}
    if len(kept) == len(model.nodes) and len(constants) == len(model.constants):
        return model
    written = {name for node in kept for name in node.output}
    written.update(value.name for value in model.inputs)
    return replace(
        model,
        nodes=tuple(reversed(kept)),
        constants=constants,
        tensors={name: tensor for name, tensor in model.tensors.items() if name in written},
    )


def drop_dropout(model: Model) -> Model:
    """The model with each Dropout that does nothing turned into an Identity.

    One that trains, or whose mask is used, stays.
    """
    read = {name for node in model.nodes for name in reads(node)} | set(model.outputs)
    nodes = tuple(
        helper.make_node("Identity", node.input[:1], node.output[:1], name=node.name)
        if _is_idle(model, node, read)
        else node
        for node in model.nodes
    )
    return model if nodes == model.nodes else replace(model, nodes=nodes)


def drop_identity(model: Model) -> Model:
    """The model without Identity, but where one joins an input or a constant to an output."""
    inputs = {value.name for value in model.inputs}
    producer = {name: node for node in model.nodes for name in node.output if name}
    names: dict[str, str] = {}
    pinned = set(model.outputs)
    dropped: set[int] = set()
    for node in model.nodes:
        if node.op_type != "Identity" or node.domain:
            continue
        source, result = _final(node.input[0], names), node.output[0]
        if result not in model.outputs:
            names[result] = source
        elif source in producer and source not in pinned and source not in inputs:
            # The value goes by the name of the output from its producer on.
            names[source] = result
            pinned.add(result)
        else:
            continue
        dropped.add(id(node))
    if not dropped:
        return model
    final = {name: _final(name, names) for name in names}
    kept = (node for node in model.nodes if id(node) not in dropped)
    tensors = dict(model.tensors)
    for old, new in final.items():
        tensor = tensors.pop(old, None)
        if tensor and new not in tensors and new not in model.constants:
            tensors[new] = replace(tensor, name=new)
    return replace(model, nodes=tuple(renamed(n, final) for n in kept), tensors=tensors)


def dequantise_apart(model: Model) -> Model:
    """The model with a DequantizeLinear of its own for each node that reads one.

    So integers are what nodes share, and what they hand to each other.
    """
    readers = Counter(name for node in model.nodes for name in reads(node))
    own = Counter(name for node in model.nodes for name in dict.fromkeys(node.input))
    taken = {n for node in model.nodes for n in (*node.output, *reads(node))} | {*model.constants}
    names = {node.name for node in model.nodes}
    shared = {
        node.output[0]: node
        for node in model.nodes
        if node.op_type == "DequantizeLinear"
        and not node.domain
        and readers[node.output[0]] > 1
        # Nested graphs, and who names the output, need the one that is there.
        and readers[node.output[0]] == own[node.output[0]]
        and node.output[0] not in model.outputs
    }
    if not shared:
        return model
    nodes: list[onnx.NodeProto] = []
    tensors = dict(model.tensors)
    used: set[str] = set()
    for node in model.nodes:
        again = {name: shared[name] for name in node.input if name in shared and name in used}
        used.update(name for name in node.input if name in shared)
        changed = {}
        for name, source in again.items():
            copy = onnx.NodeProto()
            copy.CopyFrom(source)
            copy.name = fresh(source.name, names) if source.name else ""
            copy.output[:] = [fresh(name, taken)]
            changed[name] = copy.output[0]
            if name in tensors:
                tensors[copy.output[0]] = replace(tensors[name], name=copy.output[0])
            nodes.append(copy)
        nodes.append(renamed(node, changed))
    return replace(model, nodes=tuple(nodes), tensors=tensors)


def fold_batch_normalization(model: Model) -> Model:
    """The model with each BatchNormalization in the Conv or ConvTranspose before it.

    Only where nothing else reads the convolution, and all parameters are constants. The weights
    are scaled in float64.
    """
    readers = Counter(name for node in model.nodes for name in reads(node))
    readers.update(model.outputs)
    producer = {node.output[0]: node for node in model.nodes}
    taken = {*producer, *model.constants, *model.tensors}
    replaced: dict[int, onnx.NodeProto] = {}
    constants = dict(model.constants)
    dropped: set[int] = set()
    for node in model.nodes:
        convolution = producer.get(node.input[0]) if node.input else None
        if convolution is None or readers[node.input[0]] != 1:
            continue
        if not _can_fold(model, convolution, node, readers):
            continue
        weights = _scaled(model, convolution, node)
        if not all(np.isfinite(array.astype(np.float64)).all() for array in weights):
            continue
        both = (fresh(f"{node.output[0]}_{part}", taken) for part in ("weight", "bias"))
        names = dict(zip(both, weights, strict=True))
        constants |= names
        copy = onnx.NodeProto()
        copy.CopyFrom(convolution)
        copy.input[:] = [convolution.input[0], *names]
        copy.output[:] = node.output[:1]
        replaced[id(convolution)] = copy
        dropped.add(id(node))
    if not dropped:
        return model
    nodes = tuple(replaced.get(id(n), n) for n in model.nodes if id(n) not in dropped)
    return prune(replace(model, nodes=nodes, constants=constants))


def renamed(node: onnx.NodeProto, names: Mapping[str, str]) -> onnx.NodeProto:
    """The node with its tensors renamed, inside nested graphs too."""
    if not any(name in names for name in (*node.output, *reads(node))):
        return node
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    copy.input[:] = [names.get(name, name) for name in node.input]
    copy.output[:] = [names.get(name, name) for name in node.output]
    for attribute in copy.attribute:
        for graph in (attribute.g,) if attribute.HasField("g") else attribute.graphs:
            inner = [renamed(item, names) for item in graph.node]
            del graph.node[:]
            graph.node.extend(inner)
            for value in graph.output:
                value.name = names.get(value.name, value.name)
    return copy


def _final(name: str, names: Mapping[str, str]) -> str:
    while name in names:
        name = names[name]
    return name


def _is_idle(model: Model, node: onnx.NodeProto, read: set[str]) -> bool:
    if node.op_type != "Dropout" or node.domain:
        return False
    if any(name in read for name in node.output[1:]):
        return False
    # Up to opset 11 it never trains; from 12 on an input says so.
    training = node.input[2] if len(node.input) > 2 else ""
    return not training or (training in model.constants and not model.constants[training].any())


def _can_fold(
    model: Model, convolution: onnx.NodeProto, node: onnx.NodeProto, readers: Mapping[str, int]
) -> bool:
    attributes = {attribute.name: attribute.i for attribute in node.attribute}
    parameters = [*node.input[1:], *(name for name in convolution.input[1:] if name)]
    return (
        node.op_type == "BatchNormalization"
        and convolution.op_type in ("Conv", "ConvTranspose")
        and not node.domain
        and not convolution.domain
        and not attributes.get("training_mode", 0)
        # Until opset 8 it could have parameters for each pixel.
        and attributes.get("spatial", 1) == 1
        and not any(readers.get(name) for name in node.output[1:] if name)
        and all(name in model.constants for name in parameters)
    )


def _scaled(
    model: Model, convolution: onnx.NodeProto, node: onnx.NodeProto
) -> tuple[np.ndarray, np.ndarray]:
    """Weight and bias of the convolution with the normalization in them."""
    scale, shift, mean, variance = (
        model.constants[name].astype(np.float64) for name in node.input[1:5]
    )
    epsilon = next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5)
    group = next((a.i for a in convolution.attribute if a.name == "group"), 1)
    weight = model.constants[convolution.input[1]]
    given = convolution.input[2] if len(convolution.input) > 2 else ""
    bias = model.constants[given].astype(np.float64) if given else 0.0
    factor = scale / np.sqrt(variance + epsilon)
    exact = weight.astype(np.float64)
    if convolution.op_type == "Conv":
        exact = exact * factor.reshape(-1, *(1,) * (weight.ndim - 1))
    else:
        # Its weights have the input channels first, and the output channels by group second.
        parts = exact.reshape(group, -1, *weight.shape[1:])
        exact = parts * factor.reshape(group, 1, -1, *(1,) * (weight.ndim - 2))
    exact = exact.reshape(weight.shape)
    return exact.astype(weight.dtype), ((bias - mean) * factor + shift).astype(weight.dtype)
