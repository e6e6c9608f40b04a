"""The vision encoder of Qwen3-VL with timm's classifier, with or without the projector to the language model."""

from typing import Any

from timm.models import qwen3_vit
from timm.models.qwen3_vit import Qwen3VitClassifier
from torch import Tensor, nn

from dynadapter.backbones.cut import (
    _check_grid,
    _same_forward,
    _square,
    arguments,
    blocks,
    convert,
    embed,
    finish,
    tokens,
    widths,
)
from dynadapter.backbones.depth import remove_last_blocks


@embed.register
def _(model: Qwen3VitClassifier, images: Tensor) -> Tensor:
    _same_forward(model, Qwen3VitClassifier)
    x = model.encoder.patch_embed(images)  # (batch, rows, columns, width)
    _check_grid(x.shape[1:3])
    return model.encoder._pos_embed(x)[0]


@blocks.register
def _(model: Qwen3VitClassifier) -> list[tuple[nn.Module, ...]]:
    _same_forward(model, Qwen3VitClassifier)
    return [(block,) for block in model.encoder.blocks]


@arguments.register
def _(model: Qwen3VitClassifier, unit: tuple[nn.Module, ...], x: Tensor) -> dict[str, Any]:
    """Return the rotary embedding, which depends only on the grid of patches."""
    return {"rope": model.encoder.rope.get_embed(shape=list(_square(x.shape[1])))}


@finish.register
def _(model: Qwen3VitClassifier, x: Tensor) -> Tensor:
    x = x.unflatten(1, _square(x.shape[1]))
    return x if model.encoder.merger is None else model.encoder.merger(x)


@tokens.register
def _(model: Qwen3VitClassifier, x: Tensor) -> Tensor:
    return x


@widths.register
def _(model: Qwen3VitClassifier) -> list[int]:
    return [model.embed_dim] * len(model.encoder.blocks)


@remove_last_blocks.register
def _(model: Qwen3VitClassifier, count: int) -> None:
    model.encoder.blocks = model.encoder.blocks[: len(model.encoder.blocks) - count]


@convert.register
def _(model: Qwen3VitClassifier, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return qwen3_vit.checkpoint_filter_fn_classifier(state, model)
