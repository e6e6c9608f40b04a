"""RepAdapter: a linear adapter before a frozen matrix, which can be merged into that matrix."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from dynadapter.adapters.base import AdapterLayer, AdapterSpec, check_choice, check_size, is_matrix, matrices, parameter
from dynadapter.adapters.lowrank import add_product, project, some_outputs
from dynadapter.adapters.merging import exact, rebuilt


class RepAdapterLayer(AdapterLayer):
    """``W f(u) + b`` with ``f(u) = u + s * (up @ drop(down @ u + down_bias) + up_bias)``, up in groups.

    Args:
        base_layer: A linear layer, or a convolution in one group.
        spec: The adapter's configuration.

    Attributes:
        down: (bottleneck, width).
        down_bias: (bottleneck,) or None.
        up: (width, bottleneck / groups); as in a grouped convolution, each group of rows reads its own part of the
            bottleneck.
        up_bias: (width,) or None.
    """

    def __init__(self, base_layer: nn.Module, spec: "RepAdapter") -> None:
        super().__init__(base_layer, spec)
        weight = matrices(base_layer)[0].weight
        width = weight.shape[1]
        self.groups = spec.groups
        self.down = parameter(weight, spec.bottleneck, width)
        self.down_bias = parameter(weight, spec.bottleneck) if spec.bias else None
        self.up = parameter(weight, width, spec.bottleneck // spec.groups)
        self.up_bias = parameter(weight, width) if spec.bias else None
        nn.init.xavier_uniform_(self.down)

    def dense(self) -> Tensor:
        """Return ``up`` as one block-diagonal matrix (width, bottleneck); one product is faster than one per group."""
        return torch.block_diag(*self.up.chunk(self.groups)) if self.groups > 1 else self.up

    def forward(self, u: Tensor) -> Tensor:
        """Map tokens (..., width) to (..., out), or (batch, width, rows, columns) to (batch, out, rows, columns)."""
        return self.base_layer(self.adapted(u))

    def adapted(self, u: Tensor) -> Tensor:
        """Return ``f(u)``, in the layout of ``u``."""
        hidden = self.dropout(project(u, self.down, self.down_bias, self.channels_first))
        return add_product(u, hidden, self.dense(), self.up_bias, self.scale, self.channels_first)

    def some(self, u: Tensor, start: int, stop: int) -> Tensor:
        """Compute only the outputs ``start:stop`` for tokens (..., width)."""
        return some_outputs(matrices(self.base_layer)[0], self.adapted(u), slice(start, stop))

    def merged(self) -> nn.Module:
        """Return the base layer with ``W M`` and ``b + W c``, where ``f(u) = M u + c``, for each pixel of a kernel."""
        matrix = matrices(self.base_layer)[0]
        weight, up = exact(matrix.weight).movedim(1, -1), exact(self.dense())  # (out, ..., width)
        bias = None
        if matrix.bias is not None and self.down_bias is not None and self.up_bias is not None:
            constant = up @ exact(self.down_bias) + exact(self.up_bias)
            bias = exact(matrix.bias) + self.scale * weight.flatten(0, -2) @ constant
        weight = weight + self.scale * (weight @ up) @ exact(self.down)
        return rebuilt(self.base_layer, weight.movedim(-1, 1).contiguous(), bias)


@dataclass(frozen=True, kw_only=True)
class RepAdapter(AdapterSpec):
    """Linear bottleneck before attention and before the MLP, after their norms; without cost once merged.

    Source: Luo et al. 2023, RepAdapter (arXiv 2302.08106).

    Args:
        bottleneck: Channels of the bottleneck.
        groups: Groups of the up-projection; divides ``bottleneck`` and the layer's width.
        bias: Whether both projections have biases, if the wrapped layer is a matrix with a bias; otherwise the biases
            could not be merged.
        placement: ``block`` for both places, ``attn`` for the place before attention only.
        targets: Patterns of linear layers, or convolutions in one group; empty means the layers of ``placement``, or
            the convolutions of a convolutional network that mix channels.
    """

    dropout: float = 0.1
    bottleneck: int = 8
    groups: int = 2
    bias: bool = True
    placement: Literal["block", "attn"] = "block"

    def __post_init__(self) -> None:
        check_size("bottleneck", self.bottleneck)
        check_size("groups", self.groups)
        check_choice("placement", self.placement, "block", "attn")
        if self.bottleneck % self.groups:
            raise ValueError(f"groups={self.groups} must divide bottleneck={self.bottleneck}")
        super().__post_init__()

    @property
    def places(self) -> tuple[str, ...]:
        """The first matrices of each attention and of each block's MLP (two matrices in a SwiGLU)."""
        attention = ("*.attn.qkv", "*.attn.q_proj", "*.attn.k_proj", "*.attn.v_proj")
        mlp = ("*blocks.*.mlp.fc1", "*blocks.*.mlp.fc1_g", "*blocks.*.mlp.fc1_x")
        return (*attention, *mlp) if self.placement == "block" else attention

    def wrap(self, model: nn.Module, name: str) -> RepAdapterLayer:
        """Build the wrapper of one layer.

        Raises:
            ValueError: If the groups do not divide its width.
        """
        layer = model.get_submodule(name)
        matrix = matrices(layer)[0]
        if matrix.weight.shape[1] % self.groups:
            raise ValueError(
                f"groups={self.groups} must divide the {matrix.weight.shape[1]} channels that {name} takes"
            )
        return RepAdapterLayer(layer, replace(self, bias=self.bias and matrix.bias is not None and is_matrix(matrix)))
