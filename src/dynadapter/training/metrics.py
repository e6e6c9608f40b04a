"""Metrics of evaluation, exact in every precision: counts are integers and sums have 64 bits."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric

BINS = 15
"""Bins of the calibration error."""
KINDS = ("acc", "balanced_acc", "macro_f1", "ece", "loss")
"""What is measured at each exit: accuracy, balanced accuracy, macro-F1, calibration error and loss."""


class ExactMetric(Metric):
    """A metric whose states keep their types when the module around it changes precision or device.

    Lightning's ``bf16-true`` and ``16-true`` convert the states of other metrics to 16 bits, in which a count cannot
    exceed 256 or 2048.
    """

    full_state_update = False
    higher_is_better = None
    is_differentiable = False

    @property
    def real(self) -> torch.dtype:
        """The type of sums: float64, or float32 on an Apple GPU, which has no float64."""
        return torch.float32 if self.device.type == "mps" else torch.float64

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        def move(state: Tensor) -> Tensor:
            device = fn(torch.empty(0, device=state.device)).device
            narrow = device.type == "mps" and state.dtype == torch.float64
            return state.to(device, torch.float32 if narrow else state.dtype)

        return super()._apply(move, exclude_state)

    def _add_sum(self, name: str, *shape: int, dtype: torch.dtype = torch.int64) -> None:
        """Add a state of zeros that is summed over processes."""
        self.add_state(name, torch.zeros(shape, dtype=dtype), dist_reduce_fx="sum")


class SampleMean(ExactMetric):
    """The mean of a value over samples; equal for any number of processes and any division into batches.

    Values that are not finite are kept.

    >>> mean = SampleMean()
    >>> mean.update(torch.tensor(1.0), samples=3)
    >>> mean.update(torch.tensor(5.0), samples=1)
    >>> mean.compute().item()
    2.0
    """

    total: Tensor
    samples: Tensor

    def __init__(self) -> None:
        super().__init__()
        self._add_sum("total", dtype=torch.float64)
        self._add_sum("samples")

    def update(self, mean: Tensor, samples: int) -> None:
        """Add the mean over a number of samples; the mean over none is ignored."""
        if samples:
            self.total += mean.detach().to(self.real) * samples
            self.samples += samples

    def compute(self) -> Tensor:
        """Return the mean over all samples, a float64 scalar; 0 if there was none."""
        return self.total / self.samples.clamp(min=1)


class Accuracy(ExactMetric):
    """The fraction of samples that are right.

    >>> accuracy = Accuracy()
    >>> accuracy.update(torch.tensor([True, False, True, True]))
    >>> accuracy.compute().item()
    0.75
    """

    right: Tensor
    samples: Tensor

    def __init__(self) -> None:
        super().__init__()
        self._add_sum("right")
        self._add_sum("samples")

    def update(self, right: Tensor) -> None:
        """Count a batch of booleans ``(batch,)``."""
        self.right += right.sum()
        self.samples += len(right)

    def compute(self) -> Tensor:
        """Return the accuracy, a float64 scalar; 0 if there was no sample."""
        return self.right.to(self.real) / self.samples.clamp(min=1)


class ClassCounts(ExactMetric):
    """Counts of samples by class; the base of metrics in which all classes have equal weight."""

    samples: Tensor
    right: Tensor
    predicted: Tensor

    def __init__(self, classes: int) -> None:
        super().__init__()
        for name in ("samples", "right", "predicted"):
            self._add_sum(name, classes)

    def update(self, predicted: Tensor, targets: Tensor) -> None:
        """Add a batch.

        Args:
            predicted: Class indices ``(batch,)``; -1 is always wrong.
            targets: Class indices ``(batch,)``.
        """
        classes = len(self.samples)
        self.samples += torch.bincount(targets, minlength=classes)
        self.right += torch.bincount(targets[predicted == targets], minlength=classes)
        self.predicted += torch.bincount(predicted[predicted >= 0], minlength=classes)


class Recall(ClassCounts):
    """The fraction of each class that is right; NaN for a class without samples.

    >>> recall = Recall(classes=3)
    >>> recall.update(torch.tensor([0, 0, 0, 0]), torch.tensor([0, 0, 0, 1]))
    >>> recall.compute().tolist()
    [1.0, 0.0, nan]
    """

    def compute(self) -> Tensor:
        """Return the fractions ``(classes,)`` in float64."""
        return self.right.to(self.real) / self.samples


class BalancedAccuracy(Recall):
    """The mean over classes of the fraction of right samples; classes without samples are left out.

    >>> balanced = BalancedAccuracy(classes=3)
    >>> balanced.update(torch.tensor([0, 0, 0, 0]), torch.tensor([0, 0, 0, 1]))
    >>> balanced.compute().item()
    0.5
    """

    def compute(self) -> Tensor:
        """Return the balanced accuracy, a float64 scalar; 0 if there was no sample."""
        return super().compute().nansum() / (self.samples > 0).sum().clamp(min=1)


class MacroF1(ClassCounts):
    """The mean over classes of F1, the harmonic mean of precision and recall.

    Classes that occur neither among targets nor among predictions are left out, as in scikit-learn.

    >>> f1 = MacroF1(classes=3)
    >>> f1.update(torch.tensor([0, 0, 0, 0]), torch.tensor([0, 0, 0, 1]))
    >>> round(f1.compute().item(), 4)
    0.4286
    """

    def compute(self) -> Tensor:
        """Return the macro-F1, a float64 scalar; 0 if there was no sample."""
        both = self.samples + self.predicted
        f1 = 2 * self.right.to(self.real) / both.clamp(min=1)
        return f1.sum() / (both > 0).sum().clamp(min=1)


class CalibrationError(ExactMetric):
    """Expected calibration error: |accuracy - confidence|, averaged over bins of confidence by their sizes.

    Source: Guo et al. 2017, with 15 bins of equal width.

    >>> error = CalibrationError()
    >>> error.update(torch.tensor([0.9, 0.9, 0.9, 0.9]), torch.tensor([True, True, True, False]))
    >>> round(error.compute().item(), 6)
    0.15
    """

    samples: Tensor
    right: Tensor
    confidence: Tensor

    def __init__(self) -> None:
        super().__init__()
        self._add_sum("samples", BINS)
        self._add_sum("right", BINS)
        self._add_sum("confidence", BINS, dtype=torch.float64)

    def update(self, confidence: Tensor, right: Tensor) -> None:
        """Add a batch.

        Args:
            confidence: Largest probability of each sample ``(batch,)``.
            right: Whether the class of this probability is right ``(batch,)``.
        """
        confidence = confidence.to(self.real)
        members = F.one_hot((confidence * BINS).long().clamp(max=BINS - 1), BINS)  # (batch, bins)
        self.samples += members.sum(0)
        self.right += (members * right[:, None]).sum(0)
        self.confidence += (members * confidence[:, None]).sum(0)

    def compute(self) -> Tensor:
        """Return the error, a float64 scalar; 0 if there was no sample."""
        return (self.right - self.confidence).abs().sum() / self.samples.sum().clamp(min=1)


class ExitUse(ExactMetric):
    """Count how many samples stop at each exit; equal for any number of processes and any division into batches.

    >>> use = ExitUse(exits=3)
    >>> use.update(torch.tensor([0, 0, 2, 0]))
    >>> use.compute().tolist()
    [0.75, 0.0, 0.25]

    Args:
        exits: Number of all exits, the last included.

    Raises:
        ValueError: ``exits`` is below 1.
    """

    counts: Tensor

    def __init__(self, exits: int) -> None:
        super().__init__()
        if exits < 1:
            raise ValueError(f"exits={exits} must be at least 1, the last exit")
        self._add_sum("counts", exits)

    def update(self, exit_index: Tensor) -> None:
        """Count a batch.

        Args:
            exit_index: ``(batch,)`` integers, from 0.

        Raises:
            ValueError: An exit index is out of range.
        """
        known, count = len(self.counts), exit_index.numel()
        if count and (exit_index.min() < 0 or exit_index.max() >= known):
            found = f"{exit_index.min().item()} to {exit_index.max().item()}"
            raise ValueError(f"exit_index must be from 0 to {known - 1}, got {found}")
        self.counts += torch.bincount(exit_index, minlength=known)

    def compute(self) -> Tensor:
        """Return the exit shares ``(exits,)`` in float64, which sum to 1; all 0 if there was no sample."""
        return self.counts.to(self.real) / self.counts.sum().clamp(min=1)


def metrics_of_exits(exits: int, classes: int) -> dict[str, nn.ModuleList]:
    """Return new metrics for each exit, for each of the :data:`KINDS`."""
    kinds: dict[str, Callable[[], Metric]] = {
        "acc": Accuracy,
        "balanced_acc": partial(BalancedAccuracy, classes),
        "macro_f1": partial(MacroF1, classes),
        "ece": CalibrationError,
        "loss": SampleMean,
    }
    return {kind: nn.ModuleList(kinds[kind]() for _ in range(exits)) for kind in KINDS}
