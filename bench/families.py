"""Small networks of one kind of layer each, with drawn weights: families that few models have.

Each is an ONNX model of real shapes: the grouped stages of RegNet, the ragged widths at the
beginning of Inception v3, the reductions of MobileNet, and a temporal network of 1-D convolutions.
"""

import zlib
from collections.abc import Sequence
from math import prod

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

CLASSES = 10


class Network:
    """A chain of layers that is built up by its methods, each from the last value; then `model`.

    `value` and `channels` are the last value's; a residual branch is a matter of remembering them.
    """

    def __init__(self, name: str, shape: Sequence[int], seed: int) -> None:
        self._name = name
        self._seed = seed
        self._nodes: list[onnx.NodeProto] = []
        self._weights: list[onnx.TensorProto] = []
        self._input = helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)
        self._batch = shape[0]
        self._spatial = len(shape) - 2
        self.value = "input"
        self.channels = shape[1]

    def conv(
        self,
        channels: int,
        kernel: int,
        stride: int = 1,
        group: int = 1,
        dilation: int = 1,
        gain: float = 2.0,
    ) -> "Network":
        """A convolution of the width of its input over the stride.

        `gain` is what the variance is multiplied by: 2 before a ReLU keeps it.
        """
        shape = (channels, self.channels // group, *[kernel] * self._spatial)
        pad = dilation * (kernel - 1) // 2
        self._add(
            "Conv",
            [self.value, self._weight(shape, gain / prod(shape[1:])), self._bias(channels)],
            kernel_shape=[kernel] * self._spatial,
            strides=[stride] * self._spatial,
            dilations=[dilation] * self._spatial,
            pads=[pad] * 2 * self._spatial,
            group=group,
        )
        self.channels = channels
        return self

    def relu(self) -> "Network":
        return self._add("Relu", [self.value])

    def pool(self) -> "Network":
        """The largest of each 2 x 2."""
        return self._add("MaxPool", [self.value], kernel_shape=[2, 2], strides=[2, 2])

    def add(self, other: str) -> "Network":
        return self._add("Add", [self.value, other])

    def squeeze_excite(self, channels: int) -> "Network":
        """Scales each channel by what two small layers make of the means of all."""
        value, width = self.value, self.channels
        self._add("GlobalAveragePool", [value])
        self.conv(channels, 1).relu().conv(width, 1, gain=1.0)
        self._add("Sigmoid", [self.value])
        return self._add("Mul", [value, self.value])

    def classifier(self) -> "Network":
        self._add("GlobalAveragePool", [self.value])
        self._add("Flatten", [self.value])
        weight = self._weight((CLASSES, self.channels), 1 / self.channels)
        return self._add("Gemm", [self.value, weight, self._bias(CLASSES)], transB=1)

    def model(self) -> onnx.ModelProto:
        output = helper.make_tensor_value_info("output", TensorProto.FLOAT, (self._batch, CLASSES))
        self._nodes[-1].output[0] = "output"
        graph = helper.make_graph(
            self._nodes, self._name, [self._input], [output], initializer=self._weights
        )
        return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])

    def _add(self, kind: str, reads: Sequence[str], **attributes: object) -> "Network":
        name = f"{kind.lower()}{len(self._nodes)}"
        self._nodes.append(helper.make_node(kind, reads, [f"{name}.out"], name, **attributes))
        self.value = f"{name}.out"
        return self

    def _weight(self, shape: Sequence[int], variance: float) -> str:
        name = f"weight{len(self._weights)}"
        rng = np.random.default_rng(zlib.crc32(f"{self._name} {name}".encode()) ^ self._seed)
        values = rng.standard_normal(shape, np.float32) * np.float32(np.sqrt(variance))
        self._weights.append(numpy_helper.from_array(values, name))
        return name

    def _bias(self, channels: int) -> str:
        return self._weight((channels,), 0.01)


