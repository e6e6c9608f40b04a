"""Families whose blocks take and give maps (batch, channels, height, width).

These are ResNet with all that timm builds of its class (wide ResNet, ResNeXt, SE-ResNet, Res2Net, ResNeSt, SKNet);
ResNetV2 with BiT; RegNet X, Y, Z and V; EfficientNet and MobileNetV3 with MobileNet V1, V2 and V4, MixNet and FBNet;
ByobNet with CLIP's ResNets, RepVGG, MobileOne, GCResNet, RegNetZ, BotNet, HaloNet and LambdaResNet; ConvNeXt, versions
1 and 2; MaxViT, CoAtNet and MaxxViT.
"""

from functools import singledispatch
from typing import Any

from timm.models import regnet
from timm.models.byobnet import ByobNet
from timm.models.convnext import ConvNeXt
from timm.models.efficientnet import EfficientNet
from timm.models.maxxvit import MaxxVit
from timm.models.mobilenetv3 import MobileNetV3
from timm.models.regnet import RegNet
from timm.models.resnet import ResNet
from timm.models.resnetv2 import ResNetV2
from torch import Tensor, nn

from dynadapter.backbones.cut import (
    _same_forward,
    _staged_blocks,
    _staged_widths,
    blocks,
    built_for,
    convert,
    embed,
    finish,
    size_step,
    tokens,
    widths,
)

Efficient = EfficientNet | MobileNetV3
Staged = ResNet | ResNetV2 | RegNet | ByobNet | MaxxVit | Efficient
"""Networks of stages, where the first block of a stage downsamples."""


@singledispatch
def stages(model: Any) -> Any:
    """Return the blocks of each stage of one of ``Staged``."""
    return [stage.blocks for stage in model.stages]  # ResNetV2, MaxxVit


@stages.register
def _(model: ResNet) -> Any:
    return [model.layer1, model.layer2, model.layer3, model.layer4]


@stages.register
def _(model: RegNet) -> Any:
    parts: Any = (model.s1, model.s2, model.s3, model.s4)
    return [list(stage.children()) for stage in parts]


@stages.register
def _(model: ByobNet) -> Any:
    return model.stages


@stages.register
def _(model: Efficient) -> Any:
    return model.blocks


@embed.register
def _(model: ResNetV2 | RegNet | ByobNet | ConvNeXt | MaxxVit, images: Tensor) -> Tensor:
    _same_forward(model, ResNetV2 | RegNet | ByobNet | ConvNeXt | MaxxVit)
    return model.stem(images)


@embed.register
def _(model: ResNet, images: Tensor) -> Tensor:
    _same_forward(model, ResNet)
    return model.maxpool(model.act1(model.bn1(model.conv1(images))))


@embed.register
def _(model: Efficient, images: Tensor) -> Tensor:
    _same_forward(model, Efficient)
    return model.bn1(model.conv_stem(images))


@blocks.register
def _(model: Staged) -> list[tuple[nn.Module, ...]]:
    _same_forward(model, Staged)
    return [(block,) for stage in stages(model) for block in stage]


@blocks.register
def _(model: ConvNeXt) -> list[tuple[nn.Module, ...]]:
    _same_forward(model, ConvNeXt)
    return _staged_blocks(model.stages)


@finish.register
def _(model: ResNet | MobileNetV3, x: Tensor) -> Tensor:
    return x  # the last convolution of MobileNetV3 follows the pooling


@finish.register
def _(model: ResNetV2 | MaxxVit, x: Tensor) -> Tensor:
    return model.norm(x)


@finish.register
def _(model: RegNet | ByobNet, x: Tensor) -> Tensor:
    return model.final_conv(x)


@finish.register
def _(model: EfficientNet, x: Tensor) -> Tensor:
    return model.bn2(model.conv_head(x))


@finish.register
def _(model: ConvNeXt, x: Tensor) -> Tensor:
    return model.norm_pre(x)


@tokens.register
def _(model: Staged | ConvNeXt, x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)  # (batch, tokens, width), row by row


@widths.register
def _(model: ResNet | ResNetV2 | RegNet | MaxxVit) -> list[int]:
    infos: Any = model.feature_info[1:]  # the first is the stem's
    return [info["num_chs"] for info, stage in zip(infos, stages(model), strict=True) for _ in stage]


@widths.register
def _(model: ByobNet | Efficient) -> list[int]:
    return [_out_channels(block) for stage in stages(model) for block in stage]


@widths.register
def _(model: ConvNeXt) -> list[int]:
    return _staged_widths(model, model.stages)


@built_for.register
def _(model: MaxxVit) -> int | None:
    size = getattr(model, "img_size", None)  # timm before 1.0.27 does not store it
    return size[0] if size else None


@size_step.register
def _(model: MaxxVit) -> int:
    return 32  # so windows and grids fit the map of each stage


@convert.register
def _(model: RegNet, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return regnet._filter_fn(state)


def _out_channels(module: Any) -> int:
    """Return the channels of a module's last convolution, with or without adapters; 0 if it has none."""
    module = getattr(module, "base_layer", module)
    if hasattr(module, "out_channels") and not isinstance(module, nn.Conv1d):  # efficient channel attention has one
        return int(module.out_channels)
    children = list(module.named_children())[::-1]
    children.sort(key=lambda child: child[0].startswith("attn"))  # attention at the end of a block keeps its channels
    return next((found for _, child in children if (found := _out_channels(child))), 0)
