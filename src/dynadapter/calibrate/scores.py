"""Compute the scores of samples at the early exits, with which thresholds are compared."""

import math
from collections.abc import Sequence
from typing import TypeGuard

import torch
from torch import Tensor

from dynadapter.calibrate.stacked import Stacked
from dynadapter.exits.policies import Policy, Thresholded, route
from dynadapter.spec import kinds

SATURATED = 1e-7
"""Certainties this close to 0 or 1 count as equal where log-odds are compared."""


def has_thresholds(kind: object) -> TypeGuard[type[Thresholded]]:
    """Check whether a kind of policy has thresholds."""
    return isinstance(kind, type) and issubclass(kind, Thresholded)


def thresholded(kind: type[Policy]) -> type[Thresholded]:
    """Return the kind if it has thresholds."""
    if not has_thresholds(kind):
        names = [known.__name__ for known in kinds(Thresholded)]  # type: ignore[type-abstract]
        raise ValueError(
            f"kind={getattr(kind, '__name__', kind)} has no thresholds; choose one of {names}, or your own "
            "subclass of Thresholded"
        )
    return kind


class Scores:
    """The scores of one kind of policy, with a sign so that a greater score means a more certain sample.

    A sample exits at the first early exit k with ``sure[k] >= cut[k]``. At ``laxest``, all samples with finite logits
    exit.

    Args:
        kind: A kind with thresholds.
        data: The samples.

    Attributes:
        sure: (early exits, samples), in the precision in which the policy compares; -inf where a sample cannot exit.
    """

    def __init__(self, kind: type[Policy], data: Stacked) -> None:
        self.kind = thresholded(kind)
        self.sign = 1 if self.kind.certain_above else -1
        self.laxest = 0.0 if self.sign > 0 else -1.0
        early = data.predicted[:-1]
        values = self.sign * self.kind.score(early)
        self.sure = values.where(early.isfinite().all(-1) & ~values.isnan(), -torch.inf)

    def cuts(self, policies: Sequence[Policy]) -> Tensor:
        """Return the cuts of policies of this kind (policies, early exits)."""
        each = [[self.sign * p.threshold_at(k) for k in range(len(self.sure))] for p in policies]  # type: ignore[attr-defined]
        return torch.tensor(each, dtype=self.sure.dtype, device=self.sure.device).reshape(len(policies), len(self.sure))

    def threshold(self, cut: float) -> float:
        """Return the threshold for a cut."""
        return self.sign * cut + 0.0  # + 0.0 turns -0.0 into 0.0

    def log_odds(self, slope: float) -> Tensor:
        """Return log-odds of the certainties, raised by a slope from exit to exit: (early exits, samples) float64."""
        certain = (self.sure.double() - self.laxest).clamp(SATURATED, 1 - SATURATED).logit()
        steps = slope * torch.arange(len(certain), dtype=torch.float64, device=certain.device)
        return torch.where(self.sure > -torch.inf, certain + steps[:, None], -torch.inf)

    def thresholds(self, cut: float, slope: float) -> tuple[float, ...]:
        """Return the threshold of each early exit that belongs to a cut through :meth:`log_odds`."""
        odds = (cut - slope * k for k in range(len(self.sure)))
        return tuple(self.threshold(self.laxest + (1 + math.tanh(x / 2)) / 2) for x in odds)

    def between(self, above: Tensor, below: Tensor) -> Tensor:
        """Return cuts between scores ``above``, at which samples exit, and the lower scores ``below``."""
        middle = below + (above - below) / 2
        return torch.where(middle > below, middle, above)  # neighbouring floats have no middle


def exit_indices(policies: Sequence[Policy], data: Stacked, scores: Scores | None = None) -> Tensor:
    """Return the exit indices (policies, samples) of policies without temperatures and combination."""
    index = torch.full((len(policies), data.samples), data.exits - 1, device=data.logits.device)
    places: dict[type[Thresholded], list[int]] = {}
    for place, policy in enumerate(policies):
        policy.check(data.exits)
        if isinstance(policy, Thresholded):
            places.setdefault(type(policy), []).append(place)
        else:
            index[place] = route(policy, data.predicted)
    for kind, rows in places.items():
        known = scores if scores is not None and scores.kind is kind else Scores(kind, data)
        cuts = known.cuts([policies[row] for row in rows])
        found = index[rows]
        for k in reversed(range(data.exits - 1)):  # the earliest exit writes last
            found[known.sure[k] >= cuts[:, k, None]] = k
        index[rows] = found
    return index
