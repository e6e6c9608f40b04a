"""Combine the exits that a sample has passed, for its prediction and for the scores of the exit policy."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from dynadapter.exits.policies import Confidence, Never, Policy, Thresholded, wide
from dynadapter.exits.temperature import Scaled

Combine = Literal["own", "mean", "geometric"]
"""What an exit predicts by: its own logits, or a combination with the exits before it."""


@dataclass(frozen=True)
class Combined(Policy):
    """Combine the newest exit with the exits before it; another policy and the prediction use the combination.

    The heads have run anyway, so it adds no cost. An exit with non-finite logits is left out.

    >>> policy = Combined(Confidence(0.8), by="mean")
    >>> policy.name
    'confidence_0.8_mean'
    >>> logits = torch.tensor([[[2.0, 0.0]], [[0.0, 1.0]]])  # two exits: probabilities 0.88 and 0.27 of class 0
    >>> policy.combine(logits).softmax(-1)[:, 0, 0]
    tensor([0.8808, 0.5749])

    Args:
        policy: The other policy. Temperatures are applied first: ``Scaled(Combined(...), temperatures)``.
        by: ``mean``, the running mean of the probabilities; or ``geometric``, their geometric mean weighted by depth:
            exit k has weight k.

    Source: Wołczyk et al. 2021, Zero Time Waste (its ensembling), with fixed weights (ours).
    """

    policy: Policy = field(default_factory=Confidence)
    by: Literal["mean", "geometric"] = "geometric"

    def __post_init__(self) -> None:
        if self.by not in ("mean", "geometric"):
            raise ValueError(f"by={self.by!r} is unknown; choose 'mean' or 'geometric'")
        if type(self.policy).combine is not Policy.combine:
            raise ValueError(
                "policy changes what exits predict already; combine the exits once, after temperatures: "
                "Scaled(Combined(...), temperatures)"
            )

    @property
    def name(self) -> str:
        return f"{self.policy.name}_{self.by}"

    uses_early_exits = True  # a sample that never exits early is predicted by all exits

    def check(self, exits: int) -> None:
        self.policy.check(exits)

    def combine(self, history: Tensor) -> Tensor:
        own = wide(history)
        finite = own.isfinite().all(-1, keepdim=True)  # (exits so far, batch, 1)
        log_p = torch.where(finite, own, 0).log_softmax(-1)
        if self.by == "mean":
            sums = torch.where(finite, log_p, -torch.inf).logcumsumexp(0)
            combined = sums - finite.cumsum(0).to(own.dtype).log()
        else:
            weights = torch.arange(1, len(own) + 1, dtype=own.dtype, device=own.device)[:, None, None] * finite
            combined = (weights * log_p).cumsum(0) / weights.cumsum(0)
        return torch.where(finite, combined, own)  # routing and its callers see that the newest exit is not finite

    def meets_condition(self, history: Tensor) -> Tensor:
        return self.policy.should_exit(self.combine(history))


def predicting(by: Combine, temperatures: Sequence[float] | None = None) -> Policy:
    """Return a policy without early exits that combines exits in this way; see :func:`with_decision`.

    >>> with_decision(predicting("mean", (2.0, 1.0)), Confidence(0.8)).name
    'confidence_0.8_mean_scaled'
    """
    policy = Never() if by == "own" else Combined(Never(), by)
    return policy if all(t == 1 for t in temperatures or ()) else Scaled(policy, tuple(temperatures or ()))


def with_decision(policy: Policy, decision: Policy) -> Policy:
    """Return a policy with another inner policy and the same temperatures and combination."""
    if isinstance(policy, Scaled | Combined):
        return replace(policy, policy=with_decision(policy.policy, decision))
    return decision


def with_threshold(policy: Policy, threshold: float | tuple[float, ...]) -> Policy:
    """Return the same policy with another threshold.

    >>> with_threshold(Combined(Confidence(0.8), by="mean"), 0.5).name
    'confidence_0.5_mean'

    Raises:
        ValueError: The policy has no threshold, or the value is not valid.
    """
    before = decision(policy)
    if not isinstance(before, Thresholded):
        raise ValueError(f"threshold={threshold}: the policy {policy.name} has none; leave it out")
    return with_decision(policy, replace(before, threshold=threshold))


def decision(policy: Policy) -> Policy:
    """Return the policy inside temperatures and combination."""
    while isinstance(policy, Scaled | Combined):
        policy = policy.policy
    return policy
