"""The tensors of ``model.safetensors``: choose, write, read and check them, and load them into a network."""

import hashlib
from collections.abc import Mapping

import safetensors.torch
import torch
from torch import Tensor

from dynadapter.adapters import adapter_layers
from dynadapter.backbones import classifier
from dynadapter.exits.net import ExitNet
from dynadapter.files import listed


def frozen_names(net: ExitNet) -> set[str]:
    """Return the state-dict keys of the frozen backbone: all except adapters, classifier and other trained tensors."""
    ours = {id(p) for head in classifier(net.backbone) for p in head.parameters()}
    for layer in adapter_layers(net.backbone).values():
        ours |= set(map(id, layer.own_parameters().values()))
    state = net.backbone.state_dict(keep_vars=True)
    return {f"backbone.{name}" for name, p in state.items() if id(p) not in ours and not p.requires_grad}


def saved_tensors(net: ExitNet, whole: bool) -> dict[str, Tensor]:
    """Copy the tensors that belong in the file to the CPU."""
    left_out = set() if whole else frozen_names(net)
    state = net.state_dict()
    # Each in its own storage: safetensors refuses tensors that share one.
    return {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in state.items()
        if name not in left_out
    }


def to_bytes(tensors: Mapping[str, Tensor]) -> tuple[bytes, str]:
    """Return the content of a safetensors file and its SHA-256."""
    data = safetensors.torch.save(dict(tensors), metadata={"format": "pt"})
    return data, hashlib.sha256(data).hexdigest()


def from_bytes(data: bytes, sha256: str, where: str) -> dict[str, Tensor]:
    """Read the content of a safetensors file whose hash is known."""
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise ValueError(
            f"{where} has SHA-256 {found[:12]}..., its config.json says {sha256[:12]}...: the file is damaged, cut off "
            f"({len(data)} bytes) or of another bundle; fetch or write the bundle again"
        )
    try:
        # Copied out of the one buffer: torch aligns its own memory, and sums then agree to the last bit.
        return {name: tensor.clone() for name, tensor in safetensors.torch.load(data).items()}
    except Exception as error:  # safetensors has its own type; a wrong type of tensor is a KeyError
        raise ValueError(f"{where} is not a readable safetensors file ({error})") from error


def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuse tensors that hold NaN or infinity."""
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise ValueError(
            f"{where}: {len(broken)} of {len(tensors)} tensors hold NaN or infinity ({listed(broken, 3)}); such a "
            "network predicts nothing: train it again, or pass check_finite=False to look into it"
        )


def fill(net: ExitNet, tensors: dict[str, Tensor], whole: bool, where: str) -> None:
    """Replace the network's tensors by those of a file, which are not copied and keep their types.

    Raises:
        ValueError: A tensor is missing, unknown, or of another shape.
    """
    own = net.state_dict(keep_vars=True)
    needed = set(own) if whole else set(own) - frozen_names(net)
    faults = {
        "lacks": sorted(needed - set(tensors)),
        "has unknown": sorted(set(tensors) - set(own)),
        "has, in another shape,": [
            f"{name} {tuple(tensor.shape)} instead of {tuple(own[name].shape)}"
            for name, tensor in sorted(tensors.items())
            if name in own and tensor.shape != own[name].shape
        ],
    }
    lines = [f"{fault} {len(names)} tensors ({listed(names, 3)})" for fault, names in faults.items() if names]
    if lines:
        raise ValueError(
            f"{where} {' and '.join(lines)}: it does not belong to the backbone, adapter, heads, exits and class names "
            "of its config.json"
        )
    for name, tensor in tensors.items():
        own[name].data = tensor
