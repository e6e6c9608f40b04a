"""Adapters on the named layers of a frozen backbone: the kinds, injection and merging."""

from dynadapter.adapters.adapter_plus import AdapterPlus
from dynadapter.adapters.base import AdapterLayer, Adapters, AdapterSpec
from dynadapter.adapters.bitfit import BitFit
from dynadapter.adapters.bottleneck import Adapter, AdaptFormer
from dynadapter.adapters.by_blocks import ByBlocks
from dynadapter.adapters.convpass import Convpass
from dynadapter.adapters.dora import DoRA
from dynadapter.adapters.fact import FacT
from dynadapter.adapters.from_peft import Peft
from dynadapter.adapters.injection import adapter_layers, inject, needs_grid
from dynadapter.adapters.lora import LoRA
from dynadapter.adapters.merging import merge
from dynadapter.adapters.repadapter import RepAdapter
from dynadapter.adapters.ssf import SSF
from dynadapter.adapters.to_peft import save_peft
from dynadapter.adapters.vpt import VPT

__all__ = [
    "SSF",
    "VPT",
    "AdaptFormer",
    "Adapter",
    "AdapterLayer",
    "AdapterPlus",
    "AdapterSpec",
    "Adapters",
    "BitFit",
    "ByBlocks",
    "Convpass",
    "DoRA",
    "FacT",
    "LoRA",
    "Peft",
    "RepAdapter",
    "adapter_layers",
    "inject",
    "merge",
    "needs_grid",
    "save_peft",
]
