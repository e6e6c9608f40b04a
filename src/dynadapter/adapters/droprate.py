"""Dropout whose rate is a buffer, so that a schedule can change it in place."""

import torch
from torch import Tensor, nn


def check_rate(rate: float, name: str = "dropout") -> float:
    """Return the rate as a float."""
    if not 0 <= rate < 1:
        raise ValueError(f"{name}={rate} must be a fraction of at least 0 and below 1; 0 switches it off")
    return float(rate)


class DropRate(nn.Module):
    """Inverted dropout in training mode, the identity in evaluation mode.

    >>> drop = DropRate(0.1)
    >>> drop.set(0.5)
    >>> drop.rate
    tensor(0.5000)

    Args:
        rate: Fraction of the activations to drop, in [0, 1).

    Attributes:
        rate: Scalar buffer, not saved. Writing it in place does not recompile compiled code.
        active: Whether a positive rate was ever set; before that no random number is drawn.
    """

    rate: Tensor

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("rate", torch.tensor(check_rate(rate)), persistent=False)
        self.active = rate > 0

    def set(self, rate: float) -> None:
        """Set the rate in place."""
        self.rate.fill_(check_rate(rate))
        # Never back to False: a rate that is sometimes 0 must not recompile at each change
        self.active = self.active or rate > 0

    def forward(self, x: Tensor) -> Tensor:
        """Map activations of any shape to the same shape and type."""
        if not (self.training and self.active):
            return x
        rate = self.rate.float()
        # In float32: half-precision random numbers are too coarse to meet the rate
        kept = torch.rand_like(x, dtype=torch.float32) >= rate
        return x * kept / (1 - rate)

    def extra_repr(self) -> str:
        return f"rate={float(self.rate):g}"
