"""Count the files of a data module's folder by split."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynadapter.data.dataset import Sample
from dynadapter.images.accounting import Account, account

if TYPE_CHECKING:
    from dynadapter.data.base import ImageData


def account_of(data: "ImageData", predict: bool = False) -> Account | None:
    """Count the files of a data module's folder by split, and by the reason why they are not read.

    Args:
        data: The data module.
        predict: Count the files of `predict_images` instead, if that is a folder.

    Returns:
        The counts; None without a folder.
    """
    folder = data.predict_images if predict else getattr(data, "folder", None)
    if not isinstance(folder, str | Path) or not Path(folder).expanduser().is_dir():
        return None
    splits: tuple[Any, ...] = ("predict",) if predict else ("train", "val", "test")
    files: dict[str, list[Path]] = {}
    for split in splits:
        try:
            samples = data.predict_samples() if predict else data.used(split)
        except (ValueError, OSError):  # the split is missing or wrong; it is reported where it is used
            samples = []
        files[split] = _paths(samples)
    unused: dict[str, list[Path]] = {} if predict else {"in other lists": data.listed()}
    if data.shots is not None and not predict and files["train"]:
        unused["beyond the shots"] = _paths(data.samples("train"))
    return account(Path(folder).expanduser(), files, data.skipped, unused)


def _paths(samples: Sequence[Sample]) -> list[Path]:
    return [Path(source) for source, _ in samples if isinstance(source, os.PathLike)]
