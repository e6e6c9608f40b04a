"""BEiT, versions 1 and 2: Vision Transformers with a learned bias for each pair of relative positions."""

from typing import Any

import torch
from timm.models import beit
from timm.models.beit import Beit
from torch import Tensor, nn

from dynadapter.backbones.cut import (
    _same_forward,
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
def _(model: Beit, images: Tensor) -> Tensor:
    _same_forward(model, Beit)
    x = model.patch_embed(images)
    x = torch.cat((model.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
    return model.pos_drop(x if model.pos_embed is None else x + model.pos_embed)


@blocks.register
def _(model: Beit) -> list[tuple[nn.Module, ...]]:
    _same_forward(model, Beit)
    return [(block,) for block in model.blocks]


@arguments.register
def _(model: Beit, unit: tuple[nn.Module, ...], x: Tensor) -> dict[str, Any]:
    """Return the bias that all blocks share, if there is one."""
    return {} if model.rel_pos_bias is None else {"shared_rel_pos_bias": model.rel_pos_bias()}


@finish.register
def _(model: Beit, x: Tensor) -> Tensor:
    return model.norm(x)


@tokens.register
def _(model: Beit, x: Tensor) -> Tensor:
    return x


@widths.register
def _(model: Beit) -> list[int]:
    return [model.embed_dim] * len(model.blocks)


@prefix_tokens.register
def _(model: Beit) -> int:
    return model.num_prefix_tokens


@has_class_token.register
def _(model: Beit) -> bool:
    return model.global_pool == "token"


@pools_mean.register
def _(model: Beit) -> bool:
    return model.global_pool == "avg"


@convert.register
def _(model: Beit, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return beit.checkpoint_filter_fn(state, model)
