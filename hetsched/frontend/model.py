"""What the steps of the front end hand to each other."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper, numpy_helper

from hetsched.dtype import onnx_code
from hetsched.graph import dtype_of, ir_version
from hetsched.op import Tensor

# Larger constants never tell a shape; leaving them out keeps every look at the model cheap.
TELLING_NBYTES = 4096


@dataclass(frozen=True, eq=False)
class Model:
    """A model on its way to a `Graph`: its weights are apart, its shapes not all known.

    The protobufs are never changed: a step makes new ones. A step that has nothing to do returns
    the model itself.
    """

    name: str
    nodes: tuple[onnx.NodeProto, ...]
    inputs: tuple[onnx.ValueInfoProto, ...]
    outputs: tuple[str, ...]
    constants: Mapping[str, np.ndarray]
    opsets: Mapping[str, int]
    tensors: Mapping[str, Tensor]
    """What is known of the tensors that are no constants."""

    def tensor(self, name: str) -> Tensor | None:
        """The type of a tensor, or None as long as it is unknown."""
        if name in self.constants:
            return described(name, self.constants[name])
        return self.tensors.get(name)


def described(name: str, array: np.ndarray) -> Tensor:
    return Tensor(name, array.shape, dtype_of(array))


def typed(tensor: Tensor) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(tensor.name, onnx_code(tensor.dtype), tensor.shape)


def to_proto(
    model: Model,
    nodes: Iterable[onnx.NodeProto] | None = None,
    outputs: Iterable[str] | None = None,
) -> onnx.ModelProto:
    """The model, or some of its nodes, as a protobuf that onnx and ONNX Runtime take.

    Constants of more than `TELLING_NBYTES` become inputs, behind those of the model.
    """
    names = tuple(model.outputs if outputs is None else outputs)
    small = {name: array for name, array in model.constants.items() if is_telling(array)}
    graph = helper.make_graph(
        model.nodes if nodes is None else nodes,
        model.name or "graph",
        [
            *model.inputs,
            *(typed(described(k, v)) for k, v in model.constants.items() if k not in small),
        ],
        [onnx.ValueInfoProto(name=name) for name in names],
        initializer=[numpy_helper.from_array(array, name) for name, array in small.items()],
    )
    inputs = {value.name for value in graph.input}
    for output in graph.output:
        if output.name in model.tensors:
            output.CopyFrom(typed(model.tensors[output.name]))
    graph.value_info.extend(
        typed(tensor)
        for name, tensor in model.tensors.items()
        if name not in inputs and name not in names
    )
    return helper.make_model(
        graph,
        ir_version=ir_version(model.opsets),
        opset_imports=[helper.make_opsetid(*opset) for opset in model.opsets.items()],
    )


def is_telling(array: np.ndarray) -> bool:
    return array.nbytes <= TELLING_NBYTES


def all_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """The nodes and those of their nested graphs."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from all_nodes(graph.node)


def fresh(name: str, taken: set[str]) -> str:
    """`name`, or where it is taken `name_2`, `name_3`, ...; it is taken from then on."""
    candidate, count = name, 1
    while candidate in taken:
        count += 1
        candidate = f"{name}_{count}"
    taken.add(candidate)
    return candidate
