"""EfficientNet and MobileNetV3, and all that timm builds of these classes: MobileNet V1, V2 and V4, MixNet, FBNet."""

from typing import Any

from timm.models.efficientnet import EfficientNet
from timm.models.mobilenetv3 import MobileNetV3
from torch import Tensor, nn

from dynadapter.backbones.cut import _map_to_tokens, _out_channels, _same_forward, blocks, embed, finish, tokens, widths
from dynadapter.backbones.depth import _without_last_of_stages, remove_last_blocks

Efficient = EfficientNet | MobileNetV3


@embed.register
def _(model: Efficient, images: Tensor) -> Tensor:
    _same_forward(model, _family(model))
    return model.bn1(model.conv_stem(images))


@blocks.register
def _(model: Efficient) -> list[tuple[nn.Module, ...]]:
    _same_forward(model, _family(model))
    stages: Any = model.blocks
    return [(block,) for stage in stages for block in stage]  # the first block of a stage downsamples


@finish.register
def _(model: EfficientNet, x: Tensor) -> Tensor:
    return model.bn2(model.conv_head(x))


@finish.register
def _(model: MobileNetV3, x: Tensor) -> Tensor:
    return x  # the last convolution follows the pooling


@tokens.register
def _(model: Efficient, x: Tensor) -> Tensor:
    return _map_to_tokens(x)


@widths.register
def _(model: Efficient) -> list[int]:
    stages: Any = model.blocks
    return [_out_channels(block) for stage in stages for block in stage]


@remove_last_blocks.register
def _(model: Efficient, count: int) -> None:
    model.blocks = _without_last_of_stages(model.blocks, count)


def _family(model: Efficient) -> type[nn.Module]:
    return EfficientNet if isinstance(model, EfficientNet) else MobileNetV3
