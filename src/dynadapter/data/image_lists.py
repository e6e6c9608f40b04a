"""Read images from text lists of paths and labels, such as the lists of few-shot benchmarks."""

import os
from pathlib import Path
from typing import Any

from dynadapter.data.base import ImageData, Split
from dynadapter.data.dataset import Sample
from dynadapter.data.lists import listed_classes, listed_files, read_list
from dynadapter.data.splits import MissingSplit


class ImageLists(ImageData):
    """Images in text lists, one per line: ``PATH LABEL``, with labels from 0.

    The few-shot lists of NOAH have this form, such as ``train_meta.list.num_shot_16.seed_0``. An image that is listed
    twice counts twice.

    Args:
        root: Folder of all images; paths are relative to it.
        train: List of the images for training; None without any.
        val: The same for validation.
        test: The same for the test.
        classes: File with one class name per line, in the order of the labels; None for numbers up to the highest
            label.
    """

    validation_switch = "val, the list of its images"

    def __init__(
        self,
        root: str | Path,
        train: str | Path | None = None,
        val: str | Path | None = None,
        test: str | Path | None = None,
        classes: str | Path | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.folder = Path(os.path.expanduser(root))
        if not self.folder.is_dir():
            raise ValueError(f"root {self.folder} does not exist or is not a folder")
        given = {"train": train, "val": val, "test": test}
        files = {split: Path(os.path.expanduser(file)) for split, file in given.items() if file is not None}
        for name, file in (files | ({} if classes is None else {"classes": Path(os.path.expanduser(classes))})).items():
            if not file.is_file():
                raise ValueError(f"{name}: {file} does not exist or is not a file")
        if not files:
            raise ValueError("there is no list; give train, val or test")
        self.lists = {split: read_list(file, self.folder) for split, file in files.items()}
        lines = [line for part in self.lists.values() for line in part]
        self.class_names = listed_classes(lines, None if classes is None else Path(os.path.expanduser(classes)))

    def samples(self, split: Split) -> list[Sample]:
        if split == "val" and split not in self.lists:
            return []
        if split not in self.lists:
            raise MissingSplit(f"{split} has no list; give {split}, a file of lines PATH LABEL")
        lines = self.lists[split]
        files = listed_files(lines, self.folder, missing=self.on_error == "skip")
        return [(file, line.label) for file, line in zip(files, lines, strict=True)]

    def listed(self) -> list[Path]:
        return [self.folder / line.path for lines in self.lists.values() for line in lines]
