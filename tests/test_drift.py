"""Drift is told where exit shares or confidences change, and not where they vary by chance."""

from dataclasses import replace

import numpy as np
import pytest
from served import make_bundle

from dynadapter.serve.drift import Drift, Reference

SHARES = [0.5, 0.3, 0.2]
CONFIG = make_bundle().config
MEASURED = {"shares": SHARES, "samples": 400, "confidence": 0.8, "confidence_deviation": 0.1}


def test_reference_of_a_bundle():
    assert Reference.of(replace(CONFIG, measured=MEASURED)) == Reference((0.5, 0.3, 0.2), 400, 0.8, 0.1)
    without = {name: MEASURED[name] for name in ("shares", "samples")}
    assert Reference.of(replace(CONFIG, measured=without)) == Reference((0.5, 0.3, 0.2), 400)


@pytest.mark.parametrize(
    "wrong",
    [
        None,
        {"notes": "another network"},
        MEASURED | {"shares": [0.5, 0.5]},
        MEASURED | {"shares": [0.5, 0.3, "0.2"]},
        MEASURED | {"shares": [0.9, 0.9, -0.8]},
        MEASURED | {"shares": [0.1, 0.1, 0.1]},
        MEASURED | {"samples": 0},
        MEASURED | {"samples": True},
    ],
)
def test_unusable_reference_is_none(wrong):
    assert Reference.of(replace(CONFIG, measured=wrong)) is None
    assert Drift(None, 1).add(0, 0.5) == []


@pytest.mark.parametrize(
    ("shares", "samples", "window"),
    [(SHARES, 100, 500), (SHARES, 2000, 200), ([0.995, 0.004, 0.001], 200, 500), ([1.0, 0.0, 0.0], 40, 500)],
)
def test_chance_is_no_drift(shares, samples, window):
    """Calibration and windows are drawn from one distribution; the intervals hold in 297 of 300 draws at least."""
    rng, outside = np.random.default_rng(0), 0
    for _ in range(300):
        sure = rng.beta(8, 2, samples)
        reference = Reference(tuple(rng.multinomial(samples, shares) / samples), samples, sure.mean(), sure.std())
        live = dict(zip(("exit 1", "exit 2", "exit 3"), rng.multinomial(window, shares) / window, strict=True))
        live["confidence"] = rng.beta(8, 2, window).mean()
        outside += any(not low <= live[name] <= high for name, (_, low, high) in reference.expected(window).items())
    assert outside <= 3


def test_live_values_appear_together():
    """Another thread may read them at any time."""
    seen = []

    class Watched(Drift):
        def __setattr__(self, name, value):
            if name == "live":
                seen.append(list(value))
            super().__setattr__(name, value)

    drift = Watched(Reference((0.5, 0.3, 0.2), 400, 0.8, 0.1), window=1)
    drift.add(0, 0.8)
    assert seen == [[], ["exit 1", "exit 2", "exit 3", "confidence"]]


def test_drift_is_told_once_and_taken_back():
    drift = Drift(Reference((0.5, 0.3, 0.2), 400, 0.8, 0.1), window=100)
    same = [0] * 50 + [1] * 30 + [2] * 20

    def lines(exits, sure):
        return [line for exit_index in exits for line in drift.add(exit_index, sure)]

    assert lines(same, 0.8) == []
    assert drift.live == pytest.approx({"exit 1": 0.5, "exit 2": 0.3, "exit 3": 0.2, "confidence": 0.8})
    first = lines([2] * 100, 0.5)
    assert drift.outside == {"exit 1", "exit 2", "exit 3", "confidence"}
    assert first[0].startswith("mean confidence is 0.500 in the last 100 images, in calibration 0.800 (0.755 to 0.845")
    assert first[3].startswith("exit 3 has a share of 1.000")
    assert lines([2] * 100, 0.5) == []
    assert [line for line in lines(same, 0.8) if "within again" not in line] == []
    assert drift.outside == frozenset()
    with pytest.raises(ValueError, match="at least 1 image"):
        Drift(None, 0)
