"""Create a frozen timm model from a name and check that files belong to it."""

import difflib
import hashlib
import inspect
import os
import re
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg
from torch import nn

from dynadapter.backbones.cut import _classifier_layers, blocks, built_for, size_step
from dynadapter.backbones.draws import DrawFrom
from dynadapter.backbones.frozen import freeze, remove_stochastic_depth
from dynadapter.backbones.packaged import find
from dynadapter.backbones.packaged import names as packaged_names
from dynadapter.backbones.weight_files import load_weights, one_line
from dynadapter.files import machine_memory

DEAD = ("drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_block_rate")
"""timm's dropout rates, which need a backbone in training mode."""


def create_backbone(
    name: str,
    num_classes: int,
    *,
    pretrained: bool = False,
    weights: str | Path | None = None,
    image_size: int | None = None,
    seed: int = 0,
    **timm_args: Any,
) -> nn.Module:
    """Create a timm model as a backbone: frozen except for its classifier, and in evaluation mode.

    An :class:`~dynadapter.exits.net.ExitNet` keeps it in evaluation mode. Stochastic depth (``drop_path_rate``) still
    works in training; it is 0 unless given. timm's other dropout rates would have no effect and are an error.

    >>> backbone = create_backbone("vit_tiny_patch16_224", num_classes=10, img_size=32, patch_size=8, depth=2)
    >>> [name for name, parameter in backbone.named_parameters() if parameter.requires_grad]
    ['head.weight', 'head.bias']

    Args:
        name: A timm name of a known family, with or without tag (``vit_base_patch16_224.augreg_in21k``),
            ``hf-hub:owner/name``, ``local-dir:folder``, or a packaged backbone (``micro``).
        num_classes: Classes of the model's own classifier.
        pretrained: Load the weights of this name: from timm's cache or the network, or from the package.
        weights: A local weight file (:mod:`~dynadapter.backbones.weight_files`); it overrides ``pretrained``.
        image_size: Height and width of the images in pixels, for families built for one size. ``img_size`` in
            ``timm_args`` overrides it.
        seed: Random seed of the new classifier, and of every tensor if there are no weights. The global random state is
            neither used nor changed.
        timm_args: Further arguments of timm's model, such as ``patch_size``, ``global_pool`` or ``in_chans``.

    Returns:
        The model on the CPU.

    Raises:
        ValueError: If timm has no such name, an argument is wrong, or weights cannot be loaded.
        TypeError: If no cut is known for the model's class.
    """
    given, packaged = name, find(name)
    if packaged is not None:
        name, timm_args = packaged.architecture, packaged.settings(timm_args, image_size)
        weights = packaged.weights() if pretrained and weights is None else weights
    _check_name(name)
    _check_arguments(num_classes, timm_args)
    # Builds without memory show wrong names, arguments, families and sizes before any download
    model = _build(name, num_classes, seed, timm_args, device="meta")
    blocks(model)
    if image_size is not None and timm_args.get("img_size") is None and built_for(model) not in (None, image_size):
        timm_args["img_size"] = image_size
        model = _build(name, num_classes, seed, timm_args, device="meta")
        _check_image_size(model, name, image_size)
    _check_memory(model, name)
    model = _build(name, num_classes, seed, timm_args, pretrained=pretrained and weights is None)
    if weights is not None:
        load_weights(model, given, Path(os.path.expanduser(weights)))
    _require_finite(model, given)
    freeze(model)
    if timm_args.get("drop_path_rate") is None:  # timm would take its own default
        remove_stochastic_depth(model)
    return model.eval()


def _check_arguments(num_classes: int, timm_args: dict[str, Any]) -> None:
    if num_classes < 0:
        raise ValueError(f"num_classes={num_classes} must be at least 0; 0 gives a model without classifier")
    if timm_args.get("global_pool") == "":
        raise ValueError("global_pool='' leaves features unpooled; choose 'avg', 'token' ..., or leave it out")
    rate = timm_args.get("drop_path_rate") or 0.0
    if not (isinstance(rate, int | float) and 0 <= rate < 1):
        raise ValueError(f"drop_path_rate={rate!r:.40} must be a number of at least 0 and below 1")
    if dead := [name for name in DEAD if timm_args.get(name)]:
        raise ValueError(
            f"{dead[0]}={timm_args[dead[0]]} would have no effect: a frozen backbone stays in evaluation mode; leave "
            "it out, or use drop_path_rate, the adapter's dropout or sparsity.shallow"
        )


