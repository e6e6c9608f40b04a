"""Progress under every limit of a training and after every change on a resume: no jump, and 1 at the end."""

import itertools
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CLASSES
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint, Timer
from PIL import Image
from tiny import QUIET, make_classifier, trainer
from torch.utils.data import DataLoader, TensorDataset

from dynadapter.data.folder import ImageFolder
from dynadapter.training.callbacks.loss_weights import ExitWeights
from dynadapter.training.callbacks.sparsity import BidirectionalSparsity
from dynadapter.training.module import ExitClassifier
from dynadapter.training.schedules import Constant, Linear
from dynadapter.training.weighting import PerExit

IGNORED = ["ignore:You're resuming from a checkpoint that ended before", "ignore:Be aware that when using `ckpt_path`"]
pytestmark = [pytest.mark.filterwarnings(line) for line in QUIET + IGNORED]

IMAGES, EPOCHS = 24, 4
SMALL = {"img_size": 8, "patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 2}


class Rates(Callback):
    """Note the progress of each batch by learning rate, loss weights and dropout, whose schedules are lines."""

    def __init__(self) -> None:
        self.seen: list[float] = []
        self.epochs: list[int] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        rate = 1 - trainer.optimizers[0].param_groups[0]["lr"]
        weight = float(pl_module.net.exit_weights[0])
        (layer, *_rest) = [part for name, part in pl_module.net.named_modules() if name.endswith("dropout")]
        assert (weight, float(layer.rate) * 2) == pytest.approx((rate, rate), abs=self.slack(trainer, rate))
        self.seen.append(rate)
        self.epochs.append(trainer.current_epoch)

    def slack(self, trainer: Any, rate: float) -> float:
        """The first rate after a resume was set before it; the clock moves between two readings."""
        timed = any(isinstance(callback, Timer) for callback in trainer.callbacks)
        return 1.0 if timed else 0.1 if self.resumed and rate in (self.seen or [rate])[:1] else 1e-6

    resumed = False


class StopAfter(Callback):
    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        trainer.should_stop = trainer.should_stop or trainer.global_step == self.steps


def batches(count: int, size: int) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 3, 8, 8, generator=generator)
    return DataLoader(TensorDataset(images, torch.arange(count) % CLASSES), batch_size=size)


def classifier(**changes: Any) -> ExitClassifier:
    return make_classifier(
        backbone_args=SMALL,
        exit_depths=[1],
        lr_schedule=Linear(1.0, 0.0),
        optimizer=lambda p: torch.optim.SGD(p, lr=1.0),
        **changes,
    )


def schedules() -> list[Callback]:
    weights = PerExit((Linear(0.0, 1.0), Linear(1.0, 0.0)))
    return [ExitWeights(weights), BidirectionalSparsity(Linear(0.0, 0.5), Linear(0.0, 0.5), keep=Constant(1.0))]


def train(rates: Rates, batch: int, *more: Callback, ckpt_path: Any = None, **options: Any) -> ExitClassifier:
    module = classifier()
    quiet = {"max_epochs": EPOCHS, "num_sanity_val_steps": 0, "limit_val_batches": 0}
    run = trainer(*schedules(), rates, *more, **(quiet | options))
    run.fit(module, batches(IMAGES, batch), batches(4, 4), ckpt_path=ckpt_path)
    return module


LIMITS: dict[str, tuple[dict[str, Any], list[Callback], int]] = {  # options, callbacks, optimiser steps
    "epochs": ({}, [], 6 * 4),
    "accumulation": ({"accumulate_grad_batches": 3}, [], 2 * 4),
    "uneven accumulation": ({"accumulate_grad_batches": 4}, [], 2 * 4),
    "limit_train_batches": ({"limit_train_batches": 0.5}, [], 3 * 4),
    "max_steps": ({"max_steps": 10, "max_epochs": -1}, [], 10),
    "max_steps before max_epochs": ({"max_steps": 10}, [], 10),
    "max_steps after max_epochs": ({"max_steps": 1000}, [], 6 * 4),
    "scheduler": ({}, [GradientAccumulationScheduler({0: 1, 2: 3})], 2 * 6 + 2 * 2),
    "max_time after max_epochs": ({"max_time": {"days": 300}}, [], 6 * 4),
}


@pytest.mark.parametrize("limit", LIMITS)
def test_progress_runs_from_zero_to_one(limit: str) -> None:
    options, callbacks, steps = LIMITS[limit]
    rates = Rates()
    rates.slack = lambda trainer, rate: 1e-6  # type: ignore[method-assign]
    train(rates, 4, *callbacks, **options)
    changes = [rates.seen[0], *(b for a, b in itertools.pairwise(rates.seen) if b != a)]
    assert len(changes) == steps
    assert (changes[0], changes[-1]) == pytest.approx((0, 1), abs=1e-6)
    assert changes == sorted(changes)


