"""Convpass: a small convolution over the grid of tokens beside attention and beside the MLP."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynadapter.adapters.base import AdapterSpec, channels, check_size, keeps_grid, parameter
from dynadapter.adapters.bottleneck import AdaptFormer, BottleneckLayer
from dynadapter.backbones import prefix_tokens


class ConvpassLayer(BottleneckLayer):
    """``layer(x) + s * (up @ drop(gelu(conv(gelu(down @ x + down_bias)) + kernel_bias)) + up_bias)``.

    The 3x3 convolution runs over the grid of patches. Each token before the patches, such as the class token, is
    convolved alone, as an image of one pixel.

    Args:
        base_layer: An attention, an MLP or a single matrix.
        spec: The adapter's configuration.
        prefix: Tokens before the patches.
        grids: Possible grids (rows, columns) of the layer's patches, of a video (moments, rows, columns); any other
            number of patches must be a square.

    Attributes:
        kernel: (bottleneck, bottleneck, 3, 3), the identity at the start.
        kernel_bias: (bottleneck,).
    """

    needs_grid = True

    def __init__(self, base_layer: nn.Module, spec: "Convpass", prefix: int, grids: Sequence[tuple[int, ...]]) -> None:
        super().__init__(base_layer, spec, *channels(base_layer), spec.bottleneck)
        self.prefix = prefix
        self.grids = {math.prod(grid): grid for grid in grids}
        self.kernel = nn.init.dirac_(parameter(self.down, spec.bottleneck, spec.bottleneck, 3, 3))
        self.kernel_bias = parameter(self.down, spec.bottleneck)
        nn.init.xavier_uniform_(self.down)

    def forward(self, x: Tensor, **context: Tensor) -> Tensor:
        """Map tokens (..., width) or (batch, width, rows, columns) to the adapted output of the base layer."""
        hidden = F.gelu(self.project_down(x))
        if self.channels_first:
            hidden = self._convolved(hidden)
        elif hidden.ndim == 4:
            hidden = self._convolved(hidden.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        else:
            hidden = self._mixed(hidden)
        return self.add_up_projection(self.base_layer(x, **context), self.dropout(F.gelu(hidden)))

    def _convolved(self, hidden: Tensor) -> Tensor:
        """Convolve (batch, bottleneck, rows, columns)."""
        return F.conv2d(hidden, self.kernel.to(hidden.dtype), self.kernel_bias.to(hidden.dtype), padding=1)

    def _mixed(self, hidden: Tensor) -> Tensor:
        """Convolve tokens (batch, tokens, bottleneck) on their grid."""
        patches = hidden[:, self.prefix :]
        batch, count, width = patches.shape
        grid = self.grids.get(int(count)) or (math.isqrt(count),) * 2
        rows, columns = grid[-2:]
        if math.prod(grid) != count:
            raise ValueError(
                f"Convpass needs every patch in its place, and {count} do not form a square; give square images"
            )
        moments = patches.reshape(-1, rows * columns, width)  # of a video; of an image one
        images = moments.transpose(1, 2).reshape(-1, width, rows, columns)
        patches = self._convolved(images).flatten(2).transpose(1, 2).reshape(batch, count, width)
        if not self.prefix:
            return patches
        middle = self.kernel[:, :, 1, 1].to(hidden.dtype)
        front = F.linear(hidden[:, : self.prefix], middle, self.kernel_bias.to(hidden.dtype))
        return torch.cat([front, patches], 1)


@dataclass(frozen=True, kw_only=True)
class Convpass(AdapterSpec):
    """A bottleneck with a 3x3 convolution beside attention and beside the MLP, on their normalised input.

    Source: Jie and Deng 2022, Convpass (arXiv 2207.07039). In a Swin Transformer the grid beside attention is a window,
    in a VideoMAE that of one moment.
    It does not work with token merging and exit tokens, and it cannot be merged.

    Args:
        bottleneck: Channels of the bottleneck.
        targets: Patterns of attentions, MLPs or matrices; empty means the attention and the MLP of each block.
    """

    dropout: float = 0.1
    bottleneck: int = 8

    takes = AdaptFormer.takes
    places = ("*blocks.*.attn", "*blocks.*.mlp")
    once_a_block = True

    def __post_init__(self) -> None:
        check_size("bottleneck", self.bottleneck)
        super().__post_init__()

    def fits(self, layer: nn.Module) -> bool:
        """Check whether the layer or one of its children is a matrix, or it is a convolution that keeps the grid."""
        return keeps_grid(layer)

    def defaults(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> list[str]:
        """Return the names of the layers at its places; none in a Hiera, whose tokens are not ordered by rows."""
        return [] if hasattr(model, "unroll") else super().defaults(model, layers)

    def wrap(self, model: nn.Module, name: str) -> ConvpassLayer:
        """Build the wrapper of one layer.

        Raises:
            ValueError: If the model is a Hiera, whose tokens are not ordered by rows.
        """
        if hasattr(model, "unroll"):
            raise ValueError(
                f"Convpass cannot wrap {name}: the tokens of {type(model).__name__} are not ordered by rows; choose "
                "another kind"
            )
        layer, block = model.get_submodule(name), model.get_submodule(name.rpartition(".")[0])
        known = (
            (layer, "window_size"),
            (block, "input_resolution"),
            (getattr(model, "patch_embed", None), "grid_size"),
        )
        grids = [getattr(owner, attribute, None) for owner, attribute in known]
        return ConvpassLayer(layer, self, prefix_tokens(model), [tuple(grid) for grid in grids if grid is not None])
