"""FacT: the updates of all matrices of a backbone share one factorised tensor; without cost once merged."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dynadapter.adapters.base import AdapterLayer, AdapterSpec, check_size, matrices, parameter
from dynadapter.adapters.lora import LowRankLayer

MAX_RANK = 256
"""Largest rank; the core then has 17 million numbers."""


class FacTLayer(LowRankLayer):
    """``W x + b + s * D x``, where each square tile of D is ``up @ C @ down`` and C weighs the slices of the core.

    Matrices of one tile size, rank and injection share ``up``, ``down`` and ``core``: the first of them in the model
    holds them, and in the others they are None.

    Args:
        base_layer: A linear layer, or a convolution in one group.
        spec: The adapter's configuration.

    Attributes:
        down: (rank, tile), once injected.
        up: (tile, rank), once injected.
        core: (rank, rank, rank), once injected; the last axis is the one that ``mix`` weighs.
        mix: (tiles, rank), the layer's own tensor; tiles row by row, as in the matrix.
    """

    def __init__(self, base_layer: nn.Module, spec: "FacT") -> None:
        super().__init__(base_layer, spec)
        weight, rank = matrices(base_layer)[0].weight, spec.rank
        out, width = weight.flatten(1).shape  # a window of pixels side by side
        self.tile = math.gcd(out, width)
        self.grid = (out // self.tile, width // self.tile)
        self.rank = rank
        self.mix = nn.init.xavier_uniform_(parameter(weight, self.grid[0] * self.grid[1], rank))
        self.down: Any = None
        self.up: Any = None
        self.core: Any = None
        self._holder: list[Any] = [self]  # a list, so that the holder is no child of this layer

    def share(self, wrappers: Sequence[AdapterLayer]) -> None:
        """Use the factors of the first of these layers with the same tile and rank; the first one creates them."""
        size = (self.tile, self.rank)
        self._holder = [next(o for o in wrappers if isinstance(o, FacTLayer) and (o.tile, o.rank) == size)]
        if self._holder[0] is self:
            self.down = parameter(self.mix, self.rank, self.tile)
            self.up = parameter(self.mix, self.tile, self.rank)
            self.core = nn.init.xavier_uniform_(parameter(self.mix, self.rank, self.rank, self.rank))
            nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    @property
    def uses(self) -> Sequence[AdapterLayer]:
        """The layer that holds the factors."""
        return self._holder

    def matrix_down(self) -> Tensor:
        down = self._holder[0].down
        return torch.block_diag(*[down] * self.grid[1]) if self.grid[1] > 1 else down

    def matrix_up(self) -> Tensor:
        up, core = self._holder[0].up, self._holder[0].core
        weighed = (self.mix @ core.flatten(0, 1).t()).view(*self.grid, self.rank, self.rank)
        return (up @ weighed).transpose(1, 2).flatten(2).flatten(0, 1)  # (rows of tiles, tile, columns * rank)


@dataclass(frozen=True, kw_only=True)
class FacT(AdapterSpec):
    """Update every matrix of attention and MLP with shared factors; once merged, it adds no cost.

    Source: Jie and Deng 2023, FacT (arXiv 2212.03145), its Tucker form FacT-TK. A matrix is cut into square tiles, such
    as q, k and v of a fused qkv; each tile has ``rank`` numbers that are not shared.

    Args:
        rank: Rank of all three axes, at most 256, because the core has rank^3 numbers.
        targets: Patterns of linear layers, or convolutions in one group; empty means all matrices of attention and MLP.
    """

    rank: int = 16

    places = (
        *(f"*blocks.*.attn.{name}" for name in ("qkv", "q_proj", "k_proj", "v_proj", "proj")),
        "*blocks.*.mlp.fc*",
    )

    def __post_init__(self) -> None:
        check_size("rank", self.rank, MAX_RANK)
        super().__post_init__()

    def wrap(self, model: nn.Module, name: str) -> FacTLayer:
        """Build the wrapper of one layer."""
        return FacTLayer(model.get_submodule(name), self)
