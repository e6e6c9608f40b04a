"""Find thresholds for a goal on given samples: an average cost, or an accuracy drop."""

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
    static: float | None = None,
) -> Calibrated:
    """Find thresholds whose average cost on these samples is at most ``budget``.

    ``shared`` chooses, among all values of one threshold for all exits, the strictest within the budget: exact, and
    hard to overfit. ``refined`` searches one threshold per exit for the best accuracy on these samples within the
    budget. On these samples it is never worse than ``shared``; on others it can be, if these are few. Samples with
    equal scores exit together, on the cheap side of the budget.

    >>> logits = torch.tensor([[[3.0, 0.0], [2.0, 0.0], [1.0, 0.0], [0.0, 0.0]], [[9.0, 0.0]] * 4])
    >>> found = to_cost(logits, torch.zeros(4, dtype=torch.int64), costs=[1, 4], budget=0.7)
    >>> found.shares, found.cost
    ((0.5, 0.5), 0.625)

    Args:
        logits: (exits, samples, classes).
        targets: (samples,).
        costs: (exits,), cumulative.
        budget: Greatest average cost as a fraction of static.
        kind: Confidence, Entropy, Margin or Patience.
        search: One threshold for all exits, or one for each.
        temperatures: (exits,), or none.
        static: Cost of the static network; None for that of the last exit.

    Raises:
        ValueError: If no threshold is within the budget (the message names the lowest cost), or arguments do not fit.
    """
    data = Stacked(logits, targets, costs, static, temperatures)
    steps = ladder(kind, data)
    budget = _reachable(budget, steps.cost[-1].item(), data)
    step = int((steps.cost <= budget).int().argmax())  # costs fall: the first that fits

    def value(right: Tensor, cost: Tensor) -> Tensor:
        tie = (
            cost * data.static / (2 * data.costs[-1])
        )  # at most 1/2: the cost decides between equally accurate thresholds
        return torch.where(cost <= budget, right - tie, -torch.inf)

    goal = f"to a cost of at most {budget:g} of static"
    return _calibrated(search, kind, data, steps, step, value, goal, budget)


def to_accuracy_drop(
    logits: Tensor,
    targets: Tensor,
    costs: Sequence[float] | Tensor,
    points: float,
    *,
    kind: type[Policy] = Confidence,
    search: Search = "shared",
    temperatures: Sequence[float] | None = None,
    static: float | None = None,
) -> Calibrated:
    """Find the cheapest thresholds whose accuracy on these samples is at most ``points`` below the last exit's.

    :func:`with_guarantee` bounds the loss on future samples.

    Args:
        logits: (exits, samples, classes).
        targets: (samples,).
        costs: (exits,), cumulative.
        points: Percentage points; negative for a gain, which early exits sometimes give.
        kind: Confidence, Entropy, Margin or Patience.
        search: See :func:`to_cost`.
        temperatures: (exits,), or none.
        static: Cost of the static network; None for that of the last exit.

    Raises:
        ValueError: If no threshold reaches a gain (the message names the best), or arguments do not fit.
    """
    if not -100 <= points <= 100:
        raise ValueError(f"points={points} must be percentage points, between -100 and 100, e.g. 0.5")
    data = Stacked(logits, targets, costs, static, temperatures)
    steps = ladder(kind, data)
    last = int(steps.right[0])
    floor = math.ceil(last - points / 100 * data.samples - 1e-9)  # 0.3 % of 1000 samples are 3, not 2.9999...
    enough = (steps.right >= floor).nonzero()[:, 0]
    if not len(enough):
        best = (int(steps.right.max()) - last) / data.samples * 100
        raise ValueError(
            f"points={points:g} cannot be reached: on these {data.samples} samples the best {_kind_name(kind)} is "
            f"{best:.3g} points above the last exit; give at least {-math.floor(best * 1e3) / 1e3:g}"
        )

    def value(right: Tensor, cost: Tensor) -> Tensor:
        return torch.where(right >= floor, -cost, -torch.inf)

    step = int(enough[-1])  # costs fall, so the last of these is the cheapest
    return _calibrated(search, kind, data, steps, step, value, f"to {points:g} points below the last exit")


