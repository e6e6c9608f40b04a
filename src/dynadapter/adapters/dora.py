"""DoRA: a low-rank update of a frozen matrix's directions, and a learned length for each row."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dynadapter.adapters.base import AdapterSpec, check_size, matrices
from dynadapter.adapters.lora import PLACES, LoRALayer
from dynadapter.adapters.lowrank import add_product, by_channel, some_outputs
from dynadapter.adapters.merging import exact, rebuilt

SHORTEST = 1e-19
"""Least length by which a row is divided: zeros have none, and in float32 the squares of a shorter row vanish."""


class DoRALayer(LoRALayer):
    """``W' x + b``, where each row of W' has the direction of ``W + s * lora_b @ lora_a`` and its own length.

    Args:
        base_layer: A linear layer, or a convolution in one group.
        spec: The adapter's configuration.
        rank: Rank of the update.

    Attributes:
        magnitude: (out,), the lengths of the rows.
    """

    def __init__(self, base_layer: nn.Module, spec: AdapterSpec, rank: int) -> None:
        super().__init__(base_layer, spec, rank, split=False)
        self.magnitude = nn.Parameter(self.lengths())

    @torch.no_grad()
    def lengths(self) -> Tensor:
        """Return the lengths of the rows of ``W + s * lora_b @ lora_a``, (out,), without gradient; above 0."""
        weight = matrices(self.base_layer)[0].weight.flatten(1).to(self.lora_b.dtype)
        return self._lengths(weight + self.scale * self.lora_b @ self.lora_a)

    def _lengths(self, rows: Tensor) -> Tensor:
        least = max(torch.finfo(self.lora_b.dtype).tiny, SHORTEST)
        return torch.linalg.vector_norm(rows, dim=1).clamp(min=least)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (..., width) to (..., out), or (batch, width, rows, columns) to (batch, out, rows, columns)."""
        return self._lengthened(self.base_layer(x), x, slice(None), self.channels_first)

    def some(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Compute only the outputs ``start:stop`` for tokens (..., width)."""
        rows = slice(start, stop)
        return self._lengthened(some_outputs(matrices(self.base_layer)[0], x, rows), x, rows, False)

    def _lengthened(self, y: Tensor, x: Tensor, rows: slice, channels_first: bool) -> Tensor:
        """Adapt the base layer's outputs ``rows``; exactly ``y`` while lengths and directions are unchanged."""
        bias = matrices(self.base_layer)[0].bias
        factor = self.magnitude[rows] / self.lengths()[rows]
        plain = y if bias is None else y - by_channel(bias[rows], y, channels_first)
        y = y + plain * by_channel(factor - 1, y, channels_first)
        hidden = self.dropout(self.project_down(x))
        return add_product(y, hidden, factor[:, None] * self.lora_b[rows], None, self.scale, channels_first, own=True)

    def merged(self) -> nn.Module:
        """Return the base layer with W'."""
        weight = exact(matrices(self.base_layer)[0].weight.flatten(1))
        weight = weight + self.scale * exact(self.lora_b) @ exact(self.lora_a)
        return rebuilt(self.base_layer, weight * (exact(self.magnitude) / self._lengths(weight))[:, None])


@dataclass(frozen=True, kw_only=True)
class DoRA(AdapterSpec):
    """Low-rank update of the directions of a matrix's rows, with a separate learned length for each row.

    Source: Liu et al. 2024, DoRA (arXiv 2402.09353), whose lengths of the updated rows get no gradient, as here. The
    scale s is ``alpha / r``, as for LoRA. While it is not merged, every call computes these lengths from the whole
    matrix.

    Args:
        rank: Rank r of each update.
        targets: Patterns of linear layers, or convolutions in one group; empty means the default places of LoRA.
    """

    rank: int = 8

    places = PLACES

    def __post_init__(self) -> None:
        check_size("rank", self.rank)
        super().__post_init__()

    def wrap(self, model: nn.Module, name: str) -> DoRALayer:
        """Build the wrapper of one layer."""
        return DoRALayer(model.get_submodule(name), self, self.rank)
