"""Early exits that learn from the last exit's answer beside the labels."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dynadapter.spec import Spec


@dataclass(frozen=True)
class Distillation(Spec):
    """Makes a part of each early exit's loss the divergence from what the last exit says (Phuong and Lampert 2019).

    The last exit is the teacher and gets no gradient from it. Answers are softened by a temperature T, and the
    divergence counts T² times, so that its gradient keeps its size (Hinton et al. 2015).

    Args:
        share: Part of an early exit's loss that is the divergence, in [0, 1]; the rest is its cross-entropy.
        temperature: Of both answers, above 0.
    """

    share: float = 0.5
    temperature: float = 2.0

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"share={self.share} must be in [0, 1]")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be above 0")

    def mix(self, losses: Tensor, logits: Tensor) -> Tensor:
        """Gives the exits' losses with the divergence mixed in; the last exit's stays.

        Args:
            losses: The cross-entropies (exits,).
            logits: (exits, batch, classes).

        Returns:
            (exits,).
        """
        if len(logits) == 1:
            return losses
        soft = (logits if logits.dtype.itemsize > 2 else logits.float()) / self.temperature
        answers, wanted = soft[:-1].log_softmax(-1), soft[-1].detach().log_softmax(-1)
        apart = F.kl_div(answers, wanted.expand_as(answers), reduction="none", log_target=True).sum(-1).mean(1)
        early = losses[:-1].lerp(self.temperature**2 * apart, self.share)
        return torch.cat([early, losses[-1:]])
