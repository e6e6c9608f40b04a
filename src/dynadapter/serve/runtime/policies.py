"""The exit policies in numpy: the same decisions as :mod:`dynadapter.exits.policies`, which a test compares."""

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Score = Callable[[Floats], Floats]


def softmax(logits: Floats) -> Floats:
    """Return the probabilities of logits (..., classes)."""
    powers: Floats = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities: Floats = powers / powers.sum(-1, keepdims=True)
    return probabilities


def confidence(logits: Floats) -> Floats:
    """Return the largest softmax probability (...) of logits (..., classes)."""
    largest: Floats = softmax(logits).max(-1)
    return largest


def entropy(logits: Floats) -> Floats:
    """Return the entropy of the softmax divided by log(classes), in [0, 1]: (..., classes) to (...)."""
    log_p = _log_softmax(logits)
    greatest = np.float32(math.log(max(logits.shape[-1], 2)))  # the entropy of a single class is 0
    normalised: Floats = np.clip(-(np.exp(log_p) * log_p).sum(-1) / greatest, 0, 1)
    return normalised


def _log_softmax(logits: Floats) -> Floats:
    centred = logits - logits.max(-1, keepdims=True)
    log_p: Floats = centred - np.log(np.exp(centred).sum(-1, keepdims=True))
    return log_p


def margin(logits: Floats) -> Floats:
    """Return the largest minus the second largest softmax probability, in [0, 1]: (..., classes) to (...)."""
    p = softmax(logits)
    if p.shape[-1] == 1:
        return p[..., 0]
    highest = np.partition(p, -2, axis=-1)
    return highest[..., -1] - highest[..., -2]


# The score of a kind, and how it is compared with the threshold
SCORES: dict[str, tuple[Score, Callable[..., Any]]] = {
    "Confidence": (confidence, np.greater_equal),
    "Entropy": (entropy, np.less_equal),
    "Margin": (margin, np.greater_equal),
}
FIELDS = {**dict.fromkeys(SCORES, "threshold"), "Patience": "patience", "AtExit": "exit", "Never": None}
"""The kinds of policies, each with its field."""


class Policy:
    """Decide which samples stop at an exit.

    >>> policy = Policy({"kind": "Confidence", "threshold": 0.8}, num_exits=2)
    >>> policy.stops(np.array([[[2.0, 0.0], [1.0, 0.0]]], dtype=np.float32))  # confidence 0.88 and 0.73
    array([ True, False])

    Args:
        settings: The kind and its field: ``threshold``, one number or one for each early exit, ``patience``, or
            ``exit``, counted from 1. Also ``combine``, if predictions combine the exits passed: ``mean`` or
            ``geometric``.
        num_exits: Number of exits, the last one included.
        temperatures: One divisor of the logits for each exit; None to leave logits as they are.

    Raises:
        ValueError: The kind is unknown, or its field or the temperatures do not fit.
    """

    def __init__(
        self, settings: Mapping[str, Any], num_exits: int, temperatures: Sequence[float] | None = None
    ) -> None:
        self.kind: str = settings.get("kind", "")
        if self.kind not in FIELDS:
            raise ValueError(f"unknown policy {self.kind!r}; choose from: {', '.join(FIELDS)}")
        field = FIELDS[self.kind]
        if settings.keys() - {"combine"} != {"kind", field} - {None}:
            raise ValueError(f"policy {self.kind} has {', '.join(settings)}; it takes kind{f', {field}' * bool(field)}")
        self.by = settings.get("combine")
        if self.by not in (None, "mean", "geometric"):
            raise ValueError(f"combine={self.by!r} is unknown; choose mean or geometric")
        self.thresholds = np.empty(0, np.float32)
        if field == "threshold":
            self.thresholds = _thresholds(settings["threshold"], num_exits)
        self.patience, self.exit = settings.get("patience", 1), settings.get("exit", 1)
        for name, value in (("patience", self.patience), ("exit", self.exit)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} must be a whole number of at least 1")
        if "exit" in settings and self.exit >= num_exits:
            raise ValueError(f"exit={self.exit} is not an early exit of {num_exits}")
        self.temperatures = _temperatures(temperatures, num_exits)

    def combine(self, history: Floats) -> Floats:
        """Return the prediction of each exit: its logits after its temperature, alone or combined with earlier exits.

        Args:
            history: Logits (exits so far, batch, classes).
        """
        with np.errstate(over="ignore", invalid="ignore"):
            own: Floats = history / self.temperatures[: len(history), None, None]
        if self.by is None:
            return own
        finite = np.isfinite(own).all(-1, keepdims=True)
        log_p = _log_softmax(np.where(finite, own, np.float32(0)))
        with np.errstate(divide="ignore", invalid="ignore"):  # a sample of which no exit so far is finite
            if self.by == "mean":
                sums = np.logaddexp.accumulate(np.where(finite, log_p, np.float32(-np.inf)))
                combined = sums - np.log(finite.cumsum(0, dtype=np.float32))
            else:
                weights = np.arange(1, len(own) + 1, dtype=np.float32)[:, None, None] * finite
                combined = (weights * log_p).cumsum(0) / weights.cumsum(0)
        predicted: Floats = np.where(finite, combined, own)
        return predicted

    def stops(self, history: Floats) -> NDArray[np.bool_]:
        """Decide which samples stop at the newest exit; a sample whose logits there are not finite never does.

        Args:
            history: Logits (exits so far, batch, classes), the newest last. The last exit of a network takes every
                sample and needs no decision.

        Returns:
            (batch,) bool.
        """
        k = len(history) - 1
        with np.errstate(over="ignore", invalid="ignore"):  # `finite` excludes whatever is not finite
            predicted = self.combine(history)
            finite: NDArray[np.bool_] = np.asarray(np.isfinite(predicted).all(-1))  # (exits so far, batch)
            if self.kind in SCORES:
                score, beyond = SCORES[self.kind]
                sure = beyond(score(predicted[-1]), self.thresholds[k])
            elif self.kind == "Patience" and len(history) >= self.patience:
                classes = predicted[-self.patience :].argmax(-1)
                sure = ((classes == classes[-1]) & finite[-self.patience :]).all(0)
            else:
                sure = np.full(history.shape[1], self.kind == "AtExit" and len(history) >= self.exit)
        stopping: NDArray[np.bool_] = sure & finite[-1]
        return stopping


def _thresholds(given: Any, num_exits: int) -> Floats:
    values = given if isinstance(given, list | tuple) else [given] * (num_exits - 1)
    if len(values) != num_exits - 1 or not all(_is_number(value) and 0 <= value <= 1 for value in values):
        raise ValueError(
            f"threshold={given!r} does not fit {num_exits} exits; give one number in [0, 1], or {num_exits - 1}, one "
            "for each early exit"
        )
    return np.asarray(values, np.float32)


def _temperatures(given: Sequence[float] | None, num_exits: int) -> Floats:
    if given is None:
        return np.ones(num_exits, np.float32)
    if len(given) != num_exits or not all(_is_number(value) and 0 < value < math.inf for value in given):
        raise ValueError(f"temperatures={given!r} do not fit; give {num_exits} numbers above 0, one for each exit")
    return np.asarray(given, np.float32)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
