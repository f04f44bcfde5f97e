"""Operations in pieces, against the whole in ONNX Runtime."""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from onnx import helper, parser, shape_inference

from bench import models
from bench.chains import ARITHMETIC, chain, deviation, drawn_splits, runs
from hetsched import oracle, read_onnx
from hetsched.errors import SplitRefused
from hetsched.graph import Graph, from_onnx, to_onnx
from hetsched.inputs import seeded
from hetsched.liveness import peak_nbytes
from hetsched.op import Tensor
from hetsched.operation import flops, group_flops, operation_of, operations
from hetsched.rewrite import redundancy, rewrite, split
from hetsched.split import Exit, Split
from tests.graphs import Builder

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
    whole = replace(whole, ops=(replace(whole.ops[0], name="node"),))
    inputs = feeds(whole)
    for output in whole.outputs:
        alone = replace(whole, outputs=(output,))
        done, names, refusals = [alone], ["whole"], []
        for item in cuts(alone):
            try:
                done.append(split(alone, [item]))
            except SplitRefused as refusal:
                refusals.append(str(refusal))
                continue
            names.append(str(item.exits[0]))
            assert redundancy(alone, item) == pytest.approx(extra_flops(alone, done[-1]))
        assert len(done) > 1, "nothing is cut"
        assert all("'node' cannot be cut along axis" in refusal for refusal in refusals)
        found = list(oracle.run(to_onnx(side_by_side(done)), inputs).values())
        for name, result in zip(names, found, strict=True):
            assert deviation(result, found[0]) <= 1e-5, name


def extra_flops(whole: Graph, pieces: Graph) -> float:
    """The FLOPs of the groups of `pieces` over those of `whole`, less one."""
    before = sum(map(group_flops, whole.groups))
    return sum(map(group_flops, pieces.groups)) / before - 1 if before else 0.0


@pytest.mark.parametrize("seed", range(120))
def test_random_chains_are_exact(seed: int) -> None:
    # One third each are floats, quantised layers and integers.
    drawn = chain(seed, ARITHMETIC[seed % 3])
    assert drawn.deviation() <= (1e-5 if drawn.arithmetic == "float32" else 0)


def test_what_chains_are_random_in() -> None:
    ways = Counter(way for seed in range(120) for way in chain(seed, ARITHMETIC[seed % 3]).ways)
    assert min(ways[way] for way in ("batch", "channels", "rows", "columns", "tiles", "sum")) >= 4


