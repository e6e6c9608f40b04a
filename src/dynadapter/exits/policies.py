"""Exit policies: decide from the logits of the exits so far which samples stop at an exit."""

import math
from abc import abstractmethod
from dataclasses import dataclass
from numbers import Real
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from dynadapter.spec import Spec, returned


def wide(logits: Tensor) -> Tensor:
    """Return half-precision logits as float32; a bfloat16 softmax has no values between 0.996 and 1."""
    return logits if logits.dtype.itemsize > 2 else logits.float()


def confidence(logits: Tensor) -> Tensor:
    """Return the largest softmax probability, in [1 / classes, 1].

    Args:
        logits: (..., classes).

    Returns:
        (...), float32, or float64 for float64 logits.
    """
    return wide(logits).softmax(-1).amax(-1)


def entropy(logits: Tensor) -> Tensor:
    """Return the entropy of the softmax divided by its maximum log(classes), in [0, 1].

    Args:
        logits: (..., classes).

    Returns:
        (...), float32, or float64 for float64 logits.
    """
    log_p = wide(logits).log_softmax(-1)
    maximum = math.log(max(logits.shape[-1], 2))  # a single class has entropy 0
    return (-(log_p.exp() * log_p).sum(-1) / maximum).clamp(0, 1)


def margin(logits: Tensor) -> Tensor:
    """Return the difference of the two largest softmax probabilities, in [0, 1]; 1 for a single class.

    Args:
        logits: (..., classes).

    Returns:
        (...), float32, or float64 for float64 logits.
    """
    p = wide(logits).softmax(-1)
    if p.shape[-1] == 1:
        return p[..., 0]
    first, second = p.topk(2, -1).values.unbind(-1)
    return first - second


@dataclass(frozen=True)
class Policy(Spec):
    """Base of the exit policies. A subclass defines its condition in :meth:`meets_condition`."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Short name for log keys, CSV headers and file names, such as ``confidence_0.9``."""

    @property
    def uses_early_exits(self) -> bool:
        """Whether samples can exit early; if not, routing runs no early head."""
        return True

    @abstractmethod
    def meets_condition(self, history: Tensor) -> Tensor:
        """Check which samples meet the condition at the newest exit. Its logits can be non-finite.

        Args:
            history: Logits (exits so far, batch, classes), the newest last.

        Returns:
            (batch,) bool.
        """

    def combine(self, history: Tensor) -> Tensor:
        """Return the prediction of each exit as logits; most policies return each exit's own logits.

        :class:`~dynadapter.exits.temperature.Scaled` divides them by temperatures, then
        :class:`~dynadapter.exits.combining.Combined` combines each exit with those before it.

        Args:
            history: Logits (exits so far, batch, classes), the newest last.

        Returns:
            (exits so far, batch, classes).
        """
        return history

    def should_exit(self, history: Tensor) -> Tensor:
        """Check which samples exit at the newest exit; a sample with non-finite logits there continues.

        Args:
            history: Logits (exits so far, batch, classes), the newest last; never those of the network's last exit.

        Returns:
            (batch,) bool.

        Raises:
            ValueError: If :meth:`meets_condition` returned something else.
        """
        meets = self.meets_condition(history)
        if not isinstance(meets, Tensor) or meets.dtype != torch.bool or meets.shape != history.shape[1:2]:
            raise ValueError(
                f"{type(self).__name__}.meets_condition returned {returned(meets)}; return torch.bool (batch,), here "
                f"({history.shape[1]},)"
            )
        # NaN and infinity give NaN here. isfinite takes twice as many steps, which shows for one image on a CPU.
        finite = (history[-1] * 0).sum(-1) == 0
        return meets & finite

    def check(self, exits: int) -> None:
        """Check that the policy fits a network with this number of exits, the last one included.

        Raises:
            ValueError: If it has thresholds for another number of exits.
        """


