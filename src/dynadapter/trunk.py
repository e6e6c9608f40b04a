"""Frozen timm trunks, cut by functions: the only file that knows timm's families.

A trunk is a plain timm model. The functions here cut its forward pass into ``embed``, a list of ``blocks``, ``finish``
and ``classify``, so that a network can stop, read or route between any two blocks. Nothing is copied or stored: what
adapters replace inside the model is what runs. ``finish`` of all blocks of ``embed`` is bit-equal to timm's
``forward_features``, and ``classify`` of that to the model's own output.

The cut dispatches on the model's class. A new family registers its own ``embed``, ``blocks``, ``finish``, ``tokens``
and ``widths`` (and ``prefix_tokens``, ``has_class_token``, ``convert`` where the defaults do not fit).

timm's gradient checkpointing lives in the forward passes that are cut here, so ``set_grad_checkpointing`` has no effect
on a trunk that runs through these functions.
"""

import difflib
import hashlib
import inspect
import pickle
import re
from functools import singledispatch
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import timm
import torch
from timm.models import adapt_input_conv, convnext, get_pretrained_cfg, swin_transformer, vision_transformer
from timm.models import load_state_dict as read_checkpoint
from timm.models.convnext import ConvNeXt
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from dynadapter.packaged import find
from dynadapter.packaged import names as packaged_names

# The modules of timm whose models are of a family below; only for the names that an error message suggests.
_TIMM_MODULES = ("vision_transformer", "vision_transformer_hybrid", "deit", "swin_transformer", "convnext")


# ---- the cut: one question each, answered per family -----------------------------------------------------------------


@singledispatch
def embed(model: nn.Module, images: Tensor) -> Tensor:
    """Turns images into what the first block takes.

    Args:
        model: A timm model of a known family.
        images: (batch, channels, height, width).

    Returns:
        The family's own layout: ViT (batch, tokens, width), Swin (batch, height, width, channels), ConvNeXt
        (batch, channels, height, width).

    Raises:
        TypeError: If no cut is known for the model's class.
    """
    _unknown(model)


@singledispatch
def blocks(model: nn.Module) -> list[tuple[nn.Module, ...]]:
    """Lists the model's blocks.

    Returns:
        Per block the modules to apply in order, each with one tensor in and one out. Where a stage starts with a
        downsampling layer, that layer belongs to the stage's first block.

    Raises:
        TypeError: If no cut is known for the model's class.
    """
    _unknown(model)


@singledispatch
def finish(model: nn.Module, x: Tensor) -> Tensor:
    """Turns the last block's output into features, as the end of timm's ``forward_features`` does.

    Raises:
        TypeError: If no cut is known for the model's class.
    """
    _unknown(model)


@singledispatch
def tokens(model: nn.Module, x: Tensor) -> Tensor:
    """Reads any block's output as tokens.

    Args:
        model: A timm model of a known family.
        x: The output of a block, in the family's layout.

    Returns:
        (batch, tokens, width), the prefix tokens first and the grid's row by row.

    Raises:
        TypeError: If no cut is known for the model's class.
    """
    _unknown(model)


@singledispatch
def widths(model: nn.Module) -> list[int]:
    """Lists the channels after each block.

    Raises:
        TypeError: If no cut is known for the model's class.
    """
    _unknown(model)


@singledispatch
def prefix_tokens(model: nn.Module) -> int:
    """Counts the tokens in front of the image's own: class, distillation, registers; a family may have none."""
    return 0


@singledispatch
def needs_all_tokens(model: nn.Module) -> str | None:
    """Names what in the model must have every token of the image in its place; None where some may go on the way."""
    return type(model).__name__


@singledispatch
def has_class_token(model: nn.Module) -> bool:
    """Says whether the model's own head reads a class token (the first one); a model may carry one and not read it."""
    return False


@singledispatch
def reads_class_row(model: nn.Module) -> bool:
    """Says whether the model's own norm, pooling and head need no row but the first of the last block's output."""
    return False


