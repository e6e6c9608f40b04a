"""LoRA: a low-rank update of a frozen matrix."""

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynadapter.adapters.base import AdapterLayer, AdapterSpec, check_choice, check_size, matrices, parameter
from dynadapter.adapters.lowrank import add_product, is_recorded, project, some_outputs
from dynadapter.adapters.merging import exact, rebuilt

PLACES = ("*.attn.qkv", "*.attn.q_proj", "*.attn.k_proj", "*.attn.v_proj", "stages.*.mlp.fc1")
"""The q, k and v of each attention, or the first matrix of each MLP in a ConvNeXt."""


class LowRankLayer(AdapterLayer):
    """``W x + b + s * matrix_up @ drop(matrix_down @ x)``; a subclass defines both matrices."""

    @abstractmethod
    def matrix_down(self) -> Tensor:
        """Return the matrix from the layer's input to the low-rank activations, (rank, width)."""

    @abstractmethod
    def matrix_up(self) -> Tensor:
        """Return the matrix from the low-rank activations to the layer's output, (out, rank)."""

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (..., width) to (..., out), or (batch, width, rows, columns) to (batch, out, rows, columns)."""
        y = self.base_layer(x)
        hidden = self.dropout(self.project_down(x))
        own = not is_recorded(self.base_layer)
        return add_product(y, hidden, self.matrix_up(), None, self.scale, self.channels_first, own)

    def project_down(self, x: Tensor) -> Tensor:
        """Map the base layer's input to the low-rank activations, with the kernel size and stride of the base layer."""
        base = matrices(self.base_layer)[0]
        if isinstance(base, nn.Conv2d):
            weight = self.matrix_down().to(x.dtype).unflatten(1, base.weight.shape[1:])
            return F.conv2d(x, weight, None, base.stride, base.padding, base.dilation)
        return project(x, self.matrix_down(), None, False)

    def some(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Compute only the outputs ``start:stop`` for tokens (..., width)."""
        y = some_outputs(matrices(self.base_layer)[0], x, slice(start, stop))
        hidden = self.dropout(project(x, self.matrix_down(), None, False))
        return add_product(y, hidden, self.matrix_up()[start:stop], None, self.scale, False, own=True)

    def merged(self) -> nn.Module:
        """Return the base layer with ``W + s * matrix_up @ matrix_down``."""
        weight = matrices(self.base_layer)[0].weight.flatten(1)
        return rebuilt(
            self.base_layer, exact(weight) + self.scale * exact(self.matrix_up()) @ exact(self.matrix_down())
        )


class LoRALayer(LowRankLayer):
    """``W x + b + s * lora_b @ drop(lora_a @ x)``.

    Args:
        base_layer: A linear layer, or a convolution in one group.
        spec: The adapter's configuration.
        rank: Rank of each update.
        split: Whether the layer is a fused qkv in which q and v each get an update.

    Attributes:
        lora_a: (rank, width), or (2 * rank, width), the rows of q before those of v; on a convolution with a kernel of
            k pixels (rank, width * k), the weight of a convolution with that kernel.
        lora_b: (out, rank), or (2 * out / 3, rank), likewise.
    """

    def __init__(self, base_layer: nn.Module, spec: AdapterSpec, rank: int, split: bool) -> None:
        super().__init__(base_layer, spec)
        weight = matrices(base_layer)[0].weight
        out, width = weight.flatten(1).shape
        self.split = split
        self.lora_a = parameter(weight, 2 * rank if split else rank, width)
        self.lora_b = parameter(weight, 2 * out // 3 if split else out, rank)
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    def matrix_down(self) -> Tensor:
        return self.lora_a

    def matrix_up(self) -> Tensor:
        if not self.split:
            return self.lora_b
        query, value = self.lora_b.chunk(2)
        key = query.new_empty(len(query), 0)  # no columns, so its rows of the block-diagonal matrix are zero
        return torch.block_diag(query, key, value)


def _has_equal_parts(attention: Any) -> bool:
    """Check whether q, k and v of an attention with a fused qkv have the same number of channels."""
    if hasattr(attention, "dim_qk"):  # a LambdaLayer, whose heads share k and v
        return attention.num_heads == 1 and attention.dim_qk == attention.dim_v
    return getattr(attention, "dim_out_qk", None) == getattr(attention, "dim_out_v", None)  # BottleneckAttn


@dataclass(frozen=True, kw_only=True)
class LoRA(AdapterSpec):
    """Low-rank update of the fused qkv projection, or of any other matrix.

    Source: Hu et al. 2021, LoRA (arXiv 2106.09685). The scale s is ``alpha / r`` in that paper and in peft. Dropout
    acts on the ``rank`` activations of the bottleneck (ours); peft drops elements of the layer's input.

    Args:
        rank: Rank r of each update.
        split: ``fused`` uses one pair of matrices for the whole layer. ``qv`` uses one pair for q and one for v of a
            fused qkv, and none for k; on other layers it equals ``fused``.
        targets: Patterns of linear layers, or convolutions in one group; empty means ``*.qkv``, or q, k and v where
            they are separate layers; ``stages.*.mlp.fc1`` on a ConvNeXt, which has no attention; in another
            convolutional network the convolutions that mix channels.
    """

    rank: int = 8
    split: Literal["fused", "qv"] = "fused"

    places = PLACES

    def __post_init__(self) -> None:
        check_size("rank", self.rank)
        check_choice("split", self.split, "fused", "qv")
        super().__post_init__()

    def wrap(self, model: nn.Module, name: str) -> LoRALayer:
        """Build the wrapper of one layer.

        Raises:
            ValueError: If q and v are to be adapted in a layer where they alternate by head, as in MaxViT, or where
                q, k and v have different numbers of channels, as in LambdaResNet.
        """
        block, _, key = name.rpartition(".")
        split = self.split == "qv" and key == "qkv"
        attention: Any = model.get_submodule(block)
        if split and getattr(attention, "head_first", False):
            raise ValueError(f"split='qv' does not fit {name}, whose q, k and v alternate by head; use split='fused'")
        if split and not _has_equal_parts(attention):
            raise ValueError(
                f"split='qv' does not fit {name}, whose q, k and v have different numbers of channels; use "
                "split='fused'"
            )
        return LoRALayer(model.get_submodule(name), self, self.rank, split)