@dataclass(frozen=True)
class Thresholded(Policy):
    """Base of the policies that compare a score in [0, 1] with a threshold.

    A subclass defines :meth:`score`. Its thresholds can be calibrated.

    Args:
        threshold: One value for all early exits, or one per early exit; in [0, 1].
    """

    threshold: float | tuple[float, ...]

    certain_above: ClassVar[bool] = True
    """Whether a greater score means a more certain sample; if false, a sample exits at a score of at most the
    threshold."""
    beyond: ClassVar[str] = "its score"
    """The range of the score and the alternative, for the error message of a threshold out of range."""

    @staticmethod
    @abstractmethod
    def score(logits: Tensor) -> Tensor:
        """Return the score of each sample (...), in [0, 1], from the logits (..., classes) of one exit."""

    def meets_condition(self, history: Tensor) -> Tensor:
        score, threshold = self.score(history[-1]), self.threshold_at(len(history) - 1)
        return score >= threshold if self.certain_above else score <= threshold

    def __post_init__(self) -> None:
        given = self.threshold
        values = tuple(given) if isinstance(given, (tuple, list)) else (given,)
        for value in values:
            if not isinstance(value, Real) or isinstance(value, bool):
                raise TypeError(f"threshold={given!r} must be a number in [0, 1], or one such number per early exit")
            if not 0 <= value <= 1:  # NaN fails as well
                raise ValueError(f"threshold={given!r}: {value!r} is not in [0, 1], the range of {self.beyond}")
        floats = tuple(float(value) for value in values)
        object.__setattr__(self, "threshold", floats if isinstance(given, (tuple, list)) else floats[0])

    @property
    def name(self) -> str:
        values = self.threshold if isinstance(self.threshold, tuple) else (self.threshold,)
        return "_".join([type(self).__name__.lower(), *(f"{value:g}" for value in values)])

    def check(self, exits: int) -> None:
        if isinstance(self.threshold, tuple) and len(self.threshold) != exits - 1:
            have, need = len(self.threshold), exits - 1
            raise ValueError(
                f"threshold has {have} {'value' if have == 1 else 'values'}, this network has {need} early "
                f"{'exit' if need == 1 else 'exits'} ({exits} exits); give one value or {need}"
            )

    def threshold_at(self, exit: int) -> float:
        """Return the threshold of an early exit (index from 0)."""
        return self.threshold[exit] if isinstance(self.threshold, tuple) else self.threshold


@dataclass(frozen=True)
class Confidence(Thresholded):
    """Exit when the largest softmax probability reaches the threshold (MSDNet, Dyn-Adapter).

    >>> Confidence(0.9).name
    'confidence_0.9'

    Args:
        threshold: One value for all early exits, or one per early exit; in [0, 1]; at 0 every sample exits.
    """

    threshold: float | tuple[float, ...] = 0.9

    beyond = "a probability; use Never() for no early exits"
    score = staticmethod(confidence)


@dataclass(frozen=True)
class Entropy(Thresholded):
    """Exit when the softmax's entropy divided by log(classes) is at most the threshold (BranchyNet, normalised).

    Args:
        threshold: One value for all early exits, or one per early exit; in [0, 1]; at 1 every sample exits.
    """

    threshold: float | tuple[float, ...] = 0.3

    certain_above = False
    beyond = "an entropy normalised by log(classes); use Never() for no early exits"
    score = staticmethod(entropy)


@dataclass(frozen=True)
class Margin(Thresholded):
    """Exit when the two largest softmax probabilities differ by the threshold or more.

    Args:
        threshold: One value for all early exits, or one per early exit; in [0, 1]; at 0 every sample exits.
    """

    threshold: float | tuple[float, ...] = 0.5

    beyond = "a difference of two probabilities; use Never() for no early exits"
    score = staticmethod(margin)


@dataclass(frozen=True)
class Patience(Policy):
    """Exit when the last ``patience`` exits, the newest included, predict the same class (PABEE, Zhou et al. 2020).

    An exit with non-finite logits agrees with no other. PABEE counts agreements between neighbours, one fewer than the
    exits that agree: its patience t is ``patience = t + 1`` here.

    Args:
        patience: Exits in a row that must agree; with 1 every sample exits at the first exit.
    """

    patience: int = 2

    def __post_init__(self) -> None:
        if self.patience < 1:
            raise ValueError(f"patience={self.patience} must be at least 1, the number of exits in a row that agree")

    @property
    def name(self) -> str:
        return f"patience_{self.patience}"

    def meets_condition(self, history: Tensor) -> Tensor:
        if len(history) < self.patience:
            return torch.zeros(history.shape[1], dtype=torch.bool, device=history.device)
        recent = history[-self.patience :]
        classes = recent.argmax(-1)  # (patience, batch)
        return ((classes == classes[-1]) & recent.isfinite().all(-1)).all(0)


