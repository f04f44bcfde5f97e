"""Constants computed once, before anything is planned."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx

from hetsched import oracle
from hetsched.errors import ModelError
from hetsched.frontend.contradictions import overflows
from hetsched.frontend.model import Model, is_telling, to_proto
from hetsched.graph import reads

RANDOM = frozenset(
    """Bernoulli BiasDropout BitmaskBiasDropout BitmaskDropout Dropout Multinomial RandomNormal
    RandomNormalLike RandomUniform RandomUniformLike""".split()
)
# The integer path reads scales and zero points from them.
QUANTIZING = frozenset(("DequantizeLinear", "DynamicQuantizeLinear", "QuantizeLinear"))
# A constant that is both larger than this and than twice what it is made from stays an operation.
LARGEST_NBYTES = 16 * 2**20
LARGEST_GROWTH = 2


def fold(model: Model) -> Model:
    """The model with each operation on constants replaced by its result.

    Shape and Size of a tensor of known shape count as constant. Random and quantizing operations
    stay, and those whose result would be far larger than what it is made from.
    """
    measured = _measured(model)
    chosen = _foldable(measured)
    if not chosen:
        return measured
    wanted = _needed(measured, chosen)
    results = _evaluated(measured, chosen, wanted)
    done = {id(n) for n in chosen if all(o in results or o not in wanted for o in n.output)}
    left = tuple(node for node in measured.nodes if id(node) not in done)
    # Where a part could not be computed, what it reads has to be there.
    missing = {name for node in left for name in reads(node)} & {
        name for node in chosen if id(node) in done for name in node.output if name not in results
    }
    results |= _evaluated(measured, chosen, missing) if missing else {}
    if not missing <= set(results):
        return measured
    written = {name for node in left for name in node.output}
    results = {name: array for name, array in results.items() if name not in written}
    if not results:
        return measured
    return replace(measured, nodes=left, constants={**measured.constants, **results})


def _measured(model: Model) -> Model:
    found = {}
    for node in model.nodes:
        if node.op_type in ("Shape", "Size") and not node.domain:
            tensor = model.tensor(node.input[0])
            if tensor:
                limits = {attribute.name: attribute.i for attribute in node.attribute}
                part = slice(limits.get("start"), limits.get("end"))
                value = tensor.shape[part] if node.op_type == "Shape" else tensor.size
                found[node.output[0]] = np.array(value, np.int64)
    if not found:
        return model
    nodes = tuple(node for node in model.nodes if not found.keys() & set(node.output))
    return replace(model, nodes=nodes, constants={**model.constants, **found})


def _foldable(model: Model) -> list[onnx.NodeProto]:
    """The nodes that constants alone decide, in order."""
    ready = set(model.constants)
    chosen = []
    for node in model.nodes:
        if not ready.issuperset(reads(node)):
            continue
        if _may_fold([node]) and _fits(model, node) and _is_safe(model, node):
            chosen.append(node)
            ready.update(node.output)
    return chosen


def _may_fold(nodes: Iterable[onnx.NodeProto]) -> bool:
    for node in nodes:
        kind = node.op_type
        if kind in RANDOM | QUANTIZING or "Sequence" in kind or kind.startswith("Optional"):
            return False
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                if not _may_fold(graph.node):
                    return False
    return True


def _is_safe(model: Model, node: onnx.NodeProto) -> bool:
    """Whether ONNX Runtime can compute it and live; what is divided must be at hand to tell.

    Raises
    ------
    ModelError
        It cannot: the processor would trap.
    """
    if node.op_type not in ("Div", "Mod") or node.domain:
        return True
    output = model.tensor(node.output[0])
    if output and output.dtype.startswith(("float", "bfloat")):
        return True
    if not all(name in model.constants for name in node.input):
        return False
    if overflows(model, node):
        raise ModelError(
            f"{node.op_type} '{node.name}' divides integers by zero, or the smallest one by -1"
        )
    return True


def _fits(model: Model, node: onnx.NodeProto) -> bool:
    outputs = [model.tensor(name) for name in node.output if name]
    inputs = [model.tensor(name) for name in reads(node)]
    nbytes = sum(tensor.nbytes for tensor in inputs if tensor)
    if None in outputs:
        # With the values at hand, the next round may know better.
        return all(name in model.constants for name in reads(node))
    limit = max(LARGEST_NBYTES, LARGEST_GROWTH * nbytes)
    return sum(tensor.nbytes for tensor in outputs if tensor) <= limit


def _needed(model: Model, chosen: Sequence[onnx.NodeProto]) -> set[str]:
    """What the rest of the model reads of the results of `chosen`."""
    folded = {id(node) for node in chosen}
    read = {name for node in model.nodes if id(node) not in folded for name in reads(node)}
    read.update(model.outputs)
    return read & {name for node in chosen for name in node.output if name}


def _evaluated(
    model: Model, nodes: Sequence[onnx.NodeProto], wanted: set[str]
) -> dict[str, np.ndarray]:
    """The tensors `wanted` that `nodes` define; those that cannot be computed are left out.

    One run does it all; where it fails, each half is tried on its own.
    """
    names = [name for node in nodes for name in node.output if name in wanted]
    if not names:
        return {}
    read = {name for node in nodes for name in reads(node)}
    constants = {name: array for name, array in model.constants.items() if name in read}
    part = replace(model, inputs=(), constants=constants, tensors={})
    feeds = {name: array for name, array in constants.items() if not is_telling(array)}
    try:
        return _tensors(oracle.run(to_proto(part, nodes=nodes, outputs=names), feeds))
    except ModelError:
        if len(nodes) == 1:
            return {}
    half = len(nodes) // 2
    # The second half may read anything that the first one defines.
    inner = {name for node in nodes[half:] for name in reads(node)} & {
        name for node in nodes[:half] for name in node.output
    }
    results = _evaluated(model, nodes[:half], (wanted | inner))
    known = {*model.constants, *results}
    rest = []
    for node in nodes[half:]:
        if known.issuperset(reads(node)):
            rest.append(node)
            known.update(node.output)
    richer = replace(model, constants={**model.constants, **results})
    return {**results, **_evaluated(richer, rest, wanted)}


def _tensors(results: Mapping[str, object]) -> dict[str, np.ndarray]:
    return {name: array for name, array in results.items() if isinstance(array, np.ndarray)}
