"""From a file, bytes or a protobuf to a model whose weights are arrays."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto, helper, numpy_helper

from hetsched.dtype import dtype_name, numpy_dtype
from hetsched.errors import ModelError
from hetsched.frontend.model import Model
from hetsched.frontend.wire import outline

# Their elements share bytes: only onnx's own reader unpacks them.
PACKED = frozenset(
    getattr(TensorProto, name)
    for name in ("INT4", "UINT4", "FLOAT4E2M1", "INT2", "UINT2")
    if hasattr(TensorProto, name)
)
VALUE_DTYPES = {
    "value_float": np.float32,
    "value_floats": np.float32,
    "value_int": np.int64,
    "value_ints": np.int64,
    "value_string": object,
    "value_strings": object,
}
NOT_A_MODEL = "this is not an ONNX model"


def parse(source: str | Path | bytes | onnx.ModelProto) -> tuple[onnx.ModelProto, Path | None]:
    """The protobuf, and the file that its external data stand beside.

    Raises
    ------
    ModelError
        There is no such file, it cannot be read, or it is no ONNX model.
    """
    if isinstance(source, onnx.ModelProto):
        return source, None
    path = None if isinstance(source, bytes) else Path(source)
    content = source if isinstance(source, bytes) else _content(Path(source))
    if not content:
        raise ModelError(f"{NOT_A_MODEL}: it is empty")
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(content)
    except DecodeError:
        reason = "it is no protobuf, or only the beginning of one"
        raise ModelError(f"{NOT_A_MODEL}: {reason}") from None
    # Almost any bytes are some protobuf; only a model has these two.
    if not proto.ir_version or not proto.HasField("graph"):
        raise ModelError(f"{NOT_A_MODEL}: it has no version or no graph")
    if any(isinstance(text, bytes) for text in _texts(proto)):
        raise ModelError("a name in the model is not UTF-8; the file is damaged")
    return proto, path


def detach(proto: onnx.ModelProto, path: Path | None) -> Model:
    """The model with its initializers and `Constant` nodes as arrays.

    Raises
    ------
    ModelError
        A weight is sparse, damaged, or not where the model says.
    """
    graph = proto.graph
    if graph.sparse_initializer:
        name = graph.sparse_initializer[0].values.name
        raise ModelError(f"the weight '{name}' is sparse; store it dense")
    constants: dict[str, np.ndarray] = {}
    for tensor in graph.initializer:
        if tensor.name in constants:
            raise ModelError(f"two weights are named '{tensor.name}'")
        constants[tensor.name] = _array(tensor, f"the weight '{tensor.name}'", path)
    nodes = []
    for node in graph.node:
        if node.op_type == "Constant" and node.domain in ("", "ai.onnx"):
            if len(node.output) != 1 or node.output[0] in constants:
                raise ModelError(f"Constant '{node.name}' must define one tensor of its own")
            constants[node.output[0]] = constant(node, path)
        else:
            nodes.append(_embedded(node, path))
    return Model(
        name=graph.name,
        nodes=tuple(nodes),
        inputs=tuple(value for value in graph.input if value.name not in constants),
        outputs=tuple(dict.fromkeys(value.name for value in graph.output)),
        constants=constants,
        opsets={
            "" if opset.domain == "ai.onnx" else opset.domain: opset.version
            for opset in proto.opset_import
        },
        tensors={},
    )


def constant(node: onnx.NodeProto, path: Path | None = None) -> np.ndarray:
    """The value of a `Constant` node."""
    what = f"Constant '{node.name or ''.join(node.output)}'"
    found = [a for a in node.attribute if a.name.startswith(("value", "sparse_value"))]
    if len(found) != 1:
        raise ModelError(f"{what} has {len(found)} values; it must have one")
    attribute = found[0]
    if attribute.name == "value":
        return _array(attribute.t, what, path)
    if attribute.name == "sparse_value":
        raise ModelError(f"{what} is sparse; store it dense")
    if attribute.name not in VALUE_DTYPES:
        raise ModelError(f"{what} has the unknown attribute '{attribute.name}'")
    value = helper.get_attribute_value(attribute)
    if attribute.name.startswith("value_string"):
        many = isinstance(value, Iterable) and not isinstance(value, bytes)
        value = [_text(item) for item in value] if many else _text(value)
    try:
        return np.array(value, VALUE_DTYPES[attribute.name])
    except (TypeError, ValueError):
        raise ModelError(f"{what}: '{attribute.name}' has a value of another type") from None


def tensors(node: onnx.NodeProto) -> Iterator[TensorProto]:
    """All weights inside a node, those of its nested graphs included."""
    for attribute in node.attribute:
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors
        for graph in (attribute.g, *attribute.graphs):
            yield from graph.initializer
            for inner in graph.node:
                yield from tensors(inner)


def _content(path: Path) -> bytes:
    try:
        return outline(path)
    except FileNotFoundError:
        raise ModelError("there is no such file") from None
    except IsADirectoryError:
        raise ModelError("this is a folder; name the .onnx file in it") from None
    except PermissionError:
        raise ModelError("no permission to read the file") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ModelError(f"the file cannot be read: {reason}") from None


def _texts(proto: onnx.ModelProto) -> Iterator[str | bytes]:
    """All names of a model; those that are not UTF-8 come as bytes."""
    for opset in proto.opset_import:
        yield opset.domain
    for function in proto.functions:
        yield from (function.name, function.domain, function.overload)
        yield from (*function.input, *function.output, *function.attribute)
        yield from _node_texts(function.node)
    yield from _graph_texts(proto.graph)


def _graph_texts(graph: onnx.GraphProto) -> Iterator[str | bytes]:
    yield graph.name
    yield from (tensor.name for tensor in graph.initializer)
    for value in (*graph.input, *graph.output, *graph.value_info):
        yield value.name
        yield from (dim.dim_param for dim in value.type.tensor_type.shape.dim)
    yield from _node_texts(graph.node)


def _node_texts(nodes: Iterable[onnx.NodeProto]) -> Iterator[str | bytes]:
    for node in nodes:
        yield from (node.name, node.op_type, node.domain, node.overload)
        yield from (*node.input, *node.output)
        for attribute in node.attribute:
            yield from (attribute.name, attribute.ref_attr_name)
            for graph in (attribute.g, *attribute.graphs):
                yield from _graph_texts(graph)


def _text(value: bytes | str) -> str:
    return value.decode(errors="surrogateescape") if isinstance(value, bytes) else value


def _embedded(node: onnx.NodeProto, path: Path | None) -> onnx.NodeProto:
    """The node with the external data of its attributes and nested graphs inside it."""
    if not any(tensor.data_location == TensorProto.EXTERNAL for tensor in tensors(node)):
        return node
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    for tensor in tensors(copy):
        if tensor.data_location == TensorProto.EXTERNAL:
            array = _array(tensor, f"a weight of {node.op_type} '{node.name}'", path)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return copy


def _array(tensor: TensorProto, what: str, path: Path | None) -> np.ndarray:
    if any(dim < 0 for dim in tensor.dims):
        raise ModelError(f"{what} has a negative dimension")
    if tensor.data_type == TensorProto.UNDEFINED:
        raise ModelError(f"{what} has no element type")
    dtype = numpy_dtype(dtype_name(tensor.data_type))
    shape = tuple(tensor.dims)
    external = tensor.data_location == TensorProto.EXTERNAL
    if external and tensor.data_type == TensorProto.STRING:
        raise ModelError(f"{what} holds strings, which cannot be external")
    if external:
        nbytes = _nbytes(tensor.data_type, shape, dtype)
        content = _external(tensor, nbytes, what, path)
        if tensor.data_type not in PACKED:
            little = np.frombuffer(content, dtype.newbyteorder("<"))
            return little.astype(dtype, copy=False).reshape(shape)
        tensor = TensorProto(data_type=tensor.data_type, dims=shape, raw_data=content)
    try:
        array: np.ndarray = numpy_helper.to_array(tensor)
        if array.dtype.kind in "SU":
            array = array.astype(object)
        return array.reshape(shape)
    except (ValueError, TypeError, OverflowError, MemoryError):
        wanted = f"{dtype.name}[{', '.join(map(str, shape))}]"
        raise ModelError(f"{what} should be {wanted}, but its data are of another size") from None


def _nbytes(code: int, shape: tuple[int, ...], dtype: np.dtype) -> int:
    size = 1
    for dim in shape:
        size *= dim
    if code in PACKED:
        name = TensorProto.DataType.Name(code)
        bits = 2 if name.endswith("INT2") else 4
        return (size * bits + 7) // 8
    return size * dtype.itemsize


def _external(tensor: TensorProto, nbytes: int, what: str, path: Path | None) -> bytes:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    if path is None:
        raise ModelError(f"{what} is in the file '{location}'; give the model by its path")
    # Both the link and what it leads to count as the model's folder: caches link file by file.
    folders = {path.parent.resolve(), path.resolve().parent}
    inside = Path(location).parts and not Path(location).is_absolute()
    try:
        file = (path.parent / location).resolve()
        if not inside or not any(file.is_relative_to(folder) for folder in folders):
            raise ModelError(f"{what} is in '{location}', outside the folder of the model")
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", nbytes))
        if not file.is_file():
            raise ModelError(f"{what} is in the file '{location}', which is not there")
        if offset < 0 or length != nbytes:
            raise ModelError(f"{what} takes {nbytes} bytes, not {length} at {offset}")
        if file.stat().st_size < offset + nbytes:
            raise ModelError(
                f"{what} ends at byte {offset + nbytes} of '{location}', "
                f"which has only {file.stat().st_size}"
            )
        with file.open("rb") as stream:
            stream.seek(offset)
            content: bytes = stream.read(nbytes)
            return content
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ModelError(f"{what} in '{location}' cannot be read: {reason}") from None
