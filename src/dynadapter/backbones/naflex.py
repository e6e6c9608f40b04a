"""NaFlexVit: timm's ViT for images of any size, here for batches of one size; with C-RADIO and SigLIP 2."""

from typing import Any

from timm.models.naflexvit import NaFlexVit
from torch import Tensor, nn

from dynadapter.backbones.cut import _check_grid, _needs_grid, _same_forward, _square, arguments, embed


@embed.register
def _(model: NaFlexVit, images: Tensor) -> Tensor:
    _same_forward(model, NaFlexVit)
    x, grid = model.embeds(images)
    if model.rope is not None or _needs_grid(model):
        _check_grid(grid)
    return model.norm_pre(x)


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
