"""Predictions as a table: one line an image."""

import csv
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

from lightning.pytorch import Callback, LightningModule, Trainer

FIELDS = ("file", "class", "confidence", "exit")


class PredictionWriter(Callback):
    """Writes predictions to a CSV file with the columns file, class, confidence (in [0, 1]) and exit (from 1).

    The rows go to a file beside the output, ``<output>.partial``, which takes the output's name when all is done: a
    file that stands there is whole. Names of files that are no text in any encoding keep their bytes.

    A prediction step takes part by returning a mapping with ``files`` and ``classes`` (lists of text), ``confidence``
    and ``exits`` (tensors, exits from 0), each (batch,).

    Args:
        output: The CSV file; None writes none and only counts.
        overwrite: Whether a file that is there may be replaced.

    Attributes:
        rows: How many predictions there were.

    Raises:
        ValueError: If the output exists and may not be replaced: here, before any image is read.
    """

    def __init__(self, output: str | Path | None = "predictions.csv", overwrite: bool = False) -> None:
        self.output = Path(output) if output is not None else None
        self.overwrite = overwrite
        self.rows = 0
        self._file: TextIO | None = None
        self._refuse()

    def _refuse(self) -> None:
        if self.output is not None and self.output.exists() and not self.overwrite:
            raise ValueError(f"{self.output} exists; name another output, or allow to replace it with overwrite=true")

    @property
    def partial(self) -> Path | None:
        """The unfinished file."""
        return self.output and self.output.with_name(self.output.name + ".partial")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Looks again for what cannot be done."""
        if stage == "predict":
            self._refuse()
            if trainer.world_size > 1:
                raise ValueError(
                    f"predictions are written by one process, there are {trainer.world_size}; set devices=1"
                )

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Opens the unfinished file."""
        self.rows = 0
        if self.partial is not None:
            self.partial.parent.mkdir(parents=True, exist_ok=True)
            # Python reads file names that are not UTF-8 with surrogateescape; so written, they are the same bytes.
            self._file = self.partial.open("w", newline="", encoding="utf-8", errors="surrogateescape")
            self._write([FIELDS])

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Adds a batch's rows."""
        wanted = ("files", "classes", "confidence", "exits")
        if not isinstance(outputs, Mapping) or any(key not in outputs for key in wanted):
            given = ", ".join(map(str, outputs)) if isinstance(outputs, Mapping) else type(outputs).__name__
            raise ValueError(
                f"PredictionWriter needs predict_step to return a mapping with {', '.join(wanted)}; got {given}"
            )
        files, classes, confidences, exits = (outputs[key] for key in wanted)
        rows = list(zip(files, classes, confidences.tolist(), exits.tolist(), strict=True))
        self.rows += len(rows)
        if self._file is not None:
            self._write((file, name, f"{confidence:.4f}", exit + 1) for file, name, confidence, exit in rows)

    def _write(self, rows: Iterable[tuple]) -> None:
        csv.writer(self._file, lineterminator="\n").writerows(rows)  # type: ignore[arg-type]

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gives the finished file its name."""
        if self._file is not None and self.partial is not None and self.output is not None:
            self._file.close()
            self._file = None
            os.replace(self.partial, self.output)
            print(f"{self.rows} predictions in {self.output}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Closes the unfinished file, which stays what it is."""
        if self._file is not None:
            self._file.close()
            self._file = None
