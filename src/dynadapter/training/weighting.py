"""Weightings: loss-weight schedules, the weight of each exit in the joint loss over training."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from dynadapter.spec import Spec
from dynadapter.training.schedules import Linear, Schedule


@dataclass(frozen=True)
class Weighting(Spec):
    """One loss weight per exit as a function of progress, from 0 at the first step to 1 at the last; they sum to 1.

    A subclass defines :meth:`profile`, the weights in any scale; this class divides them by their sum.
    """

    @property
    def varies(self) -> bool:
        """Return whether the weights depend on progress; others also work in training without a known end."""
        return True

    @abstractmethod
    def profile(self, progress: float, exits: int) -> Sequence[float]:
        """Return the weights of all exits at ``progress`` in [0, 1], none negative, in any scale."""

    def __call__(self, progress: float, exits: int) -> tuple[float, ...]:
        """Return the weights of all exits; they sum to 1.

        Args:
            progress: In [0, 1].
            exits: Number of all exits, the last included.

        Returns:
            One weight per exit, the first exit first.

        Raises:
            ValueError: The profile has another length, a negative or non-finite value, or only zeros.
        """
        values = [float(value) for value in self.profile(progress, exits)]
        if len(values) != exits:
            raise ValueError(f"{self} gives {len(values)} weights, this network has {exits} exits; give one per exit")
        total = sum(values)
        if not (min(values) >= 0 and 0 < total < math.inf):
            raise ValueError(
                f"{self} gives {values} at progress {progress:g}; weights must be finite, at least 0, and not all 0"
            )
        return tuple(value / total for value in values)


def _tilted(lateness: float, exits: int, floor: float) -> list[float]:
    """Return a straight line over the exits, from ``floor`` to 1: falling at lateness 0, flat at 0.5, rising at 1."""
    places = [k / (exits - 1) for k in range(exits)] if exits > 1 else [0.5]
    return [floor + (1 - floor) * ((1 - lateness) * (1 - place) + lateness * place) for place in places]


@dataclass(frozen=True)
class _Shifting(Weighting):
    floor: float = 0.1
    ease: Schedule = Linear(0.0, 1.0)  # noqa: RUF009 - frozen
    last: float | None = None

    def __post_init__(self) -> None:
        if self.last is not None and not 0 < self.last < 1:
            raise ValueError(f"last={self.last!r} must be above 0 and below 1: the last exit's fraction of all weights")
        if not 0 <= self.floor <= 1:
            raise ValueError(
                f"floor={self.floor!r} must be in [0, 1]: the smallest weight as a fraction of the largest"
            )

    @property
    def varies(self) -> bool:
        return self.ease.varies

    def way(self, progress: float) -> float:
        """Return the progress of the shift, in [0, 1]."""
        way = self.ease(progress)
        if not 0 <= way <= 1:
            raise ValueError(f"ease={self.ease} gives {way} at progress {progress:g}; it must stay in [0, 1]")
        return way

    def shifted(self, lateness: float, exits: int) -> list[float]:
        """Return a line over the exits; with ``last`` over the early exits, beside the last exit's constant weight."""
        if self.last is None or exits == 1:
            return _tilted(lateness, exits, self.floor)
        early = _tilted(lateness, exits - 1, self.floor)
        return [*((1 - self.last) * value / sum(early) for value in early), self.last]


@dataclass(frozen=True)
class EarlyToLate(_Shifting):
    """The early exits have the largest weights at the start of training, the late exits at the end.

    Exit k of K is at p = (k - 1) / (K - 1), whatever its depth. With e = ease(progress), its weight is proportional to
    ``floor + (1 - floor) * ((1 - e) * (1 - p) + e * p)``: a line over the exits that turns from falling to rising.
    Dyn-Adapter's adaptive prioritisation shifts weight from one group of exits to the other; the direction and this
    formula are ours.

    >>> [round(w, 3) for w in EarlyToLate(floor=0.1)(0.0, 4)]
    [0.455, 0.318, 0.182, 0.045]

    Args:
        floor: Smallest weight at either end of training as a fraction of the largest; 0 switches exits off there.
        ease: Progress of the shift, from 0 (not begun) to 1 (complete).
        last: Constant weight of the last exit, as a fraction of all weights; the early exits then shift among
            themselves. None lets the last exit shift too.
    """

    def profile(self, progress: float, exits: int) -> Sequence[float]:
        return self.shifted(self.way(progress), exits)


@dataclass(frozen=True)
class LateToEarly(_Shifting):
    """The late exits have the largest weights at the start, the early exits at the end (ours).

    This is :class:`EarlyToLate` reversed. With ``last`` and :class:`~dynadapter.exits.exit_tokens.ExitTokens` the
    adapters train as in the static network: the constant weight of the last exit then does not change the optimiser's
    steps.

    Args:
        floor: Smallest weight at either end of training as a fraction of the largest; 0 switches exits off there.
        ease: Progress of the shift, from 0 (not begun) to 1 (complete).
        last: Constant weight of the last exit, as a fraction of all weights; the early exits then shift among
            themselves. None lets the last exit shift too.
    """

    def profile(self, progress: float, exits: int) -> Sequence[float]:
        return self.shifted(1 - self.way(progress), exits)


@dataclass(frozen=True)
class Uniform(Weighting):
    """The same weight for all exits (MSDNet)."""

    varies = False

    def profile(self, progress: float, exits: int) -> Sequence[float]:
        return [1.0] * exits


@dataclass(frozen=True)
class LinearInDepth(Weighting):
    """Weights proportional to the exit's number: exit k counts k times as much as exit 1 (PABEE)."""

    varies = False

    def profile(self, progress: float, exits: int) -> Sequence[float]:
        return [float(k) for k in range(1, exits + 1)]


@dataclass(frozen=True)
class PerExit(Weighting):
    """One schedule per exit; at every step the values are scaled to the sum of 1.

    Args:
        schedules: One per exit, the last exit included.
    """

    schedules: tuple[Schedule, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "schedules", tuple(self.schedules))

    @property
    def varies(self) -> bool:
        return any(schedule.varies for schedule in self.schedules)

    def profile(self, progress: float, exits: int) -> Sequence[float]:
        return [schedule(progress) for schedule in self.schedules]
