"""One folder a run: where it is, what it holds, and that no other run ever writes into it."""

import os
import shutil
import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

RUN_FOLDERS = {"fit": "version", "validate": "validate", "test": "test"}
"""How the folder of a run is called below ``trainer.default_root_dir``; the other commands leave none."""

RUN_VARIABLE = "DYNADAPTER_RUN"
"""Tells the processes that Lightning starts beside the first one which folder that one has chosen."""


class SaveConfig(SaveConfigCallback):
    """Writes the whole configuration into the folder of the run."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Writes ``config.yaml``."""
        path = Path(trainer.default_root_dir) / self.config_filename
        path.parent.mkdir(parents=True, exist_ok=True)
        self.parser.save(self.config, path, skip_none=False, overwrite=False, multifile=False)


def loggers(folder: Path) -> list[Logger]:
    """Makes the loggers of a run: ``metrics.csv`` and, for a training, TensorBoard's events."""
    number = folder.name.removeprefix("version_")
    version = int(number) if number.isdigit() else folder.name
    where: dict[str, Any] = {"save_dir": folder.parent, "name": "", "version": version}
    return [CSVLogger(**where), TensorBoardLogger(**where)] if isinstance(version, int) else [CSVLogger(**where)]


def settle(checkpoint: ModelCheckpoint, folder: Path | None) -> None:
    """Lets a training save into its folder; with a ``monitor`` the best and the last one.

    Args:
        checkpoint: As configured.
        folder: Of the run; None leaves the choice to Lightning.
    """
    if checkpoint.dirpath is None and folder is not None:
        checkpoint.dirpath = str(folder / "checkpoints")
    if checkpoint.monitor is None:
        # A training that goes on has a new folder, and only what was best so far would be lost with the old one.
        warnings.filterwarnings("ignore", message="The dirpath has changed from")
    elif checkpoint.filename == "last":
        checkpoint.filename = "best"
        checkpoint.save_last = True


def claim_folder(root: Path, kind: str) -> Path:
    """Makes the next free folder of a kind: ``root/version_0``, ``root/version_1`` ...

    All processes of one training agree on it: those that Lightning starts are told, and those that a launcher starts
    write nothing, since Lightning sends the first one's folder to all.

    Raises:
        ValueError: If ``root`` cannot be a folder.
    """
    if not is_first():
        return Path(os.environ.get(RUN_VARIABLE, root / kind))
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"trainer.default_root_dir={root} cannot be made: {error.strerror}") from error
    taken = [path.name.removeprefix(f"{kind}_") for path in root.glob(f"{kind}_*")]
    number = max((int(name) for name in taken if name.isdigit()), default=-1) + 1
    while True:
        folder = root / f"{kind}_{number}"
        try:
            folder.mkdir()
        except FileExistsError:  # another run has just taken it
            number += 1
        else:
            os.environ[RUN_VARIABLE] = str(folder)
            return folder


def forget(folder: Path) -> None:
    """Removes the folder of a run that failed before it measured or saved anything."""
    started = ("config.yaml", "hparams.yaml", "events.out.tfevents.")
    if is_first() and all(path.name.startswith(started) for path in folder.iterdir()):
        shutil.rmtree(folder)


def is_first() -> bool:
    """Says whether this is the first process, or the only one."""
    return getattr(rank_zero_only, "rank", 0) == 0
