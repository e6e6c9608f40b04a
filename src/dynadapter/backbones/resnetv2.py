"""ResNet with the norm before each convolution: timm's ResNetV2, with BiT."""

from typing import Any

from timm.models.resnetv2 import ResNetV2
from torch import Tensor, nn

from dynadapter.backbones.cut import (
    _map_to_tokens,
    _same_forward,
    blocks,
    checkpointing,
    embed,
    finish,
    tokens,
    widths,
)
from dynadapter.backbones.depth import remove_last_blocks


@embed.register
def _(model: ResNetV2, images: Tensor) -> Tensor:
    _same_forward(model, ResNetV2)
    return model.stem(images)


@blocks.register
def _(model: ResNetV2) -> list[tuple[nn.Module, ...]]:
    _same_forward(model, ResNetV2)
    stages: Any = model.stages
    return [(block,) for stage in stages for block in stage.blocks]  # the first block of a stage downsamples


@finish.register
def _(model: ResNetV2, x: Tensor) -> Tensor:
    return model.norm(x)


@tokens.register
def _(model: ResNetV2, x: Tensor) -> Tensor:
    return _map_to_tokens(x)


@widths.register
def _(model: ResNetV2) -> list[int]:
    infos: Any = model.feature_info[1:]  # the first is the stem's
    stages: Any = model.stages
    return [info["num_chs"] for info, stage in zip(infos, stages, strict=True) for _ in stage.blocks]


@checkpointing.register
def _(model: ResNetV2) -> bool:
    return any(stage.grad_checkpointing for stage in model.stages)


@remove_last_blocks.register
def _(model: ResNetV2, count: int) -> None:
    last: Any = model.stages[-1]
    last.blocks = last.blocks[: len(last.blocks) - count]
