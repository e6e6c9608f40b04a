"""Images of the data sets of torchvision."""

import inspect
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torchvision.datasets
from PIL import Image

from dynadapter.data.base import Split
from dynadapter.data.library_images import LibraryImages
from dynadapter.data.mapped import MappedData
from dynadapter.data.table import ONE_LABEL

OURS = ("root", "transform", "target_transform", "transforms", "loader", "is_valid_file", "download")
"""Arguments that are settings of their own, or functions."""
REFUSED = ("LSUN", "LSUNClass", "DatasetFolder", "VisionDataset")
"""LSUN reads an unchecked pickle; the others are bases."""
ONE_AT_A_TIME = threading.Lock()
"""The data sets are not written for threads: FakeData sets the global random state."""
COMPARED = 100
"""Labels of which an item is read for a comparison; an item of each of ImageNet's classes takes many seconds."""


class TorchVisionDataset(MappedData):
    """A data set for classification of ``torchvision.datasets``, such as ``CIFAR100`` or ``Flowers102``.

    Splits follow the arguments of its class: ``train`` (true and false), or ``split`` with ``train``, ``val`` (or
    ``valid``) and ``test``; `splits` names others. A class with neither has only training images. An image has one
    label.

    torchvision reads its own files. A checkpoint or a run folder cannot switch `download` on.

    Args:
        dataset: Name of the class in ``torchvision.datasets``.
        root: Folder of the data sets.
        download: Download files that are missing in `root`.
        args: Further arguments of the class, without root and transforms, such as ``{target_type: category}``.
        splits: Arguments for each split, such as ``{train: {split: trainval}, test: {split: test}}``; None follows the
            class.
        kwargs: As for :class:`~dynadapter.data.mapped.MappedData`.
    """

    def __init__(
        self,
        dataset: str,
        root: str | Path = "data",
        download: bool = False,
        args: dict[str, Any] | None = None,
        splits: dict[str, dict[str, Any]] | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.kind = _kind(dataset)
        self.root = Path(os.path.expanduser(root))
        self.download = download
        self.args = dict(args or {})
        self.splits = _splits(self.kind) if splits is None else splits
        if unknown := self.splits.keys() - {"train", "val", "test"}:
            raise ValueError(f"splits names {min(unknown)!r:.40}; it may name train, val and test")
        for given in (self.args, *self.splits.values()):
            _check_args(self.kind, given)
        first = next((part for split in ("train", "val", "test") if (part := self.part(split)) is not None), None)
        if first is None:
            raise ValueError(f"{dataset} has no images for train, val or test; give splits")
        assert isinstance(first, _Items)
        self.class_names = first.class_names()

    def open_part(self, split: Split) -> "_Items | None":
        if split not in self.splits:
            return None
        known = _parameters(self.kind)
        ours = {name: value for name, value in (("root", self.root), ("download", self.download)) if name in known}
        place = f"{self.kind.__name__}/{split}"
        guessed = split == "val" and self.hparams["splits"] is None
        for given in (self.splits[split], {"split": "valid"})[: 1 + guessed]:
            try:
                return _Items(place, self.kind(**{**self.args, **given, **ours}))
            except Exception as error:  # of any data set
                unknown = isinstance(error, ValueError) and "argument split" in str(error)  # of torchvision's check
                if guessed and unknown:
                    continue
                advice = "; --data.download true fetches it" if "download" in known and not self.download else ""
                if unknown:
                    advice = "; name them, as in splits: {train: {split: trainval}, test: {split: test}}"
                raise ValueError(f"{place} cannot be opened: {' '.join(str(error).split())[:300]}{advice}") from error
        return None


class _Items(LibraryImages):
    """The items of a data set."""

    def __init__(self, place: str, items: Any) -> None:
        self.items = items
        labels, self.named = _labels(place, items)
        super().__init__(place, labels)

    def fetch(self, index: int) -> Path | bytes | Image.Image:
        with ONE_AT_A_TIME:
            image = self.items[index][0]
        if not isinstance(image, Image.Image):
            raise ValueError(f"it is a {type(image).__name__}, not an image")
        return image

    def class_names(self) -> list[str]:
        """Return the class names of the data set, else the numbers up to the highest label."""
        names = getattr(self.items, "classes", None) if self.named else None
        count = max(self.labels, default=0) + 1
        if isinstance(names, list | tuple) and len(names) >= count and all(isinstance(name, str) for name in names):
            return list(names)
        known = getattr(self.items, "num_classes", count)
        return [str(label) for label in range(max(count, known if isinstance(known, int) else 0))]


def _kind(name: str) -> Any:
    """Return the class of a name."""
    short = name.removeprefix("torchvision.datasets.")
    kind = getattr(torchvision.datasets, short, None) if short in torchvision.datasets.__all__ else None
    base = torchvision.datasets.VisionDataset
    if not (isinstance(kind, type) and issubclass(kind, base)) or short in REFUSED:
        raise ValueError(f"torchvision.datasets has no data set {name!r:.80} for classes of images, such as CIFAR100")
    return kind


def _splits(kind: Any) -> dict[str, dict[str, Any]]:
    known = _parameters(kind)
    if "train" in known:
        return {"train": {"train": True}, "test": {"train": False}}
    return {name: {"split": name} for name in ("train", "val", "test")} if "split" in known else {"train": {}}


def _parameters(kind: Any) -> list[str]:
    """Return the names of a class's arguments, including those of its bases if it passes arguments on."""
    names: list[str] = []
    for cls in kind.__mro__:
        parameters = inspect.signature(cls).parameters
        names += [name for name, one in parameters.items() if one.kind is not one.VAR_KEYWORD]
        if len(names) and all(one.kind is not one.VAR_KEYWORD for one in parameters.values()):
            break
    return names


def _check_args(kind: Any, given: Any) -> None:
    """Raise a ValueError for arguments that are unknown, functions, or set by other settings."""
    known = [name for name in _parameters(kind) if name not in OURS]
    if not isinstance(given, dict):
        raise ValueError(f"arguments of {kind.__name__} are names with values, not {given!r:.80}")
    for name, value in given.items():
        if name not in known:
            raise ValueError(f"{kind.__name__} has no argument {name!r:.40} to set; it has: {', '.join(known)}")
        parts = value if isinstance(value, list | tuple) else [value]
        if not all(part is None or isinstance(part, str | int | float | bool) for part in parts):
            raise ValueError(f"{kind.__name__}: {name}={value!r:.80} must be plain values")


def _labels(place: str, items: Any) -> tuple[list[int], bool]:
    """Return the label of each item, and whether the data set's class names can be theirs.

    The data set's list of labels is used if it agrees with its items: it can hold others, such as the breeds of
    OxfordIIITPet where an item has its species. Else all items are read.
    """
    named = True
    with ONE_AT_A_TIME:
        for name in ("targets", "labels", "_labels"):
            given = getattr(items, name, None)
            if given is None or len(given) != len(items):
                continue
            given = given.tolist() if hasattr(given, "tolist") else list(given)
            if _agree(place, given, items):
                return [_label(place, label) for label in given], True
            named = False
        if len(items) and (not isinstance(first := items[0], tuple) or len(first) != 2):
            raise ValueError(f"{place} has no pairs of image and label; it is not a data set for classes of images")
        return [_label(place, items[index][1]) for index in range(len(items))], named


def _agree(place: str, labels: list[Any], items: Any) -> bool:
    """Check whether the first items with each of the first `COMPARED` labels have these labels."""
    first: dict[str, int] = {}
    for index, label in enumerate(labels):
        first.setdefault(str(label), index)
    for index in list(first.values())[:COMPARED]:
        try:
            own = items[index][1]
        except Exception:  # of a damaged image; whoever uses it reports why
            continue
        if labels[index] != _label(place, own):
            return False
    return True


def _label(place: str, label: Any) -> int:
    if np.ndim(label) or isinstance(label, dict | str | bool) or label is None or int(label) != label:
        raise ValueError(f"{place}: a label is {' '.join(str(label).split()):.60}, not a class index; {ONE_LABEL}")
    return int(label)
