"""Combine the exits that a sample has passed: its prediction, and the scores of the exit policy, read all of them."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from dynadapter.exits.policies import Confidence, Policy


@dataclass(frozen=True)
class Combined(Policy):
    """Apply another policy to a combination of the newest exit with the exits before it; predict by it, too.

    The heads have run anyway, so it costs nothing. An exit with non-finite logits counts for nothing.

    >>> policy = Combined(Confidence(0.8), by="mean")
    >>> policy.name
    'confidence_0.8_mean'
    >>> logits = torch.tensor([[[2.0, 0.0]], [[0.0, 1.0]]])  # two exits: probabilities 0.88 and 0.27 of class 0
    >>> policy.combine(logits).softmax(-1)[:, 0, 0]
    tensor([0.8808, 0.5749])

    Args:
        policy: The other policy. Its temperatures apply to the combined logits.
        by: ``mean``, the running mean of the probabilities; or ``geometric``, their geometric mean weighted by depth:
            exit k has weight k.

    Source: Wołczyk et al. 2021, Zero Time Waste (its ensembling), with fixed weights (ours).
    """

    policy: Policy = field(default_factory=Confidence)
    by: Literal["mean", "geometric"] = "geometric"

    def __post_init__(self) -> None:
        if self.by not in ("mean", "geometric"):
            raise ValueError(f"by={self.by!r} is unknown; choose 'mean' or 'geometric'")
        if isinstance(self.policy, Combined):
            raise ValueError("policy is Combined already; combine the exits once")

    @property
    def name(self) -> str:
        return f"{self.policy.name}_{self.by}"

    @property
    def uses_early_exits(self) -> bool:
        return True  # a sample that never exits early is predicted by all exits

    def check(self, exits: int) -> None:
        self.policy.check(exits)

    def combine(self, history: Tensor) -> Tensor:
        wide = history if history.dtype == torch.float64 else history.float()
        finite = wide.isfinite().all(-1, keepdim=True)  # (exits so far, batch, 1)
        log_p = torch.where(finite, wide, 0).log_softmax(-1)
        if self.by == "mean":
            sums = torch.where(finite, log_p, -torch.inf).logcumsumexp(0)
            combined = sums - finite.cumsum(0).to(wide.dtype).log()
        else:
            weights = torch.arange(1, len(wide) + 1, dtype=wide.dtype, device=wide.device)[:, None, None] * finite
            combined = (weights * log_p).cumsum(0) / weights.cumsum(0)
        return torch.where(finite, combined, wide)  # routing and its callers see that the newest exit is not finite

    def meets_condition(self, history: Tensor) -> Tensor:
        return self.policy.should_exit(self.combine(history))
