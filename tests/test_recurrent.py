"""Unrolled LSTM, GRU and RNN against onnxruntime's own kernels."""

from collections.abc import Mapping, Sequence
from functools import cache
from itertools import product

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from hetsched.errors import UnsupportedOperation
from hetsched.graph import Graph, to_onnx
from hetsched.lowering.recurrent import ACTIVATIONS, GATES, WIDEST, lower_recurrent
from hetsched.op import Op, Tensor

KINDS = ("LSTM", "GRU", "RNN")
DIRECTIONS = ("forward", "reverse", "bidirectional")
FUNCTIONS = {"LSTM": 3, "GRU": 2, "RNN": 1}
INPUTS = ("X", "W", "R", "B", "sequence_lens", "initial_h", "initial_c", "P")
OUTPUTS = ("Y", "Y_h", "Y_c")
STEPS, BATCH, INPUT, HIDDEN = 5, 3, 4, 6


@cache
def newest_opset() -> int:
    """The newest opset of which onnxruntime runs a recurrent operation."""
    for opset in range(onnx.defs.onnx_opset_version(), 21, -1):
        try:
            run(layer("RNN", opset=opset), {"X": np.zeros((STEPS, BATCH, INPUT), np.float32)})
        except (
            onnxruntime.capi.onnxruntime_pybind11_state.Fail,
            onnxruntime.capi.onnxruntime_pybind11_state.InvalidGraph,
            onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented,
        ):
            continue
        return opset
    raise AssertionError("onnxruntime runs no opset since 22")


