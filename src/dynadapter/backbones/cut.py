"""The functions that cut a timm model into blocks, dispatched on its family by ``functools.singledispatch``.

A backbone is a plain timm model. These functions cut its forward pass into ``embed``, a list of ``blocks``, ``finish``
and ``classify``, so that a network can stop, read or route between any two blocks. Nothing is copied: the modules of
the model run, with their adapters. ``finish`` of all blocks of ``embed`` is bit-equal to timm's ``forward_features``,
and ``classify`` of that to the model's own output.

The functions dispatch on the model's class. A new family, in this package or another one, registers all functions in
``REQUIRED``, and those in ``OPTIONAL`` whose defaults do not fit.
"""

import math
import sys
from functools import singledispatch
from typing import Any, NoReturn

import torch
from torch import Tensor, nn


@singledispatch
def embed(model: nn.Module, images: Tensor) -> Tensor:
    """Convert images into the input of the first block.

    Args:
        model: A timm model of a known family.
        images: (batch, channels, height, width); of a family of videos (batch, frames, channels, height, width).

    Returns:
        The family's own layout: ViT (batch, tokens, width), Swin (batch, height, width, channels), ConvNeXt
        and other convolutional networks (batch, channels, height, width).

    Raises:
        TypeError: If no cut is known for the model's class.
    """
    _unknown(model)


@singledispatch
def blocks(model: nn.Module) -> list[tuple[nn.Module, ...]]:
    """List the model's blocks.

    Returns:
        For each block the modules to apply in order, each with one tensor in and one out. If a stage starts with a
        downsampling layer, that layer belongs to the stage's first block.

    Raises:
        TypeError: If no cut is known for the model's class.
    """
    _unknown(model)


@singledispatch
def finish(model: nn.Module, x: Tensor) -> Tensor:
    """Convert the last block's output into features, like the end of timm's ``forward_features`` does.

    Raises:
        TypeError: If no cut is known for the model's class.
    """
    _unknown(model)


@singledispatch
def tokens(model: nn.Module, x: Tensor) -> Tensor:
    """Convert the output of any block into tokens.

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
    """List the channels after each block.

    Raises:
        TypeError: If no cut is known for the model's class.
    """
    _unknown(model)


@singledispatch
def prefix_tokens(model: nn.Module) -> int:
    """Count the tokens in front of the patch tokens: class, distillation and register tokens."""
    return 0


@singledispatch
def arguments(model: nn.Module, unit: tuple[nn.Module, ...], x: Tensor) -> dict[str, Any]:
    """Return the further arguments of the modules of a block, after ``x``, such as rotary embeddings."""
    return {}


@singledispatch
def checkpointing(model: nn.Module) -> bool:
    """Check whether timm's ``set_grad_checkpointing`` is on, in the model, its parts or its stages."""
    parts = (part for child in model.children() for part in (child, *child.children()))
    return any(part.__dict__.get("grad_checkpointing", False) for part in (model, *parts))


@singledispatch
def pools_mean(model: nn.Module) -> bool:
    """Check whether the model's own head reads a mean of the patch tokens, as in MAE."""
    return not has_class_token(model)


@singledispatch
def add_prefix_tokens(model: nn.Module, block: nn.Module | None, count: int) -> None:
    """Prepare the model for more tokens between the prefix tokens and the patches: in one block, or from the first
    block on.

    A family registers it if its blocks attend among all tokens, whatever their number.

    Args:
        model: A timm model of such a family.
        block: One of its blocks; None for tokens in front of the first block, which pass all of them.
        count: Number of tokens.

    Raises:
        TypeError: If the family has not registered it.
        ValueError: If the model's settings do not allow it.
    """
    raise TypeError(f"{type(model).__name__} does not take more tokens than those of its patches")


def takes_prefix_tokens(model: nn.Module) -> bool:
    """Check whether the family has registered :func:`add_prefix_tokens`."""
    return not _is_default(add_prefix_tokens, model)


@singledispatch
def needs_all_tokens(model: nn.Module) -> str | None:
    """Return the name of the part that needs every patch token in its place; None if tokens can be merged."""
    return type(model).__name__


@singledispatch
def has_class_token(model: nn.Module) -> bool:
    """Check whether the model's own head reads the class token, the first token."""
    return False


@singledispatch
def reads_class_row(model: nn.Module) -> bool:
    """Check whether norm, pooling and head of the model need only the first row of the last block's output."""
    return False


