"""All that a single number, a shared threshold or a patience, can do to a set of samples."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dynadapter.calibrate.scores import RULES, Scores
from dynadapter.calibrate.stacked import Stacked
from dynadapter.exits.policies import Confidence, Entropy, Margin, Never, Patience, Policy, route

KINDS: dict[str, type[Policy]] = {
    "confidence": Confidence,
    "entropy": Entropy,
    "margin": Margin,
    "patience": Patience,
}
"""The kinds of policy that can be calibrated, by the name a user types."""


class Ladder(NamedTuple):
    """Every setting that makes a difference, from nobody leaving early to everybody: costs fall from step to step.

    ``counts`` (steps, exits) are the samples that leave at each exit, ``right`` (steps,) the right predictions,
    ``cost`` (steps,) the average relative costs; ``policy`` gives the policy of a step, without temperatures;
    ``scores`` are those of a kind with thresholds.
    """

    counts: Tensor
    right: Tensor
    cost: Tensor
    policy: Callable[[int], Policy]
    scores: Scores | None = None


def ladder(kind: type[Policy], data: Stacked) -> Ladder:
    """Gives the ladder of a kind of policy.

    Raises:
        ValueError: If the kind cannot be calibrated.
    """
    if kind is Patience:
        return _patiences(data)
    if kind in RULES:
        return _thresholds(Scores(kind, data), data)
    names = [known.__name__ for known in KINDS.values()]
    raise ValueError(f"kind={getattr(kind, '__name__', kind)} cannot be calibrated; choose one of {names}")


def _patiences(data: Stacked) -> Ladder:
    policies: list[Policy] = []
    taken: list[Tensor] = []
    for policy in (Never(), *(Patience(patience) for patience in range(data.exits - 1, 0, -1))):
        exits = route(policy, data.logits)
        if not taken or not exits.equal(taken[-1]):
            policies.append(policy)
            taken.append(exits)
    counts = torch.stack([data.counts(exits) for exits in taken])
    right = torch.stack([data.right.gather(0, exits[None]).sum() for exits in taken]).cpu()
    return Ladder(counts, right, data.cost(counts), policies.__getitem__)


def _thresholds(scores: Scores, data: Stacked) -> Ladder:
    """Counts leavers and right predictions at every threshold in one sorted pass.

    A sample is gone by exit k exactly if the greatest of its scores so far reaches the cut. So the right predictions
    are those of the last exit, plus, for each k and each sample gone by k, what exit k has over exit k + 1.
    """
    greatest = scores.sure.cummax(0).values if len(scores.sure) else scores.sure  # (early exits, samples)
    values = greatest[greatest > -torch.inf].unique().flip(0)  # falling; step i + 1 cuts at values[i]
    right = data.right[-1].sum().expand(len(values)).clone()
    gone = [torch.zeros_like(right)]
    for k, row in enumerate(greatest):
        rising, order = row.sort()
        reach = data.samples - torch.searchsorted(rising, values)  # how many reach each value
        gain = data.right[k].long() - data.right[k + 1].long()
        right += torch.cat([gain.new_zeros(1), gain[order.flip(0)].cumsum(0)])[reach]
        gone.append(reach)
    gone.append(torch.full_like(right, data.samples))

    nobody = torch.tensor([[0] * (data.exits - 1) + [data.samples]])
    counts = torch.cat([nobody, torch.stack(gone, -1).diff(dim=-1).cpu()])
    right = torch.cat([data.right[-1].sum()[None], right]).cpu()
    cuts = [*scores.between(values[:-1], values[1:]).tolist(), scores.laxest]

    def policy(step: int) -> Policy:
        return scores.kind(scores.threshold(cuts[step - 1])) if step else Never()

    return Ladder(counts, right, data.cost(counts), policy, scores)
