"""Write trained LoRA adapters as an adapter folder of the package peft; peft itself is not needed."""

import json
import os
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from dynadapter.adapters.injection import adapter_layers
from dynadapter.adapters.lora import LoRALayer
from dynadapter.backbones import classifier
from dynadapter.files import write_folder

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What peft puts in front of a model's own names."""


def save_peft(
    backbone: nn.Module, folder: str | os.PathLike[str], base_model: str | None = None, overwrite: bool = False
) -> Path:
    """Write the LoRA adapters and the classifier of a backbone as a folder that peft loads.

    ``peft.PeftModel.from_pretrained(model, folder)`` on the same backbone without adapters computes the same logits,
    which are those of the last exit. Early heads are not written. A fused qkv with ``split="qv"`` becomes one
    update of twice the rank.

    Args:
        backbone: A backbone with LoRA and no other kind of adapter, such as ``net.backbone``.
        folder: The folder to write, atomically.
        base_model: Name of the backbone, as information.
        overwrite: Replace an existing folder.

    Returns:
        The folder.

    Raises:
        ValueError: The backbone has no adapters, or another kind than LoRA.
        FileExistsError: The folder exists.
    """
    layers = adapter_layers(backbone)
    others = sorted({layer.kind for layer in layers.values() if type(layer) is not LoRALayer})
    if others or not layers:
        raise ValueError(
            f"the adapters are {', '.join(others) or 'merged or missing'}; only LoRA that is not merged can be "
            "written for peft"
        )
    place = Path(os.path.expanduser(folder))
    tensors: dict[str, Tensor] = {}
    sizes: dict[str, tuple[int, float]] = {}
    if place.exists() and not overwrite:
        raise FileExistsError(f"{folder} exists; give another folder, or overwrite=True")
    for name, layer in layers.items():
        assert isinstance(layer, LoRALayer)
        down, up = layer.matrix_down(), layer.matrix_up()
        sizes[name] = (len(down), layer.scale * len(down))
        for key, matrix in (("lora_A", down), ("lora_B", up)):
            tensors[f"{PREFIX}{name}.{key}.weight"] = matrix[:, :, None, None] if layer.channels_first else matrix
    heads = classifier(backbone)
    trained = [name for name, part in backbone.named_modules() if any(part is head for head in heads)]
    for name in trained:
        state = backbone.get_submodule(name).state_dict()
        tensors |= {f"{PREFIX}{name}.{key}": value for key, value in state.items()}
    files = {
        TENSORS: safetensors.torch.save(
            {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}, {"format": "pt"}
        ),
        CONFIG: (json.dumps(_config(sizes, trained, base_model), indent=2) + "\n").encode(),
    }
    write_folder(place, files, overwrite)
    return place


def _config(sizes: dict[str, tuple[int, float]], trained: list[str], base_model: str | None) -> dict[str, Any]:
    """Return the content of ``adapter_config.json`` from each layer's rank and alpha."""
    rank, alpha = next(iter(sizes.values()))
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,  # peft's factor of the update is alpha / r
        "rank_pattern": {name: r for name, (r, _) in sizes.items() if r != rank},
        "alpha_pattern": {name: a for name, (_, a) in sizes.items() if a != alpha},
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(sizes),
        "modules_to_save": trained,
    }
