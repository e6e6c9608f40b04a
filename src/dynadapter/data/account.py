"""Count the files of a data module's folder by split."""

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynadapter.data.dataset import Sample
from dynadapter.data.test_sets import with_one_test_set
from dynadapter.images.accounting import Account, account

if TYPE_CHECKING:
    from dynadapter.data.base import ImageData


def account_of(data: "ImageData") -> Account | None:
    """Count the files of a data module's folder by split, and by the reason why they are not read."""
    folder = getattr(data, "folder", None)
    if not isinstance(folder, Path) or not folder.is_dir():
        return None
    with data.own_classes():  # `data` may have taken those of a model
        return _account_of(data, folder)


def _account_of(data: "ImageData", folder: Path) -> Account:
    splits: tuple[Any, ...] = ("train", "val", "test")
    files: dict[str, list[Path]] = {}
    for split in splits:
        try:
            samples = data.used(split)
        except (ValueError, OSError):  # the split is missing or wrong; it is reported where it is used
            samples = []
        files[split] = _paths(samples)
    for part in with_one_test_set(data):
        with suppress(ValueError, OSError):
            for other in part.further_tests():  # one may be named from the root, and the folder from here
                places = (os.path.relpath(path, folder) for path in _paths(other.samples("test")))
                files[other.test_label] = [folder / place for place in places]
    unused: dict[str, list[Path]] = {"in other lists": data.listed()}
    if data.shots is not None and files["train"]:
        unused["beyond the shots"] = _paths(data.samples("train"))
    return account(folder, files, data.skipped, unused)


def _paths(samples: Sequence[Sample]) -> list[Path]:
    return [Path(source) for source, _ in samples if isinstance(source, os.PathLike)]
