"""Parts as OpenCL kernels: the text of loops, the launches of a part, and what they compute."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import onnx
import pytest
import test_quantized
from onnx import helper
from test_forms import network
from test_recurrent import arrays, layer
from test_tvm_operations import assert_right, named, operation

from hetsched import forms, oracle
from hetsched.device import Device
from hetsched.errors import CompileError, UnsupportedOperation
from hetsched.graph import Graph, to_onnx
from hetsched.host import cores, cpu_device
from hetsched.launches import APART, OUTPUT, WORKSPACE, Program
from hetsched.plugin import load
from hetsched.schedules.rules import Rules
from hetsched.schedules.vectors import Vectors
from hetsched.target import Artifact, Target

lowering = pytest.importorskip("hetsched.lowering.opencl")
kernels = import_module("hetsched.lowering.kernels")

Array = np.ndarray
RNG = np.random.default_rng(0)
IMAGE = RNG.standard_normal((1, 20, 9, 11), np.float32)
ROWS = RNG.standard_normal((2, 3, 40), np.float32)
FACTORS = RNG.standard_normal((40, 50), np.float32)
WEIGHTS = RNG.standard_normal((24, 20, 3, 3), np.float32)
RULES = Rules(Vectors.of(cpu_device("cpu", "cpu").isa), 2)


def program(graph: Graph, units: int = 1, rules: Rules = RULES) -> Program:
    made: Program = lowering.program(graph, rules, units)[0]
    return made


@pytest.fixture
def device() -> Device:
    target = load(Target, "opencl")
    if reason := target.unavailable():
        pytest.skip(reason)
    found = target.device("opencl:cpu" if len(target.devices()) > 1 else "opencl:0")
    if found.kind != "cpu":
        pytest.skip("no OpenCL device computes on the processor")
    return target.device(f"{found.name}@{cores()[-1]}")


def computed(graph: Graph, inputs: Sequence[Array], device: Device, units: int) -> list[Array]:
    target = load(Target, "opencl")
    made, weights = lowering.program(graph, RULES, units)
    given = {t.name: graph.constants[t.name] for t in graph.outputs if t.name in graph.constants}
    with target.load(Artifact(made.files(), {**weights, **given}), graph, device) as kernel:
        return [np.asarray(result) for result in kernel.run(inputs)]


def check(model: onnx.ModelProto, inputs: Sequence[Array], device: Device, units: int) -> None:
    names = [value.name for value in model.graph.input]
    expected = oracle.run(model, dict(zip(names, inputs, strict=True)))
    for value in model.graph.output:
        array = expected[value.name]
        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        value.CopyFrom(helper.make_tensor_value_info(value.name, kind, array.shape))
    results = computed(named(model), inputs, device, units)
    for found, output in zip(results, model.graph.output, strict=True):
        assert_right(found, expected[output.name])


HALF = ROWS.astype(np.float16)
OPERATIONS: Mapping[str, tuple[onnx.ModelProto, list[Array]]] = {
    "convolution": operation("Conv", 11, IMAGE, WEIGHTS, constants=1, pads=[1, 1, 1, 1]),
    "strided": operation("Conv", 11, IMAGE, WEIGHTS, constants=1, strides=[2, 2]),
    "depthwise": operation("Conv", 11, IMAGE, WEIGHTS[:20, :1], constants=1, group=20),
    "transposed": operation(
        "ConvTranspose", 11, IMAGE, WEIGHTS[:20], constants=1, strides=[2, 2]
    ),
    "max pool": operation("MaxPool", 12, IMAGE, kernel_shape=[3, 3], strides=[2, 2]),
    "global pool": operation("GlobalAveragePool", 7, IMAGE),
    "product": operation("MatMul", 13, ROWS, FACTORS, constants=1),
    "products": operation("MatMul", 13, ROWS, ROWS.transpose(0, 2, 1).copy()),
    "softmax": operation("Softmax", 13, ROWS),
    "normalised": operation("LayerNormalization", 17, ROWS, ROWS[0, 0], constants=1),
    "error function": operation("Erf", 13, 3 * ROWS),
    "tangent": operation("Atanh", 9, np.tanh(ROWS)),
    "truth": operation("And", 7, ROWS > 0, ROWS < 1),
    "chosen": operation("Where", 9, ROWS > 0, ROWS, np.zeros(1, np.float32), constants=1),
    "powers": operation("Pow", 13, ROWS, np.array([2], np.float32), constants=1),
    "isnan": operation("IsNaN", 13, np.where(ROWS > 1, np.float32(np.nan), ROWS)),
    "to bool": operation("Cast", 13, np.round(ROWS), to=9),
    "to half": operation("Cast", 13, ROWS, to=10),
    "half sum": operation("Add", 13, HALF, HALF[:1]),
    "half product": operation("MatMul", 13, HALF, HALF.transpose(0, 2, 1).copy()),
    "to bytes": operation("Cast", 13, np.array([300, -1, 5]), to=2),
    "remainder": operation("Mod", 13, np.array([5, -5, 7, -7]), np.array([3, 3, -4, -4])),
    "narrow": operation("Add", 14, np.array([100, -100], np.int8), np.array([100, -100], np.int8)),
    "sum so far": operation("CumSum", 11, ROWS, np.array(1), constants=1, reverse=1),
    "gathered": operation("Gather", 13, ROWS, np.array([-1, 0, 2]), axis=2),
    "scattered": operation(
        "ScatterND", 11, ROWS, np.array([[0, 1], [1, -1]]), ROWS[:, 0].copy(), constants=1
    ),
    "largest": operation("ArgMax", 12, ROWS, axis=2),
    "first": operation("TopK", 11, ROWS, np.array([5]), constants=1, axis=2, outputs=2),
    "last": operation("TopK", 11, np.round(ROWS), np.array([3]), constants=1, axis=1, outputs=2,
                      largest=0),
    "resized": operation(
        "Resize", 13, IMAGE, None, None, np.array([1, 20, 15, 6]), constants=3, mode="linear"
    ),
    "turned": operation("Transpose", 13, ROWS, perm=[2, 0, 1]),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations(name: str, device: Device) -> None:
    model, inputs = OPERATIONS[name]
    # Some on one unit, where a function is one kernel, some on several.
    units = 1 + 2 * (list(OPERATIONS).index(name) % 2)
    check(model, inputs, device, units)


def test_work_is_shared_by_several_units(device: Device) -> None:
    model, inputs = operation("Conv", 11, RNG.standard_normal((2, 20, 40, 40), np.float32),
                              WEIGHTS, constants=1, pads=[1, 1, 1, 1])  # fmt: skip
    made = program(named(onnx.shape_inference.infer_shapes(model)), 3)
    assert max(launch.global_size[0] for launch in made.launches) == 3
    check(model, inputs, device, 3)


@pytest.mark.parametrize(
    ("index", "dot", "features"),
    [
        (1, "madd", {}),
        (10, "vnni", {}),
        (10, "vnni", {"avx512_vnni": "-DHAS_QUADS"}),
    ],
)
def test_bytes_are_multiplied_exactly(
    index: int,
    dot: str,
    features: Mapping[str, str],
    device: Device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By two instructions, and in plain C where the processor has not that of `features`."""
    runtime = import_module("hetsched.opencl.runtime")
    monkeypatch.setattr(runtime, "FEATURES", features)
    vectors = replace(RULES.vectors, dot=dot, lanes=16)
    monkeypatch.setattr(f"{__name__}.RULES", replace(RULES, vectors=vectors))

    def here(isa: str, graph: Graph, *inputs: Array) -> list[Array]:
        return computed(graph, inputs, device, 1 + index % 2)

    monkeypatch.setattr(test_quantized, "computed", here)
    types = test_quantized.TYPES[index % 3]
    test_quantized.check_convolution("", test_quantized.CASES[index], types, seed=index)