@pytest.mark.parametrize("name", ["light_shufflenet", "mobilenet_v3_small", "digits_lstm"])
def test_networks_in_random_pieces_are_exact(name: str) -> None:
    (model,) = models.chosen(models.FOLDER, [name], 1)
    graph = read_onnx(models.load(model), shapes=dict(model.shapes))
    inputs = models.inputs(model, graph)
    rng = random.Random(0)
    borders = sorted(rng.sample(range(1, len(graph.ops)), len(graph.ops) // 7))
    splits, _, _ = drawn_splits(rng, graph, runs(graph.ops, borders))
    assert len(splits) > 1 or len(graph.ops) < 20
    whole = oracle.run(to_onnx(graph), inputs)
    pieces = oracle.run(to_onnx(split(graph, splits)), inputs)
    for output in whole:
        # Deep networks add up what is rounded.
        assert deviation(pieces[output], whole[output]) <= 5e-5


def weight(build: Builder, *shape: int) -> Tensor:
    values = np.random.default_rng(len(build.constants)).standard_normal(shape)
    return build.constant(values.astype(np.float32))


def windows(*sizes: int) -> tuple[Graph, list[str]]:
    """Convolutions of 3 x 3 over rows of these sizes, from one to the next, and their results."""
    build = Builder()
    x = build.input("x", 1, 2, sizes[0], 4)
    names = []
    for number, (before, after) in enumerate(pairwise(sizes)):
        x = build.op(
            "Conv",
            *(x, weight(build, 2, 2, 3, 3), weight(build, 2)),
            shape=(1, 2, after, 4),
            name=f"conv{number}",
            pads=(1, 1, 1, 1),
            strides=(-(-before // after), 1),
        )
        names.append(x.name)
    return build.graph(x), names


def at(tensor: str, axis: int, *bounds: int, total: bool = False) -> Exit:
    return Exit(tensor, ((axis, bounds),), total)


def written(graph: Graph) -> list[str]:
    """The operations, as text."""
    return [
        f"{op.name}: {op.kind}({', '.join(t.name for t in op.reads if 'int64' not in t.name)}) "
        f"-> {list(op.output().shape)}"
        for op in graph.ops
    ]


def test_rows_of_two_convolutions_by_hand() -> None:
    graph, (_, two) = windows(6, 6, 3)
    pieces = rewrite(graph, [Split(("conv0", "conv1"), (at(two, 2, 0, 1, 3),))])
    # Row 0 sees rows 0 and 1, which see rows 0 to 2; rows 1 and 2 see rows 1 to 5, which see all.
    assert written(pieces.graph) == [
        "x[:, :, 0:3, :]: Slice(x) -> [1, 2, 3, 4]",
        "conv0#0: Conv(x[:, :, 0:3, :], c0, c1) -> [1, 2, 2, 4]",
        "conv1#0: Conv(conv0.y#0, c2, c3) -> [1, 2, 1, 4]",
        "conv0#1: Conv(x, c0, c1) -> [1, 2, 5, 4]",
        "conv1#1: Conv(conv0.y#1, c2, c3) -> [1, 2, 2, 4]",
        "join conv1.y: Concat(conv1.y#0, conv1.y#1) -> [1, 2, 3, 4]",
    ]
    assert pieces.places["conv0#1"] == (0, 1)
    assert "join conv1.y" not in pieces.places
    # 7 rows for 6 of the first, and all three of the second: 4 FLOPs for each of 18 terms and one.
    assert redundancy(graph, Split(("conv0", "conv1"), (at(two, 2, 0, 1, 3),))) == pytest.approx(
        1 / 9
    )


def test_splits_that_follow_each_other_exchange_a_halo() -> None:
    graph, (one, two) = windows(6, 6, 6)
    halves = [Split(("conv0",), (at(one, 2, 0, 3, 6),)), Split(("conv1",), (at(two, 2, 0, 3, 6),))]
    pieces = rewrite(graph, halves)
    moved = [op for op in pieces.graph.ops if op.kind == "Slice" and op.input(0).name != "x"]
    # One row each, cut where it was made.
    assert [op.output().shape[2] for op in moved] == [1, 1]
    assert [pieces.places[op.name] for op in moved] == [(0, 1), (0, 0)]
    # Both are cut before either piece goes on.
    names = [op.name for op in pieces.graph.ops]
    assert max(names.index(op.name) for op in moved) < names.index("conv1#0")
    assert [redundancy(graph, half) for half in halves] == [0, 0]


def test_splits_that_agree_exchange_nothing() -> None:
    build = Builder()
    x = build.input("x", 1, 6, 8, 8)
    conv = build.op("Conv", x, weight(build, 6, 6, 1, 1), name="conv")
    relu = build.op("Relu", conv, name="relu")
    deep = build.op("Conv", relu, weight(build, 6, 1, 3, 3), name="deep", group=6, pads=(1,) * 4)
    pool = build.op("GlobalAveragePool", deep, name="pool", shape=(1, 6, 1, 1))
    graph = build.graph(pool)
    pieces = split(graph, [Split((t.name[:-2],), (at(t.name, 1, 0, 4, 6),)) for t in (
        conv, relu, deep, pool
    )])  # fmt: skip
    assert [op.kind for op in pieces.ops if op.kind in ("Slice", "Concat")] == ["Concat"]


def heads() -> tuple[Graph, tuple[str, ...]]:
    """Attention of three heads of four columns, and its operations."""
    build = Builder()
    x = build.input("x", 1, 5, 12)
    made = []
    for name, order in (("q", (0, 2, 1, 3)), ("k", (0, 2, 3, 1)), ("v", (0, 2, 1, 3))):
        columns = build.op("MatMul", x, weight(build, 12, 12), name=name)
        sizes = build.constant(np.array([1, 5, 3, 4]), "sizes")
        four = build.op("Reshape", columns, sizes, shape=(1, 5, 3, 4), name=f"{name}4")
        shape = tuple(four.shape[axis] for axis in order)
        made.append(build.op("Transpose", four, shape=shape, name=f"{name}t", perm=order))
    scores = build.op("MatMul", made[0], made[1], shape=(1, 3, 5, 5), name="scores")
    seen = build.op("Softmax", scores, name="softmax", axis=-1)
    mixed = build.op("MatMul", seen, made[2], shape=(1, 3, 5, 4), name="mixed")
    turned = build.op("Transpose", mixed, shape=(1, 5, 3, 4), name="turned", perm=(0, 2, 1, 3))
    flat = build.op(
        "Reshape", turned, build.constant(np.array([1, 5, 12])), shape=(1, 5, 12), name="flat"
    )
    y = build.op("MatMul", flat, weight(build, 12, 12), name="project")
    graph = build.graph(y)
    return graph, tuple(op.name for op in graph.ops)


def test_heads_of_attention_are_columns_of_its_products() -> None:
    graph, names = heads()
    item = Split(names, (at("project.y", 0, 0, 8, 12, total=True),))
    pieces = split(graph, [item])
    columns = {op.name: op.input(1).shape for op in pieces.ops if op.kind == "MatMul"}
    assert columns["q#0"] == columns["k#0"] == columns["v#0"] == (12, 8)
    assert columns["project#1"] == (4, 12)
    # The two terms are added up, and nothing else is computed twice.
    assert redundancy(graph, item) == pytest.approx(5 * 12 / sum(map(flops, graph.ops)))
    inputs = feeds(graph)
    found = oracle.run(to_onnx(pieces), inputs)["project.y"]
    assert deviation(found, oracle.run(to_onnx(graph), inputs)["project.y"]) <= 1e-6


def test_half_a_head_is_refused() -> None:
    graph, names = heads()
    message = "Reshape 'flat' cannot be cut along axis 2: what it has there lies apart"
    with pytest.raises(SplitRefused, match=message):
        split(graph, [Split(names, (at("project.y", 0, 0, 6, 12, total=True),))])


def test_what_all_pieces_need_is_computed_once() -> None:
    graph, names = heads()
    inside = tuple(name for name in names if name != "project")
    item = Split(inside, (at("flat.y", 1, 0, 2, 5),))
    pieces = rewrite(graph, [item])
    # Tokens of the queries are cut; keys and values are all needed, and belong to the first piece.
    again = {name for name, place in pieces.places.items() if place == (0, 1)}
    assert {"q#1", "scores#1", "mixed#1"} < again
    assert not again & {"k#1", "kt#1", "v#1"}
    assert pieces.places["k#0"] == pieces.places["v#0"] == (0, 0)
    assert redundancy(graph, item) == 0


def test_a_bias_goes_with_the_first_term() -> None:
    graph, (one,) = windows(6, 6)
    pieces = split(graph, [Split(("conv0",), (at(one, 0, 0, 1, 2, total=True),))])
    assert [len(op.inputs) for op in pieces.ops if op.kind == "Conv"] == [3, 2]


def test_who_reads_a_region_of_a_sum_adds_up_that_region() -> None:
    graph, (one, two) = windows(6, 6, 6)
    splits = [
        Split(("conv0",), (at(one, 0, 0, 1, 2, total=True),)),
        Split(("conv1",), (at(two, 2, 0, 3, 6),)),
    ]
    pieces = split(graph, splits)
    assert [op.output().shape[2] for op in pieces.ops if op.kind == "Add"] == [4, 4]
    inputs = feeds(graph)
    found = oracle.run(to_onnx(pieces), inputs)[two]
    assert deviation(found, oracle.run(to_onnx(graph), inputs)[two]) <= 1e-6


@pytest.mark.parametrize("opset", [9, 17])
def test_terms_of_a_product_with_a_bias(opset: int) -> None:
    """Until opset 11 a Gemm needed its third input; the bias is added once all the same."""
    build = Builder()
    rng = np.random.default_rng(0)
    x = build.input("x", 3, 8)
    weight = build.constant(rng.standard_normal((8, 5)).astype(np.float32))
    bias = build.constant(rng.standard_normal(5).astype(np.float32))
    y = build.op("Gemm", x, weight, bias, shape=(3, 5), name="gemm")
    graph = replace(build.graph(y), opsets={"": opset})
    pieces = split(graph, [Split(("gemm",), (at(y.name, 0, 0, 3, 8, total=True),))])
    inputs = feeds(graph)
    found = oracle.run(to_onnx(pieces), inputs)[y.name]
    assert deviation(found, oracle.run(to_onnx(graph), inputs)[y.name]) <= 1e-6


def test_weights_are_cut_without_a_copy() -> None:
    graph, (one,) = windows(6, 6)
    pieces = split(graph, [Split(("conv0",), (at(one, 1, 0, 1, 2),))])
    cut = pieces.constants["c0[0:1, :, :, :]"]
    assert cut.shape == (1, 2, 3, 3)
    assert np.shares_memory(cut, graph.constants["c0"])


def test_a_split_is_deterministic_and_can_be_split_again() -> None:
    graph, (_, two) = windows(8, 8, 8)
    item = Split(("conv0", "conv1"), (at(two, 2, 0, 5, 8),))
    pieces = split(graph, [item])
    assert pieces.digest == split(graph, [item]).digest
    again = split(pieces, [Split(("conv0#0",), (at("conv0.y#0", 1, 0, 1, 2),))])
    assert "conv0#0#1" in {op.name for op in again.ops}
    inputs = feeds(graph)
    found = oracle.run(to_onnx(again), inputs)[two]
    assert deviation(found, oracle.run(to_onnx(graph), inputs)[two]) <= 1e-6


def test_a_piece_that_is_all_of_an_output_has_its_name() -> None:
    graph, (one,) = windows(6, 6)
    pieces = split(graph, [Split(("conv0",), (at(one, 2, 0, 6),))])
    assert [op.kind for op in pieces.ops] == ["Conv", "Identity"]
    assert [tensor.name for tensor in pieces.outputs] == [one]


@pytest.mark.parametrize("dtype", ["float16", "float64", "int32", "int8"])
def test_every_element_type_is_cut(dtype: str) -> None:
    build = Builder()
    x = build.input("x", 2, 3, 7, dtype=dtype)
    y = build.op("Neg", x, name="neg")
    y = build.op("Concat", y, x, shape=(2, 6, 7), name="concat", axis=1)
    y = build.op("Transpose", y, shape=(7, 2, 6), name="turn", perm=(2, 0, 1))
    graph = build.graph(y)
    exits = (Exit(y.name, ((0, (0, 2, 7)), (2, (0, 2, 3, 6)))),)
    pieces = split(graph, [Split(("neg", "concat", "turn"), exits)])
    inputs = feeds(graph)
    (found,), (wanted,) = (oracle.run(to_onnx(g), inputs).values() for g in (pieces, graph))
    np.testing.assert_array_equal(found, wanted)


def test_an_old_opset_has_the_bounds_of_a_slice_as_attributes() -> None:
    graph, (one,) = windows(6, 6)
    graph = replace(graph, opsets={"": 9})
    pieces = split(graph, [Split(("conv0",), (at(one, 2, 0, 2, 6),))])
    assert pieces.ops[0].attributes == {"starts": (0,), "ends": (3,), "axes": (2,)}
    inputs = feeds(graph)
    found = oracle.run(to_onnx(pieces), inputs)[one]
    assert deviation(found, oracle.run(to_onnx(graph), inputs)[one]) <= 1e-6


BOTH = ("conv0", "conv1")


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ([Split(BOTH, ())], "the split of 'conv0' has no exit"),
        ([Split(BOTH, (at("conv0.y", 1, 0, 1, 2),))], "output 'conv1.y' is no exit"),
        ([Split(("conv0",), (at("x", 1, 0, 1, 2),))], "no operation of the split writes .* 'x'"),
        ([Split(("conv0", "lost"), (at("conv0.y", 1, 0, 2),))], "names 'lost' twice, or the graph"),
        ([Split(("conv1",), (at("conv1.y", 1, 0, 3),))], r"\(0, 3\), which does not rise from 0"),
        ([Split(("conv1",), (at("conv1.y", 2, 0, 4, 4, 6),))], "does not rise"),
        ([Split(("conv1",), (at("conv1.y", 4, 0, 2),))], "'conv1.y' has no axis 4"),
        (
            [Split(("conv1",), (Exit("conv1.y", ((1, (0, 2)), (1, (0, 2)))),))],
            "is cut along one axis twice",
        ),
        (
            [Split(BOTH, (at("conv0.y", 2, 0, 3, 6), at("conv1.y", 2, 0, 6)))],
            "exit 'conv1.y' has 1 pieces, and another 2",
        ),
        (
            [Split(BOTH, (at("conv0.y", 1, 0, 1, 2, total=True), at("conv1.y", 2, 0, 3, 6)))],
            "Conv 'conv1' reads the sum 'conv0.y' inside of its split",
        ),
        ([Split(("conv1",), (at("conv1.y", 2, 0, 6),))] * 2, "'conv1' is in two splits"),
    ],
)  # fmt: skip
def test_a_split_that_does_not_fit_says_why(splits: list[Split], message: str) -> None:
    graph, _ = windows(6, 6, 6)
    with pytest.raises(SplitRefused, match=message):
        split(graph, splits)


def test_a_split_around_another_operation_is_refused() -> None:
    graph, (one, _, three) = windows(6, 6, 6, 6)
    outer = Split(("conv0", "conv2"), (at(one, 2, 0, 3, 6), at(three, 2, 0, 3, 6)))
    with pytest.raises(SplitRefused, match="waits for itself, by way of conv0 -> conv1"):
        split(graph, [outer])


@pytest.mark.parametrize(
    ("text", "axis", "why"),
    [
        ("(float[2,3] x) => (y) { y = Softmax (x) }", 1, "it is added up"),
        ("(float[2,3,4] x) => (y) { y = LayerNormalization (x, s, b) }", 2, "statistics"),
        ("(float[4,6] x) => (y) { y = CumSum (x, a) }", 1, "taken together"),
        ("(float[1,4,4,4] x) => (y) { y = Conv <group=2> (x, w) }", 1, "cut groups of 2"),
        ("(float[1,8,2,2] x) => (y) { y = DepthToSpace <blocksize=2> (x) }", 1, "far apart"),
        ("(float[4] x, int64[4,1] i) => (y) { y = GatherND (x, i) }", 0, "no known regions"),
        ("(float[4] x) => (y) { y = MaxPool <kernel_shape=[2]> (x) }", 0, ""),
    ],
)
def test_an_operation_that_is_not_cut_says_why(text: str, axis: int, why: str) -> None:
    weights = "<float[4] s = {1, 1, 1, 1}, float[4] b = {0, 0, 0, 0}, int64 a = {1}, "
    weights += "float[4,2,1,1] w = {1, 2, 3, 4, 5, 6, 7, 8}>"
    if "MaxPool" in text:
        text = "(float[1,1,4] x) => (y, i) { y, i = MaxPool <kernel_shape=[2]> (x) }"
        axis, why = 2, "the places of the greatest elements count in the whole input"
    graph = graph_of(text.replace("{", weights + " {", 1))
    output = graph.outputs[-1]
    graph = replace(graph, outputs=(output,), ops=(replace(graph.ops[0], name="node"),))
    bounds = (0, 1, output.shape[axis])
    with pytest.raises(SplitRefused, match=f"'node' cannot be cut.*{why}"):
        split(graph, [Split(("node",), (at(output.name, axis, *bounds),))])


def test_memory_by_hand() -> None:
    build = Builder()
    x = build.input("x", 10)
    a = build.op("Relu", x, name="a")
    view = build.op("Reshape", a, build.constant(np.array([10])), name="view")
    b = build.op("Concat", view, x, shape=(20,), name="b", axis=0)
    c = build.op("ReduceSum", b, shape=(1,), name="c")
    graph = build.graph(c)
    # x and a, the view being a, until both are read; then b and c.
    assert peak_nbytes(graph) == 4 * (10 + 10 + 20)
    assert peak_nbytes(replace(graph, outputs=(c, a))) == 4 * (10 + 10 + 20)
    assert peak_nbytes(graph, graph.ops) == peak_nbytes(graph)


def test_tiles_one_after_the_other_take_less_memory() -> None:
    build = Builder()
    x = build.input("x", 1, 2, 32, 32)
    wide = build.op("Conv", x, weight(build, 32, 2, 1, 1), shape=(1, 32, 32, 32), name="wide")
    pool = build.op(
        "MaxPool", wide, shape=(1, 32, 4, 4), name="pool", kernel_shape=(8, 8), strides=(8, 8)
    )
    graph = build.graph(pool)
    tiles = (Exit(pool.name, ((2, (0, 1, 2, 3, 4)), (3, (0, 2, 4)))),)
    pieces = split(graph, [Split(("wide", "pool"), tiles)])
    assert peak_nbytes(graph) == 4 * (2 * 1024 + 32 * 1024)
    # The input, one tile of an eighth, and what the tiles have made so far.
    assert peak_nbytes(pieces) < 0.25 * peak_nbytes(graph)
    # First all of the wide tensor, then its pools, is no better than without tiles.
    breadth = sorted(pieces.ops, key=lambda op: op.kind in ("MaxPool", "Concat"))
    assert peak_nbytes(pieces, breadth) > 0.9 * peak_nbytes(graph)
