"""Whether a model is one that can be served at all."""

from functools import cache

import onnx
from onnx import checker, defs
from onnxruntime.capi import onnxruntime_pybind11_state as native

from hetsched.errors import ModelError
from hetsched.frontend.model import Model, all_nodes, to_proto

OLDEST_OPSET = 7
OLDEST_IR_VERSION = 3
NEWEST_OPSET = defs.onnx_opset_version()
# The newest that ONNX Runtime and the compilers know.
SETTLED_OPSET = 26


def check_versions(proto: onnx.ModelProto) -> None:
    """Refuses a model of an IR or opset version that is too old or too new.

    Raises
    ------
    ModelError
        The message says what is supported.
    """
    if not OLDEST_IR_VERSION <= proto.ir_version <= onnx.IR_VERSION:
        raise ModelError(
            f"IR version {proto.ir_version}; supported are {OLDEST_IR_VERSION} to {onnx.IR_VERSION}"
        )
    if not proto.graph.output:
        raise ModelError("the graph has no outputs")
    versions = {opset.domain: opset.version for opset in proto.opset_import}
    version = versions.get("", versions.get("ai.onnx"))
    if version is None and any(n.domain in ("", "ai.onnx") for n in proto.graph.node):
        raise ModelError("the model does not say which opset it is of")
    if version is not None and not OLDEST_OPSET <= version <= NEWEST_OPSET:
        advice = "newer: update onnx" if version > NEWEST_OPSET else "older: export it again"
        raise ModelError(
            f"opset {version}; supported are {OLDEST_OPSET} to {NEWEST_OPSET} (it is {advice})"
        )
    for value in (*proto.graph.input, *proto.graph.output):
        kind = value.type.WhichOneof("value")
        if kind not in (None, "tensor_type"):
            what = kind.removesuffix("_type").replace("_", " ")
            raise ModelError(f"'{value.name}' is a {what}; only tensors are supported")


def check_nodes(model: Model) -> None:
    """Refuses nodes that no operator is known for, or that do not fit their operator.

    Raises
    ------
    ModelError
        The message names the node.
    """
    foreign = []
    for node in model.nodes:
        for inner in all_nodes([node]):
            if not _is_known(inner, model):
                raise ModelError(_unknown(inner, model))
            if not _is_standard(inner, model):
                foreign.append(node)
    skipped = {id(node) for node in foreign}
    proto = to_proto(model, nodes=(node for node in model.nodes if id(node) not in skipped))
    proto.graph.input.extend(
        onnx.ValueInfoProto(name=name)
        for node in model.nodes
        if id(node) in skipped
        for name in node.output
        if name
    )
    for value in (*proto.graph.input, *proto.graph.output):
        # The checker wants some type, and looks at no more than that.
        kind = value.type.tensor_type
        kind.elem_type = kind.elem_type or onnx.TensorProto.FLOAT
        kind.shape.SetInParent()
    try:
        checker.check_model(proto)
    except (checker.ValidationError, ValueError, RuntimeError) as error:
        raise ModelError(one_line(error)) from None


def settled_opset(model: Model) -> int:
    """The opset to go on with: an older one where all operators mean the same in it."""
    version = model.opsets.get("", SETTLED_OPSET)
    if version <= SETTLED_OPSET:
        return version
    newest = max(
        (
            defs.get_schema(node.op_type, version, "").since_version
            for node in all_nodes(model.nodes)
            if not node.domain and defs.has(node.op_type, version, "")
        ),
        default=SETTLED_OPSET,
    )
    return SETTLED_OPSET if newest <= SETTLED_OPSET else version


def one_line(error: Exception) -> str:
    """The message of an error of onnx, without its line breaks and rules.

    Examples
    --------
    >>> one_line(ValueError("No Op registered for Foo\\n\\n==> Context: Bad node spec. Name: n"))
    'No Op registered for Foo (Bad node spec. Name: n)'
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    context = [line.removeprefix("==> Context: ") for line in lines[1:] if "Context:" in line]
    first = " ".join(line for line in lines if "Context:" not in line)
    return f"{first} ({context[-1]})" if context else first


def _is_standard(node: onnx.NodeProto, model: Model) -> bool:
    version = model.opsets.get(node.domain, NEWEST_OPSET)
    return bool(defs.has(node.op_type, version, node.domain))


def _is_known(node: onnx.NodeProto, model: Model) -> bool:
    if node.domain not in model.opsets:
        return False
    # An operator that is deprecated is left to the checker, which says so.
    return defs.has(node.op_type, node.domain) or (node.domain, node.op_type) in _runtime_kinds()


def _unknown(node: onnx.NodeProto, model: Model) -> str:
    domains = {domain for domain, _ in _runtime_kinds()}
    where = f"'{node.name}'" if node.name else "a node"
    if node.domain not in model.opsets:
        domain = node.domain or "ai.onnx"
        return f"{node.op_type} {where} is of domain '{domain}', which the model does not import"
    if not node.domain:
        return f"{node.op_type} {where}: ONNX has no such operator"
    if node.domain in domains:
        return f"{node.op_type} {where}: the domain '{node.domain}' has no such operator"
    known = ", ".join(sorted(domain or "ai.onnx" for domain in domains))
    return f"{node.op_type} {where} is of the unknown domain '{node.domain}'; known are {known}"


@cache
def _runtime_kinds() -> frozenset[tuple[str, str]]:
    """Domain and kind of the operators that ONNX Runtime has, its internal ones left out."""
    return frozenset(
        (schema.domain, schema.name)
        for schema in native.get_all_operator_schema()
        if schema.domain in ("", "ai.onnx.ml", "com.microsoft")
    )