def test_bytes_are_multiplied_on_several_units(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PoCL puts such a convolution's loops into a function of its own."""
    vectors = replace(RULES.vectors, dot="vnni", lanes=16)
    monkeypatch.setattr(f"{__name__}.RULES", replace(RULES, vectors=vectors))
    monkeypatch.setattr(
        test_quantized,
        "computed",
        lambda isa, graph, *inputs: computed(graph, inputs, device, 2),
    )
    case = test_quantized.Case((1, 32, 27, 27), (128, 32, 3, 3), pads=(1, 1, 1, 1))
    test_quantized.check_convolution("", case, ("uint8", "int8", "uint8"), seed=0)


@pytest.mark.parametrize(("kind", "direction"), [("LSTM", "bidirectional"), ("GRU", "reverse")])
def test_recurrent_layers(kind: str, direction: str, device: Device) -> None:
    values = arrays(kind, 2 if direction == "bidirectional" else 1)
    batch = values["X"].shape[1]
    lengths = [index % 4 for index in range(batch)]
    graph = layer(kind, direction, without=(), lengths=lengths, values=values)
    expected = oracle.run(to_onnx(graph), {"X": values["X"]})
    results = computed(graph, [values["X"]], device, 2)
    for found, tensor in zip(results, graph.outputs, strict=True):
        assert_right(found, expected[tensor.name])


def test_a_part_takes_and_gives_blocks_of_channels(device: Device) -> None:
    graph = network("conv")
    lanes = RULES.vectors.lanes
    whole = replace(graph, packed=dict.fromkeys(forms.packed(graph, lanes), lanes))
    assert whole.packed
    values = {t.name: RNG.standard_normal(t.shape).astype(t.dtype) for t in graph.inputs}
    expected = oracle.run(to_onnx(graph), values)
    for group in graph.groups:
        part = whole.part(group.ops, group.name)
        given = [values[t.name] for t in part.inputs]
        results = computed(part, given, device, 1)
        values |= {t.name: found for t, found in zip(part.outputs, results, strict=True)}
    for tensor in graph.outputs:
        assert_right(values[tensor.name], expected[tensor.name])


def chain(count: int) -> Graph:
    """So many equal convolutions, each with its own weights."""
    names = [f"t{index}" for index in range(count + 1)]
    weights = [f"w{index}" for index in range(count)]
    value = helper.make_tensor_value_info
    shape = (1, 32, 8, 8)
    made = helper.make_graph(
        [
            helper.make_node("Conv", [names[i], weights[i]], [names[i + 1]], f"n{i}",
                             pads=[1, 1, 1, 1])
            for i in range(count)
        ],
        "chain", [value(names[0], 1, shape)], [value(names[-1], 1, shape)],
        [helper.make_tensor(w, 1, (32, 32, 3, 3), np.full(9216, i + 1)) for i, w in
         enumerate(weights)],
    )  # fmt: skip
    return named(helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)]))


