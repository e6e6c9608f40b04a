"""timm's ByobNet: CLIP's ResNets, RepVGG, MobileOne, GCResNet, RegNetZ, BotNet, HaloNet, LambdaResNet and others."""

from timm.models import byobnet
from timm.models.byobnet import ByobNet
from torch import Tensor, nn

from dynadapter.backbones.cut import (
    _map_to_tokens,
    _out_channels,
    _same_forward,
    blocks,
    convert,
    embed,
    finish,
    tokens,
    widths,
)
from dynadapter.backbones.depth import _without_last_of_stages, remove_last_blocks


@embed.register
def _(model: ByobNet, images: Tensor) -> Tensor:
    _same_forward(model, ByobNet)
    return model.stem(images)


@blocks.register
def _(model: ByobNet) -> list[tuple[nn.Module, ...]]:
    _same_forward(model, ByobNet)
    return [(block,) for stage in model.stages for block in stage]  # the first block of a stage downsamples


@finish.register
def _(model: ByobNet, x: Tensor) -> Tensor:
    return model.final_conv(x)


@tokens.register
def _(model: ByobNet, x: Tensor) -> Tensor:
    return _map_to_tokens(x)


@widths.register
def _(model: ByobNet) -> list[int]:
    return [_out_channels(block) for stage in model.stages for block in stage]


@remove_last_blocks.register
def _(model: ByobNet, count: int) -> None:
    model.stages = _without_last_of_stages(model.stages, count)


@convert.register
def _(model: ByobNet, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return byobnet.checkpoint_filter_fn(state, model)
