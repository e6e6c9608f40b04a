"""Adapter+: a bottleneck after each block, with a learned factor for each channel."""

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from dynadapter.adapters.base import check_size, parameter
from dynadapter.adapters.blocks import BlockSpec, has_channels_first
from dynadapter.adapters.bottleneck import BottleneckLayer
from dynadapter.adapters.droprate import DropRate, check_rate
from dynadapter.adapters.lowrank import add_product, project


class AdapterPlusLayer(BottleneckLayer):
    """``y + s * gain * (up @ drop(gelu(down @ y + down_bias)) + up_bias)``, where y is the block's output.

    Args:
        base_layer: The block.
        spec: The adapter's configuration.
        width: Channels of the block's output.

    Attributes:
        gain: (width,), the factor of each channel, 1 at the start.
        drop_path: Drops the update of a whole sample in training.
    """

    def __init__(self, base_layer: nn.Module, spec: "AdapterPlus", width: int) -> None:
        super().__init__(base_layer, spec, width, width, spec.bottleneck)
        self.channels_first = has_channels_first(base_layer)
        self.gain = nn.init.ones_(parameter(self.down, width))
        self.drop_path = DropRate(spec.drop_path).to(self.down.device)
        self.drop_path.training = self.training
        nn.init.trunc_normal_(self.down, std=0.01, a=-0.02, b=0.02)

    def forward(self, x: Tensor, **context: Tensor) -> Tensor:
        """Map the block's input to its adapted output; ``context`` holds the block's other arguments."""
        return self.after(self.base_layer(x, **context))

    def after(self, y: Tensor) -> Tensor:
        """Adapt the block's output, token by token; it may be only some of the tokens."""
        hidden = self.dropout(F.gelu(self.project_down(y)))
        up, bias = self.gain[:, None] * self.up, self.gain * self.up_bias
        if self.drop_path.training and self.drop_path.active:
            kept = self.drop_path(y.new_ones(len(y), *[1] * (y.ndim - 1)))
            update = project(hidden, up, bias, self.channels_first).to(y.dtype)
            return y + self.scale * kept * update
        return add_product(y, hidden, up, bias, self.scale, self.channels_first)


@dataclass(frozen=True, kw_only=True)
class AdapterPlus(BlockSpec):
    """Adapter+: a bottleneck with GELU after each block, whose channels have learned factors.

    Source: Steitz and Roth 2024, Adapters Strike Back (arXiv 2406.06820). The up-projection starts at zero (ours); in
        the paper both projections start at a truncated N(0, 0.01). It cannot be merged.

    Args:
        bottleneck: Channels of the bottleneck.
        drop_path: Fraction of the samples whose update is left out in training, in [0, 1).
        targets: Patterns of blocks; empty means all blocks.
    """

    bottleneck: int = 8
    drop_path: float = 0.1

    def __post_init__(self) -> None:
        check_size("bottleneck", self.bottleneck)
        check_rate(self.drop_path, "drop_path")
        super().__post_init__()

    def wrap(self, model: nn.Module, name: str) -> AdapterPlusLayer:
        """Build the wrapper of one block.

        Raises:
            ValueError: If that layer is not a block.
        """
        return AdapterPlusLayer(model.get_submodule(name), self, self.width(model, name))
