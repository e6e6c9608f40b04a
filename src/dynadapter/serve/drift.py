"""Compare exit shares and mean confidence of a bundle's answers with its calibration, window by window."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple

from dynadapter.serve.bundle.config import Config

Z = 4.0
"""Half width of the intervals in standard errors; without drift, a value leaves its interval by chance in about one of
16,000 windows."""
CONFIDENCE = "confidence"


class Expected(NamedTuple):
    """A value of the calibration, and the interval for the value of a window if the images have not changed."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Reference:
    """The measurements of a bundle's calibration.

    Args:
        shares: Exit shares.
        samples: Number of images.
        confidence: Mean confidence; None if it was not recorded.
        deviation: Standard deviation of the confidence between images.
    """

    shares: tuple[float, ...]
    samples: int
    confidence: float | None = None
    deviation: float = 0.0

    @classmethod
    def of(cls, config: Config) -> "Reference | None":
        """Return the reference stored in a bundle; None if it has no usable one."""
        measured: Mapping[str, Any] = config.measured or {}
        shares, samples = measured.get("shares"), measured.get("samples")
        if not isinstance(shares, list | tuple) or len(shares) != len(config.exit_depths):
            return None
        if not all(_is_share(share) for share in shares) or not math.isclose(sum(shares), 1, abs_tol=1e-3):
            return None
        if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
            return None
        sure: list[Any] = [measured.get("confidence"), measured.get("confidence_deviation")]
        return cls(tuple(shares), samples, *(sure if all(map(_is_share, sure)) else ()))

    def expected(self, images: int) -> dict[str, Expected]:
        """Return the intervals for a window of the given number of images, by name: ``exit 1`` ... ``confidence``.

        Both the window and the calibration are samples, so both add to the width. Pseudo-counts keep the width of the
        interval of a share of 0 or 1 above 0 (Agresti and Coull 1998).
        """
        spread = Z * math.sqrt(1 / images + 1 / self.samples)
        found = {}
        for number, share in enumerate(self.shares, 1):
            p = (share * self.samples + Z**2 / 2) / (self.samples + Z**2)
            half = spread * math.sqrt(p * (1 - p))
            found[f"exit {number}"] = Expected(share, max(0.0, min(share, p) - half), min(1.0, max(share, p) + half))
        if self.confidence is not None:
            half = spread * self.deviation
            found[CONFIDENCE] = Expected(self.confidence, self.confidence - half, self.confidence + half)
        return found


def _is_share(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and 0 <= float(value) <= 1


class Drift:
    """Watch exits and confidences in windows of equal size. It is not thread-safe.

    >>> drift = Drift(Reference((0.5, 0.5), samples=1000), window=200)
    >>> [message for _ in range(200) for message in drift.add(0, 0.9)][0]
    'exit 1 has a share of 1.000 in the last 200 images, in calibration 0.500 (0.345 to 0.655 are within its interval)'

    Args:
        reference: What to compare with; None to count only.
        window: Images in a window.

    Attributes:
        live: The values of the last whole window by name; empty before there is one.
        expected: See :meth:`Reference.expected`.
        outside: The names of the values that left their interval.
    """

    def __init__(self, reference: Reference | None, window: int = 500) -> None:
        if window < 1:
            raise ValueError(f"window={window} must be at least 1 image")
        self.window = window
        self.expected = reference.expected(window) if reference is not None else {}
        self.live: dict[str, float] = {}
        self.outside: frozenset[str] = frozenset()
        self._counts = [0] * (len(reference.shares) if reference is not None else 0)
        self._sum = 0.0
        self._left_out = 0

    def add(self, exit_index: int, confidence: float) -> list[str]:
        """Add an image; at the end of a window, return a line for each value that has left its interval or is back."""
        if not self._counts:
            return []
        self._counts[exit_index] += 1
        self._sum += confidence
        if (images := sum(self._counts)) < self.window:
            return []
        shares = {f"exit {number}": count / images for number, count in enumerate(self._counts, 1)}
        self.live = shares | {CONFIDENCE: self._sum / images}  # whole at once: another thread may read it
        self._restart()
        before = self.outside
        self.outside = frozenset(
            name for name, (_, low, high) in self.expected.items() if not low <= self.live[name] <= high
        )
        return list(self._changed(before))

    def leave_out(self) -> None:
        """Leave out an image that the load has stopped early; if these are more than 1 %, begin a new window."""
        self._left_out += 1
        if self._left_out > self.window / 100:
            self._restart()

    def _restart(self) -> None:
        self._counts, self._sum, self._left_out = [0] * len(self._counts), 0.0, 0

    def _changed(self, before: frozenset[str]) -> Iterator[str]:
        for name in sorted(before ^ self.outside):
            what = "mean confidence is" if name == CONFIDENCE else f"{name} has a share of"
            value, low, high = self.expected[name]
            verdict = f"{low:.3f} to {high:.3f} are within its interval" if name in self.outside else "within again"
            yield (
                f"{what} {self.live[name]:.3f} in the last {self.window} images, in calibration {value:.3f} ({verdict})"
            )
