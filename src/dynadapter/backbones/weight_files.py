"""Load local weight files: read them without running code, adapt them by timm's own filters, and check every tensor."""

import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.models import adapt_input_conv
from timm.models import load_state_dict as read_checkpoint
from torch import Tensor, nn

from dynadapter.backbones.cut import _classifier_layers, blocks, convert
from dynadapter.files import require_room

_WHAT_FITS = "give the timm name and arguments that the file was made with"


def load_weights(model: nn.Module, name: str, path: Path) -> None:
    """Load a local weight file into the model.

    The file must have every tensor except the classifier's, and no others. timm's own functions adapt names, patch
    size, position embedding, windows and input channels. A classifier with another number of classes is left out.

    Args:
        model: A timm model of a known family; changed in place.
        name: Its name, for messages.
        path: ``.safetensors``, ``.pth``, ``.pt``, ``.bin`` (tensors only, no code), or Google's ``.npz`` for ViT.

    Raises:
        ValueError: If the file is missing or damaged, needs code to load, or does not fit.
    """
    if not path.is_file():
        raise ValueError(f"weights={str(path)!r} is not a file; give an existing .safetensors, .pth, .pt, .bin or .npz")
    require_room(path, _unpacked(path))
    if path.suffix.lower() == ".npz":
        _load_npz(model, name, path)
        return
    state = _read(path)
    require_stored(state, f"weights={str(path)!r}")
    try:
        state = _fit_classifier(model, _fit_input(model, convert(model, state)))
    except Exception as error:  # timm's filters raise many kinds of errors for another architecture
        raise ValueError(f"weights={str(path)!r} do not fit {name!r} ({one_line(error)}); {_WHAT_FITS}") from error
    _check_fit(model, name, path, state)
    model.load_state_dict(state)


def _unpacked(path: Path) -> int:
    """Return the bytes of a file's content, which an archive can hold packed."""
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            return max(size, sum(part.file_size for part in archive.infolist()))
    except Exception:  # no archive, or a damaged one, which can raise anything
        return size


def require_stored(content: Any, where: str) -> None:
    """Refuse tensors of a pickle that have more elements than the file holds: strides of 0 repeat one without end.

    Args:
        content: Mappings, lists and tuples, at any depth, with tensors among other values.
        where: The file, for the message.

    Raises:
        ValueError: A tensor is not stored element by element.
    """
    for x in _tensors_in(content):
        dense = x.layout is torch.strided and not x.is_meta
        if not dense or x.numel() * x.element_size() > x.untyped_storage().nbytes():
            raise ValueError(f"{where} holds a tensor {tuple(x.shape)} that is not stored whole; save its values")


def _tensors_in(content: Any) -> Iterator[Tensor]:
    left, seen = [content], set[int]()
    while left:
        part = left.pop()
        if isinstance(part, Tensor):
            yield part.to_local() if hasattr(part, "to_local") else part  # of several processes, this one's part
        elif isinstance(part, Mapping | list | tuple) and id(part) not in seen:
            seen.add(id(part))  # pickle can put a list into itself
            left += part.values() if isinstance(part, Mapping) else part


def _read(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a file without running code from it."""
    try:
        return read_checkpoint(str(path), weights_only=True)
    except Exception as error:  # torch, zipfile, pickle and safetensors each have their own
        if any(isinstance(cause, pickle.UnpicklingError) for cause in (error, error.__cause__, error.__context__)):
            raise ValueError(
                f"weights={str(path)!r} needs code to load, which is refused, or it is damaged; if you "
                "trust it, load it yourself and save its state dict as .safetensors"
            ) from error
        raise ValueError(
            f"weights={str(path)!r} cannot be read ({one_line(error)}); it is damaged or has no weights: fetch it "
            "again, or give another file"
        ) from error


def _fit_input(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Adapt the first convolution of an RGB file to another number of input channels with timm's function."""
    config: Any = model.pretrained_cfg
    key = f"{config['first_conv']}.weight"
    weight, own = state.get(key), model.state_dict().get(key)
    if weight is not None and own is not None and weight.ndim == 4 and weight.shape[1] == 3 != own.shape[1]:
        state[key] = adapt_input_conv(own.shape[1], weight)
    return state


def _fit_classifier(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Use the model's own classifier if the file has none, or has another number of classes."""
    own = model.state_dict()
    if not any(name.startswith(("head.fc.", "head.norm.")) for name in state):
        # A file of masked pre-training ends before the head, whose norm then starts as the identity, as in timm
        state |= {name: tensor for name, tensor in own.items() if name.startswith("head.norm.")}
    for layer in _classifier_layers(model):
        weight = state.get(f"{layer}.weight")
        if weight is None or len(weight) != model.num_classes:
            state = {key: tensor for key, tensor in state.items() if not key.startswith(f"{layer}.")}
            state |= {key: tensor for key, tensor in own.items() if key.startswith(f"{layer}.")}
    return state


def _check_fit(model: nn.Module, name: str, path: Path, state: dict[str, Tensor]) -> None:
    """Raise a ValueError that counts and names the tensors that do not fit."""
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
    faulty = [
        f"{len(found)} {fault} ({', '.join(found[:3])}{', ...' if len(found) > 3 else ''})"
        for fault, found in faults.items()
        if found
    ]
    if faulty:
        raise ValueError(f"weights={str(path)!r} do not fit {name!r}: {'; '.join(faulty)}; {_WHAT_FITS}")


def _load_npz(model: nn.Module, name: str, path: Path) -> None:
    """Load Google's JAX layout by timm's own function, which exists only for ViT."""
    load: Any = getattr(model, "load_pretrained", None)
    if load is None:
        raise ValueError(
            f"weights={str(path)!r} do not fit {name!r}: .npz is the layout of Google's ViT, and this is a "
            f"{type(model).__name__}; give a .safetensors, .pth, .pt or .bin file"
        )
    try:
        held, depth = _npz_depth(path), len(blocks(model))
        if held != depth:  # timm's function would silently drop the last blocks of a deeper file
            raise ValueError(f"{held} blocks instead of {depth}")
        load(str(path))
    except Exception as error:  # a missing array is a KeyError, another shape a RuntimeError ...
        raise ValueError(
            f"weights={str(path)!r} do not fit {name!r} ({one_line(error)}); the file is damaged, or not Google's ViT "
            "of this size"
        ) from error


def _npz_depth(path: Path) -> int:
    """Count the blocks in Google's layouts, which have one array per block or stack all blocks in one."""
    with path.open("rb") as file, np.load(file) as arrays:
        stacked = [key for key in arrays.files if key.endswith("Transformer/encoderblock/LayerNorm_0/scale")]
        if stacked:
            return len(arrays[stacked[0]])
        return len({found[1] for key in arrays.files if (found := re.search(r"encoderblock_(\d+)/", key))})


def one_line(error: Exception) -> str:
    """Return the type of an error and the first sentence of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].split('. ')[0]}" if lines else type(error).__name__
