"""Dropout whose rate is a buffer, so that a schedule can move it in place."""

import torch
from torch import Tensor, nn


def check_rate(rate: float) -> float:
    """Returns the rate where it is a fraction in [0, 1).

    Raises:
        ValueError: If it is not.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"dropout={rate} must be a fraction of at least 0 and below 1; 0 switches it off")
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
        rate: Scalar buffer, not saved. Written in place, it does not make compiled code recompile.
        active: Whether a positive rate was ever set; until then not even a random number is drawn.
    """

    rate: Tensor

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("rate", torch.tensor(check_rate(rate)), persistent=False)
        self.active = rate > 0

    def set(self, rate: float) -> None:
        """Changes the rate in place.

        Raises:
            ValueError: If the rate is not in [0, 1).
        """
        self.rate.fill_(check_rate(rate))
        # Never back to False: a rate that is 0 now and then must not recompile each time it changes.
        self.active = self.active or rate > 0

    def forward(self, x: Tensor) -> Tensor:
        """Maps activations of any shape to the same shape and type."""
        if not (self.training and self.active):
            return x
        rate = self.rate.float()
        # Drawn in float32: half-precision random numbers are so coarse that the rate would be missed.
        kept = torch.rand_like(x, dtype=torch.float32) >= rate
        return x * kept / (1 - rate)

    def extra_repr(self) -> str:
        return f"rate={float(self.rate):g}"
