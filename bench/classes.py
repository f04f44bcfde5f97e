"""What kind of network each model is, and of which families of layers it is a sample.

A convolutional network is classed by its blocks, or else by what most of its multiply-adds are.
"""

from collections.abc import Mapping
from types import MappingProxyType

THREE = "3x3"
BOTTLENECK = "bottleneck"
DEPTHWISE = "depthwise"
TRANSFORMER = "transformer"
SMALL = "recurrent and small"
FAMILY = "families"
OTHER = "other"
INTEGER = "int8"
CLASSES = (THREE, BOTTLENECK, DEPTHWISE, TRANSFORMER, SMALL, FAMILY, OTHER, INTEGER)

_MODELS = {
    THREE: "resnet18 googlenet unet light_vgg19 light_inception_v1 light_inception_v2 "
    "light_zfnet512 dnsmos_p808_v8 plcmos_v2",
    BOTTLENECK: "resnet50 light_resnet50 squeezenet1_1 light_squeezenet",
    DEPTHWISE: "mobilenet_v2 mobilenet_v3_small efficientnet_b0 light_shufflenet ppocrv2_cls",
    TRANSFORMER: "bert_base_like vit_b_16 convnext_tiny",
    SMALL: "digits_cnn digits_branch digits_lstm lenet5 gru_seq lstm_text silero_vad_16k_op15",
    FAMILY: "dcgan_gen regnet_x_400mf regnet_y_400mf width_71 width_73 width_149 "
    "light_densenet121 depthwise_stride2 temporal attacut_sc magika",
    OTHER: "basic_pitch crepe_tiny light_bvlc_alexnet",
}
# Rows of their own for layers that are easily left behind.
_FAMILIES = {
    "transposed convolution": "unet dcgan_gen",
    "grouped convolution": "regnet_x_400mf regnet_y_400mf light_shufflenet",
    "ragged widths": "width_71 width_73 width_149",
    "BN-ReLU-conv": "light_densenet121",
    "stride-2 depthwise": "depthwise_stride2",
    "MobileNetV3": "mobilenet_v3_small ppocrv2_cls",
    "1-D convolution": "temporal attacut_sc magika",
    "LSTM and GRU": "lstm_text gru_seq digits_lstm silero_vad_16k_op15",
}


def _listed(names: Mapping[str, str]) -> Mapping[str, tuple[str, ...]]:
    return MappingProxyType({key: tuple(text.split()) for key, text in names.items()})


MODELS = _listed(_MODELS)
FAMILIES = _listed(_FAMILIES)


def class_of(model: str, dtype: str = "float32") -> str:
    """The class of a model; one in integers is compared with its like only.

    >>> class_of("resnet18"), class_of("resnet18_int8", "int8"), class_of("crepe_tiny")
    ('3x3', 'int8', 'other')
    """
    if dtype == INTEGER:
        return INTEGER
    return next((name for name, models in MODELS.items() if model in models), OTHER)


def families_of(model: str) -> tuple[str, ...]:
    return tuple(name for name, models in FAMILIES.items() if model in models)
