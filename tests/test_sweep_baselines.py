"""What the same logits give without a policy, against plain loops over images, exits and mixtures."""

import itertools

import numpy as np
import pytest

from dynadapter.sweep.baselines import costs, mixture, one_exit, oracle

COSTS = [25.0, 50.4, 75.0, 100.0]


def make_line(accuracy: np.ndarray) -> dict:
    """Return a line with accuracies (ways, exits)."""
    return {
        "exits": [
            {"percent_of_static": COSTS[k], "accuracy": own, "mean": mean, "geometric": geometric}
            for k, (own, mean, geometric) in enumerate(accuracy.T.tolist())
        ]
    }


@pytest.mark.parametrize(
    ("target", "place"),
    [
        ({"cost": 0.5}, (1, 1)),  # 50.4 % are close enough to 50
        ({"cost": 0.45}, (0, 0)),
        ({"cost": 0.1}, (0, 0)),  # nothing is cheaper than the first exit
        ({"accuracy": 0.61}, (1, 1)),
        ({"accuracy": 0.64}, (2, 2)),
        ({"accuracy": 0.99}, (2, 3)),  # out of reach: the most accurate
    ],
)
def test_exit_for_all_images(target, place):
    accuracy = np.array([[0.5, 0.6, 0.62, 0.6], [0.5, 0.62, 0.63, 0.64], [0.5, 0.61, 0.65, 0.66]])
    assert one_exit([make_line(accuracy)], target) == place
    shifted = [make_line(accuracy + 0.1), make_line(accuracy - 0.1)]  # their mean counts
    assert one_exit(shifted, target) == place


def test_rounded_accuracy_reaches_its_target():
    """Combined accuracies stand in a line with six decimals."""
    accuracy = np.array([[0.2, 0.25, 0.3, 1 / 3], [0.2, round(1 / 3, 6), 0.3, 0.3], [0.2, 0.3, 0.3, 0.3]])
    assert one_exit([make_line(accuracy)], {"accuracy": 1 / 3}) == (1, 1)


def test_tie_goes_to_the_cheaper_exit():
    """Of 30 images 20 are right at both exits; the combined accuracy stands in the line with six decimals."""
    accuracy = np.array([[20 / 30, 0.6, 0.6, 0.6], [0.6, round(20 / 30, 6), 0.6, 0.6], [0.6, 0.6, 0.6, 0.6]])
    assert one_exit([make_line(accuracy)], {"cost": 0.5}) == (0, 0)


@pytest.mark.parametrize("cost", [10.0, 25.0, 30.0, 50.4, 66.0, 100.0, 120.0])
def test_mixture_against_a_grid(cost):
    generator = np.random.default_rng(0)
    for _ in range(20):
        accuracy = generator.random((3, 4))
        line = make_line(accuracy)
        weights = mixture(line, cost)
        assert weights.sum() == pytest.approx(1)
        assert weights.min() >= 0
        assert (weights * costs(line)).sum() <= max(cost, 25.0) + 1e-9
        best = 0.0
        points = list(zip(np.tile(COSTS, 3), accuracy.ravel(), strict=True))
        for (cost_a, a), (cost_b, b) in itertools.product(points, points):
            for share in np.linspace(0, 1, 101):
                if cost_a * (1 - share) + cost_b * share <= max(cost, 25.0) + 1e-9:
                    best = max(best, a * (1 - share) + b * share)
        assert best - 1e-9 <= (weights * accuracy).sum() <= best + 0.02


def test_oracle_against_a_loop():
    right = np.random.default_rng(0).random((4, 200)) < 0.4
    taken = [next((k for k in range(4) if right[k, i]), 0) for i in range(200)]
    accuracy, cost = oracle(right, np.array(COSTS))
    assert accuracy == pytest.approx(100 * np.mean([right[:, i].any() for i in range(200)]))
    assert cost == pytest.approx(np.mean([COSTS[k] for k in taken]))
