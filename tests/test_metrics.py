"""The metrics against a count by hand, and every measure of an evaluation, in every precision."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import QUIET, make_classifier, trainer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from dynadapter.cost import exit_costs
from dynadapter.exits.policies import Confidence
from dynadapter.training.callbacks.early_exit import EarlyExit
from dynadapter.training.callbacks.flops import FlopsReport
from dynadapter.training.metrics import Accuracy, CalibrationError, ExactMetric, ExitUse, SampleMean
from dynadapter.training.module import ExitClassifier

pytestmark = [pytest.mark.filterwarnings(line) for line in QUIET]


@given(st.lists(st.lists(st.integers(0, 3), max_size=8), min_size=1, max_size=5))
@settings(deadline=None, max_examples=40)
def test_shares_are_equal_for_any_batches(batches: list[list[int]]) -> None:
    use = ExitUse(exits=4)
    for batch in batches:
        use.update(torch.tensor(batch, dtype=torch.int64))
    counted = Counter(exit for batch in batches for exit in batch)
    assert use.compute().tolist() == pytest.approx([counted[k] / max(counted.total(), 1) for k in range(4)])


def test_counts_add_up_over_processes() -> None:
    parts = [ExitUse(exits=3) for _ in range(2)]
    parts[0].update(torch.tensor([0, 0, 2]))
    parts[1].update(torch.tensor([1]))
    assert all(
        part._reductions["counts"](torch.stack([p.counts for p in parts])).tolist() == [2, 1, 1] for part in parts
    )


def test_reset_and_forward() -> None:
    use = ExitUse(exits=2)
    assert use(torch.tensor([0, 0])).tolist() == [1, 0]
    assert use(torch.tensor([1, 1])).tolist() == [0, 1]
    assert use.compute().tolist() == [0.5, 0.5]
    use.reset()
    use.update(torch.tensor([1]))
    assert use.compute().tolist() == [0, 1]


@pytest.mark.parametrize("exits", [[3], [-1], [0, 1, 7]])
def test_unknown_exit_is_named(exits: list[int]) -> None:
    with pytest.raises(ValueError, match="exit_index must be from 0 to 2, got"):
        ExitUse(exits=3).update(torch.tensor(exits))


def test_zero_exits_are_refused() -> None:
    with pytest.raises(ValueError, match="exits=0 must be at least 1"):
        ExitUse(exits=0)


@given(st.lists(st.lists(st.floats(-10, 10), max_size=8), min_size=1, max_size=5))
@settings(deadline=None, max_examples=40)
def test_means_are_equal_for_any_batches(batches: list[list[float]]) -> None:
    mean, values = SampleMean(), [value for batch in batches for value in batch]
    for batch in batches:
        mean.update(torch.tensor(batch).mean(), len(batch))  # NaN for an empty batch
    assert float(mean.compute()) == pytest.approx(sum(values) / max(len(values), 1), abs=1e-5)


def test_mean_of_nonfinite_is_nonfinite() -> None:
    mean = SampleMean()
    mean.update(torch.tensor(1.0), 2)
    mean.update(torch.tensor(float("nan")), 2)
    assert mean.compute().isnan()


# ---- every measure, in every precision


EXITS, SAMPLES, CLASSES = 3, 2400, 5
TYPES = {
    "32-true": torch.float32,
    "bf16-true": torch.bfloat16,
    "16-true": torch.float16,
    "bf16-mixed": torch.float32,
    "64-true": torch.float64,
}


class Table(torch.nn.Module):
    """A network whose images are its logits ``(batch, exits, classes, 1)``."""

    def forward(self, images: Tensor) -> Tensor:
        return images[..., 0].transpose(0, 1)


def softmax(row: list[float]) -> list[float]:
    powers = [math.exp(value - max(row)) for value in row]
    return [power / sum(powers) for power in powers]


def class_measures(predicted: list[int], targets: list[int]) -> tuple[float, float]:
    """Return balanced accuracy and macro-F1, class by class."""
    recalls, f1 = [], []
    for name in {*targets, *predicted}:
        right = sum(p == t == name for p, t in zip(predicted, targets, strict=True))
        f1.append(2 * right / (predicted.count(name) + targets.count(name)))
        if name in targets:
            recalls.append(right / targets.count(name))
    return sum(recalls) / len(recalls), sum(f1) / len(f1)


def plain_counts(logits: Tensor, targets: list[int], threshold: float, costs: tuple[float, ...]) -> dict[str, float]:
    """Return what a test should log; accuracy, loss, calibration error, exit shares and costs sample by sample."""
    found: dict[str, float] = {}
    rows = [[softmax(row) for row in one] for one in logits.double().tolist()]
    for k, one in enumerate(rows, start=1):
        right = [row.index(max(row)) == target for row, target in zip(one, targets, strict=True)]
        found[f"test/acc_exit{k}"] = sum(right) / SAMPLES
        balanced, f1 = class_measures([row.index(max(row)) for row in one], targets)
        found |= {f"test/balanced_acc_exit{k}": balanced, f"test/macro_f1_exit{k}": f1}
        found[f"test/loss_exit{k}"] = -sum(math.log(r[t]) for r, t in zip(one, targets, strict=True)) / SAMPLES
        bins: list[float] = [0.0] * 15
        for row, hit in zip(one, right, strict=True):
            bins[min(int(max(row) * 15), 14)] += hit - max(row)
        found[f"test/ece_exit{k}"] = sum(map(abs, bins)) / SAMPLES
    stops = [next((k for k in range(EXITS - 1) if max(rows[k][i]) >= threshold), EXITS - 1) for i in range(SAMPLES)]
    name = f"test/confidence_{threshold:g}"
    for k in range(EXITS):
        found[f"{name}/share_exit{k + 1}"] = stops.count(k) / SAMPLES
    predicted = [rows[k][i].index(max(rows[k][i])) for i, k in enumerate(stops)]
    found[f"{name}/acc"] = sum(p == t for p, t in zip(predicted, targets, strict=True)) / SAMPLES
    found[f"{name}/balanced_acc"], found[f"{name}/macro_f1"] = class_measures(predicted, targets)
    found[f"{name}/gmacs"] = sum(costs[k] for k in stops) / SAMPLES
    return found | {f"test/{kind}": found[f"test/{kind}_exit{EXITS}"] for kind in ("acc", "balanced_acc", "macro_f1")}


@pytest.fixture(scope="module")
def classifier() -> ExitClassifier:
    return make_classifier()


@pytest.mark.parametrize(("precision", "dtype"), TYPES.items())
def test_every_measure_is_a_plain_count(classifier: ExitClassifier, precision: str, dtype: torch.dtype) -> None:
    costs = exit_costs(classifier.net.float(), 32).gmacs
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(CLASSES, (SAMPLES,), generator=generator)
    logits = torch.randn(SAMPLES, EXITS, CLASSES, generator=generator)
    logits[torch.arange(SAMPLES), :, targets] += torch.tensor([0.5, 1.0, 2.0])
    classifier.net.forward = Table().forward  # type: ignore[method-assign]
    data = DataLoader(TensorDataset(logits[..., None], targets), batch_size=60)
    run = trainer(EarlyExit([Confidence(0.6)]), FlopsReport(image_size=32, show=False), precision=precision)
    (got,) = run.test(classifier, data, verbose=False)
    expected = plain_counts(logits.to(dtype).transpose(0, 1), targets.tolist(), 0.6, costs)
    assert got == pytest.approx(expected, rel=1e-5)


METRICS: list[tuple[Any, list[Any]]] = [
    (Accuracy, [torch.tensor([True])]),
    (CalibrationError, [torch.tensor([0.7]), torch.tensor([False])]),
    (lambda: ExitUse(2), [torch.tensor([1])]),
    (SampleMean, [torch.tensor(0.7), 1]),
]


@pytest.mark.parametrize(("make", "sample"), METRICS)
@pytest.mark.parametrize("convert", ["bfloat16", "half", "float", "double"])
def test_states_keep_their_types(make: Any, sample: list[Any], convert: str) -> None:
    metric: ExactMetric = make()
    holder = torch.nn.ModuleList([metric])
    getattr(holder, convert)()
    holder.to(getattr(torch, convert))
    for _ in range(300):
        metric.update(*sample)
    states = {name: getattr(metric, name) for name in metric._defaults}
    assert {state.dtype for state in states.values()} <= {torch.int64, torch.float64}
    assert metric.compute().dtype == torch.float64
    once = make()
    once.update(*sample)
    assert torch.allclose(metric.compute(), once.compute(), rtol=1e-12)
