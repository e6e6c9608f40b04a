"""Measure accuracy, confusion, recall and reliability from the logits of all exits."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dynadapter.calibrate.stacked import classes
from dynadapter.exits.policies import Policy, Routed, read_off

BINS = 15


@dataclass(frozen=True)
class Measured:
    """The logits of a network on the labelled images of a split, and the measurements from them.

    Args:
        split: ``val`` or ``test``.
        logits: Logits of all exits (exits, images, classes).
        targets: Class indices (images,).
        costs: Cost of each exit as a fraction of static (exits,).
        policy: The exit policy.
        origin: Description of where the policy comes from.
        class_names: In the order of their indices.
        sources: The images: files, or images in memory.
        exit_depths: After how many blocks each exit stands.
        parameters: Number of trained parameters.
        static_gmacs: Cost of the static network, in GMACs.
    """

    split: str
    logits: Tensor
    targets: Tensor
    costs: tuple[float, ...]
    policy: Policy
    origin: str
    class_names: tuple[str, ...]
    sources: Sequence[Any]
    exit_depths: tuple[int, ...]
    parameters: int
    static_gmacs: float

    @property
    def exits(self) -> int:
        """Number of exits."""
        return len(self.logits)

    @property
    def chose_policy(self) -> bool:
        """Whether the policy was calibrated on the validation images, and these are they."""
        return self.split == "val" and self.origin.startswith("calibrated")

    @cached_property
    def predictions(self) -> Tensor:
        """Classes by each exit's own logits (exits, images); -1 for non-finite logits."""
        return classes(self.logits)

    @cached_property
    def routed(self) -> Routed:
        """The exit of each image under the policy, and its logits there."""
        return read_off(self.policy, self.logits)

    @cached_property
    def predicted(self) -> Tensor:
        """Classes under the policy (images,); -1 for non-finite logits."""
        return classes(self.routed.logits)

    @cached_property
    def accuracies(self) -> list[float]:
        """Accuracy of each exit by its own logits, in [0, 1]."""
        return (self.predictions == self.targets).double().mean(1).tolist()

    @cached_property
    def accuracy(self) -> float:
        """Accuracy under the policy, in [0, 1]."""
        return (self.predicted == self.targets).double().mean().item()

    @cached_property
    def shares(self) -> list[float]:
        """Fraction of the images that stop at each exit under the policy."""
        return (torch.bincount(self.routed.exit_index, minlength=self.exits) / len(self.targets)).tolist()

    @cached_property
    def cost(self) -> float:
        """Mean cost under the policy, as a fraction of static."""
        return float(np.dot(self.shares, self.costs))


def confusion(predicted: Tensor, targets: Tensor, num_classes: int) -> np.ndarray:
    """Count the images of each class by predicted class.

    Args:
        predicted: Classes (images,); negative ones are left out.
        targets: Classes (images,).
        num_classes: Number of classes.

    Returns:
        Counts (classes, classes): rows are true classes, columns predictions.
    """
    known = predicted >= 0
    pairs = targets[known] * num_classes + predicted[known]
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes).numpy()


def recall(predicted: Tensor, targets: Tensor, num_classes: int) -> np.ndarray:
    """Return the fraction of right predictions of each class (classes,); NaN for a class without images."""
    counts = torch.bincount(targets, minlength=num_classes).double().numpy()
    right = torch.bincount(targets[predicted == targets], minlength=num_classes).double().numpy()
    return np.divide(right, counts, out=np.full(num_classes, np.nan), where=counts > 0)


class Reliability(NamedTuple):
    """Agreement of confidence and accuracy, in bins of equal width.

    Attributes:
        confidence: Mean confidence of each bin (bins,); NaN for an empty one.
        accuracy: Accuracy of each bin (bins,); NaN for an empty one.
        counts: Number of images of each bin (bins,).
        error: Expected calibration error (Guo et al. 2017), in [0, 1].
    """

    confidence: np.ndarray
    accuracy: np.ndarray
    counts: np.ndarray
    error: float


def reliability(logits: Tensor, targets: Tensor) -> Reliability:
    """Measure the reliability of confidences, the largest probabilities.

    Args:
        logits: (images, classes); images whose logits are not finite are left out.
        targets: Classes (images,).
    """
    finite = logits.isfinite().all(-1)
    top, predicted = logits[finite].double().softmax(-1).max(-1)
    right = (predicted == targets[finite]).double()
    place = (top * BINS).long().clamp(max=BINS - 1)
    counts = torch.bincount(place, minlength=BINS).double()
    sums = torch.stack([torch.zeros(BINS, dtype=torch.float64).index_add_(0, place, part) for part in (top, right)])
    confidence, accuracy = (sums / counts).numpy()
    error = (sums[1] - sums[0]).abs().sum().item() / max(int(counts.sum()), 1)
    return Reliability(confidence, accuracy, counts.numpy(), error)
