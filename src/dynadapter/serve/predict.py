"""Classify many images into a resumable table, in one process or several."""

import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from dynadapter.exits.policies import Policy
from dynadapter.images.preprocess import Preprocess
from dynadapter.images.reading import UnreadableImage
from dynadapter.serve.bundle import Bundle
from dynadapter.serve.formats import COLUMNS, PROBABILITY, Row, Unread
from dynadapter.serve.table import PredictionTable

Pixels = NDArray[np.uint8]
"""(3, size, size)."""


class NonFinite(ValueError):
    """The network's logits for an image are NaN or infinite, so there is no prediction."""


class TooManyUnread(ValueError):
    """More images than allowed cannot be read."""


# ---- rows


def columns(class_names: Sequence[str], top_k: int = 1, probabilities: bool = False) -> tuple[str, ...]:
    """Return the names of a table's columns.

    >>> columns(["ant", "bee"], top_k=2)
    ('file', 'class', 'confidence', 'exit', 'class_2', 'confidence_2')

    Args:
        class_names: Class names of the network.
        top_k: How many classes to name for each image, the most probable first.
        probabilities: Add a column with the probability of each class. A name that occurs again, such as ``crane``
            among those of ImageNet, gets a number: ``probability_crane_2``.
    """
    more = [f"{name}_{k}" for k in range(2, top_k + 1) for name in ("class", "confidence")]
    found = dict[str, None]()  # in order
    for name in class_names if probabilities else ():
        column, number = f"{PROBABILITY}{name}", 1
        while column in found:
            number += 1
            column = f"{PROBABILITY}{name}_{number}"
        found[column] = None
    return (*COLUMNS, *more, *found)


def rows(
    bundle: Bundle, policy: Policy, files: Sequence[str], pixels: Sequence[Pixels], top_k: int, probabilities: bool
) -> list[Row]:
    """Compute a batch's rows.

    Raises:
        NonFinite: Logits of an image are not finite.
    """
    assert bundle.preprocess is not None
    if not files:
        return []
    logits, exit_index = bundle.route(torch.from_numpy(bundle.preprocess.normalize(np.stack(pixels))), policy)
    broken = (~logits.isfinite().all(-1)).nonzero()[:, 0].tolist()
    if broken:
        raise NonFinite(
            f"the logits of {len(broken)} of {len(files)} images are not finite, {files[broken[0]]} among them: the "
            "network's weights are broken or too large for its precision; use another checkpoint or bundle"
        )
    order = logits.argsort(dim=-1, descending=True, stable=True)[:, :top_k].tolist()
    found: list[Row] = []
    for file, values, best, exit in zip(files, logits.softmax(-1).tolist(), order, exit_index.tolist(), strict=True):
        ranked = [part for k in best for part in (bundle.class_names[k], round(values[k], 4))]
        every = [round(value, 6) for value in values] if probabilities else []
        found.append([file, *ranked[:2], exit + 1, *ranked[2:], *every])
    return found


# ---- the run


class _Read(NamedTuple):
    """An image that was read: its pixels (3, size, size) uint8, or None and the reason."""

    file: str
    pixels: Pixels | None
    reason: str


def predict(
    bundle: Bundle,
    table: PredictionTable,
    policy: Policy | None = None,
    *,
    top_k: int = 1,
    probabilities: bool = False,
    max_skipped: int = 10,
    workers: int = 4,
    numbers: Sequence[int] | None = None,
    on_batch: Callable[[], None] = lambda: None,
) -> None:
    """Fill a table with this process's share of the images; the caller then finishes the table.

    Args:
        bundle: The network, with preprocessing.
        table: With the columns that :func:`columns` returns for `top_k` and `probabilities`.
        policy: Policy to use instead of the bundle's own.
        top_k: As in :func:`columns`.
        probabilities: As in :func:`columns`.
        max_skipped: More unreadable images than this are an error.
        workers: Threads that read images ahead; 0 reads each batch when it is due.
        numbers: Batches to compute, which the caller shares out; by default those that no other process has claimed.
        on_batch: Called after each batch.

    Raises:
        NonFinite: The logits of an image are not finite.
        TooManyUnread: More images cannot be read; they are listed in ``table.unread_list``.
    """
    assert bundle.preprocess is not None
    passes: list[tuple[Iterable[int], int]] = [(numbers or (), workers)]
    if numbers is None:  # at the end, take over what another process has claimed and not finished
        passes = [(table.claim(), workers), (table.claim(wait=True), 0)]
    for some, threads in passes:
        with closing(read_batches(bundle.preprocess, table, some, threads)) as batches:
            for number, batch in batches:
                unread = [Unread(read.file, read.reason) for read in batch if read.pixels is None]
                check_cap(table, max_skipped, unread)
                files, pixels = [], []
                for read in batch:
                    if read.pixels is not None:
                        files.append(read.file)
                        pixels.append(read.pixels)
                found: Iterator[Row | Unread] = iter(
                    rows(bundle, policy or bundle.policy, files, pixels, top_k, probabilities)
                )
                skipped: Iterator[Row | Unread] = iter(unread)
                table.save(number, [next(skipped if read.pixels is None else found) for read in batch])
                on_batch()
    check_cap(table, max_skipped)


def check_cap(table: PredictionTable, most: int, unread: Sequence[Unread] = ()) -> None:
    """Compare the number of unreadable images with a limit, and list them if there are more.

    Args:
        table: The table.
        most: The limit.
        unread: Unreadable images that the table does not have yet.

    Raises:
        TooManyUnread: There are more; they are listed in ``table.unread_list``.
    """
    count = table.unread + len(unread)
    if count > most:
        table.list_unread(unread)
        raise TooManyUnread(f"{count} images cannot be read, more than max_skipped={most}")


def read_batches(
    preprocess: Preprocess, table: PredictionTable, numbers: Iterable[int], workers: int
) -> Generator[tuple[int, list[_Read]]]:
    """Read batches ahead of their use.

    Yields:
        The number of a batch, and its images in order.
    """

    def read(file: str) -> _Read:
        try:
            return _Read(file, preprocess.read(file), "")
        except UnreadableImage as error:
            return _Read(file, None, error.reason)

    if not workers:
        for number in numbers:
            yield number, [read(file) for file in table.batch(number)]
        return
    pool = ThreadPoolExecutor(workers)  # Pillow decodes outside the interpreter lock
    try:
        pending: deque[tuple[int, list[Future[_Read]]]] = deque()
        ahead = max(2, math.ceil(2 * workers / table.batch_size))
        for number in numbers:
            pending.append((number, [pool.submit(read, file) for file in table.batch(number)]))
            if len(pending) > ahead:
                first, futures = pending.popleft()
                yield first, [future.result() for future in futures]
        while pending:
            first, futures = pending.popleft()
            yield first, [future.result() for future in futures]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
