"""Model-local functions, inlined."""

from collections.abc import Iterable

import networkx
import onnx
from onnx import defs, inliner

from hetsched.errors import ModelError

DEFAULT = ("", "ai.onnx")


def inline_functions(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model with the body of each function in the place of its calls.

    Raises
    ------
    ModelError
        A function calls itself, or cannot be inlined.
    """
    if not proto.functions:
        return proto
    _refuse_recursion(proto)
    light = onnx.ModelProto()
    light.CopyFrom(proto)
    weights = {tensor.name for tensor in proto.graph.initializer}
    declared = {value.name for value in proto.graph.input}
    # The inliner need not carry the weights through; their names must stay taken.
    del light.graph.initializer[:]
    light.graph.input.extend(
        onnx.ValueInfoProto(name=name) for name in sorted(weights) if name not in declared
    )
    _agree_on_opsets(light)
    functions = {_key(function) for function in proto.functions}
    for convert_version in (False, True):
        try:
            inlined = inliner.inline_local_functions(light, convert_version)
        except (RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ModelError(f"the functions of the model cannot be inlined: {reason}") from None
        left = [node for node in inlined.graph.node if _key(node) in functions]
        if not left:
            break
    if left:
        kind, name = left[0].op_type, left[0].name
        raise ModelError(f"'{name}' calls the function {kind}, which is of another opset")
    del inlined.functions[:]
    kept = [value for value in inlined.graph.input if value.name in declared]
    del inlined.graph.input[:]
    inlined.graph.input.extend(kept)
    inlined.graph.initializer.extend(proto.graph.initializer)
    return inlined


def _agree_on_opsets(proto: onnx.ModelProto) -> None:
    """Puts functions into the model's opset where their operators mean the same in both.

    onnx converts a function only where it knows the types of its inputs.
    """
    version = next((o.version for o in proto.opset_import if o.domain in DEFAULT), None)
    if version is None:
        return
    for function in proto.functions:
        for opset in function.opset_import:
            if opset.domain in DEFAULT and all(
                _since(kind, opset.version) == _since(kind, version)
                for domain, kind, _ in _called(function.node)
                if domain in DEFAULT
            ):
                opset.version = version


def _since(kind: str, version: int) -> int | None:
    known = defs.has(kind, version, "")
    return int(defs.get_schema(kind, version, "").since_version) if known else None


def _refuse_recursion(proto: onnx.ModelProto) -> None:
    keys = {_key(function) for function in proto.functions}
    calls = networkx.DiGraph()
    for function in proto.functions:
        for called in _called(function.node):
            if called in keys:
                calls.add_edge(_key(function), called)
    if not networkx.is_directed_acyclic_graph(calls):
        (_, name, _), _ = networkx.find_cycle(calls)[0]
        raise ModelError(f"the function {name} calls itself")


def _called(nodes: Iterable[onnx.NodeProto]) -> Iterable[tuple[str, str, str]]:
    for node in nodes:
        yield _key(node)
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from _called(graph.node)


def _key(named: onnx.NodeProto | onnx.FunctionProto) -> tuple[str, str, str]:
    kind = named.op_type if isinstance(named, onnx.NodeProto) else named.name
    return named.domain, kind, named.overload
