"""From an ONNX model to a `Graph`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import onnx
from onnx import helper

from hetsched.errors import ModelError
from hetsched.frontend.bind import bind
from hetsched.frontend.branches import enclose, inline_branches
from hetsched.frontend.check import check_nodes, check_versions, settled_opset
from hetsched.frontend.contradictions import refuse_contradictions, refuse_groups
from hetsched.frontend.fold import fold
from hetsched.frontend.functions import inline_functions
from hetsched.frontend.infer import ask_runtime, confirm, infer, refuse_unknown, unknown
from hetsched.frontend.load import detach, parse
from hetsched.frontend.model import Model, described, typed
from hetsched.frontend.order import named, ordered, separated
from hetsched.frontend.simplify import (
    dequantise_apart,
    drop_dropout,
    drop_identity,
    fold_batch_normalization,
    prune,
)
from hetsched.graph import Graph, from_onnx, ir_version


def read_onnx(
    model: str | Path | bytes | onnx.ModelProto,
    shapes: Mapping[str, Sequence[int]] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Graph:
    """The graph of an ONNX model, its shapes all known and its constants folded.

    `shapes` binds the inputs that the model leaves open, `progress` is told of each step. The
    names of inputs and outputs are those of the model. External data are looked for beside the
    file; a model given as bytes or as a protobuf cannot have any.

    Raises
    ------
    ModelError
        The file is no ONNX model, a shape is open or depends on the data, or an operator is
        unknown. The message is one line that begins with the file's name.
    """
    report = progress or (lambda _: None)
    try:
        return _read(model, shapes or {}, report)
    except ModelError as error:
        # A name in the model may hold line breaks; the message stays one line.
        text = " ".join(str(error).splitlines())
        raise ModelError(f"{_source(model)}: {text}") from None


def _read(
    source: str | Path | bytes | onnx.ModelProto,
    shapes: Mapping[str, Sequence[int]],
    report: Callable[[str], None],
) -> Graph:
    report("reading the file")
    proto, path = parse(source)
    check_versions(proto)
    model = detach(inline_functions(proto), path)
    report("checking the operations")
    model = ordered(separated(named(model)))
    check_nodes(model)
    refuse_groups(model)
    model = replace(model, opsets={**model.opsets, "": settled_opset(model)})
    report("binding the shapes")
    model = bind(model, shapes)
    model = settle(prune(model), report)
    report("simplifying")
    model = named(enclose(dequantise_apart(fold_batch_normalization(model))))
    return to_graph(model)


def settle(model: Model, report: Callable[[str], None]) -> Model:
    """The model with all shapes known, in rounds of inference and folding until nothing changes.

    Raises
    ------
    ModelError
        A shape stays unknown.
    """
    rounds = 0
    while True:
        rounds += 1
        report(f"inferring shapes and folding constants, round {rounds}")
        before = model
        for step in (infer, fold, inline_branches, drop_dropout, drop_identity, prune):
            model = step(model)
        if model is before and unknown(model):
            model = ask_runtime(model)
        if model is before:
            refuse_unknown(model)
            confirm(model)
            refuse_contradictions(model)
            return model


def to_graph(model: Model) -> Graph:
    """The graph of a model whose shapes are all known."""
    used = {node.domain for node in model.nodes} | {""}
    opsets = {domain: version for domain, version in model.opsets.items() if domain in used}
    values = {name: described(name, array) for name, array in model.constants.items()}
    outputs = [typed(values.get(name) or model.tensors[name]) for name in model.outputs]
    hidden = {value.name for value in (*model.inputs, *outputs)}
    proto = helper.make_model(
        helper.make_graph(
            model.nodes,
            model.name or "graph",
            model.inputs,
            outputs,
            initializer=[
                onnx.TensorProto(name=name, data_type=typed(value).type.tensor_type.elem_type)
                for name, value in values.items()
            ],
            value_info=[typed(t) for name, t in model.tensors.items() if name not in hidden],
        ),
        ir_version=ir_version(opsets),
        opset_imports=[helper.make_opsetid(*opset) for opset in opsets.items()],
    )
    for tensor in proto.graph.initializer:
        tensor.dims.extend(values[tensor.name].shape)
    return from_onnx(proto, model.constants)


def _source(model: str | Path | bytes | onnx.ModelProto) -> str:
    return str(model) if isinstance(model, str | Path) else "the model"
