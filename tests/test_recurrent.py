"""LSTM, GRU and RNN compiled by TVM against onnxruntime's own kernels.

Layers that a test compares are compiled together, which takes a fraction of the time, and without
LLVM's optimisations; `test_targets.py` has some with them.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetsched.errors import CompileError
from hetsched.graph import Graph, to_onnx
from hetsched.op import Op, Tensor
from hetsched.schedules.rules import Rules
from hetsched.schedules.vectors import Vectors

tvm = pytest.importorskip("tvm")

from tvm.support.cc import create_shared  # noqa: E402

from hetsched.lowering.recurrent import ACTIVATIONS  # noqa: E402
from hetsched.lowering.relax import build, compile_part, lowered, refusal_of  # noqa: E402
from hetsched.targets.cpu import llvm  # noqa: E402
from hetsched.tvm_runtime import to_numpy, to_tvm  # noqa: E402

KINDS = ("LSTM", "GRU", "RNN")
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
DIRECTIONS = ("forward", "reverse", "bidirectional")
FUNCTIONS = {"LSTM": 3, "GRU": 2, "RNN": 1}
INPUTS = ("X", "W", "R", "B", "sequence_lens", "initial_h", "initial_c", "P")
OUTPUTS = ("Y", "Y_h", "Y_c")
STEPS, BATCH, INPUT, HIDDEN = 5, 3, 4, 6
ISA = "x86_64"
# A hidden size of HIDDEN fills one vector and part of another.
VECTORS = Vectors(lanes=4, registers=16)

Case = tuple[Graph, Mapping[str, np.ndarray]]


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
    hidden: int = HIDDEN,
) -> dict[str, np.ndarray]:
    """A value of every input but the lengths."""
    rng = np.random.default_rng(seed)
    rows = GATES[kind] * hidden
    state = (directions, batch, hidden)
    shapes = {
        "X": (steps, batch, INPUT),
        "W": (directions, rows, INPUT),
        "R": (directions, rows, hidden),
        "B": (directions, 2 * rows),
        "initial_h": state,
    }
    if kind == "LSTM":
        shapes |= {"initial_c": state, "P": (directions, 3 * hidden)}
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
    hidden = values["R"].shape[2]
    if attributes.get("layout"):
        steps, batch = batch, steps
        shapes = {"Y": (batch, steps, directions, hidden)}
        shapes |= dict.fromkeys(("Y_h", "Y_c"), (batch, directions, hidden))
    else:
        shapes = {"Y": (steps, directions, batch, hidden)}
        shapes |= dict.fromkeys(("Y_h", "Y_c"), (directions, batch, hidden))
    written = tuple(
        Tensor(key, shapes[key], values["X"].dtype.name) if key in outputs else None
        for key in OUTPUTS[: 3 if kind == "LSTM" else 2]
    )
    op = Op(
        name,
        kind,
        tuple(tensors[key] if key else None for key in read),
        written,
        {"hidden_size": hidden, "direction": direction, **attributes},
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


def together(graphs: Sequence[Graph]) -> Graph:
    """All of `graphs` side by side; the tensors of the first begin with `0/`."""

    def own(tensor: Tensor | None, index: int) -> Tensor | None:
        return tensor and replace(tensor, name=f"{index}/{tensor.name}")

    numbered = list(enumerate(graphs))
    return Graph(
        name="together",
        ops=tuple(
            Op(
                f"{i}/{op.name}",
                op.kind,
                tuple(own(tensor, i) for tensor in op.inputs),
                tuple(own(tensor, i) for tensor in op.outputs),
                op.attributes,
            )
            for i, graph in numbered
            for op in graph.ops
        ),
        inputs=tuple(replace(t, name=f"{i}/{t.name}") for i, g in numbered for t in g.inputs),
        outputs=tuple(replace(t, name=f"{i}/{t.name}") for i, g in numbered for t in g.outputs),
        constants={f"{i}/{name}": a for i, g in numbered for name, a in g.constants.items()},
        opsets=graphs[0].opsets,
    )


def compiled(
    graph: Graph, vectors: Vectors = VECTORS
) -> Callable[[Mapping[str, np.ndarray]], list[np.ndarray]]:
    """What runs `graph` by name of its inputs."""

    def machine(module: Any) -> Any:
        with TemporaryDirectory() as folder:
            objects = build(module, {**llvm(ISA), "opt-level": 0}, Path(folder))
            library = str(Path(folder) / "code.so")
            create_shared(library, list(map(str, objects)))
            loaded = tvm.runtime.load_module(library)
        return tvm.runtime.vm.VirtualMachine(loaded, tvm.cpu())["main"]

    main, part = compile_part(graph, machine, Rules(vectors), interpreted=True)

    def call(feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        arrays = [*(feeds[tensor.name] for tensor in graph.inputs), *part.weights.values()]
        result = main(*(to_tvm(array, array.dtype) for array in arrays))
        results = [result] if len(graph.outputs) == 1 else result
        return [np.array(to_numpy(tensor)) for tensor in results]

    return call


def assert_equivalent(cases: Iterable[Case], vectors: Vectors = VECTORS) -> None:
    cases = list(cases)
    by_opsets: dict[int, list[Case]] = {}
    for graph, values in cases:
        by_opsets.setdefault(graph.opsets[""], []).append((graph, values))
    for group in by_opsets.values():
        feeds = {
            f"{i}/{key}": v for i, (_, values) in enumerate(group) for key, v in values.items()
        }
        found = compiled(together([graph for graph, _ in group]), vectors)(feeds)
        for graph, values in group:
            own = [found.pop(0) for _ in graph.outputs]
            assert_close(own, run(graph, values))


def case(kind: str, direction: str) -> dict[str, np.ndarray]:
    return arrays(kind, 2 if direction == "bidirectional" else 1)


@pytest.mark.parametrize("opset", [7, 14, "newest"])
def test_every_opset(opset: int | str) -> None:
    number = newest_opset() if opset == "newest" else int(opset)
    assert_equivalent(
        (layer(kind, direction, number, ("sequence_lens",), clip=0.7), case(kind, direction))
        for kind, direction in product(KINDS, DIRECTIONS)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_optional_inputs(kind: str) -> None:
    names = ("B", "initial_h", "initial_c", "P") if kind == "LSTM" else ("B", "initial_h")
    assert_equivalent(
        (
            layer(
                kind,
                "bidirectional",
                without=[name for name, there in zip(names, chosen, strict=True) if not there],
            ),
            case(kind, "bidirectional"),
        )
        for chosen in product((True, False), repeat=len(names))
    )


@pytest.mark.parametrize("kind", KINDS)
def test_computed_inputs(kind: str) -> None:
    """Weights, biases and states that another operation or the caller provides."""
    cases = []
    for direction in DIRECTIONS:
        values = case(kind, direction)
        graph = layer(kind, direction, computed=tuple(values))
        assert not graph.constants
        cases.append((graph, values))
    assert_equivalent(cases)


@pytest.mark.parametrize("kind", KINDS)
def test_omitted_outputs(kind: str) -> None:
    names = OUTPUTS if kind == "LSTM" else OUTPUTS[:2]
    cases = []
    for chosen in product((True, False), repeat=len(names)):
        outputs = [name for name, wanted in zip(names, chosen, strict=True) if wanted]
        if outputs:
            graph = layer(kind, "bidirectional", outputs=outputs, lengths=[5, 2, 0], without=())
            cases.append((graph, case(kind, "bidirectional")))
    assert_equivalent(cases)


@pytest.mark.parametrize("kind", KINDS)
def test_every_activation_in_every_place(kind: str) -> None:
    """In each place of one direction in turn, beside the usual ones in the other."""
    usual = ("Sigmoid", "Tanh", "Tanh")[: FUNCTIONS[kind]] if kind != "RNN" else ("Tanh",)
    cases = []
    for index, function in enumerate(sorted(ACTIVATIONS)):
        # The places go round with the functions; in the other direction it stands in all.
        names = [*usual, *[function] * len(usual)]
        names[index % len(usual)] = function
        # The first that takes one gets it, the others their defaults. Without a bound on the gates
        # the states of an unbounded function overflow.
        graph = layer(
            kind,
            "bidirectional",
            activations=names,
            activation_alpha=(0.3,),
            activation_beta=(0.45,),
            clip=2.0,
        )
        cases.append((graph, case(kind, "bidirectional")))
    assert_equivalent(cases)


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_alphas_and_betas_are_consumed_in_turn(kind: str) -> None:
    names = ("HardSigmoid", "ScaledTanh", "LeakyRelu", "Relu", "Affine", "Elu")
    assert_equivalent(
        (
            layer(
                kind,
                "bidirectional",
                activations=names[: 2 * FUNCTIONS[kind]],
                activation_alpha=alphas,
                activation_beta=betas,
            ),
            arrays(kind, 2),
        )
        for alphas, betas in (
            ((0.3, 0.8, 0.2), (0.4,)),
            ((), (0.6, 0.9, 0.1)),
            ((0.5,) * 9, (0.3,) * 9),
        )
    )


def test_activations_of_an_rnn() -> None:
    both = [("Tanh", "LeakyRelu"), ("Affine", "ThresholdedRelu"), ("Elu", "HardSigmoid")]
    numbers: dict[str, object] = {"activation_alpha": (0.4, 0.2), "activation_beta": (0.1,)}
    cases = [
        (layer("RNN", "bidirectional", activations=names, **numbers), arrays("RNN", 2))
        for names in both
    ]
    # The defaults of both directions written out.
    cases.append((layer("RNN", activations=("Relu", "Tanh")), arrays("RNN", 1)))
    assert_equivalent(cases)


def test_names_of_activations_in_any_case() -> None:
    names = ("hardsigmoid", "RELU", "sOftSign")
    assert_equivalent(
        (layer(kind, activations=names[: FUNCTIONS[kind]]), arrays(kind, 1))
        for kind in ("LSTM", "GRU")
    )


@pytest.mark.parametrize("kind", KINDS)
def test_clip(kind: str) -> None:
    flag = {"LSTM": "input_forget", "GRU": "linear_before_reset"}.get(kind)
    cases = []
    for clip, without in product((0.05, 0.4), ((), ("B", "P"))):
        for flags in ({}, {flag: 1}) if flag else ({},):
            graph = layer(kind, "bidirectional", without=without, clip=clip, **flags)
            cases.append((graph, case(kind, "bidirectional")))
    assert_equivalent(cases)


def test_an_rnn_clips_to_nothing_and_ignores_a_negative_clip() -> None:
    assert_equivalent((layer("RNN", clip=clip), arrays("RNN", 1)) for clip in (0.0, -1.0))


@pytest.mark.parametrize(
    ("kind", "flag"), [("LSTM", "input_forget"), ("GRU", "linear_before_reset")]
)
def test_flags(kind: str, flag: str) -> None:
    cases = []
    for direction, without in product(("forward", "bidirectional"), ((), ("B", "P"))):
        graph = layer(kind, direction, without=without, **{flag: 1})
        values = case(kind, direction)
        plain = layer(kind, direction, without=without)
        assert np.abs(run(graph, values)[0] - run(plain, values)[0]).max() > 1e-3
        cases.append((graph, values))
    assert_equivalent(cases)


@pytest.mark.parametrize("kind", KINDS)
def test_constant_lengths(kind: str) -> None:
    cases = []
    for direction, lengths in product(DIRECTIONS, ([5, 3, 1], [0, 5, 2])):
        values = case(kind, direction)
        # What lies beyond a sequence must not matter.
        for row, length in enumerate(lengths):
            values["X"][length:, row] = 1e30
        cases.append((layer(kind, direction, without=(), lengths=lengths), values))
    assert_equivalent(cases)


@pytest.mark.parametrize("kind", KINDS)
def test_lengths_at_run_time(kind: str) -> None:
    for direction in ("reverse", "bidirectional"):
        values = case(kind, direction)
        graph = layer(
            kind, direction, without=(), computed=("X", "sequence_lens"), lengths=[1, 1, 1]
        )
        ours = compiled(graph)
        for lengths in ([5, 5, 5], [5, 3, 1], [2, 4, 3], [0, 5, 2], [0, 0, 0]):
            feeds = {**values, "sequence_lens": np.array(lengths, np.int32)}
            assert_close(ours(feeds), run(graph, feeds))


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
        assert_close(compiled(graph)(turned), expected)


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
        found = compiled(graph)(values)
        assert {array.dtype.name for array in found} == {dtype}
        assert_close(found, expected, tolerance)


@pytest.mark.parametrize("vectors", [(4, 16), (4, 32), (8, 16), (16, 32)])
def test_any_vectors(vectors: tuple[int, int]) -> None:
    """Tiles that divide neither the hidden size nor the batch evenly, and those that do."""
    cases = []
    for kind, (batch, hidden) in product(KINDS, ((1, 32), (1, 45), (2, 1), (7, 16), (9, 37))):
        values = arrays(kind, 1, batch=batch, hidden=hidden)
        values["R"] *= 0.3
        cases.append((layer(kind, "reverse", values=values), values))
    assert_equivalent(cases, Vectors(*vectors))


@pytest.mark.parametrize(
    ("directions", "batch", "hidden"), [(1, 1, 432), (2, 1, 64), (1, 40, 64), (2, 19, 33)]
)
def test_threads_share_a_step_or_the_sequences(directions: int, batch: int, hidden: int) -> None:
    direction = "bidirectional" if directions == 2 else "forward"
    for kind in ("LSTM", "GRU"):
        values = arrays(kind, directions, batch=batch, hidden=hidden, steps=20)
        values["R"] *= 0.1
        graph = layer(kind, direction, values=values)
        assert "T.parallel" in lowered(graph, Rules(VECTORS)).module.script()
        assert_equivalent([(graph, values)])


@settings(max_examples=6, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_layer(data: st.DataObject) -> None:
    draw = data.draw
    vectors = Vectors(*draw(st.sampled_from([(4, 16), (4, 32), (8, 16), (16, 32)])))
    cases = [_any_layer(draw) for _ in range(3)]
    assert_equivalent(cases, vectors)


def _any_layer(draw: Callable[[st.SearchStrategy[Any]], Any]) -> Case:
    kind, direction = draw(st.sampled_from(KINDS)), draw(st.sampled_from(DIRECTIONS))
    directions = 2 if direction == "bidirectional" else 1
    steps, batch = draw(st.integers(1, 4)), draw(st.integers(1, 8))
    opset = 14
    seed, hidden = draw(st.integers(0, 99)), draw(st.integers(1, 40))
    values = arrays(kind, directions, steps, batch, seed=seed, hidden=hidden)
    values["R"] *= 0.4
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
    return graph, values


def test_a_layer_of_another_domain_is_another_operation() -> None:
    x, y = Tensor("x", (2,), "float32"), Tensor("y", (2,), "float32")
    op = Op("own", "LSTM", (x,), (y,), domain="com.example")
    refusal = refusal_of(Graph("plain", (op,), (x,), (y,), {}, {"": 17, "com.example": 1}))
    assert refusal is not None
    assert "ONNX's own domain" in refusal


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
        (layer("RNN", values=arrays("RNN", 1, steps=0)), "empty"),
        (layer("RNN", values=arrays("RNN", 1, dtype="int32")), "int32"),
        (layer("GRU", values={**arrays("GRU", 1), "B": np.zeros((1, HIDDEN), np.float32)}), "B"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_refused_is_named(graph: Graph, message: str) -> None:
    refusal = refusal_of(graph)
    assert refusal is not None
    assert "net/layer" in refusal
    assert message in refusal
    with pytest.raises(CompileError):
        compiled(graph)


@pytest.mark.parametrize("kind", KINDS)
def test_one_function_whatever_the_steps(kind: str) -> None:
    def functions(steps: int) -> list[str]:
        graph = layer(kind, "bidirectional", values=arrays(kind, 2, steps=steps))
        return sorted(v.name_hint for v in lowered(graph, Rules(VECTORS)).module.functions)

    assert functions(STEPS) == functions(50 * STEPS)
    assert kind.lower() in functions(STEPS)


def test_weights_are_packed_when_they_are_compiled() -> None:
    graph = layer("LSTM", "bidirectional")
    made = {variable.name_hint for variable in lowered(graph, Rules(VECTORS)).module.functions}
    assert made == {"main", "reshape", "matmul", "add", "lstm"}
