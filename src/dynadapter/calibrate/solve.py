"""Solve one goal from stacked logits: choose a policy on all samples, and measure that choice by cross-fitting.

Cross-fitting: the samples are split into folds. Each fold is routed by a policy, temperatures included, that was chosen
on the other folds. So no sample is measured by a policy that its own right or wrong answer helped to choose.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dynadapter.calibrate.curves import Curve, curve
from dynadapter.calibrate.goal import Goal
from dynadapter.calibrate.goals import Search, to_accuracy_drop, to_cost
from dynadapter.calibrate.guarantee import losses_by_exit, with_guarantee
from dynadapter.calibrate.ladder import ladder
from dynadapter.calibrate.scores import exit_indices
from dynadapter.calibrate.stacked import Calibrated, Outcome, Stacked, split_folds
from dynadapter.exits.policies import Confidence, Never, Patience, Policy, route
from dynadapter.exits.temperature import fit_temperatures

FEW = 40
"""Below so many samples a note says that the numbers are rough."""

FOLDS = 10
"""Folds of the cross-fitting."""

LEVELS = 21
"""Costs, evenly spaced up to the budget, among which the most accurate is chosen."""


@dataclass(frozen=True)
class Measured(Outcome):
    """The result of routing on some samples.

    Args:
        accuracy_last_exit: Accuracy of the last exit, in [0, 1].
        lost: Fraction of the samples where routing is wrong and the last exit right.
    """

    accuracy_last_exit: float
    lost: float


@dataclass(frozen=True)
class Solution:
    """A policy that was calibrated for a goal, and its results.

    Args:
        goal: The goal.
        found: The policy, and how it was found.
        calibration: Result of the policy on the samples that it was chosen on.
        cross_fitted: Result on the same samples, each routed by a policy that was chosen without it.
        curve: Curve of the same kind of policy on all samples.
        notes: Remarks for the user.
        nonfinite: Samples with logits that are not finite at some exit.
        protocol: Which samples were used for what, in words.
    """

    goal: Goal
    found: Calibrated
    calibration: Measured
    cross_fitted: Measured
    curve: Curve
    notes: tuple[str, ...]
    nonfinite: int
    protocol: str


@dataclass(frozen=True)
class _Data:
    """Logits (exits, samples, classes), targets (samples,) and costs, and how to calibrate on them."""

    logits: Tensor
    targets: Tensor
    costs: Sequence[float] | Tensor
    static: float | None
    kind: type[Policy]
    search: Search
    with_temperatures: bool
    seed: int

    def part(self, rows: Tensor) -> "_Data":
        """Return some of the samples."""
        return replace(self, logits=self.logits[:, rows], targets=self.targets[rows])

    def temperatures(self) -> tuple[float, ...] | None:
        """Fit the temperatures, if there are to be any."""
        return fit_temperatures(self.logits, self.targets) if self.with_temperatures else None

    def stacked(self, temperatures: Sequence[float] | None) -> Stacked:
        """Return the samples for the functions that need no more."""
        return Stacked(self.logits, self.targets, self.costs, self.static, temperatures)

    def folds(self, goal: Goal) -> tuple[Tensor, ...]:
        """Split the samples, stratified by class; at random for a risk, whose guarantee needs independent samples."""
        samples = len(self.targets)
        return split_folds(samples, min(FOLDS, samples), self.seed, None if goal.name == "risk" else self.targets)


def solve(
    logits: Tensor,
    targets: Tensor,
    costs: Sequence[float] | Tensor,
    goal: Goal,
    *,
    kind: type[Policy] = Confidence,
    search: Search = "shared",
    with_temperatures: bool | None = None,
    seed: int = 0,
    static: float | None = None,
    samples: str = "samples",
) -> Solution:
    """Calibrate a policy for a goal on all samples, and measure it on them by cross-fitting.

    Args:
        logits: (exits, samples, classes), at least 2 samples.
        targets: (samples,).
        costs: (exits,), cumulative.
        goal: The goal.
        kind: Confidence, Entropy, Margin or Patience.
        search: One threshold for all exits, or one for each, for a cost or an accuracy drop.
        with_temperatures: Whether to fit a temperature to each exit first; None for yes, except for a risk, whose
            certificate would have to do without the samples that the temperatures are fitted on.
        seed: Random seed of the folds.
        static: Cost of the static network; None for that of the last exit.
        samples: What the samples are, in words, for the protocol.

    Raises:
        ValueError: If the goal cannot be reached (the message names what can), the last exit has no finite logits, or
            arguments do not fit.
    """
    fitted = (goal.name != "risk" if with_temperatures is None else with_temperatures) and kind is not Patience
    data = _Data(logits, targets, costs, static, kind, search, fitted, seed)
    if not logits[-1].isfinite().all(-1).any():
        raise ValueError(f"the last exit has finite logits for none of {len(targets)} {samples}; the network is broken")
    folds = data.folds(goal)
    found, crossed, missed = _calibrated_and_crossed(data, goal, folds)
    nonfinite = int((~logits.isfinite().all(-1)).any(0).sum())
    notes = [*found.notes, *_remarks(found, goal)]
    if missed:
        notes.append(f"{missed} of {len(folds)} folds cannot reach the goal; their {samples} took the last exit")
    if len(targets) < FEW:
        notes.append(f"{len(targets)} {samples} are too few; calibrate on at least {FEW}, better thousands")
    if nonfinite:
        notes.append(f"{nonfinite} of all {len(targets)} {samples} have logits that are not finite at some exit")
    whole = data.stacked(None)
    return Solution(
        goal=goal,
        found=found,
        calibration=_measured(whole, route(found.policy, logits)),
        cross_fitted=_measured(whole, crossed),
        curve=curve(logits, targets, costs, kind, temperatures=found.temperatures, static=static),
        notes=tuple(notes),
        nonfinite=nonfinite,
        protocol=_protocol(data, goal, samples, len(folds)),
    )


def policy_for(
    goal: Goal, logits: Tensor, targets: Tensor, costs: Sequence[float] | Tensor, static: float | None = None
) -> Policy:
    """Return the confidence policy that :func:`solve` finds for a goal, without measuring it.

    A network with one exit needs none.

    Raises:
        ValueError: As :func:`solve`.
    """
    if len(logits) == 1:
        return Never()
    data = _Data(logits, targets, costs, static, Confidence, "shared", goal.name != "risk", 0)
    if goal.name == "cost" and len(targets) > 1:
        return _most_accurate(data, goal, data.folds(goal))[0].policy
    return _calibrated(data, goal).policy


def _calibrated_and_crossed(data: _Data, goal: Goal, folds: Sequence[Tensor]) -> tuple[Calibrated, Tensor, int]:
    """Find the policy, and route each sample by a policy of other folds.

    Returns:
        The policy, the exit indices (samples,), and how many folds have no policy.
    """
    if goal.name == "cost" and data.search == "shared":
        return *_most_accurate(data, goal, folds), 0
    found, missed = _calibrated(data, goal), 0
    index = torch.zeros(len(data.targets), dtype=torch.int64, device=data.logits.device)
    for fold, rest in _with_rests(folds):
        policy: Policy = Never()
        try:
            policy = _calibrated(data.part(rest), goal).policy
        except ValueError:  # reached on all samples, but not on these
            missed += 1
        index[fold] = route(policy, data.logits[:, fold])
    return found, index, missed


def _calibrated(data: _Data, goal: Goal) -> Calibrated:
    """Find the policy on all given samples; a message names the setting of the goal, not an argument of a function."""
    options: dict[str, Any] = {"kind": data.kind, "static": data.static}
    try:
        if goal.name == "risk":
            certify = data
            if data.with_temperatures:
                first, second = split_folds(len(data.targets), 2, data.seed)
                certify, options["temperatures"] = data.part(first), data.part(second).temperatures()
            confidence = goal.confidence or 0.9
            return with_guarantee(certify.logits, certify.targets, data.costs, goal.amount, confidence, **options)
        options |= {"temperatures": data.temperatures(), "search": data.search}
        find = to_cost if goal.name == "cost" else to_accuracy_drop
        return find(data.logits, data.targets, data.costs, goal.amount, **options)
    except ValueError as error:
        line = str(error).replace("budget=", "goal.cost=", 1).replace("points=", "goal.accuracy_drop=", 1)
        raise ValueError(line) from error


def _with_rests(folds: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each fold, and the samples of all others."""
    for k, fold in enumerate(folds):
        yield fold, torch.cat([*folds[:k], *folds[k + 1 :]]).sort().values


