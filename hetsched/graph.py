"""The frozen, analysed view of an ONNX model, which every later stage works on."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from types import MappingProxyType

import networkx
import numpy as np
import onnx
from onnx import helper, numpy_helper

from hetsched.dtype import dtype_name, numpy_dtype, onnx_code, raw_bytes
from hetsched.errors import ModelError
from hetsched.fusion import Group, Wiring
from hetsched.op import Op, Tensor, can_adjoin, in_blocks

# The oldest IR that has all that a graph can hold (16-bit floats, several domains), so that every
# tool of the last years opens what hetsched writes.
IR_VERSION = 8
# Weights of at least this many bytes leave the model for the one weight file of a package.
DETACHED_NBYTES = 1024
# The property of a model that says which tensors are packed.
PACKED = "hetsched.packed"


@dataclass(frozen=True, eq=False)
class Graph:
    """Operations in topological order over tensors of static shape.

    `constants` are the weights, read-only arrays by tensor name. `joins` are operations that put
    together what several devices may have computed: none is the tail of a kernel group, which would
    wait for all of it, and those of `views` are in no group at all. `packed` are tensors that stand
    in blocks of so many channels where they cross the border of the graph or of its parts, as
    `in_blocks` says. Checked when made: each tensor is defined once and before it is read.

    Raises
    ------
    ModelError
        A tensor is read before it is defined, or defined twice.
    """

    name: str
    ops: tuple[Op, ...]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    constants: Mapping[str, np.ndarray] = field(repr=False)
    opsets: Mapping[str, int]
    joins: frozenset[str] = frozenset()
    packed: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "constants", MappingProxyType(dict(self.constants)))
        object.__setattr__(self, "opsets", MappingProxyType(dict(self.opsets)))
        object.__setattr__(self, "packed", MappingProxyType(dict(self.packed)))
        for array in self.constants.values():
            array.flags.writeable = False
        defined = {tensor.name for tensor in self.inputs} | set(self.constants)
        names: set[str] = set()
        for op in self.ops:
            if op.name in names:
                raise ModelError(f"two operations are named '{op.name}'")
            names.add(op.name)
            for tensor in op.reads:
                if tensor.name not in defined:
                    raise ModelError(f"{op} reads '{tensor.name}' before anything defines it")
            for tensor in op.writes:
                if tensor.name in defined:
                    raise ModelError(f"{op} defines '{tensor.name}' a second time")
                defined.add(tensor.name)
        for tensor in self.outputs:
            if tensor.name not in defined:
                raise ModelError(f"nothing defines the output '{tensor.name}'")
        if self.packed:
            self._check_packed()

    def _check_packed(self) -> None:
        tensors = {tensor.name: tensor for tensor in self.inputs}
        tensors |= {tensor.name: tensor for op in self.ops for tensor in op.writes}
        for name, lanes in self.packed.items():
            tensor = tensors.get(name)
            if tensor is None or tensor.dtype != "float32" or len(tensor.shape) not in (3, 4):
                raise ModelError(f"'{name}' is no tensor that has blocks of channels")
            if lanes < 1:
                raise ModelError(f"'{name}' has blocks of {lanes} channels")

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """The kernel groups, in topological order: the unit of price and placement."""
        return self._wiring.groups()

    @cached_property
    def _wiring(self) -> Wiring:
        views = frozenset(self.producers[name].name for name in self.views)
        return Wiring(self.ops, self.outputs, self.constants, self.joins, views)

    @cached_property
    def views(self) -> Mapping[str, tuple[Tensor, ...]]:
        """What is joined of tensors that can lie one behind the other, by name, and of which.

        Nobody has to copy them: who makes one writes it to its place.
        """
        found: dict[str, tuple[Tensor, ...]] = {}
        taken = {tensor.name for tensor in self.outputs}
        for op in self.ops:
            if op.name not in self.joins or op.kind != "Concat":
                continue
            # Not `reads`, where a tensor that stands there twice is once.
            pieces = tuple(tensor for tensor in op.inputs if tensor is not None)
            joined = op.output()
            apart = len({tensor.name for tensor in pieces}) == len(pieces)
            made = all(
                tensor.name in self.producers
                and self.producers[tensor.name].name not in self.joins
                and tensor.name not in taken
                for tensor in pieces
            )
            nbytes = [tensor.nbytes for tensor in pieces]
            if apart and made and can_adjoin(joined.shape, op.attributes["axis"], nbytes):
                found[joined.name] = pieces
                taken.update(tensor.name for tensor in pieces)
        return found

    def sources(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """The tensors that kernel groups make of which `tensor` is a view, or itself."""
        return self.views.get(tensor.name, (tensor,))

    @cached_property
    def producers(self) -> Mapping[str, Op]:
        """The operation that writes each tensor, by tensor name."""
        return {tensor.name: op for op in self.ops for tensor in op.writes}

    @cached_property
    def computed(self) -> tuple[Tensor, ...]:
        """The outputs that an operation makes, each once: those that are no input, no constant."""
        return tuple(t for t in dict.fromkeys(self.outputs) if t.name in self.producers)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of structure, names, weights and packed tensors: what a plan belongs to."""
        digest = sha256(to_onnx(self, weights=False).SerializeToString(deterministic=True))
        for name in sorted(self.constants):
            array = self.constants[name]
            digest.update(f"{name} {array.dtype} {array.shape}".encode())
            # Strings have no buffer; their text is what counts.
            text = array.dtype == object
            digest.update(repr(array.tolist()).encode() if text else raw_bytes(array))
        return digest.hexdigest()

    @property
    def weight_nbytes(self) -> int:
        return sum(array.nbytes for array in self.constants.values())

    def networkx(self) -> networkx.MultiDiGraph:
        """Operations by name, an edge for each tensor that one hands to another.

        Nodes carry `op`, edges `tensor`.
        """
        view = networkx.MultiDiGraph(name=self.name)
        for op in self.ops:
            view.add_node(op.name, op=op)
        for op in self.ops:
            for tensor in op.reads:
                if tensor.name in self.producers:
                    view.add_edge(self.producers[tensor.name].name, op.name, tensor=tensor)
        return view

    def border(self, ops: Iterable[Op]) -> Group:
        """`ops` as one group, with the tensors that cross its border, in order of first use."""
        return self._wiring.gather(ops)

    def handed(self, tensor: Tensor) -> Tensor:
        """`tensor` with the shape in which it crosses a border."""
        lanes = self.packed.get(tensor.name)
        return replace(tensor, shape=in_blocks(tensor.shape, lanes)) if lanes else tensor

    def part(self, ops: Iterable[Op], name: str) -> "Graph":
        """`ops` as a graph of its own, with the constants that they read, and their border."""
        border = self.border(ops)
        crossing = dict.fromkeys(tensor.name for tensor in (*border.inputs, *border.outputs))
        return Graph(
            name=name,
            ops=border.ops,
            inputs=border.inputs,
            outputs=border.outputs,
            constants={tensor.name: self.constants[tensor.name] for tensor in border.constants},
            opsets=self.opsets,
            packed={name: self.packed[name] for name in crossing if name in self.packed},
        )

    def __str__(self) -> str:
        inputs = ", ".join(map(str, self.inputs))
        outputs = ", ".join(map(str, self.outputs))
        return f"{self.name}({inputs}) -> {outputs}: {len(self.ops)} operations"


