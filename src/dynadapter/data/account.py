"""Count the files of a data module's folder by split."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynadapter.data.dataset import Sample
from dynadapter.images.accounting import Account, account

if TYPE_CHECKING:
    from dynadapter.data.base import ImageData


def account_of(data: "ImageData") -> Account | None:
    """Count the files of a data module's folder by split, and by the reason why they are not read."""
    folder = getattr(data, "folder", None)
    if not isinstance(folder, Path) or not folder.is_dir():
        return None
    splits: tuple[Any, ...] = ("train", "val", "test")
    files: dict[str, list[Path]] = {}
    for split in splits:
        try:
            samples = data.used(split)
        except (ValueError, OSError):  # the split is missing or wrong; it is reported where it is used
            samples = []
        files[split] = _paths(samples)
    unused: dict[str, list[Path]] = {"in other lists": data.listed()}
    if data.shots is not None and files["train"]:
        unused["beyond the shots"] = _paths(data.samples("train"))
    return account(folder, files, data.skipped, unused)


def _paths(samples: Sequence[Sample]) -> list[Path]:
    return [Path(source) for source, _ in samples if isinstance(source, os.PathLike)]
