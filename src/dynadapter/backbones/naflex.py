"""NaFlexVit: timm's ViT for images of any size, here for batches of one size; with C-RADIO and SigLIP 2."""

from typing import Any

from timm.models import naflexvit
from timm.models.naflexvit import NaFlexVit
from torch import Tensor, nn

from dynadapter.backbones.cut import (
    _same_forward,
    _square,
    arguments,
    blocks,
    convert,
    embed,
    finish,
    has_class_token,
    pools_mean,
    prefix_tokens,
    tokens,
    widths,
)


@embed.register
def _(model: NaFlexVit, images: Tensor) -> Tensor:
    _same_forward(model, NaFlexVit)
    return model.norm_pre(model.embeds(images)[0])


@blocks.register
def _(model: NaFlexVit) -> list[tuple[nn.Module, ...]]:
    _same_forward(model, NaFlexVit)
    return [(block,) for block in model.blocks]


@arguments.register
def _(model: NaFlexVit, unit: tuple[nn.Module, ...], x: Tensor) -> dict[str, Any]:
    """Return the rotary embedding of the block, if there is one."""
    rope: Any = model.rope
    if rope is None:
        return {}
    rotary = rope.get_embed(shape=_square(x.shape[1] - model.num_prefix_tokens))
    if model.rope_is_mixed:  # each block has its own
        rotary = rotary[next(k for k, block in enumerate(model.blocks) if block is unit[0])]
    return {"rope": rotary}


@finish.register
def _(model: NaFlexVit, x: Tensor) -> Tensor:
    return model.norm(x)


@tokens.register
def _(model: NaFlexVit, x: Tensor) -> Tensor:
    return x


@widths.register
def _(model: NaFlexVit) -> list[int]:
    return [model.embed_dim] * len(model.blocks)


@prefix_tokens.register
def _(model: NaFlexVit) -> int:
    return model.num_prefix_tokens


@has_class_token.register
def _(model: NaFlexVit) -> bool:
    return model.global_pool == "token"


@pools_mean.register
def _(model: NaFlexVit) -> bool:
    return model.global_pool in ("avg", "avgmax")


@convert.register
def _(model: NaFlexVit, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return naflexvit.checkpoint_filter_fn(state, model)