@singledispatch
def convert(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gives a checkpoint timm's names and this model's resolution, by the family's own filter in timm."""
    return state


def pool(model: nn.Module, features: Tensor) -> Tensor:
    """Pools features into what the classifier reads, (batch, width), as timm does it."""
    return model.forward_head(features, pre_logits=True)  # type: ignore[operator]


def classify(model: nn.Module, features: Tensor) -> Tensor:
    """Turns features into logits (batch, classes) by the model's own pooling and classifier."""
    return model.forward_head(features)  # type: ignore[operator]


def classifier(model: nn.Module) -> list[nn.Module]:
    """Lists the model's final linear layers: one, two for a distilled DeiT, none for a model without classes."""
    return [layer for layer in _classifier_layers(model).values() if not isinstance(layer, nn.Identity)]


# ---- VisionTransformer: ViT, DeiT, DINOv2, and the names of MAE, CLIP and SigLIP -------------------------------------


@embed.register
def _(model: VisionTransformer, images: Tensor) -> Tensor:
    _same_forward(model, VisionTransformer)
    x = model._pos_embed(model.patch_embed(images))  # adds the prefix tokens; the one private call
    return model.norm_pre(model.patch_drop(x))


@blocks.register
def _(model: VisionTransformer) -> list[tuple[nn.Module, ...]]:
    _same_forward(model, VisionTransformer)
    return [(block,) for block in model.blocks]


@finish.register
def _(model: VisionTransformer, x: Tensor) -> Tensor:
    return model.norm(x)


@tokens.register
def _(model: VisionTransformer, x: Tensor) -> Tensor:
    return x


@widths.register
def _(model: VisionTransformer) -> list[int]:
    return [model.embed_dim] * len(model.blocks)


@prefix_tokens.register
def _(model: VisionTransformer) -> int:
    return model.num_prefix_tokens


@needs_all_tokens.register
def _(model: VisionTransformer) -> str | None:
    # To timm's own blocks tokens are a set; one of somebody else's may know positions, as by rotary embeddings
    kinds = [type(block) for block in model.blocks]
    return next((kind.__name__ for kind in kinds if kind.__module__ != vision_transformer.__name__), None)


@has_class_token.register
def _(model: VisionTransformer) -> bool:
    # "prr" refines all tokens and then reads the class token where there is one; "map" attends to the patches
    return model.global_pool == "token" or (model.global_pool == "prr" and model.has_class_token)


@reads_class_row.register
def _(model: VisionTransformer) -> bool:
    return model.global_pool == "token" and model.has_class_token and type(model) is VisionTransformer


@convert.register
def _(model: VisionTransformer, state: dict) -> dict[str, Tensor]:
    return vision_transformer.checkpoint_filter_fn(state, model, adapt_layer_scale=True)  # DeiT III names it otherwise


# ---- the class token first: what a ViT's head needs of a block, and the rest of it -----------------------------------


_TOKEN_WISE = (timm.layers.Mlp, timm.layers.GluMlp, timm.layers.SwiGLU)
"""MLPs that treat each token by itself."""


def splits(model: nn.Module, unit: tuple[nn.Module, ...]) -> bool:
    """Says whether :func:`class_row` and :func:`other_rows` may replace a block whose class token alone is read.

    They may where everything but attention works token by token: in timm's plain pre-norm ViT block, with adapters on
    its qkv, its output projection or its MLP, or without. A hook on the block itself is then not called.
    """
    block = unit[-1]
    if type(block) is not vision_transformer.Block or len(unit) > 1 or not isinstance(model, VisionTransformer):
        return False
    attention, mlp = block._modules["attn"], block._modules["mlp"]  # asked at every exit of every batch, hence so
    if type(attention) is not vision_transformer.Attention:
        return False
    inner = attention._modules
    return (
        inner.get("gate") is None
        and (isinstance(inner["qkv"], nn.Linear) or hasattr(inner["qkv"], "some"))
        and isinstance(getattr(mlp, "base_layer", mlp), _TOKEN_WISE)
    )


def run(module: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Applies a module of a block's unit; the result is the module's own, bit for bit.

    Without gradients timm's plain ViT block is run in fewer steps: what does nothing in evaluation is not called, plain
    layers are functions of their tensors, and tensors in the middle are written again instead of new ones. On a CPU
    that takes up to a tenth off a block's time, most of all for one or two images, as deep stages get them. A block or
    a layer with a hook, a compiled one, or one with a forward of its own runs as it is.

    Args:
        module: One of :func:`blocks`' modules.
        x: Its input, which is left as it is.
        bias: (batch, tokens), added to the attention scores of each token as a key; for timm's ViT blocks.
    """
    mask = None if bias is None else _mask(bias, x.shape[1])
    if type(module) is not vision_transformer.Block or not _reuses() or _changed(module) or module.training:
        return module(x) if mask is None else module(x, attn_mask=mask)
    parts: Any = module._modules  # a module looks its attributes up in Python, which would cost what is gained here
    attention = parts["attn"]
    inner: Any = attention._modules
    plain = type(attention) is vision_transformer.Attention and attention.fused_attn and inner.get("gate") is None
    if not plain or _changed(attention):
        return module(x) if mask is None else module(x, attn_mask=mask)
    batch, tokens, _ = x.shape
    qkv = _direct(inner["qkv"], _direct(parts["norm1"], x))
    qkv = qkv.reshape(batch, tokens, 3, attention.num_heads, attention.head_dim)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    q, k = _called(inner["q_norm"], q), _called(inner["k_norm"], k)
    mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return _rest(module, x, mixed.transpose(1, 2).reshape(batch, tokens, -1))


def _mask(bias: Tensor, queries: int) -> Tensor:
    """What attention adds to its scores (batch, heads, queries, keys): a view of one row for all heads and queries."""
    return bias[:, None, None].expand(-1, 1, queries, -1)


def class_row(block: Any, x: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Computes a block's output for the class token alone.

    Keys and values are needed of all tokens; query, output projection and MLP of the first row only. Of a block's
    multiply-adds this is little more than a sixth.

    Args:
        block: A block that :func:`splits`.
        x: Its input (batch, tokens, width).
        bias: As in :func:`run`.

    Returns:
        The output's first row (batch, 1, width), and what :func:`other_rows` needs: keys beside values (batch, tokens,
        2 * width of attention).
    """
    attention, normed = block.attn, block.norm1(x)
    inner = attention.num_heads * attention.head_dim
    keys_values = _some(attention.qkv, normed, inner, 3 * inner)
    # Two dimensions are one product with the bias in it; an exported graph keeps three, as all that int8 looks for.
    first = normed[:, 0] if _reuses() else normed[:, :1]
    query = _some(attention.qkv, first, 0, inner).view(-1, 1, inner)
    return _after_attention(block, x[:, :1], _attend(attention, query, keys_values, bias)), keys_values


def other_rows(block: Any, x: Tensor, keys_values: Tensor, bias: Tensor | None = None) -> Tensor:
    """Finishes a block that :func:`class_row` has begun, for the samples that go on.

    The class token's row is computed once more, which costs less than putting the rows together would.

    Args:
        block: The same block.
        x: The block's input (batch, tokens, width) of those samples.
        keys_values: What :func:`class_row` gave, of those samples.
        bias: As in :func:`run`, of those samples.

    Returns:
        The block's output (batch, tokens, width).
    """
    attention = block.attn
    query = _some(attention.qkv, block.norm1(x), 0, attention.num_heads * attention.head_dim)
    return _after_attention(block, x, _attend(attention, query, keys_values, bias))


def _some(layer: Any, x: Tensor, start: int, stop: int) -> Tensor:
    """Some of a linear layer's outputs, of a wrapped one by its own word for it."""
    if isinstance(layer, nn.Linear):
        bias = None if layer.bias is None else layer.bias[start:stop]
        return nn.functional.linear(x, layer.weight[start:stop], bias)
    return layer.some(x, start, stop)


def _attend(attention: Any, query: Tensor, keys_values: Tensor, bias: Tensor | None) -> Tensor:
    """Attention as timm does it, for some queries (batch, queries, inner) and all (batch, tokens, 2 * inner)."""
    heads, width, parts = attention.num_heads, attention.head_dim, attention._modules
    batch, queries, inner = query.shape
    q = _called(parts["q_norm"], query.view(batch, queries, heads, width).transpose(1, 2))
    k, v = keys_values.view(batch, -1, 2, heads, width).permute(2, 0, 3, 1, 4).unbind(0)
    k = _called(parts["k_norm"], k)
    mask = None if bias is None else _mask(bias, queries)
    mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=attention.scale)
    return mixed.transpose(1, 2).reshape(batch, queries, inner)


def _after_attention(block: Any, x: Tensor, mixed: Tensor) -> Tensor:
    """What a block does in evaluation with the rows that attention gave: projection, both residual sums, the MLP."""
    if not _reuses():
        attention = block.attn
        x = x + block.drop_path1(block.ls1(attention.proj_drop(attention.proj(attention.norm(mixed)))))
        return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
    return _rest(block, x, mixed)


def _rest(block: Any, x: Tensor, mixed: Tensor) -> Tensor:
    """The same where tensors may be written again."""
    parts = block._modules
    inner = parts["attn"]._modules
    x = _added(_called(parts["ls1"], _direct(inner["proj"], _called(inner["norm"], mixed))), x)
    return _added(_called(parts["ls2"], _mlp(parts["mlp"], _direct(parts["norm2"], x))), x)


def _mlp(mlp: Any, x: Tensor) -> Tensor:
    """An MLP in evaluation, whose activation takes the place of what it reads."""
    if type(mlp) is not timm.layers.Mlp or _changed(mlp):
        return mlp(x)
    parts: Any = mlp._modules
    act = parts["act"]
    if type(act) is not nn.GELU or _changed(act):
        return mlp(x)
    hidden = torch._C._nn.gelu_(_direct(parts["fc1"], x), approximate=act.approximate)  # type: ignore[attr-defined]
    return _direct(parts["fc2"], _called(parts["norm"], hidden))


def _called(layer: nn.Module, x: Tensor) -> Tensor:
    return x if type(layer) is nn.Identity else layer(x)


def _direct(layer: Any, x: Tensor) -> Tensor:
    """Applies a layer; a plain linear one or norm as a function of its tensors, for a module's call takes longer."""
    kind = type(layer)
    if kind is nn.Linear and not _changed(layer):
        own = layer._parameters
        return nn.functional.linear(x, own["weight"], own["bias"])
    if (kind is nn.LayerNorm or (kind is timm.layers.LayerNorm and not layer._fast_norm)) and not _changed(layer):
        own = layer._parameters
        return torch.layer_norm(x, layer.normalized_shape, own["weight"], own["bias"], layer.eps)
    return layer(x)


def _added(fresh: Tensor, x: Tensor) -> Tensor:
    """Adds to what a layer has just made, in its place unless autocast has given it another type."""
    return fresh.add_(x) if fresh.dtype == x.dtype else x + fresh


def _reuses() -> bool:
    """Says whether tensors may be written again: no gradient needs them, nobody traces, or watches all modules."""
    return not (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or nn.modules.module._has_any_global_hook()
    )


def _changed(module: nn.Module) -> bool:
    """Says whether somebody has changed how a module is called."""
    hooked = module._forward_hooks or module._forward_pre_hooks
    return bool(hooked) or module._compiled_call_impl is not None or "forward" in module.__dict__


# ---- SwinTransformer -------------------------------------------------------------------------------------------------


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


@convert.register
def _(model: SwinTransformer, state: dict) -> dict[str, Tensor]:
    return swin_transformer.checkpoint_filter_fn(state, model)


# ---- ConvNeXt, versions 1 and 2 --------------------------------------------------------------------------------------


@embed.register
def _(model: ConvNeXt, images: Tensor) -> Tensor:
    _same_forward(model, ConvNeXt)
    return model.stem(images)


@blocks.register
def _(model: ConvNeXt) -> list[tuple[nn.Module, ...]]:
    _same_forward(model, ConvNeXt)
    return _staged_blocks(model.stages)


@finish.register
def _(model: ConvNeXt, x: Tensor) -> Tensor:
    return model.norm_pre(x)


@tokens.register
def _(model: ConvNeXt, x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)  # (batch, channels, height, width) -> (batch, tokens, width)


@widths.register
def _(model: ConvNeXt) -> list[int]:
    return _staged_widths(model, model.stages)


@convert.register
def _(model: ConvNeXt, state: dict) -> dict[str, Tensor]:
    state = convnext.checkpoint_filter_fn(state, model)
    if not any(name.startswith(("head.fc.", "head.norm.")) for name in state):
        # A file of masked pre-training ends before the head, whose norm then starts as the identity, as in timm.
        state |= {name: own for name, own in model.state_dict().items() if name.startswith("head.norm.")}
    return state


# ---- shared by the families ------------------------------------------------------------------------------------------


def _staged_blocks(stages: nn.Sequential) -> list[tuple[nn.Module, ...]]:
    """Lists the blocks of all stages, each stage's downsampling in front of its first block."""
    units: list[tuple[nn.Module, ...]] = []
    stage: Any
    for stage in stages:
        first, *rest = stage.blocks
        downsample = () if isinstance(stage.downsample, nn.Identity) else (stage.downsample,)
        units += [(*downsample, first), *((block,) for block in rest)]
    return units


def _staged_widths(model: nn.Module, stages: nn.Sequential) -> list[int]:
    """Repeats each stage's channels for each of its blocks."""
    infos: Any = model.feature_info
    depths = [len(stage.blocks) for stage in stages]  # type: ignore[arg-type]
    return [info["num_chs"] for info, depth in zip(infos, depths, strict=True) for _ in range(depth)]


def _same_forward(model: nn.Module, family: type[nn.Module]) -> None:
    """Refuses a subclass with a forward pass of its own, which a cut of the family's would silently drop."""
    for method in ("forward", "forward_features"):
        if getattr(type(model), method) is not getattr(family, method):
            _unknown(model, f", whose {method} is not {family.__name__}'s")


def _unknown(model: nn.Module, why: str = "") -> NoReturn:
    known = sorted(family.__name__ for family in blocks.registry if family is not object)
    raise TypeError(
        f"no cut is known for {type(model).__name__}{why}; known: {known}. Choose a timm model of these classes, "
        "or register embed, blocks, finish, tokens and widths of dynadapter.trunk for yours"
    )


def _classifier_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Names the classifier's layers, identities included."""
    layers: Any = model.get_classifier()  # type: ignore[operator]
    wanted = set(layers) if isinstance(layers, tuple | list) else {layers}
    return {name: module for name, module in model.named_modules() if module in wanted}


# ---- creation --------------------------------------------------------------------------------------------------------


def create_trunk(
    name: str,
    num_classes: int,
    *,
    pretrained: bool = False,
    weights: str | Path | None = None,
    image_size: int | None = None,
    seed: int = 0,
    **timm_args: Any,
) -> nn.Module:
    """Creates a timm model as a trunk: frozen except for its classifier, and in evaluation mode.

    The trunk stays in evaluation mode in an :class:`~dynadapter.net.ExitNet`, so ``drop_path_rate``, ``proj_drop_rate``
    and the like are accepted but inactive: what is frozen is not regularised.

    >>> trunk = create_trunk("vit_tiny_patch16_224", num_classes=10, img_size=32, patch_size=8, depth=2)
    >>> [name for name, parameter in trunk.named_parameters() if parameter.requires_grad]
    ['head.weight', 'head.bias']

    Args:
        name: Any timm name of a known family, with tag or without (``vit_base_patch16_224.augreg_in21k``), or
            ``hf-hub:owner/name``, or ``local-dir:folder``, or a trunk that ships with the package (``micro``).
        num_classes: Classes of the model's own classifier.
        pretrained: Whether timm fetches the weights that belong to the name, or takes them from its cache; those of a
            packaged trunk are at hand.
        weights: A local file instead, which wins over ``pretrained``: ``.safetensors``, a PyTorch file (``.pth``,
            ``.pt``, ``.bin``; tensors only, no code) or Google's ``.npz`` for ViT. Names, patch size, position
            embedding, windows and input channels are adapted by timm's own functions; a classifier of another class
            count is left out, and everything else has to fit.
        image_size: Height and width of the images in pixels, for the families that are built for one size; the others
            take any. An ``img_size`` among ``timm_args`` wins over it.
        seed: Decides what the weights do not: the new classifier, and without weights every tensor. The same arguments
            rebuild the same tensors; the global random state is neither used nor changed.
        timm_args: Further arguments of timm's model: ``img_size``, ``patch_size``, ``global_pool``, ``in_chans`` ...

    Returns:
        The model on the CPU.

    Raises:
        ValueError: If timm has no such name, an argument is wrong, or weights cannot be fetched, read or fitted.
        TypeError: If no cut is known for the model's class.
    """
    asked, packaged = name, find(name)
    if packaged is not None:
        name, timm_args = packaged.architecture, packaged.settings(timm_args, image_size)
        weights = packaged.weights() if pretrained and weights is None else weights
    _check_name(name)
    if num_classes < 0:
        raise ValueError(
            f"num_classes={num_classes} must be the number of classes, or 0 for a model without classifier"
        )
    if timm_args.get("global_pool") == "":
        raise ValueError("global_pool='' leaves features unpooled; choose 'avg', 'token' ..., or leave it out")
    # Wrong names, arguments and families show in this first build, before anything is downloaded.
    model = _build(name, num_classes, seed, timm_args)
    blocks(model)
    if image_size is not None and timm_args.get("img_size") is None and built_for(model) not in (None, image_size):
        timm_args["img_size"] = image_size
        model = _build(name, num_classes, seed, timm_args)
        patch = model.patch_embed.patch_size[0]  # type: ignore[union-attr, index]
        if image_size % patch:
            raise ValueError(
                f"image_size={image_size} is no multiple of the patch size {patch} of {name!r}, and pixels at the "
                f"border would be lost; choose {image_size // patch * patch} or {(image_size // patch + 1) * patch}"
            )
    if weights is not None:
        _load_weights(model, asked, Path(weights).expanduser())
    elif pretrained:
        model = _build(name, num_classes, seed, timm_args, pretrained=True)
    freeze(model)
    return model.eval()


def built_for(model: nn.Module) -> int | None:
    """Gives the image size in pixels (the height) that the model was built for; None where it takes any."""
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    return size[0] if size else None


def freeze(model: nn.Module) -> None:
    """Stops the gradients of all parameters but the classifier's; to be called before adapters are injected."""
    model.requires_grad_(False)
    for layer in classifier(model):
        layer.requires_grad_(True)


def fingerprint(model: nn.Module) -> str:
    """Names the frozen tensors by a hash, so that files made for one trunk are not used with another.

    It covers name, shape, type and bytes of every tensor of the state dict except the classifier's; the device, the
    memory layout and the order of the tensors play no part. Adapters change the names: to be called before injection.

    Returns:
        The SHA-256 as 64 hexadecimal digits.
    """
    own_head = tuple(f"{name}." for name in _classifier_layers(model))
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not name.startswith(own_head):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            # As bytes, because numpy knows no bfloat16
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _check_name(name: str) -> None:
    """Refuses a name or a tag that timm does not have, with the nearest ones that it has."""
    if ":" in name:  # a folder or a repository: timm looks there
        return
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        names = [model for module in _TIMM_MODULES for model in timm.list_models(module=module)]
        near = difflib.get_close_matches(architecture, [*packaged_names(), *names], n=3)
        hint = (
            f"the nearest are {', '.join(near)}" if near else f"names start with {', '.join(_TIMM_MODULES[2:])} or vit"
        )
        raise ValueError(
            f"timm has no model {name!r}; {hint}; timm.list_models('*part*') lists all, 'hf-hub:owner/name' and "
            "'local-dir:folder' name models elsewhere"
        )
    try:
        get_pretrained_cfg(name)
    except RuntimeError:
        tags = [known.partition(".")[2] for known in timm.list_models(f"{architecture}.*", pretrained=True)]
        near = difflib.get_close_matches(tag, tags, n=3, cutoff=0.0)
        raise ValueError(
            f"timm has no weights {tag!r} for {architecture}; there are {', '.join(near) or 'none'}; "
            "without a tag timm takes its default"
        ) from None


def _build(name: str, num_classes: int, seed: int, timm_args: dict[str, Any], pretrained: bool = False) -> nn.Module:
    """Lets timm build the model from a seed, on the CPU whatever the surrounding default device is."""
    try:
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            # torch.manual_seed would also seed the accelerators, which a fork without devices does not restore
            torch.random.default_generator.manual_seed(seed)
            return timm.create_model(name, pretrained=pretrained, num_classes=num_classes, **timm_args)
    except Exception as error:  # assertions, TypeErrors, network and file errors of many libraries
        said = _one_line(error)
        wrong = re.search(r"unexpected keyword argument '(\w+)'", said)
        if wrong:
            raise ValueError(_wrong_argument(name, wrong[1])) from error
        # timm reads the configuration of a model on the hub first, with weights or without
        if pretrained or (name.startswith("hf") and isinstance(error, OSError)):
            raise ValueError(
                f"the pretrained weights of {_full_name(name)!r} could not be fetched ({said}); without a network they "
                "have to be in the cache of the Hugging Face hub, or give a local file as weights='...'"
            ) from error
        raise ValueError(f"timm cannot build {name!r} with {timm_args or 'its defaults'} ({said})") from error


def _full_name(name: str) -> str:
    """Adds the tag that timm takes by default."""
    config = None if ":" in name else get_pretrained_cfg(name)
    return f"{config.architecture}.{config.tag}" if config and config.tag else name


def _wrong_argument(name: str, argument: str) -> str:
    if argument == "img_size":
        return f"{name!r} takes no img_size, because it works on images of any size; leave it out"
    known = {key for family in blocks.registry for key in inspect.signature(family).parameters if family is not object}
    near = difflib.get_close_matches(argument, sorted(known - {argument}), n=3)
    hint = f"the nearest in timm are {', '.join(near)}" if near else "see the class's arguments in timm"
    return f"{name!r} takes no argument {argument!r}; {hint}"


# ---- local weight files ----------------------------------------------------------------------------------------------

_WHAT_FITS = "give the timm name and arguments that the file was made with"


def _load_weights(model: nn.Module, name: str, path: Path) -> None:
    """Fits a local weight file to the model; every tensor but the classifier's has to be there, and nothing else."""
    if not path.is_file():
        raise ValueError(f"weights={str(path)!r} is not a file; give an existing .safetensors, .pth, .pt, .bin or .npz")
    if path.suffix.lower() == ".npz":
        _load_npz(model, name, path)
        return
    state = _read(path)
    try:
        state = _fit_classifier(model, _fit_input(model, convert(model, state)))
    except Exception as error:  # timm's filters trip in many ways over tensors of another architecture
        raise ValueError(f"weights={str(path)!r} do not fit {name!r} ({_one_line(error)}); {_WHAT_FITS}") from error
    _check_fit(model, name, path, state)
    model.load_state_dict(state)


def _read(path: Path) -> dict[str, Tensor]:
    """Reads tensors and nothing else: no code of the file is run."""
    try:
        return read_checkpoint(str(path), weights_only=True)
    except Exception as error:  # torch, zipfile, pickle and safetensors each have their own
        if any(isinstance(cause, pickle.UnpicklingError) for cause in (error, error.__cause__, error.__context__)):
            raise ValueError(
                f"weights={str(path)!r} would have to run code to be read, which is refused, or it is damaged; if you "
                "trust it, load it yourself and save its state dict as .safetensors"
            ) from error
        raise ValueError(
            f"weights={str(path)!r} cannot be read ({_one_line(error)}); it is damaged or holds no weights: fetch it "
            "again, or give another file"
        ) from error


def _fit_input(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Adapts the first convolution of a colour model to another number of input channels, as timm does."""
    config: Any = model.pretrained_cfg
    key = f"{config['first_conv']}.weight"
    weight, own = state.get(key), model.state_dict().get(key)
    if weight is not None and own is not None and weight.ndim == 4 and weight.shape[1] == 3 != own.shape[1]:
        state[key] = adapt_input_conv(own.shape[1], weight)
    return state


def _fit_classifier(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Puts the model's own classifier where the file has none, or one of another class count."""
    own = model.state_dict()
    for layer in _classifier_layers(model):
        weight = state.get(f"{layer}.weight")
        if weight is None or len(weight) != model.num_classes:
            state = {key: tensor for key, tensor in state.items() if not key.startswith(f"{layer}.")}
            state |= {key: tensor for key, tensor in own.items() if key.startswith(f"{layer}.")}
    return state


def _check_fit(model: nn.Module, name: str, path: Path, state: dict[str, Tensor]) -> None:
    """Raises one line that counts and names what does not fit."""
    own = model.state_dict()
    faults = {
        "missing": [key for key in own if key not in state],
        "unknown": [key for key in state if key not in own],
        "of another shape": [
            f"{key} {tuple(state[key].shape)} instead of {tuple(tensor.shape)}"
            for key, tensor in own.items()
            if key in state and state[key].shape != tensor.shape
        ],
    }
    told = [
        f"{len(found)} {fault} ({', '.join(found[:3])}{', ...' if len(found) > 3 else ''})"
        for fault, found in faults.items()
        if found
    ]
    if told:
        raise ValueError(f"weights={str(path)!r} do not fit {name!r}: {'; '.join(told)}; {_WHAT_FITS}")


def _load_npz(model: nn.Module, name: str, path: Path) -> None:
    """Loads Google's JAX layout by timm's own function, which only ViT has."""
    load: Any = getattr(model, "load_pretrained", None)
    if load is None:
        raise ValueError(
            f"weights={str(path)!r} do not fit {name!r}: .npz is the layout of Google's ViT, and this is a "
            f"{type(model).__name__}; give a .safetensors, .pth, .pt or .bin file"
        )
    try:
        held, depth = _npz_depth(path), len(blocks(model))
        if held != depth:  # timm's function would drop the last blocks of a deeper file without a word
            raise ValueError(f"{held} blocks instead of {depth}")
        load(str(path))
    except Exception as error:  # a missing array is a KeyError, another shape a RuntimeError ...
        raise ValueError(
            f"weights={str(path)!r} do not fit {name!r} ({_one_line(error)}); the file is damaged, or not Google's ViT "
            "of this size"
        ) from error


def _npz_depth(path: Path) -> int:
    """Counts the blocks in Google's layouts, which have one array per block or stack all blocks in one."""
    with path.open("rb") as file, np.load(file) as arrays:
        stacked = [key for key in arrays.files if key.endswith("Transformer/encoderblock/LayerNorm_0/scale")]
        if stacked:
            return len(arrays[stacked[0]])
        return len({found[1] for key in arrays.files if (found := re.search(r"encoderblock_(\d+)/", key))})


def _one_line(error: Exception) -> str:
    """The kind of an error and the first sentence of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].split('. ')[0]}" if lines else type(error).__name__
