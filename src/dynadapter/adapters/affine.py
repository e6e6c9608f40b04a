"""Adapters that multiply and shift the channels of a layer's output, and the layers for which that is possible."""

from typing import Any

import torch
from torch import Tensor, nn

from dynadapter.adapters.base import AdapterLayer, AdapterSpec
from dynadapter.adapters.lowrank import by_channel, some_outputs
from dynadapter.adapters.merging import exact, rebuilt

TAKES = "a linear layer, a convolution or a norm with learned tensors"
"""The layers of :func:`is_affine` in words."""


def is_affine(layer: nn.Module) -> bool:
    """Check whether a layer ends with a product with its own weight, so that a factor on its output can be merged."""
    if not isinstance(getattr(layer, "weight", None), nn.Parameter):
        return False
    if isinstance(layer, nn.Conv2d | nn.Conv3d):
        return "Std" not in type(layer).__name__  # timm's StdConv2d normalises its weight
    if not isinstance(getattr(layer, "act", None), nn.Identity | None):
        return isinstance(layer, nn.BatchNorm2d)  # timm's BatchNormAct2d, whose norm can be called alone
    norms = (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm2d)
    return isinstance(layer, (nn.Linear, *norms)) or hasattr(layer, "normalized_shape")  # the last: timm's RmsNorm


class AffineLayer(AdapterLayer):
    """A wrapper that maps the base layer's output y to ``factor * y + offset``, by channel and before an activation.

    A subclass defines :meth:`factor` and :meth:`offset`.

    Args:
        base_layer: A layer for which :func:`is_affine` holds.
        spec: The adapter's configuration.
    """

    def __init__(self, base_layer: nn.Module, spec: AdapterSpec) -> None:
        super().__init__(base_layer, spec)
        images = isinstance(base_layer, nn.Conv2d | nn.Conv3d | nn.BatchNorm2d | nn.GroupNorm)
        self.channels_first = images or "2d" in type(base_layer).__name__  # timm's LayerNorm2d and RmsNorm2d

    def factor(self) -> Tensor | None:
        """Return the factors (out,), or None for 1."""
        return None

    def offset(self) -> Tensor | None:
        """Return the offsets (out,), or None for 0."""
        return None

    def changed(self, y: Tensor, rows: slice = slice(None)) -> Tensor:
        """Apply the factors and offsets of some channels to an output that has only these channels."""
        factor, offset = self.factor(), self.offset()
        if factor is not None:
            y = y * by_channel(factor[rows], y, self.channels_first)
        return y if offset is None else y + by_channel(offset[rows], y, self.channels_first)

    def forward(self, x: Tensor) -> Tensor:
        """Map the base layer's input to its changed output."""
        layer: Any = self.base_layer
        if isinstance(self.base_layer, nn.BatchNorm2d) and hasattr(layer, "act"):
            return layer.act(layer.drop(self.changed(nn.BatchNorm2d.forward(layer, x))))
        return self.changed(layer(x))

    def some(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Compute only the outputs ``start:stop`` for tokens (..., width)."""
        rows = slice(start, stop)
        return self.changed(some_outputs(self.base_layer, x, rows), rows)

    def merged(self) -> nn.Module:
        """Return the base layer with ``factor * W`` and ``factor * b + offset``."""
        layer: Any = self.base_layer
        weight, factor, offset = exact(layer.weight), self.factor(), self.offset()
        factors = torch.ones(len(weight), dtype=weight.dtype) if factor is None else exact(factor)
        bias = None
        if getattr(layer, "bias", None) is not None:
            bias = factors * exact(layer.bias) + (0 if offset is None else exact(offset))
        return rebuilt(layer, weight * factors.view(-1, *[1] * (weight.ndim - 1)), bias)


def check_no_dropout(spec: AdapterSpec) -> None:
    """Raise a ValueError if a kind without a bottleneck has a rate of dropout."""
    if spec.dropout:
        raise ValueError(f"dropout={spec.dropout} does not fit {type(spec).__name__}, which has no bottleneck; use 0")
