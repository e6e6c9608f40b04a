"""MaxViT, CoAtNet and MaxxViT: convolutions, and attention in windows, grids or the whole image."""

from typing import Any

from timm.models import maxxvit
from timm.models.maxxvit import MaxxVit
from torch import Tensor, nn

from dynadapter.backbones.cut import (
    _same_forward,
    blocks,
    built_for,
    checkpointing,
    convert,
    embed,
    finish,
    size_step,
    tokens,
    widths,
)


@embed.register
def _(model: MaxxVit, images: Tensor) -> Tensor:
    _same_forward(model, MaxxVit)
    return model.stem(images)


@blocks.register
def _(model: MaxxVit) -> list[tuple[nn.Module, ...]]:
    _same_forward(model, MaxxVit)
    return [(block,) for stage in _stages(model) for block in stage.blocks]  # the first block of a stage downsamples


@finish.register
def _(model: MaxxVit, x: Tensor) -> Tensor:
    return model.norm(x)


@tokens.register
def _(model: MaxxVit, x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)  # (batch, channels, height, width) -> (batch, tokens, width)


@widths.register
def _(model: MaxxVit) -> list[int]:
    infos: Any = model.feature_info[1:]  # the first is the stem's
    return [info["num_chs"] for info, stage in zip(infos, _stages(model), strict=True) for _ in stage.blocks]


@checkpointing.register
def _(model: MaxxVit) -> bool:
    return any(stage.grad_checkpointing for stage in _stages(model))


@built_for.register
def _(model: MaxxVit) -> int | None:
    size = getattr(model, "img_size", None)  # timm before 1.0.27 does not store it
    return size[0] if size else None


@size_step.register
def _(model: MaxxVit) -> int:
    return 32  # so windows and grids fit the map of each stage


@convert.register
def _(model: MaxxVit, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return maxxvit.checkpoint_filter_fn(state, model)


def _stages(model: MaxxVit) -> Any:
    return model.stages  # timm declares a module or tensor
