"""Nodes whose shapes cannot be right, though the inference of onnx lets them pass."""

from collections.abc import Callable, Mapping
from itertools import chain

import onnx

from hetsched.errors import ModelError
from hetsched.frontend.model import Model, all_nodes
from hetsched.op import Tensor

SAME_SIZE = frozenset(("Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"))
POOLS = frozenset(("AveragePool", "LpPool", "MaxPool"))


def refuse_groups(model: Model) -> None:
    """Refuses convolutions in less than one group: inference divides by their number.

    Raises
    ------
    ModelError
        The message names the node.
    """
    for node in all_nodes(model.nodes):
        for attribute in node.attribute:
            if attribute.name in ("group", "num_groups") and attribute.i < 1:
                number = attribute.i
                raise ModelError(
                    f"{node.op_type} '{node.name}': {attribute.name} is {number}, "
                    "but must be 1 or more"
                )


def refuse_contradictions(model: Model) -> None:
    """Refuses nodes whose input and output shapes contradict their operator.

    Raises
    ------
    ModelError
        The message names the node and the shapes.
    """
    for node in model.nodes:
        if node.domain or node.op_type not in RULES:
            continue
        inputs = [model.tensor(name) if name else None for name in node.input]
        output = model.tensor(node.output[0]) if node.output[0] else None
        if output is None or not inputs or inputs[0] is None:
            continue
        if not RULES[node.op_type](node, inputs, output):
            shapes = ", ".join(str(list(tensor.shape)) for tensor in inputs if tensor)
            raise ModelError(
                f"{node.op_type} '{node.name}': its inputs {shapes} do not fit one another "
                f"or its output {list(output.shape)}"
            )


def overflows(model: Model, node: onnx.NodeProto) -> bool:
    """Whether an integer division of constants has no result: zero or the smallest by -1.

    The processor traps on both.
    """
    if node.op_type not in ("Div", "Mod") or node.domain:
        return False
    dividend, divisor = (model.constants[name] for name in node.input)
    if dividend.dtype.kind not in "iu" or not divisor.size:
        return False
    if not divisor.all():
        return True
    smallest = -(2 ** (8 * dividend.itemsize - 1))
    return bool(
        dividend.dtype.kind == "i" and (divisor == -1).any() and (dividend == smallest).any()
    )


def _same_size(_: onnx.NodeProto, inputs: list[Tensor | None], output: Tensor) -> bool:
    return inputs[0] is not None and inputs[0].size == output.size


def _same_dims(_: onnx.NodeProto, inputs: list[Tensor | None], output: Tensor) -> bool:
    return inputs[0] is not None and sorted(inputs[0].shape) == sorted(output.shape)


def _convolution(node: onnx.NodeProto, inputs: list[Tensor | None], output: Tensor) -> bool:
    x, weight = inputs[:2]
    bias = inputs[2] if len(inputs) > 2 else None
    if x is None or weight is None:
        return True
    group = next((item.i for item in node.attribute if item.name == "group"), 1)
    is_transposed = node.op_type == "ConvTranspose"
    # Channels in and out, as the weights have them.
    given = weight.shape[0] if is_transposed else weight.shape[1] * group
    made = weight.shape[1] * group if is_transposed else weight.shape[0]
    return (
        len(x.shape) == len(weight.shape) == len(output.shape)
        and x.shape[1] == given
        and output.shape[1] == made
        and given % group == made % group == 0
        and (bias is None or bias.shape == (made,))
        and _spatial(node, inputs, output)
    )


def _spatial(_: onnx.NodeProto, inputs: list[Tensor | None], output: Tensor) -> bool:
    """A window that is larger than what it slides over leaves nothing."""
    x = inputs[0]
    return x is None or x.size == 0 or all(dim > 0 for dim in output.shape[2:])


Rule = Callable[[onnx.NodeProto, list[Tensor | None], Tensor], bool]
RULES: Mapping[str, Rule] = dict(
    chain(
        ((kind, _same_size) for kind in SAME_SIZE),
        ((kind, _spatial) for kind in POOLS),
        (("Transpose", _same_dims), ("Conv", _convolution), ("ConvTranspose", _convolution)),
    )
)
