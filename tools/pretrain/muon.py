"""Muon in float32: torch's iterates in bfloat16, which a CPU without such instructions does many times slower."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def orthogonalized(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Return the matrix with singular values near 1, by Newton-Schulz iteration as in ``torch.optim.Muon``.

    A step maps each singular value s to a·s + b·s³ + c·s⁵, in the matrix's own precision.
    """
    a, b, c = coefficients
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    wide = wide / wide.norm().clamp(min=eps)
    for _ in range(steps):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide if matrix.shape[0] <= matrix.shape[1] else wide.T


class Muon(torch.optim.Muon):
    """``torch.optim.Muon`` with ``adjust_lr_fn="match_rms_adamw"``, whose iteration keeps the gradient's precision.

    Its state is torch's, so checkpoints of either fit the other.
    """

    def __init__(self, params: Any, **settings: Any) -> None:
        super().__init__(params, adjust_lr_fn="match_rms_adamw", **settings)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient."""
        for group in self.param_groups:
            iteration = group["ns_coefficients"], group["ns_steps"], group["eps"]
            for matrix in group["params"]:
                if (gradient := matrix.grad) is not None:
                    mean = self.state[matrix].setdefault("momentum_buffer", torch.zeros_like(gradient))
                    mean.lerp_(gradient, 1 - group["momentum"])
                    update = orthogonalized(gradient.lerp(mean, group["momentum"]), *iteration)
                    matrix.mul_(1 - group["lr"] * group["weight_decay"])
                    matrix.sub_(update, alpha=group["lr"] * 0.2 * max(matrix.shape) ** 0.5)
