"""Vision Transformers with rotary embeddings: timm's Eva, with EVA-02, DINOv3, Perception Encoder and RoPE-ViT."""

from typing import Any

from timm.models.eva import Eva
from torch import Tensor, nn

from dynadapter.backbones.cut import (
    _count_prefix_tokens,
    _same_forward,
    _square,
    add_prefix_tokens,
    arguments,
    blocks,
    embed,
)


@embed.register
def _(model: Eva, images: Tensor) -> Tensor:
    _same_forward(model, Eva)
    return model.norm_pre(model._pos_embed(model.patch_embed(images))[0])


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
        rotary = rope.get_embed(shape=_grid(model, x.shape[1] - model.num_prefix_tokens))
    if model.rope_mixed:  # each block has its own
        rotary = rotary[next(k for k, block in enumerate(model.blocks) if block is unit[0])]
    return {"rope": rotary}


def _grid(model: Eva, patches: int) -> tuple[int, int]:
    """Return rows and columns of the patches."""
    rows, columns = model.patch_embed.grid_size
    if rows * columns == patches:
        return rows, columns
    return _square(patches)


@add_prefix_tokens.register
def _(model: Eva, block: nn.Module | None, count: int) -> None:
    if block is None:
        _count_prefix_tokens(model, count)
    for one in model.blocks if block is None else (block,):
        attention: Any = one.attn
        attention.num_prefix_tokens += count  # those without a rotary embedding
