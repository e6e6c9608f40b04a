"""The goals of a sweep, to which exit policies are calibrated; also relative to another recipe's accuracy."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dynadapter.calibrate import Goal, policy_for
from dynadapter.exits.policies import Policy


@dataclass(frozen=True)
class SweepGoal:
    """A goal of a sweep.

    >>> SweepGoal(Goal(accuracy_drop=0.5), "static").name
    'accuracy_drop 0.5 from static'

    Args:
        goal: A cost, or an accuracy drop.
        reference: Recipe from whose accuracy on val200 an accuracy drop is measured; None for the last exit.

    Raises:
        ValueError: The goal is a risk, or a cost with a reference.
    """

    goal: Goal
    reference: str | None = None

    def __post_init__(self) -> None:
        if self.goal.risk is not None:
            raise ValueError("a sweep calibrates to accuracy_drop or cost; dynadapter calibrate bounds a risk")
        if self.reference is not None and self.goal.cost is not None:
            raise ValueError("reference belongs to accuracy_drop; leave it out beside cost")

    @property
    def name(self) -> str:
        """Name of the goal in the tables."""
        start = "" if self.reference is None else f" from {self.reference}"
        return f"{self.goal.name} {self.goal.amount:g}{start}"

    @property
    def untrained(self) -> str:
        """The reason why there is no policy if no training of the reference succeeded."""
        return f"{self.reference} could not be trained"

    def target(self, last: float, reference: float | None) -> dict[str, float]:
        """Return the target of the policy on val200: ``{cost: ...}`` or ``{accuracy: ...}``, both fractions."""
        if self.goal.cost is not None:
            return {"cost": self.goal.cost}
        return {"accuracy": (last if reference is None else reference) - self.goal.amount / 100}

    def policy(
        self, logits: Tensor, targets: Tensor, costs: Sequence[float], static: float, reference: float | None = None
    ) -> Policy:
        """Calibrate on the images of val200; if the reference's accuracy is out of reach, to the best accuracy.

        Args:
            logits: (exits, images, classes).
            targets: (images,).
            costs: Cumulative cost of each exit (exits,).
            static: Cost of the static network, in the same unit.
            reference: Accuracy of the reference on these images, in [0, 1].

        Raises:
            ValueError: The goal is out of reach and has no reference.
        """
        if reference is None:
            return policy_for(self.goal, logits, targets, costs, static)
        last = (logits[-1].argmax(-1) == targets).double().mean().item()
        drop = self.goal.amount + 100 * (last - reference)  # the same floor, counted from the last exit
        try:
            return policy_for(Goal(accuracy_drop=max(-100.0, min(100.0, drop))), logits, targets, costs, static)
        except ValueError:  # the budget is the full depth, which costs more than static by its heads
            return policy_for(Goal(cost=1.0), logits, targets, costs, max(static, costs[-1]))


def goals_of(given: Sequence[dict[str, Any]]) -> tuple[SweepGoal, ...]:
    """Return the goals that a file names, such as ``[{cost: 0.5}, {accuracy_drop: 0, reference: static}]``.

    Raises:
        ValueError: An entry is not a goal, two goals are equal, or the first goal, which chooses the scale, has a
            reference.
    """
    goals = []
    for one in given:
        try:
            goals.append(SweepGoal(Goal(**{k: v for k, v in one.items() if k != "reference"}), one.get("reference")))
        except (TypeError, ValueError) as error:
            raise ValueError(f"goal={one}: {error}") from error
        if goals[-1].goal.balanced:
            raise ValueError(f"goal={one}: a sweep compares by accuracy; leave metric out")
    if not goals or goals[0].reference is not None:
        raise ValueError("the first goal chooses the scale; give one without reference there, such as {cost: 0.5}")
    if len({goal.name for goal in goals}) < len(goals):
        raise ValueError(f"goal names {', '.join(goal.name for goal in goals)}; give each once")
    return tuple(goals)
