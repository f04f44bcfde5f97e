"""Ifs whose condition is a constant, replaced by the branch taken; what else is nested."""

from dataclasses import replace

import onnx
from onnx import helper, numpy_helper

from hetsched.errors import ModelError
from hetsched.frontend.load import constant
from hetsched.frontend.model import Model
from hetsched.graph import reads


def inline_branches(model: Model) -> Model:
    """The model with the branch taken in the place of each If of constant condition.

    The tensors of nested graphs must have names of their own; see `separated`.
    """
    constants = dict(model.constants)
    nodes: list[onnx.NodeProto] = []
    changed = False
    for node in model.nodes:
        if node.op_type != "If" or node.domain or node.input[0] not in constants:
            nodes.append(node)
            continue
        changed = True
        condition = constants[node.input[0]]
        if condition.size != 1:
            raise ModelError(f"If '{node.name}': its condition has {condition.size} elements")
        wanted = "then_branch" if condition.reshape(()) else "else_branch"
        branch = next(item.g for item in node.attribute if item.name == wanted)
        if len(branch.output) != len(node.output):
            raise ModelError(f"If '{node.name}': its branch has {len(branch.output)} outputs")
        constants |= {tensor.name: numpy_helper.to_array(tensor) for tensor in branch.initializer}
        for inner in branch.node:
            if inner.op_type == "Constant" and not inner.domain:
                constants[inner.output[0]] = constant(inner)
            else:
                nodes.append(inner)
        nodes.extend(
            helper.make_node("Identity", [value.name], [name], name=f"{node.name}/{name}")
            for value, name in zip(branch.output, node.output, strict=True)
            if name
        )
    return replace(model, nodes=tuple(nodes), constants=constants) if changed else model


def enclose(model: Model) -> Model:
    """The model with the constants that nested graphs take from outside copied into them.

    A node then reads what its inputs say, and no more: it can be moved to another model.

    Raises
    ------
    ModelError
        A nested graph reads a tensor from outside that is no constant.
    """
    nodes = tuple(_enclosed(model, node) for node in model.nodes)
    return model if nodes == model.nodes else replace(model, nodes=nodes)


def _enclosed(model: Model, node: onnx.NodeProto) -> onnx.NodeProto:
    if not any(attribute.HasField("g") for attribute in node.attribute):
        return node
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    for attribute in copy.attribute:
        if not attribute.HasField("g"):
            continue
        alone = onnx.NodeProto(attribute=[attribute])
        for name in reads(alone):
            if name not in model.constants:
                raise ModelError(
                    f"{node.op_type} '{node.name}': its {attribute.name} reads '{name}' from "
                    "outside, which is no constant; export the model without this, or cut it "
                    "off there"
                )
            attribute.g.initializer.append(numpy_helper.from_array(model.constants[name], name))
    return copy
