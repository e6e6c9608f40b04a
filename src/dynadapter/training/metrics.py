"""Metrics that torchmetrics has not."""

import torch
from torch import Tensor
from torchmetrics import Metric


class SampleMean(Metric):
    """The mean of a value over samples; the same for any number of processes and any split into batches.

    Values that are not finite stay what they are.

    >>> mean = SampleMean()
    >>> mean.update(torch.tensor(1.0), samples=3)
    >>> mean.update(torch.tensor(5.0), samples=1)
    >>> mean.compute()
    tensor(2.)
    """

    full_state_update = False
    higher_is_better = None
    is_differentiable = False
    total: Tensor
    samples: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("samples", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, mean: Tensor, samples: int) -> None:
        """Adds the mean of so many samples; of none, nothing."""
        if samples:
            self.total += mean.detach() * samples
            self.samples += samples

    def compute(self) -> Tensor:
        """Gives the mean of all samples, a scalar; 0 if there was none."""
        return self.total / self.samples.clamp(min=1)


class ExitUse(Metric):
    """Counts at which exit samples left; the same for any number of processes and any split into batches.

    >>> use = ExitUse(exits=3)
    >>> use.update(torch.tensor([0, 0, 2, 0]))
    >>> use.compute()
    tensor([0.7500, 0.0000, 0.2500])

    Args:
        exits: Number of all exits, the last included.
    """

    full_state_update = False
    higher_is_better = None
    is_differentiable = False
    counts: Tensor

    def __init__(self, exits: int) -> None:
        super().__init__()
        if exits < 1:
            raise ValueError(f"exits={exits} must be at least 1, the last exit")
        self.add_state("counts", torch.zeros(exits, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, exits: Tensor) -> None:
        """Counts a batch.

        Args:
            exits: Zero-based exits (batch,), integers.

        Raises:
            ValueError: If there is no such exit.
        """
        known = len(self.counts)
        if exits.numel() and (exits.min() < 0 or exits.max() >= known):
            raise ValueError(f"exits must be from 0 to {known - 1}, got {exits.min().item()} to {exits.max().item()}")
        self.counts += torch.bincount(exits, minlength=known)

    def compute(self) -> Tensor:
        """Gives the share of samples that left at each exit: (exits,), summing to 1; all 0 if there was no sample."""
        return self.counts / self.counts.sum().clamp(min=1)
