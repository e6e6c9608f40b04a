"""Write checkpoints atomically, check them before use, and find the newest intact one."""

import contextlib
import io
import os
import time
import zipfile
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn

from dynadapter.backbones.weight_files import require_stored
from dynadapter.files import PARTIAL, locked, open_regular, require_room, write
from dynadapter.spec import IMPORT_FIRST


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write checkpoints atomically, read them without running code, and remove only files next to them.

    A checkpoint is written under another name in the same folder and then renamed. If the process or the machine stops,
    the path holds either the old or the new file. Unfinished files of a killed process are removed when the next
    checkpoint is written into the folder.

    (Lightning writes to a temporary folder, which may be on another file system; then the final move is a copy.)

    The checkpoint of a resumed training is not trusted, and it names files to remove. Hence only regular files directly
    in a folder into which this object has written are removed.

    Args:
        remote: Whether to read from places that are not local files, such as ``s3://...``. Use it by
            ``Trainer(plugins=[AtomicCheckpointIO(remote=True)])``.
    """

    def __init__(self, remote: bool = False) -> None:
        super().__init__()
        self.remote = remote
        self._folders: set[str] = set()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Save a checkpoint.

        Raises:
            ValueError: The content does not load under ``weights_only=True``.
            OSError: The file cannot be written; an existing file is kept.
        """
        self._folders.add(_folder(path))
        if storage_options is not None or not _is_local(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        buffer.seek(0)
        if foreign := torch.serialization.get_unsafe_globals_in_checkpoint(buffer):
            raise ValueError(
                f"the checkpoint {path} would not load under weights_only=True: it holds {', '.join(foreign)}; "
                "keep only numbers, text and tensors in callbacks and hyper-parameters"
            )
        target = Path(path)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            for left_over in target.parent.glob(f".*{ModelCheckpoint.FILE_EXTENSION}.*{PARTIAL}"):
                left_over.unlink(missing_ok=True)
            write(target, buffer.getbuffer())
        except OSError as error:
            raise OSError(
                f"checkpoint {target} cannot be written: {error.strerror or error}; earlier checkpoints are whole: "
                "free disk space or give another folder, and resume"
            ) from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any = lambda storage, _: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load a checkpoint under ``weights_only=True``.

        Raises:
            ValueError: The file is damaged or not local, or ``weights_only`` is false.
        """
        if weights_only is False:
            raise ValueError("weights_only=False would run the code in a checkpoint; leave it out")
        if _is_local(path) or not self.remote:
            return read(path, map_location)
        checkpoint: dict[str, Any] = super().load_checkpoint(path, map_location, weights_only=True)
        require_stored(checkpoint, str(path))
        return checkpoint

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint directly in a folder into which this object has written; warn of any other."""
        local = _is_local(path)
        if _folder(path) not in self._folders or (local and os.path.isdir(path)):
            rank_zero_warn(f"{path} is not a file of this training's checkpoint folder, so it is not removed")
        elif local:
            Path(path).unlink(missing_ok=True)
        else:
            super().remove_checkpoint(path)


def use_atomic_checkpoints(trainer: Trainer) -> None:
    """Set :class:`AtomicCheckpointIO` for a trainer's checkpoints, unless the user chose another plugin."""
    try:
        default = type(trainer.strategy.checkpoint_io) is TorchCheckpointIO
    except NotImplementedError:  # a strategy that shards its checkpoints
        return
    if default:
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()


class RunCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, which saves only at points from which a training can be resumed exactly.

    It does not save by steps or by time between the batches of one optimiser step, because no checkpoint holds their
    gradients. If training stops or validates there, the step begins again after a resume. If validation follows a
    batch, it saves after the validation, because a training resumed before it would skip it. An epoch without
    validation is saved at its end, unless a metric is monitored. With a metric ``val...`` and saves by steps or
    by time, these write the last checkpoint alone, and each validation is compared with the best one: between
    validations the metric is that of earlier weights. With ``save_last`` the last checkpoint is written whenever a save
    is due; Lightning writes it only when the best one changes. The end of the training
    is saved without a monitored metric or with ``save_last``, however rarely checkpoints are saved.

    While a training runs, no other training can save into its folder, because they would overwrite and remove each
    other's files.
    """

    _due = False  # a save by steps or by time that waits for the validation
    _compared = 0  # the last step whose validation was compared
    _folder: contextlib.ExitStack | None = None  # what holds the folder

    @property
    def state_key(self) -> str:
        """Lightning's key of its state in a checkpoint, so that each class can resume from the state of the other."""
        return super().state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__, 1)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the folder, and lock it until the training ends.

        Raises:
            Busy: Another training saves into it.
        """
        super().setup(trainer, pl_module, stage)
        self._release()
        saves = stage == "fit" and trainer.is_global_zero and not trainer.fast_dev_run  # type: ignore[attr-defined]
        ours = [one for one in trainer.checkpoint_callbacks if isinstance(one, RunCheckpoint) and one._folder]
        shared = any(one.dirpath == self.dirpath for one in ours)  # another of this trainer has locked it
        if saves and self.dirpath is not None and _is_local(self.dirpath) and not shared:
            Path(self.dirpath).parent.mkdir(parents=True, exist_ok=True)
            with contextlib.ExitStack() as held:
                held.enter_context(locked(Path(self.dirpath)))
                self._folder = held.pop_all()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Release the folder."""
        self._release()
        super().teardown(trainer, pl_module, stage)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save if this is configured, and release the folder."""
        super().on_exception(trainer, pl_module, exception)
        self._release()

    def _release(self) -> None:
        if self._folder is not None:
            self._folder.close()
            self._folder = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Correct the counts of a training that stops within an epoch or within an optimiser step.

        Lightning has counted the epoch as complete by then, and a resume would begin the next one. No checkpoint holds
        the gradients of an incomplete step, so its batches are repeated.
        """
        loops = checkpoint["loops"]["fit_loop"]
        batches = loops["epoch_loop.batch_progress"]
        if batches["is_last_batch"] or not 0 < batches["current"]["ready"] < trainer.num_training_batches:
            return
        repeated = batches["current"]["processed"] % trainer.accumulate_grad_batches
        for part in ("total", "current"):
            epochs = loops["epoch_progress"][part]
            epochs["processed"] = epochs["completed"] = epochs["started"] - 1
            batches[part] = {name: count - repeated for name, count in batches[part].items()}
        of_data = checkpoint.get(type(trainer.datamodule).__qualname__, {})  # type: ignore[attr-defined]
        for position in (*loops["state_dict"].get("combined_loader", ()), of_data):
            if isinstance(position, dict) and position.keys() >= {"epoch", "batches"}:  # of a ResumableLoader
                position["batches"] -= repeated

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save by steps or by time, if due."""
        loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
        if loop._should_accumulate():
            return
        if fetcher is not None and loop._should_check_val_fx(fetcher) and _validates(trainer):
            self._due = self._is_due(trainer)
        elif not self._compares_later(trainer):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        elif self._is_due(trainer) and not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def _compares_later(self, trainer: Trainer) -> bool:
        """Check whether saves are by steps or by time, and a metric of validation (``val...``) chooses the best one."""
        by_steps = self._every_n_train_steps > 0 or self._train_time_interval is not None
        return by_steps and (self.monitor or "").startswith("val") and trainer.enable_validation

    def _is_due(self, trainer: Trainer) -> bool:
        """Check whether a save by steps or by time is due."""
        if self._train_time_interval is None:
            return self._every_n_train_steps > 0 and trainer.global_step % self._every_n_train_steps == 0
        now, before = time.monotonic(), self._last_time_checked
        due = before is not None and now - before >= self._train_time_interval.total_seconds()
        if due := trainer.strategy.broadcast(due):  # the clocks of processes differ
            self._last_time_checked = now
        return due

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what was due before the validation, and what is due after it."""
        candidates = self._monitor_candidates(trainer)
        compares = self._compares_later(trainer) and self.monitor in candidates
        if compares and self._compared != trainer.global_step:  # a save by steps of this step compared nothing
            self._compared, self._last_global_step_saved = trainer.global_step, 0
        if (self._due or compares) and not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)
        self._due = False
        super().on_validation_end(trainer, pl_module)
        if not self._should_save_on_train_epoch_end(trainer):
            self._save_last(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save by epochs, if due, and after the last epoch."""
        super().on_train_epoch_end(trainer, pl_module)
        if self._should_save_on_train_epoch_end(trainer):
            self._save_last(trainer)
        # Not in on_train_end, before which a weight average replaces the weights to continue from.
        if _is_last_epoch(trainer) and not self._should_skip_saving_checkpoint(trainer):
            candidates = self._monitor_candidates(trainer)
            if self.monitor is None:
                self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)

    def _should_save_on_train_epoch_end(self, trainer: Trainer) -> bool:
        if self._save_on_train_epoch_end is None and self.monitor is None and not _validates(trainer):
            return True
        return super()._should_save_on_train_epoch_end(trainer)

    def _save_last(self, trainer: Trainer) -> None:
        due = self._every_n_epochs > 0 and (trainer.current_epoch + 1) % self._every_n_epochs == 0
        if due and not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))


def _is_last_epoch(trainer: Trainer) -> bool:
    """Check at the end of an epoch whether the training ends. (Lightning's ``done`` does, but it counts the epoch.)"""
    loop, epochs = trainer.fit_loop, trainer.max_epochs
    steps_done = trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps
    done: int = loop.epoch_progress.current.processed  # type: ignore[attr-defined]
    epochs_done = epochs is not None and epochs != -1 and done >= epochs
    return steps_done or epochs_done or (trainer.should_stop and loop._can_stop_early)


def _validates(trainer: Trainer) -> bool:
    """Check whether the current epoch has a validation."""
    every = trainer.check_val_every_n_epoch
    due = every is None or (trainer.current_epoch + 1) % every == 0
    batches = trainer.num_val_batches
    return due and trainer.enable_validation and (sum(batches) if isinstance(batches, list) else batches) > 0


class Resumable(NamedTuple):
    """A checkpoint from which a training can be resumed.

    Args:
        path: The file.
        step: Number of finished optimiser steps.
        damaged: Damaged checkpoints of the folder.
    """

    path: Path
    step: int
    damaged: list[Path]


def newest(folder: Path) -> Resumable | None:
    """Return the intact checkpoint of a folder with the most steps and with the optimiser's state; None without any.

    Raises:
        ValueError: All checkpoints of the folder are damaged.
    """
    found: list[tuple[int, float, Path]] = []
    damaged = []
    for path in folder.glob(f"*{ModelCheckpoint.FILE_EXTENSION}"):
        try:
            open_regular(path).close()
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # tensors stay on the disk
            if "optimizer_states" in checkpoint:
                found.append((int(checkpoint["global_step"]), path.stat().st_mtime, path))
        except Exception:  # a damaged file can raise anything
            damaged.append(path)
    for step, _, path in sorted(found, reverse=True):
        try:
            check(path)
        except ValueError:
            damaged.append(path)
        else:
            return Resumable(path, step, sorted(damaged))
    if damaged:
        raise ValueError(f"no checkpoint in {folder} can be read: {', '.join(p.name for p in sorted(damaged))}")
    return None


def read(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Read a checkpoint, under ``weights_only=True``.

    Raises:
        ValueError: The file is damaged, not a checkpoint, or not local.
    """
    require_local(path)
    require_room(path, os.path.getsize(path))
    check(path)
    try:
        checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # a damaged file can raise anything
        foreign = "weights_only" in str(error).lower()
        why = (
            f"it holds more than numbers, text and tensors{_foreign(path)}"
            if foreign
            else "it was not written by torch"
        )
        raise ValueError(f"{path} is not a readable checkpoint: {why}") from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} is not a checkpoint: it holds a {type(checkpoint).__name__}")
    require_stored(checkpoint, str(path))
    return checkpoint


def _foreign(path: str | Path) -> str:
    """Return a message that names the unknown class in a checkpoint, and how to make a user's class known."""
    try:
        names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # a damaged file can raise anything
        return ""
    return f", {', '.join(names)!r:.200}; {IMPORT_FIRST}" if names else ""


def check(path: str | Path) -> None:
    """Check that a file is intact: every part must match its stored checksum (CRC-32).

    torch writes these checksums but does not check them when it loads.

    Raises:
        ValueError: The file is truncated, damaged or not written by torch.
        OSError: The file cannot be opened.
    """
    with open_regular(path) as file:  # errors of the path, not of the content, are raised unchanged
        size = os.fstat(file.fileno()).st_size
        try:
            with zipfile.ZipFile(file) as archive:
                parts = archive.infolist()
                stored = all(part.compress_type == zipfile.ZIP_STORED for part in parts)
                if not stored or sum(part.file_size for part in parts) > size:
                    why: str | None = "it was not written by torch"
                else:
                    broken = archive.testzip()
                    why = f"{broken} has another checksum" if broken else None
        except zipfile.BadZipFile as error:
            why = "it is empty" if not size else str(error)
        except Exception as error:  # a flipped bit can look like a password or another compression method
            why = str(error) or type(error).__name__
    if why:
        why = " ".join(why.split())
        raise ValueError(f"{path} is not a readable checkpoint: it is cut off or damaged ({why})")


def require_local(path: str | Path) -> None:
    """Raise an error for a place that is not a local path.

    Raises:
        ValueError: The place is a URL or has another prefix of fsspec, such as ``http://``, ``s3://`` or
            ``simplecache::``.
    """
    if not _is_local(path):
        raise ValueError(
            f"{path} is not a local file; fetch it first, or let a Trainer read it by "
            "plugins=[AtomicCheckpointIO(remote=True)]"
        )


def _is_local(path: str | Path) -> bool:
    return isinstance(path, Path) or (len(urlsplit(path).scheme) < 2 and "::" not in path)  # one letter is a drive


def _folder(path: str | Path) -> str:
    """Return the folder of a file; if it is local, with all links resolved."""
    return os.path.realpath(os.path.dirname(path)) if _is_local(path) else str(path).rpartition("/")[0]