@singledispatch
def convert(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert a checkpoint to timm's names and this model's resolution with timm's filter for the family."""
    modules = (sys.modules[kind.__module__] for kind in type(model).__mro__)
    filters = next((found for one in modules if (found := getattr(one, "checkpoint_filter_fn", None))), None)
    return state if filters is None else filters(state, model)


@singledispatch
def built_for(model: nn.Module) -> int | None:
    """Return the height in pixels that the model was built for, or None if it takes any size."""
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    return size[0] if size else None


@singledispatch
def size_step(model: nn.Module) -> int:
    """Return the patch size: the height that a model is built for must be a multiple of it."""
    patch: Any = model.patch_embed
    return int(patch.patch_size[0])


def fixed_size(model: nn.Module) -> int | None:
    """Return the height and width in pixels that images must have, or None if the model takes several sizes.

    Raises:
        ValueError: The model was built for images that are not square.
    """
    embed = getattr(model, "patch_embed", None)
    if not getattr(embed, "strict_img_size", True):
        return None
    size = getattr(embed, "img_size", None) or getattr(model, "img_size", None)
    if isinstance(size, tuple) and len(set(size)) > 1:
        raise ValueError(f"img_size={size}: the backbone was built for images that are not square; give one number")
    return built_for(model)


@singledispatch
def frames(model: nn.Module) -> int | None:
    """Return the frames of a clip, for a model that takes videos; None for one that takes images."""
    return None


def input_shape(model: nn.Module, height: int, width: int) -> tuple[int, ...]:
    """Return the shape of the model's input: (channels, height, width); clips: (frames, channels, height, width)."""
    clip = frames(model)
    image = (in_chans(model) or 3, height, width)
    return image if clip is None else (clip, *image)


def in_chans(model: nn.Module) -> int | None:
    """Return the channels of the images that the model takes; None if unknown."""
    stem = next((module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Conv3d)), None)
    return getattr(model, "in_chans", None) if stem is None else stem.in_channels  # NaFlexVit's stem is a linear layer


@singledispatch
def classify(model: nn.Module, features: Tensor, logs: Tensor | None = None) -> Tensor:
    """Convert features into logits (batch, classes) with the model's own pooling and classifier.

    Args:
        model: A timm model of a known family.
        features: The result of :func:`finish`.
        logs: (batch, tokens), after token merging the logarithm of the number of tokens that each token stands for;
            pooling weighs a token by this number. None counts each token once.
    """
    return model.forward_head(features)  # type: ignore[operator]


def _count_prefix_tokens(model: Any, count: int) -> None:
    """Count more prefix tokens in timm's ViT or Eva."""
    if model.dynamic_img_size and model.pos_embed is not None and not model.no_embed_class:
        raise ValueError(
            "dynamic_img_size does not fit tokens in front of the first block; leave it out, or add them in each block"
        )
    model.num_prefix_tokens += count


def mean_tokens(x: Tensor, logs: Tensor | None) -> Tensor:
    """Average tokens (batch, tokens, width) to (batch, width); see :func:`classify` for ``logs``."""
    return x.mean(1) if logs is None else torch.bmm(logs.softmax(1)[:, None], x)[:, 0]


@singledispatch
def classifier(model: nn.Module) -> list[nn.Module]:
    """List the model's final linear layers: one, two for a distilled DeiT, none for a model without classes."""
    layers: Any = model.get_classifier() if hasattr(model, "get_classifier") else ()  # type: ignore[operator]
    layers = layers if isinstance(layers, tuple | list) else (layers,)
    return [layer for layer in layers if not isinstance(layer, nn.Identity)]


# Helpers for the families


def _staged_blocks(stages: nn.Sequential) -> list[tuple[nn.Module, ...]]:
    """List the blocks of all stages, with each stage's downsampling before its first block."""
    units: list[tuple[nn.Module, ...]] = []
    stage: Any
    for stage in stages:
        first, *rest = stage.blocks
        downsample = () if isinstance(stage.downsample, nn.Identity) else (stage.downsample,)
        units += [(*downsample, first), *((block,) for block in rest)]
    return units


def _staged_widths(model: nn.Module, stages: nn.Sequential) -> list[int]:
    """Return the channels after each block of a model with stages."""
    infos: Any = model.feature_info
    depths = [len(stage.blocks) for stage in stages]  # type: ignore[arg-type]
    return [info["num_chs"] for info, depth in zip(infos, depths, strict=True) for _ in range(depth)]


def _square(patches: int) -> tuple[int, int]:
    """Return rows and columns of the patches of a square image."""
    side = math.isqrt(patches)
    if side * side != patches:
        raise ValueError(f"{patches} patches do not form a square; give square images")
    return side, side


def _grid(patches: int, built: tuple[int, int] | None) -> tuple[int, int]:
    """Return rows and columns of the patches: those of the size that a model was built for, or of a square image."""
    return built if built is not None and math.prod(built) == patches else _square(patches)


