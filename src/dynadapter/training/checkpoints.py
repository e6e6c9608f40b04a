"""Checkpoints that are there whole or not at all: written in one step, and checked before anything of them is used."""

import contextlib
import errno
import io
import os
import zipfile
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

PARTIAL = ".partial"
"""Ends the name of a file that is being written; nobody ever reads one."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and gives it its name in one step; reads none that is damaged.

    Whenever the process or the machine ends, under that name is the old file or the new one. What a killed process left
    unfinished is removed when the next checkpoint is written into that folder. Give each run a folder of its own.

    (Lightning's own writes to a temporary folder elsewhere; from another file system a file is moved by copying it.)
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Saves a checkpoint.

        Raises:
            ValueError: If it holds something that does not load under ``weights_only=True``.
            OSError: In one line, if it cannot be written; a file that was there stays.
        """
        if storage_options is not None or not _is_local(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        buffer.seek(0)
        if foreign := torch.serialization.get_unsafe_globals_in_checkpoint(buffer):
            raise ValueError(
                f"the checkpoint {path} would not load again under weights_only=True: it holds {', '.join(foreign)}; "
                "let callbacks and hyper-parameters keep numbers, text and tensors alone"
            )
        target = Path(path)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            for left_over in target.parent.glob(f"*{ModelCheckpoint.FILE_EXTENSION}{PARTIAL}"):
                left_over.unlink(missing_ok=True)
            write(target, buffer.getbuffer())
        except OSError as error:
            raise OSError(
                f"checkpoint {target} cannot be written: {error.strerror or error}; what was saved before is whole: "
                "make room or give another place, and go on from it"
            ) from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any = lambda storage, _: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Loads a checkpoint, under ``weights_only=True`` unless something else is said.

        Raises:
            ValueError: If it is damaged.
        """
        if _is_local(path) and Path(path).is_file():
            check(path)
        return super().load_checkpoint(path, map_location, True if weights_only is None else weights_only)


class RunCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, saving only where a training can go on exactly, and the last one always.

    Not between the batches of one optimiser step, whose gradients no checkpoint holds; and where validation follows on
    a batch, after it, because a training resumed before it would leave it out. With ``save_last`` the last one is saved
    whenever one is due; Lightning saves it only when the best one has changed.
    """

    _due = False  # a save by steps that waits for the validation

    @property
    def state_key(self) -> str:
        """The name of its state in a checkpoint: Lightning's, so that either goes on from the other's."""
        return super().state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__, 1)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves by steps or by time, where that is due."""
        loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
        if loop._should_accumulate():
            return
        if fetcher is not None and loop._should_check_val_fx(fetcher):
            self._due = self._every_n_train_steps > 0 and trainer.global_step % self._every_n_train_steps == 0
            return  # a save by time comes a step later
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves what was due before the validation, and what is due after it."""
        if self._due and not self._should_skip_saving_checkpoint(trainer):
            candidates = self._monitor_candidates(trainer)
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)
        self._due = False
        super().on_validation_end(trainer, pl_module)
        if not self._should_save_on_train_epoch_end(trainer):
            self._save_last(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves by epochs, where that is due."""
        super().on_train_epoch_end(trainer, pl_module)
        if self._should_save_on_train_epoch_end(trainer):
            self._save_last(trainer)

    def _save_last(self, trainer: Trainer) -> None:
        due = self._every_n_epochs > 0 and (trainer.current_epoch + 1) % self._every_n_epochs == 0
        if due and not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))


class Resumable(NamedTuple):
    """A checkpoint from which a training can go on.

    Args:
        path: The file.
        step: Optimiser steps that were done.
        damaged: Newer files in that folder that cannot be read.
    """

    path: Path
    step: int
    damaged: list[Path]


def newest(folder: Path) -> Resumable | None:
    """Finds the checkpoint in a folder with the most steps that is whole and holds the optimiser's state.

    Raises:
        ValueError: If there are some, and all of them are damaged.
    """
    found: list[tuple[int, float, Path]] = []
    damaged = []
    for path in folder.glob(f"*{ModelCheckpoint.FILE_EXTENSION}"):
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # tensors stay on the disk
            if "optimizer_states" in checkpoint:
                found.append((checkpoint["global_step"], path.stat().st_mtime, path))
        except Exception:  # whatever the reader trips over
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


def read(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint to the CPU, under ``weights_only=True``.

    Raises:
        ValueError: In one line, if it is damaged, or no checkpoint.
    """
    check(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the reader trips over, the file is what is wrong
        foreign = "weights_only" in str(error).lower()
        why = "it holds more than numbers, text and tensors" if foreign else "torch has not written it"
        raise ValueError(f"{path} is no checkpoint that can be read: {why}") from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} is no checkpoint: it holds a {type(checkpoint).__name__}")
    return checkpoint


def check(path: str | Path) -> None:
    """Makes sure that a file is whole: every part of it has the checksum that was written with it (CRC-32).

    torch writes these checksums and does not look at them when it reads.

    Raises:
        ValueError: In one line, if it is cut off or damaged, or is no file of torch's.
        OSError: If it cannot be opened.
    """
    with open(path, "rb") as file:  # what is wrong with the place, not with the content, is said as it is
        size = os.fstat(file.fileno()).st_size
        try:
            with zipfile.ZipFile(file) as archive:
                parts = archive.infolist()
                stored = all(part.compress_type == zipfile.ZIP_STORED for part in parts)
                if not stored or sum(part.file_size for part in parts) > size:
                    why: str | None = "torch has not written it"
                else:
                    broken = archive.testzip()
                    why = f"{broken} has another checksum" if broken else None
        except zipfile.BadZipFile as error:
            why = "it is empty" if not size else str(error)
        except Exception as error:  # a flipped bit can look like a password, another method, another script
            why = str(error) or type(error).__name__
    if why:
        why = " ".join(why.split())
        raise ValueError(f"{path} is no checkpoint that can be read: it is cut off or damaged ({why})")


def write(target: Path, data: bytes | memoryview) -> None:
    """Writes a file that is there whole or not at all, whenever the process or the machine ends.

    Raises:
        OSError: If it cannot be written; a file that was there stays, and nothing is left beside it.
    """
    partial = target.with_name(target.name + PARTIAL)
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            _sync(file.fileno())
        os.replace(partial, target)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):  # Windows opens no folders, and needs not
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            _sync(folder)
        finally:
            os.close(folder)


def _sync(handle: int) -> None:
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that knows no such thing
            raise


def _is_local(path: str | Path) -> bool:
    scheme = urlsplit(str(path)).scheme
    return len(scheme) < 2 or isinstance(path, Path)  # one letter is a drive
