"""The folder of a run: its path, its loggers and its config file. No other run writes into it."""

import csv
import io
import os
import shutil
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only

from dynadapter.files import READ_ONLY, append, read_bytes, write

RUN_FOLDERS = {"fit": "version", "validate": "validate", "test": "test"}
"""The name of a run's folder below ``trainer.default_root_dir``. ``calibrate`` creates one without a run."""

MOST = 2**30
"""A larger ``metrics.csv`` is not read."""

RUN_VARIABLE = "DYNADAPTER_RUN"
"""The environment variable that passes the first process's folder to those that Lightning starts beside it."""


def create_run_folder(root: Path, kind: str) -> Path:
    """Create the next free run folder: ``root/version_0``, ``root/version_1`` ...

    All processes of one training use one folder. Those that Lightning starts read it from the environment. Those that
    a launcher starts write nothing, because Lightning sends the first process's folder to all.
    """
    if not is_first_process():
        return Path(os.environ.get(RUN_VARIABLE, root / kind))
    folder = next_folder(root, kind)
    os.environ[RUN_VARIABLE] = str(folder)
    return folder


def next_folder(root: Path, kind: str) -> Path:
    """Create the next free folder of a kind, for this process only."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        taken = [path.name.removeprefix(f"{kind}_") for path in root.glob(f"{kind}_*")]
        number = max((int(name) for name in taken if name.isdecimal()), default=-1) + 1
        while True:
            folder = root / f"{kind}_{number}"
            try:
                folder.mkdir()
            except FileExistsError:  # another run has just created it
                number += 1
            else:
                return folder
    except OSError as error:
        if error.errno not in READ_ONLY and root.is_dir():
            raise
        raise ValueError(
            f"trainer.default_root_dir={root} cannot be written: {error.strerror}; give another"
        ) from error


def list_runs(root: Path) -> list[Path]:
    """List the folders of trainings in a folder, the oldest first."""
    runs = [run for run in root.glob("version_*") if run.name.removeprefix("version_").isdecimal()]
    return sorted(runs, key=lambda run: int(run.name.removeprefix("version_")))


def remove_if_empty(folder: Path) -> None:
    """Remove the folder of a run that failed before it measured or saved anything."""
    started = ("config.yaml", "hparams.yaml", "run.json", "validation.txt", "skipped.csv", ".")
    if is_first_process() and all(path.name.startswith(started) for path in folder.iterdir()):
        shutil.rmtree(folder)


def is_first_process() -> bool:
    """Check whether this is the first process of a training, or the only one."""
    return getattr(rank_zero_only, "rank", 0) == 0


def place_checkpoints(checkpoint: ModelCheckpoint, folder: Path | None) -> None:
    """Save checkpoints into the folder of the run; with a ``monitor``, the best and the last one.

    Args:
        checkpoint: As configured.
        folder: Folder of the run; None leaves the choice to Lightning.
    """
    if checkpoint.dirpath is None and folder is not None:
        checkpoint.dirpath = str(folder / "checkpoints")
    if checkpoint.monitor is None:
        # A training that continues has a new folder. Lightning warns that it forgets the best score, and there is none.
        warnings.filterwarnings("ignore", message="The dirpath has changed from")
    elif checkpoint.filename == "last":
        checkpoint.filename = "best"
        checkpoint.save_last = True


class SaveConfig(SaveConfigCallback):
    """Write the whole configuration into the folder of the run."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write ``config.yaml`` atomically: resume would read a partial file as another configuration."""
        path = Path(trainer.default_root_dir) / self.config_filename
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, self.parser.dump(self.config, skip_none=False).encode())


# ---- metrics.csv


def loggers(folder: Path, earlier: Sequence[dict[str, str]] = ()) -> list[Logger]:
    """Return the logger of a run, which writes ``metrics.csv``."""
    number = folder.name.removeprefix("version_")
    version = int(number) if number.isdecimal() else folder.name
    return [Metrics(earlier, save_dir=folder.parent, name="", version=version)]


class Metrics(CSVLogger):
    """``metrics.csv`` of a run; it has only complete lines whenever the process ends."""

    def __init__(self, earlier: Sequence[dict[str, str]] = (), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.earlier = list(earlier)

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        """The writer, created on first use."""
        if not isinstance(self._experiment, ExperimentWriter):
            os.makedirs(self.root_dir, exist_ok=True)
            self._experiment = _LineWriter(self.log_dir)
        return self._experiment

    @rank_zero_only
    def write_earlier(self) -> None:
        """Write the earlier run's lines, before any other."""
        self.experiment.metrics[:0], self.earlier = self.earlier, []
        self.save()


class _LineWriter(ExperimentWriter):
    """Append complete lines, and replace the file atomically if a new metric changes the header."""

    def save(self) -> None:
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
                append(path, _csv(self.metrics, keys))
        except OSError as error:
            raise OSError(f"{path} cannot be written: {error.strerror or error}") from error
        self.metrics = []


def _csv(lines: Iterable[dict[str, Any]], keys: Sequence[str]) -> bytes:
    text = io.StringIO(newline="")
    csv.DictWriter(text, keys, lineterminator="\n").writerows(lines)
    return text.getvalue().encode()


def read_lines(path: Path) -> list[dict[str, str]]:
    """Read the complete lines of a ``metrics.csv``, without empty cells.

    An incomplete last line is left out.

    Raises:
        OSError: The file cannot be read.
        ValueError: The file is damaged.
    """
    try:
        text = read_bytes(path, MOST).decode("utf-8")
        reader = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1], newline=""), restkey="")
        whole = [line for line in reader if "" not in line and None not in line.values()]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is damaged: {error}; repair or delete it") from error
    return [{key: value for key, value in line.items() if value} for line in whole]


def is_numeric(line: Mapping[str, str]) -> bool:
    """Check whether all cells of a line are numbers; a foreign file may hold words."""
    try:
        return all(isinstance(float(cell), float) for cell in line.values())
    except ValueError:
        return False
