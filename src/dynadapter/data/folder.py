"""Read images from one folder for each class."""

import os
from pathlib import Path
from typing import Any

from dynadapter.data.base import ImageData, Split
from dynadapter.data.classes import positions
from dynadapter.data.dataset import Sample
from dynadapter.data.held_out import HeldOutData
from dynadapter.data.splits import MissingSplit
from dynadapter.data.test_sets import check_test_sets, open_test_sets
from dynadapter.files import listed, shown
from dynadapter.images.reading import SUFFIXES, image_files

SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
"""The names of the splits' folders."""


class ImageFolder(HeldOutData):
    """Images in ``root/train/CLASS/``, ``root/val/CLASS/`` and ``root/test/CLASS/``, at any depth below the class.

    They may also be called ``training``, ``valid``, ``validation`` or ``testing``; case does not matter. Classes are
    the subfolders of ``train``, sorted. Classes of ``val`` and ``test`` are matched by name. Without ``val``, a
    fraction of each class of ``train`` is held out, each image by a hash of its path below the class. Added images
    therefore do not change the split of the others.

    A root without these folders, whose folders all hold images, is read as ``train``: ``root/CLASS/``. A root with only
    ``val`` or ``test`` can be used for evaluation, not for training.

    Args:
        root: Folder with ``train``, ``val`` and ``test``, as far as they exist, or with the classes.
        test_sets: Further test sets by name: folders like `root`. Each is measured after the first as
            ``test/NAME/...``, by its test split, or by all of its images if it has none. Its classes must be among
            those of the training.
        kwargs: As for :class:`~dynadapter.data.held_out.HeldOutData`.
    """

    validation_switch = "val_fraction above 0, or make a folder 'val'"

    def __init__(self, root: str | Path, test_sets: dict[str, str] | None = None, **kwargs: Any):
        super().__init__(**kwargs)
        self.root = Path(os.path.expanduser(root))
        self.test_sets = check_test_sets(test_sets)
        if not self.root.is_dir():
            raise ValueError(f"root {self.root} does not exist or is not a folder")
        self._folders = find_splits(self.root)
        if not self._folders and _subfolders(self.root) and not _without_images(self.root):
            self._folders = {"train": self.root}
        self._whole = False  # whether the test split has the images of all splits
        measured = self._all_classes()
        self.class_names = self._list_classes("train") if "train" in self._folders or not measured else measured
        if wrong := [name for name in self.class_names if name.encode(errors="replace").decode() != name]:
            raise ValueError(
                f"the class folder {shown(wrong[0])} in {self.root} has a name that is not UTF-8, which no bundle can "
                "hold; rename it"
            )
        if not self.class_names:
            raise ValueError(
                f"{self._folder('train')} holds no class folder; expected train/CLASS/image.png{self._taken()}"
            )

    @property
    def folder(self) -> Path:
        """The folder of all images."""
        return self.root

    @property
    def class_folders(self) -> list[Path]:
        """The folders that hold the class folders."""
        return list(self._folders.values())

    def samples(self, split: Split) -> list[Sample]:
        if split == "test" and self._whole:
            return [sample for part in self._folders for sample in self._list_samples(part)]
        if split == "test" or split in self._folders.keys() - {"train"}:
            return self._list_samples(split)
        train = self._list_samples("train")
        if "val" in self._folders:
            return train
        places = [Path(str(path)).relative_to(self._folder("train")) for path, _ in train]
        images = [(place.parts[0], "/".join(place.parts[1:])) for place in places]
        return self.half(split, train, images)

    def further_tests(self) -> list[ImageData]:
        def build(settings: dict[str, Any], place: str) -> ImageFolder:
            other = ImageFolder(**{**settings, "root": place})
            if "test" not in other._folders:
                other._whole, other.class_names = True, other._all_classes()
            return other

        return open_test_sets(self, self.test_sets, build)

    def _all_classes(self) -> list[str]:
        return sorted({name for folder in self._folders.values() for name in _subfolders(folder)})

    def _folder(self, split: str) -> Path:
        return self._folders.get(split, self.root / split)

    def _list_classes(self, split: str) -> list[str]:
        folder = self._folder(split)
        if not folder.is_dir():
            there = listed(_subfolders(self.root)) or "no folder"
            flat, bare = f" or {self.root.resolve().name}/CLASS/image.png" if not self._folders else "", ""
            if flat and len(empty := _without_images(self.root)) < len(_subfolders(self.root)):
                bare = f"; no image directly in: {listed(empty)}" if empty else ""
            expected = f"expected {split}/CLASS/image.png{flat}"
            if flat and not _subfolders(self.root) and (images := len(image_files(self.root))):
                raise MissingSplit(
                    f"{self.root} holds {images:,} image{'s' * (images != 1)} and no folder for each class; "
                    f"{expected}: if it is a class, give the folder that holds it"
                )
            raise MissingSplit(f"{folder} does not exist; {expected}, but root contains: {there}{bare}{self._taken()}")
        return _subfolders(folder)

    def _taken(self) -> str:
        """Return a remark about folders that are taken as splits, but may be classes."""
        bare = [f"{shown(path.name)} as {split}" for split, path in self._folders.items() if not _subfolders(path)]
        if not bare or len(_subfolders(self.root)) == len(self._folders):
            return ""
        return f"; taken as a split: {', '.join(bare)}; if it is a class, move all class folders into a folder train"

    def _list_samples(self, split: str) -> list[Sample]:
        classes = self._list_classes(split)
        labels = dict(zip(classes, positions(classes, self.class_names), strict=True))
        if unknown := [name for name, label in labels.items() if label is None]:
            raise ValueError(
                f"{self._folder(split)} has classes that train does not have: {listed(unknown)}; "
                f"train has: {listed(self.class_names)}"
            )
        index = {name: label for name, label in labels.items() if label is not None}
        found = [(path, index[name]) for name in classes for path in image_files(self._folder(split) / name)]
        with_images = {label for _, label in found}
        without = [name for name in classes if index[name] not in with_images]
        if not found or (split == "train" and without and not self._whole):
            raise ValueError(
                f"no image in {self._folder(split)} for: {listed(without) or 'any class'}; "
                f"looked for files ending in {', '.join(SUFFIXES)}"
            )
        return list(found)


def find_splits(root: Path) -> dict[str, Path]:
    """Return the folders of a root that hold ``train``, ``val`` and ``test``, under any of their names."""
    found: dict[str, Path] = {}
    for name in _subfolders(root):
        split = next((split for split, names in SPLITS.items() if name.lower() in names), None)
        if split is None:
            continue
        if split in found:
            raise ValueError(f"{root} has two folders for {split}: {found[split].name} and {name}; keep one of them")
        found[split] = root / name
    return found


def _without_images(root: Path) -> list[str]:
    """Return the folders in a root that directly hold no image."""
    return [
        name
        for name in _subfolders(root)
        if not any(
            file.suffix.lower() in SUFFIXES and not file.name.startswith(".") for file in (root / name).iterdir()
        )
    ]


def _subfolders(folder: Path) -> list[str]:
    """Return the names of the folders in a folder, without hidden ones."""
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
