"""What the sets of `bench.costs` share: options, what they find, and how networks are halved."""

from dataclasses import dataclass
from pathlib import Path

from bench.sets import Found

# Networks of one family are in one half, so that neither has seen what the other is asked.
# The split was chosen by kind before any error was looked at: each half has plain, separable,
# grouped, transformer, recurrent and quantised networks.
HALVES: tuple[tuple[str, ...], tuple[str, ...]] = (
    tuple(
        "digits_cnn crepe_tiny ppocrv2_cls mobilenet_v3_small efficientnet_b0 squeezenet1_1 "
        "light_squeezenet squeezenet1_1_int8 regnet_x_400mf regnet_y_400mf basic_pitch "
        "light_bvlc_alexnet width_71 width_73 width_149 resnet18 resnet50 light_resnet50 "
        "resnet18_int8 resnet50_int8 dcgan_gen lstm_text vit_b_16 convnext_tiny".split()
    ),
    tuple(
        "digits_branch digits_lstm lenet5 silero_vad_16k_op15 attacut_sc gru_seq depthwise_stride2 "
        "light_shufflenet temporal mobilenet_v2 mobilenet_v2_int8 magika dnsmos_p808_v8 plcmos_v2 "
        "light_inception_v1 light_inception_v2 googlenet googlenet_int8 light_zfnet512 light_vgg19 "
        "light_densenet121 unet bert_base_like".split()
    ),
)


@dataclass(frozen=True)
class Options:
    """What the command line says. What is measured is kept in `folder`, and measured once."""

    device: str
    seed: int
    models: Path
    folder: Path
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Result(Found):
    """What a set found, and whether that is what is wanted; None where nothing is."""

    passed: bool | None = None
