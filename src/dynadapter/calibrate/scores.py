"""The scores of samples at the early exits, which thresholds are compared with."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dynadapter.calibrate.stacked import Stacked
from dynadapter.exits.policies import (
    Confidence,
    Entropy,
    Margin,
    Policy,
    Thresholded,
    confidence,
    entropy,
    margin,
    route,
)
from dynadapter.exits.temperature import tempered


class Rule(NamedTuple):
    """How a kind of policy decides: a sample exits where ``sign * score >= sign * threshold``."""

    score: Callable[[Tensor], Tensor]
    sign: int


RULES: dict[type[Policy], Rule] = {
    Confidence: Rule(confidence, 1),
    Entropy: Rule(entropy, -1),
    Margin: Rule(margin, 1),
}
"""The kinds of policy with thresholds."""


def thresholded(kind: type[Policy]) -> type[Thresholded]:
    """Return the kind if it has thresholds to choose.

    Raises:
        ValueError: If it has none.
    """
    if kind not in RULES or not issubclass(kind, Thresholded):
        names = [known.__name__ for known in RULES]
        raise ValueError(f"kind={getattr(kind, '__name__', kind)} has no thresholds to choose; choose one of {names}")
    return kind


class Scores:
    """The scores of one kind of policy, with a sign so that a greater score means a more certain sample.

    A sample exits at the first early exit k with ``sure[k] >= cut[k]``. Cuts range from ``laxest``, where all samples
    with finite logits exit, to ``strictest``, where only samples with the greatest possible score exit.

    Args:
        kind: A kind with thresholds.
        data: The samples.

    Attributes:
        sure: (early exits, samples), in the precision in which the policy compares; -inf where a sample cannot exit.
    """

    def __init__(self, kind: type[Policy], data: Stacked) -> None:
        self.kind = thresholded(kind)
        score, self.sign = RULES[kind]
        self.laxest, self.strictest = (0.0, 1.0) if self.sign > 0 else (-1.0, 0.0)
        logits = tempered(data.logits, data.temperatures)
        self.sure = logits.new_full((data.exits - 1, data.samples), -torch.inf)
        for k in range(data.exits - 1):
            finite = data.logits[k].isfinite().all(-1) & logits[k].isfinite().all(-1)
            values = self.sign * score(logits[k])
            self.sure[k] = values.where(finite & ~values.isnan(), -torch.inf)

    def exit_index(self, cuts: Sequence[float]) -> Tensor:
        """Return the exit indices (samples,) under one cut per early exit."""
        return first_exit(self.sure >= torch.tensor(cuts, dtype=self.sure.dtype, device=self.sure.device)[:, None])

    def cuts(self, policy: Thresholded) -> list[float]:
        """Return the cuts of a policy of this kind, one per early exit."""
        return [self.sign * policy.threshold_at(k) for k in range(len(self.sure))]

    def threshold(self, cut: float) -> float:
        """Return the threshold that belongs to a cut."""
        return self.sign * cut + 0.0  # + 0.0 turns -0.0 into 0.0

    def between(self, above: Tensor, below: Tensor) -> Tensor:
        """Return cuts between scores ``above``, which exit, and the lesser scores ``below``, which do not."""
        middle = below + (above - below) / 2
        return torch.where(middle > below, middle, above)  # neighbouring floats have no middle

    def cut(self, falling: Tensor, count: int) -> float:
        """Return the cut where the first ``count`` of falling scores exit, together with scores equal to the last."""
        if count == 0:
            return self.strictest
        least = falling[count - 1]
        rest = falling[falling < least]
        return self.between(least, rest[0]).item() if len(rest) else self.laxest

    def order(self) -> list[Tensor]:
        """Return the samples in the order of their scores at each early exit, highest first."""
        return [row.argsort(descending=True, stable=True) for row in self.sure]


def first_exit(exits: Tensor) -> Tensor:
    """Return the first exit where a sample exits, else the last: (early exits, samples) bool to (samples,) int64."""
    index = torch.full(exits.shape[1:], len(exits), device=exits.device)
    for k in reversed(range(len(exits))):
        index[exits[k]] = k
    return index


def exit_indices(policies: Sequence[Policy], data: Stacked) -> Iterator[Tensor]:
    """Yield the exit indices (samples,) of each policy; the scores of a kind are computed once."""
    scores: dict[type[Policy], Scores] = {}
    for policy in policies:
        kind = type(policy)
        if kind in RULES and isinstance(policy, Thresholded):
            policy.check(data.exits)
            scores[kind] = scores.get(kind) or Scores(kind, data)
            yield scores[kind].exit_index(scores[kind].cuts(policy))
        else:
            yield route(data.complete(policy), data.logits)
