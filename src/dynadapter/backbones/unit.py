"""Run one block of a backbone, with or without timm's gradient checkpointing."""

from collections.abc import Callable
from typing import Any

import torch
from timm.models import vision_transformer
from torch import Tensor, nn

from dynadapter.backbones.cut import arguments, checkpointing
from dynadapter.backbones.vit_block import run


def run_unit(model: nn.Module, unit: tuple[nn.Module, ...], x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply one block of :func:`blocks`.

    After ``model.set_grad_checkpointing()`` a forward pass with gradients keeps only the unit's input, and the backward
    pass computes the unit again: less memory for more time.
    """
    return checkpointed(model, _run_all, model, unit, x, bias)


def checkpointed(model: nn.Module, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function of a part of the model, with gradient checkpointing where that is on; see :func:`run_unit`."""
    if torch.is_grad_enabled() and checkpointing(model):
        # A reentrant pass would give no gradients to adapters whose input needs none
        return vision_transformer.checkpoint(function, *arguments, use_reentrant=False)
    return function(*arguments)


def _run_all(model: nn.Module, unit: tuple[nn.Module, ...], x: Tensor, bias: Tensor | None) -> Tensor:
    given = arguments(model, unit, x)
    for module in unit:
        x = module(x, **given) if given else run(module, x, bias)
    return x