def _calibrated(
    search: str,
    kind: type[Policy],
    data: Stacked,
    steps: Ladder,
    step: int,
    value: Value,
    goal: str,
    budget: float | None = None,
) -> Calibrated:
    """Return the shared threshold of a step, or thresholds per exit with a higher value."""
    shared = steps.policy(step)
    if search == "shared":
        return data.calibrated(shared, f"{_kind_name(kind)} {goal}")
    if search != "refined":
        raise ValueError(f"search={search!r} is not known; choose 'shared' or 'refined'")
    scores = steps.scores or Scores(thresholded(kind), data)
    starts = [scores.cuts(shared) if isinstance(shared, Thresholded) else [scores.strictest] * (data.exits - 1)]
    if budget is not None:
        starts.append(geometric(scores, data, budget)[1])
    cuts, reached = refined(scores, data, starts, value)
    if reached > value(steps.right[step], steps.cost[step]).item():
        policy = scores.kind(tuple(scores.threshold(cut) for cut in cuts))
        return data.calibrated(policy, f"{_kind_name(kind)} per exit {goal}")
    note = "no thresholds per exit do better on these samples than a shared one"
    return data.calibrated(shared, f"{_kind_name(kind)} {goal}", note)


def geometric_shares(
    logits: Tensor,
    targets: Tensor,
    costs: Sequence[float] | Tensor,
    budget: float,
    *,
    kind: type[Policy] = Confidence,
    temperatures: Sequence[float] | None = None,
    static: float | None = None,
) -> Calibrated:
    """Find one threshold per exit for geometric exit shares p_k ~ q^k whose average cost is at most ``budget``.

    At exit k, of the samples that have not exited yet, the floor(samples * p_k) with the highest scores exit; all of
    them if fewer are left. Only q is fitted, from scores alone, so the targets cannot be overfitted.

    Args:
        logits: (exits, samples, classes).
        targets: (samples,), for the reported accuracy.
        costs: (exits,), cumulative.
        budget: Greatest average cost as a fraction of static.
        kind: Confidence, Entropy or Margin.
        temperatures: (exits,), or none.
        static: Cost of the static network; None for that of the last exit.

    Raises:
        ValueError: If no threshold is within the budget (the message names the lowest cost), or arguments do not fit.

    Source: Huang et al. 2018, Multi-scale dense networks for resource efficient image classification, section 5,
    "budgeted batch classification"; this code bisects q instead of a grid search.
    """
    data = Stacked(logits, targets, costs, static, temperatures)
    scores = Scores(kind, data)
    budget = _reachable(budget, geometric(scores, data, 0.0)[0], data)
    _, cuts = geometric(scores, data, budget)
    policy = scores.kind(tuple(scores.threshold(cut) for cut in cuts))
    return data.calibrated(policy, f"{_kind_name(kind)} per exit, geometric shares to a cost of at most {budget:g}")


def _kind_name(kind: type[Policy]) -> str:
    return "patience" if kind is Patience else f"{kind.__name__.lower()} threshold"


def _reachable(budget: float, cheapest: float, data: Stacked) -> float:
    """Return the budget, raised to the lowest cost where only rounding separates them.

    Raises:
        ValueError: If the budget is below the lowest cost.
    """
    most = max(1.0, data.costs[-1] / data.static)
    if not 0 < budget <= most:  # NaN fails as well
        raise ValueError(
            f"budget={budget} must be above 0 and at most {most:.4g}: a fraction of static, e.g. 0.5 for 50 %"
        )
    if budget >= cheapest or math.isclose(budget, cheapest, rel_tol=1e-9):
        return max(budget, cheapest)
    nonfinite = int((~data.logits[0].isfinite().all(-1)).sum())
    without = f" (but {nonfinite}, whose logits there are not finite)" if nonfinite and data.exits > 1 else ""
    raise ValueError(
        f"budget={budget:g} cannot be reached: with all samples at exit 1{without} the average cost is "
        f"{math.ceil(cheapest * 1e4) / 1e4:g} of static; give that or more, or put the first exit earlier"
    )
