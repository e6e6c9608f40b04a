"""Swin Transformers, versions 1 and 2."""

from timm.models import swin_transformer, swin_transformer_v2
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
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

Swin = SwinTransformer | SwinTransformerV2


@embed.register
def _(model: Swin, images: Tensor) -> Tensor:
    _same_forward(model, _family(model))
    return model.patch_embed(images)


@blocks.register
def _(model: Swin) -> list[tuple[nn.Module, ...]]:
    _same_forward(model, _family(model))
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


@checkpointing.register
def _(model: Swin) -> bool:
    return any(stage.grad_checkpointing for stage in model.layers)


@convert.register
def _(model: Swin, state: dict[str, Tensor]) -> dict[str, Tensor]:
    filters = swin_transformer_v2 if isinstance(model, SwinTransformerV2) else swin_transformer
    return filters.checkpoint_filter_fn(state, model)


def _family(model: Swin) -> type[nn.Module]:
    return SwinTransformerV2 if isinstance(model, SwinTransformerV2) else SwinTransformer
