"""Metrics of evaluation that torchmetrics does not have, and the metrics that are kept for each exit."""

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassCalibrationError


class SampleMean(Metric):
    """The mean of a value over samples; equal for any number of processes and any division into batches.

    Values that are not finite are kept.

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
        """Add the mean over a number of samples; the mean over none is ignored."""
        if samples:
            self.total += mean.detach() * samples
            self.samples += samples

    def compute(self) -> Tensor:
        """Return the mean over all samples, a scalar; 0 if there was none."""
        return self.total / self.samples.clamp(min=1)


class ExitUse(Metric):
    """Count how many samples stop at each exit; equal for any number of processes and any division into batches.

    >>> use = ExitUse(exits=3)
    >>> use.update(torch.tensor([0, 0, 2, 0]))
    >>> use.compute()
    tensor([0.7500, 0.0000, 0.2500])

    Args:
        exits: Number of all exits, the last included.

    Raises:
        ValueError: There is no exit.
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

    def update(self, exit_index: Tensor) -> None:
        """Count a batch.

        Args:
            exit_index: ``(batch,)`` integers, from 0.

        Raises:
            ValueError: There is no such exit.
        """
        known, count = len(self.counts), exit_index.numel()
        if count and (exit_index.min() < 0 or exit_index.max() >= known):
            found = f"{exit_index.min().item()} to {exit_index.max().item()}"
            raise ValueError(f"exit_index must be from 0 to {known - 1}, got {found}")
        self.counts += torch.bincount(exit_index, minlength=known)

    def compute(self) -> Tensor:
        """Return the exit shares ``(exits,)``, which sum to 1; all 0 if there was no sample."""
        return self.counts / self.counts.sum().clamp(min=1)


def metrics_of_exits(num_classes: int, exits: int) -> dict[str, nn.ModuleList]:
    """Return new metrics, one for each exit: ``acc`` (accuracy), ``ece`` (calibration error, 15 bins) and ``loss``."""

    def calibration_error() -> Metric:
        return MulticlassCalibrationError(num_classes, n_bins=15, norm="l1", validate_args=False)

    kinds = {"acc": MeanMetric, "ece": calibration_error, "loss": SampleMean}
    return {kind: nn.ModuleList(metric() for _ in range(exits)) for kind, metric in kinds.items()}
