"""Checkpoint files: written whole or not at all, checked before use, and the newest one found."""

import errno
import io
import os
import random
import subprocess
import sys
import zipfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import TINY
from conftest import raises_one_line
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint
from saved import fitted, read, same
from tiny import loader, make_classifier, trainer
from torch.utils.data import DataLoader

from dynadapter.training.checkpoints import AtomicCheckpointIO, RunCheckpoint, check, newest
from dynadapter.training.checkpoints import read as read_whole

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")


CONTENT = {"state_dict": {"a": torch.arange(100.0)}, "optimizer_states": [], "global_step": 3, "name": "text"}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoints" / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(CONTENT, path)
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_is_loaded(saved: Path) -> None:
    for loaded in (AtomicCheckpointIO().load_checkpoint(saved), read_whole(saved)):
        assert loaded["name"] == "text"
        assert torch.equal(loaded["state_dict"]["a"], torch.arange(100.0))
    with pytest.raises(FileNotFoundError):
        AtomicCheckpointIO().load_checkpoint(saved.with_name("other.ckpt"))


def test_other_file_systems_use_lightning() -> None:
    where = "memory://folder/a.ckpt"
    files = AtomicCheckpointIO(remote=True)
    files.save_checkpoint(CONTENT, where)
    assert files.load_checkpoint(where)["name"] == "text"
    files.remove_checkpoint(where)
    with pytest.raises(FileNotFoundError):
        files.load_checkpoint(where)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_interrupted_save_keeps_the_old_file(call: str, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: Any) -> None:
        raise Killed

    monkeypatch.setattr(os, call, killed)
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)  # a killed process removes nothing
    with pytest.raises(Killed):
        AtomicCheckpointIO().save_checkpoint(CONTENT | {"name": "new"}, saved)
    monkeypatch.undo()
    [left] = [name for name in names(saved.parent) if name != "last.ckpt"]
    assert left.startswith(".last.ckpt.")
    assert left.endswith(".partial")
    assert read_whole(saved)["name"] == "text"
    found = newest(saved.parent)
    assert found is not None
    assert (found.path, found.step, found.damaged) == (saved, 3, [])
    AtomicCheckpointIO().save_checkpoint(CONTENT, saved.with_name("best.ckpt"))  # of any name
    assert names(saved.parent) == ["best.ckpt", "last.ckpt"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_full_disk_is_one_line(call: str, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    told = f"checkpoint {saved} cannot be written: No space left on device; .* whole"
    with raises_one_line(OSError, match=told):
        AtomicCheckpointIO().save_checkpoint(CONTENT | {"name": "new"}, saved)
    assert names(saved.parent) == ["last.ckpt"]
    assert read_whole(saved)["name"] == "text"


FULL = """
import resource, sys
from dynadapter.cli import main
from dynadapter.training.checkpoints import AtomicCheckpointIO
save = AtomicCheckpointIO.save_checkpoint
def limited(self, checkpoint, *args, **kwargs):
    if checkpoint["global_step"] == 4:  # from the second epoch on no file may have more than a few bytes
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
    return save(self, checkpoint, *args, **kwargs)
AtomicCheckpointIO.save_checkpoint = limited
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_training_on_a_full_disk(tmp_path: Path) -> None:
    args = ["fit", "-c", TINY, "--trainer.max_epochs=4", f"--trainer.default_root_dir={tmp_path}"]
    done = subprocess.run([sys.executable, "-c", FULL, *args], capture_output=True, text=True, check=False)
    saved = tmp_path / "version_0" / "checkpoints"
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(
        f"dynadapter: error: checkpoint {saved / 'last.ckpt'} cannot be written: File too large; "
    )
    assert "Traceback" not in done.stderr
    assert names(saved) == ["last.ckpt"]
    assert read_whole(saved / "last.ckpt")["global_step"] == 2


def test_unloadable_contents_are_not_saved(saved: Path) -> None:
    with pytest.raises(ValueError, match=r"would not load under weights_only=True: it holds pathlib\.\w+Path; "):
        AtomicCheckpointIO().save_checkpoint(CONTENT | {"where": Path("a")}, saved)
    assert read_whole(saved)["name"] == "text"


@pytest.mark.parametrize("left", [0, 1, 100, -1, -30, -1000])
def test_a_file_that_was_cut_off(left: int, saved: Path) -> None:
    saved.write_bytes(saved.read_bytes()[:left])
    for reader in (check, read_whole, AtomicCheckpointIO().load_checkpoint):
        with raises_one_line(ValueError, match=rf"{saved} is not a readable checkpoint: "):
            reader(saved)
    with pytest.raises(ValueError, match=r"can be read: last\.ckpt"):
        newest(saved.parent)


def test_flipped_bits_are_found_or_harmless(tmp_path: Path) -> None:
    path = fitted(make_classifier(), tmp_path / "a.ckpt")
    whole, content = path.read_bytes(), read(path)
    rng = random.Random(0)
    found = 0
    for _ in range(200):
        place = rng.randrange(8 * len(whole))
        flipped = bytearray(whole)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        try:
            again = read_whole(path)
        except ValueError:
            found += 1
        else:
            assert same(again["state_dict"], content["state_dict"]), place
            assert again["optimizer_states"][0]["state"].keys() == content["optimizer_states"][0]["state"].keys()
    assert found > 100  # the others hit padding, dates and the like


def test_torch_does_not_check_checksums(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    torch.save({"a": torch.zeros(1000)}, path)
    data = bytearray(path.read_bytes())
    data[data.index(bytes(1000)) + 500] = 1
    path.write_bytes(data)
    assert torch.load(path, weights_only=True)["a"].any()
    with pytest.raises(ValueError, match="cut off or damaged"):
        check(path)


def test_hostile_archives_are_not_unpacked(tmp_path: Path) -> None:
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(50_000_000))
    (tmp_path / "bomb.ckpt").write_bytes(bomb.getvalue())
    with pytest.raises(ValueError, match="it was not written by torch"):
        check(tmp_path / "bomb.ckpt")


def test_most_steps_is_newest(tmp_path: Path) -> None:
    assert newest(tmp_path) is None
    for name, step in (("a", 5), ("b", 9), ("c", 7)):
        AtomicCheckpointIO().save_checkpoint(CONTENT | {"global_step": step}, tmp_path / f"{name}.ckpt")
    weights = {key: value for key, value in CONTENT.items() if key != "optimizer_states"}
    AtomicCheckpointIO().save_checkpoint(weights | {"global_step": 20}, tmp_path / "weights.ckpt")
    assert newest(tmp_path) == (tmp_path / "b.ckpt", 9, [])
    (tmp_path / "b.ckpt").write_bytes((tmp_path / "b.ckpt").read_bytes()[:-9])
    assert newest(tmp_path) == (tmp_path / "c.ckpt", 7, [tmp_path / "b.ckpt"])


def test_lightning_checkpoints_interchange() -> None:
    for options in ({}, {"monitor": "val/acc", "mode": "max"}, {"every_n_train_steps": 5}):
        assert RunCheckpoint(**options).state_key == ModelCheckpoint(**options).state_key


def test_last_does_not_depend_on_best(tmp_path: Path) -> None:
    class Worse(Callback):
        def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            pl_module.log("score", -float(trainer.current_epoch))

    saver = RunCheckpoint(dirpath=tmp_path, filename="best", monitor="score", mode="max", save_last=True)
    trainer(Worse(), saver, max_epochs=3, enable_checkpointing=True).fit(make_classifier(), loader(2), loader(1))
    assert {name: read(tmp_path / name)["global_step"] for name in names(tmp_path)} == {"best.ckpt": 2, "last.ckpt": 6}


@pytest.mark.parametrize(
    ("saving", "length", "steps"),
    [
        ({"every_n_train_steps": 5}, {"max_epochs": 3}, 6),
        ({"every_n_train_steps": 5}, {"max_epochs": -1, "max_steps": 7}, 7),
        ({"every_n_epochs": 2}, {"max_epochs": 3}, 6),
        ({"monitor": "score", "save_last": True}, {"max_epochs": 3, "check_val_every_n_epoch": 2}, 6),
        ({"every_n_epochs": 2}, {"max_epochs": 9, "stops": True}, 2),
    ],
)
def test_end_of_training_is_saved(saving: dict, length: dict, steps: int, tmp_path: Path) -> None:
    class Score(Callback):
        stops = length.pop("stops", False)

        def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            pl_module.log("score", float(trainer.current_epoch))

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.should_stop = self.stops

    saver = RunCheckpoint(
        dirpath=tmp_path, filename="best" if "monitor" in saving else "last", enable_version_counter=False, **saving
    )
    trainer(Score(), saver, enable_checkpointing=True, **length).fit(make_classifier(), loader(2), loader(1))
    assert read(tmp_path / "last.ckpt")["global_step"] == steps
    if "monitor" in saving:
        assert read(tmp_path / "best.ckpt")["global_step"] == 4  # of the only validation


@pytest.mark.parametrize("validation", [None, "val"])
@pytest.mark.parametrize("every", [1, 2, 10])
def test_every_epoch_is_saved(validation: str | None, every: int, tmp_path: Path) -> None:
    """Epochs without validation count too: an interruption then loses one epoch at most."""
    saved: list[int] = []

    class Saver(RunCheckpoint):
        def _save_checkpoint(self, trainer: Any, filepath: str) -> None:
            saved.append(trainer.current_epoch)
            super()._save_checkpoint(trainer, filepath)

    saver = Saver(dirpath=tmp_path, filename="last", enable_version_counter=False)
    fitting = trainer(saver, max_epochs=3, enable_checkpointing=True, check_val_every_n_epoch=every)
    fitting.fit(make_classifier(), loader(), loader(1) if validation else None)
    assert saved == [0, 1, 2]
    assert read_whole(tmp_path / "last.ckpt")["epoch"] == 2


class NoValidation(LightningDataModule):
    def train_dataloader(self) -> DataLoader:
        return loader(3)

    def val_dataloader(self) -> list[DataLoader]:
        return []


@pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")
def test_saves_by_steps_without_validation(tmp_path: Path) -> None:
    saver = RunCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    trainer(saver, max_epochs=2, enable_checkpointing=True).fit(make_classifier(), datamodule=NoValidation())
    assert names(tmp_path) == ["step=3.ckpt", "step=6.ckpt"]


def test_saves_by_time_if_every_step_validates(tmp_path: Path) -> None:
    saver = RunCheckpoint(dirpath=tmp_path, filename="{step}", train_time_interval=timedelta(0), save_top_k=-1)
    trainer(saver, max_epochs=2, enable_checkpointing=True).fit(make_classifier(), loader(1), loader(1))
    assert names(tmp_path) == ["step=1.ckpt", "step=2.ckpt"]


def scored_training(
    folder: Path, batches: int, scores: dict[int, float], options: dict[str, Any], **saving: Any
) -> RunCheckpoint:
    """Train an epoch in which a validation after a step of `scores` has that score, and others 0; return the saver."""

    def score(trainer: Trainer, *_: Any) -> None:
        trainer.callback_metrics["val/score"] = torch.tensor(scores.get(trainer.global_step, 0.0))

    saver = RunCheckpoint(dirpath=folder, filename="{step}", monitor="val/score", mode="max", **saving)
    scored = LambdaCallback(on_validation_epoch_end=score)
    fitting = trainer(scored, saver, max_epochs=1, enable_checkpointing=True, **options)
    fitting.fit(make_classifier(), loader(batches), loader(1))
    return saver


def test_best_is_of_a_validated_step(tmp_path: Path) -> None:
    """Between validations the metric is that of earlier weights, so saves by steps compare nothing."""
    scores = {2: 0.1, 4: 0.9, 6: 0.5, 8: 0.2}
    saver = scored_training(tmp_path, 9, scores, {"val_check_interval": 2}, every_n_train_steps=3, save_last=True)
    assert names(tmp_path) == ["last.ckpt", "step=4.ckpt"]
    assert saver.best_model_score == 0.9
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 9


def test_best_is_of_a_validation_within_a_step(tmp_path: Path) -> None:
    """The step before was saved already, as the last checkpoint: its validation is compared nevertheless."""
    options = {"accumulate_grad_batches": 2, "val_check_interval": 3}
    saver = scored_training(tmp_path, 12, {1: 0.9}, options, every_n_train_steps=1, save_last=True)
    assert names(tmp_path) == ["last.ckpt", "step=1.ckpt"]
    assert saver.best_model_score == 0.9


def test_validations_within_a_step_are_compared_once(tmp_path: Path) -> None:
    options = {"accumulate_grad_batches": 4, "val_check_interval": 1}
    scored_training(tmp_path, 12, {1: 1.0, 2: 2.0, 3: 3.0}, options, every_n_train_steps=1, save_top_k=3)
    assert names(tmp_path) == ["step=1.ckpt", "step=2.ckpt", "step=3.ckpt"]


def test_two_callbacks_save_into_one_folder(tmp_path: Path) -> None:
    savers = [
        RunCheckpoint(dirpath=tmp_path / "saved", filename="last"),
        RunCheckpoint(dirpath=tmp_path / "saved", filename="{step}", every_n_train_steps=2, save_top_k=-1),
    ]
    fitting = trainer(*savers, max_epochs=2, enable_checkpointing=True)
    fitting.fit(make_classifier(), loader(3), loader(1))
    assert names(tmp_path / "saved") == ["last.ckpt", "step=2.ckpt", "step=4.ckpt", "step=6.ckpt"]
    assert names(tmp_path) == ["saved"]  # the lock is released
