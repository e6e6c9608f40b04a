"""What to calibrate for."""

from dataclasses import dataclass
from typing import Literal

Metric = Literal["accuracy", "balanced_accuracy"]


@dataclass(frozen=True)
class Goal:
    """What to calibrate for: exactly one of ``cost``, ``accuracy_drop`` and ``risk``.

    >>> str(Goal(cost=0.5))
    'cost at most 0.5 of static'

    Args:
        cost: Greatest average cost as a fraction of static, above 0 and at most 1.
        accuracy_drop: Percentage points that the accuracy may be below the reference's; negative for a gain.
        risk: Fraction of all samples where routing may be wrong and the last exit right, with a finite-sample
            guarantee for future samples.
        confidence: Probability that the guarantee of ``risk`` holds; None for 0.9.
        reference: Another network to compare the accuracy with on the same samples, such as the checkpoint of a static
            network; None for the last exit by its own logits.
        metric: ``balanced_accuracy`` is the mean accuracy over the classes that occur. None for ``accuracy``, the
            fraction of all samples that are right.

    Raises:
        ValueError: If not exactly one of the three is given, or a number is out of range.
    """

    cost: float | None = None
    accuracy_drop: float | None = None
    risk: float | None = None
    confidence: float | None = None
    reference: str | None = None
    metric: Metric | None = None

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
            "cost": (0 < self.amount <= 1, "above 0 and at most 1: a fraction of static, e.g. 0.5 for 50 %"),
            "accuracy_drop": (-100 <= self.amount <= 100, "percentage points between -100 and 100, e.g. 0.5"),
            "risk": (0 < self.amount < 1, "between 0 and 1, both excluded, e.g. 0.02"),
        }[self.name]
        if not fits:  # nor does NaN
            raise ValueError(f"goal.{self.name}={self.amount} must be {allowed}")
        if self.confidence is not None and self.name != "risk":
            raise ValueError(f"goal.confidence belongs to goal.risk, not to goal.{self.name}; leave it out")
        if self.reference is not None and self.name == "risk":
            raise ValueError("goal.risk is against the last exit; leave goal.reference out, or give goal.accuracy_drop")
        if self.metric not in (None, "accuracy", "balanced_accuracy"):
            raise ValueError(f"goal.metric={self.metric} must be accuracy or balanced_accuracy")
        if self.balanced and self.name == "risk":
            raise ValueError(
                "goal.risk is a fraction of all images, for which goal.metric=balanced_accuracy has no guarantee; "
                "leave goal.metric out, or give goal.accuracy_drop"
            )
        if self.confidence is not None and not 0 < self.confidence < 1:
            raise ValueError(f"goal.confidence={self.confidence} must be between 0 and 1, both excluded, e.g. 0.9")

    @property
    def name(self) -> str:
        """``cost``, ``accuracy_drop`` or ``risk``."""
        return next(name for name in ("cost", "accuracy_drop", "risk") if getattr(self, name) is not None)

    @property
    def amount(self) -> float:
        """The number of the goal."""
        amount: float = getattr(self, self.name)
        return amount

    @property
    def balanced(self) -> bool:
        """Whether the accuracy is balanced."""
        return self.metric == "balanced_accuracy"

    @property
    def measure(self) -> str:
        """Name of the accuracy, for messages."""
        return "balanced accuracy" if self.balanced else "accuracy"

    @property
    def given(self) -> dict[str, float | str]:
        """The goal as it was given, with the confidence of a risk."""
        more: dict[str, float | str] = {"confidence": self.confidence or 0.9} if self.name == "risk" else {}
        named = {"reference": self.reference, "metric": self.metric}
        return {self.name: self.amount, **more, **{name: value for name, value in named.items() if value}}

    def __str__(self) -> str:
        if self.name == "cost":
            return f"cost at most {self.amount:g} of static" + (", by balanced accuracy" if self.balanced else "")
        if self.name == "accuracy_drop":
            return f"{self.measure} at most {self.amount:g} points below {self.reference or 'the last exit'}"
        return f"risk at most {self.amount:g} against the last exit, with confidence {self.confidence or 0.9:g}"
