"""Create a frozen timm model from a name and check that files belong to it."""

import difflib
import hashlib
import inspect
import re
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg
from torch import nn

from dynadapter.backbones.cut import _classifier_layers, blocks, classifier
from dynadapter.backbones.packaged import find
from dynadapter.backbones.packaged import names as packaged_names
from dynadapter.backbones.weight_files import load_weights, one_line

# The modules of timm whose models are of a family below; only for the names that an error message suggests.
_TIMM_MODULES = ("vision_transformer", "vision_transformer_hybrid", "deit", "swin_transformer", "convnext")


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
    """Creates a timm model as a backbone: frozen except for its classifier, and in evaluation mode.

    The backbone stays in evaluation mode in an :class:`~dynadapter.exits.net.ExitNet`, so ``drop_path_rate``,
    ``proj_drop_rate`` and the like are accepted but inactive: what is frozen is not regularised.

    >>> backbone = create_backbone("vit_tiny_patch16_224", num_classes=10, img_size=32, patch_size=8, depth=2)
    >>> [name for name, parameter in backbone.named_parameters() if parameter.requires_grad]
    ['head.weight', 'head.bias']

    Args:
        name: Any timm name of a known family, with tag or without (``vit_base_patch16_224.augreg_in21k``), or
            ``hf-hub:owner/name``, or ``local-dir:folder``, or a backbone that ships with the package (``micro``).
        num_classes: Classes of the model's own classifier.
        pretrained: Whether timm fetches the weights that belong to the name, or takes them from its cache; those of a
            packaged backbone are at hand.
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
        load_weights(model, asked, Path(weights).expanduser())
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
    """Names the frozen tensors by a hash, so that files made for one backbone are not used with another.

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
        said = one_line(error)
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