def to_onnx(graph: Graph, weights: bool = True) -> onnx.ModelProto:
    """The graph as an ONNX model; tensors have their plain shapes, and `packed` is a property.

    Without `weights`, constants of `DETACHED_NBYTES` or more stay behind as initializers that have
    dtype and shape but no data, to be bound to a weight file.
    """
    initializers = []
    for name, array in graph.constants.items():
        if weights or array.nbytes < DETACHED_NBYTES or array.dtype == object:
            initializers.append(numpy_helper.from_array(array, name))
        else:
            code = onnx_code(array.dtype.name)
            initializers.append(onnx.TensorProto(name=name, data_type=code, dims=array.shape))
    model = helper.make_model(
        helper.make_graph(
            [_to_node(op, graph.opsets) for op in graph.ops],
            graph.name or "graph",
            [_to_value_info(tensor) for tensor in graph.inputs],
            [_to_value_info(tensor) for tensor in graph.outputs],
            initializer=initializers,
            value_info=[
                _to_value_info(tensor)
                for op in graph.ops
                for tensor in op.writes
                if tensor not in graph.outputs
            ],
        ),
        ir_version=ir_version(graph.opsets),
        opset_imports=[helper.make_opsetid(*opset) for opset in graph.opsets.items()],
        producer_name="hetsched",
    )
    if graph.packed:
        packed = json.dumps(dict(graph.packed), sort_keys=True)
        helper.set_model_props(model, {PACKED: packed})
    return model