def _check_grid(shape: Any, built: tuple[int, int] | None = None) -> None:
    """Raise a ValueError if the blocks, which receive only the patches, would take them for another grid."""
    rows, columns = shape
    if torch.jit.is_tracing() or built == (rows, columns):  # while tracing the numbers are tensors
        return
    if rows != columns:
        raise ValueError(f"{rows} x {columns} patches do not form a square; give square images")
    if built is not None and math.prod(built) == rows * columns:
        raise ValueError(f"{rows} x {columns} patches do not fit a model built for {built[0]} x {built[1]}; give those")


def _needs_grid(model: nn.Module) -> bool:
    """Check whether an adapter reads the neighbours of a token."""
    return any(getattr(part, "needs_grid", False) for part in model.modules())


def _same_forward(model: nn.Module, families: Any) -> None:
    """Raise a TypeError if a subclass of a family, or of one in a union, has its own forward pass, which would not run.

    torch.compile traces this.
    """
    known = getattr(families, "__args__", (families,))
    family = next(kind for kind in type(model).__mro__ if kind in known)
    for method in ("forward", "forward_features"):
        if getattr(type(model), method) is not getattr(family, method):
            _unknown(model, f", whose {method} is not {family.__name__}'s")


REQUIRED: tuple[Any, ...] = (embed, blocks, finish, tokens, widths)
"""What a family must register."""


def _register_once(function: Any) -> None:
    """Refuse a second module that registers a function for the same class; a cell of a notebook may run twice."""
    plain = function.register

    def register(family: Any, implementation: Any = None) -> Any:
        if implementation is None and isinstance(family, type):
            return lambda given: register(family, given)
        before = dict(function.registry)
        result = plain(family, implementation)
        for known, old in before.items():
            new = function.registry[known]
            if new.__module__ != old.__module__:
                plain(known, old)
                raise ValueError(
                    f"{new.__module__} registers {function.__name__} of {known.__name__}, which {old.__module__} has "
                    f"registered; register a subclass of {known.__name__}, or import one of the two modules"
                )
        return result

    function.register = register


OPTIONAL: tuple[Any, ...] = (
    arguments,
    prefix_tokens,
    add_prefix_tokens,
    checkpointing,
    pools_mean,
    needs_all_tokens,
    has_class_token,
    reads_class_row,
    built_for,
    size_step,
    frames,
    convert,
    classify,
    classifier,
)
"""What a family may register where the default does not fit."""
for _function in (*REQUIRED, *OPTIONAL):
    _register_once(_function)


def _is_default(function: Any, model: nn.Module) -> bool:
    return function.dispatch(type(model)) is function.dispatch(object)


def check_family(model: nn.Module) -> None:
    """Check that a family registers all required functions, and that their results are consistent.

    Raises:
        TypeError: If no cut is known for the model's class, or a block is not a tuple of modules.
        ValueError: If there is not one width for each block.
    """
    if any(_is_default(function, model) for function in REQUIRED):
        _unknown(model)
    found, channels, name = blocks(model), widths(model), type(model).__name__
    for block in found:
        if not isinstance(block, tuple) or not all(isinstance(part, nn.Module) for part in block):
            raise TypeError(f"blocks of {name} has a {type(block).__name__}; give a tuple of modules for each block")
    if len(channels) != len(found):
        raise ValueError(f"widths of {name} has {len(channels)} values for {len(found)} blocks; give one for each")


def _unknown(model: nn.Module, why: str = "") -> NoReturn:
    lacking = [function.__name__ for function in REQUIRED if _is_default(function, model)]
    if 0 < len(lacking) < len(REQUIRED):
        raise TypeError(
            f"the family of {type(model).__name__} is not whole; also register {', '.join(lacking)} of "
            "dynadapter.backbones"
        )
    known = sorted(family.__name__ for family in blocks.registry if family is not object)
    kind = type(model)
    name = f"{kind.__module__}.{kind.__name__}" if kind.__name__ in known else kind.__name__  # not timm's class
    raise TypeError(
        f"no cut is known for {name}{why}; known: {known}. Choose a timm model of these classes, "
        "or register embed, blocks, finish, tokens and widths of dynadapter.backbones for yours"
    )


def _classifier_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the classifier's layers by name, including identities."""
    layers: Any = model.get_classifier() if hasattr(model, "get_classifier") else classifier(model)  # type: ignore[operator]
    wanted = set(layers) if isinstance(layers, tuple | list) else {layers}
    return {name: module for name, module in model.named_modules() if module in wanted}