def test_functions_are_cases_of_few_kernels(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = chain(3)
    together = program(graph, 2)
    monkeypatch.setattr(lowering, "KERNEL_LETTERS", 1)
    apart = program(graph, 2)
    names = list(dict.fromkeys(launch.kernel for launch in apart.launches))
    assert len(names) == 3
    assert {launch.case for launch in apart.launches} == {None}
    assert {launch.kernel for launch in together.launches} == {"kernels0"}
    cases = [names.index(launch.kernel) for launch in apart.launches]
    assert [launch.case for launch in together.launches] == cases
    for alone, case in zip(apart.launches, together.launches, strict=True):
        assert case.arguments[: len(alone.arguments)] == alone.arguments
        assert set(case.arguments) == set(alone.arguments)
    # Each may be built alone.
    for made, count in ((apart, len(names)), (together, 1)):
        kernels = [text.count("__kernel ") for text in made.source.split(APART)]
        assert kernels == [0] + [1] * count
    # The first two together, the third alone.
    letters = [len(text) - len(lowering.HEAD) for text in apart.source.split(APART)[1:]]
    two = sum(letters[:2]) + 2 * len(lowering.FUNCTION)
    monkeypatch.setattr(lowering, "KERNEL_LETTERS", two)
    some = program(graph, 2)
    assert list(dict.fromkeys(launch.kernel for launch in some.launches)) == ["kernels0", names[2]]
    x = RNG.standard_normal((1, 32, 8, 8)).astype(np.float32)
    (expected,) = oracle.run(to_onnx(graph), {"t0": x}).values()
    assert_right(computed(graph, [x], device, 2)[0], expected)


def test_small_functions_are_joined_on_one_unit(device: Device) -> None:
    graph = chain(3)
    model = to_onnx(graph)
    apart, joined = program(graph, 2), program(graph, 1)
    assert len(apart.launches) > 1
    (launch,) = joined.launches
    assert APART not in joined.source
    assert launch.global_size == (1,)
    # Each region whole, and as often as it is.
    places = [(place.region, place.which, place.start) for place in launch.arguments]
    assert len(set(places)) == len(places)
    assert sum(place.nbytes for place in launch.arguments) == sum(
        joined.region_nbytes(place.region, place.which) for place in launch.arguments
    )
    x = RNG.standard_normal((1, 32, 8, 8)).astype(np.float32)
    (expected,) = oracle.run(model, {"t0": x}).values()
    for units in (1, 2):
        assert_right(computed(graph, [x], device, units)[0], expected)


def test_equal_loops_are_one_kernel_and_memory_is_used_again() -> None:
    few, many = program(chain(4), 2), program(chain(8), 2)
    assert len(many.launches) == len(few.launches) + 4
    assert many.source == few.source
    assert many.workspace_nbytes == few.workspace_nbytes
    # Of neighbours, none writes what it reads.
    for launch in many.launches:
        spans = [
            (place.start, place.start + place.nbytes, place.written)
            for place in launch.arguments
            if place.region == WORKSPACE
        ]
        for start, end, written in spans:
            others = [span for span in spans if span != (start, end, written)]
            assert not written or all(end <= s or e <= start for s, e, _ in others)


def test_what_an_output_is_made_of_is_copied() -> None:
    """An output whose tensor has a place already."""
    model, _ = operation("Identity", 13, ROWS)
    made = program(named(onnx.shape_inference.infer_shapes(model)), 2)
    places = made.launches[-1].arguments
    assert [(place.region, place.written) for place in places][-1] == (OUTPUT, True)


def text_of(body: str, units: int = 1, **shapes: tuple[int, ...]) -> str:
    """The kernels of a function of float32 tensors, in the language that TVM prints."""
    arguments = ", ".join(f'{n}: T.Buffer({shape}, "float32")' for n, shape in shapes.items())
    lines = "\n".join(f"    {line}" for line in body.strip().splitlines())
    text = f"@T.prim_func(s_tir=True)\ndef f({arguments}):\n{lines}\n"
    function = import_module("tvm.script").from_source(text)
    found = kernels.kernels(lowering.flattened({"f": function})["f"], units)
    return "".join(nest.text for nest in found.nests)


def test_text_of_vectors() -> None:
    text = text_of(
        """
for i in T.serial(4):
    for j in T.vectorized(8):
        y[i * 8 + j] = T.max(x[i * 8 + j], T.float32(0)) * T.float32(0.5)
""",
        x=(32,),
        y=(32,),
    )
    assert text == golden("vectors", text)


def test_text_of_shared_loops() -> None:
    text = text_of(
        """
for i in T.parallel(6):
    for j in T.parallel(5):
        y[i * 5 + j] = T.if_then_else(i < 3, x[i * 5 + j], T.float32(0))
""",
        units=4,
        x=(30,),
        y=(30,),
    )
    assert text == golden("shared", text)


GOLDEN = Path(__file__).parent / "golden"


def golden(name: str, text: str) -> str:
    path = GOLDEN / f"opencl_{name}.cl"
    if os.environ.get("HETSCHED_UPDATE_GOLDEN"):
        path.write_text(text)
    return path.read_text()


def test_what_has_no_kernel_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedOperation, match="no type for float8"):
        kernels._Type.of("float8_e4m3fn")
    made = helper.make_graph(
        [helper.make_node("NonZero", ["x"], ["y"], "node0")],
        "zero",
        [helper.make_tensor_value_info("x", 1, (3,))],
        [helper.make_tensor_value_info("y", 7, (1, 2))],
    )
    graph = named(helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)]))
    with pytest.raises(CompileError, match="NonZero 'node0'"):
        program(graph)
    assert "NonZero" in (lowering.why_not(graph) or "")
    assert lowering.why_not(named(OPERATIONS["first"][0])) is None