def regnet(
    name: str,
    widths: Sequence[int],
    depths: Sequence[int],
    group_width: int,
    excited: bool,
    seed: int,
) -> onnx.ModelProto:
    """A RegNet with its normalisations folded: each block 1x1, grouped 3x3 and 1x1.

    References
    ----------
    Radosavovic et al., "Designing network design spaces", CVPR 2020,
    https://doi.org/10.1109/CVPR42600.2020.01044
    """
    network = Network(name, (1, 3, 224, 224), seed).conv(32, 3, 2).relu()
    for width, depth in zip(widths, depths, strict=True):
        for index in range(depth):
            value, channels = network.value, network.channels
            stride = 2 if index == 0 else 1
            network.conv(width, 1).relu()
            network.conv(width, 3, stride, group=width // group_width).relu()
            if excited:
                network.squeeze_excite(channels // 4)
            # The sums of many branches would grow beyond measure.
            network.conv(width, 1, gain=0.2)
            branch = network.value
            if index == 0:
                network.value, network.channels = value, channels
                network.conv(width, 1, stride, gain=1.0)
                network.add(branch)
            else:
                network.add(value)
            network.relu()
    return network.classifier().model()


def regnet_x_400mf(seed: int) -> onnx.ModelProto:
    """Groups of 16 channels: as many as a vector of AVX-512 has lanes."""
    return regnet("regnet_x_400mf", (32, 64, 160, 400), (1, 2, 7, 12), 16, False, seed)


def regnet_y_400mf(seed: int) -> onnx.ModelProto:
    """Groups of 8 channels, numbers of channels that no vector divides, squeeze and excitation."""
    return regnet("regnet_y_400mf", (48, 104, 208, 440), (1, 3, 6, 6), 8, True, seed)


def yolo_stem(seed: int) -> onnx.ModelProto:
    """The first 16 layers of YOLOv2 on 608 x 608 pixels, with ReLU: 12 convolutions, 4 poolings.

    References
    ----------
    Redmon and Farhadi, "YOLO9000: better, faster, stronger", CVPR 2017,
    https://doi.org/10.1109/CVPR.2017.690
    """
    network = Network("yolo_stem", (1, 3, 608, 608), seed)
    stages = (((32, 3),), ((64, 3),), ((128, 3), (64, 1), (128, 3)), ((256, 3), (128, 1), (256, 3)))
    for stage in stages:
        for channels, kernel in stage:
            network.conv(channels, kernel).relu()
        network.pool()
    for channels, kernel in ((512, 3), (256, 1), (512, 3), (256, 1)):
        network.conv(channels, kernel).relu()
    return network.classifier().model()


def batch_of_4(seed: int) -> onnx.ModelProto:
    """Four images through residual blocks of 3x3, as at the beginning of ResNet-18."""
    network = Network("batch_of_4", (4, 3, 112, 112), seed).conv(64, 7, 2).relu().pool()
    for _ in range(3):
        value = network.value
        network.conv(64, 3).relu().conv(64, 3, gain=0.5).add(value).relu()
    network.conv(128, 3, 2).relu()
    return network.classifier().model()


def width_71(seed: int) -> onnx.ModelProto:
    """Rows of 71 pixels, a prime: no tile but 1 divides them."""
    network = Network("width_71", (1, 3, 71, 71), seed).conv(64, 3).relu()
    return network.conv(48, 1).relu().conv(96, 3).relu().classifier().model()


def width_73(seed: int) -> onnx.ModelProto:
    """Rows of 73 pixels, a prime, and 80 channels, as in Inception v3."""
    network = Network("width_73", (1, 3, 73, 73), seed).conv(64, 3).relu()
    return network.conv(80, 1).relu().conv(64, 3).relu().classifier().model()


def width_149(seed: int) -> onnx.ModelProto:
    """Rows of 149 pixels behind a stride, a prime, as at the beginning of Inception v3."""
    network = Network("width_149", (1, 3, 297, 297), seed).conv(32, 3, 2).relu()
    return network.conv(32, 3).relu().conv(64, 1).relu().classifier().model()


def depthwise_stride2(seed: int) -> onnx.ModelProto:
    """The reductions of MobileNet, of 3x3 and 5x5, with the 1x1 convolutions between them."""
    network = Network("depthwise_stride2", (1, 3, 224, 224), seed).conv(32, 3, 2).relu()
    for channels, kernel in ((96, 3), (144, 3), (240, 5), (480, 3)):
        network.conv(channels, 1).relu()
        network.conv(channels, kernel, 2, group=channels).relu()
        network.conv(channels // 6, 1, gain=1.0)
    return network.conv(320, 1).relu().classifier().model()


def temporal(seed: int) -> onnx.ModelProto:
    """1-D convolutions over 1000 steps, dilated ever wider, and residual.

    References
    ----------
    Bai, Kolter and Koltun, "An empirical evaluation of generic convolutional and recurrent
    networks for sequence modeling", 2018, https://arxiv.org/abs/1803.01271
    """
    network = Network("temporal", (1, 40, 1000), seed).conv(64, 9, gain=1.0)
    for level in range(6):
        value = network.value
        network.conv(64, 3, dilation=2**level).relu().conv(64, 3, dilation=2**level, gain=0.5)
        network.add(value).relu()
    return network.classifier().model()
