"""What a trained network does on a split, read off its stacked logits: every exit, and the policy."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dynadapter.calibrate import evaluate
from dynadapter.exits.policies import Policy, route
from dynadapter.spec import plain


def measure(
    policy: Policy, logits: Tensor, targets: Tensor, costs: Sequence[float], static: float, depths: Sequence[int]
) -> tuple[dict[str, Any], Tensor]:
    """Measure every exit and the policy.

    Args:
        policy: Decides where images exit.
        logits: (exits, images, classes).
        targets: (images,).
        costs: Cumulative cost of each exit (exits,).
        static: Cost of the static network, in the same unit.
        depths: Blocks before each exit (exits,).

    Returns:
        The part of a line that holds results, and the exit index of each image (images,).
    """
    finite = logits.isfinite().all(-1)
    right = (logits.argmax(-1) == targets) & finite
    exits = []
    for k, depth in enumerate(depths):
        loss = F.cross_entropy(logits[k].double(), targets).item()
        exits.append(
            {
                "exit": k + 1,
                "after_block": depth,
                "percent_of_static": round(100 * costs[k] / static, 3),
                "accuracy": right[k].double().mean().item(),
                "loss": round(loss, 6) if math.isfinite(loss) else None,
            }
        )
    outcome = evaluate(policy, logits, targets, costs, static=static)
    routed = {
        "policy": plain(policy),
        "accuracy": outcome.accuracy,
        "percent_of_static": round(100 * outcome.cost, 3),
        "exit_shares": {f"exit {k}": round(share, 6) for k, share in enumerate(outcome.shares, start=1)},
    }
    results = {"images": len(targets), "classes": logits.shape[-1], "exits": exits, "policy": routed}
    return results, route(policy, logits).to(torch.int64)
