"""Cut a backbone to its first blocks: a shallower model with the same norm and head."""

from functools import singledispatch
from typing import Any

from timm.models.beit import Beit
from timm.models.byobnet import ByobNet
from timm.models.convnext import ConvNeXt
from timm.models.efficientnet import EfficientNet
from timm.models.eva import Eva
from timm.models.hiera import Hiera
from timm.models.maxxvit import MaxxVit
from timm.models.mobilenetv3 import MobileNetV3
from timm.models.naflexvit import NaFlexVit
from timm.models.regnet import RegNet
from timm.models.resnet import ResNet
from timm.models.resnetv2 import ResNetV2
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from dynadapter.backbones.cut import blocks, widths


def cut_depth(model: nn.Module, depth: int) -> None:
    """Remove all blocks of a model after the first ``depth``; its norm and head follow the last remaining block.

    Args:
        model: A timm model of a known family, with its weights loaded and without adapters.
        depth: Blocks to keep, from 1 to all.

    Raises:
        ValueError: The model has fewer blocks, or its norm and head read another number of channels than those after
            block ``depth``.
        TypeError: The model's class is unknown.
    """
    channels = widths(model)
    if not 1 <= depth <= len(channels):
        raise ValueError(
            f"depth={depth} does not fit a backbone of {len(channels)} blocks; choose 1 to {len(channels)}"
        )
    fitting = [count for count, width in enumerate(channels, start=1) if width == channels[-1]]
    if depth not in fitting:
        raise ValueError(
            f"depth={depth} ends where the {type(model).__name__} has {channels[depth - 1]} channels, and its norm and "
            f"head read {channels[-1]}; choose {fitting[0]} to {fitting[-1]}"
        )
    remove_last_blocks(model, len(channels) - depth)
    assert len(blocks(model)) == depth


@singledispatch
def remove_last_blocks(model: nn.Module, count: int) -> None:
    """Remove a model's last ``count`` blocks, fewer than its last stage has; each family registers its own function.

    Raises:
        TypeError: The model's class is unknown.
    """
    known = sorted(family.__name__ for family in remove_last_blocks.registry if family is not object)
    raise TypeError(
        f"the depth of a {type(model).__name__} cannot be cut; known: {known}; leave depth out, or register "
        "remove_last_blocks of dynadapter.backbones.depth for this class"
    )


@remove_last_blocks.register
def _(model: VisionTransformer | Eva | Beit | Hiera | NaFlexVit, count: int) -> None:
    model.blocks = _without_last(model.blocks, count)


@remove_last_blocks.register
def _(model: SwinTransformer | SwinTransformerV2, count: int) -> None:
    last: Any = model.layers[-1]
    last.blocks = _without_last(last.blocks, count)


@remove_last_blocks.register
def _(model: ConvNeXt | MaxxVit | ResNetV2, count: int) -> None:
    last: Any = model.stages[-1]
    last.blocks = _without_last(last.blocks, count)


@remove_last_blocks.register
def _(model: ResNet, count: int) -> None:
    model.layer4 = _without_last(model.layer4, count)


@remove_last_blocks.register
def _(model: RegNet, count: int) -> None:
    last: Any = model.s4
    for name in list(last._modules)[len(last._modules) - count :]:
        delattr(last, name)


@remove_last_blocks.register
def _(model: ByobNet, count: int) -> None:
    model.stages = _without_last_of_stages(model.stages, count)


@remove_last_blocks.register
def _(model: EfficientNet | MobileNetV3, count: int) -> None:
    model.blocks = _without_last_of_stages(model.blocks, count)


def _without_last_of_stages(stages: Any, count: int) -> nn.Sequential:
    """Remove blocks from the end of stages, where neighbouring stages can have the same width."""
    kept = [list(stage) for stage in stages]
    for _ in range(count):
        kept[-1].pop()
        if not kept[-1]:
            kept.pop()
    return nn.Sequential(*(nn.Sequential(*blocks) for blocks in kept))


def _without_last(modules: Any, count: int) -> Any:
    return modules[: len(modules) - count]
