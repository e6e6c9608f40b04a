"""Write the predictions of a Trainer as a table."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from dynadapter.files import replacing
from dynadapter.serve.formats import COLUMNS, Row, check_output, write_table

OUTPUTS = ("files", "classes", "confidence", "exit_index")


class PredictionWriter(Callback):
    """Write predictions to a table with the columns file, class, confidence (in [0, 1]) and exit (from 1).

    The file is written at the end, in one step, by the first process. Of n processes, the process of rank k has images
    k, k + n, k + 2n and so on, as samplers distribute them. Only ``dynadapter predict`` can resume after a kill.

    The prediction step must return a mapping with ``files`` and ``classes`` (lists of text), ``confidence`` and
    ``exit_index`` (tensors, exits from 0), each (batch,).

    Args:
        output: File of the table: ``.csv``, ``.jsonl`` or ``.parquet``; None only counts predictions.
        overwrite: Whether an existing file may be replaced.

    Attributes:
        rows: Number of predictions over all processes.

    Raises:
        ValueError: The output cannot be written. This is checked here, before any image is read.
    """

    def __init__(self, output: str | Path | None = "predictions.csv", overwrite: bool = False) -> None:
        self.output = Path(output) if output is not None else None
        self.overwrite = overwrite
        self.rows = 0
        self._rows: list[Row] = []
        self._check_output()

    def _check_output(self) -> None:
        if self.output is not None:
            check_output(self.output, self.overwrite)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the output again."""
        if stage == "predict":
            self._check_output()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start with an empty table."""
        self.rows, self._rows = 0, []

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Keep a batch's rows."""
        if not isinstance(outputs, Mapping) or any(key not in outputs for key in OUTPUTS):
            given = ", ".join(map(str, outputs)) if isinstance(outputs, Mapping) else type(outputs).__name__
            raise ValueError(
                f"PredictionWriter needs predict_step to return a mapping with {', '.join(OUTPUTS)}; got {given}"
            )
        files, classes, confidences, exits = (outputs[key] for key in OUTPUTS)
        for file, name, confidence, exit in zip(files, classes, confidences.tolist(), exits.tolist(), strict=True):
            sure = confidence if confidence == confidence else None  # NaN
            self._rows.append([file, name, sure, exit + 1])

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the rows of all processes.

        Raises:
            ValueError: The processes do not have every image exactly once, in turn.
        """
        parts = [self._rows]
        if trainer.world_size > 1:
            parts = [[] for _ in range(trainer.world_size)]
            torch.distributed.all_gather_object(parts, self._rows)
        rows = list(interleaved(parts))
        self.rows, self._rows = len(rows), []
        if trainer.is_global_zero and self.output is not None:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.output) as file:
                write_table(file, self.output.suffix, COLUMNS, rows)
            print(f"{self.rows} predictions in {self.output}")
        trainer.strategy.barrier()  # the table is complete when the prediction returns, in every process


def interleaved(parts: Sequence[Sequence[Row]]) -> Iterator[Row]:
    """Yield a row of each part in turn.

    Raises:
        ValueError: A part ends too early; only in the last turn may the last parts have no row.
    """
    short = False
    for turn in zip_longest(*parts):
        rows = [row for row in turn if row is not None]
        if short or turn[: len(rows)] != tuple(rows):
            raise ValueError(
                "the processes have not predicted every image once, in turn; give images by a data module of "
                "dynadapter, or a loader whose samples Lightning distributes"
            )
        short = len(rows) < len(turn)
        yield from rows
