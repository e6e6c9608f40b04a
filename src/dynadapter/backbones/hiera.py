"""Hiera: a transformer in stages, whose tokens are ordered by mask units and not by rows."""

import math
from typing import Any

from timm.models.hiera import Hiera
from torch import Tensor, nn

from dynadapter.backbones.cut import (
    _same_forward,
    blocks,
    built_for,
    embed,
    finish,
    size_step,
    tokens,
    widths,
)


@embed.register
def _(model: Hiera, images: Tensor) -> Tensor:
    _same_forward(model, Hiera)
    return model.unroll(model._pos_embed(model.patch_embed(images)))


@blocks.register
def _(model: Hiera) -> list[tuple[nn.Module, ...]]:
    _same_forward(model, Hiera)
    return [(block,) for block in model.blocks]


@finish.register
def _(model: Hiera, x: Tensor) -> Tensor:
    return x  # the norm belongs to the head


@tokens.register
def _(model: Hiera, x: Tensor) -> Tensor:
    """Return the tokens row by row; the number of tokens determines the stage and thereby their order."""
    count = int(x.shape[1])
    block = next(k for k, (_, size) in model.reroll.schedule.items() if math.prod(size) == count)
    return model.reroll(x, block).flatten(1, 2)


@widths.register
def _(model: Hiera) -> list[int]:
    blocks: Any = (getattr(block, "base_layer", block) for block in model.blocks)  # without adapters around them
    return [block.dim_out for block in blocks]


@built_for.register
def _(model: Hiera) -> int:
    return model.tokens_spatial_shape[0] * model.patch_stride[0]


@size_step.register
def _(model: Hiera) -> int:
    return model.patch_stride[0] * model.mask_unit_size[0]