@dataclass(frozen=True)
class Never(Policy):
    """No sample exits early: every sample runs the whole backbone."""

    name = "never"
    uses_early_exits = False

    def meets_condition(self, history: Tensor) -> Tensor:
        return torch.zeros(history.shape[1], dtype=torch.bool, device=history.device)


@dataclass(frozen=True)
class AtExit(Policy):
    """Every sample exits at one early exit, or at the next one where its logits are finite.

    >>> AtExit(2).name
    'at_exit_2'

    Args:
        exit: The exit, counted from 1; the last exit is :class:`Never`.
    """

    exit: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.exit, bool) or not isinstance(self.exit, int) or self.exit < 1:
            raise ValueError(f"exit={self.exit!r} must be a whole number of at least 1; exits count from 1")

    @property
    def name(self) -> str:
        return f"at_exit_{self.exit}"

    def check(self, exits: int) -> None:
        if self.exit >= exits:
            early = f"give 1 to {exits - 1}, or Never()" if exits > 1 else "give Never()"
            raise ValueError(f"exit={self.exit} is not an early exit of this network ({exits} exits); {early}")

    def meets_condition(self, history: Tensor) -> Tensor:
        return torch.full((history.shape[1],), len(history) >= self.exit, device=history.device)


def at_exit(exit: int, exits: int) -> Policy:
    """Return the policy by which every sample takes one exit (index from 0; it may be the last exit)."""
    return AtExit(exit + 1) if exit < exits - 1 else Never()


def combined(policy: Policy, history: Tensor) -> Tensor:
    """Return the result of :meth:`Policy.combine` after a check of its shape.

    Raises:
        ValueError: If :meth:`Policy.combine` returned another shape.
    """
    logits = policy.combine(history)
    if not isinstance(logits, Tensor) or logits.shape != history.shape:
        raise ValueError(
            f"{type(policy).__name__}.combine returned {returned(logits)}; return logits (exits so far, batch, "
            f"classes), here {tuple(history.shape)}"
        )
    return logits


class Routed(NamedTuple):
    """Result of routing a batch, in the order of its input.

    Attributes:
        logits: (batch, classes), the prediction of each sample's exit.
        exit_index: (batch,), each sample's exit, from 0.
    """

    logits: Tensor
    exit_index: Tensor

    @property
    def nonfinite(self) -> Tensor:
        """Number of samples (scalar) with non-finite logits; such samples never exit early."""
        return (~self.logits.isfinite().all(-1)).sum()


def read_off(policy: Policy, logits: Tensor) -> Routed:
    """Route samples by the logits of all exits, without running the network.

    Args:
        policy: The exit policy.
        logits: (exits, samples, classes).

    Raises:
        ValueError: If the policy's thresholds do not fit the number of exits.
    """
    exit_index = route(policy, logits)
    rows = torch.arange(len(exit_index), device=logits.device)
    return Routed(combined(policy, logits)[exit_index, rows], exit_index)


def route(policy: Policy, logits: Tensor) -> Tensor:
    """Compute each sample's exit from the logits of all exits, without running the network.

    Args:
        policy: The exit policy.
        logits: (exits, samples, classes).

    Returns:
        Exit indices (samples,), int64, from 0.

    Raises:
        ValueError: If the policy's thresholds do not fit the number of exits.
    """
    exits, samples, _ = logits.shape
    policy.check(exits)
    taken = torch.full((samples,), exits - 1, device=logits.device)
    for k in reversed(range(exits - 1)):  # the earliest exit writes last
        taken[policy.should_exit(logits[: k + 1])] = k
    return taken