class Clock:
    """Each reading of the time takes a hundredth of the second that is planned."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 0.01
        return self.now


def test_max_time_is_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning.pytorch.callbacks.timer.time.monotonic", Clock())
    rates = Rates()
    train(rates, 4, max_epochs=-1, max_time={"seconds": 1})
    assert 0 <= rates.seen[0] < 0.1
    assert 0.85 < rates.seen[-1] <= 1
    assert rates.seen == sorted(rates.seen)
    with pytest.raises(ValueError, match="no known end; set max_steps or max_time"):
        train(Rates(), 4, max_epochs=-1)


PLACES = {  # when the first run saves and stops, in batches of 4
    "end of an epoch": ({}, 12, {}),
    "after validation": ({"save_on_train_epoch_end": False}, 12, {"limit_val_batches": 1}),
    "inside an epoch": ({"every_n_train_steps": 1}, 9, {}),
}
CHANGES: dict[
    str, tuple[int, dict[str, Any], list[Callback], int]
] = {  # batch size, options, callbacks, steps an epoch
    "larger batches": (12, {}, [], 2),
    "smaller batches": (2, {}, [], 12),
    "odd batches": (5, {}, [], 5),
    "accumulation": (4, {"accumulate_grad_batches": 3}, [], 2),
    "scheduler": (4, {}, [GradientAccumulationScheduler({0: 1, 1: 2})], 3),
    "fewer batches an epoch": (4, {"limit_train_batches": 3}, [], 3),
}


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, list[float]]]:
    """Return a function that trains to a place, and returns the checkpoint and the progress of its batches."""

    @cache
    def start(place: str) -> tuple[Path, list[float]]:
        saving, steps, options = PLACES[place]
        folder, rates = tmp_path_factory.mktemp("run"), Rates()
        saver = ModelCheckpoint(folder, save_last=True, **saving)
        train(rates, 4, saver, StopAfter(steps), min_epochs=0, enable_checkpointing=True, **options)
        assert len(rates.seen) == steps
        return folder / "last.ckpt", rates.seen

    return start


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("change", CHANGES)
def test_changed_resume_goes_on(place: str, change: str, started: Any) -> None:
    _, steps, options = PLACES[place]
    batch, changed, callbacks, per_epoch = CHANGES[change]
    (checkpoint, before), rates = started(place), Rates()
    rates.resumed = True
    train(rates, batch, *callbacks, ckpt_path=checkpoint, **(options | changed))
    after = rates.seen
    assert rates.epochs[0] == steps // 6
    assert after == sorted(after)
    assert after[-1] == pytest.approx(1, abs=1e-6)
    step = 2.2 / (EPOCHS * min(per_epoch, 6) - 1)  # the larger of both plans' steps, twice where a part of one is left
    assert max(b - a for a, b in itertools.pairwise([before[-1], *after])) <= step
    left = (EPOCHS - steps / 6) * per_epoch
    assert abs(len({round(rate, 9) for rate in after}) - left) < 1 + math.ceil(left % 1)


@pytest.mark.parametrize("place", PLACES)
def test_unchanged_resume_is_bit_exact(place: str, started: Any) -> None:
    options = PLACES[place][2]
    (checkpoint, before), straight, rates = started(place), Rates(), Rates()
    train(straight, 4, **options)
    train(rates, 4, ckpt_path=checkpoint, **options)
    assert before + rates.seen == straight.seen


@pytest.mark.parametrize(("first", "second"), [(4, 12), (12, 4)])
def test_image_folder_resumes_after_validation(first: int, second: int, tmp_path: Path) -> None:
    for split, count in (("train", 8), ("val", 2)):
        for k in range(3 * count):
            (tmp_path / split / "abc"[k % 3]).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (80 * (k % 3), k, 0)).save(tmp_path / split / "abc"[k % 3] / f"{k}.png")
    options: dict[str, Any] = {"max_epochs": EPOCHS, "min_epochs": 0, "num_sanity_val_steps": 0}
    rates, steps = Rates(), IMAGES // first * 2
    saver = ModelCheckpoint(tmp_path / "run", save_last=True, save_on_train_epoch_end=False)
    for batch, callbacks, checkpoint in (
        (first, [saver, StopAfter(steps)], None),
        (second, [], tmp_path / "run" / "last.ckpt"),
    ):
        data = ImageFolder(tmp_path, image_size=8, batch_size=batch)
        run = trainer(*schedules(), rates, *callbacks, enable_checkpointing=bool(callbacks), **options)
        rates.resumed = checkpoint is not None
        rates.slack = lambda *_: 0.2  # type: ignore[method-assign]
        run.fit(classifier(num_classes=3), datamodule=data, ckpt_path=checkpoint)
    assert len(rates.seen) == steps + IMAGES // second * 2
    changes = [b - a for a, b in itertools.pairwise(rates.seen)]
    assert min(changes) > -0.01  # the first step has the rate of the first plan
    assert max(changes) < 2.2 / 7
    assert rates.seen[-1] == pytest.approx(1, abs=1e-6)
    assert rates.epochs[steps] == 2
