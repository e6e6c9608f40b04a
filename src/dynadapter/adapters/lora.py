"""LoRA: a low-rank update of a frozen matrix."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from dynadapter.adapters.base import AdapterLayer, AdapterSpec, check_choice, check_size, matrices, parameter
from dynadapter.adapters.lowrank import add_product, project
from dynadapter.adapters.merging import exact, rebuilt


class LoRALayer(AdapterLayer):
    """``W x + b + s * lora_b @ drop(lora_a @ x)``.

    Args:
        base_layer: A linear layer or a 1x1 convolution.
        spec: The kind that asks for it.
        rank: Rank of the update, of each update where there are two.
        split: Whether the layer is a fused qkv whose q and v get a pair each.

    Attributes:
        lora_a: (rank, width), or (2 * rank, width) for q above v.
        lora_b: (out, rank), or (2 * out / 3, rank) for q above v.
    """

    kind = "LoRA"
    mergeable = True

    def __init__(self, base_layer: nn.Module, spec: AdapterSpec, rank: int, split: bool) -> None:
        super().__init__(base_layer, spec)
        weight = matrices(base_layer)[0].weight
        out, width = weight.shape[:2]
        self.split = split
        self.lora_a = parameter(weight, 2 * rank if split else rank, width)
        self.lora_b = parameter(weight, 2 * out // 3 if split else out, rank)
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    def up(self) -> Tensor:
        """Gives the matrix from the low-rank activations to the layer's output, (out, rows of ``lora_a``)."""
        if not self.split:
            return self.lora_b
        query, value = self.lora_b.chunk(2)
        key = query.new_empty(len(query), 0)  # no columns: only zero rows in the block-diagonal matrix
        return torch.block_diag(query, key, value)

    def forward(self, x: Tensor) -> Tensor:
        """Maps tokens (..., width) to (..., out), or (batch, width, rows, columns) accordingly."""
        y = self.base_layer(x)
        hidden = self.dropout(project(x, self.lora_a, None, self.channels_first))
        return add_product(y, hidden, self.up(), None, self.scale, self.channels_first, own=True)

    def some(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Gives only the outputs from ``start`` to ``stop`` for tokens (..., width)."""
        matrix = matrices(self.base_layer)[0]
        bias = None if matrix.bias is None else matrix.bias[start:stop]
        y = project(x, matrix.weight.flatten(1)[start:stop], bias, False)
        hidden = self.dropout(project(x, self.lora_a, None, False))
        return add_product(y, hidden, self.up()[start:stop], None, self.scale, False, own=True)

    def merged(self) -> nn.Module:
        """Gives the base layer with ``W + s * lora_b @ lora_a``."""
        weight = matrices(self.base_layer)[0].weight.flatten(1)
        return rebuilt(self.base_layer, exact(weight) + self.scale * exact(self.up()) @ exact(self.lora_a))


@dataclass(frozen=True, kw_only=True)
class LoRA(AdapterSpec):
    """Low-rank update of the fused qkv projection, or of any other matrix.

    Source: Hu et al. 2021, LoRA (arXiv 2106.09685). The scale s is what that paper and peft write as ``alpha / r``.
    Dropout acts on the ``rank`` activations in the middle (ours); peft drops the layer's input instead.

    Args:
        rank: Rank r of the update, of each update where there are two.
        split: ``fused`` has one pair of matrices for the whole layer. ``qv`` has one for q and one for v, and none for
            k, where the layer is a fused qkv; elsewhere it is the same as ``fused``.
        targets: Patterns of linear layers or 1x1 convolutions; empty: ``*.qkv``, or in a ConvNeXt, which has no
            attention, ``stages.*.mlp.fc1``.
    """

    rank: int = 8
    split: Literal["fused", "qv"] = "fused"

    def __post_init__(self) -> None:
        check_size("rank", self.rank)
        check_choice("split", self.split, "fused", "qv")
        super().__post_init__()

    @property
    def places(self) -> tuple[str, ...]:
        """The fused q, k and v of each attention, or the first matrix of each MLP in a ConvNeXt."""
        return ("*.qkv", "stages.*.mlp.fc1")

    def wrap(self, model: nn.Module, name: str) -> LoRALayer:
        """Builds the wrapper of one layer."""
        split = self.split == "qv" and name.rpartition(".")[2] == "qkv"
        return LoRALayer(model.get_submodule(name), self, self.rank, split)
