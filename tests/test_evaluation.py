"""Metrics and predictions of ExitClassifier, against formulas in plain Python."""

import math
from typing import Any

import pytest
import torch
from conftest import CLASSES
from tiny import Named, cross_entropy, loader, make_classifier, noise_batches, shaken, trainer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from dynadapter.data import Shapes
from dynadapter.exits.policies import Confidence, Patience
from dynadapter.exits.temperature import Scaled

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")


def calibration_error(logits: Tensor, targets: Tensor, bins: int = 15) -> float:
    """Return the calibration error of Guo et al. 2017: |accuracy - confidence|, averaged over bins by their size."""
    rows: list[list[tuple[float, bool]]] = [[] for _ in range(bins)]
    for row, target in zip(logits.softmax(-1), targets.tolist(), strict=True):
        p = float(row.max())
        rows[min(int(p * bins), bins - 1)].append((p, int(row.argmax()) == target))
    error = 0.0
    for row in (row for row in rows if row):
        gap = sum(right for _, right in row) / len(row) - sum(p for p, _ in row) / len(row)
        error += abs(gap) * len(row) / len(targets)
    return error


@pytest.mark.parametrize("split", ["val", "test"])
def test_metrics_equal_the_whole_split(split: str) -> None:
    module, batches = shaken(make_classifier()), noise_batches(37, 8)  # the last batch is smaller
    images, targets = batches.dataset.tensors
    with torch.no_grad():
        logits = module.eval().net(images)
    run = trainer()
    (got,) = (run.validate if split == "val" else run.test)(module, batches, verbose=False)
    for k in range(3):
        right = [int(row.argmax()) == int(t) for row, t in zip(logits[k], targets, strict=True)]
        assert got[f"{split}/acc_exit{k + 1}"] == pytest.approx(sum(right) / 37)
        assert got[f"{split}/ece_exit{k + 1}"] == pytest.approx(calibration_error(logits[k], targets), rel=1e-4)
        assert got[f"{split}/loss_exit{k + 1}"] == pytest.approx(cross_entropy(logits[k], targets, 0.0), rel=1e-4)
    assert got[f"{split}/acc"] == got[f"{split}/acc_exit3"]
    assert len(got) == 3 * 5 + 3
    assert len({got[f"{split}/acc_exit{k}"] for k in (1, 2, 3)}) > 1


def test_metrics_start_anew_each_epoch() -> None:
    module, batches = shaken(make_classifier()), noise_batches(11, 4)
    fitting = trainer(num_sanity_val_steps=2)
    fitting.fit(module, loader(2), batches)
    after = {k: float(v) for k, v in fitting.callback_metrics.items() if k.startswith("val/")}
    (again,) = trainer().validate(module, batches, verbose=False)
    assert after == pytest.approx(again)


def test_nonfinite_logits_count_as_wrong() -> None:
    module, batches = shaken(make_classifier()), noise_batches(10, 5)
    images, targets = batches.dataset.tensors
    (clean,) = trainer().validate(
        module, DataLoader(TensorDataset(images[1:], targets[1:]), batch_size=5), verbose=False
    )
    images[0] = math.nan
    targets[0] = 0  # argmax of a row of NaN
    (got,) = trainer().validate(module, batches, verbose=False)
    for k in (1, 2, 3):
        assert got[f"val/acc_exit{k}"] == pytest.approx(clean[f"val/acc_exit{k}"] * 9 / 10)
        assert got[f"val/ece_exit{k}"] == pytest.approx(clean[f"val/ece_exit{k}"])


def test_predictions_follow_the_policy() -> None:
    names = [f"class {k}" for k in range(CLASSES)]
    module = shaken(make_classifier(class_names=names))
    ((images, files),) = Named()
    with torch.no_grad():
        logits = module.eval().net(images)
    (never,) = trainer().predict(module, DataLoader(Named(), batch_size=None))
    assert never["exit_index"].tolist() == [2] * 4
    confidences = logits.softmax(-1).amax(-1)
    policy = Confidence(float(confidences[0].median()) + 1e-4)
    module.policy = policy
    (got,) = trainer().predict(module, DataLoader(Named(), batch_size=None))
    leave = [next((k for k in (0, 1) if confidences[k, i] >= policy.threshold), 2) for i in range(4)]
    assert len(set(leave)) > 1
    assert got["files"] == files
    assert got["exit_index"].tolist() == leave
    assert got["classes"] == [names[int(logits[k, i].argmax())] for i, k in enumerate(leave)]
    assert got["confidence"].tolist() == pytest.approx(
        [float(confidences[k, i]) for i, k in enumerate(leave)], rel=1e-4
    )


@pytest.mark.parametrize("temperatures", [2.0, (0.5, 3.0, 2.0)])
def test_confidence_uses_the_temperature(temperatures: Any) -> None:
    module = shaken(make_classifier())
    ((images, _),) = Named()
    module.policy = Scaled(Scaled(Patience(2), 1.5), temperatures)
    (got,) = trainer().predict(module, DataLoader(Named(), batch_size=None))
    heat = [1.5 * t for t in (temperatures if isinstance(temperatures, tuple) else [temperatures] * 3)]
    with torch.no_grad():
        logits = module.eval().net(images)
    for i, k in enumerate(got["exit_index"].tolist()):
        assert float(got["confidence"][i]) == pytest.approx(float((logits[k, i] / heat[k]).softmax(-1).max()), rel=1e-4)


def test_loader_is_not_the_data_of_an_earlier_call() -> None:
    """Lightning keeps the data module of an earlier call as `trainer.datamodule`."""
    data = Shapes(8, 8, 8, image_size=32)
    data.test_label = "test/winter"
    model, running = make_classifier(num_classes=8, class_weights="auto"), trainer(max_epochs=1)
    [named] = running.test(model, datamodule=data, verbose=False)
    [plain] = running.test(model, dataloaders=loader(1), verbose=False)
    assert "test/winter/acc" in named
    assert "test/acc" in plain
    with pytest.raises(ValueError, match="class_weights=auto needs a data module"):
        running.fit(model, loader(1))