def _require_finite(model: nn.Module, name: str) -> None:
    """Raise a ValueError if weights hold NaN or infinity, because every prediction would be NaN."""
    if broken := [key for key, tensor in model.state_dict().items() if not tensor.isfinite().all()]:
        raise ValueError(
            f"{len(broken)} weights of {name!r} hold NaN or infinity, {broken[0]} among them; give other weights"
        )


def _check_image_size(model: nn.Module, name: str, image_size: int) -> None:
    """Raise a ValueError if the patches do not cover the image: pixels at the border would be lost."""
    step = size_step(model)
    if image_size % step:
        below = image_size // step * step or step
        raise ValueError(
            f"image_size={image_size} is not a multiple of {step} pixels, the patch size of {name!r} or what its "
            f"windows need; use {below} or {below + step}"
        )


def _check_memory(model: nn.Module, name: str) -> None:
    """Raise a ValueError if the tensors do not fit into the memory of this machine."""
    needed = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    if needed > (there := machine_memory()):
        raise ValueError(
            f"{name!r} with these arguments takes {needed / 1e9:,.1f} GB, this machine has {there / 1e9:,.1f} GB; give "
            "smaller sizes"
        )


def fingerprint(model: nn.Module) -> str:
    """Return a hash of the frozen tensors, to check whether a file belongs to this backbone.

    It covers name, shape, type and bytes of every tensor of the state dict except the classifier's. Device, memory
    layout and order do not change it. Adapters change names, so call it before injection.

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
    """Raise a ValueError with the nearest known names if timm does not know the name or its tag."""
    if ":" in name:  # a folder or a repository, which timm resolves
        return
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, [*packaged_names(), *timm.list_models()], n=3)
        hint = f"the nearest are {', '.join(near)}" if near else "such as vit_base_patch16_224, convnext_tiny, resnet50"
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


def _build(
    name: str, num_classes: int, seed: int, timm_args: dict[str, Any], pretrained: bool = False, device: str = "cpu"
) -> nn.Module:
    """Build the model with timm from a seed, on the given device; ``meta`` takes no memory."""
    if device == "meta":
        timm_args = {key: value for key, value in timm_args.items() if key != "checkpoint_path"}
    try:
        with torch.device(device), DrawFrom(seed):
            return timm.create_model(name, pretrained=pretrained, num_classes=num_classes, **timm_args)
    except Exception as error:  # assertions, TypeErrors, network and file errors of many libraries
        reason = one_line(error)
        wrong = re.search(r"unexpected keyword argument '(\w+)'", reason)
        if wrong:
            raise ValueError(_wrong_argument(name, wrong[1])) from error
        # timm reads the configuration of a model on the hub first, with weights or without
        if pretrained or (name.startswith("hf") and isinstance(error, OSError)):
            raise ValueError(
                f"the pretrained weights of {_full_name(name)!r} could not be fetched ({reason}); without a network "
                "they must be in the cache of the Hugging Face hub, or give a local file as weights='...'"
            ) from error
        raise ValueError(f"timm cannot build {name!r} with {timm_args or 'its defaults'} ({reason})") from error


def _full_name(name: str) -> str:
    """Return the name with timm's default tag."""
    config = None if ":" in name else get_pretrained_cfg(name)
    return f"{config.architecture}.{config.tag}" if config and config.tag else name


def _wrong_argument(name: str, argument: str) -> str:
    if argument == "img_size":
        return f"{name!r} takes no img_size, because it works on images of any size; leave it out"
    known = {key for family in blocks.registry for key in inspect.signature(family).parameters if family is not object}
    near = difflib.get_close_matches(argument, sorted(known - {argument}), n=3)
    hint = f"the nearest in timm are {', '.join(near)}" if near else "see the class's arguments in timm"
    return f"{name!r} takes no argument {argument!r}; {hint}"
