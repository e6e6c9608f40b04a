"""The part of an ExitNet up to one exit, as a static network."""

from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from dynadapter.exits.net import ExitNet


class Truncated(nn.Module):
    """The part of an :class:`ExitNet` up to one exit, as a plain classifier.

    Args:
        net: The network whose modules it shares.
        k: Exit index, from 0; negative values count from the end.

    Raises:
        ValueError: If there is no such exit.
    """

    def __init__(self, net: "ExitNet", k: int) -> None:
        super().__init__()
        if not -net.num_exits <= k < net.num_exits:
            raise ValueError(f"exit index {k} is out of range; this network has exit indices 0 to {net.num_exits - 1}")
        self.net = net
        self.k = k % net.num_exits

    def forward(self, images: Tensor) -> Tensor:
        """Map images (batch, channels, height, width) to logits (batch, classes)."""
        x = self.net.embed(images)
        for k in range(self.k + 1):
            x = self.net.stage(k, x)
        return self.net.head(self.k, x)
