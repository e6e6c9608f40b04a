"""The accuracy-cost curve of one kind of policy, and its rows as a table."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dynadapter.calibrate.ladder import ladder
from dynadapter.calibrate.scores import Scores, exit_indices, has_thresholds
from dynadapter.calibrate.stacked import Outcome, Stacked
from dynadapter.exits.policies import Confidence, Patience, Policy, Thresholded, at_exit


@dataclass(frozen=True)
class Point(Outcome):
    """One point of an accuracy-cost curve.

    Args:
        label: The kind of policy, or "exit 1", "exit 2" ... where all samples take one exit.
        threshold: The threshold, that of exit 1 if each has its own, or the patience; None if the policy has neither.
        policy: Routes raw logits.
    """

    label: str
    threshold: float | None
    policy: Policy


class Curve(NamedTuple):
    """The accuracy-cost curve of one kind of policy, in order of increasing cost, and its reference points.

    ``routed`` ends with the full depth, where no sample exits early. ``anytime`` has one point per exit, at which all
    samples exit (MSDNet's anytime prediction); it also ends with the full depth.
    """

    routed: tuple[Point, ...]
    anytime: tuple[Point, ...]


def curve(
    logits: Tensor,
    targets: Tensor,
    costs: Sequence[float] | Tensor,
    kind: type[Policy] = Confidence,
    *,
    prediction: Policy | None = None,
    slope: float = 0.0,
    static: float | None = None,
    balanced: bool = False,
    points: int = 200,
) -> Curve:
    """Compute accuracy and cost at every threshold that changes the routing, thinned to points evenly spaced in cost.

    Args:
        logits: (exits, samples, classes).
        targets: (samples,).
        costs: (exits,), cumulative.
        kind: A kind in :data:`~dynadapter.calibrate.ladder.KINDS`.
        prediction: Policy that gives temperatures and combination; its thresholds are ignored.
        slope: See :func:`dynadapter.calibrate.ladder.ladder`.
        static: Cost of the static network; None for that of the last exit.
        balanced: Whether accuracies are balanced.
        points: Greatest number of routed points; both ends are always among them.

    Raises:
        ValueError: If arguments do not fit.
    """
    if points < 2:
        raise ValueError(f"points={points} must be at least 2, for both ends of the curve")
    data = Stacked(logits, targets, costs, static, prediction, balanced)
    scores = Scores(kind, data) if has_thresholds(kind) else None
    steps = ladder(kind, data, slope, scores)
    kept = torch.arange(len(steps.cost)).flip(0)  # cheapest first
    if len(kept) > points:
        rising = steps.cost[kept]
        even = torch.linspace(rising[0].item(), rising[-1].item(), points, dtype=torch.float64)
        even[-1] = rising[-1]
        kept = kept[torch.searchsorted(rising, even).unique()]

    def routed(step: int) -> Point:
        policy = steps.policy(step)
        outcome = data.outcome(exit_indices([policy], data, scores)[0])  # rounded thresholds may miss their step
        label = kind.__name__.lower() if step else f"exit {data.exits}"
        return Point(**vars(outcome), label=label, threshold=_number(policy), policy=data.complete(policy))

    def anytime(k: int) -> Point:
        outcome = data.outcome(torch.full((data.samples,), k, device=data.logits.device))
        policy = data.complete(at_exit(k, data.exits))
        return Point(**vars(outcome), label=f"exit {k + 1}", threshold=None, policy=policy)

    best = {}  # by cost
    for point in sorted(map(routed, kept.tolist()), key=lambda point: (point.cost, point.accuracy)):
        best[point.cost] = point
    return Curve(tuple(best.values()), tuple(anytime(k) for k in range(data.exits)))


def _number(policy: Policy) -> float | None:
    if isinstance(policy, Thresholded):
        return policy.threshold_at(0)
    return policy.patience if isinstance(policy, Patience) else None


def curve_rows(found: Curve) -> list[list[str | float]]:
    """Return the rows of a CSV file: a header, the routed points, and the points with all samples at one exit."""
    exits = len(found.anytime)
    header: list[str | float] = [
        "policy",
        "threshold",
        "cost",
        "accuracy",
        *(f"share_exit{k + 1}" for k in range(exits)),
    ]
    points = (*found.routed, *found.anytime)
    return [
        header,
        *([p.label, "" if p.threshold is None else p.threshold, p.cost, p.accuracy, *p.shares] for p in points),
    ]
