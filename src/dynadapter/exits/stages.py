"""The loop of early exit: run a stage, ask the policy, keep the samples that continue."""

from collections.abc import Callable

import torch
from torch import Tensor

from dynadapter.exits.policies import Policy, Routed, combined

Step = Callable[[int, tuple[Tensor, ...]], tuple[tuple[Tensor, ...], Tensor | None]]
"""Runs a stage: from its number and inputs, one row a sample, to the inputs of the next stage and the logits, which are
None where no head ran."""


def run_stages(step: Step, num_exits: int, inputs: tuple[Tensor, ...], policy: Policy) -> Routed:
    """Stop each sample at the first exit whose policy condition it meets.

    Args:
        step: Runs a stage.
        num_exits: Number of exits, the last one included.
        inputs: What the first stage takes, one row for each sample, at least one.
        policy: The exit policy.

    Returns:
        Logits and exit indices of all samples in order.
    """
    samples = len(inputs[0])
    rows: Tensor | None = None  # positions of the remaining samples in the batch; None while all remain
    out, exits = torch.empty(0), torch.empty(0)
    history: Tensor | None = None  # (exits so far, remaining, classes)
    for k in range(num_exits):
        inputs, found = step(k, inputs)
        if found is None:
            continue
        history = found[None] if history is None else torch.cat([history, found[None]])
        logits, stay = combined(policy, history)[-1], None
        if k < num_exits - 1:
            stay = (~policy.should_exit(history)).nonzero()[:, 0]
            if len(stay) == len(logits):
                continue
        # Write the results of all remaining samples; those that continue are written again later
        if rows is None:
            out, exits = logits.clone(), torch.full((samples,), k, device=logits.device)
        else:
            out.index_copy_(0, rows, logits)
            exits.index_fill_(0, rows, k)
        if stay is None or not len(stay):
            break
        rows = stay if rows is None else rows.index_select(0, stay)
        history = history.index_select(1, stay)
        inputs = tuple(part.index_select(0, stay) for part in inputs)
    return Routed(out, exits)
