"""Fit a temperature for each exit on validation logits, and apply it before exits are combined and a policy decides."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Real

import torch
from torch import Tensor

from dynadapter.exits.policies import Confidence, Policy, wide

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.1, 10.0
"""Range of a fitted temperature; beyond it a few samples decide and confidences saturate."""


def fit_temperatures(logits: Tensor, targets: Tensor) -> tuple[float, ...]:
    """Fit the temperature of each exit that minimises the mean negative log-likelihood of the targets.

    The likelihood is convex in 1 / temperature, so a Newton iteration inside a shrinking bracket finds the minimum, in
    float64. The result is in [0.1, 10] and its likelihood is never worse than at temperature 1. If there is no minimum,
    the temperature is 1: every target has its row's largest logit, or no row is finite. Rows with non-finite logits are
    left out, since such samples never exit early.

    >>> logits = torch.tensor([[[4.0, 0.0], [4.0, 0.0], [4.0, 0.0], [4.0, 0.0]]])  # confidence 98 %, accuracy 75 %
    >>> [temperature] = fit_temperatures(logits, torch.tensor([0, 0, 0, 1]))
    >>> round((logits[0, 0] / temperature).softmax(-1)[0].item(), 4)
    0.75

    Args:
        logits: (exits, samples, classes) of data that the network was not trained on.
        targets: Classes (samples,).

    Returns:
        One temperature per exit, the last exit included.

    Raises:
        TypeError: If logits are not floating or targets not integers.
        ValueError: If shapes do not fit, there is no sample, or a target is not a class.

    Source: Guo et al. 2017, On calibration of modern neural networks, section 4.2.
    """
    check_logits(logits)
    targets = check_targets(logits, targets)
    return tuple(_fit(exit_logits, targets) for exit_logits in logits.detach())


def check_logits(logits: Tensor) -> None:
    """Raise an error unless logits are floating-point (exits, samples, classes) with at least one of each."""
    if not logits.is_floating_point():
        raise TypeError(f"logits are {logits.dtype}; give floating-point logits (exits, samples, classes)")
    if logits.ndim != 3 or not logits.numel():
        raise ValueError(
            f"logits have shape {tuple(logits.shape)}; give (exits, samples, classes) with at least one of each"
        )


def check_targets(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the targets as int64 on the logits' device, after a check that there is one class per sample."""
    _, samples, classes = logits.shape
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise TypeError(f"targets are {targets.dtype}; give integer classes (samples,)")
    if targets.shape != (samples,):
        raise ValueError(
            f"targets have shape {tuple(targets.shape)}; give ({samples},), one class per sample of logits"
        )
    low, high = targets.min().item(), targets.max().item()
    if low < 0 or high >= classes:
        raise ValueError(f"targets run from {low} to {high}; give classes from 0 to {classes - 1}, as logits have")
    return targets.long().to(logits.device)


def _fit(logits: Tensor, targets: Tensor) -> float:
    finite = logits.isfinite().all(-1)
    z = logits[finite].double()
    z = z - z.amax(-1, keepdim=True)  # (samples, classes), the largest is 0
    right = z.gather(-1, targets[finite, None])[:, 0]
    if not (right < 0).any():
        return 1.0

    def slope(sharpness: float) -> tuple[float, float]:
        """Return the first and second derivative of the mean negative log-likelihood by 1 / temperature."""
        p = (sharpness * z).softmax(-1)
        mean = (p * z).sum(-1)
        variance = (p * (z - mean[:, None]).square()).sum(-1)
        return (mean - right).mean().item(), variance.mean().item()

    def likelihood(sharpness: float) -> float:
        return ((sharpness * z).logsumexp(-1) - sharpness * right).mean().item()

    low, high = 1 / MAX_TEMPERATURE, 1 / MIN_TEMPERATURE
    if slope(low)[0] >= 0:
        best = low
    elif slope(high)[0] <= 0:
        best = high
    else:
        best = 1.0
        for _ in range(100):  # about five suffice; bisection alone would need fifty
            first, second = slope(best)
            low, high = (best, high) if first < 0 else (low, best)
            newton = best - first / second if second > 0 else math.nan
            step = newton if low < newton < high else math.sqrt(low * high)
            best, before = step, best
            if not abs(best - before) > 1e-10 * before:
                break
    return 1 / best if likelihood(best) < likelihood(1.0) else 1.0


def tempered(logits: Tensor, temperatures: Sequence[float]) -> Tensor:
    """Divide each exit's logits by its temperature; half precision becomes float32.

    Args:
        logits: (exits so far, samples, classes).
        temperatures: One per exit, in order; further values are ignored.

    Returns:
        (exits so far, samples, classes).
    """
    return torch.stack([exit_logits / t for exit_logits, t in zip(wide(logits), temperatures, strict=False)])


@dataclass(frozen=True)
class Scaled(Policy):
    """Divide each exit's logits by its temperature; another policy and the prediction use the divided logits.

    Temperatures are applied first; exits are combined after that. A sample with non-finite logits, before or after the
    division, continues.

    >>> policy = Scaled(Confidence(0.8), temperatures=(2.0, 1.0))
    >>> policy.name
    'confidence_0.8_scaled'
    >>> policy.should_exit(torch.tensor([[[2.0, 0.0]]]))  # confidence 0.88, or 0.73 at temperature 2
    tensor([False])

    Args:
        policy: The other policy.
        temperatures: One value for all exits, or one per exit, the last one included; above 0.

    Source: Guo et al. 2017, section 4.2, per exit (ours).
    """

    policy: Policy = field(default_factory=Confidence)
    temperatures: float | tuple[float, ...] = 1.0

    def __post_init__(self) -> None:
        given = self.temperatures
        values = tuple(given) if isinstance(given, (tuple, list)) else (given,)
        for value in values:
            if not isinstance(value, Real) or isinstance(value, bool):
                raise TypeError(f"temperatures={given!r} must be a number above 0, or one such number per exit")
            if not 0 < value < math.inf:  # NaN fails as well
                raise ValueError(f"temperatures={given!r}: {value!r} is not above 0 and finite; 1 changes no logits")
        floats = tuple(float(value) for value in values)
        object.__setattr__(self, "temperatures", floats if isinstance(given, (tuple, list)) else floats[0])

    @property
    def name(self) -> str:
        return f"{self.policy.name}_scaled"

    @property
    def uses_early_exits(self) -> bool:
        return self.policy.uses_early_exits

    def check(self, exits: int) -> None:
        if isinstance(self.temperatures, tuple) and len(self.temperatures) != exits:
            raise ValueError(
                f"temperatures has {len(self.temperatures)} values, this network has {exits} exits; "
                f"give one value, or {exits} with the last exit's"
            )
        self.policy.check(exits)

    def combine(self, history: Tensor) -> Tensor:
        return self.policy.combine(self._tempered(history))

    def meets_condition(self, history: Tensor) -> Tensor:
        return self.policy.should_exit(self._tempered(history))

    def _tempered(self, history: Tensor) -> Tensor:
        each = self.temperatures if isinstance(self.temperatures, tuple) else (self.temperatures,) * len(history)
        if not self.uses_early_exits:  # then routing runs no early head, and the last exits alone are here
            each = each[-len(history) :]
        return tempered(history, each)
