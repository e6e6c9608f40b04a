"""Adapters on the named layers of a frozen backbone: the kinds, injection and merging."""

from dynadapter.adapters.base import AdapterLayer, Adapters, AdapterSpec
from dynadapter.adapters.bottleneck import Adapter, AdaptFormer
from dynadapter.adapters.by_blocks import ByBlocks
from dynadapter.adapters.injection import adapter_layers, inject
from dynadapter.adapters.lora import LoRA
from dynadapter.adapters.merging import merge
from dynadapter.adapters.repadapter import RepAdapter

__all__ = [
    "AdaptFormer",
    "Adapter",
    "AdapterLayer",
    "AdapterSpec",
    "Adapters",
    "ByBlocks",
    "LoRA",
    "RepAdapter",
    "adapter_layers",
    "inject",
    "merge",
]
