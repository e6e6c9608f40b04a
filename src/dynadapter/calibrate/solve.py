"""Solve one goal from stacked logits: choose a setting on all samples, and measure that choice by cross-fitting.

Cross-fitting: the samples are split into folds. Each fold is routed by a policy that was chosen on the other folds,
with temperatures, combination and kind of setting. So no sample is measured by a policy that was chosen with its own
label.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dynadapter.calibrate.choosing import (
    AUTO,
    COMBINES,
    Options,
    Samples,
    Search,
    choose,
)
from dynadapter.calibrate.curves import Curve, curve
from dynadapter.calibrate.goal import Goal
from dynadapter.calibrate.intervals import Interval, difference_interval, mean_interval, share_interval
from dynadapter.calibrate.stacked import Calibrated, Outcome, classes, split_folds
from dynadapter.exits.combining import Combine, decision
from dynadapter.exits.policies import Confidence, Never, Policy, confidence, read_off

FEW = 40
"""Below so many samples a note says that the numbers are rough."""

FOLDS = 10
"""Folds of the cross-fitting."""


@dataclass(frozen=True)
class Measured(Outcome):
    """The result of routing on some samples.

    Args:
        accuracy_last_exit: Accuracy of the last exit by its own logits, in [0, 1].
        lost: Fraction of the samples where routing is wrong and the last exit right.
        accuracy_reference: Accuracy of the reference network; of the last exit if there is none.
        confidence: Mean confidence of the predictions, over samples with finite logits.
        confidence_deviation: Standard deviation of the confidence between these samples.
    """

    accuracy_last_exit: float
    lost: float
    accuracy_reference: float
    confidence: float
    confidence_deviation: float


@dataclass(frozen=True)
class CrossFitted(Measured):
    """The result of routing each sample by a policy that was chosen without it, with intervals of 95 %.

    Args:
        accuracy_interval: Interval of the accuracy; of the mean over classes if it is balanced.
        difference_interval: Interval of the accuracy minus the accuracy of the reference on the same samples.
    """

    accuracy_interval: Interval
    difference_interval: Interval


@dataclass(frozen=True)
class Solution:
    """A policy that was calibrated for a goal, and its results.

    Args:
        goal: The goal.
        found: The policy, and how it was found.
        calibration: Result of the policy on the samples on which it was chosen.
        cross_fitted: Result on the same samples, each routed by a policy that was chosen without it.
        curve: Accuracy-cost curve of the same kind of setting on all samples.
        notes: Remarks for the user.
        nonfinite: Samples with logits that are not finite at some exit.
        protocol: Description of which samples were used for what.
    """

    goal: Goal
    found: Calibrated
    calibration: Measured
    cross_fitted: CrossFitted
    curve: Curve
    notes: tuple[str, ...]
    nonfinite: int
    protocol: str


def solve(
    logits: Tensor,
    targets: Tensor,
    costs: Sequence[float] | Tensor,
    goal: Goal,
    *,
    kind: type[Policy] = Confidence,
    searches: Sequence[Search] = AUTO,
    combines: Sequence[Combine] = COMBINES,
    with_temperatures: bool | None = None,
    seed: int = 0,
    static: float | None = None,
    reference: Tensor | None = None,
    samples: str = "samples",
) -> Solution:
    """Calibrate a policy for a goal on all samples, and measure it on them by cross-fitting.

    Args:
        logits: (exits, samples, classes), at least 2 samples.
        targets: (samples,).
        costs: (exits,), cumulative.
        goal: The goal.
        kind: A kind in :data:`~dynadapter.calibrate.ladder.KINDS`.
        searches: What to choose; see :data:`dynadapter.calibrate.choosing.SEARCHES`. A risk has one threshold.
        combines: How exits may predict: by their own logits, the running mean or the weighted geometric mean.
        with_temperatures: Whether to fit a temperature to each exit first; None means yes, except for a risk, because
            samples used to fit temperatures cannot certify.
        seed: Random seed of the folds.
        static: Cost of the static network; None for that of the last exit.
        reference: Classes (samples,) that another network predicts for the same samples; an accuracy drop is measured
            against them. None for the last exit by its own logits.
        samples: Description of the samples for the protocol.

    Raises:
        ValueError: If the goal cannot be reached (the message names what can), the last exit has no finite logits, or
            arguments do not fit.
    """
    options = Options(kind, tuple(searches), tuple(combines), with_temperatures, seed)
    data = Samples(logits, targets, costs, static, reference, options, goal.balanced)
    _check(data, samples)
    folds = _folds(data, goal)
    found, slope = choose(data, goal)
    routed, missed = _crossed(data, goal, folds, found.policy)
    nonfinite = int((~logits.isfinite().all(-1)).any(0).sum())
    notes = [*found.notes, *_remarks(found, data, goal)]
    notes += _doubts(samples, len(targets), nonfinite, missed, len(folds), goal.name)
    return Solution(
        goal=goal,
        found=found,
        calibration=_measured(data, _routed(found.policy, logits)),
        cross_fitted=_with_intervals(data, routed),
        curve=curve(
            logits, targets, costs, kind, prediction=found.policy, slope=slope, static=static, balanced=goal.balanced
        ),
        notes=tuple(notes),
        nonfinite=nonfinite,
        protocol=_protocol(data, goal, samples, len(folds)),
    )


def _check(data: Samples, samples: str) -> None:
    data.stacked()  # checks the arguments
    count = len(data.targets)
    if count < 2:
        raise ValueError(f"{count} {samples} are too few; calibrate on at least 2, better thousands")
    if not data.logits[-1].isfinite().all(-1).any():
        raise ValueError(f"the last exit has finite logits for none of {count} {samples}; the network is broken")
    if data.reference is not None and data.reference.shape != data.targets.shape:
        raise ValueError(f"reference has shape {tuple(data.reference.shape)}; give one class for each of {count}")


def policy_for(
    goal: Goal, logits: Tensor, targets: Tensor, costs: Sequence[float] | Tensor, static: float | None = None
) -> Policy:
    """Return the policy that :func:`solve` finds for a goal by default, without measuring it.

    For a network with one exit it is :class:`Never`.

    Raises:
        ValueError: As :func:`solve`.
    """
    data = Samples(logits, targets, costs, static, balanced=goal.balanced)
    return Never() if len(logits) == 1 else choose(data, goal).found.policy


def _folds(data: Samples, goal: Goal) -> tuple[Tensor, ...]:
    """Split the samples, stratified by class; at random for a risk, whose guarantee needs independent samples."""
    samples = len(data.targets)
    return split_folds(samples, min(FOLDS, samples), data.options.seed, None if goal.name == "risk" else data.targets)


class _Predicted(NamedTuple):
    """Exit indices, predicted classes and confidences of samples, each (samples,)."""

    exits: Tensor
    classes: Tensor
    confidence: Tensor


def _crossed(data: Samples, goal: Goal, folds: Sequence[Tensor], found: Policy) -> tuple[_Predicted, int]:
    """Route each sample by a policy that was chosen on other folds; count the folds that have no policy.

    For a risk these are the folds that certify no early exit, although all samples together do.
    """
    missed, parts = 0, []
    for number, fold in enumerate(folds):
        rest = torch.cat([*folds[:number], *folds[number + 1 :]]).sort().values
        policy: Policy = Never()
        try:
            policy = choose(data.part(rest), goal).found.policy
            if goal.name == "risk" and isinstance(decision(policy), Never):
                missed += not isinstance(decision(found), Never)
        except ValueError:  # reached on all samples, but not on these
            missed += 1
        parts.append(_routed(policy, data.logits[:, fold]))
    order = torch.cat(list(folds)).argsort()
    return _Predicted(*(torch.cat(values)[order] for values in zip(*parts, strict=True))), missed


def _routed(policy: Policy, logits: Tensor) -> _Predicted:
    routed = read_off(policy, logits)
    return _Predicted(routed.exit_index, classes(routed.logits), confidence(routed.logits).double())


def _measured(data: Samples, routed: _Predicted) -> Measured:
    whole, right = data.stacked(), routed.classes == data.targets
    outcome, sure = whole.outcome(routed.exits), routed.confidence[routed.confidence.isfinite()]
    return Measured(
        cost=outcome.cost,
        accuracy=whole.accuracy(right),
        shares=outcome.shares,
        samples=whole.samples,
        accuracy_last_exit=whole.accuracy(whole.right_last),
        lost=(whole.right_last & ~right).sum().item() / whole.samples,
        accuracy_reference=whole.accuracy(data.compared() == data.targets),
        confidence=sure.mean().item() if len(sure) else 0.0,
        confidence_deviation=sure.std(correction=0).item() if len(sure) else 0.0,
    )


def _with_intervals(data: Samples, routed: _Predicted) -> CrossFitted:
    right, theirs = routed.classes == data.targets, data.compared() == data.targets
    groups = [data.targets == c for c in data.targets.unique()] if data.balanced else [torch.ones_like(right)]
    accuracies, gains, ofs, differences = [], [], [], []
    for ours, their in ((right[group], theirs[group]) for group in groups):
        count, gained, lost = len(ours), int((ours & ~their).sum()), int((their & ~ours).sum())
        accuracies.append(int(ours.sum()) / count)
        ofs.append(share_interval(int(ours.sum()), count))
        gains.append((gained - lost) / count)
        differences.append(difference_interval(gained, lost, count))
    return CrossFitted(
        **vars(_measured(data, routed)),
        accuracy_interval=mean_interval(accuracies, ofs),
        difference_interval=mean_interval(gains, differences),
    )


# ---- words


def _remarks(found: Calibrated, data: Samples, goal: Goal) -> Iterator[str]:
    """Yield notes about classes that a balanced accuracy leaves out, and if no sample exits early.

    For a risk, the note of the certificate already has the latter.
    """
    classes, there = data.logits.shape[-1], len(data.targets.unique())
    if goal.balanced and there < classes:
        yield f"{classes - there} of {classes} classes have no image here; the balanced accuracy is over the others"
    if found.shares[-1] == 1 and len(found.shares) > 1 and goal.name != "risk":
        yield f"no image exits early under this policy; each of them costs {found.cost:.1%} of static"


def _doubts(samples: str, count: int, nonfinite: int, missed: int, folds: int, goal: str) -> Iterator[str]:
    """Yield notes about too few samples, non-finite logits, and folds without a policy."""
    if missed:
        what = "certify no early exit" if goal == "risk" else "cannot reach the goal"
        yield f"{missed} of {folds} folds {what}; their {samples} took the last exit"
    if count < FEW:
        yield f"{count} {samples} are too few; calibrate on at least {FEW}, better thousands"
    if nonfinite:
        yield f"{nonfinite} of all {count} {samples} have logits that are not finite at some exit"


def _protocol(data: Samples, goal: Goal, samples: str, folds: int) -> str:
    risk = goal.name == "risk"
    where = f"all {len(data.targets)} {samples}"
    if risk and data.options.halves_a_risk:
        where = f"a random half of the {len(data.targets)} {samples}, the temperatures were fitted on the other half"
    elif not risk and data.options.temperatures is not False:
        where += ", and the temperatures fitted"
    return (
        f"the policy was {'certified' if risk else 'chosen'} on {where}; the cross-fitted numbers come from {folds} "
        f"folds{'' if risk else ', each class alike'} (seed {data.options.seed}), each routed by a policy of the other "
        "folds, which were alone in choosing it. Costs are whole-block GMACs as a fraction of static"
    )