# ---- a cost


def _most_accurate(data: _Data, goal: Goal, folds: Sequence[Tensor]) -> tuple[Calibrated, Tensor]:
    """Find a shared threshold: for the cost, up to the budget, whose cross-fitted accuracy is the best.

    A threshold for a cost depends on scores alone, so labels choose among ``LEVELS`` costs only. Each fold is routed by
    thresholds of the others at the cost that is the most accurate on the others.

    Returns:
        The policy, and the exit indices (samples,).
    """
    _calibrated(data, goal)  # raises if the budget cannot be reached
    index = torch.zeros(LEVELS, len(data.targets), dtype=torch.int64, device=data.logits.device)
    for fold, rest in _with_rests(folds):
        part, heat = data.part(rest), data.part(rest).temperatures()
        policies, held = _at_levels(part.stacked(heat), data.kind, goal.amount), data.part(fold).stacked(heat)
        index[:, fold] = torch.stack(list(exit_indices(policies, held)))
    heat = data.temperatures()
    whole = data.stacked(heat)
    right = whole.right.gather(0, index)
    cost = torch.tensor(whole.costs, dtype=torch.float64, device=index.device)[index]
    crossed = torch.zeros_like(index[0])
    for fold, rest in _with_rests(folds):
        crossed[fold] = index[_best(right[:, rest], cost[:, rest])][fold]
    name = "patience" if data.kind is Patience else f"{data.kind.__name__.lower()} threshold"
    method = f"{name} of the best cross-fitted accuracy among {LEVELS} costs of at most {goal.amount:g} of static"
    policy = _at_levels(whole, data.kind, goal.amount)[_best(right, cost)]
    return whole.calibrated(policy, method), crossed


