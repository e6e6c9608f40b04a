"""Choose a setting on held-out samples: how exits are combined, and thresholds or one exit for all.

The thresholds of a candidate are computed from scores only: they are the strictest for a given cost. Labels only decide
between candidates. A few hundred labels are noisy, so each label is averaged with the network's own probabilities; see
:func:`beliefs`. Reported numbers count only labels, on samples that took no part in the choice; see
:mod:`dynadapter.calibrate.solve`. docs/method.md compares these rules with others.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dynadapter.calibrate.goal import Goal
from dynadapter.calibrate.guarantee import with_guarantee
from dynadapter.calibrate.ladder import Ladder, ladder
from dynadapter.calibrate.scores import Scores, exit_indices, has_thresholds
from dynadapter.calibrate.stacked import Calibrated, Stacked, classes, split_folds
from dynadapter.exits.combining import Combine, predicting
from dynadapter.exits.policies import Confidence, Patience, Policy, at_exit, route, wide
from dynadapter.exits.temperature import fit_temperatures

Search = Literal["one_exit", "one_threshold", "thresholds"]
SEARCHES: tuple[Search, ...] = ("one_exit", "one_threshold", "thresholds")
"""What is chosen: one exit for all samples, one threshold for all exits, or one for each; fewest numbers first."""
AUTO: tuple[Search, ...] = ("one_exit", "thresholds")
"""The default: with one threshold among the settings, worse ones are chosen on average; see docs/method.md."""
COMBINES: tuple[Combine, ...] = ("own", "mean", "geometric")

LEVELS = 21
"""Costs, evenly spaced up to the greatest, for which thresholds are tried."""

SLOPES = (1.0, 2.0)
"""Slopes of thresholds by exit; see :mod:`dynadapter.calibrate.ladder`."""

PRIOR = 200
"""A label has the weight samples / (samples + ``PRIOR``); the rest has the most likely prediction of the network."""

SAFETY = 0.5
"""Standard errors by which an accuracy must be within the goal."""


@dataclass(frozen=True)
class Options:
    """What to choose among.

    Args:
        kind: A kind in :data:`~dynadapter.calibrate.ladder.KINDS`.
        searches: Some of :data:`SEARCHES`; ``thresholds`` is one number for Patience and for a single early exit.
        combines: Some of :data:`COMBINES`.
        temperatures: Whether to fit a temperature to each exit first; None means yes, except for a risk, because
            samples used to fit temperatures cannot certify.
        seed: Random seed of the folds.
    """

    kind: type[Policy] = Confidence
    searches: Sequence[Search] = AUTO
    combines: Sequence[Combine] = COMBINES
    temperatures: bool | None = None
    seed: int = 0

    @property
    def halves_a_risk(self) -> bool:
        """Whether a risk is certified on half of the samples, because the other half fits temperatures."""
        read = self.kind is not Patience or set(self.combines) != {"own"}  # patience compares classes alone
        return bool(self.temperatures) and read


@dataclass(frozen=True)
class Samples:
    """Samples to choose on.

    Args:
        logits: (exits, samples, classes).
        targets: (samples,).
        costs: (exits,), cumulative.
        static: Cost of the static network; None for that of the last exit.
        reference: Classes (samples,) to compare the accuracy with; None for those of the last exit.
        options: What to choose among.
        balanced: Whether all occurring classes have equal weight.
    """

    logits: Tensor
    targets: Tensor
    costs: Sequence[float] | Tensor
    static: float | None = None
    reference: Tensor | None = None
    options: Options = field(default_factory=Options)
    balanced: bool = False

    def part(self, rows: Tensor) -> "Samples":
        """Return some of the samples."""
        reference = None if self.reference is None else self.reference[rows]
        return replace(self, logits=self.logits[:, rows], targets=self.targets[rows], reference=reference)

    def temperatures(self, goal: Goal) -> tuple[float, ...] | None:
        """Fit the temperatures; None if the options exclude them."""
        wanted = goal.name != "risk" if self.options.temperatures is None else self.options.temperatures
        return fit_temperatures(self.logits, self.targets) if wanted else None

    def stacked(self, by: Combine = "own", temperatures: Sequence[float] | None = None) -> Stacked:
        """Return the samples with the predictions of one way of combining."""
        return Stacked(self.logits, self.targets, self.costs, self.static, predicting(by, temperatures), self.balanced)

    def compared(self) -> Tensor:
        """Return the classes (samples,) that the accuracy is compared with."""
        return classes(self.logits[-1]) if self.reference is None else self.reference.to(self.logits.device)


class Candidate(NamedTuple):
    """A setting to choose: a policy, what it predicts by, and how it was found.

    ``policy`` has neither temperatures nor combination; ``data`` are the samples with both.
    """

    data: Stacked
    policy: Policy
    by: Combine
    search: Search
    slope: float


class Candidates(NamedTuple):
    """Candidate settings, with the credit and the cost of each on every sample.

    ``credit`` (candidates, samples) is the estimated probability that a prediction is right (:func:`beliefs`) times the
    weight of the sample, ``cost`` (candidates, samples) the relative cost, and ``compared`` (samples,) the credit of
    the last exit, and beside a reference the difference between both by labels.
    """

    settings: list[Candidate]
    credit: Tensor
    cost: Tensor
    compared: Tensor


class Chosen(NamedTuple):
    """A calibrated policy, and the slope of its thresholds."""

    found: Calibrated
    slope: float = 0.0


def choose(data: Samples, goal: Goal) -> Chosen:
    """Choose a setting for a goal.

    Raises:
        ValueError: If the goal cannot be reached (the message names what can), or arguments do not fit.
    """
    if goal.name == "risk":
        return Chosen(_certified(data, goal))
    tried = candidates(data, goal)
    best = tried.settings[most_accurate(tried) if goal.name == "cost" else cheapest(tried, goal)]
    method = f"chosen among {len(tried.settings)} settings: {describe(best)}"
    return Chosen(best.data.calibrated(best.policy, method), best.slope)


def candidates(data: Samples, goal: Goal) -> Candidates:
    """Try every setting that the options allow, within the budget of a cost."""
    heat = data.temperatures(goal)
    belief = beliefs(data, heat)
    budget = goal.amount if goal.name == "cost" else math.inf
    settings: list[Candidate] = []
    credit: list[Tensor] = []
    cost: list[Tensor] = []
    weights = data.stacked().weights
    for by in data.options.combines:
        stacked = data.stacked(by, heat)
        within = _reachable(budget, stacked)
        costs = torch.tensor(stacked.costs, dtype=torch.float64, device=data.logits.device) / stacked.static
        right = credits_of(belief, stacked.predictions)
        for search, slope, policies, index in _paths(stacked, data.options, within):
            settings += [Candidate(stacked, policy, by, search, slope) for policy in policies]
            credit.append(right.gather(0, index))
            cost.append(costs[index])
    last = classes(data.logits[-1])
    compared = credits_of(belief, last[None])[0]
    if data.reference is not None:
        # Labels alone compare two networks: the belief contains this network's opinion, not the reference's
        compared = compared + (data.compared() == data.targets).double() - (last == data.targets).double()
    return Candidates(settings, torch.cat(credit) * weights, torch.cat(cost), compared * weights)


def beliefs(data: Samples, temperatures: Sequence[float] | None) -> Tensor:
    """Return the estimated probability of each class, from labels and network: (samples, classes) float64, sum 1.

    It is a weighted mean of the label and the network's own probabilities. These are from the last exit or from a
    combination of all exits, whichever has the greatest likelihood after its own temperature.
    """
    label = F.one_hot(data.targets.long(), data.logits.shape[-1]).double()
    own = temperatures or fit_temperatures(data.logits, data.targets)
    last = torch.stack([wide(predicting(by, own).combine(data.logits)[-1]) for by in COMBINES])
    heats = torch.tensor(fit_temperatures(last, data.targets), dtype=torch.float64, device=last.device)
    belief = (last.double() / heats[:, None, None]).log_softmax(-1)
    finite = belief.isfinite().all(-1)
    likelihood = torch.where(finite, (belief * label).sum(-1), 0).sum(1)
    best = int(likelihood.argmax())
    weight = torch.where(finite[best], PRIOR / (len(label) + PRIOR), 0)[:, None]
    return (1 - weight) * label + weight * torch.where(finite[best, :, None], belief[best], 0).exp()


def credits_of(belief: Tensor, predictions: Tensor) -> Tensor:
    """Return the estimated probability that predicted classes (exits, samples) are right; 0 for class -1."""
    known = belief.gather(1, predictions.T.clamp(min=0)).T
    return torch.where(predictions < 0, 0, known)


def _paths(data: Stacked, options: Options, budget: float) -> Iterator[tuple[Search, float, list[Policy], Tensor]]:
    """Yield each kind of setting within the budget: search, slope, policies, and exit indices (policies, samples)."""
    scores = Scores(options.kind, data) if has_thresholds(options.kind) else None
    sloped = scores is not None and data.exits > 2
    for search in options.searches:
        for slope in SLOPES if search == "thresholds" and sloped else (0.0,):
            if search == "one_exit":
                policies = [at_exit(k, data.exits) for k in range(data.exits)]
            else:
                policies = levels(ladder(options.kind, data, slope, scores), budget)
            index = exit_indices(policies, data, scores)
            fits = _fits(data, index, budget)
            yield search, slope, [policies[k] for k in fits], index[fits]


def _fits(data: Stacked, index: Tensor, budget: float) -> list[int]:
    """Return the rows of exit indices (rows, samples) whose average cost is within the budget."""
    if budget == math.inf:
        return list(range(len(index)))
    costs = [data.cost(data.counts(row)).item() for row in index]
    return [k for k, cost in enumerate(costs) if cost <= budget or math.isclose(cost, budget, rel_tol=1e-9)]


def levels(steps: Ladder, budget: float) -> list[Policy]:
    """Return the strictest policy within each of ``LEVELS`` costs, from the lowest cost to the budget."""
    cheapest, dearest = steps.cost[-1].item(), steps.cost[0].item()
    most = max(cheapest, min(budget, dearest))
    levels = torch.linspace(cheapest, most, LEVELS, dtype=torch.float64).clamp(cheapest, most)
    levels[-1] = most
    within = torch.searchsorted(steps.cost.flip(0).contiguous(), levels, right=True)  # how many steps cost no more
    return [steps.policy(step) for step in (len(steps.cost) - within).unique().flip(0).tolist()]


# ---- the best candidate


def most_accurate(tried: Candidates) -> int:
    """Return the candidate with the most credit; of equal ones the cheapest, then that with the fewest thresholds."""
    credit, cost = tried.credit.mean(1).tolist(), tried.cost.mean(1).tolist()
    return min(
        range(len(credit)),
        key=lambda i: (round(-credit[i], 12), round(cost[i], 12), freedom(tried.settings[i])),
    )


def cheapest(tried: Candidates, goal: Goal) -> int:
    """Return the cheapest candidate whose credit is within the accuracy drop of the compared predictions.

    The paired difference plus half of its standard error must be within the goal. Among candidates within one standard
    error of the lowest cost, the one with the fewest thresholds is taken.
    """
    drop = tried.compared - tried.credit
    doubt = drop.mean(1) + SAFETY * _standard_error(drop)
    within = (doubt <= goal.amount / 100 + 1e-9).nonzero()[:, 0].tolist()
    if not within:
        best = 100 * doubt.min().item()
        raise ValueError(
            f"goal.accuracy_drop={goal.amount:g} cannot be reached: on these {drop.shape[1]} samples the best setting "
            f"is {best:.3g} points below, half a standard error included; give at least {math.ceil(best * 1e3) / 1e3:g}"
        )
    cost = tried.cost.mean(1)
    least = min(within, key=lambda i: cost[i].item())
    near = cost - cost[least] <= _standard_error(tried.cost - tried.cost[least]) + 1e-9
    return min((i for i in within if near[i]), key=lambda i: (freedom(tried.settings[i]), cost[i].item()))


_PREDICTS = {
    "own": "each exit predicts by its own logits",
    "mean": "each exit predicts by the mean of the exits so far",
    "geometric": "each exit predicts by the weighted geometric mean of the exits so far",
}


def describe(one: Candidate) -> str:
    """Return a setting in words."""
    what = {
        "one_exit": f"all at exit {getattr(one.policy, 'exit', one.data.exits)}",
        "one_threshold": "one threshold",
        "thresholds": "a threshold for each exit" if one.slope else "one threshold",
    }
    return f"{what[one.search]}; {_PREDICTS[one.by]}"


def _standard_error(values: Tensor) -> Tensor:
    """Return the standard error of the mean of each row (rows, samples)."""
    return values.std(1, correction=0) / values.shape[1] ** 0.5


def freedom(one: Candidate) -> tuple[int, bool]:
    """Return a rank of complexity: one exit, one threshold, thresholds by exit; own logits before combinations."""
    return SEARCHES.index(one.search), one.by != "own"


# ---- a risk


def _certified(data: Samples, goal: Goal) -> Calibrated:
    """Return the cheapest of the certified policies, of which there is one for each way of combining.

    The probability that a certificate is wrong is shared equally among the ways, so all hold together.
    """
    ways = data.options.combines
    heat, certify = None, data
    if data.options.halves_a_risk:
        first, second = split_folds(len(data.targets), 2, data.options.seed)
        certify, heat = data.part(first), data.part(second).temperatures(goal)
    found = [
        with_guarantee(
            certify.logits,
            certify.targets,
            data.costs,
            goal.amount,
            goal.confidence or 0.9,
            kind=data.options.kind,
            prediction=predicting(by, heat),
            comparisons=len(ways),
            static=data.static,
        )
        for by in ways
    ]
    best = min(range(len(ways)), key=lambda i: found[i].cost)
    return replace(found[best], method=f"{found[best].method}; {_PREDICTS[ways[best]]}")


def _reachable(budget: float, data: Stacked) -> float:
    """Return the budget, raised to the lowest cost if they differ only by rounding."""
    lowest = data.cost(data.counts(route(at_exit(0, data.exits), data.predicted))).item()
    nonfinite = int((~data.logits[0].isfinite().all(-1)).sum())
    without = f" (but {nonfinite}, whose logits there are not finite)" if nonfinite and data.exits > 1 else ""
    return reachable(budget, lowest, without)


def reachable(budget: float, lowest: float, without: str = "") -> float:
    """Return a greatest average cost, raised to the lowest possible one if they differ only by rounding.

    Args:
        budget: The greatest average cost, as a fraction of static.
        lowest: The cost of exit 1, likewise.
        without: Samples that cannot take exit 1, for the message.

    Raises:
        ValueError: The budget is lower.
    """
    if budget >= lowest or math.isclose(budget, lowest, rel_tol=1e-9):
        return max(budget, lowest)
    raise ValueError(
        f"goal.cost={budget:g} cannot be reached: with all samples at exit 1{without} the average cost is "
        f"{math.ceil(lowest * 1e4) / 1e4:g} of static; give that or more, or put the first exit earlier"
    )
