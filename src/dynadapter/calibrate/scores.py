"""How sure the early exits are of each sample: the numbers that thresholds are compared with."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dynadapter.calibrate.stacked import Stacked
from dynadapter.exits.policies import Confidence, Entropy, Margin, Policy, Thresholded, confidence, entropy, margin
from dynadapter.exits.temperature import tempered


class Rule(NamedTuple):
    """How a kind of policy reads the logits: leave where ``sign * score >= sign * threshold``."""

    score: Callable[[Tensor], Tensor]
    sign: int


RULES: dict[type[Policy], Rule] = {
    Confidence: Rule(confidence, 1),
    Entropy: Rule(entropy, -1),
    Margin: Rule(margin, 1),
}
"""The kinds with thresholds."""


def thresholded(kind: type[Policy]) -> type[Thresholded]:
    """Makes sure that a kind has thresholds to choose.

    Raises:
        ValueError: If it has none; the message lists the kinds that do.
    """
    if kind not in RULES or not issubclass(kind, Thresholded):
        names = [known.__name__ for known in RULES]
        raise ValueError(f"kind={getattr(kind, '__name__', kind)} has no thresholds to choose; choose one of {names}")
    return kind


class Scores:
    """The scores of one kind of policy, turned so that greater is surer.

    A sample leaves at the first early exit k with ``sure[k] >= cut[k]``. Cuts lie between ``laxest``, with which
    everybody leaves who may, and ``strictest``, with which only those leave who have the greatest score there is.

    Args:
        kind: A kind with thresholds.
        data: The samples.

    Attributes:
        sure: (early exits, samples) in the precision in which the policy compares; -inf where a sample must go on.
    """

    def __init__(self, kind: type[Policy], data: Stacked) -> None:
        self.kind = thresholded(kind)
        score, self.sign = RULES[kind]
        self.laxest, self.strictest = (0.0, 1.0) if self.sign > 0 else (-1.0, 0.0)
        logits = tempered(data.logits, data.temperatures)
        self.sure = logits.new_full((data.exits - 1, data.samples), -torch.inf)
        for k in range(data.exits - 1):
            may = data.logits[k].isfinite().all(-1) & logits[k].isfinite().all(-1)
            values = self.sign * score(logits[k])
            self.sure[k] = values.where(may & ~values.isnan(), -torch.inf)

    def taken(self, cuts: Sequence[float]) -> Tensor:
        """Gives the exits (samples,) at which the samples leave, from one cut per early exit."""
        return first_exit(self.sure >= torch.tensor(cuts, dtype=self.sure.dtype, device=self.sure.device)[:, None])

    def cuts(self, policy: Thresholded) -> list[float]:
        """Gives the cuts of a policy of this kind, one per early exit."""
        return [self.sign * policy.at(k) for k in range(len(self.sure))]

    def threshold(self, cut: float) -> float:
        """Gives the threshold that a cut stands for."""
        return self.sign * cut + 0.0  # + 0.0 turns -0.0 into 0.0

    def between(self, above: Tensor, below: Tensor) -> Tensor:
        """Gives cuts that let those with scores ``above`` leave and those with the lesser scores ``below`` go on."""
        middle = below + (above - below) / 2
        return torch.where(middle > below, middle, above)  # neighbouring floats have no middle

    def cut(self, falling: Tensor, leavers: int) -> float:
        """Gives the cut that lets the first ``leavers`` of a falling queue of scores leave, and those who tie."""
        if leavers == 0:
            return self.strictest
        least = falling[leavers - 1]
        rest = falling[falling < least]
        return self.between(least, rest[0]).item() if len(rest) else self.laxest

    def order(self) -> list[Tensor]:
        """Gives the samples in the order of their scores at each early exit, the surest first."""
        return [row.argsort(descending=True, stable=True) for row in self.sure]


def first_exit(leaves: Tensor) -> Tensor:
    """Gives the first exit that lets a sample leave, else the last: (early exits, samples) bool to (samples,) int64."""
    taken = torch.full(leaves.shape[1:], len(leaves), device=leaves.device)
    for k in reversed(range(len(leaves))):
        taken[leaves[k]] = k
    return taken
