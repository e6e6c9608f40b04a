"""Compute the cost and accuracy of a policy on a set of samples from stacked logits."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dynadapter.exits.combining import with_decision
from dynadapter.exits.policies import Never, Policy, combined, route
from dynadapter.exits.temperature import check_logits, check_targets


@dataclass(frozen=True)
class Outcome:
    """The result of a policy on a set of samples.

    Args:
        cost: Average cost as a fraction of static.
        accuracy: Fraction of right predictions, in [0, 1], or balanced accuracy if `balanced` is true; NaN without
            targets.
        shares: Exit shares (exits,), adding up to 1.
        samples: Number of samples.
    """

    cost: float
    accuracy: float
    shares: tuple[float, ...]
    samples: int


@dataclass(frozen=True)
class Calibrated(Outcome):
    """A calibrated policy with its result on the samples on which it was chosen; use :func:`evaluate` for others.

    Args:
        policy: Routes raw logits: it includes temperatures and combination.
        method: Description of how the policy was found.
        notes: Remarks for the user, such as the guarantee in full, or why there is none.
        risk: Fraction of these samples that is lost, if it was bounded; see :func:`with_guarantee`.
    """

    policy: Policy
    method: str
    notes: tuple[str, ...] = ()
    risk: float | None = None


class Stacked:
    """Checked logits, targets and costs of samples, and quantities computed from them once.

    Args:
        logits: (exits, samples, classes).
        targets: (samples,), or None.
        costs: (exits,), cumulative.
        static: Cost of the static network; None for that of the last exit.
        prediction: Policy that gives temperatures and combination; its thresholds are ignored.
        balanced: Whether accuracies are balanced: all occurring classes have equal weight.

    Attributes:
        predicted: Prediction of each exit, as logits (exits, samples, classes).
        predictions: Classes (exits, samples), -1 for logits that are not finite.
        right: (exits, samples) bool, True for a right prediction; all False without targets.
        weights: Weight of each sample in an accuracy (samples,) float64; 1 on average.
        last: Classes of the last exit by its own logits (samples,), -1 for logits that are not finite.
    """

    def __init__(
        self,
        logits: Tensor,
        targets: Tensor | None,
        costs: Sequence[float] | Tensor,
        static: float | None = None,
        prediction: Policy | None = None,
        balanced: bool = False,
    ) -> None:
        check_logits(logits)
        self.logits = logits.detach()
        self.exits, self.samples, _ = logits.shape
        self.prediction = prediction or Never()
        self.prediction.check(self.exits)
        self.predicted = combined(self.prediction, self.logits)
        self.predictions, self.last = classes(self.predicted), classes(self.logits[-1])
        self.labelled = targets is not None
        self.right = torch.zeros_like(self.predictions, dtype=torch.bool)
        self.right_last = torch.zeros_like(self.last, dtype=torch.bool)
        if targets is not None:
            targets = check_targets(logits, targets)
            self.right, self.right_last = self.predictions == targets, self.last == targets
        self.weights = torch.ones(self.samples, dtype=torch.float64, device=logits.device)
        if balanced and targets is not None:
            self.weights = balancing(targets)
        self.costs, self.static = _check_costs(costs, static, self.exits)

    def accuracy(self, right: Tensor) -> float:
        """Return the accuracy, from booleans (samples,)."""
        return (right * self.weights).sum().item() / self.samples

    def complete(self, policy: Policy) -> Policy:
        """Add temperatures and combination to a policy."""
        return with_decision(self.prediction, policy)

    def counts(self, exit_index: Tensor) -> Tensor:
        """Count the samples at each exit: exit indices (samples,) to (exits,) int64 on the CPU."""
        return torch.bincount(exit_index, minlength=self.exits).cpu()

    def cost(self, counts: Tensor) -> Tensor:
        """Return the average relative cost, exact for whole costs: (..., exits) counts to (...) float64."""
        total = torch.zeros(counts.shape[:-1], dtype=torch.float64)
        for k, cost in enumerate(self.costs):  # one order of summation for every shape: equal counts cost the same
            total += counts[..., k].double() * cost
        return total / (self.samples * self.static)

    def outcome(self, exit_index: Tensor) -> Outcome:
        """Return the result when the samples exit at ``exit_index`` (samples,)."""
        counts = self.counts(exit_index)
        return Outcome(
            cost=self.cost(counts).item(),
            accuracy=self.accuracy(self.right.gather(0, exit_index[None])[0]) if self.labelled else math.nan,
            shares=tuple(count / self.samples for count in counts.tolist()),
            samples=self.samples,
        )

    def calibrated(self, policy: Policy, method: str, *notes: str, risk: float | None = None) -> Calibrated:
        """Return the result of a policy, completed with temperatures and combination, on these samples."""
        policy = self.complete(policy)
        nonfinite = (~self.logits[:-1].isfinite().all(-1)).any(0).sum().item()
        if nonfinite:
            notes += (f"{nonfinite} of {self.samples} samples have logits that are not finite at an early exit",)
        exit_index = route(policy, self.logits)
        return Calibrated(**vars(self.outcome(exit_index)), policy=policy, method=method, notes=notes, risk=risk)


def balancing(targets: Tensor) -> Tensor:
    """Return weights (samples,) float64 with mean 1 that give all occurring classes equal weight.

    >>> balancing(torch.tensor([0, 0, 0, 2])).tolist()
    [0.666..., 0.666..., 0.666..., 2.0]
    """
    counts = torch.bincount(targets)
    return len(targets) / ((counts > 0).sum() * counts[targets]).double()


def classes(logits: Tensor) -> Tensor:
    """Return the predicted classes of logits (..., classes), -1 for logits that are not finite."""
    return torch.where(logits.isfinite().all(-1), logits.argmax(-1), -1)


def _check_costs(costs: Sequence[float] | Tensor, static: float | None, exits: int) -> tuple[list[float], float]:
    values = [float(cost) for cost in costs]
    if len(values) != exits:
        raise ValueError(
            f"costs has {len(values)} values, the logits have {exits} exits; give the cost up to each exit"
        )
    if not all(a < b < math.inf for a, b in zip([0.0, *values], values, strict=False)):  # NaN fails as well
        raise ValueError(f"costs={values} must be above 0 and rise from exit to exit: each is the cost up to its exit")
    full_cost = values[-1] if static is None else float(static)
    if not 0 < full_cost < math.inf:
        raise ValueError(f"static={static} must be the cost of the static network, above 0, in the unit of costs")
    return values, full_cost


def evaluate(
    policy: Policy,
    logits: Tensor,
    targets: Tensor | None,
    costs: Sequence[float] | Tensor,
    *,
    static: float | None = None,
) -> Outcome:
    """Compute the cost and accuracy of a policy on these samples; held-out samples give an unbiased estimate.

    >>> from dynadapter.exits.policies import Confidence
    >>> logits = torch.tensor([[[3.0, 0.0], [0.1, 0.0]], [[3.0, 0.0], [0.0, 3.0]]])  # two exits, two samples
    >>> evaluate(Confidence(0.9), logits, torch.tensor([0, 1]), costs=[1, 4])
    Outcome(cost=0.625, accuracy=1.0, shares=(0.5, 0.5), samples=2)

    Args:
        policy: Routes these logits, such as ``Calibrated.policy``.
        logits: (exits, samples, classes).
        targets: (samples,), or None.
        costs: (exits,), cumulative.
        static: Cost of the static network; None for that of the last exit.

    Raises:
        ValueError: If the policy does not fit the number of exits, or arguments do not fit.
    """
    data = Stacked(logits, targets, costs, static, policy)
    return data.outcome(route(policy, logits.detach()))


def split_folds(samples: int, folds: int = 2, seed: int = 0, targets: Tensor | None = None) -> tuple[Tensor, ...]:
    """Split samples at random into folds whose sizes differ by at most one.

    With targets the folds are stratified: their numbers of samples of a class differ by at most one. Leave the targets
    out if a fold goes to :func:`with_guarantee`, which needs independent samples.

    >>> first, second = split_folds(5)
    >>> len(first), len(second), sorted(torch.cat([first, second]).tolist())
    (3, 2, [0, 1, 2, 3, 4])

    Args:
        samples: Number of samples.
        folds: Number of folds, from 2 to ``samples``.
        seed: Random seed of the split.
        targets: Classes (samples,).

    Returns:
        The indices of each fold in rising order, int64.

    Raises:
        ValueError: If there are fewer samples than folds, fewer than 2 folds, or another number of targets.
    """
    if not 2 <= folds <= samples:
        raise ValueError(f"samples={samples} cannot be split into folds={folds}; give 2 to {samples} folds")
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(seed))
    if targets is not None:
        if targets.shape != (samples,):
            raise ValueError(f"targets have shape {tuple(targets.shape)}; give ({samples},), one per sample")
        order = order[targets.cpu()[order].argsort(stable=True)]  # class by class, each in random order
    return tuple(order[fold::folds].sort().values for fold in range(folds))
