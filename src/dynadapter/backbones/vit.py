"""Vision Transformers: what timm's VisionTransformer, Eva, Beit and NaFlexVit share, and VisionTransformer's own.

VisionTransformer includes DeiT, DINOv2, MAE, CLIP and SigLIP. What the others have alone is in eva.py, beit.py and
naflex.py.
"""

from timm.models import vision_transformer
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from dynadapter.backbones.cut import (
    _check_grid,
    _count_prefix_tokens,
    _needs_grid,
    _same_forward,
    add_prefix_tokens,
    blocks,
    classify,
    convert,
    embed,
    finish,
    has_class_token,
    mean_tokens,
    needs_all_tokens,
    pools_mean,
    prefix_tokens,
    reads_class_row,
    tokens,
    widths,
)

Alike = VisionTransformer | Eva | Beit | NaFlexVit


@embed.register
def _(model: VisionTransformer, images: Tensor) -> Tensor:
    _same_forward(model, VisionTransformer)
    x = model.patch_embed(images)
    if model.dynamic_img_size and _needs_grid(model):  # (batch, rows, columns, width)
        _check_grid(x.shape[1:3], model.patch_embed.grid_size)
    x = model._pos_embed(x)  # adds the prefix tokens; the one private call
    return model.norm_pre(model.patch_drop(x))


@blocks.register
def _(model: VisionTransformer | Beit | NaFlexVit) -> list[tuple[nn.Module, ...]]:
    _same_forward(model, VisionTransformer | Beit | NaFlexVit)
    return [(block,) for block in model.blocks]


@finish.register
def _(model: Alike, x: Tensor) -> Tensor:
    return model.norm(x)


@tokens.register
def _(model: Alike, x: Tensor) -> Tensor:
    return x


@widths.register
def _(model: Alike) -> list[int]:
    return [model.embed_dim] * len(model.blocks)


@prefix_tokens.register
def _(model: Alike) -> int:
    return model.num_prefix_tokens


@add_prefix_tokens.register
def _(model: VisionTransformer, block: nn.Module | None, count: int) -> None:
    if block is None:
        _count_prefix_tokens(model, count)


@needs_all_tokens.register
def _(model: VisionTransformer) -> str | None:
    if model.global_pool == "prr":  # its pooling attends among all tokens and cannot count them
        return "prr pooling"
    # timm's own blocks treat tokens as a set; other blocks can use positions, such as rotary embeddings
    kinds = [type(getattr(block, "base_layer", block)) for block in model.blocks]
    return next((kind.__name__ for kind in kinds if kind.__module__ != vision_transformer.__name__), None)


@has_class_token.register
def _(model: Eva | Beit | NaFlexVit) -> bool:
    return model.global_pool == "token"


@has_class_token.register
def _(model: VisionTransformer) -> bool:
    # "prr" refines all tokens and then reads the class token where there is one; "map" attends to the patches
    return model.global_pool == "token" or (model.global_pool == "prr" and model.has_class_token)


@reads_class_row.register
def _(model: VisionTransformer) -> bool:
    return model.global_pool == "token" and model.has_class_token and type(model) is VisionTransformer


@pools_mean.register
def _(model: Alike) -> bool:
    return model.global_pool in ("avg", "avgmax")


@classify.register
def _(model: VisionTransformer, features: Tensor, logs: Tensor | None = None) -> Tensor:
    if logs is None or model.global_pool not in ("avg", "avgmax", "map"):  # the others read one token, or the greatest
        return model.forward_head(features)
    start = 0 if model.pool_include_prefix else model.num_prefix_tokens
    own, logs = features[:, start:], logs[:, start:]
    if model.global_pool == "map":
        pooled = model.attn_pool(own, attn_mask=logs[:, None, None])
    else:
        pooled = mean_tokens(own, logs)
        if model.global_pool == "avgmax":
            pooled = 0.5 * (pooled + own.amax(1))
    return model.head(model.head_drop(model.fc_norm(pooled)))


@convert.register
def _(model: VisionTransformer, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return vision_transformer.checkpoint_filter_fn(state, model, adapt_layer_scale=True)  # DeiT III names it otherwise
