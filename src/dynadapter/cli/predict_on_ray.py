"""Fill a table of predictions by Ray Data, on one machine or several."""

import logging
import os
from collections.abc import Callable
from contextlib import ExitStack
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dynadapter.cli.errors import Failed, Mistake, one_line
from dynadapter.cli.ray_session import ray_session
from dynadapter.serve.predict import NonFinite, check_cap, predict
from dynadapter.serve.table import PredictionTable

if TYPE_CHECKING:
    from dynadapter.serve.bundle import Bundle

Columns = dict[str, NDArray[Any]]
"""Columns of a block of rows, by name."""
READERS = 2
"""Threads of a worker that read images ahead."""
TOGETHER = 8
"""Batches that a worker takes at once, so that images are read ahead."""


class Worker:
    """A worker of Ray Data: loads the network once, and computes the batches whose numbers it gets."""

    def __init__(self, args: list[str], folder: str) -> None:
        self.args, self.folder = args, folder
        self.opened = ExitStack()

    @cached_property
    def parts(self) -> tuple[Any, "Bundle", PredictionTable]:
        """The settings, the network and the table."""
        from dynadapter.cli.imports import import_own
        from dynadapter.cli.predict import parser, prepared

        os.chdir(self.folder)
        import_own()
        given = parser().parse_args(self.args)
        return given, *self.opened.enter_context(prepared(given, number=1))

    def __call__(self, batches: Columns) -> Columns:
        """Compute batches and save them in the table.

        Args:
            batches: ``number``: (batches,), their places in the table.

        Returns:
            The same, with ``error``: (batches,), empty, or what stopped the worker. Ray loses an exception's class.
        """
        try:
            given, bundle, table = self.parts
            predict(
                bundle,
                table,
                top_k=given.top_k,
                probabilities=given.probabilities,
                max_skipped=len(table.files),  # the command counts the images of all workers
                workers=READERS if given.num_workers is None else given.num_workers,
                numbers=[n for n in batches["number"].tolist() if not table.look(n)],  # saved before a retry
            )
            error = ""
        except (NonFinite, Mistake) as found:
            error = str(found)
        except Exception as found:
            error = f"a worker of Ray failed: {one_line(found)}"
        return batches | {"error": np.array([error] * len(batches["number"]))}


def fill_on_ray(given: Any, args: list[str], table: PredictionTable, on_batch: Callable[[], None]) -> None:
    """Compute all batches that a table lacks.

    All machines must see the images, the network and the table under the same paths. Ray gives the batches of a worker
    that ends to another one.

    Args:
        given: The settings: ``processes`` workers, each with a processor and ``gpus``.
        args: The same as arguments of the command.
        table: The table, begun by this process.
        on_batch: Called after each batch.

    Raises:
        TooManyUnread: More than ``max_skipped`` images cannot be read; they are listed in ``table.unread_list``.
        Failed: A worker, or Ray, failed.
    """
    check_cap(table, given.max_skipped)  # of the batches that an earlier run has saved
    if not (todo := [number for number in range(table.batches) if not table.look(number)]):
        return
    with ray_session():
        import ray.data

        for name in ("ray.data", "ray.data._internal"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        ray.data.DataContext.get_current().enable_progress_bars = False
        items = ray.data.from_items([{"number": n} for n in todo], override_num_blocks=-(-len(todo) // TOGETHER))
        done = items.map_batches(
            Worker,
            batch_size=None,  # a block
            fn_constructor_args=(args, os.getcwd()),
            concurrency=given.processes,
            num_gpus=given.gpus or None,
        )
        try:
            for row in done.iter_rows():
                if row["error"]:
                    raise Failed(row["error"])
                if table.look(row["number"]):
                    on_batch()
                check_cap(table, given.max_skipped)
        except ray.exceptions.RayError as error:
            raise Failed(f"Ray stopped: {one_line(error)}") from error
