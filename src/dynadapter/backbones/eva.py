"""Vision Transformers with rotary embeddings: timm's Eva, with EVA-02, DINOv3, Perception Encoder and RoPE-ViT."""

from typing import Any

from timm.models.eva import Eva
from torch import Tensor, nn

from dynadapter.backbones.cut import (
    _check_grid,
    _count_prefix_tokens,
    _grid,
    _needs_grid,
    _same_forward,
    add_prefix_tokens,
    arguments,
    blocks,
    embed,
)


@embed.register
def _(model: Eva, images: Tensor) -> Tensor:
    _same_forward(model, Eva)
    x = model.patch_embed(images)
    if model.dynamic_img_size and (model.rope is not None or _needs_grid(model)):  # (batch, rows, columns, width)
        _check_grid(x.shape[1:3], model.patch_embed.grid_size)
    return model.norm_pre(model._pos_embed(x)[0])


@blocks.register
def _(model: Eva) -> list[tuple[nn.Module, ...]]:
    _same_forward(model, Eva)
    if model.patch_drop is not None:
        raise TypeError("Eva with patch_drop_rate drops other positions for each image; leave patch_drop_rate out")
    return [(block,) for block in model.blocks]


@arguments.register
def _(model: Eva, unit: tuple[nn.Module, ...], x: Tensor) -> dict[str, Any]:
    """Return the rotary embedding of the block, which depends only on the grid of patches."""
    rope: Any = model.rope
    if rope is None:
        return {}
    if hasattr(rope, "feat_shape") and not model.dynamic_img_size:
        rotary = rope.get_embed()
    else:
        rotary = rope.get_embed(shape=_grid(x.shape[1] - model.num_prefix_tokens, model.patch_embed.grid_size))
    if model.rope_mixed:  # each block has its own
        rotary = rotary[next(k for k, block in enumerate(model.blocks) if block is unit[0])]
    return {"rope": rotary}


@add_prefix_tokens.register
def _(model: Eva, block: nn.Module | None, count: int) -> None:
    found: Any = [getattr(one, "base_layer", one).attn for one in (model.blocks if block is None else (block,))]
    if block is None:
        _count_prefix_tokens(model, count)
    for inner in found:
        attention = getattr(inner, "base_layer", inner)  # without an adapter around it
        attention.num_prefix_tokens += count  # those without a rotary embedding
