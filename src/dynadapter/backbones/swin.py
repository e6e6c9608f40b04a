"""Swin Transformers, versions 1 and 2."""

from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor, nn

from dynadapter.backbones.cut import (
    _same_forward,
    _staged_blocks,
    _staged_widths,
    blocks,
    embed,
    finish,
    tokens,
    widths,
)

Swin = SwinTransformer | SwinTransformerV2


@embed.register
def _(model: Swin, images: Tensor) -> Tensor:
    _same_forward(model, Swin)
    return model.patch_embed(images)


@blocks.register
def _(model: Swin) -> list[tuple[nn.Module, ...]]:
    _same_forward(model, Swin)
    return _staged_blocks(model.layers)


@finish.register
def _(model: Swin, x: Tensor) -> Tensor:
    return model.norm(x)


@tokens.register
def _(model: Swin, x: Tensor) -> Tensor:
    return x.flatten(1, 2)  # (batch, height, width, channels) -> (batch, tokens, width)


@widths.register
def _(model: Swin) -> list[int]:
    return _staged_widths(model, model.layers)
