"""The tensors of ``model.safetensors``: which belong there, how they are written, and how a network takes them up."""

import hashlib
from collections.abc import Iterable, Mapping

import safetensors.torch
import torch
from torch import Tensor

from dynadapter.adapters import adapter_layers
from dynadapter.backbones import classifier
from dynadapter.exits.net import ExitNet


def frozen_names(net: ExitNet) -> set[str]:
    """Names the state-dict keys of the frozen backbone: not adapters, own classifier, and what else is trained."""
    ours = {id(p) for head in classifier(net.backbone) for p in head.parameters()}
    for layer in adapter_layers(net.backbone).values():
        ours |= {id(p) for name, p in layer.named_parameters() if not name.startswith("base_layer.")}
    state = net.backbone.state_dict(keep_vars=True)
    return {f"backbone.{name}" for name, p in state.items() if id(p) not in ours and not p.requires_grad}


def saved_tensors(net: ExitNet, whole: bool) -> dict[str, Tensor]:
    """Copies what belongs in the file to the CPU.

    Args:
        net: The network.
        whole: Everything instead of what was trained.
    """
    left_out = set() if whole else frozen_names(net)
    state = net.state_dict()
    # Each in storage of its own: safetensors refuses tensors that share one.
    return {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in state.items()
        if name not in left_out
    }


def to_bytes(tensors: Mapping[str, Tensor]) -> tuple[bytes, str]:
    """Gives the content of a safetensors file and its SHA-256."""
    data = safetensors.torch.save(dict(tensors), metadata={"format": "pt"})
    return data, hashlib.sha256(data).hexdigest()


def from_bytes(data: bytes, sha256: str, where: str) -> dict[str, Tensor]:
    """Reads the content of a safetensors file whose hash is known.

    Raises:
        ValueError: If the hash is another, or the content is no safetensors file.
    """
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise ValueError(
            f"{where} has SHA-256 {found[:12]}..., its config.json says {sha256[:12]}...: the file is damaged, cut off "
            f"({len(data)} bytes) or of another bundle; fetch or write the bundle again"
        )
    try:
        # Copied out of the one buffer: torch's own memory is aligned, and the same sums come out to the last bit.
        return {name: tensor.clone() for name, tensor in safetensors.torch.load(data).items()}
    except Exception as error:  # safetensors has its own type; a wrong type of tensor is a KeyError
        raise ValueError(f"{where} is no readable safetensors file ({error})") from error


def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuses tensors that hold NaN or infinity.

    Raises:
        ValueError: If there are any.
    """
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise ValueError(
            f"{where}: {len(broken)} of {len(tensors)} tensors hold NaN or infinity ({_listed(broken)}); such a "
            "network predicts nothing: train it again, or pass check_finite=False to look into it"
        )


def fill(net: ExitNet, tensors: dict[str, Tensor], whole: bool, where: str) -> None:
    """Replaces the network's tensors by those of a file; types are the file's.

    Args:
        net: A network as it was before training.
        tensors: By name; the network takes them over.
        whole: Whether all tensors have to be there, instead of those that are trained.
        where: The file's path, for messages.

    Raises:
        ValueError: If a tensor is missing, unknown, or of another shape.
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
    told = [f"{fault} {len(names)} tensors ({_listed(names)})" for fault, names in faults.items() if names]
    if told:
        raise ValueError(
            f"{where} {' and '.join(told)}: it does not belong to the backbone, adapter, heads, exits and class "
            f"names of "
            "its config.json"
        )
    for name, tensor in tensors.items():
        own[name].data = tensor


def _listed(names: Iterable[str], most: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
