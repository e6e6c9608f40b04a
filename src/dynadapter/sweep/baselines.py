"""Baselines from the same logits without a policy: all images at one exit, random mixtures of exits, the oracle."""

from collections.abc import Mapping, Sequence

import numpy as np

from dynadapter.sweep.measure import WAYS
from dynadapter.sweep.plan import Line

SLACK = 1.0
"""Points of static that an exit may cost beyond a budget: with its head, half of the blocks cost a little over 50 %."""

ROUNDING = 1e-4
"""Points of accuracy by which a line may be rounded."""

DECIMALS = 4
"""Decimals of combined accuracies in %; equal ones compare equal where the exits' own have as many."""

ORACLE = "oracle"

Place = tuple[int, int]
"""A way to predict, of :data:`WAYS`, and an exit, both from 0."""


def costs(line: Line) -> np.ndarray:
    """Return the cost of each exit in % of static (exits,)."""
    return np.array([entry["percent_of_static"] for entry in line["exits"]])


def accuracies(line: Line) -> np.ndarray:
    """Return the accuracy of each exit in % by each way of combining the exits passed (ways, exits)."""
    keys = ["accuracy", *(name for name, _ in WAYS[1:])]
    return 100 * np.array([[entry[key] for entry in line["exits"]] for key in keys])


def one_exit(twins: Sequence[Line], target: Mapping[str, float]) -> Place:
    """Choose one exit for all images, and how it combines the exits passed.

    For a cost, this is the most accurate exit on val200 within the budget. For an accuracy, it is the cheapest exit
    that reaches it, or the most accurate one if none does.

    Args:
        twins: Results on val200 of the train800 runs of one arm; their means count.
        target: ``{cost: ...}`` or ``{accuracy: ...}``, both fractions.
    """
    accuracy = np.mean([accuracies(line).round(DECIMALS) for line in twins], axis=0)
    cost = np.broadcast_to(costs(twins[0]), accuracy.shape)
    if "cost" in target:
        fits = cost <= max(100 * target["cost"] + SLACK, cost.min())
        value = np.where(fits, accuracy - 1e-6 * cost, -np.inf)
    else:
        enough = accuracy >= 100 * target["accuracy"] - ROUNDING
        value = np.where(enough, -cost + 1e-6 * accuracy, -np.inf) if enough.any() else accuracy - 1e-6 * cost
    way, k = np.unravel_index(int(value.argmax()), value.shape)
    return int(way), int(k)


def mixture(line: Line, cost: float) -> np.ndarray:
    """Return the most accurate random mixture of exits at a cost, chosen on the images of the line itself.

    This favours the mixture. Two exits are enough, because the best mixtures lie on the hull of the exits.

    Args:
        line: A run with several exits.
        cost: Mean cost in % of static. If it is below the cost of the first exit, the first exit is taken.

    Returns:
        Probability of each way and exit (ways, exits); the sum is 1.
    """
    accuracy = accuracies(line)
    cost_of = np.broadcast_to(costs(line), accuracy.shape).ravel()
    flat = accuracy.ravel()
    cost = max(cost, cost_of.min())
    gap = cost_of[None, :] - cost_of[:, None]
    share = np.divide(cost - cost_of[:, None], gap, out=np.zeros_like(gap), where=gap > 0).clip(0, 1)
    value = flat[:, None] * (1 - share) + flat[None, :] * share
    value[cost_of > cost] = -np.inf  # rows are the cheaper exit: share is 0 where the other is no dearer
    i, j = np.unravel_index(int(value.argmax()), value.shape)
    weights = np.zeros(flat.size)
    weights[i] += 1 - share[i, j]
    weights[j] += share[i, j]
    return weights.reshape(accuracy.shape)


def oracle(right: np.ndarray, cost: np.ndarray) -> tuple[float, float]:
    """Return accuracy and cost in % if each image takes its first right exit, or exit 1 if none is right.

    Args:
        right: Whether each exit's own prediction is right (exits, images).
        cost: Cost of each exit in % of static (exits,).
    """
    return 100 * float(right.any(0).mean()), float(cost[right.argmax(0)].mean())


def readings(line: Line, twin: Line, right: np.ndarray) -> dict[str, tuple[float, float]]:
    """Return accuracy and cost in % of a run for each reading: every exit, policy and baseline.

    The twin is the line of its train800 run, which chooses the exit for all images; ``right`` (ways, exits, images).
    """
    accuracy, cost = accuracies(line), costs(line)
    found = {f"exit {k + 1}": (float(accuracy[0, k]), float(cost[k])) for k in range(len(cost))}
    for name, entry in line["policies"].items():
        if "unreached" in entry:
            continue
        found[name] = 100 * entry["accuracy"], entry["percent_of_static"]
        if len(cost) > 1:
            place = one_exit([twin], entry["target"])
            found[f"{name}: all at one exit"] = float(accuracy[place]), float(cost[place[1]])
            mixed = mixture(line, entry["percent_of_static"])
            found[f"{name}: random mixture"] = float((mixed * accuracy).sum()), float((mixed * cost).sum())
    if len(cost) > 1:
        found[ORACLE] = oracle(right[0], cost)
    return found