def arrays(
    kind: str,
    directions: int,
    steps: int = STEPS,
    batch: int = BATCH,
    dtype: str = "float32",
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """A value of every input but the lengths."""
    rng = np.random.default_rng(seed)
    rows = GATES[kind] * HIDDEN
    state = (directions, batch, HIDDEN)
    shapes = {
        "X": (steps, batch, INPUT),
        "W": (directions, rows, INPUT),
        "R": (directions, rows, HIDDEN),
        "B": (directions, 2 * rows),
        "initial_h": state,
    }
    if kind == "LSTM":
        shapes |= {"initial_c": state, "P": (directions, 3 * HIDDEN)}
    return {
        name: (0.6 * rng.standard_normal(shape)).astype(dtype) for name, shape in shapes.items()
    }


def layer(
    kind: str,
    direction: str = "forward",
    opset: int = 17,
    without: Sequence[str] = ("sequence_lens",),
    computed: Sequence[str] = ("X",),
    outputs: Sequence[str] = OUTPUTS,
    lengths: Sequence[int] | None = None,
    values: Mapping[str, np.ndarray] | None = None,
    name: str = "net/layer",
    **attributes: object,
) -> Graph:
    """A graph of one recurrent operation; its inputs are constants but for those `computed`."""
    directions = 2 if direction == "bidirectional" else 1
    values = dict(arrays(kind, directions) if values is None else values)
    if lengths is not None:
        values["sequence_lens"] = np.array(lengths, np.int32)
    read = [key if key in values and key not in without else None for key in INPUTS]
    read = read[: 8 if kind == "LSTM" else 6]
    tensors = {key: Tensor(key, values[key].shape, values[key].dtype.name) for key in read if key}
    steps, batch = values["X"].shape[:2]
    if attributes.get("layout"):
        steps, batch = batch, steps
        shapes = {"Y": (batch, steps, directions, HIDDEN)}
        shapes |= dict.fromkeys(("Y_h", "Y_c"), (batch, directions, HIDDEN))
    else:
        shapes = {"Y": (steps, directions, batch, HIDDEN)}
        shapes |= dict.fromkeys(("Y_h", "Y_c"), (directions, batch, HIDDEN))
    written = tuple(
        Tensor(key, shapes[key], values["X"].dtype.name) if key in outputs else None
        for key in OUTPUTS[: 3 if kind == "LSTM" else 2]
    )
    op = Op(
        name,
        kind,
        tuple(tensors[key] if key else None for key in read),
        written,
        {"hidden_size": HIDDEN, "direction": direction, **attributes},
    )
    return Graph(
        name="layer",
        ops=(op,),
        inputs=tuple(tensors[key] for key in tensors if key in computed),
        outputs=tuple(tensor for tensor in written if tensor is not None),
        constants={key: values[key] for key in tensors if key not in computed},
        opsets={"": opset},
    )


def run(graph: Graph, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        to_onnx(graph).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feeds = {tensor.name: inputs[tensor.name] for tensor in graph.inputs}
    results: list[np.ndarray] = session.run(None, feeds)
    return results


def assert_close(
    found: Sequence[np.ndarray], expected: Sequence[np.ndarray], tolerance: float = 1e-5
) -> None:
    assert len(found) == len(expected) > 0
    for left, right in zip(found, expected, strict=True):
        assert left.shape == right.shape
        assert np.isfinite(right.astype(np.float64)).all()
        peak = max(1.0, float(np.abs(right).max(initial=0)))
        assert np.abs(left.astype(np.float64) - right).max(initial=0) <= tolerance * peak


def assert_equivalent(graph: Graph, values: Mapping[str, np.ndarray], **more: np.ndarray) -> Graph:
    """The graph lowered, once its results are seen to be those of the graph."""
    lowered = lower_recurrent(graph)
    assert not {op.kind for op in lowered.ops} & set(KINDS)
    assert (lowered.inputs, lowered.outputs) == (graph.inputs, graph.outputs)
    assert lowered.opsets == graph.opsets
    onnx.checker.check_model(to_onnx(lowered), full_check=True)
    inputs = {**values, **more}
    assert_close(run(lowered, inputs), run(graph, inputs))
    return lowered


def case(kind: str, direction: str) -> dict[str, np.ndarray]:
    return arrays(kind, 2 if direction == "bidirectional" else 1)


@pytest.mark.parametrize("opset", [7, 8, 9, 10, 11, 13, 14, 18, 22, "newest"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_opset(kind: str, direction: str, opset: int | str) -> None:
    number = newest_opset() if opset == "newest" else int(opset)
    values = case(kind, direction)
    for without in ((), ("initial_h", "initial_c", "P", "B")):
        assert_equivalent(layer(kind, direction, number, without, clip=0.7), values)


@pytest.mark.parametrize("kind", KINDS)
def test_optional_inputs(kind: str) -> None:
    names = ("B", "initial_h", "initial_c", "P") if kind == "LSTM" else ("B", "initial_h")
    for direction, chosen in product(DIRECTIONS, product((True, False), repeat=len(names))):
        without = [name for name, there in zip(names, chosen, strict=True) if not there]
        assert_equivalent(layer(kind, direction, without=without), case(kind, direction))


@pytest.mark.parametrize("opset", [7, 17])
@pytest.mark.parametrize("kind", KINDS)
def test_computed_inputs(kind: str, opset: int) -> None:
    """Weights, biases and states that another operation or the caller provides."""
    for direction in DIRECTIONS:
        values = case(kind, direction)
        graph = layer(kind, direction, opset, computed=tuple(values))
        assert not graph.constants
        assert_equivalent(graph, values)


@pytest.mark.parametrize("kind", KINDS)
def test_omitted_outputs(kind: str) -> None:
    names = OUTPUTS if kind == "LSTM" else OUTPUTS[:2]
    for direction, chosen in product(DIRECTIONS, product((True, False), repeat=len(names))):
        outputs = [name for name, wanted in zip(names, chosen, strict=True) if wanted]
        if outputs:
            graph = layer(kind, direction, outputs=outputs, lengths=[5, 2, 0], without=())
            assert_equivalent(graph, case(kind, direction))


@pytest.mark.parametrize("opset", [7, 17])
@pytest.mark.parametrize("function", sorted(ACTIVATIONS))
@pytest.mark.parametrize("kind", KINDS)
def test_every_activation_in_every_place(kind: str, function: str, opset: int) -> None:
    usual = ("Sigmoid", "Tanh", "Tanh")[: FUNCTIONS[kind]] if kind != "RNN" else ("Tanh",)
    for place, direction in product(range(FUNCTIONS[kind]), ("forward", "bidirectional")):
        names = list(usual)
        names[place] = function
        if direction == "bidirectional":
            names = [*usual, *names]
        values = case(kind, direction)
        for numbers in ({}, {"activation_alpha": (0.3,), "activation_beta": (0.45,)}):
            # Without a bound on the gates the states of an unbounded function overflow.
            graph = layer(kind, direction, opset, activations=names, clip=2.0, **numbers)
            assert_equivalent(graph, values)


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_alphas_and_betas_are_consumed_in_turn(kind: str) -> None:
    names = ("HardSigmoid", "ScaledTanh", "LeakyRelu", "Relu", "Affine", "Elu")
    count = 2 * FUNCTIONS[kind]
    values = arrays(kind, 2)
    for alphas, betas in (
        ((0.3, 0.8, 0.2), (0.4,)),
        ((), (0.6, 0.9, 0.1)),
        ((0.5,) * 9, (0.3,) * 9),
    ):
        graph = layer(
            kind,
            "bidirectional",
            activations=names[:count],
            activation_alpha=alphas,
            activation_beta=betas,
        )
        assert_equivalent(graph, values)


def test_alphas_of_both_directions_of_an_rnn() -> None:
    values = arrays("RNN", 2)
    for names in (("Tanh", "LeakyRelu"), ("Affine", "ThresholdedRelu"), ("Elu", "HardSigmoid")):
        graph = layer(
            "RNN",
            "bidirectional",
            activations=names,
            activation_alpha=(0.4, 0.2),
            activation_beta=(0.1,),
        )
        assert_equivalent(graph, values)


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_names_of_activations_in_any_case(kind: str) -> None:
    names = ("hardsigmoid", "RELU", "sOftSign")[: FUNCTIONS[kind]]
    assert_equivalent(layer(kind, activations=names), arrays(kind, 1))


def test_an_rnn_with_the_defaults_of_both_directions_written_out() -> None:
    assert_equivalent(layer("RNN", activations=("Relu", "Tanh")), arrays("RNN", 1))


@pytest.mark.parametrize("opset", [7, 17])
@pytest.mark.parametrize("clip", [0.05, 0.4, 100.0])
@pytest.mark.parametrize("kind", KINDS)
def test_clip(kind: str, clip: float, opset: int) -> None:
    for direction in DIRECTIONS:
        for without in ((), ("P",), ("B", "P")):
            graph = layer(kind, direction, opset, without, clip=clip)
            assert_equivalent(graph, case(kind, direction))
            flag = {"LSTM": "input_forget", "GRU": "linear_before_reset"}.get(kind)
            if flag:
                graph = layer(kind, direction, opset, without, clip=clip, **{flag: 1})
                assert_equivalent(graph, case(kind, direction))


def test_an_rnn_clips_to_nothing_and_ignores_a_negative_clip() -> None:
    values = arrays("RNN", 1)
    for clip in (0.0, -1.0):
        assert_equivalent(layer("RNN", clip=clip), values)


@pytest.mark.parametrize(
    ("kind", "flag"), [("LSTM", "input_forget"), ("GRU", "linear_before_reset")]
)
def test_flags(kind: str, flag: str) -> None:
    for direction, without in product(DIRECTIONS, ((), ("B",), ("P",), ("initial_h",))):
        graph = layer(kind, direction, without=without, **{flag: 1})
        values = case(kind, direction)
        plain = layer(kind, direction, without=without)
        assert np.abs(run(graph, values)[0] - run(plain, values)[0]).max() > 1e-3
        assert_equivalent(graph, values)


@pytest.mark.parametrize("opset", [7, 9, 13, 22])
@pytest.mark.parametrize("kind", KINDS)
def test_constant_lengths(kind: str, opset: int) -> None:
    for direction, lengths in product(
        DIRECTIONS, ([5, 5, 5], [5, 3, 1], [2, 4, 3], [0, 5, 2], [0, 0, 0], [3, 3, 3])
    ):
        values = case(kind, direction)
        # What lies beyond a sequence must not matter.
        for row, length in enumerate(lengths):
            values["X"][length:, row] = 1e30
        graph = layer(kind, direction, opset, (), lengths=lengths)
        assert_equivalent(graph, values)


@pytest.mark.parametrize("opset", [9, 13, 22])
@pytest.mark.parametrize("kind", KINDS)
def test_lengths_at_run_time(kind: str, opset: int) -> None:
    for direction in DIRECTIONS:
        values = case(kind, direction)
        graph = layer(kind, direction, opset, (), ("X", "sequence_lens"), lengths=[1, 1, 1])
        lowered = lower_recurrent(graph)
        for lengths in ([5, 5, 5], [5, 3, 1], [0, 5, 2], [0, 0, 0]):
            feeds = {**values, "sequence_lens": np.array(lengths, np.int32)}
            assert_close(run(lowered, feeds), run(graph, feeds))


@pytest.mark.parametrize("kind", KINDS)
def test_layout_with_the_batch_first(kind: str) -> None:
    """onnxruntime has no such kernel: against the same layer with the steps first."""
    for direction, computed in product(DIRECTIONS, (("X",), ("X", "initial_h", "initial_c"))):
        values = case(kind, direction)
        turned = dict(values)
        for name in turned.keys() & {"X", "initial_h", "initial_c"}:
            turned[name] = np.ascontiguousarray(values[name].swapaxes(0, 1))
        y, *last = run(layer(kind, direction, values=values, lengths=[5, 2, 4], without=()), values)
        expected = [y.transpose(2, 0, 1, 3), *(state.swapaxes(0, 1) for state in last)]
        graph = layer(kind, direction, 14, (), computed, lengths=[5, 2, 4], values=turned, layout=1)
        assert_close(run(lower_recurrent(graph), turned), expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-6), ("float16", 1e-2)])
@pytest.mark.parametrize("kind", KINDS)
def test_other_floats(kind: str, dtype: str, tolerance: float) -> None:
    """onnxruntime has float32 kernels alone: against them."""
    functions = ("HardSigmoid", "Elu", "ThresholdedRelu")[: FUNCTIONS[kind]] * 2
    for names in (None, functions):
        attributes = {} if names is None else {"activations": names}
        single = arrays(kind, 2)
        expected = run(layer(kind, "bidirectional", clip=2.0, **attributes), single)
        values = {name: array.astype(dtype) for name, array in single.items()}
        graph = layer(kind, "bidirectional", values=values, clip=2.0, **attributes)
        lowered = lower_recurrent(graph)
        if dtype == "float64":
            # Where onnxruntime also lacks some of the plain operations.
            found = ReferenceEvaluator(to_onnx(lowered)).run(None, {"X": values["X"]})
        else:
            found = run(lowered, values)
        assert {array.dtype.name for array in found} == {dtype}
        assert_close(found, expected, tolerance)


@pytest.mark.parametrize(
    ("kind", "steps"),
    [*product(KINDS, (1, WIDEST, WIDEST + 1)), ("RNN", WIDEST**2 + 3)],
)
def test_any_number_of_steps(kind: str, steps: int) -> None:
    values = arrays(kind, 2, steps=steps, batch=1)
    values["R"] *= 0.3
    graph = layer(kind, "bidirectional", values=values)
    lowered = assert_equivalent(graph, values)
    per_direction = {"LSTM": steps + 1, "GRU": 2 * steps + 1, "RNN": steps + 1}[kind]
    assert sum(op.kind == "MatMul" for op in lowered.ops) == 2 * per_direction
    widest = max(len(op.inputs) + len(op.outputs) for op in lowered.ops)
    assert widest <= WIDEST + 2


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_layer(data: st.DataObject) -> None:
    draw = data.draw
    kind, direction = draw(st.sampled_from(KINDS)), draw(st.sampled_from(DIRECTIONS))
    directions = 2 if direction == "bidirectional" else 1
    steps, batch = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    opset = draw(st.sampled_from([7, 9, 11, 14, 22]))
    values = arrays(kind, directions, steps, batch, seed=draw(st.integers(0, 99)))
    optional = sorted(values.keys() - {"X", "W", "R"})
    attributes: dict[str, object] = {}
    if draw(st.booleans()):
        attributes["clip"] = draw(st.sampled_from([0.1, 0.5, 2.0]))
    if "clip" in attributes:
        # Only with a bound on the gates do the states of an unbounded function stay finite.
        count = FUNCTIONS[kind] * directions
        names = st.sampled_from(sorted(ACTIVATIONS))
        attributes["activations"] = draw(st.lists(names, min_size=count, max_size=count))
        floats = st.lists(st.sampled_from([0.2, 0.5, 0.9]), max_size=count)
        attributes["activation_alpha"] = draw(floats)
        attributes["activation_beta"] = draw(floats)
    if kind != "RNN":
        flag = "input_forget" if kind == "LSTM" else "linear_before_reset"
        attributes[flag] = draw(st.integers(0, 1))
    lengths = draw(st.none() | st.lists(st.integers(0, steps), min_size=batch, max_size=batch))
    graph = layer(
        kind,
        direction,
        opset,
        draw(st.lists(st.sampled_from(optional), unique=True)),
        ("X", *draw(st.lists(st.sampled_from(("W", "R", *optional)), unique=True))),
        lengths=lengths,
        values=values,
        **attributes,
    )
    assert_equivalent(graph, values)


def test_a_graph_without_recurrent_operations_is_returned_as_it_is() -> None:
    x, y = Tensor("x", (2,), "float32"), Tensor("y", (2,), "float32")
    # An LSTM of another domain is another operation.
    for op in (Op("relu", "Relu", (x,), (y,)), Op("own", "LSTM", (x,), (y,), domain="com.example")):
        graph = Graph("plain", (op,), (x,), (y,), {}, {"": 17, "com.example": 1})
        assert lower_recurrent(graph) is graph


def test_names_are_new_and_begin_with_those_of_the_operation() -> None:
    """Beside tensors that already have the names which the layer would take."""
    first = layer("GRU", name="gru")
    taken = set()
    for op in lower_recurrent(first).ops:
        taken |= {op.name, *(tensor.name for tensor in op.writes)}
    x = first.inputs[0]
    clashes = tuple(
        Op(f"relu{index}", "Relu", (x,), (Tensor(name, x.shape, x.dtype),))
        for index, name in enumerate(sorted(taken - {"Y", "Y_h"}))
    )
    graph = Graph(
        "clash", (*clashes, *first.ops), first.inputs, first.outputs, first.constants, first.opsets
    )
    lowered = assert_equivalent(graph, arrays("GRU", 1))
    new = [op for op in lowered.ops if op not in clashes]
    assert all(op.name.startswith("gru/") for op in new)
    assert all(name.startswith("gru/") for name in lowered.constants)


def test_weights_that_only_the_operation_read_are_gone() -> None:
    graph = layer("LSTM", "bidirectional", lengths=[5, 4, 3], without=())
    lowered = lower_recurrent(graph)
    assert not lowered.constants.keys() & graph.constants.keys()
    read = {tensor.name for op in lowered.ops for tensor in op.reads}
    assert lowered.constants.keys() <= read
    # A weight that something else reads stays.
    w = Tensor("W", graph.constants["W"].shape, "float32")
    copy = Tensor("copy", w.shape, w.dtype)
    shared = Graph(
        "shared",
        (*graph.ops, Op("copy", "Identity", (w,), (copy,))),
        graph.inputs,
        (*graph.outputs, copy),
        graph.constants,
        graph.opsets,
    )
    assert_equivalent(shared, arrays("LSTM", 2))


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (layer("RNN", opset=6), "opset 6"),
        (layer("LSTM", output_sequence=1), "'output_sequence'"),
        (layer("LSTM", linear_before_reset=1), "'linear_before_reset'"),
        (layer("GRU", "sideways"), "'sideways'"),
        (layer("GRU", layout=2), "layout 2"),
        (layer("GRU", activations=("Sigmoid", "Swish")), "'Swish'"),
        (layer("GRU", activations=("Sigmoid",)), "1 activations; 2"),
        (layer("LSTM", clip=0.0), "clip of 0"),
        (layer("LSTM", hidden_size=7), "hidden_size of 7"),
        (layer("LSTM", lengths=[6, 1, 1], without=()), "1 to 6"),
        (layer("LSTM", lengths=[-1, 1, 1], without=()), "-1 to 1"),
        (
            layer("LSTM", opset=8, lengths=[1, 1, 1], without=(), computed=("sequence_lens", "X")),
            "run time",
        ),
        (layer("RNN", values=arrays("RNN", 1, steps=0)), "empty"),
        (layer("RNN", values=arrays("RNN", 1, dtype="int32")), "int32"),
        (layer("GRU", values={**arrays("GRU", 1), "B": np.zeros((1, HIDDEN), np.float32)}), "B"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_refused_is_named(graph: Graph, message: str) -> None:
    with pytest.raises(UnsupportedOperation) as refusal:
        lower_recurrent(graph)
    assert "net/layer" in str(refusal.value)
    assert message in str(refusal.value)


@pytest.mark.parametrize(("kind", "opset"), [("LSTM", 9), ("LSTM", 17), ("GRU", 17), ("RNN", 17)])
def test_through_tvm(kind: str, opset: int) -> None:
    """Compiled and run; every step calls the same functions."""
    tvm = pytest.importorskip("tvm")
    from tvm import relax
    from tvm.relax.frontend.onnx import from_onnx

    def fused(steps: int) -> tvm.IRModule:
        values = arrays(kind, 2, steps=steps)
        graph = layer(kind, "bidirectional", opset, values=values, outputs=("Y", "Y_h"))
        module = from_onnx(to_onnx(lower_recurrent(graph)), keep_params_in_input=False)
        for step in ("LegalizeOps", "AnnotateTIROpPattern", "FoldConstant", "FuseOps", "FuseTIR"):
            module = getattr(relax.transform, step)()(module)
        return module

    module = fused(STEPS)
    assert len(fused(STEPS + 4).functions) == len(module.functions)
    machine = relax.VirtualMachine(
        relax.build(module, tvm.target.Target({"kind": "llvm"})), tvm.cpu()
    )
    values = arrays(kind, 2)
    found = [array.numpy() for array in machine["main"](tvm.runtime.tensor(values["X"]))]
    graph = layer(kind, "bidirectional", opset, values=values, outputs=("Y", "Y_h"))
    assert_close(found, run(graph, values))
