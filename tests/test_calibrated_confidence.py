"""Calibration records the mean confidence of routed samples, with which a server compares."""

import pytest
import torch

from dynadapter.calibrate import Goal
from dynadapter.calibrate.report import measured_data
from dynadapter.calibrate.solve import solve
from dynadapter.exits.policies import read_off


def test_confidence_is_of_the_routed_samples():
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(3, 120, 4, generator=generator), torch.randint(4, (120,), generator=generator)
    solution = solve(logits, targets, [1.0, 2.0, 3.0], Goal(cost=0.6))
    sure = [row.softmax(0).max().item() for row in read_off(solution.found.policy, logits).logits]
    mean = sum(sure) / 120
    assert solution.calibration.confidence == pytest.approx(mean, abs=1e-6)
    deviation = (sum((value - mean) ** 2 for value in sure) / 120) ** 0.5
    assert solution.calibration.confidence_deviation == pytest.approx(deviation, abs=1e-6)
    stored = measured_data(solution, "val", "images")
    assert stored["confidence"] == solution.cross_fitted.confidence
    assert 0.25 < stored["confidence"] < 1