def _at_levels(data: Stacked, kind: type[Policy], budget: float) -> list[Policy]:
    """Return the strictest policy within each of ``LEVELS`` costs, from the lowest cost to the budget."""
    steps = ladder(kind, data)
    cheapest, dearest = steps.cost[-1].item(), steps.cost[0].item()
    most = max(cheapest, min(budget, dearest))
    levels = torch.linspace(cheapest, most, LEVELS, dtype=torch.float64).clamp(cheapest, most)
    levels[-1] = most
    fits = (steps.cost <= levels[:, None]).int().argmax(1)  # costs fall: the first that fits
    return [steps.policy(step) for step in fits.tolist()]


def _best(right: Tensor, cost: Tensor) -> int:
    """Return the level with the most right predictions, of equal ones the cheapest; both are (levels, samples)."""
    count, total = right.sum(1).tolist(), cost.sum(1).tolist()
    return min(range(len(count)), key=lambda level: (-count[level], total[level], level))


def _measured(data: Stacked, index: Tensor) -> Measured:
    lost = losses_by_exit(data, "lost").gather(0, index[None])[0]
    last = torch.full_like(index, data.exits - 1)
    return Measured(
        **vars(data.outcome(index)), accuracy_last_exit=data.outcome(last).accuracy, lost=lost.mean().item()
    )


# ---- words


def _remarks(found: Calibrated, goal: Goal) -> list[str]:
    """Return a note if no sample exits early, unless the certificate of a risk has said so."""
    exits = len(found.shares)
    if found.shares[-1] < 1 or exits == 1 or goal.name == "risk":
        return []
    return [f"no image exits early under this policy; each of them costs {found.cost:.1%} of static"]


def _protocol(data: _Data, goal: Goal, samples: str, folds: int) -> str:
    risk = goal.name == "risk"
    chosen = f"the policy was {'certified' if risk else 'chosen'} on"
    where = f"all {len(data.targets)} {samples}"
    if risk and data.with_temperatures:
        where = f"a random half of the {len(data.targets)} {samples}, the temperatures were fitted on the other half"
    elif data.with_temperatures:
        where += ", and the temperatures fitted"
    return (
        f"{chosen} {where}; the cross-fitted numbers come from {folds} folds{'' if risk else ', each class alike'} "
        f"(seed {data.seed}), each routed by a policy of the other folds. Costs are whole-block GMACs as a fraction of "
        "static"
    )