def from_onnx(model: onnx.ModelProto, weights: Mapping[str, np.ndarray] | None = None) -> Graph:
    """The graph of a model all of whose shapes are known, as `to_onnx` writes it.

    `weights` are the arrays of initializers that have no data in the model. Any other model goes
    through `read_onnx`.

    Raises
    ------
    ModelError
        A shape is missing, or the nodes are not in topological order.
    """
    graph = model.graph
    constants = {tensor.name: _constant(tensor, weights or {}) for tensor in graph.initializer}
    tensors = {
        name: Tensor(name, array.shape, dtype_of(array)) for name, array in constants.items()
    }
    for value in (*graph.input, *graph.value_info, *graph.output):
        if value.name not in constants:
            tensors[value.name] = _to_tensor(value)

    def tensor(name: str, node: onnx.NodeProto) -> Tensor | None:
        if not name:
            return None
        if name not in tensors:
            raise ModelError(f"{node.op_type} '{node.name}': the shape of '{name}' is unknown")
        return tensors[name]

    ops = tuple(
        Op(
            name=node.name,
            kind=node.op_type,
            inputs=tuple(tensor(name, node) for name in node.input),
            outputs=tuple(tensor(name, node) for name in node.output),
            attributes={attribute.name: _to_value(attribute) for attribute in node.attribute},
            domain="" if node.domain == "ai.onnx" else node.domain,
        )
        for node in graph.node
    )
    return Graph(
        name=graph.name,
        ops=ops,
        inputs=tuple(tensors[i.name] for i in graph.input if i.name not in constants),
        outputs=tuple(tensors[output.name] for output in graph.output),
        constants=constants,
        opsets={
            "" if opset.domain == "ai.onnx" else opset.domain: opset.version
            for opset in model.opset_import
        },
        packed=_packed(model),
    )


def dtype_of(array: np.ndarray) -> str:
    """The dtype name of an array, as `Tensor` has it."""
    return "string" if array.dtype == object or array.dtype.kind in "US" else array.dtype.name


def topological(nodes: Sequence[onnx.NodeProto], defined: set[str]) -> list[onnx.NodeProto]:
    """`nodes` so that each comes after those that it reads from; ties stay in file order.

    Raises
    ------
    ModelError
        The nodes form a cycle, or read a tensor that nothing defines.
    """
    producer = {name: i for i, node in enumerate(nodes) for name in node.output if name}
    view = networkx.DiGraph()
    view.add_nodes_from(range(len(nodes)))
    for index, node in enumerate(nodes):
        for name in reads(node):
            if name in producer:
                view.add_edge(producer[name], index)
            elif name not in defined:
                raise ModelError(
                    f"{node.op_type} '{node.name}' reads '{name}', which nothing defines"
                )
    try:
        return [nodes[index] for index in networkx.lexicographical_topological_sort(view)]
    except networkx.NetworkXUnfeasible:
        cycle = [nodes[source].name for source, _ in networkx.find_cycle(view)]
        raise ModelError(f"the graph has a cycle through {' -> '.join(cycle[:6])}") from None


def reads(node: onnx.NodeProto) -> list[str]:
    """The tensors that a node reads, those that its nested graphs take from outside included."""
    found = [name for name in node.input if name]
    for attribute in node.attribute:
        for nested in (attribute.g, *attribute.graphs):
            inside = {v.name for v in nested.input} | {t.name for t in nested.initializer}
            for inner in nested.node:
                found.extend(name for name in reads(inner) if name not in inside)
                inside.update(inner.output)
            found.extend(value.name for value in nested.output if value.name not in inside)
    return list(dict.fromkeys(found))


