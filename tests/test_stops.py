"""A training that stops within an epoch, or within an optimiser step, can be resumed exactly."""

from pathlib import Path
from typing import Any

import pytest
from commands import TINY
from lightning.pytorch import Callback, seed_everything
from saved import read, same
from tiny import QUIET, make_classifier, trainer

from dynadapter.cli import main
from dynadapter.data import Shapes
from dynadapter.training.callbacks import WeightAverage
from dynadapter.training.checkpoints import RunCheckpoint
from dynadapter.training.mixing import Mixing
from dynadapter.training.module import ExitClassifier
from dynadapter.training.schedules import Constant

pytestmark = [
    pytest.mark.filterwarnings(*QUIET, "ignore:Checkpoint directory .* is not empty"),
    pytest.mark.filterwarnings("ignore:The number of training batches", "ignore:The dirpath has changed"),
]


class Stop(Callback):
    """Stop once after a number of batches, as EarlyStopping or max_time does."""

    def __init__(self, batches: int | None = None) -> None:
        self.batches = batches
        self.seen: list[tuple[int, int, float]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append((trainer.current_epoch, batch_idx, float(batch[0].sum())))

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        trainer.should_stop = trainer.should_stop or len(self.seen) == self.batches


def train(folder: Path, stop: int | None = None, resumed: Path | None = None, **options: Any) -> Any:
    """Train on three epochs of four batches; return the batches and the checkpoint."""
    seed_everything(0, verbose=False)
    data = Shapes(train_images=16, val_images=4, test_images=4, image_size=32, normalization="half", batch_size=4)
    module = make_classifier(num_classes=data.num_classes, mixing=Mixing(), lr_schedule=Constant(1.0))
    naming: dict[str, Any] = {"dirpath": folder, "filename": "last", "enable_version_counter": False}
    saver = RunCheckpoint(every_n_epochs=options.pop("every_n_epochs", None), **naming)
    options = {"max_epochs": 3, "enable_checkpointing": True, **options}
    stopping = Stop(stop)
    trainer(stopping, WeightAverage(0.9), saver, **options).fit(
        module, datamodule=data, ckpt_path=resumed, weights_only=True
    )
    return stopping.seen, read(folder / "last.ckpt")


@pytest.mark.parametrize(
    ("stop", "options", "first"),
    [
        (None, {"max_steps": 6}, 6),
        (2, {"limit_val_batches": 0.0}, 2),
        (7, {}, 7),
        (8, {}, 8),  # at the end of an epoch
        (7, {"accumulate_grad_batches": 2}, 6),  # the step begins again
        (5, {"accumulate_grad_batches": 2, "every_n_epochs": 2}, 4),
    ],
    ids=str,
)
def test_stop_within_an_epoch(stop: int | None, options: Any, first: int, tmp_path: Path) -> None:
    train(tmp_path / "stopped", stop, **options)
    options = options | {"max_steps": -1}
    batches, expected = train(tmp_path / "whole", **options)
    resumed, found = train(tmp_path / "resumed", None, tmp_path / "stopped" / "last.ckpt", **options)
    assert resumed == batches[first:]
    for part in ("state_dict", "current_model_state"):
        assert same(found[part], expected[part])
    assert found["global_step"] == expected["global_step"]
    assert found["loops"]["fit_loop"]["epoch_progress"] == expected["loops"]["fit_loop"]["epoch_progress"]


@pytest.mark.filterwarnings("ignore:The `srun` command is available")
def test_fit_resumes_within_an_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--trainer.max_epochs=2", "--trainer.limit_train_batches=4"]
    fit = ["fit", "-c", TINY, f"--trainer.default_root_dir={tmp_path}", *options]
    main(fit)
    step = ExitClassifier.training_step

    def stop(self: ExitClassifier, batch: Any, batch_idx: int) -> Any:
        self.trainer.should_stop = self.trainer.fit_loop.total_batch_idx == 5
        return step(self, batch, batch_idx)

    monkeypatch.setattr(ExitClassifier, "training_step", stop)
    main(fit)
    monkeypatch.undo()
    main(["fit", "--resume", str(tmp_path / "version_1"), *options])
    expected, stopped, found = (read(tmp_path / f"version_{k}" / "checkpoints" / "last.ckpt") for k in range(3))
    assert (stopped["global_step"], found["global_step"]) == (6, 8)
    assert same(found["state_dict"], expected["state_dict"])
