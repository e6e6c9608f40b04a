"""Intervals of 95 % for an accuracy, for the difference of two accuracies on the same samples, and for their means."""

from collections.abc import Sequence
from typing import NamedTuple

Z = 1.959963984540054
"""Quantile 0.975 of the normal distribution."""


class Interval(NamedTuple):
    """The lower and upper end of an interval."""

    low: float
    high: float


def share_interval(count: int, samples: int) -> Interval:
    """Return the interval of a probability from a count of independent samples.

    >>> share_interval(150, 200)
    Interval(low=0.6857..., high=0.8047...)

    Source: Wilson 1927, the score interval.
    """
    centre = (count + Z**2 / 2) / (samples + Z**2)
    half = Z / (samples + Z**2) * (count * (samples - count) / samples + Z**2 / 4) ** 0.5
    return Interval(max(0.0, centre - half), min(1.0, centre + half))


def difference_interval(gained: int, lost: int, samples: int) -> Interval:
    """Return the interval of the difference of two accuracies on the same samples.

    Args:
        gained: Samples that only the first has right.
        lost: Samples that only the second has right.
        samples: All samples.

    Source: Agresti and Min 2005, Simple improved confidence intervals for comparing matched proportions: Wald's
        interval with half a sample added to each of the four cells.
    """
    total = samples + 2
    mean = (gained - lost) / total
    half = Z * ((gained + lost + 1) / total - mean**2) ** 0.5 / total**0.5
    return Interval(max(-1.0, mean - half), min(1.0, mean + half))


def mean_interval(estimates: Sequence[float], intervals: Sequence[Interval]) -> Interval:
    """Return the interval of the mean of independent estimates, such as the accuracies of classes.

    Args:
        estimates: The estimates.
        intervals: Their 95 % intervals; each contains its estimate.

    Source: Zou and Donner 2008, Construction of confidence limits about effect measures: a general approach (MOVER).
    """
    mean, number = sum(estimates) / len(estimates), len(estimates)
    below = sum((one - ends.low) ** 2 for one, ends in zip(estimates, intervals, strict=True)) ** 0.5 / number
    above = sum((ends.high - one) ** 2 for one, ends in zip(estimates, intervals, strict=True)) ** 0.5 / number
    return Interval(mean - below, mean + above)
