"""The joint loss of all exits, and distillation from the last exit to the early ones."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dynadapter.exits.policies import wide
from dynadapter.spec import Spec

IGNORED = -100
"""Padding label of evaluation, ignored: cross-entropy leaves such samples out, and so do all measures."""


def exit_losses(
    logits: Tensor, targets: Tensor, label_smoothing: float = 0.0, class_weights: Tensor | None = None
) -> Tensor:
    """Return each exit's cross-entropy, the mean over the batch; half-precision logits are converted to float32.

    Args:
        logits: ``(exits, batch, classes)``.
        targets: Class indices ``(batch,)`` int64, or probabilities ``(batch, classes)`` as mixup produces them.
        label_smoothing: Probability spread evenly over all classes, in [0, 1].
        class_weights: ``(classes,)``, the weight of an image's cross-entropy by its class; a mixed image has the mean
            weight of its classes. The sum is divided by the number of images and not by the sum of weights, so that the
            mean over processes equals that of the whole batch.

    Returns:
        ``(exits,)``.

    Raises:
        ValueError: The targets fit neither shape.
    """
    _, batch, classes = logits.shape
    if targets.shape not in ((batch,), (batch, classes)):
        raise ValueError(
            f"targets {tuple(targets.shape)} do not fit logits {tuple(logits.shape)} (exits, batch, classes); "
            f"give classes {(batch,)} or probabilities {(batch, classes)}"
        )
    if class_weights is None:
        return torch.stack([F.cross_entropy(one, targets, label_smoothing=label_smoothing) for one in wide(logits)])
    counted: Tensor | int = batch
    if targets.dim() == 1:
        factors, counted = class_weights[targets.clamp(min=0)], (targets != IGNORED).sum()
    else:  # a product of elements: autocast would round a product of matrices
        factors = (targets.float() * class_weights).sum(-1)
    each = [F.cross_entropy(one, targets, reduction="none", label_smoothing=label_smoothing) for one in wide(logits)]
    return torch.stack([(factors * losses).sum() / counted for losses in each])


def joint_loss(logits: Tensor, targets: Tensor, weights: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return the weighted sum of all exits' cross-entropies.

    An exit of weight 0 stays in the graph with zero gradients, so that data-parallel training finds every parameter.

    Args:
        logits: ``(exits, batch, classes)``.
        targets: Class indices ``(batch,)`` int64, or probabilities ``(batch, classes)`` as mixup produces them.
        weights: ``(exits,)``.
        label_smoothing: Probability spread evenly over all classes, in [0, 1].

    Returns:
        Scalar.

    Raises:
        ValueError: The targets or weights do not fit the logits.
    """
    if weights.shape != logits.shape[:1]:
        raise ValueError(f"weights {tuple(weights.shape)} must be one per exit: {tuple(logits.shape[:1])}")
    return (weights * exit_losses(logits, targets, label_smoothing)).sum()


@dataclass(frozen=True)
class Distillation(Spec):
    """Distillation from the last exit: a part of each early exit's loss is the divergence from the last exit's output.

    The last exit receives no gradient from it. Both outputs are softened by a temperature T, and the divergence is
    multiplied by T², which keeps the scale of its gradient (Hinton et al. 2015). Source: Phuong and Lampert 2019.

    Args:
        share: Fraction of an early exit's loss that is the divergence, in [0, 1]; the rest is its cross-entropy.
        temperature: Temperature of both outputs, above 0.

    Raises:
        ValueError: A value is out of range.
    """

    share: float = 0.5
    temperature: float = 2.0

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"share={self.share} must be in [0, 1]")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be above 0")

    def mix(self, losses: Tensor, logits: Tensor) -> Tensor:
        """Return the exits' losses with the divergence mixed in; the last exit's loss is unchanged.

        Args:
            losses: The cross-entropies ``(exits,)``.
            logits: ``(exits, batch, classes)``.

        Returns:
            ``(exits,)``.
        """
        if len(logits) == 1:
            return losses
        soft = wide(logits) / self.temperature
        students, teacher = soft[:-1].log_softmax(-1), soft[-1].detach().log_softmax(-1)
        divergence = F.kl_div(students, teacher.expand_as(students), reduction="none", log_target=True).sum(-1).mean(1)
        early = losses[:-1].lerp(self.temperature**2 * divergence, self.share)
        return torch.cat([early, losses[-1:]])
