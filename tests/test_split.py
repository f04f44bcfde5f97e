"""Operations in pieces, against the whole in ONNX Runtime."""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise

import numpy as np
import onnx
import pytest
from onnx import helper, parser, shape_inference

from hetsched import oracle
from hetsched.errors import SplitRefused
from hetsched.fusion import ELEMENTWISE
from hetsched.graph import Graph, from_onnx, to_onnx
from hetsched.inputs import seeded
from hetsched.op import Op, Tensor
from hetsched.operation import flops, operation_of, operations
from hetsched.rewrite import redundancy, rewrite, split
from hetsched.split import Exit, Split

# Of the newest opset ONNX Runtime lacks some types that it has in an older one.
OPSET, NEW = 21, {"RMSNormalization": 23}
UNARY = """Abs Acos Asinh Atan Ceil Celu Cos Elu Erf Exp Floor Gelu HardSwish Identity IsNaN
LeakyRelu Mish Neg Reciprocal Relu Round Selu Shrink Sigmoid Sign Sin Sinh Softplus Softsign Sqrt
Tan Tanh ThresholdedRelu""".split()
BINARY = "Add Div Equal Greater Less Max Min Mul Pow Sub".split()
# What is in no file is elementwise, or refused.
PLAIN = (
    *(f"(float[2,3] x) => (y) {{ y = {kind} (x) }}" for kind in UNARY),
    *(f"(float[2,3,4] x, float[3,1] z) => (y) {{ y = {kind} (x, z) }}" for kind in BINARY),
    "(bool[2,3,4] c, float[4] x, float[3,1] z) => (y) { y = Where (c, x, z) }",
    "(float[2,3] x) => (y) { y = Cast <to=10> (x) }",
    "(float[2,3] x, int32[5] z) => (y) { y = CastLike (x, z) }",
)
EXAMPLES = [*PLAIN, *(text for operation in operations() for text in operation.examples)]


def graph_of(text: str) -> Graph:
    """The graph of one operation in ONNX's text."""
    graph = parser.parse_graph(f"graph {text}")
    opset = NEW.get(graph.node[0].op_type, OPSET)
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)],
        ir_version=10,
    )
    return from_onnx(shape_inference.infer_shapes(model, check_type=True, data_prop=True))


def feeds(graph: Graph, seed: int = 0) -> dict[str, np.ndarray]:
    """Values for each input; indices are of the first three."""
    return {
        tensor.name: seeded(tensor, seed + number, high=3 if tensor.dtype == "int64" else 200)
        for number, tensor in enumerate(graph.inputs)
    }


def side_by_side(graphs: Sequence[Graph]) -> Graph:
    """Graphs of the same inputs and one output as one graph, whose outputs are numbered."""
    ops, constants, outputs = [], {}, []
    for number, graph in enumerate(graphs):
        given = {tensor.name for tensor in graph.inputs}

        def own(tensor: Tensor | None, number: int = number, given: set[str] = given) -> Tensor:
            if tensor is None or tensor.name in given:
                return tensor
            return replace(tensor, name=f"{number}/{tensor.name}")

        constants |= {f"{number}/{name}": array for name, array in graph.constants.items()}
        for op in graph.ops:
            inputs, written = tuple(map(own, op.inputs)), tuple(map(own, op.outputs))
            ops.append(replace(op, name=f"{number}/{op.name}", inputs=inputs, outputs=written))
        outputs.append(own(graph.outputs[0]))
    first = graphs[0]
    return Graph("variants", tuple(ops), first.inputs, tuple(outputs), constants, first.opsets)


def deviation(found: np.ndarray, wanted: np.ndarray) -> float:
    """How far results are apart, as a share of the peak; infinite where integers differ."""
    assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
    if found.dtype.kind != "f":
        return 0.0 if np.array_equal(found, wanted) else np.inf
    same = (found == wanted) | (np.isnan(found) & np.isnan(wanted))
    error = np.where(same, 0, np.abs(found - wanted))
    peak = np.abs(wanted[np.isfinite(wanted)]).max(initial=1e-30)
    return float(np.nan_to_num(error, nan=np.inf).max(initial=0) / peak)


def cuts(graph: Graph) -> Iterator[Split]:
    """Every cut of each axis of the one output of an operation, of two axes, and of its terms."""
    (output,) = graph.outputs
    op = graph.producers[output.name]
    halves = []
    for axis, size in enumerate(output.shape):
        for first in range(1, size):
            yield Split((op.name,), (Exit(output.name, ((axis, (0, first, size)),)),))
        if size > 1:
            halves.append((axis, (0, size // 2, size)))
    for one, other in pairwise(halves):
        yield Split((op.name,), (Exit(output.name, (one, other)),))
    with suppress(SplitRefused):
        depth = operation_of(op).depth(op)
        bounds = (0, depth // 2, depth)
        yield Split((op.name,), (Exit(output.name, ((0, bounds),), sum=True),))


@pytest.mark.parametrize("text", EXAMPLES)
def test_every_cut_is_exact(text: str) -> None:
    whole = graph_of(text)
    inputs = feeds(whole)
    for op in whole.ops:
        whole = replace(whole, ops=(replace(op, name="node"),))
    for output in whole.outputs:
        alone = replace(whole, outputs=(output,))
        done, names = [alone], ["whole"]
        for item in cuts(alone):
            try:
                done.append(split(alone, [item]))
            except SplitRefused as refusal:
                assert "'node' cannot be cut along axis" in str(refusal)
                continue
            names.append(str(item.exits[0]))
            # A slice and a concatenation compute nothing.
            extra = sum(map(flops, done[-1].ops)) - sum(map(flops, alone.ops))
            predicted = redundancy(alone, item) * sum(map(flops, alone.ops))
            assert predicted == pytest.approx(extra) or not flops(alone.ops[0])
        assert len(done) > 1, "nothing is cut"
        found = list(oracle.run(to_onnx(side_by_side(done)), inputs).values())
        for name, result in zip(names, found, strict=True):
            assert deviation(result, found[0]) <= 1e-5, name