def typed(model: onnx.ModelProto, shape: Sequence[int]) -> Graph:
    """The graph of a model whose one output is of float32."""
    (value,) = model.graph.output
    value.CopyFrom(helper.make_tensor_value_info(value.name, onnx.TensorProto.FLOAT, shape))
    return named(model)


def test_tiles_have_whole_vectors_short_addresses_and_fetched_weights() -> None:
    """Each of these was worth 5 to 60 % of a kernel's time on PoCL, whose LLVM undoes it else."""
    rules = Rules(Vectors(16, 32))
    left, right = np.ones((56, 256), np.float32), np.ones((256, 1024), np.float32)
    model, _ = operation("MatMul", 11, left, right, constants=1)
    source = program(typed(model, (56, 1024)), rules=rules).source
    assert "min_vector_width(512)" in source
    assert re.search(r"fetch\(\(*a\d", source)
    (inner,) = re.findall(r"for \(int (i\d+) = 0; \1 < 256; ", source)
    # What no loop changes, then the innermost loop, then the constant of the row in the tile.
    loads = re.findall(rf"\(a\d[^;]*?\+ \({inner}\)\)( \+ \(\d+\)\))?", source)
    assert any(loads)
    assert not re.search(rf"\+ \(\d+\)\) \+ \({inner}", source)


def test_a_bound_call_reads_its_inputs_anew(device: Device) -> None:
    graph = typed(operation("Relu", 11, ROWS)[0], ROWS.shape)
    target = load(Target, "opencl")
    given = ROWS.copy()
    with target.load(target.compile(graph, device), graph, device) as kernel:
        call = kernel.bind([given])
        (first,) = call()
        np.testing.assert_array_equal(first, np.maximum(ROWS, 0))
        given[:] = -ROWS
        (second,) = call()
        assert second is first
        np.testing.assert_array_equal(second, np.maximum(-ROWS, 0))
