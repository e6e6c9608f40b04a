"""The paired bootstrap of the claims: a mean difference over fixed tasks, with images and seeds drawn at random."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 10_000
LEVEL = 0.95
"""Share of the draws inside the interval."""


@dataclass(frozen=True)
class Difference:
    """A mean difference in points.

    Args:
        estimate: Mean over the tasks.
        low: Lower end of the interval.
        high: Upper end of the interval.
        tasks: Difference of each task, a mean over its seeds.
        seeds: Fewest seeds of a task.
    """

    estimate: float
    low: float
    high: float
    tasks: tuple[float, ...]
    seeds: int


def compare(tasks: Sequence[np.ndarray], draws: int = DRAWS, seed: int = 0) -> Difference:
    """Estimate a mean difference over tasks, with a percentile interval from a bootstrap over images and seeds.

    Images are drawn with replacement, the same for all seeds of a task. Seeds are drawn with replacement, too. Of their
    spread only the part counts that the images do not explain, because the draw of images has that part already. It is
    scaled by sqrt(n / (n - 1)), because n seeds drawn from n vary less than new ones would, and by Student's factor,
    with the degrees of freedom of Welch and Satterthwaite: where one task has most of the spread, its seeds alone
    count. With one seed the interval covers the images alone.

    Args:
        tasks: For each task the difference of each seed and image (seeds, images), such as right minus right, in
            [-1, 1].
        draws: Draws of the bootstrap.
        seed: Random seed of the draws.
    """
    generator = np.random.default_rng(seed)
    means = [100 * task.mean(1) for task in tasks]
    share = _share_of_seeds(tasks)
    of_images, of_seeds = np.zeros(draws), np.zeros(draws)
    for task, mean in zip(tasks, means, strict=True):
        seeds, images = task.shape
        # Images with the same differences at all seeds are alike: draw how many of each kind.
        kinds, counts = np.unique(task, axis=1, return_counts=True)
        drawn = generator.multinomial(images, counts / images, size=draws)
        of_images += 100 * (drawn @ kinds.mean(0)) / images
        if seeds > 1:
            chosen = mean[generator.integers(seeds, size=(draws, seeds))].mean(1)
            of_seeds += share * np.sqrt(seeds / (seeds - 1)) * (chosen - mean.mean())
    if freedom := _freedom(means):
        of_seeds *= np.sqrt(freedom / generator.chisquare(freedom, draws))
    low, high = np.quantile((of_images + of_seeds) / len(tasks), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    by_task = tuple(float(mean.mean()) for mean in means)
    return Difference(float(np.mean(by_task)), float(low), float(high), by_task, min(map(len, tasks)))


def _freedom(means: Sequence[np.ndarray]) -> float:
    """Return the degrees of freedom of a sum of means over seeds; 0 where no task has a spread.

    Args:
        means: For each task the mean of each seed (seeds,).
    """
    spread = [(mean.var(ddof=1) / len(mean), len(mean) - 1) for mean in means if len(mean) > 1]
    total = sum(variance for variance, _ in spread)
    return float(total**2 / sum(variance**2 / freedom for variance, freedom in spread)) if total else 0.0


def _share_of_seeds(tasks: Sequence[np.ndarray]) -> float:
    """Return the share of the seeds' standard deviation that single images do not explain, over all tasks."""
    between = within = 0.0
    for task in tasks:
        seeds, images = task.shape
        if seeds > 1:
            residual = task - task.mean(1, keepdims=True) - task.mean(0, keepdims=True) + task.mean()
            between += task.mean(1).var(ddof=1)
            within += (residual**2).sum() / ((seeds - 1) * (images - 1)) / images
    return float(np.sqrt(max(0.0, 1 - within / between))) if between else 0.0
