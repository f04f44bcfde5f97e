"""Reading ONNX models: real ones, generated ones of every opset, and bad ones."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.backend.test.case.node import collect_testcases

from hetsched import oracle
from hetsched.dtype import numpy_dtype, tolerance
from hetsched.errors import ModelError
from hetsched.frontend.reader import read_onnx
from hetsched.graph import Graph, to_onnx
from hetsched.op import Tensor

DATA = Path(__file__).parent / "data"
LIGHT = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
FLOAT, INT64, BOOL, STRING = (
    TensorProto.FLOAT,
    TensorProto.INT64,
    TensorProto.BOOL,
    TensorProto.STRING,
)
REAL: dict[str, dict[str, tuple[int, ...]]] = {
    "attacut_sc": {"input": (1, 2, 200)},
    "basic_pitch": {"serving_default_input_2:0": (1, 43844, 1)},
    "digits_branch": {},
    "digits_cnn": {},
    "digits_lstm": {},
    "dnsmos_p808_v8": {"input_1": (1, 900, 120)},
    "ppocrv2_cls": {"x": (1, 3, 48, 192)},
    "silero_vad_16k_op15": {"input": (1, 576), "state": (2, 1, 128)},
}
SMALL_LIGHT = ("light_inception_v1", "light_shufflenet", "light_squeezenet")

Value = tuple[str, int, Sequence[int | str | None] | None]
X: Value = ("x", FLOAT, [2, 3])
Y: Value = ("y", FLOAT, None)
node = helper.make_node


def model_of(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[Value] = (X,),
    outputs: Sequence[Value] = (Y,),
    weights: Mapping[str, Any] | None = None,
    opset: int = 17,
    domains: Sequence[str] = (),
    functions: Sequence[onnx.FunctionProto] = (),
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "made",
        [helper.make_tensor_value_info(*value) for value in inputs],
        [helper.make_tensor_value_info(*value) for value in outputs],
        initializer=[
            numpy_helper.from_array(np.asarray(array), name)
            for name, array in (weights or {}).items()
        ],
    )
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in domains)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8, functions=functions)


def kinds(graph: Graph) -> list[str]:
    return [op.kind for op in graph.ops]


def random_inputs(tensors: Sequence[Tensor], seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    arrays: dict[str, np.ndarray] = {}
    for tensor in tensors:
        dtype = numpy_dtype(tensor.dtype)
        if tensor.dtype == "string":
            arrays[tensor.name] = np.full(tensor.shape, "a", object)
        elif dtype.kind in "iub":
            arrays[tensor.name] = rng.integers(0, 2 if dtype.kind == "b" else 70, tensor.shape)
            arrays[tensor.name] = np.asarray(arrays[tensor.name], dtype)
        else:
            arrays[tensor.name] = np.asarray(rng.standard_normal(tensor.shape), dtype)
    if "sr" in arrays:
        arrays["sr"] = np.array(16000, np.int64)
    return arrays


def assert_shapes_are_true(graph: Graph, inputs: Mapping[str, np.ndarray]) -> None:
    """Runs the graph with every tensor in it as an output, and compares shapes and types."""
    model = to_onnx(graph)
    outputs = {value.name for value in model.graph.output}
    model.graph.output.extend(v for v in model.graph.value_info if v.name not in outputs)
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    del model.graph.value_info[:]
    options = oracle.session_options(threads=1)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = oracle.open_session(model, options)
    names = [value.name for value in session.get_outputs()]
    feeds = {name: oracle.to_ort(array) for name, array in inputs.items()}
    results = session.run_with_ort_values(names, feeds)
    found = {n: oracle.from_ort(value) for n, value in zip(names, results, strict=True)}
    for op in graph.ops:
        for tensor in op.writes:
            array = found[tensor.name]
            assert (tensor.shape, numpy_dtype(tensor.dtype)) == (array.shape, array.dtype), tensor


def assert_same(
    model: onnx.ModelProto, graph: Graph, inputs: Mapping[str, np.ndarray] | None = None
) -> None:
    """The graph has the names of the model, and its results."""
    given = dict(inputs or random_inputs(graph.inputs))
    expected = oracle.run(model, given)
    found = oracle.run(to_onnx(graph), given)
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        if array.dtype.kind in "fV":
            peak = np.abs(array.astype(np.float64)).max(initial=0)
            limit = tolerance(array.dtype.name).relative * peak
            np.testing.assert_allclose(
                found[name].astype(np.float64), array.astype(np.float64), rtol=0, atol=limit
            )
        else:
            np.testing.assert_array_equal(found[name], array)


def refusal(source: Any, shapes: Mapping[str, Sequence[int]] | None = None) -> str:
    with pytest.raises(ModelError) as caught:
        read_onnx(source, shapes)
    text = str(caught.value)
    assert "\n" not in text
    return text


def check(model: onnx.ModelProto, shapes: Mapping[str, Sequence[int]] | None = None) -> Graph:
    graph = read_onnx(model, shapes)
    inputs = random_inputs(graph.inputs)
    assert_same(model, graph, inputs)
    if not any(tensor.dtype == "string" for tensor in graph.inputs):
        assert_shapes_are_true(graph, inputs)
    return graph


# Real models


@pytest.mark.parametrize("name", REAL)
def test_real_model(name: str) -> None:
    file = DATA / f"{name}.onnx"
    graph = read_onnx(file, REAL[name])
    for tensor in graph.inputs:
        assert tensor.shape == REAL[name].get(tensor.name, tensor.shape)
    inputs = random_inputs(graph.inputs)
    assert_same(onnx.load(file), graph, inputs)
    assert_shapes_are_true(graph, inputs)


@pytest.mark.parametrize("name", SMALL_LIGHT)
def test_light_model(name: str) -> None:
    check(onnx.load(LIGHT / f"{name}.onnx"))


@pytest.mark.parametrize("name", sorted(path.stem for path in LIGHT.glob("*.onnx")))
def test_light_model_imports(name: str) -> None:
    assert read_onnx(LIGHT / f"{name}.onnx").ops


def test_digits_are_still_recognised() -> None:
    digits = np.load(DATA / "digits_test.npz")
    session = oracle.session(to_onnx(read_onnx(DATA / "digits_cnn.onnx")))
    images = digits["x"].astype(np.float32)[:, None] / 16
    found = [int(np.argmax(session.run(None, {"image": image})[0])) for image in images]
    assert np.mean(found == digits["y"]) == pytest.approx(0.987, abs=0.001)


def test_recurrent_operations_stay_whole() -> None:
    assert "LSTM" in kinds(read_onnx(DATA / "digits_lstm.onnx"))
    graph = read_onnx(DATA / "silero_vad_16k_op15.onnx", REAL["silero_vad_16k_op15"])
    assert "LSTM" in kinds(graph)
    assert "If" not in kinds(graph)


@pytest.mark.parametrize("given", [str, Path, lambda file: Path(file).read_bytes(), onnx.load])
def test_model_is_given_as(given: Any) -> None:
    file = str(DATA / "digits_cnn.onnx")
    assert read_onnx(given(file)).digest == read_onnx(file).digest


def test_model_given_as_protobuf_is_not_changed() -> None:
    model = onnx.load(DATA / "silero_vad_16k_op15.onnx")
    before = model.SerializeToString(deterministic=True)
    read_onnx(model, REAL["silero_vad_16k_op15"])
    assert model.SerializeToString(deterministic=True) == before


def test_progress_is_told() -> None:
    said: list[str] = []
    read_onnx(DATA / "digits_cnn.onnx", progress=said.append)
    assert said[0] == "reading the file"
    assert said[-1] == "simplifying"


# Every opset


@pytest.mark.parametrize("opset", range(7, onnx.defs.onnx_opset_version() + 1))
def test_opset(opset: int) -> None:
    inputs: list[Value] = [("x", FLOAT, ["N", 3, 8, 8])]
    nodes = [
        node("Conv", ["x", "w", "b"], ["c"], pads=[1, 1, 1, 1]),
        node("BatchNormalization", ["c", "s", "b", "m", "v"], ["n"]),
        node("Relu", ["n"], ["r"]),
        node("MaxPool", ["r"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
        node("Shape", ["p"], ["shape"]),
        node("Gather", ["shape", "zero"], ["batch"], axis=0),
        node("Concat", ["batch", "rest"], ["target"], axis=0),
        node("Reshape", ["p", "target"], ["f"]),
        node("Dropout", ["f"], ["d"]),
        node("Gemm", ["d", "g", "h"], ["y"]),
    ]
    rng = np.random.default_rng(0)
    weights = {
        "w": rng.standard_normal((4, 3, 3, 3), np.float32),
        **{name: rng.random(4, np.float32) + 1 for name in "sbmv"},
        "zero": np.array([0]),
        "rest": np.array([-1]),
        "g": rng.standard_normal((64, 5), np.float32),
        "h": rng.standard_normal(5, np.float32),
    }
    model = model_of(nodes, inputs, [Y], weights, opset)
    graph = read_onnx(model, {"x": (2, 3, 8, 8)})
    assert kinds(graph) == ["Conv", "Relu", "MaxPool", "Reshape", "Gemm"]
    assert graph.outputs[0].shape == (2, 5)
    if opset <= 27:
        assert_same(model, graph)
    assert_shapes_are_true(graph, random_inputs(graph.inputs))


@pytest.mark.parametrize(("opset", "word"), [(6, "older"), (1, "older"), (99, "newer")])
def test_opset_out_of_range(opset: int, word: str) -> None:
    text = refusal(model_of([node("Relu", ["x"], ["y"])], opset=opset))
    assert f"opset {opset}; supported are 7 to {onnx.defs.onnx_opset_version()}" in text
    assert word in text


def test_ir_version_out_of_range() -> None:
    model = model_of([node("Relu", ["x"], ["y"])])
    model.ir_version = 2
    assert "IR version 2; supported are 3 to" in refusal(model)


# Shapes of the inputs


def add(x: Sequence[Any] | None, z: Sequence[Any] | None) -> onnx.ModelProto:
    return model_of([node("Add", ["x", "z"], ["y"])], [("x", FLOAT, x), ("z", FLOAT, z)])


def test_symbol_binds_in_all_inputs() -> None:
    graph = check(add(["N", 3], ["N", 1]), {"x": (5, 3)})
    assert [tensor.shape for tensor in graph.inputs] == [(5, 3), (5, 1)]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 4), st.sampled_from(["a", "b", None, 0, -1])), max_size=4))
def test_any_dimensions_bind(dims: list[tuple[int, Any]]) -> None:
    sizes = {"a": 2, "b": 3}
    shape = tuple(sizes.get(symbol, size) for size, symbol in dims)
    graph = read_onnx(add([symbol for _, symbol in dims], list(shape)), {"x": shape})
    assert {tensor.shape for tensor in (*graph.inputs, *graph.outputs)} == {shape}


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"q": (1,)}, "no input is named 'q'; there are 'x', 'z'"),
        ({"x": (1, 2, 3)}, "of rank 2, but [1, 2, 3] has rank 3"),
        ({"x": (1, 4)}, "the input 'x' is [N, 3], which [1, 4] is not"),
        ({"x": (1, 3), "z": (2, 3)}, "the dimension 'N' is 1 in one place, but 2"),
        ({"x": (-1, 3)}, "needs sizes of 0 or more, not -1"),
        ({}, "'x' [N, 3], 'z' [N, ?]; give it, such as --shape x=1,3 --shape z=1,128"),
        ({"x": (4, 3)}, "the input is not of static shape: 'z' [4, ?]"),
    ],
)
def test_shapes_that_do_not_bind(shapes: dict[str, tuple[int, ...]], words: str) -> None:
    assert words in refusal(add(["N", 3], ["N", None]), shapes)


def test_suggested_flags_would_do() -> None:
    text = refusal(DATA / "silero_vad_16k_op15.onnx")
    assert text.endswith("--shape input=1,128 --shape state=2,1,128")


def test_unknown_rank_and_scalar_and_empty() -> None:
    assert check(add(None, []), {"x": (2, 2)}).outputs[0].shape == (2, 2)
    assert check(add([], []), {"x": ()}).outputs[0].shape == ()
    assert check(add([0, 3], [3]), {"x": (0, 3)}).outputs[0].shape == (0, 3)


def test_initializer_listed_as_input_is_a_weight() -> None:
    model = model_of([node("Add", ["x", "w"], ["y"])], [X, ("w", FLOAT, [3])], weights={})
    model.graph.initializer.append(numpy_helper.from_array(np.ones(3, np.float32), "w"))
    model.ir_version = 3
    graph = read_onnx(model)
    assert [tensor.name for tensor in graph.inputs] == ["x"]


def test_declared_shapes_are_not_believed() -> None:
    graph = read_onnx(model_of([node("Relu", ["x"], ["y"])], outputs=[("y", FLOAT, [7, 7, 7])]))
    assert graph.outputs[0].shape == (2, 3)


# Weights


def test_large_weights_in_the_file(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weights: dict[str, np.ndarray] = {
        "a": rng.standard_normal((200, 100), np.float32),
        "b": rng.standard_normal(100).astype(np.float16),
        "c": rng.integers(-9, 9, (300, 100)),
    }
    outputs: list[Value] = [("y", FLOAT, None)]
    nodes = [node("Relu", ["x"], ["y"])]
    for name, array in weights.items():
        outputs.append((name, helper.np_dtype_to_tensor_dtype(array.dtype), None))
    model = model_of(nodes, outputs=outputs, weights=weights)
    whole = model.SerializeToString()
    file = tmp_path / "m.onnx"
    file.write_bytes(whole)
    for graph in (read_onnx(file), read_onnx(whole)):
        for name, array in weights.items():
            np.testing.assert_array_equal(graph.constants[name], array)
    # Wherever the file ends, it is refused.
    for nbytes in (100, 70_000, 90_000, len(whole) - 1):
        file.write_bytes(whole[:nbytes])
        assert "not an ONNX model" in refusal(file)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("value", numpy_helper.from_array(np.ones((2, 3), np.float32)), np.ones((2, 3))),
        ("value_float", 2.5, np.array(2.5)),
        ("value_floats", [1.0, 2.0, 3.0], np.array([1.0, 2.0, 3.0])),
    ],
)
def test_constant_node(name: str, value: Any, expected: np.ndarray) -> None:
    graph = check(
        model_of([node("Constant", [], ["c"], **{name: value}), node("Add", ["x", "c"], ["y"])])
    )
    np.testing.assert_array_equal(graph.constants["c"], expected.astype(np.float32))


@pytest.mark.parametrize(("name", "value"), [("value_int", 4), ("value_ints", [1, 2, 3])])
def test_constant_node_of_integers(name: str, value: Any) -> None:
    nodes = [node("Constant", [], ["c"], **{name: value}), node("Add", ["x", "c"], ["y"])]
    graph = check(model_of(nodes, [("x", INT64, [3])], [("y", INT64, None)]))
    assert graph.constants["c"].tolist() == value


@pytest.mark.parametrize(("name", "value"), [("value_string", "a"), ("value_strings", ["a", "b"])])
def test_constant_node_of_strings(name: str, value: Any) -> None:
    nodes = [node("Constant", [], ["c"], **{name: value}), node("Equal", ["x", "c"], ["y"])]
    graph = check(model_of(nodes, [("x", STRING, [2])], [("y", BOOL, None)], opset=19))
    assert graph.constants["c"].tolist() == value
    assert graph.inputs[0].dtype == "string"


def test_sparse_weights_are_refused_by_name() -> None:
    values = numpy_helper.from_array(np.ones(1, np.float32), "sparse_w")
    sparse = helper.make_sparse_tensor(values, numpy_helper.from_array(np.array([0])), [3])
    nodes = [
        node("Constant", [], ["c"], name="k", sparse_value=sparse),
        node("Add", ["x", "c"], ["y"]),
    ]
    assert "Constant 'k' is sparse" in refusal(model_of(nodes))
    model = model_of(nodes[1:])
    model.graph.sparse_initializer.append(sparse)
    assert "'sparse_w' is sparse" in refusal(model)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_short_floats(dtype: str) -> None:
    code = getattr(TensorProto, dtype.upper())
    nodes = [node("Cast", ["w"], ["v"], to=code), node("Mul", ["x", "v"], ["y"])]
    weights = {"w": np.array([1.5, 2.5, 3.5], np.float32)}
    graph = read_onnx(model_of(nodes, [("x", code, [2, 3])], [("y", code, None)], weights))
    assert kinds(graph) == ["Mul"]
    assert graph.constants["v"].dtype.name == dtype
    np.testing.assert_array_equal(graph.constants["v"].astype(np.float32), weights["w"])


def external(folder: Path, **changes: str) -> Path:
    """A model whose one weight is in `weights.bin`, 8 bytes into it."""
    (folder / "inner").mkdir()
    (folder / "outside.bin").write_bytes(bytes(1000))
    np.arange(-2, 6, dtype=np.float32).tofile(folder / "inner" / "weights.bin")
    model = model_of([node("Add", ["x", "w"], ["y"])], weights={"w": np.zeros((2, 3), np.float32)})
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    entries = {"location": "weights.bin", "offset": "8", "length": "24", **changes}
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    file = folder / "inner" / "m.onnx"
    file.write_bytes(model.SerializeToString())
    return file


def test_external_data(tmp_path: Path) -> None:
    graph = read_onnx(external(tmp_path))
    assert graph.constants["w"].ravel().tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"location": "gone.bin"}, "'gone.bin', which is not there"),
        ({"location": "../outside.bin"}, "outside the folder of the model"),
        ({"location": "/etc/passwd"}, "outside the folder of the model"),
        ({"location": ""}, "outside the folder of the model"),
        ({"location": "."}, "outside the folder of the model"),
        ({"offset": "16"}, "ends at byte 40 of 'weights.bin', which has only 32"),
        ({"offset": "-4"}, "takes 24 bytes, not 24 at -4"),
        ({"offset": "x"}, "cannot be read"),
        ({"length": "20"}, "takes 24 bytes, not 20"),
    ],
)
def test_bad_external_data(tmp_path: Path, changes: dict[str, str], words: str) -> None:
    text = refusal(external(tmp_path, **changes))
    assert words in text
    assert "the weight 'w'" in text
    assert text.startswith(str(tmp_path / "inner" / "m.onnx"))


def test_external_data_through_a_link_out_of_the_folder(tmp_path: Path) -> None:
    file = external(tmp_path, location="link.bin")
    (file.parent / "link.bin").symlink_to(tmp_path / "outside.bin")
    assert "outside the folder of the model" in refusal(file)


def test_external_data_need_a_folder(tmp_path: Path) -> None:
    content = external(tmp_path).read_bytes()
    assert "give the model by its path" in refusal(content)


# Names and order


def test_names_are_unique_and_readable() -> None:
    nodes = [
        node("Relu", ["x"], ["a"], name="r"),
        node("Relu", ["a"], ["b"], name="r"),
        node("Relu", ["b"], ["y"]),
    ]
    assert [op.name for op in read_onnx(model_of(nodes)).ops] == ["r", "r_2", "Relu_2"]


def test_nodes_out_of_order_are_sorted() -> None:
    nodes = [node("Exp", ["b"], ["y"]), node("Relu", ["a"], ["b"]), node("Neg", ["x"], ["a"])]
    assert kinds(check_sorted(nodes)) == ["Neg", "Relu", "Exp"]


def check_sorted(nodes: Sequence[onnx.NodeProto]) -> Graph:
    graph = read_onnx(model_of(nodes))
    assert_same(model_of(nodes[::-1]), graph)
    return graph


def test_unused_nodes_and_weights_go_and_inputs_stay() -> None:
    nodes = [node("Relu", ["x"], ["y"]), node("Add", ["x", "w"], ["unused"])]
    graph = check(model_of(nodes, [X, ("z", FLOAT, [1])], weights={"w": np.ones(3, np.float32)}))
    assert (kinds(graph), dict(graph.constants)) == (["Relu"], {})
    assert [tensor.name for tensor in graph.inputs] == ["x", "z"]


def test_outputs_that_are_inputs_or_weights() -> None:
    outputs: list[Value] = [Y, X, ("w", FLOAT, [3]), Y]
    model = model_of([node("Relu", ["x"], ["y"])], [X], outputs, {"w": np.ones(3, np.float32)})
    graph = read_onnx(model)
    assert [tensor.name for tensor in graph.outputs] == ["y", "x", "w"]


def test_optional_inputs_and_outputs() -> None:
    rng = np.random.default_rng(0)
    weights = {
        "w": rng.standard_normal((1, 16, 3), np.float32),
        "r": rng.standard_normal((1, 16, 4), np.float32),
        "h": rng.standard_normal((1, 2, 4), np.float32),
    }
    nodes = [node("LSTM", ["x", "w", "r", "", "", "h"], ["", "y"], hidden_size=4)]
    graph = check(model_of(nodes, [("x", FLOAT, ["T", 2, 3])], weights=weights), {"x": (5, 2, 3)})
    op = graph.ops[0]
    assert [tensor is None for tensor in op.inputs] == [False, False, False, True, True, False]
    assert [tensor is None for tensor in op.outputs] == [True, False]


# Functions


def twice(opset: int = 17, inner: str = "Add") -> onnx.FunctionProto:
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("local", 1)]
    domain = "local" if inner == "Twice" else ""
    inputs = ["a"] if inner == "Twice" else ["a", "a"]
    body = [node(inner, inputs, ["t"], domain=domain), node("Identity", ["t"], ["b"])]
    return helper.make_function("local", "Twice", ["a"], ["b"], body, opsets)


@pytest.mark.parametrize("opset", [16, 17])
def test_functions_are_inlined(opset: int) -> None:
    nodes = [node("Twice", [a], [b], domain="local") for a, b in (("x", "t"), ("t", "y"))]
    weights = {"b": np.ones(3, np.float32)}
    nodes.append(node("Add", ["y", "b"], ["z"]))
    model = model_of(nodes, [X], [("z", FLOAT, None)], weights, 17, ["local"], [twice(opset)])
    graph = read_onnx(model)
    assert kinds(graph) == ["Add", "Add", "Add"]
    x = np.ones((2, 3), np.float32)
    np.testing.assert_array_equal(oracle.run(to_onnx(graph), {"x": x})["z"], 4 * x + 1)


def test_function_that_calls_itself() -> None:
    nodes = [node("Twice", ["x"], ["y"], domain="local")]
    model = model_of(nodes, domains=["local"], functions=[twice(inner="Twice")])
    assert "the function Twice calls itself" in refusal(model)


# Control flow


def branch(nodes: Sequence[onnx.NodeProto], output: str, **weights: Any) -> onnx.GraphProto:
    return helper.make_graph(
        nodes,
        "branch",
        [],
        [helper.make_tensor_value_info(output, FLOAT, None)],
        [numpy_helper.from_array(np.asarray(v, np.float32), k) for k, v in weights.items()],
    )


def choose(condition: str, output: str, yes: onnx.GraphProto, no: onnx.GraphProto) -> Any:
    return node("If", [condition], [output], name=output, then_branch=yes, else_branch=no)


@st.composite
def nested_ifs(draw: st.DrawFn, depth: int = 0) -> onnx.GraphProto:
    """A branch that reads from outside, names its tensors as its brothers do, and may nest."""
    factor = draw(st.integers(1, 9))
    nodes = [node("Mul", ["x", "w"], ["t"])]
    last = "t"
    if depth < 2 and draw(st.booleans()):
        condition = draw(st.sampled_from(["yes", "no"]))
        yes, no = draw(nested_ifs(depth + 1)), draw(nested_ifs(depth + 1))
        nodes.append(choose(condition, "u", yes, no))
        nodes.append(node("Add", ["t", "u"], ["v"]))
        last = "v"
    nodes.append(node("Add", [last, "outer"], ["sum"]))
    # An output may also be a weight of the branch.
    output = draw(st.sampled_from(["sum", "sum", last, "w"]))
    return branch(nodes, output, w=np.full((2, 3), factor))


@settings(max_examples=40, deadline=None)
@given(nested_ifs(), nested_ifs(), st.sampled_from(["yes", "no"]))
def test_constant_ifs_are_inlined(
    yes: onnx.GraphProto, no: onnx.GraphProto, condition: str
) -> None:
    weights = {"yes": np.array(True), "no": np.array(False), "two": np.float32(2).reshape(())}
    nodes = [
        node("Mul", ["x", "two"], ["outer"]),
        choose(condition, "a", yes, no),
        node("Add", ["a", "outer"], ["y"]),
    ]
    graph = read_onnx(model_of(nodes, weights=weights))
    assert "If" not in kinds(graph)
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    taken = yes if condition == "yes" else no
    expected = evaluate(taken, {"x": x, "outer": 2 * x}) + 2 * x
    np.testing.assert_array_equal(oracle.run(to_onnx(graph), {"x": x})["y"], expected)


def evaluate(graph: onnx.GraphProto, outer: Mapping[str, np.ndarray]) -> np.ndarray:
    """The one output of a branch of `nested_ifs`, by its definition."""
    values = {**outer, "w": numpy_helper.to_array(graph.initializer[0])}
    for item in graph.node:
        if item.op_type == "If":
            attributes = {attribute.name: attribute.g for attribute in item.attribute}
            taken = "then_branch" if item.input[0] == "yes" else "else_branch"
            inner = {name: values[name] for name in ("x", "outer")}
            values[item.output[0]] = evaluate(attributes[taken], inner)
        else:
            a, b = (values[name] for name in item.input)
            values[item.output[0]] = a * b if item.op_type == "Mul" else a + b
    result: np.ndarray = values[graph.output[0].name]
    return result


def test_condition_that_folds() -> None:
    nodes = [
        node("Shape", ["x"], ["s"]),
        node("Size", ["s"], ["rank"]),
        node("Equal", ["rank", "two"], ["c"]),
        choose(
            "c",
            "y",
            branch([node("Neg", ["x"], ["t"])], "t"),
            branch([node("Exp", ["x"], ["t"])], "t"),
        ),
    ]
    assert kinds(check(model_of(nodes, weights={"two": np.array(2)}))) == ["Neg"]


def test_open_if_with_constant_branches_stays() -> None:
    yes, no = (branch([node("Neg", ["w"], ["t"])], "t"), branch([node("Exp", ["w"], ["t"])], "t"))
    nodes = [choose("c", "a", yes, no), node("Add", ["x", "a"], ["y"])]
    weights = {"w": np.arange(6, dtype=np.float32).reshape(2, 3)}
    model = model_of(nodes, [X, ("c", BOOL, [])], weights=weights)
    graph = read_onnx(model)
    assert kinds(graph) == ["If", "Add"]
    part = graph.part(graph.ops[:1], "alone")
    assert [tensor.name for tensor in part.inputs] == ["c"]
    for condition in (True, False):
        inputs = {"x": np.ones((2, 3), np.float32), "c": np.array(condition)}
        assert_same(model, graph, inputs)
        oracle.run(to_onnx(part), {"c": np.array(condition)})


def test_open_if_that_reads_from_outside_is_refused() -> None:
    yes, no = (branch([node(kind, ["x"], ["t"])], "t") for kind in ("Neg", "Exp"))
    nodes = [choose("c", "a", yes, no), node("Relu", ["a"], ["y"])]
    text = refusal(model_of(nodes, [X, ("c", BOOL, [])]))
    assert "If 'a'" in text
    assert "reads 'x' from outside" in text


def looping(step: Sequence[onnx.NodeProto]) -> onnx.ModelProto:
    """Repeats `step`, from `state` to `next`, as often as the input `n` says."""
    body = helper.make_graph(
        [node("Identity", ["c"], ["again"]), *step],
        "body",
        [
            helper.make_tensor_value_info("i", INT64, []),
            helper.make_tensor_value_info("c", BOOL, []),
            helper.make_tensor_value_info("state", FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("again", BOOL, []),
            helper.make_tensor_value_info("next", FLOAT, None),
        ],
    )
    nodes = [node("Loop", ["n", "", "x"], ["y"], name="l", body=body)]
    return model_of(nodes, [X, ("n", INT64, [])], weights={"w": np.ones(3, np.float32)})


def test_loop_that_keeps_the_shape_of_its_state_stays() -> None:
    graph = check(looping([node("Add", ["state", "w"], ["next"])]))
    assert kinds(graph) == ["Loop"]
    assert graph.outputs[0].shape == (2, 3)


def test_loop_that_grows_is_refused() -> None:
    text = refusal(looping([node("Concat", ["state", "state"], ["next"], axis=0)]))
    assert "Loop 'l'" in text


def test_scan_stays() -> None:
    body = helper.make_graph(
        [node("Add", ["s", "e"], ["n"]), node("Mul", ["n", "w"], ["o"])],
        "body",
        [helper.make_tensor_value_info(name, FLOAT, [3]) for name in "se"],
        [helper.make_tensor_value_info(name, FLOAT, [3]) for name in "no"],
    )
    weights = {"zero": np.zeros(3, np.float32), "w": np.full(3, 2, np.float32)}
    nodes = [node("Scan", ["zero", "x"], ["last", "y"], body=body, num_scan_inputs=1)]
    graph = check(model_of(nodes, weights=weights))
    assert kinds(graph) == ["Scan"]
    assert graph.outputs[0].shape == (2, 3)


# Folding


def test_random_and_quantizing_operations_stay() -> None:
    nodes = [
        node("RandomNormal", [], ["r"], shape=[2, 3]),
        node("QuantizeLinear", ["w", "s", "z"], ["q"]),
        node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        node("Sum", ["x", "r", "d"], ["y"]),
    ]
    weights = {"w": np.ones(3, np.float32), "s": np.float32(0.1), "z": np.int8(0)}
    stay = ["RandomNormal", "QuantizeLinear", "DequantizeLinear", "Sum"]
    assert kinds(read_onnx(model_of(nodes, weights=weights))) == stay


@pytest.mark.parametrize(("rows", "stays"), [(1000, False), (10_000, True)])
def test_large_results_stay(rows: int, stays: bool) -> None:
    nodes = [node("ConstantOfShape", ["s"], ["c"]), node("MatMul", ["x", "c"], ["y"])]
    weights = {"s": np.array([rows, 1000])}
    graph = read_onnx(model_of(nodes, [("x", FLOAT, [1, rows])], weights=weights))
    assert ("ConstantOfShape" in kinds(graph)) == stays


def test_what_cannot_be_computed_stays_and_the_rest_folds() -> None:
    nodes = [
        node("Neg", ["w"], ["a"]),
        node("Gather", ["a", "far"], ["b"]),
        node("Exp", ["w"], ["c"]),
        node("Sum", ["x", "b", "c"], ["y"]),
    ]
    weights = {"w": np.ones(3, np.float32), "far": np.array([99])}
    graph = read_onnx(model_of(nodes, weights=weights))
    assert kinds(graph) == ["Gather", "Sum"]
    assert {"a", "c"} <= set(graph.constants)


@pytest.mark.parametrize(("a", "b"), [(-(2**63), -1), (1, 0)])
@pytest.mark.parametrize("kind", ["Div", "Mod"])
def test_division_that_traps_is_refused(kind: str, a: int, b: int) -> None:
    model = model_of(
        [node(kind, ["a", "b"], ["y"], name="d")],
        outputs=[("y", INT64, None)],
        weights={"a": np.array([a]), "b": np.array([b])},
    )
    assert f"{kind} 'd' divides integers by zero" in refusal(model)


@pytest.mark.parametrize(
    ("start", "end", "expected"), [(0, None, [2, 3, 4]), (-1, None, [4]), (1, 2, [3]), (5, 9, [])]
)
def test_shape_of_known_shape(start: int, end: int | None, expected: list[int]) -> None:
    limits = {"start": start} | ({} if end is None else {"end": end})
    model = model_of(
        [node("Shape", ["x"], ["y"], **limits)], [("x", FLOAT, [2, 3, 4])], [("y", INT64, None)]
    )
    graph = check(model)
    assert graph.constants["y"].tolist() == expected


def test_each_reader_dequantises_on_its_own() -> None:
    """Two nodes, one of which reads it twice: one copy, and the integers are shared."""
    nodes = [
        node("QuantizeLinear", ["x", "s"], ["q"]),
        node("DequantizeLinear", ["q", "s"], ["d"]),
        node("Add", ["d", "d"], ["a"]),
        node("Mul", ["a", "d"], ["y"]),
    ]
    graph = check(model_of(nodes, weights={"s": np.array(0.1, np.float32)}))
    kinds = [op.kind for op in graph.ops]
    assert sorted(kinds) == "Add DequantizeLinear DequantizeLinear Mul QuantizeLinear".split()
    made = {op.output().name: op for op in graph.ops if op.kind == "DequantizeLinear"}
    assert {op.input(0).name for op in made.values()} == {"q"}
    add, product = (next(op for op in graph.ops if op.kind == kind) for kind in ("Add", "Mul"))
    assert {add.input(0).name, add.input(1).name, product.input(1).name} == made.keys()


def test_contrib_operation_gets_its_shape_from_the_runtime() -> None:
    nodes = [
        node("BiasGelu", ["x", "b"], ["g"], domain="com.microsoft"),
        node("ReduceSum", ["g"], ["y"], keepdims=0),
    ]
    weights = {"b": np.ones(3, np.float32)}
    graph = check(model_of(nodes, weights=weights, domains=["com.microsoft"]))
    assert [op.output().shape for op in graph.ops] == [(2, 3), ()]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_shapes_of_the_cases_of_onnx() -> None:
    """Every operator, by the examples that ONNX defines it with."""
    count = 0
    for case in collect_testcases(None):
        if "expanded" in case.name:
            continue
        model = onnx.ModelProto()
        model.CopyFrom(case.model)
        inputs, outputs = case.data_sets[0]
        shapes = {}
        for index, (value, array) in enumerate(zip(list(model.graph.input), inputs, strict=False)):
            code = value.type.tensor_type.elem_type
            if index and code in (INT64, BOOL):
                # Mostly axes, sizes and the like, which real models have as constants.
                weight = np.asarray(array, helper.tensor_dtype_to_np_dtype(code))
                model.graph.initializer.append(numpy_helper.from_array(weight, value.name))
                model.graph.input.remove(value)
            elif isinstance(array, np.ndarray | np.generic):
                shapes[value.name] = array.shape
        try:
            graph = read_onnx(model, shapes)
        except ModelError:
            continue
        count += 1
        for tensor, array in zip(graph.outputs, outputs, strict=False):
            if isinstance(array, np.ndarray):
                assert tensor.shape == array.shape, case.name
    assert count > 900


# Simplification


@pytest.mark.parametrize("kind", ["Identity", "Dropout"])
def test_nothing_is_left_of_operations_that_do_nothing(kind: str) -> None:
    nodes = [
        node(kind, ["x"], ["a"]),
        node("Relu", ["a"], ["b"]),
        node(kind, ["b"], ["c"]),
        node(kind, ["c"], ["y"]),
    ]
    graph = check(model_of(nodes))
    assert kinds(graph) == ["Relu"]
    assert (graph.ops[0].input(0).name, graph.ops[0].output().name) == ("x", "y")


def test_identity_between_two_outputs_or_from_an_input_stays() -> None:
    nodes = [node("Relu", ["x"], ["y"])]
    nodes += [node("Identity", [a], [b]) for a, b in (("y", "z"), ("x", "v"))]
    outputs: list[Value] = [(name, FLOAT, None) for name in "yzv"]
    graph = check(model_of(nodes, outputs=outputs))
    assert [tensor.name for tensor in graph.outputs] == ["y", "z", "v"]
    assert kinds(graph) == ["Relu", "Identity", "Identity"]


def test_dropout_stays_where_its_mask_is_used_or_it_trains() -> None:
    masked = model_of([node("Dropout", ["x"], ["y", "mask"])], outputs=[Y, ("mask", BOOL, None)])
    assert kinds(check(masked)) == ["Dropout"]
    training = model_of([node("Dropout", ["x", "", "t"], ["y"])], weights={"t": np.array(True)})
    assert kinds(read_onnx(training)) == ["Dropout"]


def normalized(kind: str, group: int, bias: bool, after: Sequence[Any] = ()) -> onnx.ModelProto:
    rng = np.random.default_rng(1)
    shape = (6, 4 // group, 3, 3) if kind == "Conv" else (4, 6 // group, 3, 3)
    weights = {
        "w": rng.standard_normal(shape, np.float32),
        **{name: rng.random(6, np.float32) + np.float32(0.5) for name in ("k", "s", "b", "m", "v")},
    }
    nodes = [
        node(kind, ["x", "w", *(["k"] if bias else [])], ["c"], name="conv", group=group),
        node("BatchNormalization", ["c", "s", "b", "m", "v"], ["y"], epsilon=1e-3),
        *after,
    ]
    return model_of(nodes, [("x", FLOAT, [2, 4, 7, 7])], weights=weights)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("kind", ["Conv", "ConvTranspose"])
def test_batch_normalization_folds(kind: str, group: int, bias: bool) -> None:
    graph = check(normalized(kind, group, bias))
    assert kinds(graph) == [kind]
    assert graph.ops[0].name == "conv"
    assert set(graph.constants) == {"y_weight", "y_bias"}


def test_batch_normalization_stays() -> None:
    second = normalized("Conv", 1, True, [node("Relu", ["c"], ["z"])])
    second.graph.output.append(helper.make_tensor_value_info("z", FLOAT, None))
    assert kinds(check(second)) == ["Conv", "BatchNormalization", "Relu"]
    alone = normalized("Conv", 1, True)
    alone.graph.input.append(helper.make_tensor_value_info("s", FLOAT, [6]))
    kept = [tensor for tensor in alone.graph.initializer if tensor.name != "s"]
    del alone.graph.initializer[:]
    alone.graph.initializer.extend(kept)
    assert kinds(check(alone)) == ["Conv", "BatchNormalization"]


# Bad input


def test_files_that_are_no_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "m.onnx"
    assert refusal(file) == f"{file}: there is no such file"
    assert "this is a folder" in refusal(tmp_path)
    file.write_bytes(b"")
    assert "it is empty" in refusal(file)
    file.write_bytes(b"\x89PNG\r\n\x1a\n not a model")
    assert "not an ONNX model" in refusal(file)
    whole = (DATA / "digits_cnn.onnx").read_bytes()
    for part in (1, 7, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:part])
        refusal(file)

    def refuse(_: Path) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "stat", refuse)
    assert "no permission" in refusal(file)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_are_refused(content: bytes) -> None:
    refusal(content)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=5))
def test_damaged_model_is_read_or_refused(changes: list[tuple[int, int]]) -> None:
    content = bytearray((DATA / "digits_branch.onnx").read_bytes())
    for place, value in changes:
        content[place % len(content)] = value
    with suppress(ModelError):
        read_onnx(bytes(content))


@pytest.mark.parametrize(
    ("nodes", "words"),
    [
        ([node("Foo", ["x"], ["y"], name="f")], "Foo 'f': ONNX has no such operator"),
        (
            [node("Foo", ["x"], ["y"], name="f", domain="mine")],
            "Foo 'f' is of the unknown domain 'mine'",
        ),
        (
            [node("Foo", ["x"], ["y"], name="f", domain="com.microsoft")],
            "the domain 'com.microsoft' has no such operator",
        ),
        ([node("Relu", ["x"], ["y"], name="f", domain="other")], "does not import"),
        ([node("Add", ["x", "q"], ["y"], name="f")], "Add 'f' reads 'q', which nothing defines"),
        ([node("Relu", ["x"], ["z"], name="f")], "nothing defines the output 'y'"),
        (
            [node("Relu", ["x"], ["y"], name="a"), node("Relu", ["x"], ["y"], name="b")],
            "Relu 'b' defines 'y' a second time",
        ),
        (
            [
                node("Relu", ["b"], ["a"], name="one"),
                node("Relu", ["a"], ["b"], name="two"),
                node("Add", ["x", "b"], ["y"]),
            ],
            "the graph has a cycle through one -> two",
        ),
        ([node("Relu", ["x"], ["y"], name="f", alpha=1)], "Unrecognized attribute: alpha"),
        ([node("Relu", ["x", "x"], ["y"], name="f")], "has input size 2"),
        ([node("LeakyRelu", ["x"], ["y"], name="f", alpha="a")], "Mismatched attribute type"),
        ([node("MatMul", ["x", "x"], ["y"], name="f")], "MatMul 'f': Incompatible dimensions"),
        ([node("Reshape", ["x", "five"], ["y"], name="f")], "Reshape 'f': its inputs [2, 3]"),
        ([node("Add", ["x", "five"], ["y"], name="f")], "Add 'f': B has inconsistent type"),
        ([node("Conv", ["image", "w"], ["y"], name="f")], "Conv 'f': its inputs [1, 3, 8, 8]"),
        ([node("Conv", ["image", "w"], ["y"], name="f", group=0)], "group is 0"),
        ([node("NonZero", ["x"], ["y"], name="f")], "NonZero 'f': its output shape depends on"),
        (
            [node("Cast", ["x"], ["s"], to=INT64), node("Expand", ["x", "s"], ["y"], name="f")],
            "Expand",
        ),
        (
            [node("Size", ["x"], ["n"]), node("SplitToSequence", ["x"], ["y"], name="f")],
            "SplitToSequence 'f': it makes a sequence",
        ),
        ([node("Constant", [], ["y"], name="f")], "Constant 'f' has 0 values"),
    ],
)
def test_bad_node(nodes: Sequence[onnx.NodeProto], words: str) -> None:
    weights = {"five": np.array([5]), "w": np.ones((4, 5, 3, 3), np.float32)}
    inputs: list[Value] = [X, ("image", FLOAT, [1, 3, 8, 8])]
    model = model_of(nodes, inputs, weights=weights, domains=["mine", "com.microsoft"])
    assert words in refusal(model)


def test_graph_without_outputs() -> None:
    assert "no outputs" in refusal(model_of([node("Relu", ["x"], ["y"])], outputs=[]))


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (TensorProto(name="w", data_type=FLOAT, dims=[3], raw_data=b"123"), "of another size"),
        (TensorProto(name="w", data_type=FLOAT, dims=[3]), "of another size"),
        (TensorProto(name="w", data_type=FLOAT, dims=[2**40, 2**40]), "of another size"),
        (TensorProto(name="w", data_type=FLOAT, dims=[-3]), "negative"),
        (TensorProto(name="w", data_type=77, dims=[3]), "element type 77"),
        (TensorProto(name="w", dims=[3]), "no element type"),
    ],
)
def test_damaged_weight(tensor: TensorProto, words: str) -> None:
    model = model_of([node("Add", ["x", "w"], ["y"])])
    model.graph.initializer.append(tensor)
    assert words in refusal(model)


def test_inputs_that_are_no_tensors() -> None:
    model = model_of([node("SequenceAt", ["x", "i"], ["y"])], weights={"i": np.array(0)})
    kind = helper.make_tensor_sequence_value_info("x", FLOAT, [2])
    model.graph.input[0].CopyFrom(kind)
    assert "'x' is a sequence; only tensors are supported" in refusal(model)
