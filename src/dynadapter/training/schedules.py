"""Schedules: a number as a pure function of the progress of training."""

import math
from abc import abstractmethod
from dataclasses import dataclass

from dynadapter.spec import Spec


@dataclass(frozen=True)
class Schedule(Spec):
    """A value as a function of progress, from 0 at the first step to 1 at the last."""

    @property
    def varies(self) -> bool:
        """Return whether the value depends on progress; a constant also works in training without a known end."""
        return True

    @abstractmethod
    def __call__(self, progress: float) -> float:
        """Return the value at ``progress`` in [0, 1]."""


def _check_finite(**values: float) -> None:
    for name, value in values.items():
        if not math.isfinite(value):
            raise ValueError(f"{name}={value!r} must be a finite number")


def _between(start: float, end: float, way: float) -> float:
    """Interpolate between start and end: exact at both ends, and never outside them through rounding."""
    value = start * (1 - way) + end * way
    return min(max(value, min(start, end)), max(start, end))


@dataclass(frozen=True)
class Constant(Schedule):
    """The same value throughout training.

    Args:
        value: The value.
    """

    value: float

    varies = False

    def __post_init__(self) -> None:
        _check_finite(value=self.value)

    def __call__(self, progress: float) -> float:
        return self.value


@dataclass(frozen=True)
class _FromTo(Schedule):
    start: float
    end: float

    def __post_init__(self) -> None:
        _check_finite(start=self.start, end=self.end)


@dataclass(frozen=True)
class Linear(_FromTo):
    """A straight line.

    >>> Linear(1, 0)(0.25)
    0.75

    Args:
        start: Value at the first step.
        end: Value at the last step.
    """

    def __call__(self, progress: float) -> float:
        return _between(self.start, self.end, progress)


@dataclass(frozen=True)
class Cosine(_FromTo):
    """Half a cosine wave: slow at both ends, fastest in the middle.

    Args:
        start: Value at the first step.
        end: Value at the last step.
    """

    def __call__(self, progress: float) -> float:
        return _between(self.start, self.end, (1 - math.cos(math.pi * progress)) / 2)


@dataclass(frozen=True)
class Cubic(_FromTo):
    """The cubic schedule of gradual pruning, fast at first and slow towards the end (Zhu and Gupta 2017).

    Args:
        start: Value at the first step.
        end: Value at the last step.
    """

    def __call__(self, progress: float) -> float:
        return _between(self.start, self.end, 1 - (1 - progress) ** 3)


@dataclass(frozen=True)
class Step(_FromTo):
    """One value, then another.

    Args:
        start: Value before ``at``.
        end: Value from ``at`` on.
        at: Progress in [0, 1] at which it changes.
    """

    at: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.at <= 1:
            raise ValueError(f"at={self.at!r} must be a fraction of training in [0, 1]")

    def __call__(self, progress: float) -> float:
        return self.start if progress < self.at else self.end


@dataclass(frozen=True)
class Warmup(Schedule):
    """A straight line to another schedule's first value, then that schedule over the rest of training.

    >>> Warmup(0.5, 0.0, then=Linear(1, 0))(0.75)
    0.5

    Args:
        fraction: Fraction of training that the line takes, in [0, 1).
        start: Value at the first step.
        then: The schedule that follows; its progress runs from 0 to 1 over the rest of training.
    """

    fraction: float
    start: float
    then: Schedule

    def __post_init__(self) -> None:
        _check_finite(start=self.start)
        if not 0 <= self.fraction < 1:
            raise ValueError(f"fraction={self.fraction!r} must be a fraction of training in [0, 1)")

    def __call__(self, progress: float) -> float:
        if progress < self.fraction:
            return _between(self.start, self.then(0.0), progress / self.fraction)
        return self.then((progress - self.fraction) / (1 - self.fraction))
