"""Images of a data set of the library `datasets`: on disk, or on the Hugging Face Hub."""

import importlib.util
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from dynadapter.data.base import Split
from dynadapter.data.classes import sorted_names
from dynadapter.data.folder import SPLITS
from dynadapter.data.library_images import LibraryImages
from dynadapter.data.lists import PathCheck
from dynadapter.data.mapped import MappedData
from dynadapter.data.table import COLUMNS, ONE_LABEL
from dynadapter.files import listed, one_line, shown

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)


class HubDataset(MappedData):
    """A data set of the library ``datasets`` (extra ``datasets``): a folder of its ``save_to_disk``, or one of the Hub.

    No code of a data set is run. Nothing is loaded from the Hub without `download`, which a checkpoint or a run folder
    cannot switch on.

    Class names are those of a ``ClassLabel``, else the labels sorted alphabetically, or by value if all are whole
    numbers. An image has one label. A split that is found by its usual name and has no labels is left out.

    Args:
        path: The folder, or ``OWNER/NAME`` on the Hub.
        config: Name of the configuration of a data set on the Hub that has several.
        revision: Commit, tag or branch on the Hub; None for the newest.
        download: Load the data set from the Hub, or from the cache of an earlier load.
        image_column: Name of the column of images; None for the only one.
        label_column: Name of the column of labels; None finds ``label``, ``class``, ``category``, ``target``, or the
            only ``ClassLabel``.
        train_split: Name of the split for training; None finds ``train`` or ``training``.
        val_split: The same for validation: ``val``, ``valid`` or ``validation``.
        test_split: The same for the test: ``test`` or ``testing``.
        kwargs: As for :class:`~dynadapter.data.mapped.MappedData`.
    """

    validation_switch = "val_fraction above 0, or val_split"

    def __init__(
        self,
        path: str | Path,
        config: str | None = None,
        revision: str | None = None,
        download: bool = False,
        image_column: str | None = None,
        label_column: str | None = None,
        train_split: str | None = None,
        val_split: str | None = None,
        test_split: str | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        if importlib.util.find_spec("datasets") is None:
            raise ValueError("HubDataset needs the package datasets; install it by pip install 'dynadapter[datasets]'")
        self.path = str(path)
        folder = Path(os.path.expanduser(path))
        if folder.is_dir():
            found = _on_disk(folder)
            roots = [folder]
        else:
            found, roots = _on_hub(self.path, config, revision, download)
        self._check = PathCheck(*roots)
        given = {"train": train_split, "val": val_split, "test": test_split}
        self.splits = {split: name for split in given if (name := _split(self.path, split, given[split], found))}
        if not self.splits:
            raise ValueError(f"{self.path} has the splits {listed(found)}; give train_split, val_split or test_split")
        first = next(iter(self.splits.values()))
        self.columns = _columns(self.path, found[first].features, image_column, label_column)
        for split, name in list(self.splits.items()):
            if missing := [column for column in self.columns if column not in found[name].features]:
                if given[split] is None and len(self.splits) > 1:  # such as a test split of a competition
                    del self.splits[split]
                    continue
                raise ValueError(
                    f"{self.path}: split {shown(name)} has no column {missing[0]}; give another {split}_split"
                )
        self._found = found
        _require_one_order(self.path, self.columns[1], {name: found[name].features for name in self.splits.values()})
        labels = {split: list(found[name][self.columns[1]]) for split, name in self.splits.items()}
        self.class_names, self._labels = _classes(found[next(iter(self.splits.values()))], self.columns[1], labels)

    def open_part(self, split: Split) -> LibraryImages | None:
        if split not in self.splits:
            return None
        name = self.splits[split]
        return _Rows(f"{self.path}/{name}", self._labels[split], self._found[name], self.columns[0], self._check)


class _Rows(LibraryImages):
    """The rows of a split."""

    def __init__(self, place: str, labels: list[int], rows: Any, column: str, check: PathCheck) -> None:
        from datasets import Image as Encoded

        self.rows = rows.select_columns([column]).cast_column(column, Encoded(decode=False))
        self.column = column
        self.check = check
        super().__init__(place, labels)

    def fetch(self, index: int) -> Path | bytes | Image.Image:
        value = self.rows[index][self.column]
        if not value:
            raise ValueError("there is no image")
        if value["bytes"] is not None:
            return value["bytes"]
        if self.check.state(Path(value["path"])) == "outside":  # a data set may name any file of this machine
            raise ValueError(f"it names a file outside the data set: {shown(value['path'])}")
        return Path(value["path"])


def _on_disk(folder: Path) -> dict[str, Any]:
    from datasets import Dataset, load_from_disk

    try:
        found = load_from_disk(str(folder))
    except FileNotFoundError as error:
        raise ValueError(
            f"{folder} was not written by save_to_disk of datasets; for folders of images use ImageFolder"
        ) from error
    except Exception as error:  # damaged files fail in many ways
        raise ValueError(f"{folder} cannot be read by datasets: {one_line(error):.300}") from error
    return {"train": found} if isinstance(found, Dataset) else dict(found)


def _on_hub(name: str, config: str | None, revision: str | None, download: bool) -> tuple[dict[str, Any], list[Path]]:
    """Return the splits of a data set on the Hub, and the folders that its files may lie in."""
    if not HUB_NAME.fullmatch(name):
        raise ValueError(f"{shown(name)} is neither a folder nor a name on the Hub, which has the form OWNER/NAME")
    if not download:
        raise ValueError(
            f"{name} is not a folder here; to load the data set of this name from the Hugging Face Hub, give "
            "download: true (--data.download true)"
        )
    import datasets
    from huggingface_hub.constants import HF_HUB_CACHE

    try:
        found = datasets.load_dataset(name, config, revision=revision)
    except Exception as error:  # of the network, the Hub, or the data set
        raise ValueError(
            f"{name} cannot be loaded from the Hub: {type(error).__name__}: {one_line(error):.300}"
        ) from error
    return dict(found), [Path(datasets.config.HF_DATASETS_CACHE), Path(HF_HUB_CACHE)]


def _split(path: str, split: str, given: str | None, found: Mapping[str, Any]) -> str | None:
    if given is not None and given not in found:
        raise ValueError(f"{path} has no split {given!r:.80}; {split}_split may be one of: {listed(found)}")
    return given or next((name for name in found if name.lower() in SPLITS[split]), None)


def _columns(path: str, features: Mapping[str, Any], image: str | None, label: str | None) -> tuple[str, str]:
    """Return the names of the columns of images and labels."""
    from datasets import ClassLabel
    from datasets import Image as Encoded

    for part, given in (("image", image), ("label", label)):
        if given is not None and given not in features:
            raise ValueError(f"{path} has no column {given!r:.80}; {part}_column may be one of: {listed(features)}")
    images = [name for name, feature in features.items() if isinstance(feature, Encoded)]
    if image is None and len(images) != 1:
        raise ValueError(f"{path} has {len(images)} columns of images; set image_column to one of: {listed(features)}")
    image = image or images[0]
    if image not in images:
        raise ValueError(f"{path}: column {image} holds no images; columns of images are: {listed(images) or 'none'}")
    usual = next((name for word in COLUMNS["label"] for name in features if name.lower() == word), None)
    named = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    label = label or usual or (named[0] if len(named) == 1 else None)
    if label is None:
        raise ValueError(f"{path} has no column called label or class; set label_column to one of: {listed(features)}")
    return image, label


def _require_one_order(path: str, column: str, features: Mapping[str, Any]) -> None:
    """Raise a ValueError unless the splits, each with its features, have equal classes in the column of labels."""
    names = {split: getattr(kinds[column], "names", None) for split, kinds in features.items()}  # None: no ClassLabel
    first, *others = names
    for other in others:
        if names[other] != names[first]:
            raise ValueError(
                f"{path}: column {column} has other classes in split {shown(other)} than in split {shown(first)}; cast "
                "both to one ClassLabel (cast_column)"
            )


def _classes(rows: Any, column: str, labels: dict[str, list[Any]]) -> tuple[list[str], dict[str, list[int]]]:
    """Return the class names, and the class index of each image by split."""
    from datasets import ClassLabel, Value

    feature = rows.features[column]
    if isinstance(feature, ClassLabel):
        return list(feature.names), {split: [-1 if k is None else k for k in part] for split, part in labels.items()}
    kind = feature.dtype if isinstance(feature, Value) else "several values"
    if kind == "several values":
        raise ValueError(f"column {column} holds several values; {ONE_LABEL}")
    if not kind.startswith(("int", "uint", "string", "large_string")):
        raise ValueError(f"column {column} holds {kind}; labels are a ClassLabel, text or whole numbers")
    for split, part in labels.items():
        if None in part:
            raise ValueError(f"column {column} has no label for image {part.index(None)} of {split}")
    names = sorted_names({str(label) for part in labels.values() for label in part})
    index = {name: k for k, name in enumerate(names)}
    return names, {split: [index[str(label)] for label in part] for split, part in labels.items()}
