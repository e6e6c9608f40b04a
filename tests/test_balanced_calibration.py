"""Calibration by balanced accuracy: each class that occurs counts the same."""

import json
import math
from pathlib import Path

import pytest
import torch
from scipy import stats
from test_calibrate import COSTS, fake
from test_cli_calibrate import run
from torch import Tensor

from dynadapter import load
from dynadapter.calibrate import Goal, evaluate, solve
from dynadapter.calibrate.intervals import Interval, difference_interval, mean_interval, share_interval
from dynadapter.calibrate.stacked import balancing
from dynadapter.exits.policies import read_off
from dynadapter.sweep.goals import goals_of

BALANCED = "balanced_accuracy"


def unbalanced(samples: int = 1200) -> tuple[Tensor, Tensor]:
    """Return logits of two exits: 9 of 10 samples are of class 0; exit 1 knows that one, exit 2 knows both a little."""
    g = torch.Generator().manual_seed(0)
    targets = (torch.rand(samples, generator=g) < 0.1).long()
    logits = torch.zeros(2, samples, 2)
    right = torch.rand(2, samples, generator=g) < torch.tensor([[0.98, 0.1], [0.85, 0.9]])[:, targets]
    answers = torch.where(right, targets, 1 - targets)
    logits.scatter_(2, answers[..., None], 1 + torch.rand(2, samples, 1, generator=g))
    return logits, targets


def by_class(predicted: Tensor, targets: Tensor) -> float:
    """Return the balanced accuracy, class by class."""
    recalls = []
    for c in sorted(set(targets.tolist())):
        rows = [i for i, target in enumerate(targets.tolist()) if target == c]
        recalls.append(sum(predicted[i].item() == c for i in rows) / len(rows))
    return sum(recalls) / len(recalls)


def test_the_metric_decides_the_exit() -> None:
    """Exit 1 is more accurate, exit 2 knows the rare class; both are within the budget."""
    logits, targets = unbalanced()
    common = solve(logits, targets, [50, 100], Goal(cost=1.0), combines=("own",), searches=("one_exit",))
    fair = solve(logits, targets, [50, 100], Goal(cost=1.0, metric=BALANCED), combines=("own",), searches=("one_exit",))
    assert common.found.shares == (1, 0)
    assert fair.found.shares == (0, 1)
    # nor is exit 1 within five points of the last exit by balanced accuracy, though it is by accuracy
    assert solve(logits, targets, [50, 100], Goal(accuracy_drop=5)).calibration.cost < 0.6
    assert solve(logits, targets, [50, 100], Goal(accuracy_drop=5, metric=BALANCED)).calibration.cost > 0.9


@pytest.mark.parametrize("goal", [{"cost": 0.6}, {"accuracy_drop": 2.0}], ids=str)
def test_numbers_are_means_over_classes(goal: dict[str, float]) -> None:
    logits, _ = fake(300, exits=3, classes=4)
    targets = (torch.rand(300, generator=torch.Generator().manual_seed(1)) * 2.5).long()  # class 3 does not occur
    logits[..., 0] += 0.5
    found = solve(logits, targets, COSTS, Goal(**goal, metric=BALANCED))
    routed = read_off(found.found.policy, logits)
    assert found.calibration.accuracy == pytest.approx(by_class(routed.logits.argmax(-1), targets), abs=1e-12)
    assert found.calibration.accuracy_last_exit == pytest.approx(by_class(logits[-1].argmax(-1), targets), abs=1e-12)
    assert found.calibration.accuracy == found.found.accuracy
    plain = evaluate(found.found.policy, logits, targets, COSTS)
    assert (found.calibration.cost, found.calibration.shares) == (plain.cost, plain.shares)
    for point in (*found.curve.routed[::20], *found.curve.anytime):
        expected = by_class(read_off(point.policy, logits).logits.argmax(-1), targets)
        assert point.accuracy == pytest.approx(expected, abs=1e-12)
    assert "1 of 4 classes have no image here; the balanced accuracy is over the others" in found.notes
    low, high = found.cross_fitted.accuracy_interval
    assert low < found.cross_fitted.accuracy < high


def test_classes_of_equal_size_change_nothing() -> None:
    logits, targets = fake(200, exits=3, classes=4)
    targets = targets.sort().values
    targets[:] = torch.arange(4).repeat_interleave(50)
    for goal in ({"cost": 0.6}, {"accuracy_drop": 1.0}):
        plain, balanced = (solve(logits, targets, COSTS, Goal(**goal, metric=metric)) for metric in (None, BALANCED))
        assert plain.found.policy == balanced.found.policy
        assert plain.cross_fitted.accuracy == pytest.approx(balanced.cross_fitted.accuracy, abs=1e-12)


def test_weights_add_up_by_class() -> None:
    targets = torch.tensor([3, 0, 0, 1, 0, 3])
    weights = balancing(targets)
    assert weights.mean().item() == pytest.approx(1)
    assert {round(weights[targets == c].sum().item(), 12) for c in (0, 1, 3)} == {2.0}


# ---- intervals


def test_mean_of_one_is_its_interval() -> None:
    for estimate, interval in ((0.75, share_interval(150, 200)), (0.05, difference_interval(15, 5, 200))):
        assert mean_interval([estimate], [interval]) == pytest.approx(interval)


def test_mean_interval_covers() -> None:
    """Three classes of 10, 30 and 200 images: between 93 and 98 of 100 intervals hold the true mean."""
    shares, sizes = [0.9, 0.5, 0.8], [10, 30, 200]
    drawn = [stats.binom(n, p).rvs(4000, random_state=k) for k, (n, p) in enumerate(zip(sizes, shares, strict=True))]
    held = 0
    for counts in zip(*drawn, strict=True):
        ends = [share_interval(int(count), n) for count, n in zip(counts, sizes, strict=True)]
        low, high = mean_interval([count / n for count, n in zip(counts, sizes, strict=True)], ends)
        held += low <= sum(shares) / 3 <= high
    assert 0.93 < held / 4000 < 0.98
    perfect = mean_interval([1.0] * 50, [share_interval(4, 4)] * 50)
    assert perfect.high == 1
    assert isinstance(perfect, Interval)


# ---- refused


def test_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match=r"goal\.metric=balanced_accuracy has no guarantee; leave goal\.metric out"):
        Goal(risk=0.1, metric=BALANCED)
    with pytest.raises(ValueError, match=r"goal\.metric=f1 must be accuracy or balanced_accuracy"):
        Goal(cost=0.5, metric="f1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a sweep compares by accuracy; leave metric out"):
        goals_of([{"cost": 0.5, "metric": BALANCED}])


# ---- the command


def test_command_writes_balanced_numbers(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, bundle = tmp_path / "out", tmp_path / "bundle"
    run(checkpoint, "--goal.cost=0.8", f"--goal.metric={BALANCED}", f"--out={out}", f"--bundle={bundle}")
    printed = capsys.readouterr().out
    assert "cost at most 0.8 of static, by balanced accuracy" in printed
    assert printed.count("balanced accuracy") >= 3
    written = json.loads((out / "calibration.json").read_text())
    assert written["goal"] == {"cost": 0.8, "metric": BALANCED}
    measured = load(bundle).config.measured
    assert measured is not None
    assert measured[BALANCED] == written["cross_fitted"]["accuracy"]
    assert not math.isnan(measured["balanced_accuracy_last_exit"])
    assert "accuracy" not in measured
    card = (bundle / "README.md").read_text()
    assert "balanced accuracy" in card
    assert "Not measured: accuracy" not in card
