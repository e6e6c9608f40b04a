"""Predictions as a table: one line an image."""

import csv
import glob
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, TextIO

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

FIELDS = ("file", "class", "confidence", "exit")


class PredictionWriter(Callback):
    """Writes predictions to a CSV file with the columns file, class, confidence (in [0, 1]) and exit (from 1).

    The rows go to a file beside the output, ``<output>.partial``, which takes the output's name when all is done: a
    file that stands there is whole. Names of files that are no text in any encoding keep their bytes.

    Several processes write a part each, ``<output>.partial.0`` and so on, on one file system. Of n processes, the one
    of rank k has images k, k + n, k + 2n and so on, as samplers deal them out; in the end the first one puts the rows
    in their order.

    A prediction step takes part by returning a mapping with ``files`` and ``classes`` (lists of text), ``confidence``
    and ``exits`` (tensors, exits from 0), each (batch,).

    Args:
        output: The CSV file; None writes none and only counts.
        overwrite: Whether a file that is there may be replaced.

    Attributes:
        rows: How many predictions there were, over all processes.

    Raises:
        ValueError: If the output exists and may not be replaced: here, before any image is read.
    """

    def __init__(self, output: str | Path | None = "predictions.csv", overwrite: bool = False) -> None:
        self.output = Path(output) if output is not None else None
        self.overwrite = overwrite
        self.rows = 0
        self._file: TextIO | None = None
        self._own: Path | None = None
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

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Opens the unfinished file."""
        self.rows = 0
        if self.partial is not None:
            self.partial.parent.mkdir(parents=True, exist_ok=True)
            self._own = self.partial if trainer.world_size == 1 else self._part(trainer.global_rank)
            self._file = _opened(self._own, "w")
            self._write([FIELDS])

    def _part(self, rank: int) -> Path:
        assert self.partial is not None
        return self.partial.with_name(f"{self.partial.name}.{rank}")

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Adds a batch's rows."""
        wanted = ("files", "classes", "confidence", "exit_index")
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

    def _write(self, rows: Iterable[Iterable[Any]]) -> None:
        csv.writer(self._file, lineterminator="\n").writerows(rows)  # type: ignore[arg-type]

    def _close(self) -> None:
        """Closes the unfinished file once what was written is on the disk."""
        if self._file is not None:
            with self._file as file:
                self._file = None
                file.flush()
                os.fsync(file.fileno())

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gives the finished file its name, put together of those of all processes.

        Raises:
            ValueError: If the parts do not make up one table.
        """
        self._close()
        counted = torch.tensor(self.rows, dtype=torch.int64, device=trainer.strategy.root_device)
        self.rows = int(trainer.strategy.reduce(counted, reduce_op="sum"))  # all parts are whole
        problem = None
        if trainer.is_global_zero and self.partial is not None and self.output is not None:
            try:
                if trainer.world_size > 1:
                    self._put_together(trainer.world_size)
                os.replace(self.partial, self.output)
            except (OSError, ValueError) as error:
                if trainer.world_size == 1:
                    raise
                problem = f"the predictions are not put together: {error}"
            else:
                self._remove_parts()
                print(f"{self.rows} predictions in {self.output}")
        problem = trainer.strategy.broadcast(problem)  # nobody waits for one that has failed
        if problem is not None:
            raise ValueError(problem)

    def _remove_parts(self) -> None:
        """Removes the parts, those of an earlier run with more processes as well."""
        assert self.partial is not None
        for path in self.partial.parent.glob(f"{glob.escape(self.partial.name)}.*"):
            if path.suffix[1:].isdecimal():
                path.unlink()

    def _put_together(self, processes: int) -> None:
        """Writes the rows of all processes in the order of the images."""
        with ExitStack() as stack:
            parts = []
            for path in map(self._part, range(processes)):
                if not path.is_file():
                    raise ValueError(f"{path} is missing; all processes must write to one file system")
                parts.append(csv.reader(stack.enter_context(_opened(path, "r"))))
            for part in parts:
                next(part)  # the header
            assert self.partial is not None
            self._file = stack.enter_context(_opened(self.partial, "w"))
            self._write(chain([FIELDS], _dealt_out(parts)))
            self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Closes the unfinished file, which stays what it is."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _opened(path: Path, mode: str) -> TextIO:
    # Python reads file names that are not UTF-8 with surrogateescape; so written, they are the same bytes.
    return path.open(mode, newline="", encoding="utf-8", errors="surrogateescape")  # type: ignore[return-value]


def _dealt_out(parts: Sequence[Iterable[list[str]]]) -> Iterator[list[str]]:
    """Takes a row of each part in turn; only in the last turn may the last parts have none."""
    short = False
    for turn in zip_longest(*parts):
        rows = [row for row in turn if row is not None]
        if short or turn[: len(rows)] != tuple(rows):
            raise ValueError(
                "the processes have not predicted every image once, in turn; give images by ImagesToPredict, or a "
                "loader whose samples Lightning deals out"
            )
        short = len(rows) < len(turn)
        yield from rows
