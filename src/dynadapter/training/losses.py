"""The joint loss of all exits."""

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED = -100
"""The class of a sample that only fills up a batch; cross-entropy leaves it out, and so must every measure."""


def exit_losses(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Gives each exit's cross-entropy, the mean over the batch; half-precision logits are taken in float32.

    Args:
        logits: (exits, batch, classes).
        targets: Classes (batch,) int64, or probabilities (batch, classes) as mixup makes them.
        label_smoothing: Share of the target spread evenly over all classes, in [0, 1].

    Returns:
        (exits,).

    Raises:
        ValueError: If the targets fit neither shape.
    """
    _, batch, classes = logits.shape
    if targets.shape not in ((batch,), (batch, classes)):
        raise ValueError(
            f"targets {tuple(targets.shape)} fit no logits {tuple(logits.shape)} (exits, batch, classes); "
            f"give classes {(batch,)} or probabilities {(batch, classes)}"
        )
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    return torch.stack([F.cross_entropy(one, targets, label_smoothing=label_smoothing) for one in logits])


def joint_loss(logits: Tensor, targets: Tensor, weights: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Gives the weighted sum of all exits' cross-entropies.

    An exit of weight 0 stays in the graph with zero gradients, so that data-parallel training misses no parameter.

    Args:
        logits: (exits, batch, classes).
        targets: Classes (batch,) int64, or probabilities (batch, classes) as mixup makes them.
        weights: (exits,).
        label_smoothing: Share of the target spread evenly over all classes, in [0, 1].

    Returns:
        Scalar.

    Raises:
        ValueError: If the targets or weights do not fit the logits.
    """
    if weights.shape != logits.shape[:1]:
        raise ValueError(f"weights {tuple(weights.shape)} must be one per exit: {tuple(logits.shape[:1])}")
    return (weights * exit_losses(logits, targets, label_smoothing)).sum()
