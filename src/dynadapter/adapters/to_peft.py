"""Write trained LoRA adapters as an adapter folder of the package peft; peft itself is not needed."""

import json
import os
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from dynadapter.adapters.base import matrices
from dynadapter.adapters.injection import adapter_layers
from dynadapter.adapters.lora import LoRALayer
from dynadapter.backbones import classifier
from dynadapter.files import write_folder
from dynadapter.peft_place import CONFIG, TENSORS, check_place

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
        overwrite: Replace an adapter folder, and nothing more.

    Returns:
        The folder, behind symbolic links.

    Raises:
        ValueError: The backbone has no adapters, or another kind than LoRA, or peft would compute something else; or
            the folder is in use.
    """
    layers = adapter_layers(backbone)
    others = sorted({layer.kind for layer in layers.values() if type(layer) is not LoRALayer})
    if others or not layers:
        raise ValueError(
            f"the adapters are {', '.join(others) or 'merged or missing'}; only LoRA that is not merged can be "
            "written for peft"
        )
    tensors: dict[str, Tensor] = {}
    sizes: dict[str, tuple[int, float]] = {}
    for name, layer in layers.items():
        assert isinstance(layer, LoRALayer)
        down, up, base = layer.matrix_down(), layer.matrix_up(), matrices(layer.base_layer)[0]
        _require_same(backbone.get_submodule(name.rpartition(".")[0]), name, base)
        sizes[name] = (len(down), layer.scale * len(down))
        if isinstance(base, nn.Conv2d):
            down, up = down.unflatten(1, base.weight.shape[1:]), up[:, :, None, None]
        tensors |= {f"{PREFIX}{name}.lora_A.weight": down, f"{PREFIX}{name}.lora_B.weight": up}
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
    place = check_place(folder, overwrite)
    write_folder(place, files, overwrite, check_place)
    return place


def _require_same(parent: Any, name: str, base: nn.Module) -> None:
    """Raise a ValueError for a layer in which peft would compute something else.

    Args:
        parent: The module that holds the layer.
        name: The layer's name.
        base: The layer without its adapter.
    """
    way = "merge the adapters into the weights by dynadapter.merge instead"
    # inject makes these attentions call the layer; peft does not
    if name.endswith("qkv") and hasattr(parent, "qkv_bias_separate") and parent.q_bias is not None:
        raise ValueError(f"peft would have no effect on {name}, of which timm's attention reads only the weight; {way}")
    if getattr(base, "dilation", (1, 1)) != (1, 1):
        raise ValueError(f"peft would leave out the dilation {base.dilation} of {name}; {way}")


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
