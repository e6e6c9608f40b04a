"""One folder a run: where it is, what it holds, and that no other run ever writes into it."""

import csv
import io
import os
import shutil
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only

from dynadapter.training.checkpoints import write

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
        # Half of it would be another configuration, and a training that is taken up again reads it.
        write(path, self.parser.dump(self.config, skip_none=False).encode())


class Metrics(CSVLogger):
    """``metrics.csv`` of a run: whole lines whenever the process ends, and maybe an earlier run's lines first.

    Args:
        earlier: Lines of the run that this one goes on from.
    """

    def __init__(self, earlier: Sequence[dict[str, str]] = (), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.earlier = list(earlier)

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        """The writer, made when it is first asked for."""
        if not isinstance(self._experiment, ExperimentWriter):
            os.makedirs(self.root_dir, exist_ok=True)
            self._experiment = _Lines(self.log_dir)
        return self._experiment

    @rank_zero_only
    def go_on(self) -> None:
        """Writes the earlier lines, before any other."""
        self.experiment.metrics[:0], self.earlier = self.earlier, []
        self.save()


class _Lines(ExperimentWriter):
    """Adds lines in one step each, and puts a new header over all in one step, too."""

    def save(self) -> None:
        """Writes what was logged."""
        if not self.metrics:
            return
        path = Path(self.metrics_file_path)
        try:
            keys = sorted({*self.metrics_keys, *(key for line in self.metrics for key in line)})
            if keys != self.metrics_keys or not path.exists():
                old = read_lines(path) if path.exists() else []
                write(path, _csv([dict(zip(keys, keys, strict=True)), *old, *self.metrics], keys))
                self.metrics_keys = keys
            else:
                data = _csv(self.metrics, keys)
                with path.open("ab", buffering=0) as file:
                    while data:  # less than all is written where the disk is full, and then nothing
                        data = data[file.write(data) :]
        except OSError as error:
            raise OSError(f"{path} cannot be written: {error.strerror or error}") from error
        self.metrics = []


def _csv(lines: Iterable[dict[str, Any]], keys: Sequence[str]) -> bytes:
    text = io.StringIO(newline="")
    csv.DictWriter(text, keys, lineterminator="\n").writerows(lines)
    return text.getvalue().encode()


def read_lines(path: Path) -> list[dict[str, str]]:
    """Reads the whole lines of a ``metrics.csv``, without what is empty; one that a kill has cut off is left out."""
    text = path.read_text(encoding="utf-8")
    reader = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1], newline=""), restkey="")
    whole = [line for line in reader if "" not in line and None not in line.values()]
    return [{key: value for key, value in line.items() if value} for line in whole]


def loggers(folder: Path, earlier: Sequence[dict[str, str]] = ()) -> list[Logger]:
    """Makes the loggers of a run: ``metrics.csv`` and, for a training, TensorBoard's events.

    Args:
        folder: Of the run.
        earlier: Lines of ``metrics.csv`` to begin with.
    """
    number = folder.name.removeprefix("version_")
    version = int(number) if number.isdigit() else folder.name
    where: dict[str, Any] = {"save_dir": folder.parent, "name": "", "version": version}
    lines = Metrics(earlier, **where)
    return [lines, TensorBoardLogger(**where)] if isinstance(version, int) else [lines]


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
    folder = next_folder(root, kind)
    os.environ[RUN_VARIABLE] = str(folder)
    return folder


def next_folder(root: Path, kind: str) -> Path:
    """Makes the next free folder of a kind, for this process alone.

    Raises:
        ValueError: If ``root`` cannot be a folder.
    """
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
            return folder


def forget(folder: Path) -> None:
    """Removes the folder of a run that failed before it measured or saved anything."""
    started = ("config.yaml", "hparams.yaml", "run.json", "events.out.tfevents.")
    if is_first() and all(path.name.startswith(started) for path in folder.iterdir()):
        shutil.rmtree(folder)


def is_first() -> bool:
    """Says whether this is the first process, or the only one."""
    return getattr(rank_zero_only, "rank", 0) == 0
