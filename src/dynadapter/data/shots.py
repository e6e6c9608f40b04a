"""Few shots: train on k images of each class, drawn by a seed."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dynadapter.data.dataset import Sample
from dynadapter.data.library_images import LibraryImage
from dynadapter.data.splits import draw, path_in


def few_shot(samples: Sequence[Sample], shots: int | None, seed: int, folder: Path | None) -> list[Sample]:
    """Return `shots` images of each class, in the order of `samples`; a class with fewer is returned whole.

    An image is drawn by a hash of its path in `folder`, or of its index in the data set. The draw is therefore the same
    on every machine and does not depend on the order of the files, and the images of k shots are among those of k + 1
    shots.

    Args:
        samples: Pairs (image, class).
        shots: Images of each class; None for all.
        seed: Seed of the draw.
        folder: The folder of all images; None without one.
    """
    if shots is None:
        return list(samples)
    by_class: dict[Any, list[tuple[float, int]]] = {}
    for index, (source, label) in enumerate(samples):
        by_class.setdefault(label, []).append((draw("shots", _name(index, source, folder), seed), index))
    chosen = [index for drawn in by_class.values() for _, index in sorted(drawn)[:shots]]
    return [samples[index] for index in sorted(chosen)]


def _name(index: int, source: Any, folder: Path | None) -> str:
    if not isinstance(source, os.PathLike):
        return str(source.index if isinstance(source, LibraryImage) else index)
    return path_in(source, folder)
