"""Unbalanced classes: weights in the loss, a balanced order of images, and measures in which classes count the same."""

import re
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from commands import SMALL
from PIL import Image
from tiny import Losses, make_classifier, noise_batches, trainer
from torch.nn import functional as F

from dynadapter.cli import main
from dynadapter.data import ImageFolder
from dynadapter.data.samplers import EpochOrder
from dynadapter.training.class_weights import class_weights, without_images
from dynadapter.training.losses import exit_losses
from dynadapter.training.metrics import BalancedAccuracy, MacroF1
from dynadapter.training.mixing import Mixing

NAMES = ["ant", "bee", "cat"]


# ---- weights


def test_auto_is_balanced_by_its_formula():
    counts = [60, 30, 10]
    weights = class_weights("auto", NAMES, counts)
    assert weights.tolist() == pytest.approx([100 / (3 * count) for count in counts])
    assert sum(n * w for n, w in zip(counts, weights.tolist(), strict=True)) == pytest.approx(100)


def test_absent_class_changes_no_other():
    assert class_weights("auto", NAMES, [30, 0, 10])[[0, 2]].tolist() == pytest.approx([40 / 60, 40 / 20])


@pytest.mark.parametrize("counts", [[2, 1, 1], None])
def test_named_weights_keep_the_learning_rate(counts):
    weights = class_weights({"bee": 5.0}, NAMES, counts)
    assert (weights / weights[0]).tolist() == pytest.approx([1, 5, 1])
    if counts:
        assert sum(n * w for n, w in zip(counts, weights.tolist(), strict=True)) == pytest.approx(4)


MISTAKES = [
    ("auto", None, "class_weights=auto needs a data module that lists its images"),
    ({"dog": 1.0}, [1, 1, 1], "class_weights: dog is not a class; the classes are ant, bee, cat"),
    ({"ant": 1.0, "a\u0301": 2.0}, None, "class_weights: \u00e1 is not a class"),
    ({True: 1.0}, None, "YAML reads yes, no, on, off and null as other values: quote them"),
    ({"ant": 0.0}, [1, 0, 0], "all training images have the weight 0"),
]


def test_weights_match_numbers_and_accents():
    """YAML reads the name 0 as a number; macOS and Linux encode accents differently."""
    weights = class_weights({0: 2.0, "e\u0301": 4.0}, ["0", "1", "\u00e9"], None)
    assert weights.tolist() == [2, 1, 4]
    assert class_weights({"\u00e9": 4.0}, ["e\u0301", "f"], None).tolist() == [4, 1]
    with pytest.raises(ValueError, match="class_weights: 0 is given twice; give each class one weight"):
        class_weights({0: 2.0, "0": 1.0}, ["0", "1"], None)