def ir_version(opsets: Mapping[str, int]) -> int:
    """The oldest IR version that allows `opsets`, and weights that are no inputs."""
    versions = helper.OP_SET_ID_VERSION_MAP
    needed = (versions.get((domain or "ai.onnx", v), 0) for domain, v in opsets.items())
    return int(max(IR_VERSION, *needed))


def _packed(model: onnx.ModelProto) -> dict[str, int]:
    written = {entry.key: entry.value for entry in model.metadata_props}.get(PACKED, "{}")
    try:
        return {str(name): int(lanes) for name, lanes in json.loads(written).items()}
    except (AttributeError, TypeError, ValueError):
        raise ModelError(f"the property '{PACKED}' does not parse: {written[:80]}") from None


def _constant(tensor: onnx.TensorProto, weights: Mapping[str, np.ndarray]) -> np.ndarray:
    if tensor.name in weights:
        array = weights[tensor.name]
        if array.shape != tuple(tensor.dims) or array.dtype != numpy_dtype(
            dtype_name(tensor.data_type)
        ):
            raise ModelError(f"the weights of '{tensor.name}' do not fit the model")
        return array
    found: np.ndarray = numpy_helper.to_array(tensor)
    return found


def _to_tensor(value: onnx.ValueInfoProto) -> Tensor:
    if value.type.WhichOneof("value") != "tensor_type":
        raise ModelError(f"'{value.name}' is not a tensor; sequences and maps are not supported")
    kind = value.type.tensor_type
    if not kind.HasField("shape") or not all(d.HasField("dim_value") for d in kind.shape.dim):
        raise ModelError(f"the shape of '{value.name}' is unknown")
    shape = tuple(dim.dim_value for dim in kind.shape.dim)
    return Tensor(value.name, shape, dtype_name(kind.elem_type))


def _to_value_info(tensor: Tensor) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(tensor.name, onnx_code(tensor.dtype), tensor.shape)


def _to_value(attribute: onnx.AttributeProto) -> object:
    if attribute.type == onnx.AttributeProto.GRAPH:
        return attribute.g.SerializeToString(deterministic=True)
    value = helper.get_attribute_value(attribute)
    if isinstance(value, onnx.TensorProto):
        return numpy_helper.to_array(value)
    if attribute.type == onnx.AttributeProto.STRING:
        return value.decode(errors="surrogateescape")
    if attribute.type == onnx.AttributeProto.STRINGS:
        return tuple(item.decode(errors="surrogateescape") for item in value)
    return tuple(value) if isinstance(value, Sequence) else value


def _to_node(op: Op, opsets: Mapping[str, int]) -> onnx.NodeProto:
    node = helper.make_node(
        op.kind,
        [tensor.name if tensor else "" for tensor in op.inputs],
        [tensor.name if tensor else "" for tensor in op.outputs],
        name=op.name,
        domain=op.domain,
    )
    kinds = _attribute_kinds(op, opsets)
    for name, value in op.attributes.items():
        kind = kinds.get(name)
        if isinstance(value, bytes):
            nested = onnx.GraphProto.FromString(value)
            node.attribute.append(helper.make_attribute(name, nested))
        elif isinstance(value, np.ndarray):
            node.attribute.append(helper.make_attribute(name, numpy_helper.from_array(value)))
        else:
            node.attribute.append(helper.make_attribute(name, value, attr_type=kind))
    return node


def _attribute_kinds(op: Op, opsets: Mapping[str, int]) -> Mapping[str, int]:
    """The attribute types by the operator's schema: an empty list alone does not tell its type."""
    try:
        schema = onnx.defs.get_schema(op.kind, opsets.get(op.domain, 1), op.domain)
    except onnx.defs.SchemaError:
        return {}
    return {name: int(attribute.type.value) for name, attribute in schema.attributes.items()}
