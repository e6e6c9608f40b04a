"""A folder per class: the layout that people have their own images in."""

from pathlib import Path
from typing import Any

from dynadapter.data.base import ImageData, Sample, Split
from dynadapter.data.splits import hold_out
from dynadapter.images.reading import SUFFIXES, image_files, shown


class ImageFolder(ImageData):
    """Images in ``root/train/CLASS/``, ``root/val/CLASS/`` and ``root/test/CLASS/``, at any depth below.

    Classes are the subfolders of ``train``, sorted; those of ``val`` and ``test`` are matched by name. Without ``val``
    a part of ``train`` is held out, the same share of each class.

    Args:
        root: Folder with ``train`` and, if there are, ``val`` and ``test``.
        val_fraction: Share of the training images held out where ``val`` is missing, in [0, 1); 0 for no validation.
        split_seed: Decides which images are held out.
    """

    validation_switch = "val_fraction above 0, or make a folder 'val'"

    def __init__(self, root: str | Path, val_fraction: float = 0.2, split_seed: int = 0, **kwargs: Any):
        super().__init__(**kwargs)
        if not 0 <= val_fraction < 1:
            raise ValueError(f"val_fraction must lie in [0, 1), not {val_fraction}")
        self.root = Path(root).expanduser()
        self.val_fraction = val_fraction
        self.split_seed = split_seed
        if not self.root.is_dir():
            raise ValueError(f"root {self.root} does not exist or is no folder")
        self.class_names = self._classes("train")
        if not self.class_names:
            raise ValueError(f"{self.root / 'train'} holds no class folder; expected train/CLASS/image.png")

    def samples(self, split: Split) -> list[Sample]:
        if split == "test" or (split == "val" and (self.root / "val").is_dir()):
            return self._listed(split)
        train = self._listed("train")
        if (self.root / "val").is_dir():
            return train
        kept, held = hold_out([label for _, label in train], self.val_fraction, self.split_seed)
        return [train[i] for i in (kept if split == "train" else held)]

    def _classes(self, split: str) -> list[str]:
        folder = self.root / split
        if not folder.is_dir():
            there = _told(subfolders(self.root)) or "no folder"
            raise ValueError(f"{folder} does not exist; expected {split}/CLASS/image.png, but in root are: {there}")
        return subfolders(folder)

    def _listed(self, split: str) -> list[Sample]:
        classes = self._classes(split)
        if unknown := sorted(set(classes) - set(self.class_names)):
            raise ValueError(
                f"{self.root / split} has classes that train has not: {_told(unknown)}; "
                f"train has: {_told(self.class_names)}"
            )
        index = {name: label for label, name in enumerate(self.class_names)}
        found = [(path, index[name]) for name in classes for path in image_files(self.root / split / name)]
        with_images = {label for _, label in found}
        without = [name for name in classes if index[name] not in with_images]
        if not found or (split == "train" and without):
            raise ValueError(
                f"no image in {self.root / split} for: {_told(without) or 'any class'}; "
                f"looked for files ending in {', '.join(SUFFIXES)}"
            )
        return list(found)


def subfolders(folder: Path) -> list[str]:
    """List the names of the folders in a folder, hidden ones left out."""
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _told(names: list[str]) -> str:
    return ", ".join(map(shown, names))
