"""Compute every distinct result on a set of samples of a policy with one parameter: a threshold or a patience.

There can also be one threshold for each exit, all set by the one parameter: the log-odds of the threshold fall by a
fixed slope from exit to exit. They are the log-odds of a certainty from 0 to 1: the confidence, the margin, or 1 -
entropy.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dynadapter.calibrate.scores import Scores, has_thresholds
from dynadapter.calibrate.stacked import Stacked
from dynadapter.exits.policies import Confidence, Entropy, Margin, Never, Patience, Policy, route

KINDS: dict[str, type[Policy]] = {
    "confidence": Confidence,
    "entropy": Entropy,
    "margin": Margin,
    "patience": Patience,
}
"""The kinds of policy that can be calibrated, by name."""


class Ladder(NamedTuple):
    """All distinct settings of a kind, from no early exit to all samples at exit 1; the cost falls step by step.

    ``counts`` (steps, exits) are the numbers of samples at each exit, ``right`` (steps,) the total weights of right
    predictions, ``cost`` (steps,) the average relative costs. ``policy`` maps a step to its policy, without
    temperatures and combination. With a slope, the thresholds of that policy are rounded: where certainties are almost
    equal, other samples may exit than at the step.
    """

    counts: Tensor
    right: Tensor
    cost: Tensor
    policy: Callable[[int], Policy]


def ladder(kind: type[Policy], data: Stacked, slope: float = 0.0, scores: Scores | None = None) -> Ladder:
    """Compute the ladder of a kind of policy.

    Args:
        kind: A kind in :data:`~dynadapter.calibrate.ladder.KINDS`.
        data: The samples.
        slope: Decrease of the log-odds of the threshold from exit to exit; 0 for one threshold for all exits.
        scores: The scores of the samples, if they are known already.

    Raises:
        ValueError: If the kind cannot be calibrated.
    """
    if kind is Patience:
        return _patiences(data)
    if has_thresholds(kind):
        return _thresholds(scores or Scores(kind, data), data, slope)
    names = [known.__name__ for known in KINDS.values()]
    raise ValueError(
        f"kind={getattr(kind, '__name__', kind)} cannot be calibrated; choose one of {names}, or your own subclass of "
        "Thresholded"
    )


def _patiences(data: Stacked) -> Ladder:
    policies: list[Policy] = []
    indices: list[Tensor] = []
    for policy in (Never(), *(Patience(patience) for patience in range(data.exits - 1, 0, -1))):
        exit_index = route(policy, data.predicted)
        if not indices or not exit_index.equal(indices[-1]):
            policies.append(policy)
            indices.append(exit_index)
    counts = torch.stack([data.counts(exit_index) for exit_index in indices])
    right = torch.stack([(data.right.gather(0, index[None])[0] * data.weights).sum() for index in indices]).cpu()
    return Ladder(counts, right, data.cost(counts), policies.__getitem__)


def _thresholds(scores: Scores, data: Stacked, slope: float) -> Ladder:
    """Count samples per exit and right predictions at every threshold in one sorted pass.

    A sample has exited by exit k exactly if the greatest of its scores so far reaches the cut. So the number of right
    predictions is the number at the last exit plus, for each k and each sample that exited by k, the gain of exit k
    over exit k + 1.
    """
    sure = scores.log_odds(slope) if slope else scores.sure
    greatest = sure.cummax(0).values if len(sure) else sure  # (early exits, samples)
    values = greatest[greatest > -torch.inf].unique().flip(0)  # falling; step i + 1 cuts at values[i]
    credit = data.right * data.weights
    right = credit[-1].sum().expand(len(values)).clone()
    exited = [torch.zeros_like(right, dtype=torch.int64)]
    for k, row in enumerate(greatest):
        rising, order = row.sort()
        reach = data.samples - torch.searchsorted(rising, values)  # samples that reach each value
        gain = credit[k] - credit[k + 1]
        right += torch.cat([gain.new_zeros(1), gain[order.flip(0)].cumsum(0)])[reach]
        exited.append(reach)
    exited.append(torch.full_like(exited[0], data.samples))

    none_early = torch.tensor([[0] * (data.exits - 1) + [data.samples]])
    counts = torch.cat([none_early, torch.stack(exited, -1).diff(dim=-1).cpu()])
    right = torch.cat([credit[-1].sum()[None], right]).cpu()
    cuts = [*scores.between(values[:-1], values[1:]).tolist(), -math.inf if slope else scores.laxest]

    def policy(step: int) -> Policy:
        if not step:
            return Never()
        cut = cuts[step - 1]
        return scores.kind(scores.thresholds(cut, slope) if slope else scores.threshold(cut))

    return Ladder(counts, right, data.cost(counts), policy)
