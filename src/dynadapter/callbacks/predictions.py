"""Predictions as a table: one line an image."""

import csv
import os
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

FIELDS = ("file", "class", "confidence", "exit")


class PredictionWriter(Callback):
    """Writes predictions to a CSV file with the columns file, class, confidence (in [0, 1]) and exit (from 1).

    The rows go to a file beside the output, which takes the output's name when all is done: a file that stands there is
    whole. A step takes part by returning a mapping with ``files``, ``classes``, ``confidence`` and ``exits``.

    Args:
        output: The CSV file; None writes none.
        overwrite: Whether a file that is there may be replaced.
    """

    def __init__(self, output: str | None = "predictions.csv", overwrite: bool = False) -> None:
        self.output = Path(output) if output is not None else None
        self.overwrite = overwrite
        self.rows = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses to replace a file before any image is read."""
        if stage != "predict" or self.output is None:
            return
        if self.output.exists() and not self.overwrite:
            raise ValueError(f"{self.output} exists; name another --output, or set --predictions.overwrite=true")
        if trainer.world_size > 1:
            raise ValueError("predictions are written by one process; set --trainer.devices=1")
        self.output.parent.mkdir(parents=True, exist_ok=True)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Opens the unfinished file."""
        self.rows = 0
        if self.output is not None:
            self._partial = self.output.with_name(self.output.name + ".partial")
            self._file = self._partial.open("w", newline="", encoding="utf-8")
            self._writer = csv.writer(self._file)
            self._writer.writerow(FIELDS)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Adds a batch's rows."""
        columns = zip(
            outputs["files"], outputs["classes"], outputs["confidence"].tolist(), outputs["exits"].tolist(), strict=True
        )
        for file, name, confidence, exit in columns:
            self.rows += 1
            if self.output is not None:
                self._writer.writerow((file, name, f"{confidence:.4f}", exit + 1))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gives the finished file its name."""
        if self.output is not None:
            self._file.close()
            os.replace(self._partial, self.output)
            print(f"{self.rows} predictions in {self.output}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Closes the unfinished file; it keeps its name ``.partial``."""
        if getattr(self, "_file", None) is not None:
            self._file.close()
