"""Freeze a backbone, and set which of its modules follow the training mode."""

from collections.abc import Iterator
from itertools import chain

from timm.layers import DropPath
from torch import nn

from dynadapter.backbones.cut import classifier


def freeze(model: nn.Module) -> None:
    """Freeze all parameters except those of the classifier and the adapters, which are not changed.

    Args:
        model: A timm model, with or without adapters. A module with a child ``base_layer`` counts as an adapter around
            that layer, as in this package and in peft. It may list all its children that belong to the backbone in
            ``base_parts``.
    """
    free = {id(p) for layer in classifier(model) for p in layer.parameters()}
    free |= {id(p) for part in _adapter_parts(model) for p in part.parameters()}
    for wrapper in _wrappers(model):
        free |= {id(p) for p in wrapper.parameters(recurse=False)}
    for parameter in model.parameters():
        if id(parameter) not in free:
            parameter.requires_grad_(False)


def set_mode(model: nn.Module, training: bool) -> None:
    """Set classifier, adapters and stochastic depth to training or evaluation mode, and the rest to evaluation mode.

    Batch statistics then do not change, and the backbone's own dropout is off.
    """
    model.eval()
    for wrapper in _wrappers(model):
        wrapper.training = training
    depth = (part for part in model.modules() if isinstance(part, DropPath))
    for part in chain(_adapter_parts(model), classifier(model), depth):
        part.train(training)


def remove_stochastic_depth(model: nn.Module) -> None:
    """Replace stochastic depth by identities, as timm does at rate 0; the default of timm's Swin is 0.1."""
    for name in [name for name, part in model.named_modules() if isinstance(part, DropPath)]:
        model.set_submodule(name, nn.Identity())


def _wrappers(model: nn.Module) -> Iterator[nn.Module]:
    return (part for part in model.modules() if isinstance(part._modules.get("base_layer"), nn.Module))


def _adapter_parts(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that adapters add to the layers that they wrap."""
    for wrapper in _wrappers(model):
        of_backbone = getattr(wrapper, "base_parts", ("base_layer",))
        yield from (child for name, child in wrapper.named_children() if name not in of_backbone)
