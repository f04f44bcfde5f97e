"""Names that are unique, and nodes in topological order."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import onnx

from hetsched.errors import ModelError
from hetsched.frontend.model import Model, fresh
from hetsched.graph import topological


def named(model: Model) -> Model:
    """Each node with a name of its own; nodes that have one keep it.

    A node without a name is called after its kind and its place in the file.
    """
    wanted = [node.name for node in model.nodes]
    if all(wanted) and len(set(wanted)) == len(wanted):
        return model
    taken = set(wanted) - {""}
    seen: set[str] = set()
    nodes = []
    for index, node in enumerate(model.nodes):
        if not node.name:
            node = _copied(node, fresh(f"{node.op_type}_{index}", taken))
        elif node.name in seen:
            node = _copied(node, fresh(node.name, taken))
        seen.add(node.name)
        nodes.append(node)
    return replace(model, nodes=tuple(nodes))


def separated(model: Model) -> Model:
    """Each tensor of a nested graph with a name that no other has, so that it can be moved.

    The domain `ai.onnx` is the default one by another name, and becomes it.
    """
    taken = {name for node in model.nodes for name in (*node.input, *node.output)}
    taken |= {value.name for value in model.inputs} | set(model.constants) | {""}
    nodes = tuple(_separated(node, {}, taken) for node in model.nodes)
    return model if nodes == model.nodes else replace(model, nodes=nodes)


def ordered(model: Model) -> Model:
    """Nodes after those that they read from, inside nested graphs too.

    Raises
    ------
    ModelError
        A cycle, or a tensor that nothing defines, or that is defined twice.
    """
    defined = {value.name for value in model.inputs} | set(model.constants)
    if len({value.name for value in model.inputs}) < len(model.inputs):
        raise ModelError("two inputs have the same name")
    _refuse_second_definitions(model.nodes, defined)
    everything = defined | {name for node in model.nodes for name in node.output}
    nodes = [_ordered(node, everything) for node in model.nodes]
    for name in model.outputs:
        if name not in everything or not name:
            raise ModelError(f"nothing defines the output '{name}'")
    return replace(model, nodes=tuple(topological(nodes, defined)))


def defined_in(graph: onnx.GraphProto) -> list[str]:
    """The tensors that a nested graph defines, each once, in order."""
    names = [value.name for value in graph.input]
    names += [tensor.name for tensor in graph.initializer]
    names += [name for node in graph.node for name in node.output if name]
    return list(dict.fromkeys(names))


def _copied(node: onnx.NodeProto, name: str) -> onnx.NodeProto:
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    copy.name = name
    return copy


def _separated(node: onnx.NodeProto, names: Mapping[str, str], taken: set[str]) -> onnx.NodeProto:
    graphs = any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute)
    if not names and not graphs and node.domain != "ai.onnx":
        return node
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    copy.domain = "" if node.domain == "ai.onnx" else node.domain
    copy.input[:] = [names.get(name, name) for name in node.input]
    copy.output[:] = [names.get(name, name) for name in node.output]
    for attribute in copy.attribute:
        if attribute.HasField("g"):
            attribute.g.CopyFrom(_separated_graph(attribute.g, names, taken))
        for graph in attribute.graphs:
            graph.CopyFrom(_separated_graph(graph, names, taken))
    return copy


def _separated_graph(
    graph: onnx.GraphProto, names: Mapping[str, str], taken: set[str]
) -> onnx.GraphProto:
    inner = {**names, **{name: fresh(name, taken) for name in defined_in(graph)}}
    copy = onnx.GraphProto()
    copy.CopyFrom(graph)
    # What the file says of shapes inside is of no use once the shapes outside are bound.
    del copy.value_info[:], copy.node[:]
    copy.node.extend(_separated(node, inner, taken) for node in graph.node)
    for item in (*copy.input, *copy.initializer, *copy.output):
        item.name = inner.get(item.name, item.name)
    return copy


def _ordered(node: onnx.NodeProto, outer: set[str]) -> onnx.NodeProto:
    if not any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
        return node
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    for attribute in copy.attribute:
        for graph in (attribute.g,) if attribute.HasField("g") else attribute.graphs:
            if graph.sparse_initializer:
                raise ModelError(f"{node.op_type} '{node.name}' holds a sparse weight")
            given = {value.name for value in graph.input} | {t.name for t in graph.initializer}
            _refuse_second_definitions(graph.node, given)
            within = outer | set(defined_in(graph))
            nodes = topological([_ordered(inner, within) for inner in graph.node], outer | given)
            for value in graph.output:
                if value.name not in within:
                    raise ModelError(
                        f"{node.op_type} '{node.name}': nothing defines '{value.name}'"
                    )
            del graph.node[:]
            graph.node.extend(nodes)
    return copy


def _refuse_second_definitions(nodes: Iterable[onnx.NodeProto], given: set[str]) -> None:
    seen = set(given)
    for node in nodes:
        for name in filter(None, node.output):
            if name in seen:
                raise ModelError(f"{node.op_type} '{node.name}' defines '{name}' a second time")
            seen.add(name)
