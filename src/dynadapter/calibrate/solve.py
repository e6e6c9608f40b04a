"""Solve one goal from stacked logits: calibrate on one half of the samples, and measure on both."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dynadapter.calibrate.curves import Curve, curve
from dynadapter.calibrate.goals import Search, to_accuracy_drop, to_cost
from dynadapter.calibrate.guarantee import losses, with_guarantee
from dynadapter.calibrate.stacked import Calibrated, Outcome, evaluate, split_halves
from dynadapter.exits.policies import Confidence, Never, Patience, Policy
from dynadapter.exits.temperature import fit_temperatures

FEW = 20
"""Below so many samples in a half a note says that the numbers are rough."""


@dataclass(frozen=True)
class Goal:
    """What to calibrate for: exactly one of ``cost``, ``accuracy_drop`` and ``risk``.

    >>> str(Goal(cost=0.5))
    'cost at most 0.5 of static'

    Args:
        cost: Greatest average cost as a fraction of static.
        accuracy_drop: Percentage points that the accuracy may be below the last exit's; negative for a gain.
        risk: Fraction of all samples where routing may be wrong and the last exit right, with a finite-sample
            guarantee for future samples.
        confidence: Probability that the guarantee of ``risk`` holds; None for 0.9.

    Raises:
        ValueError: If not exactly one is given, or a number is out of range.
    """

    cost: float | None = None
    accuracy_drop: float | None = None
    risk: float | None = None
    confidence: float | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("cost", "accuracy_drop", "risk") if getattr(self, name) is not None]
        if len(given) != 1:
            problem = (
                f"{' and '.join(f'goal.{n}' for n in given)} are {len(given)} goals" if given else "there is no goal"
            )
            raise ValueError(
                f"{problem}; give one of goal.cost=0.5 (a fraction of static), goal.accuracy_drop=0.5 (percentage "
                "points), goal.risk=0.02 (a fraction of all images, with goal.confidence=0.9)"
            )
        fits, allowed = {
            "cost": (0 < self.amount < math.inf, "above 0: a fraction of static, e.g. 0.5"),
            "accuracy_drop": (-100 <= self.amount <= 100, "percentage points between -100 and 100, e.g. 0.5"),
            "risk": (0 < self.amount < 1, "between 0 and 1, both excluded, e.g. 0.02"),
        }[self.name]
        if not fits:  # nor does NaN
            raise ValueError(f"goal.{self.name}={self.amount} must be {allowed}")
        if self.confidence is not None and self.name != "risk":
            raise ValueError(f"goal.confidence belongs to goal.risk, not to goal.{self.name}; leave it out")
        if self.confidence is not None and not 0 < self.confidence < 1:
            raise ValueError(f"goal.confidence={self.confidence} must be between 0 and 1, both excluded, e.g. 0.9")

    @property
    def name(self) -> str:
        """``cost``, ``accuracy_drop`` or ``risk``."""
        return next(name for name in ("cost", "accuracy_drop", "risk") if getattr(self, name) is not None)

    @property
    def amount(self) -> float:
        """The number that was given for it."""
        amount: float = getattr(self, self.name)
        return amount

    @property
    def given(self) -> dict[str, float]:
        """The goal as it was given, with the confidence of a risk."""
        return {self.name: self.amount, **({"confidence": self.confidence or 0.9} if self.name == "risk" else {})}

    def __str__(self) -> str:
        if self.name == "cost":
            return f"cost at most {self.amount:g} of static"
        if self.name == "accuracy_drop":
            return f"accuracy at most {self.amount:g} points below the last exit"
        return f"risk at most {self.amount:g} against the last exit, with confidence {self.confidence or 0.9:g}"


@dataclass(frozen=True)
class Half(Outcome):
    """The result of a policy on one half of the samples.

    Args:
        accuracy_last_exit: Accuracy of the last exit, in [0, 1].
        lost: Fraction of the samples where routing is wrong and the last exit right.
    """

    accuracy_last_exit: float
    lost: float


@dataclass(frozen=True)
class Solution:
    """A policy that was calibrated on one half of the samples, and its results.

    Args:
        goal: The goal.
        found: The policy, and how it was found.
        calibration: Result on the half that the policy was chosen on.
        held_out: Result on the other half.
        curve: Curve of the same kind of policy on the held-out half.
        notes: Remarks for the user.
        nonfinite: Samples with logits that are not finite at some exit.
        protocol: Which half was used for what, in words.
    """

    goal: Goal
    found: Calibrated
    calibration: Half
    held_out: Half
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
    search: Search = "shared",
    with_temperatures: bool = True,
    seed: int = 0,
    static: float | None = None,
    samples: str = "samples",
) -> Solution:
    """Calibrate a policy for a goal on one random half of the samples, and measure it on both halves.

    The halves are stratified by class, except for a risk: its guarantee needs independent samples, and temperatures
    that were fitted on the other half.

    Args:
        logits: (exits, samples, classes).
        targets: (samples,).
        costs: (exits,), cumulative.
        goal: The goal.
        kind: Confidence, Entropy, Margin or Patience.
        search: One threshold for all exits, or one for each, for a cost or an accuracy drop.
        with_temperatures: Whether to fit a temperature to each exit first.
        seed: Random seed of the halves.
        static: Cost of the static network; None for that of the last exit.
        samples: What the samples are, in words, for the protocol.

    Raises:
        ValueError: If the goal cannot be reached (the message names what can), or arguments do not fit.
    """
    first, second = split_halves(len(targets), seed, None if goal.name == "risk" else targets)
    fit = second if goal.name == "risk" else first
    temperatures = fit_temperatures(logits[:, fit], targets[fit]) if with_temperatures else None
    options: dict[str, Any] = {"kind": kind, "temperatures": temperatures, "static": static}
    found = _calibrated(logits[:, first], targets[first], costs, goal, search, options)
    nonfinite = int((~logits.isfinite().all(-1)).any(0).sum())
    notes = list(found.notes)
    if len(second) < FEW:
        notes.append(f"a half of {len(second)} {samples} is too few; calibrate on at least {2 * FEW}, better thousands")
    if nonfinite:
        notes.append(f"{nonfinite} of all {len(targets)} {samples} have logits that are not finite at some exit")
    if kind is Patience and with_temperatures:
        notes.append("patience compares classes only, which temperatures do not change")
    return Solution(
        goal=goal,
        found=found,
        calibration=_measured(found.policy, logits[:, first], targets[first], costs, static),
        held_out=_measured(found.policy, logits[:, second], targets[second], costs, static),
        curve=curve(logits[:, second], targets[second], costs, **options),
        notes=tuple(notes),
        nonfinite=nonfinite,
        protocol=_protocol(goal, with_temperatures, seed, samples, len(first), len(second)),
    )


def _calibrated(
    logits: Tensor,
    targets: Tensor,
    costs: Sequence[float] | Tensor,
    goal: Goal,
    search: Search,
    options: dict[str, Any],
) -> Calibrated:
    """Find the policy; a message names the setting of the goal instead of an argument of the function."""
    try:
        if goal.name == "cost":
            return to_cost(logits, targets, costs, goal.amount, search=search, **options)
        if goal.name == "accuracy_drop":
            return to_accuracy_drop(logits, targets, costs, goal.amount, search=search, **options)
        return with_guarantee(logits, targets, costs, goal.amount, goal.confidence or 0.9, **options)
    except ValueError as error:
        line = str(error).replace("budget=", "goal.cost=", 1).replace("points=", "goal.accuracy_drop=", 1)
        raise ValueError(line) from error


def _measured(
    policy: Policy, logits: Tensor, targets: Tensor, costs: Sequence[float] | Tensor, static: float | None
) -> Half:
    return Half(
        **vars(evaluate(policy, logits, targets, costs, static=static)),
        accuracy_last_exit=evaluate(Never(), logits, targets, costs, static=static).accuracy,
        lost=losses(policy, logits, targets).mean().item(),
    )


def _protocol(goal: Goal, with_temperatures: bool, seed: int, samples: str, first: int, second: int) -> str:
    risk = goal.name == "risk"
    words = (
        f"the {samples} were halved at random{'' if risk else ', each class alike'} (seed {seed}): on {first} the "
        f"policy was {'certified' if risk else 'chosen'}"
    )
    if with_temperatures:
        words += f"; the temperatures were fitted on the {'other' if risk else 'same'} half"
    return f"{words}; the other {second} are held out. Costs are whole-block GMACs as a fraction of static"
