"""Swin Transformers."""

from timm.models import swin_transformer
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

from dynadapter.backbones.cut import (
    _same_forward,
    _staged_blocks,
    _staged_widths,
    blocks,
    checkpointing,
    convert,
    embed,
    finish,
    tokens,
    widths,
)


@embed.register
def _(model: SwinTransformer, images: Tensor) -> Tensor:
    _same_forward(model, SwinTransformer)
    return model.patch_embed(images)


@blocks.register
def _(model: SwinTransformer) -> list[tuple[nn.Module, ...]]:
    _same_forward(model, SwinTransformer)
    return _staged_blocks(model.layers)


@finish.register
def _(model: SwinTransformer, x: Tensor) -> Tensor:
    return model.norm(x)


@tokens.register
def _(model: SwinTransformer, x: Tensor) -> Tensor:
    return x.flatten(1, 2)  # (batch, height, width, channels) -> (batch, tokens, width)


@widths.register
def _(model: SwinTransformer) -> list[int]:
    return _staged_widths(model, model.layers)


@checkpointing.register
def _(model: SwinTransformer) -> bool:
    return any(stage.grad_checkpointing for stage in model.layers)


@convert.register
def _(model: SwinTransformer, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return swin_transformer.checkpoint_filter_fn(state, model)
