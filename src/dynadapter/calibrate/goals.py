"""Thresholds toward a goal: a budget of compute, or an accuracy that may be lost."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from dynadapter.calibrate.ladder import Ladder, ladder
from dynadapter.calibrate.refine import Value, geometric, refined
from dynadapter.calibrate.scores import Scores, thresholded
from dynadapter.calibrate.stacked import Calibrated, Stacked
from dynadapter.exits.policies import Confidence, Patience, Policy, Thresholded

Search = Literal["shared", "refined"]


def to_cost(
    logits: Tensor,
    targets: Tensor,
    costs: Sequence[float] | Tensor,
    budget: float,
    *,
    kind: type[Policy] = Confidence,
    search: Search = "shared",
    temperatures: Sequence[float] | None = None,
    full: float | None = None,
) -> Calibrated:
    """Finds thresholds that spend a budget of compute and never exceed it on these samples.

    ``shared`` takes, among all values of one threshold for all exits, the strictest that the budget allows: exact, and
    hard to overfit. ``refined`` looks for one threshold per exit with the best accuracy on these samples within the
    budget; on these samples it is never worse than ``shared``, on others it is only if these are few.
    Samples that tie leave together, on the cheap side of the budget.

    >>> logits = torch.tensor([[[3.0, 0.0], [2.0, 0.0], [1.0, 0.0], [0.0, 0.0]], [[9.0, 0.0]] * 4])
    >>> found = to_cost(logits, torch.zeros(4, dtype=torch.int64), costs=[1, 4], budget=0.7)
    >>> found.shares, found.cost
    ((0.5, 0.5), 0.625)

    Args:
        logits: (exits, samples, classes).
        targets: (samples,).
        costs: (exits,), cumulative.
        budget: Greatest average cost as a fraction of the full backbone's.
        kind: Confidence, Entropy, Margin or Patience.
        search: One threshold for all exits, or one for each.
        temperatures: (exits,), or none.
        full: Cost of the full backbone.

    Raises:
        ValueError: If the budget cannot be reached; the message says what can. Or if arguments do not fit.
    """
    data = Stacked(logits, targets, costs, full, temperatures)
    steps = ladder(kind, data)
    budget = _reachable(budget, steps.cost[-1].item(), data)
    step = int((steps.cost <= budget).int().argmax())  # costs fall: the first that fits

    def value(right: Tensor, cost: Tensor) -> Tensor:
        tie = cost * data.full / (2 * data.costs[-1])  # at most 1/2: less cost decides between equally many right ones
        return torch.where(cost <= budget, right - tie, -torch.inf)

    goal = f"to a cost of at most {budget:g} of the full backbone"
    return _found(search, kind, data, steps, step, value, goal, budget)


def to_accuracy_drop(
    logits: Tensor,
    targets: Tensor,
    costs: Sequence[float] | Tensor,
    points: float,
    *,
    kind: type[Policy] = Confidence,
    search: Search = "shared",
    temperatures: Sequence[float] | None = None,
    full: float | None = None,
) -> Calibrated:
    """Finds the cheapest thresholds whose accuracy is at most ``points`` below the last exit's on these samples.

    This is a statement on these samples; for one on samples to come see :func:`with_guarantee`.

    Args:
        logits: (exits, samples, classes).
        targets: (samples,).
        costs: (exits,), cumulative.
        points: Percentage points; negative to ask for a gain, which early exits sometimes give.
        kind: Confidence, Entropy, Margin or Patience.
        search: One threshold for all exits, or one for each; see :func:`to_cost`.
        temperatures: (exits,), or none.
        full: Cost of the full backbone.

    Raises:
        ValueError: If a gain cannot be reached; the message says what can. Or if arguments do not fit.
    """
    if not -100 <= points <= 100:
        raise ValueError(f"points={points} must be percentage points, between -100 and 100, e.g. 0.5")
    data = Stacked(logits, targets, costs, full, temperatures)
    steps = ladder(kind, data)
    last = int(steps.right[0])
    floor = math.ceil(last - points / 100 * data.samples - 1e-9)  # 0.3 % of 1000 samples are 3, not 2.9999...
    enough = (steps.right >= floor).nonzero()[:, 0]
    if not len(enough):
        best = (int(steps.right.max()) - last) / data.samples * 100
        raise ValueError(
            f"points={points:g} cannot be reached: on these {data.samples} samples the best {_called(kind)} is "
            f"{best:.3g} points above the last exit; give at least {-math.floor(best * 1e3) / 1e3:g}"
        )

    def value(right: Tensor, cost: Tensor) -> Tensor:
        return torch.where(right >= floor, -cost, -torch.inf)

    step = int(enough[-1])  # costs fall: the last that is good enough is the cheapest
    return _found(search, kind, data, steps, step, value, f"to {points:g} points below the last exit")


def _found(
    search: str,
    kind: type[Policy],
    data: Stacked,
    steps: Ladder,
    step: int,
    value: Value,
    goal: str,
    budget: float | None = None,
) -> Calibrated:
    """Gives the shared threshold of a step, or thresholds per exit that are worth more."""
    shared = steps.policy(step)
    if search == "shared":
        return data.calibrated(shared, f"{_called(kind)} {goal}")
    if search != "refined":
        raise ValueError(f"search={search!r} is not known; choose 'shared' or 'refined'")
    scores = steps.scores or Scores(thresholded(kind), data)
    starts = [scores.cuts(shared) if isinstance(shared, Thresholded) else [scores.strictest] * (data.exits - 1)]
    if budget is not None:
        starts.append(geometric(scores, data, budget)[1])
    cuts, worth = refined(scores, data, starts, value)
    if worth > value(steps.right[step], steps.cost[step]).item():
        policy = scores.kind(tuple(scores.threshold(cut) for cut in cuts))
        return data.calibrated(policy, f"{_called(kind)} per exit {goal}")
    note = "no thresholds per exit were found that do better on these samples than a shared one"
    return data.calibrated(shared, f"{_called(kind)} {goal}", note)


def geometric_shares(
    logits: Tensor,
    targets: Tensor,
    costs: Sequence[float] | Tensor,
    budget: float,
    *,
    kind: type[Policy] = Confidence,
    temperatures: Sequence[float] | None = None,
    full: float | None = None,
) -> Calibrated:
    """Finds one threshold per exit such that shares p_k ~ q^k of the samples leave, with q set to spend a budget.

    At exit k the surest floor(samples * p_k) of those still in leave; with fewer left, all of them. Only scores decide
    and q is the only thing that is fitted, so the targets cannot be overfitted.

    Args:
        logits: (exits, samples, classes).
        targets: (samples,), for the accuracy that is reported.
        costs: (exits,), cumulative.
        budget: Greatest average cost as a fraction of the full backbone's.
        kind: Confidence, Entropy or Margin.
        temperatures: (exits,), or none.
        full: Cost of the full backbone.

    Raises:
        ValueError: If the budget cannot be reached; the message says what can. Or if arguments do not fit.

    Source: Huang et al. 2018, Multi-scale dense networks for resource efficient image classification, section 5,
    "budgeted batch classification"; a bisection on q instead of a grid is ours.
    """
    data = Stacked(logits, targets, costs, full, temperatures)
    scores = Scores(kind, data)
    budget = _reachable(budget, geometric(scores, data, 0.0)[0], data)
    _, cuts = geometric(scores, data, budget)
    policy = scores.kind(tuple(scores.threshold(cut) for cut in cuts))
    return data.calibrated(policy, f"{_called(kind)} per exit, geometric shares to a cost of at most {budget:g}")


def _called(kind: type[Policy]) -> str:
    return "patience" if kind is Patience else f"{kind.__name__.lower()} threshold"


def _reachable(budget: float, cheapest: float, data: Stacked) -> float:
    """Gives the budget, lifted to the cheapest cost where it falls short by rounding only."""
    if not 0 < budget < math.inf:  # NaN fails as well
        raise ValueError(f"budget={budget} must be above 0: a fraction of the full backbone's cost, e.g. 0.5")
    if budget >= cheapest or math.isclose(budget, cheapest, rel_tol=1e-9):
        return max(budget, cheapest)
    stuck = int((~data.logits[0].isfinite().all(-1)).sum())
    without = f" (but {stuck}, whose logits there are not finite)" if stuck and data.exits > 1 else ""
    raise ValueError(
        f"budget={budget:g} cannot be reached: with all samples at exit 1{without} the average cost is "
        f"{math.ceil(cheapest * 1e4) / 1e4:g} of the full backbone; give that or more, or put the first exit earlier"
    )