@pytest.mark.parametrize(("given", "counts", "words"), MISTAKES)
def test_impossible_weights_are_named(given, counts, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        class_weights(given, NAMES, counts)


@pytest.mark.parametrize("given", ["balanced", {}, {"ant": -1.0}, {"ant": "2"}, {"ant": float("nan")}, [1, 2]])
def test_wrong_settings_are_refused_at_once(given):
    with pytest.raises(ValueError, match="class_weights"):
        make_classifier(class_weights=given)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_equals_a_loop(smoothing):
    logits, targets, weights = torch.randn(2, 6, 3), torch.tensor([0, 2, 1, 0, 0, 2]), torch.tensor([0.5, 2.0, 1.5])
    expected = [
        sum(
            weights[t] * F.cross_entropy(row[None], t[None], label_smoothing=smoothing)
            for row, t in zip(one, targets, strict=True)
        )
        / 6
        for one in logits
    ]
    assert torch.allclose(exit_losses(logits, targets, smoothing, weights), torch.stack(expected))
    hard = F.one_hot(targets, 3).float()
    mixed = exit_losses(logits, 0.3 * hard + 0.7 * hard.flip(0), 0.0, weights)
    each = torch.stack([F.cross_entropy(one, 0.3 * hard + 0.7 * hard.flip(0), reduction="none") for one in logits])
    factors = 0.3 * weights[targets] + 0.7 * weights[targets.flip(0)]
    assert torch.allclose(mixed, (factors * each).mean(1))


def test_halves_of_a_batch_have_its_mean():
    """Two processes average their losses: the weights must not be normalised by batch."""
    logits, targets, weights = torch.randn(3, 8, 3), torch.randint(3, (8,)), torch.tensor([0.1, 3.0, 1.0])
    halves = [exit_losses(logits[:, part], targets[part], 0.0, weights) for part in (slice(4), slice(4, 8))]
    assert torch.allclose(torch.stack(halves).mean(0), exit_losses(logits, targets, 0.0, weights))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve images of ant, four of bee, and one of cat, which none of the validation images is."""
    for name, count in zip(NAMES, (12, 4, 1), strict=True):
        for split, images in (("train", count), ("val", 0 if name == "cat" else 2)):
            (tmp_path / split / name).mkdir(parents=True)
            for k in range(images):
                Image.new("RGB", (32, 32), (20 * k, 60, 90)).save(tmp_path / split / name / f"{k}.png")
    (tmp_path / "val" / "cat").rmdir()
    return tmp_path


def test_training_uses_them(folder, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "dynadapter.training.module.exit_losses",
        lambda logits, targets, smoothing=0.0, weights=None: (
            seen.append(weights) or exit_losses(logits, targets, smoothing, weights)
        ),
    )
    module = make_classifier(num_classes=3, class_weights="auto")
    trainer(max_steps=1).fit(module, datamodule=ImageFolder(folder, batch_size=4, image_size=32))
    weighted = [weights for weights in seen if weights is not None]
    assert [w.tolist() for w in weighted] == [pytest.approx([17 / 36, 17 / 12, 17 / 3])]
    assert len(seen) > len(weighted)  # validation has none


def test_smoothing_has_the_weight_of_the_image(folder):
    seen = []
    for mixing in (None, Mixing(cutmix=0.0, prob=0.0)):
        torch.manual_seed(0)
        losses = Losses()
        module = make_classifier(num_classes=3, class_weights="auto", label_smoothing=0.1, mixing=mixing)
        trainer(losses, max_steps=1).fit(module, datamodule=ImageFolder(folder, batch_size=4, image_size=32))
        seen += losses.seen
    assert seen[1] == pytest.approx(seen[0])


def test_balanced_draws_have_mean_one(folder):
    module = make_classifier(num_classes=3, class_weights={"cat": 9.0})
    data = ImageFolder(folder, batch_size=4, image_size=32, balanced=True)
    trainer(max_steps=1).fit(module, datamodule=data)
    assert module._class_weights.tolist() == pytest.approx([3 / 11, 3 / 11, 27 / 11])


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
def test_loader_without_a_data_module_names_classes():
    module, batches = make_classifier(num_classes=2, class_weights={"a": 2.0}), noise_batches(4, 2)
    batches.dataset.tensors[1].remainder_(2)
    batches.dataset.classes = ["a", "b"]
    trainer(max_steps=1).fit(module, batches)
    assert module._class_weights.tolist() == [2, 1]


def test_it_is_a_setting_of_the_command(folder, tmp_path, caplog):
    data = ["--data=ImageFolder", f"--data.root={folder}", "--data.batch_size=4", "--data.balanced=true"]
    rest = ["--model.class_weights={cat: 3}", "--epochs=1", f"--trainer.default_root_dir={tmp_path / 'runs'}"]
    main(["fit", *data, *SMALL, *rest])
    assert "no validation image of: cat" in caplog.text
    header = (tmp_path / "runs" / "version_0" / "metrics.csv").read_text().splitlines()[0].split(",")
    policy = ("confidence_0.9/balanced_acc", "confidence_0.9/macro_f1")
    for key in ("balanced_acc", "macro_f1", "balanced_acc_exit1", "macro_f1_exit2", *policy):
        assert f"val/{key}" in header


def test_classes_without_validation_images_are_named(folder):
    data = ImageFolder(folder, image_size=8)
    assert without_images(data) == ["no validation image of: cat"]
    assert without_images(ImageFolder(folder / "train", val_fraction=0)) == []
    data.dataset("train").samples = [sample for sample in data.dataset("train").samples if sample[1] != 1]
    assert without_images(data) == ["no training image of: bee", "no validation image of: cat"]


@pytest.mark.parametrize(("weights", "refused"), [("auto", True), ({"cat": 2.0}, False), (None, False)])
def test_classes_are_not_corrected_twice(weights, refused, folder):
    model = make_classifier(num_classes=3, class_weights=weights)
    data = ImageFolder(folder, batch_size=4, image_size=32, balanced=True)
    with pytest.raises(ValueError, match=r"correct twice.*data.balanced: false") if refused else nullcontext():
        trainer(max_steps=1).fit(model, datamodule=data)


# ---- measures


def recalls(predicted: list[int], targets: list[int]) -> dict[int, float]:
    right = Counter(t for p, t in zip(predicted, targets, strict=True) if p == t)
    return {name: right[name] / count for name, count in Counter(targets).items()}


@pytest.mark.parametrize("seed", range(5))
def test_measures_equal_their_definitions(seed):
    """As scikit-learn's balanced_accuracy_score and f1_score(average="macro"), for predictions that are classes."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(4, (30,), generator=generator)
    predicted = torch.where(
        torch.rand(30, generator=generator) < 0.6, targets, torch.randint(6, (30,), generator=generator)
    )
    balanced, f1 = BalancedAccuracy(7), MacroF1(7)
    for part in (slice(0, 11), slice(11, 30)):  # batches
        balanced.update(predicted[part], targets[part])
        f1.update(predicted[part], targets[part])
    guesses, truths = predicted.tolist(), targets.tolist()
    found = recalls(guesses, truths)
    assert balanced.compute().item() == pytest.approx(sum(found.values()) / len(found))
    values = []
    for name in {*guesses, *truths}:
        right = sum(g == t == name for g, t in zip(guesses, truths, strict=True))
        precision, recall = right / max(guesses.count(name), 1), right / max(truths.count(name), 1)
        values.append(2 * precision * recall / (precision + recall) if right else 0.0)
    assert f1.compute().item() == pytest.approx(sum(values) / len(values))


def test_measures_equal_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    targets, predicted = torch.tensor([0, 0, 0, 1, 2, 2]), torch.tensor([0, 3, 0, 1, 1, 2])
    balanced, f1 = BalancedAccuracy(5), MacroF1(5)
    balanced.update(predicted, targets)
    f1.update(predicted, targets)
    assert f1.compute().item() == pytest.approx(metrics.f1_score(targets, predicted, average="macro", zero_division=0))
    recall = metrics.recall_score(targets, predicted, labels=[0, 1, 2], average="macro")
    assert balanced.compute().item() == pytest.approx(recall)


def test_prediction_that_is_no_class_is_wrong():
    balanced, f1 = BalancedAccuracy(2), MacroF1(2)
    for metric in (balanced, f1):
        metric.update(torch.tensor([-1, 1]), torch.tensor([0, 1]))
        assert metric.compute() == 0.5


# ---- the balanced order


def test_balanced_order_draws_classes_equally():
    labels = [0] * 900 + [1] * 90 + [2] * 10
    drawn = Counter(labels[index] for index, _ in EpochOrder(range(1000), 10, seed=0, classes=labels))
    assert all(280 < drawn[name] < 390 for name in range(3))


@pytest.mark.parametrize("processes", [2, 3])
def test_balanced_order_is_shared_by_processes(processes):
    labels = [0] * 20 + [1] * 4
    together = list(EpochOrder(range(24), 12, seed=1, classes=labels))
    orders = [
        EpochOrder(range(24), 12 // processes, seed=1, processes=processes, rank=rank, classes=labels)
        for rank in range(processes)
    ]
    shared = [one for group in zip(*map(list, orders), strict=True) for one in group]
    assert shared == together
    assert len({number for _, number in together}) == 24  # an image that is drawn twice is augmented in two ways
    again = EpochOrder(range(24), 12, seed=1, classes=labels)
    again.start = 1
    assert list(again) == together[12:]
    assert list(again) != together


def test_balanced_order_of_cached_images(folder):
    def labels(cache: bool) -> list[int]:
        torch.manual_seed(0)
        data = ImageFolder(folder, cache=cache, balanced=True, batch_size=4, image_size=8, augment="flip")
        return [label for _, batch in data.train_dataloader() for label in batch.tolist()]

    assert labels(cache=True) == labels(cache=False)
    assert len(labels(cache=True)) == 16
