"""Measure every exit and the policies of a trained network on a split, from its stacked logits."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dynadapter.calibrate import evaluate
from dynadapter.exits.combining import Combined
from dynadapter.exits.policies import Never, Policy, read_off
from dynadapter.spec import plain

WAYS: tuple[tuple[str, Policy], ...] = (
    ("own", Never()),
    ("mean", Combined(Never(), by="mean")),
    ("geometric", Combined(Never(), by="geometric")),
)
"""What an exit predicts by: its own logits, or those of all exits passed."""


def measure(
    policies: Mapping[str, Policy],
    logits: Tensor,
    targets: Tensor,
    costs: Sequence[float],
    static: float,
    depths: Sequence[int],
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Measure every exit and the policies.

    Args:
        policies: The exit policies by the name of their goal.
        logits: (exits, images, classes).
        targets: (images,).
        costs: Cumulative cost of each exit (exits,).
        static: Cost of the static network, in the same unit.
        depths: Exit depths (exits,).

    Returns:
        The results for a line, and the values of each image for a bootstrap: ``right`` (ways, exits, images) bool,
        ``exit_index`` (policies, images) uint8 from 0, and ``routed`` (policies, images) bool, whether the prediction
        under the policy is right.
    """
    right = torch.stack([_right(way.combine(logits), targets) for _, way in WAYS])
    accuracy = right.double().mean(-1).tolist()
    exits = []
    for k, depth in enumerate(depths):
        loss = F.cross_entropy(logits[k].double(), targets).item()
        exits.append(
            {
                "exit": k + 1,
                "after_block": depth,
                "percent_of_static": round(100 * costs[k] / static, 3),
                "accuracy": accuracy[0][k],
                **{name: round(accuracy[way][k], 6) for way, (name, _) in enumerate(WAYS) if way},
                "loss": round(loss, 6) if math.isfinite(loss) else None,
            }
        )
    routed = {name: measure_policy(policy, logits, targets, costs, static) for name, policy in policies.items()}
    read = [read_off(policy, logits) for policy in policies.values()]
    images = {
        "right": right.numpy(),
        "exit_index": _stacked([one.exit_index for one in read], len(targets)).astype(np.uint8),
        "routed": _stacked([_right(one.logits, targets) for one in read], len(targets)).astype(bool),
    }
    return {"images": len(targets), "classes": logits.shape[-1], "exits": exits, "policies": routed}, images


def measure_policy(
    policy: Policy, logits: Tensor, targets: Tensor, costs: Sequence[float], static: float
) -> dict[str, Any]:
    """Return the policy and its result on these images as plain data; arguments as of :func:`measure`."""
    outcome = evaluate(policy, logits, targets, costs, static=static)
    return {
        "policy": plain(policy),
        "accuracy": outcome.accuracy,
        "percent_of_static": round(100 * outcome.cost, 3),
        "exit_shares": {f"exit {k}": round(share, 6) for k, share in enumerate(outcome.shares, start=1)},
    }


def _right(logits: Tensor, targets: Tensor) -> Tensor:
    return (logits.argmax(-1) == targets) & logits.isfinite().all(-1)


def _stacked(values: Sequence[Tensor], images: int) -> np.ndarray:
    return torch.stack(list(values)).numpy() if values else np.zeros((0, images))
