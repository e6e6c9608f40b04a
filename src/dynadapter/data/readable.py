"""Leave out unreadable images, and list them."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from dynadapter.data.clips import Clip
from dynadapter.data.dataset import Sample
from dynadapter.images.reading import UnreadableImage, why_unreadable
from dynadapter.images.values import Range


def readable(
    split: str, samples: Sequence[Sample], value_range: Range | None, skipped: dict[str, str], most: int
) -> list[Sample]:
    """Decode every image once and return the samples that can be read.

    This happens before any worker process starts, so that the list of unreadable images is complete.

    Args:
        split: Split of the samples, for messages.
        samples: Pairs (image, class).
        value_range: As in :class:`~dynadapter.images.preprocess.Preprocess`.
        skipped: Reasons by path of unreadable images; those of this split are added.
        most: Greatest allowed number of unreadable images.

    Raises:
        ValueError: No image of the split can be read, or too many cannot.
    """
    with ThreadPoolExecutor() as pool:
        reasons = list(pool.map(partial(_why_unreadable, value_range=value_range), [source for source, _ in samples]))
    broken = {str(source): why for (source, _), why in zip(samples, reasons, strict=True) if why}
    skipped |= broken
    if len(skipped) > most:
        raise ValueError(f"{len(skipped)} images cannot be read, more than max_skipped={most}: {_shortened(skipped)}")
    if len(broken) == len(samples) > 0:
        raise ValueError(f"no image of {split} can be read: {_shortened(broken)}")
    if broken:
        rank_zero_warn(f"{split}: skipped {len(broken)} unreadable image(s): {_shortened(broken)}")
    return [sample for sample, why in zip(samples, reasons, strict=True) if not why]


def _why_unreadable(source: Any, value_range: Range | None) -> str | None:
    if not isinstance(source, Clip):
        return why_unreadable(source, value_range)
    try:
        source.read()
    except UnreadableImage as error:
        return error.reason
    return None


def _shortened(broken: Mapping[str, str]) -> str:
    lines = [f"{path} ({why})" for path, why in broken.items()]
    rest = [f"and {len(lines) - 20} more"] if len(lines) > 20 else []
    return "; ".join(lines[:20] + rest)
