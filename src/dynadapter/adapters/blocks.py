"""Kinds that wrap whole blocks of the backbone."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from dynadapter.adapters.base import AdapterSpec, unwrapped
from dynadapter.backbones import blocks, widths


def block_widths(model: nn.Module) -> dict[int, int]:
    """Return the channels after each block, by the ``id`` of the block without its wrapper."""
    units = zip(blocks(model), widths(model), strict=True)
    return {id(unwrapped(unit[-1])): width for unit, width in units}


def has_channels_first(block: nn.Module) -> bool:
    """Check whether a block's output is (batch, width, rows, columns), as for every block with a convolution."""
    return any(isinstance(part, nn.Conv2d) for part in block.modules())


@dataclass(frozen=True, kw_only=True)
class BlockSpec(AdapterSpec):
    """Base of the kinds that wrap whole blocks."""

    takes = "a block of the backbone"
    places = ("*",)  # any name; `defaults` chooses

    def fits(self, layer: nn.Module) -> bool:
        """Check whether the layer can be a block; :meth:`wrap` checks that it is one."""
        return len(list(layer.modules())) > 3

    def defaults(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> list[str]:
        """Return the names of all blocks."""
        known = block_widths(model)
        return [name for name, layer in layers.items() if id(layer) in known]

    def width(self, model: nn.Module, name: str) -> int:
        """Return the channels after a block."""
        known, layer = block_widths(model), model.get_submodule(name)
        if id(layer) not in known:
            raise ValueError(
                f"{type(self).__name__} cannot wrap {name}, a module of type {type(layer).__name__}; it takes "
                f"{self.takes}; leave targets out for all of them"
            )
        return known[id(layer)]
